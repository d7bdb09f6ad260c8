"""A small detector learns from a large one, on pictures of shapes that this file draws. It takes a few minutes on two cores.

    python examples/detector.py

For your own images, replace `shapes` by a list of (image, target): a tensor (3, H, W) from 0 to 1, and a dict with 'boxes' (N, 4) in pixels, x1 y1 x2 y2,
and 'labels' (N,), which start at 1. Everything else stays.
"""

import sys
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD, DefaultBoxGenerator
from fastdistill.detection import DetectionDistiller, compare_detectors, show_detections

CLASSES = ['square', 'disk', 'triangle']


# data


def shapes(n, seed, size=96):
    "Images with one to five shapes of any color on a noisy background, and their boxes"
    g = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=g))
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    found = []
    for _ in range(n):
        x = torch.rand(3, 1, 1, generator=g) * 0.5 + 0.15 * torch.randn(3, size, size, generator=g)
        boxes, labels = [], []
        for _ in range(number(1, 6)):
            side, kind = number(12, 32), number(1, 4)
            top, left = number(0, size - side), number(0, size - side)
            i, j = rows - top, columns - left
            inside = (i >= 0) & (i < side) & (j >= 0) & (j < side)
            if kind == 2:
                inside = (i + 0.5 - side / 2) ** 2 + (j + 0.5 - side / 2) ** 2 <= side**2 / 4
            if kind == 3:
                inside &= (j + 0.5 - side / 2).abs() <= (i + 1) / 2
            color = torch.rand(3, 1, generator=g) * 0.7 + 0.3
            x[:, inside] = color + 0.05 * torch.randn(3, int(inside.sum()), generator=g)
            boxes.append([left, top, left + side, top + side])
            labels.append(kind)
        target = dict(boxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.tensor(labels))
        found.append((x.clamp(0, 1), target))
    return found


def collate(rows):
    return tuple(zip(*rows))


# models


def blocks(*widths):
    "Halves the resolution with each width"
    layers = [
        nn.Sequential(
            nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
            nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
        )
        for a, b in zip((3, *widths), widths)
    ]  # fmt: skip
    return nn.Sequential(*layers)


def large(size=96):
    "A RetinaNet with levels of stride 8, 16, 32"
    body = blocks(32, 64, 96, 128)
    backbone = BackboneWithFPN(body, {'2': '0', '3': '1'}, [96, 128], 64)
    anchors = AnchorGenerator(((12, 17), (24, 32), (44, 56)), ((1.0,),) * 3)
    return RetinaNet(
        backbone, len(CLASSES) + 1, min_size=size, max_size=size, anchor_generator=anchors
    )


class Levels(nn.Module):
    "Feature maps of stride 8 and 16"

    def __init__(self, *widths):
        super().__init__()
        body = blocks(*widths)
        self.fine, self.coarse = body[:3], body[3:]
        self.out_channels = list(widths[2:])

    def forward(self, x):
        fine = self.fine(x)
        return {'fine': fine, 'coarse': self.coarse(fine)}


def small(size=96):
    "An SSD: a different family, with different levels and channels"
    boxes = DefaultBoxGenerator([[], []], scales=[0.14, 0.25, 0.35], steps=[8, 16])
    return SSD(Levels(8, 16, 24, 32), boxes, (size, size), len(CLASSES) + 1, score_thresh=0.05)


# training


def train(step, parameters, data, epochs, lr, seed=0):
    """Train for some epochs.

    Args:
        step: fn(images, targets) -> dict of losses: a detector, or a `DetectionDistiller`.
    """
    loader = DataLoader(
        data, 16, shuffle=True, drop_last=True, collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    opt = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for images, targets in loader:
            losses = step(images, targets)
            opt.zero_grad()
            sum(losses.values()).backward()
            opt.step()
            schedule.step()
    print({k: round(v.item(), 3) for k, v in losses.items()})


def main(train_images=400, epochs=12, picture=None):
    data, test = shapes(train_images, seed=0), shapes(100, seed=1)
    torch.manual_seed(0)
    teacher, alone = large(), small()
    student = small()
    student.load_state_dict(alone.state_dict())

    print('teacher')
    train(teacher.train(), teacher.parameters(), data, epochs, 2e-3)
    print('student alone')
    train(alone.train(), alone.parameters(), data, epochs, 4e-3)
    print('student with teacher')
    distiller = DetectionDistiller(student.train(), teacher)
    print(distiller.pairs)
    distiller.check(DataLoader(test, 25, collate_fn=collate)).enforce()
    with distiller.teacher:
        train(distiller, distiller.parameters(), data, epochs, 4e-3)

    models = dict(teacher=teacher, alone=alone, distilled=student)
    report = compare_detectors(
        models, DataLoader(test, 25, collate_fn=collate), classes=CLASSES, title='Shapes'
    )
    print(report.to_markdown())
    if picture:
        images, targets = collate(test[:4])
        show_detections(models, images, targets, classes=CLASSES, score=0.5).savefig(
            picture, dpi=110
        )
    return report


if __name__ == '__main__':
    main(picture=sys.argv[1] if len(sys.argv) > 1 else None)
