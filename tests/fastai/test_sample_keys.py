"What names a sample of fastai's data: not its label, not unused columns, not where the folder lies."

import random, shutil
import numpy as np
import pandas as pd
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
from fastai.basics import DataLoaders, Pipeline, noop
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import (
    ColReader,
    IndexSplitter,
    ItemGetter,
    get_image_files,
    parent_label,
)
from fastai.learner import Learner
from fastai.tabular.all import (
    Categorify,
    FillMissing,
    Normalize,
    TabularDataLoaders,
    tabular_learner,
)
from fastai.vision.all import FlipItem, ImageBlock, Resize
from PIL import Image
from torch import nn
from fastdistill.fastai import (
    DistillError,
    KnowledgeDistillation,
    TeacherCache,
    cache_teacher,
    verify_cache,
)
from fastdistill.fastai.cache_feed import StoredOutputs
from fastdistill.fastai.sample_keys import item_keys, key_root, paths_in

pytestmark = pytest.mark.filterwarnings(
    *apps.FASTAI_WARNINGS, 'ignore:__array__ implementation:DeprecationWarning'
)


class Flat(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.l = nn.Linear(8 * 8 * 3, 2)

    def forward(self, x):
        return self.l(x.flatten(1))


@pytest.fixture
def folder(tmp_path):
    g = np.random.default_rng(0)
    for i in range(24):
        p = tmp_path / 'data' / 'ab'[i % 2] / f'{i:02}.png'
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(p)
    return tmp_path / 'data'


def images(folder, keep=lambda p: True, **kwargs):
    "As people write it: the folder is the source, and the DataLoaders' own path stays '.'"
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=['a', 'b'])),
        get_items=lambda f: sorted(get_image_files(f).filter(keep)),
        get_y=parent_label,
        splitter=IndexSplitter(range(4)),
        item_tfms=[Resize(8), FlipItem()],
    )
    return block.dataloaders(folder, bs=4, num_workers=0, **kwargs)


def quiet(learn, source):
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=KnowledgeDistillation(source))


def write(dls, path, **kwargs):
    return cache_teacher(Flat().eval(), dls, path, check=False, **kwargs)


def test_a_cache_fits_after_its_folder_of_images_was_moved(folder, tmp_path):
    write(images(folder), tmp_path / 'c')
    assert str(images(folder).path) == '.'
    shutil.move(folder, tmp_path / 'elsewhere' / 'pictures')
    quiet(Learner(images(tmp_path / 'elsewhere' / 'pictures'), Flat(1)), tmp_path / 'c')


def test_a_cache_fits_images_whose_paths_were_relative_when_it_was_written_or_are_now(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(images('data'), tmp_path / 'c')
    shutil.move(folder, tmp_path / 'pictures')
    for f in ('pictures', tmp_path / 'pictures'):
        quiet(Learner(images(f), Flat(1)), tmp_path / 'c')
    write(images(tmp_path / 'pictures'), tmp_path / 'd')
    quiet(Learner(images('pictures'), Flat(1)), tmp_path / 'd')


def named_by_texts(folder, form, keep=lambda p: True, **kwargs):
    "Items that are not Path objects, as people read them from a csv"
    get_x, get_y = (noop, parent_label) if form is str else (ItemGetter(0), ItemGetter(1))
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=['a', 'b'])),
        get_items=lambda f: [form(p) for p in sorted(get_image_files(f).filter(keep))],
        get_x=get_x,
        get_y=get_y,
        splitter=IndexSplitter(range(4)),
        item_tfms=Resize(8),
    )
    return block.dataloaders(folder, bs=4, num_workers=0, **kwargs)


