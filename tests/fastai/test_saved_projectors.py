"Projectors and their optimizer are kept beside the student's file, so that a resumed training is the training that was not interrupted."

import copy, errno, io
from functools import partial
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
from apps import pair, toy
from fastai.basics import Adam, Callback, DataLoaders, Lamb, OptimWrapper, SGD, ranger, set_seed
from fastai.callback.tracker import SaveModelCallback
from fastdistill.fastai import DistillError, KnowledgeDistillation, Teacher, Term, kd, losses

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
OPTS = [
    Adam,
    Lamb,
    ranger,
    partial(OptimWrapper, opt=torch.optim.AdamW),
    partial(SGD, mom=0.9, wd=0.1),
    SGD,
]
LAYERS = {'0': '0', '2': '2'}


def recipe():
    return kd() + Term(losses.VID(), 0.1, layers=LAYERS)


def KD(teacher, *args, **kwargs):
    return KnowledgeDistillation(teacher, *(args or [recipe()]), check=False, **kwargs)


def weights(learn):
    return [p.detach().clone() for p in learn.model.parameters()]


def projectors(cb):
    return [p.detach().clone() for p in cb.distiller.own_parameters()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    'opt_func', OPTS, ids=['Adam', 'Lamb', 'ranger', 'AdamW', 'SGD with momentum', 'SGD']
)
def test_a_resumed_fit_is_the_one_that_was_not_interrupted(tmp_path, opt_func):
    def begin():
        student, teacher = toy(opt_func=opt_func, path=tmp_path)
        return student, KD(teacher)

    straight, cb = begin()
    for _ in range(2):
        straight.fit(1, 0.01, cbs=cb)
    first, cb1 = begin()
    first.fit(1, 0.01, cbs=[cb1, SaveModelCallback(every_epoch=True, with_opt=True)])
    set_seed(99)
    second, cb2 = begin()
    second.create_opt()
    second.load('model_0', weights_only=False)
    second.fit(1, 0.01, cbs=cb2)
    assert same(weights(straight), weights(second)) and same(projectors(cb), projectors(cb2))


def test_measured_shares_of_the_gradient_continue_too(tmp_path):
    "They are running means over the batches of both fits"
    shared = lambda teacher: KD(
        teacher, kd() + Term(losses.hint, grad_ratio=0.3, layers=LAYERS, projector='linear')
    )
    student, teacher = toy(opt_func=SGD, path=tmp_path)
    cb = shared(teacher)
    for _ in range(2):
        student.fit(1, 0.1, cbs=cb)
    first, teacher = toy(opt_func=SGD, path=tmp_path)
    first.fit(1, 0.1, cbs=[shared(teacher), SaveModelCallback(every_epoch=True, with_opt=True)])
    set_seed(99)
    second, teacher = toy(opt_func=SGD, path=tmp_path)
    second.create_opt()
    second.load('model_0', weights_only=False)
    cb2 = shared(teacher)
    second.fit(1, 0.1, cbs=cb2)
    assert same(weights(student), weights(second))
    assert same(projectors(cb), projectors(cb2))


@pytest.mark.parametrize('drawn', ['member', 'dropout'])
def test_a_fit_that_resumes_at_an_epoch_draws_the_teachers_that_come_next(tmp_path, drawn):
    def begin():
        student, teacher = toy(opt_func=SGD, path=tmp_path)
        if drawn == 'dropout':
            model = torch.nn.Sequential(torch.nn.Dropout(0.5), teacher)
            return student, KD(Teacher(model, run=dict(mode='train')), kd())
        members = [teacher, copy.deepcopy(teacher)]
        with torch.no_grad():
            [*members[1].parameters()][-2].neg_()
        return student, KD(Teacher(members, ensemble=dict(combine='sample')), kd())

    straight, cb = begin()
    straight.fit(3, 0.1, cbs=[cb, SaveModelCallback(every_epoch=True, with_opt=True)])
    second, cb2 = begin()
    set_seed(99)
    second.create_opt()
    second.load('model_0', weights_only=False)
    second.fit(3, 0.1, cbs=cb2, start_epoch=1)
    assert same(weights(straight), weights(second))


