"Outputs that other programs computed become a cache."
import json
import numpy as np
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastdistill import DistillError, Distiller, Outputs, kd, losses, soft_labels
from fastdistill.cache import Replayed, TeacherCache, cache_from
from fastdistill.cache.keys import keys_of
from fastdistill.outputs import TopK

g = torch.Generator().manual_seed(0)
N,C,L,V = 7,4,5,50
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

def outputs(cache, names=NAMES): return cache.outputs(cache.find(keys_of(names)))

def top(t, k):
    v,i = t.topk(k)
    return i.tolist(),v.tolist()


# classes

def files(tmp_path):
    "The same outputs in every form"
    import pyarrow as pa, pyarrow.parquet as pq
    lp = LOGP.tolist()
    np.save(tmp_path/'a.npy', LOGP.numpy())
    np.savez(tmp_path/'a.npz', logits=LOGITS.numpy(), key=np.array(NAMES))
    pq.write_table(pa.table(dict(id=NAMES, probs=LOGP.exp().tolist())), tmp_path/'a.parquet', row_group_size=3)
    shuffled = [[2, 0, 3, 1] for _ in range(N)]
    return dict(npy=dict(outputs=tmp_path/'a.npy', keys=NAMES), npz=dict(outputs=tmp_path/'a.npz'), parquet=dict(outputs=tmp_path/'a.parquet'),
                array=dict(outputs=LOGP.numpy(), keys=NAMES), tensor=dict(outputs=LOGP, keys=NAMES),
                jsonl=dict(outputs=lines(tmp_path/'a.jsonl', [dict(key=k, logprobs=v) for k,v in zip(NAMES, lp)])),
                named=dict(outputs=[dict(key=k, logprobs={str(i): x for i,x in enumerate(v)}) for k,v in zip(NAMES, lp)], n=C),
                ids=dict(outputs=[dict(image=k, ids=i, lp=[v[j] for j in i]) for k,v,i in zip(NAMES, lp, shuffled)], n=C, value='lp', keys='image'))

def arrow(folder, parts):
    "A folder as `Dataset.save_to_disk` of Hugging Face writes it: files of Arrow's stream format"
    import pyarrow as pa
    folder.mkdir()
    (folder/'state.json').write_text('{}')
    for i,(names,lp) in enumerate(parts):
        table = pa.table(dict(id=names, logprobs=lp.tolist()))
        with pa.OSFile(str(folder/f'data-{i:05}-of-00002.arrow'), 'wb') as f, pa.ipc.new_stream(f, table.schema) as to: to.write_table(table, max_chunksize=2)
    return folder

class Rows(list):
    "What is used of a `datasets.Dataset`"
    column_names = ['id', 'logprobs']

def test_a_column_of_a_dataset_of_hugging_face(tmp_path):
    folder = arrow(tmp_path/'hub', [(NAMES[:3], LOGP[:3]), (NAMES[3:], LOGP[3:])])
    torch.testing.assert_close(outputs(opened(folder, tmp_path/'a')).logits, LOGP)
    rows = Rows(dict(id=k, logprobs=v) for k,v in zip(NAMES, LOGP.tolist()))
    torch.testing.assert_close(outputs(opened(rows, tmp_path/'b')).logits, LOGP)
    with pytest.raises(DistillError, match='teacher, weights'): opened(Rows(rows[:-1] + [dict(rows[-1], logprobs=rows[0]['logprobs'])]), tmp_path/'b')
    (tmp_path/'both'/'train').mkdir(parents=True)
    (tmp_path/'both'/'dataset_dict.json').write_text('{}')
    with pytest.raises(DistillError, match=r'has several splits \(train\): give one'): opened(tmp_path/'both', tmp_path/'c')
    class Splits(dict): column_names = {}
    with pytest.raises(DistillError, match=r'several splits \(train\): give one, as in dataset'): opened(Splits(train=rows), tmp_path/'c')
    class Stream: column_names = ['id']
    with pytest.raises(DistillError, match='A stream of rows has no length'): opened(Stream(), tmp_path/'c')

