"Logits of many classes stored as their principal components and the ten likeliest classes."

import functools
import http.server
import json
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastdistill import DistillError, Distiller, Outputs, Teacher, kd, losses
from fastdistill.base.outputs import DistillWarning, TopK
from fastdistill.cache import (
    Layout,
    Store,
    StreamJoin,
    TeacherCache,
    TeacherRows,
    cache_dataset,
    pack_cache,
    seal_stream,
    start_stream,
    store_choice,
    unpack_cache,
    write_stream,
)
from fastdistill.recipes.term import Term
from manifests import write_manifest

N, C, K = 300, 320, 12
SAME = Teacher(nn.Identity())  # its logits are its inputs


def logits(n=N, classes=C, rank=60, seed=0):
    "Logits of which the first components hold most"
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, rank, generator=g) * 6 * 0.9 ** torch.arange(rank)
    return z @ torch.randn(rank, classes, generator=torch.Generator().manual_seed(99)) / 4 + 3


T = logits()


def written(path, store=None, t=T, teacher=SAME, **options):
    store = dict(components=K) if store is None else store
    given = dict(views=0, keys=range(len(t)), progress=False) | options
    return cache_dataset(teacher, TensorDataset(t), path, store=store, **given)


def by_numpy(t, fitted, k=K):
    "What is read back of exact numbers: the projection, limited to the tenth logit, and the top 10"
    t, fitted = t.double().numpy(), fitted.double().numpy()
    mean = fitted.mean(0)
    v = np.linalg.svd(fitted - mean, full_matrices=False)[2][:k]
    want = (t - mean) @ v.T @ v + mean
    for row, own in zip(want, t):
        top = np.argsort(-own)[:10]
        np.minimum(row, own[top[-1]], out=row)
        row[top] = own[top]
    return torch.from_numpy(want).float()


def measured(t=T):
    "The 256 samples on which the components are computed"
    return t[np.unique(np.linspace(0, len(t) - 1, 256, dtype=int))]


# what a row holds


def test_the_logits_are_those_of_an_independent_computation(tmp_path):
    got = written(tmp_path, dict(components=K, dtype='float32')).outputs(range(N)).logits
    torch.testing.assert_close(got, by_numpy(T, measured()), rtol=1e-4, atol=1e-4)