def automatic(teacher):
    return KD(teacher, None)


def test_a_chosen_recipe_continues_with_its_measured_gradients(tmp_path):
    straight, teacher = toy(opt_func=SGD, path=tmp_path)
    cb = automatic(teacher)
    for _ in range(2):
        straight.fit(1, 0.1, cbs=cb)
    first, teacher = toy(opt_func=SGD, path=tmp_path)
    first.fit(1, 0.1, cbs=[automatic(teacher), SaveModelCallback(every_epoch=True, with_opt=True)])
    second, teacher = toy(opt_func=SGD, path=tmp_path)
    second.create_opt()
    second.load('model_0', weights_only=False)
    cb2 = automatic(teacher)
    second.fit(1, 0.1, cbs=cb2)
    assert cb2.distiller.ratios  # a recipe with measured gradients was chosen
    assert cb2.distiller.head.chosen_text == cb.distiller.head.chosen_text
    assert cb2.distiller.ratios.state_dict() == cb.distiller.ratios.state_dict()
    assert same(weights(straight), weights(second))


def test_a_recipe_is_not_chosen_anew_after_a_load(tmp_path, capsys):
    "Not even if the teacher has become so sure that a higher temperature would be chosen"
    first, teacher = toy(path=tmp_path)
    cb = automatic(teacher)
    first.fit(1, 0.01, cbs=[cb, SaveModelCallback(with_opt=True)])
    sure, other = toy(path=tmp_path)
    with torch.no_grad():
        for p in [*other.parameters()][-2:]:
            p *= 5
    alone = automatic(other)
    sure.fit(1, 0.01, cbs=alone)
    second, _ = toy(path=tmp_path)
    second.create_opt()
    second.load('model', weights_only=False)
    second.logger = print
    again = automatic(other)
    second.fit(1, 0.01, cbs=again)
    assert alone.distiller.head.chosen_text != cb.distiller.head.chosen_text
    assert again.distiller.head.chosen_text == cb.distiller.head.chosen_text
    assert again.recipe.terms[0].options == cb.recipe.terms[0].options
    chosen = cb.distiller.head.chosen_text
    assert f'recipe {chosen}, as before' in capsys.readouterr().out


def test_lr_find_neither_measures_gradients_for_the_fit_nor_keeps_its_own(tmp_path):
    student, teacher = toy(opt_func=SGD, path=tmp_path)
    cb = automatic(teacher)
    student.fit(1, 0.1, cbs=cb)
    before = cb.distiller.ratios.state_dict()
    with student.added_cbs(cb):
        student.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert cb.distiller.ratios.state_dict() == before


@pytest.mark.parametrize('opt_func', OPTS[:4], ids=['Adam', 'Lamb', 'ranger', 'AdamW'])
def test_state_dict_is_read_without_running_code(opt_func):
    student, teacher = toy(opt_func=opt_func)
    cb, file = KD(teacher), io.BytesIO()
    student.fit(1, 0.01, cbs=cb)
    torch.save(cb.state_dict(), file)
    file.seek(0)
    other = KD(teacher)
    other.load_state_dict(torch.load(file, weights_only=True))

    class First(Callback):
        def before_train(self):
            assert same(projectors(cb), projectors(other))

    student.fit(1, 0.01, cbs=[other, First()])


def test_what_continues_is_said(tmp_path, capsys):
    student, teacher = toy(path=tmp_path)
    student.fit(1, 0.01, cbs=[KD(teacher), SaveModelCallback(with_opt=True)])
    student.load('model', weights_only=False)
    student.logger = print
    capsys.readouterr()
    student.fit(1, 0.01, cbs=KD(teacher))
    assert (
        'loaded the projectors and their optimizer from model.distill.pth'
        in capsys.readouterr().out
    )
    student.fit(1, 0.01, cbs=KD(teacher))
    assert 'continue from' not in capsys.readouterr().out  # once


