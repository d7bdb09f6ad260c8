"""Export a trained student to a file that needs neither fastai nor fastdistill.

The outputs of the file are compared with those of the Learner.
"""

import copy
import io
import json
import logging
import re
import tempfile
import warnings
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fastai
import torch
from fastai.basics import Learner
from fastai.layers import ToTensorBase
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.atomic_files import new_file
from ..base.model_state import restored
from ..base.outputs import DistillError, Outputs, as_plain
from ..base.random_state import guarded_random_state
from ..base.task import Task, fit_labels, label_axis
from ..checks.batch_scores import FEW, Tally
from ..evaluation import Report
from ..teachers import Teacher
from ..teachers.fast_copy import AS_IT_IS
from ..teachers.model_loading import FACTS, Onnx
from .class_names import encoding_of_text, vocab_of
from .compare import compare
from .probe_batches import prepared, prepared_batches, some_batches
from .tables import encoding_of_table
from .task import task_of
from .teachers import image_stats, resize_of_images

CLOSE = 0.01  # largest allowed difference, as a fraction of the largest output
ADAPTIVE_MAX_POOL = torch.ops.aten.adaptive_max_pool2d.default


@dataclass(repr=False)
class Exported:
    """An exported student, and the result of the comparison with its Learner.

    Attributes:
        path: Path of the file.
        bytes: Size of the file.
        difference: Largest difference between the outputs of the file and of the Learner.
        samples: Number of samples on which the difference was measured.
        facts: Metadata stored in the file.
        report: For int8, a comparison of the Learner and the file on the validation set.
    """

    path: Path
    bytes: int
    difference: float
    samples: int
    facts: dict = field(default_factory=dict)
    report: Report | None = None

    def __str__(self) -> str:
        out = (
            f'{self.path}: {self.bytes / 1e6:.2f} MB; largest difference from the Learner {self.difference:.2g} '
            f'({self.samples} validation samples)'
        )
        if self.report is None:
            return out
        k, (a, b) = self.report.headline, self.report.models.values()
        info, d = self.report.info[k], self.report.comparisons[0].differences[k]
        cost = f'{info.label} {info.text(a.measures[k].value)} -> {info.text(b.measures[k].value)}{info.unit}'
        return f'{out}; {cost} ({"significant" if d.significant else "not significant"})'

    __repr__ = __str__


class LogitsOnly(nn.Module):
    """A model that returns only its logits. Other outputs, such as the hidden states of a text
    model, are removed.

    Args:
        model: The model.
        temperature: Number by which the logits are divided, or one number for each class or label.
            None to leave the logits unchanged.
        task: What the model predicts.
    """

    def __init__(self, model, temperature: float | list | None = None, task: Task | None = None):
        super().__init__()
        self.model, self.task = model, task
        T = None if temperature is None else torch.tensor(temperature)
        self.register_buffer('temperature', T)

    def forward(self, *x, **kwargs: Any):
        raw = self.model(*x, **kwargs)
        # subtle: return a tensor unchanged, because tensors have a special class during tracing
        logits = (
            raw
            if isinstance(raw, torch.Tensor)
            else raw[0]
            if isinstance(raw, tuple)
            else Outputs.of(raw).logits
        )
        return logits if self.temperature is None else tempered(logits, self.temperature, self.task)


def tempered(logits: Tensor, temperature: Tensor, task: Task) -> Tensor:
    """Divide logits by a temperature, or by one temperature for each class or label."""
    if temperature.dim():
        temperature = temperature.view(
            -1, *[1] * (logits.dim() - 1 - label_axis(logits.shape, task))
        )
    return logits / temperature


def check_learner(learn, name) -> None:
    """Raise a DistillError if `learn` is a bare model. The export needs a Learner."""
    if not isinstance(learn, Learner):
        raise DistillError(
            f'{name} got a {type(learn).__name__}: pass the Learner, learn instead of '
            'learn.model. The result is checked on inputs of its validation set. Without a Learner, use '
            'torch.onnx.export or torch.export: the student is an ordinary module.'
        )


