"Pairs are kept as asked; 'auto' proposes what one would choose by hand."

import functools, random, warnings
from dataclasses import asdict
import numpy as np
import pytest, timm, torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torchvision import models as tv
from torchvision.models.vgg import make_layers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

with warnings.catch_warnings():  # while it is imported, fastai uses what PyTorch has deprecated
    warnings.simplefilter('ignore')
    from fastai.collab import EmbeddingDotBias
    from fastai.tabular.model import TabularModel
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model, get_text_classifier
    from fastai.vision.learner import create_body, create_timm_model, create_vision_model
    from fastai.vision.models.unet import DynamicUnet
from fastdistill import Distiller, Term, losses, recipes
from fastdistill.base.outputs import DistillError, Outputs
from fastdistill.features.layer_pairs import Pair, PairTable, pair
from fastdistill.features.model_stages import stages
from fastdistill.features.projectors import Projector
from fastdistill.features import Taps
from fastdistill.teachers import Teacher


def images(size=64, b=2, wide=None):
    return torch.randn(b, 3, size, wide or size, generator=torch.Generator().manual_seed(1))


def words(b=4, n=20):
    return torch.randint(2, 50, (b, n), generator=torch.Generator().manual_seed(1))


def net(c=4):
    return nn.Sequential(
        nn.Conv2d(3, c, 3),
        nn.ReLU(),
        nn.Conv2d(c, 2 * c, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * c, 2),
    )


def vit(depth, **kw):
    return timm.create_model(
        'vit_tiny_patch16_224',
        **{**dict(img_size=64, depth=depth, embed_dim=24, num_heads=3, num_classes=3), **kw},
    )


def names(pairs):
    return [(p.student, p.teacher) for p in pairs]


def stage_names(model, x):
    return [u.name + u.turn for u in stages(model, x if isinstance(x, tuple) else (x,))]


# as asked


def test_pairs_are_kept_as_asked_many_to_many_and_in_that_order():
    s, t, x = net(), net(8), images(8)
    for asked in ({'2': ['0', '2'], '0': '2'}, [('2', '0'), ('2', '2'), ('0', '2')]):
        pairs = pair(s, t, x, layers=asked)
        assert names(pairs) == [('2', '0'), ('2', '2'), ('0', '2')] and isinstance(pairs, PairTable)
    assert pairs[0] == Pair('2', (2, 8, 4, 4), '0', (2, 8, 6, 6), '4x4 -> 6x6')
    assert asdict(pairs[2])['projector'] == '6x6 -> 4x4, conv_bn 4 -> 16'
    assert names(pair(s, t, x, layers=['2', '0'])) == [('2', '2'), ('0', '0')] and names(
        pair(s, t, x, layers='2')
    ) == [('2', '2')]


def test_the_shapes_are_those_that_the_layers_give():
    s, t, x = net(), net(8), images(8)
    for p in pair(s, t, x, layers={'1@in': '1', '3': '3', '6@in': '6@in'}):
        for m, name, shape in ((s, p.student, p.s_shape), (t, p.teacher, p.t_shape)):
            with Taps(m, name) as taps:
                m(x)
                assert tuple(taps.pop()[name].shape) == shape


def test_globs_pair_in_order_if_they_are_as_many():
    s, t, x = tv.resnet18(), timm.create_model('resnet34'), images(32)
    assert names(pair(s, t, x, layers={'layer[12]': 'layer[34]@pre'})) == [
        ('layer1', 'layer3@pre'),
        ('layer2', 'layer4@pre'),
    ]
    assert names(pair(s, t, x, layers='layer?')) == [
        (f'layer{i}', f'layer{i}') for i in (1, 2, 3, 4)
    ]
    with pytest.raises(
        DistillError,
        match=r"'layer1.\*' matches 2 layers of the student \(layer1.0, layer1.1\), 'layer1.\*' matches 3 of the",
    ):
        pair(s, t, x, layers={'layer1.*': 'layer1.*'})


