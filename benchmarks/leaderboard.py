"""Write docs/leaderboard.md from the result files: every method in the cells in which it ran, and what a step costs.

    python benchmarks/leaderboard.py

It reads benchmarks/results/quality: the runs of protocol 1 in the folder itself, and those of protocol 2 in folders whose names begin with
protocol2. It also reads benchmarks/results/bench/*.json, and benchmarks/results/loss_memory.json (written by benchmarks/loss_memory.py).
"""

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks' / 'quality'))

from judge import Cell, Judged, spoken, value  # noqa: E402
from stats import Arm, Effect, at_best_rate  # noqa: E402
from stored import OUT, read, read_json  # noqa: E402
from tables import shown  # noqa: E402

BENCH = ROOT / 'benchmarks' / 'results' / 'bench'
MEMORY = ROOT / 'benchmarks' / 'results' / 'loss_memory.json'
PAGE = ROOT / 'docs' / 'leaderboard.md'
PICTURE = ROOT / 'docs' / 'img' / 'leaderboard.png'
START, END = '<!-- made by benchmarks/leaderboard.py -->', '<!-- end -->'
# the loss of a method, by the start of its name. kd(.5), mse(.5) and the default have different ones in different cells
LOSS_OF = {
    r'kd\(\d+,|kl\(|soft\(': 'kl',
    r'dist\(': 'dist',
    r'logit_std\(': 'standardized kl',
    'regression': 'regression',
    r'binary\(': 'binary_kl',
    'skewedx': 'skewed_kl',
    'smoothing': 'labels alone',
    r'(abkd|taid|ttm|wttm|dkd|nkd|rld|cwd|hint|at)(?=[x(])': None,  # its own name
}


@dataclass
class Row:
    "A method in a cell, against labels alone"

    cell: str
    method: str
    version: str  # of the protocol
    measure: str
    gain: Effect
    ece: float | None  # difference of the calibration error

    @property
    def verdict(self):
        if not self.gain.p < 0.05:
            return ''
        return 'better' if self.gain.mean > 0 else 'worse'

    @property
    def in_points(self):
        return self.measure != 'bits'


class CellOfProtocol1(Cell):
    "All seeds at the best rate count. None were set aside to choose it, so intervals ignore that choice"

    def __post_init__(self):
        self.output = self.plan['facts']['output']
        best = at_best_rate(self.runs, self.output)
        self.finished = {k: runs for k, runs in best.items() if len(runs) > 1}

    def arm(self, name, measure):
        runs = self.finished[name]
        rate = runs[0]['lr']
        return Arm({}, {rate: {r['seed']: value(measure, r['test']) for r in runs}}, [rate], rate)


def cells(folder):
    "(version, cell) of each protocol. Other folders hold studies with other rules"
    for name, facts in sorted(read_json(folder / 'facts.json').items()):
        yield '1', CellOfProtocol1(name, dict(facts=facts), read(folder / f'{name}.jsonl'))
    for newer in sorted(folder.glob('protocol2*')):
        for cell in Judged(newer).cells.values():
            yield '2', cell


def rows(folder=OUT):
    "The methods that are finished, in each cell in which labels alone are finished too"
    for version, cell in cells(folder):
        for name in cell.finished if cell.has('labels') else ():
            if name == 'labels':
                continue
            # more is better in all gains, so that of labels alone is how much larger the error of the method is
            ece = cell.gain('labels', name, 'ece').mean if 'ece' in cell.measures else None
            yield Row(cell.name, name, version, cell.main, cell.gain(name), ece)


def loss_of(method):
    "The loss of its term; None if it has different ones in different cells"
    for start, loss in LOSS_OF.items():
        if match := re.match(start, shown(method)):
            return loss or match[1]
    return None


def memory(method):
    "What its loss needs at once, in multiples of the logits; empty if it was not measured"
    loss = loss_of(method)
    return f'{json.loads(MEMORY.read_text())["losses"][loss]:.1f}' if loss else ''


