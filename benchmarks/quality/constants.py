"""Are the default's constants the right ones? Each variant of candidates.py against the default, in the cells that ran.

    python benchmarks/quality/run.py --out benchmarks/results/quality/constants --cells trec_short --recipes 'labels;default;default, ratio 1'
    python benchmarks/quality/constants.py
    python benchmarks/quality/constants.py --folder benchmarks/results/quality/fade  # the strength of fading alone

Gains are in points of the main measure, with the rates and seeds of PROTOCOL.md. A data set counts once, with the mean of its cells. The last table chooses the value of each constant on
all data sets but one, and shows what this choice gains there over the default."""

from collections import defaultdict
from pathlib import Path
import numpy as np
import typer
from judge import Judged, said
from stats import overall
from stored import OUT
from tables import table

DEFAULT = 'default'
CONSTANTS = {
    'entropy of the softened teacher (.9)': ('even .8', 'even .97'),
    'gradient ratio (3)': ('ratio 1', 'ratio 10'),
    'between and within classes (2, 2)': ('beta 1, gamma 3', 'beta 3, gamma 1'),
    'fade (1)': ('no fade', 'fade .2', 'fade .5'),
}
NAMES = {k: tuple(f'{DEFAULT}, {v}' for v in variants) for k, variants in CONSTANTS.items()} | {
    f'{constant} of {o} ({value})': tuple(f'{DEFAULT} of {o}, {v}' for v in variants)
    for o in ('labels', 'numbers')
    for constant, value, variants in (
        ('gradient ratio', 3, ('ratio 0.3', 'ratio 1', 'ratio 10')),
        ('fade', 0.2, ('no fade', 'fade .5', 'fade 1')),
    )
}


def of_data_sets(judged, found):
    "data set -> mean gain of its cells"
    by = defaultdict(list)
    for cell, effect in found.items():
        by[judged.cells[cell].facts['data_set']].append(effect.mean)
    return {k: float(np.mean(v)) for k, v in by.items()}


def gains(judged, measure):
    "variant -> {cell: Effect against the default}"
    all_of = [n for names in NAMES.values() for n in names]
    return {n: g for n in all_of if (g := judged.gains(n, DEFAULT, measure))}


def of_cells(judged, found, measure):
    cells = [n for n in judged.cells if any(n in g for g in found.values())]
    rows = [[c, *(said(g[c], measure) if c in g else '' for g in found.values())] for c in cells]
    last = ['over data sets', *(over_data_sets(judged, g, measure) for g in found.values())]
    return table(['against the default', *found], [*rows, last])


def over_data_sets(judged, found, measure):
    cells = [(judged.cells[c].facts['data_set'], e.mean) for c, e in found.items()]
    return said(overall(cells), measure) if len({d for d, _ in cells}) > 2 else ''


def left_out(judged, found):
    rows = []
    for constant, names in NAMES.items():
        if not all(n in found for n in names):
            continue
        each = {n: of_data_sets(judged, found[n]) for n in names}
        data_sets = sorted(set.intersection(*(set(e) for e in each.values())))
        each[DEFAULT] = dict.fromkeys(data_sets, 0.0)
        choices, gained = [], []
        for d in data_sets if len(data_sets) > 2 else ():
            rest = [o for o in data_sets if o != d]
            best = max(each, key=lambda n: (np.mean([each[n][o] for o in rest]), n == DEFAULT))
            choices.append(best)
            gained.append(each[best][d])
        if gained:
            kept = sum(c == DEFAULT for c in choices)
            others = '; '.join(sorted({c for c in choices if c != DEFAULT}))
            rows.append(
                [
                    constant,
                    len(data_sets),
                    f'{kept} of {len(choices)}',
                    others,
                    f'{np.mean(gained):+z.2f}',
                ]
            )
    heads = ['constant', 'data sets', 'chooses the default', 'else', 'gain where it was left out']
    return table(heads, rows)


def main(folder: Path = OUT / 'constants'):
    judged = Judged(folder)
    for measure in (None, 'nll'):
        found = gains(judged, measure)
        print(f'\n{measure or "main measure"}\n\n{of_cells(judged, found, measure)}')
        if measure is None:
            print(left_out(judged, found))


if __name__ == '__main__':
    typer.run(main)
