"A teacher's outputs from anywhere, beside the label: nothing else may notice."

import numpy as np
import pandas as pd
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, MSELossFlat
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.all import (
    CategoryBlock,
    DataBlock,
    IndexSplitter,
    ItemGetter,
    MultiCategoryBlock,
    RegressionBlock,
    TensorCategory,
    TransformBlock,
    get_c,
)
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.vision.all import (
    Flip,
    ImageBlock,
    MaskBlock,
    Normalize,
    PILImage,
    PILMask,
    PointBlock,
    TensorImage,
    aug_transforms,
)
from torch import nn
import torch.nn.functional as F
from fastdistill.fastai import KnowledgeDistillation, hint
from fastdistill.fastai.teacher_block import TeacherBlock
from cached import feed
from fastdistill.fastai.held_outputs import GivenOutputs
from fastdistill.fastai.teacher_targets import TeacherTarget, TeacherTargets, samples_of
from fastdistill.base.outputs import DistillError

pytestmark = pytest.mark.filterwarnings(
    *apps.FASTAI_WARNINGS, 'ignore:__array__ implementation:DeprecationWarning'
)

N, C = 24, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (N, 16, 16, 3), dtype=np.uint8)
ROWS = RNG.normal(size=(N, C)).astype('f4')


def image(i):
    return PILImage.create(IMAGES[i])


def label(i):
    return 'abc'[i % 3]


def row(i):
    return ROWS[i]


def number(i):
    return torch.tensor([float(i)])


class Flat(nn.Module):
    def __init__(self, n=3 * 16 * 16, c=C):
        super().__init__()
        self.l = nn.Linear(n, c)

    def forward(self, x):
        return self.l(x.flatten(1))


def block(label=CategoryBlock, get=label, target=TeacherBlock, row=row, **kwargs):
    kwargs = dict(batch_tfms=[*aug_transforms(), Normalize.from_stats(*[[0.5] * 3] * 2)]) | kwargs
    return DataBlock(
        (ImageBlock, label, target),
        get_x=image,
        get_y=[get, row],
        splitter=IndexSplitter(range(16, N)),
        **kwargs,
    )


def data(bs=8, num_workers=0, **kwargs):
    return block(**kwargs).dataloaders(range(N), bs=bs, num_workers=num_workers)


def quiet(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, **kwargs)
    return learn


class Spy(TeacherTargets):
    "Reads what a feed gives in each batch of a fit"

    order = 50

    def __init__(self, source, kind='softmax'):
        super().__init__()
        self.source, self.kind, self.got = source, kind, []

    def before_fit(self):
        self.feed = feed(self.source, self.learn, self.kind)

    def before_train(self):
        self.feed.begin(self.epoch)

    def before_batch(self):
        pass

    def after_pred(self):
        pass

    def after_loss(self):
        t = self.source.outputs(self.learn.xb, samples_of(self.learn)).logits
        self.got.append((self.learn.x, self.learn.yb, t, self.learn.training))

    def after_fit(self):
        self.feed.detach()


@pytest.mark.parametrize('workers', [0, 2])
def test_each_target_stays_with_its_item(workers):
    dls = DataBlock(
        (TransformBlock, RegressionBlock, TeacherBlock),
        get_x=number,
        get_y=[lambda i: float(i), row],
        splitter=IndexSplitter(range(16, N)),
    ).dataloaders(range(N), bs=4, num_workers=workers)
    for x, _, t in dls.train:
        torch.testing.assert_close(
            torch.Tensor(t), torch.from_numpy(ROWS[x.long().flatten()]), rtol=0, atol=0
        )


def test_the_data_is_what_the_label_says_and_no_transform_touches_the_target():
    dls = data()
    assert (
        dls.c == C
        and list(dls.vocab) == ['a', 'b', 'c']
        and dls.n_inp == 1
        and 'CrossEntropy' in repr(dls.loss_func)
    )
    x, y, t = dls.one_batch()
    assert type(x) is TensorImage and type(y) is TensorCategory and type(t) is TeacherTarget
    known = torch.from_numpy(ROWS)
    assert all((known == o).all(1).any() for o in t)