def overall(found):
    "One line for each method: in how many cells, better, worse, and the best and worst gain"
    by = defaultdict(list)
    for r in found:
        by[r.method, r.version].append(r)
    by = dict(sorted(by.items(), key=lambda o: -len(o[1])))
    out = [
        '| method | protocol | cells | better | worse | median gain | largest | smallest | calibration error | memory |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for (method, version), those in by.items():
        # bits are not in the medians
        gains = [r for r in those if r.in_points] or those
        best, worst = (f(gains, key=lambda r: r.gain.mean) for f in (max, min))
        eces = [r.ece for r in those if r.ece is not None]
        verdicts = [r.verdict for r in those]
        out.append(
            f'| {spoken(method)} | {version} | {len(those)} | {verdicts.count("better")} | {verdicts.count("worse")} '
            f'| {median(r.gain.mean for r in gains):+z.1f} | {best.gain.mean:+z.1f} {best.cell} | {worst.gain.mean:+z.1f} {worst.cell} '
            f'| {f"{median(eces):+z.3f}" if eces else ""} | {memory(method)} |'
        )
    return '\n'.join(out)


def of_cell(name, those):
    out = [
        f'### {name}',
        '',
        '| method | gain | 95% interval | verdict | seeds | calibration error |',
        '|---|---|---|---|---|---|',
    ]
    for r in sorted(those, key=lambda r: -r.gain.mean):
        digits = 1 if r.in_points else 3
        ece = '' if r.ece is None else f'{r.ece:+z.3f}'
        out.append(
            f'| {spoken(r.method)}{"" if r.version == "1" else f" (protocol {r.version})"} | {r.gain.mean:+z.{digits}f} '
            f'| {r.gain.low:+.{digits}f} to {r.gain.high:+.{digits}f} | {r.verdict} | {r.gain.n} | {ece} |'
        )
    return '\n'.join([*out, ''])


def measured_memory(pair):
    return any(o.get('peak') for o in pair['ways'].values())


def step_costs():
    "Time of a step with a teacher, divided by that of a step without one, and the memory of the process"
    files = {p.stem: json.loads(p.read_text()) for p in sorted(BENCH.glob('*.json'))}
    pairs = {n: f['pairs'][n] for n, f in files.items()}
    ways = list(dict.fromkeys(w for o in pairs.values() for w in o['ways']))
    versions = next(iter(files.values()))['machine']
    out = [
        f'| way | {" | ".join(pairs)} |',
        '|---|' + '---|' * len(pairs),
    ]
    for way in ways:
        ratios = [o['ways'].get(way, {}).get('cpu_ratio') for o in pairs.values()]
        cells = ' | '.join('' if r is None else f'{r:.2f}' for r in ratios)
        out.append(f'| {way} | {cells} |')
    out += [
        '',
        'Peak memory of the process in MiB, where it was measured:',
        '',
        f'| way | {" | ".join(n for n, o in pairs.items() if measured_memory(o))} |',
        '|---|' + '---|' * sum(map(measured_memory, pairs.values())),
    ]
    for way in ways:
        peaks = [o['ways'].get(way, {}).get('peak') for o in pairs.values() if measured_memory(o)]
        cells = ' | '.join('' if o is None else f'{o:,.0f}' for o in peaks)
        out.append(f'| {way} | {cells} |')
    tools = ', '.join(f'{t} {versions[t]}' for t in ('fasterai', 'torchdistill', 'timm', 'torch'))
    return '\n'.join(out) + f'\n\nWith {tools}.'


def draw(found, cell='digits100_short'):
    "Every method in one cell, with its interval. The points of protocol 1 are empty"
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    these = sorted((r for r in found if r.cell == cell), key=lambda r: r.gain.mean)
    fig, ax = plt.subplots(figsize=(7.5, 0.21 * len(these) + 0.8), dpi=100)
    for i, r in enumerate(these):
        color = dict(better='#2f6fc5', worse='#c05020').get(r.verdict, '#777777')
        ax.plot([r.gain.low, r.gain.high], [i, i], lw=1.2, color=color)
        inside = 'white' if r.version == '1' else color
        ax.plot(r.gain.mean, i, 'o', ms=4, color=color, markerfacecolor=inside)
    ax.axvline(0, lw=0.8, color='black')
    ax.set_yticks(range(len(these)), [spoken(r.method).strip('`') for r in these], fontsize=8)
    ax.set_ylim(-0.7, len(these) - 0.3)
    ax.set_xlabel('gain in accuracy over labels alone, points, with its 95% interval', fontsize=9)
    ax.grid(axis='x', lw=0.3)
    for side in ('top', 'right', 'left'):
        ax.spines[side].set_visible(False)
    fig.tight_layout()
    fig.savefig(PICTURE, metadata=dict(Software=None))
    plt.close(fig)


def text(found):
    found = list(found)
    worse = sorted((r for r in found if r.verdict == 'worse'), key=lambda r: r.gain.mean)
    cells = defaultdict(list)
    for r in found:
        cells[r.cell].append(r)
    lost = [
        f'| {spoken(r.method)} | {r.cell} | {r.gain.mean:+z.1f} | {r.gain.low:+.1f} to {r.gain.high:+.1f} |'
        for r in worse
        if r.in_points
    ]
    return '\n'.join(
        [
            f'{len(found)} results of {len({r.method for r in found})} methods in {len(cells)} cells.',
            '',
            '## All methods',
            '',
            overall(found),
            '',
            '## What a step costs',
            '',
            step_costs(),
            '',
            '## Failures',
            '',
            f'The {len(lost)} results that are significantly worse than labels alone, worst first:',
            '',
            '| method | cell | gain | 95% interval |',
            '|---|---|---|---|',
            *lost,
            '',
            '## Each cell',
            '',
            *[of_cell(name, those) for name, those in sorted(cells.items())],
        ]
    )


def main():
    page, found = PAGE.read_text(), list(rows())
    head, tail = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f'{head}{START}\n\n{text(found)}\n{END}{tail}')
    draw(found)


if __name__ == '__main__':
    main()
