"A teacher answers as its model does in eval mode, in every form, and is afterwards as it was before."

import copy, hashlib, inspect, math, pickle, random, sys, warnings
from collections import OrderedDict, namedtuple
from functools import partial
from types import SimpleNamespace
import numpy as np
import onnx, pytest, timm, torch, torchvision
from onnx import TensorProto, helper, numpy_helper
from torch import nn
import torch.nn.functional as F
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from torch.utils.data import TensorDataset
from fastdistill.cache import cache_dataset
from fastdistill.checks.shared_parameters import numbers_of_parameters, parameters_of
from fastdistill.teachers.model_loading import Onnx
from fastdistill.base.outputs import DistillError, DistillWarning, Outputs
from fastdistill import Distiller, kd
from fastdistill.teachers.members import modules_of
from fastdistill.teachers.image_normalization import image_change
from fastdistill import Teacher  # the public name, whose docstring explains the options


def digest(t):
    return (
        None
        if t is None
        else hashlib.sha256(
            t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
    )


def state(model):
    "All that law 1 is about: weights, where they are, gradients, buffers, modes, hooks"
    ps = [
        (n, id(p), p.data_ptr(), digest(p), p.requires_grad, digest(p.grad), p.device)
        for n, p in model.named_parameters()
    ]
    bs = [(n, b.data_ptr(), digest(b), b.device) for n, b in model.named_buffers()]
    return (
        ps,
        bs,
        [
            (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.named_modules()
        ],
    )


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def trained(model, *x, **kw):
    "As users have them: in train mode, with gradients and statistics, some of it frozen"
    model.train()
    Outputs.of(model(*x, **kw)).logits.sum().backward()
    next(model.parameters()).requires_grad_(False)
    next(model.children()).eval()
    return model


def eval_of(model, *x, **kw):
    m = copy.deepcopy(model).eval()
    with torch.no_grad():
        return Outputs.of(m(*x, **kw)).logits


def refuses(match):
    return pytest.raises(DistillError, match=match)


def same(a, b, tol=0.0):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            num_labels=3,
            pad_token_id=None,
            attn_implementation='eager',
        )
    )


def lraspp():
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=30,
            n_positions=16,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


class Table(nn.Module):
    "Two inputs, as tabular models take them"

    def __init__(self):
        super().__init__()
        self.emb, self.bn, self.lin = nn.Embedding(6, 3), nn.BatchNorm1d(2), nn.Linear(5, 4)

    def forward(self, cats, conts):
        return self.lin(torch.cat([self.emb(cats[:, 0]), self.bn(conts)], 1))


IDS = torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(0))
MODELS = {
    'small': (small, (images(4, 3, 8, 8),)),
    'torchvision': (lambda: torchvision.models.resnet18(num_classes=4), (images(2, 3, 32, 32),)),
    'timm': (
        lambda: timm.create_model('resnet10t', pretrained=False, num_classes=4),
        (images(2, 3, 32, 32),),
    ),
    'segmentation': (lraspp, (images(2, 3, 32, 32),)),
    'bert': (bert, (IDS,)),
    'gpt2': (gpt2, (IDS,)),
    'lstm': (lambda: nn.Sequential(nn.LSTM(3, 4, dropout=0.5, num_layers=2)), (images(5, 2, 3),)),
    'table': (Table, (torch.tensor([[1], [2], [5]]), images(3, 2))),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, x = MODELS[request.param]
    return trained(seeded(make), *x), x


# law 1: a guest


def test_the_answer_is_the_models_own_in_eval_mode(case):
    model, x = case
    want = eval_of(model, *x)
    for t in (Teacher(model), Teacher(model).start()):
        o = t(*x)
        same(o.logits, want)
        assert (
            type(o.logits) is torch.Tensor
            and not o.logits.requires_grad
            and o.feats == {}
            and o.mask is None
        )
        t.stop()


def test_the_model_is_afterwards_as_it_was_before(case):
    model, x = case
    was, rng = state(model), torch.get_rng_state()
    t = Teacher(model)
    t(*x)
    assert state(model) == was
    with t:
        t(*x)
        t(*x)
    assert state(model) == was and torch.equal(
        torch.get_rng_state(), rng
    )  # nor did it draw a random number
    with pytest.raises(KeyboardInterrupt), t:
        t(*x)
        raise KeyboardInterrupt
    assert state(model) == was


def test_train_mode_is_put_back_too(case):
    model, x = case
    was = state(model)
    t = Teacher(model, run=dict(mode='train'))
    with t:
        assert all(m.training for m in model.modules())
        t(*x)
    t(*x)
    assert state(model) == was


def test_train_mode_is_train_mode():
    model, x = trained(seeded(small), images(4, 3, 8, 8)), images(4, 3, 8, 8)
    want = seeded(lambda: copy.deepcopy(model).train()(x))
    with Teacher(model, run=dict(mode='train')) as t:
        same(seeded(lambda: t(x)).logits, want.detach())
        assert model[1].num_batches_tracked > 1 and not torch.equal(t(x).logits, t(x).logits)
    assert model[1].num_batches_tracked == 1


def test_every_submodule_is_in_eval_mode_at_every_batch():
    model, x = seeded(small).train(), images(4, 3, 8, 8)
    want = eval_of(model, x)
    with Teacher(model) as t:
        assert not any(m.training for m in model.modules())
        model.train()  # by a fit of the teacher's own, say
        same(t(x).logits, want)
        same(t(x).logits, want)
    assert all(m.training for m in model.modules())


def test_a_models_own_eval_method_does_not_run():
    class Merging(nn.Linear):
        "As adapters do that merge into the weights"

        def train(self, mode=True):
            self.weight.data += -1 if mode else 1
            return super().train(mode)

    model = Merging(2, 2)
    was = state(model)
    Teacher(model)(images(2, 2))
    assert state(model) == was


def test_buffers_that_change_in_eval_mode_are_put_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer('n', torch.zeros(()))

        def forward(self, x):
            self.n += 1
            return super().forward(x)

    model = Counting()
    with Teacher(model) as t:
        t(images(2, 2))
        assert model.n == 1
    assert model.n == 0


def test_sparse_buffers_and_modules_without_parameters():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('edges', torch.eye(3).to_sparse())

        def forward(self, x):
            return x if x.is_meta else self.edges @ x

    model, x = Graph(), images(3, 2)
    for t in (Teacher(model), Teacher(nn.Identity())):
        same(t(x).logits, x)
    edges = model.edges
    Teacher(model)(x.to('meta'))
    assert model.edges is edges


def test_start_and_stop_may_come_twice_and_nested():
    model, x = seeded(small).train(), images(4, 3, 8, 8)
    t = Teacher(model)
    t.stop()
    assert t.start().start() is t and t.runner.started
    with t:
        with t:
            t(x)
        assert not model.training
    assert t.runner.started and not model.training
    t.stop()
    t.stop()
    assert not t.runner.started and model.training
    with pytest.raises(KeyboardInterrupt), t:
        raise KeyboardInterrupt
    assert not t.runner.started and model.training


def test_a_model_that_teaches_twice_in_one_ensemble_is_put_back():
    model = seeded(small).train()
    was = state(model)
    with Teacher([model, Teacher(model, run=dict(mode='train'))]) as t:
        t(images(4, 3, 8, 8))
    assert state(model) == was


def test_a_start_that_fails_leaves_the_other_members_as_they_were():
    class Broken(nn.Linear):
        @property
        def training(self):
            return True

        @training.setter
        def training(self, v):
            if not v:
                raise RuntimeError('no eval mode')

    good, bad = nn.Linear(2, 2), Broken(2, 2)
    t = Teacher([good, bad])
    with pytest.raises(RuntimeError, match='no eval mode'):
        t.start()
    assert good.training and not t.runner.started and not t.members[0].runner.started


def test_the_teacher_is_no_part_of_what_holds_it():
    student = nn.Linear(2, 2)
    student.teacher = Teacher(nn.Linear(2, 2))
    assert (
        len(list(student.parameters())) == 2
        and list(student.state_dict()) == ['weight', 'bias']
        and len(list(student.modules())) == 1
    )


def test_a_distributed_model_is_asked_without_its_wrapper(tmp_path):
    "DDP's forward sends buffers to the other processes, which would all have to ask at once"
    dist = torch.distributed
    dist.init_process_group(
        'gloo', store=dist.FileStore(str(tmp_path / 'store'), 1), rank=0, world_size=1
    )
    try:
        model = nn.Linear(2, 2)
        assert Teacher(nn.parallel.DistributedDataParallel(model)).model is model
    finally:
        dist.destroy_process_group()


def test_its_parameters_are_known():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    t = Teacher([a, [b, Teacher(a)]])
    known = {id(p) for p in parameters_of(t).values()}
    assert known == {id(p) for m in (a, b) for p in m.parameters()}
    assert modules_of(t) == [a, b, a]
    assert modules_of(Teacher(lambda x: x)) == [] and t.named_modules()['1.0.'] is b


def test_losses_can_go_backward_past_the_answer():
    "Answers are no inference tensors, which 'cannot be saved for backward'"
    s = nn.Linear(2, 3)
    model = nn.Linear(2, 3)
    guess = torch.inference_mode()(lambda x: model(x))
    for t in (Teacher(model), Teacher(guess), Teacher([model, guess])):
        s.zero_grad()
        x = images(4, 2)
        F.mse_loss(s(x), t(x).logits).backward()
        assert s.weight.grad.abs().sum() > 0 and model.weight.grad is None


def test_no_graph_even_where_the_model_wants_one():
    def with_grad(x):
        with torch.enable_grad():
            return torch.ones(1, requires_grad=True) * x

    assert not Teacher(with_grad)(images(2, 2).requires_grad_()).logits.requires_grad


def test_the_students_batch_is_not_changed_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))
    x = images(4, 2)
    was = x.clone()
    same(Teacher(model)(x).logits, eval_of(model, was.clone()))
    same(x, was)
    Teacher(lambda d: d['x'].zero_())({'x': x})
    same(x, was)


