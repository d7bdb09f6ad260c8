"Knowledge distillation: train a small model on what a big one knows."

import lazy_loader

__version__ = '0.1.0'
# the names are in __init__.pyi: each is loaded when it is first used, for `fastdistill --help` needs no torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