def export_student(
    learn: Learner,
    path: str | Path,
    *,
    int8: bool = False,
    calibration: int = 8,
    n: int = 8,
    temperature: float | list[float] | None = None,
) -> Exported:
    """Export the student's network with a variable batch size and, for texts, a variable length.
    Then check the file.

    The outputs of the file are compared with those of the Learner on real inputs. The input shape,
    the class names, how images are resized and normalized, and how rows of tables are encoded are
    stored in the file as metadata.

    Args:
        learn: Learner of the trained student.
        path: 'student.onnx' (needs the extra 'onnx') or 'student.pt2' (torch.export).
        int8: Whether to quantize an .onnx file to int8. By default, static quantization is
            calibrated on validation batches. After quantization-aware training, the learned scales
            are used.
        calibration: Number of batches for calibration.
        n: Number of validation batches on which the file is compared with the Learner.
        temperature: Number by which the file divides its logits, or a list with one number for each
            label. Use this option for a model that `calibrate` can't change. The temperature is
            also stored as metadata.
    """
    check_learner(learn, 'export_student')
    temperature = plain_temperature(temperature)
    path = Path(path)
    if path.suffix not in WRITERS:
        raise DistillError(
            f'{str(path)!r}: the suffix must be {" or ".join(WRITERS)}. For other formats, such as '
            'TFLite or Core ML, export one of these and convert it with the tool of that format.'
        )
    if int8 and path.suffix != '.onnx':
        raise DistillError(
            "int8=True needs an .onnx file: export_student(learn, 'student.onnx', int8=True)"
        )
    quantized = is_fake_quantized(learn.model)
    if quantized and path.suffix == '.onnx' and not int8:
        raise DistillError(
            'This model is in quantization-aware training, and ONNX has no fake quantization: '
            f'export_student(learn, {path.name!r}, int8=True) writes it in int8, with the learned '
            'scales.'
        )
    batches = validation_inputs(learn, max(n, calibration if int8 else 0))
    facts = facts_of(learn, batches[0]) | dict(int8=int8, temperature=temperature)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as tmp:
        with on_cpu(learn.model) as model, silent_exporters():
            if quantized and int8:
                model = in_int8(model)
            WRITERS[path.suffix](
                LogitsOnly(model, temperature, task_of(learn.loss_func)),
                example(batches[0], facts),
                tmp,
                facts,
            )
        if int8:
            with silent_exporters():
                quantize(tmp, batches[:calibration], facts, learned=quantized)
        there = Teacher(LOADERS[path.suffix](tmp))
        close = None if int8 else CLOSE
        difference, count = compared(learn, there, path, batches[:n], close, temperature)
    report = None
    if int8:
        float32, data = learn, {}
        if temperature is not None:
            float32 = LogitsOnly(learn.model, temperature, task_of(learn.loss_func))
            data = dict(dls=learn.dls, loss_func=learn.loss_func, metrics=learn.metrics)
        both = dict(float32=float32, int8=str(path))
        report = compare(both, seconds=0, progress=False, **data)
    return Exported(path, path.stat().st_size, difference, count, facts, report)


