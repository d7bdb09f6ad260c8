"""How fast a teacher runs: its precision, memory format, folded batch-norms, compilation. Decided
at the first batch.
"""

import copy
import time
from types import FunctionType

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.flop_counter import FlopCounterMode

from ..base.outputs import DistillError, as_plain, tensors_in
from ..features.layer_names import named
from ..features.probe import is_compiled
from .compiled import Compilation, synchronize
from .folding import foldable
from .forms import is_graph

__all__ = ['AS_IT_IS', 'OPTIONS', 'Speed', 'check_speed', 'native_bf16']

# name -> possible values; the first one is the default
OPTIONS = dict(
    precision=('auto', 'fp32', 'bf16', 'fp16'),
    compile=('auto', True, False),
    memory_format=('auto', 'channels_last', None),
    fold_bn=('auto', True, False),
)
# the options of a teacher that runs as the model itself
AS_IT_IS = dict(precision='fp32', compile=False, memory_format=None, fold_bn=False)
PRECISIONS = dict(bf16=torch.bfloat16, fp16=torch.float16)
# largest difference from the model as it is, as a share of the spread of its outputs
FARTHEST = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}
# below this number of operations a batch, a model is too small to gain, and 'auto' leaves it as it is
WORK = 5e9


def check_speed(options, model):
    """Refuse values that do not exist, and options of a module for a teacher that is none.

    Args:
        options: Name -> value.
        model: None for an ensemble.
    """
    for k, have in OPTIONS.items():
        if options[k] not in have:
            raise DistillError(f'{k}={options[k]!r}: must be one of {", ".join(map(repr, have))}')
    batch = options['batch']
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise DistillError(
            f'batch={batch!r}: give a whole number of rows from 1, or None for all rows at once'
        )
    if model is None or isinstance(model, nn.Module) and not is_graph(model):
        return
    asked = [k for k, v in OPTIONS.items() if options[k] not in (v[0], 'fp32', None, False)]
    if options['device'] is not None:
        asked.append('device')
    if asked:
        raise DistillError(
            f'{", ".join(f"{k}={options[k]!r}" for k in asked)} is for an nn.Module, but this teacher '
            f'is a {type(model).__name__}, which runs as it is. Give the nn.Module that it was made '
            'from.'
        )


def native_bf16(device) -> bool:
    "Does this device compute in bfloat16 itself?"
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has = lambda name: getattr(
        torch.cpu, name, bool
    )()  # older versions of PyTorch have no such function
    return device.type == 'cpu' and (
        has('_is_avx512_bf16_supported') or has('_is_amx_tile_supported')
    )


def why_no_copy(model) -> str:
    """Why a module runs as it is; empty if a copy may run in its place."""
    tensors = [*model.parameters(), *model.buffers()]
    if is_graph(model):
        return 'it is a program'
    if is_compiled(model):
        return 'it is compiled already'
    if hasattr(model, 'hf_device_map') or len({t.device for t in tensors}) > 1:
        return 'it is on several devices'
    if any(t.is_meta or t.is_quantized or t.layout != torch.strided for t in tensors):
        return 'its weights are special'
    if any(type(p) is not nn.Parameter for p in model.parameters()):
        return 'its weights are special'
    # subtle: a hook that is, or belongs to, an object outside the model would be copied with that object
    inside = {
        id(o)
        for m in model.modules()
        for v in vars(m).values()
        for o in (v, *(v if type(v) is list else ()))
    }
    if any(id(o) not in inside for h in hooks_of(model) if (o := owner_of(h)) is not None):
        return 'it has hooks of yours'
    return ''


def hooks_of(model):
    """The functions that modules call before and after they run."""
    return [
        h
        for m in model.modules()
        for d in (m._forward_hooks, m._forward_pre_hooks)
        for h in d.values()
    ]


def owner_of(hook):
    """The object that a hook is, or whose method it is; None for a function."""
    return None if isinstance(hook, FunctionType) else getattr(hook, '__self__', hook)


