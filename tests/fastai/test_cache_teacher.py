"The teacher runs once: what is stored is what it would say, live, about the very batch that the student sees."

import json, random, warnings
from functools import partial
import numpy as np
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
import processes
from fastai.basics import (
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    TfmdDL,
    Transform,
    noop,
    rank_distrib,
)
from fastai.callback.mixup import MixUp
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from fastai.text.all import TextBlock
from fastai.data.all import (
    CategoryBlock,
    DataBlock,
    IndexSplitter,
    IntToFloatTensor,
    MultiCategoryBlock,
    RegressionBlock,
    TfmdLists,
    ToTensor,
)
from fastai.vision.all import (
    FlipItem,
    ImageBlock,
    MaskBlock,
    Normalize,
    PILImage,
    PILMask,
    PointBlock,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    Rotate,
    TensorImage,
    Zoom,
    aug_transforms,
    imagenet_stats,
)
from torch import nn
from fastdistill.cache import TeacherCache, cache_dataset, write_cache
from fastdistill.fastai.cache_data import cache_teacher as checked_first, verify_cache
from fastdistill.fastai import KnowledgeDistillation, kd, recipes
from fastdistill.fastai.cache_feed import StoredOutputs
from fastdistill.fastai.learner_notes import notes_of
from fastdistill.fastai.sampled_batches import sampled
from fastdistill.fastai.teacher_targets import samples_of
from fastdistill.fastai.transforms import Replay
from fastdistill.base.outputs import DistillError, DistillWarning, Outputs, as_dense
from fastdistill.base.task import Task
from fastdistill.recipes.batch_tensors import all_classes
from fastdistill.features import Taps
from fastdistill.fastai.teachers import teacher_of
from fastdistill.teachers import Teacher
import cached
from cached import (
    AUGMENT,
    CROPS,
    Convs,
    IMAGES,
    N,
    SIZE,
    TRAIN,
    cache_teacher,
    data,
    image,
    label,
    mask,
    noise,
    quiet,
    state_of,
    student,
)


pytestmark = pytest.mark.filterwarnings(
    *apps.FASTAI_WARNINGS, 'ignore:__array__ implementation:DeprecationWarning'
)


def labels(i):
    return ['abc'[i % 3], 'de'[i % 2]]


def points(i):
    return np.random.default_rng(i).uniform(2, 28, (4, 2)).tolist()


def test_a_module_and_data_without_a_loss_function_need_a_kind(tmp_path):
    items = [(torch.zeros(4), torch.tensor(0)), (torch.ones(4), torch.tensor(1))]
    dls = DataLoaders.from_dsets(items, items, bs=2, device='cpu')
    with pytest.raises(
        DistillError, match=r"no loss function .*: pass kind='softmax' .*\(numbers\)\.$"
    ):
        checked_first(nn.Linear(4, 2), dls, tmp_path / 'targets')
    checked_first(nn.Linear(4, 2), dls, tmp_path / 'targets', kind='softmax', check=False)


def test_a_cache_records_the_image_size_of_its_teacher(tmp_path):
    dls, theirs = (
        data(augment='light', item_tfms=[Resize(16)]),
        data(augment='light', item_tfms=[Resize(24)]),
    )
    teacher = Learner(theirs, Convs(3))
    cache = cache_teacher(teacher, dls, tmp_path / 'c', store=dict(dtype='float32'))
    assert cache.manifest.teacher['size'] == '(24, 24)'
    x, _ = dls.train.new(shuffle=False, drop_last=False).one_batch()
    with pytest.raises(DistillError, match=r'teacher, size: \(24, 24\) in the cache, None now'):
        cache_teacher(
            Teacher(teacher.model, images=dict(stats=imagenet_stats), kind='softmax'),
            dls,
            tmp_path / 'c',
            store=dict(dtype='float32'),
        )


def bordered_mask(i):
    m = np.array(mask(i))
    m[:3] = 255
    return PILMask.create(m)


@pytest.mark.filterwarnings('ignore::fastdistill.DistillWarning', 'ignore:load_learner. uses')
@pytest.mark.parametrize('said_by', ['teacher', 'ensemble', 'file', 'student'])
def test_the_ignored_label_is_that_of_a_learner(said_by, tmp_path):
    loss = CrossEntropyLossFlat(axis=1, ignore_index=255)
    dls = data(MaskBlock(codes=['x', 'y']), bordered_mask, 'none', item_tfms=CROPS())
    learn = student(dls, 2, dense=True, loss_func=loss)
    teacher = quiet(Learner(dls, Convs(2, dense=True), loss_func=loss))
    given, where = dict(
        teacher=(teacher, dls),
        ensemble=([teacher, teacher], dls),
        file=(tmp_path / 'teacher.pkl', dls),
        student=(teacher.model, learn),
    )[said_by]
    if said_by == 'file':
        teacher.export(given)
    with pytest.raises(DistillError, match='There is a label 255, but the outputs have 2 classes'):
        checked_first(teacher.model, dls, tmp_path / 'none')
    cache = checked_first(given, where, tmp_path / 'c', views=2, store='float32')
    assert verify_cache(cache, given, where).worst < 1e-4
    quiet(learn, 1, cbs=KnowledgeDistillation(cache))
    assert np.isfinite(learn.recorder.values[-1][:2]).all()


class Compare(Callback):
    "Asks the live teacher about each batch of a fit, as the model got it, and keeps what is stored"

    order = 6

    def __init__(self, source, teacher, kind='softmax', axis=1):
        super().__init__()
        self.source, self.asked, self.kind_axis, self.seen = source, teacher, (kind, axis), []

    def before_fit(self):
        self.feed = cached.feed(self.source, self.learn, *self.kind_axis)

    def before_train(self):
        self.feed.begin(self.epoch)

    def after_fit(self):
        self.feed.detach()

    def stored(self):
        out = self.source.outputs(self.learn.xb, samples_of(self.learn))
        return all_classes(out, Outputs(torch.Tensor(self.learn.pred)))

    def after_loss(self):
        if not self.source.has_outputs(samples_of(self.learn)):
            return
        live = self.asked(*(o.as_subclass(torch.Tensor) for o in self.learn.xb))
        self.seen.append(
            (
                self.learn.training,
                self.learn.epoch,
                self.stored().logits,
                live.logits,
                self.learn.x,
            )
        )

    @property
    def error(self):
        return max((as_dense(a) - b).abs().max().item() for _, _, a, b, _ in self.seen)


def compare(learn, cache, teacher, n=3, **kwargs):
    c = Compare(StoredOutputs(cache), teacher, **kwargs)
    quiet(learn, n, cbs=c)
    return c


@pytest.mark.parametrize('augment', AUGMENT)
def test_stored_logits_are_those_of_the_live_teacher_on_the_replayed_batch(tmp_path, augment):
    teacher = Teacher(Convs(3))
    cache = cache_teacher(
        teacher, data(augment=augment), tmp_path, views=2, store=dict(dtype='float32')
    )
    for bs, workers in [(8, 0), (5, 2)] if augment == 'colours' else [(5, 0)]:
        c = compare(student(data(augment=augment, bs=bs, num_workers=workers)), cache, teacher)
        assert c.error < 1e-5
        # and a wrong row would be seen: other samples and other views give other logits
        epochs = [torch.cat([t for _, e, _, t, _ in c.seen if e == k]) for k in range(3)]
        assert (epochs[0][:-1] - epochs[0][1:]).abs().max(1).values.min() > 1e-3
        assert torch.cdist(epochs[0], epochs[1]).min(1).values.median() > 1e-3


