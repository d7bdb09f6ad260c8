"""What several students share while they train side by side: the batches, the teacher's outputs, a
cache's rows.
"""

import random
from dataclasses import dataclass

import torch
from fastai.basics import Callback

from ..base.generators import Generators
from ..base.outputs import DistillError, Outputs, map_tensors, tensors_in
from ..base.seeds import seeded
from ..teachers.rng_stream import OwnDraws
from ..teachers.teacher import Teacher
from .batches import PARTS, restored
from .cache_feed import CacheFeed
from .language_model import in_first_order
from .targets import Feed

__all__ = ['SharedBatches', 'SharedRows', 'SharedTeacher', 'Stream', 'seeded_batches']


def seeded_batches(dl, seed: int):
    """The batches of `dl`. At the end its attributes and generators are restored.

    Args:
        dl: A DataLoader of fastai or PyTorch.
        seed: Of its shuffling and of generators in its transforms.
    """
    with (
        restored(dl),
        in_first_order(dl),
        Generators(*(getattr(dl, k, None) for k in PARTS)).seeded(seed),
    ):
        if hasattr(dl, 'rng'):
            dl.rng = random.Random(seed)
        yield from dl


class Stream:
    """The batches of one epoch. They depend on the seed alone, whatever else draws random numbers
    meanwhile.

    Args:
        of: What `generators` returns.
    """

    def __init__(self, dl, seed: int, of):
        self.batches, self.of, self.next, self.draws = seeded_batches(dl, seed), of, 0, OwnDraws()
        with seeded(seed, getattr(dl, 'device', None)), self.draws.own(of):
            pass

    def batch(self):
        """The next batch; None at the end."""
        with self.draws.own(self.of):
            b = next(self.batches, None)
        self.next += 1
        return b

    def close(self):
        with self.draws.own(self.of):
            self.batches.close()


def stop_restoring(dl):
    return dl


class StreamOf:
    """Instead of a Learner's DataLoader: its batches come from the shared stream."""

    def __init__(self, dl, ask, epoch, index):
        self.dl, self.ask, self.epoch, self.index = dl, ask, epoch, index

    def __getattr__(self, k):
        if k == 'dl':
            raise AttributeError(k)
        return getattr(self.dl, k)

    def __len__(self):
        return len(self.dl)

    def __iter__(self):
        i = 0
        while (b := self.ask((self.epoch, self.index, i))) is not None:
            yield b
            i += 1

    # a copy of a Learner that is made in a fit has the DataLoader itself
    def __reduce__(self):
        return stop_restoring, (self.dl,)


class SharedBatches(Callback):
    """Replaces the Learner's DataLoader in each phase by the shared stream of batches.

    Args:
        ask: fn((epoch, index of the DataLoader, number of the batch)) -> batch.
    """

    order = 100  # after callbacks that replace the DataLoader, such as DistributedTrainer

    def __init__(self, ask):
        super().__init__()
        self.ask, self.epochs = ask, {}

    def before_train(self):
        self._share()

    def before_validate(self):
        self._share()

    def _share(self):
        # other DataLoaders, as of a `get_preds` inside the fit, are the student's own
        i = next((i for i, dl in enumerate(self.learn.dls.loaders) if dl is self.learn.dl), None)
        if i is None:
            return
        self.learn.dl = StreamOf(self.learn.dl, self.ask, self.epochs.get(i, 0), i)
        self.epochs[i] = self.epochs.get(i, 0) + 1

    def __setattr__(self, k, v):
        # subtle: when the callback is removed, also after an error, the Learner gets its DataLoader back
        if k == 'learn' and v is None and self.learn is not None:
            if isinstance(dl := vars(self.learn).get('dl'), StreamOf):
                self.learn.dl = dl.dl
        super().__setattr__(k, v)

    # an exported Learner gets a callback that does nothing, and needs no fastdistill
    def __reduce__(self):
        return Callback, ()


@dataclass
class Pass:
    """One run of the teacher.

    Attributes:
        inputs: (args, kwargs).
        versions: Of the tensors in them, which count changes in place.
        places: The inputs, with each tensor's place in the batch instead of the tensor.
    """

    inputs: object
    versions: list
    places: object
    autocast: tuple
    layers: set
    outputs: Outputs


