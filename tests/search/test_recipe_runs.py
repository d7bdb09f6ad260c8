"Recipes side by side over several seeds: numbers, their test, and a folder from which an interrupted experiment continues."

import functools, json, os, random, signal
import numpy as np
import pytest, torch
from scipy import stats
import apps, processes
from apps import CallsInside, Rows, toy
from torch import nn
from fastai.basics import (
    SGD,
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    Datasets,
    LabelSmoothingCrossEntropyFlat,
    Learner,
    accuracy,
)
from fastai.vision.augment import Brightness, Flip
from fastdistill.fastai import (
    DistillError,
    RecipeReport,
    Term,
    compare_recipes,
    cache_teacher,
    dkd,
    kd,
    losses,
)
from fastdistill.search.significance import adjusted, difference_by_seed
from fastdistill.evaluation.report_data import Difference
from fastdistill.search.recipe_report import RecipeRun
from fastdistill.base.random_state import seeded

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)


def features(teacher_layer):
    hint = Term(losses.hint, layers={'2': teacher_layer}, projector='linear', weight=0.1)
    return kd(T=2.0) + hint


RECIPES = dict(
    alone=None,
    default='auto',
    features=features('2'),
)
DLS, TEACHER = toy()[0].dls, toy()[1]


def make_student(cbs=None):
    (learn,) = apps.quiet(
        Learner(DLS, apps.mlp(6), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)
    )
    return learn


def run(recipes=None, n_epoch=2, lr=0.1, make=make_student, teacher=TEACHER, **kwargs):
    return compare_recipes(
        make, teacher, recipes or RECIPES, n_epoch, lr, progress=False, check=False, **kwargs
    )


@functools.cache
def whole():
    return run(seeds=3)


def by_hand(learn, recipe, seed, teacher, n_epoch=2, lr=0.1):
    "A training with `seed`, in plain lines"
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for dl in learn.dls.loaders:
        dl.rng = random.Random(seed)
    if recipe is None:
        learn.fit_one_cycle(n_epoch, lr)
    else:
        learn.distill(teacher, n_epoch, lr, recipe, check=False)
    return learn


def weights(learn):
    return [v.clone() for v in learn.model.state_dict().values()]


def test_each_number_is_that_of_its_own_training():
    "The same start and batches for each recipe, different ones with a different seed"
    made = []

    def make():
        made.append(make_student())
        return made[-1]

    report = run(seeds=[4, 9], make=make)
    assert report.seeds == [4, 9]
    assert (report.metric, report.higher, report.baseline) == ('accuracy', True, 'alone')
    for seed in (4, 9):
        for name, recipe in RECIPES.items():
            with seeded(seed):
                student = make_student()
            by_hand(student, recipe, seed, TEACHER)
            got = next(r for r in report.runs if (r.recipe, r.seed) == (name, seed)).history
            names = [n for n in student.recorder.metric_names[1:] if n != 'time']
            assert [[got[n][e] for n in names] for e in range(2)] == [
                [None if v is None else float(v) for v in row] for row in student.recorder.values
            ]
            assert all(map(torch.equal, weights(student), weights(made.pop(0))))
    assert not made
    assert len({tuple(r.history['valid_loss']) for r in report.runs}) == 6
    by_loss = run(seeds=[4], metric='valid_loss')
    assert not by_loss.higher and by_loss.values('default') == [
        report.values('default', 'valid_loss')[0]
    ]
    assert by_loss.verdict('default') == 'one seed: no test' and by_loss.verdict('alone') == ''


AUGMENTED = dict(
    alone=None,
    kd=kd(),
    layers=kd() + Term(losses.hint, layers={'0.0': '0.0'}, projector='conv', weight=0.1),
)


@pytest.fixture(scope='module')
def images():
    "A Learner of augmented pictures in a new order each epoch, and a teacher"
    learn, teacher = apps.quiet(*apps.image(batch_tfms=[Flip(), Brightness()]))
    return learn, teacher.model.eval()


