"A projector gives the teacher's shape, by arithmetic that can be redone by hand."

import copy, pickle
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastdistill.base.outputs import DistillError
from fastdistill.features.projectors import PROJECTORS, Projector, describe_projector
from fastdistill.features.maps_and_tokens import resize, to_grid


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def n_params(p):
    return sum(o.numel() for o in p.parameters())


# shapes

SHAPES = [  # student, teacher
    ((2, 3), (2, 5)),
    ((2, 7, 3), (2, 7, 5)),
    ((2, 3, 4, 4), (2, 5, 4, 4)),
    ((2, 3, 8, 4), (2, 5, 4, 8)),
    ((2, 3, 4, 4, 4), (2, 5, 2, 4, 8)),
    ((2, 17, 3), (2, 5, 4, 4)),
    ((2, 16, 3), (2, 5, 8, 8)),
    ((2, 9, 3), (2, 5, 2, 4)),
    ((2, 3, 8, 8), (2, 17, 5)),
    ((2, 3, 4, 4), (2, 21, 5)),
    ((2, 17, 3), (2, 50, 5)),
    ((2, 11, 3), (2, 6, 5)),
    ((2, 3, 4, 4), (2, 5)),
    ((2, 7, 3), (2, 5)),
]


@pytest.mark.parametrize('kind', PROJECTORS)
@pytest.mark.parametrize('s_shape, t_shape', SHAPES, ids=str)
def test_every_kind_gives_the_teachers_shape(s_shape, t_shape, kind):
    p, s, t = Projector(s_shape, t_shape, kind), rand(*s_shape).requires_grad_(), rand(*t_shape)
    y = p(s, t)
    assert (
        y.shape == t.shape and p(s).shape == t.shape
    )  # without the teacher's tensor: the size it was built for
    y.square().sum().backward()
    assert s.grad.abs().sum() > 0 and all(o.grad is not None for o in p.parameters())
    a, b = 3, 5
    maps = len(t_shape) > 3
    want = dict(linear=a * b + b, conv=a * b + b, conv_bn=a * b + 2 * b, mlp=a * b + b + b * b + b)
    assert (
        n_params(p) == want['conv_bn' if maps else 'linear']
        if kind == 'auto'
        else n_params(p) == want[kind]
    )


@pytest.mark.parametrize('s_shape, t_shape', SHAPES, ids=str)
def test_matching_the_grid_leaves_the_students_channels(s_shape, t_shape):
    p = Projector(s_shape, t_shape, match='grid')
    y = p(rand(*s_shape), rand(*t_shape))
    channel = 2 if len(t_shape) == 3 else 1
    assert n_params(p) == 0 and y.shape[channel] == 3
    assert [n for i, n in enumerate(y.shape) if i != channel] == [
        n for i, n in enumerate(t_shape) if i != channel
    ]


@pytest.mark.parametrize('shape', [(2, 3), (2, 7, 3), (2, 3, 4, 4)])
def test_nothing_is_built_nor_drawn_where_shapes_agree(shape):
    s, state = rand(*shape), torch.get_rng_state()
    for p in (
        Projector(shape, (9, *shape[1:])),
        Projector(shape, shape, match='grid'),
        Projector(shape, (2, 9), match='none'),
        Projector((2, 3), (2, 5, 4, 4), match='none'),
    ):
        assert p(s, rand(*shape)) is s and n_params(p) == 0 and str(p) == 'none'
    assert torch.equal(torch.get_rng_state(), state)


def test_a_kind_that_is_named_is_built_also_where_shapes_agree_and_where_the_loss_needs_none():
    assert n_params(Projector((2, 3), (2, 3), 'linear')) == 12
    p = Projector((2, 3, 4, 4), (2, 5, 8, 8), 'conv', match='none')
    assert p(rand(2, 3, 4, 4), rand(2, 5, 8, 8)).shape == (
        2,
        5,
        4,
        4,
    )  # channels as asked, the grid left alone
    p = Projector((2, 3, 4, 4), (2, 5, 8, 8), 'conv', match='grid')
    assert p(rand(2, 3, 4, 4), rand(2, 5, 8, 8)).shape == (2, 5, 8, 8)


def test_sizes_may_vary_from_batch_to_batch():
    p = Projector((2, 3, 8, 8), (2, 5, 4, 4))
    for b, h, w in [(3, 4, 6), (1, 5, 5), (4, 16, 2)]:
        assert p(rand(b, 3, 2 * h, w), rand(b, 5, h, w)).shape == (b, 5, h, w)
    p = Projector((2, 7, 3), (2, 7, 5))
    for b, n in [(3, 9), (1, 1)]:
        assert p(rand(b, n, 3), rand(b, n, 5)).shape == (b, n, 5)
    p = Projector(
        (2, 17, 3), (2, 5, 8, 8)
    )  # tokens of a ViT opposite a map: square, and then twice as high as wide
    assert p(rand(3, 26, 3), rand(3, 5, 10, 10)).shape == (3, 5, 10, 10)
    assert p(rand(3, 9, 3), rand(3, 5, 8, 4)).shape == (3, 5, 8, 4)
    p = Projector((2, 3, 4, 4), (2, 3, 4, 4))  # equal when it was built
    assert p(rand(2, 3, 5, 5), rand(2, 3, 4, 4)).shape == (2, 3, 4, 4)


