"Fixtures: one runs the command line; with the other, no test waits for a model to be timed a thousand times."

import sys
import pytest
from fastdistill.cli import main


@pytest.fixture
def command(monkeypatch, capsys):
    "Run `fastdistill ARGS`: (exit code, what it printed, what it complained of)"

    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', *map(str, args)])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def few_times(monkeypatch):
    "A report measures for half a second, or a thousand runs, for each model and batch size"
    monkeypatch.setattr('fastdistill.evaluation.cost.MOST_RUNS', 20)
