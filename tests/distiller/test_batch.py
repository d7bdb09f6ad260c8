"Which positions of a batch count, and where its labels stand: labels that are ignored, MixUp's second labels, padding, next tokens."

from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastdistill import (
    DistillError,
    Distiller,
    Outputs,
    Recipe,
    Term,
    auto,
    dkd,
    kd,
    losses,
    soft_labels,
)

VOCAB = 11


def logits(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    s, t = [torch.randn(*shape, generator=g, dtype=torch.float64) * 3 for _ in range(2)]
    return s.requires_grad_(), t


def value_and_grad(v, s):
    return v.item(), torch.autograd.grad(v, s)[0]


def same(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-9)
    torch.testing.assert_close(a[1], b[1])


class LM(nn.Module):
    "A language model of one layer: what it predicts at a position depends on the token there"

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, input_ids, attention_mask=None):
        return dict(logits=self.out(self.embed(input_ids)))


def tokens(b=3, l=7, seed=0):
    return torch.randint(VOCAB, (b, l), generator=torch.Generator().manual_seed(seed))


# labels that are ignored


@pytest.mark.parametrize(
    'recipe',
    [kd(2.0, 0.5), kd(2.0, 1.0), dkd(beta=2.0), Recipe(Term(losses.dist), Term(losses.mse))],
    ids=['kd', 'alpha=1', 'dkd', 'sum'],
)
@pytest.mark.parametrize('ignore', [-100, 255])
def test_ignored_labels_of_flat_logits_do_not_count(recipe, ignore):
    s, t = logits(8, 5)
    y = torch.arange(8) % 5
    y[[1, 4, 5]] = ignore
    on = y != ignore
    got = value_and_grad(recipe(s, t, y, ignore_index=ignore), s)
    same(got, value_and_grad(recipe(s[on], t[on], y[on]), s))
    assert (got[1][~on] == 0).all()


def test_ignored_labels_of_a_table_do_not_count_either():
    s, t = logits(6, 5)
    y = torch.tensor([0, 1, -100, 3, -100, 2])
    same(
        value_and_grad(kd()(s, t, y[:, None]), s), value_and_grad(kd()(s, t, y), s)
    )  # tabular labels have shape (B, 1)


def test_a_loss_function_says_which_label_it_ignores():
    s, t = logits(6, 5)
    y = torch.tensor([0, 1, 4, 3, 4, 2])
    for task_loss in (
        nn.CrossEntropyLoss(ignore_index=4),
        partial(F.cross_entropy, ignore_index=4),
    ):
        assert Distiller(None, None, kd(), task_loss=task_loss).head.task.ignore_index == 4
        same(
            value_and_grad(kd()(s, t, y, task_loss=task_loss), s),
            value_and_grad(kd()(s, t, y, ignore_index=4), s),
        )


def test_a_batch_whose_labels_are_all_ignored_gives_0_and_not_nan():
    s, t = logits(4, 5)
    v, g = value_and_grad(soft_labels()(s, t, torch.full((4,), -100)), s)
    assert v == 0 and (g == 0).all()


def test_on_a_gpu_no_look_is_taken_at_the_labels(monkeypatch):
    "There, all positions get a mask, and nothing changes by it"
    s, t = logits(2, 5, 3, 4)
    y = torch.randint(5, (2, 3, 4))
    recipe = kd(2.0, 0.5) + Recipe(Term(losses.cwd), Term(losses.dist))
    here = value_and_grad(recipe(s, t, y), s)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    same(value_and_grad(recipe(s, t, y), s), here)


