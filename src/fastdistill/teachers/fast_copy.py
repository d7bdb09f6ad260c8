"""Replace a teacher's model with a faster copy with similar outputs, chosen on the first batch."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.utils.flop_counter import FlopCounterMode

from ..base.errors import DistillError, check_choice
from ..base.outputs import as_plain, tensors_in
from ..features.probe import is_compiled
from .batch_norm_folding import foldable
from .compiled_module import CompiledModule
from .copy_plan import CopyPlan, short_name, weights_of, without_layers
from .model_loading import is_graph

# {option: allowed values}. The first value is the default
OPTIONS = dict(
    precision=('auto', 'fp32', 'bf16', 'fp16'),
    memory_format=('auto', 'channels_last', None),
    fold_bn=('auto', True, False),
    compile=(False, True),
)
# options in `run=` with their defaults, except 'mode'
DEFAULTS = {k: v[0] for k, v in OPTIONS.items()} | dict(device=None, batch=None)
# options with which the model itself runs, never a faster copy
AS_IT_IS = dict(precision='fp32', memory_format=None, fold_bn=False, compile=False)
PRECISIONS = dict(bf16=torch.bfloat16, fp16=torch.float16)
# maximum difference from the outputs of the original model, relative to their standard deviation
# (see `difference`)
FARTHEST = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}
LAYERS = 5  # limit for the outputs of layers, as a multiple of `FARTHEST`
NOT_FASTER = 'a copy is not faster'
# minimum number of operations per batch for 'auto', since smaller models do not become faster
WORK = 5e9
# {type of device: number of batches from one comparison of weights to the next}. On a GPU, each
# comparison waits until earlier batches are finished
EVERY = dict(cuda=50)
BLOCK = 16  # pixels along each axis of an image that count as one position


def check_run(given: dict[str, Any], model: Any) -> None:
    """Raise a DistillError for invalid options, or for options that this model does not support.

    Args:
        given: Options of `run=`.
        model: Model of the teacher. None for an ensemble.
    """
    options = DEFAULTS | given
    for k, have in OPTIONS.items():
        check_choice(k, options[k], have)
    batch = options['batch']
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise DistillError(
            f'batch={batch!r}: must be a positive whole number of rows, or None for all rows at '
            'once'
        )
    check_device(options['device'])
    if model is None or isinstance(model, nn.Module) and not is_graph(model):
        return
    if asked := given_by_hand(options):
        raise DistillError(
            f'{", ".join(f"{k}={options[k]!r}" for k in asked)} is for an nn.Module, but this teacher '
            f'is a {type(model).__name__}, which runs as it is. Give the nn.Module that it was made '
            'from.'
        )


def check_device(device: Any) -> None:
    """Raise a DistillError for a device that is not available."""
    if device is None:
        return
    try:
        if torch.empty(0, device=device).device.type == 'meta':
            raise RuntimeError('it holds no values')
    # subtle: PyTorch raises different errors for unknown devices and for missing devices
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ValueError) as e:
        raise DistillError(
            f"device={device!r}: this device can't be used here ({str(e).splitlines()[0]}). Omit "
            'device= to run the teacher on the device of the batches.'
        ) from e


def native_bf16(device: torch.device) -> bool:
    """Return True if a device computes in bfloat16 natively."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # older versions of PyTorch lack the functions
    names = '_is_avx512_bf16_supported', '_is_amx_tile_supported'
    return device.type == 'cpu' and any(getattr(torch.cpu, name, bool)() for name in names)


def why_no_copy(model: Module) -> str:
    """Return why a module can't be replaced by a copy, or '' if it can."""
    tensors = weights_of(model)
    if is_graph(model):
        return 'it is a program'
    if is_compiled(model):
        return 'it is compiled already'
    if hasattr(model, 'hf_device_map') or len({t.device for t in tensors}) > 1:
        return 'it is on several devices'
    plain = all(type(p) is nn.Parameter for p in model.parameters())
    if not plain or any(t.is_meta or t.is_quantized or t.layout != torch.strided for t in tensors):
        return 'its weights are special'
    # subtle: if a hook belongs to an object outside the model, that object would be copied too
    inside = {
        id(o)
        for m in model.modules()
        for v in vars(m).values()
        for o in (v, *(v if type(v) is list else ()))
    }
    if any(id(o) not in inside for h in hooks_of(model) if (o := owner_of(h)) is not None):
        return 'it has custom hooks'
    return ''