@pytest.mark.parametrize('form', ['npy', 'npz', 'parquet', 'array', 'tensor', 'jsonl', 'named', 'ids'])
def test_all_classes_in_every_form(form, tmp_path):
    out = outputs(opened(path=tmp_path/'cache', bs=3, **files(tmp_path)[form])).logits
    torch.testing.assert_close(out.log_softmax(1), LOGP, atol=1e-5, rtol=1e-5)

def test_a_folder_of_files_is_one_table(tmp_path):
    rows = [dict(key=k, logprobs=v) for k,v in zip(NAMES, LOGP.tolist())]
    (tmp_path/'parts').mkdir()
    lines(tmp_path/'parts'/'0.jsonl', rows[:3])
    lines(tmp_path/'parts'/'1.jsonl', rows[3:])
    torch.testing.assert_close(outputs(opened(tmp_path/'parts', tmp_path/'cache')).logits, LOGP)

@pytest.mark.parametrize('tail', ['uniform', 'zero', 'bucket'])
def test_the_likeliest_classes_keep_their_probabilities(tail, tmp_path):
    rows = [dict(key=k, **dict(zip(('ids', 'logprobs'), top(lp, 2 + i % 2)))) for i,(k,lp) in enumerate(zip(NAMES, LOGP))]
    out = outputs(opened(lines(tmp_path/'a.jsonl', rows), tmp_path/'cache', C, tail=tail)).logits
    v,ids = LOGP.topk(2)        # as many as every row has
    assert isinstance(out, TopK) and torch.equal(out.ids, ids)
    torch.testing.assert_close(out.values, v)
    student = torch.randn(N, C, generator=g)
    torch.testing.assert_close(out.dense(student), TopK(ids, v, C, tail).dense(student))

def test_logits_are_normalized_before_the_likeliest_are_taken(tmp_path):
    out = outputs(opened(LOGITS, tmp_path/'cache', keys=NAMES, given='logits', topk=2)).logits
    torch.testing.assert_close(out.values, LOGP.topk(2).values)

def test_a_student_trains_from_them(tmp_path):
    x,y = torch.randn(N, 6, generator=g),torch.randint(C, (N,), generator=g)
    data,student = TensorDataset(x, y),nn.Linear(6, C)
    cache = opened(LOGP, tmp_path/'cache', keys=NAMES)
    (xb,yb,rows), = DataLoader(Replayed(data, cache, keys=NAMES), batch_size=N)
    d = Distiller(student, None, kd(2., 1.))
    torch.testing.assert_close(d.compute(Outputs(student(xb)), cache.decode(rows), None, (yb,)).total, losses.kl(student(x), LOGP, T=2.))

def test_files_are_found_below_their_folder(tmp_path):
    from pathlib import Path
    cache = opened([dict(path=f'a/{i}.png', logprobs=v) for i,v in enumerate(LOGP.tolist())], tmp_path/'cache', root='/data/pictures')
    assert cache.find(keys_of([Path('/data/pictures/a/3.png')], '/data/pictures')).tolist() == [3]


# tokens

def vllm(t, k): return [None, *({str(i): dict(logprob=v, rank=j, decoded_token='x') for j,(i,v) in enumerate(zip(*top(p, k)))} for p in t)]
def sglang(t, k): return [None, *([[v, i, None] for i,v in zip(*top(p, k))] for p in t)]
def openai(t, k): return dict(content=[dict(token=f'token_id:{top(p, 1)[0][0]}', logprob=0., top_logprobs=[
    dict(token=f'token_id:{i}', logprob=v) for i,v in zip(*top(p, k))]) for p in t])
def plain(t, k): return [dict(zip(map(str, (o := top(p, k))[0]), o[1])) for p in t]
TOKEN_FORMS = dict(prompt_logprobs=vllm, input_top_logprobs=sglang, logprobs=openai, top_logprobs=plain)

