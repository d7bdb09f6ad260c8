"The callback: distillation inside a fit, and nothing of it outside."
import copy
from pathlib import Path
from fastai.basics import Adam, Callback, L, Metric, OptimWrapper, ValueMetric, find_bs, noop, one_param
from fastai.callback.mixup import MixHandler
from ..cache.reader import TeacherCache
from ..distiller import Distiller, Recipe, Term
from ..features.names import unwrap
from ..features.taps import Taps
from ..outputs import DistillError, Outputs, as_plain
from ..ranks import broadcast, mean_over_ranks, on_first, rank
from ..recipes import kd
from .task import task_of
from ..teacher.teacher import Teacher
from .cache_feed import CacheFeed
from .check import check_teacher, fitting_teacher
from .targets import Feed, TargetFeed

__all__ = ['KnowledgeDistillation']


class PartMetric(Metric):
    "The mean of one term over the validation set, as a column of its own"
    def __init__(self, kd, key): self.kd,self.key = kd,key
    def reset(self): self.total,self.count = 0.,0
    def accumulate(self, learn):
        if (v := self.kd.parts.get(self.key)) is None: return
        n = find_bs(learn.yb)
        self.total += learn.to_detach(v)*n
        self.count += n
    @property
    def value(self): return self.total/self.count if self.count else None
    @property
    def name(self): return f'{self.key}_loss'
    # after an interrupted fit it may still be there when the learner is exported, where it must need nothing
    def __reduce__(self): return ValueMetric, (noop, self.name)


