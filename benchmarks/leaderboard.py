"""Write docs/leaderboard.md from the result files: every method in every cell, and what a step costs.

    python benchmarks/leaderboard.py

It reads benchmarks/results/quality/*.jsonl, those of newer protocols in folders beside them, and benchmarks/results/bench/*.json, and benchmarks/results/loss_memory.json
(written by benchmarks/loss_memory.py).
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
QUALITY = ROOT / 'benchmarks' / 'results' / 'quality'
BENCH = ROOT / 'benchmarks' / 'results' / 'bench'
MEMORY = ROOT / 'benchmarks' / 'results' / 'loss_memory.json'
PAGE = ROOT / 'docs' / 'leaderboard.md'
PICTURE = ROOT / 'docs' / 'img' / 'leaderboard.png'
START, END = '<!-- made by benchmarks/leaderboard.py -->', '<!-- end -->'
# what is predicted -> the measure that counts, and by what it is multiplied so that more is better
MAIN = dict(
    classes=('accuracy', 100),
    pixels=('miou', 100),
    labels=('map', 100),
    numbers=('r2', 100),
    tokens=('bits', -1),
)
UNITS = dict(tokens='bits')
DEFAULT = 'the default'
# result files keep the names that recipes had when they ran
SHOWN = {'timm': 'kl(1)w1', 'keras': 'kd(10,.9)', 'fasterai': 'kd(20,.9)', 'default': DEFAULT}
# the loss whose memory a method needs, by the start of its name. kd(.5), mse(.5) and the default have different ones in different cells
LOSS_OF = {
    r'kd\(\d+,|kl\(|soft\(': 'kl',
    r'dist\(|Recipe\(Term\(dist,': 'dist',
    r'logit_std\(': 'standardized kl',
    r'regression|Recipe\(Term\(regression,': 'regression',
    r'binary\(': 'binary_kl',
    'skewedx': 'skewed_kl',
    'smoothing': 'labels alone',
    r'(abkd|taid|ttm|wttm|dkd|nkd|rld|cwd|hint|at)(?=[x(])': None,  # its own name
}
REPORTED = 100  # protocols with separate seeds for choosing a rate report those from here on


@dataclass
class Row:
    "A method in a cell, against labels alone"

    cell: str
    method: str
    version: str
    gain: float
    low: float
    high: float
    p: float
    seeds: int
    ece: float | None  # difference of the calibration error
    cost: float  # seconds of a training, divided by those of labels alone

    @property
    def verdict(self):
        if not self.p < 0.05:
            return ''
        return 'better' if self.gain > 0 else 'worse'


def read(path):
    "The finished runs of a file; a line that an interrupt cut off is none"
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def score(run, output, split):
    name, factor = MAIN[output]
    return factor * run[split][name]


def chosen(runs, output):
    "The runs of one recipe that are reported: those at the rate that is best on the validation split"
    by_rate = defaultdict(dict)
    for r in runs:
        if r['seed'] < REPORTED:
            by_rate[r['lr']][r['seed']] = score(r, output, 'valid')
    by_rate = {lr: o for lr, o in by_rate.items() if 0 in o}
    if not by_rate:  # a cell with one rate, where nothing is chosen
        return [r for r in runs if r['seed'] >= REPORTED]
    both = set.intersection(*map(set, by_rate.values()))
    best = max(by_rate, key=lambda lr: mean(by_rate[lr][s] for s in sorted(both)))
    at_best = [r for r in runs if r['lr'] == best]
    return [r for r in at_best if r['seed'] >= REPORTED] or at_best


def compared(cell, method, version, runs, alone, output):
    "A `Row`; None with fewer than two seeds that both have"
    seeds = sorted({r['seed'] for r in runs} & {r['seed'] for r in alone})
    if len(seeds) < 2:
        return None
    a, b = [{r['seed']: r for r in o} for o in (runs, alone)]
    d = np.array([score(a[s], output, 'test') - score(b[s], output, 'test') for s in seeds])
    error = d.std(ddof=1) / len(d) ** 0.5
    half = stats.t.ppf(0.975, len(d) - 1) * error
    p = 2 * stats.t.sf(abs(d.mean()) / error, len(d) - 1) if error else float(not d.any())
    gaps = [a[s]['test']['ece'] - b[s]['test']['ece'] for s in seeds if 'ece' in a[s]['test']]
    return Row(
        cell=cell,
        method=SHOWN.get(method, method),
        version=version,
        gain=d.mean(),
        low=d.mean() - half,
        high=d.mean() + half,
        p=p,
        seeds=len(d),
        ece=mean(gaps) if gaps else None,
        cost=mean(a[s]['seconds'] for s in seeds) / max(mean(b[s]['seconds'] for s in seeds), 1e-9),
    )


def facts_of(folder):
    "What is known of each cell: its own file has it for protocol 1, the plans for newer ones"
    facts = json.loads((folder / 'facts.json').read_text())
    for path in sorted(folder.rglob('plan.json')):
        facts = {k: o['facts'] for k, o in json.loads(path.read_text()).items()} | facts
    return facts


def names_of(path):
    "{text: names} of the recipes that are planned for a result file. Protocol 2 stores the texts, and protocol 1 the names"
    plans = path.with_name('plan.json')
    planned = json.loads(plans.read_text()).get(path.stem, {}) if plans.exists() else {}
    found = defaultdict(list)
    for name, recipe in planned.get('recipes', {}).items():
        found[recipe['text']].append(name)
    return found


def rows(folder=QUALITY):
    "All rows of all result files; the version is the name of the folder, or protocol 1"
    facts = facts_of(folder)
    for path in sorted(folder.rglob('*.jsonl')):
        version = '1' if path.parent == folder else re.sub(r'\D', '', path.parent.name)
        by = defaultdict(list)
        for r in read(path):
            by[r['recipe']].append(r)
        if path.stem not in facts or 'labels' not in by:
            continue
        output = facts[path.stem]['output']
        alone, names = chosen(by['labels'], output), names_of(path)
        for recipe, runs in by.items():
            for method in names.get(recipe, [recipe]):
                if method != 'labels':
                    row = compared(path.stem, method, version, chosen(runs, output), alone, output)
                    if row:
                        yield row


def said(method):
    return method if method == DEFAULT else f'`{method}`'


def memory(method):
    "What its loss needs at once, in multiples of the logits; empty if it was not measured"
    measured = json.loads(MEMORY.read_text())['losses']
    for start, loss in LOSS_OF.items():
        if match := re.match(start, method):
            return f'{measured[loss or match[1]]:.1f}'
    return ''


def overall(found):
    "One line for each method: in how many cells, better, worse, and the best and worst gain"
    by = defaultdict(list)
    for r in found:
        by[r.method, r.version].append(r)
    by = dict(sorted(by.items(), key=lambda o: -len(o[1])))
    out = [
        '| method | protocol | cells | significantly better | significantly worse | median gain | largest | smallest | calibration error | time | memory |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for (method, version), those in by.items():
        points = [r for r in those if r.cell not in BITS]
        best, worst = (f(points or those, key=lambda r: r.gain) for f in (max, min))
        eces = [r.ece for r in those if r.ece is not None]
        verdicts = [r.verdict for r in those]
        out.append(
            f'| {said(method)} | {version} | {len(those)} | {verdicts.count("better")} | {verdicts.count("worse")} '
            f'| {median(r.gain for r in points or those):+.1f} | {best.gain:+.1f} {best.cell} | {worst.gain:+.1f} {worst.cell} '
            f'| {f"{median(eces):+.3f}" if eces else ""} | {median(r.cost for r in those):.1f} | {memory(method)} |'
        )
    return '\n'.join(out)


BITS = {'lm_short', 'wikitext'}  # in bits, not points: not in the medians


def of_cell(name, those):
    digits = 3 if name in BITS else 1
    out = [
        f'### {name}',
        '',
        '| method | gain | 95% interval | verdict | seeds | calibration error | time |',
        '|---|---|---|---|---|---|---|',
    ]
    for r in sorted(those, key=lambda r: -r.gain):
        ece = '' if r.ece is None else f'{r.ece:+.3f}'
        out.append(
            f'| {said(r.method)}{"" if r.version == "1" else f" (protocol {r.version})"} | {r.gain:+.{digits}f} '
            f'| {r.low:+.{digits}f} to {r.high:+.{digits}f} | {r.verdict} | {r.seeds} | {ece} | {r.cost:.1f} |'
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

    these = sorted((r for r in found if r.cell == cell), key=lambda r: r.gain)
    fig, ax = plt.subplots(figsize=(7.5, 0.21 * len(these) + 0.8), dpi=100)
    for i, r in enumerate(these):
        color = dict(better='#2f6fc5', worse='#c05020').get(r.verdict, '#777777')
        ax.plot([r.low, r.high], [i, i], lw=1.2, color=color)
        inside = 'white' if r.version == '1' else color
        ax.plot(r.gain, i, 'o', ms=4, color=color, markerfacecolor=inside)
    ax.axvline(0, lw=0.8, color='black')
    ax.set_yticks(range(len(these)), [r.method for r in these], fontsize=8)
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
    worse = sorted((r for r in found if r.verdict == 'worse'), key=lambda r: r.gain)
    cells = defaultdict(list)
    for r in found:
        cells[r.cell].append(r)
    lost = [
        f'| {said(r.method)} | {r.cell} | {r.gain:+.1f} | {r.low:+.1f} to {r.high:+.1f} |'
        for r in worse
        if r.cell not in BITS
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
