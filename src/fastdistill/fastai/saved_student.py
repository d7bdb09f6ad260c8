"""Save a trained student in a folder, and load it again.

The folder contains the weights, facts about the student, a model card and, if possible, the
network.
"""

import json
import warnings
from contextlib import ExitStack
from pathlib import Path

from fastai.basics import Learner, pd
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from ..base.atomic_files import file_errors, new_file
from ..base.outputs import DistillError, DistillWarning
from ..base.task import Task
from ..evaluation import Report
from ..teachers.model_loading import Onnx
from .student_export import (
    LogitsOnly,
    check_learner,
    export_student,
    facts_of,
    plain_temperature,
    validation_inputs,
)
from .tables import table_inputs

USE = """```python
import json, pathlib
{imports}

facts = json.loads(pathlib.Path('config.json').read_text())
session = onnxruntime.InferenceSession('student.onnx')
{prepare}
logits, = session.run(['logits'], {feed})
{answer}
```

Inputs are NumPy arrays: {inputs}. {notes}
"""
IMPORTS = 'import numpy as np, onnxruntime  # neither PyTorch nor fastdistill'
USE_PHOTO = """

def prepared(path):
    image = Image.open(path).convert('{mode}')
    h, w = facts['resize']['size']
{resize}
    pixels = np.asarray(image, dtype='float32').reshape(h, w, -1) / 255
    pixels = (pixels - np.float32(facts['normalization']['mean'])) / np.float32(facts['normalization']['std'])
    return pixels.transpose(2, 0, 1)[None]

"""
USE_TABLE = """table = facts['table']


def missing(value):
    return value is None or value != value


def code(value, classes):  # 0 for missing and unknown categories
    if value not in classes and not missing(value):  # 13, 13.0 and '13' are the same category
        value, *classes = (str(v).removesuffix('.0') for v in (value, *classes))
    return classes.index(value, 1) if value in classes[1:] else 0


def encoded(row):
    row = dict(row)
    for name, value in table['fill'].items():  # missing numbers
        row[name + '_na'] = missing(row[name])
        if row[name + '_na']:
            row[name] = value
    codes = [code(row[name], table['classes'][name]) for name in table['cat_names']]
    numbers = np.array([row[name] for name in table['cont_names']], dtype='float64')
    assert np.isfinite(numbers).all(), 'a number is missing in a column without a fill value'
    numbers = (numbers - table['means']) / table['stds']
    return np.array([codes], dtype='int64'), numbers[None].astype('float32')


row = {row}
names = [i.name for i in session.get_inputs()]"""
TABLE_IN_WORDS = """`row` is a dict with the raw values of the columns. A missing
value is `None` or `nan`. Whole numbers that are categories may be numbers or text.

The row above consists of sample categories and column means.
For this row, the logits are `{logits}`: compare them with the output of your own code."""
USE_TEXT = """text = facts['text']
rules = [getattr(core, name) for name in text['rules']]
tokenize = core.Tokenizer(core.{tokenizer}, rules=rules)
ids = {{token: i for i, token in enumerate(text['vocab'])}}
x = np.array([[ids.get(token, 0) for token in tokenize('a text')]])  # 0 is xxunk"""
TEXT_IN_WORDS = """In a batch, shorter texts are padded with `ids['xxpad']`. Without
fastai, the program must apply the same rules and split the texts in the same way: other tokens are
unknown to the student, or mean something else."""
# how fastai's Resize prepares a validation image, for each of its methods
RESIZE = dict(
    none='    # images keep their size',
    squish='    image = image.resize((w, h), Image.Resampling.{filter})',
    crop="""    # cut the middle of the photo, in the shape of the student's images
    m = min(image.width / w, image.height / h)
    width, height = int(m * w), int(m * h)
    left, top = int(0.5 * (image.width - width)), int(0.5 * (image.height - height))
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((w, h), Image.Resampling.{filter})""",
    pad="""    # pad the photo to the shape of the student's images
    m = max(image.width / w, image.height / h)
    width, height = int(m * w), int(m * h)
    left, top = int(0.5 * (width - image.width)), int(0.5 * (height - image.height))
    sides = (top, height - image.height - top), (left, width - image.width - left)
    image = np.pad(np.atleast_3d(image), (*sides, (0, 0)), '{pad}').squeeze()
    image = Image.fromarray(image).resize((w, h), Image.Resampling.{filter})""",
)
MODES = {1: 'L', 3: 'RGB'}  # {number of channels: mode of PIL}
PADS = dict(reflection='reflect', border='edge', zeros='constant')
ANSWERS = dict(
    softmax="np.array(facts['classes'])[logits[0].argmax(0)]",
    sigmoid="[c for c, logit in zip(facts['classes'], logits[0]) if logit > 0]",
)
SAVE_MASK = """if facts['ignored'] in range(len(facts['classes'])):
    logits[:, facts['ignored']] = -np.inf  # a class that was not learned is never predicted
mask = logits[0].argmax(0).astype('uint8')  # the class index of each pixel
Image.fromarray(mask).save('mask.png')"""
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
        onnx: Whether to save the network too. If None, the network is saved if it can be exported;
            otherwise, a warning says why not.
        title: Title of the model card.
        temperature: Number by which the logits are divided, as in `export_student`. student.onnx
            divides by the temperature itself. `load_student` makes the loaded model divide by it.
    """
    check_learner(learn, 'save_student')
    # raise an error for an invalid temperature before anything is written
    temperature = plain_temperature(temperature)
    if report is not None and not isinstance(report, Report):
        raise DistillError(
            f'report is of type {type(report).__name__}: it must be a Report from compare.'
        )
    folder = Path(folder)
    check_own_files(folder, onnx)
    facts = facts_of(learn, validation_inputs(learn, 1)[0]) | dict(
        network=type(learn.model).__name__,
        temperature=temperature,
        parameters=sum(p.numel() for p in learn.model.parameters()),
    )
    checked, is_new = None, not folder.exists()
    with file_errors(f"{folder} can't be the folder of a student"):
        folder.mkdir(parents=True, exist_ok=True)
    # the network comes first, since a failed export must not change the folder
    if onnx is not False:
        try:
            checked = export_student(learn, folder / 'student.onnx', temperature=temperature)
        except (DistillError, ImportError) as e:
            if onnx:
                if is_new:
                    folder.rmdir()
                raise
            warnings.warn(f'no ONNX file: {e}', DistillWarning)
    text = card(title, facts, checked, report, learn.dls)
    with ExitStack() as stack:
        # write all files before any of them replaces a file of a previously saved student
        new = lambda name: stack.enter_context(new_file(folder / name))
        if report is not None:
            report.to_json(new('report.json'))
        new('README.md').write_bytes(text.encode())
        save_model(learn.model, str(new('model.safetensors')))
        # subtle: the file that is opened last is renamed first, see `check_own_files`
        content = json.dumps(facts, indent=1, ensure_ascii=False) + '\n'
        new('config.json').write_bytes(content.encode())
    # files of a previously saved student don't belong to the new weights
    if report is None:
        (folder / 'report.json').unlink(missing_ok=True)
    if checked is None:
        (folder / 'student.onnx').unlink(missing_ok=True)
    return folder


def check_own_files(folder: Path, onnx: bool | None) -> None:
    """Raise a DistillError if files in the folder are not from a saved student and would be
    overwritten or removed.

    Args:
        folder: Folder for the student.
        onnx: Whether the network is saved too, see `save_student`.
    """
    try:
        facts = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        facts = None
    # subtle: config.json is renamed first, so an interrupted `save_student` leaves none of these
    # files without it, except for the network
    if isinstance(facts, dict) and {'network', 'normalization'} <= set(facts):
        return
    names = ['config.json', 'README.md', 'model.safetensors', 'report.json']
    if onnx is False:
        names.append('student.onnx')  # it would be removed
    if found := [n for n in names if (folder / n).exists()]:
        raise DistillError(
            f'{folder} has a {found[0]} that does not belong to a saved student, and would be '
            'overwritten or removed: choose a different folder.'
        )


def card(title, facts, checked, report, dls):
    """Format the model card as Markdown."""
    lines = [
        f'# {title}',
        '',
        f'{facts["network"]} with {facts["parameters"]:,} parameters. Outputs: '
        f'{dict(softmax="logits of classes", sigmoid="logits of labels", regression="numbers")[facts["task"]]}. '
        '`config.json` contains class names, input shapes, and how images, texts or rows of '
        'tables are prepared.',
        '',
        '## How to use',
        '',
        USE_WEIGHTS if checked is None else how_to_use(facts, Onnx(checked.path), dls),
    ]
    if checked is not None:
        lines += [
            f'`student.onnx` was compared with the trained model on {checked.samples} validation '
            f'samples: the largest difference between their outputs is {checked.difference:.2g}.',
            '',
        ]
    return '\n'.join(lines if report is None else [*lines, report.to_markdown()])


def how_to_use(facts, network, dls) -> str:
    """Return code that runs the network on a photo, a row of a table or a text, if it is known how
    to convert these to inputs.
    """
    answer = (facts['classes'] and ANSWERS.get(facts['task'])) or 'logits[0]'
    own = dict(imports=IMPORTS, answer=f'print({answer})', notes=images_in_words(facts))
    how = facts['resize'] or {}
    channels = facts['inputs'][0]['shape'][1] if how else 0
    if how.get('method') in RESIZE and channels in MODES:
        pad = PADS.get(how.get('pad_mode'))
        resize = RESIZE[how['method']].format(filter=how['filter'].upper(), pad=pad)
        own['imports'] += '\nfrom PIL import Image'
        own |= dict(
            prepare=USE_PHOTO.format(mode=MODES[channels], resize=resize),
            feed="{'x': prepared('photo.jpg')}",
        )
        if len(network.session.get_outputs()[0].shape) > 2:
            is_mask = facts['classes'] and facts['task'] == 'softmax'
            own['answer'] = SAVE_MASK if is_mask else 'print(logits[0])'
    elif facts['table'] and not facts['table']['unknown']:
        row = example_row(facts['table'])
        # encode with fastai, so that the logits also test the code in the card
        x = table_inputs(dls.test_dl(pd.DataFrame([row])).dataset)
        logits = [float(f'{v:.5g}') for v in network(*x)[0].tolist()]
        own |= dict(
            prepare=USE_TABLE.format(row=row),
            feed='dict(zip(names, encoded(row)))',
            notes=TABLE_IN_WORDS.format(logits=logits),
        )
    elif facts['text'] and str(facts['text']['tokenizer']).endswith(')'):
        own |= dict(
            imports='import numpy as np, onnxruntime\n'
            'from fastai.text import core  # only for the tokens; needs PyTorch',
            prepare=USE_TEXT.format(tokenizer=facts['text']['tokenizer']),
            feed="{'x': x}",
            notes=TEXT_IN_WORDS,
        )
    else:
        feed = ', '.join(f"'{o['name']}': {o['name']}" for o in facts['inputs'])
        own |= dict(prepare='', feed=f'{{{feed}}}')
    inputs = ', '.join(
        f'`{o["name"]}`, {o["dtype"]} of shape ({", ".join(map(str, o["shape"]))})'
        for o in facts['inputs']
    )
    return USE.format(**own, inputs=inputs)


def example_row(table) -> dict:
    """Return a raw row: the last class of each category, and the mean of each number."""
    added = {f'{n}_na' for n in table['fill']}
    first = {n: table['classes'][n][-1] for n in table['cat_names'] if n not in added}
    return first | {n: round(v, 3) for n, v in zip(table['cont_names'], table['means'])}


def images_in_words(facts) -> str:
    """Describe how images become inputs. Return '' if the inputs are not images."""
    how, n = facts['resize'], facts['normalization']
    if how is None:
        return ''
    h, w = how['size']
    return (
        f'Prepare images like the validation images, which have {h} x {w} pixels (height, width; '
        f'resize method: {how["method"]}, filter: {how["filter"]}). Pixels are from 0 to 1; then the mean '
        f'{n["mean"]} is subtracted, and the result is divided by {n["std"]}.'
    )


def load_student(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load the student from a folder, in evaluation mode. Nothing is unpickled.

    Args:
        folder: Folder written by `save_student`.
        model: A network of the same type. The weights are loaded into this network. If None, the
            exported network is run with onnxruntime.

    Returns:
        The exported network or `model` with the weights, as a callable that takes tensors. The
        attribute `facts` has the content of config.json. If the student was saved with a
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
                f'{str(folder)!r} contains weights, but no network: build the network, and pass it '
                'as model=.'
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
        if (T := plain_temperature(facts.get('temperature'))) is not None:
            model = LogitsOnly(model, T, Task(facts['task'], facts['axis']))
        model.eval()
    model.facts = facts
    return model