class SharedTeacher(Teacher):
    """Runs `teacher` once for each batch, and gives its outputs to all students. A student that
    changed its inputs, as MixUp does, gets a run of its own, unless another student had the same
    inputs.

    Args:
        wanted: The layers that all students compare.
    """

    def __init__(self, teacher: Teacher, wanted=lambda: ()):
        super().__init__(teacher)
        self.given = frozenset(
            o for o in vars(self) if not o.startswith('_')
        )  # `teacher_of` changes no option
        self.wanted, self.seed, self.places, self.passes, self.sharing = wanted, None, {}, [], False

    # students start and stop it, but it runs from the first batch to the end of all of them
    def start(self):
        return self

    def stop(self):
        if not self.sharing:
            super().stop()

    def reset(self):
        pass

    def begin_epoch(self):
        self.sharing = True
        super().start()
        super().reset()

    def end(self):
        """Restore the model."""
        self.forget()
        self.sharing = False
        super().stop()

    # a call that is no part of a batch's training, as of the doctor or where layers are paired
    def __call__(self, *x, **kw):
        return super().outputs(x, kw)

    def forget(self):
        self.seed, self.places, self.passes = None, {}, []

    def begin_batch(
        self,
        seed: int,  # of what the teacher draws for this batch
        copies,  # the batch, as each student gets it
    ):
        self.forget()
        self.seed = seed
        for b in copies:
            self.places |= {tensor_identity(t): i for i, t in enumerate(tensors_in(b))}

    def outputs(self, args=(), kwargs=None, layers=()):
        if self.seed is None:
            return super().outputs(args, kwargs, layers)
        inputs = args, kwargs or {}
        places = map_tensors(inputs, lambda t: self.places.get(tensor_identity(t)))
        for p in self.passes:
            if (
                p.autocast == autocast()
                and set(layers) <= p.layers
                and same_inputs(p, inputs, places)
            ):
                return p.outputs
        if self.passes and self.remembers:
            raise DistillError(
                f'{self.name} has a hidden state, so it can run once for each batch. But these students '
                'need two runs: they change the inputs, or have different precisions. Train them one by '
                'one.'
            )
        wanted = list(dict.fromkeys([*self.layers, *layers, *self.wanted()]))
        versions = [t._version for t in tensors_in(inputs)]
        out = self._run(inputs, wanted)
        self.passes.append(Pass(inputs, versions, places, autocast(), set(wanted), out))
        return out

    def _run(self, inputs, layers):
        device = next((t.device for t in tensors_in(inputs)), None)
        # subtle: what it draws depends on the batch alone, and not on which students asked before
        with seeded(self.seed, device):
            self.random = OwnDraws()
            return super().outputs(*inputs, layers)


def tensor_identity(t):
    return t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device


def autocast():
    on = [d for d in ('cpu', 'cuda') if torch.is_autocast_enabled(d)]
    return tuple((d, torch.get_autocast_dtype(d)) for d in on)


def same_inputs(p, inputs, places):
    """Are these the inputs of a run? Tensors that are still as they came in the batch are known by
    their place in it.
    """
    if None not in parts_in(places) and p.places == places:
        return True
    if [t._version for t in tensors_in(p.inputs)] != p.versions:
        return False
    return map_tensors(p.inputs, lambda t: None) == map_tensors(inputs, lambda t: None) and all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(tensors_in(p.inputs), tensors_in(inputs))
    )


def parts_in(o):
    if isinstance(o, (tuple, list)):
        return [v for p in o for v in parts_in(p)]
    return parts_in(list(o.values())) if isinstance(o, dict) else [o]


class SharedRows(CacheFeed):
    """Reads the rows that another feed has put into the shared batches."""

    def __init__(self, source: CacheFeed):
        super().__init__(source.cache, source.keys)
        self.source = source

    def attach(self, learn, kind='softmax', axis=1):
        Feed.attach(self, learn, kind, axis)
        self._find_order(learn.dls)
        return self

    def detach(self):
        Feed.detach(self)
