"The ways to distill that are timed: ours, those of other packages, and loops written by hand. All but one use `kd`."

import shutil, tempfile, weakref
from functools import partial
from typing import Callable
import torch
import torch.nn.functional as F
from fastai.basics import Callback, CancelValidException, Learner
from fastai.optimizer import OptimWrapper
from fastdistill.base.outputs import DistillError, as_plain
from fastdistill.fastai import KnowledgeDistillation, Teacher, cache_teacher, kd
from fastdistill.teachers.fast_copy import AS_IT_IS
from fastdistill.teachers.teacher import say_with
from .pairs import loss_of

__all__ = ['FLOOR', 'WAYS', 'Fit', 'Loop']

TEMPERATURE, ALPHA = 4.0, 0.9
FLOOR = 'no teacher'
sgd = partial(OptimWrapper, opt=torch.optim.SGD)


def plain_logits(out):
    return as_plain(out[0] if isinstance(out, tuple) else out)


def soft_loss(s, t, axis):
    "The three lines that everybody writes"
    p, q = F.log_softmax(s / TEMPERATURE, axis), F.softmax(t / TEMPERATURE, axis)
    return F.kl_div(p, q, reduction='none').sum(axis).mean() * TEMPERATURE**2


class Fit:
    "A fit of fastai, one epoch at a time"

    def __init__(
        self,
        pair,
        batches,
        callbacks,  # fn(pair, teacher, DataLoaders) -> callbacks
    ):
        student, teacher = pair.models()
        dls = pair.data(batches)
        self.learn = Learner(
            dls, student, loss_func=loss_of(pair), opt_func=sgd, cbs=pair.callbacks()
        )
        self.learn.remove_cbs([c for c in self.learn.cbs if type(c).__name__ == 'ProgressCallback'])
        self.callbacks = callbacks(pair, teacher, dls)

    def run(self, clock):
        "One epoch. `clock` marks the end of each step"
        with self.learn.no_logging():
            self.learn.fit(1, 1e-3, cbs=[*self.callbacks, Marks(clock), NoValidation()])


class Marks(Callback):
    "Marks the end of each training step"

    order = 100

    def __init__(self, clock):
        self.clock = clock

    def before_train(self):
        self.clock.start()

    def after_batch(self):
        if self.training:
            self.clock.mark()


class NoValidation(Callback):
    order = -100

    def before_validate(self):
        raise CancelValidException


class Loop:
    "A plain PyTorch loop"

    def __init__(
        self,
        pair,
        batches,
        loss,  # fn(pair, student, teacher) -> fn(x, y) -> loss of a batch
    ):
        self.student, teacher = pair.models()
        self.dl = pair.data(batches).train
        self.loss, self.opt = (
            loss(pair, self.student, teacher),
            torch.optim.SGD(self.student.parameters(), lr=1e-3),
        )
        self.student.train()

    def run(self, clock):
        clock.start()
        for *x, y in self.dl:
            self.loss([as_plain(o) for o in x], as_plain(y)).backward()
            self.opt.step()
            self.opt.zero_grad()
            clock.mark()


# of ours

KD = kd(TEMPERATURE, ALPHA)


def live(pair, teacher, dls, recipe=KD, **options):
    return [KnowledgeDistillation(Teacher(teacher, **options), recipe, check=False)]


def free(pair, teacher, dls):
    "A teacher that costs nothing: what is left is the callback"
    kept = []

    def answer(*x):
        if not kept or len(kept[0]) != len(x[0]):
            kept[:] = [plain_logits(teacher.eval()(*x)).detach()]
        return kept[0]

    return [KnowledgeDistillation(answer, KD, check=False)]


def stored(pair, teacher, dls, store='auto'):
    folder = tempfile.mkdtemp(prefix='fastdistill-bench-')
    keys = None if pair.callbacks is not list else partial(numbered_key, {})
    cache = cache_teacher(
        Teacher(teacher),
        dls,
        folder,
        check=False,
        progress=False,
        keys=keys,
        kind='softmax',
        axis=pair.axis,
        store=store,
    )
    cb = KnowledgeDistillation(cache, KD)
    weakref.finalize(cb, shutil.rmtree, folder, ignore_errors=True)
    return [cb]


def numbered_key(seen, item):
    return str(seen.setdefault(id(item), len(seen)))


# of others


