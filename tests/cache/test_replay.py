"Random numbers that belong to a sample and a view."

import copy, random
from collections import namedtuple
import numpy as np
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from fastdistill import Distiller
from fastdistill.cache import TeacherCache, cache_dataset
from fastdistill.base.outputs import DistillError, DistillWarning, Outputs
from fastdistill.cache import Replayed
from fastdistill.cache.per_sample import PerSample, per_sample
from fastdistill.base.random_state import restored_once, seeded, RandomGuard
from fastdistill.base.sample_seeds import scramble, seeds_of, view_of
from fastdistill.teachers import Teacher


def splitmix(state):
    "Steele, Lea and Flood 2014, in plain Python"
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_scramble_is_splitmix64():
    xs = [0, 1, 2**63, 2**64 - 1, 1234567]
    assert (
        [scramble(x) for x in xs]
        == scramble(np.array(xs, np.uint64)).tolist()
        == [splitmix(x) for x in xs]
    )
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published first number of seed 0


def test_one_number_and_many_agree():
    keys = np.random.default_rng(0).integers(0, 2**64, 50, dtype=np.uint64)
    for stages in [(), (3,), (2, 2**63 + 5)]:
        assert seeds_of(7, keys, *stages).tolist() == [seeds_of(7, int(k), *stages) for k in keys]
    views = np.arange(50) % 4
    assert seeds_of(7, keys, views).tolist() == [
        seeds_of(7, int(k), int(v)) for k, v in zip(keys, views)
    ]
    for n in range(1, 9):
        for e in range(20):
            assert view_of(keys, e, n, 5).tolist() == [view_of(int(k), e, n, 5) for k in keys]


@pytest.mark.parametrize('views', range(1, 10))
def test_views_come_once_each_in_an_order_that_changes(views):
    keys = np.arange(200, dtype=np.uint64)
    v = np.stack([view_of(keys, e, views) for e in range(3 * views)])
    for lap in np.split(v, 3):
        assert (np.sort(lap, 0) == np.arange(views)[:, None]).all()
    if views > 3:
        assert (
            len({tuple(o) for o in v[:views].T}) > views - 1
            and (v[:views] != v[views : 2 * views]).any()
        )
    if views > 1:
        assert (
            np.bincount(v[0], minlength=views).min() > 200 / views / 3
        )  # an epoch shows all of them


def draws():
    return random.random(), np.random.rand(), torch.rand(2).tolist()


def test_seeded_repeats_and_puts_back():
    was = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with seeded(2**64 - 1):
        a = draws()
    with seeded(2**64 - 1):
        b = draws()
    with seeded(3):
        c = draws()
    assert a == b and all(x != y for x, y in zip(a, c))
    with pytest.raises(KeyError):
        with seeded(1):
            raise KeyError
    assert was == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


def test_many_seeded_in_a_row_put_back_once():
    def state():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            np.random.get_state()[2:],
            torch.get_rng_state().tolist(),
        )

    def draw(s):
        with seeded(s):
            return random.random(), np.random.normal(), torch.rand(1).item()

    np.random.normal()  # leaves a second number behind
    was, alone = state(), [draw(s) for s in range(3)]
    assert state() == was
    with restored_once():
        got = [draw(s) for s in range(3)]
    assert got == alone and state() == was
    with pytest.raises(KeyError), restored_once(), restored_once():
        draw(1)
        raise KeyError
    assert state() == was
    draw(1)
    assert state() == was  # and nothing is held any more


