"A teacher in any common form: frozen while it predicts, unchanged afterwards."

import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import wraps

import torch
from torch import nn

from ..base.class_mapping import class_groups, of_classes
from ..base.outputs import (
    DistillError,
    DistillWarning,
    Outputs,
    as_plain,
    check_axis,
    check_output,
    map_tensors,
    tensors_in,
    warn_of_first,
    warn_of_several,
)
from ..features.calls import arguments, is_hf
from ..features.layer_names import named
from ..features.layer_pairs import names_of_tokens
from ..features.taps import Taps
from .ensemble import member_weights, mix
from .estimator import Estimator
from .fast_copy import AS_IT_IS, OPTIONS, check_speed
from .forms import FORMS, Onnx, check_second_argument, explained, is_graph, load_model
from .frozen import cuda_devices
from .hidden_state import NO_RESET, has_reset, why_no_reset
from .images import affine, check_images, fit_images, is_image, maps_of_size, stats_of
from .probabilities import check_probabilities, logits_of
from .rng_stream import OwnDraws, generators
from .running import Running
from .slices import in_slices, joined, plain_output

__all__ = ['Teacher']

POSSIBLE = dict(
    mode=('eval', 'train'),
    combine=('probs', 'logits', 'sample'),
    kind=('softmax', 'sigmoid', 'regression'),
    outputs=('logits', 'probs'),
)

# a member of an ensemble takes these options from the ensemble, unless it was given its own
INHERITED = (
    'mode',
    'stats',
    'input_stats',
    'size',
    'combine',
    'kind',
    'axis',
    'output',
    'outputs',
    'inputs',
    'items',
    'device',
    'batch',
    *OPTIONS,
)


def records_given(init):
    """Store the names of the options that were given as `given`, even if a value equals the
    default.
    """

    @wraps(init)
    def call(self, *args, **options):
        self.given = frozenset(options)
        init(self, *args, **options)

    return call


