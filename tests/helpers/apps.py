"The nine applications of fastai, tiny and real: a student and a teacher on the same data, built in memory."

import functools
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import (
    Categorify,
    FillMissing,
    Normalize,
    TabularDataLoaders,
    tabular_learner,
)
from fastai.text.all import (
    AWD_LSTM,
    TextBlock,
    awd_lstm_clas_config,
    awd_lstm_lm_config,
    language_model_learner,
    text_classifier_learner,
)
from fastai.vision.all import (
    ImageBlock,
    MaskBlock,
    PointBlock,
    accuracy_multi,
    foreground_acc,
    unet_learner,
    vision_learner,
)

N, BS, SIZE = 64, 16, 16  # training items (half as many for validation), batch size, pixels


def conv(i, o, stride=2):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def small(pretrained=False, **_):
    return nn.Sequential(conv(3, 4), conv(4, 8), nn.AdaptiveAvgPool2d(1))


def big(pretrained=False, **_):
    return nn.Sequential(conv(3, 8), conv(8, 16), nn.AdaptiveAvgPool2d(1))


def pictures(n, seed=0, size=SIZE):
    "Noise with one bright square each: (n, size, size, 3) uint8, the squares' upper left corners, their colours"
    g = np.random.default_rng(seed)
    x = g.integers(0, 90, (n, size, size, 3))
    at, colour = g.integers(0, size - size // 2, (n, 2)), g.integers(0, 3, n)
    for im, (r, c), k in zip(x, at, colour):
        im[r : r + size // 2, c : c + size // 2, k] += 150
    return x.astype(np.uint8), at, colour


def of(xs):
    return lambda i: xs[i]  # items are positions


def image_dls(block, get_y, seed=0, size=SIZE, **kwargs):
    x, at, colour = pictures(N * 3 // 2, seed, size)
    ys = [get_y(*o) for o in zip(x, at, colour)]
    items = list(range(len(x)))
    return DataBlock(
        (ImageBlock, block), get_x=of(x), get_y=of(ys), splitter=IndexSplitter(items[N:]), **kwargs
    ).dataloaders(items, bs=BS, num_workers=0)


def vision(dls, n_out, y_range=None, **kwargs):
    head = lambda nf: nn.Sequential(
        nn.Flatten(),
        nn.Linear(nf * 16, n_out),
        *([] if y_range is None else [SigmoidRange(*y_range)]),
    )
    return [
        vision_learner(dls, arch, pretrained=False, n_out=n_out, custom_head=head(nf), **kwargs)
        for arch, nf in ((small, 8), (big, 16))
    ]


def image(vocab=('red', 'green', 'blue'), **kwargs):
    dls = image_dls(
        CategoryBlock(vocab=list(vocab), sort=False),
        lambda x, at, k: ['red', 'green', 'blue'][k],
        **kwargs,
    )
    return vision(dls, len(vocab), metrics=accuracy)


def multi_label():
    "Is the square red? in the upper half? in the left half?"
    dls = image_dls(
        MultiCategoryBlock(encoded=True, vocab=['red', 'up', 'left']),
        lambda x, at, k: [float(k == 0), float(at[0] < SIZE // 4), float(at[1] < SIZE // 4)],
    )
    return vision(dls, 3, metrics=accuracy_multi)


def mask_of(x, at, k):
    m = np.zeros(x.shape[:2], np.uint8)
    m[at[0] : at[0] + len(x) // 2, at[1] : at[1] + len(x) // 2] = k + 1
    return m


def unet(size=SIZE):
    dls = image_dls(MaskBlock(codes=['ground', 'red', 'green', 'blue']), mask_of, size=size)
    return [
        unet_learner(dls, arch, pretrained=False, n_out=4, metrics=foreground_acc)
        for arch in (small, big)
    ]


def points():
    dls = image_dls(
        PointBlock, lambda x, at, k: [[at[1], at[0]], [at[1] + SIZE / 2, at[0] + SIZE / 2]]
    )
    return vision(dls, 4, y_range=(-1, 1))


def image_regression():
    dls = image_dls(RegressionBlock, lambda x, at, k: 4 * float(at.sum()) / SIZE)
    return vision(dls, 1, metrics=mae)


WORDS = ['xxunk', 'xxpad', 'good', 'fine', 'bad', 'poor', 'the', 'a', 'film', 'song', 'was', 'is']


def sentences(n, seed=0, length=9):
    "Words drawn at random, and whether there are more good ones than bad ones"
    g = np.random.default_rng(seed)
    x = [
        list(np.random.default_rng([seed, i]).choice(WORDS[2:], g.integers(length - 3, length + 4)))
        for i in range(n)
    ]
    return x, [
        ['no', 'yes'][sum(w in ('good', 'fine') for w in o) > sum(w in ('bad', 'poor') for w in o)]
        for o in x
    ]


def words(o):
    return o  # a tokenizer: they are tokens already


def awd(config, n_hid):
    "Tiny, and without dropout: forward passes can be compared (fastai's WeightDropout breaks at exactly 0)"
    return {
        **config,
        **{k: 0.0 for k in config if k.endswith('_p')},
        'weight_p': 1e-12,
        'emb_sz': n_hid,
        'n_hid': n_hid,
        'n_layers': 2,
    }


def text_classifier(vocab=WORDS, classes=('no', 'yes'), **options):
    x, y = sentences(N * 3 // 2)
    items = list(range(len(x)))
    dls = DataBlock(
        (
            TextBlock(words, vocab=vocab, seq_len=16, **options),
            CategoryBlock(vocab=list(classes), sort=False),
        ),
        get_x=of(x),
        get_y=of(y),
        splitter=IndexSplitter(items[N:]),
    ).dataloaders(items, bs=BS, num_workers=0)
    return [
        text_classifier_learner(
            dls,
            AWD_LSTM,
            config=awd(awd_lstm_clas_config, h),
            pretrained=False,
            drop_mult=1.0,
            lin_ftrs=[8],
            ps=[0.0],
            seq_len=16,
            metrics=accuracy,
        )
        for h in (4, 12)
    ]


def language_model(vocab=WORDS, **options):
    "Sentences in which each word tells the next one"
    x = [[WORDS[2 + (i * j) % 10] for j in range(24)] for i in range(1, 13)] * 3
    items = list(range(len(x)))
    dls = DataBlock(
        TextBlock(words, vocab=vocab, is_lm=True, seq_len=8, **options),
        get_x=of(x),
        splitter=IndexSplitter(items[24:]),
    ).dataloaders(items, bs=8, seq_len=8, num_workers=0)
    return [
        language_model_learner(
            dls,
            AWD_LSTM,
            config=awd(awd_lstm_lm_config, h),
            pretrained=False,
            drop_mult=1.0,
            metrics=accuracy,
        )
        for h in (4, 12)
    ]


def table(n, seed=0):
    g = np.random.default_rng(seed)
    df = pd.DataFrame(
        dict(
            colour=g.choice(['red', 'green', 'blue'], n),
            shape=g.choice(['round', 'square'], n),
            length=g.normal(size=n),
            width=g.normal(size=n),
        )
    )
    df['kind'] = np.where(df.length + df.width + (df.colour == 'red') > 0.4, 'long', 'short')
    return df


def tabular(df=None):
    df = table(N * 3 // 2) if df is None else df
    dls = TabularDataLoaders.from_df(
        df,
        procs=[Categorify, FillMissing, Normalize],
        cat_names=['colour', 'shape'],
        cont_names=['length', 'width'],
        y_names='kind',
        y_block=CategoryBlock(),
        valid_idx=list(range(N, len(df))),
        bs=BS,
        num_workers=0,
    )
    return [tabular_learner(dls, layers=[h], metrics=accuracy) for h in (4, 24)]


def ratings(n, seed=0):
    g = np.random.default_rng(seed)
    u, i = g.integers(0, 8, n), g.integers(0, 8, n)
    return pd.DataFrame(
        dict(
            user=[f'u{o}' for o in u],
            item=[f'i{o}' for o in i],
            rating=1.0 + 4 * ((u * i) % 3 == 0),
        )
    )


def collab(use_nn=False, df=None):
    dls = CollabDataLoaders.from_df(
        ratings(N * 3 // 2) if df is None else df, seed=0, valid_pct=1 / 3, bs=BS, num_workers=0
    )
    return [
        collab_learner(
            dls, n_factors=h, use_nn=use_nn, layers=[h] if use_nn else None, y_range=(0, 5.5)
        )
        for h in (2, 12)
    ]


def collab_nn():
    return collab(True)


@dataclass
class App:
    "One application: how to make it, and what a test by hand has to know of it"

    make: Callable  # () -> student, teacher; untrained
    kind: str = 'softmax'
    axis: int = -1
    layers: dict = field(default_factory=lambda: {'0.1': '0.1'})  # two layers to compare
    lr: float = 0.03
    epochs: int = 8  # that the teacher is trained for
    rnn: bool = False  # ends in a tuple, and adds its regularisers to the loss

    @property
    def name(self):
        return self.make.__name__

    def task(self, s, y):
        "The task loss in plain PyTorch"
        if self.kind == 'softmax':
            s, y = flat(s, self.axis), y.long().flatten()
            return -(s - s.logsumexp(1, keepdim=True))[range(len(y)), y].mean()
        if self.kind == 'sigmoid':
            p = s.sigmoid()
            return -(y * p.log() + (1 - y) * (1 - p).log()).mean()
        return (s.flatten() - y.float().flatten()).pow(2).mean()

    def divergence(self, s, t, T=1.0):
        "From teacher to student in plain PyTorch, T^2 included"
        if self.kind == 'regression':
            return (s.flatten() - t.flatten()).pow(2).mean()
        if self.kind == 'softmax':
            p, q = [(flat(o, self.axis) / T).softmax(1) for o in (t, s)]
        else:
            p, q = [
                torch.stack([(o / T).sigmoid(), (-o / T).sigmoid()]).flatten(1).T for o in (t, s)
            ]
        return T**2 * (p * (p.log() - q.log())).sum(1).mean()

    def regularisers(self, raw):
        "What fastai's RNNRegularizer adds to a text model's loss"
        if not self.rnn:
            return 0.0
        raw, out = [o[-1] if isinstance(o, list) else o for o in raw[1:]]
        return 2.0 * out.pow(2).mean() + (raw[:, 1:] - raw[:, :-1]).pow(2).mean()


APPS = [
    App(image),
    App(multi_label, 'sigmoid'),
    App(unet, axis=1, layers={'layers.4': 'layers.4'}),
    App(points, 'regression'),
    App(image_regression, 'regression', epochs=16),
    App(
        text_classifier, rnn=True, layers={'0.module.rnns.1': '0.module.rnns.1'}, lr=0.05, epochs=20
    ),
    App(language_model, rnn=True, layers={'0.rnns.1': '0.rnns.1'}, lr=0.1),
    App(tabular, layers={'layers.0': 'layers.0'}),
    App(collab, 'regression', layers={'u_weight': 'u_weight'}, lr=0.1, epochs=16),
    App(collab_nn, 'regression', layers={'layers.0': 'layers.0'}, epochs=16),
]


# fastai, when it loads an optimizer's state
FASTAI_WARNINGS = ['ignore:numpy.core is deprecated:DeprecationWarning']


def quiet(*learners):
    for l in learners:
        l.logger = noop
        if hasattr(l, 'progress'):
            l.remove_cb(l.progress)
    return learners


def less_sure(s, y):
    return F.binary_cross_entropy_with_logits(s, 0.2 + 0.6 * y)


def less_far(s, y):
    return F.mse_loss(s.flatten(), (0.6 * y.float() + 0.4 * y.float().mean(0)).flatten())


@functools.cache
def trained(name):
    "Weights of a trained teacher, never quite sure: who follows it, is different from who follows the labels"
    app = next(a for a in APPS if a.name == name)
    set_seed(1)
    _, teacher = quiet(*app.make())
    teacher.loss_func = dict(
        softmax=LabelSmoothingCrossEntropyFlat(0.4, axis=app.axis),
        sigmoid=less_sure,
        regression=less_far,
    )[app.kind]
    teacher.fit_one_cycle(app.epochs, app.lr)
    return teacher.model.state_dict()


def pair(app, seed=0):
    "A new student and a trained teacher on the same data"
    app = next(a for a in APPS if a.name == app) if isinstance(app, str) else app
    state = trained(app.name)
    set_seed(seed)
    student, teacher = quiet(*app.make())
    teacher.model.load_state_dict(state)
    return student, teacher


def logits(raw):
    return (raw[0] if isinstance(raw, tuple) else raw).as_subclass(torch.Tensor)


def flat(x, axis):
    return x.movedim(axis, -1).flatten(0, -2) if x.dim() > 1 else x  # rows of classes


def plain(b):
    return tuple(o.as_subclass(torch.Tensor) if isinstance(o, torch.Tensor) else o for o in b)


def answers(model, dl):
    "Logits and labels of each batch, in evaluation mode, through nothing of fastai's loop; the model's modes are put back"
    was = [m.training for m in model.modules()]
    model.eval()
    if hasattr(model, 'reset'):
        model.reset()
    with torch.no_grad():
        out = [(logits(model(*plain(b)[:-1])), plain(b)[-1]) for b in dl]
    for m, w in zip(model.modules(), was):
        m.training = w
    return out


def snapshot(model):
    "All that a fit could change in a model: weights, buffers, gradients, requires_grad, modes, hooks"
    ts = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return ts, grads, {n: p.requires_grad for n, p in model.named_parameters()}, modes(model)


def modes(model):
    "Of each module: is it in training mode, and how many hooks are on it?"
    return {
        n: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for n, m in model.named_modules()
    }


def same(a, b):
    "Are two snapshots bit-identical?"

    def eq(x, y):
        tensors = torch.is_tensor(x) + torch.is_tensor(y)
        return torch.equal(x, y) if tensors == 2 else not tensors and x == y

    return all(d.keys() == e.keys() and all(eq(d[k], e[k]) for k in d) for d, e in zip(a, b))


def distributed_on_cpu():
    "fastai's DistributedDL only knows GPUs"
    from fastai.distributed import DistributedDL

    def broadcast(self, t, rank):
        t = torch.tensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()

    DistributedDL._broadcast = broadcast


def leave_together():
    "The end of a process among several: gloo's threads abort one that ends while another still speaks to it"
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class HalfOnCPU(MixedPrecision):
    "fastai's mixed precision, which knows GPUs alone, on the CPU"

    name = 'mixed_precision'

    def before_fit(self):
        dtype = dict(bf16=torch.bfloat16, fp16=torch.float16)[str(self.amp_mode.value)]
        self.autocast, self.scales = torch.autocast('cpu', dtype=dtype), L()
        self.learn.scaler = torch.amp.GradScaler(
            'cpu', **{'enabled': dtype == torch.float16, **self.kwargs}
        )


# the smallest one: rows of 8 numbers in 4 classes, no randomness, no batch-norm


def mlp(hidden):
    return nn.Sequential(
        nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4)
    )


def rows(n=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=g)
    return x, (x[:, :4] + 0.3 * torch.randn(n, 4, generator=g)).argmax(1)


@functools.cache
def wise():
    "Weights of a trained teacher"
    (x, y), m = rows(), (set_seed(1), mlp(16))[1]
    opt = torch.optim.Adam(m.parameters(), 0.02)
    for _ in range(80):
        F.cross_entropy(m(x), y).backward()
        opt.step()
        opt.zero_grad()
    return m.state_dict()


def toy(bs=16, loss_func=None, opt_func=SGD, labels=True, seed=0, **kwargs):
    "A student Learner and a trained teacher, a plain module; batches in one order"
    teacher = mlp(16)
    teacher.load_state_dict(wise())
    x, y = rows()
    items = list(zip(x, y)) if labels else [(o,) for o in x]
    set_seed(seed)
    dls = DataLoaders.from_dsets(
        items[:64], items[64:], bs=bs, shuffle=False, num_workers=0, device='cpu'
    )
    (student,) = quiet(
        Learner(
            dls,
            mlp(6),
            loss_func=loss_func or CrossEntropyLossFlat(),
            opt_func=opt_func,
            metrics=accuracy if labels else None,
            **kwargs,
        )
    )
    return student, teacher.eval()


class CallsInside(Callback):
    "Calls a function of the Learner at an event of a fit"

    def __init__(self, call, event, order):
        self.call, self.event, self.order, self.busy = call, event, order, False

    def __call__(self, event_name):
        if event_name == self.event and not self.busy:
            self.busy = True
            self.call(self.learn)
            self.busy = False


class Rows(list):
    "A dataset with the method that `tta` calls"

    @contextmanager
    def set_split_idx(self, i):
        yield self
