"""Set the weight of a term with a gradient ratio, so that the term's gradient norm is a given
multiple of the gradient norm of the other losses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.distributed import length_over_ranks, previous_rows, world_size
from ..base.outputs import DistillError, Draws, as_dense
from .gradient_norms import gradient_norm
from .teacher_gain import TeacherGain


class GradientRatio:
    """The weight at which a term's gradient norm equals that of the other losses, including the
    task loss. Norms are measured at the tensors that the term compares (the student's logits or
    layers), and running means of the norms are used. The norms are measured in each of the first
    batches, then less and less often, and finally once in `EVERY` batches.

    If the student already agrees with the teacher, the gradient of the term is close to zero, and
    the weight would become huge. Two more quantities prevent this. `apart` is the term's gradient
    norm if each sample gets the teacher's outputs for a different sample. It estimates the norm for
    a student that disagrees with the teacher. The measured norm is clamped to at least `FLOOR`
    times `apart`. The value of the term shows whether the gradient may have grown since the last
    measurement. All numbers stay on the GPU, so training steps do not wait for a transfer to the
    CPU.

    Args:
        fade: Gain of the teacher below which the weight falls (see `TeacherGain`). 0 for never.
    """

    # FIRST: all batches before number 2 * FIRST are measured
    # EVERY: final interval between measured batches
    # NEW: minimum weight of a new measurement in the running mean
    FIRST, EVERY, NEW = 16, 32, 0.2
    ENOUGH = 16  # a measurement of fewer samples has a lower minimum weight
    FEW = 4  # batches of fewer samples are always measured, because their gradients vary widely
    # Minimum norm relative to `apart`.
    # On average, two samples are sqrt(2) times as far apart as a sample is from the mean. So 0.7 is
    # about the relative norm for a student that always predicts the mean.
    FLOOR = 0.7
    # If the term's norm grows by more than this factor, the new norm replaces the mean. A norm of
    # the other losses is clamped to this multiple of the mean, because one wrong label can make it
    # huge
    JUMP = 4.0

    def __init__(self, fade: float = 0.0) -> None:
        self.gain = TeacherGain(fade) if fade else None
        self.batches = 0
        self.measured = 0
        self.parts: tuple = ()
        self.means: Any = None  # a tensor after the first measurement
        # the teacher's outputs for the last measured batch, if it had only one sample
        self.previous: list[Tensor] | None = None

    def forget(self) -> None:
        """Forget the measured norms. The next batch is then measured as if it were the first."""
        self.means, self.parts = None, ()

    def due(self, parts: tuple, few: bool) -> bool:
        """Advance the batch counter and return True if this batch should be measured.

        Args:
            parts: Names of the other losses and indices of the measured layers. If they change, the
                running means are reset.
            few: True for a batch of fewer than `FEW` samples.
        """
        if parts != self.parts:
            self.batches, self.measured, self.parts = 0, 0, parts
        self.batches += 1
        every = 2 ** (
            max(self.batches // self.FIRST, 1).bit_length() - 1
        )  # 1 up to 31, 2 up to 63, 4 up to 127 ...
        return few or self.batches % min(every, self.EVERY) == 0

    def add(self, new: Tensor, samples: Tensor) -> None:
        """Add a measurement to the running means.

        Args:
            new: Tensor (4,) with the gradient norm of the other losses, the gradient norm of the
                term, `apart`, and the value of the term.
            samples: Number of measured samples, a 0-dim tensor.
        """
        self.measured += 1
        # the fifth number is the count of measurements since the mean was last replaced
        before = new.new_zeros(5) if self.means is None else self.means.to(new)
        jumped = (new[1] > self.JUMP * before[1]) | (self.measured == 1)
        most = (self.JUMP * before[0]).where(before[0] > 0, torch.inf)
        new = torch.cat([new[:1].minimum(most), new[1:]])
        n = torch.where(jumped, 1.0, before[4] + 1)
        rate = (1 / n).maximum(self.NEW * (samples / self.ENOUGH).clamp(max=1.0))
        means = torch.cat([before[:4].lerp(new, rate), n[None]])
        self.means = means.where(
            new.isfinite().all(), before
        )  # ignore an overflow in half precision

    def of_different_samples(self, outputs: Sequence[Any]) -> list[Any]:
        """Return teacher outputs that belong to different samples, in the same shapes. Each sample
        gets the outputs of the sample before it in the batch. If batches have only one sample, the
        sample gets the outputs from the last measured batch. A single feature map or sequence is
        instead shifted by half of its length.

        Args:
            outputs: The teacher's outputs that the term compares, (B, ...): tensors,
                `LinearLogits` or `Draws`.
        """
        before, self.previous = self.previous, None
        if world_size() > 1 or any(len(t) > 1 for t in outputs):
            return [map_samples(previous_rows, t) for t in outputs]
        # subtle: keep only outputs without positions, because maps and sequences may be large
        if any(t.dim() > 2 for t in outputs):
            return [shifted_by_half(t) for t in outputs]
        outputs = [as_dense(t) for t in outputs]
        if any(isinstance(t, Draws) for t in outputs):
            return [t.reorder(torch.arange(t.n).roll(1)) for t in outputs]
        self.previous = [t.detach() for t in outputs]
        if before is None or [t.shape for t in before] != [t.shape for t in outputs]:
            return [t.roll(1, -1) for t in outputs]
        return [b.to(t) for b, t in zip(before, outputs)]

    def factor_at(self, value: Tensor | None) -> Tensor:
        """Compute the weight for a batch, a 0-dim tensor. The weight is 0 as long as the term has no
        gradient. It is lowered if the value of the term is much larger than its running mean.

        Args:
            value: Value of the term in this batch. None to skip this correction.
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
        # float64 holds the numbers of any dtype
        number = lambda t: torch.tensor(t, dtype=torch.float64)
        self.previous = None if previous is None else [*map(number, previous)]


