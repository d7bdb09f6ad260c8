"The teachers of several heads, looked at one by one."

from contextlib import closing

from ..base.distributed import counted_as_one
from ..base.outputs import DistillError
from ..checks.explain import explain_training
from .arguments import feed_of
from .batches import prepared_batches
from .check import TeacherCheck, find_mistakes
from .head import heads_of, options_of_heads
from .raw_items import items_shown

__all__ = ['check_heads', 'explain_heads']


def running_heads(learn, teachers, kind, axis):
    """(head, its task, its `Teacher`), of each head."""
    heads = heads_of(teachers)
    kinds = options_of_heads(kind, 'kind', heads)
    for k, h in heads.items():
        if feed_of(h.source) is not None:
            raise DistillError(
                f"The head {k!r} has stored outputs, which can't be asked for other inputs: pass the "
                'teacher itself.'
            )
        task = h.task_of(learn, kinds[k], axis)
        yield h, task, h.teacher_of(learn, task)


def check_heads(learn, teachers, kind, axis, recipe, n) -> dict:
    """Name of a head -> what `check_teacher` finds about its teacher, without costs."""
    recipes, out = options_of_heads(recipe, 'recipe', heads_of(teachers)), {}
    for h, task, t in running_heads(learn, teachers, kind, axis):
        with items_shown(learn.dls.loaders, t), counted_as_one():
            out[h.name] = TeacherCheck().join(
                find_mistakes(learn, t, task, recipes[h.name], n, output=h, head=h)
            )
        out[h.name].title = f'{t.name} as a teacher of {h.name}'
    return out


def explain_heads(learn, teachers, callback, kind, axis, n, steps) -> dict:
    """Name of a head -> what `explain` finds about it."""
    known, out = (
        {} if callback is None or callback.distiller is None else callback.distiller.heads,
        {},
    )
    for h, task, t in running_heads(learn, teachers, kind, axis):
        valid, train = map(h.batches, prepared_batches(learn, n, n))
        shares = known[h.name].gradient_shares if h.name in known else None
        with items_shown(learn.dls.loaders, t), closing(valid), closing(train):
            out[h.name] = explain_training(
                t, task, learn.model, valid, train, steps=steps, shares=shares, output=h
            )
    return out
