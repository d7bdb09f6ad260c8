"Findings about a teacher and a student, without any framework."
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from .features.probe import dry_run
from .outputs import DistillError, DistillWarning, Outputs, map_tensors
from .replay.seeds import RandomGuard

__all__ = ['Finding', 'Findings', 'check_outputs', 'few_names', 'single_teachers']

BATCHES = 8 # of the validation set are enough to tell a teacher from chance


@dataclass
class Finding:
    "One thing that was found, and what to do about it"
    level:str # 'error': training would be wrong; 'warning': probably; 'note': seen and taken care of
    what:str
    do:str

    def __str__(self): return f"{self.level}: {self.what}. {self.do}"


class Findings(list):
    "What the doctor found; empty when all is well"
    def __repr__(self): return '\n'.join(map(str, self)) or 'Nothing found: the teacher fits.'

    def enforce(self):
        "Raise on errors, warn on warnings, print notes"
        for f in self:
            if f.level == 'note': print(f'fastdistill: {f.what}. {f.do}')
            if f.level == 'warning': warnings.warn(f'{f.what}. {f.do}', DistillWarning, stacklevel=2)
        if errors := [f for f in self if f.level == 'error']:
            head = 'Before training, mistakes were found (check=False trains all the same):'
            raise DistillError('\n'.join([head, *[f'- {f.what}. {f.do}' for f in errors]]))
        return self


def single_teachers(teacher):
    "The members of an ensemble, and theirs; a teacher on its own is its only one"
    return [o for m in teacher.members for o in single_teachers(m)] or [teacher]


def few_names(names, n): return ', '.join(map(str, names[:n])) + (' ...' if len(names) > n else '')

KIND_IN_WORDS = dict(softmax='one class of several (softmax)', sigmoid='a label or none, each for itself (sigmoid)',
            regression='numbers (regression)')


def check_outputs(
    teacher, # a `Teacher`
    task, # what the student predicts
    batches, # (inputs, targets) of each, both tuples
    student=None, # its module; None: shapes are not compared
    output=None # which of its outputs is distilled, as in `Outputs.of`
):
    "Findings about the teacher's outputs for a few batches: the right shape, logits, the same twice, and better than chance?"
    tally = None
    with RandomGuard(), teacher:
        for xb,yb in batches:
            teacher.reset()
            t = teacher(*xb).logits
            if tally is None:
                if student is not None and (wrong := shape_error(student_shape(student, xb, output), t.shape, task)):
                    yield wrong
                    return
                yield from steady(teacher, xb, t)
                tally = Tally(task)
            tally.add(t.float(), *yb[:1])
    if tally is None: return
    yield from untrained(teacher)
    yield from probabilities(tally, task)
    yield from chance(tally)


def student_shape(student, xb, output=None): return Outputs.of(dry_run(student, *xb), output=output).logits.shape


def shape_error(s, t, task):
    same = s.numel() == t.numel() if task.kind == 'regression' else s == t
    if not same:
        return Finding('error', f"The student's output has shape {tuple(s)}, the teacher's {tuple(t)}",
                       "Both need the same outputs: the same classes (or number of targets), and in dense tasks the same resolution. "
                       "If the teacher has more classes, Teacher(teacher, select=[...]) takes those of the student, in its order. "
                       "If the resolutions differ, wrap the teacher in a function that resizes: KnowledgeDistillation(lambda x: ...)")


def steady(teacher, xb, t):
    "The same answer twice, and for a sample in other company"
    if teacher.mode == 'train': return      # as asked
    def ask(*x):
        teacher.reset()
        return teacher(*x).logits
    def near(a, b):
        largest = b.nan_to_num(0, 0, 0).abs().max().item()      # classes that are switched off may be -inf
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=.05*largest, equal_nan=True)
    function = any(o.module is None and o.path is None for o in single_teachers(teacher))   # what it holds can't be put in evaluation mode from here
    parts = [o for x in xb for o in (x.values() if isinstance(x, Mapping) else [x])]
    alone = function and len(t) > 1 and all(isinstance(o, Tensor) and o.dim() and len(o) == len(t) for o in parts)
    if not near(ask(*xb), t): why = "answers the same batch differently each time (is dropout on?)"
    elif alone and not near(ask(*map_tensors(xb, lambda o: o[:-1])), t[:-1]):
        why = "answers a sample differently in another batch (is batch-norm in training mode?)"
    else: return
    yield Finding('warning', f"The teacher {why}",
                  "Modules are put in evaluation mode by themselves; call eval() on those that a function of yours holds")


