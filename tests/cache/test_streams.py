"Rows of a stream: written by many writers, sealed, and joined with the samples again."

import json
import pickle
import re
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastdistill import DistillError, Distiller, Outputs, Teacher, kd
from fastdistill.base.outputs import DistillWarning, Draws
from fastdistill.cache import (
    Replayed,
    RowWriter,
    StreamJoin,
    TeacherCache,
    TeacherRows,
    cache_dataset,
    pack_cache,
    seal_stream,
    start_stream,
    unpack_cache,
    write_stream,
)
from fastdistill.cache.keys import hash_of, key_of, keys_of
import processes
from manifests import write_manifest

N, C, BS = 60, 5, 8
SHARDS = 4
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))


def net(classes=C, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, classes))


def samples(ids):
    return [dict(key=f'sample {i}', inputs=X[i], label=i % C) for i in ids]


def batches(ids, bs=BS):
    return DataLoader(samples(ids), bs)


def shard(k):
    return range(k * N // SHARDS, (k + 1) * N // SHARDS)


def start(path, teacher=None, store='float32', **options):
    teacher = Teacher(net()) if teacher is None else teacher
    return start_stream(path, teacher, next(iter(batches(range(20), 20))), store, **options)


def written(path, shards=range(SHARDS), **options):
    rows = start(path, **options)
    for k in shards:
        write_stream(batches(shard(k)), rows, f'shard-{k}', part_bytes=5 * 20)
    return rows


class Stream(IterableDataset):
    "Samples in a given order, divided among the workers"

    def __init__(self, ids):
        self.ids = list(ids)

    def __iter__(self):
        w = get_worker_info()
        ids = self.ids if w is None else self.ids[w.id :: w.num_workers]
        yield from samples(ids)


# from the stream to the student


def test_a_student_learns_from_a_stream_as_from_a_live_teacher(tmp_path):
    "A plain loop, from the rows to the trained student"
    written(tmp_path)
    seal_stream(tmp_path)
    cache = TeacherCache(tmp_path)

    def train(loader, teacher_outputs):
        student = net(seed=1)
        distiller = Distiller(student, None, kd(T=2, alpha=0.7))
        opt = torch.optim.SGD(distiller.parameters(), 0.1)
        for b in loader:
            out = student(b['inputs'])
            task = nn.functional.cross_entropy(out, b['label'])
            loss = distiller.compute(Outputs(out), teacher_outputs(b), task, (b['label'],)).total
            opt.zero_grad()
            loss.backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    teacher = Teacher(net())
    live = train(DataLoader(Stream(range(N)), BS), lambda b: teacher(b['inputs']))
    joined = StreamJoin(Stream(range(N)), cache, 'key')
    stored = train(DataLoader(joined, BS), lambda b: cache.decode(b['teacher']))
    assert not torch.equal(
        live, torch.cat([p.detach().flatten() for p in net(seed=1).parameters()])
    )
    torch.testing.assert_close(stored, live)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('order', ['same', 'shuffled', 'part'])
def test_each_sample_gets_its_own_row(order, workers, tmp_path):
    written(tmp_path)
    cache = seal_stream(tmp_path)
    ids = dict(same=range(N), shuffled=torch.randperm(N).tolist(), part=range(17, 41))[order]
    joined = StreamJoin(Stream(ids), cache, 'key', at_once=7)
    found = [*DataLoader(joined, 4, num_workers=workers)]
    assert sum(len(b['key']) for b in found) == len(ids)
    for b in found:
        torch.testing.assert_close(cache.decode(b['teacher']).logits, net()(b['inputs']).detach())


def test_the_rows_of_a_dataset_can_be_joined_too(tmp_path):
    cache = cache_dataset(
        Teacher(net()),
        torch.utils.data.TensorDataset(X),
        tmp_path,
        views=0,
        store='float32',
        keys=[f'sample {i}' for i in range(N)],
        progress=False,
    )
    for o in StreamJoin(Stream(range(N)[::-1]), cache, 'key'):
        torch.testing.assert_close(cache.decode(o['teacher'][None]).logits[0], net()(o['inputs']))


def test_samples_of_any_form(tmp_path):
    written(tmp_path)
    cache = seal_stream(tmp_path)
    pairs = [(f'sample {i}', i) for i in range(3)]
    name, i, row = [*StreamJoin(pairs, cache, 0)][2]
    assert (name, i) == ('sample 2', 2)
    assert np.array_equal(row.numpy(), cache.row(2))
    alone, row = [*StreamJoin([f'sample {i}' for i in range(3)], cache, lambda o: o)][1]
    assert alone == 'sample 1'
    assert np.array_equal(row.numpy(), cache.row(1))


def test_an_entry_of_the_samples_is_not_replaced(tmp_path):
    "A column of the user may be called as the new entry"
    written(tmp_path)
    cache = seal_stream(tmp_path)
    stream = samples(range(N))
    stream[1]['teacher'] = 'Ms. Miller'
    match = r"already have an entry 'teacher'.*pass StreamJoin\(..., name=...\) with a new name"
    with pytest.raises(DistillError, match=match):
        next(iter(StreamJoin(stream, cache, 'key')))

    class Columns(Stream):
        column_names = ['key', 'teacher']

    with pytest.raises(DistillError, match=match):
        StreamJoin(Columns(range(N)), cache, 'key')
    # a stream that is joined with two teachers
    twice = StreamJoin(StreamJoin(samples(range(N)), cache, 'key'), cache, 'key', name='second')
    assert {*next(iter(twice))} == {'key', 'inputs', 'label', 'teacher', 'second'}
    joined = StreamJoin(stream, cache, 'key', name='row')
    assert [o.get('teacher') for o in joined][:2] == [None, 'Ms. Miller']


@pytest.mark.parametrize('name', ['numbers', 'arrays', 'tokens of equal length', 'tokens'])
def test_names_that_are_tensors_in_the_stream_and_in_the_batches(name, tmp_path):
    "As in a stream of `datasets` with_format('torch'), whose batches a DataLoader joins to tensors"
    names = dict(
        numbers=[torch.tensor(i) for i in range(N)],
        arrays=[np.array([i, 2]) for i in range(N)],
        tokens=[torch.arange(i + 1) for i in range(N)],
    ).get(name) or [torch.tensor([i, 1]) for i in range(N)]
    stream = [o | dict(key=k) for o, k in zip(samples(range(N)), names)]

    def collate(items):
        own = [o['key'] for o in items]
        own = torch.stack(own) if name.startswith(('numbers', 'tokens of')) else own
        return dict(key=own, inputs=torch.stack([o['inputs'] for o in items]))

    loader = DataLoader(stream, BS, collate_fn=collate)
    rows = start_stream(tmp_path, Teacher(net()), next(iter(loader)), 'float32')
    write_stream(loader, rows, 'all')
    cache = seal_stream(tmp_path, keys=names)
    for order in (range(N), torch.randperm(N).tolist()):
        found = list(StreamJoin([stream[i] for i in order], cache, key='key'))
        logits = cache.decode(torch.stack([o['teacher'] for o in found])).logits
        assert torch.allclose(logits, net()(X[list(order)]), atol=1e-6)


def test_samples_without_a_row_are_named(tmp_path):
    written(tmp_path)
    cache = seal_stream(tmp_path)
    stream = [dict(key=k) for k in ['sample 0', 'sample 1', 'sample 99']]
    with pytest.raises(DistillError, match=r"Sample 2 of the stream \('sample 99'\) has no row"):
        [*StreamJoin(stream, cache, 'key')]
    with pytest.raises(DistillError, match="has no '__key__'"):
        [*StreamJoin(stream, cache)]


# what is stored


def test_a_sealed_stream_is_a_cache_in_the_order_of_the_names(tmp_path):
    written(tmp_path, shards=[2, 0, 3, 1])
    cache = seal_stream(tmp_path)
    assert np.array_equal(cache.keys, keys_of([f'sample {i}' for i in range(N)]))
    torch.testing.assert_close(cache.outputs(range(N)).logits, net()(X).detach())
    assert len(cache.check()) == N
    assert sorted({p.suffix for p in tmp_path.rglob('*') if p.is_file()} - {''}) == [
        '.bin',
        '.json',
        '.rows',
    ]
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(again.row(N - 1), cache.row(N - 1))
    assert np.array_equal(again.find(cache.keys[[5, 3]]), [5, 3])


def test_parts_are_in_the_order_of_their_numbers(tmp_path):
    rows = start(tmp_path)
    for k in reversed(range(12)):
        write_stream(batches(range(5 * k, 5 * k + 5)), rows, f'part_{k}')
    cache = seal_stream(tmp_path)
    torch.testing.assert_close(cache.outputs(range(N)).logits, net()(X).detach())


def test_it_can_be_packed(tmp_path):
    written(tmp_path / 'a')
    cache = seal_stream(tmp_path / 'a')
    pack_cache(cache, tmp_path / 'a.zip')
    other = unpack_cache(tmp_path / 'a.zip', tmp_path / 'b')
    assert np.array_equal(other.rows(range(N)), cache.rows(range(N)))


@pytest.mark.parametrize('store', ['hidden', dict(draws=9), dict(topk=2), 'int8'], ids=str)
def test_every_way_to_store(store, tmp_path):
    "The same rows as those of a dataset"
    written(tmp_path / 'a', store=store)
    cache = seal_stream(tmp_path / 'a')
    plain = cache_dataset(
        Teacher(net()),
        torch.utils.data.TensorDataset(X),
        tmp_path / 'b',
        views=0,
        store=store,
        keys=[f'sample {i}' for i in range(N)],
        progress=False,
    )
    a, b = (c.outputs(range(N)).logits for c in (cache, plain))
    if isinstance(a, Draws):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.freqs, b.freqs)
        return
    a, b = (t if torch.is_tensor(t) else t.dense() for t in (a, b))
    # a batch of another size may round differently
    torch.testing.assert_close(a, b, atol=0.01, rtol=0)


