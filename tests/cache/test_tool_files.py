"""Files of other tools. The golden files are written here, from the documented formats, with loops of their own:

- DistillKit (github.com/arcee-ai/DistillKit, distillkit/compression and sample_logits_vllm.py): Parquet files and
  compression_config.yaml. For each token but the last, the log-probabilities of the k likeliest next tokens: some exact, then a
  polynomial of their rank plus quantized residuals, all as bytes; and their numbers, in ceil(log2(d)) bits each.
- open-instruct (github.com/allenai/open-instruct, open_instruct/distillkit/sample_common.py): the same, with two more columns.
- axolotl (src/axolotl/integrations/kd/chat_template.py): a column of lists for the last tokens of a text.
- vLLM (docs.vllm.ai, vllm.logprobs): `prompt_logprobs`, null for the first token, with the token itself as one more entry if it is
  not among the k likeliest.
"""

import json
import math
import struct

import numpy as np
import pytest
import torch

from fastdistill import DistillError, losses
from fastdistill.cache import cache_from
from fastdistill.cache.keys import keys_of

V, K, L = 50, 8, 5
TOKENS = [[3, 7, 1, 9, 4], [8, 2, 6]]
g = torch.Generator().manual_seed(0)
LOGP = [torch.randn(len(t), V, generator=g).mul(3).log_softmax(1) for t in TOKENS]


def likeliest(row, j, k=K):
    "(numbers, log-probabilities) of the k likeliest tokens at a position"
    v, i = LOGP[row][j].topk(k)
    return i.tolist(), v.tolist()


def packed(numbers, bits):
    text = ''.join(f'{o:0{bits}b}' for o in numbers)
    text += '0' * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def bfloat16(x):
    return struct.pack('<f', x)[2:]


CONFIGS = dict(
    exact=dict(exact_k=K, exact_dtype='float32', delta_encoding=False),
    bfloat16=dict(exact_k=K, exact_dtype='bfloat16', delta_encoding=False),
    deltas=dict(exact_k=K, exact_dtype='float32', delta_encoding=True),
    polynomial=dict(
        exact_k=3,
        exact_dtype='float32',
        polynomial_terms=[0, 1, 'sqrt'],
        term_dtype='float32',
        delta_encoding=False,
    ),
    residuals=dict(
        exact_k=2,
        exact_dtype='float32',
        polynomial_terms=[0, 1],
        term_dtype='float64',
        delta_encoding=False,
        residual_bins=[
            dict(scale_dtype='float32', element_bits=11, num_elements=3),
            dict(scale_dtype='float32', element_bits=1, num_elements=2),
        ],
    ),
)


def compressed(values, c):
    "(bytes of a position, the log-probabilities that they stand for)"
    out, n = [], c['exact_k']
    stored = [b - a for a, b in zip([0, *values], values)] if c['delta_encoding'] else values
    got = []
    for v in stored[:n]:
        part = bfloat16(v) if c['exact_dtype'] == 'bfloat16' else struct.pack('<f', v)
        out += part
        whole = b'\0\0' + part if len(part) == 2 else part
        got.append(struct.unpack('<f', whole)[0])
    rest = np.array(stored[n:])
    if terms := c.get('polynomial_terms'):
        t = np.arange(len(rest))
        x = np.stack([np.sqrt(t) if o == 'sqrt' else t**o for o in terms], 1)
        fit = np.linalg.lstsq(x, rest, rcond=None)[0]
        form = dict(float32='<f', float64='<d')[c['term_dtype']]
        for o in fit:
            out += struct.pack(form, o)
        approx = x @ fit
        at = 0
        for b in c['residual_bins']:
            part, bits = (rest - approx)[at : at + b['num_elements']], b['element_bits']
            scale = np.abs(part).max() / (1 if bits == 1 else 2 ** (bits - 1))
            low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            q = [min(max(round(o / scale), low), high) for o in part]
            out += struct.pack('<f', scale)
            out += packed([o - low for o in q], bits)
            for i, o in enumerate(q):
                approx[at + i] += (2 * o - 1 if bits == 1 else o) * scale
            at += len(part)
        got += approx.tolist()
    return out, np.cumsum(got) if c['delta_encoding'] else np.array(got)


def distillkit_files(folder, options, more=None):
    "The folder as the tool writes it, and what its rows stand for"
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    folder.mkdir()
    c = dict(d=V, k=K, residual_bins=[], polynomial_terms=None, error_diffusion=False) | options
    (folder / 'compression_config.yaml').write_text(yaml.safe_dump(c))
    want = []
    for r, tokens in enumerate(TOKENS):
        values, numbers, meant = [], [], []
        for j in range(len(tokens) - 1):
            ids, v = likeliest(r, j)
            data, got = compressed(v, c)
            values.append(data)
            numbers.append(packed(ids, math.ceil(math.log2(V))))
            meant.append((ids, got))
        want.append(meant)
        columns = dict(
            input_ids=pa.array([tokens], pa.list_(pa.uint64())),
            compressed_logprobs=pa.array([values], pa.list_(pa.list_(pa.uint8()))),
            bytepacked_indices=pa.array([numbers], pa.list_(pa.list_(pa.uint8()))),
        )
        pq.write_table(pa.table(columns | (more or {})), folder / f'data_{r}.parquet')
    return folder, want


