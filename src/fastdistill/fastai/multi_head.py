"Several heads in one Learner: each output of the student learns from its own teacher."

import copy
from contextlib import closing
from dataclasses import replace

import torch
from fastai.basics import Callback

from ..base.distributed import counted_as_one, of_first, on_first
from ..base.outputs import DistillError
from ..base.seeds import RandomGuard
from ..base.task import Task
from ..checks.explain import explain_training
from ..distiller.distiller import Distiller
from ..distiller.heads import Heads
from ..features.layer_names import unwrap
from ..features.layer_pairs import PairTable
from ..recipes.recipe_loss import Distilled
from ..recipes.term import Recipe, one_temperature
from .arguments import feed_of, make_recipe
from .batches import PreparationError, prepared_batches
from .cache_feed import CacheFeed
from .callback import KnowledgeDistillation
from .check import TeacherCheck, find_mistakes
from .default_recipe import choose_recipe, example_of
from .finite import FiniteCheck
from .head import heads_of, option_of_heads
from .head_feed import HeadFeed, HeadsFeed
from .raw_items import items_shown
from .targets import Feed
from .teachers import teacher_of

__all__ = ['HeadsDistillation', 'check_heads', 'explain_heads']


class TeacherGroup:
    """The teachers of all heads, which begin and end together."""

    reads_items = False  # one that does says that it does not know the items

    def __init__(self, distillers):
        self.distillers = distillers

    def each(self, method, *args):
        for d in self.distillers:
            if d.teacher is not None:
                getattr(d.teacher, method)(*args)

    def start(self):
        self.each('start')

    def stop(self):
        self.each('stop')

    def reset(self):
        self.each('reset')

    def say_with(self, fn):
        self.each('say_with', fn)


class LearnerHeads(Heads):
    """`Heads` with what the callback needs of a `Distiller`. It takes the task loss of all heads
    from the Learner.
    """

    chosen = None  # each head keeps its own

    def __init__(self, heads, **distillers):
        super().__init__(**distillers)
        self.at, self.gradient_shares, self.known_shares = heads, None, []
        self.teacher = TeacherGroup(self.heads.values())
        self.join()

    def join(self):
        """The recipe of all heads. How much the labels count must be the same in all of them, since
        they have one loss.
        """
        self.recipe = Recipe(
            *(
                Recipe(*(renamed(t, f'{k}_{t.name}') for t in d.recipe.terms), task=d.recipe.task)
                for k, d in self.heads.items()
            )
        )
        for d in self.heads.values():
            d.take(Recipe(*d.recipe.terms, task=self.recipe.task))

    @property
    def ready(self):
        return all(d.ready for d in self.heads.values())

    def setup(self, *x):
        for d in self.heads.values():
            d.setup(*x)

    @property
    def pairs(self):
        return PairTable([p for d in self.heads.values() for p in d.pairs or []])

    @property
    def layered(self):
        return [t for t in self.recipe.terms if t.layers is not None]

    @property
    def links(self):
        return torch.nn.ModuleDict({k: d.links for k, d in self.heads.items()})

    @links.setter
    def links(self, new):
        for k, d in self.heads.items():
            d.links = new[k]

    @property
    def ratios(self):
        return {k: d.ratios for k, d in self.heads.items() if d.ratios}

    @ratios.setter
    def ratios(self, new):
        for k, r in new.items():
            self.heads[k].ratios = r

    def get_extra_state(self):
        return {k: d.get_extra_state() for k, d in self.heads.items()}

    def set_extra_state(self, state):
        for k, d in self.heads.items():
            d.set_extra_state(state[k])

    @property
    def measures(self):
        return all(d.measures for d in self.heads.values())

    @measures.setter
    def measures(self, on):
        for d in self.heads.values():
            d.measures = on

    def own_parameters(self):
        return [p for d in self.heads.values() for p in d.own_parameters()]

    def active_terms(self, progress):
        return {k: d.active_terms(progress) for k, d in self.heads.items()}

    def student_layers(self, terms):
        return list(
            dict.fromkeys(n for k, d in self.heads.items() for n in d.student_layers(terms[k]))
        )

    def student_outputs(self, raw, feats, x):
        return {k: d.student_outputs(raw, feats, x) for k, d in self.heads.items()}

    def teacher_outputs(self, x, progress):
        out = {
            k: d.teacher_outputs(x, progress) for k, d in self.heads.items() if not lacks_outputs(d)
        }
        return out if any(o is not None for o in out.values()) else None

    def compute(self, student, teacher, task, targets, *, progress, mixed=None):
        """The loss of a batch, with the task loss of all heads as `task`."""
        each = {}
        for k, d in self.heads.items():
            if lacks_outputs(d):
                continue
            labels = self.at[k].labels
            m = None if mixed is None else (labels(mixed[0]), mixed[1])
            each[k] = d.compute(
                student[k],
                teacher and teacher[k],
                task,
                labels(targets),
                progress=progress,
                mixed=m,
            )
        self._take_shares()
        named = lambda o: {
            f'{k}_{n}': v for k, e in each.items() for n, v in getattr(e, o).items() if n != 'task'
        }
        taught = [e.taught for e in each.values() if e.taught is not None]
        weights = next(iter(each.values())).weights
        return Distilled(
            task,
            sum(taught[1:], taught[0]) if taught else None,
            named('parts'),
            {'task': weights['task'], **named('weights')},
        )

    def _take_shares(self):
        """Of the gradient at each head, as soon as they are measured."""
        new = [d.gradient_shares for d in self.heads.values()]
        if all(a is b for a, b in zip(new, self.known_shares)) and self.known_shares:
            return
        name = lambda k, n: f'{k} labels' if n == 'task' else f'{k}_{n}'
        self.known_shares, found = (
            new,
            {name(k, n): v for k, s in zip(self.heads, new) for n, v in (s or {}).items()},
        )
        if found:
            self.gradient_shares = found