def test_other_inputs_for_the_teacher_and_several_inputs():
    s, t = net(), net(8)
    (p,) = pair(s, t, images(8), {'2': '2'}, x_teacher=images(10))
    assert (p.s_shape, p.t_shape) == ((2, 8, 4, 4), (2, 16, 6, 6))
    tab = TabularModel([(5, 3)], 2, 2, [7, 6])
    assert pair(tab, tab, (words(4, 1) % 5, torch.randn(4, 2)), layers=['layers.1'])[0].s_shape == (
        4,
        6,
    )
    bert = BertForSequenceClassification(bert_config(1))
    x = dict(input_ids=words(), attention_mask=torch.ones(4, 20, dtype=torch.long))
    assert pair(bert, bert, x, layers='bert.encoder.layer.*')[0].s_shape == (4, 20, 8)


@pytest.mark.parametrize(
    'layers, message',
    [
        ({'9': '0'}, "In the student: No layer '9' in Sequential"),
        ({'0': '9'}, "In the teacher: No layer '9' in Sequential"),
        ([('0', '1', '2')], r"\('0', '1', '2'\) is not a pair of names. Give"),
        ([('0', None)], 'is not a pair of names'),
        ({'0': 3}, 'is not a pair of names'),
        ([3], '3 is not a pair of names'),
        (3, 'layers=3'),
        ({}, 'does not name any layers'),
    ],
)
def test_wrong_layers_are_refused(layers, message):
    with pytest.raises(DistillError, match=message):
        pair(net(), net(), images(8), layers=layers)


@pytest.mark.parametrize(
    'layers, message',
    [
        (3, 'is not a pair of names'),
        ({'0': 3}, 'is not a pair of names'),
        ([('0', '1', '2')], 'is not a pair of names'),
        ({}, 'does not name any layers'),
        ('0@mena', '@mena. It must be one of @in'),
        ({'0': '1@maps'}, '@maps. It must be one of @in'),
        ('auto@mena', '@mena. It must be one of @in'),
        (images(8), 'layers= got a tensor'),
    ],
    ids=range(8),
)
def test_layers_that_have_no_meaning_are_refused_where_the_term_is_made(layers, message):
    for make in (lambda: Term(losses.hint, layers=layers), lambda: recipes.at(layers=layers)):
        with pytest.raises(DistillError, match=message):
            make()


def test_a_projector_that_does_not_exist_is_refused_where_the_term_is_made():
    for wrong in ('conf', nn.Conv2d, None):
        with pytest.raises(DistillError, match="must be one of 'auto', 'linear'"):
            recipes.hint(projector=wrong)


@pytest.mark.parametrize(
    'layers, message',
    [
        ({'9': '0'}, "In the student: No layer '9' in Sequential"),
        ({'0': 'layer9'}, "In the teacher: No layer 'layer9' in ResNet. Nearest: 'layer4'"),
        (
            {'?': 'layer?'},
            r"'\?' matches 7 layers of the student .* 'layer\?' matches 4 of the teacher",
        ),
    ],
    ids=range(3),
)
def test_layers_that_a_model_does_not_have_are_refused_where_the_distiller_is_made(layers, message):
    with pytest.raises(DistillError, match=message):
        Distiller(net(), tv.resnet18(), recipes.at(layers=layers))


def test_layers_of_what_shows_none_are_refused_where_the_distiller_is_made():
    for teacher, name in ((lambda x: x, '<lambda>'), ([net(), net()], '2 teachers')):
        with pytest.raises(
            DistillError,
            match=f"In the teacher: layers='auto' needs one model whose layers can be read, not {name}",
        ):
            Distiller(net(), teacher, recipes.at())


def test_a_layer_that_does_not_run_is_named_with_its_model():
    t = tv.googlenet(init_weights=False, num_classes=3)
    with pytest.raises(DistillError, match="In the teacher: Layer 'aux1' of GoogLeNet did not run"):
        pair(net(), t, images(64), layers={'0': 'aux1'})


def test_printed_it_is_a_table():
    lines = str(pair(tv.resnet18(), tv.resnet50(), images())).splitlines()
    assert (
        lines[0].split() == ['student', 'shape', 'teacher', 'shape', 'projector']
        and len(lines) == 6
    )
    assert (
        lines[2].split('  ')[0] == 'layer1'
        and '(2, 64, 16, 16)' in lines[2]
        and lines[2].endswith('conv_bn 64 -> 256')
    )
    assert len({l.index('(2') for l in lines[2:]}) == 1


# three axes: (B, C, L) of a 1d convolution, or tokens (B, L, D)


