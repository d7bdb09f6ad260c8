"""Load a teacher's model from a module, program, file or callable."""

import copy
import inspect
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn import Module

from ..base.atomic_files import check_regular_file
from ..base.outputs import DistillError, DistillWarning, tensors_in
from .estimator import Estimator, is_estimator
from .image_normalization import is_image

OF_RUN = 'student.pkl'  # the student in the folder of a run of `fastdistill train`
FORMS = (
    'It must be an nn.Module (torchvision, timm, Hugging Face, TorchScript), a torch.export program, a file of '
    'TorchScript (.pt), torch.export (.pt2) or ONNX (.onnx), any callable, an object with predict_proba or predict '
    '(scikit-learn, LightGBM, XGBoost, CatBoost), a Teacher, or a list of these (an '
    'ensemble).'
)


FACTS = 'fastdistill'  # name of the metadata in a file written by `export_student`


def read_facts(text: str | None) -> dict:
    """Return the facts about a student that a file contains, such as classes and normalization."""
    try:
        facts = json.loads(text or '{}')
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def load_model(o: Any) -> tuple[Any, Path | None]:
    """Return (callable, path of the file from which it was loaded, or None)."""
    if isinstance(o, (str, Path)):
        return from_file(Path(o))
    if isinstance(o, torch.export.ExportedProgram):
        return exported_program(o), None
    if isinstance(o, nn.parallel.DistributedDataParallel):
        o = o.module  # the forward of DistributedDataParallel waits for the other processes
    if is_estimator(o):
        return Estimator(o), None
    if problem := why_no_teacher(o):
        raise DistillError(f'{problem} {FORMS}')
    return o, None


def holds_weights(o: Any) -> bool:
    """Return True for a tensor, state_dict or checkpoint."""
    parts = o.values() if isinstance(o, Mapping) else ()
    return isinstance(o, torch.Tensor) or any(map(holds_weights, parts))


def why_no_teacher(o: Any) -> str | None:
    """Return why `o` can't be a teacher, or None if it can."""
    kind = type(o).__name__
    if o is None:
        return 'None is not a teacher.'
    if isinstance(o, type):
        return f'{o.__name__} is a class, not a model.'
    if isinstance(o, Mapping) and o and not holds_weights(o):
        return (
            'A dict of teachers is for a student with several heads: pass it to Distiller, '
            'fastdistill.fastai or DistillCallback. Pass a single teacher here.'
        )
    if isinstance(o, Mapping):
        return (
            'A dict (a state_dict?) contains weights, but no network: build the model and load '
            'the weights into it.'
        )
    if hasattr(o, 'dls') and hasattr(o, 'model'):
        return 'This is a fastai Learner: pass it to fastdistill.fastai, or pass its `.model` here.'
    if not callable(o):
        return f'An object of type {kind} is not a teacher.'
    if not isinstance(o, nn.Module):
        if not builds_model(o):
            return None
        name = getattr(o, '__name__', kind)
        return f'{name} is a function that builds a model: call it, and load the weights.'
    ps, lazy = list(o.parameters()), nn.parameter.UninitializedParameter
    if any(isinstance(p, lazy) for p in ps):
        return f'{kind} is untrained: it has lazy layers that never ran.'
    # subtle: accelerate also uses meta tensors for weights on disk, which it loads when the model
    # runs
    if any(p.is_meta for p in ps) and not hasattr(o, 'hf_device_map'):
        return f'{kind} has no weights yet, only shapes (meta tensors).'
    return None


def builds_model(o: Any) -> bool:
    """Return True for a function whose annotation says that it returns a model."""
    try:
        returned = inspect.signature(o).return_annotation
    except (TypeError, ValueError):  # functions written in C have no signature
        return False
    return isinstance(returned, type) and issubclass(returned, nn.Module)


