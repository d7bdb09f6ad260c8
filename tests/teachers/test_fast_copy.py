"Faster copies of a teacher: precision, memory format, folded batch-norms, compilation. The model itself is never changed."

import copy, pickle, shutil, warnings
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from fastdistill import DistillError, Distiller, Outputs, Teacher, hint, kd
from fastdistill.teachers import compiled_module, fast_copy as speed
from fastdistill.teachers.batch_norm_folding import foldable
from fastdistill.teachers.teacher import with_defaults


def conv_net(width=8):
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 2)
            m.bias.data.normal_()
    return net


def images(n=8):
    return torch.randn(n, 3, 16, 16)


def far(a, b):
    return ((a - b).square().mean().sqrt() / b.std()).item()


def facts(model):
    "All of a model that may not change"
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [
            (id(p), p.data_ptr(), p.dtype, p.stride(), p.requires_grad, p.grad)
            for p in model.parameters()
        ],
        [
            (m, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ],
    )


def unchanged(was, model):
    now = facts(model)
    assert was[1:] == now[1:] and all(torch.equal(v, now[0][k]) for k, v in was[0].items())


@pytest.fixture
def eager(monkeypatch):
    "Small models count as large, and every copy as faster"
    monkeypatch.setattr(speed, 'WORK', 0)
    monkeypatch.setattr(speed, 'is_faster', lambda *_: True)
    return monkeypatch


def test_a_small_teacher_runs_as_it_is():
    net, x = conv_net().eval(), images()
    t = Teacher(net)
    with torch.no_grad():
        assert torch.equal(t(x).logits, net(x))
    assert (
        t.runner.module is net
        and repr(t) == 'Teacher(Sequential: as it is)'
        and repr(Teacher(net)) == 'Teacher(Sequential)'
    )


@pytest.mark.parametrize(
    'options,tol,says',
    [
        (dict(precision='bf16'), 0.03, 'bfloat16, a copy'),
        (dict(precision='fp16', fold_bn=True), 0.01, 'float16, 2 batch-norms'),
        (dict(fold_bn=True), 1e-5, 'float32, 2 batch-norms folded'),
        (dict(memory_format='channels_last'), 1e-5, 'float32, channels_last, a copy'),
        (dict(device='cpu'), 1e-6, 'float32, on cpu'),
    ],
)
def test_a_choice_by_hand_is_a_private_copy_with_the_same_outputs(options, tol, says, capsys):
    net, x = conv_net(), images()
    net[3].weight.grad = torch.ones_like(net[3].weight)
    was, plain = facts(net), copy.deepcopy(net).eval()(x)
    t = Teacher(net, run=options)
    with t:
        a, b = t(x).logits, t(x).logits
        assert t.runner.module is not net and not {
            p.data_ptr() for p in t.runner.module.parameters() if p.dtype != torch.float32
        } & {p.data_ptr() for p in net.parameters()}
    assert (
        a.dtype == torch.float32
        and torch.equal(a, b)
        and 0 <= far(a, plain) < tol
        and not a.requires_grad
    )
    assert says in repr(t) and 'MiB' in repr(t)
    unchanged(was, net)
    assert ('differ by' in capsys.readouterr().out) == ('precision' in options)


def test_auto_chooses_what_the_processor_does_itself(eager):
    net, x = conv_net(), images()
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        eager.setattr(speed, 'native_bf16', lambda device, native=native: native)
        t = Teacher(net)
        t(x)
        assert (
            next(t.runner.module.parameters()).dtype == dtype
            and t.runner.half == ('bfloat16' if native else '')
            and 'channels_last, 2 batch-norms folded' in repr(t)
        )
    t = Teacher(net, run=dict(precision='fp32', memory_format=None, fold_bn=False))
    assert torch.equal(t(x).logits, net.eval()(x)) and t.runner.module is net


def test_a_processor_without_bfloat16_is_not_asked_for_it():
    assert isinstance(speed.native_bf16(torch.device('cpu')), bool) and not speed.native_bf16(
        torch.device('mps')
    )


@pytest.mark.parametrize(
    'net,x,want',
    [
        (nn.Linear(20, 30, bias=False), torch.randn(8, 20), 2 * 8 * 600),
        (nn.LSTM(4, 8, bias=False), torch.randn(5, 3, 4), 2 * 15 * 4 * 8 * (4 + 8)),
        (
            nn.Sequential(nn.Embedding(100, 20), nn.Linear(20, 30, bias=False)),
            torch.zeros(8, 5, dtype=torch.long),
            2 * 40 * 600,
        ),
        (nn.Conv2d(3, 6, 16, 16, bias=False), torch.randn(2, 3, 64, 32), 2 * 2 * 8 * 3 * 6 * 256),
    ],
    ids=['table', 'recurrent', 'tokens', 'patches'],
)
def test_operations_are_those_that_a_layer_does(net, x, want):
    assert speed.operations(net, (x,), {}) == want


