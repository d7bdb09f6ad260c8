"Several students side by side: each one as if it had trained by itself."

import copy, os, pickle, random, signal, threading
import numpy as np
import pytest, torch
from torch import nn
import apps
from apps import same, snapshot
from fastai.basics import (
    AvgMetric,
    Callback,
    CrossEntropyLossFlat,
    DataBlock,
    DataLoaders,
    IndexSplitter,
    L,
    Learner,
    Transform,
    accuracy,
    load_learner,
    params,
    set_seed,
)
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.vision.augment import Brightness, Flip, Rotate
from fastai.vision.all import Normalize
from fastdistill.fastai import (
    DistillError,
    Recipe,
    Teacher,
    TeacherBlock,
    Term,
    cache_teacher,
    distill_many,
    dkd,
    kd,
    losses,
)
from fastdistill.fastai.cache_feed import passed_epochs
from fastdistill.fastai.shared import Stream
from fastdistill.fastai.turns import Turns, held_interrupts
from fastdistill.base.seeds import seeded

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
LR = 1e-2


class Keep(Callback):
    "Copies of the batches of each epoch as the Learner got them"

    order = -100

    def before_fit(self):
        self.trained, self.validated = [], []

    def before_train(self):
        self.trained.append([])

    def before_validate(self):
        self.validated.append([])

    def before_batch(self):
        kept = self.trained if self.training else self.validated
        if kept:
            kept[-1].append(
                tuple(o.clone() for o in (*self.xb, *self.yb))
            )  # else the doctor prepares a batch


class Played:
    "A DataLoader that only repeats batches"

    device = torch.device('cpu')

    def __init__(self, epochs):
        self.epochs, self.at, self.n = epochs, 0, None

    def __len__(self):
        return len(self.epochs[self.at])

    def __iter__(self):
        return iter([tuple(o.clone() for o in b) for b in self.epochs[self.at]])


class Play(Callback):
    "The batches of the epoch"

    order = -100

    def before_epoch(self):
        for dl in self.dls.loaders:
            dl.at = self.epoch


def augmented(seed=0):
    "Image data whose batches differ in each epoch: shuffled, flipped, rotated"
    return apps.image_dls(
        apps.CategoryBlock(vocab=['red', 'green', 'blue'], sort=False),
        lambda x, at, k: ['red', 'green', 'blue'][k],
        batch_tfms=[Flip(), Rotate(), Brightness()],
        seed=seed,
    )


@pytest.fixture(scope='module')
def dls():
    return augmented()


@pytest.fixture
def usual_ctrl_c():
    "A process that a script started in the background ignores Ctrl-C"
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)


@pytest.fixture(scope='module')
def teacher():
    t = apps.pair('image')[1]
    return t


def student(dls, seed=0, width=4, cbs=None, p=0.2, **kwargs):
    set_seed(seed)
    model = nn.Sequential(
        apps.conv(3, width),
        nn.Dropout(p),
        apps.conv(width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(p),
        nn.Linear(2 * width, 3),
    )
    (learn,) = apps.quiet(
        Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, **kwargs)
    )
    return learn


FEATURES = kd(T=2.0) + Term(losses.hint, layers={'2': '0.1'}, projector='conv', weight=0.1)
RECIPES = dict(default='auto', alone=None, features=FEATURES, labels=dkd(alpha=1.0, beta=2.0))


def trained(learn):
    "All that a training leaves"
    state = {k: v for k, v in learn.opt.state_dict().items()}
    rec = learn.recorder
    return (
        snapshot(learn.model)[0],
        state,
        [list(map(float, v)) for v in rec.values],
        list(map(float, rec.losses)),
        rec.lrs,
    )


def assert_equal(a, b):
    for x, y in zip(a, b):
        if isinstance(x, dict):
            assert pickle.dumps(str(x)) == pickle.dumps(str(y))
            for p, q in zip(tensors(x), tensors(y), strict=True):
                assert torch.equal(p, q)
        else:
            assert x == y


def tensors(o):
    if isinstance(o, torch.Tensor):
        return [o]
    if isinstance(o, dict):
        return [t for v in o.values() for t in tensors(v)]
    return [t for v in o for t in tensors(v)] if isinstance(o, (list, tuple, L)) else []


