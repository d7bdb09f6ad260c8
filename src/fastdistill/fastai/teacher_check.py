"""Check a teacher and a Learner before training for mistakes that training would not report."""

from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

from fastai.basics import DataLoaders, Learner
from fastai.data.transforms import Normalize
from torch.nn.parameter import is_lazy

from ..base.distributed import counted_as_one
from ..base.errors import DistillError, few_names
from ..base.task import Task
from ..checks.class_order import map_classes
from ..checks.findings import Finding, Findings
from ..checks.shared_parameters import larger_student, none_shared, shared_parameters
from ..checks.task_loss import summed_loss
from ..checks.teacher_outputs import BATCHES, any_outputs, check_outputs, single_teachers
from ..evaluation.checks_table import checks_as_text, html_of_checks, print_checks
from ..evaluation.text_report import show
from ..recipes.recipe_text import as_recipe
from ..recipes.term import Recipe, Term
from ..teachers.hidden_state import has_reset, why_no_reset
from ..teachers.image_normalization import image_change
from .class_names import CODES, different_codes, ignored_name, mask_codes, vocab_of, void_class
from .costs import training_costs
from .default_recipe import choose_recipe, example_of
from .learner_heads import HeadData, WholeModel
from .probe_batches import PreparationError, prepared_batches
from .raw_items import items_shown
from .task import task_of
from .teachers import class_names, image_stats, size_of_images, teacher_of

KIND_IN_WORDS = dict(
    softmax='one class of several (softmax)',
    sigmoid='each label separately (sigmoid)',
    regression='numbers (regression)',
)


class TeacherCheck(Findings):
    """List of the findings of a teacher check. The list prints as a table in a terminal or
    notebook.

    The list is empty if no mistake was found. The attribute `in_order` contains the checks that
    found nothing. The attributes `facts` and `costs` contain the measurements.
    """

    costs, cost_lines, title = None, (), ''

    def rows(self) -> list:
        """Return the rows of the table as `Finding`s: mistakes, passed checks and costs."""
        levels = ('error', 'warning', 'note')
        fine = {f.about: f for f in self.in_order}
        first = [fine.pop(k, Finding('', text, '', about=k)) for k, text in self.measured.items()]
        cost = [Finding('', text, '', about=k) for k, text in self.cost_lines]
        return [*sorted(self, key=lambda f: levels.index(f.level)), *first, *fine.values(), *cost]

    @property
    def measured(self):
        """The measured facts as text, {subject: text}."""
        if self.facts is None:
            return {}
        found = dict(score=self.facts.scores, certainty=self.facts.probabilities)
        return {k: v for k, v in found.items() if v}

    @property
    def verdict(self):
        """The last line of the table, with the number of findings."""
        if not self:
            return self.none
        n = {k: sum(f.level == k for f in self) for k in ('error', 'warning', 'note')}
        return ', '.join(f'{v} {k}{"s" if v > 1 else ""}' for k, v in n.items() if v) + (
            '. Training would stop before it begins; check=False trains anyway'
            if n['error']
            else ''
        )

    def show(self, console=None) -> None:
        """Show the table as HTML in a notebook, or as text in a terminal.

        Args:
            console: Console of Rich. If None, standard output is used.
        """
        show(self, print_checks, console)

    def __repr__(self):
        return checks_as_text(self)

    def _repr_html_(self):
        return html_of_checks(self)


