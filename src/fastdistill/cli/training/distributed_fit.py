"Train in several processes with fastai."

from typing import Any

import torch
from fastai.distributed import DistributedDL, DistributedTrainer

from ...base.distributed import broadcast


class ProcessesDL(DistributedDL):
    """fastai's DistributedDL, changed to work on any device and to shuffle with the generator of
    the wrapped DataLoader.
    """

    def _broadcast(self, t: Any, rank: int) -> Any:
        t = torch.tensor(t)
        broadcast([t])
        return t.tolist()

    @property
    def rng(self) -> Any:
        return self.dl.rng

    @rng.setter
    def rng(self, rng: Any) -> None:
        self.dl.rng = rng


class ProcessesTrainer(DistributedTrainer):
    """fastai's DistributedTrainer that uses `ProcessesDL`."""

    def _wrap_dl(self, dl: Any) -> Any:
        return (
            dl if isinstance(dl, DistributedDL) else ProcessesDL(dl, device=self.learn.model.device)
        )
