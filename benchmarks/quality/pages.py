"""Write what the stored runs say into the pages: tables and pictures of README.md, and numbers of the repository's README and docs.

python benchmarks/quality/pages.py"""

import re
from math import copysign
import calibrated, judge, protocol, tables
import numpy as np
from stats import corrected, overall
from tasks import HERE

ROOT = HERE.parents[1]
README, GAINS, DOCS = 'README.md', 'docs/recipes.md', 'docs/fastai.md'

# the words of the table in docs/recipes.md -> the cells whose gains stand behind them
SAID = {
    'two-digit numbers': 'digits100_short digits100_long',
    'Fashion-MNIST': 'fashion_short fashion_long',
    'CIFAR-10, all images': 'cifar_short cifar',
    'CIFAR-10, 5,000 images': 'cifar5000 cifar5000_wide cifar5000_long',
    'Imagenette': 'imagenette imagenette_tuned',
    'trec': 'trec_short trec_long',
    'trec, 50 fine classes': 'trec50_short trec50_long',
    'banking77': 'banking77_short banking77_long banking77_wide_short banking77_wide_long',
    'occupations (a table)': 'occupation_short occupation_long',
    'CamVid': 'camvid',
    'pixels of digits': 'digit_pixels',
    'Shakespeare': 'lm_short',
    'WikiText': 'wikitext',
    'adult': 'adult500_short adult500_long adult5000_short adult5000_long adult_short adult_long',
    'adult, taught by networks': 'adultnets5000 adultnets',
    'film reviews': 'polarity_short polarity_long',
    'SST-2': 'sst2_short sst2_long',
    'breast cancer': 'cancer',
    'nuclei': 'nuclei',
    'GoEmotions': 'goemotions_short',
    'facts about people (a table)': 'person_short person_long',
    'diabetes': 'diabetes',
    'ages': 'age5000 age',
    'points': 'points_short points_long',
}
GAIN = r'\**[+-]?\d+\.\d+\**'


class Missing(Exception):
    "A page lacks the sentence that a number belongs to"


def section(page, name, content):
    "The page with this between <!-- name --> and <!-- end of name -->"
    start, end = f'<!-- {name} -->\n', f'<!-- end of {name} -->\n'
    if page.count(start) != 1 or page.count(end) != 1:
        raise Missing(f'{start.strip()} and {end.strip()} must each stand in the page once')
    before, rest = page.split(start)
    return before + start + '\n' + content + end + rest.split(end)[1]


def fill(page, pattern, *values):
    "The page with these values as the groups of the pattern, wherever it fits. A space of the pattern may be a line break"
    matches = [*re.finditer(re.sub(r'\\? ', r'\\s+', pattern), page)]
    if not matches:
        raise Missing(f'no text fits {pattern!r}')
    for m in reversed(matches):
        for i in range(len(values), 0, -1):
            page = page[: m.start(i)] + str(values[i - 1]) + page[m.end(i) :]
    return page


def rounded(v, digits):
    "With a sign, unless it is zero; halves are rounded away from zero, as they are read"
    text = f'{v + copysign(1e-6, v):+.{digits}f}'
    return text if float(text) else text[1:]


def gains_said(page, j):
    "The page with the gains of the table that begins with 'the student predicts'"
    measured = j.gains('default', 'labels')
    q = corrected({n: e.p for n, e in measured.items()})
    head = re.search(r'^\| the student predicts .*?\n\n', page, re.M | re.S)
    if head is None:
        raise Missing('no table begins with "| the student predicts"')
    part = head[0]
    for words, cells in SAID.items():
        found = []
        for n in cells.split():
            v = rounded(measured[n].mean, 2 if j.cells[n].main == 'bits' else 1)
            found.append(f'**{v}**' if q[n] < protocol.LEVEL else v)
        pattern = rf'(?<!\w){re.escape(words)} ({GAIN}(?:, {GAIN})*)'
        part = fill(part, pattern, ', '.join(found))
    return page.replace(head[0], part)


