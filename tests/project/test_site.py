"The site: what is gathered, the menu, and mistakes that stop the build."

import importlib.util, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
import fastdistill.losses

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location('build_site', ROOT / 'scripts' / 'build_site.py')
build_site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_site)
CONFIG = (ROOT / 'mkdocs.yml').read_text()
MODULES = (
    'fastdistill fastdistill.fastai fastdistill.losses fastdistill.recipes '
    'fastdistill.huggingface fastdistill.lightning fastdistill.detection fastdistill.fastai.detector '
    'fastdistill.cache fastdistill.evaluation fastdistill.features fastdistill.losses.detection'
).split()


def test_every_page_is_in_the_menu():
    assert not build_site.missing_from_the_menu(build_site.pages())


def test_every_entry_of_the_menu_is_a_page():
    entries = re.findall(r'^ +- (?:.+: )?(\S+\.md)$', CONFIG, re.M)
    pages = {str(page.relative_to(ROOT)) for page in build_site.pages()}
    reference = {f'docs/reference/{module}.md' for module in MODULES}
    assert set(entries) == pages | reference
    assert len(entries) == len(set(entries))


def test_a_link_in_the_repository_is_the_same_on_the_site(tmp_path):
    build_site.gather(build_site.pages(), tmp_path)
    for page in tmp_path.rglob('*.md'):
        for link in build_site.LINK.findall(page.read_text()):
            assert (page.parent / link).exists(), f'{page.relative_to(tmp_path)}: {link}'


def test_a_link_to_a_missing_picture_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build_site, 'ROOT', tmp_path)
    (tmp_path / 'page.md').write_text('![a plot](img/gone.png)')
    with pytest.raises(SystemExit, match=r'page.md links to what does not exist: .*gone.png'):
        build_site.gather([tmp_path / 'page.md'], tmp_path / 'site')


def test_the_reference_has_each_public_name_once(tmp_path):
    names = (ROOT / 'tests' / 'api.txt').read_text().split()
    build_site.write_reference(names, tmp_path)
    assert {page.stem for page in tmp_path.iterdir()} == set(MODULES)
    text = '\n'.join(page.read_text() for page in tmp_path.iterdir())
    described = re.findall(r'^::: (\S+)$', text, re.M)
    assert len(described) == len(set(described))
    ends = [name.rpartition('.')[2] for name in described]
    linked = re.findall(r'\[(\w+)\]', text)
    assert {name.rpartition('.')[2] for name in names} <= {*ends, *linked}


def test_llms_txt_names_each_page_with_its_first_sentence(tmp_path):
    build_site.gather(build_site.pages(), tmp_path)
    names = (ROOT / 'tests' / 'api.txt').read_text().split()
    build_site.write_reference(names, tmp_path / 'docs' / 'reference')
    text = build_site.llms_text(CONFIG.split('\nnav:\n')[1], tmp_path)
    assert text.startswith('# fastdistill\n\n> fastdistill trains a small, fast model')
    for page in build_site.pages():
        assert f']({page.relative_to(ROOT)})' in text
    about = 'A live teacher should cost no more than its fastest forward pass.'
    assert f'- [Speed](docs/speed.md): {about}\n' in text


def test_the_card_of_a_method_gets_what_was_measured(tmp_path):
    for card in (ROOT / 'docs' / 'methods').glob('*.md'):
        (tmp_path / card.name).write_text(card.read_text())
    build_site.add_measurements(tmp_path)
    on_cards = [
        row
        for card in tmp_path.glob('*.md')
        for part in card.read_text().split('\n## Measured here\n')[1:]
        for row in re.findall(r'^\| `.*', part, re.M)
    ]
    page = (ROOT / 'docs' / 'leaderboard.md').read_text()
    methods = re.search(r'^## All methods\n(.+?)^## ', page, re.M | re.S)[1]
    # a method whose memory is known has one loss; label smoothing has none
    of_one_loss = [
        o for o in re.findall(r'^\| `.* [\d.]+ \|$', methods, re.M) if '`smoothing' not in o
    ]
    assert len(of_one_loss) > 50 and sorted(on_cards) == sorted(of_one_loss)
    assert '\n| `dkdx1` | 1 |' in (tmp_path / 'dkd.md').read_text()
    assert '\n| `kl(1)w1` | 2 |' in (tmp_path / 'kl.md').read_text()  # timm's


