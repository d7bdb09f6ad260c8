"Taps read what a forward pass by hand gives, leave nothing behind, and say what is wrong."

import copy, pickle, random, warnings
from dataclasses import asdict
import numpy as np
import pytest, timm, torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models as tv
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import BertConfig, BertForSequenceClassification

with warnings.catch_warnings():  # while it is imported, fastai uses what PyTorch has deprecated
    warnings.simplefilter('ignore')
    from fastai.tabular.model import TabularModel
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    from fastai.torch_core import TensorImage
    from fastai.vision.learner import create_vision_model
    from fastai.vision.models.unet import DynamicUnet
from fastdistill import Distiller, Teacher, hint, kd
from fastdistill.base.outputs import DistillError
from fastdistill.features.layer_names import LayerInfo, resolve, unwrap
from fastdistill.features import layers
from fastdistill.features.maps_and_tokens import as_map, as_tokens, grid
from fastdistill.features import Taps


def net(inplace=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=inplace),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(80, 2),
    )


def images(b=2, size=8):
    return torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(1))


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def awd():
    return get_language_model(AWD_LSTM, 60, config={**awd_lstm_lm_config, 'n_hid': 12, 'emb_sz': 8})


def unet():
    down = lambda i, o: nn.Sequential(
        nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
    )
    return DynamicUnet(nn.Sequential(down(3, 4), down(4, 8), down(8, 16)), 4, (32, 32))


def tokens(b=4, n=20):
    return torch.randint(2, 50, (b, n), generator=torch.Generator().manual_seed(1))


# what comes out equals the forward pass by hand


def resnet_by_hand(m, x):
    a = m.layer2(m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x))))))
    return {'layer2': a, 'layer4': m.layer4(m.layer3(a))}


def timm_cnn_by_hand(m, x):
    return {'layer3': m.layer3(m.layer2(m.layer1(m.maxpool(m.act1(m.bn1(m.conv1(x)))))))}


def timm_vit_by_hand(m, x):
    y, out = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(x)))), {}
    for i, b in enumerate(m.blocks):
        out[f'blocks.{i}'] = y = b(y)
    return out


def learner_by_hand(m, x):
    return {'0.5': m[0][:6](x), '1.2': m[1][:3](m[0](x))}


def bert_by_hand(m, x):
    hidden = m(**x, output_hidden_states=True).hidden_states
    return {'bert.encoder.layer.0': hidden[1], 'bert.encoder.layer.1': hidden[2], 'bert': hidden[2]}


def unet_by_hand(m, x):
    y = {}
    a = m.layers[3](m.layers[2](m.layers[1](m.layers[0](x))))
    y['layers.3'] = a
    y['layers.4'] = m.layers[4](a)
    return y


def lm_by_hand(m, x):
    m(x)
    m.reset()  # zeros, of this batch size
    a, _ = m[0].rnns[0](m[0].encoder(x), m[0].hidden[0])
    b, _ = m[0].rnns[1](a, m[0].hidden[1])
    m.reset()
    return {'0.rnns.0': a, '0.rnns.1': b}


def tabular_by_hand(m, x):
    cat, cont = x
    return {
        'layers.0': m.layers[0](
            torch.cat([e(cat[:, i]) for i, e in enumerate(m.embeds)] + [m.bn_cont(cont)], 1)
        )
    }


MODELS = dict(
    torchvision=(lambda: tv.resnet18(), lambda: images(size=32), resnet_by_hand),
    timm_cnn=(lambda: timm.create_model('resnet10t'), lambda: images(size=32), timm_cnn_by_hand),
    timm_vit=(
        lambda: timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2),
        lambda: images(size=32),
        timm_vit_by_hand,
    ),
    vision_learner=(
        lambda: create_vision_model(tv.resnet18, 3, pretrained=False),
        lambda: images(size=32),
        learner_by_hand,
    ),
    huggingface=(
        lambda: BertForSequenceClassification(bert_config()),
        lambda: dict(input_ids=tokens()),
        bert_by_hand,
    ),
    unet=(unet, lambda: images(size=32), unet_by_hand),
    awd_lstm=(awd, tokens, lm_by_hand),
    tabular=(
        lambda: TabularModel([(5, 3), (6, 4)], 2, 2, [7, 6]),
        lambda: (tokens(4, 2) % 5, torch.randn(4, 2)),
        tabular_by_hand,
    ),
)


