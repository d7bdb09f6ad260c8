"What importing fastdistill.fastai changes: in fastai what the table in `fastai/patches.py` names, in the user's scope nothing that is in use."

import ast, builtins, copy, functools, inspect, pickle, re, subprocess, sys
from functools import partial
from pathlib import Path
import numpy as np
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
from fastai.basics import Callback, Datasets, L, Recorder, TfmdDL, defaults
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, TransformBlock
from fastai.distributed import DistributedDL, DistributedTrainer
from fastai.learner import Learner
from matplotlib.figure import Figure
from torch import nn
import fastdistill.fastai
from fastdistill import recipes
from fastdistill.fastai import KnowledgeDistillation, patches
from fastdistill.fastai.teacher_block import TeacherBlock
from fastdistill.fastai.teacher_targets import TeacherTargets

pytestmark = [pytest.mark.filterwarnings(w) for w in apps.FASTAI_WARNINGS]

TABLE = {
    name: when
    for name, when in re.findall(r'^\| `([\w.]+)` \|.*\| ([\w ]+) \|$', patches.__doc__, re.M)
}

# all that fastai, fastcore and fasttransform hold in their modules, classes and defaults, before and after each step
SNAPSHOT = """
import os, pickle, random, sys, warnings
warnings.simplefilter('ignore')
import numpy as np, torch
from fastai.vision.all import *
import fastai.text.all, fastai.tabular.all, fastai.collab, fastai.callback.all

def state():
    modules = {n: m for n,m in sys.modules.items() if n.split('.')[0] in ('fastai', 'fastcore', 'fasttransform')}
    held = {f'{n}:{k}': v for n,m in modules.items() for k,v in vars(m).items()}
    classes = {c for c in held.values() if isinstance(c, type)}
    held |= {f'{c.__name__}.{k}': v for c in classes for k,v in vars(c).items() if not k.startswith('_abc_')}
    return held | {f'defaults.{k}': v for k,v in vars(defaults).items()}

def changes(a, b): return sorted(k for k in a.keys() | b.keys() if a.get(k) is not b.get(k))

def surroundings(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), [f for f in warnings.filters if f[2].__name__ != 'DistillWarning']

def callbacks(): return [type(c).__name__ for c in Learner(DataLoaders(), nn.Identity(), loss_func=noop).cbs]

before,around,cbs = state(),surroundings(),callbacks()
if not os.fork(): # a process that has imported fastai alone: the first that it has of fastdistill is a target from a file
    target = pickle.loads(bytes.fromhex(sys.argv[1]))
    print('unpickled', hasattr(Datasets.decode, '_knows_teacher'), [c.__name__ for c in defaults.callbacks].count('TeacherTargets'), target(1.), flush=True)
    os._exit(0)
os.wait()
import fastdistill.fastai
imported = state()
same = surroundings() == around and callbacks() == cbs
from fastdistill.fastai.teacher_block import ToTeacherTarget
ToTeacherTarget('logits', None, None)
with_target = state()
fastdistill.fastai.KnowledgeDistillation(nn.Identity())
steps = changes(before, imported), changes(imported, with_target), changes(with_target, state())
print('optuna' in sys.modules)
print(repr((steps, same, callbacks() == cbs)))
"""


