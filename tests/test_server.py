"A teacher behind HTTP, on a local server: batched, retried, limited, resumed; its key is stored nowhere."
import json, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest, torch
from fastdistill import DistillError
from fastdistill.cache import ask_server, cache_from
from fastdistill.cache.keys import keys_of

g = torch.Generator().manual_seed(0)
TABLE = torch.randn(20, 30, generator=g).log_softmax(1)     # a bigram model: the log-probabilities after each token


def answers(prompt):
    "What vLLM answers: the likeliest tokens before each token of the prompt"
    out = [None]
    for token in prompt[:-1]:
        v,i = TABLE[token].topk(4)
        out.append({str(c): dict(logprob=p) for c,p in zip(i.tolist(), v.tolist())})
    return out


@contextmanager
def server(fails=lambda i: None):
    "(url, requests that it got): `fails` says which status the request `i` gets in place of an answer"
    seen,lock = [],threading.Lock()
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            with lock:
                seen.append(dict(body=body, at=time.monotonic(), key=self.headers['Authorization']))
                status = fails(len(seen)-1)
            choices = [dict(index=i, prompt_logprobs=answers(p)) for i,p in enumerate(body.get('prompt', []))]
            self.send_response(status or 200)
            if status == 429: self.send_header('Retry-After', '0')
            self.end_headers()
            text = dict(error=f"no, {self.headers['Authorization']}") if status else dict(choices=choices[::-1], rows=body.get('rows'))
            self.wfile.write(json.dumps(text).encode())
        def log_message(self, *_): pass
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=s.serve_forever)
    thread.start()
    try: yield f'http://127.0.0.1:{s.server_port}/v1/completions',seen
    finally:
        s.shutdown()
        s.server_close()
        thread.join()

@pytest.fixture(autouse=True)
def no_proxy(monkeypatch): monkeypatch.setenv('no_proxy', '127.0.0.1')

SAMPLES = {f'text {i}': torch.randint(20, (3 + i % 3,), generator=g).tolist() for i in range(7)}


def test_answers_become_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret')
    with server() as (url,seen):
        path = ask_server(url, SAMPLES, tmp_path/'a.jsonl', body=dict(model='big', prompt_logprobs=4), key='MY_KEY', bs=3)
    assert len(seen) == 3 and {o['key'] for o in seen} == {'Bearer very-secret'} and all(o['body']['model'] == 'big' for o in seen)
    cache = cache_from(path, tmp_path/'cache', 30, dtype='float32', progress=False)
    out = cache.outputs(cache.find(keys_of(list(SAMPLES))))
    for i,tokens in enumerate(SAMPLES.values()):
        n = len(tokens)-1
        v,ids = TABLE[tokens[:-1]].topk(4)
        assert out.mask[i].tolist() == [1.]*n + [0.]*(5-n) and torch.equal(out.logits.ids[i, :n], ids)
        torch.testing.assert_close(out.logits.values[i, :n], v)
    assert not [f for f in tmp_path.rglob('*') if f.is_file() and b'very-secret' in f.read_bytes()]

def test_errors_that_pass_are_retried(tmp_path):
    with server(lambda i: [429, 503, None][i % 3]) as (url,seen):
        path = ask_server(url, SAMPLES, tmp_path/'a.jsonl', at_once=1, bs=7)
    assert len(seen) == 3 and len(path.read_text().splitlines()) == 7

def test_an_interrupted_run_resumes(tmp_path):
    path = tmp_path/'a.jsonl'
    with server(lambda i: 400 if i >= 3 else None) as (url,seen):
        with pytest.raises(DistillError, match=r'gave no answer \(400: .*The answers so far are kept'): ask_server(url, SAMPLES, path, at_once=1)
        done = path.read_text().splitlines()
        assert len(done) == 3
    path.write_text('\n'.join(done[:2]) + '\n' + done[2][:20])       # killed in the middle of a line
    (tmp_path/'a.request.json').unlink()
    with server() as (url,seen): ask_server(url, SAMPLES, path)
    assert len(seen) == 5
    assert sorted(json.loads(o)['key'] for o in path.read_text().splitlines()) == sorted(SAMPLES)

def test_answers_to_other_requests_are_not_mixed(tmp_path):
    with server() as (url,_):
        ask_server(url, SAMPLES, tmp_path/'a.jsonl', body=dict(model='big'))
        with pytest.raises(DistillError, match='has answers to other requests'): ask_server(url, SAMPLES, tmp_path/'a.jsonl', body=dict(model='small'))

def test_requests_keep_their_distance(tmp_path):
    with server() as (url,seen): ask_server(url, SAMPLES, tmp_path/'a.jsonl', per_second=20)
    times = sorted(o['at'] for o in seen)
    assert times[-1] - times[0] > 6*.05*.8

def test_any_endpoint_of_json(tmp_path):
    with server() as (url,_):
        path = ask_server(url, {k: [.2, .8] for k in SAMPLES}, tmp_path/'a.jsonl', request=lambda parts: dict(rows=parts),
                          answer=lambda r: [dict(probs=p) for p in r['rows']], bs=4)
    cache = cache_from(path, tmp_path/'cache', dtype='float32', progress=False)
    torch.testing.assert_close(cache.outputs([0]).logits.exp(), torch.tensor([[.2, .8]]))

def test_what_can_not_be_asked(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret')
    with pytest.raises(DistillError, match="there is no such variable"): ask_server('http://127.0.0.1:1', SAMPLES, tmp_path/'a.jsonl', key='NO_KEY')
    with pytest.raises(DistillError, match="ends in .jsonl"): ask_server('http://127.0.0.1:1', SAMPLES, tmp_path/'a.json')
    with pytest.raises(DistillError, match='gave no answer .* after 1 tries'): ask_server('http://127.0.0.1:1', SAMPLES, tmp_path/'a.jsonl', retries=0)
    with server(lambda i: 401) as (url,_):
        with pytest.raises(DistillError, match=r'401: .*no, Bearer \*\*\*'): ask_server(url, SAMPLES, tmp_path/'b.jsonl', key='MY_KEY')
    with server() as (url,_):
        with pytest.raises(DistillError, match='gave 1 answers for 7 samples'): ask_server(url, SAMPLES, tmp_path/'c.jsonl', bs=7, answer=lambda r: [{}])
