"Random numbers of a teacher's own: what it draws changes no random state of the student's training."
import copy, random
from contextlib import contextmanager
from functools import partial
import numpy as np
import torch

__all__ = ['OwnDraws', 'generators']


def generators(
    devices, # CUDA devices on which the teacher may draw
    python:bool # may it draw from the generators of Python and NumPy too? To read Python's takes longer than the others
):
    "Name -> (function that reads, function that sets) the state of each global generator"
    out = {'cpu': (torch.get_rng_state, torch.set_rng_state)}
    for d in devices: out[str(d)] = partial(torch.cuda.get_rng_state, d),partial(torch.cuda.set_rng_state, device=d)
    if python:
        out['random'] = random.getstate,random.setstate
        # NumPy's generator is exchanged as a whole, which is faster than its state
        out['numpy'] = np.random.get_bit_generator,np.random.set_bit_generator
    return out


class OwnDraws:
    """Inside `with draws.own(...)` the global generators continue where the last `with` ended, the first time from
    their state outside; afterwards they are as before"""
    # subtle: if the states were only put back, a teacher with dropout would draw the same numbers for each batch
    def __init__(self): self.states = {}

    @contextmanager
    def own(
        self, of # what `generators` returns
    ):
        outside = {k: read() for k,(read,_) in of.items()}
        for k,(_,put) in of.items():
            if k not in self.states: self.states[k] = copy.deepcopy(outside[k])
            put(self.states[k])
        try: yield
        finally:
            for k,(read,put) in of.items():
                self.states[k] = read()
                put(outside[k])
