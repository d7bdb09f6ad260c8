"Losses between layers: what they do not see, what they do where features are degenerate, and the tensors that some of them own."

import copy, pickle
import pytest, torch
import torch.nn.functional as F
from torch import nn
import rows_dense, rows_feature, rows_relation
from cases import Golden, maps
from fastdistill.losses import (
    OFD,
    SEED,
    VID,
    ab,
    at,
    cc,
    cwd,
    fsp,
    hint,
    ickd,
    ifvd,
    kl,
    nst,
    ofd,
    pairwise,
    pkd,
    cosine,
    pkt,
    rkd,
    seed,
    sp,
    vid,
)
from fastdistill.losses.feature import ofd_margin
from fastdistill.base.outputs import DistillError

ROWS = [*rows_feature.ROWS, *rows_relation.ROWS, *rows_dense.ROWS]
EACH = {c.fn: c for c in ROWS[::-1]}  # the first row of each loss
each = pytest.mark.parametrize('c', EACH.values(), ids=lambda c: c.fn.__name__)


def tensors(x):
    return x if isinstance(x, list) else [x]


def like(x, f):
    return [like(o, f) for o in x] if isinstance(x, list) else f(x)


def value_and_grad(c, s, t, *rest):
    s = like(s, lambda o: o.detach().clone(memory_format=torch.preserve_format).requires_grad_())
    v = c.fn(s, t, *rest, **c.opts)
    return v, torch.autograd.grad(v, tensors(s))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    'c', [c for c in ROWS if tensors(c.make()[0])[0].dim() == 4], ids=lambda c: c.id
)
def test_channels_last_gives_the_same_number(c):
    s, t, *rest = c.make()
    last = lambda x: like(x, lambda o: o.contiguous(memory_format=torch.channels_last))
    (v, ds), (w, dt) = value_and_grad(c, s, t, *rest), value_and_grad(c, last(s), last(t), *rest)
    assert w.item() == pytest.approx(v.item(), rel=1e-12)
    for a, b in zip(ds, dt):
        torch.testing.assert_close(a, b)


@each
def test_a_dead_student_gets_a_finite_gradient(c):
    "All zeros, as behind a ReLU that never fires: a norm has no gradient there, and F.normalize's is 1e12"
    s, t, *rest = c.make(torch.float32)
    v, ds = value_and_grad(c, like(s, lambda o: o * 0), t, *rest)
    assert v.isfinite() and all(d.isfinite().all() and d.abs().max() < 1e3 for d in ds)


@each
def test_a_batch_of_one_is_finite(c):
    s, t, *rest = c.make(torch.float32)
    one = lambda x: like(x, lambda o: o[:1])
    v, ds = value_and_grad(c, one(s), one(t), *[o[:1] for o in rest])
    assert v.isfinite() and all(d.isfinite().all() for d in ds)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize('gap', [0.0, 1e-6])
def test_rkd_of_two_equal_rows_has_a_small_gradient(dtype, gap):
    "In half precision it was nan, in float32 1e10: an oversampled image, or the same padding twice, ends a run"
    s, t = [o.to(dtype) for o in maps((6, 8))()]
    s[1] = s[0] + gap
    s.requires_grad_()
    rkd(s, t).backward()
    assert s.grad.isfinite().all() and s.grad.abs().max() < 100
    apart = rkd(s.detach()[[0, 2, 3, 4, 5]], t[[0, 2, 3, 4, 5]])
    assert rkd(s, t).item() < 10 * apart.item()


def test_rkd_of_equal_rows_has_no_angle_and_no_gradient_of_it():
    s, t = maps((3, 4))()
    s[1] = s[0]
    s.requires_grad_()
    v = rkd(s, t, w_d=0.0, reduction='none')
    v.sum().backward()
    assert s.grad.abs().max() < 1e-12
    e = t - t[0]  # of the teacher's angles at the first row, that to the others counts
    cos = (e[1] @ e[2] / (e[1].norm() * e[2].norm())).item()
    assert v[0].item() == pytest.approx(
        50 * (2 * cos**2 / 2 + 0.5) / 9
    )  # (1, 2) and (2, 1) against 0, (1, 1) against 0 where it is 1