def series(c, stride=2, after=nn.ReLU):
    return nn.Sequential(
        nn.Conv1d(3, c, 3, stride, 1),
        nn.BatchNorm1d(c),
        after(),
        nn.MaxPool1d(2),
        Residual(c),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(c, 2),
    )


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv1d(c, c, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()


class OverTime(nn.Module):
    "Tokens (B, L, D) in and out, with a 1d convolution inside, as in a Conformer"

    def __init__(self, d, norm):
        super().__init__()
        self.norm, self.conv = norm(d), nn.Conv1d(d, d, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)


class Speech(nn.Module):
    "A 1d convolution, then tokens, as in Whisper and wav2vec"

    def __init__(self, d, norm=nn.LayerNorm):
        super().__init__()
        self.stem, self.act, self.block, self.rnn, self.head = (
            nn.Conv1d(3, d, 3, 2, 1),
            nn.GELU(),
            OverTime(d, norm),
            nn.LSTM(d, d, batch_first=True),
            nn.Linear(d, 2),
        )

    def forward(self, x):
        return self.head(self.rnn(self.block(self.act(self.stem(x)).transpose(1, 2)))[0].mean(1))


def signal(n=64):
    return torch.randn(4, 3, n, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('n', [64, 32], ids=['', 'as many channels as places'])  # in the student
def test_a_1d_convolution_named_by_hand_has_its_channels_first(n):
    s, t, x = series(16 if n == 64 else 8), series(24, 1), signal(n)
    pairs = pair(s, t, x, layers=[str(i) for i in range(5)])
    assert names(pairs) == [(f'{i}@tokens', f'{i}@tokens') for i in range(5)]
    assert [p.s_shape for p in pairs] == [(4, n // 2, s[0].out_channels)] * 3 + [
        (4, n // 4, s[0].out_channels)
    ] * 2
    assert (
        pairs[0].projector == f'{n // 2} tokens -> {n} tokens, linear {s[0].out_channels} -> 24'
        and '0@tokens' in str(pairs)
    )
    with Taps(s, [p.student for p in pairs]) as taps:
        y = s.eval()[:1](x)
        s(x)
        torch.testing.assert_close(taps.pop()['0@tokens'], y.transpose(1, 2))


def test_what_a_suffix_asks_of_a_1d_convolution_is_asked_of_its_tokens():
    s, x = series(16), signal()
    pairs = pair(s, s, x, layers=['0@mean', '1@in', '2@pre@mean', '4@tokens', '0@in'])
    assert [p.student for p in pairs] == [
        '0@tokens@mean',
        '1@in@tokens',
        '2@pre@tokens@mean',
        '4@tokens',
        '0@in@tokens',
    ]
    assert [p.s_shape for p in pairs] == [(4, 16), (4, 32, 16), (4, 16), (4, 16, 16), (4, 64, 3)]
    with Taps(s, '0@tokens@mean') as taps:
        s.eval()(x)
        torch.testing.assert_close(taps.pop()['0@tokens@mean'], s[0](x).mean(2))


@pytest.mark.parametrize(
    'norm', [nn.LayerNorm, lambda d: nn.Identity()], ids=['with a norm', 'without one']
)
def test_tokens_stay_tokens_whatever_runs_inside_or_before(norm):
    s, x = Speech(8, norm), signal(48)
    pairs = pair(s, s, x, layers=['stem', 'act', 'block', 'block@tokens', 'rnn', 'rnn@mean'])
    assert [p.student for p in pairs] == [
        'stem@tokens',
        'act@tokens',
        'block',
        'block',
        'rnn',
        'rnn@mean',
    ]
    assert all(p.s_shape == (4, 24, 8) for p in pairs[:5]) and pairs[5].s_shape == (4, 8)
    t = nn.Sequential(
        nn.Linear(5, 8),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    ).eval()
    assert [
        p.student for p in pair(t, t, torch.randn(4, 8, 5), layers=['0', '1', '1.layers.0'])
    ] == ['0', '1', '1.layers.0']


def test_a_series_is_resized_along_its_length_even_where_its_length_is_a_square():
    for layers in ({'0': '0'}, 'last'):
        p = pair(series(16), series(16, 1), signal(), layers=layers)[0]
        assert not p.picture and (p.student, p.s_shape[1], p.t_shape[1]) in (
            ('0@tokens', 32, 64),
            ('4@tokens', 16, 32),
        )
    d = Distiller(
        series(4),
        series(4, 1),
        Term(losses.hint, layers={'4': '0'}, projector='auto'),
        example=signal(),
    )
    (link,) = d.links['hint']
    s, t = torch.randn(4, 16, 4), torch.randn(4, 64, 4)
    want = torch.nn.functional.interpolate(s.transpose(1, 2), 64, mode='linear').transpose(1, 2)
    torch.testing.assert_close(link.projector(s, t), want)


def test_distilling_a_1d_convolution_compares_channel_with_channel_and_place_with_place():
    student, teacher, x, y = (
        series(6).eval(),
        series(6).eval(),
        signal(),
        torch.tensor([0, 1, 0, 1]),
    )
    d = Distiller(
        student,
        teacher,
        Term(losses.hint, layers={'2': '2'}) + Term(losses.at, layers={'2': '2'}),
        example=x,
    )
    a, b = student[:3](x), teacher[:3](x)
    r = d(x, y)
    torch.testing.assert_close(r.parts['hint'], losses.hint(a, b).detach())
    torch.testing.assert_close(r.parts['at'], losses.at(a, b).detach())
    assert (
        sum(p.numel() for p in d.own_parameters()) == 0
    )  # the channels are as many, so there is nothing to project


def test_features_that_come_without_their_layer_must_say_how_they_lie():
    x = signal()
    f = Teacher(
        lambda x: Outputs(
            torch.zeros(4, 2),
            {'deep': torch.zeros(4, 16, 64), 'deep@tokens': torch.zeros(4, 64, 16)},
        )
    )
    with pytest.raises(
        DistillError,
        match=r"layer '0' has its channels first, \(B, C, L\). The teacher's 'deep' of shape \(4, 16, 64\)",
    ):
        pair(series(8), f, x, layers={'0': 'deep'})
    assert (
        pair(series(8), f, x, layers={'0': 'deep@tokens'})[0].projector
        == '32 tokens -> 64 tokens, linear 8 -> 16'
    )


# teachers that are no module


def test_a_teacher_an_ensemble_and_a_function_that_brings_features():
    s, t, x = net(), net(8), images(8)
    assert names(pair(s, Teacher(t), x)) == names(pair(s, t, x)) == [('1', '1'), ('3', '3')]
    assert pair(s, Teacher([t, s]), x, layers={'2': ['0.2', '1.0']})[1].t_shape == (2, 4, 6, 6)
    with pytest.raises(DistillError, match="In the teacher: layers='auto' needs one model"):
        pair(s, Teacher([t, s]), x)
    f = Teacher(lambda x: Outputs(torch.zeros(2, 2), dict(deep=torch.zeros(2, 9))))
    assert pair(s, f, x, layers={'2': 'deep'})[0] == Pair(
        '2', (2, 8, 4, 4), 'deep', (2, 9), '4x4 -> vector, linear 8 -> 9'
    )
    with pytest.raises(DistillError, match="outputs have no layer 'low'. They have: deep"):
        pair(s, f, x, layers={'2': 'low'})


# proposed: the stages of a model


def bert_config(layers):
    return BertConfig(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
    )


def awd(kind='lm', **kw):
    config = {
        **(awd_lstm_lm_config if kind == 'lm' else awd_lstm_clas_config),
        'n_hid': 12,
        'emb_sz': 8,
        **kw,
    }
    return (
        get_language_model(AWD_LSTM, 60, config=config)
        if kind == 'lm'
        else get_text_classifier(AWD_LSTM, 60, 3, config=config)
    )


def tabular(*hidden, **kw):
    return TabularModel([(5, 3), (6, 4)], 2, 2, list(hidden), **kw)


def row():
    return words(4, 2) % 5, torch.randn(4, 2)


def vgg():
    plan = [8, 'M', 8, 'M', 16, 16, 'M', 16, 16, 'M', 16, 16, 'M']
    return nn.Sequential(
        make_layers(plan, batch_norm=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
    )


class Double(nn.Sequential):
    def __init__(self, i, o):
        super().__init__(
            nn.Conv2d(i, o, 3, padding=1),
            nn.BatchNorm2d(o),
            nn.ReLU(True),
            nn.Conv2d(o, o, 3, padding=1),
            nn.BatchNorm2d(o),
            nn.ReLU(True),
        )


class Up(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.up, self.conv = nn.ConvTranspose2d(i, o, 2, 2), Double(i, o)

    def forward(self, a, b):
        return self.conv(torch.cat([b, self.up(a)], 1))


class UNet(nn.Module):
    "The textbook's"

    def __init__(self, c=4, n=3):
        super().__init__()
        self.inc, self.out = Double(3, c), nn.Conv2d(c, 5, 1)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), Double(c * 2**i, c * 2 ** (i + 1))) for i in range(n)
        )
        self.ups = nn.ModuleList(Up(c * 2 ** (i + 1), c * 2**i) for i in reversed(range(n)))

    def forward(self, x):
        xs = [self.inc(x)]
        for d in self.downs:
            xs.append(d(xs[-1]))
        y = xs.pop()
        for u in self.ups:
            y = u(y, xs.pop())
        return self.out(y)


@functools.cache
def fastai_unet(arch=tv.resnet18):
    return DynamicUnet(create_body(arch(), cut=-2), 4, (64, 64))


class TwoLSTMs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (
            nn.LSTM(5, 8, batch_first=True),
            nn.GRU(8, 8, batch_first=True),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        return self.head(self.b(self.a(x)[0])[0][:, -1])


def conv1d():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, 2, 1),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def fully_conv():
    return nn.Sequential(Double(3, 4), Double(4, 4), Double(4, 6), nn.Conv2d(6, 5, 1))


def encoder():
    blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    return nn.Sequential(nn.Linear(5, 8), blocks, nn.Flatten(), nn.Linear(56, 2))


def dilated():
    return tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)


def mlp():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(48, 9),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(9, 9),
        nn.ReLU(),
        nn.Linear(9, 2),
    )


layer = lambda *ns: [f'layer{i}' for i in ns]
of = lambda pre, *ns: [f'{pre}.{i}' for i in ns]

STAGES = dict(
    resnet18=(tv.resnet18, images, layer(1, 2, 3, 4)),  # not the stem
    resnet50=(tv.resnet50, images, layer(1, 2, 3, 4)),
    body=(
        lambda: create_body(tv.resnet18(), cut=-2),
        images,
        of('', 4, 5, 6, 7),
    ),  # without a head the last stage is a feature
    vision_learner=(
        lambda: create_vision_model(tv.resnet18, 3, pretrained=False),
        images,
        of('0', 4, 5, 6, 7),
    ),
    fastai_timm=(
        lambda: create_timm_model('resnet10t', 3, pretrained=False)[0],
        images,
        of('0.model', *layer(1, 2, 3, 4)),
    ),
    vgg=(vgg, images, of('0', 2, 6, 13, 20, 27)),  # the last activation before each pooling
    mobilenet=(tv.mobilenet_v2, images, of('features', 1, 3, 6, 13, 17)),  # not the last 1x1
    efficientnet=(
        lambda: timm.create_model('efficientnet_b0'),
        images,
        of('blocks', 0, 1, 2, 4, 6),
    ),  # what timm's features_only gives
    densenet=(
        lambda: tv.DenseNet(8, (2, 2, 2), 16),
        images,
        of('features', *[f'denseblock{i}' for i in (1, 2, 3)]),
    ),
    convnext=(lambda: timm.create_model('convnext_atto'), images, of('stages', 0, 1, 2, 3)),
    swin=(
        lambda: timm.create_model(
            'swin_tiny_patch4_window7_224',
            img_size=64,
            window_size=2,
            embed_dim=24,
            depths=(1, 1, 2, 1),
        ),
        images,
        [f'layers.{i}@map' for i in range(4)],
    ),  # channels last
    deep_stem=(lambda: timm.create_model('resnet26d'), images, layer(1, 2, 3, 4)),
    dilated=(
        dilated,
        lambda: images(32),
        of('backbone', *layer(1, 2, 3, 4)),
    ),  # three of them at one resolution
    lenet=(net, lambda: images(8), ['1', '3']),
    one_resolution=(fully_conv, images, ['0', '1', '2']),
    unet=(UNet, images, ['inc', *of('downs', 0, 1, 2), *of('ups', 0, 1, 2)]),
    fastai_unet=(
        fastai_unet,
        images,
        of('layers', '0.4', '0.5', '0.6', 3, 4, 5, 6, 7, 11),
    ),  # encoder, middle, decoder, last block
    vit=(lambda: vit(3), images, of('blocks', 0, 1, 2)),
    registers=(lambda: vit(3, reg_tokens=4), images, of('blocks', 0, 1, 2)),
    without_head=(lambda: vit(3, num_classes=0), images, of('blocks', 0, 1, 2)),
    mixer=(
        lambda: MlpMixer(img_size=64, num_blocks=3, embed_dim=16, num_classes=3),
        images,
        of('blocks', 0, 1, 2),
    ),
    torchvision_vit=(
        lambda: tv.VisionTransformer(64, 16, 2, 2, 8, 16),
        images,
        of('encoder.layers', 'encoder_layer_0', 'encoder_layer_1'),
    ),
    bert=(
        lambda: BertForSequenceClassification(bert_config(2)),
        lambda: dict(input_ids=words()),
        of('bert.encoder.layer', 0, 1),
    ),
    transformer=(encoder, lambda: torch.randn(4, 7, 5), of('1.layers', 0, 1, 2)),
    awd_lm=(awd, words, of('0.rnns', 0, 1, 2)),
    awd_classifier=(lambda: awd('clas'), words, of('0.module.rnns', 0, 1, 2)),
    lstms=(TwoLSTMs, lambda: torch.randn(4, 7, 5), ['a', 'b']),
    time_series=(conv1d, lambda: torch.randn(4, 3, 32), ['2@tokens', '4@tokens']),
    tabular=(lambda: tabular(9, 8, 7), row, of('layers', 0, 1, 2)),
    tabular_range=(lambda: tabular(9, 8, y_range=(0, 1)), row, of('layers', 0, 1)),
    mlp=(mlp, lambda: images(4), ['2', '5']),
)


@pytest.mark.parametrize('name', STAGES)
def test_stages_are_those_that_one_would_name_by_hand(name):
    make, batch, want = STAGES[name]
    torch.manual_seed(0)
    assert stage_names(make(), batch()) == [n.lstrip('.') for n in want]


@pytest.mark.parametrize('name', STAGES)
def test_stages_of_a_model_in_training_can_be_tapped(name):
    "None of them is overwritten in place by what comes after it, each has a gradient, and its shape is as was said"
    make, batch, _ = STAGES[name]
    torch.manual_seed(0)
    m, x = make().train(), batch()
    pairs = pair(m, m, x)
    with Taps(m, [p.student for p in pairs]) as taps:
        m(**x) if isinstance(x, dict) else m(*x) if isinstance(x, tuple) else m(x)
        feats = taps.pop()
    for p in pairs:
        y = feats[p.student]
        assert tuple(y.shape) == p.s_shape == p.t_shape and y.requires_grad
        assert p.projector == 'none'


# proposed: pairs


def test_convolutional_nets_pair_by_resolution():
    assert names(pair(tv.resnet18(), tv.resnet50(), images())) == [
        (f'layer{i}', f'layer{i}') for i in (1, 2, 3, 4)
    ]
    pairs = pair(tv.mobilenet_v2(), tv.resnet50(), images())
    assert names(pairs) == [
        ('features.3', 'layer1'),
        ('features.6', 'layer2'),
        ('features.13', 'layer3'),
        ('features.17', 'layer4'),
    ]
    assert names(pair(tv.shufflenet_v2_x0_5(), tv.resnet18(), images())) == [
        (f'stage{i}', f'layer{i}') for i in (2, 3, 4)
    ]
    # the same reduction of other inputs
    pairs = pair(tv.resnet18(), tv.mobilenet_v2(), images(64), x_teacher=images(96))
    assert [p.teacher for p in pairs] == [f'features.{i}' for i in (3, 6, 13, 17)]
    assert pairs[0].projector == '16x16 -> 24x24, conv_bn 64 -> 24'


def test_where_the_last_stages_have_other_resolutions_stages_pair_by_depth():
    pairs = pair(tv.resnet18(), vgg(), images())
    assert names(pairs) == [
        ('layer1', '0.2'),
        ('layer2', '0.13'),
        ('layer3', '0.20'),
        ('layer4', '0.27'),
    ]


def test_transformers_pair_at_equal_relative_depth():
    assert names(pair(vit(3), vit(6), images())) == [
        (f'blocks.{i}', f'blocks.{2 * i + 1}') for i in range(3)
    ]
    pairs = pair(vit(12), vit(8), images())
    assert names(pairs) == [
        ('blocks.2', 'blocks.1'),
        ('blocks.5', 'blocks.3'),
        ('blocks.8', 'blocks.5'),
        ('blocks.11', 'blocks.7'),
    ]
    small = DistilBertForSequenceClassification(
        DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=50)
    )
    pairs = pair(small, BertForSequenceClassification(bert_config(4)), dict(input_ids=words()))
    assert names(pairs) == [
        (f'distilbert.transformer.layer.{i}', f'bert.encoder.layer.{2 * i + 1}') for i in (0, 1)
    ]