def test_untouched_notices_each_generator():
    for f in (
        random.random,
        np.random.rand,
        lambda: torch.rand(1),
        lambda: torch.empty(2).normal_(),
    ):
        was = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        with RandomGuard() as u:
            f()
        assert u.moved and was == (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
    with RandomGuard() as u:
        PerSample([1, 2])
    assert not u.moved


def all_kinds(n):
    return [
        torch.empty(n).uniform_(-2, 3),
        torch.empty(n, 2, 3).uniform_(),
        torch.empty(n).bernoulli_(0.3),
        torch.empty(n).normal_(1, 2),
        torch.randint(0, 8, (n,)),
        torch.randint(5, (n, 2)),
        torch.randint(low=2, high=4, size=(n,)),
        torch.empty(n).float().uniform_(0, to=2),
    ]


def test_a_sample_draws_the_same_in_every_batch():
    seeds = seeds_of(0, np.arange(400, dtype=np.uint64))
    with RandomGuard() as u, PerSample(seeds):
        whole = all_kinds(400)
    assert not u.moved
    for part in (slice(3, 5), slice(17, 18), [9, 2, 300]):
        with PerSample(seeds[part]):
            some = all_kinds(len(seeds[part]))
        for a, b in zip(whole, some):
            torch.testing.assert_close(a[part], b, rtol=0, atol=0)


def test_bounds_of_randint_may_be_numpy_numbers():
    def drawn(*bounds):
        with PerSample([1, 2]):
            return torch.randint(*bounds, (2,)).tolist()

    assert drawn(np.int64(5)) == drawn(5)
    assert drawn(np.int64(3), 99) == drawn(3, 99)


def test_draws_are_distributed_as_asked_and_independent():
    n = 20000
    with PerSample(seeds_of(1, np.arange(n, dtype=np.uint64))):
        u, many, b, g, i, j, k, _ = all_kinds(n)
    assert (
        u.min() >= -2
        and u.max() <= 3
        and abs(u.mean() - 0.5) < 0.04
        and abs(u.std() - 5 / 12**0.5) < 0.03
    )
    assert abs(b.mean() - 0.3) < 0.015 and abs(g.mean() - 1) < 0.05 and abs(g.std() - 2) < 0.05
    assert (
        i.unique().tolist() == list(range(8))
        and j.unique().tolist() == list(range(5))
        and k.unique().tolist() == [2, 3]
    )
    assert (torch.bincount(i) / n - 1 / 8).abs().max() < 0.01
    m = torch.corrcoef(torch.stack([u, *many.flatten(1).T, g, b, i.float()]))
    assert (m - torch.eye(len(m))).abs().max() < 0.04


def test_what_is_not_of_the_batch_is_left_alone():
    torch.manual_seed(0)
    want = torch.rand(3), torch.empty(7).uniform_(), torch.randint(0, 9, (5,))
    torch.manual_seed(0)
    with PerSample([1, 2]):
        got = torch.rand(3), torch.empty(7).uniform_(), torch.randint(0, 9, (5,))
    for a, b in zip(want, got):
        assert torch.equal(a, b)


def test_per_sample_is_right_for_any_function():
    def fn(x, y):
        return x * torch.rand_like(x) + random.random(), y + np.random.randint(100)

    x, y = torch.randn(6, 2, 3), torch.arange(6)
    seeds = seeds_of(0, np.arange(6, dtype=np.uint64))
    a, b = per_sample(fn, seeds, x, y)
    c, d = per_sample(fn, seeds[[4, 1]], x[[4, 1]], y[[4, 1]])
    assert torch.equal(a[[4, 1]], c) and torch.equal(b[[4, 1]], d) and a.shape == x.shape
    add, small = lambda x: x + torch.rand(1), seeds >> np.uint64(1)  # seeds that fit into a tensor
    assert torch.equal(
        per_sample(add, torch.from_numpy(small.astype(np.int64)), x), per_sample(add, small, x)
    )


class Noisy(Dataset):
    "Rows of numbers; each is disturbed by all three generators"

    def __init__(self, n=23):
        self.x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] * (1 + random.random()) + np.random.rand() + torch.rand(5), i


W = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Net:
    name, module = 'net', torch.nn.Identity()

    def __call__(self, x):
        return Outputs(x @ W)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_plain_loop_sees_the_views_that_the_teacher_saw(tmp_path, workers):
    cache = cache_dataset(
        Net(),
        Noisy(),
        tmp_path,
        views=3,
        store=dict(dtype='float32'),
        keys=range(23),
        run=dict(bs=4, num_workers=workers),
    )
    data = Replayed(Noisy(), cache, keys=range(23))
    kw = dict(num_workers=workers, persistent_workers=True) if workers else {}
    epochs = []
    loader = DataLoader(data, 5, shuffle=True, **kw)
    for e in range(4):
        data.set_epoch(e)  # workers that outlive the epoch must see it
        for x, i, rows in loader:
            torch.testing.assert_close(cache.decode(rows).logits, x @ W, rtol=1e-5, atol=1e-5)
            epochs.append((e, i, x))
    of = lambda e: torch.cat([x for k, _, x in epochs if k == e])[
        torch.cat([i for k, i, _ in epochs if k == e]).argsort()
    ]
    assert (
        min((of(0) - of(1)).abs().max(1).values.min(), (of(1) - of(2)).abs().max(1).values.min())
        > 1e-3
    )
    a, b = torch.stack([of(0), of(1), of(2)]).sum(2).sort(0).values, of(3).sum(1)
    assert ((a - b).abs().amin(0) < 1e-5).all()  # the fourth epoch begins again


