"What the user names on the command line: 'file.py:name'."
import importlib.util, inspect, sys
from functools import cache as once
from pathlib import Path
from ..outputs import DistillError

__all__ = ['dataloaders', 'load_object', 'load_teacher']


def load_teacher(name): return load_object(name, teacher_from) if '.py:' in name else name


def load_object(
    name, # 'file.py:name'
    use # fn(object) -> what is wanted of it
):
    file,_,attr = name.rpartition(':')
    if not file.endswith('.py') or not attr: raise DistillError(f"{name!r}: say which file and which name in it, as in 'train.py:dls'.")
    if not Path(file).is_file(): raise DistillError(f"There is no file {file!r}.")
    module = module_of(Path(file).resolve())
    if not hasattr(module, attr):
        of = lambda v: None if inspect.ismodule(v) else getattr(v, '__module__', module.__name__)
        own = [k for k,v in vars(module).items() if k[0] != '_' and of(v) == module.__name__]
        raise DistillError(f"{file} has no {attr!r}. It has: {', '.join(own)}")
    return use(getattr(module, attr))


@once
def module_of(file):
    "The file as a module, once: data and teacher may come from the same one"
    # subtle: under its own name where that is free, so that what was pickled by a program that imported it can be loaded
    name = file.stem if file.stem not in sys.modules else f'{file.stem}_'
    spec = importlib.util.spec_from_file_location(name, file)
    sys.path.insert(0, str(file.parent))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def takes_no_arguments(o):
    "Is this a function that needs no arguments?"
    return inspect.isroutine(o) and all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                                        for p in inspect.signature(o).parameters.values())


def teacher_from(o): return o() if takes_no_arguments(o) else o


def dataloaders(o):
    o = o() if takes_no_arguments(o) else o
    o = getattr(o, 'dls', o)       # a Learner's
    if not hasattr(o, 'loaders'):
        raise DistillError(f"A {type(o).__name__} is no fastai DataLoaders, nor a function without arguments that makes one.")
    return o