def hooks_of(model: Module) -> list[Callable]:
    """Return the forward hooks and forward pre-hooks of all modules."""
    both = lambda m: (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    return [h for m in model.modules() for h in both(m)]


def owner_of(hook: Any) -> Any:
    """Return the object to which a hook belongs, or None for a plain function."""
    return None if isinstance(hook, FunctionType) else getattr(hook, '__self__', hook)


class FastCopy:
    """Runs a model or a faster copy of the model. The first batch decides which one is used.

    The model itself is never changed.

    Args:
        model: Model of the teacher.
        mode: 'eval' or 'train'.
        options: A value for each option in `OPTIONS`, and 'device'.
        say: fn(text) that reports the choice. The caller puts 'fastdistill: the teacher NAME' before
            the text.
    """

    def __init__(
        self, model: Module, mode: str, options: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.model, self.mode, self.options, self.say = model, mode, options, say
        floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
        # dtype of the model's weights, or None if there are several
        self.own: Any = floats.pop() if len(floats) == 1 else None
        # options that request a copy explicitly, even for a small model
        self.by_hand = given_by_hand(options)
        self.never = AS_IT_IS.items() <= options.items() and not self.by_hand
        self.restart()

    def restart(self) -> None:
        """Discard the copy, and choose again on the next batch."""
        self.copy: ModelCopy | None = None
        self.compared: list = []  # outputs and layers that were compared with those of the model
        self.decided_for: float | None = None  # size of the batch on which the choice was made
        self.why = ''

    def _give_up(self, why: str) -> None:
        """Discard the copy, and never choose again."""
        self.restart()
        self.decided_for, self.why = float('inf'), why
        self.say(f'runs as it is from now on: {why}')

    @property
    def module(self) -> Module:
        """The module that runs: the copy, or the model itself."""
        return self.model if self.copy is None else self.copy.module

    # choose a module before a batch runs

    def choose(
        self,
        x: Sequence,
        kw: Mapping[str, Any],
        device: torch.device,
        layers: Sequence[str],
        outputs: Sequence,
        run: Callable[..., list[Tensor]],
    ) -> None:
        """Choose the module that runs a batch.

        Args:
            x, kw: Positional and keyword inputs.
            device: Device of the model.
            layers: Names of the layers that are read in this batch.
            outputs: Descriptions of the outputs that are read in this batch.
            run: fn(module) -> these outputs, and fn(module, layers) -> the outputs of these layers,
                as `by_output` returns them. The function must not change any state.
        """
        if self.is_stale(thorough=False):
            self._give_up('its weights change while it teaches')
        # subtle: if no copy is used, choose again for a batch that is more than twice as large
        if self.decided_for is None or (
            self.copy is None
            and self.why in ('', NOT_FASTER)
            and size_of(x, kw) > 2 * self.decided_for
        ):
            self.restart()
            self.decided_for = size_of(x, kw)
            self.why = '' if self.never else why_no_copy(self.model)
            if not self.by_hand and not self.why and self.mode != 'eval':
                self.why = 'it runs in train mode'
            large = not (self.never or self.why) and is_large(self.model, x, kw, run)
            tried = not (self.why or self.never) and (large or self.by_hand)
            if tried:
                device = torch.device(self.options['device'] or device)
                self._try_copies(large, device, layers, run)
                self.compared = [*outputs]
            if self.why and (tried or self.by_hand):
                self.say(f'runs as it is: {self.why}')
        if self.copy is not None and any(o not in self.compared for o in outputs):
            self._compare_more(self.copy, outputs, run)
        if layers and self.copy is not None:
            self.copy = self.copy.with_layers(layers)
            if new := [n for n in layers if n not in self.compared]:
                self._compare_more(self.copy, new, lambda m: run(m, new), 'layers', LAYERS)

    def _try_copies(
        self,
        large: bool,
        device: torch.device,
        layers: Sequence[str],
        run: Callable[[Module], list[Tensor]],
    ) -> None:
        """Use the first copy whose outputs are close enough to those of the model."""
        dtypes = dtypes_to_try(self.own, self.options['precision'], large, device)
        if not dtypes:
            return
        out = []
        pairs = foldable(self.model, lambda: out.append(run(self.model)))
        left = without_layers(self.model, pairs, layers)
        for plan in self._plans(dtypes, large, left, device):
            try:
                module = plan.build(self.model)
                far = difference(run(module), out[0])
            # e.g. a layer does not support this dtype, or the model can't be copied
            except Exception as e:
                self.why = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:80]}'
                continue
            if why := self._why_too_far(plan, far):
                self.why = why
            elif not self.by_hand and not is_faster(module, self.model, run):
                self.why = NOT_FASTER
            else:
                self._take(module, plan, far)
                return

    def _why_too_far(
        self, plan: CopyPlan, far: float, what: str = 'outputs', times: float = 1
    ) -> str:
        """Return why a copy can't be used, or '' if its outputs are close enough.

        Args:
            far: Difference from the outputs of the model.
            what: Name of the outputs in the message.
            times: Multiple of the usual limit.
        """
        by_hand = plan.dtype != self.own and 'precision' in self.by_hand
        if far <= (1.0 if by_hand else times * FARTHEST[plan.dtype]):
            return ''
        return f'in {short_name(plan.dtype)} its {what} differ by {far:.2g} of their spread'

    def _compare_more(
        self,
        copy: 'ModelCopy',
        outputs: Sequence,
        run: Callable[[Module], list[Tensor]],
        what: str = 'outputs',
        times: float = 1,
    ) -> None:
        """Discard the copy if outputs that are read for the first time are not close enough."""
        far = difference(run(copy.module), run(self.model))
        if why := self._why_too_far(copy.plan, far, what, times):
            self._give_up(why)
        else:
            self.compared += [o for o in outputs if o not in self.compared]

    def _plans(
        self, dtypes: Sequence[torch.dtype], large: bool, pairs: tuple, device: torch.device
    ) -> Iterator[CopyPlan]:
        """Yield the plans of copies to try. 'auto' changes only large models."""
        given = lambda k, auto: auto if self.options[k] == 'auto' else self.options[k]
        layout = given('memory_format', large and is_convolutional(self.model))
        pairs = pairs if given('fold_bn', large) and self.mode == 'eval' else ()
        plan = CopyPlan(self.own, device, torch.channels_last if layout else None, pairs)
        for dtype in dtypes:
            if dtype != self.own:
                yield replace(plan, dtype=dtype)
                yield replace(plan, dtype=dtype, all_floats=True)
            elif pairs or layout or self.options['device'] or self.options['compile']:
                yield plan

    def _take(self, module: Module, plan: CopyPlan, far: float) -> None:
        self.copy, self.why = ModelCopy(self.model, plan, module, self.options, self.say), ''
        if not self.copy.bytes:
            return
        text = f'runs as a copy: {self.copy} (+{self.copy.bytes / 2**20:.3g} MiB)'
        if plan.dtype != torch.float32:
            text += (
                f". Its outputs differ by {far:.2g} of their spread; run=dict(precision='fp32') "
                'avoids that'
            )
        self.say(text)

    def is_stale(self, thorough: bool) -> bool:
        """Return True if the model's weights changed since it was copied.

        If `thorough` is True, compare the hooks too.
        """
        return self.copy is not None and not self.copy.marks.match(self.model, thorough)

    # run a batch

    def run(self, x: Sequence, kw: Mapping[str, Any], layers: Sequence[str] = ()) -> Any:
        """Run the chosen module on a batch and return its output.

        Args:
            x, kw: Positional and keyword inputs.
            layers: Names of the layers that are read.
        """
        return self.model(*x, **kw) if self.copy is None else self.copy.run(x, kw, layers)

    @property
    def cast_back(self) -> torch.dtype | None:
        """The dtype of the model if the copy has a different dtype, otherwise None."""
        return self.own if self.copy is not None and self.copy.plan.dtype != self.own else None

    def __str__(self) -> str:
        if self.decided_for is None:
            return ', '.join(f'{k}={self.options[k]!r}' for k in self.by_hand)
        if self.copy is None:
            return f'as it is{f" ({self.why})" if self.why else ""}'
        compiled = self.copy.compiled.state if self.copy.compiled else ''
        parts = ', '.join(filter(None, (str(self.copy), compiled)))
        return f'{parts}, a copy of {self.copy.bytes / 2**20:.3g} MiB'