def test_batch_transforms_of_a_plain_loop(tmp_path):
    def shake(x):
        return x + torch.randn_like(x) * random.random()

    cache = cache_dataset(
        Net(),
        Noisy(),
        tmp_path,
        views=2,
        store=dict(dtype='float32'),
        keys=range(23),
        run=dict(bs=4),
        batch_tfm=shake,
    )
    data = Replayed(Noisy(), cache, keys=range(23), seeds=True)
    for e in range(3):
        data.set_epoch(e)
        for x, _, rows, seeds in DataLoader(data, 7, shuffle=True):
            torch.testing.assert_close(
                cache.decode(rows).logits, per_sample(shake, seeds, x) @ W, rtol=1e-5, atol=1e-5
            )


def test_clean_rows_leave_the_students_transforms_random(tmp_path):
    cache = cache_dataset(
        Net(),
        torch.utils.data.TensorDataset(Noisy().x),
        tmp_path,
        views=0,
        store=dict(dtype='float32'),
    )

    class Both(torch.utils.data.TensorDataset):
        def __getitem__(self, i):
            return self.tensors[0][i] + torch.rand(5), i

    data = Replayed(Both(Noisy().x), cache)
    a, b = data[3], data[3]
    assert not torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    torch.testing.assert_close(
        cache.decode(a[2][None]).logits[0], Noisy().x[3] @ W, rtol=1e-5, atol=1e-5
    )
    assert data[-1][1] == 22
    with pytest.raises(IndexError):
        data[23]


@pytest.mark.parametrize('recipe', [None, 'kd()'])
def test_logits_in_float32_train_the_student_of_a_live_teacher(tmp_path, recipe):
    "Both loops in one order, with the same dropout: the teacher moves no random state"
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(60, 5), torch.arange(60) % 3)
    teacher = Teacher(nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 3)))
    cache = cache_dataset(teacher, data, tmp_path, views=0, store='float32')
    rows = Replayed(data, cache)

    def trained(stored):
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        distiller = Distiller(student, None if stored else teacher, recipe)
        opt = torch.optim.SGD(student.parameters(), 0.1)
        for _ in range(3):
            for x, y, *row in DataLoader(rows if stored else data, 16, shuffle=True):
                if stored:
                    s = student(x)
                    task = nn.functional.cross_entropy(s, y)
                    loss = distiller.compute(Outputs(s), cache.decode(*row), task, (y,))
                else:
                    loss = distiller(x, y)
                opt.zero_grad()
                loss.total.backward()
                opt.step()
        return nn.utils.parameters_to_vector(student.parameters())

    assert torch.equal(trained(stored=True), trained(stored=False))


class Own(Noisy):
    "Draws from a generator of its own, as recent transforms do"

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng()

    def __getitem__(self, i):
        return super().__getitem__(i)[0] + torch.from_numpy(self.rng.normal(size=5)).float(), i


@pytest.mark.parametrize('workers', [0, 2])
def test_generators_of_a_datasets_own_are_replayed_too(tmp_path, workers):
    cache = cache_dataset(
        Net(),
        Own(),
        tmp_path,
        views=2,
        store=dict(dtype='float32'),
        keys=range(23),
        run=dict(bs=4, num_workers=workers),
    )
    data = Replayed(Own(), cache, keys=range(23))
    for x, _, rows in DataLoader(data, 5, shuffle=True, num_workers=workers):
        torch.testing.assert_close(cache.decode(rows).logits, x @ W, rtol=1e-5, atol=1e-5)


def test_a_part_of_several_datasets_draws_as_the_whole(tmp_path):
    "Each dataset's own generator has numbers that do not depend on the company"
    a, b = Own(), Own()
    b.x = b.x + 5
    both = torch.utils.data.ConcatDataset([a, b])
    cache = cache_dataset(
        Net(), both, tmp_path, views=2, store=dict(dtype='float32'), keys=range(46)
    )
    for part, keys in (
        (b, range(23, 46)),
        (torch.utils.data.ConcatDataset([b, a]), [*range(23, 46), *range(23)]),
        (torch.utils.data.Subset(both, [40, 3]), [40, 3]),
    ):
        for x, _, rows in DataLoader(Replayed(part, cache, keys=keys), 5):
            torch.testing.assert_close(cache.decode(rows).logits, x @ W, rtol=1e-5, atol=1e-4)


