"""Check the teacher of each head separately."""

from ..base.distributed import counted_as_one
from ..base.outputs import DistillError
from ..recipes.recipe_text import as_recipe
from .callback_arguments import feed_of
from .learner_heads import comparisons_of, options_of_heads
from .raw_items import items_shown
from .teacher_check import TeacherCheck, find_mistakes


def running_heads(learn, teacher, kind, axis, output=None):
    """Yield (head, `Task` of the head, `Teacher` of the head) for each head.

    Args:
        learn: The student's Learner.
        teacher: Anything that `KnowledgeDistillation` accepts, except stored outputs.
        kind, axis, output: As in `KnowledgeDistillation`.
    """
    heads = comparisons_of(teacher, output)
    kinds = options_of_heads(kind, 'kind', heads)
    for k, h in heads.items():
        if k and feed_of(h.source) is not None:
            raise DistillError(
                f'The head {k!r} has stored outputs, but the teacher has to run on new inputs: pass the '
                'teacher itself.'
            )
        task = h.task_of(learn, kinds[k], axis)
        yield h, task, h.teacher_of(learn, task)


def check_heads(learn, teachers, kind, axis, recipe, n) -> dict:
    """Return {head name: findings of `check_teacher` for the teacher of the head}, without
    costs.
    """
    recipes, out = options_of_heads(recipe, 'recipe', comparisons_of(teachers)), {}
    for h, task, t in running_heads(learn, teachers, kind, axis):
        with items_shown(learn.dls.loaders, t), counted_as_one():
            out[h.name] = TeacherCheck().join(
                find_mistakes(learn, t, task, h, as_recipe(recipes[h.name]), n)
            )
        out[h.name].title = f'{t.name} as a teacher of {h.name}'
    return out