WRITES = dict(
    version=lambda x: x.relu_(),
    data=lambda x: x.data.mul_(2),
    numpy=lambda x: x.numpy().fill(1),
    view=lambda x: x[:1].zero_(),
)


@pytest.mark.parametrize('how', WRITES)
@pytest.mark.parametrize('batch', [None, 2])
def test_a_module_may_write_into_its_input_in_any_batch(how, batch):
    class Writes(nn.Linear):
        def forward(self, x):
            return super().forward(x), WRITES[how](x)

    x = images(4, 2)
    was = x.clone()
    with Teacher(Writes(2, 2), output=0, run=dict(batch=batch)) as t:
        for _ in range(3):
            t(x)
    same(x, was)


def test_outputs_are_no_views_of_the_students_batch():
    model, x = nn.Sequential(nn.Identity(), nn.Linear(2, 2)), images(4, 2)
    with Teacher(model) as t:
        for _ in range(3):
            t(x)
        for _ in range(3):
            o = t.outputs((x,), layers=['0'])
    was = x.clone()
    x.zero_()
    same(o.feats['0'], was)


def test_hidden_state_goes_on_from_batch_to_batch_and_is_put_back():
    class Sum(nn.Module):
        "As fastai's recurrent models do"

        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.ones(1))
            self.reset()

        def reset(self):
            self.hidden = [torch.zeros_like(self.k)]

        def forward(self, x):
            self.hidden = [self.hidden[0] + (self.k * x).sum().detach()]
            return self.hidden[0]

    model, x = Sum(), torch.ones(2)
    model(x)
    with Teacher(model) as t:
        assert [t(x).logits.item() for _ in range(2)] == [4, 6]
        assert t.probe(x).logits == 8 and model.hidden[0] == 6
        t.reset()
        assert t(x).logits == 2
        t(x.to('meta'))  # the state goes where the model goes
    assert model.hidden[0] == 2
    assert [t(x).logits.item() for _ in range(2)] == [4, 4]  # no run, no memory
    Teacher([model, model]).reset()
    assert model.hidden[0] == 0


class Resets(nn.Linear):
    "A linear layer whose `reset` does `how` to it"

    def __init__(self, how):
        super().__init__(2, 2)
        self.register_buffer('mean', torch.zeros(2))
        self.register_buffer('state', torch.ones(2), persistent=False)
        self.how, self.calls = how, []
        with torch.no_grad():
            self.bias[0] = math.nan  # equal to itself, here

    def reset(self):
        self.calls.append(1)
        self.state.zero_()
        self.how(self)


def swap_data(m):
    m.weight.data = torch.randn(2, 2)


def new_parameter(m):
    m.weight = nn.Parameter(m.weight.detach().clone())


def new_layers(m):
    m.more = nn.Linear(1, 1)


def needs_an_argument(m):
    raise TypeError("missing 1 required positional argument: 'h'")


@pytest.mark.parametrize(
    'how,says',
    [
        (lambda m: m.reset_parameters(), r'changes weights \(weight, bias\)'),
        (swap_data, r'changes weights \(weight\)'),
        (new_parameter, r'changes weights \(weight\)'),
        (lambda m: m.mean.add_(1), r'changes weights \(mean\)'),
        (lambda m: m.register_buffer('mean', torch.ones(2)), r'changes weights \(mean\)'),
        (new_layers, r'changes weights \(more.weight, more.bias\)'),
        (
            needs_an_argument,
            r"fails without arguments \(TypeError: missing 1 required positional argument: 'h'\)",
        ),
    ],
    ids=['in_place', 'data', 'parameter', 'buffer', 'new_buffer', 'new_layers', 'argument'],
)
def test_a_module_whose_reset_reinitializes_keeps_its_weights(how, says):
    model = Resets(how)
    model.weight.grad = torch.ones(2, 2)
    t, was, rng, attributes = Teacher(model), state(model), torch.get_rng_state(), set(vars(model))
    with pytest.warns(
        DistillWarning,
        match=f'Resets has a method reset.. that {says}. That was undone, and the method is not called again',
    ):
        t.reset()
    with t:
        t.reset()
        Teacher([Teacher(t, layers=['']), t]).reset()  # variations know it too
        t.probe(images(2, 2))
    assert (
        state(model) == was
        and torch.equal(torch.get_rng_state(), rng)
        and set(vars(model)) == attributes
    )
    assert (
        len(model.calls) == 0 and model.state.sum() == 2 and not t.runner.remembers
    )  # the trial's own traces are gone too


def test_a_reset_of_hidden_states_alone_is_called_whenever_it_is_asked_for():
    model = Resets(lambda m: torch.rand(1))
    t, was, rng = Teacher(model), state(model), torch.get_rng_state()
    for n in (1, 2):
        t.reset()
        assert len(model.calls) == n and model.state.sum() == 0
    model.state.fill_(1)
    assert (
        state(model) == was
        and torch.equal(torch.get_rng_state(), rng)
        and t.runner.remembers
        and Teacher([nn.Linear(1, 1), t]).members[1].runner.remembers
    )
    assert not any(Teacher(m).runner.remembers for m in (nn.Linear(1, 1), torch.sin))
    Teacher(scripted(nn.Linear(2, 2))).reset()


# random numbers


class Draws(nn.Module):
    "Draws from every global generator, whatever its mode"

    def forward(self, x):
        return x + torch.rand(1) + random.random() + np.random.rand()


def random_state():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
    )


@pytest.mark.parametrize(
    'make',
    [
        lambda: Teacher(nn.Sequential(nn.Dropout(0.5)), run=dict(mode='train')),
        lambda: Teacher(Draws(), run=dict(mode='train')),
        lambda: Teacher(Draws()),
        lambda: Teacher(lambda x: Draws()(x)),
        lambda: Teacher(
            [nn.Identity(), Draws().forward], run=dict(mode='train'), kind='regression'
        ),
        lambda: Teacher(lambda x: F.dropout(x, 0.5)),
        lambda: Teacher(nn.Sequential(nn.Identity(), AlwaysDrops())),
    ],
    ids=[
        'dropout',
        'module',
        'module_in_eval_mode',
        'function',
        'ensemble',
        'function_dropout',
        'dropout_in_eval_mode',
    ],
)
def test_what_a_teacher_draws_moves_no_random_state(make):
    t, x, was = make(), torch.ones(4, 50), random_state()
    for _ in range(2):  # not started, then started
        a, b = t(x).logits, t(x).logits
        assert random_state() == was and not torch.equal(
            a, b
        )  # yet each batch has numbers of its own
        t.start()
    t.stop()
    with pytest.raises(TypeError), t:
        t(x, x, 3, 4)
    assert random_state() == was


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