def test_other_transforms_are_refused_by_whoever_replays_or_writes(tmp_path):
    def shake(x):
        return x + torch.randn_like(x)

    class Louder(Noisy):
        def __getitem__(self, i):
            return super().__getitem__(i)[0] * 2, i

    class Lazy(Noisy):  # its generator is not there when it is looked for
        rng = None

        def __getitem__(self, i):
            self.rng = self.rng or np.random.default_rng()
            return self.x[i] * self.rng.random(), i

    cache = cache_dataset(Net(), Noisy(), tmp_path / 'a', views=2, keys=range(23))
    with pytest.raises(
        DistillError, match='the input of sample 0: the transforms give a different result'
    ):
        Replayed(Louder(), cache, keys=range(23))
    with pytest.raises(DistillError, match='the inputs of some samples'):
        cache_dataset(Net(), Louder(), tmp_path / 'a', views=2, keys=range(23))
    with pytest.raises(DistillError, match='transform batch_tfm: none in the cache, .*shake'):
        cache_dataset(Net(), Noisy(), tmp_path / 'a', views=2, keys=range(23), batch_tfm=shake)
    seen = Lazy()
    seen[0]
    lazy = cache_dataset(Net(), seen, tmp_path / 'b', views=2, keys=range(23))
    with pytest.raises(DistillError, match='give a different result'):
        Replayed(Lazy(), lazy, keys=range(23))
    with pytest.warns(UserWarning, match='It is used anyway'):
        Replayed(Louder(), TeacherCache(tmp_path / 'a', force=True), keys=range(23))


class Drawn(Noisy):
    "Notes what somebody else draws beside the items"

    def __getitem__(self, i):
        return self.x[i], torch.tensor(random.random())


@pytest.mark.parametrize('workers', [0, 1])
def test_what_others_draw_in_a_worker_is_not_repeated(tmp_path, workers):
    cache = cache_dataset(Net(), Noisy(), tmp_path, views=1, keys=range(23))
    both = torch.utils.data.ConcatDataset([Replayed(Noisy(), cache, keys=range(23)), Drawn()])
    order = [0, 23, 1, 24, 2, 25]  # a replayed item before each

    def drawn():
        return [
            both_item
            for both_item in DataLoader(both, None, sampler=order, num_workers=workers)
            if len(both_item) == 2
        ]

    a, b = drawn(), drawn()
    assert len({float(o[1]) for o in a + b}) == 6


def test_an_inner_seed_is_put_back_inside_of_an_outer_one():
    with seeded(1):
        a = [random.random(), torch.rand(1).item(), np.random.rand()]

    def inner():
        with seeded(9):
            random.random(), torch.rand(1), np.random.rand()

    with restored_once():
        for _ in range(2):
            with seeded(1):
                inner()
                assert [random.random(), torch.rand(1).item(), np.random.rand()] == a


def test_copies_see_the_epoch_in_workers_that_live_on(tmp_path):
    cache = cache_dataset(Net(), Noisy(), tmp_path, views=2, keys=range(23))
    data = copy.deepcopy(Replayed(Noisy(), cache, keys=range(23)))
    loader = DataLoader(data, 23, num_workers=1, persistent_workers=True)
    for e in range(3):
        data.set_epoch(e)
        assert torch.equal(next(iter(loader))[0], torch.stack([data[i][0] for i in range(23)]))


def test_writing_moves_no_global_random_state(tmp_path):
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    cache_dataset(Net(), Noisy(), tmp_path, views=2, keys=range(23))
    assert torch.equal(torch.rand(1), want)


def test_per_sample_gives_what_the_function_gives():
    Two = namedtuple('Two', 'a b')
    out = per_sample(lambda x: Two(x, -x), [1, 2, 3], torch.arange(3.0))
    assert type(out) is Two and torch.equal(out.b, -torch.arange(3.0))
    with pytest.raises(DistillError, match='2 seeds for 3 samples'):
        per_sample(lambda x: x, [1, 2], torch.arange(3.0))