APPS = dict(
    multi_label=(lambda: data(MultiCategoryBlock, labels), lambda: Convs(5), 'sigmoid', 1),
    unet=(
        lambda: data(MaskBlock(codes=['x', 'y']), mask, 'usual', item_tfms=CROPS()),
        lambda: Convs(2, dense=True),
        'softmax',
        1,
    ),
    points=(
        lambda: data(PointBlock, points, 'usual', item_tfms=[Resize(SIZE), FlipItem()]),
        lambda: Convs(8),
        'regression',
        1,
    ),
)


@pytest.mark.parametrize('app', APPS)
def test_the_same_for_labels_maps_and_points(tmp_path, app):
    make, net, kind, axis = APPS[app]
    teacher = Teacher(net())
    cache = cache_teacher(teacher, make(), tmp_path, views=2, store=dict(dtype='float32'))
    dls = make()
    dls.train.bs = 5
    learn = Learner(dls, net())
    c = compare(learn, cache, teacher, kind=kind, axis=axis)
    assert c.error < 1e-5 and len(c.seen) == 12


@pytest.mark.parametrize('app', ['text_classifier', 'tabular', 'collab'])
def test_the_same_for_texts_and_tables(tmp_path, app):
    make = getattr(apps, app)
    learn, teacher = apps.quiet(*make())
    cache = cache_teacher(
        teacher, make()[0].dls, tmp_path, views=1, store=dict(dtype='float32'), valid=True
    )
    assert verify_cache(cache, teacher, make()[0].dls, n=9).worst < 1e-4
    learn.dls.train.bs, teacher = 5, Teacher(teacher.model)
    kind = 'regression' if app == 'collab' else 'softmax'
    c = compare(learn, cache, teacher, n=2, kind=kind, axis=-1)
    assert c.error < 1e-5 and {t for t, *_ in c.seen} == {True, False}
    assert torch.cat([o for _, _, o, *_ in c.seen]).unique().numel() > 10


# which view when


def draws_its_own(x):
    return torch.as_tensor(RNG_OF_ITS_OWN.uniform(-90, 90, len(x)), dtype=x.dtype)


