"""Convert images to the normalization and size of the teacher's training images."""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.outputs import DistillError, as_plain
from .members import single_teachers

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def possible_stats(option: str) -> str:
    auto = " 'auto'," if option == 'stats' else ''
    return (
        f"must be (mean, std), 'imagenet',{auto} torchvision's weights (as in "
        'ResNet18_Weights.DEFAULT), or None'
    )


def is_image(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_floating_point()


def full_precision(t: Tensor) -> Tensor:
    return t.float() if t.dtype.itemsize < 4 else t


def stats_of(stats: Any, model: Any = None, option: str = 'stats') -> tuple[Tensor, Tensor] | None:
    """Convert a normalization to (mean, std), each a tensor (C,) or (1,).

    Args:
        stats: The option `stats` or `input_stats` of `Teacher`.
        model: Model of the teacher, for 'auto'.
        option: Name of the option, for messages.
    """
    if stats is None:
        return None
    if isinstance(stats, str):
        stats = named_stats(stats, model, option)
    elif hasattr(stats, 'transforms'):
        stats = stats.transforms().mean, stats.transforms().std  # torchvision's weights
    try:
        mean, std = [
            torch.as_tensor(as_plain(o), dtype=torch.float64).flatten().cpu() for o in stats
        ]
    except (TypeError, ValueError, RuntimeError) as e:
        raise DistillError(f'{option}={stats!r}: {possible_stats(option)}') from e
    finite = torch.cat([mean, std]).isfinite().all()
    if len(mean) != len(std) or not finite or not (std > 0).all():
        raise DistillError(
            f'{option}={stats!r}: give one mean, and one std above 0, for each channel'
        )
    return mean, std


def height_and_width(size: Any) -> tuple[int, int] | None:
    """Convert the option `size` of `Teacher` to (height, width)."""
    if size is None:
        return None
    try:
        height, width = map(index, size if isinstance(size, Iterable) else (size, size))
    except (TypeError, ValueError):
        height = width = 0
    if isinstance(size, bool) or min(height, width) < 1:
        raise DistillError(
            f'size={size!r}: must be the height and width of the images of the teacher, as in '
            'images=dict(size=(224, 320)), or one number for a square'
        )
    return height, width


def named_stats(name: str, model: Any, option: str) -> tuple:
    if name == 'imagenet':
        return IMAGENET
    if name != 'auto' or option != 'stats':
        raise DistillError(f'{option}={name!r}: {possible_stats(option)}')
    if cfg := timm_cfg(model):
        return cfg['mean'], cfg['std']
    raise DistillError(
        f"stats='auto': {type(model).__name__} does not store the normalization of its images. "
        "Models of timm do, models of torchvision don't. Pass images=dict(stats=(mean, std)), its "
        "torchvision weights, or 'imagenet'."
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
            f'input_stats have {len(gm)} channels, stats {len(wm)}: both must be for the same '
            'images'
        )
    factor, shift = torch.broadcast_tensors(gs / ws, (gm - wm) / ws)
    if (factor - 1).abs().max() < 1e-6 and shift.abs().max() < 1e-6:
        return None
    return factor[:, None, None], shift[:, None, None]


class ImageConversion:
    """Converts the images of a batch to the normalization and size of a teacher's images.

    Args:
        stats, input_stats, size: As in `Teacher`. Normalizations are results of `stats_of`.
    """

    def __init__(self, stats: Any, input_stats: Any, size: tuple[int, int] | None) -> None:
        self.stats, self.input_stats, self.size = stats, input_stats, size
        self.scaling = None if None in (stats, input_stats) else affine(input_stats, stats)

    def __str__(self) -> str:
        """Text that describes how the normalization is changed. '' if it is not changed."""
        if self.scaling is None:
            return ''
        text = lambda stats: ', std '.join(' '.join(f'{v:.4g}' for v in o.tolist()) for o in stats)
        return f'mean {text(self.input_stats)} -> mean {text(self.stats)}'

    def check(self, images: Sequence[Tensor]) -> None:
        """Raise a DistillError if the images of a batch do not fit the normalization."""
        if self.stats is not None and self.input_stats is None and images:
            raise DistillError(
                "stats is the normalization of the teacher's images, but the normalization of the batch's "
                'images is missing: give images=dict(input_stats=(mean, std)), or (0, 1) if they are not '
                'normalized.'
            )
        if self.scaling is None:
            return
        if not images:
            raise DistillError(
                'stats= is for images, float tensors of shape (B, C, H, W), but this batch has none: '
                'remove stats.'
            )
        n = len(self.scaling[0])
        if wrong := [t for t in images if n not in (1, t.shape[1])]:
            raise DistillError(
                f'stats= has {n} channels, the images have shape {tuple(wrong[0].shape)}: '
                'give one mean and std for each channel, or stats=None.'
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Convert images (B, C, H, W)."""
        if self.scaling is None and self.size is None:
            return images
        images = full_precision(images)
        if self.scaling is not None:
            images = images * self.scaling[0].to(images) + self.scaling[1].to(images)
        return images if self.size is None else resized(images, self.size)

    def restored_maps(self, logits: Any, images: Sequence[Tensor]) -> Any:
        """Resize logit maps (B, C, H, W) to the size of the images in the batch.

        Logits with a different size than the teacher's images are not changed.

        Args:
            logits: Logits of the teacher.
            images: Images of the batch.
        """
        if not images or logits.dim() != 4 or tuple(logits.shape[2:]) != self.size:
            return logits
        return resized(logits, tuple(images[0].shape[2:]))


def resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return images (B, C, H, W) with this height and width."""
    if size == tuple(images.shape[2:]):
        return images
    return F.interpolate(full_precision(images), size, mode='bilinear', antialias=True)


def image_change(teacher: Any) -> str:
    """Describe how a teacher changes the normalization of images. '' if it does not change it."""
    each = (str(ImageConversion(t.stats, t.input_stats, t.size)) for t in single_teachers(teacher))
    return '; '.join(dict.fromkeys(filter(None, each)))