def test_what_cannot_be_repeated_is_refused(tmp_path):
    class Bad(Noisy):
        def __getitem__(self, i):
            return self.x[i] * np.random.default_rng().random(), i

    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(5)

    with pytest.raises(DistillError, match='two different results'):
        cache_dataset(Net(), Bad(), tmp_path, keys=range(23))
    with pytest.raises(DistillError, match='views=0 stores one output .* differ each time'):
        cache_dataset(Net(), Noisy(), tmp_path, views=0, keys=range(23))

    def unrepeatable(x):
        return x * float(np.random.default_rng().random())

    with pytest.raises(DistillError, match='batch_tfm gave two different results for sample'):
        cache_dataset(Net(), Noisy(), tmp_path, keys=range(23), batch_tfm=unrepeatable)
    with pytest.raises(
        DistillError, match="batch_tfm= takes tensors, but the teacher's inputs are dict"
    ):
        cache_dataset(
            Net(),
            Noisy(),
            tmp_path,
            keys=range(23),
            batch_tfm=lambda x: x,
            inputs=lambda b: dict(x=b[0]),
        )
    drops = Teacher(
        torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Dropout(0.5)), run=dict(mode='train')
    )
    with pytest.raises(DistillError, match='if other samples are in its batch'):
        cache_dataset(drops, Noisy(), tmp_path, keys=range(23))
    with pytest.raises(DistillError, match='Stream can only be iterated'):
        cache_dataset(Net(), Stream(), tmp_path)
    with pytest.raises(DistillError, match='pass Teacher'):
        cache_dataset(torch.nn.Linear(5, 4), Noisy(), tmp_path, keys=range(23))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('views', [0, 2])
def test_a_cache_of_edited_inputs_is_not_taken_for_complete(tmp_path, views):
    def written(x):
        data = Noisy() if views else torch.utils.data.TensorDataset(x, torch.arange(23))
        data.x = x
        return cache_dataset(Net(), data, tmp_path, views=views, keys=range(23))

    x = Noisy().x
    written(x)
    assert written(x).manifest.complete
    with pytest.raises(DistillError, match='the inputs of some samples: the transforms give a'):
        written(x + 1)


@pytest.mark.parametrize('views', [0, 1])
def test_different_inputs_of_one_name_are_refused_where_they_are_written_and_where_they_are_used(
    tmp_path, views
):
    data = torch.utils.data.TensorDataset(Noisy().x[:6])
    kw = dict(views=views, store='float32', progress=False)
    with pytest.raises(
        DistillError, match='Samples 1 and 4 have the same key, but different inputs'
    ):
        cache_dataset(Net(), data, tmp_path, keys=list('abcdbf'), **kw)
    assert not list(tmp_path.iterdir())
    cache = cache_dataset(Net(), data, tmp_path, keys=list('abcdef'), **kw)
    with pytest.raises(
        DistillError, match='Samples 0 and 2 have the same key, but different inputs'
    ):
        Replayed(torch.utils.data.Subset(data, [0, 1, 5]), cache, keys=['a', 'b', 'a'])


def test_samples_without_a_row_say_how_to_name_them(tmp_path):
    data = torch.utils.data.TensorDataset(Noisy().x[:6])
    cache = cache_dataset(Net(), data, tmp_path, keys=list('abcdef'), progress=False)
    with pytest.raises(DistillError, match=r'6 of 6 samples .*: Replayed\(dataset, cache, keys='):
        Replayed(data, cache)
    with pytest.raises(DistillError, match='1 of 6 samples .* keys= does not give the samples'):
        Replayed(data, cache, keys=list('abcdeg'))


@pytest.mark.parametrize('views', [0, 2])
def test_equal_inputs_may_share_a_name(tmp_path, views):
    data, names = torch.utils.data.TensorDataset(Noisy().x[[0, 1, 2, 1, 0, 1]]), list('abcbab')
    shake = (lambda o: o + torch.rand(5)) if views else None
    kw = dict(views=views, store='float32', progress=False, batch_tfm=shake)
    cache = cache_dataset(Net(), data, tmp_path, keys=names, **kw)
    order = [5, 2, 0, 4, 1]
    part = Replayed(
        torch.utils.data.Subset(data, order), cache, keys=[names[i] for i in order], seeds=True
    )
    for own, row, seed in part:
        got = per_sample(shake, [int(seed)], own[None]) if views else own[None]
        torch.testing.assert_close(cache.decode(row[None]).logits, got @ W, rtol=1e-5, atol=1e-5)