def test_rkd_of_a_batch_of_equal_rows_is_finite():
    s = torch.ones(4, 3, requires_grad=True)
    v = rkd(s, randn(4, 5))
    v.backward()
    assert v.isfinite() and s.grad.abs().max() == 0


def test_rkd_in_float32_keeps_close_rows_apart():
    s, t = [
        torch.cat([o, o[:3] + 1e-2 * o[3:]]) + 100.0 for o in maps((6, 8))()
    ]  # pairs a hundred times closer than the rest, far from 0
    assert rkd(s.float(), t.float()).item() == pytest.approx(
        rkd(s.float().double(), t.float().double()).item(), rel=1e-4
    )


Q = torch.linalg.qr(randn(6, 6, seed=9))[0]
turned = lambda t: torch.einsum('bchw,cd->bdhw', t, Q)
BLIND = [  # what a loss does not see: its value against the teacher so changed is 0
    (at, 'scale and the order of channels', lambda t: 3 * t.flip(1)),
    (
        nst,
        'scale of channels and their order',
        lambda t: (t * torch.arange(1, 7).view(1, 6, 1, 1)).flip(1),
    ),
    (fsp, 'the order of positions', lambda t: [o.flatten(2).flip(2).reshape(o.shape) for o in t]),
    (
        pkd,
        'scale and shift of channels',
        lambda t: t * torch.arange(1, 7).view(1, 6, 1, 1) + torch.arange(6).view(1, 6, 1, 1),
    ),
    (rkd, 'shift, scale and turns', lambda t: 3 * t.movedim(1, 3) @ Q + 1),
    (sp, 'turns', lambda t: t.movedim(1, 3) @ Q),
    (cc, 'scale and turns', lambda t: 3 * t.movedim(1, 3) @ Q),
    (pkt, 'scale and turns', lambda t: 3 * t.movedim(1, 3) @ Q),
    (ickd, 'scale and the order of positions', lambda t: 3 * t.flatten(2).flip(2).reshape(t.shape)),
    (cwd, 'a shift of channels', lambda t: t + torch.arange(6).view(1, 6, 1, 1)),
    (
        pairwise,
        'scale of images and turns of channels',
        lambda t: turned(t) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1),
    ),
    (lambda s, t: ifvd(s, t, torch.arange(12).view(2, 2, 3) % 3), 'turns of channels', turned),
]


@pytest.mark.parametrize('fn,what,change', BLIND, ids=[b[1] for b in BLIND])
def test_is_blind_to(fn, what, change):
    t = randn(2, 6, 2, 3)
    if fn is pairwise:
        fn, t = (lambda s, t: pairwise(s, t, pool=1)), randn(2, 6, 3, 3)
    if fn is fsp:
        t = [t, randn(2, 4, 2, 3, seed=1)]
    if fn in (sp, cc, pkt, rkd):
        t = randn(5, 6, 1, 2)
    assert fn(like(t, lambda o: o + 0.5 * randn(*o.shape, seed=3)), t).item() > 1e-4
    assert fn(change(t), t).item() == pytest.approx(0, abs=1e-12)


def test_at_is_the_papers_number_too():
    "Eq. 2 has half the length of the difference; the release its square, mean over positions"
    for _, g, _ in Golden('at').cases():
        s = g['student'].clone().requires_grad_()
        v = (at(s, g['teacher'], reduction='none') * s[0, 0].numel()).sqrt().mean() / 2
        assert v.item() == pytest.approx(g['expected_paper'].item(), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(v, s)[0], g['grad_student_paper'])


def test_at_times_positions_does_not_depend_on_resolution():
    s, t = maps((2, 4, 4, 6))()
    S, T = [F.interpolate(o, scale_factor=2) for o in (s, t)]
    assert at(S, T).item() * 8 * 12 == pytest.approx(at(s, t).item() * 4 * 6)


