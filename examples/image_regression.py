"""A small network learns by how many degrees a 4 is rotated, from 300 angles with random errors of 20 degrees, alone
and with a larger network that has learned from 2,000. The last line compares how far each model is off on exact
angles (lower is better).

Data: images. Teacher: a larger network. Trainer: fastai.
"""

import sys
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *

digits = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels
fours = [d * 15 for d, y in zip(digits.images.astype(np.uint8), digits.target) if y == 4]
VALID = 10_000  # pictures from here on are for validation: fours by different writers, exact angles


def turned(n):
    "Picture `n`: a four of 16 x 16 pixels, and by how many degrees it is turned"
    rng = np.random.default_rng(n)
    i, error = (
        (rng.integers(120, len(fours)), 0) if n >= VALID else (rng.integers(120), rng.normal(0, 20))
    )
    angle = rng.uniform(-90, 90)
    return np.array(Image.fromarray(fours[i]).resize((16, 16)).rotate(angle)), angle + error


def data(n_train, n_valid=200):
    block = DataBlock(
        (ImageBlock(PILImageBW), RegressionBlock),
        splitter=FuncSplitter(lambda n: n >= VALID),
        get_x=lambda n: turned(n)[0],
        get_y=lambda n: turned(n)[1],
    )
    return block.dataloaders(
        [*range(n_train), *range(VALID, VALID + n_valid)], bs=50, num_workers=0
    )


def net(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((1, *widths), widths)]
    return nn.Sequential(
        *convs, nn.Flatten(), nn.Linear(4 * widths[-1], 1), SigmoidRange(-120, 120)
    )


def main(quick=False, seed=42):
    set_seed(seed)
    many, few = [data(n, 50) for n in (200, 100)] if quick else [data(n) for n in (2000, 300)]
    epochs = 1 if quick else 20

    def learner(dls, *widths):
        set_seed(seed)  # the students start from the same weights
        return Learner(dls, net(*widths), metrics=mae)

    teacher = learner(many, 32, 64, 128)
    teacher.fit_one_cycle(1 if quick else 8, 5e-3)
    alone, student = learner(few, 8, 16, 32), learner(few, 8, 16, 32)
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2)

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'degrees off: teacher {t:.1f}, student alone {a:.1f}, student distilled {s:.1f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