def test_a_network_for_small_images_is_as_large_as_its_operations(monkeypatch):
    "Its layers see images at full resolution, as in a ResNet for CIFAR"
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(4, 3, 32, 32)
    real = 2 * 4 * 32 * 32 * 9 * (3 * 8 + 8 * 8)
    runs = []

    def run(module):
        runs.append(module)
        return module(x)

    assert speed.operations(net, (x,), {}) < real / 100
    for work, large, n in ((real, True, 1), (real + 1, False, 1), (1e3 * real, False, 0)):
        monkeypatch.setattr(speed, 'WORK', work)
        runs.clear()
        assert speed.is_large(net, (x,), {}, run) == large
        assert len(runs) == n


def test_a_copy_that_is_not_faster_is_not_used(eager, capsys):
    eager.setattr(speed, 'native_bf16', lambda device: True)
    eager.setattr(speed, 'is_faster', lambda *_: False)
    net, x = conv_net(), images()
    t = Teacher(net)
    assert torch.equal(t(x).logits, net.eval()(x))
    assert repr(t) == 'Teacher(Sequential: as it is (a copy is not faster))'
    assert 'runs as it is: a copy is not faster' in capsys.readouterr().out


def test_the_better_of_two_runs_shows_which_module_is_faster(monkeypatch):
    seconds = iter([0, 9, 0, 3, 0, 2, 0, 4])  # a: 9 and 2; b: 3 and 4
    monkeypatch.setattr(speed.time, 'perf_counter', lambda: next(seconds))
    assert speed.is_faster('a', 'b', lambda m: torch.zeros(1))


def test_one_sample_decides_nothing_for_larger_batches(eager):
    eager.setattr(speed, 'native_bf16', lambda device: True)
    eager.setattr(speed, 'WORK', 2 * 32 * 64 * 64)
    t = Teacher(nn.Linear(64, 64))
    t(torch.randn(1, 64))
    assert not t.runner.half
    t(torch.randn(32, 64))
    assert t.runner.half == 'bfloat16'


def test_a_copy_that_is_not_faster_for_one_sample_is_tried_with_larger_batches(eager):
    eager.setattr(speed, 'native_bf16', lambda device: True)
    eager.setattr(speed, 'is_faster', lambda a, b, run: run(b)[0].numel() > 64)
    t = Teacher(nn.Linear(64, 64))
    t(torch.randn(1, 64))
    assert not t.runner.half
    t(torch.randn(32, 64))
    assert t.runner.half == 'bfloat16'


class Cancels(nn.Module):
    "A small difference of large numbers"

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return (self.lin(x) + 1000.0) - 1000.0


def test_outputs_that_are_too_far_are_refused(eager, capsys):
    eager.setattr(speed, 'native_bf16', lambda device: True)
    net, x = Cancels(), torch.randn(8, 4)
    t = Teacher(net)
    assert torch.equal(t(x).logits, net(x)) and t.runner.module is net
    assert (
        'runs as it is: in bfloat16 its outputs differ by' in capsys.readouterr().out
        and 'in bfloat16 its outputs differ by' in repr(t)
    )


class NoHalf(nn.Linear):
    def forward(self, x):
        if x.dtype == torch.bfloat16:
            raise TypeError('no half precision here')
        return super().forward(x)


def test_a_model_that_does_not_run_as_a_copy_runs_as_it_is(capsys):
    net, x = NoHalf(4, 3), torch.randn(2, 4)
    t = Teacher(net, run=dict(precision='bf16'))
    assert (
        torch.equal(t(x).logits, net(x))
        and 'TypeError: no half precision here' in capsys.readouterr().out
    )
    t = Teacher(torch.compile(nn.Linear(4, 3), backend='eager'), run=dict(precision='bf16'))
    t(x)
    assert (
        'it is compiled already' in repr(t) and 'it is compiled already' in capsys.readouterr().out
    )


def test_a_hook_of_yours_still_sees_the_model():
    class Sees:
        def __init__(self):
            self.seen = []

        def __call__(self, m, args, out):
            self.seen.append(out)

        def hook(self, m, args, out):
            self.seen.append(out)

    net, sees = conv_net(), Sees()
    net[0].register_forward_hook(sees.hook)
    t = Teacher(net, run=dict(precision='bf16'))
    t(images())
    assert len(sees.seen) == 1 and 'it has custom hooks' in repr(t)


