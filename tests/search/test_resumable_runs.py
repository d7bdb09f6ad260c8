"Runs: each happens once, is kept in a folder and found there again; processes share a folder."

import json
import pytest
from fastdistill.base.errors import DistillError
from fastdistill.search.resumable_runs import Run, Runs


class Trainings:
    "Counts the trainings, whose scores are the rate times the epoch"

    def __init__(self, n_epoch=3):
        self.n_epoch, self.names = n_epoch, []

    def __call__(self, run, after_epoch, late):
        self.names.append(run.name)
        for epoch in range(1, self.n_epoch + 1):
            if late() or after_epoch(run.lr * epoch):
                return None
        return dict(epochs=self.n_epoch)


def test_a_run_happens_once_and_is_found_again(tmp_path):
    first, second = Trainings(), Trainings()
    a = Runs(first, tmp_path).once(Run('a', dict(T=2), 0.5, 1))
    assert (a.scores, a.result, a.stopped) == ([0.5, 1.0, 1.5], dict(epochs=3), False)
    runs = Runs(second, tmp_path)
    assert runs.once(Run('a', dict(T=2), 0.5, 1)) == a
    assert runs.finished() == [a]
    assert second.names == []


def test_options_rate_and_seed_make_a_different_run():
    train = Trainings()
    runs = Runs(train)
    for o in (
        Run('a', dict(T=2), 0.5, 1),
        Run('a', dict(T=3), 0.5, 1),
        Run('a', dict(T=2), 0.4, 1),
        Run('a', dict(T=2), 0.5, 2),
    ):
        runs.once(o)
        runs.once(Run(o.name, o.options, o.lr, o.seed))
    assert len(train.names) == len(runs.finished()) == 4


def test_a_run_that_was_stopped_is_kept_and_one_without_time_is_not(tmp_path):
    train = Trainings()
    runs = Runs(train, tmp_path)
    weak = runs.once(Run('weak', lr=0.1), after_epoch=lambda run: run.score > 0.15)
    assert (weak.scores, weak.stopped, weak.result) == ([0.1, 0.2], True, None)
    late = runs.once(Run('late', lr=0.1), late=lambda: True)
    assert (late.stopped, late.result) == (False, None)
    assert Runs(train, tmp_path).finished() == [weak]


def test_an_error_keeps_nothing_and_the_run_can_be_trained_again(tmp_path):
    def fails(run, after_epoch, late):
        after_epoch(1.0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Runs(fails, tmp_path).once(Run('a', lr=0.1))
    assert not [*tmp_path.iterdir()]
    assert Runs(Trainings(), tmp_path).once(Run('a', lr=0.1)).result == dict(epochs=3)


def test_what_another_one_trains_now_is_left_to_it(tmp_path):
    train, seen = Trainings(), []

    def slow(run, after_epoch, late):
        other = Runs(train, tmp_path)
        seen.append(other.once(Run('a', lr=0.1)))
        seen.append(other.once(Run('b', lr=0.1)).name)
        return dict(slow=True)

    runs = Runs(slow, tmp_path)
    assert runs.once(Run('a', lr=0.1)).result == dict(slow=True)
    assert seen == [None, 'b']
    assert sorted(r.name for r in runs.finished()) == ['a', 'b']


def test_folders_that_are_no_experiments_of_now_are_refused(tmp_path):
    def refused(match, folder):
        with pytest.raises(DistillError, match=match):
            Runs(Trainings(), folder, dict(n_epoch=3))

    old = tmp_path / 'old'
    old.mkdir()
    (old / 'settings.json').write_text(json.dumps(dict(n_epoch=3)))
    (old / 'seed_0.json').write_text('{}')
    refused('old contains an experiment in the format of a different version of fastdistill', old)
    (tmp_path / 'find.log').write_text('a journal of Optuna')
    refused("find.log can't be the folder of an experiment: File exists", tmp_path / 'find.log')
    refused('must be a local or shared folder', 'sqlite:///find.db')
    (old / 'settings.json').write_text('{"n_ep')
    refused('settings.json is damaged', old)
    Runs(Trainings(), tmp_path / 'lost', dict(n_epoch=3)).once(Run('a', lr=0.1))
    (tmp_path / 'lost' / 'settings.json').unlink()
    refused('settings.json is missing', tmp_path / 'lost')
    Runs(Trainings(), tmp_path / 'new', dict(n_epoch=2))
    refused('new contains an experiment with n_epoch=2, but now it is 3', tmp_path / 'new')