def test_a_teachers_random_numbers_follow_the_seed_at_its_start():
    x = torch.ones(4, 50)
    t = Teacher(Draws(), run=dict(mode='train'))

    def run():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        with t:
            return [t(x).logits for _ in range(3)]

    first = run()
    t(x)
    for a, b in zip(first, run()):
        same(a, b)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for a in first:
        same(a, Draws()(x))
    for c in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        c(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_what_a_teacher_draws_on_the_gpu_moves_no_random_state():
    for t in (
        Teacher(nn.Sequential(nn.Dropout(0.5)), run=dict(mode='train')),
        Teacher(lambda x: F.dropout(x, 0.5)),
    ):
        was, x = torch.cuda.get_rng_state(), torch.ones(4, 50, device='cuda')
        with t:
            assert not torch.equal(t(x).logits, t(x).logits)
        assert torch.equal(torch.cuda.get_rng_state(), was)


def test_a_probe_leaves_no_trace():
    model, x = trained(seeded(small), images(4, 3, 8, 8)), images(4, 3, 8, 8)
    for t in (
        Teacher(model, run=dict(mode='train')),
        Teacher(model, run=dict(mode='train')).start(),
    ):
        was, rng = state(model), torch.get_rng_state()
        o = t.probe(x, layers=['0', '2'])
        assert list(o.feats) == ['0', '2'] and t.layers == []
        assert state(model) == was and torch.equal(torch.get_rng_state(), rng)
    t.stop()


# where it lives, what it takes


def test_a_teacher_goes_to_the_batch_and_comes_back(case):
    "The meta device stands for an accelerator: nothing that is moved to it could come back by being moved"
    model, x = case
    was, want = state(model), eval_of(model, *x)
    with Teacher(model) as t:
        o = t(*[v.to('meta') for v in x])
        assert o.logits.device.type == 'meta' and o.logits.shape == want.shape
        assert {p.device.type for p in model.parameters()} == {'meta'}
    assert state(model) == was
    same(Teacher(model)(*x).logits, want)


@pytest.mark.parametrize('assign', [False, True])
def test_weights_that_change_while_a_teacher_is_moved_keep_their_values(assign):
    class Moved(nn.Module):
        "Its tensors are copied as if to an accelerator, but remain readable"

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def to(self, device):
            return self._apply(torch.clone)

        def forward(self, x):
            return x + 0

    model = Moved()
    own = dict(model.state_dict(keep_vars=True))
    with Teacher(model) as t:
        t(images(3, 2).to('meta'))
        new = {k: v + 1 for k, v in model.state_dict().items()}
        model.load_state_dict(new, assign=assign)
    now = model.state_dict(keep_vars=True)
    assert all(now[k] is v for k, v in own.items())
    for k, v in nn.BatchNorm1d(2).state_dict().items():
        same(now[f'norm.{k}'], v + 1)


def test_a_teacher_elsewhere_stays_and_the_batch_goes_there():
    class Elsewhere(nn.Linear):
        "As accelerate lays out models that do not fit one device"

        hf_device_map = {'': 'disk'}

        def forward(self, x):
            assert x.device.type == 'cpu'
            return x * 2

    model = Elsewhere(2, 2)
    model.bias = None
    model.weight = nn.Parameter(model.weight.to('meta'))
    model.other = nn.Linear(1, 1)
    same(Teacher(model)(images(3, 2)).logits, images(3, 2) * 2)
    assert model.weight.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_teacher_moves_to_the_gpu_and_back(case):
    model, x = case
    was, want = state(model), eval_of(model, *x)
    with Teacher(model) as t:
        o = t(*[v.cuda() for v in x])
        assert o.logits.is_cuda and next(model.parameters()).is_cuda
        same(o.logits.cpu(), want, 1e-3)
    assert state(model) == was
    on_gpu = copy.deepcopy(model).cuda()
    o = Teacher(on_gpu)(*x)
    assert o.logits.device.type == 'cpu' and next(on_gpu.parameters()).is_cuda


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floats_come_in_the_teachers_precision_and_integers_stay(dtype):
    model = seeded(Table).to(dtype).eval()
    cats, conts = torch.tensor([[1], [2]]), images(2, 2)
    o = Teacher(model)(cats, conts)
    assert o.logits.dtype == dtype
    same(o.logits, eval_of(model, cats, conts.to(dtype)))


def test_tensor_subclasses_become_plain():
    class TensorImage(torch.Tensor):
        pass

    seen = []
    model = nn.Identity()
    model.register_forward_pre_hook(lambda m, x: seen.append(type(x[0])))
    o = Teacher(model)(images(2, 2).as_subclass(TensorImage))
    assert type(o.logits) is seen[0] is torch.Tensor


def test_nested_inputs_and_whatever_is_no_tensor():
    got = Teacher(lambda a, k, flag=None: a[0] + k['b'] if flag == 'yes' else None)(
        (torch.ones(1), 'x'), {'b': torch.ones(1)}, flag='yes'
    )
    assert got.logits == 2


def test_autocast_is_the_callers_affair():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert Teacher(nn.Linear(2, 2))(images(2, 2)).logits.dtype == torch.bfloat16


# images

OURS, THEIRS = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def norm(x, stats):
    return (x - torch.tensor(stats[0]).view(-1, 1, 1)) / torch.tensor(stats[1]).view(-1, 1, 1)


@pytest.mark.parametrize(
    'ours,theirs',
    [
        (OURS, THEIRS),
        (THEIRS, OURS),
        ((0.0, 1.0), THEIRS),
        (OURS, (0.5, 0.5)),
        ((0.0, 1.0), ([0.5], [0.25])),
    ],
)
def test_images_are_renormalised_exactly(ours, theirs):
    raw = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    three = lambda st: [
        (o * 3 if len(o) == 1 else o) if isinstance(o, (tuple, list)) else [o] * 3 for o in st
    ]
    model = seeded(small)
    t = Teacher(model, images=dict(stats=theirs, input_stats=ours))
    same(t(norm(raw, three(ours))).logits, eval_of(model, norm(raw, three(theirs))), 1e-6)
    assert 'mean ' in image_change(t) and '->' in image_change(t)
    seen = Teacher(nn.Identity(), images=dict(stats=theirs, input_stats=ours))(
        norm(raw, three(ours))
    ).logits
    same(seen, norm(raw, three(theirs)), 2e-6)  # of values up to 4


def test_equal_statistics_change_no_bit():
    model, x = seeded(small), images(4, 3, 8, 8)
    t = Teacher(
        model,
        images=dict(
            stats='imagenet',
            input_stats=(torch.tensor(THEIRS[0]).view(1, 3, 1, 1), np.array(THEIRS[1])),
        ),
    )
    same(t(x).logits, eval_of(model, x))
    assert image_change(t) == '' == image_change(Teacher(model))


def test_statistics_of_published_weights():
    raw = torch.rand(2, 3, 8, 8)
    model = seeded(small)
    want = eval_of(model, norm(raw, THEIRS))
    for stats in ('imagenet', torchvision.models.ResNet18_Weights.IMAGENET1K_V1, THEIRS):
        same(Teacher(model, images=dict(stats=stats, input_stats=(0, 1)))(raw).logits, want, 1e-6)


def test_timm_models_tell_their_statistics():
    raw = torch.rand(2, 3, 32, 32)
    model = seeded(
        lambda: timm.create_model(
            'vit_tiny_patch16_224', pretrained=False, num_classes=4, img_size=32, depth=1
        )
    )
    cfg = model.pretrained_cfg['mean'], model.pretrained_cfg['std']
    assert cfg == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    same(
        Teacher(model, images=dict(stats='auto', input_stats=OURS))(norm(raw, OURS)).logits,
        eval_of(model, norm(raw, cfg)),
        1e-5,
    )
    with refuses("ResNet does not store .* torchvision don't. Pass images="):
        Teacher(torchvision.models.resnet18(), images=dict(stats='auto'))


def test_half_precision_images_are_renormalised_in_full_precision():
    model, raw = nn.Identity(), torch.rand(2, 3, 8, 8)
    x = norm(raw, OURS).half()
    seen = Teacher(model, images=dict(stats=THEIRS, input_stats=OURS))(x).logits
    same(
        seen,
        norm(
            x.float() * torch.tensor(OURS[1]).view(-1, 1, 1) + torch.tensor(OURS[0]).view(-1, 1, 1),
            THEIRS,
        ),
        2e-6,
    )


def test_other_inputs_are_not_renormalised():
    t = Teacher(
        lambda x, n: x.mean((1, 2, 3)) + n.sum(1),
        images=dict(stats=(0.0, 0.5), input_stats=(0.0, 1.0)),
    )
    x, n = images(2, 3, 4, 4), images(2, 5)
    same(t(x, n).logits, 2 * x.mean((1, 2, 3)) + n.sum(1), 1e-6)
    same(
        Teacher(nn.Linear(5, 2), images=dict(stats=(0.0, 1.0)))(n).logits.shape, torch.Size([2, 2])
    )  # not an image, and nothing to do


@pytest.mark.parametrize(
    'kw,x,match',
    [
        (dict(stats='imagenet'), (1, 3, 4, 4), r'give images=dict\(input_stats=\(mean, std\)\)'),
        (
            dict(stats='imagenet', input_stats=(0, 1)),
            (1, 1, 4, 4),
            'has 3 channels, the images have shape .1, 1, 4, 4.',
        ),
        (dict(stats='imagenet', input_stats=(0, 1)), (1, 5), 'is for images, float tensors'),
        (
            dict(stats='imagenet', input_stats=((0, 0), (1, 1))),
            (1, 3, 4, 4),
            'input_stats have 2 channels, stats 3',
        ),
        (dict(stats='auto'), None, 'Identity does not store the normalization of its images'),
        (dict(stats='cifar'), None, "stats='cifar': must be .mean, std., 'imagenet'"),
        (dict(stats=3.0), None, 'stats=3.0: must be'),
        (dict(stats=([0, 0], [1])), None, 'one mean, and one std above 0'),
        (dict(stats=(0, 0)), None, 'one mean, and one std above 0'),
        (dict(stats=(float('nan'), 1)), None, 'one mean, and one std above 0'),
        (dict(input_stats=(0, 0)), None, '^input_stats=.0, 0.: give one mean'),
        (dict(input_stats='auto'), None, "^input_stats='auto': must be .mean, std., 'imagenet', t"),
        (dict(size=0), None, 'size=0: must be the height and width of the images of the teacher'),
        (dict(size=(32, None)), None, r'size=\(32, None\): must be the height and width'),
        (dict(size=[4, 4, 4]), None, r'size=\[4, 4, 4\]: must be the height and width'),
        (dict(size='32'), None, "size='32': must be the height and width"),
        (dict(size=1.5), None, 'size=1.5: must be the height and width'),
    ],
)
def test_a_normalization_or_size_that_cannot_be_meant(kw, x, match):
    with refuses(match):
        Teacher(nn.Identity(), images=kw)(torch.zeros(x))


def test_images_are_resized_for_the_teacher():
    x, n = images(2, 3, 8, 8), images(2, 5)
    for size, want in ((4, (4, 4)), (np.int64(4), (4, 4)), ((6, 12), (6, 12))):
        o = Teacher(nn.Flatten(), images=dict(size=size))(x)
        same(
            o.logits,
            F.interpolate(x, want, mode='bilinear', antialias=True, align_corners=False).flatten(1),
        )
    same(Teacher(nn.Identity(), images=dict(size=8))(x).logits, x)
    same(Teacher(nn.Identity(), images=dict(size=4))(n).logits, n)
    assert Teacher(seeded(small).half(), images=dict(size=4))(x).logits.dtype == torch.float16


def test_logits_of_the_pixels_of_a_resized_image_are_resized_to_the_batchs_pixels():
    x = images(2, 3, 8, 8)
    small = F.interpolate(x, (4, 4), mode='bilinear', antialias=True)
    logits = Teacher(nn.Identity(), images=dict(size=4))(x).logits
    assert logits.shape == x.shape
    same(logits, F.interpolate(small, (8, 8), mode='bilinear', antialias=True))
    same(Teacher(nn.AvgPool2d(2), images=dict(size=4))(x).logits, F.avg_pool2d(small, 2))


# the forms


def script(make):
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*torch.jit')
        return make()


def scripted(model):
    return script(lambda: torch.jit.script(model))


def traced(model, x):
    return script(lambda: torch.jit.trace(model, x))


def test_torchscript_object_and_file(tmp_path):
    model, x = trained(seeded(small), images(4, 3, 8, 8)), images(4, 3, 8, 8)
    want = eval_of(model, x)
    s = scripted(model)
    was = state(s)
    assert s.training
    same(Teacher(s)(x).logits, want, 1e-6)
    with Teacher(s, run=dict(mode='train')) as t:
        t(x)
    script(lambda: s.save(tmp_path / 's.pt'))
    script(lambda: traced(copy.deepcopy(model).eval(), x).save(tmp_path / 'traced.ts'))
    for path in ('s.pt', 'traced.ts'):
        same(Teacher(tmp_path / path)(x).logits, want, 1e-6)
        same(Teacher(str(tmp_path / path))(x).logits, want, 1e-6)
    frozen = script(lambda: torch.jit.freeze(scripted(copy.deepcopy(model).eval())))
    same(Teacher(frozen)(x).logits, want, 1e-5)
    with Teacher(s) as t:
        assert t(x.to('meta')).logits.device.type == 'meta'
    strip = lambda st: (
        [(n, *r[2:]) for n, _, *r in st[0]],
        st[1],
        st[2],
    )  # a script makes new Python objects each time
    assert strip(state(s)) == strip(was)
    n = sum(p.numel() for p in model.parameters())
    assert numbers_of_parameters(model, Teacher(s)) == (n, n)


def test_exported_program_and_file(tmp_path):
    model, x = seeded(small).eval(), images(4, 3, 8, 8)
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim('b', min=2, max=64)},)
    )
    torch.export.save(program, tmp_path / 'm.pt2')
    for form in (program, program.module(), tmp_path / 'm.pt2'):
        t = Teacher(form)
        was = state(t.module)
        for n in (4, 3):
            same(t(x[:n]).logits, eval_of(model, x[:n]), 1e-6)
        assert state(t.module) == was
        with refuses(
            r"Layers 0 of .* can't be read, only the layers that it returns \(none\). Give the nn.Module"
        ):
            Teacher(t, layers=['0'])


