"The examples: each script runs in its quick form, prints its comparison, and leaves nothing behind."

import os, re, runpy, sys, tempfile
from pathlib import Path
import pytest
import apps  # noqa: F401 (fastai, which leaves files of its own when it is imported)

EXAMPLES = Path(__file__).parents[2] / 'examples'
SCRIPTS = sorted(EXAMPLES.glob('*.py'))
HOMES = [EXAMPLES, Path(os.environ['FASTAI_HOME'])]
every_script = pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.stem)


def files():
    "All but what Python and matplotlib keep for themselves"
    found = {f for home in HOMES for f in home.rglob('*')}
    return {f for f in found if '__pycache__' not in f.parts and not f.name.startswith('fontlist')}


# in its quick form, a teacher has learned for an epoch
@pytest.mark.filterwarnings(
    'ignore:.*The teacher is (no|hardly) better than chance',
    'ignore:The .grad attribute of a Tensor',
)  # the compiler's own
@every_script
def test_an_example_prints_its_comparison_and_leaves_no_file(script, tmp_path, monkeypatch, capsys):
    before = files()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setattr(sys, 'argv', [str(script), '--quick'])
    runpy.run_path(str(script), run_name='__main__')
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r'student alone [\d.]+, student distilled [\d.]+$', last), last
    assert files() == before and not list(tmp_path.iterdir())


@every_script
def test_an_example_is_short_and_says_what_it_shows(script):
    text = script.read_text()
    assert text.startswith('"""') and len(text.splitlines()) <= 95
    assert f'({script.name})' in (EXAMPLES / 'README.md').read_text()
