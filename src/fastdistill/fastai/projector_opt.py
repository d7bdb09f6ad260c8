"""Optimizer of the projectors.

The projectors have a separate optimizer, because an additional parameter group in the student's
optimizer would break schedules and checkpoints.
"""

import copy

import numpy as np
import torch
from fastai.basics import Adam, Callback, L, OptimWrapper

from ..base.distributed import average_gradients
from ..base.outputs import map_tensors


class ProjectorOptimizer(Callback):
    """Callback that trains the projectors like the student.

    The projectors use the student's type of optimizer, learning rate, momentum and weight decay.

    Args:
        learn: The student's Learner.
        params: Parameters of the projectors.
    """

    order, remove_on_fetch = 5, False

    def __init__(self, learn, params):
        super().__init__()
        make = Adam if isinstance(learn.opt_func, OptimWrapper) else learn.opt_func
        self.params = list(params)
        self.optimizer = make([self.params], lr=learn.lr)

    def after_backward(self):
        # DistributedDataParallel averages only the gradients of the student, which does not contain
        # the projectors
        average_gradients(self.params)

    def before_step(self):
        self.skipped = False  # True if the student's optimizer skips this step

    def after_cancel_step(self):
        self.skipped = True

    def after_step(self):
        """Take a step with the current hyperparameters of the student's last parameter group."""
        overflow = self._unscale(getattr(self.learn, 'scaler', None))
        if not (self.skipped or overflow):
            for k in ('lr', 'mom', 'wd'):
                # subtle: `set_hyper` fails with NumPy numbers
                if k in self.optimizer.hypers[0] and k in self.learn.opt.hypers[-1]:
                    self.optimizer.set_hyper(k, float(self.learn.opt.hypers[-1][k]))
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _unscale(self, scaler):
        """Undo GradScaler's scaling of the loss. Return True if the gradients overflowed."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if scaler is None or not scaler.is_enabled() or not grads:
            return False
        for g in grads:
            g.mul_(1 / scaler.get_scale())
        return not torch.stack([g.isfinite().all() for g in grads]).all()

    def state_dict(self):
        return as_builtins(self.optimizer.state_dict())

    def load_state_dict(self, state):
        state = copy.deepcopy(state)
        # PyTorch's optimizers already move their state to the device of the parameters
        if not isinstance(self.optimizer, OptimWrapper):
            state = map_tensors(state, lambda t: t.to(self.params[0].device))
        self.optimizer.load_state_dict(state)

    # an exported Learner contains a callback that does nothing instead, so that it loads without
    # fastdistill
    def __reduce__(self):
        return Callback, ()


def as_builtins(o):
    """Convert fastai's and NumPy's lists and numbers to Python's built-in types.

    `torch.load(weights_only=True)` would not load fastai's and NumPy's types.
    """
    if isinstance(o, dict):
        return {k: as_builtins(v) for k, v in o.items()}
    if isinstance(o, tuple):
        return tuple(map(as_builtins, o))
    if isinstance(o, (list, L)):
        return [*map(as_builtins, o)]
    return o.item() if isinstance(o, np.generic) else o
