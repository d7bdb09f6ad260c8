"""What a type checker sees of the public names. `mypy` reads this file and nothing runs it: a line
with an `ignore` must be an error.
"""

import torch
from torch import Tensor

from fastdistill import Recipe, Schedule, Term, at, kd, losses

s, t, y = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, 1])

recipe: Recipe = kd(T=4, alpha=0.9) + at({'layer3': 'layer3'})
recipe = kd(temperature=('linear', 8, 1), alpha=Schedule('cosine', 0.9, 0.1))
recipe = Recipe(kd(lambda progress: 4 - progress), Term(losses.kl, weight='cosine', T=2), task=0.1)
value: Tensor = losses.kl(s, t, T=2, reduction='none')
value = losses.dkd(s, t, y, mask=torch.ones(2))
value = losses.Loss(losses.kl, T=2)(s, t)
value = recipe(s, t, y)

kd(temprature=4)  # type: ignore[call-overload]
kd(alpha=None)  # type: ignore[call-overload]
at(layer='auto')  # type: ignore[call-arg]
losses.kl(s, t, 2)  # type: ignore[call-arg]
losses.dkd(s, t)  # type: ignore[call-arg]
number: float = losses.kl(s, t)  # type: ignore[assignment]
