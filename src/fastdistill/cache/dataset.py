"""Run a teacher once over a map-style PyTorch dataset, and train from the stored outputs."""

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate

from ..base.errors import options_of_group
from ..base.outputs import DistillError, Outputs, check_axis
from ..base.random_state import RandomGuard, restored_once, seeded
from ..base.sample_seeds import seeds_of, view_of
from ..base.transform_random_state import Generators
from ..teachers.teacher import Teacher, reading_tokens
from .digests import code_of, fingerprint, first_part, flat_values, input_digest
from .json_checks import shortened
from .keys import dataset_keys, folder_of, names_of_samples, root_of
from .manifest import moved_samples, refuse, sample_differences
from .per_sample import per_sample
from .reader import TeacherCache
from .row_layout import Store
from .sample_files import dataset_files
from .store_choice import Choice, check_kind_of_store, uses_of
from .teacher_description import (
    Source,
    check_alone,
    check_shared_keys,
    check_vocab_of_outputs,
    distinct_views,
    identity_of,
    on_axis,
    outputs_of,
    spread_positions,
    unrepeatable,
)
from .write_progress import shown_progress
from .writer import options_of_run, write_cache


def cache_dataset(
    teacher: Any,
    dataset: Any,
    path: Path | str,
    views: int = 1,
    store: Any = 'auto',
    *,
    recipe: Any = None,
    keys: Callable | Sequence | None = None,
    inputs: Callable | None = None,
    batch_tfm: Callable | None = None,
    axis: int = 1,
    force: bool = False,
    progress: bool | Callable = True,
    run: dict | None = None,
    facts: dict | None = None,
) -> TeacherCache:
    """Run the teacher on each view of each sample, store its outputs, and open the cache.

    If a previous run was interrupted, it is resumed.

    Args:
        teacher: A `Teacher`, or a callable fn(*inputs) -> Outputs or logits. An ensemble of models
            that predict labels or numbers needs `Teacher([...], kind=...)`.
        dataset: Map-style dataset. To train a student, pass the same dataset to `Replayed`.
        path: Folder or URL of the cache.
        views: Number of augmented views of each sample. If 0, store one output for each item of the
            dataset, and don't replay transforms in training.
        store: How to store the outputs, see docs/stores.md. 'logits', 'topk', 'hidden', 'draws' and
            'pca' select what is stored. 'float32', 'float16' and 'int8' store all logits with this
            dtype. A dict has more options, such as dict(topk=10, dtype='int8'). 'auto' measures the
            size and accuracy of each format, and chooses one.
        recipe: Recipe or term for which `store` is chosen or checked. If None, assume KL at T=1.
        keys: Names of the samples: a list, or a function of the index. If None, the names are read
            from the dataset.
        inputs: fn(batch) -> inputs of the teacher. If None, use the first element of a batch that
            is a tuple, and the whole batch otherwise.
        batch_tfm: Random transform fn(x) -> x, which is applied to one sample at a time, see
            `per_sample`.
        axis: Class axis.
        force: If True, overwrite an existing cache that was written with different data, transforms
            or a different teacher.
        progress: True for a progress bar in terminals and notebooks, False for none, or fn(rows
            done, total rows, bytes done).
        run: Less common options, as a dict.

            - 'bs' (default 64), 'num_workers', 'collate_fn': options of the DataLoader.
            - 'device': device to which the batches are moved.
            - 'seed': random seed, 0 by default.
            - 'forecast': fn(Forecast), called before the teacher runs.
        facts: Information to store in the cache, as a dict.

            - 'vocab': class names, in the order of the logits.
            - 'transforms': {name: description} of the transforms. The descriptions are compared
              when an interrupted run is resumed.
    """
    loader, options = options_of_run(
        run, bs=64, num_workers=0, collate_fn=default_collate, device=None
    )
    facts = options_of_group('facts', facts, ('vocab', 'transforms'))
    if isinstance(teacher, nn.Module):
        raise DistillError(
            'A bare module may be in training mode, with gradients: pass Teacher(model).'
        )
    check_axis(axis)
    teacher = on_axis(teacher, axis)
    store, kind = Store.of(store, axis), getattr(teacher, 'kind', 'softmax')
    check_kind_of_store(store, kind)
    uses = None if recipe is None else lambda t: uses_of(recipe)
    check_indexed(dataset)
    if not len(dataset):
        raise DistillError('The dataset is empty: there is nothing to write.')
    names = dataset_keys(dataset, keys)
    items = Views(dataset, names, views, options['seed'])
    get = first_part if inputs is None else inputs
    shake = batch_tfm if views else None

    def asked(tasks: Any, bs: int) -> Iterator:
        """Yield the teacher's inputs for each batch."""
        # starting workers takes longer than loading one batch
        workers = loader['num_workers'] if len(tasks) > bs else 0
        collate = partial(collate_pairs, loader['collate_fn'])
        dl = DataLoader(items, bs, sampler=tasks.tolist(), num_workers=workers, collate_fn=collate)
        for batch, seeds in dl:
            x = to_device(get(batch), loader['device'])
            yield x if shake is None else shaken(shake, seeds, x)

    def outputs(tasks: Any, bs: int, teacher: Any = None) -> Iterator[Outputs]:
        teacher = held if teacher is None else teacher
        with teacher if hasattr(teacher, '__enter__') else nullcontext():
            yield from (outputs_of(teacher, x) for x in asked(tasks, bs))

    with RandomGuard():
        n = len(dataset)
        look = lambda i, view: fingerprint(*flat_values(next(asked(np.array([view * n + i]), 1))))
        items.views = views = distinct_views(views, n, look)
        check_items_repeat(items, asked if shake is not None else None)
        first_views = lambda at: (fingerprint(*flat_values(x)) for x in asked(at, 1))
        check_shared_keys(names, first_views, place_in(dataset))
        if isinstance(teacher, Teacher):
            x = next(asked(np.array([0]), 1))
            teacher = reading_tokens(teacher, *(x if isinstance(x, tuple) else (x,)))
        held = teacher
        check_alone(outputs, len(dataset))
        check_vocab_of_outputs(facts.get('vocab'), outputs, axis, kind)
        described = dict(facts.get('transforms') or {})
        if shake is not None:
            described['batch_tfm'] = code_of(shake if inspect.isroutine(shake) else type(shake))
        source = Source(
            names,
            outputs,
            loader['bs'],
            identity_of(teacher),
            described,
            root_of(folder_of(dataset)),
            facts.get('vocab'),
            items.digests(),
            dataset_files(dataset),
        )
        with shown_progress(progress) as show:
            return write_cache(
                path,
                source,
                store,
                views=views,
                force=force,
                progress=show,
                choose=Choice(teacher, kind, uses, recipe is not None),
                **options,
            )


