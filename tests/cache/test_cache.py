"Stored teacher outputs: the right row for each sample, whatever happens to the writer, the files and the order."

import hashlib, json, math, multiprocessing, os, pickle, random, re, resource, shutil, time
from functools import partial
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset
import torch.nn.functional as F
import writers
from manifests import write_manifest
from fastdistill.cache import (
    Layout,
    Replayed,
    Source,
    TeacherCache,
    Store,
    cache_dataset,
    write_cache,
    writer,
)
from fastdistill.cache.sample_files import changed_files, dataset_files, files_of
from fastdistill.cache.file_store import Folder
from fastdistill.cache.keys import dataset_keys, key_of
from fastdistill.cache.digests import file_checksum, fingerprint
from fastdistill.cache.manifest import Manifest
from fastdistill.cache.reader import is_cache
from fastdistill.cache.teacher_description import distinct_views
from fastdistill.cache.write_progress import shown_progress
from fastdistill.losses import kl
from fastdistill.base.outputs import DistillError, DistillWarning, Outputs, TopK
from fastdistill.teachers import Teacher

# a row


def changed_now(cache, files):
    return changed_files(cache.folder, len(cache), files)


def logits(*shape, seed=0, scale=4.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def through(out, **wish):
    lay = Layout.of(out, Store(**wish))
    rows = lay.encode(out)
    assert rows.dtype == np.uint8 and rows.shape == (len(out.logits), lay.bytes)
    again = Layout.from_json(json.loads(json.dumps(lay.to_json())))
    assert again == lay
    return again.decode(torch.from_numpy(rows)), lay


@pytest.mark.parametrize('shape', [(6, 5), (1, 3), (4, 3, 6, 7), (3, 9, 11), (5, 1), (7,)], ids=str)
def test_rows_hold_logits_of_any_shape(shape):
    x = logits(*shape)
    got, _ = through(Outputs(x), dtype='float32')
    assert torch.equal(got.logits, x) and got.mask is None and not got.feats
    got, _ = through(Outputs(x), dtype='float16')
    assert torch.equal(got.logits, x.half().float())
    got, _ = through(Outputs(x), dtype='int8')
    flat = x.reshape(len(x), -1)
    step = (flat.amax(1) - flat.amin(1)) / 254
    assert ((got.logits.reshape(len(x), -1) - flat).abs() <= step[:, None] * 0.5001 + 1e-6).all()


def test_int8_holds_the_smallest_and_the_largest_value_of_a_row_exactly(tmp_path):
    "254 steps lie between -127 and 127; with 255 of them, both ends would be rounded"
    x = logits(9, 40)
    cache = cache_dataset(
        Teacher(torch.nn.Identity()),
        TensorDataset(x),
        tmp_path,
        views=0,
        store=dict(dtype='int8'),
        progress=False,
    )
    got = cache.outputs(range(9)).logits
    torch.testing.assert_close(got.amax(1), x.amax(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.amin(1), x.amin(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('store', [dict(dtype='int8'), dict(topk=4, dtype='int8')])
def test_a_masked_class_that_makes_int8_useless_is_reported(tmp_path, store):
    "One logit of -10,000 leaves steps of 39 for all others, so the teacher's classes are lost"
    x = logits(9, 4)
    options = dict(views=0, store=store, progress=False)
    cache_dataset(Teacher(torch.nn.Identity()), TensorDataset(x), tmp_path / 'fine', **options)
    x[5, 2] = -1e4
    with pytest.warns(DistillWarning, match="int8 stores .* in steps of 39.*dtype='float16'"):
        cache_dataset(Teacher(torch.nn.Identity()), TensorDataset(x), tmp_path / 'bad', **options)


@pytest.mark.parametrize('store', ['auto', 'float16', 'logits'])
@pytest.mark.parametrize('shape', [(9, 4), (9, 4, 3, 2)], ids=str)
@pytest.mark.parametrize('offset', [3e4, -3e4])
def test_a_large_number_that_all_logits_share_is_reported(tmp_path, store, shape, offset):
    "float16 has steps of 16 there, so the teacher's classes are lost"
    x = logits(*shape)
    x[3, 2] = -3e4  # a class that is masked out: the others keep their precision
    options = dict(views=0, store=store, progress=False)
    cache_dataset(Teacher(torch.nn.Identity()), TensorDataset(x), tmp_path / 'fine', **options)
    x[5] += offset
    with pytest.warns(DistillWarning, match="float16 stores .* in steps of 16.*dtype='float32'"):
        cache_dataset(Teacher(torch.nn.Identity()), TensorDataset(x), tmp_path / 'bad', **options)
    options['store'] = 'float32'
    cache_dataset(Teacher(torch.nn.Identity()), TensorDataset(x), tmp_path / 'exact', **options)


def test_rows_hold_layers_and_masks():
    out = Outputs(
        logits(4, 3),
        {'a.scale': logits(4, 2, 5, seed=1), 'b': logits(4, 1, seed=2)},
        torch.tensor([[1, 0, 0.5]] * 4),
    )
    for dtype, tol in dict(float32=0, float16=2e-3, int8=0.1).items():
        got, _ = through(out, dtype=dtype)
        assert list(got.feats) == ['a.scale', 'b'] and torch.equal(got.mask, out.mask)
        for a, b in [(got.logits, out.logits), *((got.feats[k], out.feats[k]) for k in out.feats)]:
            torch.testing.assert_close(a, b, rtol=0, atol=tol * b.abs().max().item())


@pytest.mark.parametrize(
    'n,dtype,size',
    [(1000, 'float16', 42), (1000, 'int8', 36), (100, 'float16', 32), (10**5, 'float32', 82)],
)
def test_few_classes_of_many_take_few_bytes(n, dtype, size):
    x = logits(7, n)
    got, lay = through(Outputs(x), topk=10, dtype=dtype)
    lp, ids = x.log_softmax(1).topk(10)
    assert lay.bytes == size and torch.equal(got.logits.ids, ids) and got.logits.n == n
    torch.testing.assert_close(
        got.logits.values, lp, rtol=0, atol=dict(float32=1e-6, float16=4e-3, int8=0.03)[dtype]
    )
    others = [
        [v for i, v in enumerate(row) if i not in top]
        for row, top in zip(x.log_softmax(1).tolist(), ids.tolist())
    ]
    want = torch.tensor([[sum(o) / len(o)] for o in others])
    torch.testing.assert_close(got.logits.rest.float(), want, rtol=1e-3, atol=0)
    assert through(Outputs(x), topk=10, dtype=dtype, tail='uniform')[1].bytes == size - 2


def test_few_classes_of_maps_and_tokens():
    for shape, axis in [((2, 9, 3, 4), 1), ((2, 5, 9), -1)]:
        x = logits(*shape)
        got, _ = through(Outputs(x), topk=4, dtype='float32', axis=axis)
        d = got.logits.dense()
        assert d.shape == x.shape
        top = x.topk(4, axis).indices
        torch.testing.assert_close(d.gather(axis, top), x.log_softmax(axis).gather(axis, top))


def test_maps_can_be_stored_smaller():
    x = logits(2, 3, 8, 8)
    got, lay = through(Outputs(x), size=4, dtype='float32')
    assert lay.bytes == 3 * 16 * 4 and got.logits.shape == x.shape
    small = x.view(2, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(got.logits, F.interpolate(small, (8, 8), mode='bilinear'))
    flat = torch.full((1, 2, 8, 8), 3.0)
    assert torch.equal(through(Outputs(flat), size=(2, 4))[0].logits, flat)


@pytest.mark.parametrize(
    'out,wish,match',
    [
        (Outputs(torch.tensor([[1.0, float('nan')]])), {}, 'logits contain nan or inf'),
        (Outputs(torch.tensor([[1.0, float('inf')]])), {}, 'logits contain nan or inf'),
        (
            Outputs(torch.tensor([[1.0, -float('inf')]])),
            dict(dtype='int8'),
            "int8 can't store infinite",
        ),
        (Outputs(torch.tensor([[1.0, 1e5]])), {}, 'exceed 65504, the largest float16 number'),
        *[
            (Outputs(torch.full((1, 2), -float('inf'))), store, 'are -inf for all classes')
            for store in (dict(dtype='float32'), dict(topk=1), dict(draws=5))
        ],
        (Outputs(logits(1, 2), mask=torch.tensor([[float('nan')]])), {}, 'mask contains nan'),
        (
            Outputs(torch.tensor([[[[1.0, -float('inf')]], [[2.0, 1.0]]]])),
            dict(size=(1, 1)),
            "maps have -inf .* can't be averaged: omit size=",
        ),
        (Outputs(logits(2, 5)), dict(topk=6), 'topk=6, but the teacher has 5 classes'),
        (Outputs(logits(2, 5)), dict(size=4), r'size=\(4, 4\) needs maps'),
        (Outputs(None), {}, 'no logits'),
        (Outputs(logits(2, 5), {'a': 'text'}), {}, 'Layer a returns a str'),
    ],
)
def test_what_a_row_cannot_hold_is_refused(out, wish, match):
    with pytest.raises(DistillError, match=match):
        through(out, **wish)


def test_wrong_wishes_are_refused():
    for kw, match in [
        (dict(dtype='int4'), "must be one of 'float32'"),
        (dict(tail='x'), "must be one of 'mean'"),
        (dict(topk=0), 'one'),
    ]:
        with pytest.raises(DistillError, match=match):
            Store(**kw)


@pytest.mark.parametrize(
    'answer, n',
    [(lambda x: x[:1], 1), (lambda x: torch.cat([x, x[:1]]), 5)],
    ids=['one', 'one more'],
)
def test_a_teacher_that_returns_another_number_of_outputs_is_refused(tmp_path, answer, n):
    "One output would be stored for each sample of the batch, and one more than needed would be dropped"

    def run(tasks, bs):
        for at in np.split(tasks, range(bs, len(tasks), bs)):
            x = torch.tensor(at)[:, None] * torch.ones(3)
            yield Outputs(x if len(at) == 1 else answer(x))

    source = Source(np.arange(12, dtype=np.uint64), run, 4, dict(name='t', weights='w'), {})
    with pytest.raises(
        DistillError,
        match=f'The teacher returned {n} outputs for 4 samples: it must return one for each',
    ):
        write_cache(tmp_path, source, Store(dtype='float32'), views=0)


def test_rows_of_one_cache_are_alike():
    lay = Layout.of(Outputs(logits(2, 5)), Store())
    with pytest.raises(
        DistillError, match=r'shape \(6,\) in this batch, but \(5,\) in the first batch'
    ):
        lay.encode(Outputs(logits(2, 6)))
    with pytest.raises(DistillError, match='have no feats:a in this batch'):
        Layout.of(Outputs(logits(2, 5), {'a': logits(2, 1)}), Store()).encode(Outputs(logits(2, 5)))


# the classes that were not kept


def rest_by_hand(t, k, tail, s):
    "Probabilities of one sample in plain Python: the k largest as they are, the others by the policy"
    top = sorted(range(len(t)), key=lambda i: -t[i])[:k]
    kept, n = sum(t[i] for i in top), len(t)
    if tail == 'zero':
        return [t[i] / kept if i in top else 0.0 for i in range(n)]
    if tail == 'uniform':
        return [t[i] if i in top else (1 - kept) / (n - k) for i in range(n)]
    if tail == 'mean':
        even = math.prod(t[i] for i in range(n) if i not in top) ** (
            1 / max(n - k, 1)
        )  # of logarithms, so geometric
        return [o / (kept + (n - k) * even) for o in (t[i] if i in top else even for i in range(n))]
    free = sum(s[i] for i in range(n) if i not in top)
    return [t[i] if i in top else (1 - kept) * s[i] / free for i in range(n)]


@pytest.mark.parametrize('tail', ['mean', 'uniform', 'zero', 'bucket'])
@pytest.mark.parametrize('k', [1, 3, 6])
def test_dense_shares_the_rest_by_the_policy(tail, k):
    t, s = logits(5, 6).double(), logits(5, 6, seed=1).double()
    v, ids = t.log_softmax(1).topk(k)
    top = through(Outputs(t.float()), topk=k, tail=tail, dtype='float32')[0].logits
    torch.testing.assert_close(top.values, v.float())
    got = replace(top, rest=None if top.rest is None else exact_rest(t, ids)).dense(s).double()
    assert tail == 'mean' or (got.exp().sum(1) - 1).abs().max() < 1e-6
    got = got.softmax(1)
    want = [
        rest_by_hand(a, k, tail, b) for a, b in zip(t.softmax(1).tolist(), s.softmax(1).tolist())
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert not got.isnan().any()


def exact_rest(t, ids):
    "Not rounded to half precision, as it is stored"
    return t.log_softmax(1).scatter(1, ids, 0.0).sum(1, keepdim=True) / (t.shape[1] - ids.shape[1])


def test_the_mean_of_the_rest_leaves_out_what_is_switched_off():
    x = torch.tensor(
        [[3.0, 2.0, 1.0, -torch.inf, 0.0], [1.0, 0.0, -torch.inf, -torch.inf, -torch.inf]]
    )
    top = through(Outputs(x), topk=2, dtype='float32')[0].logits
    lp = x.log_softmax(1)
    torch.testing.assert_close(top.rest[0, 0].float(), (lp[0, 2] + lp[0, 4]) / 2, rtol=1e-3, atol=0)
    assert top.rest[1] == -65504 and not top.dense().softmax(1).isnan().any()
    with pytest.raises(DistillError, match='needs rest='):
        TopK(top.ids, top.values, 5, 'mean')


def test_at_high_temperatures_the_mean_gives_the_kept_classes_the_gradient_of_all_logits():
    "There KL compares logits with their mean taken off (arXiv:1503.02531, section 2.1), and only this policy keeps that mean"
    t, s = 8 * logits(20, 50), logits(20, 50, seed=1).requires_grad_()

    def gradient(t):
        (g,) = torch.autograd.grad(kl(s, t, T=1000.0), s)
        return g.gather(1, ids)

    ids = t.topk(10).indices
    full, *got = [
        gradient(o)
        for o in (
            t,
            *(
                through(Outputs(t), topk=10, dtype='float32', tail=k)[0].logits.dense()
                for k in ('mean', 'uniform')
            ),
        )
    ]
    far = [(o - full).abs().max() / full.abs().max() for o in got]
    assert far[0] < 0.01 < 0.1 < far[1]


def test_bucket_is_the_kl_over_k_plus_one_outcomes_and_so_is_its_gradient():
    t, s = logits(5, 8).double(), logits(5, 8, seed=1).double().requires_grad_()
    v, ids = t.log_softmax(1).topk(3)
    ours = kl(s, TopK(ids, v, 8, 'bucket').dense(s), T=1.0)
    q, p = s.softmax(1).gather(1, ids), v.exp()
    both = [torch.cat([o, 1 - o.sum(1, keepdim=True)], 1) for o in (p, q)]
    hand = (both[0] * (both[0].log() - both[1].log())).sum(1).mean()
    torch.testing.assert_close(ours, hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *[torch.autograd.grad(o, s, retain_graph=True)[0] for o in (ours, hand)],
        rtol=1e-4,
        atol=1e-6,
    )


def test_dense_stays_finite_at_the_edges():
    sure = torch.tensor([[0.0, -30.0]])
    for tail in ('uniform', 'zero'):
        d = TopK(torch.tensor([[2, 0]]), sure, 4, tail).dense()
        assert not d.isnan().any() and d[0, 2] == pytest.approx(0, abs=1e-6)
    over = TopK(
        torch.tensor([[2, 0]]), torch.tensor([[-0.0001, -7.0]]), 4
    ).dense()  # rounding: more than 1 together
    assert over.isfinite().all()
    with pytest.raises(DistillError, match="needs the student's logits"):
        TopK(torch.tensor([[2]]), torch.tensor([[-0.1]]), 4, 'bucket').dense()
    with pytest.raises(DistillError, match="must be one of 'mean'"):
        TopK(torch.tensor([[2]]), torch.tensor([[-0.1]]), 4, 'even')


def test_classes_can_be_put_in_another_order():
    t, order = logits(3, 5), torch.tensor([4, 0, 3, 1, 2])
    v, ids = t.log_softmax(1).topk(2)
    top = TopK(ids, v, 5)
    torch.testing.assert_close(top.reorder(order).dense(), top.dense()[:, order])


# names of samples

Point = namedtuple('Point', 'x y')


def test_keys_are_the_same_everywhere():
    names = [
        (Path('/data/a/cat.jpg'), '/data'),
        (Path('/elsewhere/b/a/cat.jpg'), '/elsewhere/b/'),
        (Path('a/cat.jpg'), ''),
    ]
    assert len({key_of(*o) for o in names}) == 1
    assert key_of('/data2/cat.jpg', '/data') != key_of('2/cat.jpg', '/data')
    h = hashlib.blake2b(digest_size=8)
    for p in (b'str', b'cat.jpg'):
        h.update(len(p).to_bytes(8, 'little') + p)
    assert key_of('cat.jpg') == int.from_bytes(h.digest(), 'little')


def test_different_things_have_different_keys():
    im = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    things = [
        '1',
        1,
        1.0,
        True,
        None,
        b'1',
        ('1',),
        ['1', '1'],
        ('1', ('1',)),
        (('1', '1'),),
        {'a': 1},
        {'b': 1},
        {'a': '1'},
        Path('1'),
        np.array([1, 2]),
        np.array([1.0, 2.0]),
        np.array([[1, 2]]),
        torch.tensor([2, 1]),
        im,
        im.rotate(90),
        Point(1, 2),
        '',
        (),
    ]
    keys = [key_of(o) for o in things]
    assert len(set(keys)) == len(things)
    assert keys == [key_of(o) for o in things]
    assert key_of({0, 8}) == key_of({8, 0}) != key_of({0, 9})
    assert key_of(np.int64(1)) == key_of(1) and key_of(torch.tensor([1, 2])) == key_of(
        np.array([1, 2])
    )


def test_samples_are_known_by_what_tells_them_apart():
    class Files:
        pass

    def keys(samples):
        d = Files()
        d.samples = samples
        type(d).__len__ = lambda self: len(self.samples)
        return dataset_keys(d)

    assert len(set(keys(['cat/1', 'cat/2', 'dog/1']).tolist())) == 3
    assert (
        len(set(keys([('cat', 'cat/1'), ('cat', 'cat/2')]).tolist())) == 1
    )  # (path, label), as torchvision has them
    assert len(set(keys([(0, 'cat/1'), (0, 'cat/2')]).tolist())) == 2
    assert len(dataset_keys(TensorDataset(torch.randn(4, 2).bfloat16()))) == 4


def test_a_part_of_a_folder_has_the_names_of_the_whole(tmp_path):
    class Folder:
        def __init__(self, root):
            self.root, self.samples = root, [(f'{root}/{i}.jpg', 0) for i in range(4)]

        def __len__(self):
            return 4

    whole = dataset_keys(Folder('/data/set'))
    assert np.array_equal(dataset_keys(Subset(Folder('/data/set'), [2, 0])), whole[[2, 0]])
    assert np.array_equal(dataset_keys(Folder('./set')), whole) and np.array_equal(
        dataset_keys(Folder('elsewhere/')), whole
    )


def test_the_names_of_a_whole_dataset_are_read_once_for_a_part_of_it():
    class Folder:
        reads = 0

        @property
        def samples(self):
            self.reads += 1
            return [(f'{i}.jpg', 0) for i in range(9)]

    whole = Folder()
    assert dataset_keys(Subset(whole, range(5))).tolist() == [key_of(f'{i}.jpg') for i in range(5)]
    assert whole.reads <= 2  # once to find out that it has samples


def test_plain_datasets_tell_their_keys_or_are_asked():
    x = torch.arange(12.0).view(6, 2)
    a, b = dataset_keys(TensorDataset(x)), dataset_keys(TensorDataset(x[[3, 1, 0]]))
    assert (
        len(set(a)) == 6
        and b.tolist()
        == a[[3, 1, 0]].tolist()
        == dataset_keys(Subset(TensorDataset(x), [3, 1, 0])).tolist()
    )

    class Folder:
        root, samples = '/data', [('/data/a.png', 0), ('/data/b.png', 1)]

        def __len__(self):
            return 2

    assert dataset_keys(Folder()).tolist() == [key_of('a.png'), key_of('b.png')]

    class Unknown:
        def __len__(self):
            return 2

    with pytest.raises(
        DistillError, match='The samples of a Unknown have no known names: pass keys='
    ):
        dataset_keys(Unknown())
    with pytest.raises(DistillError, match='3 keys for 2 samples'):
        dataset_keys(Unknown(), 'abc')
    with pytest.raises(DistillError, match='A object does not identify a sample'):
        dataset_keys(Unknown(), [object(), object()])
    assert dataset_keys(Unknown(), lambda i: f'id{i}').tolist() == [key_of('id0'), key_of('id1')]


# reading


def make(
    path, n=23, c=4, views=2, bs=3, shard=5, transforms=None, vocab=None, files=None, **kwargs
):
    "A cache whose views are all alike, and the outputs that are in it"
    x, w = logits(n, 3, scale=1.0), logits(3, c, seed=1, scale=1.0)

    def run(tasks, bs):
        for i in range(0, len(tasks), bs):
            yield Outputs(x[tasks[i : i + bs] % n] @ w)

    source = Source(
        dataset_keys(TensorDataset(x)),
        run,
        bs,
        dict(name='t', weights='w'),
        transforms or {},
        vocab=vocab,
        files=files,
    )
    return write_cache(
        path, source, Store(dtype='float32'), views=views, shard_bytes=shard * c * 4, **kwargs
    ), x @ w


def test_any_rows_in_any_order(tmp_path):
    cache, want = make(tmp_path)
    assert cache.manifest.shard_rows == 3 and len(cache.manifest.shards) == 1 + 2 * 8
    g = np.random.default_rng(0)
    at, view = g.integers(0, 23, 60), g.integers(0, 2, 60)
    torch.testing.assert_close(cache.outputs(at, view).logits, want[at])
    assert cache.rows([], 0).shape == (0, 16)
    with pytest.raises(DistillError, match='the cache has 23 samples and 2 views'):
        cache.rows([23])
    with pytest.raises(DistillError, match='the cache has 23 samples and 2 views'):
        cache.rows([0], [2])
    assert all(
        (cache.row(i, v) == cache.rows([i], v)[0]).all() for i, v in ((0, 0), (22, 1), (7, 1))
    )
    for i, v in ((23, 0), (-1, 0), (0, 2)):
        with pytest.raises(
            DistillError, match=f'position {i} with view {v}: the cache has 23 samples'
        ):
            cache.row(i, v)
    assert 'TeacherCache' in repr(cache) and '2 views' in repr(cache)


def test_samples_find_their_rows(tmp_path):
    cache, _ = make(tmp_path)
    g = np.random.default_rng(0)
    order = g.permutation(23)[:9]
    assert cache.find(cache.keys[order]).tolist() == order.tolist() and cache.find(
        cache.keys
    ).tolist() == list(range(23))
    with pytest.raises(
        DistillError, match=r'1 of 2 samples have no row .*\(the first is number 1\)'
    ):
        cache.find([cache.keys[3], 5])


def test_what_is_pickled_is_a_path(tmp_path):
    cache, want = make(tmp_path, n=900, shard=300)
    cache.rows(np.arange(900)), cache.keys
    data = pickle.dumps(cache)
    assert len(data) < 6000
    torch.testing.assert_close(pickle.loads(data).outputs([899, 1]).logits, want[[899, 1]])


def test_a_cache_of_ten_million_rows_opens_at_once(tmp_path):
    n, layout = 10**7, Layout.of(Outputs(logits(1, 1000)), Store(topk=10))
    m = Manifest(n, 1, 0, layout, 2**20, 64)
    for *_, name, size in m.all_shards():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with open(tmp_path / name, 'wb') as f:
            f.truncate(size)  # sparse: takes no room
    with open(tmp_path / 'keys.bin', 'wb') as f:
        f.truncate(8 * n)
    m.complete = True
    m.shards = [
        dict(name=name, bytes=size, checksum=file_checksum(tmp_path / name))
        for name, size in [
            ('keys.bin', 8 * n),
            *((name, size) for *_, name, size in m.all_shards()),
        ]
    ]
    (tmp_path / 'manifest.json').write_bytes(m.to_json())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    cache = TeacherCache(tmp_path)
    cache.rows([0, n - 1, n // 2])
    took, grown = (
        time.process_time() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    )
    assert took < 1 and grown < 20_000


# broken things


def test_what_is_no_cache_says_so(tmp_path):
    with pytest.raises(DistillError, match='no cache at .*cache_teacher'):
        TeacherCache(tmp_path / 'none')
    cache, _ = make(tmp_path)
    text = json.loads((tmp_path / 'manifest.json').read_text())
    for change, match in [
        (dict(version=9), 'of version 9, which a different version of fastdistill wrote.*again'),
        (dict(format='x'), 'does not belong to a fastdistill cache'),
        (dict(complete=False, shards=[]), 'is not finished'),
    ]:
        write_manifest(tmp_path, {**text, **change})
        with pytest.raises(DistillError, match=match):
            TeacherCache(tmp_path)
    (tmp_path / 'manifest.json').write_text('{"format"')
    with pytest.raises(DistillError, match='manifest.json is damaged'):
        TeacherCache(tmp_path)
    assert pickle.loads(pickle.dumps(cache)).views == 2


def flip(p, at=7):
    b = bytearray(p.read_bytes())
    b[at] ^= 1
    p.write_bytes(b)


def shorten(p):
    p.write_bytes(p.read_bytes()[:-3])


@pytest.mark.parametrize(
    'harm,what',
    [
        (flip, 'differs from what was written'),
        (shorten, 'has 45 bytes instead of 48'),
        (Path.unlink, 'is missing'),
    ],
)
def test_a_damaged_shard_is_named_and_rewritten_alone(tmp_path, harm, what):
    cache, want = make(tmp_path)
    good = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob('*.bin')}
    bad = tmp_path / 'view001/000003.bin'
    harm(bad)
    for look in (
        TeacherCache.check,
        lambda c: c.check(once=True),
        lambda c: c.rows(np.arange(23), 1),
        lambda c: c.row(9, 1),
    ):
        with pytest.raises(DistillError, match=f'Damaged files in .*: view001/000003.bin {what}'):
            look(TeacherCache(tmp_path))
    again, _ = make(tmp_path)
    assert again.check() is again
    for p, (data, when) in good.items():
        assert p.read_bytes() == data and (
            p == bad or p.stat().st_mtime_ns == when or p.name == 'keys.bin'
        )
    torch.testing.assert_close(again.outputs(np.arange(23), 1).logits, want)
    assert not list(tmp_path.rglob('*.json'))[1:]


def test_damaged_keys_are_rewritten(tmp_path):
    cache, _ = make(tmp_path)
    keys = cache.keys.tolist()
    flip(tmp_path / 'keys.bin')
    with pytest.raises(
        DistillError, match='Damaged files in .*: keys.bin differs from what was written'
    ):
        TeacherCache(tmp_path).check()
    assert make(tmp_path)[0].check().keys.tolist() == keys


def test_a_cache_of_something_else_is_refused_and_force_replaces_only_what_is_its_own(tmp_path):
    make(tmp_path)
    (tmp_path / 'mine.txt').write_text('keep me')
    (tmp_path / 'view000' / 'notes.bin').write_text('keep me')
    for kw, match in [
        (dict(views=1), 'views: 2 in the cache, 1 now'),
        (dict(seed=3), 'seed: 0 in the cache, 3 now'),
        (dict(n=22), 'data .count'),
        (dict(c=5), 'layout'),
        (dict(vocab=['a', 'b', 'c', 'd']), 'vocab: None in the cache'),
        (dict(transforms={'crop': '24'}), 'transform crop: none in the cache, 24 now'),
    ]:
        with pytest.raises(DistillError, match=match):
            make(tmp_path, **kw)
    with pytest.warns(DistillWarning, match='views: 2 in the cache, 1 now'):
        cache, want = make(tmp_path, views=1, force=True)
    torch.testing.assert_close(cache.check().outputs(np.arange(23)).logits, want)
    assert (
        (tmp_path / 'mine.txt').exists()
        and (tmp_path / 'view000' / 'notes.bin').exists()
        and not list(tmp_path.glob('view001/*'))
    )


def test_a_begun_cache_with_other_keys_gets_its_own_again(tmp_path):
    class Stop(Exception):
        pass

    def stop(done, *_):
        if done > 10:
            raise Stop

    x = TensorDataset(torch.randn(20, 3))
    write = lambda path, **kw: cache_dataset(
        lambda x: Outputs(x), x, path, views=0, run=dict(bs=4), store=dict(dtype='float32'), **kw
    )
    with pytest.warns(DistillWarning):
        whole = write(tmp_path / 'whole')
    for harm in (
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:-8]),
        lambda p: p.write_bytes(p.read_bytes()[::-1]),
    ):
        path = tmp_path / f'{len(list(tmp_path.iterdir()))}'
        with pytest.warns(DistillWarning), pytest.raises(Stop):
            write(path, progress=stop)
        harm(path / 'keys.bin')
        with pytest.warns(DistillWarning):
            again = write(path)
        assert np.array_equal(again.check().keys, whole.keys)


def test_a_damaged_manifest_says_so_and_force_overwrites_it(tmp_path):
    x = TensorDataset(torch.randn(8, 3))
    write = lambda **kw: cache_dataset(writers.Slow('/dev/null', 0), x, tmp_path, views=0, **kw)
    facts = dict(vocab=tuple('abcd'), transforms={'n': (1, np.int64(2)), 'a': np.arange(2)})
    write(facts=facts)
    assert write(facts=facts).check()  # as JSON keeps them
    good = (tmp_path / 'manifest.json').read_text()
    with pytest.raises(DistillError, match="object can't be stored in a manifest"):
        write(facts=dict(vocab=[object(), *'abc']), force=True)
    assert (tmp_path / 'manifest.json').read_text() == good  # nothing was removed
    for bad in (
        '{',
        '{}',
        good.replace('"layout"', '"lay"'),
        good.replace('"version": 1', '"version": 9'),
    ):
        (tmp_path / 'manifest.json').write_text(bad)
        with pytest.raises(
            DistillError, match='damaged|does not belong to a fastdistill|of version 9'
        ):
            TeacherCache(tmp_path)
        with pytest.raises(DistillError):
            write()
        with pytest.warns(DistillWarning, match='The cache is overwritten'):
            assert write(force=True).check()


def test_an_unknown_option_of_writing_is_named_with_the_allowed_ones(tmp_path):
    data = TensorDataset(torch.randn(4, 3))
    write = partial(cache_dataset, Teacher(seeded_linear(0)), data, tmp_path, views=0)
    loader = "'bs', 'num_workers', 'collate_fn', 'device', 'seed', 'forecast'"
    with pytest.raises(DistillError, match=f"'batch': 4.*: must be a dict with any of {loader}"):
        write(run=dict(batch=4))
    with pytest.raises(DistillError, match="must be a dict with any of 'vocab', 'transforms'"):
        write(facts=['a', 'b'])
    assert not any(tmp_path.iterdir())


def test_an_overwritten_cache_is_not_read_with_the_old_manifest(tmp_path, monkeypatch):
    monkeypatch.setitem(writer.write_cache.__kwdefaults__, 'shard_bytes', 32)
    x = TensorDataset(torch.randn(8, 3))
    write = lambda seed, **kw: cache_dataset(
        Teacher(seeded_linear(seed)), x, tmp_path, views=0, run=dict(bs=2), **kw
    )
    cache = write(0)
    cache.outputs([0])
    with pytest.warns(DistillWarning):
        write(1, force=True)
    with pytest.raises(DistillError, match='was overwritten .* open it again'):
        cache.outputs([7])
    assert len(TeacherCache(tmp_path).outputs([7]).logits) == 1


def test_a_teacher_that_says_nan_is_refused(tmp_path):
    class Nan(writers.Slow):
        def __call__(self, x):
            return Outputs(x * float('nan'))

    with pytest.raises(DistillError, match='contain nan or inf'):
        cache_dataset(Nan('/dev/null', 0), TensorDataset(torch.randn(8, 3)), tmp_path, views=0)


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(DistillError, match='is empty'):
        cache_dataset(writers.Slow('/dev/null', 0), TensorDataset(torch.randn(0, 3)), tmp_path)


def seeded_linear(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 4)


def test_paths_are_where_they_were_when_they_were_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = cache_dataset(
        writers.Slow('/dev/null', 0), TensorDataset(torch.randn(8, 3)), 'c', views=0
    )
    monkeypatch.chdir('/')
    assert cache.outputs([7]).logits.shape == (1, 4)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert len(TeacherCache('~/c')) == 8
    (tmp_path / 'file').write_text('')
    with pytest.raises(DistillError, match='is a file, but a cache is a folder'):
        TeacherCache(tmp_path / 'file')


def test_numbers_that_a_type_cannot_hold_are_refused_or_cut_to_what_it_can():
    far = torch.tensor([[2e5, 1e5, 0.0, -1e5]])
    with pytest.raises(DistillError, match="int8 can't store logits"):
        through(Outputs(far), topk=3, dtype='int8')
    top = through(Outputs(far), topk=2, dtype='float32')[0].logits
    assert top.rest.isfinite().all() and not top.dense().softmax(1).isnan().any()
    with pytest.raises(DistillError, match="size= and topk= can't be combined"):
        Layout.of(Outputs(logits(2, 5, 4, 4)), Store(topk=2, size=2))
    with pytest.raises(DistillError, match='topk=2 along axis 1'):
        Layout.of(Outputs(logits(6)), Store(topk=2))
    lay = Layout.of(Outputs(logits(2, 5)), Store())
    with pytest.raises(DistillError, match='have mask in this batch, unlike in the first batch'):
        lay.encode(Outputs(logits(2, 5), mask=torch.ones(2)))


def test_left_over_files_without_a_manifest_are_not_trusted(tmp_path):
    cache, want = make(tmp_path)
    flip(tmp_path / 'view000/000000.bin')
    (tmp_path / 'view000/000000.json').write_text('{}')
    (tmp_path / 'manifest.json').unlink()
    cache, want = make(tmp_path)
    torch.testing.assert_close(cache.check().outputs(np.arange(23)).logits, want)


def test_a_shard_of_the_right_size_with_wrong_bytes_is_named_before_it_is_used(tmp_path):
    cache, _ = make(tmp_path)
    cache.rows(np.arange(23))  # the other view
    bad = tmp_path / 'view001/000002.bin'
    bad.write_bytes(b'\xff' * bad.stat().st_size)
    assert np.isnan(np.frombuffer(bad.read_bytes(), np.float32)).all()
    for opened in (cache, TeacherCache(tmp_path), pickle.loads(pickle.dumps(cache))):
        for look in (
            lambda c: c.rows([0, 8], [0, 1]),
            lambda c: c.row(7, 1),
            lambda c: c.outputs([6], 1),
            lambda c: c.check(once=True),
            TeacherCache.check,
        ):
            with pytest.raises(
                DistillError,
                match='Damaged files in .*: view001/000002.bin differs from what was written.* only damaged files are rewritten',
            ):
                look(opened)
    make(tmp_path)
    assert TeacherCache(tmp_path).check(once=True)


def test_a_dataset_with_a_damaged_cache_is_refused_before_its_workers_start(tmp_path):
    cache, _ = make(tmp_path, views=1)
    data = TensorDataset(logits(23, 3, scale=1.0))
    assert len(Replayed(data, TeacherCache(tmp_path))) == 23
    flip(tmp_path / 'view000' / '000004.bin')
    with pytest.raises(
        DistillError, match='Damaged files in .*: view000/000004.bin differs from what was written'
    ):
        Replayed(data, TeacherCache(tmp_path))


def test_all_damaged_files_are_named_at_once(tmp_path):
    make(tmp_path)
    for p in sorted(tmp_path.rglob('view*/*.bin'))[2:9]:
        flip(p)
    with pytest.raises(
        DistillError,
        match='view000/000002.bin differs from what was written.*, view000/000006.bin .* and 2 more',
    ):
        TeacherCache(tmp_path).check(once=True)


def read_bytes():
    return int(Path('/proc/self/io').read_text().split()[1])


@pytest.mark.skipif(not Path('/proc/self/io').exists(), reason='counts what a process reads')
def test_a_process_checks_a_file_once_and_workers_do_not_check_again(tmp_path):
    cache, _ = make(tmp_path, n=30_000, c=64, shard=3000)
    size = cache.manifest.bytes

    def read_by(fn):
        before = read_bytes()
        fn()
        return read_bytes() - before

    assert size < read_by(lambda: cache.check(once=True)) < 1.5 * size
    assert (
        read_by(lambda: cache.check(once=True)) < 0.1 * size
        and read_by(lambda: cache.rows(np.arange(30_000), 1)) < 0.1 * size
    )
    again = lambda: TeacherCache(tmp_path).rows(np.arange(30_000))
    assert read_by(again) < 0.1 * size
    ctx = multiprocessing.get_context('spawn')
    with ctx.Pool(1) as pool:
        rows, n = pool.apply(rows_and_bytes, (cache,))  # a worker that is a new process
    assert rows == 30_000 and n < 0.1 * size
    assert size < read_by(cache.check)  # asked for by hand, all is compared again


def rows_and_bytes(cache):
    before = read_bytes()
    return len(cache.rows(np.arange(len(cache)), 1)), read_bytes() - before


# the files that samples come from


class Images:
    "A folder of images, as torchvision has them"

    def __init__(self, root):
        self.root, self.samples = str(root), [(str(p), 0) for p in sorted(Path(root).glob('*.png'))]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return torch.from_numpy(np.array(Image.open(self.samples[i][0]))).float().mean((0, 1)), 0


def paint(path, n, seed=0):
    path.mkdir(exist_ok=True)
    g = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(g.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
            path / f'{i:02}.png', compress_level=0
        )


def write_images(root, path, **kwargs):
    return cache_dataset(
        Teacher(seeded_linear(0)), Images(root), path, views=0, run=dict(bs=4), **kwargs
    )


def test_images_that_were_replaced_under_the_same_names_are_found_and_named(tmp_path):
    paint(tmp_path / 'data', 26)
    cache = write_images(tmp_path / 'data', tmp_path / 'c')
    sizes = {p: p.stat().st_size for p in (tmp_path / 'data').iterdir()}
    first = write_images(tmp_path / 'data', tmp_path / 'c')
    assert changed_now(first, dataset_files(Images(tmp_path / 'data'))) == []
    paint(tmp_path / 'data', 18, seed=1)
    assert sizes == {
        p: p.stat().st_size for p in (tmp_path / 'data').iterdir()
    }  # only the content tells
    match = '- 18 of 26 files changed since the cache was written: .*00.png, .*01.png, .*04.png and 13 more'
    with pytest.raises(DistillError, match=match):
        write_images(tmp_path / 'data', tmp_path / 'c')
    assert [Path(p).name for p in changed_now(cache, dataset_files(Images(tmp_path / 'data')))] == [
        f'{i:02}.png' for i in range(18)
    ]
    with pytest.raises(DistillError, match='18 of 26 files changed'):
        cache.check_files(dataset_files(Images(tmp_path / 'data')))
    part = Subset(Images(tmp_path / 'data'), [25, 3, 20])
    with pytest.raises(DistillError, match='1 of 3 files changed .*03.png'):
        cache.check_files(dataset_files(part), cache.find(dataset_keys(part)))
    with pytest.warns(DistillWarning, match='18 of 26 files changed'):
        TeacherCache(tmp_path / 'c', force=True).check_files(
            dataset_files(Images(tmp_path / 'data'))
        )
    old = cache.outputs([0]).logits
    with pytest.warns(DistillWarning, match='18 of 26 files changed'):
        again = write_images(tmp_path / 'data', tmp_path / 'c', force=True)
    assert changed_now(again, dataset_files(Images(tmp_path / 'data'))) == []
    assert not torch.equal(again.outputs([0]).logits, old)


def test_other_data_are_not_taken_for_changed_files(tmp_path):
    paint(tmp_path / 'data', 6)
    write_images(tmp_path / 'data', tmp_path / 'c')
    (tmp_path / 'data' / '05.png').unlink()
    with pytest.raises(
        DistillError, match=r'- data .count and fingerprint .* in the cache, .* now\nUse'
    ):
        write_images(tmp_path / 'data', tmp_path / 'c')


def test_as_many_samples_with_other_names_are_other_data(tmp_path):
    paint(tmp_path / 'data', 6)
    keys = write_images(tmp_path / 'data', tmp_path / 'c').keys.copy()
    (tmp_path / 'data' / '05.png').rename(tmp_path / 'data' / '06.png')
    with pytest.raises(DistillError, match='data .count and fingerprint'):
        write_images(tmp_path / 'data', tmp_path / 'c')
    assert np.array_equal(TeacherCache(tmp_path / 'c').keys, keys)


def test_only_files_with_another_time_are_read_again(tmp_path):
    paint(tmp_path / 'data', 26)
    write_images(tmp_path / 'data', tmp_path / 'c')
    paths, record = (
        dataset_files(Images(tmp_path / 'data')),
        (tmp_path / 'c' / 'files.bin').read_bytes(),
    )
    for p in paths[:10]:
        os.utime(p, ns=(1, 10**18))
    cache = TeacherCache(tmp_path / 'c')
    before = read_bytes()
    assert changed_now(cache, paths) == []  # touched, and the same
    some = sum(os.path.getsize(p) for p in paths[:10])
    assert some <= read_bytes() - before < 1.6 * some
    assert (tmp_path / 'c' / 'files.bin').read_bytes() == record  # reading changes nothing ...
    write_images(tmp_path / 'data', tmp_path / 'c')
    assert (
        tmp_path / 'c' / 'files.bin'
    ).read_bytes() != record  # ... but the writer notes the new times
    before = read_bytes()
    assert changed_now(TeacherCache(tmp_path / 'c'), paths) == [] and read_bytes() - before < some
    Path(paths[2]).write_bytes(b'short')
    Path(paths[5]).unlink()
    assert changed_now(cache, paths) == [paths[2], paths[5]]


def test_a_cache_without_a_record_of_its_files_is_read_as_before(tmp_path):
    paint(tmp_path / 'data', 6)
    cache = write_images(tmp_path / 'data', tmp_path / 'c')
    (tmp_path / 'c' / 'files.bin').unlink()
    assert write_images(tmp_path / 'data', tmp_path / 'c').check()
    paint(tmp_path / 'data', 6, seed=1)
    assert changed_now(cache, dataset_files(Images(tmp_path / 'data'))) == []
    with pytest.raises(DistillError, match='the inputs of some samples'):
        write_images(tmp_path / 'data', tmp_path / 'c')
    assert not (tmp_path / 'c' / 'files.bin').exists()  # what the files were is not known


@pytest.mark.parametrize('harm', [flip, shorten, lambda p: p.write_bytes(b'')])
def test_a_damaged_record_of_files_is_named(tmp_path, harm):
    paint(tmp_path / 'data', 6)
    cache = write_images(tmp_path / 'data', tmp_path / 'c')
    harm(tmp_path / 'c' / 'files.bin')
    for look in (
        lambda: changed_now(cache, dataset_files(Images(tmp_path / 'data'))),
        lambda: cache.check(),
        lambda: write_images(tmp_path / 'data', tmp_path / 'c'),
    ):
        with pytest.raises(
            DistillError, match="files.bin in .* is damaged, so changed files can't be detected"
        ):
            look()
    with pytest.warns(DistillWarning, match='files.bin in .* is damaged'):
        assert write_images(tmp_path / 'data', tmp_path / 'c', force=True).check()


def test_what_is_no_file_has_no_record(tmp_path):
    assert (
        files_of(['text', 'other']) is None
        and files_of([1, 2]) is None
        and files_of([]) is None
        and files_of(['x' * 10**5, 'y']) is None
    )
    assert (
        dataset_files(TensorDataset(torch.zeros(3, 2))) is None and dataset_files(object()) is None
    )
    (tmp_path / 'a').write_text('')
    assert files_of([tmp_path / 'a', tmp_path / 'b']) == [
        tmp_path / 'a',
        tmp_path / 'b',
    ] and files_of([(str(tmp_path / 'a'), 1)]) == [str(tmp_path / 'a')]
    make(tmp_path / 'c', n=2, bs=1, files=[tmp_path / 'a', tmp_path / 'b'])
    assert changed_now(TeacherCache(tmp_path / 'c'), [tmp_path / 'a', tmp_path / 'b']) == []
    (tmp_path / 'b').write_text('now there is one')
    assert changed_now(TeacherCache(tmp_path / 'c'), [tmp_path / 'a', tmp_path / 'b']) == [
        str(tmp_path / 'b')
    ]


# more views


def views_source(calls=None, samples=4, views=8, **kwargs):
    "Outputs that tell the sample and the view"

    def run(tasks, bs):
        for i in range(0, len(tasks), bs):
            if calls is not None:
                calls.extend(tasks[i : i + bs].tolist())
            t = torch.as_tensor(tasks[i : i + bs])
            yield Outputs(torch.stack([t % 20, t // 20], 1).float())

    looks = [dict(row=i, view=i % views, digest=f'{i} {i % views}') for i in range(samples)]
    return Source(
        np.arange(20, dtype=np.uint64),
        run,
        5,
        dict(name='t', weights='w'),
        {},
        samples=looks,
        **kwargs,
    )


def write_views(path, views, calls=None, **kwargs):
    return write_cache(
        path,
        views_source(calls, views=views),
        Store(dtype='float32'),
        views=views,
        shard_bytes=80,
        **kwargs,
    )


def views_are_right(cache, n):
    return cache.views == n and all(
        torch.equal(
            cache.outputs(np.arange(20), v).logits,
            torch.stack([torch.arange(20.0), torch.full((20,), float(v))], 1),
        )
        for v in range(n)
    )


@pytest.mark.parametrize('old,new', [(8, 12), (1, 3), (2, 4)])
def test_more_views_can_be_added_and_only_they_are_made(tmp_path, old, new):
    opened = write_views(tmp_path / 'c', old)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / 'c').rglob('view*/*.bin')}
    plan = []
    cache = write_views(tmp_path / 'c', new, calls := [], forecast=plan.append)
    assert views_are_right(cache.check(), new) and views_are_right(
        opened, old
    )  # also one that was open meanwhile
    assert (
        sorted(set(calls) - {0}) == list(range(20 * old, 20 * new))
        and plan[0].bytes == (new - old) * 20 * 8
    )
    assert times == {p: t for p in times for t in [p.stat().st_mtime_ns]} and not list(
        (tmp_path / 'c').rglob('view*/*.json')
    )
    write_views(tmp_path / 'whole', new)
    assert files(tmp_path / 'c') == files(tmp_path / 'whole')
    with pytest.raises(DistillError, match=f'views: {new} in the cache, {old} now'):
        write_views(tmp_path / 'c', old)


def test_the_clean_view_is_not_one_of_the_augmented_ones(tmp_path):
    write_views(tmp_path / 'c', 8)
    with pytest.raises(DistillError, match='views: 8 in the cache, 0 now'):
        write_cache(tmp_path / 'c', views_source(views=1), Store(dtype='float32'), views=0)
    write_cache(tmp_path / 'clean', views_source(views=1), Store(dtype='float32'), views=0)
    with pytest.raises(DistillError, match='views: 0 in the cache, 8 now'):
        write_cache(tmp_path / 'clean', views_source(), Store(dtype='float32'), views=8)


def test_views_of_other_inputs_are_not_added(tmp_path):
    write_views(tmp_path / 'c', 8)
    other = views_source(views=12)
    other.samples[3]['digest'] = 'another'
    with pytest.raises(DistillError, match='the inputs of some samples'):
        write_cache(tmp_path / 'c', other, Store(dtype='float32'), views=12)
    with pytest.raises(DistillError, match='seed: 0 in the cache, 1 now'):
        write_views(tmp_path / 'c', 12, seed=1)


def test_a_writer_that_is_stopped_while_it_adds_views_leaves_the_old_ones_readable_and_resumes(
    tmp_path,
):
    class Stop(Exception):
        pass

    def stop(done, *_):
        if done > 30:
            raise Stop

    write_views(tmp_path / 'c', 8)
    with pytest.raises(Stop):
        write_views(tmp_path / 'c', 12, progress=stop)
    assert views_are_right(TeacherCache(tmp_path / 'c').check(), 8)
    assert views_are_right(write_views(tmp_path / 'c', 8, calls := []), 8) and set(calls) == {
        0
    }  # nothing was missing
    assert views_are_right(write_views(tmp_path / 'c', 12, calls := []).check(), 12)
    assert len(set(calls) - {0}) == 80 - 30


def test_an_unfinished_cache_takes_more_views_too(tmp_path):
    class Stop(Exception):
        pass

    def stop(done, *_):
        if done > 30:
            raise Stop

    with pytest.raises(Stop):
        write_views(tmp_path / 'c', 2, progress=stop)
    with pytest.raises(DistillError, match='is not finished'):
        TeacherCache(tmp_path / 'c')
    assert (
        views_are_right(write_views(tmp_path / 'c', 3, calls := []).check(), 3)
        and len(set(calls) - {0}) == 60 - 30
    )


def test_a_damaged_view_is_repaired_while_others_are_added(tmp_path):
    write_views(tmp_path / 'c', 2)
    flip(tmp_path / 'c' / 'view001' / '000001.bin')
    assert views_are_right(write_views(tmp_path / 'c', 3, calls := []).check(), 3)
    assert sorted(set(calls) - {0}) == [*range(30, 40), *range(40, 60)]


def test_views_without_anything_random_are_stored_once(tmp_path):
    with pytest.warns(
        DistillWarning,
        match='views=8, but all views of a sample are the same: there is no random transform. One view is stored',
    ):
        assert distinct_views(8, 20, lambda i, view: f'{i}') == 1
    assert (
        distinct_views(8, 20, lambda i, view: f'{i} {view}') == 8
        and distinct_views(0, 20, None) == 0
        and distinct_views(1, 20, None) == 1
    )
    assert (
        distinct_views(8, 20, lambda i, view: f'{i} {view == 2}') == 8
        and distinct_views(8, 1, lambda i, view: view) == 8
    )
    with pytest.warns(DistillWarning, match='One view is stored'):
        cache = cache_dataset(
            Teacher(seeded_linear(0)), TensorDataset(torch.randn(8, 3)), tmp_path, views=8
        )
    assert cache.views == 1


@pytest.mark.parametrize('bs', [0, -3, 2.5, True, '4'])
def test_a_batch_size_below_one_is_refused(bs, tmp_path):
    with pytest.raises(DistillError, match=f'bs={bs!r}: must be a whole number of at least 1'):
        Source(np.arange(3, dtype=np.uint64), None, bs, {}, {})


@pytest.mark.parametrize('views', [-1, 1.5, True, '2', 10**6])
def test_a_number_of_views_that_cannot_be_is_refused(views, tmp_path):
    with pytest.raises(DistillError, match=f'views={views!r}'):
        write_cache(tmp_path, views_source(), Store(), views=views)


# where a cache is


def test_caches_are_known_by_path_and_url(tmp_path):
    pytest.importorskip('fsspec')
    make(tmp_path / 'c')
    make(f'memory://is{tmp_path}')
    for path in (
        tmp_path / 'c',
        str(tmp_path / 'c'),
        f'file://{tmp_path}/c',
        f'memory://is{tmp_path}',
    ):
        assert is_cache(path)
    (tmp_path / 't.pkl').write_bytes(b'x')
    for other in (
        tmp_path,
        tmp_path / 'none',
        tmp_path / 't.pkl',
        f'file://{tmp_path}',
        'memory://none',
        'resnet18',
        '~nobody9/c',
        'a\0b',
        '',
        None,
        3,
        Teacher(seeded_linear(0)),
        [tmp_path / 'c'],
    ):
        assert not is_cache(other), other


# what happens to writers


def files(path):
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in path.rglob('*')
        if p.is_file() and p.name != '.lock'
    }


def lines(log):
    return len(log.read_text().splitlines()) if log.exists() else 0


forks = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')


@forks
def test_a_killed_writer_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path):
    whole = writers.write(tmp_path / 'whole')
    g, path, log, finished = random.Random(0), tmp_path / 'killed', tmp_path / 'log', []
    for _ in range(100):
        p, _ = writers.start(path, log=log, pause=0.01)
        before = lines(log)
        while p.is_alive() and lines(log) < before + 4:
            time.sleep(0.002)
        time.sleep(g.random() * 0.06)
        finished.append({q: q.stat().st_mtime_ns for q in path.rglob('*.bin')})
        p.kill()
        p.join()
        if (path / 'manifest.json').exists() and json.loads((path / 'manifest.json').read_text())[
            'complete'
        ]:
            break
    assert len(finished) > 4 and len(set(map(len, finished))) > 3
    assert writers.write(path).check()
    assert files(path) == files(tmp_path / 'whole')
    # a shard that was there is not made again; only the checksum of the very last one may have been missing
    assert sum(q.stat().st_mtime_ns != t for s in finished for q, t in s.items()) <= len(finished)
    assert lines(log) < 2 * 24 + 12 * len(finished) and whole.manifest.bytes == 60 * 2 * 16


@forks
def test_two_writers_are_refused_and_a_dead_one_is_not(tmp_path):
    p, _ = writers.start(tmp_path / 'c', log=tmp_path / 'log', pause=30.0)
    while not lines(tmp_path / 'log'):
        time.sleep(0.01)
    p.kill()
    p.join()
    p, _ = writers.start(tmp_path / 'c', log=tmp_path / 'log', pause=0.3)
    while lines(tmp_path / 'log') < 5:
        time.sleep(0.01)
    with pytest.raises(DistillError, match='Another process is writing'):
        writers.write(tmp_path / 'c')
    p.kill()
    p.join()
    assert writers.write(tmp_path / 'c').check()
    with Folder(tmp_path / 'c').lock():
        with pytest.raises(DistillError, match='Another process is writing'):
            writers.write(tmp_path / 'c')


@forks
def test_after_a_full_disk_the_writer_resumes(tmp_path):
    p, errors = writers.start(tmp_path / 'c', limit=100)
    p.join()
    e = errors.get()
    assert re.search(r'DistillError: No space for \S*/view001/', e), e
    assert 'start again to resume' in e
    assert len(list((tmp_path / 'c').rglob('*.bin'))) > 5 and not list(
        (tmp_path / 'c').rglob('*.tmp')
    )
    writers.write(tmp_path / 'whole')
    writers.write(tmp_path / 'c')
    assert files(tmp_path / 'c') == files(tmp_path / 'whole')


def test_what_will_not_fit_is_refused_before_the_teacher_runs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        shutil, 'disk_usage', lambda p: namedtuple('Usage', 'total used free')(10**9, 0, 700)
    )
    with pytest.raises(
        DistillError,
        match=r'23 samples x 2 view\(s\) x 16 bytes = 0.0 MB.* There is not enough disk space: use fewer views',
    ):
        make(tmp_path / 'c', forecast=seen.append)
    assert seen[0].bytes == 23 * 2 * 16 and seen[0].bytes_per_view == 16 and seen[0].free == 700
    assert not list((tmp_path / 'c').rglob('view*'))
    done = []
    monkeypatch.undo()
    make(tmp_path / 'c', progress=lambda *a: done.append(a))
    assert done[-1] == (46, 46, 46 * 16) and [d[0] for d in done] == sorted(d[0] for d in done)


@forks
def test_many_ranks_write_the_cache_of_one(tmp_path):
    both = [
        writers.start(
            tmp_path / 'two', log=tmp_path / f'log{r}', rank=r, world=2, meet=str(tmp_path / 'meet')
        )
        for r in range(2)
    ]
    for p, errors in both:
        p.join()
        assert p.exitcode == 0 and errors.empty(), errors.get()
    writers.write(tmp_path / 'one')
    assert files(tmp_path / 'two') == files(tmp_path / 'one')
    assert [lines(tmp_path / f'log{r}') for r in range(2)] == [
        15,
        15,
    ]  # two to check, one to know the shape, and half of the batches, each


# elsewhere


@pytest.mark.parametrize('url', ['memory://caches/{}', 'file://{}'])
def test_caches_may_be_remote(tmp_path, url):
    pytest.importorskip('fsspec')
    url = url.format(tmp_path / 'remote')
    cache, want = make(url)
    torch.testing.assert_close(cache.check().outputs(np.arange(23), 1).logits, want)
    assert TeacherCache(url).manifest == cache.manifest == make(tmp_path / 'local')[0].manifest
    local = Path(cache.folder.downloads)
    assert local.exists()
    again, _ = make(url)
    torch.testing.assert_close(pickle.loads(pickle.dumps(again)).outputs([5]).logits, want[[5]])
    del cache, again
    assert not local.exists()


def test_a_teachers_fingerprint_is_its_weights():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert fingerprint(a.state_dict()) == fingerprint(a.state_dict()) != fingerprint(b.state_dict())
    with torch.no_grad():
        b.load_state_dict(a.state_dict())
        b.weight[0, 0] = torch.nextafter(b.weight[0, 0], torch.tensor(9.0))
    assert fingerprint(a.state_dict()) != fingerprint(b.state_dict())
    from fastdistill.cache.teacher_description import identity_of

    assert identity_of(Teacher(a)) == identity_of(Teacher(a)) != identity_of(Teacher(b))
    with pytest.warns(DistillWarning, match="weights of .* can't be read"):
        identity_of(math.sqrt)


@pytest.mark.parametrize('kind', [str, str.encode])
def test_a_fingerprint_depends_on_texts_that_look_like_memory_addresses(kind):
    a, b = kind('load the word at 0x10'), kind('store the word at 0x10')
    assert fingerprint(a) != fingerprint(b)


def test_the_fingerprint_of_an_array_of_objects_is_that_of_its_content():
    ragged = lambda *rows: np.array([*map(np.array, rows), None], object)
    a, again, b = ragged([1, 2], [3]), ragged([1, 2], [3]), ragged([1, 2], [4])
    assert fingerprint(a) == fingerprint(again) != fingerprint(b)


def test_an_ensemble_is_stored_along_the_class_axis_of_the_cache(tmp_path):
    torch.manual_seed(0)
    members, x = [torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)], torch.randn(6, 4, 8)
    want, data = sum(m(x).softmax(-1) for m in members) / 2, TensorDataset(x)
    options = dict(views=0, axis=-1, store='float32', progress=False)
    cache = cache_dataset(Teacher(members), data, tmp_path / 'a', **options)
    torch.testing.assert_close(cache.outputs(range(6)).logits.softmax(-1), want)
    with pytest.raises(DistillError, match='axis=1, but the teacher has axis=-1: pass axis=-1'):
        cache_dataset(Teacher(members, axis=-1), data, tmp_path / 'b', views=0, progress=False)


def test_a_terminal_shows_speed_and_size(capsys, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '200')
    with shown_progress(True) as show:
        show(8, 32, 10**6)
        show(32, 32, 4 * 10**6)
    out = capsys.readouterr().out
    assert '100% of the samples' in out
    assert re.search(r'32 of 32, 4.0 MB, [\d,]+ samples/s, 0 s left', out)
