"Define the `fastdistill` command. Errors are printed as one line instead of a traceback."

import io
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..base.errors import DistillError, DistillWarning
from .commands.cache import cache_app
from .commands.check import check_command
from .commands.compare import compare_command, export_command, report_command
from .commands.demo import demo
from .commands.find import find
from .commands.methods import methods_command
from .commands.train import train_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help='Knowledge distillation for fastai and PyTorch: train a small model on the knowledge of '
    'a large one.',
)
app.add_typer(cache_app, name='cache')
app.command('train')(train_command)
app.command()(demo)
app.command()(find)
app.command('check')(check_command)
app.command('methods')(methods_command)
app.command('compare')(compare_command)
app.command('report')(report_command)
app.command('export')(export_command)


def version(asked: bool) -> None:
    if not asked:
        return
    typer.echo(f'fastdistill {__version__}')
    raise typer.Exit()


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option('--version', callback=version, is_eager=True, help='Show the version.')
    ] = False,
    debug: Annotated[
        bool, typer.Option('--debug', help='Show the traceback of an error.')
    ] = False,  # `main` reads this flag from sys.argv
) -> None:
    pass


def main() -> None:
    """Run the command. Errors and warnings are printed as one line each. After an error, the exit
    code is 2.
    """
    # the names of files may have characters that the terminal's encoding lacks, or no characters at all
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    show_other = warnings.showwarning

    def show(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        if issubclass(category, DistillWarning):
            if number_of_process() == 0:
                console.print('[yellow]fastdistill:[/]', escape(in_flags(str(message))))
        else:
            show_other(message, category, *args, **kwargs)

    with warnings.catch_warnings():
        # fastai's tables cause this warning with pandas 3, although they do not write to the arrays
        warnings.filterwarnings('ignore', message='The given NumPy array is not writable')
        warnings.showwarning = show
        try:
            app()
        # ImportError: a package is not installed. OSError: a path can't be read or written.
        except (DistillError, ImportError, OSError) as e:
            wait_for_launcher(5 if number_of_process() else 0)
            if '--debug' in sys.argv:
                raise
            if not getattr(e, 'from_first', False):
                console.print('[red]fastdistill:[/]', escape(in_flags(str(e))))
            sys.exit(2)
        except Exception:
            wait_for_launcher(10)
            raise


def number_of_process() -> int:
    return int(os.environ.get('RANK', 0))


def wait_for_launcher(seconds: float) -> None:
    """In a distributed run, wait before exiting, so that the launcher (such as torchrun) can end
    this process. The launcher then reports the error of the process that failed first.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        time.sleep(seconds)


def in_flags(text: str) -> str:
    """Replace Python arguments in a message with command-line flags. For example, `views=8` becomes
    `--views 8`, and `force=True` becomes `--force`. The first argument of a Python call, as in
    `dict(size=8)`, is not replaced.

    Args:
        text: A message of the library.
    """
    have = names_of_flags()

    def flag(m: re.Match) -> str:
        name, value = m['name'], m['value'] or ''
        if name not in have:
            return m[0]
        name = name.replace('_', '-')
        if value == 'True':
            return f'--{name}'
        return f'--no-{name}' if value == 'False' else f'--{name} {value}'.rstrip()

    return re.sub(
        r"(?<![\w.])(?<!\w\()(?P<name>[a-z_][a-z0-9_]*)=(?P<value>True|False|'[^']*'|[\w.\-]+)?",
        flag,
        text,
    )


@cache
def names_of_flags() -> frozenset[str]:
    """Return the names of the flags of all commands, as Python arguments."""
    flags = (o for c in commands(typer.main.get_command(app)) for p in c.params for o in p.opts)
    return frozenset(o.lstrip('-').replace('-', '_') for o in flags)


def commands(command: Any) -> Iterator:
    """Yield a command and all its subcommands."""
    yield command
    for c in getattr(command, 'commands', {}).values():
        yield from commands(c)