def check_teacher(
    learn: Learner | DataLoaders,
    teacher: Any,
    task: Task | None = None,
    recipe: Term | Recipe | str | dict | None = None,
    n: int = BATCHES,
    output: str | int | Callable | None = None,
    n_epoch: int | None = 10,
) -> TeacherCheck:
    """Check a teacher against a Learner.

    The check compares the inputs that the teacher expects with the inputs that the teacher will
    receive. The check also scores the teacher on a few batches, and measures the cost of the
    teacher.

    Args:
        learn: The student's Learner, or only its DataLoaders.
        teacher: Anything that `KnowledgeDistillation` accepts.
        task: What the student predicts. If None, the task is derived from the loss function.
        recipe: Recipe or term of the training. None if unknown.
        n: Number of validation batches to read. For every four validation batches, one training
            batch is read.
        output: Which of the student's outputs is distilled, as in `Distiller`.
        n_epoch: Number of epochs for which costs are estimated. If None, costs are not estimated.
    """
    if not hasattr(learn, 'dls'):
        learn = SimpleNamespace(dls=learn, model=None, loss_func=getattr(learn, 'loss_func', None))
    task, recipe = task or task_of(learn.loss_func), as_recipe(recipe)
    teacher = teacher_of(teacher, learn, task)
    # in distributed training, a single process may run the check while the others train or wait
    with items_shown(learn.dls.loaders, teacher), counted_as_one():
        one = WholeModel(teacher, output)
        head = learn.dls.head if isinstance(learn.dls, HeadData) else one
        out = TeacherCheck().join(find_mistakes(learn, teacher, task, head, recipe, n))
        if n_epoch is not None and learn.model is not None and not out.errors:
            recipe = recipe or choose_recipe(example_of(learn, output), task, teacher, out)
            out.costs, out.cost_lines = costs_of_check(
                learn, teacher, task, recipe, output, n_epoch
            )
    # subtle: added last, because this finding must not change the recipe
    out.add('parameters', larger_student(learn.model, teacher))
    if learn.model is not None:
        out.add('task loss', loss_mistakes(learn, recipe, output, head is not one))
    out.title = f'{teacher.name} as a teacher' + (
        '' if learn.model is None else f' of {type(learn.model).__name__}'
    )
    return out


def loss_mistakes(learn, recipe, output=None, several=False):
    """Return findings if the Learner's loss is a sum over the batch.

    Args:
        learn: The student's Learner.
        recipe: The recipe. None if unknown.
        output: Which of the student's outputs is distilled, as in `Distiller`.
        several: Whether the student has several outputs.
    """

    def example():
        found = None if several else example_of(learn, output)
        return None if found is None else (found.logits, found.labels)

    return summed_loss(learn.loss_func, recipe, example)


def costs_of_check(learn, teacher, task, recipe, output, n_epoch):
    """Return (costs, lines of text). If the costs could not be measured, a line states the
    reason.
    """
    # subtle: any error is possible, because the student, the loss and the recipe may be the user's
    # own code. A fit raises the error again.
    try:
        costs = training_costs(learn, teacher, task, recipe, output)
    except Exception as e:
        return None, [('step', f'could not be measured: {type(e).__name__}: {e}')]
    return costs, [] if costs is None else [*costs.lines(n_epoch)]


def weight_shapes(model):
    """Return the shapes of a model's weights, which determine the shapes of projectors.

    Pruning masks do not change the shapes, but removing channels does.
    """
    return sorted(p.shape for p in model.parameters() if not is_lazy(p))


def check_optimizer(learn) -> None:
    """Raise a DistillError if the optimizer would not train the model's current weights.

    Pruning, for example, can give layers new weights after the optimizer was created.
    """
    if learn.opt is None:
        return  # no training (`summary`, `tta`)
    stepped = {p for ps in learn.opt.param_lists for p in ps}
    weights = {p: n for n, p in learn.model.named_parameters() if p.requires_grad}
    # the optimizer may also train weights of the loss function
    gone = stepped - {*learn.model.parameters(), *getattr(learn.loss_func, 'parameters', list)()}
    if gone and (new := [n for p, n in weights.items() if p not in stepped]):
        raise DistillError(
            "The Learner's optimizer was created before the model got new weights "
            f'({few_names(new, 3)}), e.g. by pruning, and would not train them. Call '
            'learn.create_opt() first, or create a new Learner with this model.'
        )


