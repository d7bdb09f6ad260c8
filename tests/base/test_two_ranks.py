"Two processes that train together end where one process ends with batches twice as large."

import pytest, torch
import processes, two_ranks
from fastai.basics import set_seed
from fastdistill import auto
from fastdistill.base.distributed import gather_rows

pytestmark = pytest.mark.filterwarnings('ignore::fastdistill.DistillWarning')
NAMES = [*two_ranks.cases(), *(f'{n} in a loop' for n in (*two_ranks.IN_A_LOOP, 'sharded teacher'))]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "What both processes of the two, and the single one, ended with"
    pytest.importorskip('accelerate')
    folder = tmp_path_factory.mktemp('ranks')
    both, one = (
        processes.start_two(
            folder / 'two', two_ranks.one_of_two, folder, ACCELERATE_USE_CPU='true'
        ),
        two_ranks.run(folder),
    )
    assert processes.ended(*both) == [0, 0], processes.said(folder / 'two.0') + processes.said(
        folder / 'two.1'
    )
    return [torch.load(folder / f'{i}.pt', weights_only=True) for i in (0, 1)], one


@pytest.mark.parametrize('name', NAMES)
def test_two_processes_are_one_with_the_doubled_batch(runs, name):
    "Weights of student and projectors, and the columns of the table"
    ((a, logged_a), (b, logged_b)), (one, logged) = [r[name] for r in runs[0]], runs[1][name]
    assert all(map(torch.equal, a, b)) and logged_a == logged_b and len(a) == len(one)
    for p, q in zip(a, one):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7 if 'loop' in name else 1e-5)
    # in validation, relations are those of each process's own samples
    if not ('relations' in name or name in ('shares', 'one_silent')):
        assert logged_a[1:] == pytest.approx(logged[1:], abs=1e-4)
    start = [p.detach() for p in two_ranks.models()[0].parameters()]
    assert max((p - q).abs().max() for p, q in zip(start, one)) > 0.01  # it has learned


@pytest.mark.parametrize('kind', two_ranks.IN_THE_TRAINER)
def test_two_processes_of_hugging_faces_trainer_are_one_with_the_doubled_batch(runs, kind):
    "Weights of student and projectors, and the whole loss and its parts in each step"
    ((a, logged_a), (b, logged_b)), (one, logged) = [r[kind] for r in runs[0]], runs[1][kind]
    assert all(map(torch.equal, a, b)) and logged_a == logged_b and len(logged) == 8
    for p, q in zip(a, one, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    columns = slice(0, 1 if kind == 'gpt2' else 4)  # the parts are means of the processes' means
    for step, other in zip(logged_a, logged, strict=True):
        assert step[columns] == pytest.approx(other[columns], abs=2e-4)
    set_seed(0)
    start = two_ranks.transformer(kind, 8)
    assert (
        max((p - q).abs().max() for p, q in zip(start.parameters(), one)) > 0.001
    )  # it has learned


def test_the_first_process_chooses_the_default_recipe_for_both(runs):
    "Each has a batch of its own, which alone would give another temperature"
    (a, b), alone = [r['chosen'] for r in runs[0]], runs[1]['chosen']
    assert a == b and a[0] == alone[0]  # the batch of the single process is the first one's
    teacher, train = two_ranks.models()[1], two_ranks.items()[0]
    first, second = (
        torch.stack([x for x, _ in train[i : i + two_ranks.BS]]) for i in (0, two_ranks.BS)
    )
    own = [auto(classes=4, teacher=teacher(x)).terms[0].options['T'] for x in (first, second)]
    assert own[0] != own[1]


def test_one_process_gathers_nothing():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(x) is x