def by_itself(learn, kept, teacher, recipe, seed, cbs=(), n_epoch=2, lr=LR):
    "The same batches in a plain training, which begins with the same random numbers"
    dls, learn.dls = (
        learn.dls,
        DataLoaders(Played(kept.trained), Played(kept.validated), device='cpu'),
    )
    for k in ('vocab', 'n_inp', 'after_batch'):
        setattr(learn.dls, k, getattr(dls, k))
    cbs = [Play(), *cbs]
    with seeded(seed):
        if recipe is None:
            learn.fit_one_cycle(n_epoch, lr, cbs=cbs)
        else:
            learn.distill(teacher, n_epoch, lr, recipe, check=False, cbs=cbs)
    return learn


def test_each_student_ends_as_if_it_had_trained_by_itself(dls, teacher):
    "Batches that are augmented, dropout, other architectures, recipes, rates, projectors, a student alone: the same to the last bit"
    make = lambda **kw: [student(dls, seed=i, width=w, **kw) for i, w in enumerate((4, 6, 4, 4))]
    many, lrs = make(), [1e-2, 3e-3, 1e-2, 2e-2]
    keeps = [Keep() for _ in many]
    for s, k in zip(many, keeps):
        s.add_cb(k)
    cbs = distill_many(many, teacher, 2, lrs, RECIPES, seed=5, check=False, progress=False)
    assert [c is None for c in cbs] == [False, True, False, False]
    for k in keeps[1:]:
        assert all(
            map(
                torch.equal,
                tensors([k.trained, k.validated]),
                tensors([keeps[0].trained, keeps[0].validated]),
            )
        )
    first, second = keeps[0].trained
    assert not torch.equal(first[0][0], second[0][0])
    for s, k, cb, lr, one in zip(many, keeps, cbs, lrs, make()):
        # a Learner of recorded batches shows the choice no example: it gets the recipe that was chosen
        assert_equal(
            trained(s),
            trained(by_itself(one, k, teacher, None if cb is None else cb.recipe, 5, lr=lr)),
        )


def test_the_others_change_nothing(dls, teacher):
    "One student with the seed, and the same one among others"
    one, (a, b, c) = student(dls, 1), [student(dls, i, w) for i, w in ((2, 6), (1, 4), (3, 8))]
    distill_many([one], teacher, 2, LR, seed=7, progress=False)
    distill_many([a, b, c], teacher, 2, LR, [FEATURES, 'auto', None], seed=7, progress=False)
    assert_equal(trained(one), trained(b))
    other = student(dls, 1)
    distill_many([other], teacher, 2, LR, seed=8, progress=False)
    assert not torch.equal(other.model[-1].weight, one.model[-1].weight)
    set_seed(3)
    distill_many([(again := student(dls, 1))], teacher, 1, LR, progress=False)
    set_seed(3)
    distill_many([(twice := student(dls, 1))], teacher, 1, LR, progress=False)
    assert_equal(trained(again), trained(twice))


