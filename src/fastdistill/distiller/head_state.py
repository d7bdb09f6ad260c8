"""Save and restore what the heads of a `Distiller` need to resume training, besides the weights."""

import json
from typing import Any

import torch
from torch import Tensor

from ..base.outputs import DistillError
from ..base.random_state import RandomStream
from ..recipes.default import Automatic
from ..teachers.teacher import Teacher
from .head import Head
from .heads import Heads


def encoded_state(heads: Heads) -> Tensor:
    """Return the chosen recipes, the measured gradients and the random state of the teachers.

    The state is encoded as a uint8 tensor, so that it can be stored together with the weights.
    """
    state = heads.value({k: state_of_head(h) for k, h in heads.items()})
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def load_encoded_state(heads: Heads, state: Tensor) -> None:
    """Restore what `encoded_state` returned.

    If a recipe with different terms was already chosen, the current recipe is kept.
    """
    saved = json.loads(bytes(state.tolist()))
    several = all(isinstance(o, dict) for o in saved.values())
    if several != heads.several or several and set(saved) != set(heads):
        have = f'the heads {", ".join(saved)}' if several else 'one output'
        mine = f'the heads {", ".join(heads)}' if heads.several else 'one output'
        raise DistillError(
            f'This state was saved from a Distiller with {have}, but this one has {mine}.'
        )
    for k, o in heads.by_name(saved).items():
        load_state_of_head(heads[k], o)
    heads.recipe_changed()


def state_of_head(h: Head) -> dict:
    c, t = h.chosen, h.teacher
    return dict(
        recipe=None if c is None else [c.text, c.why, c.kind],
        shares_task=h.shares_task,
        ratios=h.ratios.state_dict(),
        shift_labels=h.task_loss.shift,
        random=random_state(t),
        # whether the random state is kept when the teacher starts again
        keeps_random=isinstance(t, Teacher) and (t.runner.started or t.runner.random.keep),
    )


def load_state_of_head(h: Head, state: dict) -> None:
    h.shares_task |= state['shares_task']
    if h.automatic and state['recipe'] is not None:
        recipe = Automatic(*state['recipe'])
        names = lambda r: [t.name for t in r.terms]
        if h.waits or names(recipe) == names(h.recipe):
            h.take(recipe)
    h.ratios.load_state_dict(state['ratios'])
    if h.task_loss.shift is None:
        h.task_loss.shift = state['shift_labels']
    if isinstance(h.teacher, Teacher) and state['random']:
        keep = state['keeps_random'] and not h.teacher.runner.started
        h.teacher.runner.random = RandomStream(state['random'], keep)


def random_state(teacher: Any) -> dict:
    """Return the random state of a teacher. Empty if it uses no random numbers."""
    return teacher.runner.random.state_dict() if isinstance(teacher, Teacher) else {}
