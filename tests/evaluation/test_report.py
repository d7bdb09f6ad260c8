"The report in a terminal, as Markdown and as a page: the same numbers everywhere, and every name is only a name."

import base64, errno, io, json, os, re, shutil, subprocess
from html.parser import HTMLParser
import pytest, torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from reports import measured
from fastdistill.fastai import DistillError, Report
from fastdistill.evaluation import (
    plot_classes,
    plot_cost,
    plot_history,
    plot_recovered,
    plot_reliability,
    plot_runs,
)
from fastdistill.evaluation.report_data import Difference, Latency, MeasureInfo, SeedResults
from fastdistill.evaluation.number_format import amount, p_text, shown_text
from fastdistill.evaluation.verdicts import verdicts
from fastdistill.base.task import Task
from reports import a_report

HOSTILE = [
    '<script>alert(1)</script>',
    '"><img src=x onerror=console.error(1)>',
    "' onload='x",
    '{{ 7*7 }}{% raw %}',
    '$\\frac{1}{$',
    '😀 ☃ \u202e',
    'a|b *c* [d](http://e.x) `f`',
    '&lt;b&gt; &amp; \x00\x1b[31m',
    'url(http://e.x/a) @import "b"',
    '--><script>x</script>' + 'x' * 300,
    '',
    '[bold]rich[/] [link=http://e.x]l',
]


def hostile_report():
    r = a_report(0.001, HOSTILE[:3], HOSTILE)
    r.title, r.unit, r.notes = HOSTILE[1], HOSTILE[0], [HOSTILE[0]]
    for m in r.models.values():
        m.kind, m.metrics = HOSTILE[1], {HOSTILE[0]: 1.0}
    r.models[HOSTILE[2]].history = {HOSTILE[0] + '_loss': [1.0, 2.0], '$_loss': [1.0, 1.0]}
    r.machine['device'] = HOSTILE[0]
    return r


class Page(HTMLParser):
    "What a browser finds: elements with their attributes, and the text"

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [a for t, a in self.elements if t == tag]


def test_verdicts_name_the_numbers_and_the_test():
    ((verdict, text),) = verdicts(a_report())
    assert verdict == 'better' and text.startswith('distilled is better than alone: accuracy ')
    assert (
        "McNemar's exact test, p < 0.001; 300 samples)" in text
        and "of teacher's lead (95% interval" in text
    )
    ((verdict, text),) = verdicts(a_report(better=False))
    assert verdict == 'not significant' and text.startswith(
        'The difference between distilled and alone is not significant: '
    )


def test_less_is_better_where_it_is():
    r = a_report()
    r.headline = 'nll'
    ((verdict, text),) = verdicts(r)
    assert verdict == 'better' and r.comparison('distilled').differences['nll'].value < 0


def with_seeds(alone, distilled, difference, headline='accuracy'):
    "A report of students that were trained with several seeds"
    r = a_report()
    r.headline = headline
    values = dict(alone=alone, distilled=distilled)
    r.seeds = SeedResults([*range(4, 4 + len(alone))], values, difference)
    return r


def test_a_difference_over_seeds_comes_first():
    test = Difference(0.02, 0.0076, 0.0324, 0.02, 'paired t test')
    r = with_seeds([0.5, 0.51, 0.49], [0.52, 0.525, 0.515], test)
    over, first = verdicts(r)
    assert over == (
        'better',
        'Over 3 seeds, distilled is better than alone: accuracy +2.0 points on average (95% interval '
        '+0.8 to +3.2; paired t test, p = 0.020). distilled was better in 3 of 3 seeds.',
    )
    assert 'These are the models of seed 4.' in first[1]
    page = r.to_markdown()
    assert '| seed 4 | 50.0% | 52.0% | +2.0 points |' in page
    assert '| mean | 50.0% | 52.0% | +2.0 points (+0.8 to +3.2) |' in page
    assert 'accounts for the variation between training runs' in page
    assert Report.from_json(r.to_json()) == r
    old = json.loads(r.to_json())
    del old['seeds']
    assert Report.from_json(json.dumps(old)).seeds == SeedResults()


