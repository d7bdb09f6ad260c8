"""A chain of compression on CIFAR-10: a student, then half of its channels pruned, then quantization-aware training, then an int8 file. Each step
is trained with labels alone, with a ResNet-20 as the teacher, or (from the pruning on) with the unpruned float student as the teacher. Test
accuracy of the last epoch, three seeds; size and latency of the exported files.

    python benchmarks/compression.py --root ../shared/data --out benchmarks/results/compression

ROOT is that of cache_cifar.py. It needs torch-pruning and the extra 'onnx'. Every finished chain is kept in OUT, so that an interrupted benchmark
goes on where it stopped; the table is written at the end.
"""

import importlib.util, json, tempfile, time, warnings
from copy import deepcopy
from pathlib import Path
import numpy as np
import torch, torch_pruning, typer
from PIL import Image
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from fastai.vision.all import *
from fastdistill.fastai import *
from rich.console import Console  # after fastai's names
from rich.table import Table
from cache_cifar import sheets, subset

EPOCHS = dict(student=12, pruned=5, quantized=2)
RATES = dict(student=1e-2, pruned=5e-3, quantized=1e-4)
CHAINS = 'labels alone', 'ResNet-20 in each step', 'the unpruned student'


def data(root, n, n_test):
    "`n` training images, cropped and flipped; 500 for validation, which chooses nothing; all `n_test` of the test set"
    (x, y), (x_test, y_test) = [
        subset(*sheets(root / 'cifar10', o), k) for o, k in (('train', n), ('test', n_test))
    ]
    order = np.random.default_rng(1).permutation(n_test)
    x, y = np.concatenate([x, x_test[order]]), np.concatenate([y, y_test[order]])
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=list(range(10)))),
        get_x=lambda i: Image.fromarray(x[i]),
        get_y=lambda i: int(y[i]),
        splitter=IndexSplitter(range(n, n + 500)),
        item_tfms=[RandomResizedCrop(32, min_scale=0.6, val_xtra=0), FlipItem()],
        batch_tfms=Normalize.from_stats(*imagenet_stats),
    )
    dls = block.dataloaders(range(n + 500), bs=64, num_workers=0)
    return dls, dls.test_dl(range(n, len(x)), with_labels=True)


def net(*widths):
    layers = [
        ConvLayer(i, o, stride=s)
        for i, w in zip((3, *widths), widths)
        for i, o, s in ((i, w, 1), (w, w, 2))
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def pruned(model, x):
    "A copy with half of the channels of each layer"
    model = deepcopy(model)
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    torch_pruning.pruner.MagnitudePruner(
        model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[model[-1]]
    ).step()
    return model


def quantized(model, x):
    "A copy in quantization-aware training"
    return prepare_qat_fx(deepcopy(model).train(), get_default_qat_qconfig_mapping('onednn'), (x,))


def trained(dls, model, step, teacher):
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        if teacher is None:
            learn.fit_one_cycle(EPOCHS[step], RATES[step])
        else:
            learn.distill(teacher, EPOCHS[step], RATES[step])
    return learn


def chain(dls, way, seed, resnet, student, folder):
    "(file of each step, student)"
    teacher = resnet if way == CHAINS[1] else None
    set_seed(seed, reproducible=True)
    if student is None:
        student = trained(dls, net(16, 32, 64), 'student', teacher)
    x = dls.one_batch()[0][:2].as_subclass(torch.Tensor)  # torch-pruning follows plain tensors
    if way == CHAINS[2]:
        teacher = student
    small = trained(dls, pruned(student.model, x), 'pruned', teacher)
    qat = trained(dls, quantized(small.model, x), 'quantized', teacher)
    files = {
        'student': (student, False),
        'pruned': (small, False),
        'pruned, int8 after training': (small, True),
        'pruned, quantization-aware, int8': (qat, True),
    }
    return {
        k: export_student(learn, folder / f'{i}.onnx', int8=int8).path
        for i, (k, (learn, int8)) in enumerate(files.items())
    }, student


def measured(dls, test, files, seconds=0):
    "Accuracy and bytes of each file, and milliseconds for one image and for 64"
    report = compare(
        {k: str(p) for k, p in files.items()},
        dls,
        dl=test,
        loss_func=CrossEntropyLossFlat(),
        large=64,
        seconds=seconds,
        progress=False,
    )
    results = {
        k: dict(accuracy=m.measures['accuracy'].value, bytes=Path(files[k]).stat().st_size)
        for k, m in report.models.items()
    }
    for k, m in report.models.items():
        results[k]['ms'] = [o.p50 for o in m.cost.latency]
    return results


def main(
    root: Path = Path('../shared/data'),
    out: Path = Path('benchmarks/results/compression'),
    n: int = 3000,
    n_test: int = 5000,
    seeds: int = 3,
    views: int = 8,
):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')  # of PyTorch's quantization and of torch-pruning
    out.mkdir(parents=True, exist_ok=True)
    spec = importlib.util.spec_from_file_location('cifar_resnets', root / 'cifar_resnets.py')
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    (dls, test), resnet = data(root, n, n_test), nets.akamaster(20)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stored = cache_teacher(resnet, dls, folder / 'resnet', views=views, kind='softmax')
        for seed in range(seeds):
            student = None
            for way in CHAINS:
                if (done := out / f'{way.replace(" ", "_")}-{seed}.json').exists():
                    continue
                start = time.process_time()
                (folder / way).mkdir(exist_ok=True)
                alone = student if way == CHAINS[2] else None
                files, last = chain(dls, way, seed, stored, alone, folder / way)
                if way == CHAINS[0]:
                    student = last
                results = measured(dls, test, files)
                done.write_text(
                    json.dumps(
                        dict(
                            way=way,
                            seed=seed,
                            cpu_seconds=time.process_time() - start,
                            steps=results,
                        )
                    )
                )
                print(done.read_text(), flush=True)
        if not (out / 'cost.json').exists():
            teacher = export_student(
                Learner(dls, resnet, loss_func=CrossEntropyLossFlat()), folder / 'teacher.onnx'
            ).path
            (out / 'cost.json').write_text(
                json.dumps(measured(dls, test, {'ResNet-20': teacher, **files}, seconds=2))
            )
    report(out)


def report(out):
    rows, cost = (
        [json.loads(p.read_text()) for p in sorted(out.glob('*-*.json'))],
        json.loads((out / 'cost.json').read_text()),
    )
    table = Table(
        'step',
        *CHAINS,
        'kB',
        'ms for 1',
        'ms for 64',
        title=f'accuracy, %, mean and std; ResNet-20: {100 * cost["ResNet-20"]["accuracy"]:.1f}',
    )
    for step, c in cost.items():
        v = [
            [
                100 * r['steps'][step]['accuracy']
                for r in rows
                if r['way'] == way and step in r['steps']
            ]
            for way in CHAINS
        ]
        cells = [f'{np.mean(o):.1f} ± {np.std(o, ddof=1):.1f}' if len(o) > 1 else '' for o in v]
        table.add_row(step, *cells, f'{c["bytes"] / 1000:.0f}', *[f'{ms:.2f}' for ms in c['ms']])
    Console(width=180).print(table)


if __name__ == '__main__':
    typer.run(main)