def test_auto_measures_and_chooses(tmp_path, capsys):
    rows = start(tmp_path, Teacher(net(3000)), 'auto')
    assert 'bytes per view' in capsys.readouterr().out
    assert rows.manifest.layout.head is not None  # the hidden state has 7 numbers
    write_stream(batches(range(N)), rows, 'all')
    got = seal_stream(tmp_path).outputs(range(N)).logits.dense()
    t = net(3000)(X).detach()
    assert (got - t).abs().max() < 0.02 * (t.max() - t.min())


def test_several_views(tmp_path):
    rows = start(tmp_path, views=2)
    for view in (1, 0):
        made = ({**b, 'inputs': b['inputs'] + view} for b in batches(range(N)))
        write_stream(made, rows, 'all', view=view)
    cache = seal_stream(tmp_path)
    for view in (0, 1):
        t = net()(X + view).detach()
        torch.testing.assert_close(cache.outputs(range(N), view).logits, t)
    stream = [dict(o, view=i % 2) for i, o in enumerate(samples(range(N)))]
    for i, o in enumerate(StreamJoin(stream, cache, 'key', view='view')):
        got = cache.decode(o['teacher'][None]).logits[0]
        torch.testing.assert_close(got, net()(X[i] + i % 2).detach())


# the function of a batch, in other engines