def test_the_better_seeds_are_those_with_less_where_less_is_better():
    test = Difference(-0.1, -0.3, 0.1, 0.2, 'paired t test')
    verdict, text = verdicts(with_seeds([1.2, 1.1, 1.0], [1.0, 0.9, 1.1], test, 'nll'))[0]
    assert verdict == 'not significant'
    assert text.startswith(
        'Over 3 seeds, the difference between distilled and alone is not significant: NLL -0.1000 on '
        'average (95% interval -0.3000 to +0.1000; '
    )
    assert text.endswith('distilled was better in 2 of 3 seeds.')
    worse = Difference(0.1, 0.05, 0.15, 0.01, 'paired t test')
    assert verdicts(with_seeds([1.0] * 3, [1.1] * 3, worse, 'nll'))[0][0] == 'worse'


def test_one_seed_says_so_and_has_no_table():
    r = with_seeds([0.5], [0.6], Difference(0.1))
    ((verdict, text),) = verdicts(r)
    assert verdict == 'better'
    assert 'Each was trained once. Results vary with the seed' in text
    assert 'Seeds' not in r.to_markdown()
    assert 'This is one training' not in verdicts(a_report())[0][1]


def test_a_student_with_better_predictions_and_worse_probabilities_is_not_just_better():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    weak, strong = (k * F.one_hot(y, 3) + torch.randn(300, 3, generator=g) for k in (1.0, 1.5))
    r = measured(dict(alone=weak, student=9 * strong), y, Task('softmax'), baseline='alone')
    ((verdict, text),) = verdicts(r)
    assert verdict == 'mixed'
    assert text.startswith('student is better than alone in accuracy, but worse in NLL: accuracy ')
    assert ' Its probabilities are worse: NLL ' in text
    assert '- **mixed**: student is better than alone in accuracy' in r.to_markdown()
    out = Console(file=io.StringIO(), width=80)
    r.show(out)
    assert 'mixed student is better than alone in accuracy, but worse in NLL' in out.file.getvalue()
    assert 'mixed' in Page(r.to_html()).text
    r.headline = 'nll'
    assert verdicts(r)[0][0] == 'worse'


def test_without_a_lead_nothing_is_recovered():
    r = a_report()
    c = r.comparison('distilled')
    part = c.recovered.pop('accuracy')
    text = verdicts(r)[0][1]
    assert 'teacher has no significant lead over alone in accuracy' in text
    assert 'significantly better in NLL, Brier score.' in text
    assert 'nothing to recover' not in text
    c.recovered = {}
    text = verdicts(r)[0][1]
    assert 'teacher has no significant lead over alone, so there is nothing to recover.' in text
    c.recovered = dict(accuracy=part)
    assert 'no significant lead' not in verdicts(r)[0][1]


def test_the_texts_of_a_report_name_no_loss_that_was_not_used_and_say_what_a_size_is():
    text = a_report().to_markdown()
    assert 'dist`' not in text
    assert 'Size: the file of the model, or else its parameters and buffers' in text


def test_numbers_as_text():
    assert [amount(v) for v in (None, 0, 612, 38_300, 11_689_512, 1.8e9)] == [
        '–',
        '0',
        '612',
        '38.3 k',
        '11.7 M',
        '1.80 G',
    ]
    assert amount(153_000, 'B') == '153 kB' and amount(12, 'B') == '12.0 B'
    assert [p_text(p) for p in (None, 0.0002, 0.012, 0.34, 1.0)] == [
        'p is unknown',
        'p < 0.001',
        'p = 0.012',
        'p = 0.34',
        'p = 1.00',
    ]
    share, number = MeasureInfo('a', True, True), MeasureInfo('b')
    assert [
        share.text(v, s) for v, s in ((0.873, False), (0.0004, True), (None, False), (-0.021, True))
    ] == ['87.3', '+0.04', '–', '-2.1']
    assert [number.text(v) for v in (0.12345, 1.2345, 123.456)] == ['0.1235', '1.234', '123.46']
    assert (
        Difference(1.0, p=0.049).significant
        and not Difference(1.0, p=0.05).significant
        and not Difference(1.0).significant
    )


def test_all_views_show_the_same_numbers():
    r = a_report(0.001)
    out = Console(file=io.StringIO(), width=200)
    r.show(out)
    page = Page(r.to_html())
    accuracy = f'{100 * r.models["distilled"].measures["accuracy"].value:.1f}%'
    for text in (out.file.getvalue(), r.to_markdown(), page.text, r._repr_html_()):
        for part in (
            accuracy,
            verdicts(r)[0][1][:40],
            'Scores',
            'Agreement with teacher',
            'Calibration',
            'Cost',
            'but not for the variation between training',
        ):
            assert part in text, part