def find_mistakes(learn, teacher, task, head, recipe=None, n: int = BATCHES) -> Findings:
    """Return the findings about an existing `Teacher`.

    Args:
        learn: As in `check_teacher`.
        teacher: A `Teacher` created by `teacher_of` for this Learner and task.
        task: What the student predicts.
        head: The head of the student.
        recipe: As in `check_teacher`.
        n: As in `check_teacher`.
    """
    found = Findings()
    found.add(
        'parameters', shared_parameters(learn.model, teacher), none_shared(learn.model, teacher)
    )
    own = head.of(learn)
    for about, (look, in_words) in CHECKS.items():
        if about == 'classes' and any_outputs(recipe):
            continue  # the recipe compares outputs that may have different classes
        found.add(about, look(own, teacher, task), in_words(own, teacher, task))
    if found.errors:
        return found
    valid, train = map(head.batches, prepared_batches(learn, n, max(1, n // 4)))
    try:
        with closing(valid), closing(train):
            seen = check_outputs(
                teacher,
                task,
                valid,
                learn.model,
                train=train,
                recipe=recipe,
                names=vocab_of(own.dls),
                output=head.output,
            )
    except PreparationError as e:
        note = Finding(
            'note',
            f'The teacher was not run, since this callback does not run outside of a fit: {e}',
            "The teacher's score is unknown; check it with teacher.validate()",
        )
        found.add('score', [note])
    else:
        found.join(seen)
    return found


def with_learners(teacher):
    return [o for o in single_teachers(teacher) if o.learner is not None]


def resets(learn, teacher, task):
    """Report a student whose method `reset` changes weights, because fastai calls this method."""
    if has_reset(learn.model) and (why := why_no_reset(learn.model)):
        yield Finding(
            'error',
            f"The student's method reset() {why}, and fastai calls it whenever it fits, validates "
            'or predicts',
            'Rename the method',
        )


def resets_in_words(learn, teacher, task):
    return 'it changes no weights' if has_reset(learn.model) else ''


def kinds(learn, teacher, task):
    """Check that student and teacher predict the same kind of output."""
    own = known_kind(learn.loss_func)
    # subtle: if a cache is written without a student, kind='regression' stores a teacher's
    # embeddings unchanged
    if own not in (None, task.kind) and not (learn.model is None and task.kind == 'regression'):
        yield Finding(
            'error',
            f"You asked for kind={task.kind!r}, but the student's loss is for {KIND_IN_WORDS[own]}",
            f'Do not pass kind, or pass kind={own!r}',
        )
    for t in with_learners(teacher):
        if (theirs := known_kind(t.learner.loss_func)) not in (None, task.kind):
            yield Finding(
                'error',
                f'The teacher was trained to predict {KIND_IN_WORDS[theirs]}, the student predicts '
                f'{KIND_IN_WORDS[task.kind]}',
                "Use a teacher for the student's task, or give both the same kind of loss function",
            )


def kinds_in_words(learn, teacher, task):
    return f'both predict {KIND_IN_WORDS[task.kind]}' if with_learners(teacher) else ''


def known_kind(loss_func):
    try:
        return task_of(loss_func).kind
    except DistillError:
        return None


def labels(learn, teacher, task):
    """Check that the teacher has the student's classes."""
    for o in single_teachers(teacher):
        names = class_names(o, learn.dls)
        found = None if task.kind == 'regression' else map_classes(vocab_of(learn.dls), names)
        if found is None or found.same:
            continue
        if found.missing and o.classes is None:
            yield Finding(
                'error',
                f"The teacher does not have {len(found.missing)} of the student's classes "
                f'({few_names(found.missing, 5)}); it has {few_names(names, 8)}',
                "Use a teacher trained on the student's classes, or train the student on the "
                "teacher's classes" + of_shared(found, vocab_of(learn.dls), names),
            )
        elif o.classes is not None:
            continue  # the user selected the classes
        elif found.shared == [c for c in found.teacher if c not in found.extra]:
            n = len(found.extra)
            yield Finding(
                'note',
                f'The teacher has {n} class{"es"[: 2 * (n > 1)]} that the student does not have '
                f'({few_names(found.extra)})',
                'Its other outputs are mapped by name',
            )
        else:
            extra = f', and {len(found.extra)} more, which are not used' if found.extra else ''
            yield Finding(
                'note',
                f"The teacher has the student's classes in a different order{extra}",
                'Its outputs are mapped by name',
            )


def labels_in_words(learn, teacher, task):
    mine, each = vocab_of(learn.dls), [class_names(o, learn.dls) for o in single_teachers(teacher)]
    if mine is None or task.kind == 'regression' or any(names != mine for names in each):
        return ''
    return f'{len(mine)} classes, with the same names in the same order'


def of_shared(found, student, teacher):
    """Describe how to distill only the classes that both models have."""
    if len(found.shared) < 2:
        return ''
    # one more than are named, which adds the dots
    at = lambda names: few_names([names.index(c) for c in found.shared[:21]], 20)
    return (
        f'. To distill the {len(found.shared)} that both have, and leave the others to the labels: '
        f'Teacher(model, select=[{at(teacher)}], classes=[{at(student)}])'
    )


def ignored_labels(learn, teacher, task):
    """Check that the student's loss ignores the teacher's ignored label, and a class called void."""
    if task.kind != 'softmax':
        return
    mine = ignored_name(task, vocab_of(learn.dls))
    for t in with_learners(teacher):
        other = task_of(t.learner.loss_func, task.kind)
        theirs = ignored_name(other, vocab_of(t.learner.dls))
        if theirs != mine:
            yield Finding(
                'warning',
                f"The teacher's loss function ignores {theirs}, the student's ignores {mine}",
                'Set the same ignore_index in both. Your own loss function needs the attribute '
                'ignore_index',
            )
            return
    void = void_class(mask_codes(learn.dls) or [])
    if void is not None and task.ignore_index == Task.ignore_index:
        yield Finding(
            'warning',
            f'The masks have the class {vocab_of(learn.dls)[void]}, but the loss function ignores no '
            'label, so these pixels are learned and scored',
            f'Pass ignore_index={void} to the loss function. Your own loss function needs the '
            f'attribute ignore_index={void}',
        )


def ignored_labels_in_words(learn, teacher, task):
    name = ignored_name(task, vocab_of(learn.dls))
    return '' if task.kind != 'softmax' or name == 'no label' else f'{name}, for both'


def codings(learn, teacher, task):
    """Check that both models encode tokens and categories in the same way."""
    for o in with_learners(teacher):
        if o.inputs is not None:
            continue  # the teacher converts the inputs itself
        for name, difference in different_codes(learn.dls, o.learner.dls):
            yield Finding(
                'error',
                f'Student and teacher encode their {name} differently ({difference}), so the same '
                'numbers have different meanings for the teacher',
                "Create the student's DataLoaders with the teacher's encoding: "
                f'{CODING_FIXES[name]}',
            )


def codings_in_words(learn, teacher, task):
    """Describe the tokens and categories that both models encode in the same way."""
    found = {k: read(learn.dls) for k, read in CODES.items()} if with_learners(teacher) else {}
    same = [f'{len(v)} {k}' for k, v in found.items() if v is not None]
    return f'{", ".join(same)}, the same for both' if same else ''


SAME_TABLE = "the teacher's own dls, or teacher.dls.train_ds.new(df) for another table"
CODING_FIXES = {
    'tokens': 'TextDataLoaders(..., text_vocab=...) or TextBlock(vocab=...) with its token vocab',
    'texts': 'pass backwards=True to both TextBlocks or TextDataLoaders, or to neither',
    'categories': SAME_TABLE,
    'columns of numbers': SAME_TABLE,
}


def normalization(learn, teacher, task):
    if change := image_change(teacher):
        yield Finding(
            'note',
            f'The teacher was trained with a different normalization ({change})',
            'Its images are normalized accordingly',
        )


def normalization_in_words(learn, teacher, task):
    """Describe the mean and standard deviation of the images, if both models use the same
    values.
    """
    tfms = getattr(getattr(learn.dls, 'after_batch', None), 'fs', ())
    if not any(isinstance(t, Normalize) for t in tfms):
        return ''
    if any(o.stats is None for o in single_teachers(teacher)):
        return ''
    mean, std = (' '.join(f'{v:.4g}' for v in o.flatten().tolist()) for o in image_stats(learn.dls))
    return f'mean {mean}, std {std}, for both'


def image_sizes(learn, teacher, task):
    """Report if images are resized for the teacher because its Learner was trained on a different
    size.
    """
    for o in with_learners(teacher):
        if o.size is None or o.size == (mine := size_of_images(learn.dls)):
            continue
        own = 'have several sizes' if mine is None else f'have {in_pixels(mine)}'
        yield Finding(
            'note',
            f"The teacher was trained on images of {in_pixels(o.size)} pixels, the student's {own}",
            'Its images are resized accordingly. Use Teacher(learner.model) to skip resizing',
        )


def image_sizes_in_words(learn, teacher, task):
    mine = size_of_images(learn.dls)
    each = [size_of_images(o.learner.dls) for o in with_learners(teacher)]
    if mine is None or not each or any(s != mine for s in each):
        return ''
    return f'{in_pixels(mine)} pixels, for both'


def in_pixels(size):
    return f'{size[0]} x {size[1]}'


# {subject: (function that yields findings, function that describes the passed check)}
CHECKS = {
    'reset()': (resets, resets_in_words),
    'task': (kinds, kinds_in_words),
    'classes': (labels, labels_in_words),
    'ignored label': (ignored_labels, ignored_labels_in_words),
    'codes': (codings, codings_in_words),
    'normalization': (normalization, normalization_in_words),
    'image size': (image_sizes, image_sizes_in_words),
}