def test_columns_of_a_table_and_other_labels():
    df = pd.DataFrame(dict(i=range(N), y=[label(i) for i in range(N)], p=[list(r) for r in ROWS]))
    dls = DataBlock.from_columns(
        (TransformBlock, CategoryBlock, TeacherBlock),
        get_items=lambda d: [d.i, d.y, d.p],
        getters=[[ItemGetter(0), number], ItemGetter(1), ItemGetter(2)],
    ).dataloaders(df, bs=8)
    assert dls.n_inp == 1 and dls.c == C
    dls = data(label=MultiCategoryBlock, get=lambda i: [label(i), 'd'])
    assert dls.c == 4 and 'BCE' in repr(dls.loss_func) and dls.one_batch()[1].shape == (8, 4)
    dls = data(
        label=MaskBlock(codes=['x', 'y']),
        get=lambda i: PILMask.create(IMAGES[i][..., 0] % 2),
        row=lambda i: np.zeros((2, 16, 16), 'f4'),
    )
    assert [tuple(o.shape) for o in dls.one_batch()] == [
        (8, 3, 16, 16),
        (8, 16, 16),
        (8, 2, 16, 16),
    ] and get_c(dls) == 2


def test_a_learner_that_knows_nothing_of_teachers_works():
    learn = quiet(Learner(data(), Flat(), metrics=accuracy), 2)
    with learn.no_bar():
        alone, acc = learn.validate()
        assert 0 <= acc <= 1
        p, y = learn.get_preds()
        assert alone == pytest.approx(F.nll_loss(p.log(), torch.Tensor(y).long()).item(), rel=1e-5)
        assert learn.predict(3)[0] in 'abc'
        learn.show_results()
    learn.dls.show_batch()
    quiet(learn, cbs=MixUp())
    quiet(learn, cbs=CutMix())
    assert isinstance(learn.loss_func, type(learn.dls.loss_func))


def test_training_is_the_same_as_without_the_block():
    plain = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=image,
        get_y=label,
        splitter=IndexSplitter(range(16, N)),
        batch_tfms=aug_transforms(),
    )

    def run(blk):
        torch.manual_seed(0)
        np.random.seed(0)
        import random

        random.seed(0)
        learn = Learner(blk.dataloaders(range(N), bs=8, num_workers=0), Flat())
        torch.manual_seed(1)
        random.seed(1)
        learn.dls.train.rng = random.Random(2)
        return quiet(learn, cbs=MixUp()).model.l.weight

    torch.testing.assert_close(run(block(batch_tfms=aug_transforms())), run(plain), rtol=0, atol=0)


def test_a_loss_of_three_arguments_gets_the_target_and_metrics_do_not():
    seen = []

    def loss(out, y, y_teacher):
        seen.append(y_teacher)
        return F.cross_entropy(out, y) + F.mse_loss(out, y_teacher)

    learn = quiet(Learner(data(), Flat(), loss_func=loss, metrics=accuracy))
    assert len(seen) == 3 and all(type(o) is TeacherTarget and o.shape == (8, C) for o in seen)
    assert 0 <= learn.recorder.values[-1][2] <= 1


def one_hots():
    "Image i has a 1 in channel i alone, so that the mean of a mixed image says how much of whom is in it"

    def get_x(i):
        return TensorImage(torch.eye(16)[i][:, None, None].expand(16, 8, 8).clone())

    def get_y(i):
        return 'abc'[i % 3]

    return get_x, get_y


@pytest.mark.parametrize('mix', [MixUp(0.8), CutMix(1.0)], ids=['mixup', 'cutmix'])
@pytest.mark.parametrize('kind', ['softmax', 'sigmoid', 'regression'])
def test_mixed_batches_get_the_mixture_of_the_teachers_probabilities(mix, kind):
    get_x, get_y = one_hots()
    dls = DataBlock(
        (TransformBlock, CategoryBlock, TeacherBlock),
        get_x=get_x,
        get_y=[get_y, row],
        splitter=IndexSplitter([0, 1]),
    ).dataloaders(range(16), bs=7, num_workers=0)
    spy = Spy(GivenOutputs(), kind)
    quiet(Learner(dls, Flat(16 * 64), cbs=[mix]), cbs=spy)
    act, rows = (
        dict(softmax=lambda z: z.softmax(1), sigmoid=torch.sigmoid, regression=lambda z: z)[kind],
        torch.from_numpy(ROWS[:16]),
    )
    mixed = 0
    for x, _, t, training in spy.got:
        share = torch.Tensor(x).mean((2, 3))  # (B, 16): of whom this image is made
        torch.testing.assert_close(act(t), share @ act(rows), rtol=1e-5, atol=1e-5)
        mixed += int(training and (share.max(1).values < 0.999).any())
        if not training:
            assert (share.max(1).values == 1).all()
    assert mixed


def test_probabilities_become_logits_again():
    p = torch.tensor(ROWS).softmax(1).numpy()
    t = data(target=TeacherBlock('probabilities'), row=lambda i: p[i]).one_batch()[2]
    assert all(
        (torch.from_numpy(p) - o.softmax(0)).abs().sum(1).min() < 1e-5 for o in torch.Tensor(t)
    )
    q = torch.tensor(ROWS).sigmoid().numpy()
    q[0] = [0, 1, 0.5]
    t = TeacherBlock('label_probabilities').type_tfms[0](q[0])
    torch.testing.assert_close(torch.Tensor(t).sigmoid(), torch.tensor([0, 1, 0.5]))
    assert t.isfinite().all()


