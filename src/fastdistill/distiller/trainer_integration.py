"""Functions that integrations with other trainers use for setup and checkpoints."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from ..base.distributed import broadcast, on_first
from ..base.outputs import Outputs
from ..checks.forward import student_logits
from ..features.layer_names import unwrap
from ..features.layer_pairs import inputs
from .distiller import Distiller
from .recipe_choice import choose


def is_detector(model: Any) -> bool:
    """Return True if `model` is a torchvision detector, which `fastdistill.detection` distills."""
    kinds = type(unwrap(model)).__mro__
    return any(o.__module__.startswith('torchvision.models.detection.') for o in kinds)


def is_choosing(d: Distiller) -> bool:
    """Return True if the recipe of at least one head still has to be chosen."""
    return any(h.chooses for h in d.heads.values())


def needs_example(d: Distiller) -> bool:
    """Return True if a batch is needed to choose the recipe or build projectors."""
    return is_choosing(d) or not d.ready


def check_first(d: Distiller, batches: Iterable, **options: Any) -> None:
    """Look for mistakes before training.

    Only the first process looks for mistakes. All processes raise the same error.

    Args:
        d: The `Distiller`.
        batches: Iterable of (inputs, labels). Empty if there is no batch to read.
        **options: Options of `Distiller.check_batches`.
    """
    found = on_first(lambda: d.check_batches(batches, **options))
    for k, f in d.heads.by_name(found).items():
        d.heads[k].doubt = f.doubt
        f.enforce()


def complete(d: Distiller, x: Any, labels: bool = True) -> None:
    """Choose the recipe if none was given, pair student and teacher layers, and build projectors.

    The result is identical in all processes.

    Args:
        d: The `Distiller`.
        x: Batch of the student's inputs.
        labels: Whether the batches have labels.
    """
    x = inputs(x)
    for h in d.heads.values():
        if h.chooses:
            student = Outputs(student_logits(d.student, x, h.output))
            choose(h, student, partial(h.teacher.probe, *x), labels)
    d.heads.recipe_changed()
    if not d.ready:
        build_links(d, x)


def build_links(d: Distiller, x: Iterable) -> None:
    """Pair student and teacher layers, and build projectors. The result is identical in all
    processes.

    Args:
        d: The `Distiller`.
        x: Inputs of a batch.
    """
    d.setup(*x)
    broadcast(d.links.state_dict().values())


def takes_part(d: Distiller, progress: float | None) -> bool:
    """Return True if distillation changes the loss at this point.

    If the result is False, the training step is bit for bit the same as without distillation.

    Args:
        d: The `Distiller`.
        progress: Fraction of the training that is done, from 0 to 1.
    """
    return bool(d.active_terms(progress)) or d.recipe.task_at(progress) != 1


def add_parameters(optimizer: Optimizer, d: Distiller) -> None:
    """Add the parameters of the projectors to the student's optimizer.

    The parameters are added to the first parameter group, because existing schedulers only know the
    existing groups.

    Args:
        optimizer: Optimizer of the student.
        d: The `Distiller`.
    """
    have = {id(p) for g in optimizer.param_groups for p in g['params']}
    # Lightning gives a module without an optimizer a substitute that has no groups
    if new := [p for p in d.own_parameters() if id(p) not in have]:
        optimizer.param_groups[0]['params'] += new


def reset_gradients(d: Distiller) -> None:
    for p in d.own_parameters():
        p.grad = None


def training_state(d: Distiller) -> dict:
    """Return the state to save in addition to the student and its optimizer.

    This state consists of the projectors, the chosen recipe, the measured gradients and the random
    state of the teacher.
    """
    return dict(links=d.links.state_dict(), distiller=d.get_extra_state())


def load_state(d: Distiller, state: dict) -> None:
    """Restore what `training_state` returned.

    Args:
        d: A `Distiller` after `complete`.
        state: What `training_state` returned. The state of the `Distiller` may be None.
    """
    if state['distiller'] is not None:
        d.set_extra_state(state['distiller'])
    d.links.load_state_dict(state['links'])