def from_file(path: Path) -> tuple[Any, Path]:
    if (path / OF_RUN).is_file():
        raise DistillError(
            f'{str(path)!r} is the folder of a run. Its student is a fastai Learner in {str(path / OF_RUN)!r}: pass '
            'the folder or this file to fastdistill.fastai, such as student.distill, or load it: '
            f'load_learner({str(path / OF_RUN)!r}).model.'
        )
    if path.is_dir():
        raise DistillError(
            f'{str(path)!r} is a folder. {FORMS} In fastai, the folder of a finished cache can be the '
            'teacher, but not part of a list.'
        )
    check_regular_file(path)
    if not path.is_file():
        raise DistillError(
            f"There is no file {str(path)!r}. {FORMS} A model's name is not enough: build the model, "
            'with its weights.'
        )
    path = path.resolve()
    if path.suffix == '.onnx':
        return Onnx(path), path
    inside = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    has = lambda *ends: any(n.endswith(ends) for n in inside)
    try:
        if has('/constants.pkl'):
            return torch_script(path), path
        if has('archive_format', 'serialized_exported_program.json'):
            # torch.export.load unpickles objects that are not plain weights
            warn_of_code(path, 'contains pickles')
            extra = {n: '' for n in [f'{FACTS}.json'] if has(n)}
            model: Any = exported_program(torch.export.load(path, extra_files=extra))
            model.facts = read_facts(next(iter(extra.values()), None))
            return model, path
    except RuntimeError as e:
        raise DistillError(f'{path} could not be loaded: {e}') from e
    raise DistillError(
        f'{path} contains no TorchScript, torch.export program or ONNX network. If it contains '
        'only weights (a state_dict), build the model and load the weights into it. If it is an '
        'exported Learner or an estimator that joblib wrote, pass it to fastdistill.fastai, or '
        'load it: joblib.load(path).'
    )


def warn_of_code(path: str | Path, what: str = 'is a pickle') -> None:
    """Warn that loading a file may run code in it.

    Args:
        path: Path of the file.
        what: 'is a pickle', or 'contains pickles' for an archive of PyTorch.
    """
    warnings.warn(
        f'{path} {what}, and loading it runs the code in it. Load only files that you trust. ONNX '
        'files, and weights in a .safetensors file, contain no code.',
        DistillWarning,
        stacklevel=4,
    )


def torch_script(path: Path) -> Any:
    warn_of_code(path, 'contains pickles')  # the PyTorch documentation warns of such files, too
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*torch.jit.load')
        return torch.jit.load(path, map_location='cpu')


def exported_program(exported: torch.export.ExportedProgram) -> Module:
    """Return the module of an exported program. The mode of such a module can't be changed."""
    # {operation: index of the argument that contains the mode}
    training = {'aten.batch_norm.default': 5, 'aten.dropout.default': 2}
    if any(
        n.args[training[str(n.target)]] for n in exported.graph.nodes if str(n.target) in training
    ):
        warnings.warn(
            'This torch.export program was exported from a model in train mode: dropout and batch-norm act '
            'as in training. Export model.eval().',
            DistillWarning,
            stacklevel=4,
        )
    return exported.module()


def is_graph(m: Any) -> bool:
    """Return True for TorchScript and torch.export programs.

    Such programs do not call the forward methods of submodules, so hooks have no effect.
    """
    return isinstance(m, torch.jit.ScriptModule) or (
        isinstance(m, torch.fx.GraphModule) and 'train' in vars(m)
    )


@contextmanager
def explained(name: str, inputs: Any, module: Module | None) -> Iterator[None]:
    """Add a hint to errors of a model that gets inputs of an unsuitable shape or vocabulary.

    Args:
        name: Name of the teacher.
        inputs: Inputs of the model.
        module: The nn.Module that runs. None if unknown.
    """
    try:
        yield
    except (DistillError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, AssertionError) as e:
        if module is None or not (hint := hint_for(list(tensors_in(inputs)), module)):
            raise
        shapes = ', '.join(str(tuple(t.shape)) for t in tensors_in(inputs))
        raise DistillError(
            f'The teacher {name} does not run on inputs of shape {shapes} ({type(e).__name__}: '
            f'{" ".join(str(e).split())[:300]}). {hint}'
        ) from e


