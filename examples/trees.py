"""Trees teach a network: a forest of 300 trees has learned a table of 1,500 rows. A small network learns from the same
rows, alone and with the forest, which also labels new rows that are made from the old ones. The last line compares the
accuracies on new rows.

Data: tables. Teacher: trees. Trainer: fastai.
"""

import sys, warnings
from sklearn.ensemble import ExtraTreesClassifier
from fastai.tabular.all import *
from fastdistill.fastai import *

warnings.filterwarnings(
    'ignore', 'The given NumPy array is not writable'
)  # from fastai's tables with pandas 3

MEASURES = [f'measure{i}' for i in range(8)]


def table(n, kinds=20):
    "A kind is a combination of steps in the measures, which trees find easily"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(rng.random((n, 8)), columns=MEASURES)
    steps = (df.iloc[:, :5] * [2, 2, 3, 2, 2]).astype(int) @ [1, 3, 5, 11, 17]
    df['kind'] = [f'kind {k % kinds}' for k in steps]
    return df


def main(quick=False, seed=42):
    n_train, n = (500, 700) if quick else (1500, 3500)
    epochs = 1 if quick else 20
    df = table(n)
    forest = ExtraTreesClassifier(300, min_samples_leaf=2, random_state=seed)
    forest.fit(df[MEASURES][:n_train], df.kind[:n_train])
    dls = TabularDataLoaders.from_df(
        df,
        procs=[Normalize],
        cont_names=MEASURES,
        y_names='kind',
        y_block=CategoryBlock(),
        valid_idx=list(range(n_train, n)),
        bs=100,
    )

    def learner():
        set_seed(seed)  # the students start from the same weights
        return tabular_learner(dls, layers=[64, 32], metrics=accuracy)

    alone, student = learner(), learner()
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(forest, epochs, 1e-2, perturbed=5)

    t = forest.score(df[MEASURES][n_train:], df.kind[n_train:])
    a, s = [l.validate()[1] for l in (alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
