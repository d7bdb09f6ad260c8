"""A training step must not look at a number: a GPU would finish all its work first, and stand still until the next order. There is no GPU here,
so steps run on PyTorch's `meta` device, which has shapes and no numbers: whoever looks at one gets an error there."""

from contextlib import nullcontext
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastdistill import (
    Distiller,
    DistillWarning,
    Outputs,
    Recipe,
    Term,
    kd,
    logit_std,
    losses,
    recipes,
)
from fastdistill.features import Taps
from no_copies import NoCopies


@pytest.fixture
def no_numbers(monkeypatch):
    "`meta` has no autocast"
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())


def conv(width, dense=False, seed=0):
    torch.manual_seed(seed)
    body = [
        nn.Conv2d(3, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
    ]
    return nn.Sequential(
        *body,
        *(
            [nn.Conv2d(2 * width, 5, 1)]
            if dense
            else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)]
        ),
    )


def batch(dense=False):
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=g), torch.randint(
        5, (4, 4, 4) if dense else (4,), generator=g
    )


def to_meta(o):
    if isinstance(o, dict):
        return {k: to_meta(v) for k, v in o.items()}
    return None if o is None else o.detach().to('meta').requires_grad_(o.requires_grad)


def to_device(d, device):
    d.to(device)
    for r in d.ratios.values():
        r.means = r.means.to(device)
        if r.gain is not None:
            r.gain.sums = r.gain.sums.to(device)


def step_on_meta(recipe, dense=False, mixed=False, **options):
    "One batch on the CPU, the next on `meta`"
    x, y = batch(dense)
    d = Distiller(conv(4, dense), conv(8, dense, seed=1), recipe, example=x, **options)
    d(x, y, progress=0.5)
    t = d.teacher_outputs(x, 0.5)
    to_device(d, 'meta')
    x, y, t = x.to('meta'), y.to('meta'), Outputs(to_meta(t.logits), to_meta(t.feats))
    with Taps(d.student, d.student_layers()) as taps:
        s = Outputs(d.student(x), taps.pop())
    mix = (
        ((y.clone(),), torch.rand(4 if mixed == 'MixUp' else (), device='meta')) if mixed else None
    )
    with NoCopies():
        out = d.compute(s, t, F.cross_entropy(s.logits, y), (y,), progress=0.5, mixed=mix)
        out.total.backward()
    return d, out


RECIPES = {n: getattr(recipes, n) for n in recipes.__all__ if n != 'logit_std'}
DENSE = {'cwd', 'pairwise', 'ifvd'}


@pytest.mark.parametrize('name', RECIPES)
def test_a_step_of_every_recipe_waits_for_nothing(name, no_numbers):
    recipe = RECIPES[name]()
    swamps = pytest.warns(DistillWarning, match='^dist has 9.* of the gradient of the first batch')
    with swamps if name == 'dist' else nullcontext():
        d, out = step_on_meta(recipe, dense=name in DENSE)
    assert set(out.parts) == {t.name for t in recipe.terms} and all(
        v.is_meta for v in out.parts.values()
    )


@pytest.mark.parametrize('mixed', ['MixUp', 'CutMix'])
@pytest.mark.parametrize(
    'recipe',
    [kd(), recipes.dkd(), logit_std(kd(T=('linear', 4, 1))), kd() + recipes.nkd()],
    ids=['kd', 'dkd', 'logit_std', 'sum'],
)
def test_a_step_of_mixed_labels_waits_for_nothing(recipe, mixed, no_numbers):
    step_on_meta(recipe, mixed=mixed)


def test_a_step_with_shares_waits_for_nothing_after_the_first(no_numbers):
    d, _ = step_on_meta(
        kd()
        + recipes.dist(grad_ratio=3.0, fade=0.2)
        + recipes.at()
        + recipes.hint(layers={'3': '3'})
    )
    assert all(r.measured == 2 for r in d.ratios.values())


@pytest.mark.parametrize(
    'recipe',
    [
        kd(),
        kd()
        + Recipe(
            Term(losses.cwd, 3.0),
            Term(losses.dist),
            Term(losses.hard),
            Term(losses.jsd),
            Term(losses.mse),
        ),
    ],
)
def test_a_step_with_labels_for_each_pixel_waits_for_nothing(recipe, no_numbers):
    step_on_meta(recipe, dense=True)


def test_labels_and_padding_of_a_text_make_nothing_wait(no_numbers):
    net = lambda: nn.Linear(8, 11, device='meta')
    d = Distiller(None, None, kd(), axis=-1, shift_labels=True, check=False)
    d.head.measures = False  # both look at the first batch's numbers
    x, on, y = (
        torch.randn(2, 7, 8, device='meta'),
        torch.ones(2, 7, device='meta'),
        torch.ones(2, 7, dtype=torch.long, device='meta'),
    )
    with NoCopies():
        s = d.student_outputs(net()(x), {}, dict(attention_mask=on))
        task, y = d.head.task_loss(x, s.logits, (y,))
        d.compute(s, Outputs(net()(x)), task, y).total.backward()
    assert s.mask is not None


@pytest.mark.parametrize(
    'waits',
    [
        lambda s, t: s.mean() * (t.max().item() > 0),
        lambda s, t: s.mean() if (t > 0).any() else s.sum(),
        lambda s, t: s[s > t].mean(),
        lambda s, t: (s * torch.tensor([1.0, 2, 3, 4, 5]).to(t)).mean(),
        lambda s, t: s.mean() * t.tolist()[0][0],
    ],
)
def test_who_looks_at_a_number_is_caught(waits, no_numbers):
    with pytest.raises((RuntimeError, NotImplementedError)):
        step_on_meta(Recipe(Term(waits, name='waits')))


def test_a_whole_step_of_a_plain_loop_waits_for_nothing(no_numbers):
    x, y = batch()
    teacher = nn.Sequential(
        *[m for m in conv(8, seed=1) if not isinstance(m, nn.BatchNorm2d)]
    )  # `meta` can't compare what is put back after a run
    d = Distiller(conv(4), teacher, kd() + recipes.hint(layers={'3': '2'}), example=x)
    d(x, y)
    to_device(d, 'meta')
    teacher.to('meta')
    x, y = x.to('meta'), y.to('meta')
    with d.teacher, NoCopies():
        d(x, y).total.backward()
