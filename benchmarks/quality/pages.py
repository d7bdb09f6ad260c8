"""Write what the stored runs say into the pages: tables and pictures of README.md, and numbers of the repository's README and docs.

python benchmarks/quality/pages.py"""

import re
from math import copysign
import calibrated, judge, protocol, tables
import numpy as np
from stats import corrected
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
    'adult': 'adult500_short adult500_long adult5000_short adult5000_long adult_short',
    'adult, taught by networks': 'adultnets5000 adultnets',
    'film reviews': 'polarity_short polarity_long',
    'SST-2': 'sst2_short sst2_long',
    'breast cancer': 'cancer',
    'nuclei': 'nuclei',
    'GoEmotions': 'goemotions_short',
    'facts about people (a table)': 'person_short person_long',
    'diabetes': 'diabetes',
    'ages': 'age5000',
    'points': 'points_short points_long',
}
BITS = 'lm_short', 'wikitext'
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
    "The page with these values as the groups of the pattern, wherever it fits"
    matches = [*re.finditer(pattern, page)]
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


def gains_said(page, r):
    "The page with the gains of the table that begins with 'the student predicts'"
    head = re.search(r'^\| the student predicts .*?\n\n', page, re.M | re.S)
    if head is None:
        raise Missing('no table begins with "| the student predicts"')
    part = head[0]
    for words, cells in SAID.items():
        found = []
        for n in cells.split():
            g = r.gains[n][r.default[n]]
            v = rounded(g.mean / 100, 2) if n in BITS else rounded(g.mean, 1)
            found.append(f'**{v}**' if n in r.bold_default else v)
        pattern = rf'(?<!\w){re.escape(words)} ({GAIN}(?:, {GAIN})*)'
        part = fill(part, pattern, ', '.join(found))
    return page.replace(head[0], part)


def loss(r, n, k):
    return f'{abs(r.gains[n][k].mean):.1f}'


def of_other_cells(j):
    "Cells that are neither first tries nor new data; where the default is better, significantly better, significantly worse"
    found = j.gains('default', 'labels')
    q = corrected({n: e.p for n, e in found.items()})
    own = {n: e for n, e in found.items() if j.cells[n].kind == 'other cells'}
    return judge.counts(j, None, own, q)[:4]


def of_best(j):
    "Cells with many recipes, those in which the best gains, those of these in which it is the default; median shares and cells"
    found = judge.against_best(j)
    shares = judge.shares(j, found)
    gains = [k for k, theirs, _ in found.values() if theirs.mean > 0]
    median = lambda m: (f'{100 * np.median(shares[m]):.0f}', len(shares[m]))
    return len(found), len(gains), gains.count('default'), *median('accuracy'), *median('map')


def of_probabilities(j):
    "Cells where the default has a lower NLL, of how many, where its calibration is significantly worse; median calibration errors"
    better, worse = j.gains('default', 'labels', 'nll'), j.gains('default', 'labels', 'ece')
    q = corrected({n: e.p for n, e in worse.items()})
    medians = *np.median(judge.calibration_errors(j), 0), *calibrated.medians()
    return (
        sum(e.mean > 0 for e in better.values()),
        len(better),
        sum(e.mean < 0 and q[n] < protocol.LEVEL for n, e in worse.items()),
        *(f'{v:.3f}' for v in medians),
        len(calibrated.finished()),
    )


def of_repository(r, j):
    "page -> its text with the numbers of the runs, which the pages quote"
    readme, gains, docs = [(ROOT / n).read_text() for n in (README, GAINS, DOCS)]
    own = r.of_default()
    seeds = [g.seeds for g in own.values()]
    new = [n for n, f in r.facts.items() if f['task'] in tables.NEW]
    gains, others = gains_said(gains, r), of_other_cells(j)
    better = sum(g.mean > 0 for g in own.values()), len(own)
    readme = fill(readme, r'\[(\d+) combinations of data', better[1])
    readme = fill(readme, r'better on average in (\d+), significantly worse', better[0])
    readme = fill(
        readme,
        r'\[(\d+) combinations, \S+ of them .*?\| better on average in (\d+), significantly in (\d+); significantly worse in (\d+),',
        *others,
    )
    for pattern, values in (
        (
            r'beat labels alone in (\d+) of the (\d+) cells\. The gain is significant in the (\d+) bold',
            (*better, len(r.bold_default)),
        ),
        (r'the mean of (\d+) to (\d+) seeds', (min(seeds), max(seeds))),
        (r'CamVid \S+ \(p = ([\d.]+)\)', (f'{own["camvid"].p:.2f}',)),
        (
            r'`dist` without fading lost \*\*([\d.]+)\*\* points on banking77',
            (loss(r, 'banking77weak_long', 'dist(auto)x3'),),
        ),
        (
            r'`binary_kl` \*\*([\d.]+)\*\* on GoEmotions',
            (loss(r, 'goemotionsweak_short', 'binary(1)x3'),),
        ),
        (
            r'with 8 seeds in (\d+) cells[^.]*\. It was\s+better on average in (\d+), significantly in (\d+), and significantly worse in (\d+) ',
            others,
        ),
        (
            r'In (\d+) cells, at least ten recipes[^.]*\. In (\d+) of them, [^.]*, and in (\d+) of these,\s+[^.]*\. '
            r'The\s+median gain of the default was (\d+)% of the best recipe.s gain for\s+accuracy\s+\((\d+)\s+cells\), '
            r'and\s+(\d+)% for mean average precision \((\d+)\s+cells\)',
            of_best(j),
        ),
        (
            r'test loss in (\d+) of (\d+)\s+cells, but its calibration error was\s+significantly larger in (\d+)\. '
            r'The\s+medians of the calibration error are ([\d.]+) and ([\d.]+); with a \[temperature\]\S+\s+they are\s+([\d.]+\d) and ([\d.]+\d)\s+\(in (\d+) of these cells\)',
            of_probabilities(j),
        ),
    ):
        gains = fill(gains, pattern, *values)
    for pattern, values in (
        (
            r'in (\d+) of their (\d+) combinations of student and training length',
            (len([n for n in new if n in r.bold_default]), len(new)),
        ),
        (
            r'gains \*\*([\d.]+)\*\* points on two-digit numbers in a short training',
            (loss(r, 'digits100_short', 'kd(4,.9)'),),
        ),
        (
            r'loses \*\*([\d.]+)\*\* points on\s+banking77 in a long one',
            (loss(r, 'banking77_long', 'kd(4,.9)'),),
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
