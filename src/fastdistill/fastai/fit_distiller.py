"""Build the Distiller of a Learner, look for mistakes, and choose the recipes."""

from dataclasses import replace

from fastai.basics import one_param

from ..base.distributed import of_first, on_first
from ..checks.findings import Findings
from ..distiller.distiller import Distiller
from ..distiller.trainer_integration import is_choosing
from ..features.layer_names import unwrap
from ..features.layer_pairs import check_names
from .callback_arguments import check_options, feed_of, stored_head
from .default_recipe import choose_recipe, example_of
from .learner_heads import comparisons_of, options_of_heads
from .teacher_check import find_mistakes, loss_mistakes, weight_shapes
from .teachers import is_heads


class FitDistiller:
    """Builds the Distiller of a fit for the Learner's model and data.

    Args:
        teacher, recipe, kind, axis, output, check: As in `KnowledgeDistillation`.
        make_recipe: fn(recipe of a head) -> `Recipe`. It returns None to let `auto` choose.
        log: fn(text) that prints a message.

    Attributes:
        heads: {head name: `LearnerHead`}. The name is '' for a student with one output.
        stored: {head name: stored outputs}. Heads without stored outputs are not included.
        tasks: {head name: `Task`}.
        distiller: The `Distiller`. None before the first fit.
    """

    def __init__(self, teacher, recipe, make_recipe, *, kind, axis, output, check, log):
        self.several = is_heads(teacher)
        self.heads = comparisons_of(teacher, output)
        self.kinds = options_of_heads(kind, 'kind', self.heads)
        for k, h in self.heads.items():
            check_options(h.source, kind=self.kinds[k])
        self.axis, self.check, self.log = axis, check, log
        self.recipes = options_of_heads(recipe, 'recipe', self.heads)
        self.recipes = {k: make_recipe(r) for k, r in self.recipes.items()}
        found = {k: feed_of(h.source) for k, h in self.heads.items()}
        self.stored = {k: o for k, o in found.items() if o is not None}
        if self.several:
            self.stored = {k: stored_head(self.heads[k], o) for k, o in self.stored.items()}
        self.tasks, self.distiller, self.built, self.known_dls = {}, None, None, None
        self.checked = self.loss_checked = False

    @property
    def runs(self) -> bool:
        """True if at least one teacher runs. False if all outputs are stored."""
        return len(self.stored) < len(self.heads)

    @property
    def recipe(self):
        """The recipe. None if no recipe has been chosen yet. With several heads, the recipe is also
        None before the first fit.
        """
        d = self.distiller
        if d is None:
            return self.recipes.get('')
        return None if is_choosing(d) else d.recipe

    @property
    def output(self):
        """The `output` option of the first head, used when the student runs on an example batch."""
        return next(iter(self.heads.values())).output

    def build(self, learn) -> bool:
        """Build the Distiller for the Learner's model and task, and prepare the teachers for the
        Learner's data.

        Returns:
            True if a new Distiller was built.
        """
        model = unwrap(learn.model)
        tasks = self._tasks(learn, model)
        built = tasks, model, weight_shapes(model)
        is_new = self.built != built
        if is_new:
            self.tasks, self.built, self.known_dls = tasks, None, None
            self.distiller = self._distiller(model)
            self.distiller.links.to(one_param(model).device)
        if self.known_dls is not learn.dls:
            self.known_dls, self.checked, self.loss_checked = None, False, False
            self._take_teachers(learn)
        # subtle: set only now, so that the next fit begins again after an error
        self.built, self.known_dls = built, learn.dls
        return is_new

    def _tasks(self, learn, model):
        """Return {head name: `Task`}."""
        if self.several and self.distiller is not None and self.distiller.student is model:
            return self.tasks
        return {k: h.task_of(learn, self.kinds[k], self.axis) for k, h in self.heads.items()}

    def _distiller(self, model):
        d = Distiller(
            model,
            dict.fromkeys(self.heads),
            self.recipes,
            kind={k: t.kind for k, t in self.tasks.items()},
            axis={k: t.axis for k, t in self.tasks.items()},
            ignore_index={k: t.ignore_index for k, t in self.tasks.items()},
            output={k: h.output for k, h in self.heads.items()},
            check={k: self.check and k in self.stored for k in self.heads},
            labels={k: h.labels for k, h in self.heads.items()} if self.several else None,
        )
        if self.several:
            d.heads.share_task_loss()
        return d

    def _take_teachers(self, learn):
        for k, h in self.distiller.heads.items():
            if k in self.stored:
                h.teacher = self.stored[k]
                continue
            h.teacher = self.heads[k].teacher_of(learn, self.tasks[k])
            if self.several:
                for t in h.layered:
                    check_names(h.student, h.teacher, t.layers)
        self.distiller.heads.share_models()

    def look(self, learn, logs: bool) -> dict | None:
        """Look for mistakes, once per set of DataLoaders.

        Only the first process looks for mistakes. All processes receive its findings.

        Args:
            learn: The student's Learner.
            logs: Whether to print the scores.

        Returns:
            A dict {head name: findings}, or None if the check was skipped.
        """
        if not self.check or self.checked or not self.runs:
            return None
        found = {k: self._look(learn, k, logs) for k in self.heads if k not in self.stored}
        self.checked = True
        return found

    def _look(self, learn, k, logs):
        d, h = self.distiller.heads[k], self.heads[k]
        recipe = d.recipe if d.recipe.terms else None
        found = on_first(lambda: find_mistakes(learn, d.teacher, self.tasks[k], h, recipe))
        if not self.several:
            return found.enforce(facts=logs)
        found[:] = [replace(f, what=f'{k}: {f.what}') for f in found]
        if logs and found.facts is not None:
            print(f'fastdistill: {k}:', '; '.join(found.facts.lines()))
        return found.enforce(facts=False)

    def check_task_loss(self, learn):
        """Warn once per set of DataLoaders if the task loss is a sum over the batch."""
        if not self.check or self.loss_checked:
            return
        self.loss_checked = True
        found = Findings(loss_mistakes(learn, self.distiller.recipe, self.output, self.several))
        found.enforce()

    def choose(self, learn, found: dict | None):
        """Let `auto` choose a recipe for each head that has no recipe yet.

        Args:
            learn: The student's Learner.
            found: What `look` returned.
        """
        heads = [h for h in self.distiller.heads.values() if h.automatic]
        if not heads or not (is_choosing(self.distiller) or found is not None):
            return
        for h in heads:
            example = example_of(learn, h.output)
            looked = None if found is None else found.get(h.name)
            chosen = of_first(choose_recipe(example, self.tasks[h.name], h.teacher, looked))
            if str(h.chosen) == str(chosen):
                continue
            h.take(chosen)
            self.log(f'fastdistill: {h.prefix}recipe {chosen}')
        if self.several:
            self.distiller.heads.share_task_loss()