def test_a_convolutional_net_and_a_transformer_meet_as_maps():
    pairs = pair(tv.resnet18(), vit(8), images())
    assert names(pairs) == [(f'layer{i + 1}', f'blocks.{2 * i + 1}@map') for i in range(4)]
    assert (
        pairs[0].t_shape == (2, 24, 4, 4) and pairs[0].projector == '16x16 -> 4x4, conv_bn 64 -> 24'
    )
    assert names(pair(vit(8), tv.resnet18(), images())) == [(t, s) for s, t in names(pairs)]
    # pictures that go in by keyword are pictures too
    hf = ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=64,
        )
    )
    by_name = pair(tv.resnet18(), hf, images(), x_teacher=dict(pixel_values=images()))
    assert (
        all(
            p.teacher.endswith(f'.{i}@map') and p.t_shape == (2, 24, 4, 4)
            for i, p in enumerate(by_name)
        )
        and len(by_name) == 4
    )
    # a wide picture's tokens stay tokens: only the projector knows the picture's form
    wide = timm.create_model(
        'vit_tiny_patch16_224', img_size=(32, 64), depth=4, embed_dim=24, num_heads=3
    )
    p = pair(tv.resnet18(), wide, images(32, wide=64))[0]
    assert (p.teacher, p.projector) == ('blocks.0', '8x16 -> 9 tokens, linear 64 -> 24')
    assert Projector(p.s_shape, p.t_shape)(torch.zeros(p.s_shape)).shape == p.t_shape


