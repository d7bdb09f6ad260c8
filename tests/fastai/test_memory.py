"Memory does not grow from step to step: live, from a cache, with features."

import gc
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from fastdistill import Distiller, Outputs, Teacher, at, kd


pytestmark = pytest.mark.usefixtures('old_objects_frozen')


def net(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def tensors():
    "(number of tensors that are alive, bytes of their storages)"
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    return len(alive), sum(
        {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in alive}.values()
    )


def step_of(way):
    "A training step"
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    recipe = kd() + at(layers={'2': '2'}) if way == 'features' else kd()
    options = dict(precision='bf16', fold_bn=True) if way == 'copy' else {}
    d = Distiller(
        net(2),
        None if way == 'cache' else Teacher(net(4), run=options),
        recipe,
        example=None if way == 'cache' else x,
    )
    opt = torch.optim.SGD(d.student.parameters(), lr=1e-2)
    stored = torch.randn(4, 10)

    def step():
        if way == 'cache':
            s = Outputs(d.student(x))
            loss = d.compute(s, Outputs(stored), F.cross_entropy(s.logits, y), (y,))
        else:
            loss = d(x, y)
        loss.total.backward()
        opt.step()
        opt.zero_grad()

    if way != 'cache':
        d.teacher.start()
    return step


@pytest.mark.parametrize('way', ['live', 'cache', 'features', 'copy'])
def test_no_step_leaves_a_tensor_behind(way):
    step = step_of(way)
    for _ in range(10):
        step()
    before = tensors()
    for _ in range(100):
        step()
    assert tensors() == before