def test_parts_of_one_file_are_different_samples(tmp_path):
    "A tuple that begins with a path is known by this path, which is not enough for clips of a film"

    class Clips(Noisy):
        samples = [(f'film {i // 2}.mp4', i % 2) for i in range(23)]

        def __getitem__(self, i):
            return self.x[i], i

    with pytest.raises(
        DistillError,
        match=r"Samples \d+ \('film (\d+).mp4'\) and \d+ \('film \1.mp4'\) have the same",
    ):
        cache_dataset(Net(), Clips(), tmp_path, views=0, progress=False)


class Shifted(torch.nn.Module):
    "Nothing but weights is in its state dict"

    def __init__(self, act, shift=0.0):
        super().__init__()
        self.act, self.out = act, torch.nn.Linear(5, 4)
        self.register_buffer('shift', torch.full((5,), shift), persistent=False)
        self.load_state_dict({'out.weight': W.T, 'out.bias': torch.zeros(4)})

    def forward(self, x):
        return self.out(self.act(x - self.shift))


TANH = Shifted(torch.nn.Tanh())
CHANGES = dict(
    nothing=(TANH, None),
    inputs=(TANH, lambda b: b[1]),
    activation=(Shifted(torch.nn.ReLU()), None),
    buffer=(Shifted(torch.nn.Tanh(), 1.0), None),
)


@pytest.mark.parametrize('store', ['float32', 'int8', dict(topk=2), 'hidden'], ids=str)
@pytest.mark.parametrize('change', CHANGES)
def test_a_cache_is_not_continued_with_other_outputs(tmp_path, change, store):
    "Each of these teachers has the same weights, and the samples have the same names"
    x = Noisy().x
    data = torch.utils.data.TensorDataset(x, x.flip(1))

    def write(net, inputs, **options):
        return cache_dataset(
            Teacher(net.eval()),
            data,
            tmp_path,
            views=0,
            store=store,
            keys=range(23),
            inputs=inputs,
            progress=False,
            run=dict(bs=4),
            **options,
        )

    before = write(TANH, None).rows(range(23))
    if change == 'nothing':
        assert np.array_equal(write(*CHANGES[change]).rows(range(23)), before)
        return
    with pytest.raises(
        DistillError, match="teacher's outputs for the first samples: they differ by"
    ):
        write(*CHANGES[change])
    with pytest.warns(DistillWarning, match='The cache is overwritten'):
        after = write(*CHANGES[change], force=True).rows(range(23))
    assert not np.array_equal(before, after)


ROWS = Noisy(60).x


class Flipped(torch.utils.data.TensorDataset):
    "A random transform that often changes nothing"

    def __getitem__(self, i):
        x = super().__getitem__(i)[0]
        return (x.flip(0) if random.random() < 0.5 else x,)


@pytest.mark.parametrize(
    'now,fits',
    [
        (torch.utils.data.TensorDataset(ROWS), True),
        (Flipped(ROWS), True),
        (torch.utils.data.TensorDataset(ROWS[:, :3]), True),  # the student sees something else
        (
            torch.utils.data.TensorDataset(
                ROWS[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
            ),
            False,
        ),
        (torch.utils.data.TensorDataset(torch.cat([ROWS[:20], ROWS[21:]])), False),
        (Flipped(torch.cat([ROWS[:20], ROWS[21:]])), False),
    ],
    ids=['same', 'augmented', 'part', 'shuffled', 'removed', 'removed, augmented'],
)
def test_names_that_are_positions_do_not_fit_moved_samples(now, fits, tmp_path):
    kw = dict(views=0, store='float32', progress=False, keys=range(60))
    cache = cache_dataset(Net(), torch.utils.data.TensorDataset(ROWS), tmp_path, **kw)
    use = lambda: Replayed(now, cache, keys=range(len(now)))
    if fits:
        use()
    else:
        with pytest.raises(
            DistillError, match='sample .* has the input that sample .* had when the'
        ):
            use()


def test_outputs_reads_the_rows_of_indices_and_decode_takes_only_bytes(tmp_path):
    x, net = torch.randn(12, 5), torch.nn.Linear(5, 3)
    data = torch.utils.data.TensorDataset(x, torch.arange(12))
    cache = cache_dataset(Teacher(net), data, tmp_path / 'c', views=0, store='float32')
    for at in torch.randperm(12).split(4):
        torch.testing.assert_close(cache.outputs(at).logits, net(x[at]).detach())
    for wrong in (torch.arange(4), np.arange(4), 3, torch.zeros(4, 12)):
        with pytest.raises(DistillError, match=r'decode takes stored rows.*outputs\(positions\)'):
            cache.decode(wrong)