def test_unets_pair_way_down_with_way_down_and_way_up_with_way_up():
    assert names(pair(UNet(), UNet(6), images())) == [(n, n) for n in stage_names(UNet(), images())]
    assert names(pair(UNet(n=3), UNet(n=4), images())) == [
        ('inc', 'inc'),
        ('downs.0', 'downs.0'),
        ('downs.1', 'downs.1'),
        ('downs.2', 'downs.2'),
        ('ups.0', 'ups.1'),
        ('ups.1', 'ups.2'),
        ('ups.2', 'ups.3'),
    ]
    assert names(pair(UNet(), fastai_unet(), images())) == [
        ('downs.1', 'layers.0.4'),
        ('downs.2', 'layers.0.5'),
        ('ups.0', 'layers.6'),
        ('ups.1', 'layers.7'),
        ('ups.2', 'layers.11'),
    ]
    assert names(pair(fastai_unet(), fastai_unet(tv.resnet34), images())) == [
        (n, n) for n in STAGES['fastai_unet'][2]
    ]


def conv(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())


def up(scale):
    return nn.Upsample(scale_factor=scale)


SEGMENTERS = dict(
    down=nn.Sequential(conv(3, 8, 2), conv(8, 16, 2), conv(16, 16), nn.Conv2d(16, 4, 1), up(4)),
    down_and_up=nn.Sequential(
        conv(3, 8, 2),
        conv(8, 16, 2),
        conv(16, 32, 2),
        up(4),
        conv(32, 8),
        nn.Conv2d(8, 4, 1),
        up(2),
    ),
    halved=nn.Sequential(conv(3, 8, 2), conv(8, 8), nn.Conv2d(8, 4, 1), up(2)),
    full_size=nn.Sequential(conv(3, 8), conv(8, 8), nn.Conv2d(8, 4, 1)),
    classifier=tv.resnet18(num_classes=4),
)


