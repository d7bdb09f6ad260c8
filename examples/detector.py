"""A small SSD learns to find shapes from a larger FCOS, both detectors of torchvision. The last line compares the mean average precisions. For your own images,
replace `shapes` with a list of (image, target): a tensor (3, H, W) from 0 to 1, and a dict with 'boxes' (N, 4) in pixels (x1, y1, x2, y2) and 'labels' (N,),
which start at 1.

Data: boxes. Teacher: a larger detector. Trainer: a plain loop.
"""

import sys
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD
from fastdistill.detection import DetectionDistiller, compare_detectors

CLASSES, SIZE = ['square', 'disk', 'triangle'], 96
collate = lambda rows: tuple(zip(*rows))


def shapes(n, seed):
    "Noisy images with one to five shapes of any color, and their boxes"
    g = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=g))
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing='ij')
    for _ in range(n):
        x = torch.rand(3, 1, 1, generator=g) * 0.5 + 0.15 * torch.randn(3, SIZE, SIZE, generator=g)
        found = []
        for _ in range(number(1, 6)):
            side, kind = number(12, 32), number(1, 4)
            top, left = number(0, SIZE - side), number(0, SIZE - side)
            i, j = rows - top + 0.5, columns - left + 0.5
            square = (i > 0) & (i < side) & (j > 0) & (j < side)
            disk = (i - side / 2) ** 2 + (j - side / 2) ** 2 <= side**2 / 4
            triangle = square & ((j - side / 2).abs() <= i / 2)
            x[:, [square, disk, triangle][kind - 1]] = torch.rand(3, 1, generator=g)
            found.append([left, top, left + side, top + side, kind])
        found = torch.tensor(found)
        yield x.clamp(0, 1), dict(boxes=found[:, :4].float(), labels=found[:, 4])


def pyramid(*widths, channels):
    "Four blocks, each of half the resolution, and levels of stride 8, 16 and 32"
    conv = lambda i, o, step: (nn.Conv2d(i, o, 3, step, 1), nn.BatchNorm2d(o), nn.ReLU())
    block = lambda i, o: nn.Sequential(*conv(i, o, 2), *conv(o, o, 1))
    body = nn.Sequential(*map(block, (3, *widths), widths))
    return BackboneWithFPN(body, {'2': '0', '3': '1'}, widths[2:], channels)


def large():
    sizes = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return FCOS(pyramid(32, 64, 96, 128, channels=64), 4, SIZE, SIZE, anchor_generator=sizes)


def small(seed):
    torch.manual_seed(seed)  # the students start from the same weights
    levels = pyramid(8, 16, 24, 32, channels=24)
    levels.out_channels = [24] * 3  # of each level
    boxes = DefaultBoxGenerator([[]] * 3, scales=[0.14, 0.25, 0.4, 0.6], steps=[8, 16, 32])
    return SSD(levels, boxes, (SIZE, SIZE), 4, score_thresh=0.05)


def train(step, data, epochs, lr):
    "`step` is a detector or a DetectionDistiller: both return a dict of losses"
    loader = DataLoader(data, 16, shuffle=True, collate_fn=collate)
    opt = torch.optim.AdamW(step.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs * len(loader))
    for _ in range(epochs):
        for images, targets in loader:
            opt.zero_grad()
            sum(step(images, targets).values()).backward()
            opt.step()
            schedule.step()


def main(quick=False, seed=42):
    torch.manual_seed(seed)
    n, n_test, epochs = (32, 50, 1) if quick else (400, 200, 12)
    data, test = [*shapes(n, 0)], DataLoader([*shapes(n_test, 1)], 50, collate_fn=collate)
    models = dict(teacher=large(), alone=small(seed), distilled=small(seed))
    train(models['teacher'].train(), data, epochs, 3e-3)
    train(models['alone'].train(), data, epochs, 1e-2)
    distiller = DetectionDistiller(models['distilled'].train(), models['teacher'])
    print(distiller.check(test))
    with distiller.teacher:
        train(distiller, data, epochs, 1e-2)
    report = compare_detectors(models, test, classes=CLASSES, seconds=0 if quick else 0.5)
    found = zip(('teacher', 'student alone', 'student distilled'), report.models.values())
    print('mAP:', ', '.join(f'{n} {m.measures["map"].value:.3f}' for n, m in found))
    return models, test


if __name__ == '__main__':
    main('--quick' in sys.argv)
