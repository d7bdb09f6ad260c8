"Pictures of what is compared: the right maps in the right places, and nothing changed by looking."

import io, pickle, random
import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
import torch.nn.functional as F
from apps import FASTAI_WARNINGS, Normalize, conv, image_dls, pair, quiet, same, snapshot
from PIL import Image
from fastai.basics import Callback, DataLoaders, TfmdDL
from fastai.vision.all import CategoryBlock, vision_learner
from torch import nn
from fastdistill import DistillError, Teacher
import fastdistill.fastai  # noqa: F401 (it gives Learner show_features)
from fastdistill.evaluation import attention_map, show_features
from fastdistill.evaluation.mask_plots import plot_masks
from fastdistill.evaluation.plot_style import styled_figure

pytestmark = [pytest.mark.filterwarnings(w) for w in FASTAI_WARNINGS]


@pytest.fixture(autouse=True)
def no_open_figures():
    plt.close('all')  # other tests may have left some


def body(width):
    return nn.Sequential(conv(3, width), conv(width, 2 * width))


def net(width):
    return nn.Sequential(
        *body(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3)
    ).eval()


def cells(fig):
    "The axes of a picture, as rows: of the image, then of each pair of layers"
    parts = [f.axes for f in fig.subfigs]
    n = len(parts[0])
    return [
        [a for p in parts for a in p[r * len(p) // n : (r + 1) * len(p) // n]] for r in range(n)
    ]


def shown(ax):
    return np.asarray(ax.images[-1].get_array())


def titles(fig):
    return [a.get_title() for a in cells(fig)[0]]


def by_hand(f, p, size):
    "A plain loop: the mean of |f|^p over channels, from 0 to 1, enlarged"
    out = []
    for o in f:
        m = sum(c.abs() ** p for c in o) / len(o)
        m = (m - m.min()) / (m.max() - m.min())
        out.append(F.interpolate(m[None, None], size, mode='bilinear', align_corners=False)[0, 0])
    return torch.stack(out)


@pytest.mark.parametrize('p', [1, 2, 4])
def test_attention_map_is_the_mean_of_powers_from_0_to_1(p):
    f = torch.randn(3, 5, 4, 6)
    assert torch.allclose(attention_map(f, p), by_hand(f, p, (4, 6)), atol=1e-6)
    tokens = torch.cat([torch.randn(3, 1, 5), f.flatten(2).mT], 1)  # a class token in front
    assert torch.allclose(attention_map(tokens, p, aspect=4 / 6), attention_map(f, p))


def test_attention_map_of_a_flat_layer_is_0():
    assert attention_map(torch.ones(2, 3, 4, 4)).eq(0).all()


def test_attention_map_refuses_what_is_no_map():
    with pytest.raises(DistillError, match=r'shape \(2, 3\) is not a map'):
        attention_map(torch.randn(2, 3))


def test_each_layer_is_drawn_in_its_place():
    s, t, x = net(4), net(6), torch.rand(3, 3, 16, 24)
    fig = show_features(s, t, x, {'0': ['0', '1'], '1': '1'}, n=2, p=4)
    large, little = '\n8 x 12', '\n4 x 6'
    assert titles(fig) == [
        'image\n',
        *[f'student 0{large}', f'teacher 0{large}'],
        *[f'student 0{large}', f'teacher 1{little}'],
        *[f'student 1{little}', f'teacher 1{little}'],
    ]
    with torch.no_grad():
        want = [m(x[:2]) for m in (s[:1], t[:1], s[:1], t[:2], s[:2], t[:2])]
    for i, (picture, *maps) in enumerate(cells(fig)):
        assert np.allclose(shown(picture), x[i].permute(1, 2, 0))
        for ax, f in zip(maps, want):
            assert np.allclose(shown(ax), by_hand(f, 4, (16, 24))[i], atol=1e-5)


def test_layers_are_found_by_themselves():
    fig = show_features(net(4), net(6), torch.rand(1, 3, 16, 16))
    assert titles(fig) == [
        'image\n',
        'student 0\n8 x 8',
        'teacher 0\n8 x 8',
        'student 1\n4 x 4',
        'teacher 1\n4 x 4',
    ]


def test_looking_changes_nothing():
    s, t, x = net(4).train(), net(6).train(), torch.rand(2, 3, 16, 16)
    before, state = [snapshot(m) for m in (s, t)], torch.get_rng_state()
    fig = show_features(s, t, x)
    assert all(map(same, before, map(snapshot, (s, t)))) and torch.equal(
        state, torch.get_rng_state()
    )
    assert fig.canvas is not None and not plt.get_fignums()  # nothing stays open


def test_a_teacher_sees_its_own_normalisation():
    s, t, x = net(4), net(6), torch.randn(2, 3, 16, 16)
    given, own = ([0.5] * 3, [0.5] * 3), ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    fig = show_features(s, Teacher(t, images=dict(stats=own, input_stats=given)), x, ['1'])
    mean, std = [torch.tensor(o)[:, None, None] for o in own]
    with torch.no_grad():
        want = by_hand(t[:2]((x * 0.5 + 0.5 - mean) / std), 2, (16, 16))
    for i, row in enumerate(cells(fig)):
        assert np.allclose(shown(row[2]), want[i], atol=1e-4)


def test_grey_images_and_other_ranges_are_stretched():
    s = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)).eval()
    x = torch.randn(2, 1, 8, 8) * 9
    for i, row in enumerate(cells(show_features(s, s, x, ['0']))):
        want = (x[i, 0] - x[i].min()) / (x[i].max() - x[i].min())
        assert np.allclose(shown(row[0]), want[..., None].expand(-1, -1, 3), atol=1e-6)


