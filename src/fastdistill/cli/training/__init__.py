"""What `fastdistill train` does: it trains a teacher and a student from files on disk, and compares
them.
"""

import lazy_loader

# subtle: mistakes in the settings are found without PyTorch, whose import takes seconds
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs=dict(config=['TrainConfig'], train_run=['TrainRun', 'opened_run'])
)
