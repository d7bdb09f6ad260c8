"""Compression in several steps, with labels alone and with the unpruned teacher in each step: a small network, half of
its channels pruned, quantization-aware training, an int8 file. The last line compares the accuracies of both files on
digits by different writers.

Data: images. Teacher: the unpruned network. Trainer: fastai."""

import sys, tempfile, warnings
from copy import deepcopy
import torch_pruning  # pip install torch-pruning
from sklearn.datasets import load_digits
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from fastai.vision.all import *
from fastdistill.fastai import *

warnings.filterwarnings(
    'ignore', category=DeprecationWarning
)  # torch.ao will become a separate package
digits = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels


def picture(pair):
    return np.concatenate([digits.images[i] for i in pair], 1).astype(np.uint8) * 15


def number(pair):
    return ''.join(str(digits.target[i]) for i in pair)


def data(n_train, n_valid):
    rng = np.random.default_rng(0)
    pairs = [*rng.integers(0, 1200, (n_train, 2)), *rng.integers(1200, 1797, (n_valid, 2))]
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock(vocab=[f'{i:02}' for i in range(100)])),
        get_x=picture,
        get_y=number,
        splitter=IndexSplitter(range(n_train, n_train + n_valid)),
    )
    return block.dataloaders(pairs, bs=50, num_workers=0)


def net(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((1, *widths), widths)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(2 * widths[-1], 100))


def pruned(model, x):
    model, how = deepcopy(model), torch_pruning.importance.MagnitudeImportance(p=2)
    torch_pruning.pruner.MagnitudePruner(
        model, x, importance=how, pruning_ratio=0.5, ignored_layers=[model[-1]]
    ).step()
    return model


def quantized(model, x):
    return prepare_qat_fx(deepcopy(model).train(), get_default_qat_qconfig_mapping('onednn'), x)


def main(quick=False, seed=42):
    set_seed(seed)
    dls = data(200, 100) if quick else data(600, 500)
    # torch-pruning needs plain tensors
    x, epochs = dls.one_batch()[0][:2].as_subclass(torch.Tensor), 1 if quick else 20
    teacher = Learner(dls, net(64, 128, 256), metrics=accuracy)
    teacher.fit_one_cycle(epochs, 5e-3)

    def chain(fit, file):
        set_seed(seed)  # both chains start from the same weights
        model = net(16, 32, 64)
        for change, lr, n in (
            (None, 1e-2, epochs),
            (pruned, 5e-3, epochs),
            (quantized, 1e-4, 1 if quick else 5),
        ):
            learn = Learner(
                dls, model if change is None else change(learn.model, x), metrics=accuracy
            )
            fit(learn, n, lr)
        return export_student(learn, file, int8=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        alone = chain(lambda learn, n, lr: learn.fit_one_cycle(n, lr), folder / 'alone.onnx')
        student = chain(lambda learn, n, lr: learn.distill(teacher, n, lr), folder / 'student.onnx')
        t, a, s = (
            teacher.validate()[1],
            *[e.report.models['int8'].measures['accuracy'].value for e in (alone, student)],
        )
    print(
        f'accuracy in {student.bytes / 1000:.0f} kB: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}'
    )


if __name__ == '__main__':
    main('--quick' in sys.argv)