@pytest.mark.parametrize('form', [str, lambda p: (str(p), p.parent.name)], ids=['text', 'tuple'])
def test_a_cache_of_images_that_texts_name_fits_after_their_folder_was_moved(
    folder, tmp_path, monkeypatch, form
):
    cache = write(named_by_texts(folder, form), tmp_path / 'c')
    new = shutil.move(folder, tmp_path / 'elsewhere' / 'pictures')
    quiet(Learner(named_by_texts(new, form), Flat(1)), tmp_path / 'c')
    quiet(Learner(named_by_texts(new, form, path=new), Flat(1)), cache)
    quiet(
        Learner(named_by_texts(new, form, keep=lambda p: p.parent.name == 'b'), Flat(1)), cache
    )  # a part of them
    monkeypatch.chdir(new.parent)
    quiet(Learner(named_by_texts('pictures', form), Flat(1)), cache)
    shutil.move(new / 'a', new / 'c')
    with pytest.raises(DistillError, match='samples have no row'):
        quiet(Learner(named_by_texts(new, form), Flat(1)), cache)


def test_a_text_that_is_no_file_stays_a_samples_whole_name():
    class Loader:
        dataset = ['a/b', 'a/c']

    assert paths_in(Loader) == []


def column(folder):
    files = sorted(get_image_files(folder))
    table = pd.DataFrame(
        dict(
            file=[p.relative_to(folder).as_posix() for p in files],
            kind=[p.parent.name for p in files],
        )
    )
    return table, dict(get_x=ColReader('file', pref=folder), get_y=ColReader('kind'))


def column_by_number(folder):
    table, _ = column(folder)
    return table, dict(get_x=ColReader(0, pref=f'{folder}/'), get_y=ColReader(1))


def numbers(folder):
    files = sorted(get_image_files(folder))
    return list(range(len(files))), dict(
        get_x=lambda i: files[i], get_y=lambda i: files[i].parent.name
    )


@pytest.mark.parametrize('source', [column, column_by_number, numbers])
def test_replaced_images_are_found_also_where_a_column_or_get_x_names_them(
    folder, tmp_path, source
):
    def dls():
        items, readers = source(folder)
        block = DataBlock(
            (ImageBlock, CategoryBlock(vocab=['a', 'b'])),
            splitter=IndexSplitter(range(4)),
            item_tfms=Resize(8),
            **readers,
        )
        return block.dataloaders(items, bs=4, num_workers=0)

    write(dls(), tmp_path / 'c')
    replaced = sorted(get_image_files(folder))[9]  # not among the samples whose inputs are compared
    Image.new('RGB', (8, 8)).save(replaced)
    for use in (
        lambda: write(dls(), tmp_path / 'c'),
        lambda: quiet(Learner(dls(), Flat(1)), tmp_path / 'c'),
    ):
        with pytest.raises(
            DistillError,
            match=f'1 of 20 files changed since the cache was written: .*{replaced.name}',
        ):
            use()


@pytest.mark.parametrize('source', ['tuples', 'table'])
def test_replaced_files_of_a_second_input_are_found(folder, tmp_path, source):
    files = sorted(get_image_files(folder))
    pairs = [(p, q, p.parent.name) for p, q in zip(files[:12], files[12:])]

    class Both(nn.Module):
        def forward(self, a, b):
            return (a - b).flatten(1)[:, :2]

    def dls():
        items, reader = pairs, ItemGetter
        if source == 'table':
            items, reader = pd.DataFrame(pairs), ColReader
        block = DataBlock(
            (ImageBlock, ImageBlock, CategoryBlock(vocab=['a', 'b'])),
            n_inp=2,
            get_x=[reader(0), reader(1)],
            get_y=reader(2),
            splitter=IndexSplitter(range(2)),
            item_tfms=Resize(8),
        )
        return block.dataloaders(items, bs=4, num_workers=0)

    store = lambda: cache_teacher(Both(), dls(), tmp_path / 'c', check=False)
    store()
    store()  # nothing has changed
    replaced = pairs[5][1]  # not among the samples whose inputs are compared
    Image.new('RGB', (8, 8)).save(replaced)
    with pytest.raises(DistillError, match=f'1 of 10 files changed .*{replaced.name}'):
        store()


def test_a_file_that_get_x_draws_at_random_is_not_taken_for_a_samples_own(folder, tmp_path):
    files = sorted(get_image_files(folder))
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=['a', 'b'])),
        get_x=lambda i: random.choice(files),
        get_y=lambda i: 'ab'[i % 2],
        splitter=IndexSplitter(range(4)),
        item_tfms=Resize(8),
    )
    for _ in range(2):
        write(block.dataloaders(list(range(24)), bs=4, num_workers=0), tmp_path / 'c')
    assert not (tmp_path / 'c' / 'files.bin').exists()