@pytest.mark.parametrize(
    'loss',
    [
        losses.at,
        losses.nst,
        losses.sp,
        losses.rkd,
        losses.cc,
        losses.pkt,
        losses.ickd,
        losses.pairwise,
    ],
    ids=lambda f: f.__name__,
)
def test_a_loss_that_compares_samples_leaves_out_those_without_any_label(loss):
    s, t = logits(3, 5, 4, 4)
    y = torch.randint(5, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    y[0, :2], y[1] = -100, -100
    got = Recipe(Term(loss), task=0.0)(s, t, y)
    assert got.item() == pytest.approx(loss(s, t, mask=torch.tensor([True, False, True])).item())


# two labels a sample


def mixed(recipe, s, t, y, other, share):
    d = Distiller(None, None, recipe)
    return d.compute(Outputs(s), Outputs(t), None, (y,), mixed=((other,), share)).total


@pytest.mark.parametrize(
    'share', [torch.tensor([0.7, 0.7, 0.7, 0.7]), torch.tensor(0.7)], ids=['MixUp', 'CutMix']
)
def test_a_mixed_position_counts_as_far_as_its_labels_do(share):
    s, t = logits(4, 5)
    y, other = torch.tensor([0, -100, 2, -100]), torch.tensor([1, 2, -100, -100])
    each = losses.kl(s, t, reduction='none')
    want = (each * torch.tensor([1.0, 0.3, 0.7, 0.0])).sum() / 2
    same(value_and_grad(mixed(soft_labels(4.0), s, t, y, other, share), s), value_and_grad(want, s))


def test_a_loss_that_reads_labels_counts_each_by_its_share():
    s, t = logits(4, 5)
    y, other, share = (
        torch.tensor([0, -100, 2, -100]),
        torch.tensor([1, 2, -100, -100]),
        torch.tensor([0.7, 0.6, 0.5, 0.9], dtype=torch.float64),
    )
    a, b = [losses.dkd(s, t, o, reduction='none') for o in (y, other)]
    want = (share * a + (1 - share) * b).sum() / (1.0 + 0.4 + 0.5 + 0.0)
    same(
        value_and_grad(mixed(Recipe(dkd(), task=0.0), s, t, y, other, share), s),
        value_and_grad(want, s),
    )


def test_mixed_labels_that_all_count_give_the_plain_mean():
    s, t = logits(4, 5)
    y, other, share = (
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([0.7, 0.6, 0.5, 0.9]),
    )
    assert mixed(soft_labels(4.0), s, t, y, other, share).item() == pytest.approx(
        losses.kl(s, t).item()
    )


# padding


def test_padded_tokens_do_not_count():
    ids = tokens()
    on = torch.ones_like(ids)
    on[0, 4:], on[2, :2] = 0, 0
    d = Distiller(LM(), LM(1), soft_labels(2.0), axis=-1)
    rows = [m(ids)['logits'][on > 0] for m in (d.student, d.teacher.module)]
    for mask in (on, on.bool()):
        got = d(dict(input_ids=ids, attention_mask=mask)).total
        assert got.item() == pytest.approx(losses.kl(*rows, T=2.0).item(), rel=1e-5)
    assert d(dict(input_ids=ids)).total.item() != pytest.approx(got.item(), rel=1e-3)


def test_padding_and_ignored_labels_both_count():
    ids = tokens()
    on, y = torch.ones_like(ids), ids.roll(-1, 1)
    on[0, 4:], y[1, :3] = 0, -100
    d = Distiller(LM(), LM(1), kd(2.0, 0.5), axis=-1)
    rows = [m(ids)['logits'][(on > 0) & (y != -100)] for m in (d.student, d.teacher.module)]
    out = d(dict(input_ids=ids, attention_mask=on), y)
    assert out.parts['kd'].item() == pytest.approx(losses.kl(*rows, T=2.0).item(), rel=1e-5)


def test_an_attention_mask_says_nothing_of_one_prediction_a_text():
    class Classifier(LM):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)['logits'].mean(1)

    ids, on = tokens(), torch.zeros(3, 7)
    x = dict(input_ids=ids, attention_mask=on)
    assert Distiller(Classifier(), Classifier(1), soft_labels())(x).total.item() > 0


# next tokens


def by_hand(d, ids, y):
    "kd(2, .5) of the positions that predict a label: each predicts the next position's"
    s, t = [m(ids)['logits'][:, :-1][y[:, 1:] != -100] for m in (d.student, d.teacher.module)]
    return 0.5 * losses.kl(s, t, T=2.0) + 0.5 * F.cross_entropy(s, y[:, 1:][y[:, 1:] != -100])


@pytest.mark.parametrize('hidden', [False, True], ids=['all', 'prompt'])
def test_labels_that_stand_where_their_tokens_stand_are_moved_to_where_they_are_predicted(
    hidden, capsys
):
    ids = tokens()
    y = ids.clone()
    if hidden:
        y[:, :3] = -100
    d = Distiller(LM(), LM(1), kd(2.0, 0.5), axis=-1)
    for _ in range(2):
        assert d(dict(input_ids=ids), y).total.item() == pytest.approx(
            by_hand(d, ids, y).item(), rel=1e-5
        )
    assert (
        d.head.task_loss.shift
        and capsys.readouterr().out.count('labels are the inputs themselves') == 1
    )


