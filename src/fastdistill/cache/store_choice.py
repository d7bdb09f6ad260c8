"""Measure the size and the information loss of each storage format, and choose a format."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import log
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..base.distributed import on_first, rank
from ..base.outputs import DistillError, DistillWarning, LinearLogits, Outputs, as_dense
from ..base.text_table import text_table
from ..losses.response import dist, kl
from ..teachers.teacher import Teacher
from .file_store import Folder
from .manifest import Manifest
from .output_layer import OutputLayer, find_output_layer, head_of
from .row_layout import Layout, Store, outputs_like
from .teacher_description import Source, spread_positions

# sizes in bytes. A cache of at most TINY bytes is stored without measuring. If all logits take at
# most SMALL bytes, storing all of them is preferred
TINY, SMALL = 32e6, 1e9
NEGLIGIBLE, BAD = 0.01, 0.1  # limits for `share` and `correlation` of `Option.lost`
TEMPERATURES = 1.0, 2.0, 4.0, 8.0
SAMPLES = 256  # maximum number of measured samples
NUMBERS = 2**24  # maximum number of measured logits
LEAST_LOG = log(1e-6)  # minimum log-probability in a comparison
CALLED = "store='hidden': "


@dataclass
class Uses:
    """How a recipe uses the teacher's logits.

    Attributes:
        T: Temperatures of the losses.
        relates: True if a loss uses correlations between the outputs of different samples, as
            `dist` does.
        logits: True if a loss compares logits, not probabilities.
        why: Name of the recipe in messages.
    """

    T: tuple = (1.0,)
    relates: bool = False
    logits: bool = False
    why: str = 'the recipe'


def uses_of(recipe: Any) -> Uses:
    """Return the temperatures and other facts about how a recipe uses the teacher's logits.

    Args:
        recipe: A `Recipe` or a `Term`.
    """
    terms = [t for t in getattr(recipe, 'terms', [recipe]) if t.layers is None]
    T = tuple(dict.fromkeys(float(t.temperature or 1.0) for t in terms)) or (1.0,)
    why = ' + '.join(t.name for t in terms)
    return Uses(T, any(t.relates for t in terms), any(t.compares_logits for t in terms), why)


@dataclass
class Option:
    """A storage format, with its size and its information loss.

    Attributes:
        store: The storage format.
        bytes: Size of one view of one sample in bytes.
        total: Size of the whole cache in bytes.
        lost: List with a dict for each temperature `T`. `kl` is the KL divergence from the
            teacher's distribution to the stored distribution, in nats. `share` is `kl` divided by
            the KL divergence between the teacher and its mean prediction, at most 1. `correlation`
            is the larger decrease of the two correlations in `dist`. None if a loss can't be
            measured, as for draws.
        note: Remark for the table.
    """

    store: Store
    bytes: int
    total: int
    lost: list | None
    note: str = ''

    def worst(self, uses: Uses) -> float:
        """Return the largest information loss for a recipe, where 1 means that everything is
        lost.
        """
        if self.lost is None or (uses.logits and self.store.kind == 'topk'):
            return float('inf')
        each = [loss_at(self.lost, T) for T in dict.fromkeys((1.0, *uses.T))]
        return max(o['correlation' if uses.relates and o['T'] in uses.T else 'share'] for o in each)


def loss_at(lost: list, T: float) -> dict:
    """Interpolate the measured loss to temperature `T`, linearly in log(T)."""
    lost = sorted(lost, key=lambda o: o['T'])
    if T <= lost[0]['T'] or T >= lost[-1]['T']:
        return {**lost[0 if T <= lost[0]['T'] else -1], 'T': T}
    i = next(i for i, o in enumerate(lost) if o['T'] >= T)
    a, b = lost[i - 1], lost[i]
    w = log(T / a['T']) / log(b['T'] / a['T'])
    return {k: (1 - w) * a[k] + w * b[k] for k in a} | dict(T=T)


def lost_by(t: Tensor, got: Tensor, temperatures: Iterable[float]) -> list:
    """Measure the information loss at each temperature, see `Option.lost`.

    Args:
        t: Logits of the teacher, (positions, classes).
        got: The same logits after storing and reading, (positions, classes).
        temperatures: Temperatures of the softmax.
    """
    found = []
    for T in dict.fromkeys(map(float, temperatures)):
        p = (t / T).log_softmax(1)
        # subtle: limit probabilities to at least 1e-6, since the KL would be infinite with
        # tail='zero'
        q = torch.maximum((got / T).log_softmax(1), p.clamp_max(LEAST_LOG))
        lost = float((p.exp() * (p - q).where(p > -torch.inf, 0.0)).sum(1).mean())
        mean = p.exp().mean(0, keepdim=True).log().expand_as(p)
        told = float(kl(mean, p, T=1.0))
        # subtle: subtract `dist` of the logits with themselves, which is not 0 if a class hardly
        # varies
        apart = lambda x, b, T=T: float(dist(x, t, T=T, beta=b, gamma=1 - b)) / T**2
        error = max(apart(got, b) - apart(t, b) for b in (0.0, 1.0))
        # subtle: divide by at least 1e-6 nats, so that rounding errors are ignored if all outputs
        # are equal
        share = min(max(lost, 0.0) / max(told, 1e-6), 1.0)
        found.append(dict(T=T, kl=max(lost, 0.0), share=share, correlation=max(error, 0.0)))
    return found


def measured_options(
    batches: list, stores: list, count: int, temperatures: Iterable[float] = TEMPERATURES
) -> list:
    """Store and read the outputs of a few samples in each format, and measure the information loss.

    Args:
        batches: `Outputs` of a few samples.
        stores: The formats, as `Store`s.
        count: Number of rows of the whole cache.
        temperatures: Temperatures at which the loss is measured.

    Returns:
        A list of `Option`s. Formats that the outputs do not allow are left out.
    """
    dense = lambda o: as_dense(o.logits)
    axis = -1 if isinstance(batches[0].logits, LinearLogits) else stores[0].axis
    flat = lambda t: t.detach().float().movedim(axis, -1).reshape(-1, t.shape[axis])
    exact, options = torch.cat([flat(dense(o)) for o in batches]), []
    on = torch.cat([mask_of(o, dense(o), axis) for o in batches])
    for store in stores:
        try:
            layout = Layout.of(batches[0], store)
            total = count * layout.bytes + layout.head_bytes
            if store.kind == 'draws':
                note = f'unbiased at T={store.T:g}, only for kl and soft_ce'
                options.append(Option(store, layout.bytes, total, None, note))
                continue
            if store.kind == 'pca':
                read: list[Any] = [read_unseen(exact, store)]
            else:
                head = head_of(batches[0].logits, layout)
                rows = [torch.from_numpy(layout.encode(b, head)) for b in batches]
                read = [layout.decode(o, head).logits for o in rows]
            # tail='bucket' needs the student's logits, for which the teacher's logits are used here
            own = [dense(b).detach().float().cpu() for b in batches]
            logits = [o if isinstance(o, Tensor) else o.dense(t) for o, t in zip(read, own)]
        except DistillError:
            continue
        got = torch.cat([flat(o) for o in logits]).to(exact.device)
        lost = lost_by(exact[on], got[on], temperatures)
        options.append(Option(store, layout.bytes, total, lost))
    return options


def read_unseen(t: Tensor, store: Store, folds: int = 4) -> Tensor:
    """Store and read logits, (N, C), with the principal components of different samples.

    The components are computed from a few samples, and lose more information about other samples.
    """
    layout, got, fold = Layout.of(Outputs(t), store), torch.empty_like(t), torch.arange(len(t))
    for own in (fold % folds == i for i in range(min(folds, len(t)))):
        head = head_of(t[~own] if len(t) > 1 else t, layout)
        rows = torch.from_numpy(layout.encode(Outputs(t[own]), head))
        got[own] = cast(Tensor, layout.decode(rows, head).logits).to(t)
    return got


def mask_of(out: Outputs, logits: Tensor, axis: int) -> Tensor:
    """Return a mask of the positions to compare, which excludes padding."""
    on = (logits.movedim(axis, -1) != 0).any(-1)
    return (on if out.mask is None else on & (out.mask > 0)).reshape(-1)


def table_of_options(options: list, uses: Uses, notes: Sequence[str] = ()) -> str:
    """Format options as a table.

    Args:
        options: The options.
        uses: How the recipe uses the logits.
        notes: Lines to add below the table.
    """
    warmest = max(uses.T)
    head = ['store', 'bytes per view', 'total', 'KL at T=1', f'KL at T={warmest:g}', 'correlation']
    rows = []
    for o in options:
        size = [str(o.store), f'{o.bytes:,}', size_text(o.total)]
        if o.lost is None:
            rows.append([*size, o.note, '', ''])
            continue
        cold, warm = (loss_at(o.lost, T) for T in (1.0, warmest))
        loss = [f'{d["kl"]:.2g} ({100 * d["share"]:.2g}%)' for d in (cold, warm)]
        rows.append([*size, *loss, f'{1 - warm["correlation"]:.4f}'])
    below = (
        'KL in nats, and as a percentage of the KL between the teacher and its mean prediction; '
        f'correlations as in dist at T={warmest:g}, relative to storing all logits'
    )
    return '\n'.join([text_table(head, rows), below, *notes])


def size_text(n: float) -> str:
    return f'{n / 1e9:.2f} GB' if n >= 1e9 else f'{n / 1e6:.1f} MB'


def choose_option(options: list, uses: Uses) -> Option:
    """Choose the option for `store='auto'`.

    Storing all logits is preferred if the cache is small and the loss negligible. Otherwise, the
    smallest option with a negligible loss is chosen. If no option has a negligible loss, the option
    with the smallest loss is chosen.
    """
    good = [o for o in options if o.worst(uses) <= NEGLIGIBLE]
    exact = [o for o in good if o.store.kind == 'logits' and o.total <= SMALL]
    if exact:
        return min(exact, key=lambda o: o.total)
    return min(good, key=lambda o: o.total) if good else min(options, key=lambda o: o.worst(uses))


def check_kind_of_store(store: Store, kind: str) -> None:
    """Raise a DistillError if classes would be stored for a model that does not predict classes.

    Args:
        store: The storage format.
        kind: Kind of the outputs: 'softmax', 'sigmoid' or 'regression'.
    """
    if kind != 'softmax' and store.kind in ('topk', 'draws', 'pca'):
        what = f'topk={store.topk}' if store.kind == 'topk' else f'kind={store.kind!r}'
        raise DistillError(
            f'{what} stores the likeliest of several classes, but this model predicts {kind} outputs: '
            "use store='logits'."
        )


@dataclass
class Choice:
    """Chooses the storage format for the outputs of a teacher. `write_cache` calls it.

    Attributes:
        teacher: The teacher.
        kind: Kind of the outputs: 'softmax', 'sigmoid' or 'regression'.
        uses: fn(teacher logits of a few samples) -> `Uses`. None if the recipe is unknown.
        explicit: True if the user passed a recipe, so that an unsuitable `store=` causes a warning.
        tasks: Views of samples to measure, as the integers that `Source.run` takes. None for samples
            spread over the dataset.
    """

    teacher: Any
    kind: str = 'softmax'
    uses: Callable | None = None
    explicit: bool = False
    tasks: np.ndarray | None = None

    def __call__(
        self,
        where: Any,
        store: Store,
        source: Source,
        first: Outputs,
        views: int,
        force: bool = False,
    ) -> tuple:
        """Choose the storage format.

        The format of an existing cache is kept. Otherwise, formats are measured on a few samples,
        unless the cache is tiny or the user chose all logits.

        Args:
            where: Folder of the cache.
            store: The format that the user requested.
            source: Teacher and data. `run` of this `Source` must have an argument `teacher`.
            first: Outputs of the first sample.
            views: Number of views of each sample.
            force: True if an existing cache may be overwritten, so that what the requested format
                loses is measured again.

        Returns:
            (`Store`, `Source` of the outputs to store, information loss as in `Option.lost`, the
            measured outputs). The outputs are those of `few_outputs(source)`, or None if nothing was
            measured, or if other samples were.
        """
        old = existing_store(where)
        if store.kind == 'auto' and old is not None:
            store = old
        # numbers may have any scale, such as 2000 ± 10, where the steps of float16 are 1
        dtype = 'float32' if self.kind == 'regression' else 'float16'
        logits = Store('logits', dtype, axis=store.axis)
        if store.kind == 'auto':
            count = len(source.keys) * max(views, 1)
            if self.kind != 'softmax' or count * Layout.of(first, logits).bytes <= TINY:
                return logits, source, (), None
            return self._best(store, source, count)
        if store.kind == 'hidden' and not isinstance(first.logits, LinearLogits):
            return store, self._with_states(source, store.layer), (), None
        lossy = store.kind in ('topk', 'pca') and isinstance(first.logits, Tensor)
        if not lossy or (old is not None and not force):
            return store, source, (), None
        return store, source, *self._lost(store, source)

    def _with_states(self, source: Source, layer: str | None = None) -> Source:
        run = lambda teacher: source.first(source.bs, teacher=teacher)
        found = find_output_layer(self.teacher, run, layer)
        return replace(source, run=HiddenRun(source.run, self.teacher, found))

    def _lost(self, store: Store, source: Source) -> tuple:
        """Measure the information loss of the requested format, and warn if it is too large.

        Returns:
            (information loss, measured outputs).
        """
        batches = few_outputs(source, self.tasks)
        spread = batches if self.tasks is None else None
        Layout.of(batches[0], store)  # raises an error if the format does not suit the outputs
        uses = self._uses(batches)
        found = measured_options(batches, [store], len(source.keys), (*TEMPERATURES, *uses.T))
        if not found:
            return (), spread
        if self.explicit and found[0].worst(uses) > BAD and rank() == 0:
            text = f'{store} is not suitable for {uses.why}:\n{table_of_options(found, uses)}'
            warnings.warn(DistillWarning(text), stacklevel=5)
        return found[0].lost, spread

    def _uses(self, batches: Sequence[Any]) -> Uses:
        if self.uses is None:
            return Uses()
        return self.uses(torch.cat([as_dense(o.logits) for o in batches]))

    def _best(self, store: Store, source: Source, count: int) -> tuple:
        """Measure all formats for `store='auto'`, print a table, and choose one."""
        batches = few_outputs(source, self.tasks)
        uses, axis, notes = self._uses(batches), store.axis, []
        n, temperatures = batches[0].logits.shape[axis], (*TEMPERATURES, *uses.T)
        some = [Store('logits', d, axis=axis) for d in ('float16', 'int8')]
        some += [Store('topk', 'int8', k, axis=axis) for k in (10, 50) if k < n]
        some += [Store('draws', draws=50, T=uses.T[0], axis=axis), Store('pca', axis=axis)]
        options = measured_options(batches, some, count, temperatures)
        try:
            linear = self._with_states(source)
        except DistillError as e:
            notes = [f'Hidden states are not possible. {str(e).removeprefix(CALLED)}']
        else:
            states = [Store('hidden', d, axis=axis) for d in ('float16', 'int8')]
            hidden = few_outputs(linear, self.tasks)
            options += measured_options(hidden, states, count, temperatures)
        options.sort(key=lambda o: o.total)
        best = options[on_first(lambda: options.index(choose_option(options, uses)))]
        if rank() == 0:
            print(table_of_options(options, uses, notes))
            print(f'fastdistill: {asked_text(best)}')
        if best.store.kind == 'hidden':
            return best.store, linear, best.lost, None
        return best.store, source, best.lost, batches if self.tasks is None else None


def asked_text(option: Any) -> str:
    """Describe the chosen format, and the `store=` that requests it explicitly."""
    store = option.store
    options = dict(topk=f'dict(topk={store.topk}, dtype={store.dtype!r})')
    options |= dict(logits=repr(store.dtype), hidden=f"dict(kind='hidden', dtype={store.dtype!r})")
    options['pca'] = f'dict(components={store.components})'
    return f'{store} (the same as store={options[store.kind]})'


def existing_store(where: Folder) -> Store | None:
    """Return the `Store` of an existing cache, or None if the folder has no cache."""
    if where.size('manifest.json') is None:
        return None
    try:
        return outputs_like(Manifest.read(where).layout)[1]
    except DistillError:
        return None


class HiddenRun:
    """A `Source.run` that returns hidden states instead of logits."""

    def __init__(self, run: Callable, teacher: Any, layer: OutputLayer):
        self.run, self.layer = run, layer
        self.teacher = Teacher(teacher, layers=[*teacher.layers, layer.tap])

    def __call__(self, tasks: Any, bs: int) -> Iterator[Outputs]:
        """Yield the outputs of each batch."""
        with closing(self.run(tasks, bs, teacher=self.teacher)) as batches:
            for out in batches:
                yield self.layer.outputs(out, bool(self.teacher.runner.half))


def few_outputs(source: Source, tasks: np.ndarray | None = None) -> list:
    """Run the teacher on a few samples and return its outputs, as a list of batches."""
    n, bs = len(source.keys), source.bs
    if tasks is None:
        most = min(n, SAMPLES)
        tasks = spread_positions(n, most - most % bs or most)  # whole batches, if there are any
    found, left = [], NUMBERS
    with closing(source.run(np.asarray(tasks), min(bs, len(tasks)))) as batches:
        for out in batches:
            each = out.logits.shape.numel() // len(out.logits)
            k = max(min(len(out.logits), left // each), 1)
            found.append(first_rows(out, k))
            left -= k * each
            if left < each:
                break
    return found


def first_rows(out: Outputs, k: int) -> Outputs:
    """Return the outputs of the first samples of a batch."""
    t: Any = out.logits
    t = replace(t, hidden=t.hidden[:k]) if isinstance(t, LinearLogits) else t[:k]
    return Outputs(t, {}, None if out.mask is None else out.mask[:k])
