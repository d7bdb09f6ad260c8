"The same augmentation twice: random numbers that belong to a sample and a view, not to a batch, a worker or an epoch."
import random
from bisect import bisect_right
from contextlib import contextmanager
from math import gcd
import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset
from .generators import Generators
from .outputs import DistillError

__all__ = ['Own', 'PerSample', 'Replayed', 'held', 'per_sample', 'seeded', 'seeds_of', 'untouched', 'view_of']

MASK = 2**64-1
MIX = 0x9E3779B97F4A7C15,0xBF58476D1CE4E5B9,0x94D049BB133111EB


def scramble(x):
    "A 64-bit number (or an array of them) in which every bit depends on every bit of `x` (splitmix64's step and finaliser)"
    if isinstance(x, int):      # the same for one number, many times faster than an array of one
        x = (x + MIX[0]) & MASK
        x = ((x ^ (x >> 30))*MIX[1]) & MASK
        x = ((x ^ (x >> 27))*MIX[2]) & MASK
        return x ^ (x >> 31)
    u = np.uint64
    with np.errstate(over='ignore'):
        x = np.asarray(x, u) + u(MIX[0])
        x = (x ^ (x >> u(30)))*u(MIX[1])
        x = (x ^ (x >> u(27)))*u(MIX[2])
        return x ^ (x >> u(31))


def seeds_of(
    seed:int, # of the whole cache
    keys, # (B,) uint64: which samples; or one number
    *stages # numbers, or arrays of (B,): view, and what is drawn for (items, which batch transform)
):
    "(B,) uint64, or one number: a seed for each sample"
    one = isinstance(keys, int)
    whole = int if one else lambda o: np.asarray(o).astype(np.uint64)
    out = scramble(whole(keys) ^ whole(scramble(int(seed) & MASK)))
    for o in stages: out = scramble(out ^ scramble(whole(o)))
    return out


def view_of(
    keys, # (B,) uint64; or one number
    epoch:int,
    views:int, # how many are stored
    seed:int=0
):
    "Which view each sample shows in an epoch: all of them once in `views` epochs, in an order of its own, another one each time around"
    one = isinstance(keys, int)
    if views < 2: return 0 if one else np.zeros(np.shape(keys), np.int64)
    lap,step = divmod(epoch, views)
    h = seeds_of(seed, keys, lap, views)
    strides = [s for s in range(1, views) if gcd(s, views) == 1]
    if one: return (h % views + strides[(h >> 32) % len(strides)]*step) % views
    u = np.uint64
    stride = np.array(strides, u)[(h >> u(32)) % u(len(strides))]
    return ((h % u(views) + stride*u(step)) % u(views)).astype(np.int64)


@contextmanager
def seeded(
    seed:int, # any 64-bit number
    device=None # of the tensors that are drawn on, if not the CPU
):
    "Inside, Python's, NumPy's and PyTorch's global generators start from `seed`; afterwards they are as they were"
    with kept(device) as start:
        start(seed)
        yield


@contextmanager
def kept(device=None):
    "Gives a function that seeds the global generators; afterwards they are as they were"
    gens = [torch.default_generator] + ([torch.cuda.default_generators[torch.device(device).index or 0]] if is_cuda(device) else [])
    def start(seed):
        seed = int(seed)
        random.seed(seed)
        np.random.seed(seed & 0xffffffff)
        for g in gens: g.manual_seed(seed & 0x7fffffffffffffff)
    if HOLDING and HOLDING[-1] and not is_cuda(device):
        with holding(False): yield start        # but who is seeded inside of this must put back
        return
    states = random.getstate(),np.random.get_state(),[g.get_state() for g in gens]
    try: yield start
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for g,s in zip(gens, states[2]): g.set_state(s)


HOLDING = []

@contextmanager
def holding(on):
    HOLDING.append(on)
    try: yield
    finally: HOLDING.pop()

@contextmanager
def held():
    "Inside, the CPU's generators are put back once, at the end, and not after each `seeded`: NumPy takes its time for it"
    with kept(), holding(True): yield


