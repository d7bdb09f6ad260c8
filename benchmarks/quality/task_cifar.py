"5,000 pictures of CIFAR-10. A ready-made ResNet-56 teaches a ResNet-8. Each epoch sees its own crops and flips, with the teacher's answers to them."
import importlib.util, json
from functools import cache
import numpy as np
import torch
from PIL import Image
from loop import predict
from tasks import ROOT, Cell, Data, Fast, Split, kept

MEAN,STD = [torch.tensor(o).view(3, 1, 1)*255 for o in ((.485, .456, .406), (.229, .224, .225))]
VIEWS = 5


@cache
def nets():
    spec = importlib.util.spec_from_file_location('cifar_resnets', ROOT/'cifar_resnets.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sheets(split, each, first=0):
    "(N, 3, 32, 32) bytes and classes: `each` pictures of each class"
    xs,classes = [],json.loads((ROOT/'cifar10'/'classes.json').read_text())
    for c in classes:
        a = np.asarray(Image.open(ROOT/'cifar10'/split/f'{c}.webp').convert('RGB'))
        a = a.reshape(a.shape[0]//32, 32, a.shape[1]//32, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
        xs.append(torch.from_numpy(a[np.random.default_rng(0).permutation(len(a))[first:first+each]].copy()).permute(0, 3, 1, 2))
    return torch.cat(xs),torch.arange(len(classes)).repeat_interleave(each)


def views(x, n, g):
    "(n, N, 3, 32, 32): random crops of the padded pictures, half of them flipped"
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    out = torch.empty(n, *x.shape, dtype=x.dtype)
    for v in range(n):
        for i,(r,c,flip) in enumerate(zip(*(torch.randint(0, k, (len(x),), generator=g).tolist() for k in (9, 9, 2)))):
            o = padded[i, :, r:r+32, c:c+32]
            out[v, i] = o.flip(2) if flip else o
    return out


class Pictures(torch.nn.Module):
    "A net that takes bytes"
    def __init__(self, net): super().__init__(); self.net = Fast(net)
    def forward(self, x): return self.net((x.float()-MEAN)/STD)


def make():
    teacher = Pictures(nets().akamaster(56))
    (x,y),valid,test = sheets('train', 500),sheets('train', 200, 500),sheets('test', 300)
    seen = views(x, VIEWS, torch.Generator().manual_seed(0))
    return dict(splits=[(seen, y, torch.stack([predict(teacher, v) for v in seen]), VIEWS), *((x, y, predict(teacher, x)) for x,y in (valid, test))])


@cache
def data():
    d = kept('cifar', make)
    return Data(*(Split(*s) for s in d['splits']))


def student(d): return Pictures(nets().CifarResNet(8, width=8))


CELLS = [Cell('cifar5000', 'cifar', 'classes', data, student, 390, rates=(.03, .1, .3), opt='sgd', cost=3, seeds=3)]