class ForumCallback(Callback):
    "The callback of the forum, which changes the loss in `after_loss`, with the changes that fastai 2 needs"

    def __init__(self, teacher, axis):
        self.teacher, self.axis = teacher.eval(), axis

    def after_loss(self):
        if not self.training:
            return
        t = plain_logits(self.teacher(*self.xb))
        new = (1 - ALPHA) * self.learn.loss_grad + ALPHA * soft_loss(
            plain_logits(self.pred), t, self.axis
        )
        self.learn.loss_grad, self.learn.loss = new, new.clone()


def forum(pair, teacher, dls):
    return [ForumCallback(teacher, pair.axis)]


def fasterai(pair, teacher, dls):
    try:
        from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
    except ImportError as e:
        raise DistillError("fasterai is not installed: pip install 'fastdistill[bench]'") from e
    return [
        KnowledgeDistillationCallback(teacher, partial(same_loss, axis=pair.axis), weight=ALPHA)
    ]


def same_loss(pred, teacher_pred, axis, **kwargs):
    return soft_loss(plain_logits(pred), plain_logits(teacher_pred), axis)


def alone(pair, student, teacher):
    loss = loss_of(pair)
    return lambda x, y: loss(plain_logits(student(*x)), y)


def careful(pair, student, teacher):
    "Frozen, in evaluation mode, without a gradient: what an experienced user writes"
    loss, teacher = loss_of(pair), teacher.eval().requires_grad_(False)

    def step(x, y):
        s = plain_logits(student(*x))
        with torch.no_grad():
            t = plain_logits(teacher(*x))
        return (1 - ALPHA) * loss(s, y) + ALPHA * soft_loss(s, t, pair.axis)

    return step


def torchdistill(pair, student, teacher):
    "Its loss, in the same loop"
    try:
        from torchdistill.losses.mid_level import KDLoss
    except ImportError as e:
        raise DistillError("torchdistill is not installed: pip install 'fastdistill[bench]'") from e
    fn = KDLoss('.', 'output', '.', 'output', temperature=TEMPERATURE, alpha=1 - ALPHA)
    teacher = teacher.eval().requires_grad_(False)

    def step(x, y):
        s = plain_logits(student(*x))
        with torch.no_grad():
            t = plain_logits(teacher(*x))
        n = s.shape[pair.axis]
        flat = lambda o: {'.': dict(output=o.movedim(pair.axis, -1).reshape(-1, n))}
        return fn(flat(s), flat(t), y.reshape(-1))

    return step


class Forward:
    "The teacher's forward pass alone"

    def __init__(self, pair, batches, run):
        self.teacher, self.dl = (
            Teacher(pair.models()[1], axis=pair.axis, run=run),
            pair.data(batches).train,
        )

    def run(self, clock):
        say_with([self.teacher], lambda text: None)
        with self.teacher:
            clock.start()
            for *x, _ in self.dl:
                self.teacher(*map(as_plain, x))
                clock.mark()


# name -> fn(pair, batches) -> an object with `run`
WAYS: dict[str, Callable] = {
    FLOOR: partial(Fit, callbacks=lambda *_: []),
    'fastdistill': partial(Fit, callbacks=live),
    'fastdistill, the default recipe': partial(Fit, callbacks=partial(live, recipe=None)),
    'fastdistill, compiled': partial(Fit, callbacks=partial(live, run=dict(compile=True))),
    'fastdistill, model as it is': partial(Fit, callbacks=partial(live, run=AS_IT_IS)),
    'fastdistill, cached': partial(Fit, callbacks=stored),
    'fastdistill, cached hidden states': partial(Fit, callbacks=partial(stored, store='hidden')),
    'fastdistill, cached draws': partial(
        Fit, callbacks=partial(stored, store=dict(draws=50, T=TEMPERATURE))
    ),
    'fastdistill, cached top 50': partial(Fit, callbacks=partial(stored, store=dict(topk=50))),
    'fastdistill, free teacher': partial(Fit, callbacks=free),
    "the forum's callback": partial(Fit, callbacks=forum),
    'fasterai': partial(Fit, callbacks=fasterai),
    'no teacher, plain loop': partial(Loop, loss=alone),
    'careful plain loop': partial(Loop, loss=careful),
    "torchdistill's loss, plain loop": partial(Loop, loss=torchdistill),
    "the teacher's forward pass": partial(Forward, run=None),
    "the teacher's, model as it is": partial(Forward, run=AS_IT_IS),
}
