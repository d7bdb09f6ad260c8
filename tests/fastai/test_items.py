"A teacher that reads the raw items, the text or the image file beside the batch: `items=`, in fastai, live and stored."

import random
from contextlib import nullcontext
from functools import partial
import numpy as np
import pandas as pd
import pytest, torch
import transformers as hf
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from apps import FASTAI_WARNINGS, language_model, quiet, tabular
from fastai.basics import (
    Callback,
    CategoryBlock,
    ColReader,
    CrossEntropyLossFlat,
    DataBlock,
    DataLoader,
    DataLoaders,
    IndexSplitter,
    Learner,
    MSELossFlat,
    RegressionBlock,
    get_image_files,
    set_seed,
)
from fastai.callback.mixup import CutMix, MixUp
from fastai.text.all import TextBlock
from fastai.vision.all import Flip, ImageBlock, PointBlock, Resize
from fastdistill import Distiller, Teacher, hint, kd, with_items
from fastdistill.fastai import (
    DistillError,
    KnowledgeDistillation,
    cache_teacher,
    check_teacher,
    compare,
    verify_cache,
)

pytestmark = pytest.mark.filterwarnings(
    *FASTAI_WARNINGS, 'ignore:The teacher is no better than chance'
)
refuses = lambda text: pytest.raises(DistillError, match=text)
N, WORDS = 36, 'the a cat dog sat ran home away'.split()


# texts: the student reads fastai's tokens, the teacher its own


def texts():
    "Labels depend on capitals, which the student's tokenizer here removes"
    g = random.Random(0)
    return [
        ' '.join(g.choice([w, w.upper()]) for w in g.choices(WORDS, k=g.randint(5, 9)))
        for _ in range(N)
    ]


def lower(texts):
    return ([w.lower() for w in t.split()] for t in texts)


def text_dls():
    df = pd.DataFrame(dict(text=texts()))
    df['label'] = [
        ['few', 'many'][sum(map(str.isupper, t.split())) > len(t.split()) / 2] for t in df.text
    ]
    block = DataBlock(
        (
            TextBlock.from_df(
                'text',
                vocab=['xxunk', 'xxpad', *WORDS],
                seq_len=16,
                tok=lower,
                rules=[],
                n_workers=1,
            ),
            CategoryBlock,
        ),
        get_x=ColReader('text'),
        get_y=ColReader('label'),
        splitter=IndexSplitter(range(24, N)),
    )
    return block.dataloaders(df, bs=6, num_workers=0)


def hf_tokenizer():
    vocab = {w: i for i, w in enumerate(['[PAD]', '[UNK]', *WORDS, *map(str.upper, WORDS)])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]', unk_token='[UNK]')


TOKENIZER = hf_tokenizer()


def tokens(rows):
    return TOKENIZER(
        list(rows['text']), padding=True, return_tensors='pt', return_token_type_ids=False
    )


def bert():
    torch.manual_seed(1)
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            num_labels=2,
        )
    ).eval()


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(10, 6, padding_idx=1), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.words(x).mean(1))


def text_student():
    torch.manual_seed(0)
    return quiet(Learner(text_dls(), Bag(), loss_func=CrossEntropyLossFlat()))[0]


class ByTokens(nn.Module):
    "Another way to the same outputs: the text is found by the student's tokens, which differ for all texts"

    def __init__(self, teacher):
        super().__init__()
        self.texts = {tuple(WORDS.index(w.lower()) + 2 for w in t.split()): t for t in texts()}
        assert len(self.texts) == N
        self.teacher = teacher

    def forward(self, x):
        return self.teacher(
            **tokens(dict(text=[self.texts[tuple(i for i in row if i != 1)] for row in x.tolist()]))
        ).logits


