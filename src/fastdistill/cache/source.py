"What is cached: a teacher and its data, as the writer sees them, and whether their outputs can be stored at all."
import inspect, warnings
from dataclasses import dataclass
from numbers import Integral
import numpy as np
from ..outputs import DistillError, DistillWarning
from .digests import fingerprint

__all__ = ['Source', 'check_alone', 'distinct_views', 'identity_of', 'is_whole', 'spread_positions', 'unrepeatable']


@dataclass
class Source:
    "What a face knows about teacher and data"
    keys:np.ndarray # (N,) uint64 in the order in which rows are stored
    run:object # fn(tasks, bs) -> generator of `Outputs`, one for each `bs` tasks; task number view*N + position
    bs:int
    teacher:dict # what goes into the manifest, see there
    transforms:dict
    root:str=''
    vocab:list|None=None
    samples:list|None=None
    files:list|None=None # path of each sample's file, in the order of `keys`; None where samples are not files

    def __post_init__(self):
        if not is_whole(self.bs) or self.bs < 1: raise DistillError(f"bs={self.bs!r}: a whole number from 1 on.")
        if self.files is not None and len(self.files) != len(self.keys):
            raise DistillError(f"{len(self.files)} files for {len(self.keys)} samples: give one for each.")


def is_whole(o): return isinstance(o, Integral) and not isinstance(o, bool)


def spread_positions(n, k=4): return np.unique(np.linspace(0, n-1, min(k, n), dtype=int))


def check_alone(run, n):
    "The teacher's answer to a sample must not depend on its neighbors"
    tasks = spread_positions(n, 4)
    half = tasks[::2]
    a,b = [next(run(t, len(t))).logits for t in (tasks, half)]
    tol = 1e-3 if a.dtype.itemsize > 2 else .03
    a,b = a[::2].float(),b.float()
    # padded to another length, or nan: the layout will see
    if a.shape != b.shape or not a.isfinite().any(): return
    if (far := (a-b).abs().nan_to_num().max().item()) > tol*(1 + a[a.isfinite()].abs().max().item()):
        raise DistillError(f"The teacher's answer to a sample differs by {far:.3g} with other samples in its batch: it "
                           "is in training mode, has a memory, or a batch transform looks at the whole batch. Stored "
                           "answers would belong to no sample: "
                           "use a live teacher.")


def distinct_views(
    views:int, # asked for
    n:int, # samples
    look # fn(position, view) -> something to compare: a digest of the input as the teacher gets it
) -> int:
    "How many views to store: as many as asked for, but 1 (with a warning) where nothing random makes them differ"
    if views < 2: return views
    # subtle: many samples, for a transform may act on few of them; the search ends with the first difference
    for i in spread_positions(n, 32).tolist():
        first = look(i, 0)
        if any(look(i, v) != first for v in range(1, min(views, 4))): return views
    warnings.warn(DistillWarning(f"views={views}, but all views of a sample are the same: there is no random "
                                 "transform. One view is stored."))
    return 1


def unrepeatable(what, i):
    return (f"{what} gave sample {i} two different results from the same random seed: something in them draws from a "
            "generator that can't be found (a new one for each sample, or out of a library's sight), the clock or "
            "os.urandom, or counts its calls. "
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
    warnings.warn(DistillWarning(f"The weights behind {name} can't be seen: a cache of it is taken for the same "
                                 "teacher's as long as its code is the same. Pass Teacher(model) where there is a "
                                 "model."))
    return dict(name=name, weights=fingerprint(text), **options)


def options_of(teacher) -> dict:
    "How a teacher is asked, and its members if it has some"
    out = {k: str(getattr(teacher, k)) for k in ('layers', 'mode', 'size', 'combine', 'kind', 'axis', 'select')
           if hasattr(teacher, k)}
    if (output := getattr(teacher, 'output', None)) is not None:
        out['output'] = str(getattr(output, '__qualname__', output))
    if members := getattr(teacher, 'members', None): return {**out, 'members': [options_of(m) for m in members]}
    return {**out, 'images': teacher.adapts} if getattr(teacher, 'adapts', '') else out
