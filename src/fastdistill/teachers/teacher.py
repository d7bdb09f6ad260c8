"""The class `Teacher`, which runs a model of any common form without changing it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..base.batch_samples import BatchSamples
from ..base.class_mapping import class_groups
from ..base.distributed import rank
from ..base.errors import check_choice, options_of_group
from ..base.outputs import DistillError, Outputs, check_axis, check_output, warn_of_first
from ..base.random_state import RandomStream
from ..features.layer_names import named
from ..features.layer_pairs import names_of_tokens
from .ensemble import EnsembleRunner, member_weights
from .estimator import Estimator
from .fast_copy import AS_IT_IS, DEFAULTS, check_run
from .image_normalization import affine, stats_of
from .model_loading import FORMS, Onnx, load_model
from .raw_items import as_in_batch, with_items
from .runner import ModelRunner
from .teacher_inputs import check_own_inputs

POSSIBLE = dict(
    mode=('eval', 'train'),
    combine=('probs', 'logits', 'sample'),
    kind=('softmax', 'sigmoid', 'regression'),
    outputs=('logits', 'probs'),
)

# {group of options: options that are attributes of a `Teacher`}. The group `run` has more options
GROUPS = dict(
    images=('stats', 'input_stats', 'size'), ensemble=('combine', 'weights'), run=('mode',)
)
# default values of the options in groups
UNLESS_GIVEN: dict[str, Any] = dict(
    stats=None, input_stats=None, size=None, combine='probs', weights=None, mode='eval', run={}
)

# options of an ensemble that its members do not inherit
OWN = 'weights', 'select', 'classes', 'layers', 'frame', 'name', 'run'


def ungrouped_options(options: dict) -> dict:
    """Flatten the groups in the arguments of `Teacher`."""
    out = {k: v for k, v in options.items() if k not in GROUPS}
    for group, names in GROUPS.items():
        if options.get(group) is None:
            continue
        have = (*DEFAULTS, *names) if group == 'run' else names
        given = options_of_group(group, options[group], have)
        out |= {k: v for k, v in given.items() if k in names}
        if group == 'run':
            out['run'] = {k: v for k, v in given.items() if k not in names}
    return out


def grouped_options(options: dict) -> dict:
    """Convert flat options to the grouped arguments of `Teacher`."""
    out = {k: v for k, v in options.items() if k not in UNLESS_GIVEN}
    for group, names in GROUPS.items():
        own = {k: options[k] for k in names if k in options}
        if group == 'run':
            own |= options.get('run') or {}
        if own or group in options:
            out[group] = own
    return out


def records_given(init: Callable) -> Callable:
    """Record the names of the options that were passed to `init` in the attribute `given`."""

    @wraps(init)
    def call(self: Any, *args: Any, **options: Any) -> None:
        self.given = frozenset(ungrouped_options(options))
        init(self, *args, **options)

    return call


class Teacher:
    """A model that runs without gradients and returns `Outputs`.

    By default, the model runs in evaluation mode. The inputs are not changed. A `Teacher` is not an
    `nn.Module`, so it never becomes part of a trained model.

    To run many batches, use `with teacher:` (or `start` and `stop`) around the loop. The model is
    then prepared once, and its modes, buffers, device and hidden states are restored at the end.
    Without such a context, each call prepares and restores the model, which is slower, and hidden
    states do not persist between batches.

    A model on the CPU moves to the device of the batch. If the model is on a different device, the
    batch moves to that device. The outputs are on the device of the batch, in the precision of the
    model. The model has its own random state.

    Args:
        model: nn.Module, torch.export program, .pt, .pt2 or .onnx file, callable, estimator with
            `predict_proba` or `predict` (scikit-learn, LightGBM, XGBoost, CatBoost), or a list of
            these, which becomes an ensemble.
        kind: Kind of the logits: 'softmax' over classes, 'sigmoid' per label, or 'regression'.
        axis: Class axis.
        select: Classes of the teacher to return, in the student's order. Each entry is a class
            index, or a list of indices whose probabilities are summed (see docs/classes.md).
        classes: For a teacher with different classes, the student's class or list of classes for
            each output (see docs/classes.md). None if the classes are the same.
        layers: Dotted names of the layers to read. In an ensemble, '0.NAME' is a layer of the first
            member.
        output: Which output holds the logits: a name, an index or a function. If None, use
            'logits', 'out', or the first element of a tuple.
        outputs: Type of the output: 'logits', or 'probs' for probabilities of classes or labels, as
            estimators return.
        inputs: fn(*inputs of a batch) -> inputs of the teacher, as a tensor, a tuple or a dict.
            Useful e.g. for a different tokenizer.
        items: For fastai, fn(raw items of a batch) -> inputs of the teacher. The raw items are a
            list, or rows of a DataFrame. The inputs are tensors, or arrays or lists with a row for
            each item. An estimator or a function may take anything, such as texts.
        frame: For an estimator in fastai, the table from which the DataLoaders were created (see
            docs/trees.md).
        images: Options for preparing images, as a dict.

            - 'stats': normalization of the teacher's training images: (mean, std), torchvision
              weights, 'imagenet' or 'auto' (timm).
            - 'input_stats': (mean, std) with which the images of the batch are normalized. Pass (0,
              1) if they are not normalized.
            - 'size': height and width to which images are resized, or one number for a square.
              Logit maps of this size are resized to the size of the batch's images.
        ensemble: Options for combining the outputs of a list of teachers, as a dict.

            - 'combine': 'probs' (default) averages the probabilities and returns logits. 'logits'
              averages the logits. 'sample' draws one member for each batch.
            - 'weights': weights of the members, or their probabilities with 'sample'. None for
              equal weights.
        name: Name in messages. If None, use the name of the file or class.
        run: Options for running the model, as a dict (see docs/speed.md).

            - 'precision': 'bf16', 'fp16', 'fp32' (the precision of the model), or 'auto' (default).
              'auto' uses bf16 if the processor supports it, the model is large and the outputs are
              close.
            - 'memory_format': 'channels_last', None (unchanged), or 'auto' (default).
            - 'fold_bn': True to fold each batch norm into the preceding convolution, False, or
              'auto' (default). 'auto' changes only large models.
            - 'compile': True to use `torch.compile`.
            - 'device': device of the teacher. If None, the device is chosen as described above.
            - 'batch': number of rows that run at once, to save memory. None for all rows of a
              batch.
            - 'mode': 'eval' (default), or 'train' for methods that need it. Callables and
              torch.export programs keep their mode.
    """

    # `__init__` sets these options through `__dict__`
    mode: str | None
    combine: str
    stats: Any
    input_stats: Any
    size: Any
    weights: Any
    run: dict[str, Any]
    kind: str
    axis: int
    select: Any
    classes: Any
    layers: list[str]
    output: str | int | Callable | None
    inputs: Callable | None
    items: Callable | None
    frame: Any
    name: str
    given: frozenset[str]  # names of the options that were passed
    learner: Any  # set by fastdistill.fastai

    @records_given
    def __init__(
        self,
        model: Any,
        *,
        kind: str = 'softmax',
        axis: int = 1,
        select: Sequence | None = None,
        classes: Sequence | Mapping | None = None,
        layers: Sequence[str] = (),
        output: str | int | Callable | None = None,
        outputs: str = 'logits',
        inputs: Callable | None = None,
        items: Callable | None = None,
        frame: Any = None,
        images: Mapping | None = None,
        ensemble: Mapping | None = None,
        name: str | None = None,
        run: Mapping | None = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ('self', 'model')}
        options = UNLESS_GIVEN | ungrouped_options(given)
        self.model: Any = None
        self.path: Any = None
        self.learner = None
        self.sources: list[Teacher] = []
        self.members: list[Teacher] = []
        self.random = RandomStream()
        self._runner: Any = None
        self._was_started: list[bool] = []
        # facts about the model found while it ran, shared by all variants of this teacher
        self._facts: dict[str, Any] = model._facts if isinstance(model, Teacher) else {}
        if isinstance(model, Teacher):
            # create a variant: options that are not given are copied from `model`
            check_run(options['run'], None)
            options = {k: v if k in self.given else option_of(model, k) for k, v in options.items()}
            options['run'] = model.run | options['run']
            self.given |= model.given
            self.model, self.path, self.learner = model.model, model.path, model.learner
            self.sources = model.sources
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

    def with_defaults(self, **options: Any) -> 'Teacher':
        """Return a teacher that uses these values for all options that were not given explicitly.

        Keys of `run` are treated individually. If nothing changes, the teacher itself is returned.

        Args:
            **options: As in `Teacher`, but without groups: `stats=`, not `images=dict(stats=...)`.
        """
        run = {**(options.pop('run', None) or {}), **self.run}
        new = {k: v for k, v in options.items() if k not in self.given}
        if run != self.run:
            new['run'] = run
        return Teacher(self, **grouped_options(new)) if new else self

    def _check(self) -> None:
        for o, have in POSSIBLE.items():
            check_choice(o, option_of(self, o), have)
        if self.sources:
            mine = {k: v for k, v in given_options(self).items() if k not in OWN}
            self.members = [Teacher(m).with_defaults(**mine, run=self.run) for m in self.sources]
            self.weights = member_weights(self.weights, len(self.members))
        else:
            if self.weights is not None:
                raise DistillError(
                    'weights= is for the members of an ensemble, but this is one teacher: give a list'
                )
            self.stats = stats_of(self.stats, self.model)
            self.input_stats = stats_of(self.input_stats)
        check_output(self.output)
        check_own_inputs(self.inputs, self.items)
        check_run(self.run, self.model)
        check_axis(self.axis)
        self.select = class_groups(self.select, 'select')
        self.classes = class_groups(self.classes, 'classes', disjoint=True)
        if isinstance(self.model, Onnx):
            self.model = self.model.returning(self.output)
            if self.output is None and 'several' not in self._facts:
                self._facts['several'] = True
                if len(alike := self.model.alike()) > 1:
                    warn_of_first(f'The teacher {self.name}', ', '.join(alike))
        if isinstance(self.model, Estimator):
            self.model = self.model.of_kind(self.kind)
            self.model.frame = self.frame
            if 'outputs' not in self.given:
                self.returns = 'logits' if self.kind == 'regression' else 'probs'
        elif self.frame is not None:
            raise DistillError(
                f'frame= is the table of an estimator (scikit-learn, LightGBM ...), but {self.name} is '
                'not an estimator.'
            )
        if self.size is not None:
            self.size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        self.runner.check_layers(self.layers)

    def _name(self) -> str:
        if self.sources:
            return f'{len(self.sources)} teachers'
        if self.path:
            return self.path.name
        return getattr(self.model, '__name__', type(self.model).__name__)

    def __repr__(self) -> str:
        batch = self.run.get('batch')
        how = [str(self.runner.fast_copy or ''), '' if batch is None else f'{batch} rows at once']
        return f'Teacher({": ".join(filter(None, [self.name, ", ".join(filter(None, how))]))})'

    # the modules of the model

    @property
    def module(self) -> nn.Module | None:
        """The nn.Module of the model, or None for an ONNX file or a function.

        For a bound method, the result is the nn.Module to which the method belongs.
        """
        own = self.model, getattr(self.model, '__self__', None)
        return next((o for o in own if isinstance(o, nn.Module)), None)

    @property
    def modules(self) -> list[nn.Module]:
        """The nn.Module of the teacher, or those of all members of an ensemble, as a list."""
        own = [] if self.module is None else [self.module]
        return own + [o for m in self.members for o in m.modules]

    def named_modules(self) -> dict[str, nn.Module]:
        """Return {name as in `layers`: submodule}."""
        if self.module is not None:
            return named(self.module)
        return {
            f'{i}.{k}': v for i, m in enumerate(self.members) for k, v in m.named_modules().items()
        }

    @property
    def adapts(self) -> str:
        """Text that describes how the normalization of images is changed, or '' if it is not
        changed.
        """
        if self.members:
            return '; '.join(dict.fromkeys(filter(None, (m.adapts for m in self.members))))
        if None in (self.stats, self.input_stats) or affine(self.input_stats, self.stats) is None:
            return ''
        text = lambda stats: ', std '.join(' '.join(f'{v:.4g}' for v in o.tolist()) for o in stats)
        return f'mean {text(self.input_stats)} -> mean {text(self.stats)}'

    @property
    def known_classes(self) -> list | None:
        """The student's class, or list of classes, for each output. None if the classes are the
        same.
        """
        return self.classes or next(
            (m.known_classes for m in self.members if m.known_classes is not None), None
        )

    @property
    def needs(self) -> str:
        """'items' if the teacher or one of its members reads the raw items of a batch instead of
        its inputs, otherwise ''. See `OutputSource`.
        """
        if self.members:
            return max(m.needs for m in self.members)
        return '' if self.items is None else 'items'

    def has_outputs(self, samples: BatchSamples | None) -> bool:
        """Return True, since a model can compute outputs for any samples."""
        return True

    # running the model

    @property
    def runner(self) -> Any:
        """The runner of the model or of the members of an ensemble."""
        if self._runner is None:
            self._runner = (
                EnsembleRunner(self) if self.members else ModelRunner(self, self._facts, self._say)
            )
        return self._runner

    def say_with(self, fn: Callable | None) -> None:
        """Set the function that prints messages about the faster copy.

        Args:
            fn: fn(text). None for `print`.
        """
        self._facts['say'] = fn
        for m in self.members:
            m.say_with(fn)

    def _say(self, text: str) -> None:
        if rank() == 0:
            (self._facts.get('say') or print)(f'fastdistill: the teacher {self.name} {text}')

    def as_it_is(self) -> 'Teacher':
        """Return a variant of this teacher that never runs a faster copy.

        Use this variant to hook the modules of `named_modules`, since hooks have no effect on a
        copy.
        """
        t = Teacher(self, run=AS_IT_IS | dict(device=None))
        t.members = [m.as_it_is() for m in t.members]
        return t

    # start and stop

    @property
    def started(self) -> bool:
        return self.runner.started

    def start(self) -> 'Teacher':
        """Prepare the model for many batches, with a new random state unless `random.keep` is True.

        Has no effect if the teacher is already started.
        """
        if not self.started:
            if not self.random.keep:
                self.random = RandomStream()
            self.random.keep = False
            self.runner.start()
        return self

    def stop(self) -> None:
        """Restore the model. Has no effect if the teacher is not started."""
        if self.started:
            self.random = RandomStream()
            self.runner.stop()

    def __enter__(self) -> 'Teacher':
        was = self.started
        self.start()
        self._was_started.append(was)
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._was_started.pop():
            self.stop()

    def reset(self) -> None:
        """Reset hidden states with the method `reset` of the model.

        Has no effect if the model has no such method, or if the method changes weights.
        """
        self.runner.reset(self.random)

    # a model from a file is pickled as its path, since ONNX sessions and programs may not be
    # picklable. Copies and unpickled teachers are not started
    def __getstate__(self) -> dict[str, Any]:
        facts = {k: v for k, v in self._facts.items() if k not in ('copies', 'say')}
        fresh: dict = dict(_runner=None, _was_started=[], random=RandomStream())
        return self.__dict__ | fresh | {'_facts': facts} | ({'model': None} if self.path else {})

    def __setstate__(self, d: Mapping[str, Any]) -> None:
        self.__dict__.update(d)
        if self.path:
            self.model = load_model(self.path)[0]
        if isinstance(self.model, Onnx):
            self.model = self.model.returning(self.output)

    # run a batch

    def __call__(self, *x: Any, **kw: Any) -> Outputs:
        """Return the outputs for a batch.

        Args:
            *x: Inputs of the batch. A dict is passed as keyword arguments if the model has
                arguments with these names.
            **kw: Keyword inputs.
        """
        return self.outputs(x, kwargs=kw)

    def outputs(
        self,
        inputs: Sequence = (),
        samples: BatchSamples | None = None,
        layers: Sequence[str] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Outputs:
        """Return the outputs for a batch.

        Args:
            inputs: Inputs of the batch.
            samples: The `BatchSamples` of the batch, with the raw items for a teacher with
                `items=`. None if unknown.
            layers: Names of layers to read, in addition to those of the teacher.
            kwargs: Keyword inputs.
        """
        return self.outputs_for([self], inputs, samples, layers, kwargs)[0]

    def outputs_for(
        self,
        teachers: Sequence['Teacher'],
        inputs: Sequence = (),
        samples: BatchSamples | None = None,
        layers: Sequence[str] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Outputs]:
        """Run the model once on a batch, and return the outputs of each teacher.

        Args:
            teachers: This teacher, and other teachers for which `same_run` is true.
            inputs, samples, layers, kwargs: As in `outputs`.
        """
        if samples is not None and self.needs:
            inputs = with_items(tuple(inputs), samples.items)
            outs = self.outputs_for(teachers, inputs, None, layers, kwargs)
            return [as_in_batch(o, samples, t) for t, o in zip(teachers, outs)]
        kwargs = kwargs or {}
        if not self.started:
            try:
                self.runner.start()
                return self.outputs_for(teachers, inputs, None, layers, kwargs)
            finally:
                self.runner.stop()
        layers = list(dict.fromkeys([*self.layers, *layers]))
        with torch.no_grad(), self.random.own(self.runner.generators((inputs, kwargs))):
            return self.runner.outputs_for(teachers, inputs, kwargs, layers)

    def probe(self, *x: Any, layers: Sequence[str] | None = None, **kw: Any) -> Outputs:
        """Return the outputs for a batch without changing hidden states or random states.

        This method can be used even between `start` and `stop`.

        Args:
            *x: Inputs of the batch.
            layers: Names of the layers to read instead of those of the teacher.
            **kw: Keyword inputs.
        """
        return Teacher(self, **({} if layers is None else dict(layers=layers)))(*x, **kw)


def option_of(teacher: Teacher, name: str) -> Any:
    """Return the value of an option.

    Args:
        teacher: A `Teacher`.
        name: Name of the option, without its group.
    """
    return teacher.returns if name == 'outputs' else getattr(teacher, name)


def given_options(teacher: Teacher) -> dict:
    """Return the options that were given explicitly to a teacher, without groups."""
    return {k: option_of(teacher, k) for k in teacher.given}


def reading_tokens(teacher: Teacher, *x: Any) -> Teacher:
    """Return a variant of the teacher whose features can be stored.

    Layers that return a series (B, C, L), such as a 1d convolution, are read as tokens (B, L, C),
    since stored features do not show which axis holds the channels.

    Args:
        teacher: A `Teacher`.
        *x: Inputs of a batch.
    """
    names = names_of_tokens(teacher, x, teacher.layers) if teacher.layers else []
    return teacher if names == teacher.layers else Teacher(teacher, layers=names)


# options that affect how the model runs. All other options affect only how its output is read
OF_A_RUN = 'mode', 'size', 'inputs', 'items', 'layers', 'run'


def same_run(a: Any, b: Any) -> bool:
    """Return True if a single run of the model can give the outputs of both teachers.

    Such teachers differ at most in `output`, `kind` and their classes.
    """
    if a is b:
        return True
    if not (isinstance(a, Teacher) and isinstance(b, Teacher)) or a.model is not b.model:
        return False
    if a.model is None or isinstance(a.model, (Estimator, Onnx)):
        return False
    same = all(getattr(a, k) == getattr(b, k) for k in OF_A_RUN)
    return same and same_stats(a.stats, b.stats) and same_stats(a.input_stats, b.input_stats)


def sharing_model(teacher: Teacher, other: Teacher) -> Teacher:
    """Return a copy of the teacher that shares the facts about the model with a second teacher.

    Both teachers must have the same model, and also share its faster copy from then on.
    """
    if teacher._facts is other._facts:
        return teacher
    new = copy.copy(teacher)
    new.model, new._facts = other.model, other._facts
    return new


def same_stats(a: Any, b: Any) -> bool:
    return a is b or None not in (a, b) and all(map(torch.equal, a, b))