def bert_config(layers=2):
    return BertConfig(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
    )


def call(m, x):
    return m(**x) if isinstance(x, dict) else m(*x) if isinstance(x, tuple) else m(x)


@pytest.mark.parametrize('name', MODELS)
def test_equals_the_forward_pass_by_hand(name):
    make, batch, by_hand = MODELS[name]
    torch.manual_seed(0)
    m, x = make().eval(), batch()
    want = by_hand(m, x)
    before = n_hooks(m)  # a DynamicUnet keeps hooks of its own
    with Taps(m, list(want)) as taps:
        call(m, x)
        got = taps.pop()
    assert list(got) == list(want) and n_hooks(m) == before
    for k in want:
        assert type(got[k]) is torch.Tensor and got[k].requires_grad
        torch.testing.assert_close(got[k], want[k], msg=k)


def test_gradients_equal_those_of_a_peers_extractor():
    torch.manual_seed(0)
    m, x = tv.resnet18(), images(4, 32)
    names = ['layer3', 'layer1.0', 'layer4.1.bn2']
    twin = copy.deepcopy(m)
    peer = create_feature_extractor(twin, names)(x)
    with Taps(m, [n + '@pre' if 'bn2' in n else n for n in names]) as taps:
        m(x)
        mine = taps.pop()
    assert list(mine) == ['layer3', 'layer1.0', 'layer4.1.bn2@pre']
    for d in (peer, mine):
        sum(v.pow(2).mean() for k, v in d.items() if 'bn2' not in k).backward()
    for p, q in zip(m.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_unet_in_training_keeps_its_shortcuts_and_its_gradient():
    m, x = unet().train(), images(2, 32)
    torch.manual_seed(0)
    want = copy.deepcopy(m.state_dict())
    m(x).sum().backward()
    grads = [p.grad.clone() for p in m.parameters()]
    m.load_state_dict(want)
    m.zero_grad()
    with Taps(m, ['layers.0.1', 'layers.5', 'layers.6']) as taps:
        y = m(x)
        assert all(v.grad_fn is not None for v in taps.pop().values())
    y.sum().backward()
    for p, g in zip(m.parameters(), grads):
        torch.testing.assert_close(p.grad, g)


# forms of output


class Gives(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.lin, self.what = nn.Linear(3, 3), what

    def forward(self, x):
        return self.what(self.lin(x))


class Around(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.inner = Gives(what)

    def forward(self, x):
        self.inner(x)
        return x


class Answer(dict):
    pass


@pytest.mark.parametrize(
    'what, want',
    [
        (lambda y: y, 1),
        (lambda y: (y, y * 2), 1),
        (lambda y: [None, (y * 2, y)], 2),
        (lambda y: ((y * 3,), y), 3),
        (lambda y: dict(a=None, b=y * 4), 4),
        (lambda y: Answer(loss=y.sum(), last_hidden_state=y * 5), 5),
        (lambda y: Answer(loss=y.sum(), logits=y * 6), 6),
        (lambda y: TensorImage(y * 7), 7),
    ],
)
def test_the_main_tensor_of_any_output(what, want):
    m, x = Around(what), torch.randn(2, 3)
    with Taps(m, 'inner') as taps:
        m(x)
        got = taps.pop()['inner']
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, m.inner.lin(x) * want)


def test_an_output_without_a_tensor_says_so():
    m = Around(lambda y: 'text')
    with Taps(m, 'inner') as taps:
        m(torch.randn(2, 3))
        with pytest.raises(
            DistillError, match="Layer 'inner' of Around returned a str without a tensor"
        ):
            taps.pop()


def test_fastai_images_come_out_plain():
    m = net()
    with Taps(m, ['0', '3@in']) as taps:
        m[3](m[0](TensorImage(images())))
        assert all(type(v) is torch.Tensor for v in taps.pop().values())


# before and after: in-place layers


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        y += x
        return self.act(y)


def test_what_is_overwritten_in_place_is_refused_and_pre_reads_it():
    for m, name in [(net(), '1'), (Residual(), 'conv')]:
        x = images()
        with Taps(m, name) as taps:
            m(x)
            with pytest.raises(
                DistillError,
                match=rf"'{name}' of {type(m).__name__} was overwritten by a later.*'{name}@pre'",
            ):
                taps.pop()
    m = net().eval()
    with Taps(m, ['1@pre', '2', '2@in']) as taps:
        m(x)
        got = taps.pop()
    want = m[1](m[0](x))
    torch.testing.assert_close(got['1@pre'], want)
    torch.testing.assert_close(got['2@in'], want)
    torch.testing.assert_close(got['2'], want.relu())
    assert (want < 0).any()
    got['1@pre'].sum().backward()
    assert m[0].weight.grad is not None


def test_a_turned_output_that_had_to_be_copied_is_no_overwritten_one():
    m = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)).to(
        memory_format=torch.channels_last
    )
    with Taps(m, ['1@tokens', '1@mean']) as taps:
        y = m(images().to(memory_format=torch.channels_last))
        got = taps.pop()
    torch.testing.assert_close(got['1@tokens'], y.permute(0, 2, 3, 1).reshape(2, 64, 4))
    torch.testing.assert_close(got['1@mean'], y.mean((2, 3)))
    m = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    with Taps(m, ['0@mean']) as taps:  # a vector already, and overwritten
        m(torch.randn(2, 3))
        with pytest.raises(
            DistillError, match="'0@mean' of Sequential was overwritten.*Use the name '0@pre@mean'"
        ):
            taps.pop()