def trained(make, source, recipe=None, cbs=(), **options):
    "The weights after a training"
    learn = make()
    teacher = source(learn.dls)
    set_seed(3)
    for dl in learn.dls.loaders:
        dl.rng = random.Random(3)
    learn.fit(
        2,
        1e-1,
        cbs=[
            KnowledgeDistillation(teacher, recipe or kd(T=2, alpha=0.7), check=False, **options),
            *cbs,
        ],
    )
    return learn.model.state_dict()


def close(a, b, atol=1e-5):
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(a.values(), b.values()))


def test_a_text_teacher_reads_the_text_with_its_own_tokenizer(tmp_path):
    t, make = bert(), text_student
    want = trained(make, lambda dls: ByTokens(t))
    assert close(trained(make, lambda dls: Teacher(t, items=tokens)), want)
    assert not close(
        trained(make, lambda dls: Teacher(t, items=lambda rows: tokens(rows[::-1]))), want
    )
    stored = lambda dls: cache_teacher(
        Teacher(t, items=tokens),
        dls,
        tmp_path / 'c',
        kind='softmax',
        axis=1,
        store=dict(dtype='float32'),
    )
    assert close(trained(make, stored), want)
    assert (
        verify_cache(
            tmp_path / 'c', Teacher(t, items=tokens), make().dls, kind='softmax', axis=1
        ).worst
        < 1e-5
    )


def lists(rows):
    return {k: v.tolist() for k, v in tokens(rows).items()}


def arrays(rows):
    return {k: v.numpy() for k, v in tokens(rows).items()}


@pytest.mark.parametrize('form', [lists, arrays])
def test_a_teacher_takes_lists_and_arrays_as_tensors(form):
    t = bert()
    want = trained(text_student, lambda dls: Teacher(t, items=tokens))
    assert close(trained(text_student, lambda dls: Teacher(t, items=form)), want)


@pytest.mark.parametrize(
    'form',
    [
        list,
        lambda rows: np.stack([o.numpy() for o in rows]),
        lambda rows: [o.numpy() for o in rows],
        lambda rows: [o.tolist() for o in rows],
    ],
)
def test_rows_of_inputs_and_outputs_may_be_lists_and_arrays(form):
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    want = net(x).detach()
    reads = Teacher(net, items=form)
    torch.testing.assert_close(reads(with_items(x, [*x])).logits, want)
    if form is not list:  # a list of tensors is the outputs of a recurrent model
        returns = Teacher(lambda rows: form([*net(rows).detach()]), items=torch.stack)
        torch.testing.assert_close(returns(with_items(x, [*x])).logits, want)


def test_a_list_without_a_row_for_each_sample_is_refused():
    x, net = torch.randn(4, 3), nn.Linear(3, 2)
    for wrong in ([x[0], x[1]], [[1.0], [1.0, 2.0], [1.0], [1.0]], ['a', 'b', 'c', 'd'], None):
        with refuses('returned a .*a tensor or array with a row for each sample'):
            Teacher(net, items=lambda rows, wrong=wrong: wrong)(with_items(x, [*x]))


def test_a_pipeline_reads_the_raw_texts():
    learn = text_student()
    model = make_pipeline(TfidfVectorizer(lowercase=False), LogisticRegression())
    model.fit(texts()[:24], learn.dls.train_ds.items['label'])
    probs = lambda rows: torch.tensor(model.predict_proba(rows['text'])).float()
    want = trained(text_student, lambda dls: Teacher(lambda p: p.log(), items=probs))
    for form in (list, np.array, lambda column: column):
        teacher = Teacher(model, items=lambda rows, form=form: form(rows['text']))
        assert close(trained(text_student, lambda dls, teacher=teacher: teacher), want)
    teacher = Teacher(model.predict_proba, items=lambda rows: rows['text'], outputs='probs')
    assert close(trained(text_student, lambda dls: teacher), want)
    for given in (model, [model, model], Teacher(model)):
        with refuses("Pipeline|LogisticRegression.*items=lambda rows: rows\\['text'\\]"):
            learn.fit(1, cbs=KnowledgeDistillation(given))