@dataclass(eq=False)
class ModelCopy:
    """A faster copy of a model, which runs instead of the model.

    Attributes:
        model: Model of the teacher.
        plan: The `CopyPlan` of the copy.
        module: What the plan built.
        options, say: As in `FastCopy`.
    """

    model: Module
    plan: CopyPlan
    module: Module
    options: Mapping[str, Any]
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.marks = ModelMarks(self.model)
        own = {t.data_ptr() for t in weights_of(self.model)}
        new = [t for t in weights_of(self.module) if t.data_ptr() not in own]
        self.bytes = sum(t.numel() * t.itemsize for t in new)  # not shared with the model
        compiles = self.options['compile']
        self.compiled = CompiledModule(self.module, self._are_close, self.say) if compiles else None

    def __str__(self) -> str:
        device = self.options['device']
        return f'{self.plan}{f", on {device}" if device else ""}'

    def with_layers(self, layers: Sequence[str]) -> 'ModelCopy':
        """Return a copy in which a batch norm is folded only if these layers can still be read."""
        left = without_layers(self.model, self.plan.pairs, layers)
        if len(left) == len(self.plan.pairs):
            return self
        plan = replace(self.plan, pairs=left, device=next(self.module.parameters()).device)
        return replace(self, plan=plan, module=plan.build(self.model))

    def run(self, x: Sequence, kw: Mapping[str, Any], layers: Sequence[str]) -> Any:
        """Run a batch. Compiled code is used only if no layers are read."""
        with no_autocast(x, kw):
            if layers or self.compiled is None:
                return self.module(*x, **kw)
            return self.compiled(x, kw)

    def _are_close(self, a: Any, b: Any) -> bool:
        """Return True if the outputs of the compiled module are close to those without
        compilation.
        """
        pairs = zip(tensors_in(a), tensors_in(b))
        return all(
            difference([x.reshape(1, -1)], [y.reshape(1, -1)]) <= FARTHEST[self.plan.dtype]
            for x, y in pairs
            if x.is_floating_point()
        )