def plain_temperature(temperature) -> float | list[float] | None:
    """Convert a temperature, such as a tensor or a NumPy number, to a type that JSON can store.

    Raises:
        DistillError: The temperature is not positive.
    """
    if temperature is None:
        return None
    try:
        T = torch.as_tensor(temperature, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        T = torch.zeros(())
    if T.dim() > 1 or not T.numel() or not bool((T > 0).all()) or not bool(T.isfinite().all()):
        raise DistillError(
            f'temperature={temperature!r}: must be a positive number, or a list with one for each label.'
        )
    return T.tolist()


def weak_score(learn: Learner, n: int = 8) -> str | None:
    """Describe the score of a model if the model is not better than a constant prediction.

    Return None if the model is better, or if its score is unknown.

    Args:
        learn: The Learner.
        n: Number of validation batches to read.
    """
    task = task_of(learn.loss_func)
    tally, (valid, _) = Tally(task), prepared_batches(learn, n, 1)
    with (
        closing(valid),
        guarded_random_state(),
        Teacher(learn.model, run=AS_IT_IS) as model,
        torch.no_grad(),
    ):
        for x, y in valid:
            logits = model(*x).logits
            if y and isinstance(y[0], torch.Tensor):
                y = fit_labels(as_plain(y[0]), logits.shape, task)
                tally.add(as_plain(logits), y)
    if len(tally.items('teacher')) < FEW or tally.above_constant(0.0):
        return None
    f = tally.facts()
    return (
        f'{f.metric} {f.teacher_score:.3f} on {f.n} validation samples, and a constant prediction '
        f'scores {f.constant_score:.3f}'
    )


def validation_inputs(learn, n):
    """Return the inputs of `n` validation batches, on the CPU."""
    with closing(prepared(learn, some_batches(learn.dls.valid), 1, False)) as batches:
        out = [tuple(o.cpu() for o in x) for x, _ in islice(batches, n)]
    if not out:
        raise DistillError(
            'The validation set is empty: an exported student is checked on real inputs.'
        )
    return out


def example(x, facts):
    """Return zeros with the shape of two samples, for tracing. A size of 1 would be treated as
    fixed, and torch.export stores these inputs in the file.
    """
    shapes = [
        [
            2,
            *(
                n if isinstance(n, int) else max(2, size)
                for n, size in zip(i['shape'][1:], o.shape[1:])
            ),
        ]
        for i, o in zip(facts['inputs'], x)
    ]
    return tuple(torch.zeros(shape, dtype=o.dtype) for shape, o in zip(shapes, x))


@contextmanager
def on_cpu(model):
    """Put the model into evaluation mode on the CPU. Restore its previous state at the end."""
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    # these modules change the type of their output, such as the last layer of a U-Net
    typed = [m for m in model.modules() if isinstance(m, ToTensorBase)]
    bags = [m for m in model.modules() if type(m) is nn.EmbeddingBag and m.mode != 'max']
    try:
        with (
            guarded_random_state(),
            Teacher(model, run=AS_IT_IS),
            restored(*typed, only=['tensor_cls']),
            restored(*bags, only=['forward']),
        ):
            for m in typed:
                m.tensor_cls = torch.Tensor
            for m in bags:
                m.forward = partial(bag_of_tokens, m)
            yield model.cpu()
    finally:
        model.to(device)


def bag_of_tokens(bag: nn.EmbeddingBag, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute an EmbeddingBag of token ids (batch, length) with operations that torch.export can
    trace for any length, and that exist in ONNX.
    """
    if x.dim() != 2 or args or kwargs:
        return type(bag).forward(bag, x, *args, **kwargs)
    known = torch.ones_like(x) if bag.padding_idx is None else (x != bag.padding_idx).long()
    total = (F.embedding(x, bag.weight) * known[..., None]).sum(1)
    return total if bag.mode == 'sum' else total / known.sum(1, keepdim=True).clamp(min=1)


@contextmanager
def silent_exporters():
    """Hide warnings and log messages of PyTorch's exporters and of onnxruntime's quantization.
    Errors are still raised.
    """
    was = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # torch.export prints the graph of a model that it can't export to stderr
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(was)


def is_fake_quantized(model):
    """Return True if the model is in quantization-aware training, by PyTorch or torchao."""
    return any(c.__name__ == 'FakeQuantizeBase' for m in model.modules() for c in type(m).__mro__)


def in_int8(model):
    """Convert a model to int8 after quantization-aware training, with the learned scales.

    The model itself is not changed.
    """
    if not isinstance(model, torch.fx.GraphModule):
        raise DistillError(
            f'{type(model).__name__} is not the result of prepare_qat_fx (PyTorch) or prepare_qat_pt2e '
            '(torchao), so how to convert it is unknown. Convert it yourself, and export a Learner with '
            'the result.'
        )
    model = copy.deepcopy(model)
    if any(type(m).__module__.startswith('torchao.') for m in model.modules()):
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        return convert_pt2e(move_exported_model_to_eval(model))
    # subtle: the public converters produce operations that torch.export can't trace
    from torch.ao.quantization.quantize_fx import _convert_to_reference_decomposed_fx

    return _convert_to_reference_decomposed_fx(model)


def facts_of(learn, x) -> dict:
    """Return the facts that a user of the file must know, such as class names, as plain data."""
    task, names = task_of(learn.loss_func), vocab_of(learn.dls)
    stats = [as_plain(torch.as_tensor(o)).flatten().tolist() for o in image_stats(learn.dls)]
    text = takes_any_length(learn.model, x)
    inputs = [
        dict(
            name='x' if len(x) == 1 else f'x{i}',
            shape=['batch', 'length'] if text else ['batch', *o.shape[1:]],
            dtype=str(o.dtype).removeprefix('torch.'),
        )
        for i, o in enumerate(x)
    ]
    image = len(x) == 1 and x[0].dim() == 4
    return dict(
        task=task.kind,
        axis=task.axis,
        classes=names,
        ignored=None if task.ignore_index == Task.ignore_index else task.ignore_index,
        inputs=inputs,
        normalization=dict(mean=stats[0], std=stats[1]) if image else None,
        resize=resize_of_images(learn.dls, x[0].shape[-2:]) if image else None,
        table=encoding_of_table(learn.dls),
        text=encoding_of_text(learn.dls) if text else None,
        versions=dict(torch=torch.__version__, fastai=fastai.__version__),
    )


def takes_any_length(model, x) -> bool:
    """Return True if the inputs are token ids (batch, length), and the model also accepts a shorter
    text.
    """
    if not all(o.dim() == 2 and not o.is_floating_point() for o in x):
        return False
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    with guarded_random_state(), Teacher(model, run=AS_IT_IS) as teacher, torch.no_grad():
        try:
            teacher(*(o[:2, : max(1, o.shape[1] - 1)].to(device) for o in x))
        except Exception:  # a model for a fixed length may raise any error
            return False
    return True


def program_of(model, x, facts):
    """Return the program that torch.export creates for the model, with a variable batch size and,
    for texts, a variable length.
    """
    names = [
        {k: n for k, n in enumerate(i['shape']) if isinstance(n, str)} for i in facts['inputs']
    ]
    free = {n: torch.export.Dim(n) for own in names for n in own.values()}
    # subtle: a tuple with a single entry, because `LogitsOnly.forward` has the single argument `*x`
    shapes = (tuple({k: free[n] for k, n in own.items()} for own in names),)
    try:
        with torch.no_grad():
            return torch.export.export(model, x, dynamic_shapes=shapes)
    except Exception as e:  # torch.export raises errors without a common class
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DistillError(
            f"torch.export can't export {type(model.model).__name__} with a variable "
            f'{" and ".join(free)}: {reason}. '
            "Recurrent text models of fastai, among others, can't be exported; "
            "learn.export('student.pkl') stores any Learner."
        ) from e


def write_program(model, x, path, facts) -> None:
    # subtle: if torch.export writes to a disk that is full, it ends the process
    content = io.BytesIO()
    torch.export.save(
        program_of(model, x, facts), content, extra_files={f'{FACTS}.json': json.dumps(facts)}
    )
    path.write_bytes(content.getbuffer())


def read_program(path):
    with open(path, 'rb') as f:
        return torch.export.load(f)


def write_onnx(model, x, path, facts) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401 (the exporter needs it)
    except ImportError as e:
        raise ImportError(
            "An ONNX file needs onnx, onnxscript and onnxruntime: pip install 'fastdistill[onnx]'"
        ) from e
    program = program_of(model, x, facts)
    if any(n.target is ADAPTIVE_MAX_POOL for n in program.graph.nodes):
        program = program.run_decompositions({ADAPTIVE_MAX_POOL: global_max_pool})
    names = [o['name'] for o in facts['inputs']]
    torch.onnx.export(
        program,
        x,
        str(path),
        input_names=names,
        output_names=['logits'],
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    add_facts(with_named_axes(onnx.load(path), facts), facts, path)


def global_max_pool(x, size):
    """Decompose `ADAPTIVE_MAX_POOL` for an output of size 1, as in fastai's `AdaptiveConcatPool2d`.

    Before version 2.13, PyTorch can't export this operation to ONNX.
    """
    if max(size) > 1:
        return NotImplemented
    return x.amax((2, 3), keepdim=True), x.flatten(2).argmax(2)[..., None, None]


def with_named_axes(model, facts):
    """Rename the variable sizes of an ONNX model to 'batch' and 'length'. The exporter uses names
    like s53.
    """
    g = model.graph
    dims = lambda v: v.type.tensor_type.shape.dim
    names = {
        d.dim_param: n
        for v, i in zip(g.input, facts['inputs'])
        for d, n in zip(dims(v), i['shape'])
        if d.dim_param
    }
    for d in (d for v in (*g.input, *g.output, *g.value_info) for d in dims(v)):
        if d.dim_param:
            d.dim_param = re.sub(r'\w+', lambda m: names.get(m[0], m[0]), d.dim_param)
    return model


def add_facts(model, facts, path) -> None:
    import onnx

    del model.metadata_props[:]  # remove the metadata that the exporter wrote
    onnx.helper.set_model_props(model, {FACTS: json.dumps(facts)})
    onnx.save(model, path)


WRITERS = {'.onnx': write_onnx, '.pt2': write_program}
LOADERS = {'.onnx': Onnx, '.pt2': read_program}


def quantize(path, batches, facts, learned=False) -> None:
    """Replace an ONNX file with its int8 version.

    A file with learned scales is only optimized, so that its weights are stored in int8 instead of
    being quantized in each run.
    """
    import onnx
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort.CalibrationDataReader):
        def __init__(self, names):
            self.feeds = iter([{k: v.numpy() for k, v in zip(names, x)} for x in batches])

        def get_next(self):
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        ready, done = [str(Path(folder) / f'{n}.onnx') for n in ('ready', 'done')]
        quant_pre_process(str(path), ready, skip_symbolic_shape=True)
        names = [i.name for i in onnx.load(ready).graph.input]
        if learned:
            done = ready
        else:
            ort.quantize_static(
                ready, done, Reader(names), quant_format=ort.QuantFormat.QDQ, per_channel=True
            )
        add_facts(onnx.load(done), facts, path)


def compared(learn, there, path, batches, close, temperature=None):
    """Compare the outputs of an exported network with those of the Learner, also for a batch with a
    single sample.

    Args:
        learn: The Learner.
        there: The exported network as a `Teacher`.
        path: Path to show in messages.
        batches: Inputs.
        close: Largest allowed difference, as a fraction of the largest output. None to allow any
            finite difference.
        temperature: Number by which the exported network divides its logits.

    Returns:
        (largest difference, number of samples).
    """
    batches = [*batches, tuple(o[:1] for o in batches[-1])]
    most = largest = 0.0
    with there, Teacher(learn.model, run=AS_IT_IS) as here, torch.no_grad():
        for x in batches:
            here.reset()
            a, b = here(*x).logits.float(), there(*x).logits.float()
            if temperature is not None:
                a = tempered(a, torch.tensor(temperature), task_of(learn.loss_func))
            # subtle: nan counts as an infinite difference, and equal infinities do not differ
            apart = (a - b).abs().where(a != b, 0.0).nan_to_num(nan=torch.inf)
            most = max(most, apart.max().item())
            largest = max(largest, a.where(a.isfinite(), 0.0).abs().max().item())
    if most == torch.inf or close is not None and most > close * max(largest, 1e-6):
        apart = 'are nan or infinite' if most == torch.inf else f'differ by {most:.3g}'
        raise DistillError(
            f"{path} was not written, because its predictions differ from the Learner's: outputs up "
            f'to {largest:.3g} {apart}.'
        )
    return most, sum(len(x[0]) for x in batches[:-1])