def test_the_teacher_reads_the_items_of_unlabeled_batches_too():
    more, teacher = pd.DataFrame(dict(text=texts()[24:])), bert()
    of_items = Teacher(teacher, items=tokens)
    weights = lambda t, **options: trained(text_student, lambda dls: t, **options)
    live = weights(of_items, unlabeled=more)
    assert close(live, weights(ByTokens(teacher), unlabeled=more))
    assert not close(live, weights(of_items))


def test_layers_and_members_of_an_ensemble():
    t = bert()

    def end(teacher, layer):
        recipe = kd() + hint(layers={'out': layer}, weight=1.0)
        return trained(text_student, lambda dls: teacher, recipe=recipe)

    want = end(ByTokens(t), 'teacher.bert.pooler.activation')
    assert close(end(Teacher(t, items=tokens), 'bert.pooler.activation'), want)
    assert close(
        end(Teacher([Teacher(t, items=tokens), ByTokens(t)]), '0.bert.pooler.activation'), want
    )


# images: the student reads small crops, the teacher the file at another size


def write_images(folder):
    "Files of one color each, larger than the student's images"
    g = np.random.default_rng(0)
    for i in range(N):
        color = g.integers(0, 255, 3)
        Image.fromarray(np.broadcast_to(color, (24, 20, 3)).astype(np.uint8)).save(
            folder / f'{"dark" if color.mean() < 128 else "light"}_{i}.png'
        )


def own_pixels(paths):
    "The teacher's images: 12 x 12 and not normalized"
    return (
        torch.stack(
            [torch.from_numpy(np.array(Image.open(p).resize((12, 12)))) for p in paths]
        ).permute(0, 3, 1, 2)
        / 255
    )


def convs(width):
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 2),
    )


def image_student(folder, workers=0):
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_items=get_image_files,
        get_y=lambda p: p.name.split('_')[0],
        splitter=lambda items: IndexSplitter(
            [i for i, o in enumerate(items) if o.stem.endswith(('1', '2', '3'))]
        )(items),
        item_tfms=Resize(8),
        batch_tfms=Flip(),
    )
    return quiet(
        Learner(
            block.dataloaders(folder, bs=5, num_workers=workers),
            convs(3),
            loss_func=CrossEntropyLossFlat(),
        )
    )[0]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('images')
    write_images(path)
    return path


class ByColor:
    "Another way to the same outputs: the file is found by the color of the student's picture"

    def __init__(self, teacher, folder):
        self.teacher, self.paths = teacher, get_image_files(folder)
        self.colors = own_pixels(self.paths).mean((2, 3))

    def __call__(self, x):
        with torch.no_grad():
            return self.teacher(
                own_pixels(
                    [self.paths[i] for i in torch.cdist(x.mean((2, 3)), self.colors).argmin(1)]
                )
            )


def test_an_image_teacher_reads_the_file_at_its_own_size(folder, tmp_path):
    t, make = convs(6).eval(), lambda: image_student(folder)
    want = trained(make, lambda dls: ByColor(t, folder))
    assert close(trained(make, lambda dls: Teacher(t, items=own_pixels)), want)
    cached = lambda dls: cache_teacher(
        Teacher(t, items=own_pixels),
        dls,
        tmp_path / 'c',
        kind='softmax',
        axis=1,
        store=dict(dtype='float32'),
    )
    assert close(trained(make, cached), want)
    assert cached(make().dls).views == 0  # the student's augmentation stays random