@pytest.mark.parametrize(
    'name, pairs',
    [
        (
            'down',
            {'2': 'layers.0.4'},
        ),  # its first stage has no counterpart on the way down, where the U-Net's stem is no stage
        ('down_and_up', {'1': 'layers.0.4', '2': 'layers.0.5', '4': 'layers.7'}),
        ('halved', {'1': 'layers.7'}),  # only on the way up is there a stage of this resolution
        ('full_size', {'1': 'layers.11'}),
        (
            'classifier',
            {
                'layer1': 'layers.0.4',
                'layer2': 'layers.0.5',
                'layer3': 'layers.0.6',
                'layer4': 'layers.3',
            },
        ),
    ],
)
def test_a_convolutional_student_pairs_with_a_unet_by_resolution_on_the_way_down(name, pairs):
    student, teacher, x = (
        SEGMENTERS[name],
        DynamicUnet(create_body(tv.resnet34(), cut=-2), 4, (72, 96)),
        images(72, wide=96),
    )
    found = pair(student, teacher, x)
    assert dict(names(found)) == pairs
    if name != 'full_size':
        assert all(p.s_shape[2:] == p.t_shape[2:] for p in found)
    assert [(s, t) for t, s in names(pair(teacher, student, x))] == names(found)


def test_a_stage_pairs_with_the_last_one_of_its_resolution():
    assert names(pair(dilated(), UNet(), images())) == [
        ('backbone.layer1', 'downs.1'),
        ('backbone.layer4', 'downs.2'),
    ]