def loss(j, n, k):
    return f'{abs(j.cells[n].gain(k).mean):.1f}'


def of_cells(j, kind, alone=False):
    """Cells of this kind; where the default is better, significantly better, significantly worse; where the interval has a relevant loss.
    With `alone`, p is corrected for these cells instead of all cells."""
    found = j.gains('default', 'labels')
    own = {n: e for n, e in found.items() if j.cells[n].kind == kind}
    q = corrected({n: e.p for n, e in (own if alone else found).items()})
    cells, better, up, down, safe, *_ = judge.counts(j, None, own, q)
    return cells, better, up, down, cells - safe


def of_data_sets(j):
    "Data sets, the effect on accuracy over them, as text, and its p; first tries don't count"
    found = j.gains('default', 'labels', 'accuracy')
    inside = {n: e for n, e in found.items() if j.cells[n].kind != 'first tries'}
    o = overall([(j.cells[n].facts['data_set'], e.mean) for n, e in inside.items()])
    text = f'{o.mean:+z.1f} points, 95% interval {o.low:+.1f} to {o.high:+.1f}'
    return o.n, text, f'{o.p:.2f}'


def of_best(j):
    """Cells with many recipes, those in which the best gains, those of these in which it is the default; the median share for accuracy,
    its interval, cells; the same share with reported seeds, cells; the share and cells for mean average precision"""
    found = judge.against_best(j)
    shares, reported = (judge.shares(j, o) for o in (found, judge.against_best(j, 'reported')))
    gains = [k for k, theirs, _ in found.values() if theirs.mean > 0]
    percent = lambda v: [f'{100 * o:.0f}' for o in judge.median_share(v)]
    return (
        len(found),
        len(gains),
        gains.count('default'),
        *percent(shares['accuracy']),
        len(shares['accuracy']),
        percent(reported['accuracy'])[0],
        len(reported['accuracy']),
        percent(shares['map'])[0],
        len(shares['map']),
    )


def of_probabilities(j):
    """Cells where the default has a lower NLL, of how many, where its calibration is significantly worse; median calibration errors,
    (the default, labels alone) in all cells, and in those with a temperature, without and with it; their number; runs within the limit, of how many"""
    better, worse = j.gains('default', 'labels', 'nll'), j.gains('default', 'labels', 'ece')
    q = corrected({n: e.p for n, e in worse.items()})
    medians = [
        *np.median(judge.calibration_errors(j), 0),
        *calibrated.medians('before'),
        *calibrated.medians('after'),
    ]
    return (
        sum(e.mean > 0 for e in better.values()),
        len(better),
        sum(e.mean < 0 and q[n] < protocol.LEVEL for n, e in worse.items()),
        *(f'{v:.3f}' for v in medians),
        len(calibrated.finished()),
        *calibrated.all_within('default'),
    )


def of_alike_cells(j):
    "Other cells of the census table; other cells where the default is kd(1, .5)"
    own = [j.cells[n] for n in j.gains('default', 'labels') if j.cells[n].kind == 'other cells']
    plain = 'Recipe(Term(kd, weight=0.5, T=1), task=0.5)'
    return (
        sum(c.facts['data_set'] == 'adult census' for c in own),
        sum(c.plan['recipes']['default']['text'] == plain for c in own),
    )


