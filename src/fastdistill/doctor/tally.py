"The scores of a few batches: of teacher and student, item by item, and of a constant prediction."
import torch
from torch import Tensor
from .findings import Facts

__all__ = ['Tally', 'fit_labels']

MOST_CLASSES = 1000 # beyond, a table of which class is predicted for which is too large
FEW = 16 # fewer items show nothing
METRICS = dict(softmax='accuracy', sigmoid='accuracy per label', regression='squared error')


def fit_labels(
    y, # labels of a batch
    shape, # of the outputs
    task
) -> Tensor|None:
    "The labels in the shape of the predictions, as class numbers where there are classes; None if they do not fit"
    shape = tuple(shape)
    if task.kind != 'softmax': return y.reshape(shape) if y.numel() == torch.Size(shape).numel() else None
    if y.is_floating_point(): return y.argmax(task.axis) if tuple(y.shape) == shape else None    # a probability for each class
    axis = task.axis % len(shape)
    wanted = shape[:axis] + shape[axis+1:]
    squeezed = lambda s: [n for n in s if n != 1]
    return y.long().reshape(wanted) if squeezed(y.shape) == squeezed(wanted) else None


class Tally:
    "What a few batches show, counted batch by batch: all their outputs may be too large to keep"
    def __init__(self, task):
        self.task,self.n_labels,self.sums,self.confusion = task,0,0.,None
        self.scores,self.tops = dict(teacher=[], student=[]),dict(train=[], valid=[]) # a number for each item
        self.between,self.normed = True,True # are all outputs from 0 to 1? does each sum to 1?

    def add(
        self, t:Tensor, # the teacher's outputs for a validation batch
        y:Tensor|None=None, # labels, from `fit_labels`
        s:Tensor|None=None # the student's outputs
    ):
        "Count a validation batch"
        self.add_probabilities(t, 'valid')
        if y is None: return
        counted = self.counts(y).any(1).cpu()
        for who,o in dict(teacher=t, student=s).items():
            if o is not None: self.scores[who].append(self.item_scores(o, y)[counted])
        dict(softmax=self.add_classes, sigmoid=self.add_labels, regression=self.add_numbers)[self.task.kind](t, y)

    def add_probabilities(self, t, part):
        "The largest probability of each item (the mean of its positions), in the 'train' or the 'valid' part of the data"
        kind,axis = self.task.kind,self.task.axis
        self.between = self.between and bool((t >= 0).all() and (t <= 1).all())
        if kind == 'softmax': self.normed = self.normed and bool(((t.sum(axis)-1).abs() < 1e-3).all())
        if kind == 'regression': return
        p = t.softmax(axis).amax(axis) if kind == 'softmax' else t.abs().sigmoid()
        self.tops[part].append(p.reshape(len(p), -1).mean(1).cpu())

    def counts(self, y):
        "(B, positions): which labels count"
        y = y.reshape(len(y), -1)
        return y != self.task.ignore_index if self.task.kind == 'softmax' else torch.ones_like(y, dtype=torch.bool)

    def item_scores(self, o, y):
        "(B,) share of the right predictions in each item, or minus its squared error"
        kind,rows = self.task.kind,lambda v: v.reshape(len(v), -1).float()
        if kind == 'regression': return -rows(o-y).pow(2).mean(1).cpu()
        right = o.argmax(self.task.axis) == y if kind == 'softmax' else (o > 0) == (y > .5)
        counts = rows(self.counts(y))
        return ((rows(right)*counts).sum(1)/counts.sum(1)).cpu()

    def add_classes(self, t, y):
        "Of each class: how much there is of it, and how much of that is recognized. An item counts 1, shared by its positions"
        c,counts = t.shape[self.task.axis],self.counts(y).cpu()
        p,y = (o.reshape(len(o), -1).cpu()[counts] for o in (t.argmax(self.task.axis), y))
        w = (counts.double()/counts.sum(1, keepdim=True).clamp_min(1))[counts]
        self.sums = self.sums + torch.stack([o.bincount(u, minlength=c) for o,u in ((y, w), (y[p == y], w[p == y]))])
        self.n_labels += len(y)
        if c <= MOST_CLASSES:
            # subtle: two tables, of every other item: what one shows by chance, the other does not
            half = torch.arange(len(counts))[:, None].expand_as(counts)[counts] % 2
            table = ((half*c + y)*c + p).bincount(w, minlength=2*c*c).view(2, c, c)
            self.confusion = table if self.confusion is None else self.confusion + table

    def add_labels(self, t, y):
        "Of each label: how many items have it, how many do not, and the sums of the probabilities predicted for these and for those"
        p,y = (o.reshape(len(o), -1).double().cpu() for o in (t.sigmoid(), y > .5))
        self.sums = self.sums + torch.stack([y.sum(0), (1-y).sum(0), (p*y).sum(0), (p*(1-y)).sum(0)])
        self.n_labels += len(y)

    def add_numbers(self, t, y):
        "Of each output: squared error, sum of the targets, sum of their squares"
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
        share = self.sums[0] if self.task.kind == 'softmax' else self.sums[:2]
        return (share.max()/share.sum() if self.task.kind == 'softmax' else (share.amax(0)/share.sum(0)).mean()).item()

    def above(
        self, a, b, # scores of the same items
        least:float=.05 # of the way from the constant prediction to a perfect one
    ):
        "Are the scores `a` above the scores `b`, by more than chance does in so few items?"
        if len(a) < FEW: return False
        way = (0. if self.task.kind == 'regression' else 1.) - self.constant
        d = (a-b)/max(way, 1e-9)
        return d.mean().item() > max(least, 3*d.std().item()/len(d)**.5)

    def facts(self):
        "The scores and the probabilities, as numbers"
        mean = lambda o: torch.cat(o).mean().item() if o else None
        sign = -1 if self.task.kind == 'regression' else 1
        score = lambda v: None if v is None else sign*v
        probabilities = self.between and (self.normed or self.task.kind == 'sigmoid')    # no logits: their softmax means nothing
        train,valid = (None if probabilities else mean(self.tops[part]) for part in ('train', 'valid'))
        n = len(self.items('teacher'))
        return Facts(METRICS[self.task.kind], n, score(mean(self.scores['teacher'])), score(mean(self.scores['student'])),
                     score(self.constant) if n else None, train, valid)
