"""A teacher draws its own random numbers. They do not change the random state of the student's
training.
"""

import copy
import random
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

__all__ = ['OwnDraws', 'generators']


def generators(devices, python: bool):
    """Name -> (function that reads, function that sets) the state of each global generator.

    Args:
        devices: CUDA devices on which the teacher may draw.
        python: True: it may draw from Python's and NumPy's generators too; reading Python's
            state is slow.
    """
    out = {'cpu': (torch.get_rng_state, torch.set_rng_state)}
    for d in devices:
        out[str(d)] = (
            partial(torch.cuda.get_rng_state, d),
            partial(torch.cuda.set_rng_state, device=d),
        )
    if python:
        out['random'] = random.getstate, random.setstate
        # NumPy's generator is exchanged as a whole, which is faster than to copy its state
        out['numpy'] = np.random.get_bit_generator, np.random.set_bit_generator
    return out


class OwnDraws:
    """Inside `with draws.own(...)`, the global generators continue from the state at the end of the
    last such block. The first block starts from the state outside. At the end of each, the state
    outside is restored.
    """

    # subtle: if states were only restored, a teacher with dropout would draw the same numbers in each batch
    def __init__(self):
        self.states = {}

    @contextmanager
    def own(
        self,
        of,  # what `generators` returns
    ):
        outside = {k: read() for k, (read, _) in of.items()}
        for k, (_, put) in of.items():
            if k not in self.states:
                self.states[k] = copy.deepcopy(outside[k])
            put(self.states[k])
        try:
            yield
        finally:
            for k, (read, put) in of.items():
                self.states[k] = read()
                put(outside[k])