# arithmetic by hand


def test_linear_on_vectors_and_tokens():
    p = Projector((2, 3), (2, 5))
    w, b = p.map.weight, p.map.bias
    s = rand(2, 3)
    for i in range(2):
        for j in range(5):
            want = sum((s[i, k] * w[j, k]).item() for k in range(3)) + b[j].item()
            assert p(s)[i, j].item() == pytest.approx(want, abs=1e-6)
    q = Projector((2, 7, 3), (2, 7, 5))
    y, s = q(rand(2, 7, 3)), rand(2, 7, 3)
    for l in range(7):
        torch.testing.assert_close(y[:, l], F.linear(s[:, l], q.map.weight, q.map.bias))


def test_a_map_gets_a_1x1_convolution_and_a_batch_norm_without_a_relu():
    p, s = Projector((4, 3, 5, 5), (4, 6, 5, 5)).double(), rand(4, 3, 5, 5, dtype=torch.float64)
    conv, bn = p.map
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    z = torch.einsum('oi,bihw->bohw', conv.weight[:, :, 0, 0], s)
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    c = lambda v: v[None, :, None, None]
    want = (z - c(mean)) / (c(var) + 1e-5).sqrt() * c(bn.weight) + c(bn.bias)
    y = p(s)
    torch.testing.assert_close(y, want)
    assert (y < 0).any() and conv.bias is None


def test_batch_norm_of_tokens_is_over_their_features():
    p, s = Projector((4, 7, 3), (4, 7, 5), 'conv_bn').double(), rand(4, 7, 3, dtype=torch.float64)
    y = p(s)
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(5, dtype=torch.float64))
    z = F.linear(s, p.map[0].weight)
    torch.testing.assert_close(
        y, (z - z.mean((0, 1))) / (z.var((0, 1), unbiased=False) + 1e-5).sqrt()
    )


def test_mlp():
    p, s = Projector((2, 3), (2, 5), 'mlp'), rand(2, 3)
    a, _, b = p.map
    z = s @ a.weight.T + a.bias
    z = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    torch.testing.assert_close(p(s), z @ b.weight.T + b.bias)


def bilinear(x, h, w):
    "One pixel at a time"
    y = torch.zeros(*x.shape[:2], h, w, dtype=x.dtype)
    H, W = x.shape[2:]
    for i in range(h):
        for j in range(w):
            a, b = max((i + 0.5) * H / h - 0.5, 0), max((j + 0.5) * W / w - 0.5, 0)
            i0, j0 = int(a), int(b)
            i1, j1 = min(i0 + 1, H - 1), min(j0 + 1, W - 1)
            u, v = a - i0, b - j0
            y[..., i, j] = (1 - u) * ((1 - v) * x[..., i0, j0] + v * x[..., i0, j1]) + u * (
                (1 - v) * x[..., i1, j0] + v * x[..., i1, j1]
            )
    return y


def averages(x, h, w):
    y = torch.zeros(*x.shape[:2], h, w, dtype=x.dtype)
    H, W = x.shape[2:]
    for i in range(h):
        for j in range(w):
            y[..., i, j] = x[
                :, :, i * H // h : -(-(i + 1) * H // h), j * W // w : -(-(j + 1) * W // w)
            ].mean((2, 3))
    return y


