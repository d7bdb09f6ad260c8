"Losses between what two models answer: (B, C), (B, C, H, W), (B, L, V) ... with `axis` as the class axis."
import copy, functools, inspect, math
import torch
from torch import Tensor
import torch.nn.functional as F
from ..outputs import DistillError, as_plain
from ._base import Loss, _full, class_axis, expect, fit_mask, log_probs, loss, reduce, same_shape, temperature

__all__ = ['kl', 'KL', 'reverse_kl', 'ReverseKL', 'jsd', 'JSD', 'tvd', 'TVD', 'soft_ce', 'SoftCE', 'mse', 'MSE', 'hard', 'Hard',
           'binary_kl', 'BinaryKL', 'regression', 'Regression', 'soft_targets', 'SoftTargets',
           'dkd', 'DKD', 'nkd', 'NKD', 'dist', 'DIST', 'standardize', 'standardized']


def _positions(x, axis): return x.shape[:axis] + x.shape[axis+1:]

def _blank(mask, *xs):
    "`xs` with 0 where the mask drops a value: a nan that stands there must reach neither the value nor the gradient"
    return [x.where(mask > 0, 0.) for x in xs]

def _pair(s, t, axis, mask):
    "Both logits, checked, blank where the mask drops a position"
    same_shape(s, t)
    axis = class_axis(s, axis)
    return (s,t) if mask is None else _blank(fit_mask(mask, _positions(s, axis)).unsqueeze(axis), s, t)

def _classes(s, t, axis, mask):
    "`_pair`, where a softmax says something"
    if s.shape[class_axis(s, axis)] < 2:
        raise DistillError(f"Outputs of shape {tuple(s.shape)} have 1 class on axis {axis}, and its softmax is always 1: nothing to learn. "
                           "Is it one label, or a number? Use binary_kl or regression. Does another axis hold the classes? Pass axis.")
    return _pair(s, t, axis, mask)

def _within(x, other):
    "`x` over the classes that `other` has: one that is -inf there (outside its vocabulary) is left out, the rest sums to 1"
    return x.masked_fill(other == -torch.inf, -torch.inf)

def _kl(a, b, axis): return expect(a, a-b).sum(axis)


@loss
def kl(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    *, T:float=4., # temperature
    axis:int=1, # class axis
    mask:Tensor|None=None, # `s` without the class axis: which positions count
    reduction:str='mean'
):
    "T^2 KL(softmax(t/T) || softmax(s/T)): soft targets (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)"
    s,t = _classes(s, t, axis, mask)
    ls,lt = log_probs(s, T, axis),log_probs(_within(t, s), T, axis)
    return reduce(_kl(lt, ls, axis)*T**2, reduction, mask)

class KL(Loss): fn = kl


@loss
def reverse_kl(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    *, T:float=1., # temperature
    axis:int=1, # class axis
    mask:Tensor|None=None, # `s` without the class axis: which positions count
    reduction:str='mean'
):
    "T^2 KL(softmax(s/T) || softmax(t/T)): the student keeps to what the teacher finds likely (MiniLLM, arXiv:2306.08543)"
    s,t = _classes(s, t, axis, mask)
    ls,lt = log_probs(_within(s, t), T, axis),log_probs(t, T, axis)
    return reduce(_kl(ls, lt, axis)*T**2, reduction, mask)

class ReverseKL(Loss): fn = reverse_kl