@pytest.fixture(scope='module')
def snapshot():
    "The lines that SNAPSHOT prints in a new Python"
    target = pickle.dumps(TeacherBlock().type_tfms[0])
    out = subprocess.run(
        [sys.executable, '-c', SNAPSHOT, target.hex()], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.splitlines()[-3:]


def test_importing_changes_what_the_table_names_and_nothing_else(snapshot):
    steps, same, same_callbacks = eval(snapshot[-1])
    assert [*map(len, steps)] == [10, 5, 2]
    for names, step in zip(steps, ('import', 'first target', 'first callback')):
        assert names == sorted(n for n, when in TABLE.items() if when == step)
    assert same and same_callbacks, (
        'random states, filters of warnings other than its own, and the callbacks of a new Learner are as before'
    )


CUSTOMARY = set(
    """F T Path ab at cc cfg cwd data device dist fsp hint kl layers logger losses metrics model models nn np nst optim pairwise pd pkt
    pl plt schedule sp student t teacher torch tqdm transforms tv utils vid""".split()
)  # aliases and variables of other people's scripts


def test_a_star_import_shadows_nothing_that_people_have_in_scope():
    space, ours = {}, {}
    for m in ('vision.all', 'text.all', 'tabular.all', 'collab'):
        exec(f'from fastai.{m} import *', space)
    exec('from fastdistill.fastai import *', ours)
    ours.pop('__builtins__')
    assert set(ours) == set(fastdistill.fastai.__all__)
    assert not set(ours) & (set(space) | CUSTOMARY | set(dir(builtins)))


def test_what_the_star_does_not_bring_is_one_word_away():
    assert (
        {'at', 'dist', 'sp', 'cc', 'cwd'}
        <= set(dir(fastdistill.fastai.recipes))
        == set(recipes.__all__)
    )
    from fastdistill.fastai import at, losses

    assert at is recipes.at and losses is fastdistill.losses
    assert all(getattr(fastdistill.fastai, n) is getattr(recipes, n) for n in recipes.__all__)


def test_an_unpickled_target_is_a_first_target_too(snapshot):
    assert snapshot[0] == 'unpickled True 1 TeacherTarget(1.)'


def test_optuna_is_not_imported(snapshot):
    assert snapshot[1] == 'False'


# Learners

ROWS = np.random.default_rng(0).normal(size=(16, 3)).astype('f4')


def number(i):
    return torch.full((4,), float(i))


def label(i):
    return 'abc'[i % 3]


def row(i):
    return ROWS[i]


def data(*more):
    get_y = [label, row] if more else label
    block = DataBlock(
        (TransformBlock, CategoryBlock, *more),
        get_x=number,
        get_y=get_y,
        splitter=IndexSplitter(range(12, 16)),
    )
    return block.dataloaders(range(16), bs=4, num_workers=0)


def names(learn):
    return [c.name for c in learn.cbs]


def test_a_learner_without_teacher_targets_gets_no_callback():
    with_targets = Learner(data(TeacherBlock), nn.Linear(4, 3))
    assert TeacherTargets in defaults.callbacks and 'teacher_targets' in names(with_targets)
    plain = Learner(data(), nn.Linear(4, 3))
    assert 'teacher_targets' not in names(plain) and not hasattr(plain, 'teacher_targets')
    assert names(plain) == [n for n in names(with_targets) if n != 'teacher_targets']
    assert 'teacher_targets' in names(copy.deepcopy(with_targets))


def test_a_learner_whose_data_get_targets_later_works_with_the_callback():
    learn = Learner(data(), nn.Linear(4, 3))
    learn.dls = data(TeacherBlock)
    before = names(learn)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=KnowledgeDistillation())
    assert learn.recorder.metric_names[4] == 'dist_loss' and learn.recorder.values[0][3] > 0
    assert names(learn) == before


# blocks


class Three(DataBlock):
    blocks = TransformBlock, CategoryBlock, TeacherBlock


@pytest.mark.parametrize(
    'make',
    [
        lambda: DataBlock((TransformBlock, CategoryBlock, TeacherBlock)),
        lambda: DataBlock([TransformBlock, CategoryBlock, TeacherBlock()]),
        lambda: DataBlock(L(TransformBlock, CategoryBlock, TeacherBlock)),
        lambda: DataBlock((TransformBlock, CategoryBlock, TeacherBlock), None, None, None),
        lambda: DataBlock((TransformBlock, CategoryBlock, partial(TeacherBlock, n_out=3))),
        Three,
    ],
    ids=range(6),
)
def test_a_teacher_block_is_no_input_however_it_is_given(make):
    assert make().n_inp == 1