def shaken(fn: Callable, seeds: Any, x: Any) -> Any:
    """Apply a random transform to a batch, with separate random numbers for each sample."""
    xs = x if isinstance(x, tuple) else (x,)
    if not all(isinstance(o, Tensor) for o in xs):
        raise DistillError(
            "batch_tfm= takes tensors, but the teacher's inputs are "
            f'{", ".join(type(o).__name__ for o in xs)}: use a transform of the dataset.'
        )
    return per_sample(fn, seeds, *xs)


class Views(Dataset):
    """Dataset of all views of all samples. With N samples, view `v` of sample `i` is item `v*N +
    i`.
    """

    def __init__(self, dataset: Any, keys: np.ndarray, views: int, seed: int):
        self.dataset, self.keys, self.views, self.seed = dataset, keys, views, seed
        self.own = OwnGenerators(dataset)

    def __len__(self) -> int:
        return len(self.dataset) * max(self.views, 1)

    def __getitems__(self, tasks: Sequence[int]) -> list:
        with restored_once():
            return [self[t] for t in tasks]

    def __getitem__(self, task: int) -> tuple:
        view, i = divmod(task, len(self.dataset))
        key = int(self.keys[i])
        item = view_item(self.dataset, i, key, view, self.seed, self.own)
        return item, batch_seed(key, view, self.seed)

    def digests(self) -> list[dict]:
        """Return digests of the inputs of a few samples.

        The inputs must have the same digests when the cache is written again and, unless the cache
        has no views, in training.
        """
        n, views = len(self.dataset), max(self.views, 1)
        tasks = [(i % views, int(r)) for i, r in enumerate(spread_positions(n, 8))]
        return [dict(row=r, view=v, digest=input_digest(self[v * n + r][0])) for v, r in tasks]


def collate_pairs(collate: Callable, pairs: Sequence[tuple]) -> tuple:
    return collate([o for o, _ in pairs]), torch.stack([s for _, s in pairs])


def to_device(x: Any, device: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, (tuple, list)):
        return tuple(to_device(o, device) for o in x)
    return {k: to_device(v, device) for k, v in x.items()} if isinstance(x, dict) else x


def check_items_repeat(items: Any, asked: Any) -> None:
    """Load a few items twice to find random transforms that can't be replayed.

    The check runs before the cache is written.
    """
    tasks, n = spread_positions(len(items), 8), len(items.dataset)
    draw = lambda items, i: fingerprint(*flat_values(items[i][0]))
    # with views=0, a different seed must give the same items
    other = items if items.views else Views(items.dataset, items.keys, 0, items.seed + 1)
    for i in tasks.tolist():
        if draw(items, i) != draw(other, i):
            why = unrepeatable('The item transforms', i % n) if items.views else NOT_CLEAN
            raise DistillError(why)
    if asked is None:
        return
    for i, a, b in zip(tasks, asked(tasks, 1), asked(tasks, 1)):
        if fingerprint(*flat_values(a)) != fingerprint(*flat_values(b)):
            raise DistillError(unrepeatable('batch_tfm', i % n))


NOT_CLEAN = (
    "views=0 stores one output for each item of the dataset, but this dataset's items differ "
    'each time. Pass the dataset without random transforms here, and the dataset with them to '
    'Replayed, or use views=1 or more.'
)


