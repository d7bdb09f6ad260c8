"""Replay batch transforms separately for each sample, and describe the transforms."""

import inspect
from functools import partial

import numpy as np
import torch
from fastai.basics import ItemTransform, Pipeline, Transform
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
from fastai.tabular.core import ReadTabBatch
from fastai.vision.augment import (
    AffineCoordTfm,
    RandomErasing,
    RandTransform,
    ResizeMethod,
    SpaceTfm,
    TensorImage,
)
from fastai.vision.core import TensorPoint
from torch import Tensor

from ..base.batch_samples import BatchSamples
from ..base.outputs import DistillError
from ..base.random_state import RandomGuard
from ..base.sample_seeds import seeds_of
from ..base.transform_random_state import access_of, hands_out_generators, reachable
from ..cache.digests import code_of, fingerprint
from ..cache.keys import hash_of
from ..cache.per_sample import PerSample, per_sample
from ..teachers.raw_items import items_at
from .language_model import is_stream

# these transforms use no random numbers and treat each sample independently
FIXED = Normalize, IntToFloatTensor, ToTensor, ReadTabBatch


class Replay(Pipeline):
    """A pipeline that replaces `after_batch` of a DataLoader. It keeps the samples in the batch.

    If `plan.random` is True, the random transforms are replayed for the view of each sample.
    """

    def __init__(self, pipe, plan):
        super().__init__(pipe, split_idx=pipe.split_idx)
        self.own, self.plan = pipe, plan

    def __call__(self, o):
        if not (isinstance(o, (tuple, list)) and len(o) and isinstance(o[-1], BatchSamples)):
            return super().__call__(o)
        (b, samples), p = o, self.plan
        if isinstance(b, list):
            b = tuple(b)  # pinning memory turns tuples into lists
        b = self.replay(b, samples) if p.random else super().__call__(b)
        if p.items is not None:
            samples.items = items_at(p.items, samples.index.tolist())
        samples.moved = p.moved
        return (*(b if isinstance(b, tuple) else (b,)), samples)

    def replay(self, b, samples):
        seen, keys, known = {}, self.plan.keys[samples.index], self.plan.transforms
        for f in self.fs:
            # subtle: seeds depend on the transform's name, not its position, since a model may add
            # a Normalize
            n = seen[type(f)] = seen.get(type(f), 0) + 1
            # subtle: ids are unique only within a process, and a plan may be sent to another one
            if id(f) not in known or known[id(f)][0] is not f:
                known[id(f)] = f, hash_of(type(f).__name__.encode()), draws_alone(f)
            _, name, alone = known[id(f)]
            seeds = seeds_of(self.plan.seed, keys, samples.view, name, n)
            b = replay_one(f, b, seeds, self.split_idx, alone)
        return b


def draws_alone(f):
    """Return True if a transform must be run on one sample at a time.

    These are transforms with their own random generator, or with a list of values for the positions
    in a batch.
    """
    listed = lambda place, o: place[2] == 'draw' and isinstance(o, (list, tuple))
    return any(
        access_of(o) or hands_out_generators(o) or listed(place, o)
        for place, o, _ in reachable([f])
    )


def replay_one(f, b, seeds, split_idx, alone):
    """Run one batch transform with different random numbers for each sample."""
    if fixed(f):
        return f(b, split_idx=split_idx)
    x = first_of(b)
    # subtle: handle these transforms before `split_idx` is checked, since they store the
    # `split_idx` of the last batch
    if isinstance(f, (AffineCoordTfm, SpaceTfm)) and isinstance(x, TensorImage):
        return (
            by_sample(f, b, seeds, split_idx) if alone else replay_drawn(f, b, x, seeds, split_idx)
        )
    if f.split_idx is not None and f.split_idx != split_idx:
        return b
    return by_sample(f, b, seeds, split_idx)


def fixed(f):
    return type(f) in FIXED or f.name == 'noop'


def by_sample(f, b, seeds, split_idx):
    """Run a transform on one sample at a time, which is slow but works for every transform."""
    return per_sample(lambda *o: f(b_of(o, b), split_idx=split_idx), seeds, *flat(b))


