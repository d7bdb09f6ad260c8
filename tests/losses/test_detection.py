"Losses for detectors against plain loops and the authors' numbers."

from math import ceil, exp, floor, log, sqrt
import pytest, torch
import torch.nn.functional as F
from torch import nn
from cases import Golden
from fastdistill.base.outputs import DistillError
from fastdistill.losses import Loss
from fastdistill.losses.detection import (
    FGD,
    MGD,
    GlobalContext,
    anchor_kl,
    box_deltas,
    crosskd,
    fgd,
    mgd,
    scored_hint,
)


def heads(anchors=6, classes=3, seed=0):
    "Class logits and box deltas of student and teacher"
    g = torch.Generator().manual_seed(seed)
    new = lambda n: torch.randn(2, anchors, n, generator=g, dtype=torch.float64) * 2
    return [new(classes), new(4)], [new(classes), new(4)]


def sigmoid(x):
    return 1 / (1 + exp(-x))


def softmax(x):
    e = [exp(o - max(x)) for o in x]
    return [o / sum(e) for o in e]


def anchor_kl_loop(s, t, T, background):
    total = weights = 0
    for a, b in zip(s.flatten(0, 1).tolist(), t.flatten(0, 1).tolist()):
        if background is None:
            w = max(sigmoid(o) for o in b)
            v = 0
            for x, y in zip(a, b):
                q, p = sigmoid(x / T), sigmoid(y / T)
                v += p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))
        else:
            w = 1 - softmax(b)[background]
            q, p = [softmax([o / T for o in x]) for x in (a, b)]
            v = sum(y * log(y / x) for x, y in zip(q, p))
        total += w * v * T * T
        weights += w
    return total / weights


@pytest.mark.parametrize('T', [1.0, 3.0])
@pytest.mark.parametrize('background', [None, 0])
def test_anchor_kl_equals_a_plain_loop(T, background):
    (s, _), (t, _) = heads()
    want = anchor_kl_loop(s, t, T, background)
    assert anchor_kl(s, t, T=T, background=background).item() == pytest.approx(want)
    assert Loss(anchor_kl, T=T, background=background)(s, t).item() == pytest.approx(want)


def test_anchor_kl_is_zero_for_equal_heads():
    (s, _), _ = heads()
    assert anchor_kl(s, s).item() == pytest.approx(0, abs=1e-12)


def test_anchor_kl_refuses_different_anchors():
    (s, _), (t, _) = heads()
    with pytest.raises(DistillError, match='must be equal'):
        anchor_kl(s[:, 1:], t)


def box_deltas_loop(s, t, sure, beta):
    found = []
    for a, b, c in zip(*(o.flatten(0, 1).tolist() for o in (s[1], t[1], t[0]))):
        if max(sigmoid(o) for o in c) <= sure:
            continue
        far = [abs(x - y) for x, y in zip(a, b)]
        found.append(sum(0.5 * d * d / beta if d < beta else d - 0.5 * beta for d in far))
    return sum(found) / len(found) if found else 0.0


@pytest.mark.parametrize('sure', [0.3, 0.8, 0.9999])
def test_box_deltas_equals_a_plain_loop(sure):
    s, t = heads(anchors=20)
    want = box_deltas_loop(s, t, sure, 1 / 9)
    assert box_deltas(s, t, sure=sure).item() == pytest.approx(want)
    assert Loss(box_deltas, sure=sure)(s, t).item() == pytest.approx(want)


def test_box_deltas_of_an_unsure_teacher_give_a_zero_gradient():
    s, t = heads()
    s[1].requires_grad_()
    v = box_deltas(s, [t[0] - 100, t[1]])
    v.backward()
    assert v.item() == 0
    assert s[1].grad.abs().sum() == 0


def linear_head(classes=3, channels=2, seed=3):
    "Weights of a head with one anchor per position, and the head as a function of maps"
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(classes + 4, channels, generator=g, dtype=torch.float64)

    def run(maps):
        out = torch.cat([(m.flatten(2).mT @ w.T) for m in maps], 1)
        return dict(cls_logits=out[..., :classes], bbox_regression=out[..., classes:])

    return w.tolist(), run