def is_cuda(device): return device is not None and torch.device(device).type == 'cuda'


def per_sample(
    fn, # takes the tensors of a batch, or a slice of them with one sample, and returns one tensor or several
    seeds, # (B,) one for each sample
    *tensors # (B, ...) each
):
    "Run `fn` on one sample at a time, each with random numbers of its own: right for every `fn`, whatever it draws and how"
    if len(seeds) != len(tensors[0]): raise DistillError(f"{len(seeds)} seeds for {len(tensors[0])} samples: one for each is needed.")
    outs,own = [],Generators(fn)
    with kept(tensors[0].device) as start:
        for i,s in enumerate(seeds.tolist() if isinstance(seeds, Tensor) else seeds):
            start(s)
            with own.seeded(s): outs.append(fn(*(o[i:i+1] for o in tensors)))
    if not isinstance(outs[0], (tuple, list)): return torch.cat(outs)
    made,kind = [torch.cat(o) for o in zip(*outs)],type(outs[0])
    return kind(*made) if hasattr(kind, '_fields') else kind(made)


class PerSample(TorchFunctionMode):
    """Inside, `uniform_`, `bernoulli_`, `normal_` and `randint` on tensors whose first dimension is the batch give each sample numbers
    of its own seed, all in one go; they depend on nothing else, not even the device"""
    def __init__(self, seeds):
        super().__init__()
        self.seeds,self.calls = np.asarray(seeds, np.uint64),0

    def draw(self, shape):
        "Uniform numbers in (0, 1), of which a sample's are the same in every batch"
        self.calls += 1
        base = seeds_of(self.calls, self.seeds)
        n = int(np.prod(shape[1:]))
        bits = scramble(base[:, None] + np.arange(n, dtype=np.uint64)*np.uint64(MIX[1]))
        return torch.from_numpy(((bits >> np.uint64(11)).astype(np.float64) + .5)*2.**-53).reshape(shape)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        make = getattr(self, 'new_' + getattr(func, '__name__', ''), None)
        return func(*args, **kwargs) if make is None else make(func, *args, **kwargs)

    def fill(self, func, x, of, *args, **kwargs):
        if x.dim() == 0 or len(x) != len(self.seeds): return func(x, *args, **kwargs)
        return x.copy_(of(self.draw(x.shape)))

    # the names of PyTorch's own arguments; `from` is a word of Python's, so it may come by name
    def new_uniform_(self, func, x, *args, **kwargs):
        lo,hi = [*args, kwargs.get('from', 0.), kwargs.get('to', 1.)][:2] if len(args) != 1 else (args[0], kwargs.get('to', 1.))
        return self.fill(func, x, lambda u: u*(hi-lo) + lo, *args, **kwargs)

    def new_bernoulli_(self, func, x, p=.5, **kwargs):
        return self.fill(func, x, lambda u: u < (p.cpu() if isinstance(p, Tensor) else p), p, **kwargs)

    def new_normal_(self, func, x, mean=0., std=1., **kwargs):
        return self.fill(func, x, lambda u: torch.erfinv(2*u-1)*2**.5*std + mean, mean, std, **kwargs)

    def new_randint(self, func, *args, **kwargs):
        *given,size = [o for o in args if isinstance(o, (int, tuple, list))] + ([kwargs['size']] if 'size' in kwargs else [])
        if not size or size[0] != len(self.seeds): return func(*args, **kwargs)
        lo,hi = given if len(given) == 2 else (kwargs.get('low', 0), given[0] if given else kwargs['high'])
        return ((self.draw(size)*(hi-lo)).floor() + lo).to(kwargs.get('device'), kwargs.get('dtype') or torch.int64)