def hint_for(tensors: Sequence[torch.Tensor], module: Module) -> str:
    """Return a hint about token ids, channels or image sizes, or '' if nothing explains the error."""
    rows = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    ids = [t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool and t.numel()]
    if rows and ids and (largest := max(t.max().item() for t in ids)) >= max(rows):
        return (
            f'The token ids go up to {largest}, but its largest embedding has only {max(rows)} '
            'rows, so its vocabulary is smaller. Create the data with its tokenizer, or convert '
            'the inputs: Teacher(model, inputs=fn).'
        )
    if images := [t for t in tensors if is_image(t)]:
        have = images[0].shape[1]
        wants = next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), have)
        if wants != have:
            fn = f'lambda x: x.expand(-1, {wants}, -1, -1)' if have == 1 else 'fn'
            return (
                f'Its first convolution takes {wants} channels, but these images have {have}: '
                f'convert them, as in Teacher(model, inputs={fn}).'
            )
        return (
            'If it was made for images of a different size, Teacher(model, images=dict(size=...)) '
            'resizes them.'
        )
    return ''


def check_second_argument(model: Module, ids: torch.Tensor, second: Any) -> None:
    """Raise a DistillError if the second positional input is not an attention mask.

    An attention mask is the second argument of most Hugging Face models.
    """
    if second is None:
        return
    name = list(inspect.signature(model.forward).parameters)[1]
    fits = name == 'attention_mask' and getattr(second, 'shape', None) == ids.shape
    hidden = ids[second == 0] if fits else None
    # an attention mask hides only padding, which is always the same token
    if hidden is None or (hidden != hidden[:1]).any():
        raise DistillError(
            f'The second positional argument of {type(model).__name__} is {name}, but this tensor is '
            'not one: pass all but the first by name, as in teacher(ids, attention_mask=...), or pass '
            'one dict.'
        )


def model_files(path: Path) -> list[Path]:
    """Return the files that contain a model: the file itself and, for ONNX, the files of its
    weights.

    Args:
        path: File of the model.
    """
    if path.suffix != '.onnx':
        return [path]
    # In the format of ONNX, the name of a file of weights is an entry with the key 'location' (field
    # 1, 8 bytes) and the name as its value (field 2). The length of the name has one or two bytes.
    entry = re.compile(rb'\n\x08location\x12([\x00-\x7f]|[\x80-\xff][\x00-\x7f])')
    data, names = path.read_bytes(), set()
    for found in entry.finditer(data):
        n = sum((b & 0x7F) << 7 * i for i, b in enumerate(found[1]))
        names.add(data[found.end() : found.end() + n].decode(errors='replace'))
    return [path, *(p for n in sorted(names) if (p := path.parent / n).is_file())]