def test_a_hook_that_is_an_object_still_sees_the_model():
    class Sees:
        def __init__(self):
            self.seen = []

        def __call__(self, m, args, out):
            self.seen.append(out)

    net, sees = conv_net(), Sees()
    net[0].register_forward_hook(sees)
    Teacher(net, run=dict(precision='bf16'))(images())
    assert len(sees.seen) == 1


def test_a_hook_that_comes_after_a_copy_was_made_sees_its_layers():
    net, seen = conv_net(), []
    t = Teacher(net, run=dict(precision='bf16'))
    t(images())
    handle = net[0].register_forward_hook(lambda m, args, out: seen.append(out))
    t(images())
    assert seen
    handle.remove()
    n = len(seen)
    t(images())
    assert len(seen) == n
    assert t.runner.half == 'bfloat16'


def test_the_representation_counts_the_batch_norms_that_are_folded_now():
    t, x = Teacher(conv_net(), run=dict(fold_bn=True)), images()
    with t:
        t(x)
        assert '2 batch-norms folded' in repr(t)
        t.outputs((x,), layers=['0'])
        assert '1 batch-norms folded' in repr(t)


@pytest.mark.parametrize('rows', [3, 4])
def test_layers_are_found_where_a_batch_runs_in_slices(rows):
    x, net = images(8), conv_net()
    whole, parts = [
        Distiller(conv_net(4), Teacher(net, run=dict(batch=n)), hint(layers='auto'), example=x)
        for n in (None, rows)
    ]
    assert [(p.student, p.teacher) for p in whole.pairs] == [
        (p.student, p.teacher) for p in parts.pairs
    ]


def test_a_teacher_with_batch_is_never_run_on_more_rows():
    class Counts(nn.Sequential):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    seen = []
    t = Teacher(Counts(*conv_net()), run=dict(batch=3, precision='bf16', fold_bn=True))
    t(images(8))
    assert t.runner.half == 'bfloat16'
    assert max(seen) == 3


# folding


class Block(nn.Module):
    "Convolutions whose batch-norm must stay apart: read twice, used twice, returned, hooked"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = [nn.Conv2d(4, 4, 1) for _ in range(4)]
        self.na, self.nb, self.nc, self.nd = [nn.BatchNorm2d(4) for _ in range(4)]

    def forward(self, x):
        y = self.a(x)
        x = self.na(y) + y
        x = self.nb(self.b(self.nb(self.b(x))))
        x = self.nd(self.d(x))
        z = self.c(x)
        return self.nc(z).mean((2, 3)), z


def test_only_what_nothing_else_reads_is_folded():
    net, x = Block().eval(), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        pairs = foldable(net, lambda: net(x))
    assert [(p.conv, p.norm) for p in pairs] == [(net.d, net.nd)] and not any(
        m._forward_hooks or m._forward_pre_hooks for m in net.modules()
    )


def test_a_layer_that_is_read_stays_what_it_is():
    net, x = conv_net().eval(), images()
    t = Teacher(net, run=dict(fold_bn=True, memory_format=None))
    with t, torch.no_grad():
        assert '2 batch-norms' in repr(t(x) and t)
        o = t.outputs((x,), layers=['0', '1@pre', '4@in', '5'])
        conv = net[0](x)
        torch.testing.assert_close(o.feats['0'], conv)
        torch.testing.assert_close(o.feats['1@pre'], net[1](conv))
        torch.testing.assert_close(o.feats['4@in'], net[:4](x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(o.feats['5'], net[:6](x), rtol=1e-4, atol=1e-5)
    t = Teacher(net, run=dict(fold_bn=True), layers=['3'])
    torch.testing.assert_close(t(x).feats['3'], net[:4](x).detach(), rtol=1e-4, atol=1e-5)
    assert '1 batch-norms folded' in repr(t)


class Containers(nn.Module):
    "Containers that return, receive or pass on the output of a convolution before its batch norm"

    def __init__(self):
        super().__init__()
        norm = lambda: nn.BatchNorm2d(4)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.stem_norm, self.drop = norm(), nn.Identity()
        self.block = nn.Sequential(norm(), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1)))
        self.block2 = nn.Sequential(
            nn.Sequential(norm(), nn.ReLU(True)), nn.Conv2d(4, 4, 1), norm()
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x):
        x = self.stem_norm(self.drop(self.stem(x))).relu_()
        return self.head(self.block2(self.block(x)))


