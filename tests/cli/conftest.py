"Fixtures: one runs the command line; with the others, no test waits for a model to be timed a thousand times, for the options of all commands, or for a drawing that it does not look at."

import functools, sys
import pytest, typer
from fastdistill.cli import main

COMMAND_OF = functools.cache(typer.main.get_command)


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
    monkeypatch.setattr('fastdistill.evaluation.cost.MOST_RUNS', 5)


@pytest.fixture(autouse=True)
def command_made_once(monkeypatch):
    "Typer reads the signatures of all commands whenever one is called"
    monkeypatch.setattr('typer.main.get_command', COMMAND_OF)


@pytest.fixture(autouse=True)
def pictures_are_not_written(monkeypatch):
    """A run's report has four pictures: to write them as SVG takes half of the time of a small run. They are still made from
    the numbers of the run. Runs in fixtures and in processes of their own write them, and so do the tests of reports"""
    empty = '<svg xmlns="http://www.w3.org/2000/svg"/>'
    monkeypatch.setattr('fastdistill.evaluation.html_report.svg', lambda fig: empty)