class Onnx:
    """A network in an ONNX file, run by onnxruntime.

    The network returns the output named 'logits', or the first output if no output has this name.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime as ort
        except ImportError as e:
            raise ImportError(
                "A teacher in an ONNX file needs onnxruntime: pip install 'fastdistill[onnx]'"
            ) from e
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # other providers are not used, since TensorRT compiles for minutes and Azure uses the
        # network
        wanted = 'CUDAExecutionProvider', 'ROCMExecutionProvider', 'CPUExecutionProvider'
        have = ort.get_available_providers()
        try:
            self.session = ort.InferenceSession(
                str(path), options, providers=[p for p in wanted if p in have]
            )
        except Exception as e:  # the errors of onnxruntime have no narrower base class
            raise DistillError(f"onnxruntime can't load {path}: {e}") from e
        # as written by `export_student`
        self.facts = read_facts(self.session.get_modelmeta().custom_metadata_map.get(FACTS))
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        # names of the outputs to return as a dict. If None, a single tensor is returned
        self.wanted: list[str] | None = None

    def returning(self, output: Any) -> Self:
        """Return a copy of the network that returns its outputs as a dict.

        If `output` is a name, the dict has only that output. If `output` is an index or a function,
        the dict has all outputs. If `output` is None, the copy returns a single tensor instead.
        """
        if isinstance(output, str) and output not in self.outputs:
            raise DistillError(
                f'output={output!r}: the outputs of this ONNX network are {", ".join(self.outputs)}'
            )
        other = copy.copy(self)
        other.wanted = (
            None if output is None else [output] if isinstance(output, str) else self.outputs
        )
        return other

    def alike(self) -> list[str]:
        """Return the names of all outputs that may be the logits.

        Outputs with as many axes as the first output are candidates. The list is empty if an output
        is named 'logits'.
        """
        have = self.session.get_outputs()
        if 'logits' in self.outputs:
            return []
        return [o.name for o in have if 'float' in o.type and len(o.shape) == len(have[0].shape)]

    def __call__(self, *x: Sequence, **kw: Mapping[str, Any]) -> Any:
        feed = self._feed(x, kw)
        n = len(next(iter(feed.values())))
        # if the network has a fixed batch size, split the batch into pieces of that size and pad
        # the last
        sizes = [i.shape[0] for i in self.inputs.values() if i.shape]
        size = next((o for o in sizes if isinstance(o, int)), n)
        names = self.wanted or ['logits' if 'logits' in self.outputs else self.outputs[0]]
        pieces = [
            self._run(names, {k: v[j : j + size] for k, v in feed.items()}, size)
            for j in range(0, n, size)
        ]
        whole = [torch.cat(o)[:n] for o in zip(*pieces)]
        return whole[0] if self.wanted is None else dict(zip(names, whole))

    def _run(
        self, names: Sequence[str], feed: Mapping[str, torch.Tensor], size: int
    ) -> list[torch.Tensor]:
        pad = lambda v: (
            torch.cat([v, v[-1:].expand(size - len(v), *v.shape[1:])]) if len(v) < size else v
        )
        outputs = self.session.run(names, {k: pad(v).numpy() for k, v in feed.items()})
        return [torch.from_numpy(o) for o in outputs]

    def _feed(self, x: Sequence, kw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        given = dict(zip(self.inputs, x)) | {
            k: v for k, v in kw.items() if k in self.inputs or k != 'labels'
        }
        if len(x) > len(self.inputs) or set(given) != set(self.inputs):
            raise DistillError(
                f'This ONNX network takes {self._signature()}. '
                f'It got {len(x)} by position, {", ".join(kw) or "none"} by name.'
            )
        return {k: self._cast(k, v.detach().cpu()) for k, v in given.items()}

    def _cast(self, name: str, v: torch.Tensor) -> torch.Tensor:
        i = self.inputs[name]
        # i.type is e.g. 'tensor(float)', and PyTorch's types have the same names
        dtype = getattr(torch, i.type[7:-1], v.dtype)
        free = lambda n: not isinstance(n, int)
        fits = v.dim() == len(i.shape) and all(
            a == b or free(b) for a, b in zip(v.shape[1:], i.shape[1:])
        )
        if not fits or not torch.can_cast(v.dtype, dtype):
            resized = ' If the images have a different size, Teacher(model, images=dict(size=...)) resizes them.'
            raise DistillError(
                f'This ONNX network takes {self._signature()}. For {name} it got {v.dtype} of shape '
                f'{tuple(v.shape)}.{resized if v.dim() == 4 else ""}'
            )
        return v.to(dtype).contiguous()

    def _signature(self) -> str:
        return ', '.join(
            f'{n} ({i.type[7:-1]}: {" x ".join(map(str, i.shape))})' for n, i in self.inputs.items()
        )
