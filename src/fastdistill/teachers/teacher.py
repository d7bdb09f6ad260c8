"""The class `Teacher`, which runs a model of any common form without changing it."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..base.batch_samples import BatchSamples
from ..base.output_source import OutputSource
from ..base.outputs import DistillError, Outputs, warn_of_first
from ..features.layer_names import named
from ..features.layer_pairs import names_of_tokens
from .ensemble import EnsembleRunner
from .estimator import Estimator
from .fast_copy import AS_IT_IS, check_run
from .members import single_teachers
from .model_loading import FORMS, Onnx, load_model
from .options import (
    OWN,
    UNLESS_GIVEN,
    checked_options,
    given_options,
    grouped_options,
    option_of,
    records_given,
    ungrouped_options,
)
from .raw_items import as_in_batch, with_items
from .runner import ModelRunner


class Teacher(OutputSource):
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
        output: Which output contains the logits: a name, an index or a function. If None, use
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
        options = checked_options(options, self.given, self.model, len(self.sources))
        self.returns = options.pop('outputs')  # `outputs` is a method
        self.__dict__.update(options)
        self.name = self.name or default_name(self.model, self.path, len(self.sources))
        mine = {k: v for k, v in given_options(self).items() if k not in OWN}
        self.members = [with_defaults(Teacher(m), **mine, run=self.run) for m in self.sources]
        self.needs = needs_of(self)
        self.model = adapted_model(self)
        self.runner = runner_of(self)
        self.runner.check_layers(self.layers)

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

    def named_modules(self) -> dict[str, nn.Module]:
        """Return {name as in `layers`: submodule}."""
        if self.module is not None:
            return named(self.module)
        return {
            f'{i}.{k}': v for i, m in enumerate(self.members) for k, v in m.named_modules().items()
        }

    def as_it_is(self) -> 'Teacher':
        """Return a variant of this teacher that never runs a faster copy.

        Use this variant to hook the modules of `named_modules`, since hooks have no effect on a
        copy.
        """
        t = Teacher(self, run=AS_IT_IS | dict(device=None))
        t.members = [m.as_it_is() for m in t.members]
        return t

    # start and stop

    def start(self) -> 'Teacher':
        """Prepare the model for many batches, with a new random state.

        Has no effect if the teacher is already started.
        """
        self.runner.start()
        return self

    def stop(self) -> None:
        """Restore the model. Has no effect if the teacher is not started."""
        self.runner.stop()

    def __enter__(self) -> 'Teacher':
        was = self.runner.started
        self.start()
        self.runner.was_started.append(was)
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.runner.was_started.pop():
            self.stop()

    def reset(self) -> None:
        """Reset hidden states with the method `reset` of the model.

        Has no effect if the model has no such method, or if the method changes weights.
        """
        self.runner.reset()

    # a model from a file is pickled as its path, since ONNX sessions and programs may not be
    # picklable. Copies and unpickled teachers are not started
    def __getstate__(self) -> dict[str, Any]:
        facts = {k: v for k, v in self._facts.items() if k not in ('copies', 'say')}
        state = self.__dict__ | dict(_facts=facts) | (dict(model=None) if self.path else {})
        del state['runner']
        return state

    def __setstate__(self, d: Mapping[str, Any]) -> None:
        self.__dict__.update(d)
        if self.path:
            self.model = load_model(self.path)[0]
            self.model = adapted_model(self)
        self.runner = runner_of(self)

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
        return run_once([self], inputs, samples, layers, kwargs)[0]

    def probe(self, *x: Any, layers: Sequence[str] | None = None, **kw: Any) -> Outputs:
        """Return the outputs for a batch without changing hidden states or random states.

        This method can be used even between `start` and `stop`.

        Args:
            *x: Inputs of the batch.
            layers: Names of the layers to read instead of those of the teacher.
            **kw: Keyword inputs.
        """
        return Teacher(self, **({} if layers is None else dict(layers=layers)))(*x, **kw)


def default_name(model: Any, path: Any, n_members: int) -> str:
    """Return the default name of a teacher for messages."""
    if n_members:
        return f'{n_members} teachers'
    return path.name if path else getattr(model, '__name__', type(model).__name__)


def needs_of(teacher: Teacher) -> str:
    """Return 'items' if the teacher or one of its members reads the raw items of a batch instead of
    its inputs, otherwise ''. See `OutputSource`.
    """
    return '' if all(t.items is None for t in single_teachers(teacher)) else 'items'


def adapted_model(teacher: Teacher) -> Any:
    """Return the model of a teacher, adapted to the teacher's options."""
    model, facts = teacher.model, teacher._facts
    if isinstance(model, Onnx):
        model = model.returning(teacher.output)
        if teacher.output is None and 'several' not in facts:
            facts['several'] = True
            if len(alike := model.alike()) > 1:
                warn_of_first(f'The teacher {teacher.name}', ', '.join(alike))
    if isinstance(model, Estimator):
        model = model.of_kind(teacher.kind)
        model.frame = teacher.frame
    elif teacher.frame is not None:
        raise DistillError(
            f'frame= is the table of an estimator (scikit-learn, LightGBM ...), but {teacher.name} is '
            'not an estimator.'
        )
    return model


