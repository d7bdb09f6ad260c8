"""Students of logits that a smaller store for many classes gives back, with the default recipe: all logits in int8, the top 10, and the principal components of the
logits with the exact top 10.

    python benchmarks/pca_store.py --weights FOLDER --seeds 3        # a minute for each seed, on one core

The teacher is the EfficientNet-Lite0 of `stores.py` with 1,000 classes, on photographs of Imagenette at 96 pixels; the students are small nets on 64 pixels. Labels
are those of ImageNet. The logits are written to a cache and read back, so the components are computed on the 256 samples that the library chooses.
"""

import io, json, tarfile, tempfile
from pathlib import Path
import numpy as np
import timm
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from fastdistill import Distiller, Outputs, Teacher
from fastdistill.cache import cache_dataset
from stores import ROOT, Photos, commit

CLASSES = dict(
    n01440764=0,
    n02102040=217,
    n02979186=482,
    n03000684=491,
    n03028079=497,
    n03394916=566,
    n03417042=569,
    n03425413=571,
    n03445777=574,
    n03888257=701,
)
STORES = {
    'labels alone': None,
    'int8': 'int8',
    'top 10': dict(topk=10, dtype='int8'),
    '64 components': dict(components=64),
}


def photos(part, k):
    with tarfile.open(ROOT / 'imagenette96' / f'{part}.tar') as t:
        files = sorted((m for m in t if m.isfile()), key=lambda m: m.name)
        files = files[:: max(len(files) // k, 1)][:k]
        read = lambda m: Image.open(io.BytesIO(t.extractfile(m).read())).convert('RGB')
        x = np.stack([np.asarray(read(m).resize((64, 64))) for m in files])
    y = [CLASSES[next(p for p in m.name.split('/') if p in CLASSES)] for m in files]
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y)


def teacher_logits(weights, *sets):
    net = timm.create_model('tf_efficientnet_lite0', num_classes=1000)
    state = torch.load(next(Path(weights).rglob('*.pth')), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    net = Photos(net).eval()
    large = lambda x: F.interpolate(x.float(), 96, mode='bilinear').round()
    with torch.no_grad():
        return [torch.cat([net(large(o)) for o in x.split(32)]) for x in sets]


def stored(t, store):
    "(logits as a cache gives them back, bytes)"
    if store is None:
        return None, 0
    options = dict(views=0, keys=range(len(t)), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_dataset(
            Teacher(nn.Identity()), TensorDataset(t), folder, store=store, **options
        )
        got = cache.outputs(range(len(t))).logits
        return got if isinstance(got, torch.Tensor) else got.dense(), cache.manifest.layout.bytes


def kl(t, s, T):
    return float(F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction='batchmean'))


def correlation(t, s):
    t, s = [o - o.mean(1, keepdim=True) for o in (t, s)]
    return float(F.cosine_similarity(t, s).mean())


def student_of(seed):
    torch.manual_seed(seed)
    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
    body = [conv(3, 16), conv(16, 32), conv(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Photos(nn.Sequential(*body, nn.Linear(64, 1000)))


def trained(seed, t, x, y, steps, bs):
    "A student of the default recipe; of the labels, if there are no logits `t`"
    student = student_of(seed)
    d = None
    if t is not None:
        # the teacher is not run: its outputs are passed
        options = dict(task_loss=F.cross_entropy, kind='softmax', check=False)
        d = Distiller(student, lambda *_: None, None, **options)
    opt = torch.optim.AdamW((student if d is None else d).parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=steps)
    per_epoch = len(x) // bs
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x))
        i = order[step % per_epoch * bs :][:bs]
        out = student(x[i])
        loss = F.cross_entropy(out, y[i])
        if d is not None:
            loss = d.compute(Outputs(out), Outputs(t[i]), loss, (y[i],)).total
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return student.eval()


def main(
    weights: Path = Path('weights'),
    out: Path = Path('benchmarks/results/pca_store.json'),
    seeds: int = 3,
    n: int = 960,
    steps: int = 240,
    bs: int = 32,
):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (x, y), (xv, yv) = photos('train', n), photos('val', n // 2)
    t, tv = teacher_logits(weights, x, xv)
    stores = {name: stored(t, store) for name, store in STORES.items()}
    ten = torch.tensor([*CLASSES.values()])
    rows = json.loads(out.read_text()) if out.exists() else []
    have = {(r['store'], r['seed']) for r in rows}
    for seed in range(seeds):
        for name, (r, size) in stores.items():
            if (name, seed) in have:
                continue
            student = trained(seed, r, x, y, steps, bs)
            with torch.no_grad():
                s = torch.cat([student(o) for o in xv.split(64)])
            row = dict(store=name, seed=seed, bytes=size)
            if r is not None:
                row |= {f'stored, KL at T={T}': kl(t, r, T) for T in (1, 4)}
                row['stored, correlation'] = correlation(t, r)
            row |= {f'student, KL at T={T}': kl(tv, s, T) for T in (1, 4)}
            right = (s[:, ten].argmax(1) == torch.searchsorted(ten, yv)).float().mean()
            row |= {'student, correlation': correlation(tv, s), 'student, accuracy': float(right)}
            rows.append(row | dict(n=n, steps=steps, bs=bs, commit=commit()))
            print(rows[-1], flush=True)
            out.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    typer.run(main)
