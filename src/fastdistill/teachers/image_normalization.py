"""Convert images to the normalization and size of the teacher's training images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.outputs import DistillError, as_plain

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POSSIBLE_STATS = (
    "must be (mean, std), 'imagenet', 'auto', torchvision's weights (as in "
    'ResNet18_Weights.DEFAULT), or None'
)


def is_image(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_floating_point()


def full_precision(t: Tensor) -> Tensor:
    return t.float() if t.dtype.itemsize < 4 else t


def stats_of(stats: Any, model: Any = None) -> tuple[Tensor, Tensor] | None:
    """Convert the `stats` argument of `Teacher` to (mean, std), each a tensor (C,) or (1,)."""
    if stats is None:
        return None
    if isinstance(stats, str):
        stats = named_stats(stats, model)
    elif hasattr(stats, 'transforms'):
        stats = stats.transforms().mean, stats.transforms().std  # torchvision's weights
    try:
        mean, std = [
            torch.as_tensor(as_plain(o), dtype=torch.float64).flatten().cpu() for o in stats
        ]
    except (TypeError, ValueError, RuntimeError) as e:
        raise DistillError(f'stats={stats!r}: {POSSIBLE_STATS}') from e
    if len(mean) != len(std) or not (std > 0).all():
        raise DistillError(f'stats={stats!r}: give one mean, and one std above 0, for each channel')
    return mean, std


def named_stats(name: str, model: Any) -> tuple:
    if name == 'imagenet':
        return IMAGENET
    if name != 'auto':
        raise DistillError(f'stats={name!r}: {POSSIBLE_STATS}')
    if cfg := timm_cfg(model):
        return cfg['mean'], cfg['std']
    raise DistillError(
        f"stats='auto': {type(model).__name__} does not hold the normalization of its images, as "
        "timm's models do and torchvision's don't. Give images=dict(stats=(mean, std)), its torchvision "
        "weights, or 'imagenet'."
    )


def timm_cfg(model: Any) -> dict[str, Any] | None:
    cfg = getattr(model, 'pretrained_cfg', None)
    return cfg if isinstance(cfg, dict) and 'mean' in cfg and 'std' in cfg else None


def affine(
    given: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return (factor, shift) that convert images from normalization `given` to `wanted`.

    Both tensors have shape (C, 1, 1). The result is None if the normalizations are equal.
    """
    (gm, gs), (wm, ws) = given, wanted
    if 1 < len(gm) != len(wm) > 1:
        raise DistillError(
            f'input_stats have {len(gm)} channels, stats {len(wm)}: both must be of the same images'
        )
    factor, shift = torch.broadcast_tensors(gs / ws, (gm - wm) / ws)
    if (factor - 1).abs().max() < 1e-6 and shift.abs().max() < 1e-6:
        return None
    return factor[:, None, None], shift[:, None, None]


def check_images(
    images: Sequence[Tensor], stats: Any, input_stats: Any, scaling: tuple[Tensor, Tensor] | None
) -> None:
    """Raise a DistillError if the images of a batch do not fit the normalization.

    Args:
        images: Images of a batch.
        stats, input_stats: As in `Teacher`.
        scaling: Result of `affine` for `input_stats` and `stats`.
    """
    if stats is not None and input_stats is None and images:
        raise DistillError(
            "stats is the normalization of the teacher's images, but the normalization of the batch's "
            'images is missing: give images=dict(input_stats=(mean, std)), or (0, 1) if they are not '
            'normalized.'
        )
    if scaling is None:
        return
    if not images:
        raise DistillError(
            'stats= is for images, float tensors of shape (B, C, H, W), but this batch has none: '
            'remove stats.'
        )
    n = len(scaling[0])
    if wrong := [t for t in images if n not in (1, t.shape[1])]:
        raise DistillError(
            f'stats= has {n} channels, the images have shape {tuple(wrong[0].shape)}: '
            'give one mean and std for each channel, or stats=None.'
        )


def fit_images(
    images: Tensor, scaling: tuple[Tensor, Tensor] | None, size: tuple[int, int] | None
) -> Tensor:
    """Convert images to the teacher's normalization and size.

    Args:
        images: Images (B, C, H, W).
        scaling: Result of `affine`. None to keep the normalization.
        size: (height, width). None to keep the size.
    """
    if scaling is None and size is None:
        return images
    images = full_precision(images)
    if scaling is not None:
        images = images * scaling[0].to(images) + scaling[1].to(images)
    if size in (None, tuple(images.shape[2:])):
        return images
    return F.interpolate(images, size, mode='bilinear', antialias=True)


def maps_of_size(logits: Tensor, size: tuple[int, int], wanted: tuple[int, int] | None) -> Tensor:
    """Resize logit maps (B, C, H, W) to the size of the images in the batch.

    Logits with a different size than the teacher's images are not changed.

    Args:
        logits: Logits of the teacher.
        size: (height, width) of the teacher's images.
        wanted: (height, width) of the images in the batch. None if there are no images.
    """
    if wanted in (None, size) or logits.dim() != 4 or tuple(logits.shape[2:]) != size:
        return logits
    return F.interpolate(full_precision(logits), wanted, mode='bilinear', antialias=True)