def test_nst_is_one_number_by_positions_and_by_channels():
    s, t = maps((2, 4, 3, 3), (2, 8, 3, 3))()
    many = t.repeat(
        1, 2, 1, 1
    )  # the same distribution of channels, now more than the positions are
    assert nst(s, many).item() == pytest.approx(nst(s, t).item(), rel=1e-12)


def test_fsp_of_a_teacher_with_other_grids():
    s, t = rows_feature.lists(
        [(2, 2, 4, 4), (2, 3, 4, 4), (2, 4, 2, 2)], [(2, 2, 2, 2), (2, 3, 4, 4), (2, 4, 4, 4)]
    )()
    assert fsp(s, t).item() == pytest.approx(rows_feature.fsp_loop(s, t))


def test_ab_is_0_where_the_signs_agree_by_the_margin():
    t = randn(3, 4, 2, 2)
    assert ab(t.sign() * 2.5, t, margin=2.5) == 0
    assert ab(-t.sign() * 2.5, t, margin=2.5).item() == pytest.approx(25)


def test_ofd_margin_is_the_authors():
    for _, g, _ in Golden('ofd').cases():
        bn = nn.BatchNorm2d(len(g['bn_weight']), dtype=torch.float64)
        bn.load_state_dict(bn.state_dict() | dict(weight=g['bn_weight'], bias=g['bn_bias']))
        torch.testing.assert_close(ofd_margin(bn), g['margin'].flatten(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('axis', [1, -1])
def test_the_margin_of_ofd_does_not_see_masked_positions(axis):
    s, t = randn(3, 4, 5), randn(3, 4, 5)
    mask = torch.arange(5) < 3
    few = [o[..., :3].movedim(1, axis).contiguous() for o in (s, t)]
    t[..., 3:] = -100.0
    whole = [o.movedim(1, axis).contiguous() for o in (s, t)]
    assert ofd(*whole, axis=axis, mask=mask).item() == pytest.approx(ofd(*few, axis=axis).item())


def test_ofd_margin_is_the_mean_of_negative_draws():
    bn = nn.BatchNorm1d(3)
    bn.weight.data, bn.bias.data = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, -1.0])
    x = (
        torch.randn(400_000, 3, generator=torch.Generator().manual_seed(0)) * bn.weight.data
        + bn.bias.data
    )
    torch.testing.assert_close(
        ofd_margin(bn), (x.clamp_max(0).sum(0) / (x < 0).sum(0)), rtol=0, atol=0.01
    )
    bn.bias.data += 100  # almost never negative: the authors' -3 weight
    assert ofd_margin(bn).tolist() == [-3, -6, -1.5]
    bn.weight.data, bn.bias.data = (
        torch.ones(3),
        torch.tensor([2.8, 3.05, 3.15]),
    )  # to either side of P(x < 0) = .001
    z = torch.distributions.Normal(0.0, 1.0)
    want = [
        b - (z.log_prob(torch.tensor(b)).exp() / z.cdf(torch.tensor(-b))).item()
        for b in (2.8, 3.05)
    ]
    assert ofd_margin(bn).tolist() == pytest.approx([*want, -3.0], rel=1e-4)
    assert ofd_margin(nn.BatchNorm1d(2, affine=False)).tolist() == pytest.approx(
        [-((2 / torch.pi) ** 0.5)] * 2
    )
    bn.weight.data.zero_()
    bn.bias.data = torch.tensor([-1.0, 0.0, 1.0])  # a pruned channel is a constant
    assert ofd_margin(bn).isfinite().all() and ofd_margin(bn)[0] == -1


def test_ofd_takes_its_margin_from_a_batchnorm_or_from_the_first_batch():
    s, t = maps((3, 4, 2, 3))()
    bn = nn.BatchNorm2d(4, dtype=torch.float64)
    nn.init.uniform_(bn.weight)
    m = OFD()
    m.prepare(s, t, layer=bn)
    assert m(s, t) == ofd(s, t, margin=ofd_margin(bn)) != ofd(s, t)
    n = OFD()
    n.prepare(s, t, layer=nn.ReLU())
    assert n(s, t) == ofd(s, t) and n(s, 2 * t) == ofd(s, 2 * t, margin=n.margin) != ofd(s, 2 * t)
    n.prepare(s, 2 * t, layer=bn)  # twice = once
    assert n(s, t) == ofd(s, t) and not list(n.parameters())


