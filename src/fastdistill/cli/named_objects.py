"Load objects that are given on the command line as 'file.py:name'."

import ast
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ..base.errors import DistillError
from .arguments import in_file, in_python


def load_teacher(name: str, run: Any = None) -> Any:
    """Load the object named 'file.py:name'. Return any other name unchanged, because `Teacher` can
    load it. If the file contains an estimator and the data of the run are texts, let the estimator
    read the texts, as in `fastdistill train`.

    Args:
        name: 'file.py:name', or a file that `Teacher` accepts.
        run: Learner with the data of a run, if there is one.
    """
    if in_python(name):
        return load_object(name, called)
    if run is not None:
        from .training.exported_student import reads_texts
        from .training.teachers import file_teacher, teacher_of_texts

        if reads_texts(run):
            return teacher_of_texts(file_teacher(name))
    return name


def load_named_learner(name: str, data: str | None = None) -> Any:
    """Load a Learner and its data.

    Args:
        name: 'file.py:name', or the file of an exported Learner.
        data: 'file.py:name' of DataLoaders. None for the DataLoaders of the Learner or of its run.
    """
    from .training.exported_student import learner_in_file

    dls = None if data is None else load_object(data, dataloaders)
    if not in_python(name):
        return learner_in_file(name, dls)
    learn = load_object(name, learner)
    if dls is not None:
        learn.dls = dls
    return learn


def of_run(name: str) -> bool:
    return Path(name).suffix == '.pkl' and (Path(name).parent / 'config.toml').is_file()


def load_recipe(text: str) -> Any:
    """Load a recipe.

    Args:
        text: A recipe as text (see `recipe_from_text`), or 'file.py:name'.
    """
    from ..recipes.recipe_text import recipe_from_text

    return load_object(text, lambda o: o) if in_python(text) else recipe_from_text(text)


def load_object(name: str, use: Callable) -> Any:
    """Run a file and return an object from it.

    Args:
        name: 'file.py:name'.
        use: fn(object) -> value to return.
    """
    file, attr = in_file(name)
    module = module_of(Path(file).resolve())
    if not hasattr(module, attr):
        raise DistillError(
            f'{file} has no {attr!r}. It has: {", ".join(names_in_file(file)) or "no names"}'
        )
    with own_mistakes(Path(file).resolve()):
        return use(getattr(module, attr))


def names_in_file(file: Path | str) -> list[str]:
    """Return the public names that are defined in a file, without imported names."""
    names = []
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names += [
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            ]
    return [n for n in dict.fromkeys(names) if not n.startswith('_')]


@cache
def module_of(file: Path) -> Any:
    """Load a file as a module. The result is cached, because data and teacher may come from the
    same file.
    """
    # subtle: name the module after the file if that name is free, so that pickles of its classes
    # can be loaded
    name = file.stem if file.stem not in sys.modules else f'{file.stem}_'
    spec: Any = importlib.util.spec_from_file_location(name, file)
    sys.path.insert(0, str(file.parent))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with own_mistakes(file):
            spec.loader.exec_module(module)
    except DistillError:
        del sys.modules[name]
        raise
    return module


@contextmanager
def own_mistakes(file: Path) -> Iterator[None]:
    """Context manager that replaces an error in the user's file with a DistillError that gives the
    failing line.
    """
    try:
        yield
    except DistillError:
        raise
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(file)]
        line = getattr(e, 'lineno', None) or (lines[-1] if lines else '?')
        raise DistillError(f'{file.name} stopped in line {line}: {type(e).__name__}: {e}') from e


def called(o: Any) -> Any:
    """Call a function without required arguments and return its result. Return any other object
    unchanged.
    """
    needs = lambda p: p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    return (
        o()
        if inspect.isroutine(o) and not any(map(needs, inspect.signature(o).parameters.values()))
        else o
    )


def dataloaders(o: Any) -> Any:
    """Convert an object to fastai DataLoaders. The object may be DataLoaders, a function that
    returns them, or a Learner, whose loss function is then added.
    """
    from ..fastai.cache_data import data_of

    o = data_of(called(o))
    o = getattr(o, 'dls', o)
    if not hasattr(o, 'loaders'):
        raise DistillError(
            f"A {type(o).__name__} is neither fastai's DataLoaders nor a function without arguments "
            'that returns them.'
        )
    return o


def learner(o: Any) -> Any:
    """Convert an object to a fastai Learner. The object may be a Learner or a function that returns
    one.
    """
    o = called(o)
    if not hasattr(o, 'distill_find'):
        raise DistillError(
            f'A {type(o).__name__} is neither a fastai Learner nor a function without arguments that '
            'returns one.'
        )
    return o