def test_workers_make_the_batches(folder):
    t, make = convs(6).eval(), lambda: image_student(folder, 1)
    assert close(
        trained(make, lambda dls: Teacher(t, items=own_pixels)),
        trained(make, lambda dls: ByColor(t, folder)),
    )


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_the_outputs_are_mixed_as_the_batch(mix, folder, tmp_path):
    t, make = convs(6).eval(), lambda: image_student(folder)
    live, stored = [
        trained(make, o, cbs=[mix(1.0)])
        for o in (
            lambda dls: Teacher(t, items=own_pixels),
            lambda dls: cache_teacher(
                Teacher(t, items=own_pixels),
                dls,
                tmp_path / 'c',
                kind='softmax',
                axis=1,
                store=dict(dtype='float32'),
            ),
        )
    ]
    assert close(live, stored) and not close(
        live, trained(make, lambda dls: Teacher(t, items=own_pixels))
    )
    with refuses('some members of the ensemble read'):
        trained(make, lambda dls: Teacher([Teacher(t, items=own_pixels), convs(7)]), cbs=[mix(1.0)])


class Knows(nn.Module):
    "Its images of one color tell it the class"

    def forward(self, x):
        return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1) * 100


def test_the_check_scores_the_teacher_on_its_own_items(folder):
    learn = image_student(folder)
    found = learn.check_teacher(Teacher(Knows(), items=own_pixels))
    assert found.facts.teacher_score == 1 and not found.errors and found.costs is not None
    assert check_teacher(learn.dls, Teacher(Knows(), items=own_pixels)).facts.teacher_score == 1
    wrong = learn.check_teacher(Teacher(Knows(), items=lambda paths: 1 - own_pixels(paths)))
    assert wrong.facts.teacher_score < 0.2
    learn.fit(1, 1e-2, cbs=KnowledgeDistillation(Teacher(Knows(), items=own_pixels)))
    learn.explain(Teacher(Knows(), items=own_pixels))


def test_compare_times_it_on_its_own_items(folder):
    shapes = set()

    class Sees(Knows):
        def forward(self, x):
            shapes.add(tuple(x.shape[1:]))
            return super().forward(x)

    wide = lambda paths: torch.nn.functional.pad(own_pixels(paths), (0, 3))
    own = wide(get_image_files(folder)[:2]).shape[1:]
    teacher = Teacher(Sees(), items=wide)
    compare(dict(teacher=teacher, student=image_student(folder)), seconds=0.001, progress=False)
    assert shapes == {tuple(own)}


def test_compare_shows_it_its_own_items(folder):
    learn, t = image_student(folder), Teacher(Knows(), items=own_pixels)
    report = compare(dict(teacher=t, student=learn), large=4, seconds=0.001, progress=False)
    assert (
        report.models['teacher'].measures['accuracy'].value == 1
        and report.models['teacher'].cost.latency[1].batch == 4
    )
    other = learn.dls.test_dl(get_image_files(folder)[:7], with_labels=True)
    assert compare(dict(teacher=t, student=learn), dl=other, seconds=0, progress=False).n == 7
    both = compare(
        dict(
            teacher=t,
            other=Teacher(Knows(), items=lambda paths: 1 - own_pixels(paths)),
            student=learn,
        ),
        seconds=0,
        progress=False,
    )
    assert both.models['other'].measures['accuracy'].value < 0.2 and 'create_batches' not in vars(
        learn.dls.valid
    )
    rows = text_student()
    seen = []
    compare(
        dict(
            teacher=Teacher(
                bert(), items=lambda rows: (seen.extend(rows['text']), tokens(rows))[1]
            ),
            student=rows,
        ),
        seconds=0.001,
        large=20,
        progress=False,
    )
    assert (
        sorted(seen[:12]) == sorted(texts()[24:]) and len(seen) > 12 + 20
    )  # the validation set, then batches for the costs
    with refuses('pieces of one long text'):
        lm = quiet(*language_model())[0]
        compare(
            dict(teacher=Teacher(lambda x: x, items=tokens), student=lm), seconds=0, progress=False
        )


