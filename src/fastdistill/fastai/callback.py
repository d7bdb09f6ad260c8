"The callback: distillation inside a fit, and nothing of it outside."

import copy
from dataclasses import replace

from fastai.basics import Callback, L, noop, one_param
from fastai.callback.mixup import MixHandler

from ..base.distributed import broadcast, of_first, on_first, rank
from ..base.outputs import DistillError, as_plain, check_axis, check_output
from ..base.task import pseudo_labels
from ..distiller.distiller import Distiller
from ..distiller.heads import Heads
from ..distiller.integration import OLD_STATE
from ..features.layer_names import unwrap
from ..features.taps import Taps
from ..recipes.batch import all_classes
from ..recipes.gradient_norms import shares_in_words
from ..recipes.term import Recipe, one_temperature
from ..teachers.items import with_items
from .arguments import check_options, feed_of, make_recipe, refuse_options, stored_head
from .cache_feed import SampleFeed
from .check import check_optimizer, find_mistakes, weight_shapes
from .default_recipe import choose_recipe, example_of
from .finite import FiniteCheck
from .head import WholeModel, beside_labels, heads_of, option_of_heads, task_of_head
from .learner_notes import notes_of
from .metrics import PartMetric, TaskMetric
from .patches import DistillationCallback
from .projector_opt import ProjectorOptimizer
from .task import task_of
from .teacher_targets import samples_of
from .teachers import is_heads, teacher_of
from .trend import TrendCheck
from .unlabeled import UnlabeledInputs

__all__ = ['KnowledgeDistillation']


