"""Terms with a share: the weight that makes the norm of a term's gradient a multiple of that of the
other gradients.
"""

import torch
from torch import Tensor

from ..base.distributed import length_over_ranks
from ..base.outputs import DistillError
from .gradient_norms import gradient_norm

__all__ = ['GradientRatio', 'GradientRatios']


class GradientRatio:
    """What a term's loss is multiplied by so that its gradient has the same norm as that of the
    labels and of all terms with a weight, where the term compares: at the student's logits, or at
    its layers. Both norms are running means, measured in the first batches, then in ever fewer, and
    in the end in one of `EVERY`.

    A student that already agrees with its teacher has hardly any gradient to measure, and a factor
    computed from that would be huge. Two more numbers are therefore measured. `apart` is the norm
    of the term's gradient against the teacher's outputs for different samples, the scale that the
    term has for a student that disagrees: a norm below `FLOOR` times that counts as that much. And
    the value of the term shows between two measurements that its gradient has grown. All numbers
    stay on the device, so that no step waits for them.
    """

    # batches that are all measured; in the end one in so many is; what a new one counts in the mean
    FIRST, EVERY, NEW = 16, 32, 0.2
    FLOOR = 1.0  # the smallest norm that counts, relative to `apart`
    JUMP = 4.0  # growth beyond this is not averaged over

    def __init__(self):
        self.batches, self.measured, self.parts, self.means = 0, 0, (), None

    def due(self, parts):
        """Is this batch measured? Counts it.

        Args:
            parts: What the norms depend on: if it changes, the means start over.
        """
        if parts != self.parts:
            self.batches, self.measured, self.parts = 0, 0, parts
        self.batches += 1
        every = 2 ** (
            max(self.batches // self.FIRST, 1).bit_length() - 1
        )  # 1 up to 31, 2 up to 63, 4 up to 127 ...
        return self.batches % min(every, self.EVERY) == 0

    def add(
        self,
        new: Tensor,  # (4,) norm of what has a weight, of the term, of the term `apart`; the term's value
    ):
        self.measured += 1
        before = torch.zeros_like(new) if self.means is None else self.means.to(new)
        new = new.where(new.isfinite().all(), before)  # an overflow in half precision says nothing
        rate = new.new_full((), max(1 / self.measured, self.NEW))
        self.means = before.lerp(new, rate.where(new[1] <= self.JUMP * before[1], 1.0))

    @property
    def factor(self):
        """0-dim; 0 as long as the term has no gradient."""
        return self.factor_at(None)

    def factor_at(self, value: Tensor | None) -> Tensor:
        """The factor for a batch. It is lower where the term's value is much larger than it was.

        Args:
            value: Of the term in this batch; None: as it was when it was measured.
        """
        if value is not None:
            self.means = self.means.to(value.device)
        base, norm, apart, mean = self.means
        norm = norm.maximum(self.FLOOR * apart)
        if value is not None:
            # subtle: for a loss that is 0 at best, the norm grows no faster than the value
            growth = value.detach().float().abs() / mean.abs().clamp_min(1e-12)
            norm = norm * (growth / self.JUMP).clamp(1.0, 1e6)
        return (base / norm).where(norm > 0, 0.0)

    def state_dict(self):
        means = None if self.means is None else self.means.tolist()
        return dict(
            batches=self.batches, measured=self.measured, parts=list(self.parts), means=means
        )

    def load_state_dict(self, state):
        self.batches, self.measured, self.parts = (
            state['batches'],
            state['measured'],
            tuple(state['parts']),
        )
        self.means = None if state['means'] is None else torch.tensor(state['means'])


class GradientRatios(dict):
    """Term -> its `GradientRatio`, for the terms with a share."""

    def __init__(self, recipe):
        super().__init__({t.name: GradientRatio() for t in recipe.terms if t.has_grad_ratio})

    def measure(self, weights, values, tensors, apart):
        """Measure the terms with a share that are due in this batch.

        Args:
            weights: Part -> its weight, or its share; the labels' is 'task'.
            values: Part -> its value, of the parts that count and have a gradient.
            tensors: fn(term name): the student's logits or features that this term compares.
            apart: fn(term name): the term's value against the teacher's outputs for different
                samples.
        """
        fixed = {k: weights[k] * v for k, v in values.items() if k not in self}
        base = sum(fixed.values()) if fixed else None
        for k, ratio in self.items():
            if k not in values:
                continue
            if base is None:  # without labels, what was measured before counts
                if ratio.means is not None:
                    continue
                raise DistillError(
                    f'{k} has a share of the gradient beside the labels and the terms with a weight, '
                    'and there are none in this batch. Give it weight= instead of grad_ratio=.'
                )
            # frozen layers: the term trains its projector alone
            at = [(i, x) for i, x in enumerate(tensors(k)) if x.requires_grad]
            if at and ratio.due((*fixed, *(i for i, _ in at))):
                self._measure(k, base, values[k], apart, [x for _, x in at])

    def weights(self, weights, values):
        """The weights, those of terms with a share multiplied by what was measured."""
        return weights | {
            k: weights[k] * r.factor_at(values.get(k))
            for k, r in self.items()
            if r.means is not None
        }

    def _measure(self, name, base, value, apart, tensors):
        try:
            norms = [gradient_norm(v, tensors) for v in (base, value)]
        except RuntimeError as e:
            raise DistillError(
                f"The gradient of {name} can't be measured inside a part of the student that allows one "
                f'backward pass alone, as compiled parts do ({e}). Give it weight= instead of '
                'grad_ratio=.'
            ) from e
        if None in norms:
            raise DistillError(
                f'The task loss does not depend on what {name} compares, so that it can have no '
                'share of the gradient there. Give it weight= instead of grad_ratio=, or compare another '
                'output (output=) or layer.'
            )
        far = gradient_norm(apart(name), tensors)
        norms += [norms[1] if far is None else far, value.detach().float()]
        self[name].add(length_over_ranks(torch.stack(norms)))

    def state_dict(self):
        return {k: r.state_dict() for k, r in self.items()}

    def load_state_dict(self, state):
        for k, s in state.items():
            if k in self:
                self[k].load_state_dict(s)
