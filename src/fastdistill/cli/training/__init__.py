"""Implementation of `fastdistill train`, which trains a teacher and a student from files on disk
and compares them.
"""

import lazy_loader

# subtle: import submodules lazily, so that mistakes in the settings are reported before PyTorch is
# imported, which takes seconds
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs=dict(config=['TrainConfig'], train_run=['TrainRun'])
)