def test_a_plain_loop_hands_the_items_beside_the_batch(folder):
    t, paths = convs(6).eval(), get_image_files(folder)[:4]
    x, y, net = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), convs(3)
    teacher = Teacher(t, items=own_pixels)
    want = kd(T=2, alpha=0.7)(net(x), t(own_pixels(paths)).detach(), y)
    torch.testing.assert_close(
        Distiller(net, teacher, kd(T=2, alpha=0.7))(with_items(x, paths), y).total, want
    )
    torch.testing.assert_close(teacher(with_items(x, paths)).logits, t(own_pixels(paths)))
    assert not hasattr(x, 'raw_items')
    heads = Distiller(net, dict(a=teacher), kd(T=2, alpha=0.7))
    torch.testing.assert_close(heads(with_items(x, paths), y).total, want)
    Distiller(net, teacher, kd()).check(with_items(x, paths), y)
    Distiller(net, teacher)(with_items(x, paths), y)  # the recipe is chosen
    with refuses('3 items for a batch of 4 samples'):
        with_items(x, paths[:3])
    with refuses('2 items for a batch of no samples'):
        with_items(['a', 'b'], paths[:2])


def test_nothing_stays_behind(folder):
    learn = image_student(folder)
    state = lambda: [
        {
            k: v
            for k, v in vars(dl).items()
            if k in ('do_item', 'do_batch', 'create_batches', 'after_batch')
        }
        for dl in learn.dls.loaders
    ]
    was = state()

    class Stop(Callback):
        def after_batch(self):
            raise KeyboardInterrupt

    for cbs in ([], [Stop()]):
        with pytest.raises(KeyboardInterrupt) if cbs else nullcontext():
            learn.fit(
                1, 1e-2, cbs=[KnowledgeDistillation(Teacher(convs(6), items=own_pixels)), *cbs]
            )
        assert (
            state() == was
            and len(learn.dls.one_batch()) == 2
            and not [c for c in learn.cbs if type(c).__name__ == 'TeacherTargets']
        )


def test_the_samples_of_a_list_are_its_items():
    samples, net = [(x, i % 2) for i, x in enumerate(torch.randn(16, 4))], nn.Linear(4, 2)

    def make():
        torch.manual_seed(0)
        dls = DataLoaders.from_dsets(
            samples, samples, bs=4, shuffle=True, num_workers=0, device='cpu'
        )
        return quiet(Learner(dls, nn.Linear(4, 2), loss_func=CrossEntropyLossFlat()))[0]

    live = trained(
        make, lambda dls: Teacher(net, items=lambda samples: torch.stack([x for x, _ in samples]))
    )
    assert close(live, trained(make, lambda dls: net))


def test_points_and_maps_of_the_whole_files_are_not_given_to_flipped_images(folder):
    block = lambda target, y: DataBlock(
        (ImageBlock, target),
        get_items=get_image_files,
        get_y=y,
        item_tfms=Resize(8, 'squish'),
        batch_tfms=Flip(),
    )
    fit = lambda learn, **options: learn.fit(
        1, cbs=KnowledgeDistillation(Teacher(convs(2), items=own_pixels), check=False, **options)
    )
    of_points = block(PointBlock, lambda p: [[1.0, 2.0]]).dataloaders(folder, bs=5, num_workers=0)
    learn = quiet(Learner(of_points, convs(2), loss_func=MSELossFlat()))[0]
    with refuses('predicts points, but Flip would move'):
        fit(learn)
    numbers = block(RegressionBlock(2), lambda p: [1.0, 2.0]).dataloaders(
        folder, bs=5, num_workers=0
    )
    fit(quiet(Learner(numbers, convs(2), loss_func=MSELossFlat()))[0])