def test_a_transformer_beside_a_convolutional_net():
    timm = pytest.importorskip('timm')
    vit = timm.create_model(
        'vit_tiny_patch16_224',
        img_size=32,
        patch_size=8,
        embed_dim=12,
        depth=2,
        num_heads=2,
        num_classes=3,
    )
    fig = show_features(vit, net(4), torch.rand(1, 3, 32, 32), {'blocks.1': '1'})
    assert titles(fig)[1:] == ['student blocks.1\n4 x 4', 'teacher 1\n8 x 8']


def test_what_cant_be_drawn_is_said():
    s, x = net(4), torch.rand(2, 3, 16, 16)
    with pytest.raises(
        DistillError, match=r"Layer '4' can't be drawn. An output of shape \(2, 3\)"
    ):
        show_features(s, s, x, ['4'])
    flat = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        DistillError, match=r'shape \(2, 8\) can.t be shown: images must be \(B, 3, H, W\)'
    ):
        show_features(flat, flat, torch.rand(2, 8), ['0'])
    with pytest.raises(DistillError, match='In the teacher: No layer .9.'):
        show_features(s, s, x, {'0': '9'})


# the Learner's method


def states(*dls):
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        [d.rng.getstate() for d in dls],
    )


def test_a_learner_shows_its_validation_images_and_nothing_moves():
    student, teacher = pair('image')
    first = [b[1].tolist() for b in student.dls.valid]
    before, state, cbs = (
        [snapshot(l.model) for l in (student, teacher)],
        states(*student.dls.loaders),
        list(student.cbs),
    )
    fig = student.show_features(teacher, n=3)
    assert (
        states(*student.dls.loaders) == state and list(student.cbs) == cbs and not plt.get_fignums()
    )
    assert all(map(same, before, [snapshot(l.model) for l in (student, teacher)]))
    assert [b[1].tolist() for b in student.dls.valid] == first
    assert len(cells(fig)) == 3 and titles(fig)[1:3] == ['student 0.0\n8 x 8', 'teacher 0.0\n8 x 8']


class OfDict(nn.Module):
    "Takes a dict of images and numbers"

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, d):
        return self.model(d['image']) + d['age'][:, None]


class AsDict(Callback):
    def before_batch(self):
        self.learn.xb = (dict(age=torch.ones(len(self.x)), image=self.x),)


@pytest.mark.parametrize('how', ['dataset', 'callback'])
def test_a_learner_whose_batches_are_dicts_shows_the_images_in_them(how):
    student, teacher = pair('image')
    layers = {'0.0': '0.0'}
    want = student.show_features(teacher, layers, n=3)
    if how == 'callback':
        student.add_cb(AsDict())
    else:
        items = [
            [
                (dict(age=torch.tensor(1.0), image=torch.Tensor(x)), int(y))
                for x, y in zip(*dl.one_batch())
            ]
            for dl in student.dls
        ]
        student.dls = DataLoaders(*[TfmdDL(o, bs=8) for o in items])
    for learn in (student, teacher):
        learn.model = OfDict(learn.model)
    fig = student.show_features(teacher, {'model.0.0': 'model.0.0'}, n=3)
    assert (
        titles(fig)[1:] == ['student model.0.0\n8 x 8', 'teacher model.0.0\n8 x 8']
        and len(cells(fig)) == 3
    )
    if how == 'callback':
        assert all(
            np.array_equal(shown(a), shown(b))
            for r, q in zip(cells(fig), cells(want))
            for a, b in zip(r, q)
        )