def test_the_input_of_a_block_that_begins_in_place_and_of_one_called_by_keyword():
    m = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)))
    x = images()
    with Taps(m, '1@in') as taps:
        m(x)
        torch.testing.assert_close(taps.pop()['1@in'], m[0](x))
    bert = BertForSequenceClassification(bert_config()).eval()
    with Taps(bert, ['bert.encoder@in', 'bert.embeddings']) as taps:
        bert(input_ids=tokens())
        got = taps.pop()
    torch.testing.assert_close(got['bert.encoder@in'], got['bert.embeddings'])


def test_a_layer_that_runs_twice_counts_where_it_ran_last():
    act = nn.ReLU()
    m = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 5), act)
    x = torch.randn(2, 3)
    with Taps(m, ['1', '3']) as taps:
        y = m(x)
        got = taps.pop()
    assert got['1'] is got['3'] and torch.equal(got['1'], y)
    assert [l.shape for l in layers(m, x)] == [(2, 4), (2, 5), (2, 5), (2, 5)]


def test_inference_mode():
    m = net()
    with torch.inference_mode(), Taps(m, '0') as taps:
        m(images())
        assert taps.pop()['0'].shape == (2, 4, 6, 6)


# turned: maps and tokens


def test_tokens_as_a_map_and_back():
    y = torch.randn(2, 1 + 12, 5)
    assert grid(15) is None and grid(13, 3 / 4) == (1, 3, 4) and grid(13, 4 / 3) == (1, 4, 3)
    a = as_map(y, 3 / 4)
    for i in range(3):
        for j in range(4):
            assert torch.equal(a[:, :, i, j], y[:, 1 + 4 * i + j])
    assert torch.equal(as_tokens(a), y[:, 1:])
    assert torch.equal(as_map(a.permute(0, 2, 3, 1)), a)
    assert torch.equal(as_tokens(y), y.transpose(1, 2))