def predictions_loop(w, maps):
    "Class logits and box deltas (B, A, K) of the linear head, from lists of numbers"
    found = []
    for i in range(len(maps[0])):
        rows = []
        for m in maps:
            places = [[c[y][x] for c in m[i].tolist()] for y, x in grid(m)]
            rows += [[sum(a * b for a, b in zip(row, p)) for row in w] for p in places]
        found.append(rows)
    found = torch.tensor(found, dtype=torch.float64)
    return [found[..., :-4], found[..., -4:]]


def grid(m):
    return [(y, x) for y in range(m.shape[2]) for x in range(m.shape[3])]


def two_levels(seed=0):
    "Maps of student and teacher on two levels"
    g = torch.Generator().manual_seed(seed)
    new = lambda n: torch.randn(2, 2, n, n, generator=g, dtype=torch.float64)
    return [[new(3), new(2)] for _ in range(2)]


@pytest.mark.parametrize('boxes', [0, 1, 2.5])
@pytest.mark.parametrize('background', [None, 0])
def test_crosskd_equals_a_plain_loop(boxes, background):
    (s, t), (w, head) = two_levels(), linear_head()
    a, b = [predictions_loop(w, maps) for maps in (s, t)]
    want = anchor_kl_loop(a[0], b[0], 2.0, background)
    if background is None:
        want += boxes * box_deltas_loop(a, b, 0.6, 1 / 9)
    else:
        sure = [[1 - softmax(o)[0] > 0.6 for o in rows] for rows in b[0].tolist()]
        # a sigmoid of 1 or 0 stands for the teacher's probability
        logits = torch.tensor(sure)[..., None] * 200.0 - 100
        want += boxes * box_deltas_loop(a, [logits, b[1]], 0.6, 1 / 9)
    options = dict(head=head, boxes=boxes, T=2.0, sure=0.6, background=background)
    assert crosskd(s, t, **options).item() == pytest.approx(want)
    assert Loss(crosskd, **options)(s, t).item() == pytest.approx(want)


def test_crosskd_is_zero_for_equal_maps_and_for_what_the_head_does_not_see():
    (s, t), (_, head) = two_levels(), linear_head()
    assert crosskd(t, t, head=head).item() == pytest.approx(0, abs=1e-12)
    assert crosskd(s, t, head=head).item() > 0.1
    # a head that sees only the first channel
    first = lambda maps: head([torch.cat([m[:, :1], 0 * m[:, 1:]], 1) for m in maps])
    mixed = [torch.cat([b[:, :1], a[:, 1:]], 1) for a, b in zip(s, t)]
    assert crosskd(mixed, t, head=first).item() == pytest.approx(0, abs=1e-12)


def test_crosskd_refuses_different_numbers_of_levels():
    (s, t), (_, head) = two_levels(), linear_head()
    with pytest.raises(DistillError, match='1 student maps and 2 teacher maps'):
        crosskd(s[:1], t, head=head)


def test_scored_hint_equals_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    s, t = [[new(2, 3, 4, 4), new(2, 3, 2, 2)] for _ in range(2)]
    y = [new(2, 4, 4), new(2, 2, 2)]
    want = 0
    for a, b, w in zip(s, t, y):
        n, c, h, v = a.shape
        top = sum(
            w[i, j, k].item()
            * sum((a[i, m, j, k] - b[i, m, j, k]).item() ** 2 for m in range(c))
            / c
            for i in range(n)
            for j in range(h)
            for k in range(v)
        )
        want += top / w.sum().item()
    assert scored_hint(s, t, y).item() == pytest.approx(want)
    assert Loss(scored_hint)(s, t, y).item() == pytest.approx(want)