def test_a_program_exported_in_train_mode_is_told():
    for model in (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.5)),
    ):
        x = images(2, 3, 8, 8)
        program = torch.export.export(model.train(), (x,))
        with pytest.warns(
            DistillWarning, match='was exported from a model in train mode.*Export model.eval'
        ):
            t = Teacher(program)
        was = state(t.module)
        t(x)
        assert state(t.module) == was


def onnx_file(path, w, batch='n', inputs=('x',), dtype=TensorProto.FLOAT, outputs=('y',)):
    "y = sum of inputs times w"
    shape, out = [batch, w.shape[0]], [batch, w.shape[1]]
    nodes = [helper.make_node('Add' if len(inputs) > 1 else 'Identity', list(inputs), ['all'])]
    nodes += [helper.make_node('MatMul', ['all', 'w'], [outputs[0]])]
    nodes += [helper.make_node('Neg', [outputs[0]], [o]) for o in outputs[1:]]
    graph = helper.make_graph(
        nodes,
        'g',
        [helper.make_tensor_value_info(n, dtype, shape) for n in inputs],
        [helper.make_tensor_value_info(o, dtype, out) for o in outputs],
        [numpy_helper.from_array(w.numpy().astype(helper.tensor_dtype_to_np_dtype(dtype)), 'w')],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8), path
    )
    return path


W = images(3, 4, seed=5)


def test_onnx_files_as_teachers_of_heads(tmp_path):
    "A file with one output is the teacher of any head, otherwise the names of the outputs count"
    one = onnx_file(tmp_path / 'one.onnx', W)
    two = onnx_file(tmp_path / 'two.onnx', W, outputs=('b', 'a'))
    for teachers, signs in (dict(a=one, b=two), (1, 1)), (dict(a=two, b=one), (-1, 1)):
        x = images(5, 3)
        heads = Distiller(None, teachers, kd(), check=False)
        got = heads.teacher_outputs(x)
        for k, sign in zip(teachers, signs):
            same(got[k].logits, sign * (x @ W), 1e-6)


