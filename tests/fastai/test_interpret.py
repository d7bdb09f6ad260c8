"Where a student departs from its teacher: the same distances as in a plain loop, in the order of the items, and shown."

import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
from apps import APPS, FASTAI_WARNINGS, logits, pair, plain, same, snapshot
from fastai.basics import CrossEntropyLossFlat, L
from fastdistill.fastai import DistillError, DistillInterpretation, Teacher

pytestmark = [
    pytest.mark.filterwarnings(w)
    for w in [*FASTAI_WARNINGS, 'ignore:__array__ implementation:DeprecationWarning']
]
ITEMS = [a for a in APPS if a.name != 'language_model']


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')


def alone(learn, model, i):
    "The logits of one item, in a batch of its own"
    items = getattr(learn.dls.valid.items, 'iloc', L(learn.dls.valid.items))[[i]]
    options = dict(process=False) if hasattr(learn.dls, 'procs') else {}
    b = plain(learn.dls.test_dl(items, with_labels=True, **options).one_batch())
    model.eval()
    if hasattr(model, 'reset'):
        model.reset()
    with torch.no_grad():
        return logits(model(*b[:-1])).double()


@pytest.mark.parametrize('app', ITEMS, ids=lambda a: a.name)
def test_each_item_has_its_own_distance(app):
    student, teacher = pair(app)
    were = snapshot(student.model), snapshot(teacher.model)
    interp = DistillInterpretation.from_learner(student, teacher)
    assert same(were[0], snapshot(student.model)) and same(were[1], snapshot(teacher.model))
    n = len(student.dls.valid_ds)
    assert interp.losses.shape == (n,) and (interp.losses > 0).all()
    for i in (0, 5, n - 1):
        s, t = alone(student, student.model, i), alone(student, teacher.model, i)
        assert interp.losses[i].item() == pytest.approx(app.divergence(s, t).item(), rel=2e-3)
    values, idx = interp.top_losses(3)
    assert (
        values.tolist() == sorted(interp.losses.tolist())[::-1][:3] == interp.losses[idx].tolist()
    )


def test_of_several_labels_and_pixels_the_mean_counts():
    student, teacher = pair('unet')
    interp = DistillInterpretation.from_learner(student, teacher)
    s, t = alone(student, student.model, 2), alone(student, teacher.model, 2)
    p, q = t.softmax(1), s.softmax(1)
    assert interp.losses[2].item() == pytest.approx(
        (p * (p / q).log()).sum(1).mean().item(), rel=1e-3
    )


def test_pixels_that_the_loss_ignores_do_not_count():
    student, teacher = pair('unet')
    for learn in (student, teacher):
        learn.loss_func = CrossEntropyLossFlat(axis=1, ignore_index=0)
    interp = DistillInterpretation.from_learner(student, teacher)
    s, t = alone(student, student.model, 2), alone(student, teacher.model, 2)
    y = student.dls.valid_ds[2][1]
    counts = torch.as_tensor(np.array(y)) != 0
    assert 0 < counts.sum() < counts.numel()
    p, q = t.softmax(1), s.softmax(1)
    wanted = (p * (p / q).log()).sum(1)[0][counts].mean().item()
    assert interp.losses[2].item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize('name', ['image', 'multi_label', 'unet'])
def test_top_losses_are_plotted(name):
    student, teacher = pair(name)
    DistillInterpretation.from_learner(student, teacher).plot_top_losses(4)
    assert plt.get_fignums()


@pytest.mark.parametrize('app', ITEMS, ids=lambda a: a.name)
def test_disagreements_are_shown_in_every_application(app, capsys):
    student, teacher = pair(app)
    interp = DistillInterpretation.from_learner(student, teacher)
    interp.show_disagreements(3)
    assert plt.get_fignums() or capsys.readouterr().out