def test_scored_hint_refuses_weights_of_other_levels():
    with pytest.raises(DistillError, match='1 student maps, 1 teacher maps and 2 maps of weights'):
        scored_hint([torch.rand(1, 2, 3, 3)], [torch.rand(1, 2, 3, 3)], [torch.rand(1, 3, 3)] * 2)


def parameters(g, prefix=''):
    "The stored parameters of the authors' module whose names start so"
    prefix = f'param.{prefix}'
    return {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}


def projected(s, g):
    "The student's map with the teacher's number of channels"
    align = parameters(g, 'align.')
    return F.conv2d(s, **align) if align else s


def test_mgd_equals_the_authors_numbers():
    for tag, g, o in Golden('mgd').cases():
        c = g['teacher'].shape[1]
        convs = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1)
        )
        own = {k: v for k, v in parameters(g).items() if not k.startswith('align')}
        convs.double().load_state_dict(own)
        keep = (g['rand'] <= 1 - o['lambda']).double()
        s = g['student'].clone().requires_grad_()
        v = mgd(projected(s, g), g['teacher'], generate=convs, keep=keep)
        # the authors sum over channels and positions
        v = v * g['teacher'][0].numel() * o['alpha']
        assert v.item() == pytest.approx(g['expected'].item(), rel=1e-9), tag
        v.backward()
        torch.testing.assert_close(s.grad, g['grad_student'], rtol=1e-7, atol=1e-13)


def test_mgd_hides_the_given_part_of_the_positions():
    s = torch.ones(4, 3, 50, 50)
    m = MGD(drop=0.65, generate=nn.Identity())
    torch.manual_seed(0)
    # where a position is hidden, the generated map is 0 and the squared difference 1
    assert m(s, s).item() == pytest.approx(0.65, abs=0.02)


def test_mgd_without_convolutions_says_what_to_call():
    with pytest.raises(DistillError, match='call prepare'):
        MGD()(torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3))


def context_loop(m, x):
    "x (C, P) plus the vector of GcBlock, from lists of numbers"
    weight = lambda layer: layer.weight.flatten(1).tolist()
    a, b = weight(m.weights)[0], m.weights.bias.item()
    p = softmax([sum(a[c] * x[c][i] for c in range(len(x))) + b for i in range(len(x[0]))])
    v = [sum(o * q for o, q in zip(row, p)) for row in x]
    first, norm, _, last = m.vector
    v = [sum(o * q for o, q in zip(w, v)) + b for w, b in zip(weight(first), first.bias.tolist())]
    mean = sum(v) / len(v)
    std = sqrt(sum((o - mean) ** 2 for o in v) / len(v) + norm.eps)
    scale = zip(norm.weight.flatten().tolist(), norm.bias.flatten().tolist())
    v = [max((o - mean) / std * w + b, 0) for o, (w, b) in zip(v, scale)]
    v = [sum(o * q for o, q in zip(w, v)) + b for w, b in zip(weight(last), last.bias.tolist())]
    return [[o + add for o in row] for row, add in zip(x, v)]


def attention_loop(x, T):
    n, c = len(x[0]), len(x)
    place = softmax([sum(abs(row[i]) for row in x) / c / T for i in range(n)])
    channel = softmax([sum(map(abs, row)) / n / T for row in x])
    return [n * o for o in place], [c * o for o in channel]


def fgd_loop(s, t, boxes, context, T, background, attention, relation):
    h, w = t.shape[2:]
    total = 0
    for x, y, found in zip(s.flatten(2).tolist(), t.flatten(2).tolist(), boxes):
        (place, channel), (t_place, t_channel) = attention_loop(x, T), attention_loop(y, T)
        inside = [0.0] * (h * w)
        for x1, y1, x2, y2 in found.tolist():
            left, top, right, bottom = floor(x1 * w), floor(y1 * h), ceil(x2 * w), ceil(y2 * h)
            area = (right + 1 - left) * (bottom + 1 - top)
            for i in range(top, min(bottom + 1, h)):
                for j in range(left, min(right + 1, w)):
                    inside[i * w + j] = max(inside[i * w + j], 1 / area)
        outside = sum(o == 0 for o in inside)
        for i in range(h * w):
            mask = inside[i] or background / outside
            for c in range(len(x)):
                total += mask * t_place[i] * t_channel[c] * (x[c][i] - y[c][i]) ** 2
        total += attention * sum(abs(a - b) for a, b in zip(place + channel, t_place + t_channel))
        a, b = [context_loop(m, o) for m, o in zip(context, (x, y))]
        total += relation * sum((p - q) ** 2 for k, l in zip(a, b) for p, q in zip(k, l))
    return total / len(t)


