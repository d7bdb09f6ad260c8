"Outputs that other programs computed become a cache."

import json
import numpy as np
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastdistill import DistillError, Distiller, Outputs, Teacher, kd, losses, soft_labels
from fastdistill.cache import Replayed, TeacherCache, cache_dataset, cache_from, start_stream
from fastdistill.cache.keys import keys_of
from fastdistill.base.outputs import TopK

g = torch.Generator().manual_seed(0)
N, C, L, V = 7, 4, 5, 50
LOGITS = torch.randn(N, C, generator=g)
LOGP = LOGITS.log_softmax(1)
TOKENS = torch.randn(N, L, V, generator=g).mul(2).log_softmax(2)
NAMES = [f'sample {i}' for i in range(N)]


def lines(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return path


def opened(*args, **kwargs):
    kwargs = dict(dtype='float32', progress=False) | kwargs
    cache = cache_from(*args, **kwargs)
    assert len(TeacherCache(cache.folder).check()) == len(cache)
    return cache


def outputs(cache, names=NAMES):
    return cache.outputs(cache.find(keys_of(names)))


def top(t, k):
    v, i = t.topk(k)
    return i.tolist(), v.tolist()


# classes


def files(tmp_path):
    "The same outputs in every form"
    import pyarrow as pa, pyarrow.parquet as pq

    lp = LOGP.tolist()
    np.save(tmp_path / 'a.npy', LOGP.numpy())
    np.savez(tmp_path / 'a.npz', logits=LOGITS.numpy(), key=np.array(NAMES))
    pq.write_table(
        pa.table(dict(id=NAMES, probs=LOGP.exp().tolist())),
        tmp_path / 'a.parquet',
        row_group_size=3,
    )
    shuffled = [[2, 0, 3, 1] for _ in range(N)]
    return dict(
        npy=dict(outputs=tmp_path / 'a.npy', keys=NAMES),
        npz=dict(outputs=tmp_path / 'a.npz'),
        parquet=dict(outputs=tmp_path / 'a.parquet'),
        array=dict(outputs=LOGP.numpy(), keys=NAMES),
        tensor=dict(outputs=LOGP, keys=NAMES),
        jsonl=dict(
            outputs=lines(
                tmp_path / 'a.jsonl', [dict(key=k, logprobs=v) for k, v in zip(NAMES, lp)]
            )
        ),
        named=dict(
            outputs=[
                dict(key=k, logprobs={str(i): x for i, x in enumerate(v)})
                for k, v in zip(NAMES, lp)
            ],
            n=C,
        ),
        ids=dict(
            outputs=[
                dict(image=k, ids=i, lp=[v[j] for j in i]) for k, v, i in zip(NAMES, lp, shuffled)
            ],
            n=C,
            value='lp',
            keys='image',
        ),
    )


def arrow(folder, parts):
    "A folder as `Dataset.save_to_disk` of Hugging Face writes it: files of Arrow's stream format"
    import pyarrow as pa

    folder.mkdir()
    (folder / 'state.json').write_text('{}')
    for i, (names, lp) in enumerate(parts):
        table = pa.table(dict(id=names, logprobs=lp.tolist()))
        with (
            pa.OSFile(str(folder / f'data-{i:05}-of-00002.arrow'), 'wb') as f,
            pa.ipc.new_stream(f, table.schema) as to,
        ):
            to.write_table(table, max_chunksize=2)
    return folder


class Rows(list):
    "What is used of a `datasets.Dataset`"

    column_names = ['id', 'logprobs']


def test_a_column_of_a_dataset_of_hugging_face(tmp_path):
    folder = arrow(tmp_path / 'hub', [(NAMES[:3], LOGP[:3]), (NAMES[3:], LOGP[3:])])
    torch.testing.assert_close(outputs(opened(folder, tmp_path / 'a')).logits, LOGP)
    rows = Rows(dict(id=k, logprobs=v) for k, v in zip(NAMES, LOGP.tolist()))
    torch.testing.assert_close(outputs(opened(rows, tmp_path / 'b')).logits, LOGP)
    with pytest.raises(DistillError, match='teacher, weights'):
        opened(Rows(rows[:-1] + [dict(rows[-1], logprobs=rows[0]['logprobs'])]), tmp_path / 'b')
    (tmp_path / 'both' / 'train').mkdir(parents=True)
    (tmp_path / 'both' / 'dataset_dict.json').write_text('{}')
    with pytest.raises(DistillError, match=r'has several splits \(train\): pass one'):
        opened(tmp_path / 'both', tmp_path / 'c')

    class Splits(dict):
        column_names = {}

    with pytest.raises(DistillError, match=r'several splits \(train\): pass one, e.g. dataset'):
        opened(Splits(train=rows), tmp_path / 'c')

    class Stream:
        column_names = ['id']

    with pytest.raises(DistillError, match='A stream of rows has no length'):
        opened(Stream(), tmp_path / 'c')


@pytest.mark.parametrize(
    'form', ['npy', 'npz', 'parquet', 'array', 'tensor', 'jsonl', 'named', 'ids']
)
def test_all_classes_in_every_form(form, tmp_path):
    out = outputs(opened(path=tmp_path / 'cache', bs=3, **files(tmp_path)[form])).logits
    torch.testing.assert_close(out.log_softmax(1), LOGP, atol=1e-5, rtol=1e-5)


def test_a_folder_of_files_is_one_table(tmp_path):
    rows = [dict(key=k, logprobs=v) for k, v in zip(NAMES, LOGP.tolist())]
    (tmp_path / 'parts').mkdir()
    lines(tmp_path / 'parts' / '0.jsonl', rows[:3])
    lines(tmp_path / 'parts' / '1.jsonl', rows[3:])
    torch.testing.assert_close(outputs(opened(tmp_path / 'parts', tmp_path / 'cache')).logits, LOGP)


@pytest.mark.parametrize('k', [2, None])
def test_tokens_are_not_taken_for_those_of_another_position(k, tmp_path):
    "The same rows, read again with another `shift=`"
    lp = torch.randn(3, 4, 6, generator=g).log_softmax(-1)
    top = lp.topk(k or 6)
    ids = {} if k is None else dict(ids=top.indices)
    rows = [
        dict(
            key=i,
            logprobs=[None, *(top.values if k else lp)[i, 1:].tolist()],
            **{n: o[i].tolist() for n, o in ids.items()},
        )
        for i in range(3)
    ]
    write = lambda **options: cache_from(rows, tmp_path, 6, progress=False, **options)
    before = write().rows(range(3))
    assert np.array_equal(write(shift=False).rows(range(3)), before)
    with pytest.raises(DistillError, match="teacher's outputs for the first samples: they differ"):
        write(shift=True)


def test_outputs_for_the_first_token_are_not_taken_for_those_of_the_second(tmp_path):
    entries = [{'5': -0.2}, {'3': -0.1}]
    rows = [dict(key=i, prompt_logprobs=entries) for i in range(3)]
    write = lambda rows, **o: cache_from(rows, tmp_path / 'c', 6, progress=False, **o)
    with pytest.raises(DistillError, match="Row 0 .*the first position of 'prompt_logprobs'"):
        write(rows)
    at_model = write(rows, shift=False).outputs(range(3)).logits.ids[..., 0]
    assert at_model.tolist() == [[5, 3]] * 3


def test_the_files_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    "The names of the samples are a list, so the order of the rows decides"
    (tmp_path / 'parts').mkdir()
    for i in range(12):
        np.save(tmp_path / 'parts' / f'part_{i}.npy', np.full((1, 3), i, np.float32))
    cache = cache_from(
        tmp_path / 'parts',
        tmp_path / 'cache',
        keys=range(12),
        given='logits',
        dtype='float32',
        progress=False,
    )
    assert cache.outputs(range(12)).logits[:, 0].tolist() == [*range(12)]


@pytest.mark.parametrize('tail', ['uniform', 'zero', 'bucket'])
def test_the_likeliest_classes_keep_their_probabilities(tail, tmp_path):
    rows = [
        dict(key=k, **dict(zip(('ids', 'logprobs'), top(lp, 2 + i % 2))))
        for i, (k, lp) in enumerate(zip(NAMES, LOGP))
    ]
    out = outputs(
        opened(lines(tmp_path / 'a.jsonl', rows), tmp_path / 'cache', C, tail=tail)
    ).logits
    v, ids = LOGP.topk(2)  # as many as every row has
    assert isinstance(out, TopK) and torch.equal(out.ids, ids)
    torch.testing.assert_close(out.values, v)
    student = torch.randn(N, C, generator=g)
    torch.testing.assert_close(out.dense(student), TopK(ids, v, C, tail).dense(student))


def test_logits_are_normalized_before_the_likeliest_are_taken(tmp_path):
    out = outputs(opened(LOGITS, tmp_path / 'cache', keys=NAMES, given='logits', topk=2)).logits
    torch.testing.assert_close(out.values, LOGP.topk(2).values)


@pytest.mark.parametrize('scale,says', [(1, 'probabilities.*sum to 1'), (100, 'percent.*to 100')])
def test_probabilities_that_are_called_logits_are_refused(scale, says, tmp_path):
    probabilities = LOGP.exp().repeat(9, 1)[:9] * scale
    for column in (dict(value=None), dict(value='logits')):
        rows = [dict(key=i, logits=p.tolist()) for i, p in enumerate(probabilities)]
        with pytest.raises(DistillError, match=f"'logits' contains {says}.*given='probs'"):
            opened(rows, tmp_path / 'cache', **column)


def test_names_of_samples_have_an_order(tmp_path):
    with pytest.raises(DistillError, match='keys= is of type set, which has no order: pass a list'):
        opened(LOGP, tmp_path / 'cache', keys=set(NAMES))
    data = TensorDataset(torch.zeros(N, 6))
    for keys in (set(NAMES), dict.fromkeys(NAMES).keys()):
        with pytest.raises(DistillError, match='which has no order'):
            Replayed(data, opened(LOGP, tmp_path / 'cache', keys=NAMES), keys=keys)


def test_names_that_can_be_read_only_once_are_refused_unread(tmp_path):
    "The same generator could not name the samples of the student later"
    data = TensorDataset(torch.zeros(N, 6))
    cache = opened(LOGP, tmp_path / 'cache', keys=NAMES)
    match = 'keys= is of type generator, which has no length: pass a list'
    for use in (
        lambda keys: opened(LOGP, tmp_path / 'new', keys=keys),
        lambda keys: cache_dataset(lambda x: x, data, tmp_path / 'new', keys=keys),
        lambda keys: Replayed(data, cache, keys=keys),
    ):
        keys = (o for o in NAMES)
        with pytest.raises(DistillError, match=match):
            use(keys)
        assert list(keys) == NAMES
    for keys in (7, np.array(7), str):
        with pytest.raises(DistillError, match=r'keys= is of type \w+, which has no length'):
            opened(LOGP, tmp_path / 'new', keys=keys)


def test_sparse_tensors_are_refused(tmp_path):
    "Missing log-probabilities are not 0"
    sparse = torch.eye(N).to_sparse()
    match = r"A tensor can't be converted to an array.*If it is sparse, pass tensor.to_dense\(\)"
    for outputs in (sparse, [dict(key=k, probs=o) for k, o in zip(NAMES, sparse)]):
        with pytest.raises(DistillError, match=match):
            opened(outputs, tmp_path / 'cache', keys=NAMES)
    with pytest.raises(DistillError, match=match):
        opened(LOGP, tmp_path / 'cache', keys=[o for o in sparse])
    opened(sparse.to_dense(), tmp_path / 'cache', keys=NAMES, given='probs')


def test_a_teacher_with_sparse_weights_is_identified(tmp_path):
    data = TensorDataset(torch.randn(N, 6, generator=g))
    m = nn.Linear(6, C)
    m.register_buffer('graph', torch.eye(6).to_sparse())
    cached = lambda: cache_dataset(Teacher(m), data, tmp_path / 'cache', progress=False)
    rows = cached().rows(range(N))
    assert np.array_equal(cached().rows(range(N)), rows)
    m.graph = 2 * torch.eye(6).to_sparse()
    with pytest.raises(DistillError, match='weights'):
        cached()


def test_a_student_trains_from_them(tmp_path):
    x, y = torch.randn(N, 6, generator=g), torch.randint(C, (N,), generator=g)
    data, student = TensorDataset(x, y), nn.Linear(6, C)
    cache = opened(LOGP, tmp_path / 'cache', keys=NAMES)
    ((xb, yb, rows),) = DataLoader(Replayed(data, cache, keys=NAMES), batch_size=N)
    d = Distiller(student, None, kd(2.0, 1.0))
    torch.testing.assert_close(
        d.compute(Outputs(student(xb)), cache.decode(rows), None, (yb,)).total,
        losses.kl(student(x), LOGP, T=2.0),
    )


def test_files_are_found_below_their_folder(tmp_path):
    from pathlib import Path

    cache = opened(
        [dict(path=f'a/{i}.png', logprobs=v) for i, v in enumerate(LOGP.tolist())],
        tmp_path / 'cache',
        root='/data/pictures',
    )
    assert cache.find(keys_of([Path('/data/pictures/a/3.png')], '/data/pictures')).tolist() == [3]


# tokens


def vllm(t, k):
    return [
        None,
        *(
            {
                str(i): dict(logprob=v, rank=j, decoded_token='x')
                for j, (i, v) in enumerate(zip(*top(p, k)))
            }
            for p in t
        ),
    ]


def sglang(t, k):
    return [None, *([[v, i, None] for i, v in zip(*top(p, k))] for p in t)]


def openai(t, k):
    return dict(
        content=[
            dict(
                token=f'token_id:{top(p, 1)[0][0]}',
                logprob=0.0,
                top_logprobs=[dict(token=f'token_id:{i}', logprob=v) for i, v in zip(*top(p, k))],
            )
            for p in t
        ]
    )


def plain(t, k):
    return [dict(zip(map(str, (o := top(p, k))[0]), o[1])) for p in t]


TOKEN_FORMS = dict(
    prompt_logprobs=vllm, input_top_logprobs=sglang, logprobs=openai, top_logprobs=plain
)


@pytest.mark.parametrize('value', TOKEN_FORMS)
def test_tokens_of_texts_of_any_length(value, tmp_path):
    lengths = [1 + i % L for i in range(N)]
    lengths[-1] = L
    rows = [
        dict(id=k, **{value: TOKEN_FORMS[value](t[:n], 3)})
        for k, t, n in zip(NAMES, TOKENS, lengths)
    ]
    out = outputs(opened(lines(tmp_path / 'a.jsonl', rows), tmp_path / 'cache', V, bs=2))
    v, ids = TOKENS.topk(3)
    size = L + (
        value in ('prompt_logprobs', 'input_top_logprobs')
    )  # the last position predicts a token that is not there
    assert out.mask.shape == (N, size)
    for i, n in enumerate(lengths):
        assert out.mask[i].tolist() == [1.0] * n + [0.0] * (size - n)
        assert torch.equal(out.logits.ids[i, :n], ids[i, :n])
        torch.testing.assert_close(out.logits.values[i, :n], v[i, :n])


@pytest.mark.parametrize('wrapped', [True, False], ids=['as answered', 'its list'])
def test_completions_that_echo_the_prompt_are_moved_to_where_a_token_is_predicted(
    wrapped, tmp_path
):
    "OpenAI's completions with echo=True have no entry for the first token, like the prompt_logprobs of vLLM"
    answers = [[None, *plain(t, 3)] for t in TOKENS]
    echo = lambda entries: dict(tokens=['x'] * len(entries), top_logprobs=entries)
    rows = [
        dict(id=k, **(dict(logprobs=echo(o)) if wrapped else dict(top_logprobs=o)))
        for k, o in zip(NAMES, answers)
    ]
    out = outputs(opened(lines(tmp_path / 'a.jsonl', rows), tmp_path / 'cache', V))
    v, ids = TOKENS.topk(3)
    assert out.mask.tolist() == [[1.0] * L + [0.0]] * N
    assert torch.equal(out.logits.ids[:, :L], ids)
    torch.testing.assert_close(out.logits.values[:, :L], v)
    as_given = opened(rows, tmp_path / 'unmoved', V, shift=False)
    assert outputs(as_given).mask.tolist() == [[0.0] + [1.0] * L] * N


def test_a_column_of_lists(tmp_path):
    "As `frame['logprobs'].to_numpy()` makes it: an array of objects, each a list"
    rows = np.empty(N, object)
    rows[:] = LOGP.tolist()
    cache = opened(rows, tmp_path / 'cache', keys=NAMES)
    torch.testing.assert_close(outputs(cache).logits, LOGP)
    same = LOGP.numpy().astype(object)
    assert opened(same, tmp_path / 'cache', keys=NAMES).manifest.teacher == cache.manifest.teacher
    rows[0] = rows[1]
    with pytest.raises(DistillError, match='teacher'):
        opened(rows, tmp_path / 'cache', keys=NAMES)


def test_a_loss_of_tokens_counts_those_that_are_there(tmp_path):
    lengths = [1 + i % L for i in range(N)]
    rows = [dict(id=k, logprobs=t[:n].tolist()) for k, t, n in zip(NAMES, TOKENS, lengths)]
    cache, s = opened(rows, tmp_path / 'cache', length=L), torch.randn(N, L, V, generator=g)
    got = (
        Distiller(None, None, soft_labels(T=1.0), axis=-1).compute(Outputs(s), outputs(cache)).total
    )
    each = [
        losses.kl(s[i, :n], TOKENS[i, :n], T=1.0, reduction='none') for i, n in enumerate(lengths)
    ]
    torch.testing.assert_close(got, torch.cat(each).mean())


# mistakes


@pytest.mark.parametrize(
    'rows,kwargs,says',
    [
        (
            [dict(key='a', out=[0.0, 1.0])],
            {},
            "No column 'logprobs' with outputs; the first row \\(Row 0\\) has key, out. Name it with value=",
        ),
        (
            [dict(key='a', out=[0.0, 1.0])],
            dict(given='logits'),
            "No column 'logits' with outputs; the first row \\(Row 0\\) has key, out. Name it with value=",
        ),
        (
            [dict(name='a', logprobs=[0.0, 1.0])],
            {},
            "No column 'key' with the samples' names; the first row \\(Row 0\\) has name, logprobs",
        ),
        ([dict(key='a', logits=[0.0, 1.0])] * 2, {}, 'Two of the 2 rows have the same name'),
        (
            [dict(key='a', logprobs=[0.0, 1.0])],
            {},
            r"Row 0 \('a'\): if .* the probabilities sum to 3.72, .* pass given='logits'",
        ),
        ([dict(key='a', logprobs={'1': -0.1})], {}, 'pass n=, the number of all classes'),
        (
            [dict(key='a', logprobs={'7': -0.1})],
            dict(n=5),
            r"Row 0 \('a'\): the classes 7 must differ, and be from 0 to 4",
        ),
        (
            [dict(key='a', logprobs={'cat': -0.1})],
            dict(n=5),
            r"Row 0 \('a'\): the class 'cat' is not a whole number",
        ),
        (
            [dict(key='a', logprobs=[-0.1, -2.3]), dict(key='b', logprobs=[0.0])],
            {},
            r"Row 1 \('b'\) has 1 values without class numbers, but Row 0 \('a'\) has 2",
        ),
        (
            [dict(key='a', logprobs={'1': -0.1, '2': -3})],
            dict(n=5, topk=3),
            r"topk=3, but some positions have only 2 classes, such as one of Row 0 \('a'\)",
        ),
        (
            [dict(key='a', logprobs={'1': -0.1})],
            dict(n=5, tail='mean'),
            "tail='mean' needs the log-probabilities of all classes",
        ),
        ([], {}, 'There are no rows'),
    ],
)
def test_what_is_no_table_of_outputs(rows, kwargs, says, tmp_path):
    with pytest.raises(DistillError, match=says):
        opened(rows, tmp_path / 'cache', **kwargs)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(DistillError, match='There is no file'):
        opened(tmp_path / 'no.jsonl', tmp_path / 'cache')
    (tmp_path / 'a.txt').write_text('')
    with pytest.raises(DistillError, match='must be a file that ends in .jsonl, .parquet'):
        opened(tmp_path / 'a.txt', tmp_path / 'cache')
    (tmp_path / 'a.jsonl').write_text('{"key": 1, "logprobs": [0.0]}\n{"key"')
    with pytest.raises(DistillError, match='a.jsonl, line 2 is not JSON'):
        opened(tmp_path / 'a.jsonl', tmp_path / 'cache')


def test_another_teachers_outputs_are_refused(tmp_path):
    opened(LOGP, tmp_path / 'cache', keys=NAMES)
    opened(LOGP, tmp_path / 'cache', keys=NAMES)  # the same ones are there already
    with pytest.raises(DistillError, match='teacher, weights'):
        opened(LOGP.flip(1), tmp_path / 'cache', keys=NAMES)


# nonsense: every row is checked before anything is written

INF, NAN = float('inf'), float('nan')


@pytest.mark.parametrize(
    'row,kwargs,says',
    [
        (
            dict(logprobs=[-INF] * 3),
            {},
            "'logprobs' has only -inf: at least one class must have a finite number",
        ),
        (dict(logits=[-INF] * 3), {}, "'logits' has only -inf"),
        (
            dict(logprobs=[-9999.0] * 3),
            {},
            "'logprobs' has -9999, which marks a missing log-probability: they must be at least -1000",
        ),
        (
            dict(logprobs={'0': -0.1, '1': -9999.0}),
            dict(n=5),
            'Leave the class out of a list of the most likely classes',
        ),
        (dict(logprobs=[0.0, NAN, -1.0]), {}, "'logprobs' has NaN: each class needs a number"),
        (
            dict(logits=np.ma.masked_array([0.5, 2.0, -1.0], [False, True, False])),
            {},
            'some numbers of a masked array are masked: each class needs a number',
        ),
        (
            dict(logprobs=[-9.0, -9.0, -9.0]),
            {},
            "if 'logprobs' contains logprobs, the probabilities sum to 0.00037, but they must sum to 1. .*pass given='logits' or given='probs'",
        ),
        (dict(probs=[0.0, 0.0, 0.0]), {}, 'the probabilities sum to 0, '),
        (
            dict(probs=[1.2, -0.2, 0.0]),
            {},
            'the probabilities range from -0.2 to 1.2: they must be from 0 to 1',
        ),
        (
            dict(probs=[1.0, 1.0, 1.0]),
            {},
            'the probabilities sum to 3, .*If the classes are not mutually exclusive, use their logits',
        ),
        (
            dict(probs=[0.0, 0.0], ids=[1, 2]),
            dict(n=5),
            'they must sum to more than 0 and at most 1, because some classes are missing',
        ),
        (
            dict(logits=[0.0, 1e5, 0.0]),
            {},
            "has 100000: float16 can store numbers up to 65504. Use dtype='float32', or -inf",
        ),
        (
            dict(logits=[30001.0, 30002.0, 30003.0]),
            {},
            "'logits' is 30003, where the spacing of float16 is 16: use dtype='float32'",
        ),
        (
            dict(logits=[0.0, -INF, 0.0]),
            dict(dtype='int8'),
            "has -inf, which int8 can't store: use dtype='float16'",
        ),
        (
            dict(logits=[1.0, -1e4, 2.0]),
            dict(dtype='int8'),
            "ranges from -10000 to 2, which int8 stores in steps of 39.4: use dtype='float16'",
        ),
        (
            dict(logprobs=[-0.7, -900.0, -0.7]),
            dict(dtype='int8'),
            "ranges from -900 to -0.7, which int8 stores in steps of 3.54: use dtype='float16'",
        ),
        (dict(logprobs=[-0.1, 'x', -3.0]), {}, "'x' is not a number"),
        (dict(logprobs=[-0.1, True, -3.0]), {}, 'True is not a number'),
        (dict(logprobs='abc'), {}, "'logprobs' is 'abc': it must be a list of numbers, a dict"),
        (dict(logprobs=None), {}, "'logprobs' is None: it must be a list"),
        (dict(logprobs=[]), {}, 'there are no classes: use null'),
        (
            dict(logprobs=[-0.1, -3.0], ids=[1]),
            dict(n=5),
            r'2 numbers, but the ids \[1\]: each number needs one class',
        ),
        (
            dict(logprobs=[-0.1, -3.0], ids=[1, 1.5]),
            dict(n=5),
            'the class 1.5 is not a whole number from 0',
        ),
        (dict(logprobs=[-0.1, -3.0], ids=[1, 1]), dict(n=5), 'the classes 1, 1 must differ'),
        (dict(logprobs={'²': -0.1}), dict(n=5), "the class '²' is not a whole number"),
        (dict(logprobs=[[-0.1, -2.4], [-0.1, -9999.0]]), {}, "position 1: 'logprobs' has -9999"),
        (dict(logprobs=[[-0.1, -2.4], []]), {}, 'position 1: there are no classes'),
        (
            dict(logprobs=dict(content=[dict(token=1, logprob=-0.9), dict(token=2, logprob=-1.1)])),
            dict(n=5),
            "the position .*'token': 1.* has no 'top_logprobs': request them from the server",
        ),
    ],
)
def test_a_row_of_nonsense_is_named_before_anything_is_written(row, kwargs, says, tmp_path):
    kwargs = dict(dtype='float16') | kwargs
    with pytest.raises(DistillError, match=rf"Row 0 \('a'\): .*{says}"):
        opened([dict(key='a', **row)], tmp_path / 'cache', **kwargs)
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize(
    'rows,kwargs,says',
    [
        ([dict(key=None, logprobs=[0.0])], {}, 'its name is None: it must be a string or a number'),
        ([dict(key='\ud800', logprobs=[0.0])], {}, r"its name '\\ud800' can't be used"),
        (
            [dict(key=3, logprobs=[0.0])],
            dict(root='/data'),
            "its name 3 can't be used .*the path of a file",
        ),
        (
            [dict(key='a', logprobs=[0.0]), dict(key='b')],
            {},
            r"Row 1 \('b'\) has no 'logprobs', unlike the first row. It has key",
        ),
        (
            [dict(key='a', logprobs=[0.0]), dict(logprobs=[0.0])],
            {},
            "Row 1 has no 'key', unlike the first row. It has logprobs",
        ),
        (
            [dict(key='a', logprobs=[0.0]), [0.0]],
            {},
            'Row 1 is of type list: each row must be a dict',
        ),
        (
            [dict(key='a', logprobs=[0.0]), dict(key='a', logprobs=[0.0])],
            {},
            r"have the same name: Row 0 \('a'\) and Row 1 \('a'\)",
        ),
        (
            [dict(key='a', logprobs=[[0.0]]), dict(key='b', logprobs=[0.0])],
            {},
            'has outputs of one position, but the first row has outputs of a list of positions',
        ),
        (
            [dict(key='a', logprobs=[0.0])],
            dict(topk=0),
            'topk=0: must be a whole number of at least 1, or None',
        ),
        ([{'key': 'a', 1: 2, 'logprobs': [0.0]}], {}, "Row 0 can't be written as JSON"),
    ],
)
def test_a_row_that_differs_from_the_others_is_named(rows, kwargs, says, tmp_path):
    with pytest.raises(DistillError, match=says):
        opened(rows, tmp_path / 'cache', **kwargs)


def test_a_line_is_named_by_its_number_in_the_file(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        '{"key": 1, "logprobs": [0.0]}\n\n{"key": 2, "logprobs": [-5.0]}\n'
    )
    with pytest.raises(
        DistillError, match=r'a.jsonl, line 3 \(2\): if .* the probabilities sum to'
    ):
        opened(tmp_path / 'a.jsonl', tmp_path / 'cache')


def test_a_row_of_a_folder_is_named_by_its_own_file(tmp_path):
    (tmp_path / 'parts').mkdir()
    np.savez(tmp_path / 'parts' / '0.npz', logits=LOGITS.numpy(), key=np.array(NAMES))
    np.savez(
        tmp_path / 'parts' / '1.npz',
        logits=np.array([[0, 0, 0, 0], [0, 0, NAN, 0]]),
        key=np.array(['x', 'y']),
    )
    with pytest.raises(DistillError, match=r"1.npz, row 1 \('y'\): 'logits' has NaN"):
        opened(tmp_path / 'parts', tmp_path / 'cache')


@pytest.mark.parametrize(
    'bad,says',
    [
        (None, 'is None: it must be a list of numbers'),
        ([-0.1, None, -3.0, -4.0], 'None is not a number'),
        ([-9.0] * 4, 'the probabilities sum to'),
    ],
)
@pytest.mark.parametrize('form', ['parquet', 'arrow'])
def test_a_row_of_a_table_in_groups_is_named_by_its_number_in_the_file(form, bad, says, tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq

    file, lp = tmp_path / f'a.{form}', LOGP.tolist()
    lp[5] = bad
    table = pa.table(dict(id=NAMES, logprobs=lp))
    if form == 'parquet':
        pq.write_table(table, file, row_group_size=3)
    else:
        with pa.OSFile(str(file), 'wb') as f, pa.ipc.new_stream(f, table.schema) as to:
            to.write_table(table, max_chunksize=2)
    with pytest.raises(DistillError, match=rf"a.{form}, row 5 \('sample 5'\): .*{says}"):
        opened(file, tmp_path / 'cache')


def test_columns_of_different_lengths_are_refused(tmp_path):
    np.savez(tmp_path / 'a.npz', logits=LOGITS.numpy(), key=np.array(NAMES[:-1]))
    with pytest.raises(
        DistillError,
        match=r'a.npz has the shapes logits \[7, 4\], key \[6\]: each must have one entry for each sample',
    ):
        opened(tmp_path / 'a.npz', tmp_path / 'cache')


def test_large_arrays_in_rows_tell_teachers_apart(tmp_path):
    p = torch.rand(2, 2000, generator=g).softmax(1).numpy()
    other = p.copy()
    other[:, [900, 901]] = other[:, [901, 900]]
    rows = lambda p: [dict(key=i, probs=o) for i, o in enumerate(p)]
    opened(rows(p), tmp_path / 'cache')
    with pytest.raises(DistillError, match='teacher, weights'):
        opened(rows(other), tmp_path / 'cache')


def test_a_class_that_is_masked_out_keeps_probability_0(tmp_path):
    cache = opened([dict(key='a', logits=[1.0, -INF, 1.0])], tmp_path / 'cache')
    assert cache.outputs([0]).logits.softmax(1).tolist() == [[0.5, 0.0, 0.5]]


# rows without class numbers among rows with them

FEW, MORE = dict(probs=[0.9, 0.05, 0.05], ids=[7, 3, 1]), dict(probs=[0.9, 0.06, 0.04])


@pytest.mark.parametrize(
    'first,second',
    [
        (FEW, MORE),
        (FEW, MORE | dict(ids=None)),
        (MORE, FEW),
        (dict(logprobs={'7': -0.1}), dict(logprobs=[-0.1, -2.36])),
        (
            dict(probs=[[0.9, 0.1]], ids=[[7, 3]]),
            dict(probs=[[0.9, 0.1], [0.9, 0.1]], ids=[[7, 3], None]),
        ),
        (dict(logprobs=[{'7': -0.1}]), dict(logprobs=[{'7': -0.1}, [-0.1, -2.36]])),
    ],
)
@pytest.mark.parametrize('form', ['rows', 'jsonl', 'parquet'])
def test_a_row_without_class_numbers_among_rows_with_them_needs_all_classes(
    first, second, form, tmp_path
):
    import pyarrow as pa, pyarrow.parquet as pq

    rows = source = [dict(key='a') | first, dict(key='b') | second]
    if form == 'jsonl':
        source = lines(tmp_path / 'a.jsonl', rows)
    if form == 'parquet':
        if 'probs' not in first:
            pytest.skip('a column has one type')
        source = tmp_path / 'a.parquet'
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(schema_of(first))), source)
    says = r"\('[ab]'\) has [23] values without class numbers, but n=10: each position must have"
    with pytest.raises(DistillError, match=says):
        opened(source, tmp_path / 'cache', 10)
    assert not (tmp_path / 'cache').exists()


