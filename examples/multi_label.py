"""A small network learns which digits occur in a strip of four, alone and with a larger network as its teacher. The
last line compares the fraction of correct labels on digits by different writers.

Data: images. Teacher: a larger network. Trainer: fastai.
"""

import sys
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *

digits = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels


def picture(four):
    return np.concatenate([digits.images[i] for i in four], 1).astype(np.uint8) * 15


def labels(four):
    return sorted({str(digits.target[i]) for i in four})


def data(n_train, n_valid):
    rng = np.random.default_rng(0)
    strips = [*rng.integers(0, 1200, (n_train, 4)), *rng.integers(1200, 1797, (n_valid, 4))]
    block = DataBlock(
        (ImageBlock(PILImageBW), MultiCategoryBlock),
        get_x=picture,
        get_y=labels,
        splitter=IndexSplitter(range(n_train, n_train + n_valid)),
    )
    return block.dataloaders(strips, bs=50, num_workers=0)


def net(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((1, *widths), widths)]
    return nn.Sequential(
        *convs, AdaptiveConcatPool2d(1), nn.Flatten(), nn.Linear(2 * widths[-1], 10)
    )


def main(quick=False, seed=42):
    set_seed(seed)
    dls = data(200, 100) if quick else data(1000, 500)
    epochs = 1 if quick else 15

    def learner(*widths):
        set_seed(seed)  # the students start from the same weights
        return Learner(dls, net(*widths), metrics=accuracy_multi)

    teacher = learner(64, 128, 256)
    teacher.fit_one_cycle(epochs, 5e-3)
    alone, student = learner(8, 16, 32), learner(8, 16, 32)
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2)

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'labels right: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