def test_a_terminal_of_80_columns_cuts_no_number():
    out = Console(file=io.StringIO(), width=80)
    r = a_report(0.001)
    r.show(out)
    assert '…' not in re.sub('signific…', '', out.file.getvalue())


@pytest.mark.parametrize('make', [a_report, hostile_report], ids=['plain', 'hostile'])
def test_the_page_is_accessible_and_loads_nothing(make):
    text = make().to_html()
    page = Page(text)
    assert page.elements[0][0] == 'html' and page.all('html') == [dict(lang='en')]
    assert page.all('title') and page.all('main') and len(page.all('h1')) == 1
    assert page.all('table') and len(page.all('table')) == len(page.all('caption'))
    regions = [a for a in page.all('div') if a.get('role') == 'region']
    captions = {a['id'] for a in page.all('caption')}
    assert regions and {a.get('aria-labelledby') for a in regions} == captions
    assert (
        all(a.get('scope') in ('row', 'col') for a in page.all('th')) and len(page.all('th')) > 20
    )
    assert page.all('img') and all(
        a['alt'].strip() and a['src'].startswith('data:image/') for a in page.all('img')
    )
    assert not {t for t, _ in page.elements} & {
        'script',
        'iframe',
        'object',
        'embed',
        'form',
        'a',
        'base',
    }
    assert not [k for _, a in page.elements for k in a if k.startswith('on')]
    found = [v for _, a in page.elements for k, v in a.items() if k in ('src', 'href', 'srcset')]
    assert len(found) > 4 and all(v.startswith('data:') for v in found)
    styles = re.findall(r'<style>(.*?)</style>', text, re.S)
    assert len(styles) == 1 and 'url(' not in styles[0] and '@import' not in styles[0]
    assert 'prefers-color-scheme:dark' in styles[0] and 'width=device-width' in text
    for a in page.all('img') + page.all('source'):  # nor do the pictures load anything
        for uri in (a.get('src'), a.get('srcset')):
            if uri is None:
                continue
            svg = base64.b64decode(uri.partition('base64,')[2]).decode()
            assert '<script' not in svg and not re.search(
                r'(?:href|src)="(?!#)|@import|url\((?!#)', svg
            )


def test_hostile_names_are_only_names():
    r = hostile_report()
    for text in (r.to_html(), r._repr_html_()):
        page = Page(text)
        for name in HOSTILE[:7]:
            assert shown_text(name) in page.text
    lines = r.to_markdown().splitlines()
    assert not [l for l in lines if re.search(r'(?<!\\)<', l)]
    rows = [len(re.findall(r'(?<!\\)\|', l)) for l in lines if l.startswith('|')]
    assert len(rows) > 20 and rows.count(rows[0]) > 3
    out = Console(file=io.StringIO(), width=500, force_terminal=True)
    r.show(out)
    text = out.file.getvalue()
    assert (
        '[bold]rich[/]' in text
        and '\x1b[31m' not in text
        and '\x00' not in text
        and '\u202e' not in text
        and '\x1b]8' not in text
    )
    assert Report.from_json(r.to_json()) == r


def test_a_table_of_markdown_has_as_many_cells_in_each_row():
    table = []
    for l in [*a_report(0.001).to_markdown().splitlines(), '']:
        if l.startswith('|'):
            table.append(l.count('|'))
        elif table:
            assert len(set(table)) == 1 and len(table) > 2
            table = []


@pytest.mark.parametrize('ratio', [2.5, 4])
def test_times_that_vary_say_that_the_machine_was_busy(ratio):
    r = a_report()
    for m in r.models.values():
        p95 = 5 * (ratio if m is r.models['alone'] else 1.2)
        m.cost.latency = [Latency(1, 5.0, p95, 20)]
    says = f'A p95 is {ratio:.2f} times its median: the machine was probably busy'
    assert (says in r.to_markdown()) is (says in Page(r.to_html()).text) is (ratio > 3)


def test_what_was_not_measured_is_left_out():
    y = torch.randn(40)
    r = measured(dict(a=y + torch.randn(40), b=y + torch.randn(40)), y, Task('regression'))
    page = Page(r.to_html())
    assert (
        'Calibration' not in page.text
        and 'Agreement' not in page.text
        and 'Classes' not in page.text
        and 'R²' in page.text
    )
    lone = measured(dict(a=y), y, Task('regression'))
    assert 'a' in lone.to_markdown() and verdicts(lone) == []


