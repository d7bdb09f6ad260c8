"""Unlabeled images: a small network has 60 labeled digits, and 1,140 more pictures without labels, which the teacher
classifies. The last line compares the accuracies on digits by different writers.

Data: images. Teacher: a larger network. Trainer: fastai.
"""

import sys
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *

digits = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels


def picture(i):
    return digits.images[i].astype(np.uint8) * 15


def data(labeled, valid):
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock(vocab=[f'{i}' for i in range(10)])),
        get_x=picture,
        get_y=lambda i: str(digits.target[i]),
        splitter=IndexSplitter(range(len(labeled), len(labeled) + len(valid))),
        batch_tfms=Rotate(10),
    )
    return block.dataloaders([*labeled, *valid], bs=20, num_workers=0)


def net(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((1, *widths), widths)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(widths[-1], 10))


def main(quick=False, seed=42):
    everything, valid = range(200 if quick else 1200), range(1200, 1300 if quick else 1797)
    few, others = everything[:60], everything[60:]
    epochs = 1 if quick else 60

    def learner(items, *widths):
        set_seed(seed)  # the students start from the same weights
        return Learner(data(items, valid), net(*widths), metrics=accuracy)

    teacher = learner(everything, 64, 128, 256)
    teacher.fit_one_cycle(1 if quick else 10, 5e-3)
    alone, student = learner(few, 8, 16, 32), learner(few, 8, 16, 32)
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2, unlabeled=list(others))

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
