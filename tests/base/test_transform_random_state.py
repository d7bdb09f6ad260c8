"Generators that transforms keep to themselves: found wherever they lie, seeded, and put back."

import pickle, random
from functools import partial
import numpy as np
import pytest, torch
from fastdistill.base.transform_random_state import Generators, reachable

RNG = np.random.default_rng(3)


def named(x):
    return x + RNG.normal()


def calls(x):
    return named(x)


def within(x):
    return [x + RNG.random() for _ in range(2)][1]


MINE = random.Random(2)


def default(x, g=MINE):
    return x + g.random()


def closed():
    g = np.random.RandomState(1)
    return lambda x: x + g.rand()


class Keeps:
    def __init__(self, g, draw):
        self.g, self.draw = g, draw

    def __call__(self, x):
        return x + self.draw(self.g)


class OfClass:
    rng = random.Random(5)

    def add(self, x):
        return x + self.rng.random()


class Slots:
    __slots__ = 'g', 'unset'

    def __init__(self):
        self.g = random.Random(6)

    def __call__(self, x):
        return x + self.g.random()


class Names:
    def __call__(self, x):
        return x + RNG.normal()


class Nested:
    def __init__(self):
        self.parts = [dict(a=Keeps(random.Random(1), random.Random.random))]

    def __call__(self, x):
        return self.parts[0]['a'](x)


PLACES = dict(
    generator=lambda: Keeps(np.random.default_rng(0), np.random.Generator.normal),
    philox=lambda: Keeps(np.random.Generator(np.random.Philox(0)), np.random.Generator.normal),
    random_state=lambda: Keeps(np.random.RandomState(0), np.random.RandomState.rand),
    python=lambda: Keeps(random.Random(0), random.Random.random),
    torch=lambda: Keeps(
        torch.Generator().manual_seed(0), lambda g: torch.rand(1, generator=g).item()
    ),
    nested=Nested,
    slots=Slots,
    of_class=lambda: OfClass().add,
    names=Names,
    closure=closed,
    named=lambda: named,
    calls=lambda: calls,
    within=lambda: within,
    default=lambda: default,
    partial=lambda: partial(named),
)


@pytest.mark.parametrize('place', PLACES)
def test_it_is_found_seeded_and_put_back(place):
    fn = PLACES[place]()
    own = Generators(fn)
    with own.seeded(7):
        a = [fn(1.0), fn(1.0)]
    fn(1.0)
    with own.seeded(7):
        b = [fn(1.0), fn(1.0)]
    with own.seeded(2**64 - 1):
        c = [fn(1.0), fn(1.0)]
    assert a == b and a[0] != a[1] and a[0] != c[0]


@pytest.mark.parametrize(
    'make',
    [
        lambda: np.random.default_rng(4),
        lambda: np.random.RandomState(4),
        lambda: random.Random(4),
        lambda: torch.Generator().manual_seed(4),
    ],
)
def test_what_comes_afterwards_is_what_would_have_come(make):
    def draw(g):
        return torch.rand(1, generator=g).item() if isinstance(g, torch.Generator) else g.random()

    a, b = make(), make()
    draw(a)
    draw(b)
    with pytest.raises(KeyError), Generators([b]).seeded(1):
        draw(b)
        raise KeyError
    assert [draw(a) for _ in range(3)] == [draw(b) for _ in range(3)]


def test_each_has_numbers_of_its_own():
    pair = [np.random.default_rng(0), np.random.default_rng(0)]
    with Generators(pair).seeded(1):
        a, b = [g.random() for g in pair]
    assert a != b


def test_others_do_not_shift_its_numbers():
    "An attribute more, found before it, changes nothing; nor does the order of a function's names"
    a, b = Keeps(random.Random(0), None), Keeps(random.Random(0), None)
    b.__dict__ = dict(extra=np.random.default_rng(0), **b.__dict__)
    with Generators(a).seeded(1), Generators(b).seeded(1):
        assert a.g.random() == b.g.random()


def test_a_generator_that_is_replaced_is_followed():
    a = Keeps(random.Random(0), random.Random.random)
    own = Generators(a)
    with own.seeded(1):
        x = a(0)
    a.g = random.Random(9)
    with own.seeded(1):
        assert a(0) == x


def test_global_generators_are_not_among_them():
    class Uses:
        fns = (
            random.random,
            np.random.rand,
            random._inst,
            np.random.mtrand._rand,
            torch.default_generator,
            random.SystemRandom(),
        )

    assert not Generators(Uses(), np.random.normal, torch.rand, random.gauss).places


def test_a_worker_gets_them_with_what_holds_them():
    fn = Keeps(random.Random(0), random.Random.random)
    fn2, own = pickle.loads(pickle.dumps((fn, Generators(fn))))
    with own.seeded(1):
        a = fn2(0)
    with Generators(fn).seeded(1):
        assert fn(0) == a


def test_data_are_not_searched():
    class Data:
        def __init__(self):
            self.items, self.rng = [random.Random(i) for i in range(1000)], random.Random(0)

    assert len(Generators(Data()).places) == 1


def test_the_search_does_not_pass_through_spacy_to_all_that_it_imports():
    "But a generator that a tokenizer keeps is found"
    text = pytest.importorskip('fastai.text.core')
    tokenizer = text.SpacyTokenizer('en')
    tokenizer.rng = random.Random(0)
    assert len([*reachable([tokenizer])]) < 500
    assert len(Generators(tokenizer).places) == 1


def test_albumentations():
    A = pytest.importorskip('albumentations')
    aug = A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.OneOf([A.RandomBrightnessContrast(p=1.0), A.GaussNoise(p=1.0)], p=0.9),
            A.RandomCrop(6, 6),
        ]
    )
    x = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)

    def fn(x):
        return aug(image=x)['image']

    own = Generators(fn)

    def shown(seed):
        with own.seeded(seed):
            return fn(x)

    views = [shown(i) for i in range(12)]
    assert all(np.array_equal(v, shown(i)) for i, v in enumerate(views))
    assert len({v.tobytes() for v in views}) == 12
    aug.set_random_seed(5)
    want = [fn(x) for _ in range(3)]
    aug.set_random_seed(5)
    got = []
    for i in range(3):
        shown(i)
        got.append(fn(x))
    assert all(map(np.array_equal, want, got))
