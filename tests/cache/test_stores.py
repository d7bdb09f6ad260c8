"The ways to store outputs: what they cost, what they lose, which one is chosen, and what is refused."

import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastdistill.base.outputs import (
    DistillError,
    DistillWarning,
    Draws,
    LinearLogits,
    Outputs,
    TopK,
)
from fastdistill.cache import Store, TeacherCache, cache_dataset, store_choice
from fastdistill.cache.output_layer import OutputLayer, find_output_layer
from fastdistill import Distiller
from fastdistill.losses import cosine, dist, kl, mse, pkt, rkd, soft_ce
from fastdistill.recipes.term import Term
from fastdistill.recipes.zoo import kd, logit_std
from fastdistill.teachers import Teacher
from manifests import write_manifest


def net(classes=300, width=24, scale=6.0):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, classes))
    with torch.no_grad():
        m[2].weight.mul_(scale)
        m[0].weight[:3].mul_(20)  # a few numbers of the hidden state are larger than the others
    return m


def data(n=200):
    return TensorDataset(torch.randn(n, 10, generator=torch.Generator().manual_seed(1)))


def written(path, store, model=None, n=200, **options):
    model = model or Teacher(net())
    return cache_dataset(model, data(n), path, views=0, store=store, progress=False, **options)


def exact(n=200):
    return net()(data(n).tensors[0]).detach()


# the option


@pytest.mark.parametrize(
    'given,kind,dtype',
    [
        ('auto', 'auto', 'float16'),
        ('logits', 'logits', 'float16'),
        ('int8', 'logits', 'int8'),
        ('topk', 'topk', 'float16'),
        ('hidden', 'hidden', 'int8'),
        ('draws', 'draws', 'float16'),
        (dict(topk=3, dtype='int8'), 'topk', 'int8'),
        (dict(size=4), 'logits', 'float16'),
        (dict(layer='fc'), 'hidden', 'int8'),
        (dict(draws=9), 'draws', 'float16'),
        (dict(kind='hidden', dtype='float32'), 'hidden', 'float32'),
    ],
    ids=str,
)
def test_the_option_store(given, kind, dtype):
    store = Store.of(given)
    assert (store.kind, store.dtype) == (kind, dtype)


@pytest.mark.parametrize(
    'given,match',
    [
        ('logit', "store='logit': must be 'auto', 'logits', 'topk', 'hidden', 'draws' or 'pca'"),
        (7, 'store=7: must be'),
        (dict(k=3), "has an unknown key 'k'"),
        (dict(topk=3, draws=5), "topk, draws can't be combined"),
        (dict(kind='draws', topk=3), "kind='draws' and topk can't be combined"),
        (dict(draws=0), 'draws=0: must be a whole number from 1 to 65535, or None'),
        (dict(draws=5, T=0.0), 'T=0.0: a temperature must be a number above 0'),
        (dict(kind='all'), "kind='all': must be one of 'auto'"),
        (dict(topk='abc'), "topk='abc': must be a whole number"),
        (dict(topk=2.5), 'topk=2.5: must be a whole number'),
        (dict(draws='abc'), "draws='abc': must be a whole number"),
        (dict(draws=5, T='abc'), "T='abc': a temperature must be a number above 0"),
        (dict(components=True), 'components=True: must be a whole number'),
        (dict(size='abc'), "size='abc': must be a whole number, or (height, width)"),
        (dict(size=(8,)), 'size=(8,): must be a whole number, or (height, width)'),
    ],
    ids=str,
)
def test_a_wrong_option_says_what_is_possible(given, match):
    with pytest.raises(DistillError, match=re.escape(match)):
        Store.of(given)


# hidden states


@pytest.mark.parametrize('dtype,tol', [('float32', 1e-6), ('float16', 1e-3), ('int8', 0.01)])
def test_hidden_states_give_the_logits(dtype, tol, tmp_path):
    cache = written(tmp_path, dict(kind='hidden', dtype=dtype))
    t, got = exact(), cache.outputs(range(200)).logits
    assert isinstance(got, LinearLogits)
    assert (got.dense() - t).abs().max() <= tol * (t.max() - t.min())
    for T in (1.0, 4.0):  # the spread of softened logits shrinks with them
        assert kl(got, t, T=T) <= 1e-3


