"""Boosted trees and a random forest teach small networks on the Adult census table: accuracy, size and latency of all of them.

    python benchmarks/trees_adult.py --root ../shared/data/tabular/adult --out benchmarks/results/trees_adult

The validation set is the table's own test split. Students have the same weights at the start, and train equally long. The table of
each seed is printed and written to OUT.
"""

import io, json, time, warnings
from pathlib import Path
import joblib, lightgbm, numpy as np, pandas as pd, torch, typer
from fastai.tabular.all import (
    Categorify,
    CategoryBlock,
    FillMissing,
    Normalize,
    TabularDataLoaders,
    accuracy,
    set_seed,
    tabular_learner,
)
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder
from fastdistill.fastai import kd  # noqa: F401 (it gives Learners `distill`)

warnings.simplefilter('ignore')
NAMES = 'age workclass fnlwgt education education_num marital occupation relationship race sex gain loss hours country income'.split()
INPUTS = NAMES[:-1]


def read(root, name):
    df = pd.read_csv(
        Path(root) / f'{name}.csv.gz',
        header=None,
        skipinitialspace=True,
        na_values='?',
        names=NAMES,
    )
    return df.assign(income=df.income.str.rstrip('.'))


def teachers(df, cats):
    "Fitted on all rows of the training split, on the raw columns"
    x, y = df[INPUTS], df.income
    numbered = lambda: make_column_transformer(
        (
            OrdinalEncoder(
                handle_unknown='use_encoded_value', unknown_value=-1, encoded_missing_value=-2
            ),
            cats,
        ),
        remainder='passthrough',
    )
    types = {c: pd.CategoricalDtype(sorted(x[c].dropna().unique())) for c in cats}
    models = dict(
        forest=make_pipeline(
            numbered(), RandomForestClassifier(300, min_samples_leaf=5, n_jobs=1, random_state=0)
        ),
        hist=make_pipeline(
            numbered(),
            HistGradientBoostingClassifier(max_iter=300, learning_rate=0.06, random_state=0),
        ),
    )
    out = {k: m.fit(x, y) for k, m in models.items()}
    out['lightgbm'] = lightgbm.LGBMClassifier(
        n_estimators=300, learning_rate=0.06, verbose=-1, n_jobs=1
    ).fit(x.astype(types), y)
    return out, types


def tables(df, cats, n_train):
    conts = [c for c in INPUTS if c not in cats]
    return TabularDataLoaders.from_df(
        df,
        procs=[Categorify, FillMissing, Normalize],
        cat_names=list(cats),
        cont_names=conts,
        y_names='income',
        y_block=CategoryBlock(),
        valid_idx=list(range(n_train, len(df))),
        bs=256,
    )


def student(dls, seed):
    set_seed(seed)
    return tabular_learner(dls, layers=[64, 32], metrics=accuracy)


def scores(p, y):
    return dict(
        accuracy=float(((p > 0.5) == y).mean()),
        auc=float(roc_auc_score(y, p)),
        log_loss=float(log_loss(y, p)),
    )


def probabilities(learn):
    with learn.no_bar(), learn.no_logging():
        return learn.get_preds()[0][:, 1].double().numpy()


def median_ms(fn, n=30):
    fn()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        fn()
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def size_of(o):
    "Bytes of a compressed file"
    file = io.BytesIO()
    joblib.dump(o, file, compress=3)
    return file.tell()


def costs_of_trees(model, rows):
    return dict(
        kib=size_of(model) / 1024,
        ms_1=median_ms(lambda: model.predict_proba(rows[:1])),
        ms_1000=median_ms(lambda: model.predict_proba(rows[:1000]), 10),
    )


@torch.no_grad()
def costs_of_student(learn):
    "The network on encoded rows: the time to encode them is not in it"
    ds, net = learn.dls.valid.dataset, learn.model.eval()
    x = torch.tensor(ds.cats.to_numpy()).long(), torch.tensor(ds.conts.to_numpy()).float()
    run = lambda n: net(*(o[:n] for o in x))
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    return dict(
        kib=size_of(state) / 1024,
        ms_1=median_ms(lambda: run(1)),
        ms_1000=median_ms(lambda: run(1000)),
    )


def train(dls, seed, epochs, lr, teacher=None, **kwargs):
    learn, start = student(dls, seed), time.time()
    with learn.no_bar(), learn.no_logging():
        if teacher is None:
            learn.fit_one_cycle(epochs, lr)
        else:
            learn.distill(teacher, epochs, lr, **kwargs)
    return learn, time.time() - start


def main(
    root: Path = Path('adult'),
    out: Path = Path('benchmarks/results/trees_adult'),
    seeds: int = 3,
    epochs: int = 4,
    lr: float = 3e-3,
    labels: int = 0,
):
    train_df, test_df = read(root, 'adult-train'), read(root, 'adult-test')
    cats = [c for c in INPUTS if not pd.api.types.is_numeric_dtype(train_df[c])]
    models, types = teachers(train_df, cats)
    if labels:
        train_df = train_df.iloc[:labels]  # the student has some of the rows alone
    df = pd.concat([train_df, test_df], ignore_index=True)
    y = (test_df.income == '>50K').to_numpy()
    rows = lambda k: test_df[INPUTS].astype(types) if k == 'lightgbm' else test_df[INPUTS]
    found = {
        k: [dict(scores(m.predict_proba(rows(k))[:, 1], y), **costs_of_trees(m, rows(k)))]
        for k, m in models.items()
    }
    best = min(models, key=lambda k: found[k][0]['log_loss'])
    ways = dict(
        alone={},
        **{f'of {k}': dict(teacher=m) for k, m in models.items()},
        perturbed=dict(teacher=models[best], unlabeled=dict(perturbed=3)),
    )
    for seed in range(seeds):
        for k, options in ways.items():
            learn, seconds = train(tables(df, cats, len(train_df)), seed, epochs, lr, **options)
            found.setdefault(k, []).append(
                dict(scores(probabilities(learn), y), seconds=seconds, **costs_of_student(learn))
            )
            print(seed, k, found[k][-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / f'labels_{labels or "all"}.json').write_text(json.dumps(found, indent=1))
    print(f'perturbed: of {best}')
    for k, runs in found.items():
        print(
            f'{k:12s}',
            *(
                f'{c} {np.mean([r[c] for r in runs]):.4g} ± {np.std([r[c] for r in runs]):.2g}'
                for c in runs[0]
            ),
        )


if __name__ == '__main__':
    typer.run(main)