@loss
def jsd(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    *, beta:float=.5, # teacher's share of the mixture; 0 is kl and 1 is reverse_kl
    T:float=1., # temperature
    axis:int=1, # class axis
    mask:Tensor|None=None, # `s` without the class axis: which positions count
    reduction:str='mean'
):
    "T^2 (beta KL(p_t || m) + (1-beta) KL(p_s || m)), m = beta p_t + (1-beta) p_s: generalised Jensen-Shannon (GKD, arXiv:2306.13649)"
    if not 0 <= beta <= 1: raise DistillError(f"beta={beta}: the teacher's share of the mixture is a number from 0 to 1")
    # subtle: the mixture's own limits are 0 (its slope is the KL), so 0 and 1 stand for the KLs themselves, as in TRL
    if beta in (0, 1): return (reverse_kl if beta else kl)(s, t, T=T, axis=axis, mask=mask, reduction=reduction)
    s,t = _classes(s, t, axis, mask)
    ls,lt = log_probs(s, T, axis),log_probs(t, T, axis)
    # subtle: the gradient of logaddexp is nan where both are -inf
    lm = torch.logaddexp(lt + math.log(beta), ls.clamp_min(torch.finfo(ls.dtype).min/4) + math.log(1-beta))
    return reduce((beta*_kl(lt, lm, axis) + (1-beta)*_kl(ls, lm, axis))*T**2, reduction, mask)

class JSD(Loss): fn = jsd


@loss
def tvd(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    *, T:float=1., # temperature
    axis:int=1, # class axis
    mask:Tensor|None=None, # `s` without the class axis: which positions count
    reduction:str='mean'
):
    "T^2/2 |softmax(t/T) - softmax(s/T)|: total variation distance, bounded by T^2 (f-distill, arXiv:2307.15190)"
    s,t = _classes(s, t, axis, mask)
    v = (log_probs(s, T, axis).exp() - log_probs(t, T, axis).exp()).abs().sum(axis)/2
    return reduce(v*T**2, reduction, mask)

class TVD(Loss): fn = tvd


@loss
def soft_ce(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    *, T:float=4., # temperature
    axis:int=1, # class axis
    mask:Tensor|None=None, # `s` without the class axis: which positions count
    reduction:str='mean'
):
    "T^2 cross-entropy with the soft targets: `kl` plus the teacher's own entropy, the same gradient (arXiv:1503.02531)"
    s,t = _classes(s, t, axis, mask)
    ls,lt = log_probs(s, T, axis),log_probs(_within(t, s), T, axis)
    return reduce(expect(lt, -ls).sum(axis)*T**2, reduction, mask)

class SoftCE(Loss): fn = soft_ce


@loss
def mse(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    *, axis:int=1, # class axis
    mask:Tensor|None=None, # `s` without the class axis: which positions count
    reduction:str='mean'
):
    "Squared distance of the logits, summed over classes (Ba and Caruana 2014, arXiv:1312.6184). A temperature with its T^2 would cancel"
    s,t = _pair(s, t, axis, mask)
    return reduce((s-t).pow(2).sum(axis), reduction, mask)

class MSE(Loss): fn = mse


@loss
def hard(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    *, axis:int=1, # class axis
    mask:Tensor|None=None, # `s` without the class axis: which positions count
    reduction:str='mean'
):
    "Cross-entropy with the class that the teacher would choose (DeiT, arXiv:2012.12877); 0 for a student that is sure of it"
    s,t = _classes(s, t, axis, mask)
    return reduce(-_at(log_probs(s, 1., axis), _within(t, s).argmax(axis), axis), reduction, mask)

class Hard(Loss): fn = hard


@loss
def binary_kl(
    s:Tensor, # student logits, any shape: one per label
    t:Tensor, # teacher logits, the same shape
    *, T:float=4., # temperature
    mask:Tensor|None=None, # the shape of `s`: which labels of which samples count
    reduction:str='mean'
):
    "T^2 KL between the Bernoullis sigmoid(t/T) and sigmoid(s/T), one value per label: soft targets of multi-label models"
    same_shape(s, t)
    if mask is not None: s,t = _blank(fit_mask(mask, s.shape), s, t)
    s,t = s/temperature(T),t/T
    yes,no = [expect(F.logsigmoid(b), F.logsigmoid(b)-F.logsigmoid(a)) for a,b in ((s, t), (-s, -t))]
    return reduce((yes+no)*T**2, reduction, mask)