def test_class_names_are_mapped():
    dls = data(target=TeacherBlock(vocab=['c', 'a', 'b']))
    spy = Spy(GivenOutputs())
    quiet(Learner(dls, Flat()), cbs=spy)
    known = torch.from_numpy(ROWS[:, [1, 2, 0]])
    assert all((known == o).all(1).any() for *_, t, _ in spy.got for o in t)
    for names, say in [
        (['c', 'a', 'x'], r'does not have the class\(es\) b'),
        (['a', 'b', 'c', 'd'], 'The teacher has 4 classes'),
    ]:
        learn = Learner(
            data(target=TeacherBlock(vocab=names), row=lambda i: np.zeros(len(names), 'f4')), Flat()
        )  # noqa: B023
        with pytest.raises(DistillError, match=say):
            feed(GivenOutputs(), learn)


@pytest.mark.parametrize(
    'target,value,say',
    [
        (TeacherBlock(n_out=4), [1, 2, 3], r'shape \(3,\), but TeacherBlock expects 4 values'),
        (TeacherBlock, [1, float('nan'), 3], 'nan or infinite'),
        (TeacherBlock('probabilities'), [1, 2, 3], "use given='logits'"),
    ],
)
def test_wrong_rows_are_refused(target, value, say):
    target = target if isinstance(target, TeacherBlock) else target()
    with pytest.raises(DistillError, match=say):
        target.type_tfms[0](value)


def test_wrong_options_are_refused():
    with pytest.raises(
        DistillError, match="given='probs': must be one of 'logits', 'probabilities'"
    ):
        TeacherBlock('probs')


def test_probabilities_taken_for_logits_are_refused():
    p = torch.tensor(ROWS).softmax(1).numpy()
    learn = Learner(data(row=lambda i: p[i]), Flat())
    match = r"outputs are probabilities.*TeacherBlock\(given='probabilities'\)"
    with pytest.raises(DistillError, match=match):
        quiet(learn, cbs=KnowledgeDistillation())


def test_a_target_among_the_inputs_is_refused():
    blocks = TransformBlock, TeacherBlock, CategoryBlock
    dls = DataBlock(blocks, n_inp=2, getters=[lambda i: torch.zeros(768), row, label]).dataloaders(
        range(N), bs=4
    )
    with pytest.raises(DistillError, match='pass n_inp=1'):
        quiet(Learner(dls, Flat()))


def rows_with_pixels(i):
    return np.random.default_rng(i).normal(size=(C, 8, 8)).astype('f4')


def pixel_dls(**kwargs):
    return DataBlock(
        (ImageBlock, RegressionBlock(C), TeacherBlock),
        get_x=lambda i: PILImage.create(np.ascontiguousarray(IMAGES[i][:8, :8])),
        get_y=[lambda i: ROWS[i], rows_with_pixels],
        splitter=IndexSplitter([0, 1]),
        **kwargs,
    ).dataloaders(range(16), bs=7, num_workers=0)


def three_arguments(out, y, y_teacher):
    return F.mse_loss(out, y) + y_teacher.mean()


