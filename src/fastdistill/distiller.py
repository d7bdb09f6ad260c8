"The core: what is compared, how much it counts, and one batch of it. It knows tensors, no training loop and no particular loss."
import copy, inspect
from dataclasses import dataclass
from functools import partial
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from .features.pairs import PairTable, check_names, checked_layers, inputs, pair
from .features.probe import dry_run
from .features.projectors import checked_projector, projector
from .features.taps import Taps
from .outputs import DistillError, Outputs, TopK, as_plain
from .schedule import schedule, value_at
from .teacher.teacher import Teacher

__all__ = ['Distilled', 'Distiller', 'Recipe', 'Term']


class Term:
    "One comparison of student and teacher: a loss, how much it counts, and between which layers (else: the logits)"
    def __init__(
        self,
        loss, # fn(student, teacher, *targets, **options): a function of `fastdistill.losses`, a module of it, or your own
        weight=1., # number or schedule (see `fastdistill.schedule`)
        *,
        layers=None, # {'student.name': 'teacher.name'}, pairs of names, 'auto', 'last' (see `fastdistill.pairs`); None compares the logits
        projector='auto', # student's shape -> teacher's, where the loss needs it: 'auto', 'linear', 'conv', 'conv_bn', 'mlp', or a module
        stop_at:float|None=None, # share of the training after which the term ends
        name:str|None=None, # of its column
        **options # of the loss; a schedule is a value too, e.g. T=('linear', 8, 1)
    ):
        if not callable(loss):
            raise DistillError(f"A term needs a loss function, got {loss!r}. See fastdistill.losses for those that exist.")
        self.loss,self.layers,self.stop_at = loss,None if layers is None else checked_layers(layers),stop_at
        self.projector = checked_projector(projector)
        fn,ps = signature(loss)
        self.name = checked_name(name or getattr(fn, '__name__', type(fn).__name__))
        self.weight = schedule(weight, f'weight of {self.name}')
        args = [p for p in ps if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.accepts = {p.name for p in ps if p.kind is p.KEYWORD_ONLY}
        # how many of the targets the loss takes: those it must have, or all
        self.n_targets = None if any(p.kind is p.VAR_POSITIONAL for p in ps) else sum(p.default is p.empty for p in args[2:])
        named = self.accepts | {p.name for p in args[2:]}
        if (wrong := set(options) - named) and not any(p.kind is p.VAR_KEYWORD for p in ps):
            raise DistillError(f"{self.name} has no option {', '.join(sorted(wrong))}. It has: {', '.join(sorted(named)) or 'none'}")
        self.options = {k: schedule(v, k) if k == 'T' else v for k,v in options.items()}
        self.kind,self.match,self.lists = getattr(fn, 'kind', None),getattr(fn, 'match', 'none'),getattr(fn, 'lists', False)

    def __add__(self, other): return Recipe(self) + other

    def __repr__(self):
        of = f', layers={self.layers!r}' if self.layers is not None else ''
        return f"Term({self.name}, weight={self.weight!r}{of}{''.join(f', {k}={v!r}' for k,v in self.options.items())})"

    def weight_at(self, progress):
        if self.stop_at is not None and value_at(lambda p: p, progress, f'The end of {self.name}') >= self.stop_at: return 0.
        return value_at(self.weight, progress, f'The weight of {self.name}')

    @property
    def held(self):
        "Options that the loss brings along: a module's, or a partial's"
        return getattr(self.loss, 'options', getattr(self.loss, 'keywords', {}))

    def channels(self, t):
        "The channel axis of a layer's features, if it is not where maps have it: tokens (B, L, D) have it last"
        own = {**self.options, **self.held}
        return {'axis': -1} if self.layers is not None and t.dim() == 3 and 'axis' in self.accepts - own.keys() else {}

    def options_at(self, progress, context):
        "Options of the loss: its own, and of the context (class axis, mask, ...) what it asks for"
        own = {k: value_at(v, progress, k) if k == 'T' else v for k,v in self.options.items()}
        return {**{k: v for k,v in context.items() if k in self.accepts and k not in self.held}, **own}


def signature(loss):
    "The function behind a loss, and its parameters"
    fn = loss
    while isinstance(fn, partial): fn = fn.func
    fn = getattr(fn, 'fn', fn)
    inner = inspect.unwrap(fn)
    given = loss if isinstance(loss, partial) else inner.forward if isinstance(inner, nn.Module) else inner
    try: return fn,inspect.signature(given).parameters.values()
    except ValueError: return fn,()     # builtins have none: they are called with the two tensors


def checked_name(name):
    "It names a column, and what is kept of the term"
    if name == 'task' or '.' in name or hasattr(nn.ModuleDict, name):
        raise DistillError(f"A term can't be called {name!r}, which has a meaning already: Term(..., name='...') gives it another name.")
    return name


class Recipe:
    "Terms, and how much the labels' own loss counts beside them"
    def __init__(
        self,
        *terms, # Terms or Recipes
        task=None # weight of the task's loss, number or schedule; None: as it is (1)
    ):
        self.terms,said = [],[] if task is None else [schedule(task, 'task')]
        for o in terms:
            if not isinstance(o, (Term, Recipe)):
                raise DistillError(f"A recipe is made of terms and recipes, got {o!r}. Try kd(), or Term(losses.kl, weight=.5).")
            if task is None and isinstance(o, Recipe) and o.task is not None: said.append(o.task)
            for t in [o] if isinstance(o, Term) else o.terms: self._add(t)
        if any(o != said[0] for o in said):
            raise DistillError(f"These recipes say differently how much the labels count ({' and '.join(map(str, said))}): "
                               "give them the same alpha, or say it once for all, as in Recipe(kd(), hard_labels(), task=.1).")
        self.task = said[0] if said else None

    def _add(self, t):
        names = {u.name for u in self.terms}
        if t.name in names:
            t = copy.copy(t)
            t.name = next(n for i in range(2, 99) if (n := f'{t.name}_{i}') not in names)
        self.terms.append(t)

    def __add__(self, other): return Recipe(self, other)

    def __repr__(self): return f"Recipe({', '.join(map(repr, self.terms))}, task={1. if self.task is None else self.task!r})"

    def task_at(self, progress): return 1. if self.task is None else value_at(self.task, progress, "The task's weight")

    def __call__(
        self,
        s:Tensor, # student logits
        t:Tensor, # teacher logits
        *targets, # labels, if the recipe counts them
        task_loss=F.cross_entropy, # fn(s, *targets)
        progress:float|None=None, # share of the training that is done, for schedules
        **context # `kind`, `axis`, `mask`, `ignore_index` as in `Distiller`
    ):
        "The whole loss of one batch of logits, for those who ran both models themselves: kd(T=4, alpha=.9)(s, t, y)"
        mask = context.pop('mask', None)
        d = Distiller(None, None, self, **context)
        return d.compute(Outputs(s, mask=mask), Outputs(t), task_loss(s, *targets) if targets else None, targets, progress=progress).total


@dataclass
class Distilled:
    "One batch's loss and what it is made of"
    task:Tensor|None # the labels' own loss, unweighted; None without labels
    added:Tensor|None # what distillation adds to it; None if that is nothing at all
    parts:dict[str,Tensor] # each term's value, unweighted and detached
    weights:dict[str,float] # and what it was multiplied by; 'task' among them

    @property
    def total(self):
        "What to call `backward` on"
        if self.task is None: return self.added
        return self.task if self.added is None else self.task + self.added


class Link(nn.Module):
    "One pair of layers of one term: its projector, and its copy of the loss if that has parameters"
    def __init__(self, loss, layers=None, projector=None):
        super().__init__()
        self.layers,self.projector = layers,projector
        self.loss = loss

    def tensors(self, s:Outputs, t:Outputs):
        if self.layers is None: return s.logits,t.logits
        a,b = s.feats[self.layers[0]],t.feats[self.layers[1]]
        return (a if self.projector is None else self.projector(a, b)),b


class Distiller(nn.Module):
    """A student, its teacher, and a recipe: `distiller(x, y)` is one batch. Its parameters are the student's and the projectors',
    never the teacher's. `with distiller.teacher:` around a loop gets the teacher ready once, and not for each batch"""
    def __init__(
        self,
        student:nn.Module|None, # what is trained; None if only `compute` is used, without layers
        teacher, # a `Teacher`, or what it takes: a module, a callable, a file, a list of these
        recipe, # `kd()`, `kd() + at()`, a `Term`
        *,
        task_loss=F.cross_entropy, # fn(student logits, *targets): the labels' own loss
        kind:str='softmax', # what the logits are: 'softmax' over classes, 'sigmoid' per label, or 'regression'
        axis:int=1, # class axis
        ignore_index:int=-100, # positions with this label are left out
        balance:str|None=None, # 'grad': weights are shares of the gradient, measured at the first batch (see `measure_balance`)
        example=None # a batch of inputs, to build projectors before an optimizer asks for their parameters
    ):
        super().__init__()
        for o,v,have in (('kind', kind, ('softmax', 'sigmoid', 'regression')), ('balance', balance, (None, 'grad'))):
            if v not in have: raise DistillError(f"{o}={v!r}: possible are {', '.join(map(repr, have))}")
        self.student,self.recipe,self.task_loss = student,Recipe(recipe),task_loss
        self.teacher = teacher if teacher is None or isinstance(teacher, Teacher) else Teacher(teacher, kind=kind, axis=axis)
        self.kind,self.axis,self.ignore_index,self.balance,self.scales = kind,axis,ignore_index,balance,{}
        for t in self.recipe.terms: check_kind(t, kind)
        self.links = nn.ModuleDict({t.name: nn.ModuleList([Link(own_copy(t.loss))]) for t in self.recipe.terms if t.layers is None})
        self.pairs:PairTable|None = None # what is compared with what, once it is known
        if student is not None and teacher is not None: self.check_names()
        if example is not None: self.setup(*inputs(example))

    @property
    def layered(self): return [t for t in self.recipe.terms if t.layers is not None]

    @property
    def ready(self): return len(self.links) == len(self.recipe.terms)

    def parameters(self, recurse=True):
        if not self.ready and any(t.match == 'shape' for t in self.layered):
            raise DistillError("The projectors are not built yet, and an optimizer made now would not train them: "
                               "give the Distiller a batch of inputs, Distiller(..., example=x)")
        return super().parameters(recurse)

    def check_names(self):
        "Refuse layers that the models don't have, before any batch"
        for t in self.layered: check_names(self.student, self.teacher, t.layers)

    def own_parameters(self): return [p for p in self.links.parameters() if p.requires_grad]

    def setup(self, *x):
        "Pair layers and build projectors, from one evaluation-mode probe that changes nothing, the random state included"
        student = self.student
        with torch.random.fork_rng(sorted({p.device.index for p in student.parameters() if p.is_cuda})):
            tables = {t.name: pair(student, self.teacher, x, layers=t.layers, match=t.match, projector=t.projector) for t in self.layered}
            with Taps(student, dict.fromkeys(p.student for ps in tables.values() for p in ps)) as taps:
                dry_run(student, *x)
                s = taps.pop()
            t = self.teacher.probe(*x, layers=list(dict.fromkeys(p.teacher for ps in tables.values() for p in ps)))
            for term in self.layered: self.links[term.name] = nn.ModuleList(self._links(term, tables[term.name], s, t.feats))
        self.teacher.layers = list(dict.fromkeys([*self.teacher.layers, *self.teacher_layers()]))
        self.pairs = PairTable([p for ps in tables.values() for p in ps])
        return self

    def student_layers(self): return list(dict.fromkeys(k.layers[0] for ks in self.links.values() for k in ks if k.layers))

    def teacher_layers(self): return list(dict.fromkeys(k.layers[1] for ks in self.links.values() for k in ks if k.layers))

    def forward(
        self,
        x, # the student's input: a tensor, a tuple of several, or a dict of keyword arguments
        *targets, # labels; none where the recipe gives them no weight
        progress:float|None=None # share of the training that is done, for schedules
    ) -> Distilled:
        "Run student and teacher on a batch and compare them"
        args,kwargs = as_inputs(x)
        if not self.ready: self.setup(*args, *([kwargs] if kwargs else []))
        with Taps(self.student, self.student_layers()) as taps:
            raw = self.student(*args, **kwargs)
            s = Outputs.of(raw, taps.pop())
        t = self.teacher(*args, **kwargs)
        return self.compute(s, t, self.task_loss(s.logits, *targets) if targets else None, targets, progress=progress)

    def compute(
        self,
        student:Outputs, # of this batch
        teacher:Outputs, # of the same batch
        task:Tensor|None=None, # the labels' own loss, already computed; None without labels
        targets=(), # labels, for the losses that read them
        *,
        progress:float|None=None, # share of the training that is done, for schedules
        mixed=None # (other targets, share of the first ones): MixUp's batches have two labels a sample
    ) -> Distilled:
        "The loss of a batch whose student (and teacher) ran already: what trainers call"
        task,teacher = None if task is None else as_plain(task),all_classes(teacher, student)
        context = dict(kind=self.kind, ignore_index=self.ignore_index)
        weights,values = dict(task=self.recipe.task_at(progress)),{}
        if task is None and weights['task']:
            raise DistillError(f"This batch has no labels, but the recipe gives their loss the weight {weights['task']:g}: "
                               "use alpha=1, or soft_labels(), to train from the teacher alone")
        mask = self._mask(student, teacher, targets)
        for t in self.recipe.terms:
            weights[t.name] = w = t.weight_at(progress)
            with torch.set_grad_enabled(torch.is_grad_enabled() and w != 0):
                options = t.options_at(progress, context | self._of_logits(t, mask))
                values[t.name] = self._mixed(t, student, teacher, targets, options, *(mixed or ((), None)))
        if self.balance and torch.is_grad_enabled():
            self.measure_balance({k: v for k,v in [('task', task), *values.items()] if v is not None and v.requires_grad and weights[k]})
            weights = {k: w*self.scales.get(k, 1.) for k,w in weights.items()}
        added = [w*values[k] for k,w in weights.items() if k in values and w != 0]
        # subtle: the labels' part stays in the graph even at weight 0, so that no parameter of the student is without a gradient
        if task is not None and weights['task'] != 1: added.append((weights['task']-1)*task)
        return Distilled(task, sum(added[1:], added[0]) if added else None, {k: v.detach() for k,v in values.items()}, weights)

    def _of_logits(self, term, mask):
        "What only holds for logits: their class axis, and which positions count"
        if term.layers is not None: return {}
        return {'axis': self.axis} if mask is None else {'axis': self.axis, 'mask': mask}

    def _mixed(self, term, s, t, targets, options, others, share):
        "A term's value, also where a batch has two labels a sample"
        if share is None or term.n_targets == 0: return self._value(term, s, t, targets, options)
        if share.numel() > 1:
            if 'reduction' not in term.accepts or term.layers is not None:
                raise DistillError(f"{term.name} reads labels, and MixUp gives each sample two of them: a loss of your own needs the "
                                   "keyword-only option `reduction` ('none': one value per sample) to be mixed. "
                                   "Or use CutMix, whose share is one for the whole batch.")
            options = {**options, 'reduction': 'none'}
        first,other = [self._value(term, s, t, y, options) for y in (targets, others)]
        share = share.to(first).reshape(-1, *[1]*(first.dim()-1)) if share.numel() > 1 else share.to(first).squeeze()
        v = torch.lerp(other, first, share)
        return v.sum()/(v.numel() if options.get('mask') is None else options['mask'].sum()) if v.dim() else v

    def _value(self, term, s, t, targets, options):
        "A term's value: summed over its pairs of layers, as the papers do"
        links,targets = self.links[term.name],targets[:term.n_targets]
        if term.n_targets and len(targets) < term.n_targets:
            raise DistillError(f"{term.name} needs {term.n_targets} target(s) beside student and teacher, this batch has {len(targets)}")
        pairs = [k.tensors(s, t) for k in links]
        if term.lists: return links[0].loss(*map(list, zip(*pairs)), *targets, **term.channels(pairs[0][1]), **options)
        return sum(k.loss(a, b, *targets, **term.channels(b), **options) for k,(a,b) in zip(links, pairs))

    def _mask(self, s, t, targets):
        "Where the labels count, and where both models say that a position counts"
        masks = [m for m in (s.mask, t.mask) if m is not None]
        y = targets[0] if len(targets) else None
        dense = self.kind == 'softmax' and s.logits.dim() > 2 and isinstance(y, Tensor) and not y.is_floating_point()
        if dense and (y == self.ignore_index).any():
            masks.append(as_plain(y) != self.ignore_index)
        return None if not masks else masks[0] if len(masks) == 1 else torch.stack([m.float() for m in masks]).prod(0)

    def measure_balance(
        self, values # of what counts in this batch: the labels' loss ('task') and the terms, by name
    ):
        """Give those that have none yet a factor that makes their gradient as long as the labels' (the first term's, if the labels
        don't count) at the student's last shared layer: with it, weights are shares of the gradient there"""
        if not (new := [k for k in values if k not in self.scales]): return
        norms = self.gradient_norms(values)
        known = next((k for k in values if k in self.scales), new[0])
        for k in new: self.scales[k] = self.scales.get(known, 1.)*norms[known]/norms[k]

    def gradient_norms(self, values):
        "Of each value, at the last parameter of the student that all of them reach"
        # subtle: of matrices and kernels where there are any; a bias in front of a batch-norm has a gradient of rounding errors
        params = [p for p in self.student.parameters() if p.requires_grad]
        params = [p for p in params if p.dim() > 1] or params
        norms = {}
        for k,v in values.items():
            grads = torch.autograd.grad(v, params, retain_graph=True, allow_unused=True)
            norms[k] = [0. if g is None else g.norm().item() for g in grads]
        shared = [i for i in range(len(params)) if all(n[i] > 0 for n in norms.values())]
        if not shared:
            raise DistillError(f"balance='grad': no layer of the student gets a gradient from all of {', '.join(norms)}. "
                               "Weigh them by hand.")
        return {k: n[shared[-1]] for k,n in norms.items()}

    def _links(self, term, pairs, s, t):
        "Of one term: a link for each pair, on the student's device"
        modules = self.teacher.named_modules()
        for p in pairs:
            a,b = s[p.student],t[p.teacher]
            proj = projector(a.shape, b.shape, kind=term.projector, match=term.match, picture=p.picture).to(a.device)
            loss = own_copy(term.loss)
            if hasattr(loss, 'prepare'): loss.prepare(proj.eval()(a, b), b, layer=modules.get(p.teacher.split('@')[0]), **term.channels(b))
            yield Link(loss, (p.student, p.teacher), proj.train()).to(a.device)


def all_classes(teacher, student):
    "Stored outputs may hold the likeliest classes alone: losses want them all"
    if not isinstance(teacher.logits, TopK): return teacher
    return Outputs(teacher.logits.dense(student.logits), teacher.feats, teacher.mask)


def own_copy(loss):
    "A copy of a loss that may have parameters: a recipe can be used again"
    return copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss


def check_kind(term, kind):
    "Refuse a loss over classes for a model that has none, and so on"
    if term.kind not in (None, kind):
        says = dict(softmax='a softmax over classes', sigmoid='a sigmoid per label', regression='numbers')
        raise DistillError(f"{term.name} compares {says[term.kind]}, but this model predicts {says[kind]}. "
                           "Use kd(), which takes the loss that fits (binary_kl for labels, regression for numbers), or your own loss.")


def as_inputs(x):
    "Positional and keyword arguments of a model's call"
    if isinstance(x, dict) or hasattr(x, 'keys'): return (),dict(x)
    return (tuple(x) if isinstance(x, (tuple, list)) else (x,)),{}