def test_onnx_file(tmp_path):
    x = images(5, 3).requires_grad_()
    t = Teacher(onnx_file(tmp_path / 'm.onnx', W))
    for n in (5, 1):
        same(t(x[:n]).logits, x[:n].detach() @ W, 1e-6)
    for v in (x.double(), x.bfloat16()):
        same(t(v).logits, v.detach().float() @ W, 1e-6)
    assert modules_of(t) == [] and not t(x).logits.requires_grad and repr(t) == 'Teacher(m.onnx)'
    with refuses(r"Layers 0 of m.onnx can't be read, only the layers that it returns \(none\)"):
        Teacher(t, layers=['0'])
    with t:
        same(t(x).logits, x.detach() @ W, 1e-6)


def test_weights_that_an_onnx_file_keeps_in_a_second_file_belong_to_the_teachers_identity(tmp_path):
    from fastdistill.cache.teacher_description import identity_of

    path, location = tmp_path / 'm.onnx', 'x' * 200 + '.bin'

    def saved(w):
        network = onnx.load(onnx_file(tmp_path / 'whole.onnx', w))
        (tmp_path / location).unlink(missing_ok=True)
        onnx.save_model(
            network, path, save_as_external_data=True, location=location, size_threshold=0
        )
        return identity_of(Teacher(path)), path.read_bytes()

    first, again, other = saved(W), saved(W), saved(W + 1)
    assert first == again
    assert first[1] == other[1]  # the network itself is the same
    assert first[0] != other[0]


def test_each_member_of_an_ensemble_and_each_weight_belongs_to_its_identity(tmp_path):
    "Also members without modules, and ensembles within ensembles"
    a, b, c = [seeded(lambda: nn.Linear(3, 4), i) for i in range(3)]
    files = [onnx_file(tmp_path / f'{i}.onnx', W + i) for i in range(3)]
    weighted = lambda w: Teacher([Teacher([a, b], ensemble=dict(weights=w)), c])
    different = [
        *([a, f] for f in files),
        *([files[0], f] for f in files[1:]),
        weighted([0.9, 0.1]),
        weighted([0.1, 0.9]),
        Teacher([a, b], ensemble=dict(weights=[0.9, 0.1])),
        Teacher([b, a], ensemble=dict(weights=[0.9, 0.1])),
        Teacher([b, a], ensemble=dict(weights=[0.1, 0.9])),
    ]
    data = TensorDataset(images(4, 3))
    write = lambda i, o: cache_dataset(Teacher(o), data, tmp_path / f'c{i}').manifest.teacher
    known = [write(i, o)['weights'] for i, o in enumerate(different)]
    assert len({*known}) == len(known)
    assert [write(i, o)['weights'] for i, o in enumerate(different)] == known


def test_onnx_inputs_by_order_and_by_name(tmp_path):
    a, b = images(2, 3), images(2, 3, seed=2)
    t = Teacher(
        onnx_file(tmp_path / 'm.onnx', W, inputs=('ids', 'mask'), outputs=('other', 'logits'))
    )
    want = -(a + b) @ W  # the output called logits, though it is the second
    for o in (
        t(a, b),
        t(mask=b, ids=a),
        t({'mask': b, 'ids': a}),
        t(a, mask=b),
        t(BatchEncoding({'ids': a, 'mask': b, 'labels': a})),
    ):
        same(o.logits, want, 1e-6)
    for bad in ((a,), (a, b, a)):
        with refuses(
            r'takes ids \(float: n x 3\), mask \(float: n x 3\). It got \d by position, none by name'
        ):
            t(*bad)
    with refuses('It got 1 by position, wrong by name'):
        t(a, wrong=b)


@pytest.mark.parametrize('batch', [1, 2, 4, 9])
def test_onnx_file_with_a_fixed_batch_size(tmp_path, batch):
    x = images(5, 3)
    t = Teacher(onnx_file(tmp_path / 'm.onnx', W, batch=batch))
    for n in (5, 4, 1):
        same(t(x[:n]).logits, x[:n] @ W, 1e-6)


def test_onnx_refuses_what_does_not_fit(tmp_path):
    t = Teacher(onnx_file(tmp_path / 'm.onnx', W))
    with refuses(r'takes x \(float: n x 3\). For x it got torch.float32 of shape \(2, 7\).$'):
        t(images(2, 7))
    with refuses(r'of shape \(2, 3, 1\)'):
        t(images(2, 3, 1))
    t = Teacher(onnx_file(tmp_path / 'i.onnx', W.round(), dtype=TensorProto.INT64))
    same(
        t(torch.ones(2, 3, dtype=torch.int32)).logits,
        torch.ones(2, 3, dtype=torch.int64) @ W.round().long(),
    )
    with refuses('int64: n x 3.*it got torch.float32'):
        t(images(2, 3))
    (tmp_path / 'bad.onnx').write_bytes(b'no network')
    with refuses("onnxruntime can't load .*bad.onnx"):
        Teacher(tmp_path / 'bad.onnx')


def test_onnx_images_are_renormalised_and_resized(tmp_path):
    info = lambda n, s: helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
    pool = helper.make_node('GlobalAveragePool', ['x'], ['y'])
    graph = helper.make_graph([pool], 'g', [info('x', ['n', 3, 4, 4])], [info('y', ['n', 3, 1, 1])])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8),
        tmp_path / 'm.onnx',
    )
    x = images(2, 3, 8, 8)
    want = norm(F.interpolate(x, (4, 4), mode='bilinear', antialias=True), THEIRS).mean(
        (2, 3), keepdim=True
    )
    with refuses(r'images=dict\(size=...\)\) resizes them'):
        Teacher(tmp_path / 'm.onnx')(x)
    same(
        Teacher(tmp_path / 'm.onnx', images=dict(stats='imagenet', input_stats=(0, 1), size=4))(
            x
        ).logits,
        want,
        1e-5,
    )


def test_onnx_needs_onnxruntime(tmp_path, monkeypatch):
    onnx_file(tmp_path / 'm.onnx', W)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r"pip install 'fastdistill\[onnx\]'"):
        Teacher(tmp_path / 'm.onnx')


def test_files_pickle_and_copy_by_their_path(tmp_path, monkeypatch):
    model, x = seeded(small).eval(), images(4, 3, 8, 8)
    script(lambda: scripted(model).save(tmp_path / 'm.pt'))
    torch.export.save(torch.export.export(model, (x,)), tmp_path / 'm.pt2')
    monkeypatch.chdir(tmp_path)
    teachers = [Teacher('m.pt'), Teacher('m.pt2'), Teacher(['m.pt', 'm.pt2'])]
    monkeypatch.chdir('/')
    for t in (*teachers, Teacher(onnx_file(tmp_path / 'm.onnx', W), name='mine')):
        v = images(2, 3) if t.name == 'mine' else x
        want = t(v).logits
        with t:
            copies = copy.deepcopy(t), pickle.loads(pickle.dumps(t)), copy.copy(t)
        for c in copies:
            assert not c.runner.started and c.name == t.name
            same(c(v).logits, want)


def test_modules_pickle_and_copy_with_the_teacher():
    model, x = seeded(small), images(4, 3, 8, 8)
    t = Teacher(
        model,
        layers=['0'],
        images=dict(stats='imagenet', input_stats=(0, 1)),
        ensemble=dict(weights=None),
    )
    for c in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        same(c(x).logits, t(x).logits)
        assert c.model is not model and c.layers == ['0']
    c.layers.append('1')
    assert t.layers == ['0']


# Hugging Face


def test_hugging_face_by_position_name_and_mapping():
    model = seeded(bert).train()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ids = IDS * mask
    types = torch.tensor([[0] * 3 + [1] * 4] * 2)
    want = eval_of(model, ids, attention_mask=mask, token_type_ids=types)
    t = Teacher(model)
    batch = dict(input_ids=ids, attention_mask=mask, token_type_ids=types)
    for o in (
        t(ids, attention_mask=mask, token_type_ids=types),
        t(ids, mask, types),
        t(**batch),
        t(batch),
    ):
        same(o.logits, want)
    for o in (t(OrderedDict(batch)), t(BatchEncoding(batch))):
        same(o.logits, want)
    same(t({**batch, 'labels': torch.tensor([0, 1])}).logits, want)


def test_hugging_face_second_argument_must_be_what_it_says():
    "A tokenizer's values in its order are ids, token types, mask"
    t = Teacher(seeded(bert))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    for types in (torch.zeros_like(IDS), torch.tensor([[0] * 3 + [1] * 4] * 2)):
        with refuses(
            'second positional argument of BertForSequenceClassification is attention_mask.*by name'
        ):
            t(IDS, types)
    with refuses('by name'):
        t(IDS, torch.zeros(2))
    with refuses('second positional argument of GPT2LMHeadModel is (past_key_values|cache),'):
        Teacher(seeded(gpt2))(IDS, mask)
    t(IDS, None)
    t(IDS * mask, mask)


