"The scores of a few batches: of teacher and student, item by item, and of a constant prediction."
import torch
from torch import Tensor
from ..task import unusable
from .findings import Facts

__all__ = ['FEW', 'METRICS', 'Tally']

MOST_CLASSES = 1000 # with more, a confusion table is too large
FEW = 16 # fewer items prove nothing
METRICS = dict(softmax='accuracy', sigmoid='accuracy per label', regression='squared error')


class Tally:
    "Counts over a few batches, added batch by batch, since all their outputs may be too large to keep"
    def __init__(self, task):
        self.task,self.n_labels,self.sums,self.confusion = task,0,0.,None
        self.scores,self.tops = dict(teacher=[], student=[]),dict(train=[], valid=[]) # one number per item
        self.between,self.normed = True,True # are all outputs from 0 to 1? does each sum to 1?
        self.finite = True

    def add(
        self,
        t:Tensor, # the teacher's outputs for a validation batch
        y:Tensor|None=None, # labels, from `fit_labels`
        s:Tensor|None=None # the student's outputs
    ):
        "Count a validation batch"
        t,s = (None if o is None else o.float() for o in (t, s))
        self.add_probabilities(t, 'valid')
        if y is None: return
        for who,o in dict(teacher=t, student=s).items():
            if o is not None: self.scores[who].append(self.item_scores(o, y)[self.counted(y)])
        dict(softmax=self.add_classes, sigmoid=self.add_labels, regression=self.add_numbers)[self.task.kind](t, y)

    def add_probabilities(self, t, part):
        "The largest probability of each item (mean over its positions), in the 'train' or 'valid' part of the data"
        kind,axis = self.task.kind,self.task.axis
        self.finite = self.finite and not unusable(t, self.task)
        self.between = self.between and bool((t >= 0).all() and (t <= 1).all())
        if kind == 'softmax': self.normed = self.normed and bool(((t.sum(axis)-1).abs() < 1e-3).all())
        if kind == 'regression': return
        p = t.softmax(axis).amax(axis) if kind == 'softmax' else t.abs().sigmoid()
        self.tops[part].append(p.reshape(len(p), -1).mean(1).cpu())

    def counts(self, y):
        "(B, positions): which labels count"
        y = y.reshape(len(y), -1)
        return y != self.task.ignore_index if self.task.kind == 'softmax' else torch.ones_like(y, dtype=torch.bool)

    def counted(self, y):
        "(B,): which items have labels that count"
        return self.counts(y).any(1).cpu()

    def item_scores(self, o, y):
        "(B,) share of the right predictions in each item, or minus its squared error"
        kind,rows = self.task.kind,lambda v: v.reshape(len(v), -1).float()
        if kind == 'regression': return -rows(o-y).pow(2).mean(1).cpu()
        right = o.argmax(self.task.axis) == y if kind == 'softmax' else (o > 0) == (y > .5)
        counts = rows(self.counts(y))
        return ((rows(right)*counts).sum(1)/counts.sum(1)).cpu()

    def add_classes(self, t, y):
        "For each class: its amount, and how much of it is recognized. An item counts 1, shared by its positions"
        c,counts = t.shape[self.task.axis],self.counts(y).cpu()
        p,y = (o.reshape(len(o), -1).cpu()[counts] for o in (t.argmax(self.task.axis), y))
        w = (counts.double()/counts.sum(1, keepdim=True).clamp_min(1))[counts]
        there,recognized = y.bincount(w, minlength=c),y[p == y].bincount(w[p == y], minlength=c)
        self.sums,self.n_labels = self.sums + torch.stack([there, recognized]),self.n_labels + len(y)
        if c > MOST_CLASSES: return
        # subtle: two tables, each of every other item: an effect of chance is in one of them, but not in the other
        half = torch.arange(len(counts))[:, None].expand_as(counts)[counts] % 2
        table = ((half*c + y)*c + p).bincount(w, minlength=2*c*c).view(2, c, c)
        self.confusion = table if self.confusion is None else self.confusion + table

    def add_labels(self, t, y):
        "For each label: items with and without it, and the sums of the probabilities predicted for these and those"
        p,y = (o.reshape(len(o), -1).cpu().double() for o in (t.sigmoid(), y > .5))
        self.sums = self.sums + torch.stack([y.sum(0), (1-y).sum(0), (p*y).sum(0), (p*(1-y)).sum(0)])
        self.n_labels += len(y)

    def add_numbers(self, t, y):
        "For each output: squared error, sum of the targets, sum of their squares"
        t,y = (o.reshape(len(o), -1).cpu().double() for o in (t, y))
        self.sums = self.sums + torch.stack([(t-y).pow(2).sum(0), y.sum(0), y.pow(2).sum(0)])
        self.n_labels += len(y)

    # results

    def items(self, who): return torch.cat(self.scores[who]) if self.scores[who] else torch.zeros(0)

    def variance(self): return (self.sums[2]/self.n_labels - (self.sums[1]/self.n_labels)**2).mean().item()

    @property
    def constant(self):
        "Score of the best constant prediction"
        if self.task.kind == 'regression': return -self.variance()
        if self.task.kind == 'softmax': return (self.sums[0].max()/self.sums[0].sum()).item()
        return (self.sums[:2].amax(0)/self.sums[:2].sum(0)).mean().item()

    def above(
        self, a, b, # scores of the same items
        least:float=.05 # of the way from the constant prediction to a perfect one
    ):
        "Are the scores `a` above the scores `b`, by more than chance explains for so few items?"
        if len(a) < FEW: return False
        way = (0. if self.task.kind == 'regression' else 1.) - self.constant
        d = (a-b)/max(way, 1e-9)
        return d.mean().item() > max(least, 3*d.std().item()/len(d)**.5)

    def above_constant(self, least):
        "Are the teacher's scores above those of the constant prediction?"
        items = self.items('teacher')
        return self.above(items, torch.full_like(items, self.constant), least)

    def facts(self):
        "The scores and the probabilities, as numbers"
        mean = lambda o: torch.cat(o).mean().item() if o else None
        score = lambda v: None if v is None else -v if self.task.kind == 'regression' else v
        # a softmax over probabilities means nothing
        logits = not (self.between and (self.normed or self.task.kind == 'sigmoid'))
        train,valid = (mean(self.tops[part]) if logits else None for part in ('train', 'valid'))
        n = len(self.items('teacher'))
        return Facts(METRICS[self.task.kind], n, *(score(mean(self.scores[who])) for who in ('teacher', 'student')),
                     score(self.constant) if n else None, train, valid)