def runner_of(teacher: Teacher) -> Any:
    """Return a new runner of the model, or of the members of an ensemble."""
    return EnsembleRunner(teacher) if teacher.members else ModelRunner(teacher, teacher._facts)


def run_once(
    teachers: Sequence[Teacher],
    inputs: Sequence = (),
    samples: BatchSamples | None = None,
    layers: Sequence[str] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> list[Outputs]:
    """Run the model of teachers once on a batch, and return the outputs of each teacher.

    Args:
        teachers: Teachers for which `same_run` is true. The first one runs.
        inputs, samples, layers, kwargs: As in `Teacher.outputs`.
    """
    first, kwargs = teachers[0], kwargs or {}
    runner, layers = first.runner, list(dict.fromkeys([*first.layers, *layers]))
    samples = samples if first.needs else None
    if samples is not None:
        inputs = with_items(tuple(inputs), samples.items)
    with runner.ready(), torch.no_grad(), runner.random.own(runner.generators((inputs, kwargs))):
        outs = runner.outputs_for(teachers, inputs, kwargs, layers)
    if samples is None:
        return outs
    return [as_in_batch(o, samples, t) for t, o in zip(teachers, outs)]


def with_defaults(teacher: Teacher, **options: Any) -> Teacher:
    """Return a teacher that uses these values for all options that were not given explicitly.

    Keys of `run` are treated individually. If nothing changes, the teacher itself is returned.

    Args:
        teacher: A `Teacher`.
        **options: As in `Teacher`, but without groups: `stats=`, not `images=dict(stats=...)`.
    """
    run = {**(options.pop('run', None) or {}), **teacher.run}
    new = {k: v for k, v in options.items() if k not in teacher.given}
    if run != teacher.run:
        new['run'] = run
    return Teacher(teacher, **grouped_options(new)) if new else teacher


def say_with(sources: Iterable[OutputSource], fn: Callable | None) -> None:
    """Set the function that prints messages about the faster copies of teachers.

    Args:
        sources: Teachers, or sources without messages.
        fn: fn(text). None for `print`.
    """
    for source in sources:
        for t in single_teachers(source) if isinstance(source, Teacher) else ():
            t._facts['say'] = fn


def reading_tokens(teacher: Teacher, *x: Any) -> Teacher:
    """Return a variant of the teacher whose features can be stored.

    Layers that return a series (B, C, L), such as a 1d convolution, are read as tokens (B, L, C),
    since stored features do not show which axis is the channel axis.

    Args:
        teacher: A `Teacher`.
        *x: Inputs of a batch.
    """
    names = names_of_tokens(teacher, x, teacher.layers) if teacher.layers else []
    return teacher if names == teacher.layers else Teacher(teacher, layers=names)


# options that affect how the model runs. All other options affect only how its output is read
OF_A_RUN = 'mode', 'size', 'inputs', 'items', 'layers', 'run'


def same_run(a: Any, b: Any) -> bool:
    """Return True if a single run of the model can produce the outputs of both teachers.

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
    new.runner = runner_of(new)
    return new


def same_stats(a: Any, b: Any) -> bool:
    return a is b or None not in (a, b) and all(map(torch.equal, a, b))
