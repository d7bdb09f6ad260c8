"The global random generators: saved and restored, and streams apart from them."

import json
import random

import numpy as np
import pytest
import torch
from fastdistill.base.random_state import (
    RandomGuard,
    RandomState,
    RandomStream,
    global_generators,
    guarded_random_state,
)

DRAWS = dict(
    python=random.random,
    numpy=lambda: np.random.rand(),
    torch=lambda: torch.rand(()).item(),
)


def draws():
    return [f() for f in DRAWS.values()]


def test_a_restored_state_draws_the_same_numbers_again():
    state = RandomState()
    first = draws()
    state.restore()
    assert draws() == first


@pytest.mark.parametrize('make', [RandomGuard, guarded_random_state])
def test_a_guard_restores_the_generators_after_an_error(make):
    state = RandomState()
    want = draws()
    state.restore()
    with pytest.raises(KeyError), make():
        draws()
        raise KeyError
    assert draws() == want


@pytest.mark.parametrize('name', DRAWS)
def test_a_guard_tells_whether_anything_drew(name):
    with RandomGuard() as quiet:
        pass
    with RandomGuard() as guard:
        DRAWS[name]()
    assert not quiet.moved
    assert guard.moved


def test_a_stream_continues_where_it_ended_and_leaves_the_global_numbers_alone():
    state = RandomState()
    want = [draws() for _ in range(2)]  # without a stream
    state.restore()
    stream, all_of_them = RandomStream(), global_generators()
    with stream.own(all_of_them):
        first = draws()
    outside = draws()
    with stream.own(all_of_them):
        second = draws()
    assert outside == want[0]
    assert first == want[0]  # it starts from the state outside
    assert second == want[1]
    assert draws() == want[1]


@pytest.mark.parametrize('bits', [np.random.MT19937, np.random.PCG64])
def test_a_saved_stream_continues_after_its_state_was_a_json_file(bits):
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(bits(3))
    try:
        stream, all_of_them = RandomStream(), global_generators()
        assert stream.state_dict() == {}
        with stream.own(all_of_them):
            draws()
        saved = json.loads(json.dumps(stream.state_dict()))
        draws()
        again = RandomStream(saved)
        assert again.state_dict() == saved
        with stream.own(all_of_them):
            want = draws()
        with again.own(all_of_them):
            assert draws() == want
    finally:
        np.random.set_bit_generator(before)


def test_a_stream_in_which_nothing_drew_has_no_state():
    stream = RandomStream()
    with stream.own(global_generators()):
        pass
    assert stream.state_dict() == {}