def layers_by_hooks(model, x):
    "What each module receives (@in) and returns (@pre), by plain hooks"
    seen, handles = {}, []
    for name, m in model.named_modules():
        if name:
            note = lambda m, args, y, name=name: seen.update({f'{name}@pre': y.clone()})
            note_in = lambda m, args, name=name: seen.update({f'{name}@in': args[0].clone()})
            handles += [m.register_forward_hook(note), m.register_forward_pre_hook(note_in)]
    with torch.no_grad():
        model(x)
    for h in handles:
        h.remove()
    return seen


def with_random_norms(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.bias)
    return net.eval()


def test_a_folded_copy_gives_every_layer_and_container_of_the_model():
    torch.manual_seed(0)
    net, x = with_random_norms(Containers()), images()
    expected = layers_by_hooks(net, x)
    assert len(expected) == 2 * (len([*net.modules()]) - 1)
    for name, y in expected.items():
        t = Teacher(net, run=dict(fold_bn=True))
        with t:
            t(x)  # the batch norms are folded before the layer is known
            assert '3 batch-norms folded' in repr(t)
            o = t.outputs((x,), layers=[name])
        torch.testing.assert_close(o.feats[name], y, rtol=1e-4, atol=1e-5, msg=name)


def test_a_container_before_a_batch_norm_is_not_overwritten_in_a_folded_copy():
    net, x = with_random_norms(Containers()), images()
    with torch.no_grad():
        y = net.stem(x)
    feats = Teacher(net, run=dict(fold_bn=True), layers=['stem'])(x).feats
    torch.testing.assert_close(feats['stem'], y, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore:.torch.jit')
def test_a_model_with_a_part_in_torchscript_is_folded():
    net, x = with_random_norms(conv_net()), images()
    net[5] = torch.jit.trace(nn.ReLU(), torch.randn(2, 8, 3, 3))
    t = Teacher(net, run=dict(fold_bn=True))
    with torch.no_grad():
        torch.testing.assert_close(t(x).logits, net(x), rtol=1e-4, atol=1e-5)
    assert '2 batch-norms folded' in repr(t)


def test_a_convolution_whose_output_the_model_returns_as_a_feature_is_not_folded():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.rest = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), conv_net()

        def forward(self, x):
            y = self.conv(x)
            return Outputs(self.rest(self.norm(y).relu()), {'early': y})

    net, x = with_random_norms(Early()), images()
    t = Teacher(net, run=dict(fold_bn=True))
    torch.testing.assert_close(t(x).feats['early'], net.conv(x).detach())
    assert '2 batch-norms folded' in repr(t)


def test_a_hint_on_a_container_is_the_same_with_a_folded_copy():
    torch.manual_seed(0)
    net, student, x = with_random_norms(Containers()), Containers().eval(), images()
    with torch.no_grad():
        expected = F.mse_loss(student.stem(x), net.stem(x))
    teacher = Teacher(net, run=dict(fold_bn=True))
    recipe = kd() + hint(layers={'stem@pre': 'stem@pre'}, weight=0.01)
    d = Distiller(student, teacher, recipe, example=x, check=False)
    parts = d(x, torch.randint(5, (8,))).parts
    torch.testing.assert_close(parts['hint'], expected)
    assert '2 batch-norms folded' in repr(teacher)


def test_a_teacher_that_is_never_copied_does_not_report_the_hooks_of_a_probe():
    x = images()
    t = Teacher(conv_net(), run=dict(precision='fp32', memory_format=None, fold_bn=False))
    Distiller(conv_net(4), t, hint(layers={'5': '5'}), example=x, check=False)
    assert repr(t) == 'Teacher(Sequential: as it is)'


def test_a_feature_recipe_learns_the_same_from_a_copy():
    net, x, y = conv_net(), images(), torch.randint(5, (8,))
    grads = []
    for options in (dict(), dict(fold_bn=True, memory_format='channels_last')):
        torch.manual_seed(0)
        student = conv_net(4)
        d = Distiller(
            student,
            Teacher(net, run=options),
            kd() + hint(layers={'5': '5', '3': '3'}, weight=1.0),
            example=x,
        )
        d(x, y).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in d.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


# weights that change


