"""Check and convert the arguments of `KnowledgeDistillation`."""

from ..base.errors import DistillError, check_whole, is_whole
from ..cache.reader import TeacherCache, is_cache
from ..recipes.recipe_text import as_recipe
from ..recipes.term import Recipe, Term
from ..recipes.zoo import kd
from .cache_feed import StoredOutputs
from .held_outputs import GivenOutputs, HeldOutputs

INSTEAD = dict(
    loss="give each head a recipe instead, as in recipe={'color': kd(), 'shape': Term(my_loss, "
    'weight=1.)}',
    output="each head's output is selected by its name or position",
)


def check_options(teacher, **options):
    """Raise an error for invalid option values, or if a recipe is passed as the teacher."""
    have = dict(kind=(None, 'softmax', 'sigmoid', 'regression'), span=('fine_tune', 'fit'))
    for k, v in options.items():
        if v not in have[k]:
            raise DistillError(f'{k}={v!r}: must be {" or ".join(map(repr, have[k]))}.')
    if isinstance(teacher, (Recipe, Term)):
        raise DistillError(
            f'{teacher!r} is not a teacher: the teacher comes first, then the recipe, as in '
            'KnowledgeDistillation(teacher, kd()).'
        )


def check_epochs(n_epoch, lr_max):
    """Raise an error if the number of epochs is not a whole number, e.g. if it is the learning
    rate.
    """
    if isinstance(n_epoch, float) and n_epoch < 1 and is_whole(lr_max):
        raise DistillError(
            f'n_epoch={n_epoch}: must be a whole number. The number of epochs comes before the '
            f'learning rate. Did you mean n_epoch={lr_max}, lr_max={n_epoch}?'
        )
    check_whole('n_epoch', n_epoch, 0)


def refuse_options(several, **options):
    """Raise an error for options that need a single output if there are several heads."""
    for k, v in options.items():
        if several and v is not None:
            raise DistillError(f'{k}= is not possible with several heads: {INSTEAD[k]}.')


def feed_of(source):
    """Return the source of stored outputs. None for a teacher that runs."""
    if source is None:
        return GivenOutputs()
    # a URL must be a cache: models are local files
    if is_cache(source) or isinstance(source, str) and '://' in source:
        source = TeacherCache(source)
    if isinstance(source, TeacherCache):
        return StoredOutputs(source)
    return source if isinstance(source, HeldOutputs) else None


def stored_head(head, feed):
    """Return the source of the stored outputs of a head."""
    if isinstance(feed, StoredOutputs):
        return StoredOutputs(feed.cache, feed.keys, head)
    raise DistillError(
        f'The head {head.name!r} needs a teacher that runs, or a cache written by cache_teacher.'
    )


def make_recipe(recipe, T, alpha, loss):
    """Combine the arguments that specify a recipe into one recipe. Return None to let `auto`
    choose.
    """
    given = [k for k, v in dict(T=T, alpha=alpha, loss=loss).items() if v is not None]
    if recipe is not None and given:
        raise DistillError(
            f'A recipe and {", ".join(given)}= cannot be combined: set the options in the recipe, '
            'as in kd(T=2, alpha=.5).'
        )
    if recipe is not None or not given:
        return as_recipe(recipe)
    if loss is None:
        return kd(4.0 if T is None else T, 0.9 if alpha is None else alpha)
    if T is not None:
        raise DistillError(
            'T= has no effect with loss=, because your loss gets the unscaled logits: apply the '
            'temperature in your loss, or use Term(fn, T=...).'
        )
    alpha = 1.0 if alpha is None else alpha
    return Recipe(Term(loss, weight=alpha, name='kd'), task=kd(alpha=alpha).task)