def test_int8_costs_eight_bytes_more_than_the_width(tmp_path):
    m = written(tmp_path, 'hidden').manifest
    assert m.layout.bytes == 24 + 8
    # the weight, the bias, the units, the center and the basis
    assert m.head_bytes == 4 * (300 * 24 + 300 + 24 + 24 + 24 * 24)
    assert m.bytes == 200 * 32 + m.head_bytes


def test_logits_are_within_one_percent_of_their_spread(tmp_path):
    """The numbers of the hidden state are correlated, have means that are not 0, and a few are much
    larger than the others, as in language models.
    """
    rng = torch.Generator().manual_seed(0)
    model = nn.Linear(64, 500)
    mix = torch.randn(64, 64, generator=rng) * torch.logspace(0, -2, 64)[:, None]
    hidden = torch.randn(600, 64, generator=rng) @ mix + 2 * torch.randn(64, generator=rng)
    hidden[:, 5] *= 30
    with torch.no_grad():
        model.weight.copy_(torch.randn(500, 64, generator=rng) @ mix.T)
        model.weight[:, 5] /= 30
    cache = cache_dataset(
        Teacher(model), TensorDataset(hidden), tmp_path, views=0, store='hidden', progress=False
    )
    assert cache.manifest.layout.bytes == 64 + 8
    t = model(hidden).detach().numpy()
    error = cache.outputs(range(600)).logits.dense().numpy() - t
    # probabilities do not change if all logits of a position change by the same number
    share = error.std(1) / t.std(1)
    assert np.median(share) <= 0.005
    assert share.max() <= 0.01


def read_by_hand(folder, n=300, d=24, rows=200):
    "The tensors of head.bin, and the stored numbers of each row"
    head = np.fromfile(folder / 'head.bin', '<f4')
    shapes = dict(weight=(n, d), bias=(n,), unit=(d,), center=(d,), basis=(d, d))
    ends = np.cumsum([np.prod(s) for s in shapes.values()])
    parts = {
        k: o.reshape(s) for (k, s), o in zip(shapes.items(), np.split(head, ends), strict=False)
    }
    raw = np.fromfile(folder / 'view000/000000.bin', np.uint8).reshape(rows, d + 8)
    step, mid = raw[:, d:].copy().view('<f4').T[..., None]
    return parts, raw[:, :d].view(np.int8) * step + mid


def test_the_files_hold_what_the_page_says(tmp_path):
    model, x = net(), data().tensors[0]
    cache = written(tmp_path, 'hidden')
    head, stored = read_by_hand(tmp_path)
    numbers = stored + head['center']
    logits = numbers @ head['weight'].T + head['bias']
    np.testing.assert_allclose(cache.outputs(range(200)).logits.dense(), logits, atol=1e-4)
    # the basis is orthogonal, and the output layer is that of the model in this basis
    basis = head['basis']
    np.testing.assert_allclose(basis.T @ basis, np.eye(24), atol=1e-5)
    np.testing.assert_allclose(
        head['weight'] / head['unit'] @ basis.T, model[2].weight.detach(), atol=1e-4
    )
    hidden = model[:2](x).detach().numpy()
    np.testing.assert_allclose((numbers * head['unit']) @ basis.T, hidden, atol=0.01)
    # errors of the stored numbers cause uncorrelated errors of the logits
    of_logits = np.cov(head['weight'].T)
    rest = of_logits - np.diag(np.diag(of_logits))
    assert np.abs(rest).max() <= 1e-4 * of_logits.max()


def test_an_output_layer_with_nan_is_refused(tmp_path):
    weight = net()[2].weight.detach().clone()
    weight[7, 3] = torch.nan
    teacher = lambda x: Outputs(LinearLogits(x.repeat(1, 3)[:, :24], weight))
    with (
        pytest.warns(DistillWarning),
        pytest.raises(DistillError, match="The teacher's output layer contains nan or inf"),
    ):
        written(tmp_path, 'hidden', teacher)


def test_a_number_that_is_rarely_used_does_not_take_the_whole_range(tmp_path):
    "The units are those of the first batch, in which a few numbers of the hidden state are 0"
    torch.manual_seed(0)
    model = nn.Linear(40, 300)
    x = torch.randn(64, 40).relu()
    x[:8, :4] *= 1e-6
    cache = cache_dataset(
        Teacher(model),
        TensorDataset(x),
        tmp_path,
        views=0,
        store='hidden',
        run=dict(bs=8),
        progress=False,
    )
    t, got = model(x).detach(), cache.outputs(range(64)).logits.dense()
    assert ((got - t).abs().amax(1) <= 0.01 * (t.amax(1) - t.amin(1))).all()