def test_maps_of_the_whole_files_are_not_given_to_flipped_unlabeled_images(folder):
    block = DataBlock(
        (ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda p: p.name.split('_')[0]
    )
    still = block.dataloaders(folder, bs=5, num_workers=0)
    learn = quiet(Learner(still, convs(3), loss_func=CrossEntropyLossFlat()))[0]
    options = dict(recipe=hint(layers={'1': '1'}, weight=1.0), check=False)
    distill = partial(KnowledgeDistillation, Teacher(convs(6), items=own_pixels), **options)
    with refuses('Flip would move the student'):
        learn.fit(1, cbs=distill(unlabeled=image_student(folder).dls.train))
    learn.fit(1, cbs=distill(unlabeled=still.train))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.two, self.three = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return dict(two=self.two(x), three=self.three(x))


def test_the_teacher_of_one_of_several_heads_reads_the_items():
    samples = [(x, i % 2, i % 3) for i, x in enumerate(torch.randn(16, 4))]
    two, three = nn.Linear(4, 2), nn.Linear(4, 3)

    def make():
        torch.manual_seed(0)
        dls = DataLoaders.from_dsets(
            samples, samples, bs=4, shuffle=True, num_workers=0, device='cpu'
        )
        dls.n_inp = 1
        loss = lambda p, a, b: (
            nn.functional.cross_entropy(p['two'], a) + nn.functional.cross_entropy(p['three'], b)
        )
        return quiet(Learner(dls, TwoHeads(), loss_func=loss))[0]

    reads = Teacher(two, items=lambda samples: torch.stack([o[0] for o in samples]))
    live = trained(make, lambda dls: dict(two=two, three=three))
    assert close(live, trained(make, lambda dls: dict(two=reads, three=three)))
    other = Teacher(two, items=lambda samples: torch.stack([-o[0] for o in samples]))
    assert not close(live, trained(make, lambda dls: dict(two=other, three=three)))


def test_where_it_cannot_work_an_error_says_so(folder, tmp_path):
    t = Teacher(convs(6), items=own_pixels)
    with refuses('raw items of these inputs are not known here'):
        t(torch.randn(2, 3, 8, 8))
    with refuses('raw items of these inputs are not known here'):
        Distiller(convs(3), t, kd())(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    with refuses('one of them'):
        Teacher(convs(6), items=own_pixels, inputs=own_pixels)
    with refuses('give a function'):
        Teacher(convs(6), items='text')
    learn = image_student(folder)
    with refuses("does not see the student's augmentation"):
        cache_teacher(t, learn.dls, tmp_path / 'c', 4, kind='softmax', axis=1)
    with refuses('Flip would move the student'):
        learn.fit(1, cbs=KnowledgeDistillation(t, hint(layers={'1': '1'}, weight=1.0), check=False))
    lm = quiet(*language_model())[0]
    with refuses('pieces of one long text'):
        lm.fit(1, cbs=KnowledgeDistillation(Teacher(lambda x: x, items=tokens), check=False))
    with refuses('pieces of one long text'):
        cache_teacher(
            Teacher(lambda x: x, items=tokens),
            lm.dls,
            tmp_path / 'l',
            kind='softmax',
            axis=-1,
            check=False,
        )
    rows = quiet(*tabular())[0]
    with refuses('frame='):
        rows.fit(1, cbs=KnowledgeDistillation(Teacher(convs(6), items=own_pixels)))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(4), torch.tensor(0))] * 8)

    stream = DataLoader(Stream(), bs=4, num_workers=0)
    loader = torch.utils.data.DataLoader([(torch.randn(4), torch.tensor(0))] * 8, 4)
    for dl, why in ((stream, 'has an iterable dataset'), (loader, 'not a fastai DataLoader')):
        plain = quiet(
            Learner(DataLoaders(dl, dl), nn.Linear(4, 2), loss_func=CrossEntropyLossFlat())
        )[0]
        with refuses(why):
            plain.fit(1, cbs=KnowledgeDistillation(Teacher(nn.Linear(4, 2), items=own_pixels)))
    texts = text_student()
    with refuses("BatchEncoding of lists.*return_tensors='pt'"):
        texts.fit(
            1,
            cbs=KnowledgeDistillation(
                Teacher(bert(), items=lambda rows: TOKENIZER(list(rows['text']))), check=False
            ),
        )
