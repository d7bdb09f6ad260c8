"""Trees teach a network: a forest of 200 trees has learned a table of amounts from 8,000 rows. A small network
learns from 500 of these rows, alone and with the forest as its teacher, which also labels new rows that are made from
the 500. The last line compares the accuracies on new rows.

Data: tables. Teacher: trees. Trainer: fastai.
"""

import sys, warnings
from sklearn.ensemble import RandomForestClassifier
from fastai.tabular.all import *
from fastdistill.fastai import *

warnings.filterwarnings(
    'ignore', 'The given NumPy array is not writable'
)  # from fastai's tables with pandas 3

AMOUNTS = [f'amount{i}' for i in range(8)]


def table(n, kinds=12):
    "A kind depends on which of five amounts are above a limit, which trees find easily"
    rng = np.random.default_rng(0)
    amounts = rng.lognormal(sigma=0.7, size=(n, 8))
    above = amounts[:, :5] > [1.0, 1.2, 0.8, 1.3, 0.8]
    df = pd.DataFrame(amounts, columns=AMOUNTS)
    df['kind'] = [f'kind {k}' for k in above @ [1, 3, 5, 7, 2] % kinds]
    return df


def main(quick=False, seed=42):
    n_forest, n_train, n_valid = (1000, 200, 200) if quick else (8000, 500, 2000)
    epochs = 1 if quick else 40
    df = table(n_forest + n_valid)
    forest = RandomForestClassifier(200, random_state=seed)
    forest.fit(df[AMOUNTS][:n_forest], df.kind[:n_forest])
    few = pd.concat([df[:n_train], df[n_forest:]], ignore_index=True)
    dls = TabularDataLoaders.from_df(
        few,
        procs=[Normalize],
        cont_names=AMOUNTS,
        y_names='kind',
        y_block=CategoryBlock(),
        valid_idx=list(range(n_train, n_train + n_valid)),
        bs=50,
    )

    def learner():
        set_seed(seed)  # the students start from the same weights
        return tabular_learner(dls, layers=[64, 32], metrics=accuracy)

    alone, student = learner(), learner()
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(forest, epochs, 1e-2, unlabeled=dict(perturbed=5))

    t = forest.score(df[AMOUNTS][n_forest:], df.kind[n_forest:])
    a, s = [l.validate()[1] for l in (alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