def test_ofd_of_a_teacher_without_negative_values_is_partial_l2():
    s, t = maps((3, 4, 2, 3))()
    t = t.relu()
    assert ofd(s, t).item() == pytest.approx(
        torch.where((s > t) | (t > 0), (s - t) ** 2, 0.0).mean().item()
    )


def prepared(cls, axis=1):
    s, t = maps((3, 4, 2, 4))()
    m = cls(axis=axis)
    m.prepare(s, t)
    return m, s, t


@pytest.mark.parametrize('cls', [VID, OFD])
def test_what_a_loss_owns_is_copied_pickled_and_restored(cls):
    m, s, t = prepared(cls)
    with torch.no_grad():
        getattr(m, m.own).add_(torch.linspace(-0.5, 0, 4))
    want = m(s, t)
    fresh = cls()
    fresh.load_state_dict(m.state_dict())  # one that was never prepared, as when a training resumes
    again, _, _ = prepared(cls)
    again.load_state_dict(m.state_dict())
    for o in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), fresh, again):
        assert o(s, t) == want
    assert [n for n, _ in fresh.named_parameters()] == [
        n for n, _ in m.named_parameters()
    ] and list(m.state_dict()) == [m.own]
    with torch.no_grad():
        getattr(m, m.own).zero_()
    assert fresh(s, t) == want  # and shares nothing with it
    nest = nn.ModuleList([cls(), nn.Linear(2, 2)])
    nest.load_state_dict(nn.ModuleList([again, nn.Linear(2, 2)]).state_dict())
    assert nest[0](s, t) == want


def embeddings(n, batches):
    "Student and teacher embeddings of some batches"
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, generator=g).requires_grad_(), torch.randn(n, 3, generator=g))
        for _ in range(batches)
    ]


def test_the_queue_holds_the_last_embeddings_of_the_teacher():
    m, seen = SEED(size=5), torch.zeros(0, 3)
    for s, t in embeddings(2, 4):
        want = (
            seed(s, t, queue=seen[:5]) if len(seen) else seed(s, t)
        )  # those of the batch itself come on top
        assert m(s, t).item() == pytest.approx(want.item(), abs=1e-5)
        seen = torch.cat([t, seen])
        assert torch.equal(m.queue[: len(seen)], seen[:5]) and (m.queue[len(seen) :] == 0).all()
    s, t = embeddings(7, 1)[0]
    m(s, t)
    assert torch.equal(m.queue, t[:5])  # a batch that is larger than the queue


def test_only_batches_that_train_enter_the_queue():
    m, (s, t) = SEED(size=4), embeddings(2, 1)[0]
    with torch.no_grad():
        m(s, t)
    m(s.detach(), t)
    assert m.queue is None and not list(m.parameters())
    m(s.half(), t.half()).backward()
    assert (
        torch.equal(m.queue[:2], t.half().float())
        and s.grad.isfinite().all()
        and not m.queue.requires_grad
    )


def test_a_queue_is_copied_pickled_and_restored():
    m, batches = SEED(size=5, T_t=0.1), embeddings(2, 3)
    for s, t in batches:
        m(s, t)
    s, t = batches[0][0].detach(), batches[0][1]
    want = m(s, t)
    fresh = SEED(size=5, T_t=0.1)
    fresh.load_state_dict(m.state_dict())
    for o in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), fresh):
        assert o(s, t) == want != seed(s, t, T_t=0.1)
    m.queue.zero_()
    assert fresh(s, t) == want and 'size=5, T_t=0.1' in repr(m)


