"""A model with four factors learns how many stars people give to films, alone and with a teacher that has twenty
factors. The last line compares how many stars each model is off on unseen ratings (lower is better).

Data: ratings. Teacher: a larger model. Trainer: fastai.
"""

import sys, warnings
from fastai.collab import *
from fastai.tabular.all import *
from fastdistill.fastai import *

warnings.filterwarnings(
    'ignore', 'The given NumPy array is not writable'
)  # from fastai's tables with pandas 3


def ratings(n, users=200, films=150, tastes=6):
    "Stars from 1 to 5: what a person likes in films, what a film has of it, and chance"
    rng = np.random.default_rng(0)
    likes, has = rng.normal(size=(users, tastes)), rng.normal(size=(films, tastes))
    u, f = rng.integers(0, users, n), rng.integers(0, films, n)
    stars = (3 + 0.6 * (likes[u] * has[f]).sum(1) + 0.5 * rng.normal(size=n)).clip(1, 5)
    return pd.DataFrame(
        dict(user=[f'user {o}' for o in u], film=[f'film {o}' for o in f], stars=stars)
    )


def main(quick=False, seed=42):
    set_seed(seed)
    dls = CollabDataLoaders.from_df(
        ratings(2000 if quick else 20000), seed=0, valid_pct=0.2, bs=100
    )

    def learner(n_factors):
        set_seed(seed)  # every student starts from the same weights
        return collab_learner(dls, n_factors=n_factors, y_range=(0.5, 5.5), metrics=mae)

    teacher = learner(20)
    teacher.fit_one_cycle(1 if quick else 8, 5e-3, wd=0.1)
    alone, student = learner(4), learner(4)
    alone.fit_one_cycle(1 if quick else 5, 5e-3, wd=0.1)
    student.distill(teacher, 1 if quick else 5, 5e-3, wd=0.1)

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'stars off: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
