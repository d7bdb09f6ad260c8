"Distillation from inside the network, in every fastai application that has layers; projectors, what trains them and what keeps them."

import io
import pytest, torch
from apps import (
    APPS,
    FASTAI_WARNINGS,
    Callback,
    pair,
    quiet,
    same,
    set_seed,
    snapshot,
    text_classifier,
    toy,
)
from fastdistill import DistillError
from fastdistill.fastai import KnowledgeDistillation, Term, at, hint, kd, losses, rkd, vid

pytestmark = [pytest.mark.filterwarnings(w) for w in FASTAI_WARNINGS]
LAYERED = [a for a in APPS if not a.name.startswith('collab')]
LAYERS = {'0': '0', '2': '2'}  # of the toy


class Watch(Callback):
    "Keeps what `f(kd)` says after each step"

    order = 8

    def __init__(self, kd, f):
        self.kd, self.f, self.seen = kd, f, []

    def after_step(self):
        self.seen.append(self.f(self.kd))


@pytest.mark.parametrize('app', LAYERED, ids=lambda a: a.name)
def test_paired_loss_falls_with_layers_found_by_themselves(app, capsys):
    student, teacher = pair(app)
    student.logger = print
    before = snapshot(teacher.model)
    cb = KnowledgeDistillation(teacher, Term(losses.hint, 1.0, layers='auto'), check=False)
    watch = Watch(cb, lambda kd: kd.parts['hint'].item())
    student.fit_one_cycle(4, app.lr / 3, cbs=[cb, watch])
    assert sum(watch.seen[-3:]) < 0.9 * sum(watch.seen[:3])
    assert same(before, snapshot(teacher.model))
    pairs = cb.distiller.pairs
    assert len(pairs) and all(p.s_shape[0] == p.t_shape[0] for p in pairs)
    shown = capsys.readouterr().out
    assert all(p.student in shown and p.teacher in shown for p in pairs) and 'projector' in shown


@pytest.mark.parametrize(
    'recipe',
    [lambda: at(), lambda: rkd(), lambda: vid(weight=0.1), lambda: hint(weight=1.0)],
    ids=['at', 'rkd', 'vid', 'hint'],
)
def test_recipes_with_layers_run_as_they_stand(recipe):
    student, teacher = pair('image')
    student.fit_one_cycle(2, 0.01, cbs=KnowledgeDistillation(teacher, recipe() + kd(), check=False))
    assert all(v is not None and v == v for v in student.recorder.values[-1])


def test_each_part_is_a_column():
    student, teacher = toy()
    student.fit(
        1,
        0.1,
        cbs=KnowledgeDistillation(
            teacher,
            kd() + Term(losses.hint, 0.1, layers=LAYERS) + rkd(layers={'2': '2'}),
            check=False,
        ),
    )
    assert student.recorder.metric_names == [
        'epoch',
        'train_loss',
        'valid_loss',
        'accuracy',
        'task_loss',
        'kd_loss',
        'hint_loss',
        'rkd_loss',
        'time',
    ]


def test_projectors_follow_the_students_schedule_and_stay_out_of_it(tmp_path):
    student, teacher = toy()
    names = set(student.model.state_dict())
    cb = KnowledgeDistillation(teacher, Term(losses.hint, 1.0, layers=LAYERS), check=False)
    watch = Watch(
        cb,
        lambda kd: (
            kd.state.optimizer.optimizer.hypers[-1]['lr'],
            student.opt.hypers[-1]['lr'],
            kd.state.optimizer.optimizer.hypers[-1]['mom'],
            student.opt.hypers[-1]['mom'],
        ),
    )
    student.fit_one_cycle(2, 0.1, cbs=[cb, watch])
    assert len({o[0] for o in watch.seen}) == len(watch.seen) and all(
        a == b and c == d for a, b, c, d in watch.seen
    )
    assert sum(p.numel() for p in cb.distiller.own_parameters()) == 2 * (6 * 16 + 16)
    assert set(student.model.state_dict()) == names
    student.save(tmp_path / 'student')
    saved = torch.load(tmp_path / 'student.pth', weights_only=False)
    assert set(saved['model']) == names
    assert len(saved['opt']['state']) == len(list(student.model.parameters()))


