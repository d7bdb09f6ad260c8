"""Read samples from disk as a table. The data can be images in folders, images with masks, CSV
files or Hugging Face datasets.
"""

import csv
import io
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fastai.data.transforms import image_extensions

from ...base.atomic_files import file_errors
from ...base.errors import DistillError, DistillWarning, close_name, few_names
from .config import TrainConfig, check_data_path

TRAIN, VALID = ('train', 'training'), ('valid', 'val', 'validation', 'test')
IMAGE_FOLDERS, MASK_FOLDERS = (
    ('images', 'image', 'imgs'),
    ('masks', 'mask', 'labels', 'annotations'),
)
LABEL_NAMES = 'label', 'labels', 'class', 'category', 'target', 'y', 'intent', 'species'
TEXT_NAMES = 'text', 'sentence', 'review', 'comment', 'question', 'title', 'content', 'message'
CSV = '.csv', '.tsv', '.txt'
# a label column with more distinct integers is treated as numbers instead of classes
MANY_NUMBERS = 50


@dataclass
class Samples:
    """A table with one row per sample.

    Attributes:
        task: 'images', 'masks', 'texts' or 'table'.
        x: Names of the input columns.
        y: Name of the column with labels or with the paths of masks.
        valid: True for samples in the validation set. None if the validation set is not chosen yet.
        folder: Folder to which paths in the table are relative.
        delimiter: Delimiter between the labels of a sample. Empty if each sample has one label.
        target: What is predicted: 'classes' (one per sample), 'labels' (several per sample) or
            'numbers'.
        classes: Names of the classes, in the order of the outputs.
        size: (height, width) to which images are resized. None if the samples are not images.
        ignored: Value in masks that losses and metrics ignore. None if no value is ignored.
    """

    task: str
    frame: pd.DataFrame
    x: list
    y: str
    valid: Any
    folder: Path
    delimiter: str = ''
    target: str = 'classes'
    classes: Any = None
    size: Any = None
    ignored: int | None = None

    def __len__(self) -> int:
        return len(self.frame)


def read_samples(config: TrainConfig) -> Samples:
    """Read the samples at `config.data` without checking their content.

    Args:
        config: A TrainConfig.
    """
    check_data_path(config.data)
    path = Path(config.data)
    if path.is_file():
        s = from_csv(path, config)
    elif is_dataset(path):
        s = from_dataset(path, config)
    elif mask_folders(path) and config.task in ('auto', 'masks'):
        refuse_columns(config)
        s = from_masks(path)
    elif table := table_in(path, config):
        s = from_csv(table, config)
    else:
        refuse_columns(config)
        s = from_folders(path, config)
    if config.task not in ('auto', s.task):
        raise DistillError(
            f'task={config.task!r}, but {config.data} contains {s.task}. This task needs '
            f'{DATA_FORMS[config.task]}.'
        )
    if not len(s):
        raise DistillError(f'{config.data} contains no samples.')
    return s


def refuse_columns(config: TrainConfig) -> None:
    """Raise a DistillError if settings specify columns, but the data are folders of images."""
    for k in ('x', 'y', 'delimiter'):
        if v := getattr(config, k):
            raise DistillError(
                f'{k}={v!r}: this is for a table, such as a CSV file, but {config.data} is a folder without '
                f'one. Omit {k}, or pass the table as data.'
            )


DATA_FORMS = dict(
    images='a folder of images for each class, or a CSV file with a column of image paths (x=) and one of labels (y=)',
    masks="folders 'images' and 'masks' with files of the same names",
    texts='a CSV file with a column of texts (x=) and one of labels (y=)',
    table='a CSV file with a column to predict (y=)',
)


def split_folders(path: Path) -> tuple[Path, Path] | None:
    """Return (training folder, validation folder), or None unless both exist."""
    inside = folders_in(path, (*TRAIN, *VALID))
    trains, valids = ([inside[n] for n in names if n in inside] for names in (TRAIN, VALID))
    if not trains or not valids:
        return None
    for first, *others in (trains, valids):
        if others := [p for p in others if p.name.lower() != 'test']:  # a test set is not used
            refuse_both(path, first, others[0])
    return trains[0], valids[0]


