"""A ResNet-18 U-Net taught by a ResNet-34 U-Net on CamVid: alone, `kd`, `cwd`, both. Mean IoU of the last epoch, three seeds, equal epochs.

    python benchmarks/camvid_unet.py --root ../shared/data/camvid --out benchmarks/results/camvid_unet

Every finished run is kept in OUT, so that an interrupted benchmark goes on where it stopped; the table is written at the end.
"""

import json, time
from pathlib import Path
import torch, typer
from fastai.vision.all import (
    Callback,
    CrossEntropyLossFlat,
    DataBlock,
    FuncSplitter,
    ImageBlock,
    MaskBlock,
    Metric,
    Resize,
    ResizeMethod,
    aug_transforms,
    flatten_check,
    get_image_files,
    resnet18,
    resnet34,
    set_seed,
    unet_learner,
)
from rich.console import Console
from rich.table import Table
from fastdistill.fastai import KnowledgeDistillation, Term, kd, losses

VOID = 11


class MeanIoU(Metric):
    "Over the classes that occur, from one confusion matrix of the whole validation set; void pixels are left out"

    def reset(self):
        self.m = 0

    def accumulate(self, learn):
        p, y = flatten_check(learn.pred.argmax(1), learn.y)
        p, y = p[y != VOID].cpu(), y[y != VOID].cpu()
        self.m = self.m + torch.bincount(VOID * y + p, minlength=VOID * VOID).reshape(VOID, VOID)

    @property
    def value(self):
        inter, union = self.m.diag(), self.m.sum(0) + self.m.sum(1) - self.m.diag()
        return (inter[union > 0] / union[union > 0]).mean().item()

    @property
    def name(self):
        return 'miou'


class CPUBf16(Callback):
    "bfloat16 autocast of the student's forward on the CPU, where fastai has it on CUDA alone"

    order = 1

    def before_batch(self):
        self.cast = torch.autocast('cpu', dtype=torch.bfloat16)
        self.cast.__enter__()

    def after_pred(self):
        self.learn.pred = self.pred.float()
        self.cast.__exit__(None, None, None)


def data(root, size, bs):
    codes = (root / 'codes.txt').read_text().split()
    files = get_image_files(root, folders=['train', 'val']).filter(
        lambda p: p.parent.name == 'images'
    )
    block = DataBlock(
        (ImageBlock, MaskBlock(codes)),
        get_items=lambda _: sorted(files),
        get_y=lambda p: p.parent.parent / 'masks' / f'{p.stem}.png',
        splitter=FuncSplitter(lambda p: p.parent.parent.name == 'val'),
        item_tfms=Resize(size, method=ResizeMethod.Squish),
        batch_tfms=aug_transforms(max_warp=0, max_rotate=5),
    )
    return block.dataloaders(root, bs=bs, num_workers=0)


def learner(dls, arch):
    learn = unet_learner(
        dls,
        arch,
        pretrained=False,
        n_out=VOID,
        loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID),
        metrics=MeanIoU(),
        cbs=CPUBf16(),
        normalize=True,
    )
    learn.model.to(memory_format=torch.channels_last)
    return learn


def recipes():
    "The papers' weights: kd as everywhere here; cwd on logits, T 4, weight 3 (ICCV 2021)"
    cwd = lambda: Term(losses.cwd, weight=3.0, T=4.0)
    return dict(
        alone=lambda: None,
        kd=lambda: kd(T=4, alpha=0.5),
        cwd=cwd,
        both=lambda: kd(T=4, alpha=0.5) + cwd(),
    )


def main(
    root: Path = Path('../shared/data/camvid'),
    out: Path = Path('benchmarks/results/camvid_unet'),
    epochs: int = 3,
    teacher_epochs: int = 8,
    seeds: int = 3,
    bs: int = 8,
    height: int = 72,
    width: int = 96,
    lr: float = 1e-3,
    threads: int = 1,
):
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    set_seed(42, reproducible=True)
    teacher = learner(data(root, (height, width), bs), resnet34)
    weights = out / 'teacher.pth'
    if not weights.exists():
        teacher.fit_one_cycle(teacher_epochs, lr)
        torch.save(teacher.model.state_dict(), weights)
        (out / 'teacher.json').write_text(json.dumps(dict(miou=teacher.recorder.values[-1][2])))
    teacher.model.load_state_dict(torch.load(weights, weights_only=True))
    for seed in range(seeds):
        for name, recipe in recipes().items():
            if (done := out / f'{name}-{seed}.json').exists():
                continue
            set_seed(seed, reproducible=True)
            student = learner(data(root, (height, width), bs), resnet18)
            cbs = (
                [] if recipe() is None else [KnowledgeDistillation(teacher, recipe(), check=False)]
            )
            start = time.time()
            student.fit_one_cycle(epochs, lr, cbs=cbs)
            done.write_text(
                json.dumps(
                    dict(
                        name=name,
                        seed=seed,
                        miou=student.recorder.values[-1][2],
                        seconds=time.time() - start,
                    )
                )
            )
    report(out, epochs, (height, width))


def report(out, epochs, size):
    rows = [json.loads(p.read_text()) for p in sorted(out.glob('*-*.json'))]
    table = Table(
        'student',
        'mean IoU',
        'spread (std)',
        'seeds',
        'each',
        title=f'CamVid val, {size[0]}x{size[1]}, {epochs} epochs from scratch, last epoch; '
        f'teacher {json.loads((out / "teacher.json").read_text())["miou"]:.4f}',
    )
    for name in recipes():
        v = torch.tensor([r['miou'] for r in rows if r['name'] == name], dtype=torch.float64)
        table.add_row(
            name, f'{v.mean():.4f}', f'{v.std():.4f}', str(len(v)), ' '.join(f'{o:.4f}' for o in v)
        )
    Console(width=140).print(table)


if __name__ == '__main__':
    typer.run(main)