class KnowledgeDistillation(Callback):
    "Train the learner on what `teacher` knows: `learn.fit_one_cycle(3, 1e-3, cbs=KnowledgeDistillation(teacher))`"
    # after the student's loss and its regularisers, before GradientAccumulation (6) divides it and MixedPrecision (10) scales it
    order,remove_on_fetch,_only_train_loop = 5,False,True

    def __init__(
        self,
        teacher=None, # Learner, exported .pkl, module, TorchScript, torch.export or ONNX file, callable, `Teacher`, or a list of these
        # (an ensemble); a `TeacherCache`, or its folder; None: the batches hold its answers (see `TeacherBlock`)
        recipe=None, # `kd()`, `kd() + at()`, a `Term`; None: kd(T, alpha)
        *,
        T=None, # temperature: number or schedule (fastai's `SchedCos(8, 2)`); 4 if not given
        alpha=None, # weight of the teacher, the labels have 1-alpha: number or schedule; .9 if not given
        loss=None, # your own: fn(student_logits, teacher_logits, *targets); it is the whole loss, unless alpha mixes the labels' own in
        kind:str|None=None, # 'softmax', 'sigmoid' or 'regression'; None: read off the learner's loss function
        axis:int|None=None, # class axis; None: likewise
        balance:str|None=None, # 'grad': weights are shares of the gradient, measured at the first batch
        check:bool=True # look for mistakes before the first fit (see `check_teacher`)
    ):
        super().__init__()
        self.source,self.asked_kind,self.asked_axis,self.balance,self.check = teacher,kind,axis,balance,check
        self.recipe = make_recipe(recipe, T, alpha, loss)
        self.feed,self.on,self.mets,self.parts = feed_of(teacher),False,L(),{}
        self.distiller = self.met = self.popt = self.taps = self.told = self.kept = self.loaded = None

    # around a fit

    def before_fit(self):
        self.teardown()
        if self.learn.lock.locked() or hasattr(self.learn, 'gather_preds'): return     # validate, get_preds, show_results ...
        if any(isinstance(c, KnowledgeDistillation) and c is not self for c in self.learn.cbs):
            raise DistillError("Two KnowledgeDistillation callbacks in one Learner. Give one of them a list of teachers (an ensemble), "
                               "or a sum of recipes, kd() + at().")
        task,model = task_of(self.learn.loss_func, self.asked_kind, self.asked_axis),unwrap(self.learn.model)
        if self.distiller is None or self.distiller.student is not model or self.task != task: self._build(model, task)
        if self.met is not self.learn.dls: self._meet()
        finding = hasattr(self.learn, 'lr_finder')
        if self.feed is not None: self.feed.attach(self.learn, task.kind, task.axis)
        elif self.check and not self.checked and not finding:
            # subtle: on the first rank alone, so that all go on or all stop
            findings = on_first(lambda: check_teacher(self.learn, self.distiller.teacher, self.task, self.recipe))
            findings.enforce(facts=self.learn.logger is not noop)
            self.checked = True
        self.on = True
        if self.distiller.ready: self._load()
        if finding: self._keep()
        self.mets = L(PartMetric(self, t.name) for t in self.recipe.terms)
        self.learn.metrics = self.learn.metrics + self.mets
        self.distiller.teacher.start()

    def _build(self, model, task):
        self.task,self.popt,self.met = task,None,None
        self.distiller = Distiller(model, None, self.recipe, kind=task.kind, axis=task.axis, ignore_index=task.ignore_index,
                                   balance=self.balance)
        self.distiller.links.to(one_param(model).device)

    def _meet(self):
        "Other data may be normalised otherwise, or have their classes in another order: the teacher gets to know them"
        d = self.distiller
        if self.feed is None: d.teacher = fitting_teacher(self.source, self.learn, self.task)
        else: d.teacher = Teacher(lambda *_: self.feed.outputs(self.learn), kind=self.task.kind, axis=self.task.axis)
        d.teacher.layers = list(dict.fromkeys([*d.teacher.layers, *d.teacher_layers()]))
        self.met,self.checked = self.learn.dls,False

    def _keep(self):
        "lr_find trains until it diverges: on copies, then"
        d = self.distiller
        self.kept = d.links,d.scales,self.popt
        d.links,d.scales,self.popt = copy.deepcopy(d.links),dict(d.scales),None

    def after_fit(self): self.teardown()

    def teardown(self):
        "Put everything back; safe to call at any time, and twice"
        self._untap()
        if self.feed is not None: self.feed.detach()
        if not self.on: return
        self.on = False
        self.distiller.teacher.stop()
        self.learn.metrics = self.learn.metrics.filter(lambda m: m not in self.mets)
        if self.kept is not None: self.distiller.links,self.distiller.scales,self.popt = self.kept
        self.kept = None

    def __setattr__(self, k, v):
        # subtle: after an error or an interrupt no event comes, but the fit removes its callbacks, which ends here
        if k == 'learn' and v is None and self.learn is not None: self.teardown()
        super().__setattr__(k, v)

    def __reduce__(self): return Callback, ()   # in an exported learner: a callback that does nothing and needs nothing

    # a batch

    @property
    def active(self): return self.on and not hasattr(self.learn, 'gather_preds')     # get_preds inside a fit is none of ours

    def before_train(self): self._phase(True)
    def before_validate(self): self._phase(False)

    def _phase(self, training):
        if not self.active: return
        self.distiller.links.train(training)
        self.distiller.teacher.reset()

    def before_batch(self):
        if not self.active: return
        self.parts,self.told = {},None
        if not self.distiller.ready: self._setup()
        # subtle: not once for all: an averaged model may take the model's place for validation
        if self.taps is None: self._tap()

    def _setup(self):
        self.distiller.setup(*map(as_plain, self.xb))
        self.distiller.links.train(self.training)
        broadcast(self.distiller.links.state_dict().values())
        self._load()
        if self.distiller.pairs and rank() == 0: print(self.distiller.pairs)

    def _tap(self):
        if names := self.distiller.student_layers(): self.taps = Taps(self.learn.model, names).attach()

    def _untap(self):
        if self.taps is not None: self.taps.detach()
        self.taps = None

    def after_batch(self):
        # subtle: compiled code would be compiled anew for hooks that come and go
        if self.taps is not None and not self.taps.compiled: self._untap()

    def after_train(self): self._untap()
    def after_validate(self):
        if self.active: self._untap()

    def after_pred(self):
        if not self.active or len(self.yb) or not self.training: return
        if self.recipe.task_at(self.pct_train):
            raise DistillError("These batches have no labels, but the recipe counts their loss: use alpha=1, or soft_labels(), "
                               "to train from the teacher alone.")
        # subtle: without a target fastai makes no loss and no step; the teacher's answer is one, and its loss has the weight 0
        self.told = self.distiller.teacher(*self.xb)
        self.learn.yb = pseudo_labels(self.told.logits, Outputs.of(self.learn.pred).logits, self.task),

    def after_loss(self):
        if not self.active or not len(self.yb) or not self._taught(): return
        t = self.distiller.teacher(*self.xb) if self.told is None else self.told
        s = Outputs.of(self.learn.pred, self.taps.pop() if self.taps else None)
        y = self.yb if self.told is None else ()
        r = self.distiller.compute(s, t, self.learn.loss, y, progress=self.pct_train, mixed=self._mixed())
        self.parts = r.parts
        if not self.training or r.added is None: return
        self.learn.loss_grad = self.learn.loss_grad + r.added
        self.learn.loss = self.learn.loss + r.added

    def _taught(self):
        "Stored answers may be there for the training set alone"
        return self.training or self.feed is None or self.feed.ready(self.learn)

    def _mixed(self):
        "The second labels of a mixed batch, and the first ones' share, where MixUp or CutMix leave labels as they are"
        mix = next((c for c in self.learn.cbs if isinstance(c, MixHandler) and self.training and getattr(c, 'stack_y', False)), None)
        return None if mix is None else (mix.yb1, mix.lam)

    # projectors have an optimizer of their own: a group more in the student's would break its schedules and checkpoints

    def after_backward(self):
        mean_over_ranks(p.grad for p in self._projectors() if p.grad is not None)

    def _projectors(self): return self.distiller.own_parameters() if self.active else []

    def before_step(self): self.skip = False
    def after_cancel_step(self): self.skip = True

    def after_step(self):
        if not (ps := self._projectors()): return
        if self.popt is None: self.popt = self._make_popt(ps)
        self._unscale(ps)
        if not self.skip:
            for k in ('lr', 'mom', 'wd'):
                # subtle: a float, since set_hyper chokes on numpy's
                if k in self.popt.hypers[0] and k in self.opt.hypers[-1]: self.popt.set_hyper(k, float(self.opt.hypers[-1][k]))
            self.popt.step()
        self.popt.zero_grad()

    def _make_popt(self, ps):
        make = Adam if isinstance(self.learn.opt_func, OptimWrapper) else self.learn.opt_func
        return make([ps], lr=self.learn.lr)

    def state_dict(self):
        "What a checkpoint of training needs beside `learn.save`: projectors, their optimizer's state, measured balance"
        if self.distiller is None: return {}
        d,opt = self.distiller,None
        if self.popt is not None: opt = dict(state=list(self.popt.state_dict()['state']), hypers=[dict(h) for h in self.popt.hypers])
        return dict(links=d.links.state_dict(), scales=dict(d.scales), opt=opt)

    def load_state_dict(
        self,
        state # what `state_dict` gave; it is taken up when the next fit begins
    ):
        self.loaded = state

    def _load(self):
        state,self.loaded = self.loaded,None
        if not state: return
        self.distiller.links.load_state_dict(state['links'])
        self.distiller.scales = dict(state['scales'])
        if state['opt'] is not None:
            self.popt = self._make_popt(self.distiller.own_parameters())
            self.popt.load_state_dict(copy.deepcopy(state['opt']))

    def _unscale(self, ps):
        "Undo what half precision's scaler did to the loss; skip the step where that overflowed"
        scaler = getattr(self.learn, 'scaler', None)
        if scaler is None or not scaler.is_enabled(): return
        for p in ps:
            if p.grad is not None: p.grad.mul_(1/scaler.get_scale())
        self.skip = self.skip or any(p.grad is not None and not p.grad.isfinite().all() for p in ps)