def test_the_components_are_of_samples_from_the_whole_dataset_at_any_batch_size(tmp_path):
    store = dict(components=K, dtype='float32')
    got = written(tmp_path, store, run=dict(bs=192)).outputs(range(N)).logits
    few = T[np.linspace(0, N - 1, 192, dtype=int)]
    torch.testing.assert_close(got, by_numpy(T, few), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('store', [dict(components=K), 'auto'], ids=str)
def test_the_teacher_runs_once_on_the_samples_from_which_components_are_computed(
    store, tmp_path, monkeypatch
):
    "The same outputs are measured, and give the components"
    seen, t = [], logits(1000)

    def teacher(x):
        seen.append(len(x))
        return x

    teacher.identity = 'x'
    monkeypatch.setattr(store_choice, 'TINY', 0)
    monkeypatch.setattr(store_choice, 'SMALL', 0)
    written(tmp_path / 'a', 'float32', t, teacher)
    checks_and_rows = sum(seen)
    seen.clear()
    got = written(tmp_path / 'b', store, t, teacher)
    layout = got.manifest.layout
    assert layout.kind == 'pca'
    assert sum(seen) - checks_and_rows == 256
    want = by_numpy(t, measured(t), layout.fields[0].shape[0])
    assert (got.outputs(range(1000)).logits - want).abs().max() < 0.02 * (t.max() - t.min())


@pytest.mark.parametrize('dtype,tol', [('int8', 0.02), ('float16', 0.003)])
def test_smaller_numbers_are_rounded(dtype, tol, tmp_path):
    got = written(tmp_path, dict(components=K, dtype=dtype)).outputs(range(N)).logits
    want = by_numpy(T, measured())
    assert (got - want).abs().max() < tol * (T.max() - T.min())
    top = T.topk(10).values
    assert (got.gather(1, T.topk(10).indices) - top).abs().max() < 0.01 * (top.max() - top.min())


def test_bytes(tmp_path):
    m = written(tmp_path).manifest
    # codes and their scale, class numbers in 16 bits, logits and their scale
    assert m.layout.bytes == K + 8 + 20 + 10 + 8
    assert m.head_bytes == 4 * (C * K + C + K)
    assert (tmp_path / 'head.bin').stat().st_size == m.head_bytes
    assert m.bytes == N * m.layout.bytes + m.head_bytes


def test_the_most_of_1000_classes_take_110_bytes():
    layout = Layout.of(Outputs(logits(2, 1000)), Store.of('pca'))
    assert (layout.bytes, layout.shapes_of_head['weight'], layout.kind) == (110, (1000, 64), 'pca')


def test_with_few_samples_nothing_is_lost(tmp_path):
    "As many components as samples span their logits"
    t = logits(8)
    got = written(tmp_path, dict(components=K, dtype='float32'), t).outputs(range(8)).logits
    torch.testing.assert_close(got, t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('offset', [0.0, 3000.0])
def test_a_number_that_all_logits_share_does_not_matter(offset, tmp_path):
    t = T + offset
    got = written(tmp_path, t=t).outputs(range(N)).logits
    assert (got - by_numpy(t, measured(t))).abs().max() < 0.02 * (T.max() - T.min())


def test_a_teacher_in_bfloat16(tmp_path):
    class Half(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    got = written(tmp_path, dict(components=K, dtype='float32'), teacher=Teacher(Half()))
    t = T.bfloat16().float()
    near = (got.outputs(range(N)).logits - by_numpy(t, measured(t))).abs()
    # classes with the same logit may take each other's place among the ten
    assert (near < 1e-3).float().mean() > 0.999


# the option


@pytest.mark.parametrize(
    'given,components,dtype',
    [
        ('pca', 64, 'int8'),
        (dict(components=9), 9, 'int8'),
        (dict(kind='pca', dtype='float16'), 64, 'float16'),
    ],
    ids=str,
)
def test_the_option_store(given, components, dtype):
    store = Store.of(given)
    assert (store.kind, store.components, store.dtype) == ('pca', components, dtype)


@pytest.mark.parametrize(
    'given,match',
    [
        (dict(components=0), 'components=0: must be a whole number from 1 to 255'),
        (dict(components=256), 'components=256: must be a whole number from 1 to 255'),
        (dict(components=9, topk=3), "topk, components can't be combined"),
        (dict(kind='hidden', components=9), "kind='hidden' and components can't be combined"),
    ],
    ids=str,
)
def test_a_wrong_option_says_what_is_possible(given, match):
    with pytest.raises(DistillError, match=re.escape(match)):
        Store.of(given)


@pytest.mark.parametrize(
    't,match',
    [
        (torch.randn(4, 35), 'needs at least 36 classes to save space, but the teacher has 35'),
        (torch.randn(4, 9, 50), r'needs one prediction for each sample, .* shape \(4, 9, 50\)'),
        (torch.randn(4, 50, 5, 5), r'needs one prediction for each sample, .* shape \(4, 50, 5, 5'),
        (torch.randn(4), r'needs one prediction for each sample, .* shape \(4,\)'),
        (
            torch.randn(4, 50).index_fill(1, torch.tensor(3), -torch.inf),
            'represent infinite logits',
        ),
        (torch.randn(4, 50) * torch.nan, 'nan'),
    ],
    ids=['few classes', 'tokens', 'map', 'a number', 'infinite', 'nan'],
)
def test_unsuited_outputs_are_refused_with_the_reason(t, match, tmp_path):
    with pytest.raises(DistillError, match=match):
        written(tmp_path, t=t)
    assert not (tmp_path / 'manifest.json').exists()


@pytest.mark.parametrize('kind', ['sigmoid', 'regression'])
def test_labels_and_numbers_are_refused(kind, tmp_path):
    with pytest.raises(DistillError, match=f"kind='pca' .* predicts {kind} outputs"):
        written(tmp_path, teacher=Teacher(nn.Identity(), kind=kind))


def test_a_teacher_of_the_likeliest_classes_is_refused():
    values, ids = T.log_softmax(1).topk(20)
    with pytest.raises(DistillError, match='needs the logits of all classes'):
        Layout.of(Outputs(TopK(ids, values, C)), Store.of(dict(components=K)))


# training


@pytest.mark.parametrize('recipe', [None, kd(T=4), Term(losses.mse), Term(losses.rkd)], ids=str)
def test_every_loss_gets_the_logits(recipe, tmp_path):
    cache = written(tmp_path, dict(components=64, dtype='float32'))
    s, y = torch.randn(32, C, generator=torch.Generator().manual_seed(2)), torch.arange(32)
    values = []
    for t in (cache.outputs(range(32)), Outputs(T[:32])):  # 64 components lose nothing of rank 60
        d = Distiller(nn.Identity(), None, recipe, kind='softmax', check=False)
        values.append(d.compute(Outputs(s), t, nn.functional.cross_entropy(s, y), (y,)).total)
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


def test_training_says_how_much_is_lost(tmp_path):
    stored = written(tmp_path, dict(components=2)).outputs(range(64))
    s, y = torch.randn(64, C), torch.arange(64)
    text = (
        r'The cache stores approximate logits, and dist uses them at T=4: .* correlations of its '
        r'outputs fall by 0.\d\d, measured when the cache was written'
    )
    with pytest.warns(DistillWarning, match=text):
        d = Distiller(None, None, Term(losses.dist, T=4))
        d.compute(Outputs(s), stored, nn.functional.cross_entropy(s, y), (y,))


def test_a_bad_choice_for_a_named_recipe_warns_when_it_is_written(tmp_path):
    with pytest.warns(DistillWarning, match=r'2 components, int8 is not suitable for dist:'):
        written(tmp_path, dict(components=2), recipe=Term(losses.dist, T=4))


# the choice


def test_the_loss_is_measured_on_samples_that_the_components_do_not_know(tmp_path):
    lost = {o['T']: o['kl'] for o in written(tmp_path).manifest.lost}
    log_p, few = (measured() / 4).log_softmax(1), measured()
    kl = lambda got: float((log_p.exp() * (log_p - (got / 4).log_softmax(1))).sum(1).mean())
    want, fold = torch.empty_like(few), np.arange(256) % 4
    for i in range(4):
        want[fold == i] = by_numpy(few[fold == i], few[fold != i])
    assert lost[4.0] == pytest.approx(kl(want), rel=0.02)
    assert lost[4.0] > 1.05 * kl(by_numpy(few, few))


@pytest.fixture
def auto(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store_choice, 'TINY', 0)
    monkeypatch.setattr(store_choice, 'SMALL', 0)

    def table(t, **options):
        cache = written(tmp_path, 'auto', t, **options)
        return cache.manifest.layout.kind, capsys.readouterr().out

    return table


def test_auto_takes_it_where_it_loses_little(auto):
    kind, out = auto(logits(4000, rank=40), recipe=kd(T=4))
    assert re.search(r'64 components, int8 +110 ', out)
    assert 'fastdistill: 64 components, int8 (the same as store=dict(components=64))' in out
    assert kind == 'pca'


def test_auto_takes_nothing_that_loses_much(auto):
    kind, out = auto(torch.randn(500, C) * 2, recipe=kd(T=4))
    assert re.search(r'64 components, int8 +110 ', out)
    assert kind == 'logits'


def test_auto_leaves_it_out_with_few_classes(auto):
    assert 'components' not in auto(logits(300, 191))[1]


def test_auto_keeps_it(tmp_path, capsys):
    first = written(tmp_path)
    assert written(tmp_path, 'auto').manifest == first.manifest


# the files


class Killed(Exception):
    pass


def killed(path, after=0, **options):
    def stop(done, total, size):
        if done > after:
            raise Killed

    with pytest.raises(Killed):
        written(path, progress=stop, **options)


def test_an_interrupted_writer_continues_with_the_stored_components(tmp_path):
    "A different machine may compute them with different signs"
    killed(tmp_path)
    file, manifest = tmp_path / 'head.bin', tmp_path / 'manifest.json'
    head = np.frombuffer(file.read_bytes(), '<f4').copy()
    head[: C * K] *= -1
    file.write_bytes(head.tobytes())
    d = json.loads(manifest.read_text())
    from fastdistill.cache.digests import checksum

    d['shards'][0]['checksum'] = checksum(head.tobytes())
    write_manifest(tmp_path, d)
    cache = written(tmp_path).check()
    assert file.read_bytes() == head.tobytes()
    far = (cache.outputs(range(N)).logits - by_numpy(T, measured())).abs().max()
    assert far < 0.02 * (T.max() - T.min())


def test_views_are_added_with_the_same_components(tmp_path):
    class Noisy(TensorDataset):
        def __getitem__(self, i):
            return (self.tensors[0][i] + torch.randn(C),)

    options = dict(keys=range(N), store=dict(components=K), progress=False)
    a = cache_dataset(SAME, Noisy(T), tmp_path, views=1, **options)
    rows, head = a.rows(range(N)), (tmp_path / 'head.bin').read_bytes()
    b = cache_dataset(SAME, Noisy(T), tmp_path, views=2, **options).check()
    assert (tmp_path / 'head.bin').read_bytes() == head
    assert np.array_equal(b.rows(range(N)), rows)
    ids = T.topk(1).indices
    for view in (0, 1):
        got = b.outputs(range(N), view).logits
        assert (got.gather(1, ids) - T.gather(1, ids)).abs().max() < 6
        assert np.corrcoef(got.flatten(), T.flatten())[0, 1] > 0.9


def test_another_function_with_the_same_weights_is_noticed(tmp_path):
    class Shifted(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return x.roll(self.by, 1)

    rows = written(tmp_path, teacher=Teacher(Shifted(0))).rows(range(N))
    assert np.array_equal(written(tmp_path, teacher=Teacher(Shifted(0))).rows(range(N)), rows)
    with pytest.raises(DistillError, match="teacher's outputs for the first samples: they differ"):
        written(tmp_path, teacher=Teacher(Shifted(1)))


def damages(file):
    "How a file may be wrong: {name: fn() that damages it}"
    whole = file.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    return dict(
        changed=lambda: file.write_bytes(flipped),
        short=lambda: file.write_bytes(whole[:-4]),
        missing=file.unlink,
    ), lambda: file.write_bytes(whole)


def contents(path):
    return {p.name: p.read_bytes() for p in path.rglob('*') if p.is_file() and p.suffix != '.lock'}


@pytest.mark.parametrize('store', [dict(components=K), 'hidden'], ids=str)
@pytest.mark.parametrize('how', ['changed', 'short', 'missing'])
def test_a_damaged_file_of_components_is_named_and_rewritten(how, store, tmp_path):
    torch.manual_seed(0)
    teacher = Teacher(nn.Linear(C, C)) if store == 'hidden' else SAME
    path, part = tmp_path / 'whole', tmp_path / 'part'
    cache = written(path, store, teacher=teacher)
    want, whole = cache.rows(range(N)), contents(path)
    harm, _ = damages(path / 'head.bin')
    harm[how]()
    with pytest.raises(DistillError, match='Damaged files in .*head.bin'):
        TeacherCache(path).check()
    with pytest.raises(DistillError, match='Damaged files in .*head.bin'):
        TeacherCache(path).outputs(range(3))
    # a different teacher can't restore it, and changes nothing
    before = contents(path)
    with pytest.raises(DistillError, match="doesn't fit|head.bin of .* is missing or damaged"):
        written(path, store, teacher=Teacher(nn.Linear(C, C)))
    assert contents(path) == before
    assert np.array_equal(written(path, store, teacher=teacher).check().rows(range(N)), want)
    assert contents(path) == whole
    assert contents(path)['head.bin'] != before.get('head.bin')
    # the same while it is written
    killed(part, store=store, teacher=teacher)
    harm, _ = damages(part / 'head.bin')
    harm[how]()
    assert np.array_equal(written(part, store, teacher=teacher).check().rows(range(N)), want)


@pytest.mark.parametrize(
    'change,match',
    [
        (lambda d: d['fields'].pop(), 'layout.fields.4. is missing'),
        (lambda d: d.update(n=30), 'needs at least 36 classes'),
        (lambda d: d.update(n=None), 'layout.head and layout.draws need layout.n'),
        (lambda d: d.update(axis=0), 'needs one prediction for each sample'),
        (lambda d: d['fields'][0].update(shape=[]), 'layout.head needs'),
        (lambda d: d.pop('head'), "it needs fields 'ids' and 'values'"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(change, match, tmp_path):
    written(tmp_path)
    file = tmp_path / 'manifest.json'
    d = json.loads(file.read_text())
    change(d['layout'])
    write_manifest(tmp_path, d)
    with pytest.raises(DistillError, match=match):
        TeacherCache(tmp_path)


def test_classes_that_do_not_exist_are_refused(tmp_path):
    from fastdistill.cache.digests import checksum

    written(tmp_path)
    file, manifest = tmp_path / 'view000' / '000000.bin', tmp_path / 'manifest.json'
    rows = bytearray(file.read_bytes())
    rows[K + 8 : K + 10] = (C).to_bytes(2, 'little')
    file.write_bytes(rows)
    d = json.loads(manifest.read_text())
    own = next(o for o in d['shards'] if o['name'] == 'view000/000000.bin')
    own['checksum'] = checksum(bytes(rows))
    write_manifest(tmp_path, d)
    with pytest.raises(DistillError, match=f'class numbers that are not below layout.n={C}'):
        TeacherCache(tmp_path).check()


def test_it_can_be_packed(tmp_path):
    a = written(tmp_path / 'a')
    pack_cache(a, tmp_path / 'a.zip')
    b = unpack_cache(tmp_path / 'a.zip', tmp_path / 'b')
    assert torch.equal(a.outputs(range(N)).logits, b.outputs(range(N)).logits)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path)
        pack_cache(a, tmp_path / 'folder')
    text = (tmp_path / 'folder' / 'README.md').read_text()
    assert f'| components | {K}, from which the logits of {C} classes are approximated |' in text


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_it_can_be_read_over_http(tmp_path):
    pytest.importorskip('aiohttp')
    want = written(tmp_path).outputs(range(N)).logits
    handler = functools.partial(Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            cache = TeacherCache(f'http://127.0.0.1:{server.server_port}')
            assert torch.equal(cache.outputs(range(N)).logits, want)
        finally:
            server.shutdown()
            thread.join()


# streams


def batches(ids, bs=20):
    for i in range(0, len(ids), bs):
        at = list(ids[i : i + bs])
        yield dict(key=at, inputs=T[at])


def started(path, n=100):
    return start_stream(path, SAME, dict(key=list(range(n)), inputs=T[:n]), dict(components=K))


def test_streams(tmp_path):
    rows = started(tmp_path)
    write_stream(batches(range(150)), rows, 'a', part_bytes=2000)
    # a different process
    write_stream(batches(range(150, N)), TeacherRows(tmp_path, SAME), 'b')
    cache = seal_stream(tmp_path, keys=range(N)).check()
    want = by_numpy(T, T[:100])
    assert cache.manifest.lost
    assert (cache.outputs(range(N)).logits - want).abs().max() < 0.02 * (T.max() - T.min())
    stream = [dict(key=i, x=i) for i in (7, 250, 3)]
    for o in StreamJoin(stream, cache, 'key'):
        got = cache.decode(o['teacher'][None]).logits[0]
        assert (got - want[o['x']]).abs().max() < 0.02 * (T.max() - T.min())


def test_a_small_example_of_a_stream_is_refused(tmp_path):
    with pytest.raises(DistillError, match=r'example=, which has 12 samples: pass more than 12'):
        started(tmp_path, 12)
    assert not (tmp_path / 'manifest.json').exists()


@pytest.mark.parametrize('how', ['changed', 'short', 'missing'])
def test_damaged_components_of_a_stream_are_named_and_nothing_is_lost(how, tmp_path):
    rows = started(tmp_path)
    write_stream(batches(range(150)), rows, 'a')
    harm, restore = damages(tmp_path / 'head.bin')
    harm[how]()
    before = contents(tmp_path)
    for do in (lambda: TeacherRows(tmp_path, SAME), lambda: seal_stream(tmp_path)):
        with pytest.raises(
            DistillError, match='head.bin of .*, the components, .*: restore it, or start a new'
        ):
            do()
    assert contents(tmp_path) == before
    restore()
    write_stream(batches(range(150, N)), TeacherRows(tmp_path, SAME), 'b')
    assert len(seal_stream(tmp_path).check()) == N
