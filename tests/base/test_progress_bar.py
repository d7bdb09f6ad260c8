"Progress: a bar where one can move, notes elsewhere."

from fastdistill.base.progress_bar import progress_bar


def test_a_pipe_gets_only_the_notes(capsys):
    with progress_bar(True, 'of the time') as show:
        show('first', 0.5)
        show('a note', None)
    assert capsys.readouterr().out == 'fastdistill: a note\n'


def test_a_terminal_gets_a_bar_with_the_text(capsys, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('TERM', 'xterm')
    with progress_bar(True, 'of the time') as show:
        show('lr=[1e-3]', 0.5)
        show('a note', None)
    out = capsys.readouterr().out
    assert ' 50% of the time' in out
    assert 'lr=[1e-3]' in out
    assert 'fastdistill: a note' in out


def test_without_progress_nothing_is_printed(capsys, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')
    with progress_bar(False) as show:
        show('first', 0.5)
        show('a note', None)
    assert capsys.readouterr().out == ''
