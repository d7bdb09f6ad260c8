"A writer in a process of its own, which tests kill, stop, double and limit."

import json, multiprocessing, os, resource, signal, sys, time
from unittest import mock
import torch
from torch.utils.data import TensorDataset
from fastdistill.cache import cache_dataset, writer
from fastdistill.base.outputs import Outputs

N, BS, ROWS = 60, 5, 10


class Noisy(TensorDataset):
    "Each view of a sample is another one"

    def __getitem__(self, i):
        return tuple(x + torch.randn_like(x) for x in super().__getitem__(i))


def data():
    g = torch.Generator().manual_seed(0)
    return Noisy(torch.randn(N, 3, generator=g)), torch.randn(3, 4, generator=g)


class Slow:
    "Notes each batch that it is asked about"

    name, module = 'slow', torch.nn.Identity()

    def __init__(self, log, pause):
        self.log, self.pause = log, pause

    def __call__(self, x):
        with open(self.log, 'a') as f:
            f.write(json.dumps(x[:, 0].tolist()) + '\n')
        time.sleep(self.pause)
        return Outputs(x @ data()[1])


def write(path, log='/dev/null', pause=0.0, limit=None, rank=0, world=1, meet=None):
    "Two views of sixty samples, in shards of ten rows of 16 bytes"
    if world > 1:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{meet}', rank=rank, world_size=world
        )

    def progress(done, total, size):
        if limit and done > total / 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # the disk is full

    small = mock.patch.dict(writer.write_cache.__kwdefaults__, shard_bytes=ROWS * 16)
    try:
        with small:
            return cache_dataset(
                Slow(log, pause),
                data()[0],
                path,
                views=2,
                store=dict(dtype='float32'),
                run=dict(bs=BS),
                progress=progress,
            )
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


def _child(path, options, errors):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stderr = open(os.devnull, 'w')
    try:
        write(path, **options)
    except Exception as e:
        errors.put(f'{type(e).__name__}: {e}')


def start(path, **options):
    "The process, and a queue with its error if it had one"
    ctx = multiprocessing.get_context('fork')
    errors = ctx.SimpleQueue()
    p = ctx.Process(target=_child, args=(path, options, errors))
    p.start()
    return p, errors