@pytest.mark.parametrize(
    'card', sorted((ROOT / 'docs' / 'methods').glob('*.md')), ids=lambda o: o.stem
)
def test_the_card_of_a_method_has_a_picture_and_words_that_say_what_is_seen(card):
    (words,) = re.findall(rf'!\[(.+)\]\(\.\./img/{card.stem}\.png\)', card.read_text())
    assert len(words.split()) > 5


@pytest.fixture
def drawn(monkeypatch):
    "Draw the picture of a loss of outputs, and return its parts"
    monkeypatch.syspath_prepend(ROOT / 'docs')
    pictures, figures = pytest.importorskip('output_pictures'), []
    monkeypatch.setattr(pictures, 'save', lambda fig, name: figures.append(fig))

    def draw(name):
        pictures.drawings()[name]()
        return figures[-1].axes

    draw.student, draw.teacher = pictures.STUDENT.double(), pictures.TEACHER.double()
    return draw


def test_the_curve_of_a_picture_is_the_loss(drawn):
    _, curves, _ = drawn('tvd')
    x, y = curves.lines[0].get_data()
    p_t = drawn.teacher.exp() / drawn.teacher.exp().sum()
    for logit, value in list(zip(x, y))[::40]:
        s = drawn.student.clone()
        s[0] = float(logit)
        p_s = s.exp() / s.exp().sum()
        assert float(value) == pytest.approx(float((p_s - p_t).abs().sum() / 2), rel=1e-4)


def test_the_bars_of_a_picture_are_a_step_down_the_gradient(drawn):
    *_, bars = drawn('soft_ce')
    p_s, p_t = [(o / 4).exp() / (o / 4).exp().sum() for o in (drawn.student, drawn.teacher)]
    expected = (p_t - p_s) / (p_t - p_s).abs().sum()
    assert [o.get_width() for o in bars.patches] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_target_in_the_picture_of_taid_is_the_mixture_of_both_models(drawn):
    bars, *_ = drawn('taid')
    mixed = ((drawn.student + drawn.teacher) / 2).softmax(0)
    target = [o.get_width() for o in bars.containers[2]]
    assert target == pytest.approx(mixed.tolist(), abs=1e-5)


QUESTIONS = (
    'alpha, no gain, worse than alone, NaN, scale, eval, store, top-k, memory, several teachers, tokenizer, '
    'other classes, quantized, detector, tables, language models, served, teach what'
).split(', ')


@pytest.mark.parametrize('words', QUESTIONS)
def test_a_question_that_people_ask_is_a_heading_with_an_answer(words):
    parts = re.split(r'^## ', (ROOT / 'docs' / 'faq.md').read_text(), flags=re.M)[1:]
    answers = [
        o for o in parts if all(w in o.splitlines()[0].lower() for w in words.lower().split())
    ]
    assert len(answers) >= 1
    assert re.search(r'\]\(\S+\.md', answers[0]), 'an answer leads to a page'


