"""Run the frozen model of a teacher, or a faster copy of the model."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from ..base.class_mapping import of_classes
from ..base.distributed import rank
from ..base.outputs import (
    DistillError,
    DistillWarning,
    Outputs,
    map_tensors,
    named_output,
    tensors_in,
    warn_of_several,
)
from ..base.random_state import RandomStream, global_generators
from ..features.layer_hooks import Taps
from ..features.probe import untouched
from .batch_slices import in_slices, joined, plain_output
from .copy_plan import short_name
from .fast_copy import DEFAULTS, FastCopy, by_output
from .frozen import FrozenModel, cuda_devices
from .hidden_state import NO_RESET, has_reset, why_no_reset
from .image_normalization import ImageConversion, is_image
from .model_loading import Onnx, explained, is_graph
from .probabilities import check_probabilities, logits_of
from .teacher_inputs import own_inputs, prepared_inputs


class Runner:
    """Base class for running a teacher.

    Args:
        teacher: The `Teacher`, whose options are used.

    Attributes:
        random: The `RandomStream` of the teacher.
    """

    fast_copy: Any = None

    def __init__(self, teacher: Any) -> None:
        self.teacher, self.random = teacher, RandomStream()
        self.stack: Any = None  # an `ExitStack` while the model is prepared
        self.was_started: list[bool] = []  # for each `with teacher:` that has not ended

    def enter(self, stack: ExitStack) -> None:
        """Prepare the model.

        Args:
            stack: `ExitStack` that restores the model when it is closed.
        """
        raise NotImplementedError

    @property
    def started(self) -> bool:
        return self.stack is not None

    def start(self) -> None:
        """Prepare the model for many batches, with a new random state unless `random.keep` is True.

        Has no effect if the runner is already started.
        """
        if not self.started:
            if not self.random.keep:
                self.random = RandomStream()
            self.random.keep = False
            self._prepare()

    def stop(self) -> None:
        """Restore the model. Has no effect if the runner is not started."""
        if self.started:
            self.random = RandomStream()
            self._restore()

    def ready(self) -> AbstractContextManager:
        """Return a context manager that prepares the model for a single batch, unless the runner is
        started.
        """
        if self.started:
            return nullcontext()
        self._prepare()
        stack = ExitStack()
        stack.callback(self._restore)
        return stack

    def _prepare(self) -> None:
        with ExitStack() as stack:
            self.enter(stack)
            self.stack = stack.pop_all()

    def _restore(self) -> None:
        stack, self.stack = self.stack, None
        if stack is not None:
            stack.close()

    @property
    def half(self) -> str:
        """Name of the dtype of the faster copy if it differs from the model's, otherwise ''."""
        fast = self.fast_copy
        return '' if fast is None or fast.cast_back is None else short_name(fast.copy.plan.dtype)

    @property
    def copy_bytes(self) -> int:
        """Size in bytes of the weights that the faster copy does not share with the model."""
        copy = self.fast_copy and self.fast_copy.copy
        return copy.bytes if copy else 0

    def outputs_for(
        self, teachers: Sequence, x: Sequence, kw: Mapping[str, Any], layers: Sequence[str]
    ) -> list[Outputs]:
        """Run the model once on a batch, and return the outputs of each teacher, with the features
        of exactly these layers.

        Random numbers come from the global generators.
        """
        raise NotImplementedError

    def generators(self, x: Any = ()) -> dict:
        """Return the global random generators that the model may use for these inputs."""
        raise NotImplementedError


