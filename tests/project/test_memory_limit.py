"The limit of memory that tests/conftest.py sets for each process of the tests."

import os, subprocess, sys
from pathlib import Path

HELPERS = Path(__file__).parents[1] / 'helpers'
TWO_TESTS = 'def test_first(): pass\ndef test_second(): pass\n'


def run(folder, most, *args):
    "Output of a run of two tests whose process may use `most` bytes"
    (folder / 'conftest.py').write_text(
        'from memory_limit import MemoryLimit\n'
        f'def pytest_configure(config): config.pluginmanager.register(MemoryLimit({most}))\n'
    )
    (folder / 'test_two.py').write_text(TWO_TESTS)
    (folder / 'pytest.ini').write_text('[pytest]\n')
    # its own folder for temporary files: in the usual one, it would remove those of earlier runs
    args = *args, '--basetemp', str(folder / 'temporary')
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *args, str(folder)]
    env = {**os.environ, 'PYTHONPATH': str(HELPERS)}
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


def test_the_test_after_which_the_limit_is_exceeded_is_named_and_fails_the_run(tmp_path):
    done = run(tmp_path, 1)
    assert done.returncode == 1
    assert 'After test_two.py::test_first, the peak memory of this process is' in done.stdout
    assert 'After test_two.py::test_second' not in done.stdout
    assert '2 passed, 1 error' in done.stdout


def test_workers_of_xdist_have_the_limit_too(tmp_path):
    done = run(tmp_path, 1, '-n', '1')
    assert done.returncode == 1
    assert 'After test_two.py::test_first, the peak memory of this process is' in done.stdout


def test_below_the_limit_nothing_happens(tmp_path):
    done = run(tmp_path, 64e9)
    assert done.returncode == 0
    assert '2 passed' in done.stdout


def test_the_peak_is_in_bytes():
    "A fresh Python that fills 100 MB; what it inherits of the peak of this process is not below that"
    code = 'import memory_limit as m; b = bytearray(10**8); print(m.peak_memory())'
    env = {**os.environ, 'PYTHONPATH': str(HELPERS)}
    peak = int(subprocess.run([sys.executable, '-c', code], env=env, capture_output=True).stdout)
    assert 10**8 < peak < 10**11


def test_all_tests_have_the_limit(request):
    "This process has the plugin, with 4 GB"
    found = [
        p for p in request.config.pluginmanager.get_plugins() if type(p).__name__ == 'MemoryLimit'
    ]
    assert [p.most for p in found] == [4e9]