class BinaryKL(Loss): fn = binary_kl


DISTANCES = dict(mse=F.mse_loss, l1=F.l1_loss, huber=F.huber_loss)

@loss
def regression(
    s:Tensor, # (B, ...) student's numbers
    t:Tensor, # (B, ...) teacher's: as many per sample, in any shape
    *, distance:str='mse', # or 'l1', or 'huber' (quadratic up to 1)
    mask:Tensor|None=None, # (B,): which samples count
    reduction:str='mean'
):
    "Mean distance of the predicted numbers, one value per sample: (B,) compares with (B, 1), (B, n, 2) with (B, 2n)"
    if distance not in DISTANCES: raise DistillError(f"distance={distance!r}: possible are {', '.join(map(repr, DISTANCES))}")
    if s.shape[:1] != t.shape[:1] or s.numel() != t.numel():
        raise DistillError(f"The student's output has shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}: as many samples, and as many "
                           "numbers per sample, are needed")
    s,t = s.reshape(len(s), -1),t.reshape(len(t), -1)
    if mask is not None: s,t = _blank(fit_mask(mask, s.shape[:1])[:, None], s, t)
    return reduce(DISTANCES[distance](s, t, reduction='none').mean(1), reduction, mask)

class Regression(Loss): fn = regression


@loss
def soft_targets(
    s:Tensor, # student's outputs, before softmax or sigmoid
    t:Tensor, # teacher's
    *, kind:str='softmax', # what they are: 'softmax' over classes, 'sigmoid' per label, 'regression'
    T:float=4., # temperature (numbers have none)
    axis:int=1, # class axis, for softmax
    mask:Tensor|None=None, # as `kl`, `binary_kl` or `regression` has it
    reduction:str='mean'
):
    "The soft targets of whatever a model predicts: `kl`, `binary_kl` or `regression` (mse), by `kind`"
    if kind == 'softmax':    return kl(s, t, T=T, axis=axis, mask=mask, reduction=reduction)
    if kind == 'sigmoid':    return binary_kl(s, t, T=T, mask=mask, reduction=reduction)
    if kind == 'regression': return regression(s, t, mask=mask, reduction=reduction)
    raise DistillError(f"kind={kind!r}: possible are 'softmax', 'sigmoid' and 'regression'")

class SoftTargets(Loss): fn = soft_targets


def _labels(y, s, axis, ignore_index, mask):
    "One class per position, and the mask without the positions whose label is `ignore_index`"
    y,axis = as_plain(y),class_axis(s, axis)
    shape,n = _positions(s, axis),s.shape[axis]
    if y.is_floating_point() or y.is_complex():
        raise DistillError(f"Labels of {y.dtype}: this loss sets the label's class apart, so it needs one class (an integer) per position. "
                           "Mixed or smoothed labels have none: use kl, jsd or dist, or pass the plain labels.")
    if y.shape == (*shape, 1): y = y[..., 0]        # tabular targets are (B, 1)
    if y.shape != shape:
        raise DistillError(f"Labels of shape {tuple(y.shape)} do not fit logits of shape {tuple(s.shape)}: with the classes on axis {axis} "
                           f"they have shape {tuple(shape)}")
    y = y.long()
    keep = y != ignore_index
    if mask is not None: keep = keep*fit_mask(mask, shape)
    y = y.where(keep > 0, 0)
    # subtle: only here is a look at the values free; a GPU would stop for it at every step, and a traced graph would break
    if y.is_cpu and not torch.compiler.is_compiling() and y.numel() and not 0 <= y.min() <= y.max() < n:
        raise DistillError(f"Labels from {y.min()} to {y.max()} for {n} classes: one that does not count is named by ignore_index "
                           f"(now {ignore_index}), or left out by mask")
    return y,keep

