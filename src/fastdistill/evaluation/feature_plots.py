"""Plot attention maps of student and teacher."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.outputs import DistillError, as_plain, map_tensors, tensors_in
from ..features.layer_hooks import Taps
from ..features.layer_pairs import inputs, pair
from ..features.maps_and_tokens import as_map
from ..features.probe import dry_run
from .plot_style import new_figure


def attention_map(f: Tensor, p: float = 2, aspect: float = 1.0) -> Tensor:
    """Compute the attention map of a layer, which is the mean over channels of |f|^p, rescaled to
    the range from 0 to 1 (arXiv:1612.03928).

    Args:
        f: Maps (B, C, H, W), or tokens (B, L, D) that fill a grid.
        p: Exponent of the activations.
        aspect: Height divided by width of the image. Used only for tokens.

    Returns:
        Attention maps, (B, H, W).
    """
    if f.dim() == 3:
        f = as_map(f, aspect)
    if f.dim() != 4:
        raise DistillError(
            f'An output of shape {tuple(f.shape)} is not a map: it must be (B, C, H, W), or '
            'tokens (B, L, D).'
        )
    a = f.float().abs().pow(p).mean(1)
    low, high = a.amin((1, 2), keepdim=True), a.amax((1, 2), keepdim=True)
    return (a - low) / (high - low).clamp_min(torch.finfo(a.dtype).tiny)


def read_maps(model: nn.Module, x: Sequence, names: Sequence[str], p: float) -> dict[str, Tensor]:
    """Return {layer name: attention maps (B, H, W)} for a batch, without changing the model."""
    with Taps(model, names) as taps:
        dry_run(model, *x)
        feats = taps.pop()
    height, width = picture_in(x).shape[-2:]
    return {n: named_map(n, f, p, height / width) for n, f in feats.items()}


def picture_in(x: Any) -> Tensor:
    """Return the first tensor (B, C, H, W) in the inputs, or the first tensor if there is none.

    Args:
        x: Inputs of a batch, as nested tuples and dicts of tensors.
    """
    found = list(tensors_in(x))
    return next((o for o in found if o.dim() == 4), found[0])


def named_map(name: str, f: Tensor, p: float, aspect: float) -> Tensor:
    try:
        return attention_map(f, p, aspect).cpu()
    except DistillError as e:
        raise DistillError(f"Layer {name!r} can't be drawn. {e}") from e


def to_show(x: Tensor) -> Tensor:
    """Convert images to shape (B, H, W, 3) with values from 0 to 1.

    If any value is outside this range, each image is rescaled to the range.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise DistillError(
            f"Inputs of shape {tuple(x.shape)} can't be shown: images must be (B, 3, H, W) or (B, "
            '1, H, W). Pass images='
        )
    x = as_plain(x).float().cpu()
    if x.min() < 0 or x.max() > 1:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    return x.expand(-1, 3, -1, -1).movedim(1, -1)


def show_features(
    student: nn.Module,
    teacher: Any,
    x: Any,
    layers: Any = 'auto',
    *,
    images: Tensor | None = None,
    n: int = 4,
    p: float = 2,
) -> Any:
    """Draw the attention maps of student and teacher over each image, side by side for each pair of
    layers.

    Args:
        student: A module.
        teacher: A module, or a `Teacher`. A `Teacher` can have its own normalization and image
            size.
        x: The student's input images, (B, 3, H, W). If the student takes further inputs, a tuple
            or dict of all inputs.
        layers: Layers whose outputs are maps or tokens, specified as in `Term`.
        images: Images to show, (B, 3, H, W) with values from 0 to 1. None to show the images in
            `x`, which are rescaled to that range if necessary.
        n: Number of images.
        p: Exponent of the activations.
    """
    x = map_tensors(inputs(x), lambda o: o[:n] if o.dim() else o)
    pictures = to_show(picture_in(x) if images is None else images[:n])
    pairs = pair(student, teacher, x, layers=layers, match='none')
    s = read_maps(student, x, [o.student for o in pairs], p)
    t = read_maps(teacher, x, [o.teacher for o in pairs], p)
    columns = []
    for o in pairs:
        columns += [(f'student {o.student}', s[o.student]), (f'teacher {o.teacher}', t[o.teacher])]
    return draw_maps(pictures, columns)


def draw_maps(
    pictures: Tensor,  # (B, H, W, 3) from 0 to 1
    columns: Sequence[tuple[str, Tensor]],  # (title, (B, h, w) maps), two for each pair
) -> Any:
    b, h, w = pictures.shape[:3]
    fig = new_figure(2 * (len(columns) + 1), 1.93 * h / w * b + 0.5)
    layout: Any = fig.get_layout_engine()
    layout.set(h_pad=0.02, w_pad=0.02)
    groups = [('image', None)], *zip(columns[::2], columns[1::2])
    parts = fig.subfigures(
        1, len(groups), width_ratios=[len(g) for g in groups], wspace=0.02, squeeze=False
    )[0]
    for part, group in zip(parts, groups):
        axs = part.subplots(b, len(group), squeeze=False)
        for ax, (title, m) in zip(axs[0], group):
            ax.set_title(
                f'{title}\n{"" if m is None else f"{m.shape[1]} x {m.shape[2]}"}', fontsize=9
            )
        for row, picture, i in zip(axs, pictures, range(b)):
            for ax, (_, m) in zip(row, group):
                overlay(ax, picture, None if m is None else m[i])
    return fig


def overlay(ax: Any, picture: Tensor, m: Tensor | None) -> Any:
    """Draw an image. If a map is given, draw the map over a gray version of the image."""
    ax.axis('off')
    if m is None:
        return ax.imshow(picture.numpy())
    ax.imshow(picture.mean(-1).numpy(), cmap='gray', vmin=0, vmax=1)
    big = F.interpolate(m[None, None], picture.shape[:2], mode='bilinear', align_corners=False)[
        0, 0
    ]
    return ax.imshow(big.numpy(), cmap='inferno', alpha=0.7, vmin=0, vmax=1)