def test_the_images_among_several_inputs_are_shown():
    s, x = OfDict(net(4)), torch.rand(3, 3, 16, 24)
    alone = show_features(s.model, s.model, x, ['0'], n=2)
    fig = show_features(s, s, dict(age=torch.ones(3), image=x), ['model.0'], n=2)
    assert all(
        np.array_equal(shown(a), shown(b))
        for r, q in zip(cells(fig), cells(alone))
        for a, b in zip(r, q)
    )


COLOURS = ['red', 'green', 'blue']


def colours(**kwargs):
    return image_dls(CategoryBlock(vocab=COLOURS), lambda x, at, k: COLOURS[k], **kwargs)


def four(pretrained=False):
    return nn.Sequential(*body(4), nn.AdaptiveAvgPool2d(1))


def six(pretrained=False):
    return nn.Sequential(*body(6), nn.AdaptiveAvgPool2d(1))


def test_images_are_shown_as_they_were_and_the_teacher_gets_its_own():
    own, given = ([0.3, 0.4, 0.5], [0.2, 0.2, 0.3]), ([0.5] * 3, [0.25] * 3)
    dls = (
        colours(batch_tfms=Normalize.from_stats(*given)),
        colours(batch_tfms=Normalize.from_stats(*own)),
    )
    student, teacher = quiet(
        *[
            vision_learner(d, arch, pretrained=False, normalize=False)
            for d, arch in zip(dls, (four, six))
        ]
    )
    fig = student.show_features(teacher, {'0.1': '0.1'}, n=8)
    mean, std = [torch.tensor(o)[:, None, None] for o in own]
    plain = [
        torch.tensor(np.asarray(student.dls.valid_ds[i][0])).permute(2, 0, 1) / 255
        for i in range(len(student.dls.valid_ds))
    ]
    found = set()
    for picture, s, t in cells(fig):
        i = min(
            range(len(plain)),
            key=lambda i: (plain[i].movedim(0, -1) - torch.tensor(shown(picture))).abs().sum(),
        )
        found.add(i)
        assert np.allclose(plain[i].movedim(0, -1), shown(picture), atol=1e-5)
        with torch.no_grad():
            want = by_hand(teacher.model[0].eval()((plain[i][None] - mean) / std), 2, (16, 16))[0]
        assert np.allclose(shown(t), want, atol=1e-4) and not np.allclose(shown(s), want, atol=0.1)
    assert len(found) == 8


def test_a_unet_learner_shows_its_features():
    student, teacher = pair('unet')
    assert len(titles(student.show_features(teacher, n=1))) > 3


def test_masks_show_the_classes_and_where_they_are_wrong():
    labels = np.array([[[0, 1, 1, 255]]])
    found = dict(teacher=np.array([[[0, 1, 0, 1]]]), student=np.array([[[1, 1, 1, 0]]]))
    images = np.zeros((1, 1, 4, 3), np.uint8)
    fig = plot_masks(images, labels, found, ['sky', 'road'], 'teacher', ignored=255)
    legends = [[o.get_text() for o in legend.get_texts()] for legend in fig.legends]
    right, wrong, both, better = rows = [
        'right',
        'wrong, teacher right',
        'teacher wrong',
        'right, teacher wrong',
    ]
    assert legends == [['sky', 'road'], rows]
    of_classes, of_rows = (
        dict(zip(names, [p.get_facecolor()[:3] for p in legend.get_patches()]))
        for names, legend in zip(legends, fig.legends)
    )
    white = (1, 1, 1)
    upper, lower = fig.axes[:4], fig.axes[4:]
    drawn = lambda ax: [tuple(o) for o in ax.images[0].get_array()[0]]
    sky, road = of_classes['sky'], of_classes['road']
    assert [ax.get_title(loc='left') for ax in upper] == ['image', 'labels', *found]
    assert drawn(upper[1]) == [sky, road, road, white]
    assert drawn(upper[2]) == [sky, road, sky, white]
    assert drawn(upper[3]) == [road, road, road, white]
    assert drawn(lower[2]) == [of_rows[right], of_rows[right], of_rows[both], white]
    assert drawn(lower[3]) == [of_rows[wrong], of_rows[right], of_rows[better], white]


def test_a_notebook_shows_a_figure_before_pyplot_has_drawn_one():
    with styled_figure(4, 3) as fig:
        fig.subplots().plot([1, 2])
    for o in (fig, pickle.loads(pickle.dumps(fig))):
        image = Image.open(io.BytesIO(o._repr_png_()))
        assert image.format == 'PNG' and image.size == (400, 300)
        assert len(set(image.convert('L').tobytes())) > 2