def _at(x, y, axis):
    "`x` at the class `y`, without the class axis"
    axis = class_axis(x, axis)
    return x.gather(axis, y.unsqueeze(axis)).squeeze(axis)

def _others(x, y, axis):
    "`x` with -inf at the class `y`: a softmax or logsumexp of it is exactly that of the other classes"
    axis = class_axis(x, axis)
    return x.masked_fill(torch.zeros_like(x, dtype=torch.bool).scatter(axis, y.unsqueeze(axis), True), -torch.inf)


@loss
def dkd(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    y:Tensor, # labels: `s` without the class axis
    *, alpha:float=1., # weight of the target class against all others
    beta:float=8., # weight of the other classes among themselves
    T:float=4., # temperature
    axis:int=1, # class axis
    ignore_index:int=-100, # positions with this label do not count
    mask:Tensor|None=None, # the shape of `y`: which positions count
    reduction:str='mean'
):
    "T^2 (alpha KL of (p_y, 1-p_y) + beta KL of the softmax without y): decoupled distillation (CVPR 2022, arXiv:2203.08679)"
    y,mask = _labels(y, s, axis, ignore_index, mask)
    s,t = _classes(s, t, axis, mask)
    ls,lt = [_target_or_not(log_probs(x, T, axis), y, axis) for x in (s, t)]
    os,ot = [log_probs(_others(x, y, axis), T, axis) for x in (s, t)]
    return reduce((alpha*_kl(lt, ls, 0) + beta*_kl(ot, os, axis))*T**2, reduction, mask)

class DKD(Loss): fn = dkd

def _target_or_not(lp, y, axis):
    "log p_y and log(1-p_y), without the cancellation in 1-p_y"
    return torch.stack([_at(lp, y, axis), _others(lp, y, axis).logsumexp(axis)])


@loss
def nkd(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    y:Tensor, # labels: `s` without the class axis
    *, gamma:float=1.5, # weight of the other classes among themselves
    T:float=1., # temperature of that part; the target class has none
    axis:int=1, # class axis
    ignore_index:int=-100, # positions with this label do not count
    mask:Tensor|None=None, # the shape of `y`: which positions count
    reduction:str='mean'
):
    """-p_t^y log p_s^y + gamma T^2 cross-entropy of the softmax without y: normalised distillation (ICCV 2023, arXiv:2303.13005).
    Never below gamma T^2 times the entropy of the teacher's other classes, reached by a student that is sure of y"""
    y,mask = _labels(y, s, axis, ignore_index, mask)
    s,t = _classes(s, t, axis, mask)
    ls,lt = [_at(log_probs(x, 1., axis), y, axis) for x in (s, t)]
    os,ot = [log_probs(_others(x, y, axis), T, axis) for x in (s, t)]
    return reduce(expect(lt, -ls) + gamma*T**2*expect(ot, -os).sum(axis), reduction, mask)

class NKD(Loss): fn = nkd


@loss
def dist(
    s:Tensor, # student logits, any shape
    t:Tensor, # teacher logits, the same shape
    *, beta:float=1., # weight of the relation between the classes of a position
    gamma:float=1., # weight of the relation between the positions of a class
    T:float=1., # temperature
    axis:int=1, # class axis
    eps:float=1e-8, # added to the product of norms: a class that hardly varies over the batch counts little
    mask:Tensor|None=None, # `s` without the class axis: which positions count
    reduction:str='mean' # 'none': a position's own part, plus the part that all share
):
    """T^2 (beta (1 - Pearson of a position's probabilities) + gamma (1 - Pearson of a class's over all positions))
    (NeurIPS 2022, arXiv:2205.10536). At the teacher 0 but for `eps`, as released: a class that does not vary at all over
    the positions (a batch of one) adds its full share, without a gradient"""
    s,t = _classes(s, t, axis, mask)
    axis = class_axis(s, axis)
    p,q = log_probs(s, T, axis).exp(),log_probs(t, T, axis).exp()
    w = None if mask is None else fit_mask(mask, _positions(s, axis)).to(p.dtype).unsqueeze(axis)
    within = _pearson(p, q, [d for d in range(p.dim()) if d != axis], w, eps).mean()
    return reduce((beta*(1-_pearson(p, q, axis, None, eps)) + gamma*(1-within))*T**2, reduction, mask)

