"Small detectors of each kind, and batches of images with colored rectangles."

from collections import OrderedDict
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign


class Pyramid(nn.Module):
    "Levels of stride 8, 16, 32, with their own names"

    def __init__(self, width=8, names='012', norm=nn.BatchNorm2d):
        super().__init__()
        self.names, self.out_channels = names, width
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), norm(width), nn.ReLU())
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), norm(width), nn.ReLU()) for _ in names
        )

    def forward(self, x):
        x, out = self.stem(x), OrderedDict()
        for n, m in zip(self.names, self.down):
            out[n] = x = m(x)
        return out


SIZES = dict(min_size=64, max_size=128)
ANCHORS = ((8,), (16,), (32,))


def detector(kind, width=8, classes=4, names='012', seed=0, **options):
    torch.manual_seed(seed)
    if kind == 'FCOS':
        width = 32  # its head has group norms of 32 groups
    backbone = Pyramid(width, names)
    if kind == 'SSD':
        backbone.out_channels = [width] * len(names)
        boxes = DefaultBoxGenerator([[2]] * len(names), steps=[8 * 2**i for i in range(len(names))])
        return SSD(backbone, boxes, options.pop('size', (64, 64)), classes, **options)
    options = SIZES | options
    anchors = AnchorGenerator(ANCHORS[: len(names)], ((1.0,),) * len(names))
    if kind in ('RetinaNet', 'FCOS'):
        made = dict(RetinaNet=RetinaNet, FCOS=FCOS)[kind]
        return made(backbone, classes, anchor_generator=anchors, **options)
    pool = lambda n: MultiScaleRoIAlign(list(names), n, 2)
    common = dict(rpn_anchor_generator=anchors, box_roi_pool=pool(7), **options)
    if kind == 'FasterRCNN':
        return FasterRCNN(backbone, classes, **common)
    # torchvision's own heads have up to 512 channels: a prediction takes seconds
    if kind == 'MaskRCNN':
        head = MaskRCNNHeads(width, (16, 16), 1)
        model = MaskRCNN(backbone, classes, mask_roi_pool=pool(14), mask_head=head, **common)
        model.roi_heads.mask_predictor = MaskRCNNPredictor(16, 16, classes)
        return model
    small = dict(
        keypoint_head=KeypointRCNNHeads(width, (16, 16)),
        keypoint_predictor=KeypointRCNNPredictor(16, 2),
    )
    return KeypointRCNN(backbone, classes, keypoint_roi_pool=pool(14), **small, **common)


KINDS = 'RetinaNet', 'FCOS', 'SSD', 'FasterRCNN', 'MaskRCNN', 'KeypointRCNN'


def batch(n=2, size=(64, 64), seed=0, boxes=2):
    "Images and targets, with masks and keypoints; `size` is (height, width), or one for each image"
    g = torch.Generator().manual_seed(seed)
    sizes = size if isinstance(size[0], tuple) else [size] * n
    images, targets = [], []
    for h, w in sizes:
        x = torch.rand(3, h, w, generator=g) * 0.1
        where, labels = [], []
        for _ in range(boxes):
            i, j = [int(torch.randint(n // 2, (1,), generator=g)) for n in (h, w)]
            k = int(torch.randint(3, (1,), generator=g))
            x[k, i : i + h // 3, j : j + w // 3] = 1
            where.append([j, i, j + w // 3, i + h // 3])
            labels.append(k + 1)
        boxes_ = torch.tensor(where, dtype=torch.float32).reshape(-1, 4)
        points = torch.stack([boxes_[:, :2], boxes_[:, 2:]], 1)
        masks = torch.zeros(len(where), h, w, dtype=torch.uint8)
        for m, (a, b, c, d) in zip(masks, where):
            m[b:d, a:c] = 1
        images.append(x)
        targets.append(
            dict(
                boxes=boxes_,
                labels=torch.tensor(labels, dtype=torch.int64),
                masks=masks,
                keypoints=torch.cat([points, torch.ones(len(where), 2, 1)], 2),
            )
        )
    return images, targets


def fastai_loaders(images, targets, bs=2, tfms=()):
    "DataLoaders of fastai's blocks for boxes; half of the images are for validation"
    import numpy as np
    from fastai.vision.all import (
        BBoxBlock,
        BBoxLblBlock,
        DataBlock,
        ImageBlock,
        PILImage,
        RandomSplitter,
    )

    names = ['red', 'green', 'blue']
    array = lambda i: (images[i].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    block = DataBlock(
        (ImageBlock, BBoxBlock, BBoxLblBlock(names)),
        get_items=lambda _: range(len(images)),
        getters=[
            lambda i: PILImage.create(array(i)),
            lambda i: targets[i]['boxes'].tolist(),
            lambda i: [names[c - 1] for c in targets[i]['labels'].tolist()],
        ],
        splitter=RandomSplitter(0.5, seed=0),
        batch_tfms=list(tfms),
        n_inp=1,
    )
    return block.dataloaders(None, bs=bs, num_workers=0, shuffle=False, device='cpu')