class untouched:
    "Did anything draw from Python's, NumPy's or PyTorch's global generators meanwhile? Then `moved` says so; they are put back"
    def __enter__(self):
        self.states = self.now()
        self.moved = False
        return self

    def now(self): return random.getstate(),np.random.get_state(),torch.get_rng_state()

    def __exit__(self, *_):
        (p,n,t),(p0,n0,t0) = self.now(),self.states
        self.moved = p != p0 or n[2] != n0[2] or not np.array_equal(n[1], n0[1]) or not torch.equal(t, t0)
        random.setstate(p0)
        np.random.set_state(n0)
        torch.set_rng_state(t0)


class Replayed(Dataset):
    """A plain PyTorch dataset whose random transforms repeat the views of a cache: its items are `(*item, row)`, and
    `cache.decode(rows)` makes a batch of rows the teacher's `Outputs`. Call `set_epoch` before each epoch"""
    def __init__(
        self,
        dataset, # map-style; its transforms draw from Python's, NumPy's or PyTorch's generators, global ones or their own
        cache, # a `TeacherCache`, whose `views` decide whether transforms are replayed (views=0: they are as random as ever)
        keys=None, # what names each sample: a list, or a function of the position; None: read off the dataset where it can be
        seeds:bool=False # items are `(*item, row, seed)`: for random transforms of a whole batch, `per_sample(fn, seeds, x)`
    ):
        check_indexed(dataset)
        self.dataset,self.cache,self.seeds = dataset,cache,seeds
        self.keys,self.own = cache.keys_of(dataset, keys),Own(dataset)
        self.at = cache.find(self.keys)
        # of clean views, the transforms here may be others
        if cache.views: cache.compare(self.at, lambda i, view: view_item(dataset, i, int(self.keys[i]), view, cache.seed, self.own))
        # subtle: shared memory, so that workers which outlive an epoch see the next one
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.epoch.share_memory_()      # a copy's own

    def set_epoch(self, epoch:int): self.epoch.fill_(epoch)

    def __len__(self): return len(self.dataset)

    def __getitems__(self, idxs):
        "Of a batch: what PyTorch's DataLoader asks for where it can"
        with held(): return [self[i] for i in idxs]

    def __getitem__(self, i):
        i = range(len(self))[i]
        c,key = self.cache,int(self.keys[i])
        view = view_of(key, int(self.epoch), c.views, c.seed)
        item = view_item(self.dataset, i, key, view, c.seed, self.own) if c.views else self.dataset[i]
        row = torch.from_numpy(c.row(int(self.at[i]), view))
        rest = (row, batch_seed(key, view, c.seed)) if self.seeds else (row,)
        return (*item, *rest) if isinstance(item, (tuple, list)) else (item, *rest)


def view_item(dataset, i, key, view, seed, own):
    "Item `i` as a view shows it"
    s = seeds_of(seed, key, view)
    with seeded(s), own.of(i).seeded(s): return dataset[i]


class Own:
    "The generators of the dataset that an item comes from: its numbers are the same in a part of that dataset, or beside others"
    def __init__(self, dataset): self.dataset,self.found = dataset,{}

    def of(self, i) -> Generators:
        d,way = self.dataset,()
        while True:
            if hasattr(d, 'dataset') and hasattr(d, 'indices'): d,i,way = d.dataset,d.indices[i],(*way, 0)      # a `Subset`
            elif hasattr(d, 'datasets') and hasattr(d, 'cumulative_sizes'):                                     # a `ConcatDataset`
                k = bisect_right(d.cumulative_sizes, i)
                d,i,way = d.datasets[k],i - (d.cumulative_sizes[k-1] if k else 0),(*way, k)
            else: break
        if way not in self.found: self.found[way] = Generators(d)
        return self.found[way]


def batch_seed(key, view, seed):
    "The seed of what is drawn for a sample after its item was made, in a batch: below 2**63, for tensors hold no more"
    return torch.tensor(seeds_of(seed, key, view, 1) >> 1)


def check_indexed(dataset):
    if not hasattr(dataset, '__getitem__') or not hasattr(dataset, '__len__'):
        raise DistillError(f"{type(dataset).__name__} can only be iterated: a stored output belongs to a sample, and these have "
                           "no indices. Use a map-style dataset (__getitem__ and __len__).")