def lacks_outputs(distiller):
    """Is this a batch of validation, and the teacher's outputs are stored for the training set
    alone?
    """
    return (
        isinstance(distiller.teacher, Feed)
        and not torch.is_grad_enabled()
        and not distiller.teacher.ready()
    )


def stored_head(head, feed):
    """The stored outputs of a head."""
    if isinstance(feed, CacheFeed):
        return HeadFeed(feed, head)
    raise DistillError(
        f'The head {head.name!r}: give each head a teacher that runs, or a cache that cache_teacher '
        'wrote.'
    )


def renamed(term, name, **changes):
    """A copy of a term with another name, and with these attributes."""
    term = copy.copy(term)
    vars(term).update(name=name, **changes)
    return term


IN_PLACE = dict(
    loss="give each head a recipe instead of it, as in recipe={'color': kd(), 'shape': Term(my_loss, "
    'weight=1.)}',
    output="each head's output is the one of its name or place",
)


class HeadsDistillation(KnowledgeDistillation):
    """`KnowledgeDistillation({'color': teacher1, 'shape': teacher2})`, which makes one of these."""

    name = 'knowledge_distillation'  # in the Learner
    task = Task('softmax')  # of no head: each has its own in `tasks`

    def __init__(
        self,
        teacher,
        recipe=None,
        *,
        T=None,
        alpha=None,
        temperature=None,
        loss=None,
        kind=None,
        output=None,
        unlabeled=None,
        unlabeled_targets=None,
        perturbed=0,
        **kwargs,
    ):
        refused = dict(
            loss=loss,
            output=output,
            unlabeled=unlabeled,
            unlabeled_targets=unlabeled_targets,
            perturbed=perturbed or None,
        )
        if given := [k for k, v in refused.items() if v is not None]:
            instead = IN_PLACE.get(given[0], 'they learn from batches with labels alone. Omit it')
            raise DistillError(f'{given[0]}= with several heads: {instead}.')
        self.at = heads_of(teacher)
        super().__init__(next(iter(self.at.values())).source, **kwargs)
        self.source, self.kinds = teacher, option_of_heads(kind, 'kind', self.at)
        self.stored = {
            k: stored_head(h, feed)
            for k, h in self.at.items()
            if (feed := feed_of(h.source)) is not None
        }
        self.feed, self.runs = (
            HeadsFeed(self.stored) if self.stored else None,
            len(self.stored) < len(self.at),
        )
        self.finite_check = FiniteCheck(stored=not self.runs)
        T = one_temperature(T, temperature)
        self.recipes = {
            k: make_recipe(r, T, alpha, None)
            for k, r in option_of_heads(recipe, 'recipe', self.at).items()
        }
        self.chooses = any(r is None for r in self.recipes.values())
        self.output = next(iter(self.at.values()))  # to see the inputs that the student takes

    def _build(self):
        model = unwrap(self.learn.model)
        if self.distiller is None or self.distiller.student is not model:
            self.tasks = {
                k: task_of_head(self.learn, h, self.kinds[k], self.asked_axis)
                for k, h in self.at.items()
            }
            each = {
                k: Distiller(
                    model,
                    None,
                    self.recipes[k] or Recipe(),
                    kind=t.kind,
                    axis=t.axis,
                    output=self.at[k],
                    check=False,
                )
                for k, t in self.tasks.items()
            }
            self.distiller = LearnerHeads(self.at, **each)
            self.recipe, self.projector_opt, self.known_dls = (
                None if self.chooses else self.distiller.recipe,
                None,
                None,
            )
            self.distiller.links.to(next(model.parameters()).device)
        if self.known_dls is self.learn.dls:
            return
        self.known_dls, self.checked = self.learn.dls, False
        for k, d in self.distiller.heads.items():
            if k in self.stored:
                d.teacher, self.stored[k].task = self.stored[k], self.tasks[k]
            else:
                self._take_teacher(k, d)

    def _take_teacher(self, k, d):
        d.teacher = teacher_of(self.at[k].source, self.at[k].of(self.learn), self.tasks[k])
        if d.teacher.reads_items:
            raise DistillError(
                f'The teacher of the head {k!r} has items=, which several heads do not take: store its '
                'outputs with cache_teacher({...}, dls, folder), give it inputs=, or train a student '
                'with one head.'
            )
        d.check_names()

    def _check(self):
        found = {k: self._check_head(k) for k in self.at if k not in self.stored}
        self.checked = True
        return found

    def _check_head(self, k):
        d, h = self.distiller.heads[k], self.at[k]
        find = lambda: find_mistakes(
            self.learn, d.teacher, self.tasks[k], d.recipe, output=h, head=h
        )
        found = on_first(find)
        found[:] = [replace(f, what=f'{k}: {f.what}') for f in found]
        if self.logs and found.facts is not None:
            print(f'fastdistill: {k}:', '; '.join(found.facts.lines()))
        return found.enforce(facts=False)

    def _choose(self, found):
        """A recipe for each head without one. The labels have one loss, so that they count 1 beside
        all of them.
        """
        for k, d in self.distiller.heads.items():
            if self.recipes[k] is not None:
                continue
            looked = None if found is None else found.get(k)
            example = example_of(self.learn, self.at[k])
            chosen = of_first(choose_recipe(example, self.tasks[k], d.teacher, looked))
            self._log(f'fastdistill: {k}: recipe {chosen}')
            d.take(beside_labels(chosen))
        self.distiller.join()
        self.recipe = self.distiller.recipe

    def after_pred(self):
        if self.active and not len(self.yb):
            raise DistillError(
                'These batches have no labels, but heads are told apart by their labels.'
            )

    def _ask_teacher(self):
        t = self.distiller.teacher_outputs(self.xb, self.training_progress)
        for k, o in (t or {}).items():
            if o is not None:
                self.finite_check.add(o, self.learn, self.tasks[k])
        return t

    def __reduce__(self):
        return Callback, ()


