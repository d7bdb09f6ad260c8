"""Read teacher outputs that are stored in the batches of a fit. No teacher runs."""

from fastai.basics import TfmdDL

from ..base.mixup import mixed
from ..base.output_source import OutputSource
from ..base.outputs import DistillError, Outputs, as_plain, tensors_in
from ..base.random_state import RandomGuard
from .class_names import stored_order
from .teacher_targets import TeacherTarget, refuse_unlike_batch, target_tfms


class HeldOutputs(OutputSource):
    """An `OutputSource` that reads the teacher outputs from the `BatchSamples` of a batch.

    This source has no modules. It always returns all stored layers.
    """

    kind, axis = 'softmax', 1
    written_identity: dict = {}  # identity of the teacher whose outputs were stored, if known

    def bind(self, learn, kind: str, axis: int):
        """Prepare for the data of a Learner that is about to fit.

        Raise an error if the batches contain no teacher outputs.

        Args:
            learn: The Learner.
            kind: Kind of the logits, which determines how logits are mixed.
            axis: Class axis of the logits.
        """
        self.kind, self.axis = kind, axis

    def has_outputs(self, samples) -> bool:
        return samples is not None and getattr(samples, self.needs) is not None

    def outputs(self, inputs=(), samples=None, layers=()) -> Outputs:
        """Return the teacher's outputs for a batch. If MixUp or CutMix mixed the inputs, the
        outputs are mixed in the same way.

        Args:
            inputs: Inputs of the batch.
            samples: The `BatchSamples` of the batch.
            layers: Ignored.
        """
        if not self.has_outputs(samples):
            raise DistillError(self.missing)
        t = as_plain(getattr(samples, self.needs))
        x = next(tensors_in(inputs), t)
        return mixed(self.decode(t.to(x.device), x), samples, self.kind, self.axis)

    def __call__(self, *x, **kw):
        return self.example(x)

    def probe(self, *x, layers=None, **kw):
        return self.example(x)


class GivenOutputs(HeldOutputs):
    """Reads the targets that a `TeacherBlock` added to the labels."""

    needs, name = 'target', 'stored outputs'
    layers_advice = 'Outputs stored in the data have no layers: pass the teacher itself, or a cache with its layers.'
    missing = (
        'These batches have no teacher targets. Give KnowledgeDistillation a teacher, or build the data with a '
        'third block: DataBlock((ImageBlock, CategoryBlock, TeacherBlock), get_y=[label, teacher_row]).'
    )

    def bind(self, learn, kind, axis):
        super().bind(learn, kind, axis)
        if not target_tfms(learn.dls) and not in_first_batch(learn.dls.train):
            raise DistillError(self.missing)
        self.order = class_order(learn.dls)

    def example(self, x):
        return Outputs()  # no layers are stored

    def outputs(self, inputs=(), samples=None, layers=()) -> Outputs:
        out = super().outputs(inputs, samples, layers)
        refuse_unlike_batch(samples)
        return out

    def decode(self, t, x):
        return Outputs(t if self.order is None else t[:, self.order.to(t.device)])


def in_first_batch(dl):
    """Return True if the first batch of a DataLoader has teacher targets."""
    with RandomGuard():
        b = next(iter(dl.new(num_workers=0) if isinstance(dl, TfmdDL) else dl), ())
    return isinstance(b, (tuple, list)) and any(isinstance(o, TeacherTarget) for o in b)


def class_order(dls):
    """Return the index of the teacher's column for each class of the labels' vocab.

    Return None if both orders are the same.
    """
    names = next((f.teacher_names for f in target_tfms(dls) if f.teacher_names), None)
    return None if names is None else stored_order(names, getattr(dls, 'vocab', None))
