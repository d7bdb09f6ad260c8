"Students that train side by side: may they share their data, and is everything else their own?"

from contextlib import closing
from itertools import combinations

import torch
from fastai.basics import Learner, Metric
from torch.utils.data import IterableDataset

from ..base.outputs import DistillError, tensors_in
from ..base.seeds import seeded
from ..checks.findings import few_names
from .shared import seeded_batches
from .teachers import image_stats
from .transforms import describe_transforms

__all__ = ['check_separate']


def check_separate(learners: dict, teacher):
    """Refuse Learners that share more than their data, and those whose batches differ.

    Args:
        learners: Name -> Learner.
        teacher: What trains them; None if nothing does.
    """
    for (a, la), (b, lb) in combinations(learners.items(), 2):
        check_objects(a, la, b, lb)
        check_files(a, la, b, lb)
    first, *others = learners
    for name in others:
        check_data(first, learners[first], name, learners[name])
    if isinstance(teacher, Learner):
        for name, learn in learners.items():
            check_teacher_apart(name, learn, teacher)


def check_objects(a, la, b, lb):
    if la is lb:
        raise DistillError(f'{a} and {b} are the same Learner. Make one for each student.')
    ids = {id(p) for p in la.model.parameters()}
    if both := [n for n, p in lb.model.named_parameters() if id(p) in ids]:
        raise DistillError(
            f'{a} and {b} share {len(both)} parameters ({few_names(both, 3)}): give each student its '
            'own model.'
        )
    own = lambda learn: {
        id(o): o for o in [*learn.cbs, *(m for m in learn.metrics if isinstance(m, Metric))]
    }
    if both := [o for k, o in own(la).items() if k in own(lb)]:
        raise DistillError(
            f'{a} and {b} have the same {type(both[0]).__name__} object, which counts for one training '
            'at a time. Make one for each Learner.'
        )


def check_files(a, la, b, lb):
    """Callbacks that write into the same file."""
    if both := [*(written_files(la).keys() & written_files(lb).keys())]:
        cb = written_files(lb)[both[0]]
        raise DistillError(
            f"{a} and {b} would both write {both[0]}. Give each its own name: {cb}(fname='{b}')."
        )


def written_files(learn):
    """File -> name of the callback that writes it."""
    return {
        learn.path / (learn.model_dir if hasattr(c, 'every_epoch') else '') / str(c.fname): type(
            c
        ).__name__
        for c in learn.cbs
        if isinstance(getattr(c, 'fname', None), (str, type(learn.path)))
    }


def check_teacher_apart(name, learn, teacher):
    ids = {id(p) for p in learn.model.parameters()}
    if any(id(p) in ids for p in teacher.model.parameters()):
        raise DistillError(
            f'{name} and the teacher share parameters, so the teacher would change while it teaches. '
            'Build the student from a copy.'
        )


def check_data(a, la, b, lb):
    """Both must get the same batches."""
    if la.dls is lb.dls:
        return
    for i, (x, y) in enumerate(zip(la.dls.loaders, lb.dls.loaders)):
        if found := x is not y and batch_differences(x, y, la.dls, lb.dls):
            where = ['training', 'validation'][i] if i < 2 else f'{i}.'
            raise DistillError(
                f"{a} and {b} have different {where} batches ({found}), so they can't share one stream. "
                'Make both Learners with the same DataLoaders. A pretrained vision_learner adds '
                'Normalize to its own: make that one first, or use normalize=False for each.'
            )
    if len(la.dls.loaders) != len(lb.dls.loaders):
        raise DistillError(
            f'{a} has {len(la.dls.loaders)} DataLoaders, {b} has {len(lb.dls.loaders)}. Make both '
            'Learners with the same.'
        )


def batch_differences(x, y, dls_x, dls_y):
    """How the batches of two DataLoaders differ, as text; empty if they do not."""
    for k in ('batch_size', 'bs', 'n', 'shuffle', 'drop_last'):
        p, q = getattr(x, k, None), getattr(y, k, None)
        if p != q:
            return f'{k} {p} and {q}'
    if streams := [o for o in (x, y) if isinstance(getattr(o, 'dataset', None), IterableDataset)]:
        return f'{len(streams)} of them can be read once only, and were not compared'
    p, q = image_stats(dls_x), image_stats(dls_y)
    if not all(torch.equal(torch.as_tensor(o), torch.as_tensor(r)) for o, r in zip(p, q)):
        return 'another normalization'
    if all(hasattr(o, 'after_batch') and hasattr(o, 'dataset') for o in (x, y)):
        p, q = describe_transforms(x), describe_transforms(y)
        if changed := [k for k in dict.fromkeys([*p, *q]) if p.get(k) != q.get(k)]:
            return f'transform {changed[0]}'
    p, q = [[*tensors_in(first_batch(o))] for o in (x, y)]
    same = len(p) == len(q) and all(o.shape == r.shape and torch.equal(o, r) for o, r in zip(p, q))
    return '' if same else 'the first batch is another one, from the same random seed'


def first_batch(dl):
    dl = dl.new(num_workers=0) if hasattr(dl, 'shuffle_fn') else dl
    with seeded(0), closing(seeded_batches(dl, 0)) as batches:
        return next(batches, None)
