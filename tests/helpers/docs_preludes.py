"""What a page may take as given: `<!-- prelude: NAME -->` at its top runs the function NAME, and its blocks begin with the names
that come back. In the README, the marker stands before the block that needs it."""

import functools, warnings
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

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


class Narrow(ResNet):
    """A ResNet of torchvision with its stages and their names, and an eighth of their channels. Only the last stage has all of
    its blocks, which pages name: a page runs in a third of the time"""

    def __init__(self, *blocks):
        super().__init__(BasicBlock, blocks)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)

    def _make_layer(self, block, planes, *args, **kwargs):
        self.inplanes = min(self.inplanes, planes // 8)  # the stem had 64 channels
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def narrow18(pretrained=False):
    return Narrow(1, 1, 1, 2)


def narrow34(pretrained=False):
    return Narrow(1, 1, 1, 3)


RESNET = fastai_vision.model_meta[fastai_vision.resnet18]
for arch in (narrow18, narrow34):  # fastai knows this of its own architectures only
    fastai_vision.model_meta[arch] = dict(cut=RESNET['cut'], split=RESNET['split'])


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
    teacher = learner(narrow34, vision_dls())
    for m in teacher.model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 0.5  # its statistics must settle within ten steps
    with teacher.no_logging():
        teacher.fit(5, 1e-3)
    return teacher.model


def vision():
    "`student` (a narrow ResNet-18) and the trained `teacher` (a narrow ResNet-34), Learners on 16 + 8 `images` of 32 pixels in 3 classes; after both star imports, with a narrow `resnet18`"
    dls = vision_dls()
    student, teacher = learner(narrow18, dls), learner(narrow34, dls)
    teacher.model.load_state_dict(trained().state_dict())
    return (
        names(fastai_vision)
        | names(fastdistill_fastai)
        | dict(student=student, teacher=teacher, dls=dls, images=pictures()[0], resnet18=narrow18)
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
        for n, arch in dict(small=narrow18, big=narrow34).items()
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
    return space | dict(alone=learner(narrow18, space['dls']))


def loop():
    """A plain loop's `student`, `teacher`, `loader` and `opt`, logits `s` and `t` of both with their `targets`, and
    `Distiller`, `Recipe`, `Teacher`, `Term`, `kd`, `losses`, `recipes`, `torch`, `nn`, `F`"""
    import fastdistill

    def net(width):
        convs = [nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*convs, nn.Flatten(), nn.Linear(width, 10))

    student, teacher = net(4), net(16)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
    s, t = torch.randn(2, 8, 10)
    names = 'Distiller Recipe Teacher Term kd losses recipes'.split()
    return {n: getattr(fastdistill, n) for n in names} | dict(
        student=student,
        teacher=teacher,
        loader=DataLoader(TensorDataset(x, y), batch_size=8),
        opt=torch.optim.SGD(student.parameters(), lr=0.1),
        s=s,
        t=t,
        targets=torch.randint(10, (8,)),
        torch=torch,
        nn=nn,
        F=F,
    )


def texts():
    "`loop`, with small BERTs as `student` and `teacher`, `data` in three classes, `args`, and `Trainer`"
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    def bert(width, layers):
        sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers)
        config = BertConfig(vocab_size=100, num_attention_heads=2, num_labels=3, **sizes)
        return BertForSequenceClassification(config)

    quiet = dict(report_to=[], use_cpu=True, dataloader_pin_memory=False, max_steps=2)
    data = [dict(input_ids=torch.randint(100, (12,)), labels=i % 3) for i in range(16)]
    return loop() | dict(
        student=bert(16, 2),
        teacher=bert(32, 4),
        data=data,
        args=TrainingArguments('runs', **quiet),
        Trainer=Trainer,
    )


def detectors():
    "Detectors of different families, loaders of images with rectangles, and images without labels"
    from detectors import batch, detector, fastai_loaders
    from torch.utils.data import DataLoader

    collate = lambda rows: tuple(zip(*rows))
    rows = lambda n, seed: list(zip(*batch(n, seed=seed)))
    loader = lambda n, seed: DataLoader(rows(n, seed), 4, collate_fn=collate)

    class Yolo(nn.Module):
        "Returns losses in training mode and predictions otherwise, each in a dict"

        def __init__(self, width):
            super().__init__()
            up, down = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, width, 2, 2)
            self.neck = nn.ModuleDict(dict(up=up, down=down))

        def forward(self, x, targets=None):
            x = self.neck.down(self.neck.up(x))
            if self.training:
                return dict(total_loss=x.pow(2).mean(), num_boxes=len(targets))
            return dict(predictions=x)

    return dict(
        yolo=Yolo(4),
        yolo_teacher=Yolo(8),
        yolo_loader=DataLoader(list(zip(torch.rand(4, 3, 32, 32), torch.zeros(4, 2, 5))), 2),
        torch=torch,
        nn=nn,
        collate=collate,
        student=detector('SSD').train(),
        baseline=detector('SSD'),
        teacher=detector('RetinaNet', width=12, seed=1, score_thresh=0.0),
        twin=detector('SSD', width=12, seed=2),
        same_kind=detector('RetinaNet', width=12, seed=3),
        train_loader=loader(8, 0),
        valid_loader=loader(8, 1),
        unlabeled=batch(4, seed=2)[0],
        dls=fastai_loaders(*batch(8, seed=3), 4),
    )