class Speed:
    """How one model runs: as it is, or as a faster copy. The model itself is never changed.

    Args:
        options: Of `OPTIONS`, and 'device'.
        say: fn(text): what was decided, after 'fastdistill: the teacher NAME '.
    """

    def __init__(self, model, mode, options, say):
        self.model, self.mode, self.options, self.say = model, mode, options, say
        floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self.own = next(iter(floats)) if len(floats) == 1 else None  # dtype of the model's weights
        self.restart()

    def restart(self):
        """Decide anew at the next batch."""
        self.module, self.pairs, self.bytes, self.decided_for = self.model, [], 0, None
        self.dtype = self.marks = self.compilation = None
        self.why = ''

    # what is decided, and when

    @property
    def by_hand(self):
        """Options for which a small model is copied too."""
        given = {k: v for k, v in self.options.items() if v not in ('auto', None, False)}
        return [k for k, v in given.items() if not (k == 'precision' and v == 'fp32')]

    @property
    def copied(self):
        return self.module is not self.model

    def undecided_for(self, x, kw):
        """A batch of one sample decides nothing for larger ones."""
        return self.decided_for is None or (
            not self.copied and not self.why and size_of(x, kw) > 2 * self.decided_for
        )

    def decide(self, x, kw, device, layers, run):
        """Choose by a trial on this batch.

        Args:
            x, kw: The first batch.
            device: Where the model runs.
            layers: That are read in this batch.
            run: fn(module) -> its logits for this batch. Nothing is changed by it.
        """
        self.restart()
        self.decided_for = size_of(x, kw)
        device = torch.device(self.options['device'] or device)
        self.why = why_no_copy(self.model) or (
            '' if self.by_hand or self.mode == 'eval' else 'it runs in train mode'
        )
        if self.why and self.by_hand:
            self.say(f'runs as it is: {self.why}')
        if self.why or self.options == {**AS_IT_IS, 'device': None}:
            return
        if self.by_hand or at_most(self.model, x, kw) >= WORK:
            work, pairs, plain = self._watch(run, layers)
            if self.by_hand or work >= WORK:
                self._try(plain, pairs, work >= WORK, device, run)
        self.marks = marks_of(self.model)

    def _watch(self, run, layers):
        """(operations, foldable pairs, logits) of the model as it is."""
        out = []
        with FlopCounterMode(display=False) as counter, counted_cells(self.model) as cells:
            pairs = foldable(self.model, lambda: out.append(run(self.model)))
        return (
            counter.get_total_flops() + sum(cells),
            without_layers(self.model, pairs, layers),
            out[0],
        )

    def _try(self, plain, pairs, large, device, run):
        """The first of these copies that is as good as the model itself."""
        for wish in self._wishes(pairs, large, device):
            try:
                module = faster_copy(self.model, **wish, device=device)
                far = difference(run(module), plain)
            except Exception as e:  # layers without this precision, models that can't be copied
                self.why = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:80]}'
                continue
            dtype = wish['dtype']
            if not far <= (
                1.0 if dtype != self.own and 'precision' in self.by_hand else FARTHEST[dtype]
            ):
                self.why = f'in {short_name(dtype)} its outputs differ by {far:.2g} of their spread'
                continue
            if not self.by_hand and not is_faster(module, self.model, run):
                self.why = 'a copy is not faster'
                continue
            return self._take(module, wish, far)
        if self.why:
            self.say(f'runs as it is: {self.why}')

    def _wishes(self, pairs, large, device):
        """What copies to try, the fastest first. 'auto' changes large models alone."""
        own, asked = self.own, self.options
        dtypes = [own] if own in FARTHEST else []
        if asked['precision'] in PRECISIONS:
            dtypes = [PRECISIONS[asked['precision']], *dtypes]
        elif (
            asked['precision'] == 'auto' and large and own == torch.float32 and native_bf16(device)
        ):
            dtypes = [torch.bfloat16, own]
        auto = large and is_convolutional(self.model)
        layout = (
            torch.channels_last
            if (auto if asked['memory_format'] == 'auto' else asked['memory_format'])
            else None
        )
        if self.mode != 'eval' or not (large if asked['fold_bn'] == 'auto' else asked['fold_bn']):
            pairs = []
        for dtype in dict.fromkeys(dtypes):
            changes = pairs or layout is not None or asked['device'] or asked['compile'] is True
            if dtype == own and not changes:
                continue
            for all_floats in (False, True) if dtype != own else (False,):
                yield dict(dtype=dtype, layout=layout, pairs=pairs, all_floats=all_floats)

    def _take(self, module, wish, far):
        self.module, self.pairs, self.dtype, self.why = module, wish['pairs'], wish['dtype'], ''
        own = {t.data_ptr() for t in weights_of(self.model)}
        self.bytes = sum(
            t.numel() * t.itemsize for t in weights_of(module) if t.data_ptr() not in own
        )
        self.wish = wish
        away = (
            ''
            if self.dtype == torch.float32
            else (
                f". Its outputs differ by {far:.2g} of their spread; precision='fp32' avoids that"
            )
        )
        if self.bytes:
            self.say(f'runs as a copy: {self.choice} (+{self.bytes / 2**20:.3g} MiB){away}')

    @property
    def choice(self):
        """How the copy differs from the model, as text."""
        return ', '.join(
            filter(
                None,
                [
                    short_name(self.dtype),
                    'channels_last' if self.wish['layout'] else '',
                    f'{len(self.pairs)} batch-norms folded' if self.pairs else '',
                    f'on {self.options["device"]}' if self.options['device'] else '',
                ],
            )
        )

    # later batches

    def for_layers(self, layers):
        """Before a batch in which these layers are read: batch-norms stay apart where a layer shows
        that they are folded.
        """
        if not layers or not self.pairs:
            return
        left = without_layers(self.model, self.pairs, layers)
        if len(left) == len(self.pairs):
            return
        device = next(self.module.parameters()).device
        self.module, self.pairs = (
            faster_copy(self.model, **{**self.wish, 'pairs': left}, device=device),
            left,
        )
        self.compilation = None

    def is_stale(self, thorough):
        "Did the model change since it was copied: its weights, or if `thorough` its hooks?"
        return self.copied and not same_marks(self.marks, self.model, thorough)

    def run_as_it_is(self, why):
        self.restart()
        self.decided_for, self.why = float('inf'), why
        self.say(f'runs as it is from now on: {why}')

    def run(self, x, kw, layers, left):
        """The outputs of the module that runs.

        Args:
            layers: That are read.
            left: Batches to come in this run; None: unknown.
        """
        if not isinstance(self.model, nn.Module) or self.why:
            return self.module(*x, **kw)
        if layers or not self.copied and self.options['compile'] is not True:
            return self._as_copied(x, kw)
        if self.compilation is None:
            self.compilation = Compilation(
                self.module, self.options['compile'], self.say, self._close
            )
        with no_autocast(x, kw):
            return self.compilation(x, kw, left)

    def _as_copied(self, x, kw):
        if not self.copied:
            return self.module(*x, **kw)
        with no_autocast(x, kw):
            return self.module(*x, **kw)

    def _close(self, a, b):
        """Outputs of compiled code, and of the same module without it."""
        pairs = zip(tensors_in(as_dict(a)), tensors_in(as_dict(b)))
        return all(
            difference(x, y) <= FARTHEST.get(self.dtype, 1e-3)
            for x, y in pairs
            if x.is_floating_point()
        )

    @property
    def cast_back(self):
        """The dtype of what is returned: the model's own, also where a copy computes in another."""
        return self.own if self.copied and self.dtype != self.own else None

    @property
    def half(self):
        return '' if self.cast_back is None else short_name(self.dtype)

    def __str__(self):
        if self.decided_for is None:
            return ', '.join(f'{k}={self.options[k]!r}' for k in self.by_hand)
        if not self.copied:
            return f'as it is{f" ({self.why})" if self.why else ""}'
        compiled = (
            'not compiled'
            if self.compilation is None
            else self.compilation.state or 'not yet compiled'
        )
        return f'{self.choice}, {compiled}, a copy of {self.bytes / 2**20:.3g} MiB'


