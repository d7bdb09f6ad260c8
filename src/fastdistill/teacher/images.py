"The normalization of the images that a teacher was trained on."
import torch
from ..outputs import DistillError, as_plain

__all__ = ['affine', 'is_image', 'stats_of', 'timm_cfg']

IMAGENET = (.485, .456, .406), (.229, .224, .225)
POSSIBLE_STATS = ("possible are (mean, std), 'imagenet', 'auto', torchvision's weights (as in "
                  "ResNet18_Weights.DEFAULT), and None")


def is_image(t): return t.dim() == 4 and t.is_floating_point()


def full_precision(t): return t.float() if t.dtype.itemsize < 4 else t


def stats_of(stats, model=None):
    "(mean, std), each a tensor (C,) or (1,), from any `stats` that `Teacher` takes"
    if stats is None: return None
    if isinstance(stats, str): stats = named_stats(stats, model)
    elif hasattr(stats, 'transforms'): stats = stats.transforms().mean,stats.transforms().std # torchvision's weights
    try: mean,std = [torch.as_tensor(as_plain(o), dtype=torch.float64).flatten().cpu() for o in stats]
    except (TypeError, ValueError, RuntimeError) as e: raise DistillError(f"stats={stats!r}: {POSSIBLE_STATS}") from e
    if len(mean) != len(std) or not (std > 0).all():
        raise DistillError(f"stats={stats!r}: give one mean, and one std above 0, for each channel")
    return mean,std


def named_stats(name, model):
    if name == 'imagenet': return IMAGENET
    if name != 'auto': raise DistillError(f"stats={name!r}: {POSSIBLE_STATS}")
    if cfg := timm_cfg(model): return cfg['mean'],cfg['std']
    raise DistillError(f"stats='auto': {type(model).__name__} does not hold the normalization of its images, as "
                       "timm's models do and torchvision's don't. Give stats=(mean, std), its torchvision weights, or "
                       "'imagenet'.")


def timm_cfg(model):
    cfg = getattr(model, 'pretrained_cfg', None)
    return cfg if isinstance(cfg, dict) and 'mean' in cfg and 'std' in cfg else None


def affine(given, wanted):
    "(factor, shift), each (C, 1, 1), from images normalized with `given` to `wanted`; None if these are equal"
    (gm,gs),(wm,ws) = given,wanted
    if 1 < len(gm) != len(wm) > 1:
        raise DistillError(f"input_stats have {len(gm)} channels, stats {len(wm)}: both must be of the same images")
    factor,shift = torch.broadcast_tensors(gs/ws, (gm-wm)/ws)
    if (factor-1).abs().max() < 1e-6 and shift.abs().max() < 1e-6: return None
    return factor[:, None, None],shift[:, None, None]