class KeepBatches(Callback):
    def before_fit(self):
        self.kept = []

    def before_batch(self):
        self.kept.append(self.x.clone())


def compared_images(images, teacher, recipes):
    "The students that compare_recipes trained with seed 3, in the order of the recipes"
    made = []

    def make():
        made.append(image_student(images))
        return made[-1]

    run(recipes, make=make, teacher=teacher, seeds=[3], lr=0.01)
    return made


def image_student(images):
    (learn,) = apps.quiet(
        Learner(
            images[0].dls,
            nn.Sequential(
                apps.small(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Dropout(0.2),
                nn.LazyLinear(3),
            ),
            loss_func=CrossEntropyLossFlat(),
            metrics=accuracy,
            cbs=KeepBatches(),
        )
    )
    learn.model(torch.zeros(1, 3, 16, 16))
    return learn


@pytest.mark.parametrize('stored', [False, True], ids=['live', 'cache'])
def test_a_student_on_augmented_batches_ends_as_by_hand(images, stored, tmp_path):
    teacher = (
        cache_teacher(images[1], images[0].dls, tmp_path, 2, progress=False, check=False)
        if stored
        else images[1]
    )
    recipes = dict(alone=kd(alpha=0.0) if stored else None, kd=kd(), dkd=dkd())
    for learn, recipe in zip(compared_images(images, teacher, recipes), recipes.values()):
        with seeded(3):
            hand = image_student(images)
        by_hand(hand, recipe, 3, teacher, lr=0.01)
        assert all(map(torch.equal, weights(hand), weights(learn)))


def test_all_recipes_get_the_same_batches(images, tmp_path):
    "Also where one of them draws the weights of a projector; and labels alone get the stored views"
    for teacher in (
        images[1],
        cache_teacher(images[1], images[0].dls, tmp_path, 2, progress=False, check=False),
    ):
        recipes = AUGMENTED if teacher is images[1] else dict(alone=None, kd=kd())
        first, *others = [o.keep_batches.kept for o in compared_images(images, teacher, recipes)]
        assert len(first) > 8
        for other in others:
            assert all(map(torch.equal, first, other))
        assert not all(map(torch.equal, first[: len(first) // 2], first[len(first) // 2 :]))


@pytest.mark.filterwarnings('ignore::fastdistill.DistillWarning')
def test_looking_for_mistakes_does_not_move_the_batches(images):
    "Labels alone are not checked, the others are"
    made = []

    def make():
        made.append(image_student(images))
        return made[-1]

    compare_recipes(make, images[1], n_epoch=1, lr_max=0.01, seeds=1, progress=False)
    alone, default = (o.keep_batches.kept[-6:] for o in made)
    assert len(alone) == 6
    assert all(map(torch.equal, alone, default))


def test_students_of_a_language_model_get_their_texts_in_the_same_order():
    "fastai shuffles the texts of a language model in place"
    (learn, teacher) = apps.quiet(*apps.language_model())
    made = []

    def make():
        l = apps.quiet(*apps.language_model())[0]
        l.dls = learn.dls
        l.add_cb(KeepBatches())
        made.append(l)
        return l

    order = list(learn.dls.train.items.idxs)
    run(
        dict(alone=None, kd=kd()),
        make=make,
        teacher=teacher,
        seeds=[3],
        metric='valid_loss',
        lr=0.01,
    )
    a, b = (o.keep_batches.kept for o in made)
    assert all(map(torch.equal, a, b))
    assert list(learn.dls.train.items.idxs) == order


def test_a_bar_shows_the_training_and_its_score(capsys, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('TERM', 'xterm')
    report = compare_recipes(
        make_student, TEACHER, dict(alone=None, kd=kd()), 2, 0.1, seeds=[7], check=False
    )
    out = capsys.readouterr().out
    assert f'kd, seed 7: {report.values("kd")[0]:.4g} after epoch 2' in out
    assert '100%' in out


def test_a_rate_for_each_recipe():
    same = run(dict(a=kd(), b=kd()), seeds=1, lr=[0.1, 0.2])
    alone = run(dict(a=kd(), b=kd()), seeds=1, lr=0.2)
    assert same.runs[1] == alone.runs[1]
    assert same.values('a', 'valid_loss') != same.values('b', 'valid_loss')
    with pytest.raises(
        DistillError, match='lr_max has 3 values for 2 recipes: pass one value, or one'
    ):
        run(dict(a=kd(), b=kd()), lr=[0.1, 0.2, 0.3])
    with pytest.raises(DistillError, match='cbs=: a callback belongs to one Learner'):
        run(cbs=Callback())
    with pytest.raises(DistillError, match='lr=0.1: the learning rate is lr_max=0.1'):
        compare_recipes(make_student, apps.mlp(16), n_epoch=1, lr=0.1, seeds=1, progress=False)
    with pytest.raises(DistillError, match='Did you mean n_epoch=2, lr_max=0.1'):
        compare_recipes(make_student, apps.mlp(16), n_epoch=0.1, lr_max=2)


def test_the_paired_test_is_scipys():
    g = np.random.default_rng(0)
    for n in (2, 3, 10):
        a, b = g.normal(size=(2, n)) + [[0.5], [0]]
        d, t = difference_by_seed(a, b), stats.ttest_rel(a, b)
        low, high = t.confidence_interval(0.95)
        np.testing.assert_allclose(
            [d.value, d.low, d.high, d.p], [np.mean(a - b), low, high, t.pvalue]
        )
    assert difference_by_seed([1.0, 2.0], [1.0, 2.0]).p == 1
    same = difference_by_seed([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])
    assert same.p is None and same.value == pytest.approx(0.1)


def test_several_recipes_are_adjusted_together():
    "Holm's numbers, by hand; and chance alone is called significant in at most 5% of experiments, however many recipes there are"
    got = adjusted(
        {k: Difference(0.0, p=p) for k, p in dict(a=0.01, b=0.04, c=0.03, d=0.5, e=None).items()}
    )
    assert {k: d.p for k, d in got.items()} == dict(
        a=pytest.approx(0.04), b=pytest.approx(0.09), c=pytest.approx(0.09), d=0.5, e=None
    )
    g, wrong = np.random.default_rng(1), 0
    for _ in range(400):
        base, *others = g.normal(size=(5, 5))
        wrong += any(
            d.significant
            for d in adjusted(
                {str(i): difference_by_seed(o, base) for i, o in enumerate(others)}
            ).values()
        )
    assert wrong / 400 < 0.08


def test_two_students_of_one_recipe_do_not_differ_significantly():
    "Twenty pairs that differ by the luck of their seeds alone: at most two are called significant"
    values = np.array(
        run(dict(a=kd(), b=None), n_epoch=1, seeds=30, metric='valid_loss').values('a')
    )
    g = np.random.default_rng(0)
    pairs = [values[g.permutation(30)[:6]].reshape(2, 3) for _ in range(20)]
    assert sum(difference_by_seed(*p).significant for p in pairs) <= 2


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('names', [('wild', 'kd', 'alone'), ('alone', 'wild', 'kd')])
def test_a_recipe_that_diverges_is_last_and_does_not_change_the_tests_of_the_others(names, value):
    def wild(s, t):
        return s.sum() * value

    recipes = dict(alone=None, wild=Term(wild, weight=1.0), kd=kd(alpha=0.5))
    options = dict(metric='valid_loss', seeds=3)
    report = run({k: recipes[k] for k in names}, **options)
    others = run({k: recipes[k] for k in names if k != 'wild'}, **options)
    assert not np.isfinite(report.values('wild')).any()
    assert report.verdict('wild') == 'a training diverged: no test'
    assert report.differences['kd'] == others.differences['kd']
    assert report.best == others.best
    assert 'a training diverged' in str(report)


def report_of(values, **kwargs):
    runs = [
        RecipeRun(k, s, dict(accuracy=[0.0, v]))
        for k, vs in values.items()
        for s, v in enumerate(vs)
    ]
    r = RecipeReport('accuracy', True, [*values][0], 2, {k: k for k in values}, runs, **kwargs)
    r.differences = {
        k: difference_by_seed(v, values[r.baseline]) for k, v in values.items() if k != r.baseline
    }
    return r


def test_the_table_says_what_is_chance(capsys, tmp_path):
    r = report_of(
        dict(
            alone=[0.50, 0.52, 0.49, 0.51],
            kd=[0.60, 0.63, 0.58, 0.62],
            noise=[0.52, 0.50, 0.50, 0.50],
            worse=[0.40, 0.43, 0.40, 0.40],
        )
    )
    assert [r.verdict(k) for k in r.recipes] == [
        '',
        'better',
        'not significant',
        'worse',
    ] and r.best == 'kd'
    text = str(r)
    assert (
        'accuracy after 2 epochs, higher is better; 4 seed(s)' in text and 'paired t test' in text
    )
    row = next(l for l in text.splitlines() if l.startswith('noise'))
    assert (
        '0.5050' in row
        and '0.0100' in row
        and 'not significant' in row
        and '0.5200 0.5000 0.5000 0.5000' in row
    )
    r.show()
    shown = capsys.readouterr().out
    assert 'verdict' in shown and 'recipe' in shown
    r.to_json(tmp_path / 'r.json')
    assert RecipeReport.from_json(tmp_path / 'r.json') == r == RecipeReport.from_json(r.to_json())
    less = report_of(dict(alone=[1.0, 1.1], kd=[0.5, 0.63]))
    less.higher = False
    assert less.best == 'kd'
    for bad in ('{}', '{"format": 9}', '{', '{"format": 1, "runs": 3}'):
        with pytest.raises(DistillError, match='a report of recipes'):
            RecipeReport.from_json(bad)


class Stops(Callback):
    order = 300

    def __init__(self, at):
        self.at = at

    def after_epoch(self):
        if STOP == self.at:
            raise KeyboardInterrupt


STOP = None


def test_an_interrupted_experiment_continues(tmp_path, capsys):
    "What is finished is not trained again, and the report is the same as without the interrupt"
    global STOP
    made = []

    def make():
        made.append(1)
        return make_student(cbs=Stops(len(made)))

    STOP = 5  # the second recipe of the second seed
    with pytest.raises(KeyboardInterrupt):
        run(seeds=3, folder=tmp_path, make=make)
    STOP = None
    assert (
        'fastdistill: 4 of 9 training runs are finished. To continue from'
        in capsys.readouterr().out
    )
    assert [p.name[:4] for p in sorted(tmp_path.iterdir())] == ['run_'] * 4 + ['sett']
    made.clear()
    again = run(seeds=3, folder=tmp_path, make=make)
    assert again == whole() and len(made) == 1 + 5
    made.clear()
    assert (
        run(seeds=5, folder=tmp_path, make=make).seeds == [0, 1, 2, 3, 4] and len(made) == 1 + 2 * 3
    )


def killed(folder):
    "An experiment that ends with its fifth student"
    made = []

    def make():
        made.append(1)
        if len(made) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return make_student()

    run(seeds=3, folder=folder, make=make)


def test_a_killed_experiment_continues(tmp_path):
    folder = tmp_path / 'runs'
    assert processes.ended(processes.start(tmp_path / 'log', killed, folder)) == [
        -signal.SIGKILL
    ], processes.said(tmp_path / 'log')
    assert run(seeds=3, folder=folder) == whole()


def experiment(folder, report):
    "Leaves the report, and how many students were made"
    made = []

    def make():
        made.append(1)
        return make_student()

    got = compare_recipes(
        make, TEACHER, RECIPES, 2, 0.1, seeds=3, folder=folder, progress=False, check=False
    )
    report.write_text(json.dumps([len(made), str(got)]))


def test_two_processes_share_an_experiment(tmp_path):
    reports = [tmp_path / 'a', tmp_path / 'b']
    both = [processes.start(tmp_path / 'log', experiment, tmp_path / 'runs', o) for o in reports]
    assert processes.ended(*both) == [0, 0], processes.said(tmp_path / 'log')
    (made_a, a), (made_b, b) = (json.loads(o.read_text()) for o in reports)
    assert a == b == str(whole())
    # each may make one more to compare the start of its students with what is in the folder
    assert 9 <= made_a + made_b <= 11
    assert run(seeds=3, folder=tmp_path / 'runs') == whole()


def test_a_folder_of_another_experiment_is_refused(tmp_path):
    run(seeds=1, folder=tmp_path)

    def refused(match, **kwargs):
        with pytest.raises(DistillError, match=match):
            run(seeds=1, folder=tmp_path, **kwargs)

    refused('experiment with n_epoch=2, but now it is 3', n_epoch=3)
    refused(
        "experiment with recipes.default='auto', but now it is .*Recipe",
        recipes={**RECIPES, 'default': kd()},
    )
    refused(
        r'experiment with recipes.features.terms.1.layers.2=.2., but now it is .0.',
        recipes={**RECIPES, 'features': features('0')},
    )
    refused(
        'experiment with recipes.features=.*Recipe, but now it is nothing',
        recipes={k: RECIPES[k] for k in ('alone', 'default')},
    )
    refused('experiment with lr_max=', lr=0.2)
    refused('experiment with teacher=', teacher=apps.mlp(16))

    def larger():
        learn = make_student()
        learn.model[0].weight.data.add_(1.0)
        return learn

    refused(
        'a different student: make_student.. now returns different initial weights for seed 0',
        make=larger,
    )

    def fewer():
        learn = make_student()
        learn.dls = DataLoaders(learn.dls.train, learn.dls.valid.new(learn.dls.valid.dataset[:-1]))
        return learn

    refused(
        r'different samples: (\d+) training samples .(\w+). and \d+ validation samples .\w+. there, '
        r'\1 training samples .\2. and \d+ validation samples .\w+. now',
        make=fewer,
    )
    next(tmp_path.glob('run_*.json')).write_text('{"runs')
    refused(r'run_\w+.json is damaged .* Delete it to train its run again')


def test_a_different_batch_size_optimizer_or_task_loss_is_refused(tmp_path):
    changed = {}

    def make():
        learn = make_student()
        if 'bs' in changed:
            learn.dls = DataLoaders(*(dl.new(bs=changed['bs']) for dl in learn.dls.loaders))
        for k in changed.keys() - {'bs'}:
            setattr(learn, k, changed[k])
        return learn

    def refused(match, **kwargs):
        changed.clear()
        changed.update(kwargs)
        with pytest.raises(DistillError, match=match):
            run(recipes, 1, seeds=1, folder=tmp_path, make=make)

    recipes = dict(alone=None, kd=kd())
    run(recipes, 1, seeds=1, folder=tmp_path, make=make)
    refused('different batch sizes: 16 and 16 there, 8 and 8 now', bs=8)
    refused('different optimizer.opt_func: .*Adam there, .*SGD', opt_func=SGD)
    refused('different optimizer.wd: None there, 0.5 now', wd=0.5)
    loss = LabelSmoothingCrossEntropyFlat()
    refused('different task loss: .*CrossEntropy.* there, .*LabelSmoothing.* now', loss_func=loss)
    weighted = CrossEntropyLossFlat(weight=torch.tensor([1.0, 2, 3, 4]))
    refused(
        r'different task loss.func.weight: None there, .*\[1.0, 2.0, 3.0, 4.0\] now',
        loss_func=weighted,
    )


WEIGHTS = torch.ones(4)


def weighted(p, y):
    return torch.nn.functional.cross_entropy(p, y, weight=WEIGHTS)


class Weighted:
    def __init__(self, *weights):
        self.loss = CrossEntropyLossFlat(weight=torch.tensor(weights))

    def __call__(self, p, y):
        return self.loss(p, y)


def of_closure(*weights):
    w = torch.tensor(weights)
    return lambda p, y: torch.nn.functional.cross_entropy(p, y, weight=w)


# task losses that differ only in their content: (first, the same again, different, what differs)
EQUAL = {
    'class weights': (
        lambda: CrossEntropyLossFlat(weight=torch.tensor([1.0, 1, 1, 2])),
        lambda: CrossEntropyLossFlat(weight=torch.tensor([1.0, 1, 1, 3])),
        r'task loss.func.weight: .*\[1.0, 1.0, 1.0, 2.0\] there, .*\[1.0, 1.0, 1.0, 3.0\] now',
    ),
    'an option': (
        CrossEntropyLossFlat,
        lambda: CrossEntropyLossFlat(ignore_index=0),
        'task loss.func.ignore_index: -100.0 there, 0.0 now',
    ),
    'a lambda': (
        lambda: lambda p, y: torch.nn.functional.cross_entropy(p, y),
        lambda: lambda p, y: torch.nn.functional.cross_entropy(p, y) / 2,
        'task loss: .*<lambda> .code .* there, .*<lambda> .code .* now',
    ),
    'a closure': (
        lambda: of_closure(1.0, 1, 1, 2),
        lambda: of_closure(1.0, 1, 1, 3),
        r'task loss.w: .*2.0\] there, .*3.0\] now',
    ),
    'a partial': (
        lambda: functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.1),
        lambda: functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.2),
        'task loss.label_smoothing: 0.1 there, 0.2 now',
    ),
    'a class': (
        lambda: type('Mine', (Weighted,), dict(factor=1))(1.0, 1, 1, 1),
        lambda: type('Mine', (Weighted,), dict(factor=2))(1.0, 1, 1, 1),
        'task loss: .*Mine .code .* there, .*Mine .code .* now',
    ),
    'an object': (
        lambda: Weighted(1.0, 1, 1, 2),
        lambda: Weighted(1.0, 1, 1, 3),
        r'task loss.loss.func.weight: .*2.0\] there, .*3.0\] now',
    ),
}


@pytest.mark.parametrize('first, different, match', EQUAL.values(), ids=EQUAL)
def test_a_task_loss_with_different_content_is_refused(tmp_path, first, different, match):
    def again(loss):
        def make():
            learn = make_student()
            learn.loss_func = loss()
            return learn

        recipes = dict(alone=None, kd=kd())
        return run(recipes, 1, seeds=1, folder=tmp_path, make=make, kind='softmax')

    report = again(first)
    assert again(first) == report
    with pytest.raises(DistillError, match=match):
        again(different)


def test_a_global_that_the_task_loss_reads_counts_with_its_values(tmp_path, monkeypatch):
    def make():
        learn = make_student()
        learn.loss_func = weighted
        return learn

    again = lambda: run(
        dict(alone=None, kd=kd()), 1, seeds=1, folder=tmp_path, make=make, kind='softmax'
    )
    report = again()
    monkeypatch.setitem(globals(), 'WEIGHTS', WEIGHTS.clone())
    assert again() == report
    monkeypatch.setitem(globals(), 'WEIGHTS', WEIGHTS * 2)
    with pytest.raises(DistillError, match='different task loss.WEIGHTS: .* there, .* now'):
        again()


def test_recipes_with_different_functions_are_refused(tmp_path):
    def again(**term):
        recipe = Term(**dict(loss=losses.kl, weight=0.5, T=lambda p: 4 - p, name='mine') | term)
        return run(dict(alone=None, mine=recipe), 1, seeds=1, folder=tmp_path)

    report = again()
    assert again() == report
    with pytest.raises(DistillError, match='recipes.mine.options.T=.*<lambda> .*but now'):
        again(T=lambda p: 4 - 2 * p)
    with pytest.raises(DistillError, match='recipes.mine.defaults.T=4.0, but now it is 1.0'):
        again(loss=losses.reverse_kl)


def test_a_projector_with_new_random_weights_is_the_same_recipe(tmp_path):
    def again():
        term = Term(losses.hint, layers={'2': '2'}, projector=nn.Linear(6, 16), weight=0.1)
        return run(dict(alone=None, features=kd() + term), 1, seeds=1, folder=tmp_path)

    assert again() == again()


def test_changed_labels_and_files_under_the_same_names_are_refused(tmp_path):
    names = [tmp_path / f'{i}.txt' for i in range(12)]
    for i, name in enumerate(names):
        name.write_text(str(i))
    labels = [i % 4 for i in range(12)]

    def read(name):
        return torch.full((8,), float(name.read_text()))

    def make():
        columns = [[read], [lambda name: labels[int(name.stem)]]]
        data = Datasets(names, columns, splits=[range(8), range(8, 12)])
        dls = data.dataloaders(bs=4, num_workers=0)
        (learn,) = apps.quiet(Learner(dls, apps.mlp(6), loss_func=CrossEntropyLossFlat()))
        return learn

    recipes = dict(alone=None, default=kd())
    again = lambda: run(recipes, 1, seeds=1, folder=tmp_path / 'runs', make=make)
    first = again()
    assert again() == first
    labels[0] = 3
    with pytest.raises(DistillError, match='different labels: training .* and validation'):
        again()
    labels[0] = 0
    names[9].write_text('8')
    with pytest.raises(DistillError, match='different files: training .* and validation'):
        again()
    names[9].write_text('9')
    assert again() == first


def test_what_cant_be_compared():
    with pytest.raises(DistillError, match=r'1 recipe\(s\) and 3 seed'):
        run(dict(kd=kd()))
    with pytest.raises(DistillError, match='0 seed'):
        run(seeds=0)
    with pytest.raises(
        DistillError, match='recipes=5: compare_recipes takes a dict of names and recipes'
    ):
        run(5)
    with pytest.raises(
        DistillError,
        match="metric='f1': not all students have a value for it. The columns are train_loss, valid_loss, accuracy",
    ):
        run(seeds=1, metric='f1')
    weights = iter(range(9))

    def other():
        learn = make_student()
        learn.model[0].weight.data.add_(next(weights))
        return learn

    with pytest.raises(DistillError, match='students with different initial weights'):
        run(make=other)
    assert (
        not run(seeds=1, metric='valid_loss', n_epoch=1).higher
        and run(seeds=1, metric='valid_loss', higher=True, n_epoch=1).higher
    )


@pytest.mark.parametrize('event', ['after_train', 'after_validate', 'after_epoch'])
@pytest.mark.parametrize('method', ['validate', 'tta'])
def test_a_callback_that_validates_in_mid_fit_is_refused_in_the_first_epoch(method, event):
    "Because fastai then mixes the numbers of both in its table"
    made = []

    def make():
        made.append(make_student(CallsInside(lambda learn: getattr(learn, method)(), event, 70)))
        valid = made[-1].dls.valid
        valid.dataset = Rows(valid.dataset)
        return made[-1]

    with pytest.raises(DistillError, match='A callback of the students calls learn.validate'):
        run(make=make)
    assert len(made) == 1
    assert made[0].epoch == 0


def test_a_learner_in_place_of_a_function_that_makes_one_is_refused():
    with pytest.raises(
        DistillError,
        match=r'make_student is a Learner: compare_recipes trains a new student .* Pass a function without arguments',
    ):
        compare_recipes(make_student(), TEACHER)
