"""The pages: every Python block runs. Those of a page in docs/ build on each other, in the order of the page. Each of the
README's runs alone: in a fresh Python or, after `<!-- prelude: NAME -->`, with the names of that prelude. After
`<!-- needs: PACKAGE -->`, a block runs where that package is installed."""

import importlib.util, re, subprocess, sys, warnings
from pathlib import Path
import pytest
import docs_preludes
from fastdistill import DistillWarning

pytestmark = pytest.mark.filterwarnings(
    'ignore:numpy.core is deprecated',  # lr_find, as it loads the model again
    'ignore:__array__ implementation',  # fastai, as it shows images
    # what Lightning warns of about itself, and about small loaders
    'ignore:.*isinstance.treespec, LeafSpec.',
    'ignore:The .*dataloader.* does not have many workers',
)
ROOT = Path(__file__).parents[2]
README = ROOT / 'README.md'
START = ROOT / 'docs' / 'start.md'
DOCS = sorted((ROOT / 'docs').rglob('*.md'))
PAGES = [README, ROOT / 'examples' / 'README.md', *DOCS]
BLOCK = re.compile(
    r'^(?:<!-- (?:not run: (?P<why>.+?)|prelude: (?P<prelude>\w+)|needs: (?P<needs>\w+)) -->\n+)?^```python\n(?P<code>.*?)^```$',
    re.M | re.S,
)
# how many blocks of a page are only shown: each says why where it stands
NOT_RUN = {
    'docs/faq.md': 5,
    'docs/guides/segmentation.md': 1,
    'docs/cache.md': 1,
    'docs/classes.md': 1,
    'docs/compression.md': 1,
    'docs/fastai.md': 1,
    'docs/guides/images.md': 1,
    'docs/start.md': 1,
    'docs/streams.md': 2,
    'docs/train.md': 1,
}
HEADINGS = [
    'What it compares',
    'How to use (function, fastai)',
    'Suggested values, and from where',
    'When it helps, hurts, or clashes',
    'Paper, and where we differ',
]


def name(page):
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize('page', PAGES, ids=name)


def prelude(text):
    found = re.search(r'<!-- prelude: (\w+) -->', text)
    return getattr(docs_preludes, found[1])() if found else {}


def blocks(text):
    "Code of each block that runs, moved down to the line where it stands, so that an error names it"
    for m in BLOCK.finditer(text):
        if not m['why'] and (not m['needs'] or importlib.util.find_spec(m['needs'])):
            yield '\n' * text.count('\n', 0, m.start('code')) + m['code']


# pages whose tiny networks get a warning at the papers' weights, and of which term
SWAMPED = {'docs/fastai.md': 'd?kd', 'docs/methods/standardize.md': 'kl'}


@pytest.mark.parametrize('page', DOCS, ids=name)
def test_blocks_run(page, tmp_path, monkeypatch):
    if term := SWAMPED.get(name(page)):
        warnings.filterwarnings(
            'ignore', rf'{term} has 9\d\.\d\d% of the gradient of the first batch', DistillWarning
        )
    text = page.read_text()
    codes = list(blocks(text))
    if not codes:
        pytest.skip('no code')
    monkeypatch.chdir(tmp_path)
    space = dict(prelude(text), __name__='__page__')
    for code in codes:
        exec(compile(code, name(page), 'exec'), space)


def lone_blocks():
    text = README.read_text()
    return [
        pytest.param(m, id=f'line {text.count(chr(10), 0, m.start("code")) + 1}')
        for m in BLOCK.finditer(text)
        if not m['why']
    ]


# as in conftest.py: starting them, 40 times, takes a third of the time of the block
WITHOUT_WORKERS = 'import fastcore.basics; fastcore.basics.defaults.cpus = 0\n'


def numbers(text):
    return [float(o) for o in re.findall(r'\d*\.\d+|\d+', text)]


def check_what_it_prints(printed, page):
    """The numbers that README.md and docs/start.md say the first block prints. Its students train differently on another processor: accuracies on 1,000
    images may differ by .05, three standard deviations of their sampling noise, and losses by a tenth"""
    lines = [line.rsplit('\r', 1)[-1] for line in printed.splitlines()]
    said = [o.split('fastdistill:')[1] for o in lines if 'fastdistill:' in o]
    *epochs, last = re.search(r'^```text\n(.+?)^```$', page, re.M | re.S)[1].splitlines()
    ran = [line for line in lines if re.match(r' *\d+ +\d+\.\d', line)][-len(epochs) :]
    for ours, theirs in zip(ran, epochs, strict=True):
        (epoch, *losses), (page_epoch, *page_losses) = (numbers(o)[:6] for o in (ours, theirs))
        assert epoch == page_epoch
        assert losses == pytest.approx(page_losses, rel=0.1), theirs
    assert re.sub(r'[\d.]+', '', lines[-1]).split() == re.sub(r'[\d.]+', '', last).split()
    assert numbers(lines[-1]) == pytest.approx(numbers(last), abs=0.05)
    teacher, alone, distilled = numbers(lines[-1])
    assert teacher > distilled > alone
    bullets = re.search(r'^Before the table.+?\n\n((?:- .+\n)+)', page, re.M)[1]
    for line in bullets.splitlines():
        here = numbers(' '.join(o for o in said if ('recipe' in o) == ('recipe' in line)))
        for n in numbers(line):
            assert any(n == pytest.approx(o, rel=0.05, abs=0.05) for o in here), f'{n} in: {line}'


@pytest.mark.parametrize('m', lone_blocks())
def test_a_readme_block_runs_alone_and_prints_what_the_page_says(m, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if m['prelude']:
        exec(
            compile(m['code'], 'README.md', 'exec'),
            dict(getattr(docs_preludes, m['prelude'])(), __name__='__page__'),
        )
    else:  # subtle: in a process of its own, because fastdistill.fastai, once imported, has given `distill` to every Learner
        code = WITHOUT_WORKERS + m['code']
        of_fastai = '-Wignore:`torch.jit.script` is deprecated'  # while it is imported
        done = subprocess.run(
            [sys.executable, of_fastai, '-c', code], capture_output=True, text=True
        )
        assert not done.returncode and not done.stderr, done.stderr
        if 'print(' in m['code']:
            check_what_it_prints(done.stdout, START.read_text())


@pytest.mark.parametrize('language', ['python', 'text'])
def test_the_first_stop_shows_the_block_of_the_readme_and_what_it_prints(language):
    first = re.compile(rf'^```{language}\n.*?^```$', re.M | re.S)
    assert first.search(START.read_text())[0] == first.search(README.read_text())[0]


def test_blocks_that_are_not_run():
    shown = {
        name(p): n
        for p in PAGES
        if (n := sum(bool(m['why']) for m in BLOCK.finditer(p.read_text())))
    }
    assert shown == NOT_RUN


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\((?!https?:|#|mailto:)([^)#\s]+)', page.read_text()):
        assert (page.parent / link).exists(), f'{name(page)}: {link}'


@pytest.mark.parametrize('page', sorted((ROOT / 'docs' / 'methods').glob('*.md')), ids=name)
def test_method_cards_have_one_form(page):
    assert re.findall(r'^## (.+)$', page.read_text(), re.M) == HEADINGS
