"The methods of fastai that are wrapped."
import functools, inspect
from fastai.basics import DataBlock, Datasets, TensorBase, TfmdDL
from .block import TeacherBlock, TeacherTarget, ToTeacherTarget


def _n_inp_without_teacher(init):
    "`DataBlock(..., n_inp)` takes all blocks but the last for inputs; a `TeacherBlock` is never one, and the label before it neither"
    sig = inspect.signature(init)
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        given = sig.bind_partial(self, *args, **kwargs).arguments
        blocks = given.get('blocks')
        if given.get('n_inp') is None and isinstance(blocks, (list, tuple)):
            rest = [b for b in blocks if not (b is TeacherBlock or isinstance(b, TeacherBlock))]
            if len(rest) < len(blocks): kwargs['n_inp'] = max(1, len(rest)-1)
        init(self, *args, **kwargs)
    return __init__


def _decode_without_teacher(decode):
    "`Datasets.decode` of an input and a prediction (`predict`, `show_results`): no prediction belongs to the teacher's column"
    @functools.wraps(decode)
    def _decode(self, o, full=True):
        tls = [tl for tl in self.tls if not any(isinstance(f, ToTeacherTarget) for f in tl.tfms.fs)]
        if len(tls) < len(self.tls) and len(o) == len(tls): return tuple(tl.decode(v, full=full) for v,tl in zip(o, tls))
        return decode(self, o, full=full)
    return _decode


def _empty_without_teacher(new_empty):
    "What `export` keeps of the data: an exported student knows nothing of its teacher"
    @functools.wraps(new_empty)
    def _new_empty(self):
        tls = [tl for tl in self.tls if not any(isinstance(f, ToTeacherTarget) for f in tl.tfms.fs)]
        return new_empty(self) if len(tls) == len(self.tls) else type(self)(tls=[tl.new_empty() for tl in tls], n_inp=self.n_inp)
    return _new_empty


def _types_without_teacher(one_pass):
    "A DataLoader remembers the types of a batch, and `export` keeps them: the teacher's is remembered as a tensor like any other"
    @functools.wraps(one_pass)
    def _one_pass(self):
        one_pass(self)
        if isinstance(self._types, dict):
            self._types = {k: [TensorBase if o is TeacherTarget else o for o in v] for k,v in self._types.items()}
    return _one_pass


def _show_without_teacher(pre_show_batch):
    "Pictures are chosen by the type of input and label: a tuple of targets would be of no type that fastai can show"
    @functools.wraps(pre_show_batch)
    def _pre_show_batch(self, b, max_n=9):
        if isinstance(b, (tuple, list)): b = type(b)(o for o in b if not isinstance(o, TeacherTarget))
        return pre_show_batch(self, b, max_n=max_n)
    return _pre_show_batch


def _once(cls, name, wrap):
    "Wrap a method of fastai's, once, however often this module is loaded"
    if hasattr(getattr(cls, name), '_knows_teacher'): return
    setattr(cls, name, wrap(getattr(cls, name)))
    getattr(cls, name)._knows_teacher = True

_once(DataBlock, '__init__', _n_inp_without_teacher)
_once(Datasets, 'decode', _decode_without_teacher)
_once(Datasets, 'new_empty', _empty_without_teacher)
_once(TfmdDL, '_one_pass', _types_without_teacher)
_once(TfmdDL, '_pre_show_batch', _show_without_teacher)
