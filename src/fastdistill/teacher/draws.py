"Random numbers of a teacher's own: what it draws moves no random state of the student's training."
import copy, random
from contextlib import contextmanager
from functools import partial
import numpy as np
import torch

__all__ = ['OwnDraws', 'generators']


def generators(
    devices, # CUDA devices on which the teacher may draw
    python:bool # may it draw from Python's generator and NumPy's too? Reading Python's takes longer than all the others
):
    "Name -> (function that reads, function that sets) the state of each global generator; NumPy's state is the generator itself"
    out = {'cpu': (torch.get_rng_state, torch.set_rng_state)}
    for d in devices: out[str(d)] = partial(torch.cuda.get_rng_state, d),partial(torch.cuda.set_rng_state, device=d)
    if python: out |= dict(random=(random.getstate, random.setstate), numpy=(np.random.get_bit_generator, np.random.set_bit_generator))
    return out


class OwnDraws:
    """Inside `with draws.own(generators):` the random numbers continue those of the last time (at first: the global ones, as they
    are now); afterwards the global generators are as they were.

    subtle: if a teacher with dropout were only put back, it would draw the same numbers for each batch"""
    def __init__(self): self.states = {}

    @contextmanager
    def own(self, generators):
        outside = {k: read() for k,(read,_) in generators.items()}
        for k,(_,put) in generators.items():
            if k not in self.states: self.states[k] = copy.deepcopy(outside[k])
            put(self.states[k])
        try: yield
        finally:
            for k,(read,put) in generators.items():
                self.states[k] = read()
                put(outside[k])