def test_hidden_states_that_int8_cannot_hold_are_reported(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(40, 300)
    x = torch.randn(64, 40)
    x[20:, 0] *= 1e3
    with torch.no_grad():
        model.weight[:, 0] *= 1e-3
    with pytest.warns(
        DistillWarning, match=r'int8 differ from the teacher.s by up to \d+.\d% of their range'
    ):
        cache_dataset(
            Teacher(model),
            TensorDataset(x),
            tmp_path,
            views=0,
            store='hidden',
            run=dict(bs=8),
            progress=False,
        )


def test_each_token_has_its_own_scale(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(10, 30)
    x = torch.randn(20, 6, 10) * torch.tensor([1e-3, 1, 1e3, 1, 1, 1]).view(6, 1)
    cache = cache_dataset(
        Teacher(model), TensorDataset(x), tmp_path, views=0, axis=-1, store='hidden', progress=False
    )
    assert cache.manifest.layout.bytes == 6 * (10 + 8)
    t, got = model(x).detach(), cache.outputs(range(20)).logits.dense()
    spread = t.amax(-1) - t.amin(-1)
    assert ((got - t).abs().amax(-1) <= 0.01 * spread).all()


def test_all_losses_see_the_same_teacher(tmp_path):
    "A loss that takes no hidden states, as `dist`, gets logits"
    from fastdistill import Distiller

    stored = written(tmp_path, dict(kind='hidden', dtype='float32')).outputs(range(200))
    s = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    y = torch.arange(200)
    own = Term(lambda s, t: (s - t).pow(2).mean())
    for recipe in (kd(T=2), Term(dist, T=2), logit_std(kd(T=2)), own):
        values = []
        for t in (stored, Outputs(exact())):
            d = Distiller(None, None, recipe)
            task = nn.functional.cross_entropy(s, y)
            values.append(d.compute(Outputs(s), t, task, (y,)).total)
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def test_a_function_may_return_hidden_states_itself(tmp_path):
    model = net()

    def teacher(x):
        return Outputs(LinearLogits(model[:2](x), model[2].weight, model[2].bias))

    with pytest.warns(DistillWarning, match="weights of teacher can't be read"):
        cache = written(tmp_path, dict(kind='hidden', dtype='float32'), teacher)
    torch.testing.assert_close(cache.outputs(range(200)).logits.dense(), exact())


def test_the_output_layer_is_found():
    model, x = net(), data().tensors[0]
    found = find_output_layer(Teacher(model), lambda t: t(x))
    assert found.name == '2'
    assert torch.equal(found.weight, model[2].weight)


class Scaled(nn.Module):
    "The inner model, with a function of its logits"

    def __init__(self, fn, **config):
        super().__init__()
        self.net, self.fn = net(), fn
        self.config = type('Config', (), config)()

    def forward(self, x):
        return self.fn(self.net(x))


@pytest.mark.parametrize(
    'model',
    [
        Scaled(lambda z: z / 8),
        Scaled(lambda z: 20 * torch.tanh(z / 20), final_logit_softcapping=20.0),
    ],
    ids=['scaled', 'soft-capped'],
)
def test_scaled_and_capped_logits(model, tmp_path):
    cache = written(tmp_path, dict(kind='hidden', dtype='float32'), Teacher(model))
    want = model(data().tensors[0]).detach()
    torch.testing.assert_close(cache.outputs(range(200)).logits.dense(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'teacher,match',
    [
        (
            Teacher(Scaled(lambda z: z.log_softmax(1))),
            r'the logits of Scaled are not the output of a linear layer \(net.2\)',
        ),
        (Teacher(Scaled(lambda z: z[:, :7])), r'no linear layer of Scaled has an output of shape'),
        (Teacher([net(), net()]), 'an ensemble has no single hidden state'),
        (Teacher(nn.Tanh()), 'Tanh has no linear layer'),
        (
            Teacher(net(), select=[[0, 1], 2]),
            'sums probabilities of classes, which a linear layer can.t do',
        ),
        (Teacher(net(), outputs='probs'), 'is not a module that returns logits'),
    ],
    ids=['log_softmax', 'cut', 'ensemble', 'no layer', 'groups', 'probabilities'],
)
def test_other_teachers_are_refused_with_the_reason(teacher, match, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(DistillError, match=match):
        find_output_layer(teacher, lambda t: t(data().tensors[0][:, :10]))


def test_selected_classes(tmp_path):
    teacher = Teacher(net(), select=[5, 0, 7])
    cache = written(tmp_path, dict(kind='hidden', dtype='float32'), teacher)
    got = cache.outputs(range(200)).logits.dense()
    torch.testing.assert_close(got, exact()[:, [5, 0, 7]])


def test_a_layer_can_be_named(tmp_path):
    cache = written(tmp_path, dict(layer='2', dtype='float32'))
    torch.testing.assert_close(cache.outputs(range(200)).logits.dense(), exact())
    with pytest.raises(DistillError, match="the layer '0' of Sequential does not have an output"):
        written(tmp_path / 'other', dict(layer='0'))
    with pytest.raises(DistillError, match="No layer 'head' in Sequential"):
        written(tmp_path / 'other', dict(layer='head'))


def test_hidden_states_of_another_model_are_refused():
    x, a, b = data().tensors[0], net(), nn.Linear(24, 300)
    layer = OutputLayer('2', a[2].weight.detach(), a[2].bias.detach())
    hidden = a[:2](x)
    with pytest.raises(
        DistillError, match="layer '2' .* these are hidden states of a different model"
    ):
        layer.outputs(Outputs(b(hidden).detach(), {'2@in': hidden.detach()}))


def test_an_output_layer_of_another_shape_is_refused():
    x, a, b = data().tensors[0], net(), nn.Linear(24, 299)
    layer = OutputLayer('2', a[2].weight.detach(), a[2].bias.detach())
    hidden = a[:2](x).detach()
    with pytest.raises(
        DistillError, match=r"\(200, 300\) .* but the teacher's have shape \(200, 299\)"
    ):
        layer.outputs(Outputs(b(hidden).detach(), {'2@in': hidden}))


def test_a_damaged_output_layer_is_named(tmp_path):
    written(tmp_path, 'hidden')
    file = tmp_path / 'head.bin'
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b'\x07')
    with pytest.raises(
        DistillError, match='Damaged files .* head.bin differs from what was written'
    ):
        TeacherCache(tmp_path).check()
    file.unlink()
    with pytest.raises(DistillError, match='head.bin is missing'):
        TeacherCache(tmp_path)
    assert written(tmp_path, 'hidden').check()
    assert file.read_bytes() == whole


def test_an_interrupted_writer_keeps_the_output_layer(tmp_path):
    "The stored numbers are in units of that file"
    whole = written(tmp_path / 'a', 'hidden')

    class Killed(Exception):
        pass

    def stop(done, total, size):
        raise Killed

    with pytest.raises(Killed):
        cache_dataset(
            Teacher(net()), data(), tmp_path / 'b', views=0, store='hidden', progress=stop
        )
    assert (tmp_path / 'b' / 'head.bin').exists()
    again = written(tmp_path / 'b', 'hidden')
    assert (whole.rows(range(200)) == again.rows(range(200))).all()


def test_a_cache_may_be_packed(tmp_path):
    from fastdistill.cache import pack_cache, unpack_cache

    a = written(tmp_path / 'a', 'hidden')
    pack_cache(a, tmp_path / 'a.zip', data='noise', license='mit')
    unpack_cache(tmp_path / 'a.zip', tmp_path / 'b')
    assert torch.equal(
        a.outputs([3]).logits.dense(), TeacherCache(tmp_path / 'b').outputs([3]).logits.dense()
    )


def test_an_entry_that_does_not_fit_is_refused(tmp_path):
    written(tmp_path, 'hidden')
    file = tmp_path / 'manifest.json'
    d = json.loads(file.read_text())
    for change, match in (
        (dict(head=dict(bias=1, cap=None)), 'layout.head.bias is 1: it must be true or false'),
        (
            dict(head=dict(bias=True, cap=-1.0)),
            'layout.head.cap is -1.0: it must be a positive number',
        ),
        (dict(head=dict(bias=True)), 'layout.head has no cap'),
        (dict(draws=dict(number=0, T=1.0)), 'layout.draws.number is 0'),
    ):
        write_manifest(tmp_path, {**d, 'layout': {**d['layout'], **change}})
        with pytest.raises(DistillError, match=match):
            TeacherCache(tmp_path)


def test_logits_are_stored_as_before(tmp_path):
    written(tmp_path, 'float16')
    d = json.loads((tmp_path / 'manifest.json').read_text())
    assert set(d['layout']) == {'fields', 'n', 'tail', 'axis', 'full'}


# draws


def test_draws_are_stored_and_read(tmp_path):
    cache = written(tmp_path, dict(draws=40, T=2.0))
    d = cache.outputs(range(200)).logits
    assert isinstance(d, Draws)
    assert (d.n, d.T, d.shape) == (300, 2.0, (200, 300))
    torch.testing.assert_close(d.freqs.sum(-1), torch.ones(200))
    p = (exact() / 2).softmax(1)
    torch.testing.assert_close(d.entropy, torch.special.entr(p).sum(1))
    # ids in 2 bytes, counts in 1, the entropy in 4
    assert cache.manifest.layout.bytes == 40 * 3 + 4


def test_draws_do_not_depend_on_how_the_cache_is_written(tmp_path):
    a, b = (written(tmp_path / str(n), 'draws', run=dict(bs=n)) for n in (64, 7))
    x, y = [c.outputs(range(200)).logits for c in (a, b)]
    assert (x.ids == y.ids).float().mean() > 0.999  # a number at a boundary may round differently
    c = written(tmp_path / 'c', 'draws', run=dict(seed=1)).outputs(range(200)).logits
    assert (x.ids == c.ids).float().mean() < 0.9


def test_the_loss_of_draws_is_close_to_that_of_all_logits(tmp_path):
    d = written(tmp_path, dict(draws=200)).outputs(range(200)).logits
    s, t = torch.randn(200, 300, generator=torch.Generator().manual_seed(2)), exact()
    for fn in (kl, soft_ce):
        each = fn(s, d, T=1.0, reduction='none') - fn(s, t, T=1.0, reduction='none')
        assert abs(each.mean()) < 4 * each.std() / 200**0.5


@pytest.mark.parametrize(
    'recipe,match',
    [
        (Term(dist, T=1), "dist is not linear in the teacher's probabilities"),
        (kd(T=4), 'draws were made at T=1, but kd has T=4'),
        (Term(kl, T=('linear', 1, 4)), 'draws were made at T=1'),
        (Term(lambda s, t: s.sum(), name='own'), 'own is not linear'),
        (logit_std(kd(T=1)), 'kd is not linear'),
    ],
    ids=['dist', 'another T', 'a schedule', 'own', 'standardized'],
)
def test_draws_are_refused_before_training(recipe, match, tmp_path):
    from fastdistill import Distiller

    stored = written(tmp_path, 'draws').outputs(range(8))
    s, y = torch.randn(8, 300), torch.arange(8)
    task = nn.functional.cross_entropy(s, y)
    with pytest.raises(DistillError, match=match):
        Distiller(None, None, recipe).compute(Outputs(s), stored, task, (y,), progress=0.0)
    with pytest.raises(DistillError, match='not linear|made at T=1'):
        d = Distiller(None, None, recipe, check=False)
        d.compute(Outputs(s), stored, task, (y,), progress=0.5)


# the likeliest classes


def test_what_the_likeliest_classes_lose_is_measured_again_if_force_replaces_the_teacher(tmp_path):
    other = Teacher(nn.Sequential(nn.Linear(10, 30)))
    old = written(tmp_path / 'a', dict(topk=10)).manifest.lost
    with pytest.warns(DistillWarning, match='The cache is overwritten'):
        new = written(tmp_path / 'a', dict(topk=10), other, force=True).manifest.lost
    assert new == written(tmp_path / 'b', dict(topk=10), other).manifest.lost != old


def test_what_the_likeliest_classes_lose_is_measured(tmp_path):
    lost = written(tmp_path, dict(topk=10)).manifest.lost
    t, got = exact(), TeacherCache(tmp_path).outputs(range(200)).logits.dense()
    assert [o['T'] for o in lost] == [1.0, 2.0, 4.0, 8.0]
    for o in lost:
        torch.testing.assert_close(
            o['kl'], float(kl(got, t, T=o['T'])) / o['T'] ** 2, rtol=0.3, atol=1e-3
        )
        assert 0 < o['share'] < 2
        assert 0 <= o['correlation'] <= 1


def test_a_recipe_that_the_store_does_not_suit_is_reported_with_a_number(tmp_path):
    from fastdistill import Distiller

    stored = written(tmp_path, dict(topk=10)).outputs(range(64))
    assert isinstance(stored.logits, TopK)
    s, y = torch.randn(64, 300), torch.arange(64)
    task = nn.functional.cross_entropy(s, y)
    text = (
        r'stores the 10 likeliest of 300 classes, and dist uses them at T=4: at this temperature, \d+% of '
        r"the teacher's information is lost \(KL [\d.]+ nats\), and the correlations of its outputs fall by 0.\d\d"
    )
    with pytest.warns(DistillWarning, match=text):
        Distiller(None, None, Term(dist, T=4)).compute(Outputs(s), stored, task, (y,))
    stored.lost = None  # a cache that did not measure it
    with pytest.warns(
        DistillWarning, match=r'\d\d% of its probability at this temperature is in classes'
    ):
        Distiller(None, None, kd(T=8)).compute(Outputs(s), stored, task, (y,))


@pytest.mark.parametrize('k', [10, 300])
@pytest.mark.parametrize('loss', [mse, rkd, cosine, pkt])
def test_a_loss_that_compares_logits_is_told_that_it_gets_log_probabilities(loss, k, tmp_path):
    stored = written(tmp_path, dict(topk=k)).outputs(range(64))
    s, y = torch.randn(64, 300), torch.arange(64)
    t = exact()[:64]
    assert not torch.isclose(loss(s, t), loss(s, t.log_softmax(-1)), rtol=1e-3)
    chosen = {}
    for recipe in (Term(kl), Term(loss)):
        uses, lost = store_choice.uses_of(recipe), [dict(T=1.0, kl=0.0, share=0.0, correlation=0.0)]
        options = [
            store_choice.Option(o, n, n * 10**8, lost)
            for o, n in ((Store('topk', 'int8', k), 36), (Store('logits', 'int8'), 300))
        ]
        chosen[recipe.name] = store_choice.choose_option(options, uses).store.kind
    assert chosen == {'kl': 'topk', loss.__name__: 'logits'}
    with pytest.warns(DistillWarning, match=f'so {loss.__name__} gets these instead of logits'):
        Distiller(None, None, Term(loss)).compute(Outputs(s), stored, loss(s, t), (y,))


def test_a_recipe_that_the_store_suits_is_not_reported(tmp_path):
    from fastdistill import Distiller

    stored = written(tmp_path, dict(topk=200)).outputs(range(64))
    s, y = torch.randn(64, 300), torch.arange(64)
    task = nn.functional.cross_entropy(s, y)
    Distiller(None, None, kd(T=1)).compute(Outputs(s), stored, task, (y,))


def test_a_bad_choice_for_a_named_recipe_warns_when_it_is_written(tmp_path):
    with pytest.warns(
        DistillWarning, match=r'top 10, float16 is not suitable for dist:(.|\n)*bytes per view'
    ):
        written(tmp_path, dict(topk=10), recipe=Term(dist, T=4))


def test_the_likeliest_classes_of_one_number_are_refused(tmp_path):
    with pytest.raises(DistillError, match='topk=3 along axis 1: .* has shape'):
        cache_dataset(
            Teacher(nn.Identity()),
            TensorDataset(torch.randn(9)),
            tmp_path,
            views=0,
            store=dict(topk=3),
            progress=False,
        )


# the choice


def test_a_tiny_cache_is_not_measured(tmp_path, capsys):
    cache = written(tmp_path, 'auto')
    assert cache.manifest.layout.fields[0].dtype == 'float16'
    assert capsys.readouterr().out == ''


@pytest.fixture
def nothing_is_tiny(monkeypatch):
    monkeypatch.setattr(store_choice, 'TINY', 0)


def test_small_logits_are_stored_in_int8(tmp_path, nothing_is_tiny, capsys):
    cache = written(tmp_path, 'auto')
    assert [f.dtype for f in cache.manifest.layout.fields][0] == 'int8'
    out = capsys.readouterr().out
    for text in (
        'logits, int8',
        'hidden states, float16',
        'top 10, int8',
        '50 draws at T=1',
        'KL at T=1',
    ):
        assert text in out
    assert "fastdistill: logits, int8 (the same as store='int8')" in out


def test_the_smallest_store_with_a_negligible_loss_is_chosen(
    tmp_path, nothing_is_tiny, monkeypatch
):
    monkeypatch.setattr(store_choice, 'SMALL', 0)
    layout = written(tmp_path, 'auto', n=3000).manifest.layout
    assert layout.fields[0].name == 'hidden'
    assert layout.fields[0].dtype == 'int8'


def test_few_classes_are_chosen_where_they_are_enough(tmp_path, nothing_is_tiny, monkeypatch):
    monkeypatch.setattr(store_choice, 'SMALL', 0)
    sure = Teacher(net(scale=60.0))
    layout = written(tmp_path, 'auto', sure, recipe=kd(T=1)).manifest.layout
    assert layout.fields[0].name == 'ids'


def test_a_second_call_keeps_the_choice(tmp_path, nothing_is_tiny, capsys):
    first = written(tmp_path, 'hidden')
    again = written(tmp_path, 'auto')
    assert again.manifest == first.manifest
    assert capsys.readouterr().out == ''


def test_the_table_says_why_hidden_states_are_not_possible(tmp_path, nothing_is_tiny, capsys):
    written(tmp_path, 'auto', Teacher([net(), net()]))
    assert 'Hidden states are not possible. an ensemble has no' in capsys.readouterr().out


def test_losses_between_temperatures():
    lost = [dict(T=1.0, kl=0.0, share=0.0), dict(T=4.0, kl=1.0, share=0.5)]
    assert store_choice.loss_at(lost, 2.0) == dict(T=2.0, kl=0.5, share=0.25)
    assert store_choice.loss_at(lost, 9.0) == dict(T=9.0, kl=1.0, share=0.5)


def test_what_is_stored_exactly_loses_nothing():
    "Classes that hardly vary have a correlation of 0 in `dist`, also with themselves"
    t = exact() * torch.linspace(0, 5, 300)
    for o in store_choice.lost_by(t, t.clone(), (1.0, 4.0)):
        assert (o['kl'], o['share'], o['correlation']) == (0.0, 0.0, 0.0)


def test_exact_logits_are_good_for_correlations(tmp_path, nothing_is_tiny):
    layout = written(tmp_path, 'auto', recipe=Term(dist, T=1)).manifest.layout
    assert layout.fields[0].name == 'logits'
    assert layout.fields[0].dtype == 'int8'


def test_auto_stores_numbers_in_float32(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    year = torch.nn.Linear(6, 2)
    with torch.no_grad():
        year.bias += 2000.0
    data, options = TensorDataset(x), dict(views=0, progress=False)
    for kind, tol in (('regression', 0.0), ('sigmoid', 0.6)):
        cache = cache_dataset(Teacher(year, kind=kind), data, tmp_path / kind, **options)
        far = (cache.outputs(range(40)).logits - year(x)).abs().max()
        assert (0 < far if tol else far == 0) and far <= tol


@pytest.mark.parametrize('store', [dict(topk=2), 'draws'])
@pytest.mark.parametrize('kind,says', [('sigmoid', 'separate labels'), ('regression', 'numbers')])
def test_the_likeliest_classes_are_not_taken_for_labels_or_numbers(store, kind, says, tmp_path):
    model, x, y = torch.nn.Linear(6, 5), torch.randn(9, 6), torch.rand(9, 5)
    # the cache does not know what the student will predict
    cache = cache_dataset(
        Teacher(model), TensorDataset(x), tmp_path, views=0, store=store, progress=False
    )
    distiller = Distiller(torch.nn.Linear(6, 5), None, kd(T=1), kind=kind)
    out = distiller.student(x)
    with pytest.raises(DistillError, match=f'classes, but the model predicts {says}'):
        distiller.compute(
            Outputs(out), cache.outputs(range(9)), torch.nn.functional.mse_loss(out, y), (y,)
        )


@pytest.mark.parametrize('scale,offset', [(1.0, 3000.0), (1e-8, 0.0)])
def test_features_that_float16_does_not_hold_are_named(scale, offset, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(40, 6)
    with torch.no_grad():
        model[0].weight *= scale
        model[0].bias.copy_(model[0].bias * scale + offset)
        model[1].weight *= 1e-4
    teacher, data = Teacher(model, layers=['0']), TensorDataset(x)
    options = dict(views=0, progress=False)
    with pytest.warns(
        DistillWarning, match=r'features differ .*% \(0\) of their standard deviation'
    ):
        cache_dataset(teacher, data, tmp_path / 'half', store='float16', **options)
    exact = cache_dataset(teacher, data, tmp_path / 'full', store='float32', **options)
    torch.testing.assert_close(exact.outputs(range(40)).feats['0'], model[0](x))