def test_labels_that_stand_where_they_are_predicted_stay_there(capsys):
    ids = tokens()
    y = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    for x in (ids, dict(input_ids=ids)):
        d = Distiller(LM(), LM(1), kd(2.0, 0.5), axis=-1)
        assert (
            d(x, y).total.item()
            == pytest.approx(by_hand(d, ids, F.pad(y, (1, 0))[:, :-1]).item(), rel=1e-5)
            and d.head.task_loss.shift is False
        )
    assert capsys.readouterr().out == ''


def test_a_task_loss_of_ones_own_gets_the_labels_as_they_are():
    ids = tokens()
    own = lambda s, y: F.cross_entropy(
        s[:, :-1].flatten(0, 1), y[:, 1:].flatten()
    )  # as Hugging Face's models do
    a, b = [
        Distiller(LM(), LM(1), kd(2.0, 0.5), axis=-1, task_loss=f)(ids, ids).total.item()
        for f in (own, None)
    ]
    assert a == pytest.approx(b, rel=1e-6)


def test_labels_of_tokens_are_no_next_tokens():
    ids, tags = tokens(), tokens(seed=1)
    d = Distiller(LM(), LM(1), kd(2.0, 0.0), axis=-1)
    assert d(ids, tags).total.item() == pytest.approx(
        F.cross_entropy(d.student(ids)['logits'].flatten(0, 1), tags.flatten()).item()
    )
    assert d.head.task_loss.shift is False


def test_a_causal_model_whose_labels_show_nothing_asks():
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    student, teacher = [transformers.GPT2LMHeadModel(config) for _ in range(2)]
    x, y = dict(input_ids=tokens()), tokens(seed=1)
    with pytest.raises(
        DistillError,
        match='the alignment of these labels cannot be detected.*shift_labels=True to the Distiller.*shift_labels=False',
    ):
        Distiller(student, teacher, kd(), axis=-1)(x, y)
    for shift in (True, False):
        assert Distiller(student, teacher, kd(), axis=-1, shift_labels=shift)(x, y).total.isfinite()
    d = Distiller(student, teacher, kd(), axis=-1)
    assert (
        d(x, torch.full_like(y, -100)).task.isnan() and d.head.task_loss.shift is None
    )  # a batch without labels shows nothing
    d(x, x['input_ids'])
    assert d.head.task_loss.shift


# the task loss


@pytest.mark.parametrize(
    'kind,y,by_hand',
    [
        ('softmax', torch.tensor([0, 1, 2, 3]), F.cross_entropy),
        ('softmax', torch.tensor([[0], [1], [2], [3]]), lambda s, y: F.cross_entropy(s, y[:, 0])),
        ('softmax', torch.eye(5, dtype=torch.float64)[:4], F.cross_entropy),
        (
            'sigmoid',
            torch.eye(5, dtype=torch.long)[:4],
            lambda s, y: F.binary_cross_entropy_with_logits(s, y.double()),
        ),
        ('regression', torch.ones(4, 5), lambda s, y: F.mse_loss(s, y.double())),
        ('regression', torch.ones(20), lambda s, y: F.mse_loss(s, y.double().view(4, 5))),
    ],
    ids=['classes', 'table', 'probabilities', 'labels', 'numbers', 'flat'],
)
def test_the_labels_own_loss_is_chosen_by_kind(kind, y, by_hand):
    s, t = logits(4, 5)
    v = kd(2.0, 0.5)(s, t, y, kind=kind)
    assert v.item() == pytest.approx(
        (0.5 * losses.soft_targets(s, t, kind=kind, T=2.0) + 0.5 * by_hand(s, y)).item()
    )


@pytest.mark.parametrize('axis', [1, -1, 2])
def test_the_labels_own_loss_knows_the_class_axis(axis):
    s, t = logits(2, 5, 3, 4)
    y = torch.randint(5, (2, 3, 4))
    y[0, 1] = -100
    got = kd(2.0, 0.0)(s.movedim(1, axis), t.movedim(1, axis), y, axis=axis)
    assert got.item() == pytest.approx(F.cross_entropy(s, y).item())