def test_a_part_of_a_moved_folder_finds_its_rows(folder, tmp_path):
    cache = write(images(folder), tmp_path / 'c')
    shutil.move(folder, tmp_path / 'moved')
    part = images(
        tmp_path / 'moved', keep=lambda p: p.parent.name == 'b'
    )  # its files have another folder in common
    assert key_root(part).endswith('moved/b')
    quiet(Learner(part, Flat(1)), tmp_path / 'c')
    quiet(Learner(images(tmp_path / 'moved', path=tmp_path / 'moved'), Flat(1)), cache)


def test_keys_that_were_given_are_remembered_by_the_cache_that_comes_back(folder, tmp_path):
    name = lambda p: p.stem
    cache = write(images(folder), tmp_path / 'c', keys=name)
    quiet(Learner(images(folder), Flat(1)), cache)
    with pytest.raises(
        DistillError,
        match=r'or it was written with keys=, so the same names are needed here: TeacherCache\(path, keys=',
    ):
        quiet(Learner(images(folder), Flat(1)), tmp_path / 'c')
    learn = Learner(images(folder), Flat(1))
    with learn.no_bar(), learn.no_logging():
        learn.distill(TeacherCache(tmp_path / 'c', keys=name), 1)


def table(n=40):
    g = np.random.default_rng(0)
    return pd.DataFrame(
        dict(
            long=g.normal(size=n),
            kind=g.choice(['x', 'y'], n),
            note=[f'note {i}' for i in range(n)],
            y=g.choice(['no', 'yes'], n),
        )
    )


def tabular(df):
    return TabularDataLoaders.from_df(
        df,
        procs=[Categorify, FillMissing, Normalize],
        cat_names=['kind'],
        cont_names=['long'],
        y_names='y',
        y_block=CategoryBlock(),
        valid_idx=list(range(8)),
        bs=8,
    )


def test_the_key_of_a_tables_row_depends_neither_on_its_label_nor_on_unused_columns(tmp_path):
    df = table()
    dls, teacher = tabular(df), tabular_learner(tabular(df), layers=[8])
    cache_teacher(teacher, dls, tmp_path, check=False)
    other = df.assign(note='corrected', y=df.y.map(dict(no='yes', yes='no')))
    quiet(tabular_learner(tabular(other), layers=[4]), tmp_path)
    with pytest.raises(DistillError, match='32 of 32 samples have no row'):
        quiet(
            tabular_learner(tabular(df.assign(long=df.long[::-1].to_numpy())), layers=[4]), tmp_path
        )


def test_rows_of_a_dataframe_of_images_are_known_by_the_column_that_is_read(folder):
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=ColReader('file'),
        get_y=ColReader('y'),
        splitter=IndexSplitter([0]),
    )
    files = sorted(map(str, get_image_files(folder)))
    df = pd.DataFrame(dict(file=files[:4], y=['a', 'b', 'a', 'b'], note=''))
    keys = lambda df: item_keys(Loader(block.datasets(df).train), None, '')
    assert len(keys(df)) == 3 and (keys(df) == keys(df.assign(y='a', note='x'))).all()
    assert (keys(df) != keys(df.assign(file=files[4:8]))).all()


def two_folders(tmp_path, equal):
    "Two folders with files of the same names"
    g = np.random.default_rng(0)
    for i in range(8):
        a, b = g.integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
        for k, o in dict(a=a, b=a if equal else b).items():
            (tmp_path / k).mkdir(parents=True, exist_ok=True)
            Image.fromarray(o).save(tmp_path / k / f'{i}.png')
    return images(tmp_path)


