"The `fastdistill` command."
import sys, warnings
from pathlib import Path
from typing import Annotated
import typer
from rich.console import Console
from rich.markup import escape
from . import __version__, cache_cli
from .outputs import DistillError, DistillWarning

__all__ = ['app', 'main']

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help='Knowledge distillation for fastai and PyTorch: train a small model on what a big one knows.')
app.add_typer(cache_cli.app, name='cache')


def version(asked):
    if not asked: return
    typer.echo(f'fastdistill {__version__}')
    raise typer.Exit()


@app.callback()
def options(
    _:Annotated[bool, typer.Option('--version', callback=version, is_eager=True, help='Show the version and stop.')]=False
): pass


@app.command()
def demo(
    quick:Annotated[bool, typer.Option('--quick', help='A few steps, one seed: only to see that it runs.')]=False,
    seeds:Annotated[int, typer.Option(help='Students of each kind.')]=5,
    out:Annotated[Path, typer.Option(help='Folder for the picture and the numbers.')]=Path('out'),
    data:Annotated[str, typer.Option(help='digits (needs no files), cifar10 or camvid.')]='digits',
    root:Annotated[Path|None, typer.Option(help='Folder of the data, for cifar10 and camvid.')]=None
):
    "Train a big model, and small ones with and without its help, on real data; end with a table and a picture."
    from .demo import run
    run(data, root, seeds, out, quick)


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
