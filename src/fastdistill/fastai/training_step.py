"""Change the loss in a Learner's training step, and read the labels of a mixed batch."""

from fastai.callback.mixup import MixHandler

from ..features.layer_hooks import Taps


class StudentTaps:
    """Hooks on the student's layers. The hooks of a compiled model are kept between batches."""

    def __init__(self):
        self.taps = None

    def attach(self, model, names: list):
        """Add hooks to the layers that are compared in a batch."""
        if self.taps is not None and self.taps.names == names:
            return
        self.detach()
        if names:
            self.taps = Taps(model, names).attach()

    def pop(self) -> dict:
        """Return {layer name: output of the layer}."""
        return {} if self.taps is None else self.taps.pop()

    def end_batch(self):
        # subtle: adding and removing hooks would make torch.compile recompile
        if self.taps is not None and not self.taps.compiled:
            self.detach()

    def detach(self):
        """Remove the hooks. It is safe to call this twice."""
        if self.taps is not None:
            self.taps.detach()
        self.taps = None


def has_outputs(distiller, samples) -> bool:
    """Return True if at least one teacher has outputs for these samples.

    Args:
        distiller: The `Distiller`.
        samples: The `BatchSamples` of a batch. None if the samples are unknown.
    """
    teachers = (h.teacher for h in distiller.heads.values())
    return any(t.has_outputs(samples) for t in teachers if t is not None)


def add_distilled(learn, r):
    """Add the distillation loss to the loss of this batch.

    Args:
        learn: The student's Learner.
        r: A `Distilled` whose task loss is the Learner's loss.
    """
    if r.added is None:
        return
    if r.weights['task']:
        add_loss(learn, r.added)
    else:
        learn.loss_grad, learn.loss = r.total + regularizers(learn), r.total


def add_loss(learn, v):
    """Add a value to the loss of this batch."""
    learn.loss_grad, learn.loss = learn.loss_grad + v, learn.loss + v


def regularizers(learn):
    """Return the values that earlier callbacks added to the task loss."""
    a, b = learn.loss_grad, learn.loss
    # subtle: if nothing was added, avoid the task loss and its gradient, because they may be nan
    return 0.0 if origin(a) is origin(b) else (a - b).nan_to_num()


def origin(loss):
    """Return the operation that computed a loss, ignoring the copies of the loss that fastai
    makes.
    """
    fn = loss.grad_fn
    while fn is not None and fn.name() in ('AliasBackward0', 'CloneBackward0'):
        fn = fn.next_functions[0][0]
    return fn


def mixed_labels(learn):
    """Return (second labels, coefficient of the first labels) for a batch mixed by MixUp or CutMix.

    Return None if the batch is not mixed, or if its labels are mixed into one tensor.
    """
    mixes = [c for c in learn.cbs if isinstance(c, MixHandler) and getattr(c, 'stack_y', False)]
    if not mixes or not learn.training:
        return None
    return mixes[0].yb1, mixes[0].lam
