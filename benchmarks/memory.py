"""Resident memory of a plain loop over 2,000 steps: live, from stored outputs, with features, with a copy in bfloat16.

python benchmarks/memory.py
"""

import sys
from pathlib import Path
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests' / 'helpers'))
from test_memory import step_of  # noqa: E402


def resident():
    "MiB"
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * 4096 / 2**20


def main(steps: int = 2000):
    for way in ('live', 'cache', 'features', 'copy'):
        step, seen = step_of(way), []
        for i in range(steps + 1):
            step()
            if i % (steps // 4) == 0 and i or i == steps // 10:
                seen.append((i, resident()))
        print(way, *(f'step {i}: {m:.1f} MiB' for i, m in seen), sep='  ')


if __name__ == '__main__':
    typer.run(main)