def schema_of(row):
    import pyarrow as pa

    nested = pa.list_ if isinstance(row['probs'][0], list) else lambda o: o
    types = dict(probs=pa.float64(), ids=pa.int64())
    return dict(key=pa.string()) | {k: pa.list_(nested(o)) for k, o in types.items()}


def test_a_row_with_all_classes_among_rows_with_class_numbers(tmp_path):
    p = LOGP[1].exp()
    rows = [dict(key=0, probs=[0.9, 0.05], ids=[3, 1]), dict(key=1, probs=p.tolist())]
    out = outputs(opened(rows, tmp_path / 'cache', C, tail='zero'), [0, 1]).logits
    assert out.ids[0].tolist() == [3, 1]
    assert out.ids[1].tolist() == p.topk(2).indices.tolist()


def test_class_numbers_may_be_in_either_column(tmp_path):
    rows = [dict(key=0, probs=[0.9, 0.05, 0.05], ids=None, token_ids=[2, 0, 1])]
    out = outputs(opened(rows, tmp_path / 'cache', 3), [0]).logits
    torch.testing.assert_close(out.exp(), torch.tensor([[0.05, 0.05, 0.9]]))


# names of classes


@pytest.mark.parametrize(
    'vocab,says',
    [
        (['a', 'b'], 'vocab= has 2 names for 4 classes: pass one for each'),
        ([*'abcde'], 'vocab= has 5 names for 4 classes'),
        ([*'abca'], "vocab= has the name 'a' 2 times: each class needs a unique name"),
    ],
)
@pytest.mark.parametrize('form', ['rows', 'few', 'dataset', 'stream'])
def test_each_class_has_a_name_of_its_own(vocab, says, form, tmp_path):
    at, x = tmp_path / 'cache', torch.eye(3)
    teacher = nn.Linear(3, 4)
    batch = dict(key=[0, 1, 2], inputs=x)
    write = dict(
        rows=lambda v: cache_from(LOGP, at, keys=NAMES, vocab=v),
        few=lambda v: cache_from([dict(key=0, logprobs={'1': -0.1})], at, C, vocab=v),
        dataset=lambda v: cache_dataset(
            Teacher(teacher), TensorDataset(x), at, 0, facts=dict(vocab=v)
        ),
        stream=lambda v: start_stream(at, Teacher(teacher), batch, 'logits', vocab=v),
    )[form]
    with pytest.raises(DistillError, match=says):
        write(vocab)
    assert not at.exists() or not list(at.iterdir())
    write([*'abcd'])
    assert json.loads((at / 'manifest.json').read_text())['vocab'] == [*'abcd']


