"The contract: what every loss keeps to, checked for every row."

import copy, inspect, pickle
from contextlib import nullcontext
from functools import partial
import pytest, torch
from cases import logits
from no_copies import NoCopies
import rows_dense, rows_feature, rows_relation, rows_response
from fastdistill import losses
from fastdistill.base.outputs import DistillError

ROWS = [*rows_response.ROWS, *rows_feature.ROWS, *rows_relation.ROWS, *rows_dense.ROWS]
rows = pytest.mark.parametrize('c', ROWS, ids=lambda c: c.id)
DTYPES = [torch.float16, torch.bfloat16]


def grad_of(v, s):
    return torch.autograd.grad(v, s if isinstance(s, (list, tuple)) else [s], allow_unused=True)


def leaf(s):
    return (
        [o.detach().clone().requires_grad_() for o in s]
        if isinstance(s, (list, tuple))
        else s.detach().clone().requires_grad_()
    )


def cast(x, dtype):
    if isinstance(x, (list, tuple)):
        return [cast(o, dtype) for o in x]
    return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x


def tensors(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


def rows_of(x, axis):
    return x.movedim(axis, -1).flatten(0, -2)


def take(x, i):
    return (
        [take(o, i) for o in x]
        if isinstance(x, (list, tuple))
        else x[i]
        if torch.is_tensor(x) and x.dim()
        else x
    )


@rows
def test_equals_the_plain_loop(c):
    if c.ref is None:
        pytest.skip('golden numbers only')
    args = c.make(torch.float64)
    assert c.fn(*args, **c.opts).item() == pytest.approx(
        c.ref(*args, **c.opts), rel=1e-9, abs=1e-11
    )


@rows
def test_equals_the_authors_numbers(c):
    for gold in c.golden:
        stored = list(gold.cases())
        assert stored, f'{gold.name}: no case left'
        for tag, g, o in stored:
            names = [k for k in g if k.startswith('student')]
            for k in names:
                g[k] = g[k].clone().requires_grad_()
            rest = gold.rest(g, o)
            ours = c.fn(*gold.args(g), **gold.options(o), **gold.more(g))
            scale, suffix = gold.scale(g, o), '_paper' if gold.value.endswith('_paper') else ''
            total = ours / scale + rest
            assert total.item() == pytest.approx(
                g[gold.value].item(), rel=gold.tol, abs=gold.tol
            ), f'{gold.name} {tag}'
            for k, d in zip(
                names, torch.autograd.grad(total, [g[k] for k in names], allow_unused=True)
            ):
                want = g[f'grad_{k}{suffix}']
                torch.testing.assert_close(
                    torch.zeros_like(want) if d is None else d,
                    want,
                    rtol=1e-6,
                    atol=gold.tol,
                    msg=lambda m: f'{gold.name} {tag} {k}: {m}',
                )  # noqa: B023


@rows
def test_least_at_the_teacher(c):
    if c.at_teacher is None:
        pytest.skip('has no meaning here')
    s, t, *rest = c.make(torch.float64)
    want = c.at_teacher(t, *rest, **c.opts) if callable(c.at_teacher) else c.at_teacher
    # the teacher's answer given by the student
    assert c.fn(t, t, *rest, **c.opts).item() == pytest.approx(want, abs=1e-9)
    if c.least:
        for k in (1e-3, 0.1, 1.0):
            near = (
                [b + k * (a - b) for a, b in zip(tensors(s), tensors(t))]
                if isinstance(t, list)
                else t + k * (s - t)
                if s.shape == t.shape
                else s
            )
            assert c.fn(near, t, *rest, **c.opts).item() >= want - 1e-9


@rows
def test_gradcheck(c):
    if not c.gradcheck:
        pytest.skip('a part of the student has no gradient')
    s, t, *rest = c.make(torch.float64)
    flat = [o.requires_grad_() for o in tensors(leaf(s))]
    f = lambda *ss: c.fn(list(ss) if isinstance(s, (list, tuple)) else ss[0], t, *rest, **c.opts)
    assert torch.autograd.gradcheck(f, flat, fast_mode=True, atol=1e-4)


@rows
def test_no_gradient_reaches_the_teacher(c):
    s, t, *rest = c.make(torch.float64)
    s, t = leaf(s), leaf(t)
    c.fn(s, t, *rest, **c.opts).backward()
    assert all(o.grad is None for o in tensors(t)) and any(o.grad is not None for o in tensors(s))


@rows
def test_order_of_samples_does_not_matter(c):
    if not c.order_free:
        pytest.skip('this one compares neighbours')
    args = c.make(torch.float64)
    n = len(tensors(args[0])[0])
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    assert c.fn(*take(list(args), perm), **c.opts).item() == pytest.approx(
        c.fn(*args, **c.opts).item(), rel=1e-9, abs=1e-11
    )


@rows
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_half_precision(c, dtype):
    args = cast(list(c.make(torch.float64)), dtype)
    s = leaf(args[0])
    v = c.fn(s, *args[1:], **c.opts)
    want = c.fn(*cast(args, torch.float64), **c.opts)  # the very same rounded numbers
    assert v.dtype == torch.float32
    assert v.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert c.fn(*args, **c.opts).item() == v.item()  # autocast does not reach into a loss
    for d in grad_of(v, s):
        assert d is None or d.isfinite().all()


@rows
def test_extreme_values_stay_finite(c):
    if not c.extreme:
        pytest.skip('no logits')
    s, t, *rest = c.make(torch.float32)
    big = lambda x: [big(o) for o in x] if isinstance(x, (list, tuple)) else x * 1e4
    s = leaf(big(s))
    v = c.fn(s, big(t), *rest, **c.opts)
    assert v.isfinite() and all(d is None or d.isfinite().all() for d in grad_of(v, s))


@rows
def test_mask_and_reductions(c):
    if not c.mask:
        pytest.skip('one number for the whole batch')
    s, t, *rest = c.make(torch.float64)
    # by default, the margin of ofd is a mean over the positions that the mask includes
    opts = c.opts | (dict(margin=-0.3) if c.fn is losses.ofd else {})
    s = leaf(s)
    v = c.fn(s, t, *rest, **opts, reduction='none')
    assert c.fn(s, t, *rest, **opts, reduction='sum').item() == pytest.approx(v.sum().item())
    assert c.fn(s, t, *rest, **opts).item() == pytest.approx(v.mean().item())
    none = c.fn(s, t, *rest, **opts, mask=torch.zeros(v.shape, dtype=torch.bool))
    assert none.item() == 0 and all(d is not None and not d.isnan().any() for d in grad_of(none, s))
    mask = torch.rand(v.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    alone = v[mask].mean()
    if c.shared:
        alone = c.fn(
            *[rows_of(o, opts.get('axis', 1))[mask.flatten()] for o in (s, t)],
            **{**opts, 'axis': 1},
        )
    assert c.fn(s, t, *rest, **opts, mask=mask).item() == pytest.approx(alone.item())
    with pytest.raises(DistillError, match="must be one of 'mean'"):
        c.fn(s, t, *rest, **opts, reduction='avg')
    with pytest.raises(DistillError, match='does not fit'):
        c.fn(s, t, *rest, **opts, mask=torch.ones(99))


with_axis = [c for c in rows_response.ROWS if 'axis' in inspect.signature(c.fn).parameters]
positions = pytest.mark.parametrize('c', with_axis, ids=lambda c: c.id)


def dense(c, *shape, axis=1):
    "Arguments of this shape for a row's function, and its options"
    return logits(*shape, y='y' in inspect.signature(c.fn).parameters, axis=axis, seed=3)(), {
        **c.opts,
        'axis': axis,
    }


@positions
def test_dense_equals_flattened(c):
    for shape, axis in (((2, 5, 3, 4), 1), ((2, 3, 5), -1)):
        (s, t, *y), o = dense(c, *shape, axis=axis)
        flat = c.fn(
            rows_of(s, axis), rows_of(t, axis), *[o.flatten() for o in y], **{**o, 'axis': 1}
        )
        assert c.fn(s, t, *y, **o).item() == pytest.approx(flat.item(), rel=1e-9)


@positions
def test_a_bigger_batch_or_image_of_the_same_changes_nothing(c):
    (s, t, *y), o = dense(c, 2, 5, 3, 4)
    want = c.fn(s, t, *y, **o).item()
    # 1e-6, because the eps of dist weighs half as much when all comes twice
    assert c.fn(*[torch.cat([o, o]) for o in (s, t, *y)], **o).item() == pytest.approx(
        want, rel=1e-6
    )
    tiled = [torch.cat([torch.cat([o, o], -1)] * 2, -2) for o in (s, t, *y)]
    assert tiled[0].shape == (2, 5, 6, 8) and c.fn(*tiled, **o).item() == pytest.approx(
        want, rel=1e-6
    )


@rows
def test_function_equals_module_which_copies_pickles_and_refuses(c):
    args = c.make(torch.float64)
    module = c.module or partial(losses.Loss, c.fn)
    m = module(**c.opts)
    want = c.fn(*args, **c.opts).item()
    assert (
        m(*args).item()
        == pickle.loads(pickle.dumps(m))(*args).item()
        == copy.deepcopy(m)(*args).item()
        == want
    )
    with pytest.raises(TypeError, match='has no option nonsense. It has: '):
        module(nonsense=9)


@pytest.mark.parametrize('name', sorted({c.fn.__name__ for c in ROWS}))
def test_traces_without_a_graph_break(name):
    "All rows of a loss in one graph, which is faster than one each"
    torch.compiler.reset()  # all losses share one decorator, and dynamo keeps 8 versions of a function
    cases = {c.id: c for c in ROWS if c.fn.__name__ == name}
    args = {k: c.make(torch.float32) for k, c in cases.items()}
    values = lambda args: {k: c.fn(*args[k], **c.opts) for k, c in cases.items()}
    got = torch.compile(values, backend='eager', fullgraph=True)(args)
    near = lambda v: pytest.approx(v.item(), rel=1e-5, abs=1e-6)
    assert {k: v.item() for k, v in got.items()} == {k: near(v) for k, v in values(args).items()}


def on_meta(o):
    if isinstance(o, (list, tuple)):
        return [on_meta(x) for x in o]
    return o.to('meta').detach().requires_grad_(o.is_floating_point()) if torch.is_tensor(o) else o


@rows
def test_makes_no_gpu_wait(c, monkeypatch):
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())  # `meta` has none
    args, opts = on_meta(list(c.make(torch.float32))), {k: on_meta(v) for k, v in c.opts.items()}
    with NoCopies():
        c.fn(*args, **opts).backward()


def test_every_loss_has_a_row():
    assert {c.fn.__name__ for c in ROWS} == set(losses.LOSSES)


def test_every_function_that_is_declared_a_loss_is_public():
    # those of detectors are public in fastdistill.detection
    files = [m for n, m in vars(losses).items() if inspect.ismodule(m) and n != 'detection']
    declared = {n for m in files for n, f in vars(m).items() if hasattr(f, 'relates')}
    assert declared == set(losses.LOSSES)


@pytest.mark.parametrize(
    'fn', list(dict.fromkeys(c.fn for c in ROWS if 'T' in c.opts)), ids=lambda f: f.__name__
)
def test_a_temperature_of_0_is_refused(fn):
    c = next(c for c in ROWS if c.fn is fn)
    with pytest.raises(DistillError, match='above 0'):
        fn(*c.make(torch.float64), **{**c.opts, 'T': 0})