def folders_in(path: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return {name in lower case: folder} for the folders in `path` with these names."""
    found: dict[str, Path] = {}
    for p in sorted(path.iterdir()):
        name = p.name.lower()
        if p.is_dir() and name in names and found.setdefault(name, p) != p:
            refuse_both(path, found[name], p)
    return found


def refuse_both(path: Path, a: Path, b: Path) -> None:
    """Raise a DistillError if only one of two folders would be used."""
    raise DistillError(
        f'{path} has both a folder {a.name!r} and a folder {b.name!r}: merge them, or remove one.'
    )


def image_files(folder: Path) -> list[Path]:
    """Return all images in a folder and its subfolders. Symbolic links to folders are followed."""
    files, above = [], {str(folder): [os.path.realpath(folder)]}
    for parent, folders, names in os.walk(folder, onerror=refuse_unreadable, followlinks=True):
        inside = {n: os.path.join(parent, n) for n in folders if not n.startswith('.')}
        # subtle: do not follow a link that leads back to a parent folder, which would never end
        folders[:] = [n for n, p in inside.items() if not leads_back(p, above[parent])]
        above |= {inside[n]: [*above[parent], os.path.realpath(inside[n])] for n in folders}
        files += [
            Path(parent, n)
            for n in names
            if not n.startswith('.') and Path(n).suffix.lower() in image_extensions
        ]
    # subtle: a pandas table can't contain other names
    if odd := next((p for p in files if not is_utf8(p)), None):
        raise DistillError(f'The name of {str(odd)!r} is not UTF-8: rename the file or its folder.')
    return sorted(files)


def refuse_unreadable(error: OSError) -> None:
    raise DistillError(
        f"The folder {error.filename} can't be read: {error.strerror}. Its images would be missing."
    ) from error


def is_utf8(path: Any) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def leads_back(path: Any, above: Iterable) -> bool:
    real = os.path.realpath(path)
    return os.path.islink(path) and any(Path(p).is_relative_to(real) for p in above)


def check_each_once(files: Sequence) -> None:
    """Raise a DistillError if symbolic links lead to the same image twice. The image could
    otherwise be in both the training and the validation set.
    """
    folders: dict[Path, str] = {}
    first: dict[str, Path] = {}
    again = []
    for p in files:
        if p.parent not in folders:
            folders[p.parent] = os.path.realpath(p.parent)
        real = os.path.realpath(p) if p.is_symlink() else os.path.join(folders[p.parent], p.name)
        if real in first:
            again.append((first[real], p))
        else:
            first[real] = p
    if again:
        a, b = again[0]
        raise DistillError(
            f'{len(again)} of {len(files)} images appear twice because of links: {a} and {b} are the '
            'same file, which could be in both the training and the validation set. Remove the link.'
        )


def from_folders(path: Path, config: TrainConfig) -> Samples:
    """Read images from one folder per class. The class folders may be inside folders train and
    valid.
    """
    split = split_folders(path)
    files = [(p, i) for i, folder in enumerate(split or [path]) for p in image_files(folder)]
    check_each_once([p for p, _ in files])
    if not files:
        layouts = '; '.join(DATA_FORMS.values())
        raise DistillError(
            f'{path} contains no images, and no other data that can be read. Supported layouts: {layouts}.'
        )
    roots = split or [path]
    if loose := next((p for p, i in files if p.parent == roots[i]), None):
        raise DistillError(
            f'{loose} is not in a class folder. Images must be in a folder of their class: '
            f'{roots[0] / "CLASS" / loose.name}.'
        )
    if deep := [p for p, i in files if p.parent.parent != roots[i]]:
        raise DistillError(
            f'{len(deep)} of {len(files)} images are in folders inside a class folder, e.g. {deep[0]}: '
            f'each image must be directly in the folder of its class, as in '
            f'{roots[0] / "CLASS" / deep[0].name}. Move the images, pass the folder that contains the '
            'class folders, or use a CSV file of paths and labels.'
        )
    used = {p.parent for p, _ in files}
    folders = [p for root in roots for p in sorted(root.iterdir()) if p.is_dir()]
    if empty := [p for p in folders if p not in used and not p.name.startswith('.')]:
        warnings.warn(
            DistillWarning(
                f'{len(empty)} folder(s) contain no images, so they are not classes: '
                f'{few_names(empty)}.'
            )
        )
    frame = pd.DataFrame(dict(x=[str(p) for p, _ in files], y=[p.parent.name for p, _ in files]))
    valid = np.array([i == 1 for _, i in files]) if split else None
    return Samples('images', frame, ['x'], 'y', valid, path)


def mask_folders(path: Path) -> list[tuple[Path, Path]] | None:
    """Return a list of (image folder, mask folder). The list has one item for the training set and
    one for the validation set, or a single item if they are not separated. Return None if there are
    no such folders.
    """
    pairs = []
    for folder in split_folders(path) or [path]:
        inside = folders_in(folder, (*IMAGE_FOLDERS, *MASK_FOLDERS))
        images, masks = (
            next((inside[n] for n in names if n in inside), None)
            for names in (IMAGE_FOLDERS, MASK_FOLDERS)
        )
        if images is None or masks is None:
            return None
        pairs.append((images, masks))
    return pairs


def from_masks(path: Path) -> Samples:
    rows = []
    for i, (images, masks) in enumerate(mask_folders(path) or ()):
        of: dict[Path, Path] = {}
        for p in image_files(masks):
            if (other := of.setdefault(p.relative_to(masks).with_suffix(''), p)) != p:
                raise DistillError(
                    f'{other} and {p} are masks of the same image: remove one of them.'
                )
        for p in image_files(images):
            if (stem := p.relative_to(images).with_suffix('')) not in of:
                raise DistillError(f'{p} has no mask: {masks / stem}.png is missing.')
            rows.append((str(p), str(of[stem]), i == 1))
    check_each_once([Path(x) for x, *_ in rows])
    frame = pd.DataFrame(rows, columns=['x', 'y', 'valid'])
    valid = frame.pop('valid').to_numpy() if split_folders(path) else None
    return Samples(
        'masks', frame, ['x'], 'y', valid, path, classes=class_names_in(path / 'codes.txt')
    )


def class_names_in(file: Path) -> list[str] | None:
    """Read class names from a file, one per line. Return None if there is no file, or no name in
    it.
    """
    if not file.is_file():
        return None
    with file_errors(f"{file} can't be read as text in UTF-8"):
        lines = file.read_text(encoding='utf-8-sig').splitlines()
    return [o.strip() for o in lines if o.strip()] or None


def is_csv(path: Any) -> bool:
    return any(s in CSV for s in Path(path).suffixes)


def table_in(path: Path, config: TrainConfig) -> Path | None:
    """Return the CSV file in a folder. Return None if there is no CSV file, or if the data are
    images in class folders.
    """
    found = sorted(p for p in path.iterdir() if p.is_file() and is_csv(p) and p.name != 'codes.txt')
    if not found or config.task == 'images' and not config.x:
        return None
    if len(found) > 1 and (named := [p for p in found if p.name.startswith(TRAIN)]):
        found = named
    if len(found) > 1:
        raise DistillError(
            f'{path} contains {len(found)} CSV files ({few_names([p.name for p in found])}). Pass one '
            "of them: data='...'."
        )
    if split_folders(path) and image_files(path)[:1] and not config.x:
        return None
    return found[0]


def read_csv(path: Path, header: bool) -> pd.DataFrame:
    """Read all columns of a CSV file (separated by commas) or .tsv file (separated by tabs) as
    text.
    """
    if not is_csv(path):
        raise DistillError(
            f'{path} is neither a folder nor a CSV file (.csv, .tsv; also .gz). Convert other files '
            'to CSV.'
        )
    try:
        # subtle: the header is read like a row, because pandas would rename a repeated column and
        # would shift rows that are longer than the header
        frame = pd.read_csv(
            path,
            sep=separator(path),
            header=None,
            dtype=str,
            na_filter=False,
            skipinitialspace=True,
        )
    except ImportError:
        raise
    except UnicodeDecodeError as e:
        raise DistillError(
            f"{path} can't be read as CSV: it is not UTF-8 text ({e}). Save it again with UTF-8 encoding."
        ) from e
    # subtle: each kind of compressed file raises different errors
    except Exception as e:
        hint = (
            ' A cell that contains the separator must be in quotes.' if 'Expected' in str(e) else ''
        )
        if 'Expected 1 fields' in str(e):
            hint = ' Separate the cells of a .csv file with commas, and the cells of a .tsv file with tabs.'
        raise DistillError(f"{path} can't be read as CSV: {str(e).strip()}.{hint}") from e
    if frame.shape[1] == 1 and (sep := other_separator(frame, path)):
        raise DistillError(
            f'{path} has one column, with {sep!r} in each line: is this the separator? Separate the cells '
            'of a .csv file with commas, and the cells of a .tsv file with tabs.'
        )
    names = [str(c) for c in frame.columns]
    if header:
        names = [c.strip() or f'Unnamed: {i}' for i, c in enumerate(frame.iloc[0])]
        frame = frame.iloc[1:].reset_index(drop=True)
    frame.columns = names
    if frame.columns.has_duplicates:
        again = frame.columns[frame.columns.duplicated()][0]
        raise DistillError(
            f'{path} has two columns named {again!r}: rename or remove one. If the first line is data, '
            'add --no-header.'
        )
    return frame


def separator(path: Path) -> str:
    return '\t' if '.tsv' in path.suffixes else ','


def other_separator(frame: pd.DataFrame, path: Path) -> str | None:
    """Return a different separator that occurs equally often in each row of a single column, or
    None.
    """
    others = [o for o in (';', '\t', '|', ',') if o != separator(path)]
    n = {sep: frame[0].str.count(re.escape(sep)) for sep in others}
    return next((sep for sep, o in n.items() if o.min() == o.max() > 0), None)


def from_csv(path: Path, config: TrainConfig) -> Samples:
    text, valid = read_csv(path, config.header), None
    if Path(config.valid).is_file():
        other = read_csv(Path(config.valid), config.header)
        if [*other.columns] != [*text.columns]:
            raise DistillError(
                f'{path} and {config.valid} have different columns: {", ".join(text.columns)} and '
                f'{", ".join(other.columns)}.'
            )
        valid = np.arange(len(text) + len(other)) >= len(text)
        text = pd.concat([text, other], ignore_index=True)
    elif config.valid in text.columns:
        valid = marked(text.pop(config.valid))
    # subtle: columns are converted after the files are joined, so that a category such as 01 does
    # not become a number in only one of them
    s = from_frame(text.apply(converted), valid, path.parent, config, path)
    check_quotes(text, s.y, path)
    return replace(s, frame=s.frame.assign(**{s.y: labels_of(text[s.y], s)}))


def check_quotes(text: pd.DataFrame, y: str, path: Path) -> None:
    """Raise a DistillError if a cell contains whole rows, because a quote before them is not closed."""
    at, labels, n = text.columns.get_loc(y), set(text[y]), text.shape[1]
    sep = separator(path)
    for k, c in enumerate(text.columns):
        for i in np.flatnonzero(text[c].str.contains('\n', regex=False)):
            *lines, _ = text[c].iloc[i].split('\n')
            first, *rows = (o.split(sep) for o in lines)  # these rows have no quotes
            if len(first) < n - k:
                continue
            # subtle: the open quote may be followed by separators, and columns before it were read
            rows = [[text.at[i, y]] * (k + 1) + first[len(first) - (n - k - 1) :], *rows]
            if all(len(o) == n and o[at].strip() in labels for o in rows):
                raise DistillError(
                    f'{path}: in row {i}, counted from 0, column {c!r} contains whole rows: '
                    f'{len(rows)} line break(s), the first after {lines[0][-80:]!r}. A quote (") is '
                    'closed in a later row. Close it in the same cell, or write "" for a quote inside '
                    'quotes.'
                )


def converted(column: pd.Series) -> pd.Series:
    """Convert a column of text to numbers or booleans if all of its cells can be converted, as pandas
    does.
    """
    # subtle: an empty cell without quotes would be skipped as a blank line
    text = io.StringIO(column.to_csv(index=False, quoting=csv.QUOTE_ALL))
    return pd.read_csv(text, low_memory=False).iloc[:, 0].set_axis(column.index)


def labels_of(text: pd.Series, s: Samples) -> pd.Series:
    """Return the labels in a column of text. They are numbers if numbers are predicted. Otherwise,
    they are text, so that 01 and 1 are different classes.
    """
    if s.delimiter:
        return text
    text = text.str.strip()
    y = converted(text)
    if has_numbers(y) and (y.isna().any() or predicts_numbers(y, s.task)):
        return y
    # subtle: pandas writes classes 0 and 1 as 0.0 and 1.0 if a row once had no label
    return (text.str.replace(r'(?<=\d)\.0*$', '', regex=True) if has_numbers(y) else text).where(
        y.notna()
    )


def has_numbers(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and column.dtype != bool


def predicts_numbers(y: pd.Series, task: str) -> bool:
    """Return True if a column of numbers does not contain classes."""
    return bool((y % 1 != 0).any()) or task == 'table' and y.nunique() > MANY_NUMBERS


def marked(column: pd.Series) -> np.ndarray:
    """Return a mask of the rows that a column marks as the validation set."""
    text = column.astype(str).str.lower().str.strip()
    yes, no = ('true', '1', '1.0', *VALID), ('false', '0', '0.0', *TRAIN)
    known = dict.fromkeys(yes, True) | dict.fromkeys(no, False)
    if wrong := sorted(set(text) - set(known)):
        raise DistillError(
            f'valid={column.name!r}: this column has {wrong[0]!r}. It must contain True and False, 1 '
            "and 0, or 'train' and 'valid'."
        )
    if len(held := set(text) & {*VALID}) > 1 and 'test' in held:
        warnings.warn(
            DistillWarning(
                f"valid={column.name!r}: rows marked 'test' are in the validation set, like those marked "
                f'{min(held - {"test"})!r}. Remove them to keep them for a final test.'
            )
        )
    return text.map(known).to_numpy(dtype=bool)


def from_frame(
    frame: pd.DataFrame, valid: np.ndarray | None, folder: Path, config: TrainConfig, name: Any
) -> Samples:
    """Find the columns of inputs and labels. Columns that the settings do not specify are
    recognized by their names and content.
    """
    columns = [*frame.columns]
    for k in filter(None, [config.y, *(o.strip() for o in config.x.split(','))]):
        if k not in columns:
            raise DistillError(
                f'{name} has no column {k!r}{close_name(k, columns)}. It has {few_names(columns, 30)}'
            )
    if len(columns) < 2:
        raise DistillError(
            f'{name} has only one column ({columns[0]}): inputs and a label are needed.'
        )
    y = config.y or next((c for c in columns if c.lower() in LABEL_NAMES), columns[-1])
    x = [o.strip() for o in config.x.split(',') if o.strip()] or [c for c in columns if c != y]
    task = config.task
    if task == 'auto':
        task, single = task_of_columns(frame, x)
        if single is not None:
            x = [single]
    elif task != 'table' and len(x) > 1:
        test = is_text if task == 'texts' else is_path
        found = [c for c in x if test(frame[c])]
        if len(found) != 1:
            raise DistillError(
                f"{name} has {len(found)} columns of {task}: select one of {few_names(x, 20)} with x='...'."
            )
        x = found
    if y in x:
        raise DistillError(f'{y!r} is both the input and the label: specify them with x= and y=.')
    return Samples(task, frame, x, y, valid, folder, config.delimiter)


def task_of_columns(frame: pd.DataFrame, x: Sequence[str]) -> tuple[str, str | None]:
    """Return (task, input column). The input column is None for a table."""
    if paths := [c for c in x if is_path(frame[c])]:
        return 'images', paths[0]
    texts = [c for c in x if is_text(frame[c])]
    named = [c for c in texts if c.lower() in TEXT_NAMES]
    if named or len(texts) == len(x) == 1:
        return 'texts', (named or texts)[0]
    return 'table', None


def is_words(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column) and len(column.dropna()) > 0


def is_path(column: pd.Series) -> bool:
    if not is_words(column):
        return False
    first = column.dropna().iloc[:50]
    if all(isinstance(o, bytes) for o in first):
        return True  # the bytes of image files
    return all(Path(str(o)).suffix.lower() in image_extensions for o in first)


def is_text(column: pd.Series) -> bool:
    """Return True if at least half of the rows have three or more words."""
    return is_words(column) and column.dropna().iloc[:200].astype(str).str.count(' ').median() >= 2


def is_dataset(path: Path) -> bool:
    return any(
        (path / n).is_file() for n in ('dataset_dict.json', 'dataset_info.json', 'state.json')
    )


def from_dataset(path: Path, config: TrainConfig) -> Samples:
    """Read a dataset written by `save_to_disk` of Hugging Face's datasets."""
    try:
        import datasets
    except ImportError as e:
        raise ImportError(
            f'{path} is a Hugging Face dataset, which needs datasets: pip install datasets'
        ) from e
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DistillError(f"{path} can't be read: {e}") from e
    splits = found if isinstance(found, dict) else {'train': found}
    train, held = (
        next((splits[n] for n in names if n in splits), None) for names in (TRAIN, VALID)
    )
    if train is None:
        raise DistillError(f"{path} has no split 'train'. It has {', '.join(splits)}.")
    frames = [frame_of(o, datasets) for o in (train, held) if o is not None]
    valid = None if held is None else np.arange(sum(map(len, frames))) >= len(frames[0])
    if valid is None and config.valid in frames[0]:
        valid = marked(frames[0].pop(config.valid))
    return from_frame(pd.concat(frames, ignore_index=True), valid, path, config, path)


def frame_of(split: Any, datasets: Any) -> pd.DataFrame:
    """Convert a split to a DataFrame whose labels are class names, and whose images are bytes or
    paths.
    """
    for k, f in split.features.items():
        if isinstance(f, datasets.Image):
            split = split.cast_column(k, datasets.Image(decode=False))
    frame = split.to_pandas()
    for k, f in split.features.items():
        if isinstance(f, datasets.ClassLabel):
            frame[k] = [f.int2str(int(v)) for v in frame[k]]
        if isinstance(f, datasets.Image):
            frame[k] = [o['path'] if o['bytes'] is None else o['bytes'] for o in frame[k]]
    return frame
