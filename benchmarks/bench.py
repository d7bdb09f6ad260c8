"""What a step with a teacher costs, side by side with other ways to distill: `fastdistill bench`.

    python benchmarks/bench.py                      # all pairs; or some: resnet unet vit text table
    python benchmarks/bench.py table --rounds 20
"""
import typer
from fastdistill.cli.bench import bench

if __name__ == '__main__': typer.run(bench)