def test_a_figure_of_ones_own_is_in_the_page():
    fig = Figure(figsize=(2, 1))
    fig.subplots().plot([1, 2])
    page = Page(a_report().to_html(figures={'Where <they> differ': fig}))
    assert page.all('img')[-1]['alt'] == 'Where <they> differ' and page.all('img')[-1][
        'src'
    ].startswith('data:image/png')


def test_a_report_that_can_not_be_written_keeps_the_one_that_was_there(tmp_path, monkeypatch):
    r, file = a_report(), tmp_path / 'r.json'
    r.to_json(file)
    before = file.read_bytes()

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(DistillError, match='No space for .*r.json'):
            r.to_json(file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['r.json']


@pytest.mark.parametrize('name', ['missing/r.json', '.'])
def test_a_place_where_no_report_can_be_is_named(name, tmp_path):
    with pytest.raises(
        DistillError, match=f"Can't write {tmp_path}.*: (No such file|Is a directory)"
    ):
        a_report().to_html(tmp_path / name)


def test_the_same_report_gives_the_same_page(tmp_path):
    r = a_report()
    assert r.to_html(str(tmp_path / 'r.html')) == tmp_path / 'r.html'
    assert (tmp_path / 'r.html').read_text() == r.to_html()
    assert r.to_json(tmp_path / 'r.json') == tmp_path / 'r.json'
    assert (tmp_path / 'r.json').read_text() == r.to_json()


@pytest.mark.parametrize('make', [a_report, hostile_report], ids=['plain', 'hostile'])
def test_print_shows_a_report_in_a_few_lines(make):
    r = make()
    text = repr(r)
    assert str(r) == text
    assert len(text.splitlines()) == len(r.models) + 3 + len(verdicts(r))
    assert len(text) < 2000
    assert all(c.isprintable() or c == '\n' for c in text)


def test_print_names_each_model_with_its_score_and_the_verdict():
    r = a_report()
    title, *scores, verdict, covered, _ = repr(r).splitlines()
    assert title == 'teacher, alone and distilled: accuracy on 300 samples'
    for line, (n, m) in zip(scores, r.models.items(), strict=True):
        e = m.measures['accuracy']
        assert line.split() == [
            n,
            f'{100 * e.value:.1f}%',
            f'({100 * e.low:.1f}',
            'to',
            f'{100 * e.high:.1f})',
        ]
    assert verdict == verdicts(r)[0][1]
    assert covered == (
        'Intervals and tests account for the choice of these 300 samples, but not for the variation '
        'between training runs with different seeds.'
    )


def test_pictures_show_the_numbers_of_the_report():
    r = a_report(0.001)
    (ax,) = plot_cost(r).axes
    dots = [tuple(c.get_offsets()[0]) for c in ax.collections]
    assert dots == [
        pytest.approx((m.cost.latency[0].p50, 100 * m.measures['accuracy'].value))
        for m in r.models.values()
    ]
    (ax,) = plot_recovered(r).axes
    e = r.comparison('distilled').recovered['accuracy']
    assert ax.collections[-1].get_offsets()[0][0] == pytest.approx(100 * e.value)
    assert list(ax.lines[-1].get_xdata()) == pytest.approx([100 * e.low, 100 * e.high])
    assert [l.get_label() for l in plot_history(r).axes[0].lines] == [
        'train_loss',
        'valid_loss',
        'kd_loss',
    ]
    names = [t.get_text() for t in plot_classes(r).axes[0].get_yticklabels()]
    assert names == [c for c, *_ in sorted(r.class_changes(), key=lambda o: -o[-1])]
    labels = [t.get_text() for t in plot_runs({'one': r, 'two': r}).axes[0].get_yticklabels()]
    assert labels == ['one: alone', 'one: distilled', 'two: alone', 'two: distilled']


@pytest.mark.parametrize(
    'losses, scale',
    [
        ([250.0, 90.0], 'log'),
        ([None, 90.0], 'log'),
        ([4.0, 3.0], 'linear'),
        ([250.0, 0.0], 'linear'),
    ],
)
def test_losses_of_very_different_size_can_be_read(losses, scale):
    r = a_report(0.001)
    r.models['distilled'].history = dict(train_loss=[2.0, 0.5], kd_loss=losses)
    ax = plot_history(r).axes[-1]
    assert ax.get_title('left') == 'distilled' and ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert low <= 0.5 and high >= max(o for o in losses if o)


def test_there_is_no_picture_of_what_was_not_measured():
    y = torch.randn(40)
    r = measured(dict(a=y + torch.randn(40), b=y + torch.randn(40)), y, Task('regression'))
    assert {
        f(r) for f in (plot_cost, plot_recovered, plot_reliability, plot_history, plot_classes)
    } == {None}


def contrast(a, b):
    "Of two colors, as WCAG defines it"

    def light(c):
        c = c * 2 if len(c) == 3 else c
        rgb = [int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    x, y = sorted([light(a), light(b)])
    return (y + 0.05) / (x + 0.05)


def test_texts_have_contrast():
    themes = re.findall(r'\.fd\{(--ink:.*?)(?:\}|color:)', a_report()._repr_html_(), re.S)
    assert len(themes) == 2
    for t in themes:
        c = dict(re.findall(r'--(\w+):#(\w+)', t))
        for ground in ('paper', 'band'):
            assert all(
                contrast(c[k], c[ground]) >= 4.5 for k in ('ink', 'soft', 'good', 'bad', 'even')
            )


# in a real browser

CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
FLAGS = [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--enable-logging=stderr',
    '--virtual-time-budget=2000',
]


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium: apt-get install chromium')
@pytest.mark.parametrize('make', [a_report, hostile_report], ids=['plain', 'hostile'])
def test_chromium_renders_it_without_an_error_or_a_request(make, tmp_path):
    page, log = tmp_path / 'report.html', tmp_path / 'net.json'
    make().to_html(page)

    def run(*args):
        return subprocess.run(
            [CHROMIUM, *FLAGS, f'--user-data-dir={tmp_path}/u', *args, page.as_uri()],
            capture_output=True,
            timeout=120,
        )

    done = run('--dump-dom', f'--log-net-log={log}')
    dom, console = (
        done.stdout.decode(),
        re.findall(r'^.*CONSOLE.*$', done.stderr.decode(errors='replace'), re.M),
    )
    assert done.returncode == 0 and not console
    assert '<main>' in dom and 'Scores</caption>' in dom and '<script' not in dom
    assert not re.findall(r'"url":"(?:http|ws|ftp)[^"]*e\.x[^"]*"', log.read_text())
    assert not re.search(r'http://(?:e\.x|x)\b', log.read_text())
    shot = tmp_path / 'shot.png'
    assert run(f'--screenshot={shot}', '--window-size=500,900').returncode == 0
    from PIL import Image

    colors = Image.open(shot).convert('RGB').getcolors(1 << 20)
    assert len(colors) > 20  # it is no blank page


def of_classes(right, n=100):
    "Logits that are right on so many of n samples, of which 70 have class 0"
    y = (torch.arange(n) >= 70).long()
    wrong = torch.randperm(n, generator=torch.Generator().manual_seed(0))[right:]
    found = y.clone()
    found[wrong] = 1 - found[wrong]
    return 2.0 * F.one_hot(found, 2)


def test_a_report_says_that_a_constant_prediction_is_as_good():
    y = (torch.arange(100) >= 70).long()
    said = lambda r: next(text for _, text in verdicts(r))
    for alone, student, says in (
        (60, 70, "Neither is better than always predicting class 'cat': accuracy 70.0%."),
        (60, 80, "alone is not better than always predicting class 'cat': accuracy 70.0%."),
        (80, 60, "student is not better than always predicting class 'cat': accuracy 70.0%."),
        (80, 71, None),
    ):
        outs = dict(alone=of_classes(alone), student=of_classes(student))
        r = measured(outs, y, Task('softmax'), baseline='alone')
        r.classes = ['cat', 'dog']
        assert says in said(r) if says else 'always predicting' not in said(r)
        assert (says or 'alone') in r.to_markdown().replace('\\', '')
        one = {k: o[:, 1] - o[:, 0] for k, o in outs.items()}
        r = measured(one, y.float(), Task('sigmoid'), baseline='alone')
        assert ('always predicting no: accuracy per label 70.0%' in said(r)) is bool(says)
    y = torch.randn(50)
    outs = dict(alone=y + 2 * torch.randn(50), student=y.mean().expand(50))
    r = measured(outs, y, Task('regression'), baseline='alone')
    assert 'Neither is better than always predicting the mean of the targets: R² 0.0' in said(r)
    outs['student'] = y + 0.1
    r = measured(outs, y, Task('regression'), baseline='alone')
    assert 'alone is not better than always predicting the mean of the targets' in said(r)
