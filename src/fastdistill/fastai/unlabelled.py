"Inputs without labels beside the labelled batches: there the teacher alone teaches."
import torch
from fastai.text.data import LMDataLoader
from ..outputs import DistillError
from .batches import split_batch

__all__ = ['UnlabelledInputs', 'perturbed_rows']

SWAPPED = .1 # share of a perturbed row's cells that come from other rows, as in AutoGluon's distillation


class UnlabelledInputs:
    "The batches of inputs without labels that a training step gets beside its own"
    def __init__(
        self,
        items=None, # items like those of the training set, or a DataLoader (labels in its batches are not used); None:
        # there are none
        perturbed:int=0 # for tables: rows to make of each row of a batch, by `perturbed_rows`
    ):
        if not isinstance(perturbed, int) or perturbed < 0:
            raise DistillError(f"perturbed={perturbed!r}: it is how many rows are made of each row, from 0 up")
        self.items,self.perturbed,self.iterator = items,perturbed,None

    def __bool__(self): return self.items is not None or self.perturbed > 0

    def start(self, learn):
        "Refuse what cannot be used, before the first batch"
        if isinstance(learn.dls.train, LMDataLoader):
            raise DistillError("A language model needs no labels: add the texts to its training set.")
        self.loader = None if self.items is None else loader_of(self.items, learn)

    def batches(
        self, learn # in a training batch
    ):
        "The inputs, each a tuple"
        if self.loader is not None: yield self._next(learn)
        if self.perturbed: yield perturbed_rows(learn.xb, self.perturbed)

    def _next(self, learn):
        if self.iterator is None: self.iterator = iter(self.loader)
        if (b := next(self.iterator, None)) is None:
            self.iterator = iter(self.loader)
            b = next(self.iterator)
        x,_ = split_batch(learn, b)
        return x

    def stop(self):
        "Forget the DataLoader's iterator, and its workers"
        if self.iterator is not None and hasattr(self.iterator, 'close'): self.iterator.close()
        self.iterator = self.loader = None


def loader_of(items, learn):
    "A DataLoader of these items, prepared and augmented as the training set is"
    if hasattr(items, '__iter__') and hasattr(items, 'batch_size') or hasattr(items, 'after_batch'): loader = items
    else:
        if len(items) == 0: raise DistillError("unlabelled=: there are no items in it.")
        train = learn.dls.train
        try: ds = learn.dls.test_dl(items).dataset
        except Exception as e:
            raise DistillError("unlabelled=: these items can't be prepared as the training set's are "
                               f"({type(e).__name__}: {e}). Give items of the same kind, or a DataLoader.") from e
        loader = train.new(ds, bs=min(train.bs, len(items)), shuffle=True, drop_last=True, n=None)
    try: n = len(loader)
    except TypeError: n = None      # of a stream
    if n == 0: raise DistillError("unlabelled=: this DataLoader has no batch.")
    return loader


def perturbed_rows(
    x, # inputs of a batch of a table: (B, columns) tensors
    n:int # rows to make of each row
) -> tuple:
    """`n` x B rows, each cell with the probability .1 that of another row of the batch, so that a column holds what it
    can hold (Fakoor et al., NeurIPS 2020, arXiv:2006.14284, have several ways; AutoGluon swaps cells)"""
    if not all(isinstance(o, torch.Tensor) and o.dim() == 2 for o in x):
        shapes = ', '.join(str(tuple(getattr(o, 'shape', ()))) for o in x)
        raise DistillError(f"perturbed= is for tables, with rows of numbers as inputs. Here they have shape {shapes}.")
    def swap(o):
        rows = o.repeat(n, 1)
        other = o.gather(0, torch.randint(len(o), rows.shape, device=o.device))
        return other.where(torch.rand(rows.shape, device=o.device) < SWAPPED, rows)
    return tuple(map(swap, x))