@pytest.mark.parametrize('views', [0, 2])
def test_different_files_of_one_name_are_refused_and_both_named(tmp_path, views):
    dls = two_folders(tmp_path / 'data', equal=False)
    with pytest.raises(
        DistillError,
        match=r"Samples \d+ \(.*a/(\d).png'\)\) and \d+ \(.*b/\1.png'\)\) have the same key, but different",
    ):
        write(dls, tmp_path / 'c', views=views, keys=lambda p: p.name)
    assert not (tmp_path / 'c').exists()
    quiet(Learner(dls, Flat(1)), write(dls, tmp_path / 'c', views=views))


@pytest.mark.parametrize('views', [0, 2])
def test_copies_of_a_file_may_share_a_name(tmp_path, views):
    dls = two_folders(tmp_path / 'data', equal=True)
    quiet(Learner(dls, Flat(1)), write(dls, tmp_path / 'c', views=views, keys=lambda p: p.name))


PIXELS = {
    name: np.full((8, 8, 3), i, np.uint8) for i, name in enumerate('abcdefghijklmnopqrstuvwx')
}


def by_functions_of_rows(df, get_x):
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=['no', 'yes'])),
        get_x=get_x,
        get_y=lambda row: row.y,
        splitter=IndexSplitter(range(4)),
    )
    return block.dataloaders(df, bs=4, num_workers=0)


def labels_of_letters():
    return pd.DataFrame(dict(y=['no', 'yes', 'no'] * 8), index=list(PIXELS))


def test_a_row_that_its_label_in_the_index_identifies_finds_its_own_outputs(tmp_path):
    "The columns of many rows are equal: only the index tells them apart"
    pixels = lambda row: PIXELS[row.name]
    df, net = labels_of_letters(), Flat().eval()
    cache = cache_teacher(
        net, by_functions_of_rows(df, pixels), tmp_path / 'c', 0, 'float32', check=False
    )
    shuffled = pd.concat([df[:4], df[4:].sample(frac=0.6, random_state=0)])
    dls = by_functions_of_rows(shuffled, pixels)
    own = StoredOutputs(cache).plan(dls, dls.train, cache, None).at
    live = [net(torch.tensor(PIXELS[k]).permute(2, 0, 1)[None] / 255) for k in shuffled.index[4:]]
    torch.testing.assert_close(cache.outputs(own).logits, torch.cat(live), rtol=1e-4, atol=1e-4)
    renamed = df.rename(index=dict(x='another'))
    with pytest.raises(DistillError, match='1 of 20 samples have no row'):
        quiet(Learner(by_functions_of_rows(renamed, lambda row: PIXELS['a']), Flat(1)), cache)


def test_rows_that_only_their_number_tells_apart_are_refused(tmp_path):
    df = labels_of_letters().reset_index(drop=True)
    dls = by_functions_of_rows(df, lambda row: [*PIXELS.values()][row.name])
    with pytest.raises(DistillError, match='Samples .* have the same key, but different inputs'):
        write(dls, tmp_path / 'c', views=0)


def test_a_name_that_is_unique_among_written_samples_only_is_refused_in_training(tmp_path):
    df, name = labels_of_letters(), lambda row: row.name[0]
    pixels = lambda row: PIXELS[row.name[0]] + len(row.name) - 1
    cache = write(by_functions_of_rows(df, pixels), tmp_path, views=0, keys=name)
    for twice, fine in (df[4:], True), (df[4:].rename(index=lambda k: k + '2'), False):
        dls = by_functions_of_rows(pd.concat([df, twice]), pixels)
        if fine:
            quiet(Learner(dls, Flat(1)), cache)
        else:
            with pytest.raises(DistillError, match='have the same key, but different inputs'):
                quiet(Learner(dls, Flat(1)), cache)


def test_each_input_of_a_row_counts(tmp_path):
    "One is read from a column, the other by a function"
    df = labels_of_letters().assign(a=PIXELS['a'].tobytes(), b=list(PIXELS))
    block = DataBlock(
        (ImageBlock, ImageBlock, CategoryBlock(vocab=['no', 'yes'])),
        getters=[
            Pipeline([ColReader('a'), lambda o: np.frombuffer(o, np.uint8).reshape(8, 8, 3)]),
            lambda row: PIXELS[row.b],
            lambda row: row.y,
        ],
        n_inp=2,
        splitter=IndexSplitter(range(4)),
    )
    assert len({*item_keys(Loader(block.datasets(df).train), None, '')}) == 20


