"""A small network learns to find the middle of a digit from 400 points with random errors of 5 pixels, alone and with
a larger network that has learned from 2,000. The last line compares how many pixels each model is off on exact points
(lower is better).

Data: images. Teacher: a larger network. Trainer: fastai.
"""

import sys
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *

digits = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels
VALID = 10_000  # scenes from here on are for validation: digits by different writers, exact points


def scene(n):
    "Scene `n`: a digit somewhere on a noisy background of 24 x 24, and its middle (x, y)"
    rng = np.random.default_rng(n)
    image, (x, y) = rng.integers(0, 100, (24, 24), dtype=np.uint8), rng.integers(0, 17, 2)
    i, error = (
        (rng.integers(1200, 1797), np.zeros(2))
        if n >= VALID
        else (rng.integers(1200), rng.normal(0, 5, 2))
    )
    image[y : y + 8, x : x + 8] += (9 * digits.images[i]).astype(np.uint8)
    return image, error + (x + 4, y + 4)


def data(n_train, n_valid=200):
    block = DataBlock(
        (ImageBlock(PILImageBW), PointBlock),
        splitter=FuncSplitter(lambda n: n >= VALID),
        get_x=lambda n: scene(n)[0],
        get_y=lambda n: scene(n)[1],
    )
    return block.dataloaders(
        [*range(n_train), *range(VALID, VALID + n_valid)], bs=50, num_workers=0
    )


def pixels_off(pred, y):
    return (pred.view(-1, 2) - y.view(-1, 2)).norm(
        dim=1
    ).mean() * 12  # the picture goes from -1 to 1


def net(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((1, *widths), widths)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(9 * widths[-1], 2), SigmoidRange(-1, 1))


def main(quick=False, seed=42):
    set_seed(seed)
    many, few = [data(n, 50) for n in (200, 100)] if quick else [data(n) for n in (2000, 400)]
    epochs = 1 if quick else 12

    def learner(dls, *widths):
        set_seed(seed)  # the students start from the same weights
        return Learner(dls, net(*widths), metrics=pixels_off)

    teacher = learner(many, 32, 64, 128)
    teacher.fit_one_cycle(1 if quick else 8, 5e-3)
    alone, student = learner(few, 8, 16, 32), learner(few, 8, 16, 32)
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2)

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'pixels off: teacher {t:.2f}, student alone {a:.2f}, student distilled {s:.2f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