@pytest.mark.parametrize(
    'change',
    [lambda p: p.mul_(2), lambda p: p.data.mul_(2), lambda p: setattr(p, 'data', p.data * 2)],
)
def test_a_teacher_whose_weights_change_is_not_an_old_copy(change):
    net, x = nn.Linear(4, 3), torch.randn(8, 4)
    t = Teacher(net, run=dict(precision='bf16'))
    with t:
        t(x)
        for p in net.parameters():
            with torch.no_grad():
                change(p)
        assert torch.equal(t(x).logits, net(x)) and 'its weights change' in repr(t)
    t = Teacher(net, run=dict(precision='bf16'))
    t(x)
    for p in net.parameters():
        with torch.no_grad():
            change(p)
    a = t(x).logits
    assert far(a, net(x).detach()) < 0.03 and t.runner.half == 'bfloat16'


REPLACE = dict(
    loaded=lambda net: net.load_state_dict(conv_net().state_dict(), assign=True),
    parameter=lambda net: setattr(net[8], 'weight', nn.Parameter(torch.randn(5, 8))),
    buffer=lambda net: setattr(net[1], 'running_mean', torch.randn(8)),
    layer=lambda net: net.__setitem__(8, nn.Linear(8, 5)),
    another=lambda net: net.append(nn.Linear(5, 5)),
)


@pytest.mark.parametrize('replace', REPLACE.values(), ids=REPLACE)
@pytest.mark.parametrize(
    'run', [dict(precision='bf16'), dict(fold_bn=True)], ids=['bf16', 'folded']
)
def test_a_teacher_whose_weights_are_replaced_is_not_an_old_copy(run, replace):
    net, x = conv_net(), images()
    with Teacher(net, run=run) as t:
        t(x)
        replace(net)
        got = t(x).logits
        assert torch.equal(got, net.eval()(x))


@pytest.mark.parametrize('run', [None, dict(precision='bf16')], ids=['as it is', 'copy'])
@pytest.mark.parametrize('data', [False, True], ids=['copy_', 'data'])
def test_an_averaged_teacher_keeps_its_average_of_the_batch_norms(data, run):
    "A mean teacher: the student's moving average, of weights and of batch norm statistics"

    def average(m, student):
        for a, b in zip(m.state_dict().values(), student.state_dict().values()):
            new = (a.double() * 0.5 + b.double() * 0.5).to(a)
            with torch.no_grad():
                (a.data if data else a).copy_(new)

    student, x = conv_net(4), images()
    teacher = copy.deepcopy(student)
    alone = copy.deepcopy(teacher)
    d = Distiller(student, Teacher(teacher, run=run), kd(alpha=1.0), check=False)
    opt = torch.optim.SGD(student.parameters(), 0.1)
    with d.teacher:
        for _ in range(3):
            d(x).total.backward()
            opt.step()
            opt.zero_grad()
            average(teacher, student)
            average(alone, student)
    for k, v in alone.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[k], v, rtol=0, atol=0, msg=k)


@pytest.mark.parametrize('run', [None, dict(precision='bf16')], ids=['as it is', 'copy'])
def test_a_model_that_is_loaded_while_it_teaches_keeps_all_that_was_loaded(run):
    net, loaded, x = conv_net(), conv_net().state_dict(), images()
    with Teacher(net, run=run) as t:
        t(x)
        net.load_state_dict(loaded, assign=True)
        t(x)
    for k, v in net.state_dict().items():
        assert torch.equal(v, loaded[k]), k


def test_weights_that_are_rarely_compared_are_compared_in_the_end(monkeypatch):
    "As on a GPU, where a comparison waits for the batches before"
    monkeypatch.setitem(speed.EVERY, 'cpu', 4)
    net, x = nn.Linear(4, 3), torch.randn(8, 4)
    with Teacher(net, run=dict(precision='bf16')) as t:
        t(x)
        for p in net.parameters():
            p.data.mul_(2)
        exact = [torch.equal(t(x).logits, net(x)) for _ in range(6)]
    assert exact[0] is False
    assert all(exact[4:])


def test_with_and_without_the_block_the_numbers_are_the_same():
    net, x = conv_net(), images()
    t = Teacher(net, run=dict(precision='bf16'))
    a = t(x).logits
    with t:
        assert torch.equal(t(x).logits, a)
    assert torch.equal(t.probe(x).logits, a) and torch.equal(
        Teacher(t, select=[0, 1])(x).logits, a[:, :2]
    )


def test_training_under_autocast_does_not_change_a_copy():
    t, x = Teacher(conv_net(), run=dict(precision='bf16')), images()
    a = t(x).logits
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(t(x).logits, a)


class Memory(nn.Module):
    "A recurrent model with a hidden state"

    def __init__(self):
        super().__init__()
        self.rnn, self.out, self.h = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3), None

    def reset(self):
        self.h = None

    def forward(self, x):
        y, h = self.rnn(x, self.h)
        self.h = tuple(o.detach() for o in h)
        return self.out(y)