def test_hugging_face_without_a_head_says_what_is_missing():
    model = BertModel(bert().config)
    with refuses('keys last_hidden_state, pooler_output, without logits'):
        Teacher(model)(IDS)
    o = Teacher(lambda ids: Outputs(model(ids).pooler_output))(IDS)
    assert o.logits.shape == (2, 8)


def test_a_mapping_is_one_argument_where_the_model_has_no_such_names():
    class Net(nn.Module):
        def forward(self, batch):
            return batch['image']

    class Named(nn.Module):
        def forward(self, image, scale=1):
            return image * scale

    x = images(2, 3)
    same(Teacher(Net())({'image': x}).logits, x)
    same(Teacher(Named())({'image': x, 'scale': 2}).logits, x * 2)


# callables


def test_any_callable():
    x = images(2, 3)
    same(Teacher(torch.sin)(x).logits, x.sin())
    same(Teacher(lambda x, k=1: (x * k, 'more'))(x, k=3).logits, x * 3)
    o = Teacher(lambda x: Outputs(x, {'deep': x * 2}, x[:, 0] > 0))(x)
    same(o.feats['deep'], x * 2)
    same(o.mask, x[:, 0] > 0)
    with refuses('returned a Sequential, without logits'):
        Teacher(lambda x: small())(x)
    with refuses('returned None instead of its outputs: is a `return` missing'):
        Teacher(lambda x: None)(x)


def test_a_function_may_bring_features_along():
    x = images(2, 3)
    t = Teacher(lambda x: Outputs(x, {'deep': x * 2, 'deeper': x * 3}), layers=['deep'])
    assert list(t(x).feats) == ['deep', 'deeper']
    t.layers = ['deep', 'deepest']
    with refuses(
        r"Layers deep, deepest of <lambda> can't be read, only the layers that it returns \(deep, deeper\)"
    ):
        t(x)
    with refuses(r"Layers 0 of sin can't be read, only the layers that it returns \(none\)"):
        Teacher(torch.sin, layers=['0'])(x)
    o = Teacher([t.model, torch.sin], layers=['0.deep'])(x)
    same(o.feats['0.deep'], x * 2)


def test_a_method_of_a_module_is_that_module():
    class Net(nn.Sequential):
        def logits(self, x):
            return self(x) * 2

    model, x = Net(*seeded(small)), images(4, 3, 8, 8)
    was = state(model)
    t = Teacher(model.logits, layers=['0'])
    o = t(x)
    same(o.logits, eval_of(model, x) * 2)
    assert state(model) == was and modules_of(t) == [model] and o.feats['0'].shape == (4, 4, 6, 6)


# layers


def test_layers_are_read_with_the_answer(case):
    model, x = case
    name = [n for n, _ in model.named_modules()][-1]
    t = Teacher(model, layers=[name])
    was = state(model)
    o = t(*x)
    same(o.logits, Teacher(model)(*x).logits)
    (f,) = o.feats.values()
    assert (
        list(o.feats) == [name]
        and not f.requires_grad
        and type(f) is torch.Tensor
        and state(model) == was
    )


def test_layers_may_be_set_later_and_a_wrong_one_is_refused():
    model, x = seeded(small), images(4, 3, 8, 8)
    t = Teacher(model).start()
    t.layers = ['1', '0']
    assert list(t(x).feats) == ['1', '0']
    t.layers = ['nine']
    with refuses("No layer 'nine' in Sequential"):
        t(x)
    t.stop()
    assert not any(m._forward_hooks for m in model.modules())


def test_a_call_reads_the_layers_that_it_asks_for_beside_the_teachers_own():
    model, x = seeded(small), images(4, 3, 8, 8)
    t = Teacher(model, layers=['1'])
    for _ in range(2):
        assert (
            list(t.outputs((x,), layers=['0', '1']).feats) == ['1', '0']
            and list(t(x).feats) == ['1']
            and t.layers == ['1']
        )
        t.start()
    t.stop()
    with refuses("No layer 'nine' in Sequential"):
        t.outputs((x,), layers=['nine'])
    same(t.outputs(kwargs={'input': x}).logits, t(x).logits)
    pair = Teacher([t, model])
    assert list(pair.outputs((x,), layers=['1.0']).feats) == ['0.1', '1.0'] and list(
        pair(x).feats
    ) == ['0.1']


# ensembles


def softmax(v):
    m = max(v)
    e = [math.exp(o - m) for o in v]
    return [o / sum(e) for o in e]


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def fixed(rows):
    return lambda x: torch.tensor(rows, dtype=torch.float64)


A, B = [[1.0, 2.0, -3.0], [0.5, 0.1, 0.0]], [[0.0, -2.0, 4.0], [1.0, 1.0, -1.0]]


@pytest.mark.parametrize('weights', [None, [1, 3], [0.2, 0.8], [1, 0]])
def test_ensemble_closed_forms(weights):
    w = [0.5, 0.5] if weights is None else [o / sum(weights) for o in weights]
    x, both = torch.zeros(2, 1), [fixed(A), fixed(B)]
    pairs = [[(a, b) for a, b in zip(r, q)] for r, q in zip(A, B)]
    mean = [[w[0] * a + w[1] * b for a, b in r] for r in pairs]
    probs = [[w[0] * a + w[1] * b for a, b in zip(softmax(r), softmax(q))] for r, q in zip(A, B)]
    odds = [[w[0] * sigmoid(a) + w[1] * sigmoid(b) for a, b in r] for r in pairs]
    logit = [[math.log(p / (1 - p)) for p in r] for r in odds]
    for combine, kind, want in (
        ('probs', 'softmax', [[math.log(p) for p in r] for r in probs]),
        ('probs', 'sigmoid', logit),
        ('probs', 'regression', mean),
        *[('logits', k, mean) for k in ('softmax', 'sigmoid', 'regression')],
    ):
        same(
            Teacher(both, ensemble=dict(combine=combine, weights=weights), kind=kind)(x).logits,
            torch.tensor(want, dtype=torch.float64),
            1e-12,
        )


def test_ensemble_along_another_axis():
    a, b = images(2, 5, 4), images(2, 5, 4, seed=2)
    got = Teacher([lambda x: a, lambda x: b], axis=-1)(a).logits
    same(got.softmax(-1), (a.softmax(-1) + b.softmax(-1)) / 2, 1e-6)


def test_ensemble_of_extreme_and_half_precision_answers():
    big = torch.tensor([[1e4, -1e4, 0.0]])
    for kind in ('softmax', 'sigmoid', 'regression'):
        o = Teacher([lambda x: big, lambda x: -big.half()], kind=kind)(big).logits
        assert o.isfinite().all() and o.dtype == torch.float32
    hidden = torch.tensor([[1.0, -torch.inf]])
    assert Teacher([lambda x: hidden, lambda x: hidden])(big).logits.tolist() == [[0.0, -math.inf]]


def test_ensemble_of_every_form(tmp_path):
    model, x = seeded(lambda: nn.Linear(3, 4)), images(2, 3)
    with torch.no_grad():
        model.weight.copy_(W.T)
        model.bias.zero_()
    forms = [
        model,
        scripted(model),
        onnx_file(tmp_path / 'm.onnx', W),
        lambda x: x @ W,
        Teacher(model),
        [model, model],
    ]
    same(Teacher(forms)(x).logits, (x @ W).log_softmax(1), 1e-5)
    same(Teacher(nn.ModuleList([model, model]))(x).logits, (x @ W).log_softmax(1), 1e-5)
    assert repr(Teacher(forms)) == 'Teacher(6 teachers)'


def test_members_keep_what_they_say_and_take_over_the_rest():
    x = images(2, 3, 8, 8)
    mine = Teacher(nn.Identity(), images=dict(stats=(0.0, 0.5)))
    t = Teacher(
        [mine, nn.Identity()],
        images=dict(stats=(0.0, 0.25), input_stats=(0.0, 1.0)),
        kind='regression',
    )
    same(t(x).logits, (x * 2 + x * 4) / 2, 1e-6)
    assert image_change(t) == 'mean 0, std 1 -> mean 0, std 0.5; mean 0, std 1 -> mean 0, std 0.25'
    assert mine.input_stats is None
    again = Teacher(t, images=dict(input_stats=(0.0, 0.5)))
    same(again(x).logits, (x + x * 2) / 2, 1e-6)


