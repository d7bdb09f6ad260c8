"""Run the teacher once over a Learner's data and store the outputs, or verify stored outputs."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.basics import DataLoaders, L, Learner, Pipeline, TfmdDL, TfmdLists
from fastai.data.transforms import Normalize
from fastai.tabular.core import TabDataLoader
from fastai.text.data import SortedDL

from ..base.errors import check_whole, few_names
from ..base.model_state import restored
from ..base.outputs import (
    DistillError,
    DistillWarning,
    Draws,
    Outputs,
    as_plain,
    tensors_in,
)
from ..base.random_state import RandomGuard
from ..cache.digests import fingerprint, flat_values
from ..cache.file_store import open_folder
from ..cache.json_checks import shortened
from ..cache.reader import TeacherCache
from ..cache.row_layout import Store
from ..cache.store_choice import Choice, check_kind_of_store, existing_store, uses_of
from ..cache.teacher_description import (
    Source,
    check_alone,
    check_shared_keys,
    distinct_views,
    identity_of,
    spread_positions,
    unrepeatable,
)
from ..cache.verify_rows import Verified, comparable, row_errors
from ..cache.write_progress import shown_progress
from ..cache.writer import check_views, options_of_run, write_cache
from ..checks.class_order import map_classes
from ..recipes.default import auto, facts_for_auto
from ..recipes.recipe_text import as_recipe
from ..recipes.term import Recipe, Term
from ..teachers.members import known_classes, single_teachers
from ..teachers.raw_items import reads_only_items, with_items
from ..teachers.teacher import Teacher, reading_tokens
from .class_names import stored_order, vocab_of
from .language_model import inputs_of, is_stream, share_n_inp, stream_outputs
from .learner_heads import HeadData, heads_of, options_of_heads
from .probe_batches import loader_of
from .raw_items import raw_items
from .sample_keys import (
    are_contents,
    content_keys,
    item_keys,
    items_of,
    key_root,
    sample_files,
    storage_order,
)
from .sampled_batches import Plan, attach, refuse_unindexed, sampled
from .task import Task, task_of
from .teacher_check import check_teacher
from .teachers import class_names, image_stats, is_heads, teacher_of
from .transforms import describe_transforms, labels_are_points, moves


def for_each_head(write):
    """Decorate `cache_teacher` so that a dict of teachers is also accepted.

    For a dict {head name: teacher}, one cache is written for each head. The folder of each cache is
    named after the head.
    """

    @wraps(write)
    def _write(teacher, dls, path, *args, kind=None, **kwargs: Any):
        dls = data_of(dls)
        if not is_heads(teacher):
            return write(teacher, dls, path, *args, kind=kind, **kwargs)
        share_n_inp(dls)
        heads = heads_of(teacher)
        kinds = options_of_heads(kind, 'kind', heads)
        recipes = options_of_heads(kwargs.pop('recipe', None), 'recipe', heads)

        def of_head(k, h):
            folder = open_folder(path).sub(k)
            try:
                options = dict(kind=kinds[k] or 'softmax', recipe=recipes[k], **kwargs)
                return write(h.source, HeadData(dls, h), folder, *args, **options)
            except DistillError as e:
                raise DistillError(f'{k}: {e}') from e

        caches = {k: of_head(k, h) for k, h in heads.items()}
        return {k: caches.get(str(k)) for k in teacher}

    return _write


@for_each_head
def cache_teacher(
    teacher: Any,
    dls: DataLoaders,
    path: Path | str,
    views: int = 1,
    store: Any = 'auto',
    layers: Sequence[str] | None = None,
    *,
    recipe: Term | Recipe | str | None = None,
    valid: bool = False,
    unlabeled: Any = None,
    keys: Callable | Sequence | None = None,
    kind: str | None = None,
    axis: int | None = None,
    check: bool = True,
    force: bool = False,
    progress: bool | Callable = True,
    run: dict | None = None,
) -> TeacherCache:
    """Run the teacher on each view of each sample, store its outputs, and open the cache.

    An interrupted run is resumed.

    Args:
        teacher: A Learner, an exported .pkl, a module, a `Teacher`, or a list of these. For a
            student with several heads, pass a dict {head name: teacher} (docs/classes.md). Then one
            cache is written for each head, in a folder named after the head, and a dict of caches
            is returned.
        dls: DataLoaders whose training set (with its augmentation) is cached, or the student's
            Learner.
        path: Folder or URL of the cache.
        views: Number of augmented views of each sample. With 0, the teacher sees each sample
            without augmentation, while the student's augmentation stays random. Use 0 for a teacher
            with `items=`, because such a teacher never sees the augmentation.
        store: How outputs are stored (docs/stores.md): 'logits', 'topk', 'hidden', 'draws' or
            'pca'. Use 'float32', 'float16' or 'int8' to store all logits in that number format. Use
            a dict to set several options, such as dict(topk=10, dtype='int8'). With 'auto', the
            size and the error of each format are measured, and the best format is chosen.
        layers: Names of teacher layers whose outputs are also stored.
        recipe: Recipe for which `store` is chosen or checked. If None, the default recipe is
            assumed.
        valid: Whether to cache the validation set too. With True, the progress table shows the loss
            of each term on the validation set.
        unlabeled: Items without labels, or a DataLoader, to cache instead of the training set.
        keys: Names of the training samples: a list, or a function of the item. If None, samples are
            identified by their items.
        kind, axis: Kind of logits and class axis. If None, both are derived from the loss function
            of the student's Learner, the DataLoaders or the teacher's Learner. A label that one of
            these loss functions ignores (`ignore_index`) is ignored in the check.
        check: Whether to look for mistakes first, as `Learner.check_teacher` does.
        force: Whether to overwrite a cache that was written from different data or a different
            teacher.
        progress: Whether to show a progress bar in terminals and notebooks. To show the progress in
            a different way, pass a function fn(rows done, total rows, bytes done).
        run: Rarely used options, as a dict.

            - 'bs', 'num_workers': options of the DataLoader, by default the same as in `dls`.
            - 'seed': seed of the random numbers, 0 by default.
            - 'forecast': fn(Forecast), called before the teacher runs.
    """
    share_n_inp(dls)
    loader, options = options_of_run(run, bs=None, num_workers=None)
    task = task_of_data(dls, teacher, kind, axis)
    store = Store.of(store, task.axis)
    check_kind_of_store(store, task.kind)
    asked = {} if layers is None else dict(layers=layers)
    if valid and unlabeled is not None:
        raise DistillError(
            'valid=True caches the labeled validation set along with the training set. Omit it '
            'with unlabeled=.'
        )
    train = dls.train if unlabeled is None else loader_of(unlabeled, dls)
    teacher = stored_teacher(teacher, dls, task, **asked)
    task = with_ignored_label(task, teacher)
    # outputs stored in float32 must be exactly the outputs of the model
    if store.dtype == 'float32' and 'precision' not in teacher.run:
        teacher = Teacher(teacher, run=dict(precision='fp32'))
    found = check_teacher(dls, teacher, task, n_epoch=None).enforce() if check else None
    known = as_recipe(recipe)
    choice = lambda t: auto(**facts_for_auto(t.shape, task, lambda: t))
    uses = lambda t: uses_of(choice(t) if known is None else known)
    first_view = np.arange(train.bs) if is_stream(train) else None
    choose = Choice(teacher, task.kind, uses, known is not None, first_view)
    given = dict(force=force, choose=choose, **options)
    names = None if task.kind == 'regression' else classes_of(teacher, dls)
    source = lambda dl, views, keys: source_of(
        teacher, dls, dl, views, options['seed'], keys, names, **loader
    )
    with RandomGuard():  # DataLoaders draw a random seed for their workers
        views = 0 if only_items(teacher, views) else views_of(train, views, options['seed'])
        with shown_progress(progress) as show:
            of_train = replace(source(train, views, keys), doubt=found.doubt if check else '')
            cache = write_cache(path, of_train, store, views=views, progress=show, **given)
        if valid:
            store = replace(existing_store(cache.folder), layer=store.layer)
            names_too = keys if callable(keys) else None
            with shown_progress(progress) as show:
                write_cache(
                    cache.folder.sub('valid'),
                    source(dls.valid, 0, names_too),
                    store,
                    views=0,
                    progress=show,
                    # subtle: one layer decodes the rows of both sets
                    head=cache.files.head('cpu'),
                    **given,
                )
    cache.sample_names, cache.named_items = keys, content_keys(train.dataset)
    return cache


def only_items(teacher, views):
    """Return True if the teacher reads only raw items, so its outputs are the same for every view."""
    if not reads_only_items(teacher):
        return False
    if views > 1:
        raise DistillError(
            f"views={views}, but a teacher with items= does not see the student's augmentation: its "
            'outputs are the same for each view. Use views=0: the augmentation stays random.'
        )
    return True


def views_of(dl, views, seed):
    """Return the number of views to store. If no transform is random, all views are the same, so a
    single view is stored.
    """
    check_views(views)
    if views < 2 or is_stream(dl):
        return views  # the views of a language model differ in the order of its texts
    return distinct_views(views, *inspected_views(dl, views, seed))


def inspected_views(dl, views, seed=0):
    """Return (number of samples, fn(position, view)) for `distinct_views` and `views_differ`."""
    refuse_unindexed(dl)
    n = len(dl.dataset)
    return n, view_inspector(dl, Plan(np.arange(n, dtype=np.uint64), views, seed))


def verify_cache(
    cache: TeacherCache | Path | str,
    teacher: Any,
    dls: DataLoaders,
    n: int = 64,
    seed: int = 0,
    unlabeled: Any = None,
    **kwargs: Any,
) -> 'Verified':
    """Run the teacher again on some views and compare its outputs with the stored ones.

    Args:
        cache: A `TeacherCache`, or its path.
        teacher, dls: The teacher and the DataLoaders from which the cache was written.
        n: Number of rows to compare.
        seed: Seed for choosing the rows.
        unlabeled: As in `cache_teacher`.
        **kwargs: Options of `cache_teacher`: keys, kind, axis, layers.
    """
    if isinstance(cache, Mapping):
        raise DistillError(
            'verify_cache checks one head at a time. Pass its cache, its teacher and its kind: '
            "verify_cache(caches['color'], teachers['color'], dls, kind='softmax')."
        )
    check_whole('n', n)
    cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
    m = cache.manifest
    dls = data_of(dls)
    task = task_of_data(dls, teacher, kwargs.pop('kind', None), kwargs.pop('axis', None))
    keys = kwargs.pop('keys', cache.sample_names)
    teacher = stored_teacher(teacher, dls, task, **kwargs)
    if 'precision' not in teacher.run:
        teacher = Teacher(teacher, run=dict(precision=precision_of(m.teacher)))
    with RandomGuard():  # DataLoaders draw a random seed for their workers
        train = dls.train if unlabeled is None else loader_of(unlabeled, dls)
        source = source_of(teacher, dls, train, m.views, m.seed, keys, check=False)
        at, bs = rows_to_verify(train, len(source.keys), m.stored, n, np.random.default_rng(seed))
        view, row = np.divmod(at, len(source.keys))
        stored = cache.find(source.keys[row], named=keys is not None)
        errors, sizes = [], []
        for i, live in enumerate(source.run(at, bs)):
            part = slice(i * bs, i * bs + bs)
            rows, head = cache.rows(stored[part], view[part]), cache.files.head(torch.device('cpu'))
            old, now = comparable(m.layout, rows, live.logits, head)
            if isinstance(old, Draws):
                raise DistillError(
                    'The cache contains draws, which differ from the probabilities by chance, so '
                    'they cannot be compared with the teacher row by row.'
                )
            far, size = row_errors(old, now)
            errors, sizes = errors + far, sizes + size
    return Verified(
        len(at),
        max(errors),
        float(np.mean(errors)),
        max(e / max(n, 1) for e, n in zip(errors, sizes)),
        next(f.dtype for f in m.layout.fields if f.name in ('logits', 'values', 'hidden', 'codes')),
    )


def precision_of(teacher: dict) -> str:
    """Return the precision in which a cache was written: 'bf16', 'fp16' or 'fp32'.

    Args:
        teacher: Description of the teacher in the cache's manifest.
    """
    found = {teacher.get('precision'), *(m.get('precision') for m in teacher.get('members', []))}
    return 'bf16' if 'bfloat16' in found else 'fp16' if 'float16' in found else 'fp32'


def rows_to_verify(dl, n, views, rows, rng):
    """Choose the rows to verify, and return (indices of the rows, batch size).

    The rows are chosen at random. For a language model, the first rows of a random view are chosen.
    """
    if not is_stream(dl):
        return np.sort(rng.choice(n * views, min(rows, n * views), replace=False)), 1
    return int(rng.integers(views)) * n + np.arange(min(-(-rows // dl.bs) * dl.bs, n)), dl.bs


def task_of_data(dls, teacher, kind, axis):
    """Derive the `Task` from the loss function of the DataLoaders, or of a teacher that is a
    Learner.
    """
    return task_of(
        getattr(dls, 'loss_func', None) or getattr(teacher, 'loss_func', None), kind, axis
    )


def data_of(dls):
    """Return the DataLoaders. If `dls` is a Learner, add its loss function, if it has one, to a copy
    of its DataLoaders.
    """
    if isinstance(dls, Learner):
        dls, loss_func = copy.copy(dls.dls), dls.loss_func
        if loss_func is not None:
            dls.loss_func = loss_func
    return dls


def stored_teacher(teacher, dls, task, **options):
    """Convert `teacher` to a `Teacher` whose classes have the order in which they are stored: the
    teacher's own order for a single teacher, and the order of the labels for an ensemble, or if the
    teacher has classes that the labels do not have.
    """
    teacher = teacher_of(teacher, dls, kind=task.kind, axis=task.axis, **options)
    found = None if teacher.members else map_classes(vocab_of(dls), class_names(teacher, dls))
    of_labels = teacher.members or (found is not None and found.extra)
    return teacher_of(teacher, dls, task) if of_labels else teacher


def with_ignored_label(task, teacher):
    """Return the task. If it ignores no label, add the label that the loss function of a teacher's
    Learner ignores.
    """
    if task.ignore_index != Task.ignore_index:
        return task
    learners = [t.learner for t in (teacher, *teacher.members) if t.learner is not None]
    found = (task_of(o.loss_func, task.kind).ignore_index for o in learners)
    ignored = next((i for i in found if i != Task.ignore_index), Task.ignore_index)
    return replace(task, ignore_index=ignored)


def source_of(
    teacher, dls, dl, views, seed, keys=None, vocab=None, bs=None, num_workers=None, check=True
):
    """Build a `Source` for `write_cache` from a teacher and one DataLoader."""
    refuse_unindexed(dl)
    stream = is_stream(dl)
    if stream and bs not in (None, dl.bs):
        raise DistillError(
            f'bs={bs} cannot be used for a language model, whose text is cut into one row for each '
            f'of the {dl.bs} samples of a batch: omit bs.'
        )
    check_whole('bs', rows := dl.bs if bs is None else bs)
    root = key_root(dls)
    names, order = item_keys(dl, keys, root), storage_order(dl)
    items = raw_items(dl) if teacher.needs else None
    plan = Plan(names, views, seed, items=items, stream=stream)

    def make(tasks, bs, workers=None):
        view, row = np.divmod(tasks, len(order))
        pairs = list(zip(order[row].tolist(), view.tolist()))
        return writer_dl(dl, plan, pairs, bs, workers)

    inputs = lambda b: with_items(inputs_of(b, dl.n_inp), b[-1].items)
    if teacher.layers:
        teacher = reading_tokens(teacher, *inputs(next(iter(make([0], 1, 0)))))

    def run(tasks, bs, teacher=teacher):
        with validation_transforms(dl, not views), teacher:
            # starting workers takes longer than a single batch
            workers = num_workers if len(tasks) > bs else 0
            if stream:
                yield from stream_outputs(teacher, dl, lambda t: make(t, bs, workers), tasks, bs)
            else:
                yield from (Outputs.of(teacher(*inputs(b))) for b in make(tasks, bs, workers))

    samples = []
    if check:
        with validation_transforms(dl, not views):
            samples = sample_digests(make, len(names), views)
            check_shared_inputs(dl, plan, keys)
            if not (views or stream or reads_only_items(teacher) or dl is dls.valid):
                check_no_views(lambda tasks: map(inputs, make(tasks, 1, 0)), len(names))
        # in the teacher's faster copy, rounding errors of a sample depend on the other samples in
        # the batch
        exact = partial(run, teacher=teacher.as_it_is())
        if not stream:
            # subtle: this uses the samples of one view, in which texts are ordered by length
            check_alone(exact, len(names))
        if isinstance(dl, SortedDL):
            check_padding(exact, len(names))
        # subtle: run the first whole batch now to determine the precision, which is part of the
        # teacher's identity
        with closing(run(np.arange(len(names))[:rows], rows)) as first:
            example = next(first)
        if not (views or stream or dl is dls.valid):
            warn_of_moved(example, dls, dl)
    who = identity_of(teacher)
    # without `stats`, the student's normalization is part of the teacher's identity
    if any(t.stats is None and not t.needs for t in single_teachers(teacher)):
        who['input'] = 'mean {}, std {}'.format(
            *(torch.as_tensor(o).flatten().tolist() for o in image_stats(dls))
        )
    transforms = describe_transforms(dl) if views or stream else {}
    return Source(
        names[order], run, rows, who, transforms, root, vocab, samples, sample_files(dl, order)
    )


def warn_of_moved(out, dls, dl):
    """Warn if outputs for samples without augmentation have positions that the DataLoader's
    augmentation would move, so that a student can't be trained on them.

    Args:
        out: Outputs of the teacher for a batch.
        dls: The DataLoaders.
        dl: The DataLoader whose outputs are about to be stored.
    """
    if not (moving := moves(dl)):
        return
    have = lambda values: any(t.dim() > 2 for t in tensors_in(values))
    if have(out.logits):
        what = 'the outputs have a value for each pixel or token'
    elif labels_are_points(dls, getattr(dls, 'head', None)):
        what = 'the outputs are points'
    elif have(out.feats):
        what = 'the stored layers have positions'
    else:
        return
    warnings.warn(
        DistillWarning(
            f'The cache contains outputs for inputs without augmentation, and {what}, but '
            f"{', '.join(moving)} would move the student's input. Training with these transforms "
            'will raise an error: store augmented views (views=1 or more), or remove the '
            'transforms.'
        ),
        stacklevel=2,
    )


def writer_dl(dl, plan, pairs: list, bs, workers=None):
    """Build a DataLoader that reads (position, view) pairs in the given order."""
    cls = TabDataLoader if isinstance(dl, TabDataLoader) else TfmdDL
    more = {} if workers is None else dict(num_workers=workers)
    d = TfmdDL.new(
        dl,
        cls=cls,
        bs=bs,
        shuffle=False,
        drop_last=False,
        get_idxs=partial(list, pairs),
        **more,
    )
    return attach(d, copy.copy(plan), dl if is_stream(dl) else None)


@contextmanager
def validation_transforms(dl, on):
    """Context manager that makes a DataLoader use the validation transforms if `on` is True."""
    ds, pipes = dl.dataset, []
    if on:
        found = [getattr(o, 'tfms', None) for o in getattr(ds, 'tls', [ds])]
        pipes = [o for o in found if isinstance(o, Pipeline)]
        if isinstance(ds, TfmdLists):
            pipes.append(ds)  # a `TfmdLists` has its own `split_idx`
    with restored(*pipes, only=['split_idx']):
        for o in pipes:
            o.split_idx = 1
        yield


def check_shared_inputs(dl, plan, keys, most=None):
    """Raise an error if samples with different inputs have the same key.

    Args:
        dl: The DataLoader.
        plan: `Plan` with the keys of the samples.
        keys: The argument `keys` of `cache_teacher`.
        most: See `check_shared_keys`.
    """
    if is_stream(dl) or are_contents(dl.dataset, keys):
        return

    def digests(at):
        for b in writer_dl(dl, plan, [(int(i), 0) for i in at], 1):
            yield fingerprint(*flat_values(plain_item(b[: dl.n_inp])))

    items = items_of(dl.dataset)
    shown = isinstance(items, (list, tuple, L))
    place = lambda i: f'{i} ({shortened(repr(items[i]), 100)})' if shown else str(i)
    check_shared_keys(plan.keys, digests, place, most)


def check_no_views(read, n):
    """Raise an error if a transform is random in validation too, since `views=0` stores one output
    for each sample.

    Args:
        read: fn(tasks) -> inputs of each task.
        n: Number of samples.
    """
    tasks = spread_positions(n, 8)
    for t, a, b in zip(tasks, read(tasks), read(tasks + n)):
        if print_of(a) != print_of(b):
            raise DistillError(
                f'views=0 stores the outputs without augmentation, but a transform changes sample {t} '
                'at random in validation too. Restrict it to the training set (split_idx=0), or store '
                'its views with views=1 or more.'
            )


def check_equal(a, b, which, task) -> None:
    if print_of(a) != print_of(b):
        raise DistillError(unrepeatable(which, task))


def print_of(o):
    return fingerprint(*flat_values(plain_item(o)))


def check_padding(run, n) -> None:
    """Warn if the teacher's outputs for the shortest text change when the text is padded."""
    beside, alone = [
        next(run(np.array(t), len(t))).logits[-1].float() for t in ([0, n - 1], [n - 1])
    ]
    if beside.shape == alone.shape and (far := (beside - alone).abs().max().item()) > 0.1 * (
        1 + alone.abs().max().item()
    ):
        warnings.warn(
            DistillWarning(
                f"The teacher's outputs for a text depend on padding (they change by {far:.3g} for "
                'the shortest one). The cache stores outputs from batches of texts of similar '
                'length. Does the teacher mask padding tokens?'
            )
        )


