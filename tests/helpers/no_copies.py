"A mode in which a copy between devices is an error."

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoCopies(TorchDispatchMode):
    "A copy from one device to another is a wait too"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {o.device.type for o in (*args, out) if isinstance(o, torch.Tensor)}
        if (
            func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
            and len(devices) > 1
        ):
            raise RuntimeError(f'a copy between {devices} makes a GPU wait')
        return out