def test_projectors_of_another_recipe_are_not_used(tmp_path, capsys):
    student, teacher = toy(path=tmp_path)
    student.fit(1, 0.01, cbs=[KD(teacher), SaveModelCallback(with_opt=True)])
    student.load('model', weights_only=False)
    student.logger = print
    cb = KD(teacher, Term(losses.hint, layers={'2': '2'}))
    student.fit(1, 0.01, cbs=cb)
    assert (
        'model.distill.pth contains projectors of different terms or layers'
        in capsys.readouterr().out
    )
    state = cb.state_dict()
    other = KD(teacher)
    other.load_state_dict(state)
    with pytest.raises(
        DistillError,
        match='This state contains projectors of different terms or layers .hint.*with the recipe it was saved with',
    ):
        student.fit(1, 0.01, cbs=other)


@pytest.mark.parametrize('wrong', ['recipe', 'optimizer'])
def test_a_fit_that_fails_at_its_start_leaves_the_saved_projectors(tmp_path, wrong):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    cb = student.distill(teacher, 1, 0.01, recipe(), check=False)
    student.save('half')
    want, state = projectors(cb), copy.deepcopy(cb.state_dict())
    if wrong == 'recipe':
        del state['links']['vid.0.projector.map.weight']
    else:
        state['opt'] = 3
        state['links'] = {k: v + 1 for k, v in state['links'].items()}
    cb.load_state_dict(state)
    with pytest.raises((DistillError, TypeError)):
        student.fit(1, 0.0, cbs=cb)
    assert same(projectors(cb), want)

    again, teacher = toy(path=tmp_path, opt_func=Adam)
    again.create_opt()
    again.load('half', weights_only=False)
    cb = KD(teacher)
    cb.load_state_dict(state)
    with pytest.raises((DistillError, TypeError)):
        again.fit(1, 0.0, cbs=cb)
    again.save('half')
    file = torch.load(tmp_path / 'models' / 'half.distill.pth', weights_only=True)
    assert same(list(file['links'].values()), want)
    again.fit(1, 0.0, cbs=cb)
    assert same(projectors(cb), want)


def test_a_state_of_something_else_is_refused_at_once():
    _, teacher = toy()
    with pytest.raises(DistillError, match='has no distiller, links, opt. It has 0.weight, 0.bias'):
        KD(teacher).load_state_dict(teacher.state_dict())


def test_the_students_file_is_the_same_as_without_distillation(tmp_path):
    files = []
    for layers in (False, True):
        student, teacher = toy(path=tmp_path, opt_func=Adam)
        student.fit(
            1,
            0.01,
            cbs=[
                *([KD(teacher)] if layers else []),
                SaveModelCallback(fname=str(layers), with_opt=True),
            ],
        )
        files.append(torch.load(tmp_path / 'models' / f'{layers}.pth', weights_only=False))
    a, b = files
    assert (
        a.keys() == b.keys()
        and a['model'].keys() == b['model'].keys()
        and len(a['opt']['state']) == len(b['opt']['state'])
    )
    assert sorted(f.name for f in (tmp_path / 'models').iterdir()) == [
        'False.pth',
        'True.distill.pth',
        'True.pth',
    ]


def test_without_the_optimizer_or_without_projectors_there_is_no_file(tmp_path):
    student, teacher = toy(path=tmp_path)
    files = lambda: sorted(f.name for f in (tmp_path / 'models').glob('*'))
    student.fit(1, 0.01, cbs=[KD(teacher), SaveModelCallback(fname='a')])
    student.fit(1, 0.01, cbs=[KD(teacher, kd()), SaveModelCallback(fname='b', with_opt=True)])
    assert files() == ['a.pth', 'b.pth']
    student.fit(1, 0.01, cbs=[KD(teacher), SaveModelCallback(fname='a', with_opt=True)])
    assert files() == ['a.distill.pth', 'a.pth', 'b.pth']
    student.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    student.save(io.BytesIO())
    assert files() == ['a.distill.pth', 'a.pth', 'b.pth']
    other, _ = toy(
        path=tmp_path
    )  # another student under the same name: those projectors were not trained with it
    other.create_opt()
    other.save('a')
    assert files() == ['a.pth', 'b.pth']