def test_a_hidden_state_lives_in_the_copy():
    net, xs = Memory(), torch.randn(3, 2, 5, 4)
    t = Teacher(net, run=dict(precision='bf16'), axis=-1)
    with t:
        first = [t(x).logits for x in xs]
        probed = t.probe(xs[0]).logits
        assert not torch.equal(t(xs[0]).logits, first[0])
        t.reset()
        again = [t(x).logits for x in xs]
    assert (
        net.h is None and all(map(torch.equal, first, again)) and not torch.equal(probed, first[0])
    )
    with torch.no_grad():
        assert far(torch.stack(first), torch.stack([net(x) for x in xs])) < 0.03


def test_a_copied_or_pickled_teacher_starts_without_the_copy():
    t, x = Teacher(conv_net(), run=dict(precision='bf16')), images()
    a = t(x).logits
    for o in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert o.runner.module is o.model and torch.equal(o(x).logits, a)


def test_members_of_an_ensemble_get_the_options():
    nets, x = [conv_net(), conv_net()], images()
    t = Teacher(nets, run=dict(precision='bf16'), ensemble=dict(combine='logits'))
    with t:
        a = t(x).logits
    assert (
        all(m.runner.half == 'bfloat16' for m in t.members)
        and far(a, sum(n.eval()(x) for n in nets).detach() / 2) < 0.03
    )
    t = Teacher([Teacher(nets[0], run=dict(precision='fp32')), nets[1]], run=dict(precision='bf16'))
    t(x)
    assert [m.runner.half for m in t.members] == ['', 'bfloat16']


def test_a_variation_keeps_what_it_does_not_change():
    t = Teacher(Teacher(conv_net(), run=dict(batch=3, precision='bf16')), run=dict(fold_bn=True))
    assert t.run == dict(batch=3, precision='bf16', fold_bn=True)
    assert Teacher(t, select=[0, 1]).run == t.run
    assert Teacher(t, run=dict(precision='fp32')).run == t.run | dict(precision='fp32')


def test_defaults_change_only_what_was_not_given():
    t = Teacher(conv_net(), kind='sigmoid', run=dict(precision='bf16'))
    other = with_defaults(t, kind='softmax', axis=-1, run=dict(precision='fp32', batch=2))
    assert (other.kind, other.axis) == ('sigmoid', -1)
    assert other.run == dict(precision='bf16', batch=2)
    assert with_defaults(t, kind='softmax', run=dict(precision='fp32')) is t


def test_a_teacher_that_is_given_as_it_is_gets_no_copy(eager):
    eager.setattr(speed, 'native_bf16', lambda device: True)
    t, x = Teacher([conv_net(), conv_net()], run=dict(batch=4)), images()
    plain = t.as_it_is()
    t(x), plain(x)
    assert [m.runner.half for m in t.members] == ['bfloat16'] * 2
    assert [m.runner.half for m in plain.members] == [''] * 2
    assert all(m.runner.module is m.module for m in plain.members)


# slices


def test_slices_of_rows_give_the_same_outputs():
    net, x = conv_net(), images(7)
    whole, parts = [Teacher(net, layers=['5'], run=dict(batch=n))(x) for n in (None, 3)]
    for a, b in ((whole.logits, parts.logits), (whole.feats['5'], parts.feats['5'])):
        torch.testing.assert_close(a, b)
    seen = []

    def f(ids, attention_mask, scale):
        seen.append(len(ids))
        return Outputs(ids.float() * scale, {'a': ids}, attention_mask)

    o = Teacher(f, run=dict(batch=2))(
        torch.arange(5)[:, None], attention_mask=torch.ones(5, 1), scale=torch.tensor(2.0)
    )
    assert (
        seen == [2, 2, 1]
        and o.logits.flatten().tolist() == [0, 2, 4, 6, 8]
        and len(o.feats['a']) == len(o.mask) == 5
    )


# mistakes


@pytest.mark.parametrize(
    'options,says',
    [
        (dict(precision='half'), "precision='half': must be one of 'auto', 'fp32', 'bf16', 'fp16'"),
        (dict(compile='yes'), "compile='yes': must be one of False, True"),
        (dict(memory_format='nhwc'), "must be one of 'auto', 'channels_last', None"),
        (dict(fold_bn=2), 'must be one of'),
        (dict(compile='auto'), "compile='auto': must be one of False, True"),
        (
            dict(half=True),
            "run={'half': True}: must be a dict with any of 'precision', 'memory_format', 'fold_bn', "
            "'compile', 'device', 'batch'",
        ),
        (dict(batch=0), 'must be a positive whole number of rows'),
        (dict(batch=True), 'must be a positive whole number'),
        (
            dict(model=torch.sin, precision='bf16'),
            "precision='bf16' is for an nn.Module, but this teacher is a builtin",
        ),
        (
            dict(model=torch.sin, device='cpu', compile=True),
            "compile=True, device='cpu' is for an nn.Module",
        ),
    ],
)
def test_a_wrong_option_is_refused(options, says):
    with pytest.raises(DistillError, match=says):
        Teacher(options.pop('model', nn.Linear(2, 2)), run=options)


