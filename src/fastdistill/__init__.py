"Knowledge distillation: train a small model on what a big one knows."

import lazy_loader

__version__ = '0.1.0'
# names are listed in __init__.pyi and loaded on first use, so `fastdistill --help` does not import
# torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
