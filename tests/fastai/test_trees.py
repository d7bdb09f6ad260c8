"Teachers that are no networks: pipelines of scikit-learn and LightGBM teach tables of fastai and plain loops."

import joblib, pickle, shutil, warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
import torch.nn.functional as F
from torch import nn
import apps
from apps import toy
from fastai.basics import Callback, CancelFitException
from fastai.tabular.all import (
    Categorify,
    CategoryBlock,
    FillMissing,
    Normalize,
    RegressionBlock,
    TabularDataLoaders,
    TabularProc,
    accuracy,
    tabular_learner,
)
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from fastdistill import Distiller
from fastdistill.cache.teacher_description import identity_of
from fastdistill.fastai import (
    DistillError,
    DistillWarning,
    KnowledgeDistillation,
    Teacher,
    cache_teacher,
    compare,
    compare_recipes,
    kd,
    soft_labels,
)
from fastdistill.fastai.tables import RawRows, table_inputs, table_of
from fastdistill.fastai.task import Task
from fastdistill.fastai.teachers import teacher_of

pytestmark = [pytest.mark.filterwarnings(w) for w in apps.FASTAI_WARNINGS]
N, VALID, BS = 64, 32, 16
CATS, CONTS = ['colour', 'shape', 'level', 'sold'], ['length', 'width', 'year', 'big']


def raw(seed=0):
    "Text with gaps, categories that are numbers or booleans, numbers with gaps, whole numbers small and large"
    g, n = np.random.default_rng(seed), N + VALID
    df = apps.table(n, seed)
    df['level'], df['sold'] = g.integers(1, 4, n), g.random(n) < 0.5
    df['year'], df['big'] = g.integers(1990, 2020, n), g.integers(0, 1_400_000, n)
    df['hidden'] = g.normal(size=n)
    df['kind'] = np.where(
        df.length + df.width + (df.colour == 'red') + df.hidden > 0.4, 'long', 'short'
    )
    df.loc[::7, 'colour'] = None
    df.loc[3::5, 'width'] = np.nan
    df.index = 1000 + g.permutation(n)
    return df


def tables(df, y='kind', block=CategoryBlock, procs=(Categorify, FillMissing, Normalize), **kwargs):
    return TabularDataLoaders.from_df(
        df,
        procs=list(procs),
        cat_names=list(CATS),
        cont_names=list(CONTS),
        y_names=y,
        y_block=block(),
        valid_idx=list(range(N, len(df))),
        bs=BS,
        num_workers=0,
        **kwargs,
    )


def learner(dls):
    return tabular_learner(dls, layers=[8], metrics=accuracy)


def trees(df, columns=(*CATS, *CONTS), y='kind', model=RandomForestClassifier):
    encode = make_column_transformer(
        (OneHotEncoder(handle_unknown='ignore'), [c for c in CATS if c in columns]),
        remainder='passthrough',
    )
    return make_pipeline(encode, model(12, max_depth=4, random_state=0)).fit(
        df[list(columns)].iloc[:N], df[y].iloc[:N]
    )


def in_order(dl):
    "The inputs of all rows, and the rows' places in the DataFrame"
    return table_inputs(dl.dataset), dl.dataset.items.index


def probs(teacher, dl):
    x, _ = in_order(dl)
    return teacher(*x).logits.softmax(1)


class Counted:
    "An estimator that counts the rows of each call"

    def __init__(self, model):
        self.model, self.calls, self.classes_, self.feature_names_in_ = (
            model,
            [],
            model.classes_,
            model.feature_names_in_,
        )

    def predict_proba(self, rows):
        self.calls.append(len(rows))
        return self.model.predict_proba(rows)


class First(Callback):
    "Keep the first step's gradients and inputs, and stop"

    order = 8

    def after_backward(self):
        self.grads, self.batch = (
            [p.grad.clone() for p in self.model.parameters()],
            (self.xb, self.y),
        )
        raise CancelFitException


# fastai's tables


def test_a_forest_that_was_fitted_on_encoded_rows_teaches_as_a_function():
    dls = tables(raw())
    forest = RandomForestClassifier(4, random_state=0).fit(dls.train.xs, dls.train.y)
    table = lambda *x: pd.DataFrame(torch.cat(x, 1).numpy(), columns=dls.train.xs.columns)
    teacher = Teacher(lambda *x: torch.tensor(forest.predict_proba(table(*x))), outputs='probs')
    want = forest.predict_proba(dls.valid.xs)
    assert len(np.unique(want)) > 2
    np.testing.assert_allclose(probs(teacher, dls.valid), want, atol=1e-6)
    learner(dls).distill(teacher, 1)


