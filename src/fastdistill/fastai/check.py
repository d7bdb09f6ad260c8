"The doctor: what would go wrong in silence, said before training."
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from fastai.basics import L, is_listy, nested_attr
from ..outputs import DistillError, DistillWarning, Outputs, as_plain
from ..replay import untouched
from ..taps import run
from ..teacher import Teacher
from .stream import is_stream
from .task import task_of
from .teachers import teacher_of

__all__ = ['Finding', 'Findings', 'check_teacher', 'fitting_teacher', 'vocab_of']

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


def fitting_teacher(
    source, # what `KnowledgeDistillation` takes
    learn, # the student's Learner
    task # what it predicts
) -> Teacher:
    "The teacher, with its classes in the order of the student's where both have names"
    if isinstance(source, (list, tuple, L)): source = [fitting_teacher(o, learn, task) for o in source]
    teacher = teacher_of(source, learn, kind=task.kind, axis=task.axis)
    order = class_order(learn, teacher, task)
    return teacher if order is None else Teacher(teacher, select=order)


def check_teacher(
    learn, # the student's Learner, or its DataLoaders alone
    teacher, # what `KnowledgeDistillation` takes
    task=None # what the student predicts; None: read off its loss function
) -> Findings:
    "Compare what the teacher expects with what it will be given; a few validation batches tell whether it knows the task"
    if not hasattr(learn, 'dls'): learn = SimpleNamespace(dls=learn, model=None, loss_func=getattr(learn, 'loss_func', None))
    task = task or task_of(learn.loss_func)
    teacher = fitting_teacher(teacher, learn, task)
    found = Findings()
    for f in (shared_parameters, kinds, labels, codings, normalisation): found += f(learn, teacher, task)
    if not any(f.level == 'error' for f in found): found += answers(learn, teacher, task)
    return found


def leaves(teacher):
    "The members of an ensemble, and theirs; a teacher on its own is its only one"
    return [o for m in teacher.members for o in leaves(m)] or [teacher]

def with_learners(teacher): return [o for o in leaves(teacher) if o.learner is not None]


# what can be read off the two

def shared_parameters(learn, teacher, task):
    "Parameters that the student trains must not be the teacher's"
    if learn.model is None: return
    ids = teacher.parameters_ids
    if both := [n for n,p in learn.model.named_parameters() if id(p) in ids]:
        yield Finding('error',
                      f"Student and teacher share {len(both)} parameters ({some(both, 3)}), so the teacher would change with the student",
                      "Build the student from a copy: copy.deepcopy(teacher.model)")


def some(names, n): return ', '.join(map(str, names[:n])) + (' ...' if len(names) > n else '')


def kinds(learn, teacher, task):
    "Student and teacher answer the same kind of question"
    own = known_kind(learn.loss_func)
    if own not in (None, task.kind):
        yield Finding('error', f"You asked for kind={task.kind!r}, but the student's loss is one of {SAYS[own]}",
                      f"Leave kind out, or pass kind={own!r}")
    for t in with_learners(teacher):
        if (theirs := known_kind(t.learner.loss_func)) not in (None, task.kind):
            yield Finding('error', f"The teacher was trained to give {SAYS[theirs]}, the student gives {SAYS[task.kind]}",
                          "Take a teacher of the student's task, or give both the same kind of loss function")

SAYS = dict(softmax='one class of several (softmax)', sigmoid='a label or none, each for itself (sigmoid)',
            regression='numbers (regression)')

def known_kind(loss_func):
    try: return task_of(loss_func).kind
    except DistillError: return None


def vocab_of(dls):
    "Names of the classes, in the order of the outputs; None where there are none"
    v = None if is_stream(dls.train) else getattr(dls, 'vocab', None)
    if v is None: v = nested_attr(dls, 'train.after_item.vocab')        # codes of masks
    if v is None or isinstance(v, dict): return None
    if len(v) and all(hasattr(o, '__len__') and not isinstance(o, str) for o in v): v = v[-1]   # one for each block, as (tokens, classes)
    return list(map(str, v))


def class_order(learn, teacher, task):
    "Where each of the student's classes stands in the teacher's outputs; None where nothing needs to move, or can"
    if teacher.learner is None or teacher.select is not None or task.kind == 'regression': return None
    s,t = vocab_of(learn.dls),vocab_of(teacher.learner.dls)
    if s is None or t is None or s == t or set(s) - set(t): return None
    return [t.index(c) for c in s]


def labels(learn, teacher, task):
    "The student's classes, among the teacher's"
    for o in with_learners(teacher):
        s,t = vocab_of(learn.dls),vocab_of(o.learner.dls)
        if s is None or t is None or s == t or task.kind == 'regression': continue
        if missing := [c for c in s if c not in t]:
            yield Finding('error',
                          f"The teacher does not know {len(missing)} of the student's classes ({some(missing, 5)}); it knows {some(t, 8)}",
                          "Take a teacher trained on the student's classes, or train the student on the teacher's")
        else:
            extra = f", and {len(t)-len(s)} more that are left out" if len(t) > len(s) else ''
            yield Finding('note', f"The teacher has the student's classes in another order{extra}", "Its outputs are mapped by name")