@pytest.mark.parametrize('axis', [1, -1])
def test_vid_begins_with_the_authors_variance(axis):
    m, s, t = prepared(VID, axis)
    told = VID()
    told.prepare(s[..., :3], t[..., :3], axis=axis)  # a Distiller knows the axis of tokens
    assert told.log_scale.shape == ((4,) if axis == 1 else (3,))
    assert m.log_scale.shape == (4,) and m.log_scale.requires_grad
    assert (F.softplus(m.log_scale) + 1e-5).tolist() == pytest.approx([5.0] * 4)
    assert (
        m(s, t).item()
        == pytest.approx(vid(s, t).item())
        == pytest.approx(F.gaussian_nll_loss(s, t, torch.full_like(s, 5.0)).item())
    )


def test_vid_has_the_authors_gradient_of_its_variance():
    for _, g, o in Golden('vid').cases():
        m = VID(log_scale=g['log_scale'], eps=o['eps'])
        m(g['student'], g['teacher']).backward()
        torch.testing.assert_close(m.log_scale.grad, g['expected_grad_log_scale'])


def test_vids_variance_learns_the_mean_squared_difference():
    m, s, t = prepared(VID)
    opt = torch.optim.LBFGS(m.parameters(), max_iter=100, line_search_fn='strong_wolfe')

    def step():
        opt.zero_grad()
        v = m(s, t)
        v.backward()
        return v

    opt.step(step)
    torch.testing.assert_close(
        (F.softplus(m.log_scale) + 1e-5).detach(), (s - t).pow(2).mean((0, 2, 3)), rtol=1e-3, atol=0
    )


def test_vid_of_a_half_precision_batch_trains_in_float32():
    s, t = maps((3, 4, 2, 4))(torch.float16)
    m = VID()
    m.prepare(s, t)
    assert m.log_scale.dtype == torch.float32
    m(s, t).backward()
    assert m.log_scale.grad.abs().min() > 0


def test_vid_without_its_variance_says_what_to_do():
    with pytest.raises(
        DistillError, match=r'call prepare\(s, t\) with the features of one batch before'
    ):
        VID()(*maps((2, 3))())


def test_pkd_is_1_minus_correlation():
    s, t = maps((3, 4, 2, 3))()
    rows = lambda x: x.transpose(0, 1).flatten(1)
    r = [torch.corrcoef(torch.stack(p))[0, 1].item() for p in zip(rows(s), rows(t))]
    assert pkd(s, t).item() == pytest.approx(1 - sum(r) / 4)


def test_pkd_with_a_mask_is_pkd_of_the_positions_that_count():
    s, t = maps((3, 4, 2, 3))()
    mask = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    some = [x.movedim(1, -1)[mask] for x in (s, t)]
    assert pkd(s, t, mask=mask).item() == pytest.approx(pkd(*some).item())
    s, t = [
        x.masked_fill(~mask[:, None], torch.inf) for x in (s, t)
    ]  # masked positions may hold anything
    s.requires_grad_()
    v = pkd(s, t, mask=mask)
    assert (
        v.item() == pytest.approx(pkd(*some).item())
        and torch.autograd.grad(v, s)[0].isfinite().all()
    )
    none = pkd(s, t, mask=mask & False)
    assert none == 0 and torch.autograd.grad(none, s)[0].abs().max() == 0
    with pytest.raises(DistillError, match='does not fit'):
        pkd(s, t, mask=torch.ones(3, 5, 5))


@pytest.mark.parametrize('rows', [1, 2])
def test_pkd_of_two_values_has_no_gradient_since_their_correlation_is_always_1_or_minus_1(rows):
    "A gradient ratio would give full weight to rounding errors"
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(rows, 6, generator=g, requires_grad=True), torch.randn(rows, 6, generator=g)
    (d,) = torch.autograd.grad(pkd(s, t), s)
    assert not d.any()
    more = torch.cat([s, torch.randn(3, 6, generator=g)]), torch.cat([t, t.new_zeros(3, 6)])
    mask = torch.arange(rows + 3) < rows
    (d,) = torch.autograd.grad(pkd(*more, mask=mask), s)
    assert not d.any()


