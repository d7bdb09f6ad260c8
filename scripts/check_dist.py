"""Build the wheel and the source distribution, check them, and try the wheel as a new user would.

    python scripts/check_dist.py              # everything; the new environment takes some minutes and several GB
    python scripts/check_dist.py --no-try     # build and check only

The files stay in dist/. Nothing is uploaded.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / 'dist'
# Names at the top of the sdist, and of the wheel beside the package.
SDIST = {
    'src',
    'docs',
    'README.md',
    'LICENSE',
    'CHANGELOG.md',
    'pyproject.toml',
    'PKG-INFO',
    '.gitignore',
}


def run(*command, **options):
    """Run a command, show it, and stop if it fails."""
    print('$', ' '.join(map(str, command)), flush=True)
    subprocess.run([str(o) for o in command], check=True, **options)


def build():
    """Build both files into an empty dist/ and return (sdist, wheel)."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', DIST, ROOT)
    return next(DIST.glob('*.tar.gz')), next(DIST.glob('*.whl'))


def check_contents(sdist, wheel):
    """Stop if a file is missing, or if tests, results or caches would be shipped."""
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        metadata = z.read(next(n for n in names if n.endswith('.dist-info/METADATA'))).decode()
    with tarfile.open(sdist) as t:
        inside = [n.partition('/')[2] for n in t.getnames()]
    package = {p.relative_to(ROOT / 'src').as_posix() for p in (ROOT / 'src').rglob('*.py')}
    problems = [f'the wheel lacks {n}' for n in sorted(package - set(names))]
    problems += [f'the sdist has {n}' for n in inside if n and n.split('/')[0] not in SDIST]
    unwanted = re.compile(r'(^|/)(tests?|results|benchmarks|__pycache__)/|\.(pyc|pkl|pth)$')
    problems += [f'{n} should not be shipped' for n in [*names, *inside] if unwanted.search(n)]
    if not any(n.endswith('licenses/LICENSE') for n in names):
        problems.append('the wheel has no license file')
    if 'License-Expression: Apache-2.0' not in metadata:
        problems.append('the metadata does not name the license')
    if problems:
        sys.exit('\n'.join(problems))
    print(f'{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.2f} MB')
    print(f'{sdist.name}: {sum(map(bool, inside))} files, {sdist.stat().st_size / 1e6:.2f} MB')


def first_block():
    """Return the first Python block of the README."""
    return re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)[1]


def try_wheel(wheel, version):
    """Install the wheel without extras in a new environment, and use it away from the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / 'env', with_pip=True)
        python, command = place / 'env' / 'bin' / 'python', place / 'env' / 'bin' / 'fastdistill'
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        here = dict(cwd=folder, env=env)
        run(python, '-m', 'pip', 'install', '-q', wheel, **here)
        run(
            python,
            '-c',
            f'import fastdistill; assert fastdistill.__version__ == {version!r}',
            **here,
        )
        (place / 'first.py').write_text(first_block())
        run(python, 'first.py', **here)
        run(command, '--version', **here)
        run(command, '--help', **here)
        run(command, 'methods', 'dkd', **here)
        run(command, 'demo', '--quick', **here)


def main():
    """Build, check, and try."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--no-try', action='store_true', help='build and check only')
    options = parser.parse_args()
    sdist, wheel = build()
    run(sys.executable, '-m', 'twine', 'check', '--strict', sdist, wheel)
    check_contents(sdist, wheel)
    if not options.no_try:
        try_wheel(wheel, wheel.name.split('-')[1])
    print('ready: ' + ', '.join(p.name for p in (sdist, wheel)))


if __name__ == '__main__':
    main()
