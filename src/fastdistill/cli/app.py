"The `fastdistill` command: its options, and mistakes in one line instead of a traceback."
import sys, warnings
from typing import Annotated
import typer
from rich.console import Console
from rich.markup import escape
from .. import __version__
from ..outputs import DistillError, DistillWarning
from .cache import cache_app
from .demo import demo

__all__ = ['app', 'main']

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help='Knowledge distillation for fastai and PyTorch: train a small model on what a big one knows.')
app.add_typer(cache_app, name='cache')
app.command()(demo)


def version(asked):
    if not asked: return
    typer.echo(f'fastdistill {__version__}')
    raise typer.Exit()


@app.callback()
def options(
    _:Annotated[bool, typer.Option('--version', callback=version, is_eager=True, help='Show the version and stop.')]=False
): pass


def main():
    "The command, with mistakes and warnings in one line instead of a traceback"
    says,other = Console(stderr=True, highlight=False, soft_wrap=True),warnings.showwarning
    def show(message, category, *args, **kwargs):
        if issubclass(category, DistillWarning): says.print('[yellow]fastdistill:[/]', escape(str(message)))
        else: other(message, category, *args, **kwargs)
    with warnings.catch_warnings():
        warnings.showwarning = show
        try: app()
        except DistillError as e:
            says.print('[red]fastdistill:[/]', escape(str(e)))
            sys.exit(2)