@pytest.mark.parametrize(
    'n, want',
    [
        (196, (0, 14, 14)),
        (197, (1, 14, 14)),
        (198, (2, 14, 14)),
        (201, (5, 14, 14)),
        (200, (4, 14, 14)),
        (50, (1, 7, 7)),
        (261, (5, 16, 16)),
        (57, None),
        (1, (0, 1, 1)),
        (1000, None),
    ],
)
def test_class_and_register_tokens_come_before_the_grid(n, want):
    assert grid(n) == want


def test_names_ending_in_map_and_tokens():
    vit, x = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1).eval(), images(size=32)
    with Taps(
        vit, ['blocks.0', 'blocks.0@map', 'blocks.0@in@map', 'patch_embed.proj@tokens', 'head@map']
    ) as taps:
        with pytest.raises(DistillError, match=r'shape \(2, 1000\) are not a map.*without @map'):
            vit(x)
    with Taps(
        vit,
        [
            'blocks.0',
            'blocks.0@map',
            'blocks.0@in@map',
            'patch_embed.proj',
            'patch_embed.proj@tokens',
        ],
    ) as taps:
        vit(x)
        got = taps.pop()
    assert torch.equal(
        got['blocks.0@map'], got['blocks.0'][:, 1:].transpose(1, 2).reshape(2, 192, 2, 2)
    )
    assert got['blocks.0@in@map'].shape == (2, 192, 2, 2)
    assert torch.equal(
        got['patch_embed.proj@tokens'], got['patch_embed.proj'].flatten(2).transpose(1, 2)
    )
    with pytest.raises(DistillError, match=r'\(2, 3\) have no positions'):
        as_tokens(torch.zeros(2, 3))


# attach and detach


def test_attached_twice_is_once_and_detached_twice_is_fine():
    m, x = net(), images()
    taps = Taps(m, ['0', '3@in'])
    assert n_hooks(m) == 0
    for _ in range(3):
        taps.attach()
    assert n_hooks(m) == 2
    m(x)
    assert (
        list(taps.feats) == ['0', '3@in'] and list(taps.pop()) == ['0', '3@in'] and taps.feats == {}
    )
    for _ in range(2):
        taps.detach()
    assert n_hooks(m) == 0
    m(x)
    assert taps.feats == {}


def test_hooks_and_features_are_gone_after_an_error_or_an_interrupt():
    for error in (ValueError, KeyboardInterrupt):
        m = net()
        taps = Taps(m, '0')
        with pytest.raises(error):
            with taps:
                m(images())
                assert taps.feats
                raise error('in mid batch')
        assert n_hooks(m) == 0 and taps.feats == {}


def test_features_stay_readable_after_a_with_that_went_well():
    m = net()
    with Taps(m, '0') as taps:
        m(images())
    assert n_hooks(m) == 0 and taps.pop()['0'].shape == (2, 4, 6, 6)


def test_the_order_is_that_of_the_names_not_of_the_layers():
    m = net()
    with Taps(m, ['3', '0', '3.*', '0']) as taps:
        m(images())
        assert list(taps.pop()) == ['3', '0', '3.0', '3.1']


def test_pop_without_a_batch_says_that_the_layer_did_not_run():
    m = net()
    with Taps(m, ['0', '3']) as taps:
        m[0](images())
        with pytest.raises(DistillError, match="Layer '3' of Sequential did not run in this batch"):
            taps.pop()
        assert taps.feats == {}


@pytest.mark.filterwarnings('ignore:.torch.jit')
def test_torchscript_is_refused():
    m = net()
    for script in (torch.jit.script(m), torch.jit.trace(m.eval(), images())):
        with pytest.raises(
            DistillError, match="Layer '3' is TorchScript, whose parts can't be read"
        ):
            Taps(script, '3').attach()
        assert layers(script, images())[0].shape is None