@pytest.mark.parametrize(
    'task_loss,kind',
    [
        (nn.BCEWithLogitsLoss(), 'sigmoid'),
        (nn.MSELoss(), 'regression'),
        (F.l1_loss, 'regression'),
        (lambda s, y: s.mean(), 'softmax'),
        (nn.CrossEntropyLoss(), 'softmax'),
    ],
)
def test_a_loss_function_that_is_known_says_the_kind(task_loss, kind):
    assert Distiller(None, None, kd(), task_loss=task_loss).head.task.kind == kind


@pytest.mark.parametrize(
    'make,says',
    [
        (
            lambda s, t: Distiller(
                None, None, kd(), kind='softmax', task_loss=nn.BCEWithLogitsLoss()
            ),
            "kind='softmax', but task_loss=BCEWithLogitsLoss.. is for kind='sigmoid'",
        ),
        (
            lambda s, t: Distiller(None, None, kd(), task_loss=nn.BCELoss()),
            'takes probabilities, so the model ends in a sigmoid',
        ),
        (
            lambda s, t: kd()(s, t, torch.zeros(2, 3, dtype=torch.long)),
            r'logits, of shape \(3, 5, 2\), have their classes on axis 1, but the labels have shape \(2, 3\).$',
        ),
        (
            lambda s, t: kd()(s, t, torch.zeros(3, 5, dtype=torch.long)),
            r'labels have shape \(3, 5\). They fit classes along axis 2: pass axis=2',
        ),
        (
            lambda s, t: kd()(s, t, torch.zeros(3), kind='regression'),
            r'labels have shape \(3,\), the student.s outputs \(3, 5, 2\): both need the same number',
        ),
        (
            lambda s, t: kd()(s, t, torch.zeros(5, 3, 2), kind='regression'),
            r'labels have shape \(5, 3, 2\), .* \(3, 5, 2\): .* the same number of values per sample',
        ),
        (
            lambda s, t: kd()(s[:, :, 0], t[:, :, 0], torch.zeros(5, 3), kind='sigmoid'),
            r'labels have shape \(5, 3\), the student.s outputs \(3, 5\)',
        ),
        (
            lambda s, t: kd()(s, t, torch.zeros(3, 2), torch.zeros(3)),
            'These batches have 2 targets: pass task_loss=',
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(make, says):
    with pytest.raises(DistillError, match=says):
        make(*logits(3, 5, 2))


@pytest.mark.parametrize(
    'outputs,labels',
    [
        ((4, 6), (4, 3, 2)),
        ((4, 3, 2), (4, 6)),
        ((4, 1), (4,)),
        ((4,), (4, 1)),
        ((4, 2), (8,)),
        ((8,), (4, 2)),
    ],
)
def test_labels_of_numbers_may_be_flat_or_lack_axes_of_length_1(outputs, labels):
    s, t, y = torch.randn(outputs), torch.randn(outputs), torch.randn(labels)
    loss = kd(alpha=0)(s, t, y, kind='regression')
    torch.testing.assert_close(loss, (s.flatten() - y.flatten()).pow(2).mean())


# outputs that are computed elsewhere, such as stored ones


def student_and_teacher_outputs():
    torch.manual_seed(0)
    s, t = torch.randn(16, 5, requires_grad=True), torch.randn(16, 5)
    return s, t, torch.randint(5, (16,))


def test_compute_chooses_the_default_recipe_from_the_outputs(capsys):
    s, t, y = student_and_teacher_outputs()
    d = Distiller(nn.Linear(3, 5), nn.Linear(3, 5))
    loss = d.compute(Outputs(s), Outputs(t), F.cross_entropy(s, y), (y,))
    chosen = auto(classes=5, teacher=t)
    assert loss.parts.keys() == {'dist'}
    assert chosen.text in capsys.readouterr().out


def test_compute_without_a_teacher_chooses_from_stored_outputs():
    s, t, y = student_and_teacher_outputs()
    d = Distiller(nn.Linear(3, 5), None)
    assert d.compute(Outputs(s), Outputs(t), F.cross_entropy(s, y), (y,)).parts.keys() == {'dist'}


def test_a_distiller_with_nothing_to_distill_is_refused():
    s, _, y = student_and_teacher_outputs()
    d = Distiller(nn.Linear(3, 5), None)
    with pytest.raises(DistillError, match='no recipe, no teacher and no teacher output'):
        d.compute(Outputs(s), None, F.cross_entropy(s, y), (y,))
    with pytest.raises(DistillError, match='Pass a teacher or a recipe to the Distiller'):
        d(torch.randn(16, 3), y)
