"""Combine several teachers: the mean of their predictions, or one randomly drawn member."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.outputs import DistillError, Outputs
from .image_normalization import full_precision
from .runner import Runner, with_classes


class EnsembleRunner(Runner):
    """Runs the members of an ensemble. Layer names start with the index of the member.

    Args:
        teacher: The `Teacher` with its members.
    """

    def enter(self, stack: ExitStack) -> None:
        for m in self.teacher.members:
            stack.enter_context(m)

    def generators(self, x: Any = ()) -> dict:
        return {k: v for m in self.teacher.members for k, v in m.runner.generators(x).items()}

    def reset(self) -> None:
        for m in self.teacher.members:
            m.reset()

    def outputs_for(
        self, teachers: Sequence, x: Sequence, kw: Mapping[str, Any], layers: Sequence[str]
    ) -> list[Outputs]:
        """Return the combined outputs for a batch, once for each teacher.

        Args:
            teachers: Variants of the ensemble that select or map classes differently.
            x, kw: Positional and keyword inputs.
            layers: Names of the layers to read.
        """
        o = self._combined(x, kw, layers)
        return [with_classes(t, o) for t in teachers]

    def _combined(self, x: Sequence, kw: Mapping[str, Any], layers: Sequence[str]) -> Outputs:
        self.check_layers(layers)
        t = self.teacher
        if t.combine == 'sample':
            return self._outputs_of_one(x, kw, layers)
        names = lambda i: [n.partition('.')[2] for n in layers if n.partition('.')[0] == str(i)]
        outs = [
            m.runner.outputs_for([m], x, kw, list(dict.fromkeys(m.layers + names(i))))[0]
            for i, m in enumerate(t.members)
        ]
        feats = {f'{i}.{k}': v for i, o in enumerate(outs) for k, v in o.feats.items()}
        logits = mix([o.logits for o in outs], t.weights, t.combine, t.kind, t.axis)
        if any(o.classes != outs[0].classes for o in outs):
            raise DistillError(
                'The members of the ensemble predict different classes: classes= must be the same '
                'for all.'
            )
        mask = next((o.mask for o in outs if o.mask is not None), None)
        return Outputs(logits, feats, mask, outs[0].classes)

    def _outputs_of_one(self, x: Sequence, kw: Mapping[str, Any], layers: Sequence[str]) -> Outputs:
        """Return the outputs of a randomly drawn member."""
        if layers:
            raise DistillError(
                "combine='sample' runs only one member, so layers can't be compared: use terms on "
                "the outputs, or combine='probs'."
            )
        drawn = torch.multinomial(torch.tensor(self.teacher.weights), 1)
        member = self.teacher.members[int(drawn)]
        return member.runner.outputs_for([member], x, kw, [])[0]

    def bare_call(self, x: tuple) -> Callable[[], Outputs]:
        """Return a function that runs the ensemble on these inputs."""
        return lambda: self.teacher(*x)

    def check_layers(self, layers: Sequence[str]) -> None:
        """Raise a DistillError if a layer name does not start with the index of a member."""
        numbers = [*map(str, range(len(self.teacher.members)))]
        if wrong := [n for n in layers if n.partition('.')[0] not in numbers]:
            raise DistillError(
                f'No layer {wrong[0]!r} in an ensemble of {len(numbers)}: '
                "a layer of its first member is called '0.NAME', of its second '1.NAME', and so on."
            )


def member_weights(weights: Sequence[float] | None, n: int) -> list[float]:
    """Normalize the weights of the members to sum to 1. None gives equal weights."""
    w = [1.0] * n if weights is None else [float(o) for o in weights]
    if len(w) != n or min(w) < 0 or not 0 < sum(w) < float('inf'):
        raise DistillError(
            f'weights={weights} for {n} teachers: must be one number per teacher, none negative '
            'and not all 0'
        )
    return [o / sum(w) for o in w]


def mix(
    logits: Sequence[Tensor], weights: Sequence[float], combine: str, kind: str, axis: int
) -> Tensor:
    """Return the logits of the mean prediction of several teachers.

    Args:
        logits: Logits of each member, all of the same shape.
        weights: Weight of each member. The weights sum to 1.
        combine, kind, axis: As in `Teacher`.
    """
    for i, o in enumerate(logits):
        if o.shape != logits[0].shape:
            raise DistillError(
                f'Logits of member {i} of the ensemble have shape {tuple(o.shape)}, but logits of '
                f'member 0 have shape {tuple(logits[0].shape)}: the shapes must be equal. '
                'Teacher(member, select=...) selects classes of a member; a function can resize '
                'its outputs.'
            )
    weights, logits = zip(*[(w, full_precision(o)) for w, o in zip(weights, logits) if w > 0])
    if combine == 'logits' or kind == 'regression':
        return sum(w * o for w, o in zip(weights, logits))
    log_mean = lambda lps: torch.stack([lp + log(w) for lp, w in zip(lps, weights)]).logsumexp(0)
    if kind == 'sigmoid':
        return log_mean(map(F.logsigmoid, logits)) - log_mean(F.logsigmoid(-o) for o in logits)
    return log_mean(F.log_softmax(o, axis) for o in logits)
