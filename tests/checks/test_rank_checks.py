"What two processes find before training, each with its own part of the data, and what they do about it."

import pytest
import torch

import processes
import rank_checks


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "What both processes ended with, and what they said"
    pytest.importorskip('accelerate')
    folder = tmp_path_factory.mktemp('ranks')
    log = folder / 'log'
    both = processes.start_two(log, rank_checks.one_of_two, folder, ACCELERATE_USE_CPU='true')
    said = lambda: [processes.said(f'{log}.{i}') for i in (0, 1)]
    assert processes.ended(*both) == [0, 0], said()
    return [torch.load(folder / f'{i}.pt', weights_only=True) for i in (0, 1)], said()


@pytest.mark.parametrize('good', [True, False])
@pytest.mark.parametrize('trainer', ['loop', 'fastai'])
def test_both_processes_train_the_same_student_by_the_same_recipe(runs, trainer, good):
    (*found, weights), (*also, others) = [r[trainer][good] for r in runs[0]]
    assert found == also
    assert weights.equal(others)


def test_a_checked_teacher_is_in_doubt_for_both_or_for_none(runs):
    for r in runs[0]:
        assert not r['loop'][True][0]
        assert r['loop'][False][0]


def test_an_untrained_teacher_loses_its_gradient_ratio_in_both(runs):
    for r in runs[0]:
        known = r['loop'][True][2]['dist']
        assert known == pytest.approx(r['fastai'][True][1]['dist'], rel=1e-5) and known > 0.4
        assert r['loop'][False][2]['dist'] < 0.3
        assert r['fastai'][False][1]['dist'] < 0.3


def test_the_first_process_may_check_alone(runs):
    assert [r['first'] for r in runs[0]] == [rank_checks.N, None]


@pytest.mark.parametrize('recipe', ['default', 'layers'])
def test_a_sharded_student_is_trained_alike(runs, recipe):
    a, b = [r['sharded'][recipe] for r in runs[0]]
    assert a.equal(b)
    assert a.isfinite().all()


def test_a_student_in_shards_ends_as_in_distributed_data_parallel(runs):
    torch.testing.assert_close(runs[0][0]['sharded']['default'], runs[0][0]['loop'][True][-1])


def test_only_the_first_process_speaks(runs):
    first, second = runs[1]
    assert 'recipe labels + dist(' in first
    assert 'The teacher is no better than chance' in first
    assert second == ''