@pytest.mark.parametrize(
    'size, want',
    [
        ((3, 2), lambda x: averages(x, 3, 2)),
        ((7, 10), lambda x: bilinear(x, 7, 10)),
        ((6, 5), lambda x: x),
        ((3, 10), lambda x: bilinear(averages(x, 3, 5), 3, 10)),
        ((9, 2), lambda x: bilinear(averages(x, 6, 2), 9, 2)),
    ],
)
def test_axes_that_shrink_are_averaged_and_axes_that_grow_interpolated(size, want):
    x = rand(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(resize(x, size), want(x))


def test_tokens_to_a_map_drop_the_class_token():
    s = rand(2, 1 + 4 * 4, 3)
    y = to_grid(s, (2, 9, 4, 4))
    for i in range(4):
        for j in range(4):
            assert torch.equal(y[:, :, i, j], s[:, 1 + 4 * i + j])
    y = to_grid(
        rand(2, 1 + 2 * 8, 3), (2, 9, 3, 12)
    )  # the teacher's map is four times as wide as high, so are the tokens
    assert y.shape == (2, 3, 3, 12)


def test_a_map_to_tokens_puts_its_mean_where_the_class_token_is():
    s = rand(2, 3, 4, 4)
    y = to_grid(s, (2, 2 + 2 * 2, 9))
    small = averages(s, 2, 2)
    for k in range(2):
        torch.testing.assert_close(y[:, k], small.mean((2, 3)))
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(y[:, 2 + 2 * i + j], small[:, :, i, j])
    assert torch.equal(to_grid(s, (2, 16, 9)), s.flatten(2).transpose(1, 2))


def test_tokens_of_pictures_with_other_patches_keep_their_class_token():
    s = rand(2, 1 + 6 * 6, 3)
    y = to_grid(s, (2, 2 + 3 * 3, 9))
    small = averages(s[:, 1:].transpose(1, 2).reshape(2, 3, 6, 6), 3, 3)
    assert torch.equal(y[:, 0], s[:, 0])
    torch.testing.assert_close(y[:, 1], small.mean((2, 3)))
    torch.testing.assert_close(y[:, 2:], small.flatten(2).transpose(1, 2))


def test_sequences_of_other_lengths_are_resized_along_the_sequence():
    s = rand(2, 12, 3)
    torch.testing.assert_close(to_grid(s, (2, 6, 9)), (s[:, ::2] + s[:, 1::2]) / 2)


def test_to_a_vector_by_the_mean():
    torch.testing.assert_close(to_grid(rand(2, 3, 4, 5), (2, 9)), rand(2, 3, 4, 5).mean((2, 3)))
    torch.testing.assert_close(to_grid(rand(2, 7, 3), (2, 9)), rand(2, 7, 3).mean(1))


def test_gradients_through_every_turn():
    for a, b in [
        ((2, 3, 4, 2), (2, 5, 2, 3)),
        ((2, 5, 3), (2, 5, 4, 4)),
        ((2, 3, 4, 4), (2, 5, 5)),
        ((2, 10, 3), (2, 5, 5)),
    ]:
        p = Projector(a, b, 'linear').double()
        assert torch.autograd.gradcheck(
            lambda s: p(s, rand(*b)), rand(*a, dtype=torch.float64).requires_grad_(), fast_mode=True
        )  # noqa: B023


# precision, memory format, copies


@pytest.mark.parametrize(
    'a, b',
    [
        ((2, 3), (2, 5)),
        ((2, 17, 3), (2, 5, 2, 2)),
        ((2, 3, 4, 4), (2, 5, 8, 8)),
        ((2, 3, 4, 4), (2, 17, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_inside_and_outside_of_autocast(a, b, dtype):
    p, s = Projector(a, b, 'linear'), rand(*a).to(dtype).requires_grad_()
    want = p(s.detach().float(), rand(*b))
    y = p(s, rand(*b).to(dtype))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
    with torch.autocast('cpu', dtype=dtype):
        y = p(s, rand(*b).to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), want, rtol=5e-2, atol=5e-2)
    y.sum().backward()
    assert s.grad.dtype == dtype and all(o.grad.dtype == torch.float32 for o in p.parameters())


def test_channels_last():
    p = Projector((2, 3, 8, 8), (2, 5, 4, 4))
    s = rand(2, 3, 8, 8)
    want, last = copy.deepcopy(p)(s), s.to(memory_format=torch.channels_last)
    y = p(last, rand(2, 5, 4, 4))
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(to_grid(last, (2, 65, 9)), to_grid(s, (2, 65, 9)))


def test_the_same_seed_gives_the_same_projector():
    def make(kind):
        torch.manual_seed(3)
        return Projector((2, 3, 4, 4), (2, 5, 4, 4), kind).state_dict()

    for kind in PROJECTORS:
        a, b = make(kind), make(kind)
        assert a and all(torch.equal(a[k], b[k]) for k in a)


def test_copies_pickles_compiles_and_loads():
    p, s, t = Projector((2, 17, 3), (2, 5, 8, 8)), rand(2, 17, 3), rand(2, 5, 8, 8)
    want = p(s, t)
    for q in (
        copy.deepcopy(p),
        pickle.loads(pickle.dumps(p)),
        torch.compile(copy.deepcopy(p), backend='eager', fullgraph=True),
    ):
        torch.testing.assert_close(q(s, t), want)
    q = Projector((2, 17, 3), (2, 5, 8, 8))
    q.load_state_dict(p.state_dict())
    torch.testing.assert_close(q.eval()(s, t), p.eval()(s, t))


# the user's own


class Own(nn.Module):
    def __init__(self, o=5):
        super().__init__()
        self.conv = nn.Conv2d(3, o, 3, 2, 1)

    def forward(self, s):
        return self.conv(s)


def test_ones_own_module_or_function_is_used_as_it_is():
    s, t, own = rand(2, 3, 8, 8), rand(2, 5, 4, 4), Own()
    p = Projector(s.shape, t.shape, own)
    assert (
        torch.equal(p(s, t), own(s))
        and torch.equal(p(s), own(s))
        and list(p.parameters()) == list(own.parameters())
        and str(p) == 'Own'
    )
    p = Projector(s.shape, (2, 3, 4, 4), lambda s: s[:, :, ::2, ::2])
    assert torch.equal(p(s), s[:, :, ::2, ::2]) and n_params(p) == 0
    p = Projector(
        (2, 3), (2, 5, 4, 4), lambda s: s[:, :, None, None].expand(2, 3, 4, 4), match='grid'
    )  # what 'auto' would refuse
    assert p(rand(2, 3), rand(2, 5, 4, 4)).shape == (2, 3, 4, 4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = own(s)
    assert Projector((2, 5, 4, 4), (2, 5, 4, 4), nn.Conv2d(5, 5, 1))(half).dtype == torch.float32


def test_ones_own_module_with_the_wrong_output_is_told_what_is_needed():
    s, t = rand(2, 3, 8, 8), rand(2, 5, 4, 4)
    with pytest.raises(
        DistillError,
        match=r'Own returned \(2, 6, 4, 4\) for student features of shape \(2, 3, 8, 8\).*shape, \(2, 5, 4, 4\)',
    ):
        Projector(s.shape, t.shape, Own(6))(s, t)
    assert Projector(s.shape, t.shape, Own(6), match='grid')(s, t).shape == (2, 6, 4, 4)
    with pytest.raises(
        DistillError, match=r"Identity returned \(2, 3, 8, 8\).*the teacher's grid, \(4, 4\)"
    ):
        Projector(s.shape, t.shape, nn.Identity(), match='grid')(s, t)
    assert Projector(s.shape, t.shape, nn.Identity(), match='none')(s, t) is s
    with pytest.raises(DistillError, match='returned tuple for'):
        Projector(s.shape, t.shape, lambda s: (s,))(s, t)


# refused


@pytest.mark.parametrize(
    'args, message',
    [
        (
            ((2, 3), (2, 5), 'linaer'),
            r"projector='linaer': must be one of 'auto', 'linear', 'conv', 'conv_bn', 'mlp', a module",
        ),
        (((2, 3), (2, 5), nn.Linear), 'not its class'),
        (((2, 3), (2, 5), 3), 'projector=3'),
        (((2, 3), (2, 5), 'auto', 'all'), "match='all': must be one of 'shape', 'grid', 'none'"),
        (
            ((2, 3), (2, 5, 4, 4)),
            r"The student's \(2, 3\) has no grid that fits the teacher's \(2, 5, 4, 4\). Pair it",
        ),
        (((2, 3), (2, 7, 5)), 'no grid that fits'),
        (((2, 3, 4, 4, 4), (2, 3, 4, 4)), 'no grid that fits'),
        (((2,), (2, 5)), r"Can't project \(2,\)"),
    ],
)
def test_what_has_no_meaning_is_refused_when_it_is_built(args, message):
    with pytest.raises(DistillError, match=message):
        Projector(*args)


def test_tokens_that_are_no_picture_are_refused():
    with pytest.raises(DistillError, match=r'\(2, 15, 3\) are not a map'):
        Projector((2, 15, 3), (2, 5, 4, 4))(rand(2, 15, 3))
    with pytest.raises(DistillError, match="can't be converted to the teacher's 15 tokens"):
        Projector((2, 3, 4, 4), (2, 15, 5))(rand(2, 3, 4, 4))


def test_in_words():
    assert (
        describe_projector((2, 64, 28, 28), (2, 256, 14, 14)) == '28x28 -> 14x14, conv_bn 64 -> 256'
    )
    assert (
        describe_projector((2, 197, 192), (2, 384, 14, 14), 'mlp')
        == '197 tokens -> 14x14, mlp 192 -> 384'
    )
    assert describe_projector((2, 3, 4, 4), (2, 5), match='grid') == '4x4 -> vector'
    assert (
        describe_projector((2, 7, 3), (2, 7, 3))
        == describe_projector((2, 3, 4, 4), (2, 5), match='none')
        == 'none'
    )
    assert str(Projector((2, 3), (2, 5))) == 'linear 3 -> 5' and 'linear 3 -> 5' in repr(
        Projector((2, 3), (2, 5))
    )
    assert (
        isinstance(Projector((2, 3), (2, 5)), Projector)
        and describe_projector((2, 3), (2, 5), nn.Linear(3, 5)) == 'Linear'
    )