def test_different_classes_come_first_and_the_teachers_stands_above_the_students():
    student, teacher = pair('image')
    interp = DistillInterpretation.from_learner(student, teacher)
    n = len(student.dls.valid_ds)
    interp.show_disagreements(n)
    _, idx = interp.top_losses()
    names = student.dls.vocab
    titles = [
        [names[alone(student, m, i).argmax()] for m in (teacher.model, student.model)]
        for i in idx.tolist()
    ]
    different = [t != s for t, s in titles]
    assert any(different) and not all(different), 'this test needs both'
    assert different != sorted(different, reverse=True), 'the distances alone have this order'
    wanted = ['\n'.join(o) for o in sorted(titles, key=lambda o: o[0] == o[1])]
    fig = plt.gcf()
    assert fig.get_suptitle() == 'Teacher/Student'
    assert [a.get_title() for a in fig.axes if a.get_title()] == wanted


def test_texts_are_shown_as_texts(capsys):
    from fastai.text.all import (
        AWD_LSTM,
        BaseTokenizer,
        TextDataLoaders,
        pd,
        text_classifier_learner,
    )

    df = pd.DataFrame(
        dict(
            text=['good film', 'bad film', 'a good song', 'a bad song'] * 4,
            label=['yes', 'no'] * 8,
            is_valid=[False] * 8 + [True] * 8,
        )
    )
    dls = TextDataLoaders.from_df(
        df,
        text_col='text',
        label_col='label',
        valid_col='is_valid',
        tok=BaseTokenizer(),
        bs=4,
        num_workers=0,
        n_workers=0,
    )
    student, teacher = [text_classifier_learner(dls, AWD_LSTM, pretrained=False) for _ in range(2)]
    DistillInterpretation.from_learner(student, teacher).show_disagreements(2)
    assert 'film' in (out := capsys.readouterr().out) or 'song' in out


def test_a_teacher_of_the_raw_texts_is_asked_about_each_text(capsys):
    from fastai.text.all import Learner, TextDataLoaders, nn, pd
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = [f'a {w} {what}' for what in ('film', 'song', 'book') for w in ('good', 'bad', 'odd')]
    df = pd.DataFrame(dict(text=texts, label=['yes', 'no', 'no'] * 3))
    df['is_valid'] = df.index % 2 == 1
    pipeline = make_pipeline(CountVectorizer(), LogisticRegression()).fit(df.text, df.label)
    dls = TextDataLoaders.from_df(
        df,
        text_col='text',
        label_col='label',
        valid_col='is_valid',
        bs=3,
        num_workers=0,
        n_workers=0,
    )
    # every student answers "no", with a probability of 3/4
    net = nn.Sequential(nn.EmbeddingBag(len(dls.vocab[0]), 2), nn.Linear(2, 2))
    net[1].weight.data.zero_()
    net[1].bias.data = torch.tensor([3.0, 1.0]).log()
    student = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    for teacher in (
        Teacher(pipeline, items=lambda rows: rows['text']),
        [Teacher(pipeline, items=lambda rows: rows['text'])] * 2,
    ):
        interp = DistillInterpretation.from_learner(student, teacher)
        held = df[df.is_valid]
        p = pipeline.predict_proba(held.text)
        wanted = (p * np.log(p / [0.75, 0.25])).sum(1)
        assert interp.losses.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
        differ = pipeline.predict(held.text) != 'no'
        assert differ.any()
        assert interp.differ.tolist() == differ.tolist()
        capsys.readouterr()
        interp.show_disagreements(int(differ.sum()))
        rows = capsys.readouterr().out.strip().splitlines()[-differ.sum() :]
        assert [o.split()[-2:] for o in rows] == [['yes', 'no']] * differ.sum()
        assert all('good' in o for o in rows)


def test_with_itself_a_model_agrees():
    student, _ = pair('image')
    assert DistillInterpretation.from_learner(student, student).losses.abs().max() < 1e-6


def test_what_can_not_be_shown_is_refused():
    student, teacher = pair('language_model')
    with pytest.raises(DistillError, match='one long text'):
        DistillInterpretation.from_learner(student, teacher)
    student, _ = pair('image')
    with pytest.raises(DistillError, match=r'shape \(16, 3\), the teacher.s \(16, 5\)'):
        DistillInterpretation.from_learner(student, lambda x: torch.zeros(len(x), 5))
