"""Find a recipe: `distill_find` runs the teacher once, tries recipes and rates, and repeats the best ones. The last line
compares the accuracies on a test set that the search never saw, with the best rate of labels alone and with the recipe
that was found.

Data: images. Teacher: a larger network. Trainer: fastai.
"""

import sys
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *

digits = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels
x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)


def numbers(n, first, last):
    "Pictures of two digits side by side, and the numbers from 0 to 99 that they make"
    i, j = torch.randint(first, last, (2, n), generator=torch.Generator().manual_seed(0))
    return list(zip(torch.cat([x[i], x[j]], 3), 10 * y[i] + y[j]))


def net(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((1, *widths), widths)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(2 * widths[-1], 100))


def main(quick=False, seed=42):
    n, epochs = (100, 1) if quick else (600, 10)
    train, valid, test = numbers(n, 0, 800), numbers(n, 800, 1200), numbers(500, 1200, 1797)
    dls = DataLoaders.from_dsets(train, valid, bs=50)

    def learner(*widths):
        set_seed(seed)  # the students start from the same weights
        loss = CrossEntropyLossFlat()
        return Learner(dls, net(*widths), lr=1e-2, loss_func=loss, metrics=accuracy)

    teacher = learner(64, 128, 256)
    teacher.fit_one_cycle(epochs, 5e-3)
    found = learner(8, 16, 32).distill_find(
        teacher,
        epochs,
        minutes=0.1 if quick else 1.5,
        rates=[1e-2] if quick else [5e-3, 1e-2, 2e-2],
        trials=1 if quick else 8,
    )
    print(found.table, found.verdict, sep='\n')

    alone, student = learner(8, 16, 32), learner(8, 16, 32)
    alone.fit_one_cycle(epochs, found.best[found.labels].lr)
    student.distill(teacher, epochs, found.lr, found.recipe)
    score = lambda l: l.validate(dl=dls.test_dl(test, with_labels=True))[1]
    t, a, s = [score(l) for l in (teacher, alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
