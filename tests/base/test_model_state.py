"What is saved of a model, and restored."

import pytest
import torch
from torch import nn
from fastdistill.base.model_state import ModelState, TensorValues, restored


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm, self.seen, self.h = nn.Linear(3, 4), nn.BatchNorm1d(4), [], None

    def forward(self, x):
        self.seen.append(len(x))
        self.h, self.new = x, 1
        return self.norm(self.lin(x))


def saved(net, **options):
    return ModelState(net.modules(), **options)


def test_modes_attributes_and_buffers_are_restored():
    net = Net()
    net.norm.eval()
    mean, state = net.norm.running_mean, saved(net)
    values, seen = mean.clone(), net.seen
    net.train()(torch.randn(5, 3))
    net.norm.running_mean = torch.ones(4)
    state.restore()
    assert net.training
    assert not net.norm.training
    assert net.norm.running_mean is mean
    assert torch.equal(mean, values)
    assert net.seen is seen
    assert seen == []
    assert net.h is None
    assert not hasattr(net, 'new')


def test_hooks_that_were_added_are_removed_and_those_before_stay():
    net, calls = Net(), []
    net.register_forward_hook(lambda *_: calls.append('before'))
    state = saved(net)
    net.register_forward_hook(lambda *_: calls.append('added'))
    state.restore()
    net(torch.randn(5, 3))
    assert calls == ['before']


def test_weights_are_saved_if_asked():
    net = Net()
    grad = torch.ones(4, 3)
    net.lin.weight.grad = grad
    net.lin.bias.requires_grad_(False)
    weight = net.lin.weight
    place, values = weight.data_ptr(), weight.detach().clone()
    state = saved(net, weights=True)
    with torch.no_grad():
        weight.mul_(2)
    weight.data, weight.grad = torch.zeros(4, 3), None
    net.lin.bias.requires_grad_(True)
    state.restore()
    assert net.lin.weight is weight
    assert weight.data_ptr() == place
    assert torch.equal(weight, values)
    assert weight.grad is grad
    assert not net.lin.bias.requires_grad


def test_weights_that_were_not_saved_keep_their_values():
    net = Net()
    state = saved(net)
    with torch.no_grad():
        net.lin.weight.zero_()
    state.restore()
    assert not net.lin.weight.any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.int64])
def test_values_and_shapes_of_tensors_are_restored(dtype):
    tensors = [torch.arange(6).reshape(2, 3).to(dtype), torch.ones((), dtype=dtype)]
    want = [t.clone() for t in tensors]
    values = TensorValues(tensors)
    tensors[0].resize_(4).zero_()
    tensors[1].zero_()
    values.restore()
    for t, w in zip(tensors, want):
        assert torch.equal(t, w)


class Thing:
    def __init__(self):
        self.rate, self.names = 1, ['a']


def test_attributes_of_any_object_are_restored_after_an_error():
    thing = Thing()
    names = thing.names
    with pytest.raises(KeyError), restored(thing, 3):
        thing.rate, thing.new = 2, 0
        thing.names.append('b')
        raise KeyError
    assert vars(thing) == dict(rate=1, names=['a'])
    assert thing.names is names


def test_only_the_named_attributes_are_restored():
    thing = Thing()
    with restored(thing, only=['rate', 'new']):
        thing.rate, thing.new, thing.other = 2, 0, 3
        thing.names.append('b')
    assert vars(thing) == dict(rate=1, names=['a', 'b'], other=3)