class DIST(Loss): fn = dist

def _pearson(
    a:Tensor, b:Tensor, # of one shape
    dim, # over which it is taken
    w:Tensor|None=None, # weights that broadcast to `a`
    eps:float=1e-8
):
    "Correlation, and 0 where one of the two does not vary"
    def centre(x):
        if w is None: return x - x.mean(dim, keepdim=True)
        return (x - (w*x).sum(dim, keepdim=True)/w.sum(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).eps))*w.sqrt()
    a,b = centre(a),centre(b)
    return (a*b).sum(dim)/(torch.linalg.vector_norm(a, dim=dim)*torch.linalg.vector_norm(b, dim=dim) + eps)


def standardize(
    x:Tensor, # logits, any shape
    *, axis:int=1, # class axis
    eps:float=1e-7, # added to the standard deviation
    correction:int=1 # 1 divides by C-1, as released; 0 by C, as in the paper
):
    "Logits less their mean, over their standard deviation: the student need not have the teacher's scale (CVPR 2024, arXiv:2403.01427)"
    x,axis = _full(x),class_axis(x, axis)
    if x.shape[axis] < 2: raise DistillError(f"Logits of shape {tuple(x.shape)} have 1 class on axis {axis}: no spread to standardise")
    return (x - x.mean(axis, keepdim=True))/(eps + x.std(axis, correction=correction, keepdim=True))


class Standardized:
    "What `standardized` makes of a function: one that looks like it, and can be pickled"
    def __init__(self, fn, **options):
        functools.update_wrapper(self, fn, updated=())
        self.options_of_standardize = options
        self.__name__ = getattr(fn, '__name__', type(fn).__name__)
        if hasattr(fn, 'kind'): self.kind = fn.kind
        axis = inspect.signature(fn).parameters.get('axis')
        self.axis = 1 if axis is None or axis.default is axis.empty else axis.default
        self._check(getattr(fn, 'kind', None))

    def _check(self, kind):
        if kind in ('sigmoid', 'regression'):
            raise DistillError(f"standardized {self.__name__} for {kind}: standardising compares a position's classes with each other, "
                               "so it needs a loss of softmax logits, such as kl, dkd or dist")

    def __call__(self, s, t, *args, **kwargs):
        self._check(kwargs.get('kind'))
        axis = kwargs.get('axis', self.axis)
        s,t = _pair(_full(s), _full(t, detach=True), axis, kwargs.get('mask'))
        s,t = [standardize(x, axis=axis, **self.options_of_standardize) for x in (s, t)]
        return self.__wrapped__(s, t, *args, **kwargs)

    def __repr__(self): return f'standardized({self.__name__})'


def standardized(
    loss, # a loss function of two logits, or a `Loss` module of one
    *, eps:float=1e-7, # as `standardize` has them
    correction:int=1
):
    "The same loss on standardised logits: standardized(kl), standardized(DKD(beta=2.)) (CVPR 2024, arXiv:2403.01427)"
    if not isinstance(loss, Loss): return Standardized(loss, eps=eps, correction=correction)
    loss = copy.deepcopy(loss)
    loss.fn = Standardized(loss.fn, eps=eps, correction=correction)
    return loss


# what the logits must be for the loss to have a meaning: whoever knows what a model predicts can refuse the others
for fn in (kl, reverse_kl, jsd, tvd, soft_ce, hard, dkd, nkd, dist): fn.kind = 'softmax'
binary_kl.kind,regression.kind = 'sigmoid','regression'
del fn
