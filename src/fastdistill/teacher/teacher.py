"A teacher in whatever form people have one: frozen while it is asked, and afterwards just as it was before."
import warnings
from contextlib import ExitStack, nullcontext
from functools import wraps
import torch
from torch import nn
import torch.nn.functional as F
from ..features.calls import arguments, is_hf
from ..features.names import named
from ..features.taps import Taps
from ..outputs import DistillError, DistillWarning, Outputs, as_plain, check_output, map_tensors, tensors_in, warn_of_first, warn_of_several
from .draws import OwnDraws, generators
from .ensemble import mix, shares
from .forms import FORMS, Onnx, check_second_argument, is_graph, load_model
from .guest import Guest, cuda_devices
from .hidden import has_reset, why_no_reset
from .images import affine, full_precision, is_image, stats_of

__all__ = ['Teacher']

# options of an ensemble that its members take over, where they were not given others
INHERITED = 'mode','stats','input_stats','size','combine','kind','axis','output'


def records_given(init):
    "Keep the names of the options that were given, as `given`: they count also where they equal the default"
    @wraps(init)
    def call(self, *args, **options):
        self.given = frozenset(options)
        init(self, *args, **options)
    return call


NO_RESET = ("{name} has a method reset() that {why}. It was undone and is not called again; hidden states, if there are any, "
            "are not reset. If it has some, give it a reset() that changes nothing else.")