class Counting(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.n, self.rows = model, 0, []

    def forward(self, x):
        self.n += 1
        return self.model(x)


def test_data_and_teacher_run_once_for_each_batch(dls, teacher):
    loaded = []

    class Loaded(Transform):
        def encodes(self, o: torch.Tensor):
            loaded.append(1)
            return o

    mine, counting = augmented(), Counting(teacher.model)
    for dl in mine.loaders:
        dl.after_batch.add(Loaded())
    students = [student(mine, i) for i in range(3)]
    loaded.clear()
    distill_many(students, counting, 2, LR, [kd(), None, kd(T=2.0)], check=False, progress=False)
    assert counting.n == 2 * (4 + 2) and len(loaded) == 2 * 2 * (4 + 2)  # images and labels
    counting.n = 0
    features = Term(losses.hint, layers={'2': 'model.0.1'}, projector='conv', weight=0.1)
    distill_many(
        [student(mine, i) for i in range(3)],
        counting,
        1,
        LR,
        [kd(), kd() + features, features],
        check=False,
        progress=False,
    )
    assert counting.n <= 4 + 2 + 4  # and where students are set up


@pytest.mark.parametrize(
    'cbs',
    [
        lambda: [MixUp(0.4)],
        lambda: [CutMix()],
        lambda: [GradientAccumulation(32), GradientClip(0.1)],
        lambda: [ShortEpochCallback(pct=0.5)],
    ],
    ids=['mixup', 'cutmix', 'accumulation', 'short'],
)
def test_callbacks_that_change_batches_and_steps(dls, teacher, cbs):
    "Each student's own; the others' batches stay as they are, also where CutMix writes into them"
    many = [student(dls, 0, cbs=cbs()), student(dls, 1), student(dls, 2, cbs=cbs())]
    keeps = [Keep() for _ in many]
    for s, k in zip(many, keeps):
        s.add_cb(k)
    distill_many(many, teacher, 2, LR, [kd(), kd(), None], seed=5, progress=False)
    for i, (s, k, recipe) in enumerate(zip(many, keeps, (kd(), kd(), None))):
        one = student(dls, i, cbs=[] if i == 1 else cbs())
        # the record ends where ShortEpochCallback ends the epoch; it stops at the same share of a full one
        if i != 1 and isinstance(cbs()[0], ShortEpochCallback):
            k.trained, k.validated = keeps[1].trained, keeps[1].validated
        assert_equal(trained(s), trained(by_itself(one, k, teacher, recipe, 5)))


def test_students_that_mix_alike_share_the_teacher_too(dls, teacher):
    counting = Counting(teacher.model)
    many = [student(dls, 0, cbs=MixUp(0.4), p=0.0) for _ in range(3)]
    distill_many(many, counting, 1, LR, [kd(), kd(T=2.0), kd()], check=False, progress=False)
    assert counting.n == 4 + 2
    counting.n = 0
    distill_many(
        [student(dls, 0, cbs=MixUp(0.4)), student(dls, 0, p=0.0)],
        counting,
        1,
        LR,
        kd(),
        check=False,
        progress=False,
    )
    assert counting.n == 2 * 4 + 2


def test_precision_is_each_students_own(dls, teacher):
    make = lambda: [student(dls, i, cbs=[] if i else apps.HalfOnCPU('bf16')) for i in range(2)]
    counting, many, ones = Counting(teacher.model), make(), make()
    distill_many(many, counting, 1, LR, kd(), seed=2, check=False, progress=False)
    assert counting.n == 2 * (4 + 2)
    for a, b in zip(many, ones):
        distill_many([b], teacher, 1, LR, kd(), seed=2, check=False, progress=False)
        assert_equal(trained(a), trained(b))


def test_a_teacher_that_draws(dls, teacher):
    noisy = nn.Sequential(nn.Dropout(0.5), teacher.model)
    a, b, c = student(dls, 0), student(dls, 0), student(dls, 1)
    t = Teacher(noisy, mode='train')
    distill_many([a], t, 2, LR, seed=4, check=False, progress=False)
    distill_many([c, b], t, 2, LR, [FEATURES2, 'auto'], seed=4, check=False, progress=False)
    assert_equal(trained(a), trained(b))


FEATURES2 = kd() + Term(losses.hint, layers={'2': '1.0.1'}, projector='conv', weight=0.1)


@pytest.mark.parametrize('app', ['tabular', 'language_model', 'text_classifier', 'collab'])
def test_other_applications(app):
    "With hidden states, the regularizers of text models, ratings"
    a, t = apps.pair(app)
    (b, _), (c, _) = apps.pair(app), apps.pair(app, 1)
    for s in (b, c):
        s.dls = a.dls
    distill_many([a], t, 2, LR, seed=1, progress=False)
    distill_many([c, b], t, 2, LR, [None, 'auto'], seed=1, progress=False)
    assert_equal(trained(a), trained(b))
    assert not torch.equal(*[next(iter(snapshot(s.model)[0].values())) for s in (a, c)])


def test_fine_tune_and_other_numbers_of_epochs(dls, teacher):
    make = lambda: [
        student(dls, i, splitter=lambda m: [params(m[:3]), params(m[3:])]) for i in range(2)
    ]
    many, ones = make(), make()
    kd_ = Recipe(kd(alpha=SchedCos(0.9, 0.1)))
    distill_many(many, teacher, [1, 2], LR, kd_, seed=3, fine_tune=True, progress=False)
    assert [len(s.recorder.values) for s in many] == [1, 2]
    for s, one, n in zip(many, ones, (1, 2)):
        distill_many([one], teacher, n, LR, kd_, seed=3, fine_tune=True, progress=False)
        assert_equal(trained(s), trained(one))


def cached(dls, teacher, path, **kwargs):
    return cache_teacher(teacher, dls, path, dtype='float32', **kwargs)


@pytest.mark.parametrize('views', [2, 0])
def test_from_a_cache(teacher, tmp_path, views):
    mine = augmented()
    cache = cached(mine, teacher, tmp_path / 'c', views=views, valid=True)
    make = lambda: [student(mine, i) for i in range(3)]
    recipes, many, ones = [None, kd(), kd(T=2.0)], make(), make()
    keeps = [Keep() for _ in many]
    for s, k in zip(many, keeps):
        s.add_cb(k)
    distill_many(many, cache, 2, LR, recipes, seed=6, progress=False)
    for dl in mine.loaders:
        assert 'do_item' not in vars(dl)
    for s, one, recipe in zip(many, ones, recipes):
        assert passed_epochs(s) == {cache.identity: 2}
        if recipe is not None:
            distill_many([one], cache, 2, LR, recipe, seed=6, progress=False)
            assert_equal(trained(s), trained(one))
            assert 'kd_loss' in s.recorder.metric_names and s.recorder.values[-1][-1] is not None
    if views:  # the cache's rows are what the live teacher predicts for these batches
        live = [student(mine, 1)]
        k = keeps[1]
        k.trained, k.validated = [
            [[b[:2] for b in e] for e in part] for part in (k.trained, k.validated)
        ]
        one = by_itself(live[0], k, teacher, kd(), 6)
        for p, q in zip(one.model.parameters(), many[1].model.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_targets_in_the_data(teacher):
    "A TeacherBlock's rows; and without a teacher at all"
    vocab = ['red', 'green', 'blue']
    x, _, colour = apps.pictures(96)
    block = DataBlock(
        (apps.ImageBlock, apps.CategoryBlock(vocab=vocab, sort=False), TeacherBlock()),
        get_x=apps.of(x),
        get_y=[apps.of([vocab[k] for k in colour]), apps.of(torch.randn(96, 3))],
        splitter=IndexSplitter(list(range(64, 96))),
    )
    mine = block.dataloaders(list(range(96)), bs=16, num_workers=0)
    many, one = [student(mine, i) for i in range(2)], student(mine, 1)
    distill_many(many, None, 1, LR, [None, kd()], seed=0, progress=False)
    distill_many([one], None, 1, LR, kd(), seed=0, progress=False)
    assert_equal(trained(many[1]), trained(one))
    for s in many:
        assert len(s.recorder.values) == 1


# nothing is left behind


def state_of(*learners):
    "Callbacks, metrics, DataLoaders and hooks. As after any interrupted fit, models may be in another mode"
    return [
        (
            [type(c).__name__ for c in l.cbs],
            l.logger,
            [m.name for m in l.metrics],
            l.dls,
            {**vars(l.dls.train)},
            vars(l).get('dl') in (None, *l.dls.loaders),
            [m[1:] for m in apps.modes(l.model).values()],
        )
        for l in learners
    ]


def fails_at(epoch, batch, error):
    class Fails(Callback):
        order = 200

        def after_batch(self):
            if self.training and (self.epoch, self.iter) == (epoch, batch):
                raise error

    return Fails()


@pytest.mark.parametrize(
    'error',
    [KeyboardInterrupt(), ValueError('broken'), RuntimeError('out of memory')],
    ids=['interrupt', 'value', 'runtime'],
)
def test_nothing_is_left_after_an_error(dls, teacher, error, tmp_path):
    many = [student(dls, i, cbs=SaveModelCallback(fname=f'm{i}'), path=tmp_path) for i in range(3)]
    many[1].add_cb(fails := fails_at(1, 2, error))
    with many[0].no_logging():
        many[0].fit(1, 0.0)  # optimizers and recorders are there
    for s in many[1:]:
        s.create_opt()
    before, modules, rng, threads = (
        state_of(*many),
        snapshot(teacher.model),
        torch.get_rng_state(),
        threading.active_count(),
    )
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(type(error)) as e:
        distill_many(many, teacher, 3, LR, [kd(), FEATURES, None], seed=1, progress=False)
    if not isinstance(error, KeyboardInterrupt):
        assert e.value.__notes__ == ['(in the training of student 1)']
    assert same(snapshot(teacher.model), modules) and torch.equal(torch.get_rng_state(), rng)
    assert threading.active_count() == threads and signal.getsignal(signal.SIGINT) is handler
    assert state_of(*many) == before
    many[1].remove_cb(fails)
    again = distill_many(many, teacher, 1, LR, [kd(), FEATURES, None], seed=1, progress=False)
    assert [c is None for c in again] == [False, False, True]


def test_ctrl_c_stops_all_students_after_the_same_batch(dls, teacher, usual_ctrl_c):
    many, steps = [student(dls, i) for i in range(3)], [0, 0, 0]

    class Count(Callback):
        def __init__(self, i):
            self.i = i

        def after_step(self):
            steps[self.i] += 1
            if self.i == 1 and steps[1] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    for i, s in enumerate(many):
        s.add_cb(Count(i))
    with pytest.raises(KeyboardInterrupt):
        distill_many(many, teacher, 3, LR, progress=False)
    assert steps == [3, 3, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    distill_many(many, teacher, 1, LR, progress=False)


def test_teacher_students_and_random_numbers_are_as_before(dls, teacher):
    many = [student(dls, i) for i in range(2)]
    many[0].create_opt()
    many[1].create_opt()
    modules, rng = (
        snapshot(teacher.model),
        [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],
    )
    own = dls.train.rng.getstate()
    distill_many(many, teacher, 1, LR, [FEATURES, None], seed=1, progress=False)
    assert same(snapshot(teacher.model), modules) and dls.train.rng.getstate() == own
    assert (
        torch.equal(torch.get_rng_state(), rng[0])
        and random.getstate() == rng[1]
        and np.random.get_state()[1].tolist() == rng[2]
    )
    for s in many:
        assert (
            all(n[1:] == (0, 0, 0) for n in apps.modes(s.model).values())
            and not hasattr(s, 'shared_batches')
            and s.dl is None
        )
        assert [m.name for m in s.metrics] == ['accuracy'] and not hasattr(
            s, 'knowledge_distillation'
        )


def test_a_student_that_stops_early_leaves_the_others_alone(dls, teacher):
    stops, goes, one = (
        student(dls, 0, cbs=EarlyStoppingCallback(patience=1, min_delta=9.0)),
        student(dls, 1),
        student(dls, 1),
    )
    distill_many([stops, goes], teacher, 4, LR, seed=2, progress=False)
    distill_many([one], teacher, 4, LR, seed=2, progress=False)
    assert len(stops.recorder.values) == 2 and len(goes.recorder.values) == 4
    assert_equal(trained(goes), trained(one))


def test_a_callback_that_predicts_and_validates_inside_the_fit(dls, teacher):
    class Looks(Callback):
        order = 70

        def after_epoch(self):
            with self.learn.no_mbar(), self.learn.removed_cbs([self]):
                self.seen = dls.valid.new().one_batch()

    a, b, one = student(dls, 0, cbs=Looks()), student(dls, 1), student(dls, 1)
    distill_many([a, b], teacher, 2, LR, seed=2, progress=False)
    distill_many([one], teacher, 2, LR, seed=2, progress=False)
    assert_equal(trained(b), trained(one))


def test_save_export_and_copies_inside_the_fit(dls, teacher, tmp_path):
    class Saves(Callback):
        order = 90

        def after_epoch(self):
            self.learn.save(f'in_fit_{self.epoch}')
            copy.deepcopy(self.learn.dl)

        def __reduce__(self):
            return Callback, ()

    for i in range(2):
        (tmp_path / str(i)).mkdir()
    many = [
        student(dls, i, path=tmp_path / str(i), cbs=[SaveModelCallback(), CSVLogger(), Saves()])
        for i in range(2)
    ]
    distill_many(many, teacher, 2, LR, [kd(), None], seed=1, progress=False)
    for i, s in enumerate(many):
        assert (tmp_path / str(i) / 'history.csv').read_text().count('\n') == 3
        s.remove_cb(CSVLogger)  # fastai can't pickle its file
        s.export('out.pkl')
        assert load_learner(tmp_path / str(i) / 'out.pkl').cbs


# what can't be shared


def test_learners_that_cant_train_side_by_side(dls, teacher, tmp_path):
    a, b = student(dls, 0), student(dls, 1)

    def refused(students, match, teacher=teacher, **kw):
        with pytest.raises(DistillError, match=match):
            distill_many(students, teacher, 1, LR, progress=False, **kw)

    refused([a, a], 'student 0 and student 1 are the same Learner')
    shares = Learner(dls, nn.Sequential(a.model[:5], nn.Linear(8, 3)), loss_func=a.loss_func)
    refused({'a': a, 'b': shares}, r'a and b share 6 parameters')
    cb = EarlyStoppingCallback()
    refused(
        [student(dls, cbs=cb), student(dls, cbs=cb)], 'have the same EarlyStoppingCallback object'
    )
    metric = AvgMetric(accuracy)
    refused(
        [Learner(dls, s.model, loss_func=s.loss_func, metrics=metric) for s in (a, b)],
        'have the same AvgMetric object',
    )
    save = lambda name: student(dls, path=tmp_path, cbs=SaveModelCallback(fname=name))
    refused(
        [save('m'), save('m')],
        r"would both write .*models/m. Give each its own name: SaveModelCallback\(fname='student 1'\)",
    )
    refused([a, b], 'student 0 and the teacher share parameters', teacher=a)
    refused([a, b], 'a callback belongs to one Learner', cbs=[EarlyStoppingCallback()])
    refused([a, b], 'recipes has 3 values for 2 students', recipes=[None, kd(), kd()])
    refused([], 'give a list of Learners')
    refused([a, b.model], 'give a list of Learners')
    refused([a, b], 'No layer', recipes=[kd(), Term(losses.hint, layers={'nowhere': '0.1'})])


def test_data_that_differ_are_refused(dls, teacher):
    def refused(other, match):
        with pytest.raises(DistillError, match=match):
            distill_many([student(dls), student(other)], teacher, 1, LR, progress=False)

    refused(
        augmented(seed=3),
        'student 0 and student 1 have different training batches .the first batch is another one',
    )
    scaled = augmented()
    for dl in scaled.loaders:
        dl.after_batch.add(Normalize.from_stats([0.5] * 3, [0.5] * 3, cuda=False))
    refused(scaled, 'another normalization')
    refused(bs8(), 'bs 16 and 8')
    plain = apps.pair('image')[0].dls
    refused(plain, 'transform')
    again = augmented()
    distill_many([student(dls), student(again, 1)], teacher, 1, LR, progress=False)


def bs8():
    other = augmented()
    return DataLoaders(*(dl.new(bs=8) for dl in other.loaders), device='cpu')


# progress


def test_a_table_with_a_row_for_each_student_and_epoch(dls, teacher, capsys):
    distill_many(
        {'small': student(dls, 0), 'large': student(dls, 1, 8)}, teacher, 2, LR, [None, kd()]
    )
    out = capsys.readouterr().out
    rows = [l.split('\r')[-1].split() for l in out.splitlines()]
    header = next(r for r in rows if 'student' in r)
    assert header[-8:] == [
        'student',
        'epoch',
        'train_loss',
        'valid_loss',
        'accuracy',
        'task_loss',
        'kd_loss',
        'time',
    ]
    assert sum('small' in r for r in rows) == sum('large' in r for r in rows) == 2


# the parts


def test_turns():
    seen = []

    def count(ask):
        for i in range(3):
            seen.append(ask(i))

    t = Turns(count)
    t.resume()
    for i in range(3):
        assert t.request == i and not t.ended
        t.resume(10 * i)
    assert t.ended and seen == [0, 10, 20]
    t.close()
    assert Turns(count).close() is None

    def fails(ask):
        raise ValueError('here')

    with pytest.raises(ValueError, match='here'):
        Turns(fails).resume()
    cleaned = []

    def cleans(ask):
        try:
            ask(0)
        finally:
            cleaned.append(1)

    t = Turns(cleans)
    t.resume()
    t.close()
    t.close()
    assert t.ended and cleaned == [1]


def test_gradient_mode_is_each_functions_own():
    "What a generator could not promise: one validates, the other trains"
    modes = []

    def validates(ask):
        with torch.no_grad():
            ask(0)
            modes.append(torch.is_grad_enabled())

    def trains(ask):
        ask(0)
        modes.append(torch.is_grad_enabled())

    ts = [Turns(validates), Turns(trains)]
    for t in ts * 2:
        t.resume()
    assert modes == [False, True] and torch.is_grad_enabled()


def test_a_second_ctrl_c_interrupts_at_once(usual_ctrl_c):
    with pytest.raises(KeyboardInterrupt):
        with held_interrupts() as i:
            os.kill(os.getpid(), signal.SIGINT)
            assert i.came
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stream_depends_on_its_seed_alone(dls):
    from fastdistill.teachers.rng_stream import generators

    of = generators((), True)
    a, b = Stream(dls.train, 3, of), Stream(dls.train, 3, of)
    first = [a.batch() for _ in range(2)]
    torch.rand(5)
    np.random.rand(3)
    random.random()
    a.close()
    for x in first:
        torch.rand(1)
        assert all(map(torch.equal, x, b.batch()))
    b.close()
    c = Stream(dls.train, 4, of)
    assert not torch.equal(c.batch()[0], first[0][0])
    c.close()
