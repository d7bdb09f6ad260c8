"What a model predicts, read off its loss function."
from dataclasses import dataclass
from functools import partial
from torch import nn
import torch.nn.functional as F
from .outputs import DistillError

__all__ = ['Task', 'register_losses', 'register_wrapper', 'task_of']

# what the outputs are -> loss classes that say so; a framework registers its own
CLASSES = dict(softmax=[nn.CrossEntropyLoss], sigmoid=[nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss],
               regression=[nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss])
FUNCTIONS = {F.cross_entropy: 'softmax', F.binary_cross_entropy_with_logits: 'sigmoid', F.mse_loss: 'regression',
             F.l1_loss: 'regression', F.smooth_l1_loss: 'regression', F.huber_loss: 'regression'}


WRAPPED = [lambda lf: (lf.func, None) if isinstance(lf, partial) else None]


def register_losses(
    kind:str, # 'softmax', 'sigmoid' or 'regression'
    *classes # loss classes whose inputs are outputs of that kind
):
    "Teach `task_of` the loss classes of a framework"
    CLASSES[kind] += [c for c in classes if c not in CLASSES[kind]]


def register_wrapper(
    look # fn(loss) -> (the loss inside it, its class axis or None), or None if it is no such wrapper
):
    "Teach `task_of` to look inside a framework's wrappers of losses"
    WRAPPED.append(look)


@dataclass
class Task:
    "What the logits are, along which axis the classes lie, and which label does not count"
    kind:str # 'softmax', 'sigmoid' or 'regression'
    axis:int=1
    ignore_index:int=-100


def task_of(
    loss_func, # PyTorch's, one that a framework registered, a partial or a subclass of them
    kind:str|None=None, # say it where the loss function doesn't
    axis:int|None=None
) -> Task:
    "The task behind a loss function; one that is unknown is asked for"
    lf,axes = loss_func,[]
    while (inner := next((found for look in WRAPPED if (found := look(lf)) is not None), None)) is not None:
        lf,own_axis = inner
        if own_axis is not None: axes.append(own_axis)
    if kind is None: kind = FUNCTIONS.get(lf) if callable(lf) and getattr(lf, '__hash__', None) else None
    if kind is None:
        kind = next((k for k,classes in CLASSES.items() if isinstance(lf, tuple(classes))), None)
    if kind is None: raise DistillError(unknown_loss(lf))
    if axis is None: axis = axes[0] if axes else getattr(lf, 'axis', 1)
    ignore = getattr(lf, 'ignore_index', None)
    if ignore is None and isinstance(loss_func, partial): ignore = loss_func.keywords.get('ignore_index')
    return Task(kind, axis, -100 if ignore is None else ignore)


def unknown_loss(lf):
    name = getattr(lf, '__name__', type(lf).__name__)
    if isinstance(lf, nn.BCELoss) or lf is F.binary_cross_entropy:
        return (f"The student's loss {name} takes probabilities, so its model ends in a sigmoid, and distillation needs the outputs "
                "before it: end the model with the last linear layer and use BCEWithLogitsLossFlat.")
    if isinstance(lf, nn.NLLLoss) or lf is F.nll_loss:
        return (f"The student's loss {name} takes log-probabilities: pass kind='softmax' and axis=... (log-probabilities are logits too).")
    return (f"Can't tell from the student's loss {name} what it predicts: pass kind='softmax' (classes, with axis= their axis), "
            "'sigmoid' (labels) or 'regression' (numbers) to KnowledgeDistillation.")