def test_layers_of_an_ensemble_have_their_members_number():
    a, b = seeded(small), seeded(small, 1)
    x = images(4, 3, 8, 8)
    t = Teacher(
        [Teacher(a, layers=['1']), b, torch.nn.Sequential(b)], layers=['1.0', '2.0.0', '0.6']
    )
    o = t(x)
    assert list(o.feats) == ['0.1', '0.6', '1.0', '2.0.0']
    same(o.feats['1.0'], b[0](x).detach())
    assert set(o.feats) <= set(t.named_modules())
    for bad in ('3.0', 'layer'):
        with refuses(
            f"No layer '{bad}' in an ensemble of 2: a layer of its first member is called '0.NAME'"
        ):
            Teacher([a, b], layers=[bad])


@pytest.mark.parametrize(
    'kw,match',
    [
        (dict(ensemble=dict(weights=[1])), r'weights=\[1\] for 2 teachers'),
        (dict(ensemble=dict(weights=[1, -1])), 'none negative'),
        (dict(ensemble=dict(weights=[0, 0])), 'not all 0'),
        (dict(ensemble=dict(weights=[1, math.nan])), 'must be one number per teacher'),
        (dict(ensemble=dict(combine='mean')), "combine='mean': must be one of 'probs', 'logits'"),
        (dict(kind='softmin'), "kind='softmin': must be one of 'softmax', 'sigmoid', 'regression'"),
        (dict(run=dict(mode='test')), "mode='test': must be one of 'eval', 'train'"),
    ],
)
def test_wrong_options(kw, match):
    with refuses(match):
        Teacher([torch.sin, torch.cos], **kw)


def test_weights_of_one_teacher_are_refused():
    with refuses('weights= is for the members of an ensemble, but this is one teacher'):
        Teacher(torch.sin, ensemble=dict(weights=[1.0]))


def test_members_of_other_shapes_are_refused():
    t = Teacher([lambda x: x, lambda x: x[:, :2]])
    with refuses(
        r'Logits of member 1 of the ensemble have shape \(2, 2\), but logits of member 0 have shape \(2, 3\)'
    ):
        t(images(2, 3))


# variations, classes


def test_a_teacher_of_a_teacher_is_a_variation_on_it():
    model, x = seeded(small), images(4, 3, 8, 8)
    t = Teacher(model, layers=['0'], images=dict(stats='imagenet', input_stats=(0, 1)), name='mine')
    t.learner = 'kept'
    u = Teacher(t, layers=['1'], images=dict(size=4))
    assert (u.model, u.name, u.layers, u.size, u.learner, u.stats) == (
        model,
        'mine',
        ['1'],
        (4, 4),
        'kept',
        t.stats,
    )
    same(Teacher(t)(x).logits, t(x).logits)
    assert t.layers == ['0'] and t.size is None
    with t, u:
        u(x)
    assert model.training


def test_an_option_counts_where_it_was_given_even_if_it_equals_the_default():
    model = seeded(small)
    t = Teacher(
        [Teacher(model, run=dict(mode='eval'), images=dict(size=None)), model],
        run=dict(mode='train'),
        images=dict(size=4),
    )
    assert [(m.mode, m.size) for m in t.members] == [('eval', None), ('train', (4, 4))]
    nested = Teacher(
        [Teacher([Teacher(model, run=dict(mode='eval')), model]), model], run=dict(mode='train')
    )
    assert [m.mode for m in (*nested.members[0].members, nested.members[1])] == [
        'eval',
        'train',
        'train',
    ]
    assert [m.mode for m in Teacher(t, run=dict(mode='eval')).members] == [
        'eval',
        'eval',
    ] and t.members[1].mode == 'train'
    first = Teacher(
        model,
        select=[1],
        layers=['0'],
        images=dict(size=4, stats='imagenet', input_stats=(0, 1)),
        run=dict(mode='train'),
        name='mine',
    )
    plain = Teacher(
        first,
        select=None,
        layers=(),
        images=dict(size=None, stats=None, input_stats=None),
        run=dict(mode='eval'),
        name=None,
    )
    assert (plain.select, plain.layers, plain.size, plain.stats, plain.mode, plain.name) == (
        None,
        [],
        None,
        None,
        'eval',
        'Sequential',
    )
    assert (
        first.select == [1]
        and Teacher(first).layers == ['0']
        and Teacher(Teacher(first, select=None), images=dict(size=2)).select is None
    )
    assert Teacher(
        Teacher([model, model], ensemble=dict(weights=[1, 3])), ensemble=dict(weights=None)
    ).weights == [0.5, 0.5]


def test_the_options_can_be_read_where_they_are_recorded():
    assert {'layers', 'run', 'select'} <= set(inspect.signature(Teacher).parameters)
    assert "'train' for methods" in Teacher.__doc__
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        Teacher(torch.sin, temperature=2)


def test_classes_are_selected_in_the_students_order():
    x = images(2, 4, 3, 3)
    for t, axis in (
        (Teacher(nn.Identity(), select=[2, 0]), 1),
        (Teacher([nn.Identity()] * 2, axis=-1, kind='regression'), -1),
    ):
        t.select = torch.tensor([2, 0])
        same(t(x).logits, x.index_select(axis, torch.tensor([2, 0])))
    with refuses(r'select=\[4\]: the teacher has 4 classes along axis 1, 0 to 3'):
        Teacher(nn.Identity(), select=[4])(x)


# what is not a teacher


class Fastai:
    dls, model = None, None

    def __call__(self, event):
        pass


@pytest.mark.parametrize(
    'o,match',
    [
        (None, 'None is not a teacher. It must be an nn.Module'),
        ('resnet50', "There is no file 'resnet50'.*A model's name is not enough"),
        ('missing.onnx', "There is no file 'missing.onnx'"),
        (small().state_dict(), 'contains weights, but no network: build the model'),
        (nn.Linear, 'Linear is a class, not a model'),
        (3, 'An object of type int is not a teacher. It must be'),
        (torch.zeros(2), 'An object of type Tensor is not a teacher. It must be'),
        (torchvision.models.resnet18, 'resnet18 is a function that builds a model: call it'),
        (partial(timm.create_model, 'resnet18'), 'partial is a function that builds a model'),
        ([], 'An empty list of teachers. It must be an nn.Module'),
        (['resnet50'], "There is no file 'resnet50'"),
        (Fastai(), 'a fastai Learner: pass it to fastdistill.fastai'),
        (nn.Linear(2, 2, device='meta'), 'has no weights yet'),
    ],
)
def test_what_is_no_teacher(o, match):
    with refuses(match):
        Teacher(o)


def test_lazy_layers_that_never_ran_are_no_teacher():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        lazy = nn.LazyLinear(3)
    with refuses('LazyLinear is untrained: it has lazy layers that never ran'):
        Teacher(lazy)


def test_files_that_hold_no_network(tmp_path):
    torch.save(small().state_dict(), tmp_path / 'weights.pt')
    (tmp_path / 'text.pt').write_text('no')
    (tmp_path / 'learner.pkl').write_bytes(b'no')
    for f in ('weights.pt', 'text.pt', 'learner.pkl'):
        with refuses(r'contains no TorchScript.*\(a state_dict\), build the model'):
            Teacher(tmp_path / f)
    script(lambda: scripted(small()).save(tmp_path / 'cut.pt'))
    import zipfile

    with (
        zipfile.ZipFile(tmp_path / 'cut.pt') as z,
        zipfile.ZipFile(tmp_path / 'bad.pt', 'w') as out,
    ):
        out.writestr('bad/constants.pkl', z.read('cut/constants.pkl')[:3])
    with refuses('bad.pt could not be loaded'):
        Teacher(tmp_path / 'bad.pt')


