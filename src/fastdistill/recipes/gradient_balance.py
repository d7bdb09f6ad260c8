"""Terms with a gradient ratio: the weight at which a term's gradient norm is a given multiple of
that of the other losses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.distributed import length_over_ranks, previous_rows, world_size
from ..base.outputs import DistillError
from .gradient_norms import gradient_norm
from .teacher_gain import TeacherGain

__all__ = ['GradientRatio', 'GradientRatios']


class GradientRatio:
    """The weight at which a term's gradient norm equals that of all weighted losses, including the
    task loss, measured at the tensors the term compares (the student's logits or layers). Both
    norms are running means. They are measured in each of the first batches, then less and less
    often, and finally once in `EVERY` batches.

    If the student already agrees with its teacher, there is hardly any gradient to measure, and the
    weight would become huge. Two more numbers are therefore measured. `apart` is the norm of the
    term's gradient against the teacher's outputs for different samples, i.e. its scale for a
    student that disagrees. The norm is clamped to at least `FLOOR` times `apart`. The value of the
    term shows whether its gradient has grown since the last measurement. All numbers stay on the
    device, so that no step waits for them.

    Args:
        fade: Whether the weight falls if the teacher's predictions add little to the student's, see
            `TeacherGain`.
    """

    # first batches, all measured; final interval; minimum weight of a new measurement in the mean
    FIRST, EVERY, NEW = 16, 32, 0.2
    ENOUGH = 16  # samples; a measurement of fewer has a lower minimum weight
    # minimum norm relative to `apart`. Two samples are sqrt(2) times as far from each other as from
    # their mean, so this is about the norm for a student that always predicts the mean
    FLOOR = 0.7
    JUMP = 4.0  # larger growth replaces the mean

    def __init__(self, fade: bool = False) -> None:
        self.gain = TeacherGain() if fade else None
        self.batches = 0
        self.measured = 0
        self.parts: tuple = ()
        self.means: Any = None  # a tensor after the first measurement
        self.previous: list[Tensor] | None = (
            None  # the teacher's outputs for the last measured batch of one sample
        )

    def due(self, parts: tuple) -> bool:
        """Count this batch and return True if it should be measured.

        Args:
            parts: What the norms depend on. If it changes, the means start over.
        """
        if parts != self.parts:
            self.batches, self.measured, self.parts = 0, 0, parts
        self.batches += 1
        every = 2 ** (
            max(self.batches // self.FIRST, 1).bit_length() - 1
        )  # 1 up to 31, 2 up to 63, 4 up to 127 ...
        return self.batches % min(every, self.EVERY) == 0

    def add(self, new: Tensor, samples: Tensor) -> None:
        """Add a measurement to the running means.

        Args:
            new: (4,): norms of the weighted losses, of the term, and of the term `apart`; value of
                the term.
            samples: Number of samples that were measured, 0-dim.
        """
        self.measured += 1
        # the fifth number counts the measurements since the mean was replaced
        before = new.new_zeros(5) if self.means is None else self.means.to(new)
        jumped = (new[1] > self.JUMP * before[1]) | (self.measured == 1)
        n = torch.where(jumped, 1.0, before[4] + 1)
        rate = (1 / n).maximum(self.NEW * (samples / self.ENOUGH).clamp(max=1.0))
        means = torch.cat([before[:4].lerp(new, rate), n[None]])
        self.means = means.where(
            new.isfinite().all(), before
        )  # ignore an overflow in half precision

    def of_different_samples(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return outputs of the teacher for different samples, in the same shapes: for each sample
        those for the one before it, in this batch or, if batches have one sample, in the batch
        measured before. A single map or sequence is moved by half of its length instead.

        Args:
            outputs: The teacher's tensors that the term compares, (B, ...).
        """
        before, self.previous = self.previous, None
        if world_size() > 1 or any(len(t) > 1 for t in outputs):
            return [previous_rows(t) for t in outputs]
        # subtle: only outputs without positions are kept, since others may be large
        if any(t.dim() > 2 for t in outputs):
            return [t.flatten().roll(t.numel() // 2).reshape(t.shape) for t in outputs]
        self.previous = [t.detach() for t in outputs]
        if before is None or [t.shape for t in before] != [t.shape for t in outputs]:
            return [t.roll(1, -1) for t in outputs]
        return [b.to(t) for b, t in zip(before, outputs)]

    @property
    def factor(self) -> Tensor:
        """The weight, 0-dim. It is 0 as long as the term has no gradient."""
        return self.factor_at(None)

    def factor_at(self, value: Tensor | None) -> Tensor:
        """Compute the weight for a batch. It is lower if the term's value is much larger than
        before.

        Args:
            value: Value of the term in this batch. None for its value at the last measurement.
        """
        if value is not None:
            self.means = self.means.to(value.device)
        base, norm, apart, mean, _ = self.means
        norm = norm.maximum(self.FLOOR * apart)
        if value is not None:
            # subtle: for a loss whose minimum is 0, the norm does not grow faster than the value
            growth = value.detach().float().abs() / mean.abs().clamp_min(1e-12)
            norm = norm * (growth / self.JUMP).clamp(1.0, 1e6)
        weight = (base / norm).where(norm > 0, 0.0)
        return weight if self.gain is None else weight * self.gain.factor.to(weight)

    def state_dict(self) -> dict[str, Any]:
        means = None if self.means is None else self.means.tolist()
        previous = None if self.previous is None else [t.tolist() for t in self.previous]
        return dict(
            batches=self.batches,
            measured=self.measured,
            parts=list(self.parts),
            means=means,
            previous=previous,
            **({} if self.gain is None else dict(gain=self.gain.state_dict())),
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches = state['batches']
        self.measured = state['measured']
        self.parts = tuple(state['parts'])
        self.means = None if state['means'] is None else torch.tensor(state['means'])
        if self.gain is not None and 'gain' in state:
            self.gain.load_state_dict(state['gain'])
        previous = state['previous']
        self.previous = None if previous is None else [torch.tensor(t) for t in previous]


class GradientRatios(dict):
    """The `GradientRatio` of each term with a gradient ratio, by name."""

    def __init__(self, recipe: Any) -> None:
        terms = [t for t in recipe.terms if t.has_grad_ratio]
        super().__init__({t.name: GradientRatio(t.fade) for t in terms})

    def measure(
        self,
        weights: Mapping[str, Any],
        values: Mapping[str, Tensor],
        tensors: Callable[[str], Sequence[Tensor]],
        apart: Callable[[str], Tensor],
        errors: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Measure the terms with a gradient ratio that are due in this batch.

        Args:
            weights: {name: weight or gradient ratio}. The task loss is 'task'.
            values: {name: value} of the losses that count and have a gradient.
            tensors: fn(term name) -> the student's logits or features that this term compares.
            apart: fn(term name) -> the term's value against the teacher's outputs for different
                samples.
            errors: fn() -> `label_errors` of this batch, or None if they are unknown.
        """
        fixed = {k: weights[k] * v for k, v in values.items() if k not in self}
        base = sum(fixed.values()) if fixed else None
        for k, ratio in self.items():
            if k not in values:
                continue
            if base is None:  # without a task loss, earlier measurements count
                if ratio.means is not None:
                    continue
                raise DistillError(
                    f'grad_ratio= of {k} is relative to the task loss and the terms with a '
                    f'weight, and this batch has neither. Give {k} a weight= instead.'
                )
            # with frozen layers, the term only trains its projector
            at = [(i, x) for i, x in enumerate(tensors(k)) if x.requires_grad]
            if at and ratio.due((*fixed, *(i for i, _ in at))):
                self._measure(k, base, values[k], apart, [x for _, x in at])
                if ratio.gain is not None and errors and (new := errors()) is not None:
                    ratio.gain.add(new)

    def weights(self, weights: dict[str, Any], values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the weights of a batch. A gradient ratio becomes the weight at which the gradient
        norm of its term has that ratio. All weights are then divided by 1 plus the sum of the ratios,
        so that the gradient of the total is at most as long as without these terms, and a learning
        rate that suits the other losses still does.

        Args:
            weights: {name: weight or gradient ratio}.
            values: {name: value} of the losses that count and have a gradient.
        """
        measured = {
            k: weights[k] * r.factor_at(values.get(k))
            for k, r in self.items()
            if r.means is not None
        }
        length = self.length(weights)
        return {k: w / length for k, w in (weights | measured).items()}

    def length(self, weights: Mapping[str, Any]) -> float:
        """Return 1 plus the sum of the gradient ratios that are measured, by which `weights` divides.

        Args:
            weights: {name: weight or gradient ratio}.
        """
        return 1 + sum(weights[k] for k, r in self.items() if r.means is not None)

    def faded(
        self, weights: Mapping[str, Any], values: Mapping[str, Tensor]
    ) -> Tensor | float | None:
        """Return what is missing of the gradient because terms faded, as a multiple of the other
        losses. None if no term can fade.

        Args:
            weights: {name: weight or gradient ratio}.
            values: {name: value} of the losses that count and have a gradient.
        """
        on = {k: r for k, r in self.items() if r.means is not None and k in values}
        fading = {k: r.gain.factor for k, r in on.items() if r.gain is not None}
        if not fading:
            return None
        whole = 1 + sum(weights[k] for k in on)
        lost = sum(weights[k] * (1 - f) for k, f in fading.items())
        return lost / (whole - lost)

    def _measure(
        self,
        name: str,
        base: Tensor,
        value: Tensor,
        apart: Callable[[str], Tensor],
        tensors: Sequence[Tensor],
    ) -> None:
        try:
            norms: list[Any] = [gradient_norm(v, tensors) for v in (base, value)]
        except RuntimeError as e:
            raise DistillError(
                f"The gradient of {name} can't be measured inside a part of the student that "
                f'allows only one backward pass, such as a compiled part ({e}). Give it weight= '
                'instead of grad_ratio=.'
            ) from e
        if None in norms:
            raise DistillError(
                f'The task loss does not depend on what {name} compares, so there is no gradient '
                'to compare with. Give it weight= instead of grad_ratio=, or compare a different '
                'output (output=) or layer.'
            )
        far: Any = gradient_norm(apart(name), tensors)
        # a class that is excluded for one sample may not be for the next
        far = norms[1] if far is None else far.where(far.isfinite(), norms[1])
        # a map or a sequence has many positions, so one is enough
        few = all(x.dim() < 3 for x in tensors)
        samples = len(tensors[0]) if few else GradientRatio.ENOUGH
        norms += [far, value.detach().float(), far.new_tensor(float(samples))]
        *new, samples = length_over_ranks(torch.stack(norms))
        self[name].add(torch.stack(new), samples * world_size())

    def state_dict(self) -> dict[str, Any]:
        return {k: r.state_dict() for k, r in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for k, s in state.items():
            if k in self:
                self[k].load_state_dict(s)
