"""Convert files of other distillation tools to rows that `cache_from` reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.atomic_files import file_errors
from ..base.errors import DistillError, check_choice, is_whole
from .json_checks import json_list, json_object, load_json, refuse_entry, shortened, whole_number

# NumPy has no bfloat16, so its bits are read
FLOATS = dict(float16='<f2', bfloat16='<u2', float32='<f4', float64='<f8')
SPECIAL_TERMS = dict(sqrt=np.sqrt, exp=np.exp)
MAX_K = 2**16


@dataclass
class Tool:
    """Format in which a tool stores teacher outputs.

    Attributes:
        convert: fn(row, config) -> row with columns that `cache_from` reads.
        tail: Assumption of the tool about the classes that are not stored.
        shift: True if each entry is stored at the position of the token it predicts.
        keys: Column that identifies the samples, if the user does not specify one.
        compressed: True if the rows can be read only with the configuration of the tool.
    """

    convert: Callable
    tail: str
    shift: bool
    keys: str
    compressed: bool = False


class ConvertedRows:
    """Sequence of rows that are converted on access."""

    def __init__(self, rows: Any, convert: Callable, config: Any):
        self.rows, self.convert, self.config = rows, convert, config

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, i: int) -> str:
        return self.rows.place(i) if hasattr(self.rows, 'place') else f'Row {i}'

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        try:
            json_object('the row', row, ())
            return self.convert(row, self.config)
        except DistillError as e:
            raise DistillError(f'{self.place(i)}: {e}') from None
        # a column has a different type than the tool writes
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as e:
            why = shortened(f'{type(e).__name__}: {e}')
            raise DistillError(
                f"{self.place(i)} can't be read in the format of the tool ({why})."
            ) from e


def converted_rows(rows: Any, tool: str, config: Any = None, path: Any = None) -> tuple:
    """Convert the rows of a tool.

    Args:
        rows: Rows as the tool wrote them.
        tool: Name of the tool.
        config: Configuration of the tool, see `cache_from`.
        path: Path of the rows, if they are files.

    Returns:
        (rows with columns that `cache_from` reads, `Tool`, number of classes or None).
    """
    check_choice('tool', tool, TOOLS)
    o = TOOLS[tool]
    if not o.compressed:
        return ConvertedRows(rows, o.convert, None), o, None
    config = compression_of(config, path)
    return ConvertedRows(rows, o.convert, config), o, config['d']


# DistillKit and open-instruct


def compression_of(config: Any, path: Any) -> dict:
    """Load and check the configuration with which rows were compressed."""
    if config is None and path is not None:
        folder = Path(path)
        config = (folder if folder.is_dir() else folder.parent) / 'compression_config.yaml'
    if config is None:
        raise DistillError(
            "The compressed rows can be read only with the tool's configuration: pass config=, a dict "
            'or the path of its compression_config.yaml.'
        )
    if not isinstance(config, (dict, str, Path)):
        raise DistillError(
            f'config= is of type {type(config).__name__}: it must be a dict or a path.'
        )
    name = 'compression_config' if isinstance(config, dict) else str(config)
    if not isinstance(config, dict):
        config = read_yaml(Path(config))
    optional = dict(
        exact_dtype='float32',
        polynomial_terms=None,
        term_dtype='float32',
        delta_encoding=True,
        error_diffusion=False,
        normalize_t=False,
    )
    json_object(name, config, ('d', 'k', 'exact_k', 'residual_bins'), optional)
    c = optional | config
    whole_number(f'{name}.d', c['d'], 1, 2**31)
    whole_number(f'{name}.k', c['k'], 1, min(c['d'], MAX_K))
    whole_number(f'{name}.exact_k', c['exact_k'], 0, c['k'])
    for k in ('exact_dtype', 'term_dtype'):
        if c[k] not in [*FLOATS]:
            refuse_entry(f'{name}.{k}', c[k], ' or '.join(FLOATS))
    for t in json_list(f'{name}.polynomial_terms', c['polynomial_terms'] or [], 0, MAX_K):
        if t not in [*SPECIAL_TERMS] and type(t) is not int:
            refuse_entry(f'{name}.polynomial_terms', t, "a whole number, 'sqrt' or 'exp'")
    for i, b in enumerate(json_list(f'{name}.residual_bins', c['residual_bins'], 0, MAX_K)):
        at = f'{name}.residual_bins[{i}]'
        json_object(at, b, ('scale_dtype', 'element_bits', 'num_elements'))
        whole_number(f'{at}.element_bits', b['element_bits'], 1, 63)
        whole_number(f'{at}.num_elements', b['num_elements'], 1, c['k'])
        if b['scale_dtype'] not in [*FLOATS]:
            refuse_entry(f'{at}.scale_dtype', b['scale_dtype'], ' or '.join(FLOATS))
    if (n := sum(b['num_elements'] for b in c['residual_bins'])) > c['k'] - c['exact_k']:
        refuse_entry(f'{name}.residual_bins', f'{n} elements', 'at most k - exact_k elements')
    return c


def read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise DistillError(
            f'There is no file {path}, which the tool writes next to its rows: pass config=.'
        )
    if path.suffix == '.json':
        with file_errors(f"{path} can't be read as JSON"):
            return load_json(path.read_text(encoding='utf-8'))
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as e:
        raise DistillError(f"{path} can't be read as YAML: {shortened(e)}.") from e


class Bytes:
    """Reads consecutive fields from the bytes of all positions.

    Args:
        data: (positions, bytes) uint8.
    """

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, n: int) -> np.ndarray:
        if self.at + n > self.data.shape[1]:
            raise DistillError(
                f'a position has {self.data.shape[1]} bytes, which is fewer than its configuration requires.'
            )
        self.at += n
        return np.ascontiguousarray(self.data[:, self.at - n : self.at])

    def floats(self, n: int, dtype: str) -> np.ndarray:
        """Read the next `n` floating-point numbers of each position, (positions, n) float64."""
        kind = np.dtype(FLOATS[dtype])
        a = self.take(n * kind.itemsize).view(kind)
        if dtype == 'bfloat16':
            a = (a.astype('<u4') << 16).view('<f4')
        return a.astype(np.float64)

    def whole(self, n: int, bits: int) -> np.ndarray:
        """Read the next `n` integers of each position, highest bit first, (positions, n)."""
        flat = np.unpackbits(self.take(-(-n * bits // 8)), axis=1)[:, : n * bits]
        weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
        return flat.reshape(len(flat), n, bits) @ weights


def from_distillkit(row: Any, c: Any) -> dict:
    """Decompress a row of DistillKit.

    The row has a column `input_ids`, and columns `compressed_logprobs` and `bytepacked_indices` with
    the bytes of each position except the last.
    """
    if 'packed_indices' in row or 'coeffs' in row:
        raise DistillError(
            "this is DistillKit's legacy format (packed_indices, exact_values, coeffs), which is not "
            'supported: write the file again with its current version.'
        )
    json_object('the row', row, ('input_ids', 'compressed_logprobs', 'bytepacked_indices'))
    tokens = tokens_of(row)
    values, ids = (
        byte_table(row[k], k, len(tokens)) for k in ('compressed_logprobs', 'bytepacked_indices')
    )
    bits = int(np.ceil(np.log2(np.float32(c['d']))))
    ids = Bytes(ids).whole(c['k'], bits)
    logprobs = decompressed(Bytes(values), c)
    # subtle: approximate probabilities may have a sum above 1
    total = np.logaddexp.reduce(logprobs, 1, keepdims=True)
    logprobs -= total.clip(min=0)
    last = [None] * (len(tokens) - len(ids))
    rest = {k: v for k, v in row.items() if not k.startswith(('compressed_', 'bytepacked_'))}
    return {**rest, 'input_ids': tokens, 'ids': [*ids, *last], 'logprobs': [*logprobs, *last]}


def tokens_of(row: Any) -> list[int]:
    if (odd := [o for o in row['input_ids'] if not is_whole(o)]) != []:
        refuse_entry('input_ids', odd[0], 'a list of whole numbers')
    return [int(o) for o in row['input_ids']]


def byte_table(o: Any, name: str, n: int) -> np.ndarray:
    """Convert the bytes of all positions to an array, (positions, bytes) uint8."""
    a = np.array([list(p) for p in o])
    if a.ndim != 2 or a.dtype.kind not in 'iu' or a.min() < 0 or a.max() > 255:
        raise DistillError(f'{name} must have the same number of bytes for each position.')
    if len(a) not in (n, n - 1):
        raise DistillError(
            f'{name} has {len(a)} positions for {n} tokens: it must have one for each token except the '
            'last.'
        )
    return a.astype(np.uint8)


def decompressed(data: Bytes, c: Any) -> np.ndarray:
    """Return log-probabilities, (positions, k).

    The log-probabilities of the most likely classes are stored exactly. All others are computed
    from a polynomial and residuals.
    """
    exact = data.floats(c['exact_k'], c['exact_dtype'])
    n, terms = c['k'] - c['exact_k'], c['polynomial_terms'] or ()
    rest = np.zeros((len(exact), n))
    if terms:
        t = np.linspace(0, 1, n) if c['normalize_t'] else np.arange(n, dtype=float)
        x = np.stack([SPECIAL_TERMS[k](t) if k in SPECIAL_TERMS else t**k for k in terms])
        rest += data.floats(len(terms), c['term_dtype']) @ x
    at = 0
    for b in c['residual_bins']:
        scale, bits = data.floats(1, b['scale_dtype']), b['element_bits']
        q = data.whole(b['num_elements'], bits)
        q = 2 * q - 1 if bits == 1 else q - 2 ** (bits - 1)
        rest[:, at : at + q.shape[1]] += q * scale
        at += q.shape[1]
    out = np.concatenate([exact, rest], 1)
    return out.cumsum(1) if c['delta_encoding'] else out


# axolotl


def from_axolotl(row: Any, _: Any) -> dict:
    """Convert a row of axolotl, which has entries for the last tokens of a text.

    An entry is stored at the position of the token it predicts. Each entry is a list of dicts such
    as {'token': 'token_id:5', 'logprob': -0.1}, or a list of numbers whose classes are in the
    column `target_token_ids`.
    """
    name = next((k for k in row if k == 'logprobs' or str(k).endswith('_logprobs')), None)
    if name is None or 'input_ids' not in row:
        raise DistillError(
            f'the columns are {", ".join(map(str, row))}. They must include logprobs (or a name that ends '
            'in _logprobs), which is for the last tokens of a text, and input_ids, with all tokens.'
        )
    tokens, found = tokens_of(row), list(row[name])
    ids = None if row.get('target_token_ids') is None else list(row['target_token_ids'])
    before = [None] * (len(tokens) - len(found))
    if len(found) > len(tokens) or ids is not None and len(ids) != len(found):
        raise DistillError(
            f'{len(found)} positions in {name!r}, {len(tokens)} tokens'
            f'{"" if ids is None else f", {len(ids)} positions in target_token_ids"}: there must be '
            'one position for each of the last tokens.'
        )
    found = [p if p is not None and len(p) else None for p in found]
    out = {k: v for k, v in row.items() if k not in (name, 'target_token_ids')}
    out |= dict(input_ids=tokens, logprobs=before + found)
    return out if ids is None else out | dict(ids=before + ids)


# vLLM


def from_vllm(row: Any, _: Any) -> dict:
    """Convert a response of a vLLM server, or a row that contains `prompt_logprobs`."""
    out = dict(row)
    if row.get('prompt_logprobs') is None and row.get('choices'):
        first, *others = row['choices']
        out |= {k: v for k, v in first.items() if k.startswith('prompt_')}
        own = None, first.get('prompt_logprobs')
        if any(o.get('prompt_logprobs') not in own for o in others):
            raise DistillError(
                'the response is to several prompts: send one prompt in each request.'
            )
    if str(out.get('id', '')).startswith(('cmpl-', 'chatcmpl-')):
        del out['id']  # this id identifies the request, not the sample
    if out.get('prompt_logprobs') is None:
        raise DistillError(
            'there are no prompt_logprobs: request them from the server with prompt_logprobs=k.'
        )
    return {k: v for k, v in out.items() if k != 'choices'}


TOOLS = {
    'distillkit': Tool(from_distillkit, 'zero', False, 'input_ids', True),
    'open-instruct': Tool(from_distillkit, 'zero', False, 'input_ids', True),
    'axolotl': Tool(from_axolotl, 'zero', True, 'input_ids'),
    'vllm': Tool(from_vllm, 'uniform', True, 'prompt_token_ids'),
}
