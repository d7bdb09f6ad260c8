"""Linear layers that compute logits from the numbers in a row. This is either the output layer of a
teacher, which is applied to stored hidden states, or the principal components of its logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..base.outputs import DistillError, LinearLogits, Outputs, as_dense
from ..features.layer_hooks import Taps
from ..features.layer_names import no_such_layer
from ..teachers.teacher import Teacher

CHECKED = 16  # number of positions in each batch on which the output layer is verified
# minimum unit of a hidden feature, relative to the root mean square of all features
LEAST_UNIT = 0.25
NOT_FOUND = "Specify it, store=dict(kind='hidden', layer='NAME'), or store something else."


@dataclass
class OutputLayer:
    """The output layer of a teacher, found by `find_output_layer`.

    Attributes:
        name: Dotted name of the layer.
        weight: (C, D). If the model scales its logits, the weight includes the scale.
        bias: (C,), or None.
        cap: Soft cap of the logits, or None.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    cap: float | None = None

    @property
    def tap(self) -> str:
        """Name under which the input of the layer is captured."""
        return f'{self.name}@in'

    def outputs(self, out: Outputs, half: bool = False) -> Outputs:
        """Replace the logits with hidden states, after checking that they give the same logits.

        Args:
            out: Outputs of the teacher, with the input of the layer among the features.
            half: True if the outputs were computed in half precision.
        """
        feats = {k: v for k, v in out.feats.items() if k != self.tap}
        hidden = out.feats[self.tap].detach()
        weight = self.weight.to(hidden.device)
        bias = None if self.bias is None else self.bias.to(weight)
        t = LinearLogits(hidden.float(), weight, bias, self.cap)
        logits: Any = out.logits
        half = half or logits.dtype.itemsize < 4
        self._verify(t, logits.detach(), 0.03 if half else 1e-3)
        return replace(out, logits=t, feats=feats)

    def _verify(self, t: LinearLogits, logits: Tensor, tol: float) -> None:
        if t.shape != logits.shape:
            raise DistillError(
                f'The layer {self.name!r} gives logits of shape {tuple(t.shape)} for this batch, but '
                f"the teacher's have shape {tuple(logits.shape)}: it is not the teacher's output layer."
            )
        hidden, z = t.hidden.reshape(-1, t.hidden.shape[-1]), logits.reshape(-1, t.n)
        some = torch.as_tensor(np.linspace(0, len(z) - 1, min(CHECKED, len(z)), dtype=int))
        z = z[some.to(z.device)].float()
        # subtle: skip padded positions, where all logits are 0
        on = (z != 0).any(1)
        got = replace(t, hidden=hidden[some.to(hidden.device)]).dense()[on]
        if on.any() and (far := relative_difference(got, z[on])) > tol:
            raise DistillError(
                f'The layer {self.name!r} of the stored hidden states gives logits that differ from the '
                f"teacher's by {far:.2g} of the largest logit: these are hidden states of a different "
                'model, or the model changes the output of this layer.'
            )