class Replayed(Dataset):
    """A dataset whose random transforms reproduce the views in a cache.

    Each item is the item of the original dataset plus the bytes of its row, `(*item, row)`.
    `cache.decode(rows)` turns a batch of these bytes into the teacher's `Outputs`. Call `set_epoch`
    before each epoch.

    Args:
        dataset: Map-style dataset. The transforms may use the global random generators of Python,
            NumPy or PyTorch, or generators of the dataset.
        cache: A `TeacherCache`. If the cache was written with views=0, transforms are not replayed
            and stay random.
        keys: Names of the samples: a list, or a function of the index. If None, the names are read
            from the dataset.
        seeds: If True, each item also has a seed, `(*item, row, seed)`. Pass the seeds of a batch
            to `per_sample(fn, seeds, x)`.
    """

    def __init__(
        self, dataset: Any, cache: Any, keys: Callable | Sequence | None = None, seeds: bool = False
    ):
        check_indexed(dataset)
        self.dataset, self.cache, self.seeds = dataset, cache, seeds
        self.keys, self.own = dataset_keys(dataset, keys), OwnGenerators(dataset)
        self.at = cache.find(self.keys, keys is not None, 'Replayed(dataset, cache, keys=...)')
        item = lambda i, view: view_item(dataset, i, int(self.keys[i]), view, cache.seed, self.own)
        digest = lambda i, view: input_digest(item(i, view))
        # subtle: in the order of the cache, `find` gives each sample its own row
        if not np.array_equal(self.keys, cache.keys):
            first_views = lambda at: (digest(i, 0) for i in at.tolist())
            check_shared_keys(self.keys, first_views, place_in(dataset), most=256)
        files = dataset_files(dataset)
        cache.check_files(files, self.at)
        cache.check(once=True)
        if cache.views:
            look = lambda i, view: dict(digest=digest(i, view))
            refuse(cache.folder, sample_differences(cache.manifest, self.at, look), cache.force)
        # with views=0, training may use different transforms
        elif keys is not None and files is None:
            refuse(cache.folder, moved_samples(cache.manifest, self.at, digest), cache.force)
        # subtle: in shared memory, so that persistent workers see the new epoch
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self.epoch.share_memory_()  # a copied dataset gets its own shared memory

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, idxs: Sequence[int]) -> list:
        """Return the items of a batch. DataLoaders call this method instead of `__getitem__`."""
        with restored_once():
            return [self[i] for i in idxs]

    def __getitem__(self, i: int) -> Any:
        i = range(len(self))[i]
        c, key = self.cache, int(self.keys[i])
        view = view_of(key, int(self.epoch), c.views, c.seed)
        d = self.dataset
        item = view_item(d, i, key, view, c.seed, self.own) if c.views else d[i]
        row = torch.from_numpy(c.row(int(self.at[i]), view))
        rest = (row, batch_seed(key, view, c.seed)) if self.seeds else (row,)
        return (*item, *rest) if isinstance(item, (tuple, list)) else (item, *rest)


def place_in(dataset: Any) -> Callable[[int], str]:
    """Return a function that names the sample at a position."""
    try:
        names = names_of_samples(dataset)
    except DistillError:
        return str  # the samples of this dataset have no known names
    shown = lambda o: f' ({shortened(repr(o), 100)})' if isinstance(o, (str, PurePath)) else ''
    return lambda i: f'{i}{shown(names[i])}'


def view_item(dataset: Any, i: int, key: Any, view: int, seed: int, own: Any) -> Any:
    """Return one view of item `i`."""
    s = seeds_of(seed, key, view)
    with seeded(s), own.of(i).seeded(s):
        return dataset[i]


class OwnGenerators:
    """Finds the random generators of the dataset to which an item belongs.

    An item keeps its random numbers if its dataset is used through a `Subset` or `ConcatDataset`.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.found: dict[tuple, Generators] = {}

    def of(self, i: int) -> Generators:
        d = self.dataset
        way: tuple[int, ...] = ()
        while True:
            # a `Subset`
            if hasattr(d, 'dataset') and hasattr(d, 'indices'):
                d, i, way = d.dataset, d.indices[i], (*way, 0)
            elif hasattr(d, 'datasets') and hasattr(d, 'cumulative_sizes'):  # a `ConcatDataset`
                k = bisect_right(d.cumulative_sizes, i)
                d, i, way = d.datasets[k], i - (d.cumulative_sizes[k - 1] if k else 0), (*way, k)
            else:
                break
        if way not in self.found:
            self.found[way] = Generators(d)
        return self.found[way]


def batch_seed(key: Any, view: int, seed: int) -> Tensor:
    """Compute the seed of a sample for batch transforms.

    The seed is below 2**63, so that it fits in an int64 tensor.
    """
    return torch.tensor(seeds_of(seed, key, view, 1) >> 1)


def check_indexed(dataset: Any) -> None:
    if not hasattr(dataset, '__getitem__') or not hasattr(dataset, '__len__'):
        raise DistillError(
            f'{type(dataset).__name__} can only be iterated. Stored outputs belong to samples '
            'with an index, so use a map-style dataset (__getitem__ and __len__).'
        )