# compilation


@pytest.fixture
def compiles(monkeypatch):
    "torch.compile that compiles nothing, and counts"
    calls = []
    monkeypatch.setattr(torch, 'compile', lambda m, **kw: calls.append(kw) or m)
    monkeypatch.setattr(compiled_module, 'missing_compiler', lambda device: None)
    return calls


def runs(n, **options):
    net, x = nn.Linear(4, 3), torch.randn(8, 4)
    t = Teacher(net, run=dict(precision='bf16', **options))
    with t:
        for _ in range(n):
            out = t(x)
        assert far(out.logits, net(x).detach()) < 0.03
        return repr(t)


def test_nothing_is_compiled_unless_asked(compiles, eager):
    assert 'compiled' not in runs(8)
    t, x = Teacher(conv_net()), images()
    with t:
        for _ in range(8):
            t(x)
    assert not compiles


def test_a_teacher_is_compiled_once_if_asked(compiles, capsys):
    assert 'compiled in 0 s' in runs(8, compile=True)
    assert compiles == [dict(dynamic=False, options={'freezing': True})]
    assert capsys.readouterr().out.count('is compiled in 0 s') == 1


def test_without_a_compiler_nothing_is_compiled(monkeypatch, capsys):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert 'not compiled (there is no C++ compiler on this machine)' in runs(2, compile=True)
    assert 'is not compiled (there is no C++ compiler on this machine)' in capsys.readouterr().out


def test_an_error_of_the_compiler_is_one_line(compiles, monkeypatch, capsys):
    def fails(m, **kw):
        raise RuntimeError('no such luck\nmany lines')

    monkeypatch.setattr(torch, 'compile', fails)
    assert (
        'not compiled (RuntimeError: no such luck)' in runs(2, compile=True)
        and 'many lines' not in capsys.readouterr().out
    )


def test_compiled_outputs_that_differ_are_not_used(compiles, monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3, dtype=x.dtype)

    monkeypatch.setattr(torch, 'compile', lambda m, **kw: Wrong())
    assert 'the outputs of the compiled module differ too much' in runs(2, compile=True)