def test_rows_of_a_batch(tmp_path):
    rows = start(tmp_path)
    out = rows(next(iter(batches(range(5, 9)))))
    assert np.array_equal(
        np.array(out['key']).view(np.uint64), keys_of([f'sample {i}' for i in range(5, 9)])
    )
    assert out['view'].tolist() == [0] * 4
    got = np.stack([np.frombuffer(o, '<f4') for o in out['row']])
    np.testing.assert_allclose(got, net()(X[5:9]).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_rows_in_any_order_are_found_by_their_keys(tmp_path):
    "As Ray Data writes them: the second function gets batches of its own size"
    rows, out = start(tmp_path), RowWriter(tmp_path)
    for k in (2, 0, 3, 1):
        got = rows(next(iter(batches(shard(k), N))))
        files = out({name: o[:10] for name, o in got.items()})
        assert files['rows'] == [10]
        again = out({name: o[:10] for name, o in got.items()})  # a repeated task
        assert again == files
        out({name: o[10:] for name, o in got.items()})
    cache = seal_stream(tmp_path, keys=[f'sample {i}' for i in range(N)])
    for o in StreamJoin(Stream(range(N)), cache, 'key'):
        torch.testing.assert_close(cache.decode(o['teacher'][None]).logits[0], net()(o['inputs']))


def test_in_datasets(tmp_path):
    datasets = pytest.importorskip('datasets')
    columns = dict(key=[f'sample {i}' for i in range(N)], inputs=X.tolist())
    data = datasets.Dataset.from_dict(columns)
    rows = start(tmp_path)
    made = data.map(rows, batched=True, batch_size=7, remove_columns=data.column_names)
    made.map(RowWriter(tmp_path), batched=True, batch_size=25, remove_columns=made.column_names)
    cache = seal_stream(tmp_path, keys=data['key'])
    joined = StreamJoin(data.to_iterable_dataset(), cache, 'key')
    for i, o in enumerate(joined):
        torch.testing.assert_close(cache.decode(o['teacher'][None]).logits[0], net()(X[i]))


def test_in_spark(tmp_path):
    "`mapInPandas` calls a function of an iterator of DataFrames. Spark itself is not needed for that"
    pd = pytest.importorskip('pandas')
    rows, out = start(tmp_path), RowWriter(tmp_path)
    names = [f'sample {i}' for i in range(N)]
    frames = [
        pd.DataFrame(dict(key=names[i : i + 20], inputs=[*X[i : i + 20].numpy()]))
        for i in range(0, N, 20)
    ]
    made = [*rows(iter(frames))]
    assert [str(t) for t in made[0].dtypes] == ['int64', 'int64', 'object']
    files = pd.concat(out(iter(made)))
    assert files['rows'].tolist() == [20, 20, 20]
    assert len(seal_stream(tmp_path, keys=names)) == N


def test_several_inputs_and_functions_of_a_batch(tmp_path):
    def add(a, b):
        return net()(a + b)

    batch = dict(a=X, b=2 * X, id=list(range(N)))
    with pytest.warns(DistillWarning, match='identified only by its code'):
        rows = start_stream(tmp_path, add, batch, 'float32', inputs=('a', 'b'), key='id')
        same = TeacherRows(
            tmp_path, add, inputs=lambda b: (b['a'], b['b']), key=lambda b: [*b['id']]
        )
    assert rows(batch)['row'] == same(batch)['row']
    with pytest.raises(DistillError, match="has no column 'key', but a, b, id"):
        rows.key = 'key'
        rows(batch)


@pytest.mark.parametrize('name', ['a', '', './a/b', '/data/a', 'ä', 0, -7, 10**30, True], ids=repr)
def test_keys_of_frequent_names_are_those_of_all_others(name):
    parts = dict(str=b'str', int=b'int', bool=b'bool')[type(name).__name__]
    text = str(name).removeprefix('./').removeprefix('/data/')
    assert key_of(name, '/data') == hash_of(parts, text.encode())


# interrupted writers


class Counting:
    name, module = 'counting', nn.Identity()

    def __init__(self):
        self.seen = []

    def __call__(self, x):
        self.seen += x[:, 0].tolist()
        return net()(x)


def test_an_interrupted_writer_runs_the_teacher_only_on_the_rest(tmp_path):
    teacher = Counting()
    rows = start(tmp_path, teacher)

    def stopping():
        for i, b in enumerate(batches(range(N))):
            if i == 4:
                raise KeyboardInterrupt
            yield b

    with pytest.raises(KeyboardInterrupt):
        write_stream(stopping(), rows, 'all', part_bytes=10 * 20)
    assert len(RowWriter(tmp_path).finished('all')) == 3  # 30 of 32 rows
    teacher.seen.clear()
    assert write_stream(batches(range(N)), rows, 'all', part_bytes=10 * 20) == N
    assert teacher.seen == X[24:, 0].tolist()  # from the batch with the 31st sample on
    teacher.seen.clear()
    assert write_stream(batches(range(N)), rows, 'all') == N
    assert not teacher.seen
    torch.testing.assert_close(seal_stream(tmp_path).outputs(range(N)).logits, net()(X).detach())


def test_another_order_is_refused(tmp_path):
    rows = start(tmp_path)
    RowWriter(tmp_path).write(
        'all-000000', keys_of(['sample 0', 'sample 1']), np.zeros((2, 20), 'u1')
    )
    with pytest.raises(DistillError, match='begins with different samples than when its first 2'):
        write_stream(batches(range(1, N)), rows, 'all')
    with pytest.raises(DistillError, match='has only 1 samples, but 2 rows were written before'):
        write_stream(batches(range(1)), rows, 'all')


@pytest.mark.parametrize('n', [1, BS - 1, BS + 1])
def test_a_teacher_that_returns_another_number_of_outputs_is_refused(tmp_path, n):
    class Other(nn.Module):
        "Right for the batch with which the stream begins"

        def forward(self, x):
            return x.new_zeros(n if len(x) == BS else len(x), C)

    rows = start(tmp_path, Teacher(Other()))
    with pytest.raises(DistillError, match=f'The teacher returned {n} outputs for {BS} samples'):
        write_stream(batches(range(BS)), rows, 'all')


def slow(path, k, pause):
    "One of eight writers"

    def pausing():
        for b in batches(range(k, N, 8), 2):
            time.sleep(pause)
            yield b

    write_stream(pausing(), TeacherRows(path, Teacher(net())), f'writer-{k}', part_bytes=2 * 20)


def test_killed_and_restarted_writers_lose_and_double_nothing(tmp_path):
    path = tmp_path / 'rows'
    start(path)
    rng = np.random.default_rng(0)
    killed = [processes.start(tmp_path / f'a{k}', slow, path, k, 0.1) for k in range(8)]
    while not [*path.rglob('*.keys')]:
        time.sleep(0.01)
    for p in killed:
        time.sleep(rng.random() / 10)
        p.kill()
    assert set(processes.ended(*killed)) <= {0, -9}
    before = len([*path.rglob('*.keys')])
    assert 0 < before < 4 * 8
    with pytest.raises(DistillError, match='writers are not done: writer-'):
        seal_stream(path)
    assert len([*path.rglob('*.keys')]) == before
    again = [processes.start(tmp_path / f'b{k}', slow, path, k, 0) for k in range(8)]
    assert processes.ended(*again) == [0] * 8
    cache = seal_stream(path, keys=[f'sample {i}' for i in range(N)])
    assert len(cache) == N
    at = cache.find(keys_of([f'sample {i}' for i in range(N)]))
    torch.testing.assert_close(cache.outputs(at).logits, net()(X).detach())


def test_what_killed_writers_and_a_killed_sealing_left_is_removed(tmp_path):
    written(tmp_path)
    view = tmp_path / 'view000'
    kept = {p.name: p.read_bytes() for p in view.iterdir()}
    (view / 'shard-9-000000.rows').write_bytes(b'x' * 20)  # killed before its keys were written
    (view / 'shard-9-000001.rows.77.tmp').write_bytes(b'x' * 7)
    (tmp_path / 'keys.bin').write_bytes(b'x' * 7)  # killed before the manifest was complete
    (view / 'notes.txt').write_text('mine')
    a = seal_stream(tmp_path)
    (view / 'shard-0-000000.keys').write_bytes(kept['shard-0-000000.keys'])  # killed after that
    assert seal_stream(tmp_path).identity == a.identity
    rows = sorted(n for n in kept if n.endswith('.rows'))
    assert sorted(p.name for p in view.iterdir()) == ['notes.txt', *rows]


# what sealing finds


def refused(path, *texts, **options):
    before = sorted(str(p) for p in path.rglob('*'))
    with pytest.raises(DistillError) as e:
        seal_stream(path, **options)
    for text in texts:
        assert re.search(text, str(e.value)), (text, str(e.value))
    assert sorted(str(p) for p in path.rglob('*')) == before  # nothing is lost
    assert not json.loads((path / 'manifest.json').read_text())['complete']


def test_duplicated_rows_are_named(tmp_path):
    rows = written(tmp_path)
    write_stream(batches(range(3, 5)), rows, 'zz')
    refused(
        tmp_path,
        r'2 samples have several rows: .*shard-0-000000, row [34] and zz-000000, row [01] \(key [0-9a-f]{16}\)',
    )


def test_duplicated_rows_are_found_wherever_the_blocks_of_compared_keys_end(tmp_path, monkeypatch):
    monkeypatch.setattr('fastdistill.cache.stream_sealing.STEP', 1)
    write_stream(batches(range(3, 5)), written(tmp_path), 'zz')
    refused(tmp_path, '2 samples have several rows')


@pytest.mark.parametrize('step', [1, 7, 2**20])
def test_keys_that_differ_only_in_their_last_bits_are_told_apart(step, tmp_path, monkeypatch):
    monkeypatch.setattr('fastdistill.cache.stream_sealing.STEP', step)
    g = np.random.default_rng(0)
    near = np.repeat(np.array([5, 2**63, 2**64 - 64], np.uint64), N // 3)
    keys = g.permutation(near + np.tile(g.permutation(N // 3).astype(np.uint64), 3))
    part = lambda ids: [dict(inputs=X[ids], key=keys[ids])]
    for name in ('once', 'twice'):
        rows = start(tmp_path / name)
        for k in range(SHARDS):
            write_stream(part(shard(k)), rows, f'shard-{k}')
    write_stream(part(range(7, 9)), rows, 'zz')
    cache = seal_stream(tmp_path / 'once', keys=keys)
    order = cache.files.order
    assert np.array_equal(keys[order], np.sort(keys))
    at = cache.find(keys[::-1])
    torch.testing.assert_close(cache.outputs(at).logits, net()(X.flip(0)).detach())
    refused(tmp_path / 'twice', '2 samples have several rows: .*row [78] and zz-000000, row [01]')


def test_missing_rows_are_named(tmp_path):
    written(tmp_path, shards=[0, 1, 2])
    names = [f'sample {i}' for i in range(N)]
    refused(
        tmp_path, r"15 samples have no row: number 45 \('sample 45'\).* and 10 more", keys=names
    )
    refused(tmp_path, '5 rows belong to samples that are not in keys=: shard-2-', keys=names[:40])
    assert len(seal_stream(tmp_path, keys=names[:45])) == 45


def test_a_missing_file_is_named(tmp_path):
    written(tmp_path)
    (tmp_path / 'view000' / 'shard-2-000001.keys').unlink()
    refused(tmp_path, r'1 writers are not done: shard-2 of view 0 \(no file 1\)')


@pytest.mark.parametrize('lost', ['shard-2-000001', 'shard-2-*'])
def test_a_writer_that_lost_rows_after_it_was_done_is_named_and_writes_them_again(lost, tmp_path):
    rows = written(tmp_path)
    files = list((tmp_path / 'view000').glob(f'{lost}.*s'))
    n = sum(p.stat().st_size // 20 for p in files if p.suffix == '.rows')
    for p in files:
        p.unlink()
    there = len(shard(2)) - n
    refused(
        tmp_path,
        f'1 writers have missing rows: shard-2 of view 0 .{there} of {len(shard(2))} rows',
    )
    assert write_stream(batches(shard(2)), rows, 'shard-2', part_bytes=5 * 20) == len(shard(2))
    seal_stream(tmp_path)
    cache = TeacherCache(tmp_path)
    at = cache.find(keys_of([f'sample {i}' for i in range(N)]))
    torch.testing.assert_close(cache.outputs(at).logits, net()(X).detach())


def test_torn_rows_are_written_again_by_their_writer(tmp_path):
    rows = written(tmp_path)
    file = tmp_path / 'view000' / 'shard-1-000001.rows'
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    write_stream(batches(shard(1)), rows, 'shard-1', part_bytes=5 * 20)
    assert file.read_bytes() == data


def test_a_damaged_note_of_a_writer_is_named(tmp_path):
    rows = written(tmp_path)
    (tmp_path / 'view000' / 'shard-1.end').write_text('{"rows"')
    refused(tmp_path, 'view000/shard-1.end in .* is damaged: .* Remove it, and run its writer')
    with pytest.raises(DistillError, match='view000/shard-1.end in .* is damaged'):
        write_stream(batches(shard(1)), rows, 'shard-1')


@pytest.mark.parametrize(
    'name,view', [('../../a', 0), ('a b', 0), ('', 0), ('a' * 250, 0), ('a', 3)]
)
def test_a_writer_touches_nothing_outside_the_views_even_without_samples(name, view, tmp_path):
    rows = start(tmp_path / 'cache')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(DistillError, match='The name of a file is|view=3: .* has 1 view'):
        write_stream([], rows, name, view=view)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_missing_view_is_named(tmp_path):
    rows = start(tmp_path, views=2)
    for k, view in [(0, 0), (1, 0), (0, 1)]:
        write_stream(batches(shard(k)), rows, f'shard-{k}', view=view)
    refused(tmp_path, '1 files are in only one of view 0 and view 1: shard-1-000000')


def test_views_in_another_order_are_named(tmp_path):
    rows = start(tmp_path, views=2)
    for view in (0, 1):
        write_stream(batches(range(N)[:: 1 - 2 * view]), rows, 'all', view=view)
    refused(
        tmp_path,
        'files have different samples than in view 0, or a different order: view001/all-000000.rows',
    )


def test_torn_rows_are_named(tmp_path):
    written(tmp_path)
    file = tmp_path / 'view000' / 'shard-1-000001.rows'
    file.write_bytes(file.read_bytes()[:-7])
    refused(tmp_path, r'1 files are incomplete: view000/shard-1-000001.rows \(4.65 rows, 5 keys\)')
    file.unlink()
    refused(tmp_path, r'shard-1-000001.rows \(no rows, 5 keys\)')


@pytest.mark.parametrize('ending', ['rows', 'keys'])
def test_damaged_files_are_named(ending, tmp_path):
    written(tmp_path)
    file = tmp_path / 'view000' / f'shard-1-000001.{ending}'
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    refused(tmp_path, f'1 files are damaged: view000/shard-1-000001.{ending}')


def test_a_folder_without_rows(tmp_path):
    start(tmp_path)
    refused(tmp_path, 'files with rows: none')
    with pytest.raises(DistillError, match='is not sealed: call seal_stream'):
        TeacherCache(tmp_path)
    with pytest.raises(DistillError, match='is not a stream: call start_stream'):
        seal_stream(tmp_path / 'other')


def test_rows_of_another_teacher_or_form_are_refused(tmp_path):
    start(tmp_path)
    start(tmp_path)  # the same again
    with pytest.raises(DistillError, match="has rows with teacher .*'weights'"):
        start(tmp_path, Teacher(net(seed=1)))
    with pytest.raises(DistillError, match="has rows with teacher .*'weights'"):
        TeacherRows(tmp_path, Teacher(net(seed=1)))
    with pytest.raises(DistillError, match='has rows with layout'):
        start(tmp_path, store='int8')
    with pytest.raises(DistillError, match='has rows with views 0, but it is 2 now'):
        start(tmp_path, views=2)
    with pytest.raises(DistillError, match=r'view=1: .* has 1 view\(s\)'):
        RowWriter(tmp_path).write('a', keys_of(['a']), np.zeros((1, 20), 'u1'), 1)
    with pytest.raises(DistillError, match='has 19 bytes instead of 20'):
        RowWriter(tmp_path)(dict(key=[1], view=[0], row=[b'x' * 19]))
    with pytest.raises(DistillError, match="The name of a file is '../a'"):
        RowWriter(tmp_path).write('../a', keys_of(['a']), np.zeros((1, 20), 'u1'))


@pytest.mark.parametrize('inputs', ['inputs', lambda b: b['inputs']], ids=['column', 'function'])
def test_rows_of_other_inputs_are_refused(inputs, tmp_path):
    start(tmp_path, inputs=inputs)
    start(tmp_path, inputs=inputs)
    other = (lambda b: -b['inputs']) if callable(inputs) else 'label'
    for use in (
        lambda: TeacherRows(tmp_path, Teacher(net()), inputs=other),
        lambda: start(
            tmp_path, inputs=(lambda b: 2 * b['inputs']) if callable(inputs) else ('inputs',)
        ),
    ):
        with pytest.raises(DistillError, match="has rows with teacher .*'reads'"):
            use()
    same = (lambda b: b['inputs']) if isinstance(inputs, str) else 'inputs'
    TeacherRows(tmp_path, Teacher(net()), inputs=same)  # this may be the same


def test_a_sealed_folder_stays_as_it_is(tmp_path):
    rows = written(tmp_path)
    a, b = seal_stream(tmp_path), seal_stream(tmp_path)
    assert a.identity == b.identity
    with pytest.raises(DistillError, match='is already sealed'):
        write_stream(batches(range(3)), rows, 'more')
    with pytest.raises(DistillError, match='written as a stream: True in the cache, False now'):
        cache_dataset(
            Teacher(net()),
            torch.utils.data.TensorDataset(X),
            tmp_path,
            views=0,
            store='float32',
            keys=[f'sample {i}' for i in range(N)],
            progress=False,
        )
    assert len(TeacherCache(tmp_path).check()) == N


def test_a_file_that_is_lost_or_damaged_after_sealing_is_named(tmp_path):
    written(tmp_path)
    cache = seal_stream(tmp_path)
    file = tmp_path / 'view000' / 'shard-1-000001.rows'
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b'x')
    with pytest.raises(DistillError, match='shard-1-000001.rows differs .* write the stream again'):
        cache.check()
    file.unlink()
    with pytest.raises(DistillError, match='shard-1-000001.rows is missing'):
        StreamJoin([], tmp_path)


def test_replayed_takes_a_sealed_stream(tmp_path):
    written(tmp_path)
    data = torch.utils.data.TensorDataset(X[:7])
    names = [f'sample {i}' for i in range(7)]
    replayed = Replayed(data, seal_stream(tmp_path), keys=names)
    x, rows = next(iter(DataLoader(replayed, 7)))
    torch.testing.assert_close(replayed.cache.decode(rows).logits, net()(x).detach())


@pytest.mark.parametrize(
    'change,match',
    [
        (lambda m: m['parts'][0].__setitem__(0, '../a'), 'up to 200 letters'),
        (lambda m: m['parts'][0].__setitem__(1, 4), 'parts have 59 rows, but count is 60'),
        (lambda m: m['parts'].__setitem__(1, m['parts'][0]), 'the same name twice'),
        (lambda m: m['parts'].__setitem__(1, 'x'), r'parts\[1\]'),
    ],
)
def test_a_damaged_manifest_is_refused(change, match, tmp_path):
    written(tmp_path)
    seal_stream(tmp_path)
    m = json.loads((tmp_path / 'manifest.json').read_text())
    change(m)
    write_manifest(tmp_path, m)
    with pytest.raises(DistillError, match=match):
        TeacherCache(tmp_path)


def test_in_memory_of_fsspec():
    pytest.importorskip('fsspec')
    path = 'memory://streams/a'
    written(path)
    cache = seal_stream(path)
    torch.testing.assert_close(cache.outputs(range(N)).logits, net()(X).detach())


def test_an_ensemble_is_stored_along_the_class_axis_of_the_stream(tmp_path):
    torch.manual_seed(0)
    members, x = [nn.Linear(3, C), nn.Linear(3, C)], torch.randn(6, 4, 3)
    want = sum(m(x).softmax(-1) for m in members) / 2
    data = dict(key=list(range(6)), inputs=x)
    start_stream(tmp_path, Teacher(members), data, 'float32', axis=-1)
    # as another process makes it
    RowWriter(tmp_path)(TeacherRows(tmp_path, Teacher(members))(data))
    seal_stream(tmp_path)
    cache = TeacherCache(tmp_path)
    at = cache.find(keys_of(range(6)))
    torch.testing.assert_close(cache.outputs(at).logits.softmax(-1), want)
