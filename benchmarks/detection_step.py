"""What a teacher costs in a training step of a detector: SSDLite320 alone and taught by a RetinaNet with a ResNet-50, batch 8, in turns. Seconds of the
processor (not of the clock), so that other work on the machine counts less.

    python benchmarks/detection_step.py --out benchmarks/results/detection/step.json
"""

import json, time
from pathlib import Path
import numpy as np, torch, typer
from torchvision.models.detection import retinanet_resnet50_fpn, ssdlite320_mobilenet_v3_large
from fastdistill.recipes import pkd
from fastdistill.detection import DetectionDistiller


def main(
    out: Path = Path('benchmarks/results/detection/step.json'), turns: int = 6, batch: int = 8
):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = dict(weights=None, weights_backbone=None, num_classes=21)
    teacher = retinanet_resnet50_fpn(**plain)
    student = ssdlite320_mobilenet_v3_large(**plain).train()
    ways = {
        'alone': student,
        'pkd, a weight': DetectionDistiller(student, teacher, pkd(weight=1.0)),
        'pkd, a gradient ratio that is measured in each step': DetectionDistiller(
            student, teacher, pkd(grad_ratio=1.0)
        ),
    }
    images = [torch.rand(3, 320, 320) for _ in range(batch)]
    boxes = torch.tensor([[20.0, 30, 120, 150], [100, 100, 300, 250]])
    targets = [dict(boxes=boxes, labels=torch.tensor([1, 5])) for _ in images]
    opts = {k: torch.optim.SGD(m.parameters(), 1e-4) for k, m in ways.items()}
    seconds = {k: [] for k in ways}
    for m in ways.values():
        if m is not student:
            m.teacher.start()
    for turn in range(turns + 1):
        for k, m in ways.items():
            begin = time.process_time()
            opts[k].zero_grad()
            sum(m(images, targets).values()).backward()
            opts[k].step()
            if turn:
                seconds[k].append(time.process_time() - begin)
        print({k: v[-1:] for k, v in seconds.items()}, flush=True)
    median = {k: float(np.median(v)) for k, v in seconds.items()}
    ratio = {k: v / median['alone'] for k, v in median.items()}
    facts = dict(
        batch=batch, size=320, threads=1, turns=turns, teacher=str(ways['pkd, a weight'].teacher)
    )
    out.write_text(json.dumps(facts | dict(seconds=seconds, median=median, ratio=ratio), indent=1))
    print(ratio)


if __name__ == '__main__':
    typer.run(main)