def boxed(seed=0):
    "Maps of student and teacher, boxes that overlap, at the edge and none, and two contexts"
    g = torch.Generator().manual_seed(seed)
    s, t = [torch.randn(3, 4, 5, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    two = [[0.1, 0.1, 0.3, 0.4], [0.2, 0.3, 0.7, 0.9]]
    boxes = [torch.tensor(o).reshape(-1, 4) for o in (two, [], [[0.5, 0.6, 1.0, 1.0]])]
    torch.manual_seed(seed)
    context = [GlobalContext(4).double() for _ in range(2)]
    for p in (p for m in context for p in m.parameters()):
        nn.init.normal_(p)
    return s, t, boxes, context


def authors_context(g, who):
    m = GlobalContext(g['teacher'].shape[1]).double()
    m.weights.load_state_dict(parameters(g, f'conv_mask_{who}.'))
    m.vector.load_state_dict(parameters(g, f'channel_add_conv_{who}.'))
    return m


def test_fgd_equals_the_authors_numbers():
    for tag, g, o in Golden('fgd').cases():
        h, w = o['img_shape']
        fractions = g['boxes'] / torch.tensor([w, h, w, h])
        boxes = [fractions[g['box_image'] == i] for i in range(len(g['teacher']))]
        s = g['student'].clone().requires_grad_()
        v = fgd(
            projected(s, g),
            g['teacher'],
            boxes,
            context=[authors_context(g, who) for who in 'st'],
            T=o['temp'],
            background=o['beta'] / o['alpha'],
            attention=o['gamma'] / o['alpha'],
            relation=o['lambda'] / o['alpha'],
        )
        v = v * o['alpha']
        assert v.item() == pytest.approx(g['expected'].item(), rel=1e-9), tag
        v.backward()
        torch.testing.assert_close(
            s.grad, g['grad_student'], rtol=1e-7, atol=1e-13, msg=lambda m: f'{tag}: {m}'
        )


@pytest.mark.parametrize('options', [{}, dict(T=2.0, background=3.0, attention=0.1, relation=1.0)])
def test_fgd_equals_a_plain_loop(options):
    s, t, boxes, context = boxed()
    default = dict(T=0.5, background=0.5, attention=1.0, relation=0.005)
    want = fgd_loop(s, t, boxes, context, **default | options)
    assert fgd(s, t, boxes, context=context, **options).item() == pytest.approx(want)
    loss = FGD(context=nn.ModuleList(context), **options)
    assert loss(s, t, boxes).item() == pytest.approx(want)


def test_fgd_of_images_full_of_objects_is_finite():
    s, t, boxes, context = boxed()
    whole = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])] * 3
    v = fgd(s, t, whole, context=context, background=1e6, attention=0, relation=0)
    assert v.item() == fgd(s, t, whole, context=context, background=0, attention=0, relation=0)


def test_fgd_is_zero_for_equal_maps_and_trains_both_contexts():
    s, t, boxes, _ = boxed()
    loss = FGD().double()
    loss.prepare(s, t)
    loss = loss.double()
    assert loss(t, t, boxes).item() == 0
    loss(s, t, boxes).backward()
    assert all(m.vector[-1].bias.grad.abs().sum() > 0 for m in loss.context)


def test_fgd_without_modules_says_what_to_call():
    s, t, boxes, _ = boxed()
    with pytest.raises(DistillError, match=r'FGD trains modules, .* call prepare'):
        FGD()(s, t, boxes)
