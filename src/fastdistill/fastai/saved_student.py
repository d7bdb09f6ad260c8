"""Save a trained student in a folder, and load it again.

The folder contains the weights, facts about the student, a model card and, if possible, the
network.
"""

import json
from pathlib import Path

from fastai.basics import Learner
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from ..base.atomic_files import file_errors, new_file, write_atomically
from ..base.outputs import DistillError
from ..base.task import Task
from ..evaluation import Report
from ..teachers.model_loading import Onnx
from .student_export import (
    LogitsOnly,
    check_learner,
    export_student,
    facts_of,
    plain_temperature,
    temperature_tensor,
    validation_inputs,
)

__all__ = ['load_student', 'save_student']

USE = """```python
import json, pathlib, onnxruntime        # neither PyTorch nor fastdistill

facts = json.loads(pathlib.Path('config.json').read_text())
session = onnxruntime.InferenceSession('student.onnx')
logits, = session.run(['logits'], {{{feed}}})
```

Inputs are NumPy arrays: {inputs}. {normalization}
"""
USE_WEIGHTS = """```python
from fastdistill.fastai import load_student

model = load_student('FOLDER', model=make_the_same_network())
```
"""


def save_student(
    learn: Learner,
    folder: str | Path,
    report: Report | None = None,
    *,
    onnx: bool | None = None,
    title: str = 'Student',
    temperature: float | list[float] | None = None,
) -> Path:
    """Save a student in a folder that contains no pickles.

    The folder contains the weights (model.safetensors), facts such as class names and normalization
    (config.json), a model card with the numbers of the report (README.md), and the network
    (student.onnx).

    Args:
        learn: Learner of the trained student.
        folder: Folder, which is created.
        report: Report from `compare`. If given, the model card includes the numbers of the report.
        onnx: Whether to save the network too. If None, the network is saved if it can be exported.
        title: Title of the model card.
        temperature: Number by which the logits are divided, as in `export_student`. student.onnx
            divides by the temperature itself. `load_student` divides the logits of the saved
            weights by it.
    """
    check_learner(learn, 'save_student')
    # raises an error for a wrong one before anything is written
    temperature = plain_temperature(temperature)
    if report is not None and not isinstance(report, Report):
        raise DistillError(
            f'report is of type {type(report).__name__}: it must be a Report from compare.'
        )
    folder = Path(folder)
    check_own_files(folder)
    facts = facts_of(learn, validation_inputs(learn, 1)[0]) | dict(
        network=type(learn.model).__name__,
        temperature=temperature,
        parameters=sum(p.numel() for p in learn.model.parameters()),
    )
    with file_errors(f"{folder} can't be the folder of a student"):
        folder.mkdir(parents=True, exist_ok=True)
    # files of a student that was saved before don't belong to the new weights
    for name in ('student.onnx', 'report.json', 'README.md'):
        (folder / name).unlink(missing_ok=True)
    with new_file(folder / 'model.safetensors') as tmp:
        save_model(learn.model, str(tmp))
    write_atomically(folder / 'config.json', json.dumps(facts, indent=1, ensure_ascii=False) + '\n')
    checked = None
    if onnx is not False:
        try:
            checked = export_student(learn, folder / 'student.onnx', temperature=temperature)
        except (DistillError, ImportError):
            if onnx:
                raise
    write_atomically(folder / 'README.md', card(title, facts, checked, report))
    if report is not None:
        report.to_json(folder / 'report.json')
    return folder


def check_own_files(folder) -> None:
    """Raise a DistillError instead of overwriting files of something else."""
    try:
        facts = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        facts = None
    # subtle: config.json comes first, so an interrupted `save_student` leaves no README.md without it
    if isinstance(facts, dict) and {'network', 'normalization'} <= set(facts):
        return
    if found := [n for n in ('config.json', 'README.md') if (folder / n).exists()]:
        raise DistillError(
            f'{folder} has a {found[0]} that is not of a saved student, and would be overwritten: '
            'choose a different folder.'
        )


def card(title, facts, checked, report):
    """Format the model card as Markdown."""
    n, use = facts['normalization'], USE_WEIGHTS
    if checked is not None:
        normal = (
            ''
            if n is None
            else (
                f'Pixels are from 0 to 1; then the mean {n["mean"]} is subtracted, and the '
                f'result is divided by {n["std"]}.'
            )
        )
        use = USE.format(
            feed=', '.join(f"'{o['name']}': {o['name']}" for o in facts['inputs']),
            normalization=normal,
            inputs=', '.join(
                f'`{o["name"]}`, {o["dtype"]} of shape ({", ".join(map(str, o["shape"]))})'
                for o in facts['inputs']
            ),
        )
    lines = [
        f'# {title}',
        '',
        f'{facts["network"]} with {facts["parameters"]:,} parameters. Outputs: '
        f'{dict(softmax="logits of classes", sigmoid="logits of labels", regression="numbers")[facts["task"]]}. '
        'Class names, input shapes and normalization are in `config.json`.',
        '',
        '## How to use',
        '',
        use,
    ]
    if checked is not None:
        lines += [
            f'`student.onnx` was compared with the trained model on {checked.samples} validation samples: the '
            f'largest difference of an output is {checked.difference:.2g}.',
            '',
        ]
    return '\n'.join(lines if report is None else [*lines, report.to_markdown()])


def load_student(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load the student from a folder, in evaluation mode. Nothing is unpickled.

    Args:
        folder: Folder written by `save_student`.
        model: A network of the same type. The weights are loaded into this network. If None, the
            exported network is run with onnxruntime.

    Returns:
        A callable that takes tensors. The attribute `facts` has the content of config.json.

    Returns:
        The exported network, or `model` with the weights. If the student was saved with a
        temperature, `model` is wrapped, so that its logits are divided too.
    """
    folder = Path(folder)
    if not (folder / 'config.json').is_file():
        raise DistillError(
            f'There is no student in {str(folder)!r} (no config.json). save_student(learn, folder) '
            'writes one.'
        )
    with file_errors(f'config.json in {folder} is damaged'):
        facts = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    if model is None:
        if not (folder / 'student.onnx').is_file():
            raise DistillError(
                f'{str(folder)!r} holds weights, but no network: build it, and pass it as model=.'
            )
        model = Onnx(folder / 'student.onnx')
    else:
        try:
            load_model(model, str(folder / 'model.safetensors'))
        except (OSError, SafetensorError) as e:
            raise DistillError(f"model.safetensors in {folder} can't be read: {e}") from e
        except RuntimeError as e:
            raise DistillError(
                f'The weights in {str(folder)!r} belong to a different network: {e}'
            ) from e
        if (T := temperature_tensor(facts.get('temperature'))) is not None:
            model = LogitsOnly(model, T, Task(facts['task'], facts['axis']))
        model.eval()
    model.facts = facts
    return model
