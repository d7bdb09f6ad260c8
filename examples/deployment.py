"""From a teacher to a file that runs without PyTorch: two students are distilled, or not, and exported as ONNX. The last
line compares what onnxruntime predicts with both files, on digits by different writers.

Data: images. Teacher: a larger network. Trainer: fastai.
"""

import sys, tempfile
import onnxruntime
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


def accuracy_of_file(file, samples):
    "No PyTorch: onnxruntime and NumPy"
    session = onnxruntime.InferenceSession(file)
    images = np.stack([o.numpy() for o, _ in samples])
    logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    return (logits.argmax(1) == np.array([int(o) for _, o in samples])).mean()


def main(quick=False, seed=42):
    train, valid = numbers(200 if quick else 600, 0, 1200), numbers(1000, 1200, 1797)
    dls = DataLoaders.from_dsets(train, valid, bs=50)
    epochs = 1 if quick else 20

    def learner(*widths):
        set_seed(seed)  # the students start from the same weights
        return Learner(dls, net(*widths), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

    teacher = learner(64, 128, 256)
    teacher.fit_one_cycle(epochs, 5e-3)
    alone, student = learner(8, 16, 32), learner(8, 16, 32)
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2)

    scores = []
    with tempfile.TemporaryDirectory() as folder:
        for name, learn in dict(alone=alone, student=student).items():
            file = f'{folder}/{name}.onnx'
            print(export_student(learn, file))  # the size, and the largest difference
            scores.append(accuracy_of_file(file, valid))
    t, (a, s) = teacher.validate()[1], scores
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