class Siamese(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.net = Convs(3, seed=seed)

    def forward(self, a, b):
        return self.net(a) + 2 * self.net(b)


BATCH = dict(
    # pictures of 34 x 30, which fastai reduces where the height is more than twice the new width
    portrait=lambda: [Zoom(1, 3, p=0.7, size=16)],
    flat=lambda: [Zoom(1.0, 3.0, size=(20, 14))],
    usual=lambda: aug_transforms(size=16, max_zoom=1.5, p_affine=1.0),
    own_draw=lambda: [Rotate(180, draw=draws_its_own)],
    list_draw=lambda: [Rotate(180, p=0.3, draw=[10.0 * i for i in range(64)])],
)


# a list of numbers for each place in a batch: for one sample at a time it is the first number, and all views are one
@pytest.mark.filterwarnings('ignore:views=2, but all views of a sample are the same')
@pytest.mark.parametrize('tfms', BATCH)
def test_batch_transforms_that_look_at_the_batch_see_one_sample_at_a_time(tmp_path, tfms):
    def make(bs):
        dls = DataBlock(
            (ImageBlock, CategoryBlock),
            get_x=image,
            get_y=label,
            splitter=IndexSplitter(range(TRAIN, N)),
            batch_tfms=BATCH[tfms](),
        ).dataloaders(list(range(N)), bs=bs, num_workers=0)
        return dls

    teacher = Teacher(Convs(3))
    c = compare(
        student(make(2)),
        cache_teacher(teacher, make(8), tmp_path, views=2, store=dict(dtype='float32')),
        teacher,
    )
    assert c.error < 1e-5


def test_each_input_is_looked_at(tmp_path):
    "Of two pictures, only the second is so large that fastai reduces it"

    def make(bs):
        return DataBlock(
            (ImageBlock, ImageBlock, CategoryBlock),
            n_inp=2,
            get_x=[image, lambda i: image(i).resize((60, 60))],
            get_y=label,
            splitter=IndexSplitter(range(TRAIN, N)),
            batch_tfms=[Zoom(1, 3, p=0.7, size=20)],
        ).dataloaders(list(range(N)), bs=bs, num_workers=0)

    teacher = Teacher(Siamese())
    c = compare(
        Learner(make(3), Siamese(1)),
        cache_teacher(teacher, make(8), tmp_path, views=2, store=dict(dtype='float32')),
        teacher,
    )
    assert c.error < 1e-5


@pytest.mark.parametrize(
    'now,said',
    [
        (
            lambda: dict(item_tfms=RandomResizedCrop(SIZE, min_scale=0.5)),
            'transform after_item: RandomResizedCrop: min_scale=0.3 in the cache, min_scale=0.5 now',
        ),
        (
            lambda: dict(batch_tfms=aug_transforms(max_rotate=20.0)),
            'transform after_batch: Flip: rotate_mat.max_deg=10.0 in the cache, rotate_mat.max_deg=20.0 now',
        ),
        (
            lambda: dict(batch_tfms=aug_transforms(pad_mode='zeros')),
            "transform after_batch: Flip: pad_mode='reflection' in the cache, pad_mode='zeros' now",
        ),
    ],
    ids=['crop', 'rotation', 'padding'],
)
def test_a_changed_transform_is_named_with_the_options_that_differ(tmp_path, now, said):
    def make(**tfms):
        tfms = (
            dict(item_tfms=RandomResizedCrop(SIZE, min_scale=0.3), batch_tfms=aug_transforms())
            | tfms
        )
        return DataBlock(
            (ImageBlock, CategoryBlock),
            get_x=image,
            get_y=label,
            splitter=IndexSplitter(range(TRAIN, N)),
            **tfms,
        ).dataloaders(list(range(N)), bs=8, num_workers=0)

    cache = cache_teacher(Convs(3).eval(), make(), tmp_path)
    with pytest.raises(DistillError) as e:
        student(make(**now())).distill(cache, 1, 1e-3)
    lines = [l for l in str(e.value).splitlines() if l.startswith('- ')]
    assert lines == [f'- {said}']


class Strength(Transform):
    "Its strength is in no argument's name"

    split_idx, order = 0, 50

    def __init__(self, strength):
        super().__init__()
        self.s = strength

    def encodes(self, x: TensorImage):
        return x + torch.rand_like(x) * self.s


def test_batch_transforms_are_compared_by_what_they_give(tmp_path):
    def make(tfms):
        return DataBlock(
            (ImageBlock, CategoryBlock),
            get_x=image,
            get_y=label,
            splitter=IndexSplitter(range(TRAIN, N)),
            item_tfms=Resize(SIZE),
            batch_tfms=tfms,
        ).dataloaders(list(range(N)), bs=8, num_workers=0)

    normalize = Normalize.from_stats(*imagenet_stats)
    cache = cache_teacher(Convs(3).eval(), make([Strength(0.1)]), tmp_path / 'a')
    with pytest.raises(DistillError, match='sample 0: the transforms give a different result'):
        cached.feed(StoredOutputs(cache), student(make([Strength(0.9)])))
    with pytest.raises(DistillError, match='some samples: the transforms give'):
        cache_teacher(Convs(3).eval(), make([Strength(0.9)]), tmp_path / 'a')
    feed = cached.feed(
        StoredOutputs(cache), student(make([Strength(0.1), normalize]))
    )  # each model may have its own
    feed.detach()
    # but not where something that comes after it draws in normalised numbers
    cache = cache_teacher(Convs(3).eval(), make([RandomErasing(p=1.0)]), tmp_path / 'b')
    with pytest.raises(DistillError, match='after_batch: Normalize: none in the cache'):
        cached.feed(StoredOutputs(cache), student(make([normalize, RandomErasing(p=1.0)])))
    # a bare module sees what the DataLoaders give it
    with pytest.raises(DistillError, match='teacher, input: mean'):
        cache_teacher(Convs(3).eval(), make([Strength(0.1), normalize]), tmp_path / 'a')


def test_clean_views_are_compared_when_they_are_gone_on_with(tmp_path):
    cache_teacher(Convs(3).eval(), data(item_tfms=Resize(SIZE)), tmp_path, views=0)
    with pytest.raises(DistillError, match='the inputs of some samples'):
        cache_teacher(Convs(3).eval(), data(item_tfms=Resize(SIZE - 4)), tmp_path, views=0)


class Together(Transform):
    "Draws once for a whole batch"

    def encodes(self, b: list):
        return [(x + random.random(), *y) for x, *y in b]


class OwnBatches(TfmdDL):
    def create_batch(self, b):
        return super().create_batch(b[::-1])


def test_what_is_made_of_whole_batches_is_refused(tmp_path):
    dls = data()
    dls.train.before_batch.add(Together())
    with pytest.raises(
        DistillError, match='before_batch transform draws random numbers for a whole batch'
    ):
        cache_teacher(Convs(3).eval(), dls, tmp_path)
    dls = data(dl_type=OwnBatches)
    with pytest.raises(
        DistillError,
        match='OwnBatches overrides create_batch, so its batches cannot be replayed',
    ):
        cache_teacher(Convs(3).eval(), dls, tmp_path)


class Held(Transform):
    "Its generator lies in what is replaced"

    def __init__(self):
        super().__init__()
        self.state = dict(rng=random.Random())

    def encodes(self, x: PILImage):
        return PILImage.create(np.asarray(x) // self.state['rng'].randint(1, 9))


def test_generators_are_looked_for_in_each_epoch(tmp_path):
    held, teacher = Held(), Teacher(Convs(3))
    make = lambda: data(item_tfms=[held, Resize(SIZE)])

    class Replace(Callback):
        order = -30

        def before_train(self):
            held.state = dict(rng=random.Random())

    c = Compare(
        StoredOutputs(
            cache_teacher(teacher, make(), tmp_path, views=2, store=dict(dtype='float32'))
        ),
        teacher,
    )
    quiet(student(make()), 3, cbs=[c, Replace()])
    assert c.error < 1e-5


@pytest.mark.parametrize('where', ['item', 'batch'])
def test_a_transform_that_is_random_in_validation_too_has_no_clean_view(where, tmp_path):
    train_only = Darker()
    train_only.split_idx = 0
    dls = data(item_tfms=[darker, Resize(SIZE)] if where == 'item' else [Resize(SIZE)])
    dls.train.after_batch.add(Darker() if where == 'batch' else train_only)
    with pytest.raises(DistillError, match='changes sample 0 at random in validation too'):
        cache_teacher(Convs(3).eval(), dls, tmp_path / 'c', views=0)


class Mean(nn.Module):
    "Knows nothing of padding"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.l = nn.Embedding(len(apps.WORDS), 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.l(self.e(x).mean(1) * 4)


def test_a_teacher_that_takes_padding_for_words_is_noticed(tmp_path):
    "Stored by length, beside texts of its own length; in another batch it would say something else"
    x = [['good'] * (2 + 3 * i) for i in range(12)]
    dls = DataBlock(
        (TextBlock(apps.words, vocab=apps.WORDS, seq_len=4), CategoryBlock),
        get_x=apps.of(x),
        get_y=lambda i: 'ab'[i % 2],
        splitter=IndexSplitter([0]),
    ).dataloaders(list(range(12)), bs=4, num_workers=0)
    with pytest.warns(DistillWarning, match='outputs for a text depend on padding'):
        cache_teacher(Teacher(Mean()), dls, tmp_path, views=0)


def test_a_table_without_numbers(tmp_path):
    df = apps.table(40).drop(columns=['length', 'width'])
    make = lambda: TabularDataLoaders.from_df(
        df,
        procs=[Categorify],
        cat_names=['colour', 'shape'],
        y_names='kind',
        y_block=CategoryBlock(),
        valid_idx=list(range(30, 40)),
        bs=8,
        num_workers=0,
    )
    nets = [tabular_learner(make(), layers=[h]) for h in (4, 8)]
    cache = cache_teacher(nets[1], make(), tmp_path, store=dict(dtype='float32'))
    c = compare(
        apps.quiet(Learner(make(), nets[0].model))[0], cache, Teacher(nets[1].model), axis=-1
    )
    assert c.error < 1e-5


@pytest.mark.parametrize('workers', [0, 2])
def test_writing_moves_no_global_random_state(tmp_path, workers):
    "A student that is built afterwards has the same weights, whether the cache was there or not"

    def drawn(write):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        write()
        return torch.rand(1).item(), np.random.rand(), random.random()

    dls = data(num_workers=workers)
    teacher = Convs(3).eval()
    write = lambda: cache_teacher(teacher, dls, tmp_path, views=2, valid=True)
    assert (
        drawn(lambda: None)
        == drawn(write)
        == drawn(write)
        == drawn(lambda: verify_cache(tmp_path, teacher, dls, 4))
    )


def test_a_student_with_another_validation_set_has_no_column_for_it(tmp_path):
    teacher = Teacher(Convs(3))
    cache = cache_teacher(
        teacher, data(), tmp_path, views=2, valid=True, store=dict(dtype='float32')
    )
    c = compare(student(data(valid=range(16, N))), cache, teacher)
    assert {t for t, *_ in c.seen} == {True} and c.error < 1e-5


def test_the_first_rank_alone_speaks_of_a_cache_and_not_without_logging(
    tmp_path, capsys, monkeypatch
):
    cache = cache_teacher(
        Teacher(Convs(3)), data(), tmp_path, valid=True, store=dict(dtype='float32')
    )

    def printed(logger):
        learn = student(data(valid=range(16, N)))
        learn.logger = logger
        capsys.readouterr()
        with learn.no_bar():
            learn.fit(2, cbs=KnowledgeDistillation(cache))
        out = capsys.readouterr().out
        return [
            'because the cache was written for a different one' in out,
            'the cache has one view' in out,
        ]

    assert printed(print) == [True, True] and printed(noop) == [False, False]
    monkeypatch.setattr('fastdistill.fastai.fit_log.rank', lambda: 1)
    assert printed(print) == [False, False]


class Follow(Compare):
    "The same with a teacher that remembers"

    def before_fit(self):
        super().before_fit()
        self.asked.start()

    def after_fit(self):
        super().after_fit()
        self.asked.stop()

    def before_train(self):
        super().before_train()
        self.asked.reset()

    def before_validate(self):
        self.asked.reset()


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_for_language_models(tmp_path, workers):
    "A view is an order of the texts; the teacher goes through it from its beginning, and remembers"
    (learn, teacher), dls = apps.pair('language_model'), apps.quiet(*apps.language_model())[0].dls
    dls.train.fake_l.num_workers = workers
    cache = cache_teacher(
        teacher,
        dls,
        tmp_path,
        views=2,
        store=dict(dtype='float32'),
        valid=True,
        layers=['0.rnns.1'],
    )
    c = Follow(StoredOutputs(cache), Teacher(teacher.model), axis=-1)
    quiet(learn, 3, cbs=c)
    assert c.error < 1e-5 and {t for t, *_ in c.seen} == {True, False}
    lengths = {
        t: [x.shape[1] for e, k, *_, x in c.seen if e == t and k == 0] for t in (True, False)
    }
    assert lengths == {
        True: [8] * 8 + [7],
        False: [8] * 4 + [3],
    }  # the last ones are shorter than a row
    epochs = [torch.cat([x for t, e, *_, x in c.seen if t and e == k], 1) for k in range(3)]
    assert not torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])
    # the texts are the same ones, each whole, in another order
    starts = lambda x: sorted(x.flatten().bincount().tolist())
    assert abs(np.subtract(starts(epochs[0]), starts(epochs[1]))).max() < 30
    assert verify_cache(cache, teacher, dls, n=20).worst < 1e-5


def test_a_stream_goes_on_in_the_middle_and_gives_the_same_bytes(tmp_path, monkeypatch):
    "Whoever remembers hears again what is already written"
    monkeypatch.setitem(
        write_cache.__kwdefaults__, 'shard_bytes', 2 * 8 * 8 * 12 * 4
    )  # two batches
    dls, teacher = apps.language_model()[0].dls, apps.pair('language_model')[1]
    write = lambda: cache_teacher(teacher, dls, tmp_path, views=2, store=dict(dtype='float32'))
    cache = write()
    shards = sorted(tmp_path.glob('view*/*.bin'))
    assert len(shards) == 10
    bytes_of = [p.read_bytes() for p in shards]
    for i in (2, 3, 9):
        shards[i].unlink()
    asked = []
    h = teacher.model.register_forward_hook(lambda m, x, o: asked.append(len(x[0])))
    write()
    h.remove()
    assert [p.read_bytes() for p in shards] == bytes_of and cache.check()
    # a first batch, which shows how fast the teacher runs, and of each view all batches up to the last that was missing
    assert sum(n == 8 for n in asked) == 1 + 8 + 9


def test_a_stream_that_is_cut_otherwise_is_refused(tmp_path):
    learn, teacher = apps.pair('language_model')
    cache = cache_teacher(teacher, learn.dls, tmp_path, views=1, store=dict(topk=3))
    with pytest.raises(
        DistillError,
        match='bs=4 cannot be used for a language model, whose text is cut into one row',
    ):
        cache_teacher(teacher, learn.dls, tmp_path / 'b', run=dict(bs=4))
    for kw in (dict(bs=4), dict(seq_len=6)):
        learn.dls = DataLoaders(learn.dls.train.new(**kw), learn.dls.valid)
        with pytest.raises(
            DistillError,
            match=r'transform stream: 8 rows of 71 tokens, 8 at a time in the cache, \d rows of',
        ):
            cached.feed(StoredOutputs(cache), learn)
        learn, _ = apps.pair('language_model')
    # without shuffling: the texts as they lie there
    cache = cache_teacher(teacher, learn.dls, tmp_path / 'c', views=0, store=dict(dtype='float32'))
    c = Follow(StoredOutputs(cache), Teacher(teacher.model), axis=-1)
    quiet(learn, 2, cbs=c)
    assert c.error < 1e-5
    x = [torch.cat([x for t, e, *_, x in c.seen if t and e == k], 1) for k in range(2)]
    assert torch.equal(*x) and x[0][0, :5].tolist() == [2, 3, 4, 5, 6]


def test_each_view_comes_once_in_as_many_epochs_as_there_are_views_and_each_sample_has_an_order_of_its_own(
    tmp_path,
):
    teacher = Teacher(Convs(3))
    cache = cache_teacher(teacher, data(), tmp_path, views=3, store=dict(dtype='float32'))
    stored = torch.stack(
        [cache.outputs(np.arange(TRAIN), v).logits for v in range(3)]
    )  # (view, sample, class)
    source, learn = StoredOutputs(cache), student(data(bs=TRAIN))
    shown = []
    for n in (2, 4):  # views go on from one fit to the next, as in fine_tune
        c = Compare(source, teacher)
        quiet(learn, n, cbs=c)
        shown += [o for *_, o, _, _ in c.seen]
    which = [
        torch.cdist(o, stored.view(-1, 3)).argmin(1) for o in shown
    ]  # for each place in the batch: view*TRAIN + sample
    d = torch.stack(
        [r[(r % TRAIN).argsort()] // TRAIN for r in which]
    )  # (epoch, sample): the view shown
    assert all(
        sorted(d[:3, i].tolist()) == [0, 1, 2] == sorted(d[3:, i].tolist()) for i in range(TRAIN)
    )
    assert len({tuple(r) for r in d.T.tolist()}) > 6 and len({tuple(r) for r in d.tolist()}) == 6


def test_views_of_random_item_transforms_differ(tmp_path):
    cache = cache_teacher(
        Teacher(Convs(3)), data(augment='none'), tmp_path, views=2, store=dict(dtype='float32')
    )
    a, b = (cache.outputs(np.arange(TRAIN), v).logits for v in range(2))
    assert (a - b).abs().max(1).values.median() > 1e-3


def test_lr_find_takes_no_view_away(tmp_path):
    from fastai.callback.schedule import LRFinder

    teacher = Teacher(Convs(3))
    source = StoredOutputs(cache_teacher(teacher, data(), tmp_path, views=2))
    learn = student(data(), model_dir=tmp_path)
    quiet(learn, 2, cbs=[Compare(source, teacher), LRFinder(num_it=4)])
    assert not notes_of(learn).passed_epochs
    quiet(learn, 2, cbs=Compare(source, teacher))
    assert notes_of(learn).passed_epochs[source.cache.identity] == 2


def test_clean_views_are_those_of_validation_while_the_student_sees_augmented_ones(tmp_path):
    teacher = Teacher(Convs(3))
    make = lambda: data(item_tfms=CROPS())
    cache, dls = (
        cache_teacher(teacher, make(), tmp_path, views=0, store=dict(dtype='float32'), valid=True),
        make(),
    )
    with torch.no_grad():
        x = torch.stack(
            [torch.Tensor(o[0]) for o in [dls.test_dl([i], bs=1).one_batch() for i in range(N)]]
        )[:, 0]
        want = Convs(3).eval()(x)
    torch.testing.assert_close(
        cache.outputs(np.arange(TRAIN)).logits, want[:TRAIN], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        cache.valid.outputs(np.arange(N - TRAIN)).logits, want[TRAIN:], rtol=1e-4, atol=1e-5
    )
    c = compare(student(make()), cache, teacher, 2)
    assert (
        max((a - b).abs().max() for t, _, a, b, _ in c.seen if not t)
        < 1e-4
        < min((a - b).abs().max() for t, _, a, b, _ in c.seen if t)
    )
    xs = [x for t, _, _, _, x in c.seen if t]
    assert not torch.equal(xs[0], xs[2])


def test_mixup_mixes_the_stored_probabilities(tmp_path):
    class Before(Callback):
        order = -15

        def before_batch(self):
            self.x0 = torch.Tensor(self.learn.x).clone()

    teacher = Teacher(Convs(3))
    cache = cache_teacher(teacher, data(), tmp_path, views=2, store=dict(dtype='float32'))
    before = Before()

    class Mixed(Compare):
        def after_loss(self):
            if not self.training:
                return
            x, x0 = torch.Tensor(self.learn.x).flatten(1), before.x0
            share = torch.linalg.lstsq(
                x0.flatten(1).T.double(), x.T.double()
            ).solution.T.float()  # of whom each image is made
            self.seen.append(
                (
                    True,
                    0,
                    self.stored().logits.softmax(1),
                    share @ self.asked(x0).logits.softmax(1),
                    share,
                )
            )

    c = Mixed(StoredOutputs(cache), teacher)
    quiet(student(data(), cbs=[MixUp(0.8), before]), 2, cbs=c)
    assert c.error < 1e-4 and any((s.max(1).values < 0.95).any() for *_, s in c.seen)


# what is stored


def test_layers_are_stored_too(tmp_path):
    net = Convs(3).eval()
    cache = cache_teacher(
        net, data(), tmp_path, views=1, store=dict(dtype='float32'), layers=['a', 'bn']
    )
    seen = []

    class Look(Compare):
        def after_loss(self):
            if self.training:
                seen.append((self.stored().feats, self.learn.x))

    quiet(student(data()), 1, cbs=Look(StoredOutputs(cache), None))
    for feats, x in seen:
        with Taps(net, ['a', 'bn']) as taps, torch.no_grad():
            net(torch.Tensor(x))
            for k, v in taps.pop().items():
                torch.testing.assert_close(
                    feats[k], v.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize('tail', ['mean', 'uniform', 'zero', 'bucket'])
def test_few_classes_of_many(tmp_path, tail):
    teacher = Teacher(Convs(12))
    make = lambda: data(get_y=lambda i: 'abcdefghijkl'[i % 12], augment='none')
    cache = cache_teacher(teacher, make(), tmp_path, views=2, store=dict(topk=3, tail=tail))
    seen = []

    class Look(Compare):
        def after_loss(self):
            t, live = (
                self.stored().logits if self.training else None,
                self.asked(torch.Tensor(self.learn.x)).logits,
            )
            if self.training:
                seen.append((t, live, self.learn.pred.detach()))

    quiet(student(make(), 12), 2, cbs=Look(StoredOutputs(cache), teacher))
    for t, live, s in seen:
        p, top = live.softmax(1), live.topk(3).indices
        got = t.softmax(1)
        kept = p.gather(1, top)
        even = p.log().scatter(1, top, 0.0).sum(1, keepdim=True).div(9).exp()
        want = (
            kept / (kept.sum(1, keepdim=True) + 9 * even * (tail == 'mean'))
            if tail in ('zero', 'mean')
            else kept
        )
        torch.testing.assert_close(got.gather(1, top), want, rtol=0, atol=5e-3)
        rest = got.scatter(1, top, 0.0)
        if tail == 'zero':
            assert rest.max() == 0
        if tail == 'uniform':
            assert (rest.sum(1) - (1 - kept.sum(1))).abs().max() < 5e-3 and (
                rest.max(1).values - rest.sum(1) / 9
            ).abs().max() < 1e-4
        if tail == 'bucket':
            q = torch.Tensor(s).softmax(1).scatter(1, top, 0.0)
            torch.testing.assert_close(
                rest / rest.sum(1, keepdim=True), q / q.sum(1, keepdim=True), rtol=1e-3, atol=1e-5
            )


def test_classes_in_another_order_are_mapped_by_name(tmp_path):
    teacher = Teacher(Convs(3))
    for topk in (None, 2):
        cache = cache_teacher(
            teacher,
            data(),
            tmp_path / str(topk),
            views=1,
            store=dict(dtype='float32', topk=topk, tail='zero'),
        )
        dls = data(block=CategoryBlock(vocab=['c', 'a', 'b'], sort=False))
        assert list(dls.vocab) == ['c', 'a', 'b']
        c = compare(student(dls), cache, teacher, 1)
        for _, _, got, live, _ in c.seen:
            live = live[:, [2, 0, 1]]
            if topk:
                live = torch.where(live >= live.topk(2, 1).values[:, -1:], live, -torch.inf)
            torch.testing.assert_close(got.softmax(1), live.softmax(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(DistillError, match=r'does not have the class\(es\) d'):
        cached.feed(StoredOutputs(cache), student(data(get_y=lambda i: 'abcd'[i % 4])))


def test_a_part_of_the_data_in_another_order_finds_its_rows(tmp_path):
    teacher = Teacher(Convs(3))
    cache = cache_teacher(teacher, data(), tmp_path, views=2, store=dict(dtype='float32'))
    dls = data(items=[*range(20, 4, -1), *range(TRAIN, N)], valid=range(16, 24), bs=4)
    assert list(dls.train_ds.items) == list(range(20, 4, -1))
    assert compare(student(dls), cache, teacher, 2).error < 1e-5


# refusals


def refused(cache, dls, match, **kwargs):
    learn = student(dls, **kwargs)
    was = state_of(learn)
    with pytest.raises(DistillError, match=match):
        cached.feed(StoredOutputs(cache), learn)
    assert state_of(learn) == was


def test_data_and_transforms_that_do_not_fit_are_refused_in_words(tmp_path, monkeypatch):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=1)
    refused(
        cache,
        data(item_tfms=[RandomResizedCrop(SIZE, min_scale=0.9), FlipItem(), noise]),
        r'after_item: RandomResizedCrop: .*min_scale=0.4.* in the cache, .*min_scale=0.9.* now',
    )
    refused(cache, data(augment='colours'), 'after_batch: RandomErasing: none in the cache')
    monkeypatch.setattr(cached, 'IMAGES', IMAGES[::-1].copy())
    refused(cache, data(), 'the input of sample 0: the transforms give a different result')
    source = StoredOutputs(TeacherCache(tmp_path, force=True))
    with pytest.warns(DistillWarning, match='used anyway'):
        cached.feed(source, student(data())).detach()


def test_other_samples_are_refused(tmp_path):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=1)
    refused(cache, data(valid=[0]), '8 of 29 samples have no row .* This is a different dataset')


def test_maps_of_clean_images_are_not_given_to_augmented_ones(tmp_path):
    make = lambda **k: data(MaskBlock(codes=['x', 'y']), mask, 'usual', **k)
    with pytest.warns(
        DistillWarning, match='a value for each pixel .* Resize, Dihedral would move'
    ):
        cache = cache_teacher(
            Convs(2, dense=True).eval(), make(item_tfms=Resize(SIZE)), tmp_path, views=0
        )
    learn = Learner(make(item_tfms=Resize(SIZE)), Convs(2, dense=True))
    with pytest.raises(
        DistillError,
        match="a value for each pixel or token of the clean input, but Resize, Dihedral would move the student's input: cache views=1",
    ):
        cached.feed(StoredOutputs(cache), learn)


def test_points_of_clean_images_are_not_given_to_flipped_ones(tmp_path):
    dls = data(PointBlock, points, 'usual')
    with pytest.warns(DistillWarning, match='outputs are points, but FlipItem, .* would move'):
        cache = cache_teacher(Convs(8).eval(), dls, tmp_path, views=0)
    with pytest.raises(
        DistillError, match='are the points of the clean input, but FlipItem, .* would move'
    ):
        quiet(student(dls, 8), 1, cbs=KnowledgeDistillation(cache, check=False))


def test_numbers_of_clean_images_are_given_to_flipped_ones(tmp_path):
    dls = data(RegressionBlock, lambda i: i / 10, 'usual')
    cache = cache_teacher(Convs(1).eval(), dls, tmp_path, views=0)
    quiet(student(dls, 1), 1, cbs=KnowledgeDistillation(cache, check=False))


def test_maps_of_layers_of_clean_images_are_not_compared_with_flipped_ones(tmp_path):
    dls, name = data(augment='usual'), 'a'
    with pytest.warns(DistillWarning, match='the stored layers have positions'):
        cache = cache_teacher(Convs(3).eval(), dls, tmp_path, views=0, layers=[name])
    fit = lambda recipe: quiet(
        student(dls), 1, cbs=KnowledgeDistillation(cache, recipe, check=False)
    )
    with pytest.raises(DistillError, match='contains layers of the clean inputs.* would move'):
        fit(recipes.hint(layers={name: name}))
    fit(kd())


RNG_OF_ITS_OWN = np.random.default_rng()


def darker(x: PILImage):
    return PILImage.create(np.asarray(x) // RNG_OF_ITS_OWN.integers(1, 9, dtype=np.uint8))


class Darker(Transform):
    order = 50

    def __init__(self):
        super().__init__()
        self.rng = random.Random()

    def encodes(self, x: TensorImage):
        return x * self.rng.uniform(0.5, 1)


class Albumentations(Transform):
    "As fastai's documentation shows it"

    split_idx = 0

    def __init__(self, aug):
        super().__init__()
        self.aug = aug

    def encodes(self, x: PILImage):
        return PILImage.create(self.aug(image=np.asarray(x))['image'])


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('how', ['function', 'albumentations'])
def test_generators_of_a_transforms_own_are_replayed_too(tmp_path, how, workers):
    if how == 'albumentations':
        A = pytest.importorskip('albumentations')

    def make():
        own = (
            darker
            if how == 'function'
            else Albumentations(
                A.Compose([A.GaussNoise(p=0.9), A.HorizontalFlip(), A.RandomCrop(20, 20)])
            )
        )
        dls = data(item_tfms=[own, Resize(SIZE), FlipItem()], num_workers=workers, bs=5)
        if how == 'function':
            dls.train.after_batch.add(Darker())
        return dls

    teacher = Teacher(Convs(3))
    c = compare(
        student(make()),
        cache_teacher(teacher, make(), tmp_path, views=2, store=dict(dtype='float32')),
        teacher,
    )
    assert c.error < 1e-5
    assert (
        torch.cdist(*[torch.cat([t for _, e, _, t, _ in c.seen if e == k]) for k in range(2)])
        .min(1)
        .values.median()
        > 1e-3
    )


def unseedable(x: PILImage):
    return PILImage.create(np.asarray(x) // np.random.default_rng().integers(1, 9, dtype=np.uint8))


class Unseedable(Transform):
    order = 50

    def encodes(self, x: TensorImage):
        return x * float(np.random.default_rng().uniform(0.5, 1))


def test_what_cannot_be_repeated_is_refused_before_anything_is_written(tmp_path):
    def no(match, dls, teacher=None, **kwargs):
        with pytest.raises(DistillError, match=match):
            cache_teacher(teacher or Convs(3).eval(), dls, tmp_path / 'c', **kwargs)
        assert not (tmp_path / 'c').exists()

    no(
        'item transforms gave two different results for sample',
        data(item_tfms=[Resize(SIZE), unseedable]),
    )
    dls = data()
    dls.train.after_batch.add(Unseedable())
    no('batch transforms gave two different results for sample', dls)

    class Moody(nn.Module):  # its answer depends on who else is asked
        def __init__(self):
            super().__init__()
            self.net = Convs(3)

        def forward(self, x):
            return self.net(x) + x.mean()

    no('change by .* if other samples are in its batch', data(), Moody())
    no(
        'stores the likeliest of several classes, but this model predicts sigmoid',
        data(MultiCategoryBlock, labels),
        Convs(5),
        store=dict(topk=2),
    )
    tensors = torch.utils.data.TensorDataset(torch.randn(8, 3, 4, 4), torch.zeros(8).long())
    torch_dls = DataLoaders(*[torch.utils.data.DataLoader(tensors)] * 2)
    no('is not a fastai DataLoader: write with cache_dataset', torch_dls, kind='softmax', axis=1)


def test_a_dataset_of_unnameable_things_asks_for_names(tmp_path):
    class Thing:
        __iter__ = None

    items = [Thing() for _ in range(8)]
    get = dict(get_x=lambda o: image(items.index(o)), get_y=lambda o: label(items.index(o)))
    block = DataBlock(
        (ImageBlock, CategoryBlock), **get, splitter=IndexSplitter([7]), item_tfms=Resize(SIZE)
    )
    make = lambda: block.dataloaders(items, bs=4)
    net = Convs(3).eval()
    with pytest.raises(DistillError, match='A Thing does not identify a sample: pass keys='):
        cache_teacher(net, make(), tmp_path)
    dls = make()
    cache = cache_teacher(Convs(3).eval(), dls, tmp_path, keys=items.index)
    assert len(cache) == 7
    c = Compare(StoredOutputs(cache, keys=items.index), Teacher(Convs(3)))
    quiet(student(dls), 1, cbs=c)
    assert c.error < 2e-2


# a second call


def test_another_teacher_is_refused_and_the_same_writes_nothing(tmp_path):
    cache_teacher(Convs(3).eval(), data(), tmp_path, views=1)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.bin')}
    cache_teacher(Convs(3).eval(), data(), tmp_path, views=1)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.bin')}
    other = Convs(3, seed=5).eval()
    with pytest.raises(DistillError, match='- teacher, weights: .* in the cache, .* now'):
        cache_teacher(other, data(), tmp_path, views=1)
    with pytest.warns(DistillWarning, match='teacher'):
        cache = cache_teacher(other, data(), tmp_path, force=True, store=dict(dtype='float32'))
    assert compare(student(data()), cache, Teacher(other), 1).error < 1e-5


def test_force_takes_the_old_teachers_validation_set_away(tmp_path):
    cache_teacher(Convs(3).eval(), data(), tmp_path, valid=True)
    other = Convs(3, seed=5).eval()
    with pytest.warns(DistillWarning, match='The cache is overwritten'):
        cache = cache_teacher(other, data(), tmp_path, force=True)
    assert cache.valid is None


def test_an_ensemble_is_known_by_how_its_members_are_asked(tmp_path):
    nets = [Convs(3, seed=i).eval() for i in range(2)]
    cache_teacher(nets, data(), tmp_path)
    for other in (
        [nets[0], Teacher(nets[1], select=[2, 1, 0])],
        [nets[0], Teacher(nets[1], images=dict(stats='imagenet', input_stats=(0, 1)))],
    ):
        with pytest.raises(DistillError, match='teacher, members'):
            cache_teacher(other, data(), tmp_path)


def test_verify_asks_the_teacher_again(tmp_path):
    cache_teacher(Convs(3).eval(), data(), tmp_path, views=2, store=dict(dtype='float32'))
    v = verify_cache(tmp_path, Convs(3).eval(), data(), n=20)
    assert v.rows == 20 and v.worst < 1e-5 and '20 rows compared' in str(v)
    assert verify_cache(tmp_path, Convs(3, seed=5).eval(), data()).worst > 0.01


def test_principal_components_train_a_student_and_are_verified(tmp_path):
    "Of three classes, all are among the ten that are stored exactly"
    store, teacher = dict(components=1, dtype='float32'), Convs(3).eval()
    cache = cache_teacher(teacher, data(), tmp_path, views=2, store=store, valid=True)
    assert cache.manifest.layout.kind == cache.valid.manifest.layout.kind == 'pca'
    assert compare(student(data()), cache, Teacher(teacher), 1).error < 1e-5
    assert verify_cache(tmp_path, teacher, data(), n=20).worst < 1e-5
    assert verify_cache(tmp_path, Convs(3, seed=5).eval(), data()).worst > 0.01


@pytest.mark.parametrize('dtype, far', [('float32', 1e-5), ('int8', 0.01)])
def test_hidden_states_of_the_validation_set_are_read_as_they_were_written(tmp_path, dtype, far):
    "Their units, and in int8 their center, are those of the training set"
    learn, teacher = apps.quiet(*apps.tabular())
    store = dict(kind='hidden', dtype=dtype)
    cache = cache_teacher(teacher, learn.dls, tmp_path, views=0, store=store, valid=True)
    c = compare(learn, cache, Teacher(teacher.model), 1, axis=-1)
    assert c.error < far and {t for t, *_ in c.seen} == {True, False}


def test_a_teacher_that_says_nan_is_not_verified(tmp_path):
    net = Convs(3).eval()
    cache_teacher(net, data(), tmp_path, views=0, store='float32')
    next(net.parameters()).data.fill_(float('nan'))
    assert verify_cache(tmp_path, net, data(), n=4).worst == float('inf')


def test_wrong_numbers_of_rows_and_positions_are_refused(tmp_path):
    cache = cache_teacher(net := Convs(3).eval(), data(), tmp_path)
    with pytest.raises(DistillError, match='n=0: must be a whole number of at least 1'):
        verify_cache(cache, net, data(), n=0)
    for at in (5, [1.5], 'a', [True, False], [[0, 1]]):
        with pytest.raises(DistillError, match='must be a list or 1D array of whole numbers'):
            cache.outputs(at)


# the guest leaves


def test_an_interrupt_while_writing_leaves_nothing_behind_even_if_its_traceback_is_kept(tmp_path):
    "As IPython keeps it: generators that wait in its frames would hold modes, gradients and the training set's transforms"
    net, dls = Convs(3).train(), data()

    def stop(done, *_):
        if done > 8:
            raise KeyboardInterrupt

    for views in (0, 1):
        with pytest.raises(KeyboardInterrupt) as e:
            cache_teacher(net, dls, tmp_path / str(views), views=views, progress=stop)
        assert (
            e.tb and torch.is_grad_enabled() and net.training and dls.train.dataset.split_idx == 0
        )
        assert {tl.tfms.split_idx for tl in dls.train.dataset.tls} == {0}
    with pytest.raises(KeyboardInterrupt) as e:
        cache_dataset(
            Teacher(net),
            torch.utils.data.TensorDataset(torch.rand(16, 3, 8, 8)),
            tmp_path / 'c',
            views=0,
            run=dict(bs=4),
            progress=stop,
        )
    assert e.tb and torch.is_grad_enabled() and net.training


def test_a_fit_from_a_cache_leaves_nothing_behind(tmp_path):
    teacher = Teacher(Convs(3))
    cache = cache_teacher(teacher, data(), tmp_path, views=2, valid=True)
    learn = student(data())
    quiet(learn)  # what the first fit of a Learner sets up is not ours
    was, pipes = (
        state_of(learn),
        [(dl.after_batch, list(dl.after_batch.fs)) for dl in learn.dls.loaders],
    )
    quiet(learn, cbs=Compare(StoredOutputs(cache), teacher))

    class Fails(Callback):
        order = 7

        def after_loss(self):
            assert sampled(self.dls.train) and isinstance(self.dls.train.after_batch, Replay)
            raise KeyboardInterrupt('stop')

    compare = Compare(StoredOutputs(cache), teacher)
    with pytest.raises(KeyboardInterrupt):
        quiet(learn, cbs=[compare, Fails()])
    compare.feed.detach()
    compare.feed.detach()
    now = state_of(learn)
    strip = lambda s: (
        [{k: v for k, v in d.items() if k not in ('rng', '_DataLoader__idxs', 'it')} for d in s[0]],
        list(map(type, s[1])),
    )
    assert strip(now) == strip(was) and pipes == [
        (dl.after_batch, list(dl.after_batch.fs)) for dl in learn.dls.loaders
    ]


def test_others_on_the_same_data_see_nothing_of_it(tmp_path):
    teacher = Teacher(Convs(3))
    cache = cache_teacher(teacher, data(), tmp_path, views=2, valid=True)
    learn = student(data(), metrics=apps.accuracy)
    feed = cached.feed(StoredOutputs(cache), learn)
    with learn.no_bar():
        assert len(learn.validate()) == 2
        assert len(learn.get_preds(ds_idx=0)[0]) == TRAIN
        learn.dls.test_dl([1, 2]).one_batch()
        assert len(learn.predict(3)) == 3
        learn.show_results()
        learn.dls.show_batch()
        other = student(learn.dls)
        quiet(other)
    feed.detach()
    assert len(learn.dls.one_batch()) == 2


def test_replaying_moves_no_global_random_state(tmp_path):
    dls = data(augment='colours')
    learn = student(dls)
    source = StoredOutputs(
        cache_teacher(Convs(3).eval(), data(augment='colours'), tmp_path, views=2)
    )
    feed = cached.feed(source, learn)

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    i = iter(dls.train)
    next(i)
    was = state()
    next(i)
    assert state() == was
    feed.detach()


def test_a_worker_gets_a_path_and_not_the_data(tmp_path):
    import pickle

    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=2)
    cache.rows([1, 2], [0, 1])
    size = len(pickle.dumps(cache))
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(again.rows([1, 2], [0, 1]), cache.rows([1, 2], [0, 1])) and size < 5000
    assert json.loads((tmp_path / 'manifest.json').read_text())['count'] == TRAIN


def test_ranks_of_a_distributed_fit_get_their_own_rows(tmp_path, monkeypatch):
    pytest.importorskip('accelerate')
    from fastai.distributed import DistributedDL

    monkeypatch.setattr(
        DistributedDL, '_broadcast', lambda self, t, rank: order
    )  # what rank 0 drew
    teacher = Teacher(Convs(3))
    cache = cache_teacher(teacher, data(), tmp_path, views=2, store=dict(dtype='float32'))
    learn = student(data(bs=4))
    own = list(learn.dls.loaders)
    feed, order = (
        cached.feed(StoredOutputs(cache), learn),
        np.random.default_rng(0).permutation(TRAIN).tolist(),
    )
    for rank in range(2):  # fastai wraps the DataLoaders when the fit has begun
        learn.dls.loaders = [DistributedDL(dl, rank=rank, world_size=2) for dl in own]
        for x, _, samples in learn.dls.train:
            kept = cache.decode(samples.rows).logits
            torch.testing.assert_close(kept, teacher(torch.Tensor(x)).logits, rtol=1e-4, atol=1e-5)
    feed.detach()
    assert not any(map(sampled, own))


def one_of_two(folder):
    "What each of two processes does"
    import fastai.distributed  # noqa: F401

    warnings.simplefilter('ignore')
    apps.distributed_on_cpu()
    torch.distributed.init_process_group('gloo')
    teacher = Teacher(Convs(3))
    cache = cache_teacher(teacher, data(), folder / 'c', views=2, store=dict(dtype='float32'))
    learn = student(data(bs=3, num_workers=1))
    learn.logger = print
    c = Compare(StoredOutputs(cache), teacher)
    with learn.no_bar(), learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2, 1e-3, cbs=c)
    seen = [
        torch.cat([live for train, e, _, live, _ in c.seen if train and e == k]) for k in range(2)
    ]
    torch.save((c.error, seen), folder / f'{rank_distrib()}.pt')
    apps.leave_together()


def test_two_processes_write_a_cache_and_train_from_it(tmp_path):
    pytest.importorskip('accelerate')
    one = cache_teacher(
        Teacher(Convs(3)), data(), tmp_path / 'one', views=2, store=dict(dtype='float32')
    )
    both = processes.start_two(tmp_path / 'two', one_of_two, tmp_path, ACCELERATE_USE_CPU='true')
    assert processes.ended(*both) == [0, 0], processes.said(tmp_path / 'two.0') + processes.said(
        tmp_path / 'two.1'
    )
    two = TeacherCache(tmp_path / 'c')
    at = np.arange(2 * TRAIN)
    assert np.array_equal(one.rows(at % TRAIN, at // TRAIN), two.rows(at % TRAIN, at // TRAIN))
    (e, a), (f, b) = [torch.load(tmp_path / f'{i}.pt', weights_only=True) for i in (0, 1)]
    assert max(e, f) < 1e-5
    # in each epoch, what they see together are different samples, all but those of the last, incomplete batches
    stored = torch.cat([two.outputs(np.arange(TRAIN), v).logits for v in range(2)])
    for seen in map(torch.cat, zip(a, b)):
        far, at = (seen[:, None] - stored).abs().amax(2).min(1)
        assert far.max() < 1e-4 and len(seen) == len(set((at % TRAIN).tolist())) == 18


def test_a_copy_of_the_dataloaders_is_found_and_freed(tmp_path):
    import copy

    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=2)
    learn = student(data())
    own = learn.dls
    feed = cached.feed(StoredOutputs(cache), learn)
    learn.dls = copy.deepcopy(own)
    assert len(learn.dls.one_batch()) == 3
    feed.detach()
    assert len(learn.dls.one_batch()) == 2 == len(own.one_batch())


def test_a_teacher_learner_with_its_classes_in_another_order(tmp_path):
    mine, theirs = data(), data(block=CategoryBlock(vocab=['b', 'c', 'a'], sort=False))
    teacher = Learner(theirs, Convs(3))
    cache = cache_teacher(teacher, mine, tmp_path, views=1, store=dict(dtype='float32'))
    assert cache.manifest.vocab == ['b', 'c', 'a']
    c = compare(student(data()), cache, Teacher(teacher.model), 1)
    assert c.seen
    for _, _, got, live, _ in c.seen:
        torch.testing.assert_close(got, live[:, [2, 0, 1]], rtol=1e-4, atol=1e-5)
    with pytest.raises(DistillError, match=r'does not have the class\(es\) d'):
        cache_teacher(teacher, data(get_y=lambda i: 'abd'[i % 3]), tmp_path / 'b')
    both = [teacher, Learner(mine, Convs(3, seed=1))]
    cache = cache_teacher(both, mine, tmp_path / 'c', views=1, store=dict(dtype='float32'))
    assert cache.manifest.vocab == ['a', 'b', 'c']
    live = Teacher([Teacher(teacher.model, select=[2, 0, 1]), both[1].model])
    assert compare(student(data()), cache, live, 1).error < 1e-5
    chosen = Teacher(teacher_of(both, mine), select=[1, 0, 2])  # classes of which member?
    with pytest.raises(DistillError, match='members of the ensemble have different class orders'):
        cache_teacher(chosen, mine, tmp_path / 'd')


@pytest.mark.parametrize('names', ['dbca', 'abcd', 'dabc'])
@pytest.mark.parametrize('store', ['float32', 'hidden', dict(topk=2, dtype='float32')])
def test_a_class_that_only_a_teacher_learner_has_is_ignored_as_without_a_cache(
    store, names, tmp_path
):
    plain = partial(data, augment='none', item_tfms=Resize(SIZE))  # it is not about views
    mine, theirs = plain(), plain(block=CategoryBlock(vocab=[*names], sort=False))
    torch.manual_seed(0)
    net = Convs(4)
    if store == 'hidden':
        net = nn.Sequential(Convs(5), nn.ReLU(), nn.Linear(5, 4))
    teacher = Learner(theirs, net)
    cache = cache_teacher(teacher, mine, tmp_path, views=1, store=store)
    live = teacher_of(teacher, mine, Task('softmax', 1))
    c = compare(student(plain()), cache, live, 1)
    assert c.seen
    for _, _, got, of_live, x in c.seen:
        want = Teacher(net)(x.as_subclass(torch.Tensor)).logits[:, [names.index(k) for k in 'abc']]
        torch.testing.assert_close(of_live, want)
        if isinstance(store, dict):
            top = want.log_softmax(1).topk(2)
            torch.testing.assert_close(got.gather(1, top.indices), top.values)
        else:
            close = dict(rtol=0.02, atol=0.02) if store == 'hidden' else {}
            torch.testing.assert_close(as_dense(got), want, **close)
    assert verify_cache(cache, teacher, plain(), n=4).worst < 0.02


def test_stored_classes_that_the_labels_do_not_have_are_ignored(tmp_path):
    "Of the likeliest classes, some may be missing, so these are refused"
    theirs = data(block=CategoryBlock(vocab=[*'dbca'], sort=False))
    teacher = Learner(theirs, Convs(4))
    cache = cache_teacher(teacher, theirs, tmp_path / 'a', store='float32')
    c = compare(student(data()), cache, Teacher(teacher.model, select=[3, 1, 2]), 1)
    assert c.seen
    assert c.error < 1e-5
    few = cache_teacher(teacher, theirs, tmp_path / 'b', store=dict(topk=2))
    with pytest.raises(
        DistillError, match='The teacher has 4 classes, but the labels have 3, .* Remove d'
    ):
        cached.feed(StoredOutputs(few), student(data()))


def test_the_doctor_sees_the_teacher_first(tmp_path):
    "The same findings as before training: nothing is written from a teacher that would teach nonsense"
    with (
        pytest.raises(DistillError, match='outputs are probabilities'),
        pytest.warns(DistillWarning),
    ):
        checked_first(nn.Sequential(Convs(3), nn.Softmax(1)).eval(), data(), tmp_path)
    with pytest.warns(DistillWarning, match='no better than chance'):
        with pytest.warns(DistillWarning, match='seems to be untrained'):
            checked_first(Convs(3).eval(), data(), tmp_path / 'c')
    student, _ = apps.text_classifier()
    _, teacher = apps.text_classifier(vocab=[*apps.WORDS[:2], *apps.WORDS[:1:-1]])
    with pytest.raises(DistillError, match='code their tokens differently'):
        checked_first(teacher, student.dls, tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == ['c']


@pytest.mark.parametrize('views', [2, 0])
def test_data_without_a_datablock(tmp_path, views):
    "A TfmdLists of pictures, and a plain list of tensors"

    def pair(i):
        return image(i), torch.tensor(i % 3)

    tl = TfmdLists(list(range(N)), pair, splits=[list(range(TRAIN)), list(range(TRAIN, N))])
    make = lambda: tl.dataloaders(
        bs=4,
        num_workers=0,
        after_item=[*CROPS(), ToTensor()],
        after_batch=[IntToFloatTensor(), *AUGMENT['usual']()],
    )
    teacher = Teacher(Convs(3))
    cache = cache_teacher(
        teacher,
        make(),
        tmp_path / 'a',
        views=views,
        store=dict(dtype='float32'),
        kind='softmax',
        axis=1,
    )
    if views:
        assert (
            compare(
                Learner(make(), Convs(3), loss_func=apps.CrossEntropyLossFlat()), cache, teacher, 2
            ).error
            < 1e-5
        )
    else:
        clean = tl._new(
            list(range(TRAIN)), split_idx=1
        )  # the training items through the transforms of validation
        with torch.no_grad():
            want = Convs(3).eval()(torch.Tensor(make().valid.new(clean, bs=TRAIN).one_batch()[0]))
        torch.testing.assert_close(
            cache.outputs(np.arange(TRAIN)).logits, want, rtol=1e-4, atol=1e-5
        )
    items = list(zip(torch.rand(N, 3, 8, 8), torch.arange(N) % 3))
    dls = DataLoaders.from_dsets(items[:TRAIN], items[TRAIN:], bs=4, num_workers=0, device='cpu')
    cache = cache_teacher(
        teacher,
        dls,
        tmp_path / 'b',
        views=min(views, 1),
        store=dict(dtype='float32'),
        kind='softmax',
        axis=1,
    )
    assert (
        compare(
            Learner(dls, Convs(3), loss_func=apps.CrossEntropyLossFlat()), cache, teacher, 2
        ).error
        < 1e-5
    )


def test_rows_that_nobody_reads_change_nothing(tmp_path):
    "views=0 replays nothing: the same weights to the last bit as without a cache"
    cache = cache_teacher(Convs(3).eval(), data(augment='colours'), tmp_path, views=0, valid=True)

    def run(*cbs):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        learn = student(data(augment='colours'))
        quiet(learn, 2, cbs=[*cbs, MixUp()])
        return learn.model.state_dict()

    class Attached(Compare):
        def after_loss(self):
            assert self.source.has_outputs(samples_of(self.learn))

    a, b = run(), run(Attached(StoredOutputs(cache), None))
    assert all(torch.equal(a[k], b[k]) for k in a)
