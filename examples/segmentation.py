"""A small U-Net finds and reads a handwritten digit, pixel by pixel, alone and with a larger U-Net as its teacher, with
`recipes.cwd()`. The last line compares the mean Dice coefficients of the eleven classes on digits by different writers.

Data: masks. Teacher: a larger network. Trainer: fastai.
"""

import sys
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *

digits = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels


def scene(i):
    "Digit `i` somewhere on a noisy background of 16 x 16, and the mask: 0 is the background, 1 the digit 0 and so on"
    rng = np.random.default_rng(i)
    image, mask = rng.integers(0, 90, (16, 16), dtype=np.uint8), np.zeros((16, 16), np.uint8)
    x, y = rng.integers(0, 9, 2)
    image[y : y + 8, x : x + 8] += (10 * digits.images[i]).astype(np.uint8)
    mask[y : y + 8, x : x + 8] = (digits.images[i] > 4) * (digits.target[i] + 1)
    return np.stack([image] * 3, -1), mask


def data(items):
    blocks = ImageBlock, MaskBlock(codes=['background', *'0123456789'])
    block = DataBlock(
        blocks,
        splitter=FuncSplitter(lambda i: i >= 1200),
        get_x=lambda i: scene(i)[0],
        get_y=lambda i: scene(i)[1],
    )
    return block.dataloaders(items, bs=25, num_workers=0)


def encoder(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((3, *widths), widths)]
    return nn.Sequential(
        *convs, nn.AdaptiveAvgPool2d(1)
    )  # unet_learner cuts it at its last pooling layer


def small(pretrained):
    return encoder(8, 16, 32)


def big(pretrained):
    return encoder(24, 48, 96)


def main(quick=False, seed=42):
    set_seed(seed)
    dls = data(range(1150, 1250) if quick else range(400, 1600))

    def learner(arch):
        set_seed(seed)  # the students start from the same weights
        return unet_learner(dls, arch, pretrained=False, n_out=11, metrics=DiceMulti())

    teacher = learner(big)
    teacher.fit_one_cycle(1 if quick else 12, 1e-2)
    alone, student = learner(small), learner(small)
    alone.fit_one_cycle(1 if quick else 8, 1e-2)
    student.distill(teacher, 1 if quick else 8, 1e-2, recipes.cwd())

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'Dice: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