class KnowledgeDistillation(DistillationCallback):
    """Train the learner on what `teacher` predicts: `learn.fit_one_cycle(3, 1e-3,
    cbs=KnowledgeDistillation(teacher))`.

    Args:
        teacher: Learner, exported .pkl, module, TorchScript, torch.export or ONNX file,
            callable, estimator with `predict_proba` or `predict`, `Teacher`; a list of these
            (an ensemble); a `TeacherCache`, or its folder. None: the batches hold the teacher's
            outputs (see `TeacherBlock`). A dict: a teacher for each head (docs/classes.md).
        recipe: `kd()`, `kd() + recipes.at()`, a `Term`; None or 'auto': `auto` chooses, or
            kd(T, alpha) if one of them is given.
        T: Temperature: number or schedule (fastai's `SchedCos(8, 2)`); 4 if not given.
        alpha: Weight of the teacher, the labels have 1-alpha: number or schedule; .9 if not
            given.
        temperature: The same as T.
        loss: Your own: fn(student_logits, teacher_logits, *targets). It is the whole loss, or
            with alpha=, the part beside the labels' own.
        kind: 'softmax', 'sigmoid' or 'regression'; None: read off the learner's loss function.
        axis: Class axis; None: read off the learner's loss function.
        span: Schedules, warmup and stop_at run once through a whole `fine_tune`; 'fit': once
            through each of its two fits.
        output: Which of the student's outputs is distilled: a name, an index or a function;
            None: as in `Distiller`. Of a teacher's outputs: Teacher(model, output=...).
        unlabeled: More inputs, without labels, on which the teacher alone teaches: items like
            those of the training set, or a DataLoader. Each training batch gets one of theirs
            beside it.
        unlabeled_targets: A cache of the teacher's outputs for them, or its folder; None: the
            teacher runs.
        perturbed: For tables: so many perturbed copies of each row, on which the teacher alone
            teaches.
        check: Look for mistakes before the first fit (see `check_teacher`).
    """

    # after the student's loss and its regularizers; before GradientAccumulation (6) and MixedPrecision (10) scale it
    order, remove_on_fetch, _only_train_loop = 5, False, True

    def __init__(
        self,
        teacher=None,
        recipe=None,
        *,
        T=None,
        alpha=None,
        temperature=None,
        loss=None,
        kind: str | None = None,
        axis: int | None = None,
        span: str = 'fine_tune',
        output=None,
        unlabeled=None,
        unlabeled_targets=None,
        perturbed: int = 0,
        check: bool = True,
    ):
        super().__init__()
        self.several = is_heads(teacher)
        refuse_options(self.several, loss=loss, output=output, unlabeled_targets=unlabeled_targets)
        self.heads = heads_of(teacher) if self.several else {'': WholeModel(teacher, output)}
        of_each = lambda o, name: option_of_heads(o, name, self.heads) if self.several else {'': o}
        self.kinds = of_each(kind, 'kind')
        for k, h in self.heads.items():
            check_options(h.source, kind=self.kinds[k], span=span)
        check_output(output)
        check_axis(axis)
        self.source, self.output, self.asked_axis, self.span, self.check = (
            teacher,
            output,
            axis,
            span,
            check,
        )
        T = one_temperature(T, temperature)
        self.recipes = {
            k: make_recipe(r, T, alpha, loss) for k, r in of_each(recipe, 'recipe').items()
        }
        self.recipe = None if self.several else self.recipes['']
        self.chooses = None in self.recipes.values()
        found = {k: feed_of(h.source) for k, h in self.heads.items()}
        self.stored = {k: o for k, o in found.items() if o is not None}
        if self.several:
            self.stored = {k: stored_head(self.heads[k], o) for k, o in self.stored.items()}
        self.feed = SampleFeed()
        self.in_fit, self.part_metrics, self.parts = False, L(), {}
        self.distillers, self.chosen = {}, {}
        self.distiller = self.known_dls = self.projector_opt = self.taps = self.built = (
            self.trend
        ) = None
        self.teacher_outputs = self.epochs_span = None
        self.state_to_load = self.state_before_finder = self.reported_shares = None
        self.runs = len(self.stored) < len(self.heads)  # does a teacher run?
        self.finite_check = FiniteCheck(stored=not self.runs)
        self.unlabeled = UnlabeledInputs(
            unlabeled,
            perturbed,
            unlabeled_targets,
            runs=not self.stored if self.several else self.runs,
        )

    # around a fit

    def before_fit(self):
        self.teardown()
        # validate, get_preds, show_results ...
        if self.learn.lock.locked() or hasattr(self.learn, 'gather_preds'):
            return
        if any(isinstance(c, KnowledgeDistillation) and c is not self for c in self.learn.cbs):
            raise DistillError(
                'Two KnowledgeDistillation callbacks in one Learner. Give one of them a list of '
                'teachers (an ensemble), or a sum of recipes, kd() + recipes.at().'
            )
        check_optimizer(self.learn)
        self.in_fit, self.trend, finder = True, TrendCheck(), hasattr(self.learn, 'lr_finder')
        self._build()
        for t in self._teachers():
            t.say_with(self._log)
        sources = {k: d.teacher for k, d in self.distillers.items()}
        self.feed.attach(self.learn, sources, self.tasks)
        found = (
            self._check() if self.check and not self.checked and not finder and self.runs else None
        )
        if self.chooses and (self.recipe is None or found is not None):
            self._choose(found)
        if self.distiller.ready:
            self._take_state()
        if finder:
            self._copy_projectors()
        for d in self.distillers.values():
            d.measures = not finder
        output = next(iter(self.heads.values())).output
        if not self.distiller.ready and (example := example_of(self.learn, output)):
            self._setup(*example.x)
        self.epochs_span = None if finder or self.span == 'fit' else self._epochs_span()
        self.part_metrics = L(
            TaskMetric(self), *(PartMetric(self, t.name) for t in self.recipe.terms)
        )
        self.learn.metrics = self.learn.metrics + self.part_metrics
        if self.unlabeled and not finder:
            self._start_unlabeled()
        for t in self._teachers():
            t.start()

    def _teachers(self):
        """The source of each head, each once."""
        return list({id(d.teacher): d.teacher for d in self.distillers.values()}.values())

    def _check(self):
        """Look for mistakes, on the first rank alone, so that all ranks continue or all stop."""
        found = {k: self._check_head(k) for k in self.heads if k not in self.stored}
        self.checked = True
        return found

    def _check_head(self, k):
        d, h = self.distillers[k], self.heads[k]
        find = lambda: find_mistakes(
            self.learn,
            d.teacher,
            self.tasks[k],
            d.recipe if d.recipe.terms else None,
            output=h.output,
            head=h,
        )
        found = on_first(find)
        if not self.several:
            return found.enforce(facts=self.logs)
        found[:] = [replace(f, what=f'{k}: {f.what}') for f in found]
        if self.logs and found.facts is not None:
            print(f'fastdistill: {k}:', '; '.join(found.facts.lines()))
        return found.enforce(facts=False)

    def _choose(self, found):
        """Take the recipe that `auto` chooses, for each head without one."""
        for k, d in self.distillers.items():
            if self.recipes[k] is not None:
                continue
            example = example_of(self.learn, self.heads[k].output)
            looked = None if found is None else found.get(k)
            chosen = of_first(choose_recipe(example, self.tasks[k], d.teacher, looked))
            if k in self.chosen and str(chosen) == str(self.chosen[k]):
                continue
            self.chosen[k] = chosen
            d.take(beside_labels(chosen) if self.several else chosen)
            self._log(
                f'fastdistill: {k}: recipe {chosen}'
                if self.several
                else f'fastdistill: recipe {chosen}'
            )
        if self.several:
            self.distiller.share_task_loss()
        self.recipe = self.distiller.recipe if self.several else self.chosen['']

    def _start_unlabeled(self):
        if not any(not t.n_targets for t in self.recipe.terms):
            names = ', '.join(t.name for t in self.recipe.terms)
            raise DistillError(
                f'unlabeled= and perturbed=: all terms read labels ({names}). Add one that reads none, '
                'as kd() or soft_labels().'
            )
        d = next(iter(self.distillers.values()))
        self.unlabeled.start(self.learn, d.teacher, d.teacher_layers())

    def _build(self):
        """The distiller for this model and task, and the teacher for the normalization and classes
        of these data.
        """
        model = unwrap(self.learn.model)
        tasks = self._tasks(model)
        if self.built != (built := (tasks, model, weight_shapes(model))):
            self.tasks, self.built, self.projector_opt, self.known_dls, self.reported_shares = (
                tasks,
                built,
                None,
                None,
                None,
            )
            self.distillers = {k: self._distiller_of(k, model) for k in self.heads}
            self.distiller = self._whole_distiller()
            self.distiller.links.to(one_param(model).device)
            self.chosen, self.recipe = {}, None if self.chooses else self.distiller.recipe
        if self.known_dls is self.learn.dls:
            return
        self.known_dls, self.checked = self.learn.dls, False
        for k, d in self.distillers.items():
            d.teacher = self._source_of(k)
            if self.several and k not in self.stored:
                d.check_names()

    def _tasks(self, model):
        """What each head predicts."""
        if not self.several:
            return {'': task_of(self.learn.loss_func, self.kinds[''], self.asked_axis)}
        if self.distiller is not None and self.distiller.student is model:
            return self.tasks
        return {
            k: task_of_head(self.learn, h, self.kinds[k], self.asked_axis)
            for k, h in self.heads.items()
        }

    def _distiller_of(self, k, model):
        recipe, task = self.recipes[k], self.tasks[k]
        return Distiller(
            model,
            None,
            Recipe() if recipe is None and self.several else recipe,
            kind=task.kind,
            axis=task.axis,
            ignore_index=task.ignore_index,
            output=self.heads[k].output,
            check=self.check and k in self.stored,
        )

    def _whole_distiller(self):
        if not self.several:
            return self.distillers['']
        heads = Heads(labels={k: h.labels for k, h in self.heads.items()}, **self.distillers)
        heads.share_task_loss()
        return heads

    def _source_of(self, k):
        task, head = self.tasks[k], self.heads[k]
        if k in self.stored:
            return self.stored[k]
        return teacher_of(head.source, head.of(self.learn), task)

    def _setup(self, *x):
        """Pair layers and build projectors, once for a student."""
        self.distiller.setup(*map(as_plain, x))
        self.distiller.links.train(self.training)
        broadcast(self.distiller.links.state_dict().values())
        self._take_state()
        if self.distiller.pairs and not hasattr(self.learn, 'lr_finder'):
            self._log(self.distiller.pairs)

    def _copy_projectors(self):
        """lr_find trains until it diverges: it gets copies of the projectors."""
        ds = self.distillers.values()
        self.state_before_finder = [(d, d.links, d.ratios) for d in ds], self.projector_opt
        for d in ds:
            d.links, d.ratios = copy.deepcopy((d.links, d.ratios))
        self.projector_opt = None

    def _epochs_span(self):
        """(epochs before this fit, epochs in all) of the `fine_tune` that this fit is a phase of."""
        span = getattr(self.learn, 'fine_tune_span', None)
        if span is None:
            return None
        before, span['done'] = span['done'], span['done'] + self.n_epoch
        return before, span['epochs']

    def after_fit(self):
        self.teardown()

    def teardown(self):
        """Put everything back; safe to call at any time, and twice."""
        self._untap()
        self.feed.detach()
        self.unlabeled.stop()
        if not self.in_fit:
            return
        self.in_fit, self.n_steps = False, self.learn.train_iter  # which `validate` sets to 0
        for t in self._teachers():
            if t is not None:
                t.stop()
                t.say_with(None)
        self.learn.metrics = self.learn.metrics.filter(lambda m: m not in self.part_metrics)
        if self.state_before_finder is not None:
            were, self.projector_opt = self.state_before_finder
            for d, links, ratios in were:
                d.links, d.ratios = links, ratios
            self.state_before_finder = None
        elif self.distiller is not None:
            notes_of(self.learn).last_state = self.state_dict()

    def __setattr__(self, k, v):
        # subtle: no event follows an error or an interrupt. But `Learner.fit` removes the callbacks that it got, which
        # ends here. For a callback that stays on the Learner, see `Learner.fit` in `patches`
        if k == 'learn' and v is None and self.learn is not None:
            self.teardown()
        super().__setattr__(k, v)

    # an exported Learner gets a callback that does nothing, and needs no fastdistill
    def __reduce__(self):
        return Callback, ()

    @property
    def logs(self):
        """Does this process print? Not inside `learn.no_logging()`, and on the first rank alone."""
        return self.learn.logger is not noop and rank() == 0

    def _log(self, text):
        if not self.logs:
            return
        # fastai's bar in a terminal stands in the current line: it is wiped, and draws itself again below the text
        progress = getattr(self.learn, 'progress', None)
        bar = getattr(progress, 'pbar', None) if hasattr(progress, 'mbar') else None
        width = getattr(bar, 'max_len', 0)
        print((f'\r{" " * width}\r' if width else '') + str(text))

    # a batch

    @property
    def active(self):
        """In a fit, and not in a `get_preds` inside it."""
        return self.in_fit and not hasattr(self.learn, 'gather_preds')

    @property
    def training_progress(self):
        """Share of the training that is done, for schedules."""
        if self.epochs_span is None:
            return self.pct_train
        before, epochs = self.epochs_span
        return (before + self.pct_train * self.n_epoch) / epochs

    def before_epoch(self):
        if self.active:
            self.trend.check(self.learn, self.training_progress, self.recipe)

    def before_train(self):
        self._start_phase(True)

    def before_validate(self):
        self._start_phase(False)

    def _start_phase(self, training):
        if not self.active:
            return
        self.distiller.links.train(training)
        for t in self._teachers():
            t.reset()
        self.finite_check.start_phase()
        if training:
            self.part_metrics[0].start_training()

    def before_batch(self):
        if not self.active:
            return
        self.parts, self.teacher_outputs = {}, None
        if not self.distiller.ready:
            # it did not run on an example
            self._setup(*with_items(self.xb, getattr(samples_of(self.learn), 'items', None)))
        self._tap()

    def _tap(self):
        """Read the layers that this batch compares."""
        # subtle: hooks go on the model of this batch, since an averaged model may take its place in validation
        names = self.distiller.student_layers(self.distiller.active_terms(self.training_progress))
        if self.taps is not None and self.taps.names == names:
            return
        self._untap()
        if names:
            self.taps = Taps(self.learn.model, names).attach()

    def _untap(self):
        if self.taps is not None:
            self.taps.detach()
        self.taps = None

    def after_batch(self):
        # subtle: hooks that come and go would make torch.compile compile again
        if self.taps is not None and not self.taps.compiled:
            self._untap()

    def after_train(self):
        self._untap()
        if not self.active:
            return
        self.finite_check.enforce(self.learn)
        self.part_metrics[0].end_training()

    def after_validate(self):
        if not self.active:
            return
        self._untap()
        self.finite_check.enforce(self.learn)

    def after_pred(self):
        if not self.active or len(self.yb) or not self.training:
            return
        if self.several:
            raise DistillError(
                'These batches have no labels, but heads are told apart by their labels.'
            )
        if self.recipe.task_at(self.training_progress):
            raise DistillError(
                'These batches have no labels, but the recipe gives their loss a weight: use alpha=1, '
                'or soft_labels(), to train from the teacher alone.'
            )
        # subtle: without labels fastai computes no loss and takes no step. So it gets the teacher's predictions as
        # labels; their loss has weight 0
        self.teacher_outputs = self._ask_teacher()
        if self.teacher_outputs is not None:
            s = self._student_outputs({})
            t = all_classes(self.teacher_outputs, s).logits
            self.learn.yb = (pseudo_labels(t, s.logits, self.tasks['']),)

    def after_loss(self):
        if not self.active or not len(self.yb) or not self._has_outputs():
            return
        unlabeled = self.teacher_outputs is not None
        t = self.teacher_outputs if unlabeled else self._ask_teacher()
        s = self._student_outputs(self.taps.pop() if self.taps else {})
        y = () if unlabeled else self.yb
        r = self.distiller.compute(
            s, t, self.learn.loss, y, progress=self.training_progress, mixed=self._mixed()
        )
        self.parts = r.parts if unlabeled else {'task': r.task.detach(), **r.parts}
        self._report_shares()
        if not self.training:
            return
        self.part_metrics[0].add_training_batch(self.learn)
        if r.added is not None:
            self._add(r)
        if self.unlabeled and not hasattr(self.learn, 'lr_finder'):
            self._teach_unlabeled()

    def _teach_unlabeled(self):
        """The student learns from the teacher on inputs without labels, beside those of this batch."""
        # subtle: where nothing counts, nothing may be drawn, and no batch-norm may see these inputs
        progress = self.training_progress
        active = [t for d in self.distillers.values() for t in d.active_terms(progress)]
        if all(t.n_targets for t in active):
            return
        ask = lambda x: self.distiller.teacher_outputs(x, progress)
        for x, t in self.unlabeled.batches(self.learn, ask):
            self._each_head(t, self._check_finite)
            raw = self.learn.model(*x)
            s = self.distiller.student_outputs(raw, self.taps.pop() if self.taps else {}, x)
            v = self.distiller.without_labels(s, t, progress=progress)
            self.learn.loss_grad, self.learn.loss = self.learn.loss_grad + v, self.learn.loss + v

    def _student_outputs(self, feats):
        return self.distiller.student_outputs(self.learn.pred, feats, self.xb)

    def _ask_teacher(self):
        """The teacher's outputs for this batch; None where no term needs them."""
        samples = samples_of(self.learn)
        t = self.distiller.teacher_outputs(self.xb, self.training_progress, samples)
        self._each_head(t, self._check_finite)
        return t

    def _each_head(self, outputs, fn):
        """fn(name of the head, its outputs), of those that there are."""
        for k, o in outputs.items() if isinstance(outputs, dict) else [('', outputs)]:
            if o is not None:
                fn(k, o)

    def _check_finite(self, k, t):
        self.finite_check.add(t, self.learn, self.tasks[k])

    def _report_shares(self):
        """Print what was measured at the first training batch, and where a part counts for the
        first time.
        """
        before, shares = self.reported_shares, self.distiller.gradient_shares
        self.reported_shares = shares
        if not shares or shares is before:
            return
        new = f' with {" and ".join(k for k in shares if k not in before)}' if before else ''
        at_layers = {
            t.name: t.weight_at(self.training_progress)
            for t in self.distiller.layered
            if t.has_grad_ratio
        }
        self._log(
            f'fastdistill: gradient norms at the first batch{new}: {shares_in_words(shares, at_layers)}'
        )

    def _add(self, r):
        learn = self.learn
        if r.weights['task']:
            learn.loss_grad, learn.loss = learn.loss_grad + r.added, learn.loss + r.added
        else:
            learn.loss_grad, learn.loss = r.total + self._regularizers(), r.total

    def _regularizers(self):
        """What callbacks before this one added to the task loss."""
        a, b = self.learn.loss_grad, self.learn.loss
        # subtle: where they added nothing, the task loss and its gradient must not be used at all: they may be nan
        return 0.0 if origin(a) is origin(b) else (a - b).nan_to_num()

    def _has_outputs(self):
        """Stored outputs may be there for the training set alone."""
        samples = samples_of(self.learn)
        return self.training or any(t.has_outputs(samples) for t in self._teachers())

    def _mixed(self):
        """The second labels of a mixed batch, and the share of the first ones, where MixUp or
        CutMix keep both apart.
        """
        mixes = [
            c for c in self.learn.cbs if isinstance(c, MixHandler) and getattr(c, 'stack_y', False)
        ]
        mix = mixes[0] if mixes and self.training else None
        return None if mix is None else (mix.yb1, mix.lam)

    # projectors

    def after_backward(self):
        if self.active and self.distiller.own_parameters():
            self._optimizer().average_gradients()

    def before_step(self):
        self.skip_step = False

    def after_cancel_step(self):
        self.skip_step = True

    def after_step(self):
        if self.active and self.distiller.own_parameters():
            self._optimizer().step(self.learn, self.skip_step)

    def _optimizer(self):
        if self.projector_opt is None:
            self.projector_opt = ProjectorOptimizer(self.learn, self.distiller.own_parameters())
        return self.projector_opt

    def state_dict(self):
        """What a checkpoint needs beside the student: projectors, their optimizer's state, measured
        gradients.
        """
        if self.state_to_load:
            return {k: v for k, v in self.state_to_load.items() if k != 'file'}
        if self.distiller is None:
            return {}
        d, opt = (
            self.distiller,
            None if self.projector_opt is None else self.projector_opt.state_dict(),
        )
        return dict(
            links=d.links.state_dict(), distiller=d.get_extra_state() if d.ratios else None, opt=opt
        )

    def load_state_dict(
        self,
        state,  # what `state_dict` returned. Outside of a fit, it is loaded when the next fit begins
    ):
        self.state_to_load = state
        if self.in_fit and self.distiller.ready:
            self._take_state()

    def _take_state(self):
        """Load the state that was given, or that stood beside the student's file."""
        state, d = self.state_to_load, self.distiller
        if state is None and self.projector_opt is None:
            state = notes_of(self.learn).loaded_state
        if not hasattr(self.learn, 'lr_finder'):
            self.state_to_load = None
            notes_of(self.learn).loaded_state = None
        if not state:
            return
        shapes = lambda tensors: {k: tuple(v.shape) for k, v in tensors.items()}
        if shapes(state['links']) != shapes(d.links.state_dict()):
            names = lambda links: ', '.join(links) or 'none'
            what = f'projectors of other terms or layers ({names(state["links"])}, now {names(d.links.state_dict())})'
            if 'file' not in state:
                raise DistillError(
                    f'This state holds {what}: load it into a callback with the recipe that it was '
                    'saved from.'
                )
            return self._log(f'fastdistill: {state["file"]} holds {what}, and is not used.')
        if 'file' in state:
            self._log(f'fastdistill: projectors and their optimizer continue from {state["file"]}.')
        d.links.load_state_dict(state['links'])
        chosen = d.chosen
        if state.get('distiller') is not None:
            d.set_extra_state(state['distiller'])
        elif state.get('ratios'):
            self._log(OLD_STATE)
        if d.chosen != chosen:
            self.recipe = self.chosen[''] = d.recipe
            self._log(f'fastdistill: recipe {d.chosen[0]}, as before')
        self.projector_opt = None
        if state['opt'] is not None:
            self._optimizer().load_state_dict(state['opt'])


def origin(loss):
    """The operation that computed a loss, without the copies that fastai makes of it."""
    fn = loss.grad_fn
    while fn is not None and fn.name() in ('AliasBackward0', 'CloneBackward0'):
        fn = fn.next_functions[0][0]
    return fn