# files that say something twice


@pytest.mark.parametrize('text', ['{"key":0,"logprobs":{"1":-0.1,"1":-4.0}}', '{"key":0,"key":1}'])
def test_a_name_that_is_twice_in_an_object_is_refused(text, tmp_path):
    (tmp_path / 'a.jsonl').write_text(text)
    with pytest.raises(DistillError, match="a.jsonl, line 1 .* has the name '(1|key)' twice"):
        opened(tmp_path / 'a.jsonl', tmp_path / 'cache', 10)


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('form', ['parquet', 'arrow', 'arrow file', 'npz'])
def test_a_column_that_is_there_twice_is_refused(form, tmp_path):
    import zipfile
    import pyarrow as pa, pyarrow.parquet as pq

    file = tmp_path / f'a.{form.split()[0]}'
    columns = dict(id=NAMES, logprobs=LOGP.tolist(), other=LOGP.flip(1).tolist())
    table = pa.table(columns).rename_columns(['id', 'logprobs', 'logprobs'])
    if form == 'parquet':
        pq.write_table(table, file)
    elif form == 'npz':
        np.savez(file, logprobs=LOGP.numpy())
        with zipfile.ZipFile(file, 'a') as z:
            z.writestr('logprobs.npy', z.read('logprobs.npy'))
    else:
        new = pa.ipc.new_stream if form == 'arrow' else pa.ipc.new_file
        with pa.OSFile(str(file), 'wb') as f, new(f, table.schema) as to:
            to.write_table(table)
    with pytest.raises(DistillError, match=rf"{file.name} has the column 'logprobs' twice"):
        opened(file, tmp_path / 'cache', keys=NAMES)