def test_a_frozen_student_still_trains_its_projectors():
    student, teacher = toy()
    for p in student.model.parameters():
        p.requires_grad_(False)
    for p in student.model[4].parameters():
        p.requires_grad_()
    cb = KnowledgeDistillation(teacher, Term(losses.hint, 1.0, layers={'2': '2'}), check=False)
    watch = Watch(cb, lambda kd: kd.distiller.own_parameters()[0].detach().clone())
    frozen = student.model[2].weight.detach().clone()
    student.fit(1, 0.1, cbs=[cb, watch])
    assert torch.equal(student.model[2].weight, frozen) and not torch.equal(
        watch.seen[0], watch.seen[-1]
    )


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path):
    def begin():
        from fastai.basics import Adam

        student, teacher = toy(opt_func=Adam)
        return student, KnowledgeDistillation(
            teacher, kd() + Term(losses.VID(), 0.1, layers=LAYERS), check=False
        )

    straight, cb = begin()
    for _ in range(2):
        straight.fit(1, 0.01, cbs=cb)
    first, cb = begin()
    first.fit(1, 0.01, cbs=cb)
    first.save(tmp_path / 'half')
    file = io.BytesIO()
    torch.save(cb.state_dict(), file)
    set_seed(99)
    second, cb = begin()
    second.create_opt()
    second.load(tmp_path / 'half', with_opt=True, weights_only=False)
    file.seek(0)
    cb.load_state_dict(torch.load(file, weights_only=True))
    second.fit(1, 0.01, cbs=cb)
    for a, b in zip(straight.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)


def test_features_of_weight_0_leave_no_bit_of_difference():
    weights = []
    for recipe in (
        None,
        kd(alpha=0)
        + Term(losses.hint, 0.0, layers='auto')
        + Term(losses.VID(), 0.0, layers='auto'),
    ):
        student, teacher = pair('image')
        set_seed(5)
        student.fit_one_cycle(
            2,
            0.01,
            cbs=[] if recipe is None else KnowledgeDistillation(teacher, recipe, check=False),
        )
        weights.append(student.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*[w.values() for w in weights]))


def test_layers_are_read_only_while_a_batch_runs():
    student, teacher = toy()
    hooks = lambda: sum(len(m._forward_hooks) for m in student.model.modules())

    class Count(Callback):
        order, during, between = 90, [], []

        def after_pred(self):
            self.during.append(hooks())

        def after_batch(self):
            self.between.append(hooks())

    student.fit(
        1,
        0.1,
        cbs=[
            Count,
            KnowledgeDistillation(teacher, Term(losses.hint, 1.0, layers=LAYERS), check=False),
        ],
    )
    assert set(Count.during) == {2} and set(Count.between) == {0}


@pytest.mark.parametrize('lengths', [(3, 5), (5, 3)])
def test_rnn_layers_that_read_texts_in_pieces_of_different_lengths_are_refused(lengths):
    "The outputs of the last pieces belong to different tokens"
    student, teacher = quiet(*text_classifier())
    student.model[0].bptt, teacher.model[0].bptt = lengths
    recipe = Term(losses.hint, layers={'0.module.rnns.1': '0.module.rnns.1'})
    match = f'in pieces of bptt={lengths[0]} tokens and the teacher in pieces of bptt={lengths[1]}'
    with pytest.raises(DistillError, match=match):
        student.distill(teacher, 1, 1e-3, recipe, check=False)
    student.model[0].bptt = teacher.model[0].bptt
    student.distill(teacher, 1, 1e-3, recipe, check=False)