@pytest.mark.parametrize('value', TOKEN_FORMS)
def test_tokens_of_texts_of_any_length(value, tmp_path):
    lengths = [1 + i % L for i in range(N)]
    lengths[-1] = L
    rows = [dict(id=k, **{value: TOKEN_FORMS[value](t[:n], 3)}) for k,t,n in zip(NAMES, TOKENS, lengths)]
    out = outputs(opened(lines(tmp_path/'a.jsonl', rows), tmp_path/'cache', V, bs=2))
    v,ids = TOKENS.topk(3)
    size = L + (value in ('prompt_logprobs', 'input_top_logprobs'))      # the last position predicts a token that is not there
    assert out.mask.shape == (N, size)
    for i,n in enumerate(lengths):
        assert out.mask[i].tolist() == [1.]*n + [0.]*(size-n)
        assert torch.equal(out.logits.ids[i, :n], ids[i, :n])
        torch.testing.assert_close(out.logits.values[i, :n], v[i, :n])

def test_a_loss_of_tokens_counts_those_that_are_there(tmp_path):
    lengths = [1 + i % L for i in range(N)]
    rows = [dict(id=k, logprobs=t[:n].tolist()) for k,t,n in zip(NAMES, TOKENS, lengths)]
    cache,s = opened(rows, tmp_path/'cache', length=L),torch.randn(N, L, V, generator=g)
    got = Distiller(None, None, soft_labels(T=1.), axis=-1).compute(Outputs(s), outputs(cache)).total
    each = [losses.kl(s[i, :n], TOKENS[i, :n], T=1., reduction='none') for i,n in enumerate(lengths)]
    torch.testing.assert_close(got, torch.cat(each).mean())


# mistakes

@pytest.mark.parametrize('rows,kwargs,says', [
    ([dict(key='a', out=[0., 1.])], {}, "No column 'logprobs' with outputs; the first row has key, out. Name it with value="),
    ([dict(name='a', logprobs=[0., 1.])], {}, "No column 'key' with the samples' names; the first row has name, logprobs"),
    ([dict(key='a', logits=[0., 1.])]*2, {}, 'Two of the 2 rows have the same name'),
    ([dict(key='a', logprobs=[0., 1.])], {}, r"Row 0: the probabilities sum to 3.72, .* Say given='logits'"),
    ([dict(key='a', logprobs={'1': -.1})], {}, 'give n=, the number of all classes'),
    ([dict(key='a', logprobs={'7': -.1})], dict(n=5), 'Row 0 has the classes 7: they must differ, and be from 0 to 4'),
    ([dict(key='a', logprobs={'cat': -.1})], dict(n=5), "Row 0 has the class 'cat', which is no number"),
    ([dict(key='a', logprobs=[-.1, -9.]), dict(key='b', logprobs=[-.1])], {}, 'The positions have 1 to 2 classes'),
    ([dict(key='a', logprobs={'1': -.1, '2': -3})], dict(n=5, topk=3), 'topk=3, but some positions have 2 classes alone'),
    ([dict(key='a', logprobs={'1': -.1})], dict(n=5, tail='mean'), "tail='mean' needs the log-probabilities of all classes"),
    ([], {}, 'There are no rows')])
def test_what_is_no_table_of_outputs(rows, kwargs, says, tmp_path):
    with pytest.raises(DistillError, match=says): opened(rows, tmp_path/'cache', **kwargs)

def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(DistillError, match='There is no file'): opened(tmp_path/'no.jsonl', tmp_path/'cache')
    (tmp_path/'a.txt').write_text('')
    with pytest.raises(DistillError, match='possible are files that end in .jsonl, .parquet'): opened(tmp_path/'a.txt', tmp_path/'cache')
    (tmp_path/'a.jsonl').write_text('{"key": 1, "logprobs": [0.0]}\n{"key"')
    with pytest.raises(DistillError, match='a.jsonl, line 2 is no JSON'): opened(tmp_path/'a.jsonl', tmp_path/'cache')

def test_another_teachers_outputs_are_refused(tmp_path):
    opened(LOGP, tmp_path/'cache', keys=NAMES)
    opened(LOGP, tmp_path/'cache', keys=NAMES)       # the same ones are there already
    with pytest.raises(DistillError, match='teacher, weights'): opened(LOGP.flip(1), tmp_path/'cache', keys=NAMES)
