"What two processes find before training, each with its own part of the data: `test_rank_checks.py` compares them."

import warnings

import apps
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, DataLoaders, Learner, noop, set_seed
from fastdistill import Distiller, DistillWarning, Teacher, kd, recipes
from fastdistill.base.distributed import rank, world_size
from fastdistill.fastai import KnowledgeDistillation
from torch import nn
from torch.utils.data import DataLoader

N, BS = 64, 8  # items of one process; batch size


def teacher(good=True):
    set_seed(0)
    net = apps.mlp(16)
    if good:
        net.load_state_dict(apps.wise())
    return net


def items():
    x, y = apps.rows(2 * N)
    return [*zip(x, y)]


def mine():
    "The part of this process"
    return items()[rank() * N :][:N]


def in_a_loop(good):
    "(doubt, recipe, weights) after a check and a training of the default recipe in DistributedDataParallel"
    set_seed(rank())
    d = Distiller(apps.mlp(6), Teacher(teacher(good)))
    loader = DataLoader(mine(), BS)
    found = d.check(loader)
    model = nn.parallel.DistributedDataParallel(d)
    opt = torch.optim.SGD(d.parameters(), 0.1)
    for x, y in loader:
        opt.zero_grad()
        model(x, y).total.backward()
        opt.step()
    del model
    weights = torch.cat([p.detach().flatten() for p in d.parameters()])
    return bool(found.doubt), d.head.chosen_text, d.faded, weights


def on_the_first():
    "Only the first process checks, with a recipe that compares the samples of all processes"
    set_seed(0)
    d = Distiller(apps.mlp(6), Teacher(teacher()), kd() + recipes.rkd({'2': '2'}))
    return None if rank() else d.check(DataLoader(mine(), BS)).facts.n


def in_fastai(good):
    "(recipe, weights)"
    set_seed(rank())
    dls = DataLoaders.from_dsets(items(), mine(), bs=BS, shuffle=False, num_workers=0, device='cpu')
    learn = Learner(dls, apps.mlp(6), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    learn.logger = noop
    cb = KnowledgeDistillation(teacher(good))
    with learn.no_bar(), learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(1, 0.1, cbs=cb)
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    return str(cb.distiller.recipe), cb.distiller.faded, weights


def fully_sharded(recipe):
    "The student's weights after the same training in PyTorch's FSDP, of which each process holds a part"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    set_seed(0)
    student, mesh = apps.mlp(6), init_device_mesh('cpu', (world_size(),))
    for m in [*student, student]:
        if [*m.parameters()]:
            # subtle: with gloo, the mean of the gradients is their sum in PyTorch before 2.13
            fully_shard(m, mesh=mesh).set_force_sum_reduction_for_comms(True)
    d = Distiller(student, Teacher(teacher()), recipe, check=False, example=mine()[0][0][None])
    opt = torch.optim.SGD(d.parameters(), 0.1)
    for x, y in DataLoader(mine(), BS):
        opt.zero_grad()
        d(x, y).total.backward()
        opt.step()
    return torch.cat([p.full_tensor().detach().flatten() for p in student.parameters()])


def one_of_two(folder):
    "What each of two processes does"
    import fastai.distributed  # noqa: F401

    apps.distributed_on_cpu()
    torch.distributed.init_process_group('gloo')
    warnings.simplefilter('ignore')
    warnings.filterwarnings('always', category=DistillWarning)
    out = dict(
        loop={good: in_a_loop(good) for good in (True, False)},
        fastai={good: in_fastai(good) for good in (True, False)},
        first=on_the_first(),
        sharded=dict(
            default=fully_sharded(None),
            layers=fully_sharded(kd() + recipes.rkd({'2': '2'})),
        ),
    )
    torch.save(out, folder / f'{rank()}.pt')
    apps.leave_together()
