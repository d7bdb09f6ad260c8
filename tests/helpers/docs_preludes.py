"""What a page may take as given: `<!-- prelude: NAME -->` at its top runs the function NAME, and its blocks begin with the names
that come back. In the README, the marker stands before the block that needs it."""

import functools, warnings
import numpy as np
import torch
from torch import nn

with (
    warnings.catch_warnings()
):  # while it is imported, fastai uses what PyTorch and pandas have deprecated
    warnings.simplefilter('ignore')
    import fastai.vision.all as fastai_vision
    import fastdistill.fastai as fastdistill_fastai

CLASSES = ['red', 'green', 'blue']


def names(module):
    return {
        n: getattr(module, n)
        for n in getattr(module, '__all__', None) or dir(module)
        if not n.startswith('_')
    }


@functools.cache
def pictures(n=24, size=32):
    "Noise with a square of one colour: (n, size, size, 3) bytes, and the colours' names"
    g = np.random.default_rng(0)
    x, y = (
        g.integers(0, 120, (n, size, size, 3)).astype(np.uint8),
        [CLASSES[i % 3] for i in range(n)],
    )
    for im, c in zip(x, y):
        im[8:24, 8:24, CLASSES.index(c)] += 130
    return list(x), y


def picture(i):
    return pictures()[0][i]


def colour(i):
    return pictures()[1][i]


def vision_dls():
    v = fastai_vision
    block = v.DataBlock(
        (v.ImageBlock, v.CategoryBlock(vocab=CLASSES)),
        get_x=picture,
        get_y=colour,
        splitter=v.IndexSplitter(range(16, 24)),
        item_tfms=v.FlipItem(),
    )
    return block.dataloaders(range(24), bs=8, num_workers=0)


def learner(arch, dls):
    learn = fastai_vision.vision_learner(
        dls, arch, pretrained=False, metrics=fastai_vision.accuracy
    )
    learn.remove_cb(fastai_vision.ProgressCallback)
    return learn


@functools.cache
def trained():
    "A teacher that knows the colours, made once"
    torch.manual_seed(0)
    teacher = learner(fastai_vision.resnet34, vision_dls())
    for m in teacher.model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 0.5  # its statistics must settle within ten steps
    with teacher.no_logging():
        teacher.fit(5, 1e-3)
    return teacher.model


def vision():
    "`student` (ResNet-18) and the trained `teacher` (ResNet-34), Learners on 16 + 8 `images` of 32 pixels in 3 classes; after both star imports"
    dls = vision_dls()
    student, teacher = learner(fastai_vision.resnet18, dls), learner(fastai_vision.resnet34, dls)
    teacher.model.load_state_dict(trained().state_dict())
    return (
        names(fastai_vision)
        | names(fastdistill_fastai)
        | dict(student=student, teacher=teacher, dls=dls, images=pictures()[0])
    )


def mask(i):
    m = np.zeros((32, 32), np.uint8)
    m[8:24, 8:24] = 1 + CLASSES.index(colour(i))
    return m


def forum():
    "`vision`, and the colours as `labels`, `teacher_outputs(images)`, two U-Nets `small` and `big`"
    v, space = fastai_vision, vision()
    block = v.DataBlock(
        (v.ImageBlock, v.MaskBlock(codes=['ground', *CLASSES])),
        get_x=picture,
        get_y=mask,
        splitter=v.IndexSplitter(range(16, 24)),
    )
    dls = block.dataloaders(range(24), bs=8, num_workers=0)
    nets = {
        n: v.unet_learner(dls, arch, pretrained=False, n_out=4)
        for n, arch in dict(small=v.resnet18, big=v.resnet34).items()
    }
    for l in nets.values():
        l.remove_cb(v.ProgressCallback)

    def teacher_outputs(images):
        dl = space['dls'].test_dl(list(range(len(images))))
        return space['teacher'].get_preds(dl=dl, act=v.noop)[0].numpy()

    return space | nets | dict(labels=pictures()[1], teacher_outputs=teacher_outputs)


def compare():
    "`vision`, and `alone`, a third Learner with the student's architecture"
    space = vision()
    return space | dict(alone=learner(fastai_vision.resnet18, space['dls']))


def detectors():
    "Detectors of different families, loaders of images with rectangles, and images without labels"
    from detectors import batch, detector, fastai_loaders
    from torch.utils.data import DataLoader

    collate = lambda rows: tuple(zip(*rows))
    rows = lambda n, seed: list(zip(*batch(n, seed=seed)))
    loader = lambda n, seed: DataLoader(rows(n, seed), 4, collate_fn=collate)
    return dict(
        torch=torch,
        nn=nn,
        collate=collate,
        student=detector('SSD').train(),
        baseline=detector('SSD'),
        teacher=detector('RetinaNet', width=12, seed=1, score_thresh=0.0),
        twin=detector('SSD', width=12, seed=2),
        train_loader=loader(8, 0),
        valid_loader=loader(8, 1),
        unlabeled=batch(4, seed=2)[0],
        dls=fastai_loaders(*batch(8, seed=3), 4),
    )
