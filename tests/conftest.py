"Before the first test: one thread, no display, no network, no fsync, nothing read from or left in the user's home. Before each: the same seed."

import functools, gc, os, random, shutil, sys, tempfile

HOME = tempfile.mkdtemp(prefix='fastdistill-tests-')
os.environ |= dict(
    MPLBACKEND='Agg',
    OMP_NUM_THREADS='1',
    HF_HUB_OFFLINE='1',
    TOKENIZERS_PARALLELISM='false',
    FASTAI_HOME=HOME,
    TORCH_HOME=HOME,
    HF_HOME=HOME,
    MPLCONFIGDIR=HOME,
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from memory_limit import MemoryLimit  # noqa: E402

torch.set_num_threads(1)
# 10 ms each, and no test can tell whether a file would survive a power failure
os.fsync = lambda file: None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    "The garbage collector never looks at the million objects that the imports leave; in some files, that took half of the time"
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)  # what tests make lives long enough to be searched in vain
        gc.enable()


@pytest.fixture(scope='module')
def old_objects_frozen():
    "For trainers that collect garbage in each training: 0.4 s each, late in the tests, for what earlier ones imported"
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def without_workers():
    "fastai's DataLoaders start a process for each core, unless they are told; that takes longer than most tests"
    if fastcore := sys.modules.get('fastcore.basics'):
        fastcore.defaults.cpus = 0


@pytest.fixture(autouse=True)
def tables_of_exports_made_once():
    """An export of a small network spends half of its time on tables that are the same in the next one: onnxscript parses its
    hundreds of functions, torch.onnx lists them with their signatures, and torch.export lists PyTorch's operators 60 times"""
    for module, cls, name, kept in (
        ('onnxscript', 'TracedOnnxFunction', 'function_ir', property),
        (
            'torch.onnx._internal.exporter._registration',
            'ONNXRegistry',
            'from_torchlib',
            staticmethod,
        ),
        ('torch._export.utils', None, '_materialize_cpp_cia_ops', None),
    ):
        owner = sys.modules.get(module)
        owner = owner if cls is None else getattr(owner, cls, None)
        found = getattr(owner, name, None)
        make = getattr(found, 'fget', found)
        if callable(make) and not hasattr(make, 'cache_info'):
            once = functools.cache(make)
            setattr(owner, name, once if kept is None else kept(once))


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_configure(config):
    config.pluginmanager.register(MemoryLimit(4e9))


def pytest_unconfigure(config):
    shutil.rmtree(HOME, ignore_errors=True)