def replay_drawn(f, b, x, seeds, split_idx):
    """Run one of fastai's affine, warp, lighting and color transforms.

    The random numbers of all samples are generated first, on the CPU. Each sample has its own seed.
    Then the transform runs once on the whole batch.
    """
    # subtle: use at least two samples, so that a value per batch and a value per sample have
    # different shapes
    n = max(len(x), 2)
    like = TensorImage(torch.empty(1).expand(n, *x.shape[1:]))
    like.__dict__.update(x.__dict__)  # copy img_size, if it is set
    # subtle: with fastai's tensor types, each small operation would be many times slower
    with (
        RandomGuard() as guard,
        PerSample(np.resize(seeds, n)),
        torch._C.DisableTorchFunctionSubclass(),
    ):
        f.before_call((like,), split_idx)
    # the transform uses random numbers in a way that PerSample does not replace (batch=True)
    if guard.moved:
        return by_sample(f, b, seeds, split_idx)
    if not f.do:
        return b
    parts = [f, *getattr(f, 'coord_fs', []), *getattr(f, 'fs', [])]
    drawn = [
        {k: v.to(x.device) for k, v in vars(o).items() if isinstance(v, Tensor)} for o in parts
    ]
    run = lambda o: Transform.__call__(f, o, split_idx=split_idx)

    def use(sl):
        for o, d in zip(parts, drawn):
            vars(o).update({k: v[sl] if v.dim() and len(v) == n else v for k, v in d.items()})

    if not any(coupled(f, o) for o in flat(b) if isinstance(o, TensorImage)):
        use(slice(len(x)))
        return run(b)
    outs = []
    for i in range(len(x)):
        use(slice(i, i + 1))
        outs.append(run(b_of([o[i : i + 1] for o in flat(b)], b)))
    return tuple(torch.cat(o) for o in zip(*outs))


def coupled(f, x):
    """Return True if the result of a sample depends on the other samples of the batch.

    For large zooms, fastai first shrinks all images by the largest zoom in the batch.
    """
    if not isinstance(f, AffineCoordTfm):
        return False
    size = x.shape[-1] if f.size is None else f.size if isinstance(f.size, int) else f.size[1]
    # subtle: in fastai, `_grid_sample` compares the height with the new width, and the width with 2
    return min(x.shape[-2] / size, x.shape[-1] / 2) > 2


def first_of(b):
    while isinstance(b, tuple):
        b = b[0]
    return b


def flat(b):
    b = b if isinstance(b, tuple) else (b,)
    if not all(isinstance(o, Tensor) for o in b):
        raise DistillError(
            f"Can't replay transforms of a batch of {', '.join(type(o).__name__ for o in b)}: only "
            'tensors can be split into samples. Use views=0.'
        )
    return b


def b_of(o, b):
    return tuple(o) if isinstance(b, tuple) else o[0]


def describe_transforms(dl) -> dict:
    """Return {name: description} of all transforms that are replayed.

    `Normalize` is not included, since each model may have its own.
    """
    out = {}
    if is_stream(dl):
        out['stream'] = f'{dl.bs} rows of {dl.bl} tokens, {dl.seq_len} at a time'
    tls = getattr(dl.dataset, 'tls', [])[: getattr(dl.dataset, 'n_inp', 1)]
    # functions that read items are not described, since the items themselves are compared
    for i, tl in enumerate(tls):
        name_each(
            out, f'input {i}', [f for f in tl.tfms.fs if type(f) not in (Transform, ItemTransform)]
        )
    for k in ('after_item', 'before_batch', 'after_batch'):
        if isinstance(getattr(dl, k, None), Pipeline):
            name_each(out, k, getattr(dl, k).fs)
    own = [
        type(f).__name__
        for f in dl.after_batch.fs
        if not (fixed(f) or isinstance(f, (AffineCoordTfm, SpaceTfm)))
    ]
    # the same seed generates different random numbers on different types of devices
    if own:
        out[f'device of {", ".join(own)}'] = getattr(dl.device, 'type', 'cpu')
    return out


def name_each(out, where, fs):
    for i, f in enumerate(fs):
        if f.name == 'noop' or isinstance(f, ReadTabBatch):
            continue
        # describe Normalize only if a random transform follows, such as RandomErasing, whose noise
        # depends on the normalization
        if isinstance(f, Normalize) and all(map(fixed, fs[i + 1 :])):
            continue
        name = f'{where}: {f.name.split(" -- ")[0]}'
        n = sum(k == name or k.startswith(f'{name} #') for k in out)
        out[name if not n else f'{name} #{n + 1}'] = in_words(f)