def test_two_taps_on_one_model():
    m, x = net(), images()
    with Taps(m, '0') as a, Taps(m, ['3', '0']) as b:
        m(x)
        assert torch.equal(a.pop()['0'], b.pop()['0'])


# copies of the model


class Heavy:
    def __reduce__(self):
        raise AssertionError('was dragged along')


def test_copies_made_while_attached_do_not_write_and_drag_nothing_along():
    m, x = net().eval(), images()
    taps = Taps(m, ['0', '3@in']).attach()
    taps.seen['ballast'] = Heavy()
    data = pickle.dumps(m)
    assert (
        b'fastdistill' not in data and len(data) < len(pickle.dumps(net())) + 500
    )  # loads where fastdistill is not
    for twin in (copy.deepcopy(m), pickle.loads(data)):
        torch.testing.assert_close(twin(x), m(x))
        want = taps.pop()['0']
        twin[0].weight.data.zero_()
        twin(x)
        assert taps.feats == {}
        m(x)
        assert torch.equal(taps.pop()['0'], want)
        taps.seen['ballast'] = Heavy()
    taps.detach()
    assert n_hooks(m) == 0


def test_an_average_of_the_model_is_not_read():
    m, x = net(), images()
    taps = Taps(m, '0').attach()
    ema = AveragedModel(m)
    for p in ema.parameters():
        p.data.zero_()
    m(x)
    ema(x)
    assert taps.pop()['0'].abs().sum() > 0
    taps.detach()
    assert n_hooks(m) == 0


# wrapped models


def test_names_of_wrapped_models_are_those_of_the_inner_model():
    m = net()
    for w in (
        nn.DataParallel(m),
        torch.compile(m, backend='eager'),
        nn.DataParallel(torch.compile(m, backend='eager')),
    ):
        assert (
            unwrap(w) is m
            and resolve(w, '3.*') == ['3.0', '3.1']
            and [l.name for l in layers(w)] == [l.name for l in layers(m)]
        )
    part = nn.Sequential(torch.compile(m, backend='eager'), nn.Linear(2, 2))
    assert resolve(part, '0.3.?') == ['0.3.0', '0.3.1'] and part[0]._orig_mod is m


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('ran_before', [False, True])
def test_a_compiled_model_is_heard_also_if_it_was_compiled_before(backend, ran_before):
    m, x = net().eval(), images()
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # torch's default
    c = torch.compile(m, backend=backend)
    if ran_before:
        c(x)
    names = ['0', '1@pre', '3@in', '1']
    want = {'0': m[0](x), '1@pre': m[1](m[0](x))}
    for _ in range(3):
        with Taps(c, names) as taps:
            c(x)
            got = taps.pop()
        assert list(got) == names
        torch.testing.assert_close(got['1@pre'], want['1@pre'])
        torch.testing.assert_close(got['3@in'], want['1@pre'].relu())
        torch.testing.assert_close(
            got['1'], want['1@pre']
        )  # compiled: a copy, so that what follows can't overwrite it
        c(x)  # and without taps, nothing is written
        assert taps.feats == {}
    m.zero_grad()
    got['1@pre'].pow(2).sum().backward()
    mine = m[0].weight.grad.clone()
    m.zero_grad()
    want['1@pre'].pow(2).sum().backward()
    torch.testing.assert_close(mine, m[0].weight.grad)
    torch._dynamo.reset()


@pytest.mark.filterwarnings('ignore:The .grad attribute')  # torch's own, while it compiles
def test_a_model_compiled_in_place_or_in_parts():
    x = images()
    for m in (net(), nn.Sequential(torch.compile(net(), backend='eager'), nn.Identity())):
        if isinstance(m[0], nn.Conv2d):
            m.compile(backend='eager')
        name = '3' if isinstance(m[0], nn.Conv2d) else '0.3'
        m(x)
        with Taps(m, name) as taps:
            m(x)
            assert taps.pop()[name].shape == (2, 5, 4, 4)
        assert {l.name: l.shape for l in layers(m, x)}[name] == (2, 5, 4, 4)
    torch._dynamo.reset()


