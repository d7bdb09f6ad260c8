"""A small network learns to read two-digit numbers from 600 pictures, alone and with a larger network as its teacher.
The last line compares the accuracies on digits by different writers. The teacher knows which of the 100 classes look
alike.

Data: images. Teacher: a larger network. Trainer: fastai.
"""

import sys
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *

digits = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels


def picture(pair):
    return np.concatenate([digits.images[i] for i in pair], 1).astype(np.uint8) * 15


def number(pair):
    return ''.join(str(digits.target[i]) for i in pair)


def data(n_train, n_valid):
    rng = np.random.default_rng(0)
    pairs = [*rng.integers(0, 1200, (n_train, 2)), *rng.integers(1200, 1797, (n_valid, 2))]
    numbers = [f'{i:02}' for i in range(100)]
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock(vocab=numbers)),
        get_x=picture,
        get_y=number,
        splitter=IndexSplitter(range(n_train, n_train + n_valid)),
    )
    return block.dataloaders(pairs, bs=50, num_workers=0)


def net(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((1, *widths), widths)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(2 * widths[-1], 100))


def main(quick=False, seed=42):
    set_seed(seed)
    dls = data(200, 100) if quick else data(600, 500)
    epochs = 1 if quick else 20

    def learner(*widths):
        set_seed(seed)  # the students start from the same weights
        return Learner(dls, net(*widths), metrics=accuracy)

    teacher = learner(64, 128, 256)
    teacher.fit_one_cycle(epochs, 5e-3)
    alone, student = learner(8, 16, 32), learner(8, 16, 32)
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2)

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