PASSING_STATE = {'self', 'counter', 'lengths'}  # these attributes depend on the data seen so far


def in_words(o, depth=6):
    """Return an object's options as text. Attributes with random numbers are left out."""
    say = lambda v: in_words(v, depth - 1)
    if isinstance(o, (str, bool, type(None))):
        return repr(o)
    # the repr of NumPy numbers differs between versions
    if isinstance(o, (int, float, np.number)):
        return repr(float(o))
    if depth == 0:
        return type(o).__name__
    if isinstance(o, (Tensor, np.ndarray)):
        return f'{type(o).__name__} {fingerprint(o)[:12]}'
    if isinstance(o, partial):
        return f'{say(o.func)}{say([*o.args, *sorted(o.keywords.items())])}'
    if inspect.isroutine(o) or isinstance(o, type):
        return code_of(o)
    if isinstance(o, dict):
        o = list(o.items())
    if hasattr(o, '__iter__') and hasattr(o, '__len__') and not isinstance(o, Transform):
        if len(o) > 50:
            return f'{type(o).__name__} of {len(o)}, {hash_of(repr(list(o)).encode()):x}'
        return f'[{", ".join(map(say, o))}]'
    named = set(inspect.signature(type(o).__init__).parameters) | {'aff_fs', 'coord_fs', 'fs'}
    attrs = sorted(getattr(o, '__dict__', {}).items())
    options = {k: v for k, v in attrs if k in named - PASSING_STATE and not inspect.ismethod(v)}
    return f'{type(o).__name__}({", ".join([*own_code(o), *(f"{k}={say(v)}" for k, v in options.items())])})'


def own_code(o):
    """Return a list with a fingerprint of a transform's code. Empty for transforms of fastai."""
    if type(o) is Transform:
        return (
            [code_of(m.implementation) for m in o.encodes.methods] if hasattr(o, 'encodes') else []
        )
    if type(o).__module__.split('.')[0] in ('fastai', 'fasttransform', 'fastcore'):
        return []
    return [code_of(type(o))]


def augmented(dl):
    """Return the random transforms of the training set."""
    if getattr(getattr(dl, 'dataset', None), 'split_idx', 1) != 0:
        return []
    parts = (getattr(dl, k) for k in ('after_item', 'after_batch'))
    return [f for part in parts for f in getattr(part, 'fs', []) if isinstance(f, RandTransform)]


def moves(dl):
    """Return the names of the random transforms that move pixels to other positions."""
    squishes = lambda f: getattr(f, 'method', None) == ResizeMethod.Squish
    stays = lambda f: isinstance(f, (SpaceTfm, RandomErasing)) or squishes(f)
    return [type(f).__name__ for f in augmented(dl) if not stays(f)]


def labels_are_points(dls, head=None) -> bool:
    """Return True if labels are points or boxes, which random transforms move with the pixels.

    Args:
        dls: The DataLoaders.
        head: The student's head whose labels are checked. None to check all labels.
    """
    ds, n_inp = dls.train.dataset, dls.n_inp
    with RandomGuard():  # a transform of the labels may be random
        if hasattr(ds, 'tls'):
            found = [tl[0] for tl in ds.tls[n_inp:]] if len(ds) else []
        else:
            sample = ds[0] if len(ds) else ()
            found = [*sample[n_inp:]] if isinstance(sample, (tuple, list)) else []
    if head is not None:
        found = found[head.at : head.at + 1]
    return any(isinstance(o, TensorPoint) for o in found)


def refuse_moved_points(dls, heads=(None,)):
    """Raise an error if teacher outputs of the raw items are points, but random transforms move the
    points of the student's input.

    Args:
        dls: The DataLoaders.
        heads: Heads whose teachers read raw items and predict numbers. None stands for the whole
            student.
    """
    if (moving := moves(dls.train)) and any(labels_are_points(dls, h) for h in heads):
        raise DistillError(
            f'The teacher reads the raw items and predicts points, but {", ".join(moving)} would '
            "move the student's input. Remove these transforms, or use a teacher that reads the "
            'batch: Teacher(model, inputs=fn).'
        )