class GradientRatios(dict):
    """Dict that maps the name of each term with a gradient ratio to a `GradientRatio`."""

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
        """Measure the terms with a gradient ratio for which a measurement is due in this batch.

        Args:
            weights: {name: weight or gradient ratio}. The task loss is named 'task'.
            values: {name: value} of the losses with a nonzero weight and a gradient.
            tensors: fn(term name) -> list of student logits or features that this term compares.
            apart: fn(term name) -> value of the term with the teacher's outputs of different
                samples.
            errors: fn() -> `label_errors` of this batch, or None if they can't be computed.
        """
        fixed = {k: weights[k] * v for k, v in values.items() if k not in self}
        base = sum(fixed.values()) if fixed else None
        for k, ratio in self.items():
            if k not in values:
                # a term with a weight has no gradient if its layers are frozen, or in validation
                if weights[k] and torch.is_grad_enabled():
                    ratio.forget()
                continue
            at = [(i, x) for i, x in enumerate(tensors(k)) if x.requires_grad]
            if not at:
                # frozen layers have no gradient; the term then trains only its projector
                ratio.forget()
                continue
            if base is None:  # a batch without a task loss uses earlier measurements
                if ratio.means is not None:
                    continue
                raise DistillError(
                    f'grad_ratio= of {k} is relative to the task loss and the terms with a '
                    f'weight, and this batch has neither. Give {k} a weight= instead.'
                )
            # subtle: in distributed training, all processes must measure the same batches
            few = world_size() == 1 and any(is_below(ratio.FEW, x) for _, x in at)
            if ratio.due((*fixed, *(i for i, _ in at)), few):
                self._measure(k, base, values[k], apart, [x for _, x in at])
                if ratio.gain is not None and errors and (new := errors()) is not None:
                    ratio.gain.add(new)

    def weights(self, weights: dict[str, Any], values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the weights of a batch. A gradient ratio is replaced with the weight at which the
        gradient norm of its term has that ratio. All weights are then divided by 1 plus the sum of
        the ratios, so that the norm of the total gradient is at most as large as without these
        terms, and a learning rate that suits the other losses still works.

        Args:
            weights: {name: weight or gradient ratio}.
            values: {name: value} of the losses with a nonzero weight and a gradient.
        """
        measured = {
            k: weights[k] * r.factor_at(values.get(k))
            for k, r in self.items()
            if r.means is not None
        }
        length = self.length(weights)
        return {k: w / length for k, w in (weights | measured).items()}

    def length(self, weights: Mapping[str, Any]) -> float:
        """Return the number by which `weights` divides: 1 plus the sum of the measured gradient
        ratios.

        Args:
            weights: {name: weight or gradient ratio}.
        """
        return 1 + sum(weights[k] for k, r in self.items() if r.means is not None)

    def faded(
        self, weights: Mapping[str, Any], values: Mapping[str, Tensor]
    ) -> Tensor | float | None:
        """Return the multiple of the other losses to add to make up for the gradient lost to
        `fade`. The weights of these losses are then the same as with the lower ratios. Return None
        if no term has `fade`.

        Args:
            weights: {name: weight or gradient ratio}.
            values: {name: value} of the losses with a nonzero weight and a gradient.
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
                f'The task loss does not depend on what {name} compares, or the student is compiled '
                'as a whole, so there is no gradient to compare with. Give it weight= instead of '
                'grad_ratio=, or compare a different output (output=) or layer.'
            )
        far: Any = gradient_norm(apart(name), tensors)
        # `far` is infinite if a class has logit -inf for one sample but not for another
        far = norms[1] if far is None else far.where(far.isfinite(), norms[1])
        few = all(is_below(GradientRatio.ENOUGH, x) for x in tensors)
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


def map_samples(fn: Callable, t: Any) -> Any:
    """Apply `fn` to outputs or, if they are not a tensor, to each of their tensors with samples."""
    return fn(t) if isinstance(t, Tensor) else t.map_samples(fn)


def shifted_by_half(t: Any) -> Any:
    """Shift the output for one sample, a map or a sequence, by half of its length."""
    if isinstance(t, Tensor):
        return t.flatten().roll(t.numel() // 2).reshape(t.shape)
    return t.map_samples(lambda o: o.roll(o.shape[1] // 2, 1))


def is_below(n: int, x: Tensor) -> bool:
    """Return True if a batch has fewer than `n` samples. The result is always False for maps and
    sequences, because they have many positions.
    """
    return x.dim() < 3 and len(x) < n