def test_distributed_and_converted_to_sync_batchnorm():
    m, x = net(), images()
    taps = Taps(m, ['1@pre', '3'])
    m = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    assert type(m[1]) is nn.SyncBatchNorm
    m.eval()
    with taps:
        m(x)
        torch.testing.assert_close(taps.pop()['1@pre'], m[1](m[0](x)))
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        ddp = nn.parallel.DistributedDataParallel(net())
        with Taps(ddp, '0') as taps:
            ddp(x).sum().backward()
            torch.testing.assert_close(taps.pop()['0'], ddp.module[0](x))
        assert layers(ddp, x)[0].shape == (2, 4, 6, 6)
    finally:
        ddp = taps = None  # subtle: a group that DDP outlives may wait for itself forever
        torch.distributed.destroy_process_group()


def test_channels_last_stays_channels_last():
    m, x = (
        net().to(memory_format=torch.channels_last),
        images().to(memory_format=torch.channels_last),
    )
    with Taps(m, ['0', '1@pre', '3@in']) as taps:
        m(x)
        got = taps.pop()
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in got.values())
    torch.testing.assert_close(got['0'], m[0](x))


def test_under_autocast():
    m, x = net(), images()
    with torch.autocast('cpu', dtype=torch.bfloat16), Taps(m, ['0', '1@pre']) as taps:
        m(x)
        assert taps.pop()['0'].dtype == torch.bfloat16


# find


def test_globs_stay_within_a_level_and_two_stars_cross_it():
    m = tv.resnet18()
    assert resolve(m, 'layer?') == ['layer1', 'layer2', 'layer3', 'layer4']
    assert resolve(m, 'layer[23]') == ['layer2', 'layer3'] and resolve(m, 'layer[!1]') == [
        'layer2',
        'layer3',
        'layer4',
    ]
    assert resolve(m, 'layer1.*') == ['layer1.0', 'layer1.1']
    assert resolve(m, '**.conv2@pre') == [
        f'layer{i}.{j}.conv2@pre' for i in (1, 2, 3, 4) for j in (0, 1)
    ]
    assert resolve(m, 'fc@in') == ['fc@in'] and resolve(m, '') == ['']


def test_a_wrong_name_gives_the_nearest_and_the_tree():
    m = tv.resnet18()
    with pytest.raises(
        DistillError,
        match=r"No layer 'layer5' in ResNet. Nearest: 'layer4'.*\n(.*\n)+.*layer1.0  +BasicBlock",
    ) as e:
        Taps(m, 'layer5')
    assert len(str(e.value).splitlines()) < 45 and 'more: layers(model) lists them' in str(e.value)
    body = nn.Sequential(nn.Sequential(m), nn.Flatten())
    with pytest.raises(DistillError, match=r"Nearest: '0.0.layer3',"):
        resolve(body, 'layer3')
    with pytest.raises(DistillError, match=r"No layer 'layerx\*'"):
        resolve(m, 'layerx*')
    with pytest.raises(
        DistillError,
        match=r"'fc@out' ends in @out. It must be one of @in \(the input of the layer\); .*@map \(tokens",
    ):
        resolve(m, 'fc@out')
    taps = Taps(net(), '3.1')
    taps.model[3] = nn.Identity()
    with pytest.raises(DistillError, match="No layer '3.1'"):
        taps.attach()


# list