class ModelRunner(Runner):
    """Runs a single model.

    Args:
        teacher: The `Teacher`, whose options are used.
        facts: Facts about the model that were found while it ran. Variants of a teacher share this
            dict.
    """

    images: ImageConversion

    def __init__(self, teacher: Any, facts: dict) -> None:
        super().__init__(teacher)
        self.facts, self.run = facts, DEFAULTS | teacher.run
        self.frozen: Any = None  # the `FrozenModel` while the model is prepared
        if isinstance(teacher.model, nn.Module) and not is_graph(teacher.model):
            # variants of a teacher with the same options share the copy
            options = {k: v for k, v in self.run.items() if k != 'batch'}
            key = (teacher.mode, *map(str, options.values()))
            copies = facts.setdefault('copies', {})
            if key not in copies:
                copies[key] = FastCopy(teacher.model, teacher.mode, options, self._say)
            self.fast_copy = copies[key]

    @property
    def module(self) -> Any:
        """The nn.Module that runs: the teacher's model or a faster copy. None for a function."""
        return self.teacher.module if self.fast_copy is None else self.fast_copy.module

    def _say(self, text: str) -> None:
        if rank() == 0:
            (self.facts.get('say') or print)(f'fastdistill: the teacher {self.teacher.name} {text}')

    # start and stop

    def enter(self, stack: ExitStack) -> None:
        if self.fast_copy is not None and self.fast_copy.is_stale(thorough=True):
            self.fast_copy.restart()
        if self.module is not None:
            self.frozen = stack.enter_context(self._new_frozen())
        t = self.teacher
        self.images = ImageConversion(t.stats, t.input_stats, t.size)

    def _restore(self) -> None:
        self.frozen = None
        super()._restore()

    def _new_frozen(self) -> FrozenModel:
        private = self.module is not self.teacher.module
        return FrozenModel(self.module, self.teacher.mode, private=private)

    def generators(self, x: Any = ()) -> dict:
        """Return the global random generators that the model may use for these inputs."""
        devices = {o.device for o in tensors_in(x) if o.is_cuda}
        if (module := self.teacher.module) is not None:
            devices |= self.frozen.cuda if self.started else cuda_devices(module)
        return global_generators([*devices])

    @property
    def remembers(self) -> bool:
        """True if the model has a method `reset` that changes only hidden states.

        The method is called once as a trial.
        """
        if not has_reset(self.teacher.module):
            return False
        if 'reset' not in self.facts:
            why = why_no_reset(self.teacher.module)
            self.facts['reset'] = why is None
            if why:
                text = NO_RESET.format(name=self.teacher.name, why=why)
                warnings.warn(text, DistillWarning, stacklevel=4)
        return self.facts['reset']

    def reset(self) -> None:
        if self.remembers:
            with torch.no_grad(), self.random.own(self.generators()):
                self.module.reset()

    # run a batch

    def outputs_for(
        self, teachers: Sequence, x: Sequence, kw: Mapping[str, Any], layers: Sequence[str]
    ) -> list[Outputs]:
        """Run the model once on a batch, and return the outputs of each teacher.

        Args:
            teachers: Variants of the teacher for which `same_run` is true.
            x, kw: Positional and keyword inputs.
            layers: Names of the layers to read.
        """
        self.check_layers(layers)
        device = device_of_inputs(x, kw)
        images = [t for t in tensors_in((x, kw)) if is_image(t)]
        x, kw = own_inputs(self.teacher, tuple(x), kw)
        slices = in_slices(x, kw, self.run['batch'])
        if self.fast_copy is not None:
            x0, kw0 = slices[0]
            outputs = [(t.output, t.kind, t.axis) for t in teachers]
            run = lambda m, layers=(): self._trial(m, outputs, layers, x0, kw0, device)
            self.fast_copy.choose(x0, kw0, device, layers, outputs, run)
            if self.module is not self.frozen.model:
                self.frozen = self.stack.enter_context(self._new_frozen())
        if self.frozen is not None:
            self.frozen.settle()
        parts = [self._slice(teachers, xi, kwi, layers, device) for xi, kwi in slices]
        outs = [joined(o) for o in zip(*parts)]
        if self.teacher.size is not None:
            outs = [replace(o, logits=self.images.restored_maps(o.logits, images)) for o in outs]
        return [with_classes(t, o) for t, o in zip(teachers, outs)]

    def _trial(
        self,
        module: Module,
        outputs: Sequence,
        layers: Sequence[str],
        x: Sequence,
        kw: Mapping[str, Any],
        device: torch.device,
    ) -> list[Tensor]:
        """Return the outputs of a module for a batch without changing any state.

        Args:
            outputs: (output, kind, axis) of each teacher that reads the batch.
            layers: Names of layers whose outputs to return instead.
        """
        with untouched(module), FrozenModel(module, self.teacher.mode) as frozen:
            x, kw = prepared_inputs(self, x, kw, device, frozen)
            with Taps(module, layers) as taps:
                raw = module(*x, **kw)
            if layers:
                return [by_output(o) for o in taps.pop().values()]
            read = lambda output: Outputs.of(raw, output=output).logits
            return [by_output(read(output), kind, axis) for output, kind, axis in outputs]

    def _slice(
        self,
        teachers: Sequence,
        x: Sequence,
        kw: Mapping[str, Any],
        layers: Sequence[str],
        device: torch.device,
    ) -> list[Outputs]:
        """Run the model on a slice of the batch, and return the outputs for each teacher."""
        x, kw = prepared_inputs(self, x, kw, device, self.frozen)
        reads = bool(layers) and self.module is not None
        with Taps(self.module, layers) if reads else nullcontext() as taps:
            with explained(self.teacher.name, (x, kw), self.teacher.module):
                raw = self.call(x, kw, layers)
            read = {} if taps is None else taps.pop()
            outs = [read_outputs(t, raw, read, self.facts) for t in teachers]
        # a function has no layers, but its `Outputs` may include features with these names
        for o in outs:
            if not reads and not set(layers) <= set(o.feats):
                raise unreadable(self.teacher.name, layers, o.feats)
        dtype = None if self.fast_copy is None else self.fast_copy.cast_back
        plain = lambda t: plain_output(t, device, dtype)
        parts = lambda o: map_tensors(dict(logits=o.logits, feats=o.feats, mask=o.mask), plain)
        return [Outputs(**parts(o), classes=o.classes) for o in outs]

    def call(self, x: Sequence, kw: Mapping[str, Any], layers: Sequence[str] = ()) -> Any:
        """Run the model on prepared inputs, and return its raw output."""
        if self.fast_copy is None:
            return self.teacher.model(*x, **kw)
        return self.fast_copy.run(x, kw, layers)

    def bare_call(self, x: tuple) -> Callable[[], Any]:
        """Return a function that runs the model on inputs that are prepared once and not checked
        again.

        Args:
            x: Inputs of a batch on which the model has already run.
        """
        device = device_of_inputs(x, {})
        x, kw = own_inputs(self.teacher, tuple(x), {})
        args, kwargs = prepared_inputs(self, x, kw, device, self.frozen)
        if anew := getattr(self.teacher.model, 'anew', None):
            return lambda: anew(*args, **kwargs)
        return lambda: self.call(args, kwargs)

    def check_layers(self, layers: Sequence[str]) -> None:
        """Raise a DistillError if layers are requested from a program or an ONNX file."""
        if layers and (isinstance(self.teacher.model, Onnx) or is_graph(self.teacher.module)):
            raise unreadable(self.teacher.name, layers)