def dtypes_to_try(own: Any, precision: str, large: bool, device: torch.device) -> list[torch.dtype]:
    """Return the dtypes of the copies to try, fastest first.

    Args:
        own: Dtype of the model, or None if it has several.
        precision: Option of `run=`.
        large: Whether the model is large.
        device: Device of the copy.
    """
    dtypes = [own] if own in FARTHEST else []
    auto = large and own == torch.float32 and precision == 'auto' and native_bf16(device)
    if auto or precision in PRECISIONS:
        dtypes.insert(0, PRECISIONS.get(precision, torch.bfloat16))
    return list(dict.fromkeys(dtypes))


class ModelMarks:
    """Record of a model's state, used to detect later changes of weights or hooks.

    The record contains the hooks, the submodules, and the tensors with their versions and a few of
    their values.
    """

    def __init__(self, model: Module) -> None:
        self.tensors, self.hooks = weights_of(model), hooks_of(model)
        dicts = (d for m in model.modules() for d in (m._parameters, m._buffers, m._modules))
        self.parts: list[tuple[dict, list]] = [(d, [*d.values()]) for d in dicts if d]
        self.places, self.values = places_of(self.tensors), first_values(self.tensors)
        self.every, self.batches = EVERY.get(self.tensors[0].device.type, 1), 0

    def match(self, model: Module, thorough: bool) -> bool:
        """Return True if the model has not changed.

        If `thorough` is False, compare the values of only a few tensors, and ignore the hooks.
        """
        if places_of(self.tensors) != self.places or not self._has_same_parts():
            return False
        # subtle: changes through .data or by a fused optimizer do not increase the version, so values
        # are compared
        self.batches += 1
        if not thorough and self.batches % self.every:
            return True
        if thorough and hooks_of(model) != self.hooks:
            return False
        n = len(self.tensors)
        some = range(n) if thorough else sorted({0, n // 2, n - 1})
        now = first_values([self.tensors[i] for i in some])
        return all(torch.equal(v, self.values[i]) for v, i in zip(now, some))

    def _has_same_parts(self) -> bool:
        """Return True if no tensor and no submodule was replaced, added or removed."""
        return all(
            len(d) == len(parts) and all(map(is_, d.values(), parts)) for d, parts in self.parts
        )


def given_by_hand(options: Mapping[str, Any]) -> list:
    """Return the names of the options that request a copy explicitly."""
    asked = [k for k in OPTIONS if options[k] not in ('auto', 'fp32', None, False)]
    return asked + ['device'] * (options['device'] is not None)


def places_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in tensors]


@torch.no_grad()
def first_values(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the first few values of each tensor."""
    return [t.detach().reshape(-1)[:4].clone() for t in tensors]


def operations(model: Module, x: Sequence, kw: Mapping[str, Any]) -> float:
    """Estimate the number of operations for a batch.

    The estimate is two operations per weight and position. A position is a token, a row of a table,
    or a block of 16 pixels along each axis of an image, because most layers of networks for photos
    see them at that resolution or a lower one. Embeddings are ignored, since they are only looked up.
    """
    layers = [m for m in model.modules() if not isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    weights = {p for m in layers for p in m.parameters(recurse=False)}
    positions = max((map(positions_of, tensors_in((x, kw)))), default=0)
    return 2 * positions * sum(p.numel() for p in weights)


def is_large(
    model: Module, x: Sequence, kw: Mapping[str, Any], run: Callable[[Module], Any]
) -> bool:
    """Return True if a batch needs at least WORK operations.

    Args:
        x, kw: Positional and keyword inputs.
        run: fn(module) that runs this batch.
    """
    least = operations(model, x, kw)
    # subtle: a network for small images, such as a ResNet for CIFAR, sees them at a higher resolution
    # than `operations` assumes, so its operations are counted if they may be enough
    if least >= WORK or not is_convolutional(model) or BLOCK**2 * least < WORK:
        return least >= WORK
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            run(model)
    except Exception:  # the counter does not know all operations
        return False
    return counter.get_total_flops() >= WORK


def positions_of(t: Tensor) -> float:
    if t.dim() >= 4:
        return t.numel() / max(t.shape[1], 1) / BLOCK ** (t.dim() - 2)
    return t.numel() / max(t.shape[-1], 1) if t.is_floating_point() and t.dim() > 1 else t.numel()


def is_convolutional(model: Module) -> bool:
    kinds = [type(m) for m in model.modules()]
    return kinds.count(nn.Conv2d) > kinds.count(nn.Linear)


def is_faster(a: Module, b: Module, run: Callable[[Module], list[Tensor]]) -> bool:
    """Return True if module `a` is faster than `b`.

    The modules alternate for two runs each, and their fastest runs are compared. Not every module
    becomes faster in bfloat16: on a CPU, a linear layer is several times slower if its input is not
    contiguous, e.g. after an LSTM with `batch_first=True`.
    """
    times: dict[Module, list[float]] = {a: [], b: []}
    for _ in range(2):
        for m, seconds in times.items():
            start = time.perf_counter()
            [o.cpu() for o in run(m)]  # waits for a GPU
            seconds.append(time.perf_counter() - start)
    return min(times[a]) < min(times[b])


def no_autocast(x: Sequence, kw: Mapping[str, Any]) -> torch.autocast:
    """Return a context manager that disables autocast.

    A copy has its own precision, which the student's autocast must not change.
    """
    return torch.autocast(next((t.device.type for t in tensors_in((x, kw))), 'cpu'), enabled=False)


def size_of(x: Sequence, kw: Mapping[str, Any]) -> int:
    return max((t.numel() for t in tensors_in((x, kw))), default=0)


def by_output(logits: Any, kind: str = '', axis: int = 1) -> Tensor:
    """Return outputs as a table whose rows are compared separately, (rows, values).

    Each predicted number is a row, because numbers may have different scales, or a mean that is large
    compared with their differences. Logits are one row, and so are the outputs of a single sample.
    """
    o = as_plain(logits).detach()
    numbers = kind == 'regression' and -o.dim() <= axis < o.dim()
    rows = o.movedim(axis, 0).flatten(1) if numbers else o.reshape(1, -1)
    return rows if rows.shape[1] > 1 else o.reshape(1, -1)


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Compute the root mean square difference of outputs, relative to the standard deviation of the
    outputs in `b`. Return the largest value over all outputs.

    Args:
        a, b: Outputs, as `by_output` returns them.
    """
    far = []
    for x, y in zip(a, b):
        if x.shape != y.shape:
            return float('inf')
        x, y = x.detach().double().cpu(), y.detach().double().cpu()
        spread = (y - y.mean(1, keepdim=True)).square().mean(1).sqrt().clamp_min(1e-12)
        far.append(((x - y).square().mean(1).sqrt() / spread).max())
    return torch.stack(far).max().item()
