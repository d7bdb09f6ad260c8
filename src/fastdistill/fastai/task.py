"fastai's loss functions: what they say about the outputs of a model."
from fastai.basics import BaseLoss, DiceLoss, FocalLoss, LabelSmoothingCrossEntropy
from ..task import Task, register_losses, register_wrapper, task_of

__all__ = ['Task', 'task_of']

register_losses('softmax', FocalLoss, LabelSmoothingCrossEntropy, DiceLoss)


@register_wrapper
def inside_mixup(lf):
    "While MixUp trains, the loss function is its bound method, and it holds the old one"
    old = getattr(getattr(lf, '__self__', None), 'old_lf', None)
    return None if old is None else (old, None)


@register_wrapper
def inside_flat(lf):
    "fastai's flat losses hold PyTorch's, and know the class axis"
    return (lf.func, lf.axis) if isinstance(lf, BaseLoss) else None
