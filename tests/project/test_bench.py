"The benchmark of steps: ways that take turns, and their numbers."

import json, sys
from pathlib import Path
import pytest
from rich.console import Console
from fastdistill import DistillError

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
from step_cost.measure import WAYS, StepClock, numbers, run_bench  # noqa: E402


def test_the_numbers_of_a_pair_are_printed_drawn_and_saved(tmp_path, capsys):
    ways = [
        'no teacher',
        'fastdistill',
        'fastdistill, the default recipe',
        'fastdistill, cached',
        'careful plain loop',
        "the forum's callback",
        "the teacher's forward pass",
    ]
    found = run_bench(
        ['table'], ways, rounds=1, batches=2, memory=False, out=tmp_path, console=Console(width=130)
    )
    mine = found['pairs']['table']['ways']
    assert (
        set(mine) == set(ways)
        and mine['no teacher']['ratio'] == mine['no teacher']['cpu_ratio'] == 1
    )
    assert all(
        v['ms'] > 0 and v['cpu_ms'] > 0 and v['peak'] is None and v['first_epoch'] > 0
        for v in mine.values()
    )
    assert (
        json.loads((tmp_path / 'bench.json').read_text()) == found
        and (tmp_path / 'bench.png').stat().st_size > 1000
    )
    assert found['machine']['torch'] and 'over no teacher' in capsys.readouterr().out


def test_a_pair_or_way_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DistillError, match="no pair 'vgg': must be one of resnet, unet"):
        run_bench(['vgg'], out=tmp_path)
    with pytest.raises(
        DistillError, match="no way 'magic': must be one of no teacher, fastdistill"
    ):
        run_bench(['table'], ['magic'], out=tmp_path)


def test_rounds_have_medians_and_a_clock_counts_steps():
    assert numbers(
        [[0.001, 0.01], [0.003, 0.03], [0.002, 0.02], [0.002, 0.02], [0.002, 0.02], [0.004, 0.04]],
        3,
    ) == {'wall': [2.0, 2.0], 'cpu': [20.0, 20.0]}
    clock = StepClock()
    clock.start()
    clock.mark()
    assert len(clock.steps) == 1 and all(s >= 0 for s in clock.steps[0]) and len(WAYS) == 17


RESULTS = Path(__file__).resolve().parents[2] / 'benchmarks' / 'results' / 'first_minutes'


@pytest.mark.parametrize(
    'name, page',
    [
        ('photos', 'start.md'),
        ('scenes', 'start.md'),
        ('texts', 'guides/text.md'),
        ('texts_words', 'guides/text.md'),
    ],
)
def test_pages_say_what_their_first_commands_reached(name, page):
    facts = json.loads((RESULTS / f'{name}.json').read_text())
    each, d = facts['seeds']['values'], facts['seeds']['difference']
    spread = lambda o: f'{100 * min(o):.1f} to {100 * max(o):.1f}%'
    says = (
        f'{100 * facts["teacher"]["value"]:.1f}%',
        spread(each['distilled']),
        f'{100 * d["value"]:+.1f} points (',
        f'{100 * d["low"]:+.1f} to {100 * d["high"]:+.1f})',
    )
    lines = (RESULTS.parents[2] / 'docs' / page).read_text().splitlines()
    assert any(all(o in line for o in says) for line in lines), says
    if name != 'texts_words':  # its students alone are those of the other pipeline
        assert any(spread(each['alone']) in line and says[1] in line for line in lines)


def test_the_page_of_detectors_has_the_tables_of_the_runs():
    pytest.importorskip('torchvision')
    import detection

    page = (RESULTS.parents[2] / 'docs' / 'detectors.md').read_text()
    for table in detection.tables().split('\n\n'):
        assert table in page


def test_the_page_of_detectors_says_how_well_the_student_imitates():
    pytest.importorskip('torchvision')
    import detection

    page = (RESULTS.parents[2] / 'docs' / 'detectors.md').read_text()
    own, _ = detection.at_the_rate_of_labels(*detection.SHORT[0])
    found = detection.gains(own, dict(way='default'), dict(way='labels'), 'as_teacher')
    default, alone = [sum(o) / len(o) for o in found[:2]]
    assert f'{default:.1f} with the default and {alone:.1f} on labels alone' in page
    runs = json.loads((RESULTS.parent / 'detection' / 'inside.json').read_text())['runs']
    last = {
        ratio: [1 - r[f'level {i}'][-1] for r in runs if r['grad_ratio'] == ratio for i in range(3)]
        for ratio in (0.3, 0.001)
    }
    assert {round(o, 1) for o in last[0.3]} == {0.7}
    assert (round(min(last[0.001]), 1), round(max(last[0.001]), 1)) == (0.2, 0.6)
    cosines = [o for r in runs if r['grad_ratio'] == 0.3 for o in r['cosine']]
    assert f'mean cosine {sum(cosines) / len(cosines):.2f}' in page