def test_a_replaced_file_that_a_function_of_a_row_names_is_found(folder, tmp_path):
    files = sorted(get_image_files(folder))
    df = pd.DataFrame(
        dict(place=[p.relative_to(folder).as_posix() for p in files], y=['no', 'yes'] * 12)
    )
    dls = lambda: by_functions_of_rows(df, lambda row: folder / row.place)
    write(dls(), tmp_path / 'c', views=0)
    repaint(files[9:10])
    with pytest.raises(DistillError, match=f'1 of 20 files changed .*{files[9].name}'):
        quiet(Learner(dls(), Flat(1)), tmp_path / 'c')


def test_a_row_of_categories_does_not_get_the_outputs_of_another_category(tmp_path):
    "Categories are numbered among those that the table has"
    df = pd.DataFrame(dict(kind=[*'abcd'] * 5, y=['no', 'yes'] * 10))
    dls = lambda df: TabularDataLoaders.from_df(
        df,
        procs=[Categorify],
        cat_names=['kind'],
        y_names='y',
        y_block=CategoryBlock(vocab=['no', 'yes']),
        valid_idx=list(range(4)),
        bs=4,
    )
    of = dls(df)
    cache = cache_teacher(tabular_learner(of, layers=[8]), of, tmp_path, 0, check=False)
    part = dls(df[df.kind != 'a'].reset_index(drop=True))
    at = StoredOutputs(cache).plan(part, part.train, cache, None).at
    kinds = df.kind[4:].to_numpy()
    assert [*kinds[at]] == [part.train.classes['kind'][c] for c in part.train.dataset.items.kind]


def test_a_list_of_names_does_not_fit_another_split_of_the_same_size(tmp_path):
    def dls(first):
        block = DataBlock(
            (ImageBlock, CategoryBlock(vocab=['a', 'b'])),
            get_x=lambda i: np.full((8, 8, 3), i, np.uint8),
            get_y=lambda i: 'ab'[i % 2],
            splitter=IndexSplitter(range(first, first + 4)),
        )
        return block.dataloaders(list(range(24)), bs=4, num_workers=0)

    names = [f'number {i}' for i in range(4, 24)]
    cache = write(dls(0), tmp_path, views=0, keys=names)
    quiet(Learner(dls(0), Flat(1)), cache)
    other = [f'number {i}' for i in range(24) if not 2 <= i < 6]
    with pytest.raises(
        DistillError, match='has different samples or a different order .* at position 0'
    ):
        quiet(Learner(dls(2), Flat(1)), cache)
    with pytest.raises(DistillError, match='2 of 20 samples have no row'):
        quiet(Learner(dls(2), Flat(1)), TeacherCache(tmp_path, keys=other))
    with pytest.raises(DistillError, match='19 keys for 20 samples: give one for each'):
        quiet(Learner(dls(0), Flat(1)), TeacherCache(tmp_path, keys=names[1:]))


def test_a_shuffled_table_whose_rows_are_named_by_position_is_refused(tmp_path):
    df = labels_of_letters().reset_index(names='letter')
    position = lambda row: int(row.name)
    dls = lambda df: by_functions_of_rows(df, lambda row: PIXELS[row.letter])
    write(dls(df), tmp_path, views=0, keys=position)
    cache = TeacherCache(tmp_path, keys=position)
    quiet(Learner(dls(df[:12]), Flat(1)), cache)
    removed = pd.concat([df[:4], df[5:]]).reset_index(drop=True)
    with pytest.raises(DistillError, match='has the input that sample .* had when the cache was w'):
        quiet(Learner(dls(removed), Flat(1)), cache)


