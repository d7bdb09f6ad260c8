"`fastdistill bench`: what a step costs, side by side with other ways to distill."
from pathlib import Path
from typing import Annotated
import typer

__all__ = ['bench']


def bench(
    pairs:Annotated[list[str]|None, typer.Argument(help='resnet, unet, vit, text, table; default: all.')]=None,
    way:Annotated[list[str]|None, typer.Option(help='Name of a way in the table; may be given several times.')]=None,
    rounds:Annotated[int, typer.Option(help='Rounds, in which all ways take turns.', min=1)]=5,
    batches:Annotated[int, typer.Option(help='Batches of a round.', min=1)]=4,
    memory:Annotated[bool, typer.Option(help='Measure the peak memory too.')]=True,
    out:Annotated[Path, typer.Option(help='Folder for the numbers and the plot.')]=Path('out')
):
    "Time a step without a teacher, with ours, and with those of other packages. Make a table, a plot and a file."
    from ..bench import run_bench
    run_bench(pairs or None, way or None, rounds, batches, memory, out)