def test_mixup_mixes_each_pixel_of_the_teacher():
    get_x, get_y = one_hots()
    dls = DataBlock(
        (TransformBlock, CategoryBlock, TeacherBlock),
        get_x=get_x,
        get_y=[get_y, rows_with_pixels],
        splitter=IndexSplitter([0, 1]),
    ).dataloaders(range(16), bs=7, num_workers=0)
    spy = Spy(GivenOutputs())
    quiet(Learner(dls, Flat(16 * 64), cbs=[MixUp(0.8)]), cbs=spy)
    rows = torch.stack([torch.from_numpy(rows_with_pixels(i)) for i in range(16)]).softmax(1)
    for x, _, t, _ in spy.got:
        want = torch.einsum('bn,nchw->bchw', torch.Tensor(x).mean((2, 3)), rows)
        torch.testing.assert_close(t.softmax(1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('loss', [None, three_arguments])
def test_cutmix_is_refused_if_the_teachers_rows_have_pixels(loss):
    "Its region is unknown here, and mixing by area would be wrong for every pixel"
    learn = Learner(pixel_dls(), Flat(3 * 64), loss_func=loss, cbs=[CutMix()])
    with pytest.raises(DistillError, match='CutMix pastes a region.*a value for each pixel'):
        quiet(learn, cbs=[] if loss else Spy(GivenOutputs()))


@pytest.mark.parametrize('loss', [None, three_arguments])
def test_flips_are_refused_if_the_teachers_rows_have_pixels(loss):
    learn = Learner(pixel_dls(batch_tfms=Flip()), Flat(3 * 64), loss_func=loss)
    with pytest.raises(DistillError, match='rows belong to the raw items.* but Flip would move'):
        quiet(learn, cbs=[] if loss else Spy(GivenOutputs()))


@pytest.mark.parametrize('three', [False, True])
def test_flips_are_refused_if_the_teachers_rows_are_points(three):
    dls = block(PointBlock, lambda i: [[1.0, 2.0]], row=lambda i: ROWS[i, :2], batch_tfms=Flip())
    loss = (lambda out, y, y_teacher: F.mse_loss(out, y_teacher)) if three else MSELossFlat()
    learn = Learner(dls.dataloaders(range(N), bs=8, num_workers=0), Flat(c=2), loss_func=loss)
    with pytest.raises(DistillError, match='predicts points, but Flip would move'):
        quiet(learn, cbs=[] if three else KnowledgeDistillation(check=False))


def test_two_mixtures_are_refused():
    learn = Learner(
        data(label=MultiCategoryBlock, get=lambda i: [label(i)]), Flat(), cbs=[MixUp(), CutMix()]
    )
    with pytest.raises(DistillError, match='mixed twice'):
        quiet(learn, cbs=Spy(GivenOutputs()))


def test_data_without_targets_are_refused_before_the_first_batch():
    dls = DataBlock((ImageBlock, CategoryBlock), get_x=image, get_y=label).dataloaders(
        range(N), bs=8, num_workers=0
    )
    learn = Learner(dls, Flat(), default_cbs=False)
    with pytest.raises(
        DistillError, match='no teacher targets. Give KnowledgeDistillation a teacher'
    ):
        feed(GivenOutputs(), learn)
    assert not learn.cbs

    class Never(Callback):
        def before_train(self):
            raise AssertionError('training began')

    learn = Learner(dls, Flat())
    have = list(learn.cbs)
    state = torch.get_rng_state()
    with pytest.raises(
        DistillError, match='no teacher targets. Give KnowledgeDistillation a teacher'
    ):
        quiet(learn, cbs=[KnowledgeDistillation(), Never()])
    assert {type(c) for c in learn.cbs} == {type(c) for c in have} and torch.equal(
        state, torch.get_rng_state()
    )


def test_a_feed_leaves_nothing_behind():
    learn = Learner(data(), Flat(), default_cbs=False)
    fed = feed(GivenOutputs(), learn)
    assert sum(isinstance(c, TeacherTargets) for c in learn.cbs) == 1
    assert not GivenOutputs().has_outputs(samples_of(learn))
    fed.detach()
    fed.detach()
    assert not learn.cbs
    learn = Learner(data(), Flat())
    have = list(learn.cbs)
    feed(GivenOutputs(), learn).detach()
    assert list(learn.cbs) == have


def test_a_dataset_of_your_own_may_bring_targets():
    "Without a TeacherBlock: what counts is the type of the last target"
    rows = [(torch.rand(4), TensorCategory(i % 3), TeacherTarget(ROWS[i])) for i in range(N)]
    learn = Learner(
        DataLoaders.from_dsets(rows[:16], rows[16:], bs=8, num_workers=0, n_inp=1),
        nn.Linear(4, C),
        loss_func=CrossEntropyLossFlat(),
    )
    learn.dls.n_inp = 1
    quiet(learn, cbs=KnowledgeDistillation())
    assert learn.recorder.values[-1][-1] > 0


def test_stored_outputs_that_are_nan_stop_the_fit():
    rows = [
        (
            torch.rand(4),
            TensorCategory(i % 3),
            TeacherTarget(ROWS[i] * (float('nan') if i == 9 else 1)),
        )
        for i in range(N)
    ]
    dls = DataLoaders.from_dsets(rows[:16], rows[16:], bs=4, shuffle=False, num_workers=0)
    learn = Learner(dls, nn.Linear(4, C), loss_func=CrossEntropyLossFlat())
    learn.dls.n_inp = 1
    with pytest.raises(
        DistillError,
        match='Stored teacher outputs are nan or infinite .training, epoch 0, up to batch [0-3].*cache.check',
    ):
        quiet(learn, cbs=KnowledgeDistillation(check=False))
    assert learn.model.weight.isfinite().all()


def test_terms_of_layers_are_refused_where_targets_have_none():
    learn = Learner(data(), Flat())
    with pytest.raises(DistillError, match="have no layer 'l'. They have: no layers"):
        quiet(learn, cbs=KnowledgeDistillation(recipe=hint(layers={'l': 'l'})))
    assert not any('loss' in m.name for m in learn.metrics)
