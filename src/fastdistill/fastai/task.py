"What a Learner predicts, read off its loss function."
from dataclasses import dataclass
from functools import partial
import torch.nn.functional as F
from torch import nn
from fastai.basics import BaseLoss, DiceLoss, FocalLoss, LabelSmoothingCrossEntropy
from ..outputs import DistillError

__all__ = ['Task', 'task_of']

SOFTMAX = (nn.CrossEntropyLoss, FocalLoss, LabelSmoothingCrossEntropy, DiceLoss)
SIGMOID = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
FUNCTIONS = {F.cross_entropy: 'softmax', F.binary_cross_entropy_with_logits: 'sigmoid', F.mse_loss: 'regression',
             F.l1_loss: 'regression', F.smooth_l1_loss: 'regression', F.huber_loss: 'regression'}


@dataclass
class Task:
    "What the logits are, along which axis the classes lie, and which label does not count"
    kind:str # 'softmax', 'sigmoid' or 'regression'
    axis:int=1
    ignore_index:int=-100


def task_of(
    loss_func, # of a Learner: fastai's, PyTorch's, a partial or a subclass of them
    kind:str|None=None, # say it where the loss function doesn't
    axis:int|None=None
) -> Task:
    "The task behind a loss function; one that is unknown is asked for"
    lf,axes = loss_func,[]
    while True:      # MixUp's bound method holds the old one; partials and fastai's flat losses hold theirs
        inner = getattr(getattr(lf, '__self__', None), 'old_lf', None)
        if inner is None and isinstance(lf, partial): inner = lf.func
        if inner is None and isinstance(lf, BaseLoss): axes.append(lf.axis); inner = lf.func
        if inner is None: break
        lf = inner
    if kind is None: kind = FUNCTIONS.get(lf) if callable(lf) and getattr(lf, '__hash__', None) else None
    if kind is None:
        kind = next((k for k,cs in dict(softmax=SOFTMAX, sigmoid=SIGMOID, regression=NUMBERS).items() if isinstance(lf, cs)), None)
    if kind is None: raise DistillError(_unknown(lf))
    if axis is None: axis = axes[0] if axes else getattr(lf, 'axis', 1)
    ignore = getattr(lf, 'ignore_index', None)
    if ignore is None and isinstance(loss_func, partial): ignore = loss_func.keywords.get('ignore_index')
    return Task(kind, axis, -100 if ignore is None else ignore)


def _unknown(lf):
    name = getattr(lf, '__name__', type(lf).__name__)
    if isinstance(lf, nn.BCELoss) or lf is F.binary_cross_entropy:
        return (f"The student's loss {name} takes probabilities, so its model ends in a sigmoid, and distillation needs the outputs "
                "before it: end the model with the last linear layer and use BCEWithLogitsLossFlat.")
    if isinstance(lf, nn.NLLLoss) or lf is F.nll_loss:
        return (f"The student's loss {name} takes log-probabilities: pass kind='softmax' and axis=... (log-probabilities are logits too).")
    return (f"Can't tell from the student's loss {name} what it predicts: pass kind='softmax' (classes, with axis= their axis), "
            "'sigmoid' (labels) or 'regression' (numbers) to KnowledgeDistillation.")