def test_layers_as_data_and_as_a_table():
    m = net()
    tree = layers(m, images())
    assert tree[0] == LayerInfo('0', 'Conv2d', (2, 4, 6, 6), 112) and asdict(tree[3])['shape'] == (
        2,
        5,
        4,
        4,
    )
    assert [l.name for l in tree] == ['0', '1', '2', '3', '3.0', '3.1', '4', '5']
    assert sum(l.params for l in tree if l.depth == 1) == sum(p.numel() for p in m.parameters())
    assert [l.shape for l in layers(m)] == [None] * 8
    lines = str(tree).splitlines()
    assert lines[0].split() == ['layer', 'kind', 'output', 'parameters']
    assert (
        lines[6].startswith('  3.0')
        and 'Conv2d' in lines[6]
        and '(2, 5, 4, 4)' in lines[6]
        and lines[6].endswith('185')
    )
    at = {l.index('Conv2d') for l in lines if 'Conv2d' in l}
    assert len(at) == 1  # columns are aligned


def test_layers_that_do_not_run_have_no_shape():
    m = tv.googlenet(init_weights=False, num_classes=3)
    shapes = {l.name: l.shape for l in layers(m, images(2, 64))}
    assert shapes['aux1'] is None and shapes['inception3a'] == (2, 256, 8, 8)


class Restless(nn.Module):
    "Changes whatever a forward pass can change, in evaluation mode too"

    def __init__(self):
        super().__init__()
        self.lin, self.bn, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.register_buffer('count', torch.zeros(()))
        self.register_buffer('swapped', torch.zeros(2))
        self.seen, self.calls = [], 0

    def train(self, mode=True):
        raise AssertionError('some models do more here than set the mode: merge adapters, say')

    def forward(self, x):
        random.random()
        np.random.rand()
        torch.rand(1)
        self.count += 1
        self.swapped = torch.ones(2)
        self.calls += 1
        self.seen.append(x)
        self.last = x
        return F.dropout(self.drop(self.bn(self.lin(x))), 0.5)


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_probe_changes_nothing():
    m = Restless()
    m.bn.eval()
    modes, states, state, keys = (
        [k.training for k in m.modules()],
        random_states(),
        copy.deepcopy(m.state_dict()),
        set(vars(m)),
    )
    swapped = m.swapped
    x = torch.zeros(4, 3)
    tree = layers(m, x)
    assert (
        random_states() == states and [k.training for k in m.modules()] == modes and n_hooks(m) == 0
    )
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items()) and m.swapped is swapped
    assert m.calls == 0 and m.seen == [] and set(vars(m)) == keys and torch.is_grad_enabled()
    assert tree[0].shape == (4, 3) and m.lin.weight.grad is None


@pytest.mark.filterwarnings('ignore:Lazy modules')
def test_lazy_layers_are_not_made_by_a_probe():
    m = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(DistillError, match='Sequential has lazy layers'):
        layers(m, torch.zeros(2, 4))
    assert layers(m)[0] == LayerInfo('0', 'LazyLinear', None, 0)
    m(torch.zeros(2, 4))
    assert layers(m, torch.zeros(2, 4))[0] == LayerInfo('0', 'Linear', (2, 3), 15)


class Growing(nn.Linear):
    "Buffers get another shape and value at the first batch, in place, as observers for quantization-aware training do"

    def __init__(self):
        super().__init__(3, 3)
        self.register_buffer('most', torch.zeros(0))
        self.register_buffer('edges', torch.eye(3).to_sparse())

    def forward(self, x):
        self.most.resize_(3).copy_(x.amax(0))
        return super().forward(x)


def test_buffers_that_change_their_shape_at_the_first_batch_are_put_back():
    m, x = Growing(), torch.randn(4, 3)
    most = m.most
    layers(m, x)
    assert m.most is most and most.shape == (0,)
    with Teacher(m) as t:
        t(x)
        assert torch.equal(m.most, x.amax(0))
    assert m.most is most and most.shape == (0,)


@pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning'
)
def test_a_student_in_quantization_aware_training_is_probed_paired_and_trained_and_is_a_guest_as_a_teacher():
    fx = pytest.importorskip('torch.ao.quantization.quantize_fx')
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    def conv(c):
        return nn.Sequential(
            nn.Conv2d(3, c, 3),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, 2 * c, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * c, 3),
        )

    x, y = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 0])
    q = fx.prepare_qat_fx(conv(4).train(), get_default_qat_qconfig_mapping('x86'), (x,))
    tensors = {**dict(q.named_parameters()), **dict(q.named_buffers())}
    before = {k: v.clone() for k, v in tensors.items()}
    assert any(v.numel() == 0 for v in before.values())  # of observers that saw nothing yet

    def unchanged():
        now = {**dict(q.named_parameters()), **dict(q.named_buffers())}
        return all(
            now[k] is v and v.shape == before[k].shape and torch.equal(v, before[k])
            for k, v in tensors.items()
        )

    assert next(l.shape for l in layers(q, x) if l.name == '0') == (4, 4, 10, 10) and unchanged()
    Teacher(q)(x)
    assert unchanged()
    d = Distiller(q, conv(8), kd() + hint(layers='auto'), example=x)
    assert [p.student for p in d.pairs] == ['0', '3'] and unchanged()
    opt = torch.optim.SGD(d.parameters(), 0.01)
    losses = []
    for _ in range(5):
        losses.append(d(x, y).total)
        losses[-1].backward()
        opt.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] and not unchanged()


def test_a_probe_that_fails_changes_nothing_and_says_why():
    m, states = net(), random_states()
    with pytest.raises(
        DistillError,
        match=r'Sequential does not run on the inputs given, \(2, 3, 5, 5\): .*mat1 and mat2',
    ):
        layers(m, torch.zeros(2, 3, 5, 5))
    assert (
        n_hooks(m) == 0
        and m.training
        and all(k.training for k in m.modules())
        and random_states() == states
    )


@pytest.mark.parametrize('name', MODELS)
def test_a_probe_leaves_a_model_in_training_as_it_was(name):
    make, batch, _ = MODELS[name]
    torch.manual_seed(0)
    m, x = make().train(), batch()
    if name == 'awd_lstm':
        call(m, x)  # a hidden state from an earlier batch

    def state():
        return (
            {k: v.clone() for k, v in m.state_dict().items()},
            [k.training for k in m.modules()],
            random_states()[2],
            n_hooks(m),
        )

    before, hidden = state(), getattr(m[0], 'hidden', None) if name == 'awd_lstm' else None
    seed = torch.get_rng_state()
    y = call(m, x)
    m.load_state_dict(before[0])
    if hidden:
        m[0].hidden = hidden
    torch.set_rng_state(seed)
    tree = layers(m, *(x if isinstance(x, tuple) else (x,)))
    after = state()
    assert after[1:] == before[1:] and all(
        torch.equal(after[0][k], v) for k, v in before[0].items()
    )
    assert sum(l.shape is not None for l in tree) > 3
    if hidden:
        assert m[0].hidden is hidden
    first = lambda o: o[0] if isinstance(o, tuple) else getattr(o, 'logits', o)
    assert torch.equal(
        first(call(m, x)), first(y)
    )  # the next batch is the same as it would have been


class Named(nn.Module):
    def forward(self, x):
        return dict(a=x, b=(x * 2, x * 3))


def test_a_key_reads_one_item_of_an_output():
    m, x = nn.Sequential(Named()), torch.rand(2, 3)
    with Taps(m, ['0@[a]', '0@[b]@[1]']) as taps:
        m(x)
    found = taps.pop()
    assert torch.equal(found['0@[a]'], x)
    assert torch.equal(found['0@[b]@[1]'], x * 3)


def test_a_missing_key_lists_those_that_exist():
    m = nn.Sequential(Named(), nn.Identity())
    with pytest.raises(DistillError, match="reads the item 'c' of the output, which has a, b"):
        with Taps(m, '0@[c]'):
            m(torch.rand(2, 3))


def test_an_output_without_items_is_refused():
    m = nn.Sequential(nn.ReLU())
    with pytest.raises(DistillError, match="reads the item 'c' of the output, which is a Tensor"):
        with Taps(m, '0@[c]'):
            m(torch.rand(2, 3))
