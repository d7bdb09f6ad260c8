"Does the teacher get images in another normalization than it learned from? The usual ones are tried."
import torch
from ..outputs import Outputs
from ..teacher.images import affine, is_image, stats_of
from ..teacher.teacher import Teacher
from .findings import Finding
from .tally import METRICS, fit_labels

__all__ = ['renormalized_images']

# in words -> as `Teacher` takes them, as a user writes them
USUAL = {'numbers from 0 to 1': ((0., 1.), '(0, 1)'), 'mean 0.5 and std 0.5': ((.5, .5), '(.5, .5)'),
         "ImageNet's mean and std": ('imagenet', "'imagenet'"), 'numbers from 0 to 255': ((0., 1/255), '(0, 1/255)')}


def renormalized_images(
    tally, # of the teacher's predictions
    teacher, task,
    batches # (inputs, labels) of the first validation batches
):
    "(its score then, finding), where the teacher is clearly better with a usual normalization; tried where its score leaves some room"
    now = tally.items('teacher')
    if not can_renormalize(teacher, batches) or tally.above(now, torch.full_like(now, tally.constant), least=.9): return
    candidates = {k: t for k,(stats,_) in USUAL.items() if (t := with_stats(teacher, stats, batches)) is not None}
    few = {k: scores_with(t, tally, task, batches[:2]) for k,t in candidates.items()}
    best = max(few, key=lambda k: few[k].mean())
    if few[best].mean() <= now[:len(few[best])].mean(): return
    then = scores_with(candidates[best], tally, task, batches)
    now = now[:len(then)]
    if not tally.above(then, now): return
    a,b = (abs(o.mean().item()) for o in (now, then))
    yield then.mean().item(),Finding(
        'warning', f"The teacher seems to have learned from images in another normalization: {METRICS[task.kind]} {a:.3f} with the images "
        f"as it gets them, {b:.3f} with {best} (on {len(now)} validation items)",
        f"State what it learned from: Teacher(model, stats={USUAL[best][1]})")


def can_renormalize(teacher, batches):
    "One teacher of color or gray images whose normalization is known"
    images = [x for xb,_ in batches for x in xb if isinstance(x, torch.Tensor) and is_image(x)]
    return not teacher.members and teacher.input_stats is not None and len(images) == len(batches) and images[0].shape[1] in (1, 3)


def with_stats(teacher, stats, batches):
    "The teacher with images normalized in this way; None if that is how it gets them, or if it cannot be"
    now = teacher.input_stats if teacher.stats is None else teacher.stats
    channels = next(x for x in batches[0][0] if is_image(x)).shape[1]
    if len(stats_of(stats)[0]) not in (1, channels) or affine(now, stats_of(stats)) is None: return None
    return Teacher(teacher, stats=stats)


def scores_with(teacher, tally, task, batches):
    "(items,) the teacher's score on each item of these batches"
    with teacher:
        outs = [(Outputs.of(teacher(*xb)).logits.float(), yb[0]) for xb,yb in batches]
    ys = [fit_labels(y, t.shape, task) for t,y in outs]
    return torch.cat([tally.item_scores(t, y)[tally.counts(y).any(1).cpu()] for (t,_),y in zip(outs, ys)])