def test_a_function_that_names_items_fits_any_split(tmp_path):
    "It gets the same item where the cache is written, where it is verified and where it is used"
    got = []

    def name(row):
        got.append(type(row).__name__)
        return f'{row.name} {row.y}'

    df, pixels = labels_of_letters(), lambda row: PIXELS[row.name]
    cache = write(by_functions_of_rows(df, pixels), tmp_path, views=0, keys=name, valid=True)
    quiet(Learner(by_functions_of_rows(df[4:], pixels), Flat(1)), TeacherCache(tmp_path, keys=name))
    verify_cache(cache, Flat().eval(), by_functions_of_rows(df, pixels))
    assert {*got} == {'Series'}


def test_a_function_cannot_name_samples_that_do_not_show_their_items(tmp_path):
    class Hidden(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return torch.zeros(3, 8, 8), 0

    dls = DataLoaders.from_dsets(Hidden(), Hidden(), bs=4, num_workers=0, device='cpu')
    with pytest.raises(DistillError, match='keys= is a function of an item, but a Hidden does not'):
        write(dls, tmp_path, keys=lambda o: 'a', kind='softmax')


def test_names_that_can_be_read_only_once_are_refused(folder, tmp_path):
    keys = (str(i) for i in range(8))
    with pytest.raises(DistillError, match='keys= is of type generator, which has no length'):
        write(images(folder), tmp_path, keys=keys)
    assert len(list(keys)) == 8


class Loader:
    "What `item_keys` reads of a DataLoader"

    def __init__(self, dataset):
        self.dataset = dataset


def test_calls_of_distill_with_a_folder_continue_through_the_views(folder, tmp_path):
    from fastdistill.fastai.learner_notes import notes_of

    write(images(folder), tmp_path / 'c', views=3)
    learn = Learner(images(folder), Flat(1))
    for n in (1, 2, 3):
        with learn.no_bar(), learn.no_logging():
            learn.distill(str(tmp_path / 'c'), 1)
        assert list(notes_of(learn).passed_epochs.values()) == [n]
    write(images(folder), tmp_path / 'd', views=3)
    with learn.no_bar(), learn.no_logging():
        learn.distill(str(tmp_path / 'd'), 1)
    assert sorted(notes_of(learn).passed_epochs.values()) == [1, 3]


def repaint(files):
    "Other pictures of the same size in bytes or not, under the same names"
    g = np.random.default_rng(1)
    for p in files:
        Image.fromarray(g.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(p)


def test_files_that_were_replaced_under_the_same_names_are_found_and_named(folder, tmp_path):
    write(images(folder), tmp_path / 'c', views=2)
    write(images(folder), tmp_path / 'c', views=2)
    repaint(sorted(get_image_files(folder))[6:9])
    with pytest.raises(
        DistillError, match=r'3 of 20 files changed since the cache was written: .*12.png'
    ):
        write(images(folder), tmp_path / 'c', views=2)
    with pytest.raises(DistillError, match='3 of 20 files changed since'):
        quiet(Learner(images(folder), Flat(1)), tmp_path / 'c')
    with pytest.warns(match='3 of 20 files changed'):
        write(images(folder), tmp_path / 'c', views=2, force=True)
    quiet(Learner(images(folder), Flat(1)), tmp_path / 'c')


def test_files_with_a_new_time_and_the_same_content_fit(folder, tmp_path):
    write(images(folder), tmp_path / 'c')
    for p in get_image_files(folder):
        p.touch()
    quiet(Learner(images(folder), Flat(1)), tmp_path / 'c')
    write(images(folder), tmp_path / 'c')


def test_many_views_without_a_random_transform_are_one(folder, tmp_path):
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=IndexSplitter(range(4)),
        item_tfms=Resize(8, method='squish'),
    )
    dls = block.dataloaders(folder, bs=4, num_workers=0)
    with pytest.warns(
        match='views=8, but all views of a sample are the same: there is no random transform. One view is stored.'
    ):
        cache = write(dls, tmp_path / 'c', views=8)
    assert cache.views == 1 and write(images(folder), tmp_path / 'd', views=3).views == 3


def test_a_table_has_one_view(tmp_path):
    dls = tabular(table())
    with pytest.warns(match='One view is stored'):
        assert (
            cache_teacher(
                tabular_learner(dls, layers=[8]), dls, tmp_path, views=3, check=False
            ).views
            == 1
        )