def test_recurrent_nets_and_mlps_pair_by_depth():
    assert names(pair(awd(n_layers=2), awd(n_layers=4), words())) == [
        ('0.rnns.0', '0.rnns.1'),
        ('0.rnns.1', '0.rnns.3'),
    ]
    pairs = pair(tabular(9, 8), tabular(50, 40, 30), row())
    assert (
        names(pairs) == [('layers.0', 'layers.1'), ('layers.1', 'layers.2')]
        and pairs[1].projector == 'linear 8 -> 30'
    )
    # a student without maps can't become one; the other way it is pooled
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 2))
    with pytest.raises(DistillError, match='finds vectors in the student but maps in the teacher'):
        pair(flat, net(), images(8))
    assert pair(net(), flat, images(8)) == [
        Pair('3', (2, 8, 4, 4), '2', (2, 9), '4x4 -> vector, linear 8 -> 9')
    ]


def test_the_last_pair_alone_and_a_suffix_for_all():
    s, t = tv.resnet18(), tv.resnet50()
    assert names(pair(s, t, images(), layers='last')) == [('layer4', 'layer4')]
    pairs = pair(s, t, images(), layers='auto@mean')
    assert names(pairs) == [(f'layer{i}@mean', f'layer{i}@mean') for i in (1, 2, 3, 4)]
    assert pairs[3] == Pair('layer4@mean', (2, 512), 'layer4@mean', (2, 2048), 'linear 512 -> 2048')