@dataclass
class StoredHead:
    """The stored linear layer that computes logits from the numbers in a row: the output layer of a
    teacher for hidden states, or principal components. All rows of a cache share it.

    In int8, the features of a row share one scale. Hidden states are therefore stored in a different
    basis, in which the errors of the features cause independent errors of the logits, and as the
    difference from their median.

    Attributes:
        weight: (C, D), adapted to the basis and the units of the stored hidden states.
        bias: (C,), or None.
        unit: Unit of each stored feature, (D,), so that all features of a row have a similar range.
            With a `basis`, the unit is the standard deviation of the feature. Otherwise, it is the
            root mean square, rounded to a power of two.
        cap: Soft cap of the logits, or None.
        center: Median of each stored feature in its unit, (D,). None without a `basis`.
        basis: Orthogonal matrix by which hidden states are multiplied before they are stored, (D, D).
            None for no change.
    """

    weight: Tensor
    bias: Tensor | None
    unit: Tensor
    cap: float | None = None
    center: Tensor | None = None
    basis: Tensor | None = None

    @classmethod
    def of(cls, t: LinearLogits, layout: Any) -> 'StoredHead':
        """Build the stored output layer from the `LinearLogits` of a few samples.

        Args:
            t: The logits.
            layout: `Layout` of the rows.
        """
        hidden = t.hidden.detach().reshape(-1, t.hidden.shape[-1]).float()
        weight, basis = t.weight.detach().float(), None
        center = torch.zeros_like(hidden[0])
        if layout.basis:
            basis = basis_of(weight)
            weight, hidden = weight @ basis, hidden @ basis.to(hidden)
            # subtle: use the median, because a few positions with much larger numbers may dominate the
            # mean
            center = hidden.median(0).values
        size = (hidden - center).pow(2).mean(0).sqrt()
        # subtle: a feature that is nearly 0 in these samples may be large in a later batch. If its
        # unit were tiny, it would use up the range of the whole row
        unit = size.clamp_min(LEAST_UNIT * float(size.pow(2).mean().sqrt()) or 1.0)
        if basis is None:
            # subtle: multiplication by powers of two causes no rounding errors
            unit = torch.exp2(unit.log2().round())
        bias = None if t.bias is None else t.bias.detach().float()
        rotation = {} if basis is None else dict(center=center / unit, basis=basis)
        # rows are encoded and decoded on the CPU
        return cls(weight * unit.to(weight), bias, unit, t.cap, **rotation).to('cpu')

    def encode(self, hidden: Tensor) -> Tensor:
        """Convert hidden states to the numbers that are stored, (B, ..., D)."""
        hidden, unit = hidden.detach().float(), self.unit.to(hidden.device)
        if self.basis is None or self.center is None:
            return hidden / unit
        return hidden @ self.basis.to(hidden) / unit - self.center.to(hidden)

    def decode(self, stored: Tensor) -> LinearLogits:
        """Return the logits for the numbers that `encode` returned."""
        hidden = stored if self.center is None else stored + self.center
        return LinearLogits(hidden, self.weight, self.bias, self.cap)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors, in the order in which they are stored."""
        names = 'weight', 'bias', 'unit', 'center', 'basis'
        return {k: o for k in names if (o := getattr(self, k)) is not None}

    def project(self, t: Tensor) -> LinearLogits:
        """Project logits, (B, C), onto principal components."""
        refuse_infinite(t)
        weight, bias, unit = (cast(Tensor, o).to(t) for o in (self.weight, self.bias, self.unit))
        return LinearLogits((t - bias) @ (weight / unit**2), weight, bias)

    def to(self, device: Any) -> 'StoredHead':
        moved: dict[str, Any] = {k: o.to(device) for k, o in self.tensors.items()}
        return replace(self, **moved)

    def to_bytes(self) -> bytes:
        return b''.join(o.cpu().numpy().astype('<f4').tobytes() for o in self.tensors.values())

    @classmethod
    def from_bytes(cls, data: bytes, layout: Any) -> 'StoredHead':
        """Read an output layer that `to_bytes` wrote.

        Args:
            data: Content of the file.
            layout: `Layout` of the rows.
        """
        shapes = layout.shapes_of_head
        parts = torch.from_numpy(np.frombuffer(data, '<f4').copy()).split(
            [*map(prod, shapes.values())]
        )
        tensors = {k: o.view(shape) for (k, shape), o in zip(shapes.items(), parts)}
        return cls(**dict(bias=None) | tensors, cap=layout.head['cap'])


def basis_of(weight: Tensor) -> Tensor:
    """Return an orthogonal matrix `V` for which the columns of `weight @ V`, less their means, are
    orthogonal.

    The means don't matter, because they change all logits of a position by the same number.
    """
    if not weight.isfinite().all():
        raise DistillError("The teacher's output layer contains nan or inf.")
    weight = weight - weight.mean(0)
    # subtle: not all devices support eigh
    return torch.linalg.eigh((weight.T @ weight).cpu())[1].to(weight)


def head_of(t: Any, layout: Any) -> StoredHead | None:
    """Build the stored linear layer for a `Layout`. Return None if its rows do not need one.

    Args:
        t: Logits of a few samples. For hidden states, `LinearLogits`.
        layout: The layout.
    """
    if layout.head is None:
        return None
    if layout.kind == 'pca':
        t = principal_components(as_dense(t), layout.shapes_of_head['weight'][1])
    return StoredHead.of(t, layout).to('cpu')


def principal_components(t: Tensor, k: int) -> LinearLogits:
    """Return logits in factored form, projected onto their first `k` principal components.

    Args:
        t: Logits, (N, C).
        k: Number of components. With fewer samples, the remaining components are 0.
    """
    refuse_infinite(t := t.detach().float())
    mean = t.mean(0)
    vectors = torch.linalg.svd(t - mean, full_matrices=False).Vh[:k]
    vectors = torch.cat([vectors, vectors.new_zeros(k - len(vectors), len(mean))])
    return LinearLogits((t - mean) @ vectors.T, vectors.T, mean)


def refuse_infinite(t: Tensor) -> None:
    if not t.isfinite().all():
        raise DistillError(
            "Principal components can't represent infinite logits (classes that are masked out) or nan: "
            "use store='float16' or 'float32' for infinite logits."
        )


def worst_error(t: LinearLogits, got: LinearLogits) -> float:
    """Compute the largest error of a few stored logits.

    Args:
        t: Logits of a batch.
        got: The same logits, read back from their stored form.

    Returns:
        The error relative to the mean range of the logits of a position.
    """
    few = lambda x: x.hidden.reshape(-1, x.hidden.shape[-1])[:CHECKED]
    exact = replace(t, hidden=few(t).float()).dense().cpu()
    read = replace(got, hidden=few(got)).dense().cpu()
    # subtle: use the mean over positions, since the few classes of one position may be equal
    spread = float((exact.amax(-1) - exact.amin(-1)).mean())
    return float((read - exact).abs().max()) / spread if spread > 0 else 0.0


def find_output_layer(teacher: Any, run: Callable, layer: str | None = None) -> OutputLayer:
    """Find the linear layer that computes the teacher's logits, and verify it on a batch.

    Args:
        teacher: A `Teacher`.
        run: fn(teacher) -> `Outputs` for a batch. The function is called with modified copies of
            `teacher`.
        layer: Name of the layer. If None, try all linear layers.

    Raises:
        DistillError: If no layer computes the logits. The error gives the reason.
    """
    if not isinstance(teacher, Teacher):
        raise DistillError(
            f"store='hidden' needs a Teacher made from a module, not a {type(teacher).__name__}. A "
            'function can itself return Outputs(LinearLogits(hidden, weight, bias)).'
        )
    if teacher.members:
        raise DistillError(
            "store='hidden': an ensemble has no single hidden state. Store the members' outputs."
        )
    if teacher.returns != 'logits' or teacher.module is None:
        raise DistillError(
            f"store='hidden': {teacher.name} is not a module that returns logits, so its output layer "
            "can't be read."
        )
    model = teacher.as_it_is()
    have = dict(teacher.module.named_modules())
    if layer is not None and layer not in have:
        raise DistillError(no_such_layer(teacher.module, layer, list(have)))
    linear = [k for k, m in have.items() if isinstance(m, nn.Linear)] if layer is None else [layer]
    if not linear:
        raise DistillError(f"store='hidden': {teacher.name} has no linear layer. {NOT_FOUND}")
    with Taps(teacher.module, linear) as taps:
        logits = run(model).logits.detach().float()
        outputs = taps.feats
    # if the teacher selects some of the classes, compare the logits before the selection
    if teacher.select is not None:
        logits = run(Teacher(model, select=None, classes=None)).logits.detach().float()
    alike = [k for k, o in outputs.items() if o.shape == logits.shape]
    if not alike:
        which = f'no linear layer of {teacher.name} has'
        if len(linear) == 1:
            which = f'the layer {linear[0]!r} of {teacher.name} does not have'
        raise DistillError(
            f"store='hidden': {which} an output of shape {tuple(logits.shape)}, "
            f"like the teacher's logits. {NOT_FOUND}"
        )
    each = (as_output(k, have[k], outputs[k], logits, teacher) for k in reversed(alike))
    if not (found := [o for o in each if o]):
        far = min(relative_difference(outputs[k].float(), logits) for k in alike)
        raise DistillError(
            f"store='hidden': the logits of {teacher.name} are not the output of a linear layer "
            f'({", ".join(alike[:3])}), even with a scale or a soft cap. They differ by {far:.2g} of '
            f'the largest logit. {NOT_FOUND}'
        )
    return selected(found[0], teacher)


def as_output(name: str, module: Any, z: Any, logits: Any, teacher: Any) -> OutputLayer | None:
    """Return an `OutputLayer` if the logits can be computed from the output `z` of a layer, else
    None.
    """
    z, weight = z.detach().float(), getattr(module, 'weight', None)
    if weight is None or weight.dim() != 2 or len(weight) != logits.shape[-1]:
        return None
    tol = 0.03 if weight.dtype.itemsize < 4 else 1e-4
    weight, bias = weight.detach().float(), getattr(module, 'bias', None)
    bias = None if bias is None else bias.detach().float()
    if relative_difference(z, logits) <= tol:
        return OutputLayer(name, weight, bias)
    a = float((z * logits).sum() / (z * z).sum().clamp_min(1e-30))
    if a and relative_difference(a * z, logits) <= tol:
        return OutputLayer(name, weight * a, None if bias is None else bias * a)
    for cap in caps_of(teacher.module):
        if relative_difference(cap * torch.tanh(z / cap), logits) <= tol:
            return OutputLayer(name, weight, bias, cap)
    return None


def caps_of(model: Any) -> Iterator[float]:
    """Yield the soft caps of the logits in the configuration of a Hugging Face model."""
    config = getattr(model, 'config', None)
    for c in (config, getattr(config, 'text_config', None)):
        cap = getattr(c, 'final_logit_softcapping', None)
        if isinstance(cap, (int, float)) and cap > 0:
            yield float(cap)


def selected(layer: OutputLayer, teacher: Any) -> OutputLayer:
    """Restrict the layer to the classes that the teacher selects."""
    if teacher.select is None:
        return layer
    if any(isinstance(g, list) and len(g) > 1 for g in teacher.select):
        raise DistillError(
            f"store='hidden': select={teacher.select} sums probabilities of classes, which a linear "
            "layer can't do. Store the logits."
        )
    rows = torch.tensor([g[0] if isinstance(g, list) else g for g in teacher.select])
    rows = rows.to(layer.weight.device)
    bias = None if layer.bias is None else layer.bias[rows]
    return replace(layer, weight=layer.weight[rows], bias=bias)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest absolute value of `b`."""
    if a.shape != b.shape:
        return float('inf')
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
