"Pictures of what is compared."
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from .outputs import DistillError
from .taps import Taps, as_map, run

__all__ = ['attention_map', 'show_features']


def attention_map(
    f:Tensor, # (B, C, H, W), or (B, L, D) tokens that fill a grid
    p:float=2, # exponent of the activations
    aspect:float=1. # height over width of the picture, for tokens
) -> Tensor: # (B, H, W), each from 0 to 1
    "Where the activations of a layer are: mean over channels of |f|^p (arXiv:1612.03928)"
    if f.dim() == 3: f = as_map(f, aspect)
    if f.dim() != 4: raise DistillError(f"An output of shape {tuple(f.shape)} is no map: possible are (B, C, H, W), and tokens (B, L, D)")
    a = f.float().abs().pow(p).mean(1)
    low,high = a.amin((1, 2), keepdim=True),a.amax((1, 2), keepdim=True)
    return (a-low)/(high-low).clamp_min(1e-12)


def read_maps(model, x, names, p):
    with Taps(model, names) as taps:
        run(model, x)
        feats = taps.pop()
    return {n: attention_map(f, p, x.shape[-2]/x.shape[-1]).cpu() for n,f in feats.items()}


def show_features(
    student:nn.Module,
    teacher:nn.Module,
    x:Tensor, # (B, 3, H, W) images as the student gets them
    pairs, # {'student.name': 'teacher.name'} or pairs of names: layers whose outputs are maps or tokens
    *,
    teacher_x:Tensor|None=None, # as the teacher gets them, if otherwise
    images:Tensor|None=None, # (B, 3, H, W) from 0 to 1, to show; None: `x`, stretched to that range
    n:int=4, # of the batch
    p:float=2 # exponent of the activations
):
    "Attention maps of student and teacher side by side over each image, a pair of columns for each pair of layers; returns the figure"
    import matplotlib.pyplot as plt
    pairs = list(pairs.items() if isinstance(pairs, dict) else pairs)
    x = x[:n]
    images = (x if images is None else images[:n]).float().cpu()
    if images.min() < 0 or images.max() > 1: images = (images-images.amin((1, 2, 3), keepdim=True))/(images.amax((1, 2, 3), keepdim=True)-images.amin((1, 2, 3), keepdim=True))
    maps = [read_maps(m, o, [q[i] for q in pairs], p) for i,(m,o) in enumerate([(student, x), (teacher, x if teacher_x is None else teacher_x[:n])])]
    columns = [('', None)] + [(f"{('student', 'teacher')[i]} {q[i]}", maps[i][q[i]]) for q in pairs for i in (0, 1)]
    fig,axs = plt.subplots(len(x), len(columns), figsize=(2.1*len(columns), 2.2*len(x)), squeeze=False, layout='constrained')
    for r,row in enumerate(axs):
        for ax,(title,m) in zip(row, columns):
            ax.imshow(images[r].permute(1, 2, 0).expand(-1, -1, 3))
            if m is not None:
                big = F.interpolate(m[r][None, None], images.shape[-2:], mode='bilinear', align_corners=False)[0, 0]
                ax.imshow(big, cmap='inferno', alpha=.65, vmin=0, vmax=1)
            if r == 0: ax.set_title(f"{title}\n{'x'.join(map(str, m.shape[1:]))}" if m is not None else 'image', fontsize=8)
            ax.axis('off')
    return fig
