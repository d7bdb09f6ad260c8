"""Processes of their own that begin with everything imported: forks of one server, which the first of them starts, and which ends
with the tests. A test of what an import does, or of a process without fastdistill, starts a Python of its own instead."""

import gc, multiprocessing, os, socket, sys
from pathlib import Path
import numpy as np
import torch

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(
    [  # subtle: nothing of tests/helpers, which the server need not find; it is silent about what it cannot import
        'fastai.callback.all',
        'fastai.collab',
        'fastai.distributed',
        'fastai.tabular.all',
        'fastai.text.all',
        'fastai.vision.all',
        'fastdistill.cli.training.train_run',
        'fastdistill.fastai',
        'pytest',
        'safetensors.torch',
        'sklearn.datasets',
        'sklearn.ensemble',
    ]
)


def begin(log, env, fn, args):
    "What each does first: the environment of whoever started it, one thread, no fsync, words to LOG.out and LOG.err"
    gc.freeze()  # what was imported, as in conftest.py
    multiprocessing.set_start_method(
        None, force=True
    )  # subtle: or a DataLoader's workers would start a server of their own
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    os.fsync = lambda file: None
    np.random.seed()  # as in a new Python: not the server's state
    sys.stdout, sys.stderr = (open(f'{log}.{o}', 'a', buffering=1) for o in ('out', 'err'))
    fn(*args)


def start(log, fn, *args, **env):
    "A process that calls a function of a module"
    p = SERVER.Process(
        target=begin, args=(str(log), os.environ | {k: str(v) for k, v in env.items()}, fn, args)
    )
    p.start()
    return p


def start_two(log, fn, *args, **env):
    "Two, as a launcher starts them. Their words go to LOG.0.out, LOG.1.out, ..."
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    env |= dict(WORLD_SIZE=2, MASTER_ADDR='localhost', MASTER_PORT=port)
    return [start(f'{log}.{i}', fn, *args, **env, RANK=i, LOCAL_RANK=i) for i in (0, 1)]


def ended(*processes):
    "Their exit codes"
    for p in processes:
        p.join(300)
    for p in processes:
        p.kill()  # one that hangs
    return [p.exitcode for p in processes]


def said(log):
    return ''.join(Path(f'{log}.{o}').read_text() for o in ('out', 'err'))