def test_pkd_takes_a_channel_that_is_constant_but_for_rounding_as_constant():
    s, t = maps((8, 3, 5, 5))(torch.float32)
    for c in (0.1, 1 / 3, 1e3 / 7, -0.7):  # the float32 mean of some is another number
        s[:, 1] = c
        s.requires_grad_()
        (d,) = torch.autograd.grad(pkd(s, t), s)
        assert d[:, 1].abs().max() == 0 and d.abs().max() < 1
        s = s.detach()


def test_cc_of_a_high_degree_is_the_gaussian():
    s, t = [F.normalize(o) for o in maps((5, 3))()]
    k = lambda x: torch.exp(-0.7 * torch.cdist(x, x) ** 2)
    assert cc(s, t, gamma=0.7, degree=25).item() == pytest.approx(
        (k(s) - k(t)).pow(2).mean().item()
    )
    assert cc(7 * s, 0.1 * t, gamma=0.7).item() == pytest.approx(cc(s, t, gamma=0.7).item())


def test_pkt_of_three_points_on_axes():
    "Student: a right angle and its bisector. Teacher: all at right angles, so each other is as near"
    s = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    near = (1 + 0.5**0.5) / 2
    p = 0.5 / (0.5 + near)  # the first's share for the second
    want = [-0.5 * torch.tensor(4 * p * (1 - p)).log().item()] * 2 + [0.0]
    assert pkt(s, torch.eye(3), reduction='none').tolist() == pytest.approx(want, abs=1e-7)


def test_cwd_is_kl_over_positions():
    s, t = maps((3, 4, 2, 3), scale=3.0)()
    assert cwd(s, t, T=2.0).item() == pytest.approx(
        kl(s.flatten(2), t.flatten(2), T=2.0, axis=2).item()
    )


