"What all losses share: precision, shapes, the mask, the reduction, and the module form of a function."
import functools, inspect
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from ..outputs import DistillError

__all__ = ['Loss', 'loss', 'reduce', 'same_shape', 'log_probs', 'expect', 'temperature']


def _full(x, detach=False):
    "`x` (a tensor, or a list of them) in float32 or better"
    if isinstance(x, (list, tuple)): return [_full(o, detach) for o in x]
    if not isinstance(x, Tensor): return x
    if x.is_floating_point() and x.dtype not in (torch.float32, torch.float64): x = x.float()
    return x.detach() if detach else x


def loss(fn):
    "Run `fn(s, t, ...)` in float32 or better, also under autocast, and without a gradient into the teacher"
    @functools.wraps(fn)
    def call(s, t, *args, **kwargs):
        first = s[0] if isinstance(s, (list, tuple)) else s
        with torch.autocast(first.device.type, enabled=False):
            return fn(_full(s), _full(t, detach=True), *args, **kwargs)
    return call


def reduce(
    v:Tensor, # one value per position
    reduction:str='mean', # 'mean' over the positions that count, 'sum', or 'none'
    mask:Tensor|None=None # the shape of `v` (or one that broadcasts to it): True, or a weight, where a position counts
):
    "Reduce `v` where `mask` counts; an empty mask gives 0 with a gradient, never nan"
    if reduction not in ('mean', 'sum', 'none'):
        raise DistillError(f"reduction={reduction!r}: possible are 'mean', 'sum' and 'none'")
    if mask is not None:
        if mask.dim() > v.dim() or any(m not in (1, n) for m,n in zip(mask.shape[::-1], v.shape[::-1])):
            raise DistillError(f"A mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(v.shape)}: "
                               "it has the shape of the logits without their class axis")
        mask = mask.to(v.dtype).expand_as(v)
        # subtle: where, not a product: 0*inf is nan, and a masked position may hold anything
        v = torch.where(mask > 0, v, 0.)*mask
    if reduction == 'none': return v
    if reduction == 'sum': return v.sum()
    return v.mean() if mask is None else v.sum()/mask.sum().clamp_min(torch.finfo(v.dtype).eps)


def same_shape(s:Tensor, t:Tensor):
    "Refuse what would broadcast in silence"
    if s.shape != t.shape:
        raise DistillError(f"The student's output has shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}: they must be equal. "
                           "Different classes? Select or order the teacher's; different resolutions? Resize one of them.")


def temperature(T):
    "`T`, if it is one"
    if not T > 0: raise DistillError(f"T={T}: a temperature is a number above 0 (1 leaves the logits as they are, 2 to 8 soften them)")
    return T


def log_probs(x:Tensor, T:float=1., axis:int=1):
    "log softmax of `x/T` over the class axis"
    if not -x.dim() <= axis < x.dim(): raise DistillError(f"axis={axis}: outputs of shape {tuple(x.shape)} have no such axis")
    return F.log_softmax(x/temperature(T), axis)


def expect(lp:Tensor, v:Tensor):
    "`exp(lp)*v`, and 0 where the probability is 0 (`v` may be infinite there)"
    zero = lp == -torch.inf
    return lp.exp()*v.masked_fill(zero, 0.)


class Loss(nn.Module):
    "The module form of the loss function `fn`: it only holds options"
    fn = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.fn = staticmethod(cls.fn)
        cls.__doc__ = cls.__doc__ or inspect.getdoc(cls.fn)

    def __init__(self, **options):
        super().__init__()
        have = [p.name for p in inspect.signature(self.fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if wrong := set(options) - set(have):
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(wrong))}. It has: {', '.join(have)}")
        self.options = options

    def forward(self, s, t, *args, **kwargs): return self.fn(s, t, *args, **{**self.options, **kwargs})

    def extra_repr(self): return ', '.join(f'{k}={v!r}' for k,v in self.options.items())