def test_programs_of_pytorch_are_warned_of_as_pickles_and_onnx_files_are_not(tmp_path):
    model, x = seeded(small).eval(), images(4, 3, 8, 8)
    script(lambda: scripted(model).save(tmp_path / 'm.pt'))
    torch.export.save(torch.export.export(model, (x,)), tmp_path / 'm.pt2')
    for name in ('m.pt', 'm.pt2'):
        with pytest.warns(
            DistillWarning, match=f'{name} contains pickles, and loading it runs the code in it'
        ):
            Teacher(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Teacher(onnx_file(tmp_path / 'm.onnx', W))


def test_onnx_threads_are_torchs(tmp_path):
    o = Onnx(onnx_file(tmp_path / 'm.onnx', W))
    assert o.session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    assert o.session.get_providers()[-1] == 'CPUExecutionProvider'


# several outputs


class Heads(nn.Module):
    "Several heads on one body; `give` makes of their outputs what the model returns"

    def __init__(self, give=lambda a, b: (a, b)):
        super().__init__()
        self.a, self.b, self.give = nn.Linear(3, 4), nn.Linear(3, 4), give

    def forward(self, x):
        return self.give(self.a(x), self.b(x))


Pair = namedtuple('Pair', 'main aux')


@pytest.mark.parametrize(
    'give,output',
    [
        (lambda a, b: (a, b), 1),
        (lambda a, b: [a, b], -1),
        (lambda a, b: dict(main=a, aux=b), 'aux'),
        (lambda a, b: dict(main=a, aux=b), 1),
        (lambda a, b: dict(logits=a, aux=b), 'aux'),
        (Pair, 'aux'),
        (Pair, 1),
        (lambda a, b: SimpleNamespace(main=a, aux=b), 'aux'),
        (lambda a, b: (a, dict(deep=b)), lambda o: o[1]['deep']),
        (lambda a, b: dict(main=a, more=(b, a)), 'more'),
        (lambda a, b: dict(main=a, more=dict(out=b)), 'more'),
    ],
)
def test_the_output_that_is_distilled_can_be_named(give, output):
    model, x = seeded(lambda: Heads(give)), images(2, 3)
    same(Teacher(model, output=output)(x).logits, model.b(x).detach())
    same(Teacher([model, model], output=output, kind='regression')(x).logits, model.b(x).detach())
    same(Teacher(Teacher(model, output=output, layers=['a']))(x).feats['a'], model.a(x).detach())


def test_the_first_of_several_outputs_is_taken_and_said_once():
    x = images(2, 3)
    t = Teacher(Heads())
    with pytest.warns(
        DistillWarning,
        match=r'The teacher Heads returns several tensors that could be distilled: 0 \(2, 4\), 1 \(2, 4\)\. '
        'The first is used. Select one with output=.*output=0 confirms',
    ):
        o = t(x)
    same(o.logits, t.model.a(x).detach())
    t(x), t.probe(x), Teacher(t, layers=['a'])(x)  # no more
    Teacher(Heads(), output=0)(x)
    for give in (
        lambda a, b: (a, b[0]),
        lambda a, b: (a, b > 0),
        lambda a, b: dict(out=a, aux=b),
        lambda a, b: (a, [b, b]),
        namedtuple('Named', 'logits aux'),
    ):
        Teacher(Heads(give))(x)


def test_an_output_that_is_not_there_is_refused():
    x = images(2, 3)
    for give, output, says in (
        (
            lambda a, b: (a, b),
            2,
            r'output=2, but the model returned a tuple with 0 \(2, 4\), 1 \(2, 4\)\. Pass the name',
        ),
        (lambda a, b: (a, b), -3, 'output=-3, but'),
        (
            lambda a, b: dict(main=a, aux=[b]),
            'items',
            r"a dict with 0 \(2, 4\), 1 list, 'main' \(2, 4\), 'aux' list",
        ),
        (lambda a, b: a, 'aux', "output='aux', but the model returned one tensor"),
    ):
        with refuses(says):
            Teacher(Heads(give), output=output)(x)
    same(Teacher(nn.Identity(), output=0)(x).logits, x)
    with refuses('without logits. .* Name a different output with output='):
        Teacher(Heads(lambda a, b: dict(main=a, aux=b)))(x)
    with refuses(r'output=1.5: must be the name or the index of an output, or a function'):
        Teacher(Heads(), output=1.5)


def test_onnx_outputs_can_be_named(tmp_path):
    x = images(5, 3)
    path = onnx_file(tmp_path / 'm.onnx', W, batch=2, outputs=('a', 'b'))
    for output in ('b', 1, lambda o: o['b']):
        t = Teacher(path, output=output)
        same(t(x).logits, -x @ W, 1e-6)
        same(copy.deepcopy(t)(x).logits, -x @ W, 1e-6)
    with pytest.warns(
        DistillWarning,
        match='The teacher m.onnx returns several tensors that could be distilled: a, b. The first',
    ):
        t = Teacher(path)
    same(Teacher(t, layers=())(x).logits, x @ W, 1e-6)
    with refuses("output='c': the outputs of this ONNX network are a, b"):
        Teacher(path, output='c')


# probabilities


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    'kind,forward', [('softmax', lambda v: v.softmax(1)), ('sigmoid', torch.sigmoid)]
)
def test_probabilities_become_the_logits_that_give_them_again(kind, forward, dtype):
    p = forward(
        torch.randn(6, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    ).to(dtype)
    out = Teacher(lambda x: p, outputs='probs', kind=kind)(p).logits
    assert out.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(
        forward(out), p.to(out.dtype), atol=2e-3 if dtype is torch.float16 else 1e-6, rtol=1e-3
    )


def test_probabilities_of_0_and_1_become_finite_logits():
    p = torch.tensor([[0.0, 1.0]])
    assert Teacher(lambda x: p, outputs='probs')(p).logits.tolist() == [
        [pytest.approx(math.log(1e-7)), 0]
    ]
    far = -math.log(1e-7)
    assert Teacher(lambda x: p, outputs='probs', kind='sigmoid')(p).logits.tolist() == [
        [pytest.approx(-far), pytest.approx(far)]
    ]


def test_an_ensemble_of_probabilities_and_logits_is_the_mean_of_the_probabilities():
    x, g = torch.zeros(5, 4), torch.Generator().manual_seed(1)
    p, q = [torch.randn(5, 4, generator=g).softmax(1) for _ in range(2)]
    for t in (
        Teacher([Teacher(lambda x: p, outputs='probs'), Teacher(lambda x: q.log() + 3)]),
        Teacher([lambda x: p, Teacher(lambda x: q.log() + 3, outputs='logits')], outputs='probs'),
    ):
        torch.testing.assert_close(t(x).logits.softmax(1), (p + q) / 2)


def test_values_that_are_no_probabilities_are_refused():
    x = torch.zeros(2, 3)
    ask = lambda v, **kw: Teacher(lambda x: torch.tensor(v), outputs='probs', **kw)(x)
    with pytest.raises(
        DistillError,
        match="outputs='probs', but the outputs of <lambda> go from -1 to 2: use outputs='logits'",
    ):
        ask([[-1.0, 2.0]])
    with pytest.raises(DistillError, match=r"sum to .*1.5 along axis 1, not to 1.*kind='sigmoid'"):
        ask([[0.75, 0.75]])
    ask([[0.75, 0.75]], kind='sigmoid')
    with pytest.raises(DistillError, match='this teacher predicts numbers'):
        ask([[0.75, 0.75]], kind='regression')
    with pytest.raises(DistillError, match="outputs='odds': must be one of 'logits', 'probs'"):
        Teacher(nn.Linear(3, 2), outputs='odds')


def test_options_in_a_group_are_kept_by_a_variation_unless_given():
    t = Teacher(nn.Identity(), images=dict(size=4, input_stats=(0.0, 1.0)), run=dict(batch=2))
    again = Teacher(t, images=dict(size=8), run=dict(mode='train'))
    assert again.size == (8, 8)
    assert again.input_stats is not None
    assert again.run == dict(batch=2)
    assert again.mode == 'train'
    assert t.mode == 'eval'


@pytest.mark.parametrize(
    'group,given,allowed',
    [
        ('images', dict(sizes=4), "'stats', 'input_stats', 'size'"),
        ('ensemble', dict(weight=[1]), "'combine', 'weights'"),
        ('images', 224, "'stats', 'input_stats', 'size'"),
        ('run', dict(modus='train'), "'precision', 'memory_format'"),
    ],
)
def test_a_group_refuses_other_keys_and_says_which_it_has(group, given, allowed):
    with pytest.raises(DistillError) as e:
        Teacher(nn.Identity(), **{group: given})
    assert str(e.value).startswith(f'{group}={given!r}: must be a dict with any of {allowed}')