def unreadable(name: str, layers: Sequence[str], feats: Iterable[str] = ()) -> DistillError:
    return DistillError(
        f"Layers {', '.join(layers)} of {name} can't be read, only the layers that it "
        f'returns ({", ".join(feats) or "none"}). Give the nn.Module that it was made from, or a '
        'function that returns Outputs(logits, feats).'
    )


def read_outputs(t: Any, raw: Any, feats: Mapping[str, Any], facts: dict) -> Outputs:
    """Convert the value that a model returned to the `Outputs` of a teacher.

    Args:
        t: A `Teacher`.
        raw: Value that the model returned.
        feats: {layer name: output} of the layers that were read.
        facts: As in `ModelRunner`.
    """
    out = raw if t.output is None else named_output(raw, t.output)
    if out is raw:
        warn_of_several(raw, t.module, f'The teacher {t.name}', facts)
    o = Outputs.of(out)
    logits: Any = o.logits
    if t.returns == 'probs':
        if (checked := ('probs', t.kind, t.axis)) not in facts:
            check_probabilities(logits, t.kind, t.axis, t.name)
            facts[checked] = True
        logits = logits_of(logits, t.kind)
    return replace(o, logits=logits, feats={**o.feats, **feats})


def with_classes(teacher: Any, o: Outputs) -> Outputs:
    """Apply the class selection and class mapping of a teacher to its outputs."""
    return of_classes(o, teacher.select, teacher.classes, teacher.axis, teacher.kind)


def device_of_inputs(x: Sequence, kw: Mapping[str, Any]) -> torch.device:
    return next((t.device for t in tensors_in((x, kw))), torch.device('cpu'))
