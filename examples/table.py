"""A small network learns a table of 50 classes from 1,500 rows, a fifth of them with a wrong label, alone and with a
larger network as its teacher. The last line compares the accuracies on new rows with correct labels.

Data: tables. Teacher: a larger network. Trainer: fastai.
"""

import sys, warnings
from fastai.tabular.all import *
from fastdistill.fastai import *

warnings.filterwarnings(
    'ignore', 'The given NumPy array is not writable'
)  # from fastai's tables with pandas 3

MEASURES = [f'measure{i}' for i in range(8)]


def table(n_train, n, kinds=50):
    "Each kind has two usual sets of measures, a usual color and a usual shape"
    rng = np.random.default_rng(0)
    centers, colors, shapes = (
        rng.normal(size=(kinds, 2, 8)),
        rng.integers(0, 4, kinds),
        rng.integers(0, 3, kinds),
    )
    kind = rng.integers(0, kinds, n)
    df = pd.DataFrame(
        centers[kind, rng.integers(0, 2, n)] + 0.5 * rng.normal(size=(n, 8)), columns=MEASURES
    )
    df['color'] = np.where(rng.random(n) < 0.7, colors[kind], rng.integers(0, 4, n))
    df['shape'] = np.where(rng.random(n) < 0.7, shapes[kind], rng.integers(0, 3, n))
    wrong = (np.arange(n) < n_train) & (rng.random(n) < 0.2)
    df['kind'] = [f'kind {k}' for k in np.where(wrong, rng.integers(0, kinds, n), kind)]
    return df


def main(quick=False, seed=42):
    set_seed(seed)
    n_train, n = (1000, 1200) if quick else (1500, 2500)
    epochs = 1 if quick else 30
    dls = TabularDataLoaders.from_df(
        table(n_train, n),
        procs=[Categorify, FillMissing, Normalize],
        cat_names=['color', 'shape'],
        cont_names=MEASURES,
        y_names='kind',
        y_block=CategoryBlock(),
        valid_idx=list(range(n_train, n)),
        bs=100,
    )

    def learner(layers, **config):
        set_seed(seed)  # the students start from the same weights
        return tabular_learner(
            dls, layers=layers, config=tabular_config(**config), metrics=accuracy
        )

    teacher = learner([400, 200], ps=0.3)
    teacher.fit_one_cycle(epochs, 5e-3)
    alone, student = learner([64, 32]), learner([64, 32])
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2, T=2)

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
