"""Run the examples with several seeds, and write examples/README.md and its pictures from the results.

    python scripts/gallery.py run                      # what has not run yet; a minute or two each
    python scripts/gallery.py run image_classes trees  # only these
    python scripts/gallery.py page

Each run is stored in examples/results.json when it ends, with what the script printed.
"""

import argparse
import ast
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / 'examples'
RESULTS = EXAMPLES / 'results.json'
PICTURES = ROOT / 'docs' / 'img' / 'examples'
SEEDS = 42, 1, 2
START, END = '<!-- made by scripts/gallery.py -->', '<!-- end -->'
LAST = re.compile(
    r'^(?P<unit>.+?): (?:teacher (?P<teacher>[\d.]+), )?'
    r'student alone (?P<alone>[\d.]+), student distilled (?P<distilled>[\d.]+)$'
)
LOWER_IS_BETTER = 'pixels off', 'degrees off', 'stars off', 'perplexity'
HEADS = dict(
    images='Images', boxes='Boxes', masks='Masks', texts='Texts', tables='Tables', ratings='Ratings'
)


def scripts():
    return sorted(EXAMPLES.glob('*.py'))


def facts(script):
    "What a script says about itself: its first sentence, data, teacher and trainer"
    text = ast.get_docstring(ast.parse(script.read_text()))
    about = re.search(r'^Data: (.+)\. Teacher: (.+)\. Trainer: (.+)\.$', text, re.M)
    sentence = re.split(r'(?<=\.) (?=[A-Z`])', text.split('\n\n')[0].replace('\n', ' '))[0]
    return dict(zip(('data', 'teacher', 'trainer'), about.groups()), sentence=sentence)


def parsed(line):
    found = LAST.match(line)
    scores = {k: float(v) for k, v in found.groupdict().items() if k != 'unit' and v}
    return dict(unit=found['unit'], **scores)


def stored():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def commit():
    command = ['git', 'rev-parse', '--short', 'HEAD']
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(names, seeds):
    for seed in seeds:
        for script in scripts():
            done = stored().get(script.stem, {})
            if names and script.stem not in names or 'seconds' in done.get(str(seed), {}):
                continue
            code = f'import runpy; runpy.run_path({str(script)!r})["main"](seed={seed})'
            before = cpu_seconds()
            out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
            if out.returncode:
                raise SystemExit(f'{script.name}, seed {seed}:\n{out.stderr[-2000:]}')
            line = out.stdout.strip().splitlines()[-1]
            row = dict(printed=line, seconds=round(cpu_seconds() - before), commit=commit())
            results = stored()  # again: another process may have written
            results.setdefault(script.stem, {})[str(seed)] = row
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + '\n')
            print(script.stem, seed, line, row['seconds'], 's', flush=True)


def summary(runs):
    "Means over the seeds, the gain with its spread, and the CPU minutes of a run"
    rows = [parsed(o['printed']) for o in runs.values()]
    unit = rows[0]['unit']
    sign = -1 if unit in LOWER_IS_BETTER else 1
    gains = [sign * (r['distilled'] - r['alone']) for r in rows]
    seconds = [o['seconds'] for o in runs.values() if 'seconds' in o]
    scores = {
        k: mean(r[k] for r in rows) for k in ('teacher', 'alone', 'distilled') if k in rows[0]
    }
    return dict(
        unit=unit,
        rows=rows,
        scores=scores,
        gain=mean(gains),
        spread=stdev(gains) if len(gains) > 1 else None,
        seeds=len(gains),
        minutes=mean(seconds) / 60 if seconds else None,
        better=sum(g > 0 for g in gains),
    )


def number(x):
    return f'{x:.3f}' if abs(x) < 1 else f'{x:.2f}' if abs(x) < 10 else f'{x:.1f}'


def alternative(s):
    return f'{s["unit"]}: ' + ', '.join(f'{k} {number(v)}' for k, v in s['scores'].items())


def draw(name, s):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(2.6, 1.0), dpi=100)
    colors = dict(teacher='#777777', alone='#c05020', distilled='#2f6fc5')
    for i, kind in enumerate(reversed(s['scores'])):
        values = [r[kind] for r in s['rows']]
        ax.plot(values, [i] * len(values), 'o', ms=4, color=colors[kind], alpha=0.7)
    ax.set_yticks(range(len(s['scores'])), [*reversed(s['scores'])], fontsize=7)
    ax.tick_params(axis='x', labelsize=7)
    ax.set_ylim(-0.6, len(s['scores']) - 0.4)
    ax.margins(x=0.12)
    ax.grid(axis='x', lw=0.3)
    for side in ('top', 'right', 'left'):
        ax.spines[side].set_visible(False)
    fig.tight_layout(pad=0.3)
    PICTURES.mkdir(parents=True, exist_ok=True)
    fig.savefig(PICTURES / f'{name}.png', metadata=dict(Software=None))
    plt.close(fig)


def row(script, s):
    about = facts(script)
    gain = ('+' if s['gain'] > 0 else '') + number(s['gain'])
    if s['spread'] is not None:
        gain += f' ± {number(s["spread"])}'
    gain += f', {s["seeds"]} seeds' if s['seeds'] > 1 else ', one seed'
    low = ' (lower)' if s['unit'] in LOWER_IS_BETTER else ''
    scores = ' → '.join(number(s['scores'][k]) for k in ('alone', 'distilled'))
    cells = [
        f'[{script.name}]({script.name})<br>{about["sentence"]}',
        f'![{alternative(s)}](../docs/img/examples/{script.stem}.png)',
        f'{about["teacher"]}; {about["trainer"]}',
        f'{scores} {s["unit"]}{low}',
        gain,
        f'{s["minutes"]:.1f}' if s['minutes'] else '',
    ]
    return '| ' + ' | '.join(cells) + ' |'


def tables(results):
    found = {script: facts(script) for script in scripts()}
    out = []
    for data, head in HEADS.items():
        these = [o for o in found if found[o]['data'] == data and o.stem in results]
        out += [
            f'## {head}',
            '',
            '| script | each seed | teacher; trainer | student alone → distilled | gain | CPU minutes |',
            '|---|---|---|---|---|---|',
        ]
        out += [row(script, summary(results[script.stem])) for script in these]
        out.append('')
    for what in ('teacher', 'trainer'):
        out += [f'## By {what}', '', f'| {what} | scripts |', '|---|---|']
        for kind in sorted({o[what] for o in found.values()}):
            links = [f'[{o.name}]({o.name})' for o in found if found[o][what] == kind]
            out.append(f'| {kind} | {", ".join(links)} |')
        out.append('')
    return '\n'.join(out)


def page():
    results = stored()
    for script in scripts():
        if script.stem in results:
            draw(script.stem, summary(results[script.stem]))
    readme = EXAMPLES / 'README.md'
    text = readme.read_text()
    head, tail = text.split(START)[0], text.split(END)[1]
    readme.write_text(f'{head}{START}\n\n{tables(results)}\n{END}{tail}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['run', 'page'])
    parser.add_argument('names', nargs='*', help='of scripts, without .py; default: all')
    parser.add_argument('--seeds', type=int, nargs='+', default=SEEDS)
    args = parser.parse_args()
    if args.what == 'run':
        run(args.names, args.seeds)
    else:
        page()


if __name__ == '__main__':
    main()
