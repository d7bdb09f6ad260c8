"""Run batch transforms with separate random numbers for each sample."""

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..base.outputs import DistillError
from ..base.random_state import restored_generators
from ..base.sample_seeds import MIX, scramble, seeds_of
from ..base.transform_random_state import Generators


def per_sample(fn: Callable, seeds: Any, *tensors: Tensor) -> Any:
    """Apply `fn` to one sample at a time, with separate random numbers for each sample.

    The loop over samples is slow, but correct for every function.

    Args:
        fn: Function of one or more tensors (1, ...) that returns a tensor or a tuple of tensors.
        seeds: One seed for each sample, (B,).
        *tensors: Inputs of `fn` for the whole batch, (B, ...) each.
    """
    if len(seeds) != len(tensors[0]):
        raise DistillError(f'{len(seeds)} seeds for {len(tensors[0])} samples: give one for each.')
    outs, own = [], Generators(fn)
    with restored_generators(tensors[0].device) as start:
        for i, s in enumerate(seeds.tolist() if isinstance(seeds, Tensor) else seeds):
            start(s)
            with own.seeded(s):
                outs.append(fn(*(o[i : i + 1] for o in tensors)))
    if not isinstance(outs[0], (tuple, list)):
        return torch.cat(outs)
    made, kind = [torch.cat(o) for o in zip(*outs)], type(outs[0])
    return kind(*made) if hasattr(kind, '_fields') else kind(made)


class PerSample(TorchFunctionMode):
    """Context in which PyTorch draws random numbers for each sample from the sample's own seed.

    The context affects `uniform_`, `bernoulli_`, `normal_` and `randint` for tensors whose first
    dimension is the batch. The numbers for all samples are drawn at once. The random numbers depend
    only on the seeds, not on the device.
    """

    def __init__(self, seeds: Any):
        super().__init__()
        self.seeds, self.calls = np.asarray(seeds, np.uint64), 0

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Draw uniform random numbers in (0, 1).

        A sample gets the same numbers in every batch.
        """
        self.calls += 1
        base = seeds_of(self.calls, self.seeds)
        n = int(np.prod(shape[1:]))
        bits = scramble(base[:, None] + np.arange(n, dtype=np.uint64) * np.uint64(MIX[1]))
        numbers = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return torch.from_numpy(numbers).reshape(shape)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        make = getattr(self, 'new_' + getattr(func, '__name__', ''), None)
        return func(*args, **kwargs) if make is None else make(func, *args, **kwargs)

    def fill(self, func: Callable, x: Any, of: Callable, *args: Any, **kwargs: Any) -> Any:
        if x.dim() == 0 or len(x) != len(self.seeds):
            return func(x, *args, **kwargs)
        return x.copy_(of(self.draw(x.shape)))

    # the arguments have the same names as in PyTorch. Since `from` is a Python keyword, its value is
    # read from kwargs
    def new_uniform_(self, func: Callable, x: Any, *args: Any, **kwargs: Any) -> Any:
        ends = [*args, kwargs.get('from', 0.0), kwargs.get('to', 1.0)]
        lo, hi = ends[:2] if len(args) != 1 else (args[0], kwargs.get('to', 1.0))
        return self.fill(func, x, lambda u: u * (hi - lo) + lo, *args, **kwargs)

    def new_bernoulli_(self, func: Callable, x: Any, p: Any = 0.5, **kwargs: Any) -> Any:
        least = p.cpu() if isinstance(p, Tensor) else p
        return self.fill(func, x, lambda u: u < least, p, **kwargs)

    def new_normal_(
        self, func: Callable, x: Any, mean: Any = 0.0, std: Any = 1.0, **kwargs: Any
    ) -> Any:
        normal = lambda u: torch.erfinv(2 * u - 1) * 2**0.5 * std + mean
        return self.fill(func, x, normal, mean, std, **kwargs)

    def new_randint(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        sizes = [kwargs['size']] if 'size' in kwargs else []
        *given, size = [o for o in args if isinstance(o, (SupportsIndex, tuple, list))] + sizes
        if not size or size[0] != len(self.seeds):
            return func(*args, **kwargs)
        given = given or [kwargs['high']]
        lo, hi = given if len(given) == 2 else (kwargs.get('low', 0), *given)
        drawn = (self.draw(size) * (hi - lo)).floor() + lo
        return drawn.to(kwargs.get('device'), kwargs.get('dtype') or torch.int64)