def size_of(x, kw):
    return max((t.numel() for t in tensors_in((x, kw))), default=0)


def short_name(dtype):
    return str(dtype).removeprefix('torch.')


def weights_of(model):
    return [*model.parameters(), *model.buffers()]


def as_dict(o):
    return dict(o) if isinstance(o, dict) else o


def no_autocast(x, kw):
    """A copy has its own precision, also where the student trains under autocast."""
    return torch.autocast(next((t.device.type for t in tensors_in((x, kw))), 'cpu'), enabled=False)


def is_convolutional(model):
    kinds = [type(m) for m in model.modules()]
    return kinds.count(nn.Conv2d) > kinds.count(nn.Linear)


def at_most(model, x, kw):
    """Operations of a batch, if each weight were used at each position of the largest input."""
    positions = max(
        (t.numel() / (t.shape[1] if t.dim() == 4 else 1) for t in tensors_in((x, kw)) if t.dim()),
        default=0,
    )
    return 2 * positions * sum(p.numel() for p in model.parameters())


class counted_cells:
    """Inside, operations of recurrent layers are counted, which PyTorch's counter leaves out."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.found = []

        def count(m, args):
            steps, weights = (
                args[0].numel() // args[0].shape[-1],
                sum(p.numel() for p in m.parameters()),
            )
            self.found.append(2 * steps * weights)

        self.handles = [
            m.register_forward_pre_hook(count)
            for m in self.model.modules()
            if isinstance(m, nn.RNNBase)
        ]
        return self.found

    def __exit__(self, *_):
        for h in self.handles:
            h.remove()


def without_layers(model, pairs, layers):
    """The pairs that can be folded while these layers are read."""
    have = named(model)
    read = {have.get(n.split('@')[0]) for n in layers}
    return [(c, n) for c, n in pairs if not {c, n} & read]


def faster_copy(model, pairs, dtype, layout, all_floats, device):
    """A frozen copy of a module. Weights that need no change are shared, and no weight is copied
    unchanged first.

    Args:
        pairs: (convolution, batch-norm) to make one.
        dtype: Of the copy's weights.
        layout: Memory format of its convolutions; None: as it is.
        all_floats: Buffers that are not saved with the model get the dtype too.
    """

    def convert(t, to_dtype=True):
        t = t.detach()
        dt = dtype if to_dtype and t.is_floating_point() else t.dtype
        if layout is not None and t.dim() == 4:
            return t.to(device=device, dtype=dt, memory_format=layout)
        return t.to(device=device, dtype=dt)

    frozen = lambda p: nn.Parameter(convert(p), requires_grad=False)
    memo = {}
    for conv, norm in pairs:
        memo |= {id(conv): folded(conv, norm, frozen), id(norm): nn.Identity().eval()}
    for m in model.modules():
        if id(m) in memo:
            continue
        for p in m._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = frozen(p)
        for k, b in m._buffers.items():
            if b is None or id(b) in memo:
                continue
            new = convert(b, all_floats or k not in m._non_persistent_buffers_set)
            memo[id(b)] = new.clone() if new.data_ptr() == b.data_ptr() else new
    with torch.no_grad():
        out = copy.deepcopy(model, memo)
    for m in out.modules():
        if isinstance(m, nn.RNNBase):
            m.flatten_parameters()
    return out


@torch.no_grad()
def folded(conv, norm, frozen):
    """A convolution that does what both do."""
    bias = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
    weight, bias = fuse_conv_bn_weights(
        conv.weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    new = copy.deepcopy(conv, {id(conv.weight): frozen(weight), id(conv.bias): None})
    new.bias = frozen(bias)
    return new.train(False)


def difference(a, b):
    """How far outputs are apart, as a share of their spread: root mean square."""
    a, b = [as_plain(o).detach().double().cpu() for o in (a, b)]
    if a.shape != b.shape:
        return float('inf')
    spread = (b - b.mean()).square().mean().sqrt().clamp_min(1e-12)
    return ((a - b).square().mean().sqrt() / spread).item()


def is_faster(a, b, run):
    """Is module `a` faster than `b`? The better of two runs each, which take turns."""
    times = {a: [], b: []}
    for _ in range(2):
        for m, seconds in times.items():
            start = time.perf_counter()
            synchronize(run(m))
            seconds.append(time.perf_counter() - start)
    return min(times[a]) < min(times[b])


def marks_of(model):
    """What shows that weights or hooks changed: the tensors, their versions, some of their values,
    and the hooks.
    """
    tensors = weights_of(model)
    return tensors, places_of(tensors), first_values(tensors), hooks_of(model)


def places_of(tensors):
    return [(t.data_ptr(), t._version) for t in tensors]


@torch.no_grad()
def first_values(tensors):
    """A few values of each tensor."""
    return [t.detach().reshape(-1)[:4].clone() for t in tensors]


def same_marks(marks, model, thorough):
    """Are the weights those of the marks? If not `thorough`, of a few tensors alone the values are
    compared.
    """
    tensors, state, values, hooks = marks
    if places_of(tensors) != state:
        return False
    # subtle: a change through .data counts no version. On a GPU, each batch would wait for this comparison
    if not thorough and tensors[0].is_cuda:
        return True
    same = lambda a, b: [*map(id, a)] == [*map(id, b)]
    if thorough and not (same(weights_of(model), tensors) and hooks_of(model) == hooks):
        return False
    some = range(len(tensors)) if thorough else sorted({0, len(tensors) // 2, len(tensors) - 1})
    return all(
        torch.equal(a, b) for i in some for a, b in zip(first_values([tensors[i]]), [values[i]])
    )