def task_of_head(learn, head, kind, axis=None):
    """What a head predicts, by its option or by its labels."""
    if kind is None and labels_are_floats(learn, head):
        raise DistillError(
            f"The labels of the head {head.name!r} are not class numbers: pass kind={{'{head.name}': "
            "'regression'} for numbers, or 'sigmoid' for several labels."
        )
    return Task(kind or 'softmax', 1 if axis is None else axis)


def labels_are_floats(learn, head):
    try:
        with RandomGuard(), closing(prepared_batches(learn, 1, 1)[1]) as train:
            return any(o.is_floating_point() for _, y in train for o in head.labels(y))
    except PreparationError:
        return False


def running_heads(learn, teachers, kind, axis):
    """(head, its task, its `Teacher`), of each head."""
    heads = heads_of(teachers)
    kinds = option_of_heads(kind, 'kind', heads)
    for k, h in heads.items():
        if feed_of(h.source) is not None:
            raise DistillError(
                f"The head {k!r} has stored outputs, which can't be asked for other inputs: pass the "
                'teacher itself.'
            )
        task = task_of_head(learn, h, kinds[k], axis)
        yield h, task, teacher_of(h.source, h.of(learn), task)


def check_heads(learn, teachers, kind, axis, recipe, n) -> dict:
    """Name of a head -> what `check_teacher` finds about its teacher, without costs."""
    recipes, out = option_of_heads(recipe, 'recipe', heads_of(teachers)), {}
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


def beside_labels(recipe):
    """The same recipe where the labels have the weight 1."""
    w = recipe.task_at(0.0)
    if w in (0.0, 1.0):
        return recipe
    return Recipe(*(renamed(t, t.name, weight=t.weight / w) for t in recipe.terms), task=1.0)


KnowledgeDistillation.of_heads = HeadsDistillation
