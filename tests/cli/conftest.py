"A fixture that runs the command line."

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