def test_checksums_of_parquet_are_compared(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq

    file, p = tmp_path / 'a.parquet', LOGITS.double().softmax(1)
    table = pa.table(dict(id=NAMES, probs=p.tolist()))
    pq.write_table(table, file, write_page_checksum=True, use_dictionary=False, compression='none')
    data = bytearray(file.read_bytes())
    at = data.index(p[3, 1].numpy().tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(DistillError, match="a.parquet, row 0 can't be read as .parquet .*CRC"):
        opened(file, tmp_path / 'cache')


@pytest.mark.parametrize('outputs', [None, 3, dict(key=1), b'a.jsonl', object()])
def test_what_can_not_be_rows_is_named(outputs, tmp_path):
    with pytest.raises(DistillError, match='outputs is of type .*: it must be a file, a folder'):
        opened(outputs, tmp_path / 'cache')


def test_too_few_classes_are_named(tmp_path):
    says = r"Row 0 \('a'\) has 3 values without class numbers, but n=2: each position must have"
    with pytest.raises(DistillError, match=says):
        opened([dict(key='a', logits=[0.0, 1.0, 2.0])], tmp_path / 'cache', 2)


ODD = (
    -INF,
    INF,
    NAN,
    -9999.0,
    3.0,
    1e300,
    10**400,
    -1,
    0,
    7,
    2**70,
    '',
    'x',
    '½',
    '\ud800',
    None,
    True,
    [],
    {},
    [[]],
    [None],
    {'1': None},
    {'x': -1.0},
    [-0.1, 'x', None],
    b'x',
    object(),
)


def mutated(o, rng):
    "The same with one thing changed, somewhere in it"
    if isinstance(o, (dict, list)) and len(o) and rng.random() < 0.8:
        o = o.copy()
        k = rng.choice([*(o if isinstance(o, dict) else range(len(o)))])
        change = rng.random()
        if change < 0.15:
            del o[k]
        elif change < 0.25 and isinstance(o, list):
            o.insert(k, o[k])
        elif change < 0.35 and isinstance(o, dict):
            o[rng.choice(['token_id:1', 'x', '50', '2'])] = o.pop(k)
        else:
            o[k] = mutated(o[k], rng)
        return o
    return rng.choice(ODD)


def row_forms():
    lengths = [1 + i % L for i in range(N)]
    dense = {
        k: [dict(key=n, **{k: v}) for n, v in zip(NAMES, t.tolist())]
        for k, t in dict(logprobs=LOGP, logits=LOGITS, probs=LOGP.exp()).items()
    }
    few = [dict(key=n, **dict(zip(('ids', 'logprobs'), top(lp, 3)))) for n, lp in zip(NAMES, LOGP)]
    tokens = {
        k: [dict(key=n, **{k: f(t[:l], 3)}) for n, t, l in zip(NAMES, TOKENS, lengths)]
        for k, f in TOKEN_FORMS.items()
    }
    return [*dense.values(), few, *tokens.values()]


def are_probabilities(cache):
    out = cache.outputs(np.arange(len(cache)))
    p = (
        out.logits.values.exp().sum(-1)
        if isinstance(out.logits, TopK)
        else out.logits.softmax(-1).sum(-1)
    )
    return bool((p.isfinite() & (p < 1.03)).all())


@pytest.mark.parametrize('form', range(8))
def test_a_mutated_row_is_refused_by_name_or_harmless(form, tmp_path):
    import random

    rng, refused = random.Random(form), 0
    rows = row_forms()[form]
    n = V if form > 3 else C
    for i in range(60):
        at = rng.randrange(1, N)
        changed = [*rows[:at], mutated(rows[at], rng), *rows[at + 1 :]]
        source, name = changed, f'Row {at}'
        if i % 2:
            try:
                source, name = lines(tmp_path / 'a.jsonl', changed), f'a.jsonl, line {at + 1}'
            except TypeError:
                pass  # what JSON can't hold
        try:
            cache = opened(
                source, tmp_path / str(i), n, dtype=rng.choice(['float16', 'float32', 'int8'])
            )
        except DistillError as e:
            assert name in str(e)
            refused += 1
        else:
            assert are_probabilities(cache)
    assert refused > 20


def damaged(data, rng):
    data, at = bytearray(data), rng.randrange(len(data))
    change = rng.randrange(5)
    if change == 0:
        del data[at:]
    elif change == 1:
        del data[at : at + rng.randrange(1, 20)]
    elif change == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif change == 3:
        data[at : at + 8] = bytes(len(data[at : at + 8]))
    else:
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize('form', ['jsonl', 'parquet', 'arrow', 'npy', 'npz'])
def test_a_damaged_file_is_refused_by_name_or_harmless(form, tmp_path):
    import random

    rng, kwargs, refused = random.Random(form), {}, 0
    if form == 'arrow':
        file = arrow(tmp_path / 'hub', [(NAMES, LOGP)]) / 'data-00000-of-00002.arrow'
    else:
        file, kwargs = (
            (o := files(tmp_path)[form])['outputs'],
            {k: v for k, v in o.items() if k != 'outputs'},
        )
    whole = file.read_bytes()
    for i in range(100):
        file.write_bytes(damaged(whole, rng))
        try:
            cache = opened(file, tmp_path / 'out' / str(i), **kwargs)
        except DistillError as e:
            assert file.name in str(e)
            refused += 1
        else:
            assert are_probabilities(cache)
    assert refused > 30