def test_a_data_block_without_a_teacher_is_as_before():
    init = DataBlock.__init__.__wrapped__
    assert (
        DataBlock((TransformBlock,) * 3).n_inp == 2
        and DataBlock().n_inp == 1
        and DataBlock(TransformBlock).n_inp == 1
    )
    assert DataBlock(b for b in (TransformBlock, TransformBlock, CategoryBlock)).n_inp == 2
    assert DataBlock((TransformBlock, CategoryBlock, TeacherBlock), n_inp=2).n_inp == 2
    for wrong in (dict(foo=3), dict(blocks=[TransformBlock], get_x=[1, 2])):
        errors = []
        for make in (DataBlock, lambda **kw: init(DataBlock.__new__(DataBlock), **kw)):
            with pytest.raises((TypeError, ValueError)) as e:
                make(**wrong)
            errors.append(str(e.value))
        assert errors[0] == errors[1]


# each patch: what it is for works, and would not without it. So a test fails if fastai calls its methods in another way,
# and if a patch is no longer needed


def trained(dls=None, *cbs, n_epoch=1, **kwargs):
    learn = Learner(dls or data(), nn.Linear(4, 3), **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, 1e-3, cbs=cbs)
    return learn


def the_teacher_is_no_input(tmp_path):
    assert DataBlock((TransformBlock, CategoryBlock, TeacherBlock)).n_inp == 1


def a_prediction_is_decoded(tmp_path):
    assert trained(data(TeacherBlock)).predict(3)[0] in 'abc'


def empty_data_have_no_teacher(tmp_path):
    assert len(data(TeacherBlock).train_ds.new_empty().tls) == 2


def the_types_of_a_batch_are_fastais(tmp_path):
    dls = data(TeacherBlock)
    assert dls.train.n_inp == 1
    dls.train._one_pass()
    assert {t.__module__.split('.')[0] for t in dls.train._types[tuple]} <= {'fastai', 'torch'}


def a_batch_is_shown_without_the_teacher(tmp_path):
    x, y, its = data(TeacherBlock).train.show_batch(show=False)
    assert not isinstance(y, tuple) and len(its[0]) == 2


def metrics_do_not_see_the_teacher(tmp_path):
    assert trained(data(TeacherBlock), metrics=lambda pred, y: 0.5).recorder.values[0][-1] == 0.5


class Interrupt(Callback):
    def after_backward(self):
        raise KeyboardInterrupt


def an_interrupt_leaves_nothing_of_a_callback_that_stays(tmp_path):
    kd_ = KnowledgeDistillation(nn.Linear(4, 3), check=False)
    learn = Learner(data(), nn.Linear(4, 3), cbs=kd_)
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Interrupt())
    assert not len(learn.metrics)


def schedules_span_a_whole_fine_tune(tmp_path):
    seen = []

    class Note(Callback):
        def after_loss(self):
            if self.training:
                seen.append(self.learn.knowledge_distillation.training_progress)

    learn = Learner(data(), nn.Linear(4, 3))
    kd = KnowledgeDistillation(nn.Linear(4, 3), check=False)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, cbs=[kd, Note()])
    assert len(seen) == 6 and seen == sorted(set(seen))


def with_projectors(tmp_path):
    torch.manual_seed(0)
    learn = Learner(
        data(), nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), path=tmp_path, model_dir='.'
    )
    recipe = recipes.hint({'0': '0'})
    teacher = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3))
    kd = KnowledgeDistillation(teacher, recipe, check=False)
    return learn, kd


def projectors_are_saved_beside_the_student(tmp_path):
    learn, kd = with_projectors(tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=kd)
    learn.save('student')
    assert (tmp_path / 'student.distill.pth').is_file()


def saved_projectors_are_loaded(tmp_path):
    learn, kd = with_projectors(tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=kd)
        learn.save('student')
        other, new = with_projectors(tmp_path)
        other.load('student')
        other.fit(1, 0.0, cbs=new)
    of = lambda kd: [*kd.distiller.links.parameters()]
    assert len(of(kd)) and all(map(torch.equal, of(kd), of(new)))