def test_a_compiled_teacher_predicts_the_same():
    if compiled_module.missing_compiler(torch.device('cpu')):
        pytest.skip('no C++ compiler')
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(8, 4)
    t = Teacher(net, run=dict(compile=True))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PyTorch about itself, while it compiles
        with t:
            a, b = t(x).logits, t(x).logits
            torch.testing.assert_close(a, net(x).detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(t(x[:3]).logits, net(x[:3]).detach(), rtol=1e-4, atol=1e-5)
            assert torch.equal(a, b) and 'compiled in' in repr(t)
            assert t.outputs((x,), layers=['1']).feats['1'].shape == (8, 8)


def test_a_student_learns_from_a_half_precision_teacher_in_place_of_the_full_one():
    net, x, y = conv_net(), images(), torch.randint(5, (8,))
    grads = []
    for precision in ('fp32', 'bf16'):
        torch.manual_seed(0)
        student = conv_net(4)
        Distiller(student, Teacher(net, run=dict(precision=precision)), kd(T=4, alpha=0.9))(
            x, y
        ).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert 0 < F.mse_loss(*grads).sqrt() / grads[0].std() < 0.02


# caches


def test_the_precision_of_a_cache_is_part_of_its_teacher(tmp_path, eager):
    from cached import Convs, cache_teacher, data
    from fastdistill.fastai import verify_cache

    eager.setattr(speed, 'native_bf16', lambda device: True)
    net, dls = Convs(3).eval(), data()
    cache = cache_teacher(net, dls, tmp_path / 'a', views=1)
    assert (
        cache.manifest.teacher['precision'] == 'bfloat16'
        and verify_cache(cache, net, data(), n=8).worst < 0.02
    )
    with pytest.raises(DistillError, match='teacher, precision: bfloat16 in the cache, None now'):
        cache_teacher(Teacher(net, run=dict(precision='fp32')), dls, tmp_path / 'a', views=1)
    for options, dtype in ((dict(), 'float32'), (dict(precision='fp32'), 'float16')):
        exact = cache_teacher(
            Teacher(net, run=options), dls, tmp_path / dtype, views=1, store=dict(dtype=dtype)
        )
        assert (
            'precision' not in exact.manifest.teacher
            and verify_cache(exact, net, data(), n=8).worst < 1e-2
        )


def test_a_fit_reports_the_copy_where_the_learner_prints(eager, capsys):
    from apps import image, quiet
    from fastdistill.fastai import KnowledgeDistillation

    eager.setattr(speed, 'native_bf16', lambda device: True)
    student, teacher = quiet(*image())
    was = facts(teacher.model)
    kd = KnowledgeDistillation(teacher, check=False)
    student.fit(1, 1e-3, cbs=kd)
    assert (
        'bfloat16' in repr(kd.distiller.teacher) and kd.distiller.teacher.runner.half == 'bfloat16'
    )
    assert (
        'runs as a copy' not in capsys.readouterr().out
    )  # this learner's logger is fastai's `noop`
    student.logger = print
    student.fit(1, 1e-3, cbs=KnowledgeDistillation(teacher, check=False))
    assert capsys.readouterr().out.count('runs as a copy: bfloat16') == 1
    unchanged(was, teacher.model)


class Years(nn.Module):
    "Predicts five classes, and a year and a fraction, whose scales differ"

    def __init__(self):
        super().__init__()
        self.color, self.numbers = nn.Linear(6, 5), nn.Linear(6, 2)
        with torch.no_grad():
            self.numbers.weight *= torch.tensor([[10.0], [0.1]])
            self.numbers.bias.copy_(torch.tensor([2000.0, 0.5]))

    def forward(self, x):
        return dict(color=self.color(x), numbers=self.numbers(x))


def test_each_number_of_a_copy_is_close_relative_to_its_own_spread(eager, capsys):
    eager.setattr(speed, 'native_bf16', lambda device: True)
    net, x = Years(), torch.randn(64, 6)
    teacher = Teacher(net, output='numbers', kind='regression')
    assert torch.equal(teacher(x).logits, net(x)['numbers'])
    assert 'in bfloat16 its outputs differ by' in capsys.readouterr().out
    # one sample has no spread, so its numbers are compared together
    assert Teacher(net, output='numbers', kind='regression')(x[:1]).logits.shape == (1, 2)


@pytest.mark.parametrize('first', ['color', 'numbers'])
def test_every_output_that_is_read_from_a_copy_is_close(first, eager, capsys):
    eager.setattr(speed, 'native_bf16', lambda device: True)
    net, x, student = Years(), torch.randn(64, 6), Years()
    teachers = {k: net for k in (first, *{'color', 'numbers'} - {first})}
    d = Distiller(student, teachers, kd(), kind=dict(numbers='regression'))
    got = d.teacher_outputs(x)
    for name, want in net(x).items():
        assert torch.equal(got[name].logits, want)
    assert 'in bfloat16 its outputs differ by' in capsys.readouterr().out


def test_an_output_that_is_read_later_ends_a_copy_that_is_not_close(eager, capsys):
    eager.setattr(speed, 'native_bf16', lambda device: True)
    net, x = Years(), torch.randn(64, 6)
    color = Teacher(net, output='color')
    assert 0 < far(color(x).logits, net(x)['color']) < 0.03
    numbers = Teacher(color, output='numbers', kind='regression')
    assert torch.equal(numbers(x).logits, net(x)['numbers'])
    assert 'runs as it is from now on: in bfloat16 its outputs' in capsys.readouterr().out
    assert torch.equal(color(x).logits, net(x)['color'])


def test_a_layer_that_a_copy_does_not_hold_ends_the_copy(eager, capsys):
    "The mean of its outputs is large compared with their differences"
    eager.setattr(speed, 'native_bf16', lambda device: True)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(64, 6)
    with torch.no_grad():
        net[0].bias += 100.0
        net[1].weight *= 1e-3  # so that the outputs hardly depend on it
    teacher = Teacher(net)
    with teacher:
        assert far(teacher(x).logits, net(x).detach()) < 0.03
        assert teacher.runner.half == 'bfloat16'
        # a layer that the copy holds
        assert teacher.outputs((x,), layers=['2']).feats and teacher.runner.half == 'bfloat16'
        got = teacher.outputs((x,), layers=['0']).feats['0']
    assert torch.equal(got, net[0](x))
    assert 'from now on: in bfloat16 its layers differ by' in capsys.readouterr().out