class Teacher:
    """Answers batches with `Outputs`: without a gradient, in eval mode, on a copy of its input. It is no `nn.Module`, so that it
    never becomes part of what is trained. From `start` to `stop` (or inside `with teacher:`) its modules are as the teacher needs
    them: `stop` puts back modes, buffers, devices and hidden states. A call outside does both by itself: slower, and a hidden
    state does not outlive it. A teacher on the CPU moves to the batch's device; one that lives elsewhere stays, and the batch
    goes there. Answers come back on the batch's device, in the teacher's own precision"""
    @records_given
    def __init__(
        self,
        model, # nn.Module, torch.export program, .pt, .pt2 or .onnx file, callable (its modes are its own affair), a list of these
        *,
        layers=(), # dotted names of layers whose output is wanted too; in an ensemble '0.NAME' is the first member's
        mode:str='eval', # 'train' for papers that need it: dropout draws, batch-norm reads the batch (torch.export programs keep theirs)
        stats=None, # (mean, std) of the images it learnt from, torchvision's weights, 'imagenet', 'auto' (timm's tell); None: as they come
        input_stats=None, # (mean, std) that the batch's images are normalised with; (0, 1) if they are not
        size:int|tuple|None=None, # height and width (one number: a square) that images are resized to
        combine:str='probs', # an ensemble answers with its members' mean probabilities, as logits; or with the mean of their 'logits'
        weights=None, # of an ensemble's members; None: equal
        kind:str='softmax', # what the logits are: 'softmax' over classes, 'sigmoid' per label, or 'regression'
        axis:int=1, # class axis
        select=None, # indices of the classes to answer with, in this order: the teacher's classes put in the student's order
        output=None, # which of several outputs has the logits: a name, an index, or a function of what the model returned; None: the one
        # called 'logits' or 'out', or the first of a tuple
        name:str|None=None
    ):
        options = dict(layers=layers, mode=mode, stats=stats, input_stats=input_stats, size=size, combine=combine, weights=weights,
                       kind=kind, axis=axis, select=select, output=output, name=name)
        self.model = self.path = self.learner = None       # `learner`: where a face keeps what else it knows of the teacher
        self.sources,self.members = [],[]
        self._stack,self._guest,self._by,self._outer,self._draws = None,None,None,[],OwnDraws()
        self._found = model._found if isinstance(model, Teacher) else {}      # what was found out about the model, shared with variations
        if isinstance(model, Teacher):      # a variation on it: what is not given stays
            options = {k: v if k in self.given else getattr(model, k) for k,v in options.items()}
            self.given |= model.given
            self.model,self.path,self.learner,self.sources = model.model,model.path,model.learner,model.sources
        elif isinstance(model, (list, tuple, nn.ModuleList)):
            if not len(model): raise DistillError(f"An empty list of teachers. {FORMS}")
            self.sources = [m if isinstance(m, Teacher) else Teacher(m) for m in model]
        else: self.model,self.path = load_model(model)
        self.__dict__.update(options)
        self.layers,self.name = list(self.layers),self.name or self._name()
        self._check()

    def _check(self):
        for o,have in dict(mode=('eval', 'train'), combine=('probs', 'logits'), kind=('softmax', 'sigmoid', 'regression')).items():
            if (v := getattr(self, o)) not in have: raise DistillError(f"{o}={v!r}: possible are {', '.join(map(repr, have))}")
        if self.sources:
            mine = {k: getattr(self, k) for k in INHERITED if k in self.given}
            self.members = [Teacher(m, **{k: v for k,v in mine.items() if k not in m.given}) for m in self.sources]
            self.weights = shares(self.weights, len(self.members))
        else:
            if self.weights is not None: raise DistillError("weights= are of an ensemble's members, and this is one teacher: give a list")
            self.stats,self.input_stats = stats_of(self.stats, self.model),stats_of(self.input_stats)
        check_output(self.output)
        if isinstance(self.model, Onnx): self._check_onnx()
        if self.size is not None: self.size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        self._check_layers(self.layers)

    def _check_onnx(self):
        self.model = self.model.returning(self.output)
        if self.output is not None or 'several' in self._found: return
        self._found['several'] = True
        if len(alike := self.model.alike()) > 1: warn_of_first(f'The teacher {self.name}', ', '.join(alike))

    def _name(self):
        if self.sources: return f'{len(self.sources)} teachers'
        return self.path.name if self.path else getattr(self.model, '__name__', type(self.model).__name__)

    def __repr__(self): return f'Teacher({self.name})'

    # what is inside

    @property
    def module(self):
        "The nn.Module behind it, or None: a module's method has one, an ONNX file and a function have none"
        return next((o for o in (self.model, getattr(self.model, '__self__', None)) if isinstance(o, nn.Module)), None)

    @property
    def modules(self):
        "All nn.Modules inside (of an ensemble: its members')"
        own = [] if self.module is None else [self.module]
        return own + [o for m in self.members for o in m.modules]

    @property
    def parameters_ids(self):
        "To see whether a student shares parameters with the teacher; a TorchScript's have no lasting ids"
        return {id(p) for m in self.modules if not isinstance(m, torch.jit.ScriptModule) for p in m.parameters()}

    def named_modules(self):
        "Submodules by the names that `layers` takes"
        if self.module is not None: return named(self.module)
        return {f'{i}.{k}': v for i,m in enumerate(self.members) for k,v in m.named_modules().items()}

    @property
    def adapts(self):
        "In words, what is done to the images' normalisation; empty where nothing is"
        if self.members: return '; '.join(dict.fromkeys(filter(None, (m.adapts for m in self.members))))
        if None in (self.stats, self.input_stats) or affine(self.input_stats, self.stats) is None: return ''
        says = lambda st: ', std '.join(' '.join(f'{v:.4g}' for v in o.tolist()) for o in st)
        return f'mean {says(self.input_stats)} -> mean {says(self.stats)}'

    # from start to stop

    @property
    def started(self): return self._stack is not None

    def start(self):
        "Get ready for many batches; a second call changes nothing"
        if not self.started: self._draws = OwnDraws()
        return self._start()

    def _start(self):
        if self.started: return self
        with ExitStack() as stack:
            for m in self.members: stack.enter_context(m)
            if self.module is not None: self._guest = stack.enter_context(Guest(self.module, self.mode))
            if None not in (self.stats, self.input_stats) and not self.members: self._by = affine(self.input_stats, self.stats)
            self._stack = stack.pop_all()
        return self

    def stop(self):
        "Put everything back; safe to call at any time, and twice"
        stack,self._stack,self._guest,self._by = self._stack,None,None,None
        if stack is not None: stack.close()

    def __enter__(self):
        was = self.started
        self.start()
        self._outer.append(was)
        return self

    def __exit__(self, *_):
        if not self._outer.pop(): self.stop()

    @property
    def remembers(self):
        "Whether it has hidden states that `reset` forgets"
        return any(m.remembers for m in self.members) or (has_reset(self.module) and self._resets())

    def _resets(self):
        "Whether the module's `reset` is of hidden states alone; tried once"
        if 'reset' not in self._found:
            why = why_no_reset(self.module)
            self._found['reset'] = why is None
            if why: warnings.warn(NO_RESET.format(name=self.name, why=why), DistillWarning, stacklevel=3)
        return self._found['reset']

    def reset(self):
        "Forget hidden states, as fastai's recurrent models do in `reset`; a `reset` that changes weights is not called"
        for m in self.members: m.reset()
        if not has_reset(self.module) or not self._resets(): return
        with torch.no_grad(), self._draws.own(self._generators()): self.module.reset()

    def _generators(self, x=()):
        "The global random generators that the teacher may draw from"
        return generators({t.device for t in tensors_in(x) if t.is_cuda} | self._cuda(), self._draws_anywhere())

    def _cuda(self):
        if self.module is None: return {d for m in self.members for d in m._cuda()}
        return self._guest.cuda if self.started else cuda_devices(self.module)

    def _draws_anywhere(self):
        # subtle: functions and networks in training mode may draw from Python and NumPy too; in evaluation mode, at most from PyTorch
        if self.members: return any(m._draws_anywhere() for m in self.members)
        return self.mode == 'train' if self.module is not None else self.path is None

    # a file's session, program or script may not pickle, its path does; what is running stays behind
    def __getstate__(self):
        gone = dict(_stack=None, _guest=None, _by=None, _outer=[], _draws=OwnDraws())
        return {**self.__dict__, **gone, **({'model': None} if self.path else {})}

    def __setstate__(self, d):
        self.__dict__.update(d)
        if self.path: self.model = load_model(self.path)[0]
        if isinstance(self.model, Onnx): self.model = self.model.returning(self.output)

    # a batch

    def __call__(
        self,
        *x, # the batch's inputs, whatever the model takes; a dict goes in by name where the model has arguments of these names
        **kw # by name
    ) -> Outputs:
        "The teacher's outputs for a batch"
        return self.outputs(x, kw)

    def outputs(
        self,
        args=(), # the batch's inputs
        kwargs=None, # inputs by name
        layers=() # names of layers that this call reads, in addition to the teacher's own
    ) -> Outputs:
        "The teacher's outputs for a batch, with the layers that this call asks for"
        kwargs = kwargs or {}
        if not self.started:
            try: return self._start().outputs(args, kwargs, layers)
            finally: self.stop()
        with torch.no_grad(), self._draws.own(self._generators((args, kwargs))):
            return self._answer(args, kwargs or {}, list(dict.fromkeys([*self.layers, *layers])))

    def probe(
        self, *x, layers=None, # instead of the teacher's own
        **kw
    ) -> Outputs:
        "One answer that leaves no trace, between two batches of a run either: hidden states and random numbers are as before"
        return Teacher(self, **({} if layers is None else dict(layers=layers)))(*x, **kw)

    def _answer(self, x, kw, layers):
        o = (self._together if self.members else self._alone)(x, kw, layers)
        if self.select is None: return o
        ids,n = torch.as_tensor(self.select),o.logits.shape[self.axis]
        if ids.max() >= n: raise DistillError(f"select={ids.tolist()}: the teacher has {n} classes, 0 to {n-1}, along axis {self.axis}")
        return Outputs(o.logits.index_select(self.axis, ids.to(o.logits.device)), o.feats, o.mask)

    def _together(self, x, kw, layers):
        "An ensemble's answer; its layers have their member's number in front"
        self._check_layers(layers)
        theirs = [[n.partition('.')[2] for n in layers if n.partition('.')[0] == str(i)] for i in range(len(self.members))]
        outs = [m._answer(x, kw, list(dict.fromkeys(m.layers + names))) for m,names in zip(self.members, theirs)]
        feats = {f'{i}.{k}': v for i,o in enumerate(outs) for k,v in o.feats.items()}
        logits = mix([o.logits for o in outs], self.weights, self.combine, self.kind, self.axis)
        return Outputs(logits, feats, next((o.mask for o in outs if o.mask is not None), None))

    def _alone(self, x, kw, layers):
        self._check_layers(layers)
        device = next((t.device for t in tensors_in((x, kw))), torch.device('cpu'))
        if self._guest is not None: self._guest.settle()
        x,kw = self._arrange(x, kw, device)
        with Taps(self.module, layers) if layers and self.module is not None else nullcontext() as taps:
            raw = self.model(*x, **kw)
            if self.output is None: warn_of_several(raw, self.module, f'The teacher {self.name}', self._found)
            o = Outputs.of(raw, output=self.output)
            feats = o.feats if taps is None else {**o.feats, **taps.pop()}
        if taps is None and not set(layers) <= set(feats): raise self._unseen(layers, feats)     # a function's answer brings its own
        return Outputs(*(map_tensors(v, lambda t: plain_output(t, device)) for v in (o.logits, feats, o.mask)))

    def _check_layers(self, layers):
        if not layers: return
        if self.members:
            if wrong := [n for n in layers if n.partition('.')[0] not in map(str, range(len(self.members)))]:
                raise DistillError(f"No layer {wrong[0]!r} in an ensemble of {len(self.members)}: "
                                   "a layer of its first member is called '0.NAME', and so on.")
        elif isinstance(self.model, Onnx) or is_graph(self.module): raise self._unseen(layers)

    def _unseen(self, layers, feats=()):
        return DistillError(f"{self.name} shows only what comes out of it ({', '.join(feats) or 'no layers'}), so {', '.join(layers)} "
                            "can't be read. Give the nn.Module that it was made from, or a function that returns Outputs(logits, feats).")

    # its input

    def _arrange(self, x, kw, device):
        "The batch as the teacher needs it: by name or position, on its device, in its precision, in its normalisation and size"
        x,kw = arguments(self.model, x, kw)
        if len(x) > 1 and is_hf(self.model) and not self._guest.seen: check_second_argument(self.model, *x[:2])
        self._check_images([t for t in tensors_in((x, kw)) if is_image(t)])
        dtype = None
        if self._guest is not None: device,dtype,self._guest.seen = self._guest.place(device),self._guest.dtype,True
        return map_tensors((x, kw), lambda t: self._fit(t, device, dtype))

    def _check_images(self, images):
        if self.stats is not None and self.input_stats is None and images:
            raise DistillError("stats= says what images the teacher learnt from, but not what these are normalised with: "
                               "say input_stats=(mean, std), or input_stats=(0, 1) if they are not normalised.")
        if self._by is None: return
        if not images: raise DistillError("stats= is for images, float tensors of shape (B, C, H, W): this batch has none. Leave it out.")
        n = len(self._by[0])
        if wrong := [t for t in images if n not in (1, t.shape[1])]:
            raise DistillError(f"stats= are of {n} channels, the images have shape {tuple(wrong[0].shape)}: "
                               "give one mean and std for each channel, or stats=None.")

    def _fit(self, x, device, dtype):
        plain = as_plain(x)
        t = plain.to(device)
        if is_image(t) and (self._by is not None or self.size is not None):
            t = full_precision(t)
            if self._by is not None: t = t*self._by[0].to(t) + self._by[1].to(t)
            if self.size not in (None, tuple(t.shape[2:])): t = F.interpolate(t, self.size, mode='bilinear', antialias=True)
        if dtype is not None and t.is_floating_point(): t = t.to(dtype)
        # subtle: a copy, for a network that works in place on its input would change the student's batch
        return t.clone() if t is plain else t


def plain_output(t, device):
    "What a model gave, as a plain tensor that losses can save for their backward pass"
    t = as_plain(t).detach().to(device)
    return t.clone() if t.is_inference() else t
