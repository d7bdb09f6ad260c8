"""What of fastai is changed, in one place. The rest of fastai stays as it is.

| what | why | when |
|---|---|---|
| `DataBlock.__init__` | it counts a `TeacherBlock`, and the label before it, among the inputs | import |
| `Datasets.decode` | `predict` and `show_results` have no prediction for the teacher's column | first target |
| `Datasets.new_empty` | `export` would keep the teacher's column | first target |
| `TfmdDL._one_pass` | `export` would keep the type of the teacher's targets | first target |
| `TfmdDL._pre_show_batch` | fastai has no way to show a tuple of label and teacher's target | first target |
| `defaults.callbacks` | labels, MixUp and metrics must not see the teacher's target: see `TeacherTargets` | first target |
| `Learner.distill` | a new method, in `learner.py` | import |
| `Learner.check_teacher` | a new method, in `learner.py` | import |
| `Learner.show_features` | a new method, in `learner.py` | import |

"First target" is when the first `TeacherBlock` is made or unpickled, or the first cache is trained from. `DataBlock.__init__` can't wait
for it: a `TeacherBlock` may be given as a class, which fastai makes an instance of when it is about to count the inputs. Without a
`TeacherBlock` the wrapped methods do what they did before."""
import functools, inspect
from fastai.basics import DataBlock, Datasets, L, TensorBase, TfmdDL, defaults
from .block import FIRST_TARGET, TeacherBlock, TeacherTarget, ToTeacherTarget
from .targets import TeacherTargets

__all__ = []


def _n_inp_without_teacher(init):
    "Inputs are all blocks but the last one (`n_inp` not given): here, all but the label and the `TeacherBlock`s"
    sig = inspect.signature(init)
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        try: given = sig.bind(self, *args, **kwargs)
        except TypeError: return init(self, *args, **kwargs)        # it says what is wrong
        blocks = given.arguments.get('blocks')
        if blocks is None: blocks = self.blocks
        n_teachers = sum(map(_is_teacher, blocks)) if isinstance(blocks, (list, tuple, L)) else 0
        if n_teachers and given.arguments.get('n_inp') is None: given.arguments['n_inp'] = max(1, len(blocks)-n_teachers-1)
        init(*given.args, **given.kwargs)
    return __init__


def _is_teacher(block):
    "A `TeacherBlock`, as an instance, as the class, or as a `functools.partial` of the class"
    cls = getattr(block, 'func', block)
    return isinstance(block, TeacherBlock) or isinstance(cls, type) and issubclass(cls, TeacherBlock)


def _without_targets(tls): return [tl for tl in tls if not any(isinstance(f, ToTeacherTarget) for f in tl.tfms.fs)]


def _decode_without_teacher(decode):
    "The teacher's column is left out where an input and its prediction are decoded"
    @functools.wraps(decode)
    def _decode(self, o, full=True):
        tls = _without_targets(self.tls)
        if len(tls) < len(self.tls) and len(o) == len(tls): return tuple(tl.decode(v, full=full) for v,tl in zip(o, tls))
        return decode(self, o, full=full)
    return _decode


def _empty_without_teacher(new_empty):
    "The empty data of an exported student have no column of the teacher's"
    @functools.wraps(new_empty)
    def _new_empty(self):
        tls = _without_targets(self.tls)
        return new_empty(self) if len(tls) == len(self.tls) else type(self)(tls=[tl.new_empty() for tl in tls], n_inp=self.n_inp)
    return _new_empty


def _types_without_teacher(one_pass):
    "A DataLoader remembers the types of a batch: the type of the teacher's targets is remembered as `TensorBase`"
    @functools.wraps(one_pass)
    def _one_pass(self):
        one_pass(self)
        plain = lambda o: TensorBase if isinstance(o, type) and issubclass(o, TeacherTarget) else o
        if isinstance(self._types, dict): self._types = {k: [plain(o) for o in v] for k,v in self._types.items()}
    return _one_pass


def _show_without_teacher(pre_show_batch):
    "How a batch is shown depends on the types of input and label: the teacher's target is taken out before"
    @functools.wraps(pre_show_batch)
    def _pre_show_batch(self, b, max_n=9):
        if isinstance(b, (tuple, list)): b = type(b)(o for o in b if not isinstance(o, TeacherTarget))
        return pre_show_batch(self, b, max_n=max_n)
    return _pre_show_batch


def _once(cls, name, wrap):
    "Wrap a method, once, however often this module is loaded"
    if hasattr(getattr(cls, name), '_knows_teacher'): return
    setattr(cls, name, wrap(getattr(cls, name)))
    getattr(cls, name)._knows_teacher = True


def _at_first_target():
    _once(Datasets, 'decode', _decode_without_teacher)
    _once(Datasets, 'new_empty', _empty_without_teacher)
    _once(TfmdDL, '_one_pass', _types_without_teacher)
    _once(TfmdDL, '_pre_show_batch', _show_without_teacher)
    if TeacherTargets not in defaults.callbacks: defaults.callbacks = [*defaults.callbacks, TeacherTargets]

_once(DataBlock, '__init__', _n_inp_without_teacher)
FIRST_TARGET.append(_at_first_target)
