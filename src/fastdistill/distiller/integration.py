"""What the faces of other trainers share: a Distiller that is complete before the optimizer,
projectors, checkpoints.
"""

from ..base.distributed import broadcast, on_first, rank
from ..features.layer_names import unwrap
from ..features.layer_pairs import inputs
from .distiller import Distiller

__all__ = [
    'add_parameters',
    'check_first',
    'complete',
    'is_detector',
    'load_state',
    'needs_example',
    'reset_gradients',
    'takes_part',
    'training_state',
]

OLD_STATE = (
    'fastdistill: this checkpoint is one of an earlier release, without measured gradients, which are '
    'measured anew'
)


def is_detector(model) -> bool:
    """Is it a detector of torchvision, which `fastdistill.detection` distills?"""
    kinds = type(unwrap(model)).__mro__
    return any(o.__module__.startswith('torchvision.models.detection.') for o in kinds)


def needs_example(d: Distiller) -> bool:
    "Does it need a batch to choose its recipe, or to build its projectors?"
    return d.chooses or not d.ready


def check_first(d: Distiller, batches, **options):
    """Look for mistakes before training, in the first process, so that all continue or all stop.

    Args:
        batches: (inputs, labels) of each; empty: there are none to look at.
        **options: Of `Distiller.check_batches`
    """
    found = on_first(lambda: d.check_batches(batches, **options))
    for k, f in (found if d.several else {'': found}).items():
        d.heads[k].doubt = f.doubt
        f.enforce()


def complete(d: Distiller, x, labels: bool = True):
    """Choose the recipe if none was given, pair layers and build projectors: the same ones in all
    processes.

    Args:
        x: A batch of the student's inputs.
        labels: Do the batches have labels?
    """
    x = inputs(x)
    if d.chooses:
        d.choose(x, labels)
    if d.ready:
        return
    d.setup(*x)
    broadcast(d.links.state_dict().values())


def takes_part(d: Distiller, progress: float | None) -> bool:
    """Does distillation change the loss at this point? Else the trainer trains bit for bit as
    without it.

    Args:
        progress: Share of the training that is done.
    """
    return bool(d.active_terms(progress)) or d.recipe.task_at(progress) != 1


def add_parameters(optimizer, d: Distiller):
    """Let the student's optimizer train the projectors too. They join its first group, since a
    scheduler that exists knows the present groups.

    Args:
        optimizer: Of the student.
    """
    have = {id(p) for g in optimizer.param_groups for p in g['params']}
    optimizer.param_groups[0]['params'] += [p for p in d.own_parameters() if id(p) not in have]


def reset_gradients(d: Distiller):
    for p in d.own_parameters():
        p.grad = None


def training_state(d: Distiller) -> dict:
    """What a checkpoint of the student and its optimizer lacks: projectors, the chosen recipe, and
    measured gradients.
    """
    return dict(links=d.links.state_dict(), distiller=d.get_extra_state())


def load_state(d: Distiller, state: dict):
    """Continue from a checkpoint.

    Args:
        d: Complete.
        state: As `training_state` gives it.
    """
    if 'distiller' in state:
        d.set_extra_state(state['distiller'])
    elif rank() == 0:
        print(OLD_STATE)
    d.links.load_state_dict(state['links'])