def of_repository(r, j):
    "page -> its text with the numbers of the runs, which the pages quote"
    readme, gains, docs = [(ROOT / n).read_text() for n in (README, GAINS, DOCS)]
    cells, better, up, down, risky = of_cells(j, 'other cells')
    _, new_better, new_up, *rest = of_cells(j, 'new data')
    new = new_better, new_up, of_cells(j, 'new data', alone=True)[2], *rest
    new = [o or 'none' for o in new]
    over = (
        r'Over (\d+) data sets, the mean gain in accuracy is ([^()]+) \(p = ([\d.]+)\)',
        of_data_sets(j),
    )
    for pattern, values in (
        (
            r'\[(\d+) combinations of data.*?\| better on average in (\d+), significantly in (\d+); '
            r'significantly worse in (\d+) \(.*?\); in (\d+), the interval',
            (cells, better, up, down, risky),
        ),
        (
            r'\[ten tasks with new data.*?\| better on average in (\d+), significantly in (\w+) \(in (\w+) if .*?\); '
            r'significantly worse in (\w+); in (\w+), the interval',
            new,
        ),
        over,
    ):
        readme = fill(readme, pattern, *values)
    gains = gains_said(gains, j)
    for pattern, values in (
        (
            r'In (\d+) cells \([^)]*\), the default was better on average in (\d+), significantly in (\d+), and significantly '
            r'worse in (\d+) \([^)]*\)\. In (\d+) of them',
            (cells, better, up, down, risky),
        ),
        (
            r'\s(\d+) of these cells come from one census table, and in (\d+) of them',
            of_alike_cells(j),
        ),
        over,
        (
            r'it was better on average in (\w+), significantly in (\w+) \(in (\w+) if [^)]*\), and significantly worse in (\w+)\. In (\w+) of',
            new,
        ),
        (
            r'In (\d+) cells, at least ten recipes[^.]*\. In (\d+) of them, [^.]*, and in (\d+) of these, [^.]*\. '
            r'The median gain of the default was (\d+)% of the best recipe.s gain for accuracy \(95% interval (\d+) to (\d+)%, (\d+) cells; '
            r'(\d+)% in (\d+) cells if .*?\), and (\d+)% for mean average precision \((\d+) cells\)',
            of_best(j),
        ),
        (
            r'`dist` without fading lost \*\*([\d.]+)\*\* points on banking77',
            (f'{abs(r.gains["banking77weak_long"]["dist(auto)x3"].mean):.1f}',),
        ),
        (
            r'`binary_kl` \*\*([\d.]+)\*\* on GoEmotions',
            (f'{abs(r.gains["goemotionsweak_short"]["binary(1)x3"].mean):.1f}',),
        ),
        (
            r'gained ([\d.]+) points on banking77 in a long training and lost ([\d.]+) in a short one, but it lost ([\d.]+) on',
            [
                loss(j, n, 'default')
                for n in ('banking77weak_long', 'banking77weak_short', 'goemotionsweak_short')
            ],
        ),
        (
            r'test loss in (\d+) of (\d+) cells, but its calibration error was significantly larger in (\d+)\. '
            r'The medians of the calibration error are ([\d.]+) and ([\d.]+)\. A \[temperature\]\S+ lowers them from ([\d.]+) and ([\d.]+) '
            r'to ([\d.]+) and ([\d.]+) \(in (\d+) of these cells\), but only (\d+) of (\d+) runs',
            of_probabilities(j),
        ),
    ):
        gains = fill(gains, pattern, *values)
    for pattern, values in (
        (
            r'gains \*\*([\d.]+)\*\* points on two-digit numbers in a short training',
            (loss(j, 'digits100_short', 'kd(4,.9)'),),
        ),
        (
            r'loses \*\*([\d.]+)\*\* points on banking77 in a long one',
            (loss(j, 'banking77_long', 'kd(4,.9)'),),
        ),
    ):
        docs = fill(docs, pattern, *values)
    return {README: readme, GAINS: gains, DOCS: docs}


def of_benchmark(r, j):
    "The text of the benchmark's own page"
    page = section((HERE / 'README.md').read_text(), 'protocol 2', judge.text(j))
    page = section(page, 'calibrated', calibrated.text())
    return section(page, 'tables', tables.text(r))


def main():
    r, j = tables.Results(), judge.Judged()
    pages = of_repository(r, j) | {f'{HERE.relative_to(ROOT)}/README.md': of_benchmark(r, j)}
    for name, text in pages.items():
        (ROOT / name).write_text(text)
    tables.picture(r, HERE / 'gains.png')
    judge.picture(j, HERE / 'protocol2.png')


if __name__ == '__main__':
    main()
