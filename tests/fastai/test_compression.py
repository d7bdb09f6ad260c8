"Distillation beside pruning and quantization: masks, layers that become smaller, fake quantization, and what is exported."

from copy import deepcopy
import numpy as np
import pytest, torch
from torch import nn
from torch.nn.utils import prune
from apps import FASTAI_WARNINGS, pair, quiet, same, snapshot
from fastai.basics import Learner, accuracy
from fastdistill.fastai import (
    DistillError,
    KnowledgeDistillation,
    compare,
    export_student,
    kd,
    recipes,
)

pytestmark = pytest.mark.filterwarnings(
    *FASTAI_WARNINGS,
    'ignore:.*:DeprecationWarning',
    'ignore:.*:FutureWarning',
    'ignore:.*:UserWarning:torch.*',
)


def plain_pair():
    student, teacher = pair('image')
    return student, teacher, student.dls.valid.one_batch()[0].as_subclass(torch.Tensor)


def another(student, model):
    return quiet(Learner(student.dls, model, loss_func=student.loss_func, metrics=accuracy))[0]


def smaller(model):
    "The body's first convolution with half of its channels, those with the largest weights, as structured pruning makes it"
    model = deepcopy(model)
    (a, bn, _), (b, *_) = model[0][0], model[0][1]
    keep = (
        a.weight.abs().sum((1, 2, 3)).argsort(descending=True)[: a.out_channels // 2].sort().values
    )
    a.out_channels, b.in_channels, bn.num_features = len(keep), len(keep), len(keep)
    a.weight, b.weight = (
        nn.Parameter(a.weight[keep].detach()),
        nn.Parameter(b.weight[:, keep].detach()),
    )
    bn.weight, bn.bias = [nn.Parameter(o[keep].detach()) for o in (bn.weight, bn.bias)]
    bn.running_mean, bn.running_var = bn.running_mean[keep], bn.running_var[keep]
    return model


def masked(model, amount=0.5):
    model = deepcopy(model)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for m in convs:
        prune.l1_unstructured(m, 'weight', amount)
    return model, convs


def test_pruned_weights_stay_zero_while_the_unpruned_model_teaches():
    student, teacher, _ = plain_pair()
    model, convs = masked(teacher.model)
    was, zeros = snapshot(teacher.model), [m.weight == 0 for m in convs]
    learn = another(student, model)
    learn.distill(teacher, 2, 1e-2, kd() + recipes.hint())
    for m in convs:
        prune.remove(m, 'weight')
    assert all(
        z.any() and not z.all() and torch.equal(m.weight == 0, z) for m, z in zip(convs, zeros)
    )
    assert same(was, snapshot(teacher.model))


@pytest.mark.filterwarnings('ignore:The tensor attributes')  # of PyTorch, about the masked weights
def test_a_masked_student_is_exported_as_its_masked_weights_predict(tmp_path):
    student, teacher, x = plain_pair()
    model, convs = masked(teacher.model)
    learn = another(student, model)
    learn.distill(teacher, 1, 1e-2)
    file = export_student(learn, tmp_path / 'masked.pt2')
    for m in convs:
        prune.remove(m, 'weight')
    assert torch.allclose(
        torch.export.load(file.path).module()(x), learn.model.eval()(x), atol=1e-5
    )


def test_the_same_callback_goes_on_after_layers_were_pruned():
    student, teacher, _ = plain_pair()
    callback = KnowledgeDistillation(teacher, kd() + recipes.hint())
    student.fit(1, 1e-2, cbs=callback)
    before = [tuple(p.shape) for p in callback.distiller.own_parameters()]
    student.model = smaller(student.model)
    student.create_opt()
    start = deepcopy(student.model.state_dict())
    student.fit(1, 1e-2, cbs=callback)
    after = [tuple(p.shape) for p in callback.distiller.own_parameters()]
    assert before != after and any(s[1:2] == (2,) for s in after)
    assert not torch.equal(student.model[0][0][0].weight, start['0.0.0.weight'])


def test_pruning_in_place_keeps_projectors_of_layers_that_only_got_masks():
    student, teacher, _ = plain_pair()
    callback = KnowledgeDistillation(teacher, kd() + recipes.hint())
    student.fit(1, 1e-2, cbs=callback)
    links = callback.distiller.links['hint']
    for m in student.model.modules():
        if isinstance(m, nn.Conv2d):
            prune.l1_unstructured(m, 'weight', 0.3)
    student.fit(1, 1e-2, cbs=callback)
    assert callback.distiller.links['hint'] is links


@pytest.mark.parametrize('recipe', [None, kd() + recipes.hint()], ids=['default', 'hint'])
def test_an_optimizer_of_the_weights_before_the_pruning_is_refused(recipe):
    student, teacher, _ = plain_pair()
    student.fit(1, 1e-2)
    small = smaller(student.model)
    for a, b in zip(student.model.modules(), small.modules()):
        a._parameters, a._buffers = b._parameters, b._buffers  # in place
    with pytest.raises(
        DistillError,
        match=r'before the model got new weights \(0.0.0.weight.*learn.create_opt\(\)',
    ):
        student.distill(teacher, 1, 1e-2, recipe)
    student.create_opt()
    student.distill(teacher, 1, 1e-2, recipe)


def test_an_optimizer_that_also_steps_weights_of_the_loss_is_used():
    student, teacher, _ = plain_pair()

    class WithWeight(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, s, y):
            return super().forward(s * self.scale, y)

    student.loss_func = WithWeight()
    student.splitter = lambda m: [[*m.parameters()], [*student.loss_func.parameters()]]
    student.distill(teacher, 1, 1e-2, kind='softmax', axis=1)
    assert student.loss_func.scale != 1


def fx_student(teacher, x):
    fx = pytest.importorskip('torch.ao.quantization.quantize_fx')
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    return fx.prepare_qat_fx(
        deepcopy(teacher.model).train(), get_default_qat_qconfig_mapping('onednn'), (x[:2],)
    )


def quantization_aware():
    "(a student that was distilled with fake quantization, inputs)"
    pytest.importorskip('onnxscript')
    student, teacher, x = plain_pair()
    learn = another(student, fx_student(teacher, x))
    learn.distill(teacher, 2, 1e-3)
    return learn, x


def test_a_student_in_quantization_aware_training_is_exported_at_the_scales_that_it_learned(
    tmp_path,
):
    onnx = pytest.importorskip('onnx')
    learn, _ = quantization_aware()
    with pytest.raises(
        DistillError, match=r"no fake quantization: export_student\(learn, 's.onnx', int8=True\)"
    ):
        export_student(learn, tmp_path / 's.onnx')
    was = snapshot(learn.model)
    file = export_student(learn, tmp_path / 's.onnx', int8=True)
    assert (
        same(was, snapshot(learn.model))
        and file.facts['int8']
        and file.report.comparison('int8', 'float32') is not None
    )
    graph = onnx.load(file.path).graph
    values = {o.name: onnx.numpy_helper.to_array(o) for o in graph.initializer}
    scales = [
        values[n.input[1]]
        for n in graph.node
        if n.op_type == 'DequantizeLinear' and n.input[1] in values
    ]
    learned = [
        m.calculate_qparams()[0].numpy()
        for m in learn.model.modules()
        if type(m).__name__ == 'FusedMovingAvgObsFakeQuantize'
    ]
    assert len(learned) > 4 and all(
        any(np.allclose(l, s, rtol=1e-5) for s in scales if l.size == s.size) for l in learned
    )
    weights = [v for v in values.values() if v.dtype == np.int8 and v.ndim > 1]
    assert len(weights) == 3 and not any(
        v.dtype == np.float32 and v.ndim > 1 for v in values.values()
    )


def test_the_int8_file_predicts_as_pytorchs_own_quantized_model(tmp_path):
    fx = pytest.importorskip('torch.ao.quantization.quantize_fx')
    learn, x = quantization_aware()
    file = export_student(learn, tmp_path / 's.onnx', int8=True)
    import onnxruntime as ort

    session = ort.InferenceSession(str(file.path))
    ours = torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    theirs = fx.convert_fx(deepcopy(learn.model).eval())(x)
    spread = (theirs.max() - theirs.min()).item()
    assert (ours - theirs).abs().mean() < 0.01 * spread and (
        ours.argmax(1) == theirs.argmax(1)
    ).float().mean() >= 0.9
    report = compare({'float': learn, 'int8': str(file.path)}, seconds=0, progress=False)
    assert (
        abs(
            report.models['int8'].measures['accuracy'].value
            - report.models['float'].measures['accuracy'].value
        )
        < 0.1
    )


def test_a_student_of_torchaos_quantization_is_exported(tmp_path):
    pytest.importorskip('torchao')
    pytest.importorskip('onnxscript')
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    student, teacher, x = plain_pair()
    # without a batch-norm, for each of which torchao exports a dozen patterns
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8, 3),
    )
    program = torch.export.export(
        model.train(), (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)
    ).module()
    quantizer = X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(is_qat=True)
    )
    learn = another(student, allow_exported_model_train_eval(prepare_qat_pt2e(program, quantizer)))
    learn.distill(teacher, 1, 1e-2)
    file = export_student(learn, tmp_path / 's.onnx', int8=True)
    import onnxruntime as ort

    session = ort.InferenceSession(str(file.path))
    ours = torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    theirs = convert_pt2e(deepcopy(learn.model).eval())(x)
    assert (ours - theirs).abs().mean() < 0.01 * (theirs.max() - theirs.min())


def test_fake_quantization_that_can_not_be_converted_is_named(tmp_path):
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    student, teacher, _ = plain_pair()
    model = deepcopy(teacher.model).train()
    model.qconfig = get_default_qat_qconfig('onednn')
    learn = another(student, prepare_qat(model))
    with pytest.raises(DistillError, match='not the result of prepare_qat_fx'):
        export_student(learn, tmp_path / 's.onnx', int8=True)
