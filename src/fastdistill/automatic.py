"The recipe that is taken when none is given. The rule was chosen by measurements on many tasks: benchmarks/quality"
from . import losses
from .distiller import Distiller, Recipe, Term
from .outputs import DistillError
from .recipes import dist, kd, soft_labels

__all__ = ['Automatic', 'Distiller', 'auto']

CLASSIC = 'kd(T=4, alpha=.9) is the classic'


class Automatic(Recipe):
    "A recipe that `auto` chose. `text` is how to write it, `why` is the fact that decided"
    def __init__(self, recipe, text, why):
        super().__init__(recipe)
        self.text,self.why = text,why

    def __str__(self): return f'{self.text} ({self.why}; {CLASSIC})'


def auto(
    kind:str='softmax', # what the model predicts: 'softmax' over classes, 'sigmoid' per label, or 'regression'
    *,
    classes:int|None=None, # number of classes of a softmax; None: unknown
    dense:bool=False, # does each sample have many predictions, as pixels or tokens?
    labels:bool=True, # do the batches have labels?
    doubt:str|None=None # why the teacher should not be trusted, in words; None: nothing speaks against it
) -> Automatic:
    """The recipe that `KnowledgeDistillation(teacher)` and `Distiller(student, teacher)` take when none is given.

    Where the term has a share, the labels count in full, and its gradient at the student's logits is 3 times as long
    as theirs, whatever the scale of the loss. benchmarks/quality has the measurements behind the rule, and the tasks
    where it did not help"""
    if kind not in ('softmax', 'sigmoid', 'regression'):
        raise DistillError(f"kind={kind!r}: possible are 'softmax', 'sigmoid' and 'regression'")
    if not labels: return Automatic(soft_labels(T=1), 'soft_labels(T=1)', 'the batches have no labels')
    if doubt is not None: return Automatic(kd(T=1, alpha=.3), 'kd(T=1, alpha=.3)', doubt)
    if kind == 'regression': return shared(losses.regression, 'regression', 'numbers')
    if dense: return Automatic(kd(T=1, alpha=.5), 'kd(T=1, alpha=.5)', 'many predictions for each sample')
    if kind == 'sigmoid': return shared(losses.binary_kl, 'binary_kl', 'several labels', T=1)
    why = 'the number of classes is unknown' if classes is None else f'{classes} classes'
    if classes is None or classes <= 2: return Automatic(kd(T=1, alpha=.5), 'kd(T=1, alpha=.5)', why)
    return Automatic(dist(T=4, beta=2, gamma=2, share=3), 'labels + dist(T=4, beta=2, gamma=2, share=3)', why)


def shared(loss, name, why, **options):
    "The labels, and a term whose gradient is 3 times as long as theirs"
    text = ', '.join(['share=3', *(f'{k}={v:g}' for k,v in options.items())])
    return Automatic(Term(loss, share=3, **options), f'labels + Term(losses.{name}, {text})', why)


# a Distiller knows no particular loss, but without a recipe it takes this one
Distiller.auto = staticmethod(auto)