def opened(*args, **options):
    return cache_from(*args, dtype='float32', progress=False, **options)


def rows_of_cache(cache, names=TOKENS):
    return cache.outputs(cache.find(keys_of(names)))


@pytest.mark.parametrize('tool', ['distillkit', 'open-instruct'])
@pytest.mark.parametrize('name', CONFIGS)
def test_distillkit(name, tool, tmp_path):
    more = dict(messages=['[]'], text=['a']) if tool == 'open-instruct' else None
    folder, want = distillkit_files(tmp_path / 'a', CONFIGS[name], more)
    out = rows_of_cache(opened(folder, tmp_path / 'b', tool=tool))
    assert out.mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]  # nothing for the last token
    assert (out.logits.n, out.logits.tail) == (V, 'zero')
    for r, meant in enumerate(want):
        for j, (ids, v) in enumerate(meant):
            v = torch.tensor(v, dtype=torch.float32)
            v = v - v.logsumexp(0).clamp_min(0)
            order = v.argsort(descending=True, stable=True)
            assert out.logits.ids[r, j].tolist() == torch.tensor(ids)[order].tolist()
            torch.testing.assert_close(out.logits.values[r, j], v[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('T', [1.0, 2.0])
def test_the_default_loss_of_distillkit(T, tmp_path):
    "`zero`: the k probabilities, at the loss's temperature, are divided by their sum (its lossfuncs/common.py)"
    folder, _ = distillkit_files(tmp_path / 'a', CONFIGS['exact'])
    out = rows_of_cache(opened(folder, tmp_path / 'b', tool='distillkit'))
    student, total = torch.randn(2, L, V, generator=torch.Generator().manual_seed(1)), 0.0
    for r, tokens in enumerate(TOKENS):
        for j in range(len(tokens) - 1):
            ids, v = likeliest(r, j)
            p = [math.exp(o / T) for o in v]
            q = (student[r, j] / T).log_softmax(0)
            total += sum(a / sum(p) * (math.log(a / sum(p)) - float(q[i])) for a, i in zip(p, ids))
    got = losses.kl(student, out.logits.dense(), T=T, axis=-1, mask=out.mask)
    assert float(got) == pytest.approx(T**2 * total / 6, rel=1e-4)


def test_the_tail_of_distillkit_has_no_probability(tmp_path):
    folder, _ = distillkit_files(tmp_path / 'a', CONFIGS['exact'])
    p = rows_of_cache(opened(folder, tmp_path / 'b', tool='distillkit')).logits.dense().exp()
    ids, v = likeliest(0, 1)
    assert (p[0, 1] > 0).sum() == K
    torch.testing.assert_close(p[0, 1, ids], torch.tensor(v).softmax(0))


def test_a_configuration_that_does_not_fit(tmp_path):
    folder, _ = distillkit_files(tmp_path / 'a', CONFIGS['exact'])
    config = dict(d=V, k=K, residual_bins=[], **CONFIGS['exact'])
    opened(folder, tmp_path / 'b', tool='distillkit', config=config)
    for change, match in [
        (
            dict(k=9, exact_k=9),
            'data_0.parquet, row 0: a position has .* bytes, which is fewer than',
        ),
        (dict(exact_dtype='int8'), "exact_dtype is 'int8': it must be float16 or bfloat16"),
        (dict(exact_k=99), 'exact_k is 99: it must be a whole number from 0 to 8'),
        (dict(bits=3), "has an entry 'bits'"),
    ]:
        with pytest.raises(DistillError, match=match):
            opened(folder, tmp_path / 'c', tool='distillkit', config=config | change)
    (folder / 'compression_config.yaml').unlink()
    with pytest.raises(DistillError, match=r'There is no .*compression_config.yaml'):
        opened(folder, tmp_path / 'c', tool='distillkit')
    legacy = [dict(input_ids=[1], packed_indices=[[1]], exact_values=[[0.0]], coeffs=[[0.0]])]
    with pytest.raises(DistillError, match="Row 0: this is DistillKit's legacy format"):
        opened(legacy, tmp_path / 'c', tool='distillkit', config=config)
    with pytest.raises(DistillError, match="tool='kit': must be one of 'distillkit'"):
        opened(legacy, tmp_path / 'c', tool='kit')


@pytest.mark.parametrize('form', ['entries', 'numbers'])
def test_axolotl(form, tmp_path):
    "Entries for the last two tokens, which stand where these tokens are"
    rows = []
    for r, tokens in enumerate(TOKENS):
        entries, ids = [], []
        for j in (len(tokens) - 2, len(tokens) - 1):
            i, v = likeliest(r, j - 1, 3)
            named = [dict(token=f'token_id:{a}', logprob=b) for a, b in zip(i, v)]
            entries.append(named if form == 'entries' else v)
            ids.append(i)
        row = dict(input_ids=tokens, llm_text_generation_vllm_logprobs=entries)
        rows.append(row if form == 'entries' else row | dict(target_token_ids=ids))
    file = tmp_path / 'a.jsonl'
    file.write_text('\n'.join(map(json.dumps, rows)))
    out = rows_of_cache(opened(file, tmp_path / 'b', V, tool='axolotl'))
    assert out.mask.tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert out.logits.tail == 'zero'
    for r, j in [(0, 2), (0, 3), (1, 0), (1, 1)]:
        ids, v = likeliest(r, j, 3)
        assert out.logits.ids[r, j].tolist() == ids
        torch.testing.assert_close(out.logits.values[r, j], torch.tensor(v))
    for row, match in [
        (dict(messages='a', logprobs=[]), 'the columns are messages, logprobs. They must include'),
        (dict(input_ids=[1], logprobs=[[], []]), "2 positions in 'logprobs', 1 tokens"),
    ]:
        with pytest.raises(DistillError, match=match):
            opened([row], tmp_path / 'c', V, tool='axolotl')


@pytest.mark.parametrize('form', ['row', 'completion', 'chat'])
def test_vllm(form, tmp_path):
    rows = []
    for r, tokens in enumerate(TOKENS):
        found = [None]
        for j, token in enumerate(tokens[1:]):
            i, v = likeliest(r, j, 4)
            if token not in i:
                i, v = [*i, token], [*v, float(LOGP[r][j, token])]
            entry = lambda rank, b: dict(logprob=b, rank=rank + 1, decoded_token='x')
            found.append({str(a): entry(n, b) for n, (a, b) in enumerate(zip(i, v))})
        own = dict(prompt_logprobs=found, prompt_token_ids=tokens)
        rows.append(
            dict(
                row=own,
                completion=dict(id='cmpl-7', choices=[dict(index=0, text='', **own)]),
                chat=dict(id='chatcmpl-7', choices=[dict(index=0)], **own),
            )[form]
        )
    out = rows_of_cache(opened(rows, tmp_path / 'b', V, tool='vllm'))
    assert out.mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert out.logits.tail == 'uniform'
    for r, tokens in enumerate(TOKENS):
        for j in range(len(tokens) - 1):
            ids, v = likeliest(r, j, 4)
            assert out.logits.ids[r, j, :4].tolist() == ids
            torch.testing.assert_close(out.logits.values[r, j, :4], torch.tensor(v))
    with pytest.raises(DistillError, match='Row 0: there are no prompt_logprobs'):
        opened([dict(id=3, choices=[dict(text='')])], tmp_path / 'c', V, tool='vllm')


PROMPT = [None, {'1': dict(logprob=-0.1)}]


@pytest.mark.parametrize(
    'tool,row,says',
    [
        ('vllm', [1], 'the row is .1.: it must be an object'),
        ('vllm', dict(choices=3), "can't be read in the format of the tool .TypeError"),
        ('vllm', dict(choices=[None]), "can't be read in the format of the tool"),
        (
            'vllm',
            dict(choices=[dict(prompt_logprobs=PROMPT), dict(prompt_logprobs=PROMPT * 2)]),
            'the response is to several prompts: send one prompt in each request',
        ),
        ('axolotl', dict(input_ids=[1.5], logprobs=[]), 'input_ids is 1.5: it must be a list of'),
        ('axolotl', dict(input_ids=['x'], logprobs=[]), "input_ids is 'x': it must be a list of"),
        ('axolotl', dict(input_ids=[1], logprobs=[2]), "can't be read in the format of the tool"),
        (
            'distillkit',
            dict(input_ids=[1.5], compressed_logprobs=[], bytepacked_indices=[]),
            'input_ids is 1.5: it must be a list of whole numbers',
        ),
        (
            'distillkit',
            dict(input_ids=[1], compressed_logprobs=3, bytepacked_indices=[[1]]),
            "can't be read in the format of the tool",
        ),
    ],
)
def test_a_row_that_the_tool_did_not_write_is_named(tool, row, says, tmp_path):
    config = dict(d=V, k=K, residual_bins=[], **CONFIGS['exact']) if tool == 'distillkit' else None
    with pytest.raises(DistillError, match=rf'Row 0:? {says}'):
        opened([row], tmp_path / 'c', V, tool=tool, config=config, keys=['a'])


@pytest.mark.parametrize(
    'change', [dict(exact_dtype=[]), dict(polynomial_terms=3), dict(term_dtype={})]
)
def test_a_configuration_of_the_wrong_type_is_named(change, tmp_path):
    config = dict(d=V, k=K, residual_bins=[], **CONFIGS['exact']) | change
    with pytest.raises(DistillError, match=f'compression_config.{[*change][0]} is .*: it must be'):
        opened([{}], tmp_path / 'c', tool='distillkit', config=config)
    with pytest.raises(DistillError, match='config= is of type int: it must be a dict or a path'):
        opened([{}], tmp_path / 'c', tool='distillkit', config=3)
    (tmp_path / 'c.json').write_text('{"d": 3, "d": 4}')
    with pytest.raises(DistillError, match="an object has the name 'd' twice"):
        opened([{}], tmp_path / 'c', tool='distillkit', config=tmp_path / 'c.json')
