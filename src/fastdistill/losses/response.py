"Losses between what two models answer: (B, C), (B, C, H, W), (B, L, V) ... with `axis` as the class axis."
import torch
from torch import Tensor
import torch.nn.functional as F
from ..outputs import DistillError
from ._base import Loss, expect, log_probs, loss, reduce, same_shape

__all__ = ['kl', 'KL']


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
    same_shape(s, t)
    ls,lt = log_probs(s, T, axis), log_probs(t, T, axis)
    return reduce(expect(lt, lt-ls).sum(axis)*T**2, reduction, mask)

class KL(Loss): fn = kl
