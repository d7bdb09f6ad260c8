"Plain PyTorch: run a teacher once over a map-style dataset."
import inspect, warnings
from contextlib import nullcontext
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate
from ..generators import Generators
from ..outputs import DistillError, DistillWarning, Outputs
from ..replay import batch_seed, check_indexed, held, per_sample, view_item
from .keys import dataset_keys, root_of
from .manifest import fingerprint
from .reader import TeacherCache
from .records import Wish
from .writer import Source, write_cache

__all__ = ['cache_dataset', 'identity_of']


def cache_dataset(
    teacher, # a `Teacher`, or a callable of the same kind: fn(*inputs) -> Outputs or logits
    dataset, # map-style; `Replayed` takes it again when a student trains
    path, # folder or URL
    views:int=1, # augmented views of each sample; 0: the dataset as it is, nothing replayed
    topk:int|None=None, # keep the likeliest classes only
    dtype:str='float16', # 'float32', 'float16' or 'int8' (scaled row by row)
    *,
    keys=None, # what names each sample: a list, or a function of the position; None: read off the dataset where it can be
    inputs=None, # fn(batch) -> what the teacher is called with; None: the batch, or its first element if it is a tuple
    batch_tfm=None, # fn(x) -> x with random numbers in it: run on one sample at a time, see `per_sample`
    tail:str='mean', axis:int=1, # see `TopK`
    size=None, # height and width to which maps of logits are reduced
    bs:int=64, num_workers:int=0, collate_fn=default_collate, device=None, # of the DataLoader
    seed:int=0, # of the random numbers
    vocab=None, # class names, in the order of the logits
    transforms=None, # name -> what it is, of the transforms: compared when a cache is gone on with
    force:bool=False, # write anew over a cache that doesn't fit
    progress=None, forecast=None # fn(rows done, rows in all, bytes done); fn(Forecast)
) -> TeacherCache:
    "Write what `teacher` says about each view of each sample, and open it"
    if isinstance(teacher, nn.Module): raise DistillError("A bare module may be in training mode, with gradients: pass Teacher(model).")
    check_indexed(dataset)
    names = dataset_keys(dataset, keys)
    get = first if inputs is None else inputs
    def run(tasks, bs):
        items = Views(dataset, names, views, seed)
        dl = DataLoader(items, bs, sampler=tasks.tolist(), num_workers=num_workers, collate_fn=Together(collate_fn))
        with teacher if hasattr(teacher, '__enter__') else nullcontext(), torch.no_grad():
            for batch,seeds in dl:
                x = to(get(batch), device)
                if batch_tfm is not None and views: x = per_sample(batch_tfm, seeds, x)
                yield Outputs.of(teacher(*x) if isinstance(x, tuple) else teacher(x))
    check_repeats(Views(dataset, names, views, seed))
    source = Source(names, run, bs, identity_of(teacher), dict(transforms or {}), root_of(getattr(dataset, 'root', None)), vocab)
    return write_cache(path, source, Wish(dtype, topk, tail, axis, size), views=views, seed=seed, force=force,
                       progress=progress, forecast=forecast)


class Views(Dataset):
    "Item number view*N + position"
    def __init__(self, dataset, keys, views, seed):
        self.dataset,self.keys,self.views,self.seed,self.own = dataset,keys,views,seed,Generators(dataset)

    def __len__(self): return len(self.dataset)*max(self.views, 1)

    def __getitems__(self, tasks):
        with held(): return [self[t] for t in tasks]

    def __getitem__(self, task):
        view,i = divmod(task, len(self.dataset))
        key = int(self.keys[i])
        return view_item(self.dataset, i, key, view, self.seed, self.own),batch_seed(key, view, self.seed)


class Together:
    def __init__(self, collate): self.collate = collate
    def __call__(self, pairs): return self.collate([o for o,_ in pairs]),torch.stack([s for _,s in pairs])


def first(batch): return batch[0] if isinstance(batch, (tuple, list)) else batch


def to(x, device):
    if isinstance(x, Tensor): return x.to(device)
    if isinstance(x, (tuple, list)): return tuple(to(o, device) for o in x)
    return {k: to(v, device) for k,v in x.items()} if isinstance(x, dict) else x


def check_repeats(items, n=8):
    "Draw a few items twice: transforms with random numbers of their own can't be repeated, and are found out before anything is written"
    for i in np.linspace(0, len(items)-1, min(n, len(items)), dtype=int).tolist():
        if fingerprint(*leaves(items[i])) != fingerprint(*leaves(items[i])):
            raise DistillError(unrepeatable('The item transforms', i % len(items.dataset)))


def unrepeatable(what, i):
    return (f"{what} gave sample {i} two different results from the same random seed: something in them draws from a generator that can't "
            "be found (made anew for each sample, or out of a library's sight), the clock or os.urandom, or counts its calls. "
            "Make it draw from random, numpy.random or torch, or use views=0.")


def leaves(o):
    "The tensors, arrays and numbers in a nested item"
    if isinstance(o, dict): return [v for k in o for v in leaves(o[k])]
    if isinstance(o, (tuple, list)): return [v for p in o for v in leaves(p)]
    if hasattr(o, 'tobytes') and hasattr(o, 'mode'): return [np.asarray(o)]
    return [o]


def identity_of(teacher) -> dict:
    "What a manifest says about a teacher: its name, its weights' fingerprint, and how it is asked"
    options = {k: str(getattr(teacher, k)) for k in ('layers', 'mode', 'size', 'combine', 'kind', 'select') if hasattr(teacher, k)}
    name = getattr(teacher, 'name', None) or getattr(teacher, '__name__', type(teacher).__name__)
    shares = str(getattr(teacher, 'weights', None))     # of an ensemble's members
    if modules := getattr(teacher, 'modules', None):
        return dict(name=name, weights=fingerprint(*(m.state_dict() for m in modules), shares), **options)
    if path := getattr(teacher, 'path', None): return dict(name=name, weights=fingerprint(path.read_bytes()), **options)
    fn = getattr(teacher, 'model', teacher)
    try: text = inspect.getsource(fn if inspect.isroutine(fn) else type(fn))
    except (TypeError, OSError): text = ''
    warnings.warn(DistillWarning(f"The weights behind {name} can't be seen: a cache of it is taken for the same teacher's as long as its "
                                 "code is the same. Pass Teacher(model) where there is a model."))
    return dict(name=name, weights=fingerprint(text), **options)