def test_a_student_that_is_saved_after_the_fit_keeps_its_projectors(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    cb = student.distill(teacher, 1, 0.01, recipe(), check=False)
    want = projectors(cb)
    student.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    del cb
    student.save('half')
    again, _ = toy(path=tmp_path, opt_func=Adam, seed=3)
    again.load('half', weights_only=False)
    cb = KD(teacher)
    again.fit(1, 0.0, cbs=cb)
    assert (
        same(projectors(cb), want) and cb.state.optimizer.state_dict()['state'][0]['step'] == 8
    )  # 4 steps before, 4 now


def half_written(state, file):
    (file if hasattr(file, 'write') else open(file, 'wb')).write(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_save_without_space_keeps_the_projectors_that_were_there(tmp_path, monkeypatch):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    student.distill(teacher, 1, 0.01, recipe(), check=False)
    student.save('half')
    file = tmp_path / 'models' / 'half.distill.pth'
    before = file.read_bytes()
    save = torch.save
    fails = lambda o, f, **kw: (
        half_written(o, f) if 'distill' in str(getattr(f, 'name', f)) else save(o, f, **kw)
    )
    monkeypatch.setattr(torch, 'save', fails)
    with pytest.raises(DistillError, match='No space for .*half.distill.pth'):
        student.save('half')
    assert file.read_bytes() == before
    assert sorted(p.name for p in file.parent.iterdir()) == ['half.distill.pth', 'half.pth']


@pytest.mark.parametrize('content', [b'', b'hello', [1]])
def test_damaged_projectors_are_named(content, tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    student.distill(teacher, 1, 0.01, recipe(), check=False)
    student.save('half')
    file = tmp_path / 'models' / 'half.distill.pth'
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(
        DistillError, match='half.distill.pth is damaged .*: remove it to load only the student'
    ):
        student.load('half', weights_only=False)


def test_projectors_that_were_loaded_are_saved_again_and_those_of_other_weights_are_not(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    student.create_opt()
    student.save('plain')
    student.distill(teacher, 1, 0.01, recipe(), check=False)
    student.save('half')
    file = tmp_path / 'models' / 'half.distill.pth'
    before = torch.load(file, weights_only=True)['links']
    student.load('half', weights_only=False)
    student.save('half')
    assert same([*torch.load(file, weights_only=True)['links'].values()], [*before.values()])
    student.load('plain', weights_only=False)
    student.save('half')
    assert not file.exists()


@pytest.mark.filterwarnings('ignore:.*The task loss on the validation set rose')
@pytest.mark.filterwarnings('ignore:The labels. loss on the validation set rose')
def test_the_best_students_projectors_are_those_that_are_loaded(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    cb, seen = KD(teacher), []

    class Keep(Callback):
        def after_epoch(self):
            seen.append((weights(self.learn), projectors(cb)))

    first_is_best = SaveModelCallback(
        with_opt=True, comp=lambda a, b: b == -float('inf') or a < -1e9
    )
    student.fit(3, 0.05, cbs=[cb, Keep(), first_is_best])
    assert same(weights(student), seen[0][0])
    state = cb.state_dict()
    student.fit(1, 0.0, cbs=cb)
    assert (
        same(projectors(cb), seen[0][1])
        and not same(seen[0][1], seen[2][1])
        and state['opt'] is not None
    )


def test_the_best_students_projectors_are_saved_again_after_the_fit(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    cb = KD(teacher)
    student.fit(2, 0.05, cbs=[cb, SaveModelCallback(with_opt=True)])
    student.save('again')
    links = [
        [*torch.load(tmp_path / 'models' / f'{n}.distill.pth', weights_only=True)['links'].values()]
        for n in ('model', 'again')
    ]
    assert same(*links)


def test_a_callback_on_the_learner_is_saved_and_loaded_with_it(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    cb = KD(teacher)
    student.add_cb(cb)
    student.fit(1, 0.01)
    student.save('half')
    before = projectors(cb)
    student.fit(1, 0.01)
    student.load('half', weights_only=False)
    student.fit(1, 0.0)
    assert same(projectors(cb), before)


def test_a_state_that_is_loaded_in_mid_fit_counts_at_once(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    cb = KD(teacher)

    class Back(Callback):
        order = 70

        def after_epoch(self):
            if self.epoch == 0:
                self.learn.save('first')
                self.saved = projectors(cb)
            else:
                self.learn.load('first', weights_only=False)
                assert same(projectors(cb), self.saved)

    student.fit(2, 0.01, cbs=[cb, Back()])


def test_lr_find_takes_no_loaded_state_away(tmp_path):
    student, teacher = toy(path=tmp_path)
    student.fit(1, 0.01, cbs=[KD(teacher), SaveModelCallback(with_opt=True)])
    student.load('model', weights_only=False)
    saved = torch.load(tmp_path / 'models' / 'model.distill.pth', weights_only=True)['links']
    with student.added_cbs(KD(teacher)):
        student.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    cb = KD(teacher)
    student.fit(1, 0.0, cbs=cb)
    assert same([*cb.distiller.links.state_dict().values()], [*saved.values()])


def test_measured_gradients_are_kept_too(tmp_path):
    student, teacher = pair('image')
    student.path = tmp_path
    make = lambda: KD(
        teacher, kd(alpha=0.5) + Term(losses.at, grad_ratio=0.2, layers={'0.1': '0.1'})
    )
    cb = make()
    student.fit(1, 0.01, cbs=[cb, SaveModelCallback(with_opt=True)])
    student.load('model', weights_only=False)
    again = make()
    student.fit(1, 0.01, cbs=again)
    a, b = cb.distiller.ratios['at'], again.distiller.ratios['at']
    assert b.batches == 2 * a.batches


@pytest.mark.filterwarnings('ignore::fastdistill.base.errors.DistillWarning')
def test_the_recipe_chosen_for_two_classes_continues(tmp_path):
    "It measures no gradients, and depends on what the check of the first fit found"

    def two_classes():
        learn, _ = toy(path=tmp_path)
        x, y = apps.rows()
        items = list(zip(x, (y > 1).long()))
        learn.dls = DataLoaders.from_dsets(items[:64], items[64:], bs=16, shuffle=False)
        learn.model = torch.nn.Linear(8, 2)
        return learn

    torch.manual_seed(3)
    weak = torch.nn.Linear(8, 2)
    first, cb = two_classes(), KnowledgeDistillation(weak)
    first.fit(1, 0.01, cbs=cb)
    assert cb.distiller.head.chosen_text == 'kd(T=1, alpha=.3)'
    first.save('half')
    by_file, by_hand = automatic(weak), automatic(weak)
    by_hand.load_state_dict(cb.state_dict())
    for again, load in ((by_file, True), (by_hand, False)):
        second = two_classes()
        second.create_opt()
        if load:
            second.load('half', weights_only=False)
        second.fit(1, 0.01, cbs=again)
        assert again.distiller.head.chosen_text == 'kd(T=1, alpha=.3)'
        assert again.recipe.task == 0.7


@pytest.mark.parametrize('way', ['load', 'load_state_dict', 'lr_find'])
def test_weights_from_elsewhere_have_no_measured_gradients(way, tmp_path):
    "The next fit is that of a new callback. After lr_find, the weights and what was measured continue"
    student, teacher = toy(opt_func=SGD, path=tmp_path)
    student.save('begin')
    begin = {k: v.clone() for k, v in student.model.state_dict().items()}
    cb = automatic(teacher)
    student.fit(1, 0.1, cbs=cb)
    measured = cb.distiller.ratios['dist'].batches
    if way == 'load':
        student.load('begin', with_opt=False)
    elif way == 'load_state_dict':
        student.model.load_state_dict(begin)
    else:
        with student.added_cbs(cb):
            student.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    student.opt = None
    student.fit(1, 0.1, cbs=cb)
    if way == 'lr_find':
        assert cb.distiller.ratios['dist'].batches == 2 * measured
        return
    new, teacher = toy(opt_func=SGD, path=tmp_path)
    fresh = automatic(teacher)
    new.fit(1, 0.1, cbs=fresh)
    assert same(weights(student), weights(new))
    assert cb.distiller.ratios.state_dict() == fresh.distiller.ratios.state_dict()