def test_what_has_no_stages_says_so_and_lists_its_layers():
    with pytest.raises(
        DistillError,
        match=r"In the student: layers='auto' finds no stages in EmbeddingDotBias(.*\n)+.*u_weight +Emb",
    ):
        pair(EmbeddingDotBias(5, 10, 10), net(), words(4, 2) % 10, x_teacher=images(8))


def test_the_proposal_is_the_same_each_time_and_for_other_batches():
    s, t = create_vision_model(tv.resnet18, 3, pretrained=False), timm.create_model('resnet10t')
    a = [pair(s, t, images(64, b)) for b in (1, 2, 2, 5)]
    assert a[1] == a[2] and names(a[0]) == names(a[1]) == names(a[3])


@pytest.mark.parametrize('layers', ['auto', {'layer1': 'layer1', 'bn1@pre': 'fc@in'}], ids=str)
def test_pairing_changes_nothing(layers):
    s, t = tv.resnet18().train(), tv.resnet18().train()
    t.layer1.eval()
    state = lambda: (
        [v.clone() for m in (s, t) for v in m.state_dict().values()],
        [k.training for m in (s, t) for k in m.modules()],
    )
    rng = lambda: (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    before, states, x = state(), rng(), images()
    at_first = x.clone()
    pair(s, t, x, layers=layers)
    after = state()
    assert after[1] == before[1] and rng() == states and torch.equal(x, at_first)
    assert all(map(torch.equal, after[0], before[0]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (s, t) for m in n.modules())
