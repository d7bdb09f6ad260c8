"""A whole training from files: data, teacher, student, comparison. The command `fastdistill train`
calls it.
"""

import lazy_loader

# subtle: mistakes in the settings are found without PyTorch, whose import takes seconds
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs=dict(config=['TrainConfig'], run=['TrainRun', 'opened_run'])
)
