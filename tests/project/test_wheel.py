"The wheel and the source distribution hold what a user needs, and nothing else."

import subprocess, sys, tarfile, zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / 'src' / 'fastdistill'
CODE = '.py', '.pyi', '.typed'


def test_the_wheel_built_from_the_sdist_holds_the_package_and_its_cards(tmp_path):
    build = subprocess.run(
        [sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path, ROOT],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    sdist, wheel = (
        tarfile.open(next(tmp_path.glob('*.tar.gz'))),
        zipfile.ZipFile(next(tmp_path.glob('*.whl'))),
    )
    beside = {n.partition('/')[2] for n in sdist.getnames()}
    beside = {n for n in beside if not n.startswith(('src/', 'docs/methods/'))}
    assert beside - {'.gitignore'} == {
        'CHANGELOG.md',
        'LICENSE',
        'PKG-INFO',
        'README.md',
        'pyproject.toml',
    }
    cards = {p.name: p.read_text() for p in (ROOT / 'docs' / 'methods').glob('*.md')}
    assert cards == {
        n.rpartition('/')[2]: wheel.read(n).decode()
        for n in wheel.namelist()
        if n.startswith('fastdistill/cards/')
    }
    files = {
        f'fastdistill/{f.relative_to(PACKAGE).as_posix()}': f.read_bytes()
        for f in PACKAGE.rglob('*')
        if f.suffix in CODE
    }
    assert 'fastdistill/py.typed' in files
    assert files == {n: wheel.read(n) for n in wheel.namelist() if n.endswith(CODE)}