def test_cwd_with_a_mask_is_cwd_of_the_pixels_that_count():
    s, t = maps((3, 4, 2, 3), scale=3.0)(torch.float32)
    mask = torch.ones(3, 2, 3, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[2] = False  # nothing counts in the last image
    want = (cwd(s[:1, :, :, :2], t[:1, :, :, :2]) + cwd(s[1:2], t[1:2])) / 2
    s[2], t[0, :, :, 2] = torch.nan, torch.inf
    s.requires_grad_()
    v = cwd(s, t, mask=mask)
    v.backward()
    assert (
        v.item() == pytest.approx(want.item(), rel=1e-5)
        and s.grad.isfinite().all()
        and s.grad[2].abs().max() == 0
    )
    assert (
        cwd(s, t, mask=mask, reduction='none').shape == (3, 4) and cwd(s, t, mask=mask & False) == 0
    )
    assert cwd(s, t, T=0.1, mask=mask).isfinite()
    with pytest.raises(DistillError, match='does not fit'):
        cwd(s, t, mask=torch.ones(3, 4))


def test_ifvd_does_not_see_ignored_and_masked_positions():
    s, t = maps((2, 4, 3, 3))()
    y = torch.arange(18).view(2, 3, 3) % 3
    y[:, :, 0] = -100
    want = ifvd(s[..., 1:], t[..., 1:], y[..., 1:])
    s[..., 0] = torch.nan
    s.requires_grad_()
    v = ifvd(s, t, y)
    v.backward()
    assert (
        v.item() == pytest.approx(want.item())
        and s.grad[..., 0].abs().max() == 0
        and s.grad.isfinite().all()
    )
    mask = torch.zeros(2, 3, 3)
    mask[0, 0, 1] = 1
    assert ifvd(s, t, y, mask=mask).item() == pytest.approx(
        ifvd(s, t, y, reduction='none')[0, 0, 1].item()
    )
    none = ifvd(s, t, torch.full_like(y, -100))
    assert none == 0 and torch.autograd.grad(none, s)[0].abs().max() == 0


def test_ifvd_labels_are_resized_and_their_number_is_found():
    s, t = maps((2, 4, 3, 3))()
    y = torch.arange(18).view(2, 3, 3) % 5
    big = F.interpolate(y[:, None].float(), scale_factor=4, mode='nearest')[:, 0].long()
    assert (
        ifvd(s, t, y, classes=9) == ifvd(s, t, y) == ifvd(s, t, big) == ifvd(s, t, big, classes=5)
    )
    flat = [o.flatten(2).mT for o in (s, t)]  # tokens
    assert ifvd(*flat, y.flatten(1), axis=-1).item() == pytest.approx(ifvd(s, t, y).item())


def test_fit_says_what_it_expects_of_them():
    want = dict(
        shape={hint, fsp, ab, ofd, vid, pkd, cosine, seed, ickd, cwd},
        none={at, nst, rkd, sp, cc, pkt},
        grid={pairwise, ifvd},
    )
    assert {k: {f for f in EACH if f.match == k} for k in want} == want
    assert [f.__name__ for f in EACH if getattr(f, 'lists', False)] == ['fsp']


A, B, C = torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4), torch.ones(2, 3)
WRONG = [
    *[
        (lambda fn=fn: fn(A, B), 'compares them element by element. Give the student a projector')
        for fn in (hint, ab, ofd, vid, pkd)
    ],
    (lambda: cwd(A, B), 'channel with channel and pixel with pixel'),
    (
        lambda: ickd(A, B),
        'compares 3 channels of 2 samples with 5 of 2: give the student a projector',
    ),
    (lambda: at(C, C), 'no grid in common.*choose layers before the pooling'),
    (lambda: nst(A, C[:, :, None]), 'no grid in common'),
    (lambda: pairwise(C, C), 'no grid of positions'),
    (lambda: pairwise(A, A[..., :2]), 'leaves 4 cells of 2 student maps and 2 of 2'),
    (
        lambda: pairwise(A, A, pool=2.0),
        'pool=2.0: the size of a cell must be a whole number of pixels, or a fraction',
    ),
    (lambda: ifvd(A, A, torch.ones(2, 4)), r'labels with the axes of this grid.*labels \(2, 4\)'),
    (lambda: ifvd(A, A[..., :2], torch.ones(2, 4, 4)), 'maps with the same grid'),
    (lambda: fsp(A, A), 'but got a Tensor and a Tensor'),
    (lambda: fsp([A, B], [A]), 'a list of 2 and a list of 1'),
    (
        lambda: fsp([A, B], [A, A]),
        r'the student\'s features have shape \(2, 3, 5\), the teacher\'s \(2, 3, 3\)',
    ),
    *[(lambda fn=fn: fn(A, A[:1]), 'the same samples') for fn in (rkd, sp, cc, pkt)],
    (lambda: sp(C[0], C[0]), 'the same samples'),
    (lambda: seed(C, C[:, :2]), 'compares them element by element. Give the student a projector'),
    (lambda: seed(C, C, T_s=0.0), 'above 0'),
    (lambda: SEED(size=0), 'size=0: the queue must hold at least 1 embedding'),
    (lambda: cc(C, C, kernel='rbf'), "must be one of 'gaussian', 'bilinear'"),
    (lambda: cc(C, C, kernel='rbf'), "must be one of 'gaussian', 'bilinear'"),
    (lambda: at(A, A, axis=0), 'Axis 0 is the batch'),
    (lambda: cwd(A, A, axis=4), 'no such channel axis'),
    (lambda: at(A, A, p=0.5), 'the exponent must be at least 1'),
    (lambda: ofd(A, A, margin=torch.ones(2)), 'axis 1 has 3 channels'),
]


@pytest.mark.parametrize('call,says', WRONG, ids=[w[1] for w in WRONG])
def test_a_wrong_call_says_what_to_do(call, says):
    with pytest.raises(DistillError, match=f'(?i){says}'):
        call()


def test_relation_losses_of_a_masked_sample():
    "Its own relations do not count; it remains a neighbour"
    s, t = maps((5, 4))()
    m = torch.tensor([1, 1, 0, 1, 1])
    assert rkd(s, t, mask=m).item() == pytest.approx(
        rkd(s, t, reduction='none')[m > 0].mean().item()
    )
