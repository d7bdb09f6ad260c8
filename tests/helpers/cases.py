"A row says what a loss is: the function, its options, its inputs, a slow reference of it, the numbers of its authors' code."

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / 'golden'


@dataclass
class Golden:
    "Numbers obtained from the authors' code: `golden/NAME.safetensors`; golden/index.json says whose and which formula"

    name: str
    options: Callable = lambda o: o  # the options stored with a case -> ours
    args: Callable = lambda g: (g['student'], g['teacher'])  # the stored tensors -> our arguments
    value: str = 'expected'  # or 'expected_paper', where the release differs from the paper
    scale: Callable = lambda g, o: (
        1.0
    )  # stored value times this is ours; the row says why it isn't 1
    rest: Callable = lambda g, o: (
        0.0
    )  # what else the stored value holds (the labels' own cross-entropy, say), student attached
    tol: float = 1e-9
    more: Callable = lambda g: {}  # options of ours that are made of the stored tensors (a mask)
    only: Callable = lambda o: True  # which of the stored cases, by their options

    def cases(self):
        with safe_open(GOLDEN / f'{self.name}.safetensors', 'pt') as f:
            g = {k: f.get_tensor(k) for k in f.keys()}
        for c in json.loads((GOLDEN / 'index.json').read_text())[self.name]['cases']:
            if not self.only(c['options']):
                continue
            pre = c['case'] + '.'
            yield (
                c['tag'],
                {k[len(pre) :]: v for k, v in g.items() if k.startswith(pre)},
                c['options'],
            )


@dataclass
class Case:
    fn: Callable  # the loss function
    opts: dict  # options of this row
    make: Callable  # dtype -> (s, t, *rest), seeded; `s` may be a list of tensors
    ref: Callable | None = (
        None  # ref(s, t, *rest, **opts) -> the mean, in plain Python loops written from the paper
    )
    at_teacher: float | Callable | None = (
        0.0  # the value at s == t (a number, or a function of the arguments); None: it has no meaning here
    )
    least: bool = True  # is that the smallest value there is?
    order_free: bool = True  # the order of the samples does not matter
    mask: bool = True  # takes mask= and reduction='none'
    module: Callable | None = None  # its module form, fn(**options); None: `Loss`
    golden: list = field(default_factory=list)
    half: float = 1.5  # tolerance in half precision is this many of the dtype's own epsilon, relative to the value's scale
    shared: bool = False  # all positions share a part of their values: a mask is then checked against the chosen positions alone
    extreme: bool = True  # finite for logits of +-1e4
    gradcheck: bool = (
        True  # its gradient is that of its value; not where a part of the student is detached
    )
    name: str = ''

    @property
    def id(self):
        return self.name or self.fn.__name__ + ''.join(f'-{k}={v}' for k, v in self.opts.items())


def logits(*shape, scale=3.0, seed=0, y=False, classes=None, axis=1):
    "Rows of logits for student and teacher, and labels if `y`"

    def make(dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)
        s, t = [torch.randn(*shape, generator=g, dtype=torch.float64) * scale for _ in range(2)]
        rest = ()
        if y:
            lead = list(shape)
            c = lead.pop(axis)
            rest = (torch.randint(c, lead, generator=g),)
        return (s.to(dtype), t.to(dtype), *rest)

    return make


def maps(s_shape, t_shape=None, scale=1.0, seed=0):
    "Feature maps (or vectors, tokens) for student and teacher"

    def make(dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)
        return tuple(
            (torch.randn(*sh, generator=g, dtype=torch.float64) * scale).to(dtype)
            for sh in (s_shape, t_shape or s_shape)
        )

    return make