def test_the_rows_are_those_before_the_transforms():
    df = raw()
    dls = tables(df)
    rows = RawRows(table_of(dls))
    for dl in dls.loaders:
        x, index = in_order(dl)
        for c in [*CATS, *CONTS]:
            have, want = rows(*x)[c].to_numpy(), df.loc[index, c].to_numpy()
            if c in ('length', 'width'):
                np.testing.assert_allclose(have.astype(float), want, rtol=1e-6, atol=1e-7)
            else:
                assert ((have == want) | (pd.isna(have) & pd.isna(want))).all(), c
    assert rows.whole == {'year', 'big'}


def test_a_pipeline_teaches_its_own_probabilities_for_every_row():
    df = raw()
    dls, pipeline = tables(df), trees(df)
    teacher = teacher_of(pipeline, learner(dls), Task('softmax'))
    for dl in dls.loaders:
        want = pipeline.predict_proba(df.loc[in_order(dl)[1], [*CATS, *CONTS]])
        np.testing.assert_allclose(probs(teacher, dl), want, atol=1e-6)


def test_a_step_is_the_labels_and_the_kl_to_the_pipeline():
    df = raw()
    dls, pipeline, first = tables(df), trees(df), First()
    student = learner(dls)
    student.fit(1, cbs=[KnowledgeDistillation(pipeline, kd(2.0, 0.7), check=False), first])
    (x, y), index = first.batch, dls.train.dataset.items.index
    # the rows of the batch, found by a plain search
    all_x = torch.cat([o.double() for o in table_inputs(dls.train.dataset)], 1)
    at = [int((all_x == row).all(1).nonzero()[0]) for row in torch.cat([o.double() for o in x], 1)]
    p = (
        torch.tensor(pipeline.predict_proba(df.loc[index[at], [*CATS, *CONTS]]))
        .float()
        .clamp_min(1e-7)
    )
    s = student.model(*x)
    loss = 0.3 * F.cross_entropy(s, y.view(-1).long()) + 0.7 * 4 * F.kl_div(
        (s / 2).log_softmax(1), (p.log() / 2).log_softmax(1), log_target=True, reduction='batchmean'
    )
    for a, b in zip(first.grads, torch.autograd.grad(loss, list(student.model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_each_row_is_predicted_once_and_perturbed_rows_once_a_batch():
    df = raw()
    pipeline = Counted(trees(df))
    student = learner(tables(df))
    student.distill(pipeline, 3, 1e-2)  # with its check, which runs the teacher on several batches
    assert pipeline.calls == [N, VALID]
    student.distill(pipeline, 1, 1e-2, unlabeled=dict(perturbed=5))
    assert pipeline.calls[:4] == [N, VALID] * 2
    new = pipeline.calls[4:]  # many a perturbed row is equal to a known one
    assert len(new) == N // BS and all(BS < n < 5 * BS for n in new)


def test_perturbed_rows_are_predicted_as_the_rows_that_they_are(monkeypatch):
    df = raw()
    dls, seen = tables(df), []
    pipeline = Counted(trees(df))
    ask = pipeline.predict_proba
    pipeline.predict_proba = lambda rows: (seen.append(rows), ask(rows))[1]
    learner(dls).distill(pipeline, 1, 1e-2, soft_labels(), unlabeled=dict(perturbed=3), check=False)
    for rows in seen[2:]:
        for c in [*CATS, *CONTS]:
            known = df[c].iloc[:N].to_numpy()
            have = rows[c].to_numpy()
            if c in ('length', 'width'):
                known, have = known.astype(np.float32).round(4), have.astype(np.float32).round(4)
            assert pd.Series(have).isin(pd.Series(known)).all(), c


@pytest.mark.parametrize('classes,select', [(['short', 'long'], [1, 0]), (['long', 'short'], None)])
def test_classes_are_mapped_by_name(classes, select):
    df = raw()

    class Fixed:
        classes_ = np.array(classes)

        def predict_proba(self, rows):
            return np.tile([0.9, 0.1], (len(rows), 1))

    dls = tables(df)
    teacher = teacher_of(Fixed(), learner(dls), Task('softmax'))
    assert teacher.select == select
    np.testing.assert_allclose(
        probs(teacher, dls.valid)[0], [0.1, 0.9] if select else [0.9, 0.1], atol=1e-6
    )
    assert dls.vocab == ['long', 'short']


def test_classes_that_are_numbers_are_places_in_the_vocab():
    df = raw()
    df['number'] = (df.kind == 'short').astype(int)
    dls, pipeline = tables(df), trees(df, y='number')
    assert (
        pipeline.classes_.tolist() == [0, 1]
        and teacher_of(pipeline, learner(dls), Task('softmax')).select is None
    )
    dls = tables(df, y='number')
    assert teacher_of(pipeline, learner(dls), Task('softmax')).select is None and dls.vocab == [
        0,
        1,
    ]


def test_a_missing_class_is_an_error():
    df = raw()
    df['other'] = df.kind.replace('long', 'tall')
    with pytest.raises(
        DistillError,
        match=r"teacher does not have 1 of the student's classes \(long\); it has short, tall",
    ):
        learner(tables(df)).distill(trees(df, y='other'), 1)


def test_a_frame_has_the_columns_that_the_student_lacks():
    df = raw()
    dls, pipeline = tables(df), trees(df, [*CATS, *CONTS, 'hidden'])
    with pytest.raises(
        DistillError,
        match=r'RandomForestClassifier was fitted on the columns .* \(9\), but the rows have no hidden.*frame=df',
    ):
        learner(dls).distill(pipeline, 1)
    student = learner(dls)
    teacher = teacher_of(Teacher(pipeline, frame=df), student, Task('softmax'))
    for dl in dls.loaders:
        np.testing.assert_allclose(
            probs(teacher, dl), pipeline.predict_proba(df.loc[in_order(dl)[1]]), atol=1e-6
        )
    student.distill(Teacher(pipeline, frame=df), 1, 1e-2)
    with pytest.raises(DistillError, match='the rows have no hidden'):
        student.distill(Teacher(pipeline, frame=df), 1, 1e-2, unlabeled=dict(perturbed=1))


def test_rows_that_only_the_teacher_tells_apart_get_the_mean_prediction():
    df = raw()
    for c in CATS + CONTS:
        df[c] = df[c].iloc[1]  # all equal
    df['length'] = np.arange(len(df)) % 4
    dls, pipeline = tables(df), trees(df, [*CATS, *CONTS, 'hidden'])
    teacher = teacher_of(Teacher(pipeline, frame=df), learner(dls), Task('softmax'))
    for dl in dls.loaders:
        p = pd.DataFrame(pipeline.predict_proba(df)).groupby(df.length.to_numpy()).mean()
        np.testing.assert_allclose(
            probs(teacher, dl), p.loc[df.length.loc[in_order(dl)[1]]], atol=1e-6
        )


def test_a_frame_with_other_rows_is_refused():
    df = raw()
    dls, pipeline = tables(df), trees(df)
    ask = lambda frame: teacher_of(Teacher(pipeline, frame=frame), learner(dls), Task('softmax'))(
        *in_order(dls.valid)[0]
    )
    ask(df)
    ask(df.sample(frac=1, random_state=0))  # another order is the same table
    with pytest.raises(DistillError, match='frame= has no rows 10'):
        ask(df.iloc[:50])
    with pytest.raises(DistillError, match='its index has duplicates'):
        ask(pd.concat([df, df]))
    other = df.copy()
    other.loc[df.index[5], 'year'] = 1900
    with pytest.raises(
        DistillError,
        match=rf'frame= has different rows than the DataLoaders: year of the row {df.index[5]} is .*1900',
    ):
        ask(other)


def test_what_a_transform_lost_is_asked_for():
    df = raw()
    pipeline = trees(df)
    lossy = tables(df, procs=[Categorify, FillMissing(add_col=False), Normalize])
    with pytest.raises(
        DistillError,
        match=r'FillMissing\(add_col=False\) does not record which cells of width were missing. .*Teacher\(pipeline, frame=df\)',
    ):
        learner(lossy).distill(pipeline, 1)

    class Squared(TabularProc):
        order = 3

        def encodes(self, to):
            to.transform(['length'], lambda c: c**2)

    squared = tables(df, procs=[Categorify, FillMissing, Normalize, Squared])
    with pytest.raises(DistillError, match='It is unknown how to undo Squared'):
        learner(squared).distill(pipeline, 1)
    for dls in (lossy, squared):
        teacher = teacher_of(Teacher(pipeline, frame=df), learner(dls), Task('softmax'))
        np.testing.assert_allclose(
            probs(teacher, dls.valid), pipeline.predict_proba(df.iloc[N:]), atol=1e-6
        )
        with pytest.raises(DistillError, match="so the estimator can't predict perturbed rows"):
            learner(dls).distill(
                Teacher(pipeline, frame=df), 1, unlabeled=dict(perturbed=1), check=False
            )


def test_an_estimator_without_column_names_is_refused_on_a_table():
    df = raw()
    fitted = DecisionTreeClassifier().fit(df[CONTS].to_numpy(), df.kind)
    with pytest.raises(
        DistillError,
        match='DecisionTreeClassifier was fitted on an array, so the names of its columns are unknown',
    ):
        learner(tables(df)).distill(fitted, 1)


def test_numbers_are_predicted_as_they_are():
    df = raw()
    df['price'] = df.length * 2 + df.year / 10
    dls, pipeline = (
        tables(df, 'price', RegressionBlock),
        trees(df, y='price', model=RandomForestRegressor),
    )
    student = tabular_learner(dls, layers=[8])
    teacher = teacher_of(pipeline, student, Task('regression'))
    np.testing.assert_allclose(
        teacher(*in_order(dls.valid)[0]).logits[:, 0], pipeline.predict(df.iloc[N:]), rtol=1e-6
    )
    student.distill(pipeline, 1, 1e-2)


def test_labels_without_probabilities_are_certain():
    df = raw()
    encode = make_column_transformer(
        (OneHotEncoder(handle_unknown='ignore'), ['shape']), ('passthrough', ['length', 'year'])
    )
    pipeline = make_pipeline(encode, RidgeClassifier()).fit(
        df[['shape', 'length', 'year']], df.kind
    )
    dls = tables(df)
    p = probs(teacher_of(pipeline, learner(dls), Task('softmax')), dls.valid)
    assert [dls.vocab[i] for i in p.argmax(1)] == pipeline.predict(
        df[['shape', 'length', 'year']].iloc[N:]
    ).tolist() and p.max(1).values.min() > 0.999999


def test_a_pipeline_beside_a_learner_in_an_ensemble():
    df = raw()
    dls, pipeline = tables(df), trees(df)
    student, other = learner(dls), learner(dls)
    want = (torch.tensor(pipeline.predict_proba(df.iloc[N:])) + other.get_preds()[0]) / 2
    for both in ([pipeline, other], Teacher([Teacher(pipeline), Teacher(other.model)])):
        torch.testing.assert_close(
            probs(teacher_of(both, student, Task('softmax')), dls.valid),
            want.float(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_pipeline_writes_a_cache(tmp_path):
    df = raw()
    dls, pipeline = tables(df), trees(df)
    cache = cache_teacher(pipeline, dls, tmp_path / 'targets', store=dict(dtype='float32'))
    student = learner(dls)
    student.distill(cache, 1, 1e-2)
    again = pickle.loads(pickle.dumps(pipeline))
    assert identity_of(Teacher(again)) == identity_of(Teacher(pipeline))
    assert (
        identity_of(Teacher(trees(raw(1))))['weights'] != identity_of(Teacher(pipeline))['weights']
    )
    with pytest.raises(DistillError, match='teacher'):
        cache_teacher(trees(raw(1)), dls, tmp_path / 'targets', store=dict(dtype='float32'))


def test_lightgbm_gets_its_categories_and_a_booster_its_probabilities():
    lgb = pytest.importorskip('lightgbm')
    df = raw()
    rows = df[['colour', 'shape', *CONTS]].astype(dict(colour='category', shape='category'))
    model = lgb.LGBMClassifier(n_estimators=5, min_child_samples=2, verbose=-1, n_jobs=1).fit(
        rows.iloc[:N], df.kind.iloc[:N]
    )
    dls = tables(df)
    for teacher in (model, model.booster_):
        np.testing.assert_allclose(
            probs(teacher_of(teacher, learner(dls), Task('softmax')), dls.valid),
            model.predict_proba(rows.iloc[N:]),
            atol=1e-6,
        )
    learner(dls).distill(model, 1, 1e-2, unlabeled=dict(perturbed=2))


def test_the_exported_student_has_no_trees(tmp_path):
    df = raw()
    student = learner(tables(df))
    student.distill(trees(df), 1, 1e-2)
    student.export(tmp_path / 'student.pkl')
    assert (
        b'sklearn.ensemble' not in (tmp_path / 'student.pkl').read_bytes()
        and b'fastdistill' not in (tmp_path / 'student.pkl').read_bytes()
    )


# a plain loop


def numbers(n=200, d=6):
    g = np.random.default_rng(0)
    x = g.normal(size=(n, d)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] ** 2 > 1).astype(int) + (x[:, 2] > 0)


def test_a_plain_loop_gets_the_probabilities_of_its_rows():
    x, y = numbers()
    student, model = (
        nn.Linear(6, 3),
        make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y),
    )
    xb, yb = torch.tensor(x[:32]), torch.tensor(y[:32])
    p = torch.tensor(model.predict_proba(x[:32])).float()
    want = 0.2 * F.cross_entropy(student(xb), yb) + 0.8 * F.kl_div(
        student(xb).log_softmax(1), p, reduction='batchmean'
    )
    torch.testing.assert_close(
        Distiller(student, model, kd(1.0, 0.8))(xb, yb).total, want, rtol=1e-4, atol=1e-6
    )
    assert Teacher(model).name == 'LogisticRegression'


def test_columns_are_found_by_name():
    x, y = numbers()
    df = pd.DataFrame(x, columns=list('abcdef'))
    model = LogisticRegression().fit(df[list('cab')], y)
    want = torch.tensor(model.predict_proba(df[list('cab')])).float()
    for batch in (
        torch.tensor(df[list('cab')].to_numpy()),
        {c: torch.tensor(df[c].to_numpy()) for c in 'abcdef'},
        df[list('cab')],
    ):
        torch.testing.assert_close(
            Teacher(model)(batch).logits.softmax(1), want, rtol=1e-4, atol=1e-6
        )
    with pytest.raises(
        DistillError,
        match=r'fitted on the columns c, a, b \(3\), but the rows have no a, b. They have c',
    ):
        Teacher(model)(dict(c=torch.zeros(2)))
    with pytest.raises(
        DistillError, match=r'takes a table: one tensor .* shape \(2, 3\), \(2, 3\)'
    ):
        Teacher(model)(torch.zeros(2, 3), torch.zeros(2, 3))


def test_labels_each_by_itself():
    x, _ = numbers()
    y = np.stack([x[:, 0] > 0, x[:, 1] > 1], 1).astype(int)
    forest, rest = (
        RandomForestClassifier(8, max_depth=3, random_state=0).fit(x, y),
        OneVsRestClassifier(LogisticRegression()).fit(x, y),
    )
    one = LogisticRegression().fit(x, y[:, 0])
    ask = lambda model: Teacher(model, kind='sigmoid')(torch.tensor(x)).logits.sigmoid()
    np.testing.assert_allclose(
        ask(forest), np.stack([p[:, 1] for p in forest.predict_proba(x)], 1), atol=1e-6
    )
    np.testing.assert_allclose(ask(rest), rest.predict_proba(x), atol=1e-6)
    np.testing.assert_allclose(ask(one), one.predict_proba(x)[:, 1:], atol=1e-6)


@pytest.mark.parametrize('make', [LogisticRegression, RandomForestClassifier])
def test_an_estimator_that_is_not_fitted_is_refused(make):
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    with pytest.raises(DistillError, match=f'{make.__name__} is not fitted.*Call its fit'):
        Distiller(torch.nn.Linear(4, 3), make(), kd())(x, y)


def test_what_no_estimator_can_teach():
    x, y = numbers()
    several = RandomForestClassifier(3).fit(x, np.stack([y, y], 1))
    with pytest.raises(
        DistillError, match='predicts 2 outputs, but the student predicts one of several classes'
    ):
        Teacher(several)(torch.tensor(x))

    class Odd:
        def predict(self, rows):
            return np.arange(len(rows))

    with pytest.raises(DistillError, match='Odd has no predict_proba and no classes_'):
        Teacher(Odd())(torch.tensor(x))
    with pytest.raises(DistillError, match='frame= is the table of an estimator'):
        Teacher(nn.Linear(3, 2), frame=pd.DataFrame())
    model = LogisticRegression().fit(x, y)
    with pytest.raises(DistillError, match="frame= is for fastai's tables"):
        Teacher(model, frame=pd.DataFrame())(torch.tensor(x))


def test_an_image_learner_says_what_an_estimator_takes():
    x, y = numbers()
    with pytest.raises(
        DistillError, match=r'LogisticRegression takes a table: .*shape \(16, 3, 16, 16\)'
    ):
        apps.pair('image')[0].distill(LogisticRegression().fit(x, y), 1)


def test_a_toy_learner_of_numbers_is_taught():
    student, _ = toy()
    x, y = [torch.cat(o) for o in zip(*[b for b in student.dls.train])]
    student.distill(LogisticRegression().fit(x, y), 1, 1e-2)


def test_a_file_of_joblib_teaches_as_the_estimator_in_it(tmp_path):
    df = raw()
    dls, pipeline = tables(df), trees(df)
    joblib.dump(pipeline, tmp_path / 'trees.joblib')
    with pytest.warns(
        DistillWarning, match='trees.joblib is a pickle, and loading it runs the code in it'
    ):
        teacher_of(tmp_path / 'trees.joblib', dls, Task('softmax'))
    torch.testing.assert_close(
        probs(teacher_of(tmp_path / 'trees.joblib', dls, Task('softmax')), dls.valid),
        probs(teacher_of(pipeline, dls, Task('softmax')), dls.valid),
    )
    (tmp_path / 'none.joblib').write_bytes(b'abc')
    with pytest.raises(
        DistillError, match='none.joblib could not be loaded .*Did joblib.dump write it'
    ):
        teacher_of(tmp_path / 'none.joblib', dls)
    with pytest.raises(
        DistillError,
        match=r"There is no file .*gone.joblib'. joblib.dump\(estimator, 'gone.joblib'\)",
    ):
        teacher_of('gone.joblib', dls)
    with pytest.raises(DistillError, match='or load it: joblib.load'):
        Teacher(tmp_path / 'trees.joblib')  # no pickle is loaded in a plain loop


class Touches:
    "A pickle that makes a file when it is loaded"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize('name', ['teacher.joblib', 'teacher.pkl'])
def test_a_pickle_is_warned_of_before_its_code_runs(name, tmp_path):
    joblib.dump(Touches(tmp_path / 'ran'), tmp_path / name)
    student, _ = toy()
    with warnings.catch_warnings():
        warnings.simplefilter('error', DistillWarning)
        with pytest.raises(
            DistillWarning,
            match=f'{name} is a pickle, and loading it runs the code in it. Load only files that you trust',
        ):
            student.distill(tmp_path / name, 1, 1e-2)
    assert not (tmp_path / 'ran').exists()


class Counting:
    "Trees behind a counter"

    def __init__(self, model):
        self.model, self.classes_, self.rows = model, model.classes_, []

    def predict_proba(self, x):
        self.rows.append(len(x))
        return self.model.predict_proba(x)


def test_recipes_are_compared_with_trees_as_teacher(tmp_path):
    "In every form, with the same result. A folder tells teachers apart"
    df = raw()
    forest = trees(df)
    joblib.dump(forest, tmp_path / 'forest.joblib')

    def values(teacher):
        report = compare_recipes(
            lambda: learner(tables(df)),
            teacher,
            dict(alone=None, taught=soft_labels(1.0)),
            n_epoch=1,
            lr_max=0.1,
            seeds=[3],
            metric='valid_loss',
            folder=tmp_path / 'runs',
            progress=False,
            check=False,
        )
        return report.values('alone') + report.values('taught')

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DistillWarning)
        whole = values(forest)
        shutil.rmtree(tmp_path / 'runs')
        assert values(Teacher(forest)) == whole
        assert whole[0] != whole[1]
        with pytest.raises(DistillError, match='contains an experiment with teacher='):
            values(trees(raw(1)))
        shutil.rmtree(tmp_path / 'runs')
        assert values(tmp_path / 'forest.joblib') == whole


def test_compare_times_the_prediction_and_not_the_search_for_known_rows():
    df = raw()
    dls, counting = tables(df), Counting(trees(df))
    report = compare(
        {'teacher': counting, 'student': learner(dls)}, large=BS, seconds=0.001, progress=False
    )
    small, large = report.models['teacher'].cost.latency
    assert counting.rows.count(1) >= small.runs and counting.rows.count(BS) >= large.runs >= 20
    assert report.notes == ['The times of teacher include finding the raw row of each encoded row.']
