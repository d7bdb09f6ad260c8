"Plain PyTorch: run a teacher once over a map-style dataset."
import inspect, warnings
from contextlib import nullcontext
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate
from ..outputs import DistillError, DistillWarning, Outputs
from ..replay import Own, batch_seed, check_indexed, held, per_sample, untouched, view_item
from .keys import dataset_keys, folder_of, root_of
from .manifest import code_of, fingerprint, first, input_digest, leaves
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
    if not len(dataset): raise DistillError("The dataset is empty: there is nothing to write.")
    names = dataset_keys(dataset, keys)
    items,get = Views(dataset, names, views, seed),first if inputs is None else inputs
    shake = batch_tfm if views else None
    def asked(tasks, bs):
        "What the teacher is called with"
        workers = num_workers if len(tasks) > bs else 0     # to start workers takes longer than one batch
        dl = DataLoader(items, bs, sampler=tasks.tolist(), num_workers=workers, collate_fn=Together(collate_fn))
        for batch,seeds in dl:
            x = to(get(batch), device)
            yield x if shake is None else shaken(shake, seeds, x)
    def run(tasks, bs):
        with teacher if hasattr(teacher, '__enter__') else nullcontext():
            for x in asked(tasks, bs):
                with torch.no_grad(): out = Outputs.of(teacher(*x) if isinstance(x, tuple) else teacher(x))
                yield out
    with untouched():
        check_repeats(items, asked if shake is not None else None)
        check_alone(run, len(dataset))
        told = dict(transforms or {})
        if shake is not None: told['batch_tfm'] = code_of(shake if inspect.isroutine(shake) else type(shake))
        source = Source(names, run, bs, identity_of(teacher), told, root_of(folder_of(dataset)), vocab, items.digests())
        return write_cache(path, source, Wish(dtype, topk, tail, axis, size), views=views, seed=seed, force=force,
                           progress=progress, forecast=forecast)


def shaken(fn, seeds, x):
    "A batch transform with random numbers of each sample's own"
    xs = x if isinstance(x, tuple) else (x,)
    if not all(isinstance(o, Tensor) for o in xs):
        raise DistillError(f"batch_tfm= takes tensors, and the teacher is called with {', '.join(type(o).__name__ for o in xs)}: "
                           "use a transform of the dataset.")
    return per_sample(fn, seeds, *xs)


class Views(Dataset):
    "Item number view*N + position"
    def __init__(self, dataset, keys, views, seed):
        self.dataset,self.keys,self.views,self.seed,self.own = dataset,keys,views,seed,Own(dataset)

    def __len__(self): return len(self.dataset)*max(self.views, 1)

    def __getitems__(self, tasks):
        with held(): return [self[t] for t in tasks]

    def __getitem__(self, task):
        view,i = divmod(task, len(self.dataset))
        key = int(self.keys[i])
        return view_item(self.dataset, i, key, view, self.seed, self.own),batch_seed(key, view, self.seed)

    def digests(self):
        "A few samples' inputs: whoever replays them elsewhere must get the same bytes"
        if not self.views: return []
        n = len(self.dataset)
        tasks = [(i % self.views, int(r)) for i,r in enumerate(some(n, 8))]
        return [dict(row=r, view=v, digest=input_digest(self[v*n + r][0])) for v,r in tasks]


class Together:
    def __init__(self, collate): self.collate = collate
    def __call__(self, pairs): return self.collate([o for o,_ in pairs]),torch.stack([s for _,s in pairs])


def to(x, device):
    if isinstance(x, Tensor): return x.to(device)
    if isinstance(x, (tuple, list)): return tuple(to(o, device) for o in x)
    return {k: to(v, device) for k,v in x.items()} if isinstance(x, dict) else x


def some(n, k=4): return np.unique(np.linspace(0, n-1, min(k, n), dtype=int))


def check_repeats(items, asked):
    "Draw a few items twice: what can't be repeated is found out before anything is written"
    tasks,n = some(len(items), 8),len(items.dataset)
    draw = lambda items, i: fingerprint(*leaves(items[i][0]))
    other = items if items.views else Views(items.dataset, items.keys, 0, items.seed+1)     # the clean view is the same for any seed
    for i in tasks.tolist():
        if draw(items, i) == draw(other, i): continue
        raise DistillError(unrepeatable('The item transforms', i % n) if items.views else CLEAN)
    if asked is None: return
    for i,a,b in zip(tasks, asked(tasks, 1), asked(tasks, 1)):
        if fingerprint(*leaves(a)) != fingerprint(*leaves(b)): raise DistillError(unrepeatable('batch_tfm', i % n))


CLEAN = ("views=0 keeps one answer for each sample as the dataset gives it, but these come out differently each time: pass the dataset "
         "without its random transforms here, and the one with them to Replayed; or views=1 or more.")


def check_alone(run, n):
    "The teacher's answer to a sample must not depend on its neighbours"
    tasks = some(n, 4)
    half = tasks[::2]
    a,b = [next(run(t, len(t))).logits for t in (tasks, half)]
    tol = 1e-3 if a.dtype.itemsize > 2 else .03
    a,b = a[::2].float(),b.float()
    if a.shape != b.shape or not a.isfinite().any(): return       # padded to another length, or nan: the layout will see
    if (far := (a-b).abs().nan_to_num().max().item()) > tol*(1 + a[a.isfinite()].abs().max().item()):
        raise DistillError(f"The teacher's answer to a sample differs by {far:.3g} with other samples in its batch: it is in training "
                           "mode, has a memory, or a batch transform looks at the whole batch. Stored answers would belong to no sample: "
                           "use a live teacher.")


def unrepeatable(what, i):
    return (f"{what} gave sample {i} two different results from the same random seed: something in them draws from a generator that can't "
            "be found (made anew for each sample, or out of a library's sight), the clock or os.urandom, or counts its calls. "
            "Make it draw from random, numpy.random or torch, or use views=0.")


def identity_of(teacher) -> dict:
    "What a manifest says about a teacher: its name, its weights' fingerprint, and how it is asked"
    options = options_of(teacher)
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


def options_of(teacher) -> dict:
    "How a teacher is asked, and its members if it has some"
    out = {k: str(getattr(teacher, k)) for k in ('layers', 'mode', 'size', 'combine', 'kind', 'axis', 'select') if hasattr(teacher, k)}
    if members := getattr(teacher, 'members', None): return {**out, 'members': [options_of(m) for m in members]}
    return {**out, 'images': teacher.adapts} if getattr(teacher, 'adapts', '') else out