class Teacher(Running):
    """Runs a model on batches and returns `Outputs`: without a gradient, in eval mode. The inputs
    stay as they are. It is not an `nn.Module`, so it never becomes part of a model that is trained.

    `with teacher:` (or `start` and `stop`) around a loop prepares the model once. At the end it
    restores the model's modes, buffers, device and hidden states. A call outside of it does both
    itself: this is slower, and a hidden state does not last.

    A model on the CPU moves to the batch's device. A model on another device stays there, and the
    batch moves to it. The outputs are on the batch's device, in the model's precision. The model
    draws its own random numbers.

    Args:
        model: nn.Module, torch.export program, .pt, .pt2 or .onnx file, callable, estimator
            with `predict_proba` or `predict` (scikit-learn, LightGBM, XGBoost, CatBoost), or a
            list of these (an ensemble).
        layers: Dotted names of the layers to read; in an ensemble '0.NAME' is a layer of its
            first member.
        mode: 'train' for papers that need it; torch.export programs and callables keep their
            mode.
        stats: The teacher's image normalization: (mean, std), torchvision's weights,
            'imagenet', 'auto' (timm).
        input_stats: (mean, std) with which the batch's images are normalized; (0, 1) if they
            are not.
        size: Height and width to which images are resized; one number: a square. Logits that
            are maps of this size are resized to that of the batch's images.
        combine: An ensemble's outputs: the mean of its members' 'probs', as logits, or of their
            'logits'; 'sample': those of one member, drawn for each batch.
        weights: Of an ensemble's members, or their probabilities to be drawn; None: equal.
        kind: What the logits are: 'softmax' over classes, 'sigmoid' per label, or 'regression'.
        axis: Class axis.
        select: The teacher's classes to return, in the student's order: numbers, or lists of
            numbers, whose probabilities are summed (see docs/classes.md).
        classes: Of a teacher with other classes: the student's class, or list of classes, that
            each output is about (see docs/classes.md); None: the same as the student's.
        output: The output with the logits: a name, index or function; None: 'logits', 'out', or
            a tuple's first.
        outputs: What the model returns: 'logits', or 'probs', the probabilities of classes or
            labels, as estimators do.
        inputs: fn(*inputs of a batch) -> the teacher's own: a tensor, a tuple or a dict, as of
            another tokenizer.
        items: In fastai, the same from the raw items: fn(a list, or rows of a DataFrame) -> the
            teacher's own.
        frame: Of an estimator, in fastai: the table that the DataLoaders were made from (see
            docs/trees.md).
        name: In messages; None: the name of the file or of the class.
        precision: 'bf16', 'fp16'; 'fp32': the model's own; 'auto': bf16 if the processor
            computes in it, the model is large and its outputs stay close.
        compile: True, False; 'auto': if the run is long enough to earn the time back.
        memory_format: 'channels_last'; None: as it is; 'auto': channels_last for large
            convolutional models.
        fold_bn: True, False; 'auto': batch-norms of a large model become part of the
            convolution before them.
        device: Where the teacher runs; None: see above.
        batch: Rows that run at once, where memory is short; None: all rows of a batch.
    """

    @records_given
    def __init__(
        self,
        model,
        *,
        layers=(),
        mode: str = 'eval',
        stats=None,
        input_stats=None,
        size: int | tuple | None = None,
        combine: str = 'probs',
        weights=None,
        kind: str = 'softmax',
        axis: int = 1,
        select=None,
        classes=None,
        output=None,
        outputs: str = 'logits',
        inputs=None,
        items=None,
        frame=None,
        name: str | None = None,
        precision: str = 'auto',
        compile='auto',
        memory_format='auto',
        fold_bn='auto',
        device=None,
        batch: int | None = None,
    ):
        options = dict(
            layers=layers,
            mode=mode,
            stats=stats,
            input_stats=input_stats,
            size=size,
            combine=combine,
            weights=weights,
            kind=kind,
            axis=axis,
            select=select,
            classes=classes,
            output=output,
            outputs=outputs,
            inputs=inputs,
            items=items,
            frame=frame,
            name=name,
            precision=precision,
            compile=compile,
            memory_format=memory_format,
            fold_bn=fold_bn,
            device=device,
            batch=batch,
        )
        self.model = self.path = self.learner = (
            None  # fastdistill.fastai keeps the teacher's Learner as `learner`
        )
        self.sources, self.members, self._was_started = [], [], []
        self._stack, self._guest, self._scaling, self._draws = None, None, None, OwnDraws()
        self._batches = None  # to come in this run, if that is known
        # facts about the model that were found while it ran; variations share them
        self._found = model._found if isinstance(model, Teacher) else {}
        if isinstance(
            model, Teacher
        ):  # a variation: it takes the options that are not given from `model`
            options = {k: v if k in self.given else model.option(k) for k, v in options.items()}
            self.given |= model.given
            self.model, self.path, self.learner, self.sources = (
                model.model,
                model.path,
                model.learner,
                model.sources,
            )
        elif isinstance(model, (list, tuple, nn.ModuleList)):
            if not len(model):
                raise DistillError(f'An empty list of teachers. {FORMS}')
            self.sources = [m if isinstance(m, Teacher) else Teacher(m) for m in model]
        else:
            self.model, self.path = load_model(model)
        self.returns = options.pop('outputs')  # `outputs` is a method
        self.__dict__.update(options)
        self.layers, self.name = list(self.layers), self.name or self._name()
        self._check()

    def option(self, name: str):
        """The value of an option.

        Args:
            name: Of an option of `Teacher`
        """
        return self.returns if name == 'outputs' else getattr(self, name)

    def _check(self):
        for o, have in POSSIBLE.items():
            if (v := self.option(o)) not in have:
                raise DistillError(f'{o}={v!r}: must be one of {", ".join(map(repr, have))}')
        if self.sources:
            mine = {k: self.option(k) for k in INHERITED if k in self.given}
            self.members = [
                Teacher(m, **{k: v for k, v in mine.items() if k not in m.given})
                for m in self.sources
            ]
            self.weights = member_weights(self.weights, len(self.members))
        else:
            if self.weights is not None:
                raise DistillError(
                    'weights= is for the members of an ensemble, but this is one teacher: give a list'
                )
            self.stats, self.input_stats = (
                stats_of(self.stats, self.model),
                stats_of(self.input_stats),
            )
        check_output(self.output)
        self._check_own_inputs()
        check_speed(self._speed_options | dict(batch=self.batch), self.model)
        check_device(self.device)
        check_axis(self.axis)
        self.select = class_groups(self.select, 'select')
        self.classes = class_groups(self.classes, 'classes', disjoint=True)
        if isinstance(self.model, Onnx):
            self._check_onnx()
        if isinstance(self.model, Estimator):
            self._take_estimator()
        elif self.frame is not None:
            raise DistillError(
                f'frame= is the table of an estimator (scikit-learn, LightGBM ...), but {self.name} is '
                'none.'
            )
        if self.size is not None:
            self.size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        self._check_layers(self.layers)

    def _check_onnx(self):
        self.model = self.model.returning(self.output)
        if self.output is not None or 'several' in self._found:
            return
        self._found['several'] = True
        if len(alike := self.model.alike()) > 1:
            warn_of_first(f'The teacher {self.name}', ', '.join(alike))

    def _take_estimator(self):
        self.model = self.model.of_kind(self.kind)
        self.model.frame = self.frame
        if 'outputs' not in self.given:
            self.returns = 'logits' if self.kind == 'regression' else 'probs'

    def _name(self):
        if self.sources:
            return f'{len(self.sources)} teachers'
        return (
            self.path.name
            if self.path
            else getattr(self.model, '__name__', type(self.model).__name__)
        )

    def __repr__(self):
        how = [str(self._speed or ''), '' if self.batch is None else f'{self.batch} rows at once']
        return f'Teacher({": ".join(filter(None, [self.name, ", ".join(filter(None, how))]))})'

    # its modules

    @property
    def module(self):
        """The nn.Module that runs: the model itself, or that of a bound method; None for an ONNX
        file and a function.
        """
        return next(
            (
                o
                for o in (self.model, getattr(self.model, '__self__', None))
                if isinstance(o, nn.Module)
            ),
            None,
        )

    @property
    def modules(self):
        """The nn.Modules of the teacher, or of an ensemble's members."""
        return [o for o in (self.module,) if o is not None] + [
            o for m in self.members for o in m.modules
        ]

    @property
    def parameters_ids(self):
        """Ids of the parameters, to find those that a student shares. TorchScript's parameters have
        no lasting ids.
        """
        return {
            id(p)
            for m in self.modules
            if not isinstance(m, torch.jit.ScriptModule)
            for p in m.parameters()
        }

    def named_modules(self):
        """Name, as in `layers` -> submodule."""
        if self.module is not None:
            return named(self.module)
        return {
            f'{i}.{k}': v for i, m in enumerate(self.members) for k, v in m.named_modules().items()
        }

    @property
    def adapts(self):
        """How the normalization of the images is changed, as text; empty if it is not."""
        if self.members:
            return '; '.join(dict.fromkeys(filter(None, (m.adapts for m in self.members))))
        if None in (self.stats, self.input_stats) or affine(self.input_stats, self.stats) is None:
            return ''
        text = lambda stats: ', std '.join(' '.join(f'{v:.4g}' for v in o.tolist()) for o in stats)
        return f'mean {text(self.input_stats)} -> mean {text(self.stats)}'

    @property
    def known_classes(self):
        """The student's class, or list of classes, that each output is about; None: the same as the
        student's.
        """
        return self.classes or next(
            (m.known_classes for m in self.members if m.known_classes is not None), None
        )

    # from start to stop

    @property
    def started(self):
        return self._stack is not None

    def start(self):
        """Prepare the model for many batches, and begin a new stream of random numbers; a second
        call changes nothing.
        """
        if not self.started:
            self._draws = OwnDraws()
        return self._start()

    def _start(self):
        if self.started:
            return self
        with ExitStack() as stack:
            for m in self.members:
                stack.enter_context(m)
            if self._speed is not None and self._speed.is_stale(thorough=True):
                self._speed.restart()
            if self.runs is not None:
                self._guest = stack.enter_context(self._new_guest())
            if None not in (self.stats, self.input_stats) and not self.members:
                self._scaling = affine(self.input_stats, self.stats)
            self._stack = stack.pop_all()
        return self

    def stop(self):
        """Restore the model; may be called at any time, and twice."""
        stack, self._stack, self._guest, self._scaling, self._batches = (
            self._stack,
            None,
            None,
            None,
            None,
        )
        if stack is not None:
            stack.close()

    def __enter__(self):
        was = self.started
        self.start()
        self._was_started.append(was)
        return self

    def __exit__(self, *_):
        if not self._was_started.pop():
            self.stop()

    @property
    def remembers(self):
        """Does `reset` do anything? True if a model has hidden states that it may reset."""
        return any(m.remembers for m in self.members) or (has_reset(self.module) and self._resets())

    def _resets(self):
        """Does the module's own `reset` change only hidden states? One trial shows it."""
        if 'reset' not in self._found:
            why = why_no_reset(self.module)
            self._found['reset'] = why is None
            if why:
                warnings.warn(
                    NO_RESET.format(name=self.name, why=why), DistillWarning, stacklevel=3
                )
        return self._found['reset']

    def reset(self):
        """Reset hidden states by the model's own method `reset`, if it has one and if that changes
        no weights.
        """
        for m in self.members:
            m.reset()
        if not has_reset(self.module) or not self._resets():
            return
        with torch.no_grad(), self._draws.own(self._generators()):
            self.runs.reset()

    def _generators(self, x=()):
        """The global random generators from which the teacher may draw."""
        return generators(
            {t.device for t in tensors_in(x) if t.is_cuda} | self._cuda(), self._draws_anywhere()
        )

    def _cuda(self):
        if self.module is None:
            return {d for m in self.members for d in m._cuda()}
        return self._guest.cuda if self.started else cuda_devices(self.module)

    def _draws_anywhere(self):
        """May it draw from Python and NumPy too? Functions and models in train mode may."""
        if self.members:
            return any(m._draws_anywhere() for m in self.members)
        return self.mode == 'train' if self.module is not None else self.path is None

    # a model from a file is pickled as its path, since ONNX sessions and programs may not pickle. A copy is not started
    def __getstate__(self):
        fresh = dict(
            _stack=None,
            _guest=None,
            _scaling=None,
            _was_started=[],
            _draws=OwnDraws(),
            _batches=None,
            _found={k: v for k, v in self._found.items() if k not in ('speed', 'say')},
        )
        return {**self.__dict__, **fresh, **({'model': None} if self.path else {})}

    def __setstate__(self, d):
        self.__dict__.update(d)
        if self.path:
            self.model = load_model(self.path)[0]
        if isinstance(self.model, Onnx):
            self.model = self.model.returning(self.output)

    # a batch

    def __call__(self, *x, **kw) -> Outputs:
        """The teacher's outputs for a batch.

        Args:
            *x: The batch's inputs; a dict is passed by name if the model has arguments of these
                names.
            **kw: Inputs by name.
        """
        return self.outputs(x, kw)

    def outputs(self, args=(), kwargs=None, layers=()) -> Outputs:
        """The teacher's outputs for a batch, including the layers that this call names.

        Args:
            args: The batch's inputs.
            kwargs: Inputs by name.
            layers: Names of layers that this call reads, in addition to the teacher's own.
        """
        kwargs = kwargs or {}
        if not self.started:
            try:
                return self._start().outputs(args, kwargs, layers)
            finally:
                self.stop()
        with torch.no_grad(), self._draws.own(self._generators((args, kwargs))):
            return self._outputs(args, kwargs, list(dict.fromkeys([*self.layers, *layers])))

    def probe(self, *x, layers=None, **kw) -> Outputs:
        """The outputs for a batch. Hidden states and random numbers do not change, even in the
        middle of a run.

        Args:
            layers, *x: Instead of the teacher's own.
        """
        return Teacher(self, **({} if layers is None else dict(layers=layers)))(*x, **kw)

    def as_it_is(self) -> 'Teacher':
        """The same teacher, but what runs is the model itself and never a faster copy of it.
        Whatever hooks the modules of `named_modules` to look at layers runs this one.
        """
        t = Teacher(self, **AS_IT_IS, device=None)
        t.members = [m.as_it_is() for m in t.members]
        return t

    def reading_tokens(self, *x) -> 'Teacher':
        """The teacher for stored outputs: it reads a series (B, C, L), as a 1d convolution returns
        it, as tokens (B, L, C), since stored features do not show where their channels are.

        Args:
            *x: Inputs of a batch.
        """
        names = names_of_tokens(self, x, self.layers) if self.layers else []
        return self if names == self.layers else Teacher(self, layers=names)

    def _outputs(self, x, kw, layers):
        self._check_layers(layers)
        o = (self._outputs_of_members if self.members else self._outputs_of_model)(x, kw, layers)
        return of_classes(o, self.select, self.classes, self.axis, self.kind)

    def _outputs_of_members(self, x, kw, layers):
        """The outputs of an ensemble; names of layers begin with the member's number."""
        if self.combine == 'sample':
            return self._outputs_of_one(x, kw, layers)
        names = lambda i: [n.partition('.')[2] for n in layers if n.partition('.')[0] == str(i)]
        outs = [
            m._outputs(x, kw, list(dict.fromkeys(m.layers + names(i))))
            for i, m in enumerate(self.members)
        ]
        feats = {f'{i}.{k}': v for i, o in enumerate(outs) for k, v in o.feats.items()}
        logits = mix([o.logits for o in outs], self.weights, self.combine, self.kind, self.axis)
        if any(o.classes != outs[0].classes for o in outs):
            raise DistillError(
                'The members of the ensemble are about different classes: classes= must be equal.'
            )
        return Outputs(
            logits, feats, next((o.mask for o in outs if o.mask is not None), None), outs[0].classes
        )

    def _outputs_of_one(self, x, kw, layers):
        """The outputs of a member that is drawn."""
        if layers:
            raise DistillError(
                "combine='sample' runs one member, so layers of all can't be compared: use terms "
                "on the outputs, or combine='probs'."
            )
        return self.members[torch.multinomial(torch.tensor(self.weights), 1).item()]._outputs(
            x, kw, []
        )

    def _outputs_of_model(self, x, kw, layers):
        device = next((t.device for t in tensors_in((x, kw))), torch.device('cpu'))
        batch_size = next((tuple(t.shape[2:]) for t in tensors_in((x, kw)) if is_image(t)), None)
        x, kw = self.own_inputs(x, kw)
        slices = in_slices(x, kw, self.batch)
        if self._speed is not None:
            self._choose_speed(*slices[0], layers, device)
        if self._guest is not None:
            self._guest.settle()
        if self._batches is not None:
            self._batches -= 1
        o = joined([self._slice(*o, layers, device) for o in slices])
        return (
            o
            if self.size is None
            else replace(o, logits=maps_of_size(o.logits, self.size, batch_size))
        )

    def _slice(self, x, kw, layers, device):
        """The outputs of rows that run at once."""
        x, kw, marks = self._lent(x, kw, device, layers)
        with (
            Taps(self.runs, layers) if layers and self.module is not None else nullcontext() as taps
        ):
            with explained(self.name, (x, kw), self.module):
                raw = (
                    self.model(*x, **kw)
                    if self._speed is None
                    else self._speed.run(x, kw, layers, self._batches)
                )
            if self.output is None:
                warn_of_several(raw, self.module, f'The teacher {self.name}', self._found)
            o = Outputs.of(raw, output=self.output)
            feats = o.feats if taps is None else {**o.feats, **taps.pop()}
            logits = self._logits(o.logits)
        self._judge(marks, layers, (logits, feats, o.mask))
        # a function has no layers, but it may return features of that name
        if taps is None and not set(layers) <= set(feats):
            raise self._unreadable(layers, feats)
        dtype = None if self._speed is None else self._speed.cast_back
        return Outputs(
            *(
                map_tensors(v, lambda t: plain_output(t, device, dtype))
                for v in (logits, feats, o.mask)
            ),
            o.classes,
        )

    def _logits(self, v):
        """The logits of what the model returned."""
        if self.returns == 'logits':
            return v
        if (checked := ('probs', self.kind, self.axis)) not in self._found:
            check_probabilities(v, self.kind, self.axis, self.name)
            self._found[checked] = True
        return logits_of(v, self.kind)

    def _check_layers(self, layers):
        if not layers:
            return
        if self.members:
            if wrong := [
                n for n in layers if n.partition('.')[0] not in map(str, range(len(self.members)))
            ]:
                raise DistillError(
                    f'No layer {wrong[0]!r} in an ensemble of {len(self.members)}: '
                    "a layer of its first member is called '0.NAME', of its second '1.NAME', and so on."
                )
        elif isinstance(self.model, Onnx) or is_graph(self.module):
            raise self._unreadable(layers)

    def _unreadable(self, layers, feats=()):
        return DistillError(
            f"Layers {', '.join(layers)} of {self.name} can't be read, only the layers that it returns "
            f'({", ".join(feats) or "none"}). Give the nn.Module that it was made from, or a function '
            'that returns Outputs(logits, feats).'
        )

    # its inputs

    def _prepare(self, x, kw, device, lend=False):
        """The inputs by name or position, on the model's device and in its precision. Images get
        its normalization, size.
        """
        x, kw = arguments(self.model, x, kw)
        if len(x) > 1 and is_hf(self.model) and not self._guest.has_run:
            check_second_argument(self.model, *x[:2])
        check_images(
            [t for t in tensors_in((x, kw)) if is_image(t)],
            self.stats,
            self.input_stats,
            self._scaling,
        )
        dtype = None
        if self._guest is not None:
            device, dtype, self._guest.has_run = self._guest.place(device), self._guest.dtype, True
        return map_tensors((x, kw), lambda t: self._prepare_tensor(t, device, dtype, lend))

    def _prepare_tensor(self, x, device, dtype, lend):
        t = (plain := as_plain(x)).to(device)
        if is_image(t):
            t = fit_images(t, self._scaling, self.size)
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        # subtle: a copy, since a model that changes its input in place would change the student's batch
        return t.clone() if t is plain and not (lend and self._may_lend(t)) else t


def check_device(device):
    """Refuse a device that is not there, on which the teacher would not run."""
    if device is None:
        return
    try:
        if torch.empty(0, device=device).device.type == 'meta':
            raise RuntimeError('it holds no values')
    # subtle: PyTorch has no common error for an unknown device and one that is not there
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ValueError) as e:
        raise DistillError(
            f"device={device!r}: this device can't be used here ({str(e).splitlines()[0]}). Omit "
            'device=, and the teacher follows the batches to theirs.'
        ) from e