def plain_item(o):
    """Convert an item to plain tensors and tuples, without fastai's types."""
    return tuple(map(plain_item, o)) if isinstance(o, (tuple, list)) else as_plain(o)


def sample_digests(make, n, views):
    """Return digests of the inputs of a few samples, before and after the batch transforms.

    When a cache is used, the digests show whether the views are replayed correctly. Each view is
    computed twice, before anything is written.

    Raises:
        DistillError: If random transforms can't be repeated.
    """
    tasks = [i % max(views, 1) * n + int(r) for i, r in enumerate(spread_positions(n, 8))]
    out, items, d = [], [], make(tasks, 1, 0)
    # subtle: alternate between the two, since a transform may depend on the samples before
    for t, (item, b), (again, b_again) in zip(tasks, views_in(make(tasks, 1, 0)), views_in(d)):
        check_equal(item, again, 'The item transforms', t)
        check_equal(b[:-1], b_again[:-1], 'The batch transforms', t)
        out.append(dict(row=t % n, view=t // n, **digest_of_view(item, b, d.n_inp)))
        items.append(again)
    with RandomGuard() as guard:
        d.before_batch(items)
    if guard.moved:
        raise DistillError(
            'A before_batch transform draws random numbers for a whole batch, but training uses '
            'different batches: make it an item transform or an after_batch transform.'
        )
    return out


def views_in(d):
    """Yield (item, batch of this item after the batch transforms) for each sample.

    Args:
        d: A DataLoader with batches of one sample.
    """
    # subtle: leave out Normalize, since each model may have its own
    d.after_batch.fs = [f for f in d.after_batch.fs if not isinstance(f, Normalize)]
    return sampled(d).views(d.get_idxs())


def digest_of_view(item, b, n_inp):
    """Return a digest of a sample's input, and statistics of the input after the batch transforms.

    The statistics of a tensor are computed by `summary`.
    """
    has_floats = lambda o: isinstance(o, torch.Tensor) and o.is_floating_point() and o.numel()
    after = [summary(o) for o in flat_values(plain_item(b[:n_inp])) if has_floats(o)]
    return dict(digest=item_digest(item, n_inp), after=after)


def view_inspector(dl, plan):
    """Return a function fn(position, view) that computes `digest_of_view` for one view. One
    DataLoader is used for all of them.
    """
    d = writer_dl(dl, plan, [], 1, 0)

    def look(i, view):
        d.get_idxs = lambda: [(i, view)]
        return digest_of_view(*next(views_in(d)), d.n_inp)

    return look


def summary(x):
    """Compute the mean, the standard deviation and a position-weighted sum of a tensor.

    Similar tensors have similar statistics, on any device.
    """
    x = x.detach().double().cpu().flatten()
    weights = torch.arange(len(x)).mul(0.7).cos()
    return [
        x.mean().item(),
        x.std(correction=0).item(),
        (x * weights).mean().item() * len(x) ** 0.5,
    ]


def item_digest(item, n_inp):
    item = plain_item(item)
    return fingerprint(*flat_values(item[:n_inp])) if isinstance(item, tuple) else 'row of a table'


def classes_of(teacher, dls):
    """Return the class names in the order of the teacher's logits.

    The labels may have their classes in a different order. If the order differs, the logits are
    reordered when a student is trained.
    """
    mine = vocab_of(dls)
    if teacher.members:
        names, *others = [classes_of(m, dls) for m in teacher.members]
        if any(v != names for v in others):
            raise DistillError(
                'The members of the ensemble have different class orders. Put each in the order of '
                f'the labels with Teacher(model, select=...): {few_names(mine, 10)}.'
            )
    else:
        names = class_names(teacher, dls)
    if names is None or mine is None or known_classes(teacher):
        return mine
    if any(isinstance(o, list) for o in teacher.select or ()):
        return mine
    names = names if teacher.select is None else [names[i] for i in teacher.select]
    stored_order(names, mine)  # raise an error now if the names can't be mapped
    return names