def losses_of_different_scales_get_two_axes(tmp_path):
    kd = KnowledgeDistillation(nn.Linear(4, 3), check=False)
    learn = trained(None, kd, cbs=Recorder(train_metrics=True), n_epoch=2)
    figure = Figure()
    learn.recorder.plot_loss(skip_start=0, ax=figure.subplots())
    assert len(figure.axes) == 2


PATCHES = {
    (DataBlock, '__init__'): the_teacher_is_no_input,
    (Datasets, 'decode'): a_prediction_is_decoded,
    (Datasets, 'new_empty'): empty_data_have_no_teacher,
    (TfmdDL, '_one_pass'): the_types_of_a_batch_are_fastais,
    (TfmdDL, '_pre_show_batch'): a_batch_is_shown_without_the_teacher,
    (Learner, 'fit'): an_interrupt_leaves_nothing_of_a_callback_that_stays,
    (Learner, 'fine_tune'): schedules_span_a_whole_fine_tune,
    (Learner, 'save'): projectors_are_saved_beside_the_student,
    (Learner, 'load'): saved_projectors_are_loaded,
    (Recorder, 'plot_loss'): losses_of_different_scales_get_two_axes,
}
IDS = [f'{cls.__name__}.{name}' for cls, name in PATCHES]
NEW = {'distill', 'check_teacher', 'distill_find', 'explain', 'calibrate', 'show_features'}


def test_each_patch_has_a_test():
    assert {*IDS, 'defaults.callbacks'} == {n for n in TABLE if n.split('.')[1] not in NEW}


@pytest.mark.parametrize('patch', PATCHES, ids=IDS)
def test_what_a_patch_is_for_works(tmp_path, patch):
    PATCHES[patch](tmp_path)


@pytest.mark.parametrize('patch', PATCHES, ids=IDS)
def test_it_would_not_work_without_the_patch(tmp_path, monkeypatch, patch):
    cls, name = patch
    own = getattr(cls, name).__wrapped__
    plain = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    plain._knows_teacher = True  # or it would be wrapped again
    monkeypatch.setattr(cls, name, plain)
    with pytest.raises(
        (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
    ):
        PATCHES[patch](tmp_path)


def test_default_callbacks_are_needed_for_metrics(tmp_path, monkeypatch):
    metrics_do_not_see_the_teacher(tmp_path)
    dls = data(TeacherBlock)
    monkeypatch.setattr(
        defaults, 'callbacks', [c for c in defaults.callbacks if c is not TeacherTargets]
    )
    with pytest.raises(
        (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
    ):
        trained(dls, metrics=lambda pred, y: 0.5)


def test_private_names_of_fastai_are_listed():
    "Each is a place that a new release of fastai may break"
    package = Path(patches.__file__).parents[1]
    theirs = {
        n
        for c in (Callback, DataBlock, Datasets, DistributedDL, DistributedTrainer, Learner, TfmdDL)
        for k in c.__mro__
        if k.__module__.split('.')[0] in ('fastai', 'fastcore')
        for n in [*vars(k), *re.findall(r'self\.(_\w+)', inspect.getsource(k))]
        if re.fullmatch('_[a-z]\\w*', n)
    }
    used = set()
    for f in [*(package / 'fastai').glob('*.py'), *(package / 'cli' / 'training').glob('*.py')]:
        tree = ast.parse(f.read_text())
        own = {
            n.name
            for c in ast.walk(tree)
            if isinstance(c, ast.ClassDef) and not c.bases
            for n in c.body
            if isinstance(n, ast.FunctionDef)
        }
        for n in ast.walk(tree):
            if isinstance(n, ast.Attribute) and n.attr in theirs - own:
                used.add(n.attr)
    listed = set(re.findall(r'[`.](_[a-z]\w*)`', patches.__doc__))
    assert used <= listed