def codings(learn, teacher, task):
    "Tokens and categories are numbers that only mean the same under the same coding"
    for o in with_learners(teacher):
        a,b = learn.dls,o.learner.dls
        for name,of in CODES.items():
            s,t = of(a),of(b)
            if s is None or t is None or s == t: continue
            yield Finding('error', f"Student and teacher code their {name} differently ({differ(s, t)}), "
                          "so the teacher would read others than the student",
                          f"Make the student's DataLoaders with the teacher's coding: {HOW[name]}")


def tokens(dls):
    v = getattr(dls, 'vocab', None)
    if v is None: return None
    if is_stream(dls.train): return list(v)
    return list(v[0]) if is_listy(v) and len(v) > 1 and is_listy(v[0]) else None

def categories(dls):
    c = getattr(dls, 'classes', None)
    return {k: list(v) for k,v in c.items()} if isinstance(c, dict) and c else None

def scales(dls):
    "Means and standard deviations of a table's columns"
    p = next((p for p in getattr(getattr(dls, 'procs', None), 'fs', []) if hasattr(p, 'means') and hasattr(p, 'stds')), None)
    return None if p is None else {k: (round(float(p.means[k]), 5), round(float(p.stds[k]), 5)) for k in p.means}

CODES = {'tokens': tokens, 'categories': categories, 'columns of numbers': scales}
TABLE = "the teacher's own dls, or teacher.dls.train_ds.new(df) for another table"
HOW = {'tokens': "TextDataLoaders(..., text_vocab=...) or TextBlock(vocab=...) with its token vocab", 'categories': TABLE,
       'columns of numbers': TABLE}


def differ(s, t):
    if isinstance(s, dict): return 'in ' + ', '.join([k for k in s if s.get(k) != t.get(k)][:3] or ['names'])
    if len(s) != len(t): return f'{len(s)} and {len(t)} of them'
    return 'first {!r} and {!r}'.format(*next((x, y) for x,y in zip(s, t) if x != y))


def normalisation(learn, teacher, task):
    if teacher.adapts:
        yield Finding('note', f"The teacher was trained with another normalisation ({teacher.adapts})", "Its input is re-normalised")


# what the teacher answers

def sample(dl):
    "Some batches from all over the validation set, which is often sorted by class"
    if hasattr(dl, 'shuffle_fn'): dl = dl.new(shuffle=True, drop_last=False, num_workers=0)    # the learner's own is left alone
    for _,b in zip(range(BATCHES), dl): yield b


def answers(learn, teacher, task):
    "What the teacher says to a few validation batches: the right shape, logits, the same twice, and better than chance?"
    if len(learn.dls.loaders) < 2 or getattr(learn.dls.valid, 'n', None) == 0: return
    tally = None
    with untouched(), teacher:
        for b in sample(learn.dls.valid):
            xb,yb = split(learn, b)
            teacher.reset()
            t = teacher(*xb).logits
            if tally is None:
                if learn.model is not None and (wrong := shape_error(student_shape(learn, xb), t.shape, task)):
                    yield wrong
                    return
                yield from steady(teacher, xb, t)
                tally = Tally(task)
            tally.add(t.float(), *yb[:1])
    if tally is None: return
    yield from untrained(teacher)
    yield from probabilities(tally, task)
    yield from chance(tally)


def split(learn, b):
    if learn.model is not None: b = learn._set_device(b)
    b = tuple(b) if is_listy(b) else (b,)
    n = getattr(learn.dls, 'n_inp', 1 if len(b) == 1 else len(b)-1)
    return tuple(map(as_plain, b[:n])),tuple(map(as_plain, b[n:]))


def student_shape(learn, xb): return Outputs.of(run(learn.model, *xb)).logits.shape


def shape_error(s, t, task):
    same = s.numel() == t.numel() if task.kind == 'regression' else s == t
    if not same:
        return Finding('error', f"The student's output has shape {tuple(s)}, the teacher's {tuple(t)}",
                       "Both need the same outputs: the same classes (or number of targets), and in dense tasks the same resolution. "
                       "Wrap a teacher that differs in a function that selects or resizes: KnowledgeDistillation(lambda x: ...)")


def steady(teacher, xb, t):
    "The same answer twice, and for a sample in other company"
    if teacher.mode == 'train': return      # as asked
    def ask(*x):
        teacher.reset()
        return teacher(*x).logits
    def near(a, b):
        largest = b.nan_to_num(0, 0, 0).abs().max().item()      # classes that are switched off may be -inf
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=.05*largest, equal_nan=True)
    function = any(o.module is None and o.path is None for o in leaves(teacher))   # what it holds can't be put in evaluation mode from here
    alone = function and len(t) > 1 and all(isinstance(x, Tensor) and len(x) == len(t) for x in xb)
    if not near(ask(*xb), t): why = "answers the same batch differently each time (is dropout on?)"
    elif alone and not near(ask(*[x[:-1] for x in xb]), t[:-1]):
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