def untrained(teacher):
    norms = [m for mod in teacher.modules for m in mod.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if norms and all((m.running_mean == 0).all() and (m.running_var == 1).all() for m in norms):
        yield Finding('warning', "The teacher's batch-norm statistics are those of a new model: it seems untrained",
                      "Load its weights before distilling")


class Tally:
    "What the teacher gets right, batch by batch: all its answers to a few batches may be too large to keep"
    def __init__(self, task):
        self.task,self.n,self.sums,self.between = task,0,0.,True # samples; of what `add_...` counts; are all answers from 0 to 1?
        self.normed = True # does each answer sum to 1?

    def add(self, t, y=None):
        task = self.task
        self.between = self.between and bool((t >= 0).all() and (t <= 1).all())
        if task.kind == 'softmax': self.normed = self.normed and bool(((t.sum(task.axis)-1).abs() < 1e-3).all())
        if y is None or (task.kind == 'softmax' and y.is_floating_point()): return
        if task.kind == 'softmax': self.add_classes(t.movedim(task.axis, -1).flatten(0, -2), y.long().flatten())
        elif task.kind == 'sigmoid': self.add_labels(*[o.flatten(1) if t.dim() == 2 else o.reshape(-1, 1) for o in (t, y.reshape(t.shape))])
        else: self.add_numbers(t, y.reshape(t.shape).float())

    def add_classes(self, t, y): # of each class: samples, and those that were recognised
        y,hit = (o[y != self.task.ignore_index] for o in (y, t.argmax(1) == y))
        self.sums = self.sums + torch.stack([y.bincount(minlength=t.shape[1]), y[hit].bincount(minlength=t.shape[1])]).cpu()
        self.n += len(y)

    def add_labels(self, t, y): # of each label: those that have it and those that don't, and the probabilities that they were given
        p,y = t.sigmoid(),(y > .5).float()
        self.sums = self.sums + torch.stack([y.sum(0), (1-y).sum(0), (p*y).sum(0), (p*(1-y)).sum(0)]).double().cpu()
        self.n += len(y)

    def add_numbers(self, t, y): # squared error, sum of y, sum of its squares; of each output
        t,y = (o.reshape(len(o), -1).double() for o in (t, y))
        self.sums = self.sums + torch.stack([(t-y).pow(2).sum(0), y.sum(0), y.pow(2).sum(0)]).cpu()
        self.n += len(y)


def probabilities(tally, task):
    if not tally.between: return
    if task.kind == 'softmax' and tally.normed:
        yield Finding('error',
                      "The teacher's outputs are probabilities (each sums to 1), and a softmax over them would flatten what it knows",
                      "Give the outputs before softmax, or their logarithm: KnowledgeDistillation(lambda x: teacher(x).log())")
    if task.kind == 'sigmoid':
        yield Finding('warning', "The teacher's outputs all lie between 0 and 1: they look like probabilities",
                      "Give the outputs before the sigmoid, or undo it: KnowledgeDistillation(lambda x: torch.logit(teacher(x), eps=1e-6))")


def chance(tally):
    "A teacher that knows no more than a constant answer teaches nothing"
    if not tally.n: return
    # subtle: what a constant answer can't be good at, however rare the classes are or badly calibrated the teacher
    says = dict(softmax=classes_known, sigmoid=labels_known, regression=numbers_known)[tally.task.kind](tally.sums, tally.n)
    if says:
        yield Finding('warning', f"The teacher is no better than chance: {says}",
                      "Is it trained, for these labels in this order, and does it get its own preprocessing? teacher.validate() tells")


def classes_known(sums, n):
    have,hit = sums[:, sums[0] > 0].double()
    got,k = (hit/have).mean().item(),len(have)
    if k > 1 and got <= 1/k + 1e-9:
        return f"it recognises {got:.1%} of a class's samples on average ({n} validation labels, {k} classes), a constant answer {1/k:.1%}"


def labels_known(sums, n):
    have = sums[:, (sums[:2] > 0).all(0)]
    if not have.shape[1]: return
    with_it,without = (have[2:]/have[:2]).mean(1).tolist()
    if with_it <= without:
        return f"on {n} validation items, it gives labels that are there the probability {with_it:.3f}, labels that are not {without:.3f}"


def numbers_known(sums, n):
    error,var = sums[0].mean().item()/n,(sums[2]/n - (sums[1]/n)**2).mean().item()
    if error >= var > 0: return f"its squared error on {n} validation items is {error:.4g}, the best constant answer has {var:.4g}"
