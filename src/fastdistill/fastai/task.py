"""Register fastai's loss functions with the kind of outputs that they expect."""

from fastai.basics import BaseLoss, DiceLoss, FocalLoss, LabelSmoothingCrossEntropy

from ..base.task import Task, register_losses, register_wrapper, task_of

__all__ = ['Task', 'task_of']

register_losses('softmax', FocalLoss, LabelSmoothingCrossEntropy, DiceLoss)


@register_wrapper
def inside_mixup(lf):
    """Return the original loss function if MixUp has replaced it during training.

    MixUp sets its own method as the loss function, and stores the original one in `old_lf`.
    """
    old = getattr(getattr(lf, '__self__', None), 'old_lf', None)
    return None if old is None else (old, None)


@register_wrapper
def inside_flat(lf):
    """Return the PyTorch loss inside one of fastai's flat losses, and its class axis."""
    return (lf.func, lf.axis) if isinstance(lf, BaseLoss) else None
