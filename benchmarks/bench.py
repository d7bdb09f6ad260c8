"""What a step with a teacher costs, side by side with other ways to distill.

python benchmarks/bench.py                      # all pairs; or some: resnet unet vit text table
python benchmarks/bench.py table --rounds 20
"""

from pathlib import Path
from typing import Annotated
import typer
from step_cost.measure import run_bench


def bench(
    pairs: Annotated[
        list[str] | None, typer.Argument(help='resnet, unet, vit, text, table; default: all.')
    ] = None,
    way: Annotated[
        list[str] | None,
        typer.Option(help='Name of a way in the table; may be given several times.'),
    ] = None,
    rounds: Annotated[int, typer.Option(help='Rounds, in which all ways take turns.', min=1)] = 5,
    batches: Annotated[int, typer.Option(help='Batches of a round.', min=1)] = 4,
    memory: Annotated[bool, typer.Option(help='Measure the peak memory too.')] = True,
    out: Annotated[Path, typer.Option(help='Folder for the numbers and the plot.')] = Path('out'),
):
    "Time a step without a teacher, with ours, and with those of other packages. Make a table, a plot and a file."
    run_bench(pairs or None, way or None, rounds, batches, memory, out)


if __name__ == '__main__':
    typer.run(bench)