def feed_of(source):
    "What brings stored answers to the batches; None for a teacher that is asked"
    if source is None: return TargetFeed()
    if isinstance(source, (str, Path)) and (Path(source)/'manifest.json').is_file(): source = TeacherCache(source)
    if isinstance(source, TeacherCache): return CacheFeed(source)
    return source if isinstance(source, Feed) else None


def make_recipe(recipe, T, alpha, loss):
    "One recipe from the three ways of asking for it"
    if recipe is None and loss is None: return kd(4. if T is None else T, .9 if alpha is None else alpha)
    if recipe is not None:
        given = [k for k,v in dict(T=T, alpha=alpha, loss=loss).items() if v is not None]
        if given: raise DistillError(f"A recipe and {', '.join(given)}=: say it in the recipe, as in kd(T=2, alpha=.5).")
        return Recipe(recipe)
    if T is not None:
        raise DistillError("T= with loss=: your loss gets the logits as they are, and softens them itself (or write Term(fn, T=...)).")
    alpha = 1. if alpha is None else alpha
    return Recipe(Term(loss, weight=alpha, name='kd'), task=kd(alpha=alpha).task)


def pseudo_labels(t, s, task):
    "The teacher's answer as a target of the task's own loss"
    if task.kind == 'softmax': return t.argmax(task.axis)
    return (t > 0).to(s.dtype) if task.kind == 'sigmoid' else t.to(s.dtype)