# (pages in docs/ that answer a question, what people type into the search)
SEARCHES = [
    (
        'faq words fastai recipes methods/kl',
        'temperature and alpha; which temperature; what is alpha; choose T; alpha weight of the teacher',
    ),
    (
        'faq why fastai',
        'no gain; distillation does not help; no improvement; student not better; why did it not help',
    ),
    (
        'faq why',
        'worse than alone; student worse with teacher; distilled student is worse; distillation hurts accuracy; accuracy drops',
    ),
    ('faq why', 'nan; loss is nan; nan loss; loss becomes nan; infinite loss'),
    (
        'faq why words fastai',
        'scale of the loss; loss is too large; why is the loss so large; loss scale; train loss higher than valid loss',
    ),
    (
        'faq plain fastai',
        'teacher eval mode; teacher.eval(); is the teacher frozen; teacher evaluation mode; dropout of the teacher',
    ),
    (
        'faq cache',
        'store teacher outputs; cache teacher; precompute logits; save the outputs of the teacher; offline distillation',
    ),
    ('faq cache stores', 'top-k; topk logits; store only top k classes; likeliest classes'),
    (
        'faq speed machines',
        'out of memory; gpu memory; memory of the teacher; cuda out of memory; teacher does not fit',
    ),
    (
        'faq plain classes',
        'several teachers; ensemble of teachers; multiple teachers; two teachers; average teachers',
    ),
    (
        'faq plain guides/text methods/uld',
        'different tokenizer; tokenizer mismatch; teacher has another tokenizer; other vocabulary; different vocabulary',
    ),
    (
        'faq classes',
        'different classes; teacher has more classes; number of classes differs; class mismatch; imagenet teacher 10 classes',
    ),
    (
        'faq compression guides/deployment',
        'quantization; quantized student; int8 student; pruning; quantization aware training',
    ),
    ('faq detectors', 'object detection; yolo; detector; faster r-cnn; retinanet'),
    (
        'faq trees guides/tables',
        'tabular data; xgboost; lightgbm teacher; random forest; sklearn table',
    ),
    (
        'faq guides/language_models trainers',
        'llm; language model; gpt distillation; next token; large language models',
    ),
    (
        'faq cache guides/language_models',
        'vllm; teacher behind an api; openai api; http server teacher; served teacher',
    ),
    (
        'faq plain',
        'what teaches what; which models can be teachers; different architecture; cnn student transformer teacher; teacher and student of different architectures',
    ),
]


def test_the_search_of_the_site_leads_to_the_answer(tmp_path):
    pytest.importorskip('zensical')
    if shutil.which('node') is None:
        pytest.skip('needs node')
    build_site.write_pages(tmp_path / 'pages')
    config = CONFIG.replace('paths: [src]', f'paths: [{ROOT / "src"}]')
    config = config.replace('out/site/pages', 'pages').replace('out/site/html', 'html')
    (tmp_path / 'mkdocs.yml').write_text(config)
    command = [sys.executable, '-m', 'zensical', 'build']
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    typed = [q for _, queries in SEARCHES for q in queries.split('; ')]
    command = ['node', ROOT / 'scripts' / 'search_site.js', tmp_path / 'html', *typed]
    hits = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    lost = [
        f'{q}: {hits[q][:3]}'
        for pages, queries in SEARCHES
        for q in queries.split('; ')
        if not any(h.startswith(f'docs/{page}/') for h in hits[q][:3] for page in pages.split())
    ]
    assert not lost


def build(folder, **pages):
    "What the site's builder says about these pages"
    pytest.importorskip('zensical')
    (folder / 'pages').mkdir()
    for name, text in pages.items():
        (folder / 'pages' / f'{name}.md').write_text(f'# {name}\n\n{text}\n')
    config = CONFIG[: CONFIG.index('\nnav:')].replace('paths: [src]', f'paths: [{ROOT / "src"}]')
    config = re.sub(r'^extra_(css|javascript): .*\n', '', config, flags=re.M)
    config = config.replace('out/site/pages', 'pages').replace('out/site/html', 'html')
    (folder / 'mkdocs.yml').write_text(config)
    command = [sys.executable, '-m', 'zensical', 'build', '--strict']
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_pages_without_a_mistake_are_built(tmp_path):
    done = build(tmp_path, index='[A loss](other.md#other)', other='::: fastdistill.losses.kl')
    assert done.returncode == 0, done.stdout + done.stderr
    html = (tmp_path / 'html' / 'other' / 'index.html').read_text()
    assert 'id="fastdistill.losses.kl"' in html
    assert fastdistill.losses.kl.__doc__.split('\n')[0].split('(')[0].rstrip(' .') in html
    assert (tmp_path / 'html' / 'search.json').exists()


@pytest.mark.parametrize(
    'text, said',
    [
        ('[A page](gone.md)', 'page does not exist'),
        ('[A part](index.md#gone)', 'anchor does not exist'),
        ('::: fastdistill.gone', "Could not collect 'fastdistill.gone'"),
    ],
    ids=['page', 'anchor', 'name'],
)
def test_a_mistake_stops_the_build(text, said, tmp_path):
    done = build(tmp_path, index='Home.', other=text)
    assert done.returncode != 0
    assert said in re.sub(r'\x1b\[[\d;]*m', '', done.stdout + done.stderr)
