"A teacher behind HTTP, on a local server: batched, retried, limited, resumed; its key is stored nowhere."

import json, threading, time, traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote
import pytest, torch
from fastdistill import DistillError
from fastdistill.cache import ask_server, cache_from, http_teacher
from fastdistill.cache.keys import keys_of

g = torch.Generator().manual_seed(0)
TABLE = torch.randn(20, 30, generator=g).log_softmax(
    1
)  # a bigram model: the log-probabilities after each token


def answers(prompt):
    "What vLLM answers: the likeliest tokens before each token of the prompt"
    out = [None]
    for token in prompt[:-1]:
        v, i = TABLE[token].topk(4)
        out.append({str(c): dict(logprob=p) for c, p in zip(i.tolist(), v.tolist())})
    return out


@contextmanager
def server(fails=lambda i: None):
    "(url, requests that it got): `fails` says which status the request `i` gets instead of an answer"
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            with lock:
                seen.append(dict(body=body, at=time.monotonic(), key=self.headers['Authorization']))
                status = fails(len(seen) - 1)
            choices = [
                dict(index=i, prompt_logprobs=answers(p))
                for i, p in enumerate(body.get('prompt', []))
            ]
            self.send_response(status or 200)
            if status == 429:
                self.send_header('Retry-After', '0')
            self.end_headers()
            text = (
                dict(error=f'no, {self.headers["Authorization"]}')
                if status
                else dict(choices=choices[::-1], rows=body.get('rows'))
            )
            self.wfile.write(json.dumps(text).encode())

        def log_message(self, *_):
            pass

    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    try:
        yield f'http://127.0.0.1:{s.server_port}/v1/completions', seen
    finally:
        s.shutdown()
        s.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')


@pytest.fixture
def short_waits(monkeypatch):
    "Before another try"
    monkeypatch.setattr(http_teacher, 'LONGEST_WAIT', 0.01)


SAMPLES = {f'text {i}': torch.randint(20, (3 + i % 3,), generator=g).tolist() for i in range(7)}


def test_answers_become_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret')
    with server() as (url, seen):
        path = ask_server(
            url,
            SAMPLES,
            tmp_path / 'a.jsonl',
            body=dict(model='big', prompt_logprobs=4),
            key='MY_KEY',
            bs=3,
        )
    assert (
        len(seen) == 3
        and {o['key'] for o in seen} == {'Bearer very-secret'}
        and all(o['body']['model'] == 'big' for o in seen)
    )
    cache = cache_from(path, tmp_path / 'cache', 30, dtype='float32', progress=False)
    out = cache.outputs(cache.find(keys_of(list(SAMPLES))))
    for i, tokens in enumerate(SAMPLES.values()):
        n = len(tokens) - 1
        v, ids = TABLE[tokens[:-1]].topk(4)
        assert out.mask[i].tolist() == [1.0] * n + [0.0] * (5 - n) and torch.equal(
            out.logits.ids[i, :n], ids
        )
        torch.testing.assert_close(out.logits.values[i, :n], v)
    assert not [f for f in tmp_path.rglob('*') if f.is_file() and b'very-secret' in f.read_bytes()]


def test_errors_that_pass_are_retried(tmp_path, short_waits):
    with server(lambda i: [429, 503, None][i % 3]) as (url, seen):
        path = ask_server(url, SAMPLES, tmp_path / 'a.jsonl', at_once=1, bs=7)
    assert len(seen) == 3 and len(path.read_text().splitlines()) == 7


def test_an_interrupted_run_resumes(tmp_path):
    path = tmp_path / 'a.jsonl'
    with server(lambda i: 400 if i >= 3 else None) as (url, seen):
        with pytest.raises(
            DistillError,
            match=r"gave no answer for sample 'text 3' \(400: .*The answers so far are kept",
        ):
            ask_server(url, SAMPLES, path, at_once=1)
        done = path.read_text().splitlines()
        assert len(done) == 3
    path.write_text('\n'.join(done[:2]) + '\n' + done[2][:20])  # killed in the middle of a line
    (tmp_path / 'a.request.json').unlink()
    with server() as (url, seen):
        ask_server(url, SAMPLES, path)
    assert len(seen) == 5
    assert sorted(json.loads(o)['key'] for o in path.read_text().splitlines()) == sorted(SAMPLES)


def test_answers_to_other_requests_are_not_mixed(tmp_path):
    with server() as (url, _):
        ask_server(url, SAMPLES, tmp_path / 'a.jsonl', body=dict(model='big'))
        with pytest.raises(DistillError, match='contains answers to different requests'):
            ask_server(url, SAMPLES, tmp_path / 'a.jsonl', body=dict(model='small'))


def rows_of_request(model='big', scale=1.0):
    "The functions of an endpoint; what they read from their surroundings differs"
    return dict(
        request=lambda parts: dict(model=model, rows=parts),
        answer=lambda r: [dict(probs=[scale * v for v in p]) for p in r['rows']],
    )


@pytest.mark.parametrize(
    'change,says',
    [
        (rows_of_request('small'), 'request= has changed'),
        (rows_of_request(scale=0.5), 'answer= has changed'),
        (dict(answer=None), 'request= and answer= has changed'),
        (dict(rows_of_request(), answer=lambda r: r['rows']), 'answer= has changed'),
    ],
)
def test_answers_of_other_functions_are_not_mixed(change, says, tmp_path):
    path, samples = tmp_path / 'a.jsonl', {k: [0.2, 0.8] for k in SAMPLES}
    with server() as (url, seen):
        ask_server(url, dict([*samples.items()][:3]), path, **rows_of_request())
        with pytest.raises(DistillError, match=f'contains answers to different requests: {says}'):
            ask_server(url, samples, path, **change)
        assert len(seen) == 3
        ask_server(
            url, samples, path, at_once=1, **rows_of_request()
        )  # the same functions in another line
        assert len(seen) == 7


def test_requests_keep_their_distance(tmp_path):
    with server() as (url, seen):
        ask_server(url, SAMPLES, tmp_path / 'a.jsonl', per_second=20)
    times = sorted(o['at'] for o in seen)
    assert times[-1] - times[0] > 6 * 0.05 * 0.8


def test_any_endpoint_of_json(tmp_path):
    with server() as (url, _):
        path = ask_server(
            url,
            {k: [0.2, 0.8] for k in SAMPLES},
            tmp_path / 'a.jsonl',
            request=lambda parts: dict(rows=parts),
            answer=lambda r: [dict(probs=p) for p in r['rows']],
            bs=4,
        )
    cache = cache_from(path, tmp_path / 'cache', dtype='float32', progress=False)
    torch.testing.assert_close(cache.outputs([0]).logits.exp(), torch.tensor([[0.2, 0.8]]))


def test_what_can_not_be_asked(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret')
    with pytest.raises(DistillError, match='there is no such variable'):
        ask_server('http://127.0.0.1:1', SAMPLES, tmp_path / 'a.jsonl', key='NO_KEY')
    with pytest.raises(DistillError, match='must end in .jsonl'):
        ask_server('http://127.0.0.1:1', SAMPLES, tmp_path / 'a.json')
    with pytest.raises(DistillError, match='gave no answer .* after 1 tries'):
        ask_server('http://127.0.0.1:1', SAMPLES, tmp_path / 'a.jsonl', retries=0)
    with server(lambda i: 401) as (url, _):
        with pytest.raises(DistillError, match=r'401: .*no, Bearer \*\*\*'):
            ask_server(url, SAMPLES, tmp_path / 'b.jsonl', key='MY_KEY')
    with server() as (url, _):
        with pytest.raises(DistillError, match='gave 1 answers for 7 samples'):
            ask_server(url, SAMPLES, tmp_path / 'c.jsonl', bs=7, answer=lambda r: [{}])


# what a server may do wrong


@contextmanager
def raw_server(reply):
    "(host and port, requests): `reply(i)` is what the request `i` gets, byte by byte, status line included"
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers['Content-Length'] or 0))
            with lock:
                seen.append(
                    dict(
                        body=body,
                        headers=dict(self.headers),
                        method=self.command,
                        at=time.monotonic(),
                    )
                )
                i = len(seen) - 1
            self.wfile.write(reply(i))
            self.close_connection = True

        do_GET = do_POST

        def log_message(self, *_):
            pass

    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    try:
        yield f'127.0.0.1:{s.server_port}', seen
    finally:
        s.shutdown()
        s.server_close()
        thread.join()


GOOD = json.dumps(dict(choices=[dict(index=0, prompt_logprobs=[None, {'1': -0.1}])])).encode()


def whole(body, status='200 OK', **headers):
    lines = [
        f'HTTP/1.0 {status}',
        *(f'{k.replace("_", "-")}: {v}' for k, v in headers.items()),
        f'Content-Length: {len(body)}',
        '',
        '',
    ]
    return '\r\n'.join(lines).encode() + body


def everything_in(folder):
    return b''.join(p.read_bytes() for p in folder.rglob('*') if p.is_file())


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_a_key_is_not_sent_to_the_server_that_a_redirect_names(status, tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret')
    with raw_server(lambda i: whole(GOOD)) as (other, stolen):
        with raw_server(
            lambda i: whole(b'', f'{status} Moved', Location=f'http://{other}/v1?token=x')
        ) as (first, _):
            with pytest.raises(
                DistillError,
                match=rf"for sample 'a' \({status}: it redirects to http://{other}/v1. Redirects are not followed",
            ):
                ask_server(f'http://{first}/v1', dict(a=1), tmp_path / 'a.jsonl', key='MY_KEY')
    assert stolen == []
    assert (tmp_path / 'a.jsonl').read_text() == ''
    assert b'very-secret' not in everything_in(tmp_path)


def test_no_redirect_is_followed_without_a_key_either(tmp_path):
    with raw_server(
        lambda i: whole(b'', '307 Moved', Location='/v2') if i == 0 else whole(GOOD)
    ) as (host, seen):
        with pytest.raises(DistillError, match='307: it redirects to /v2'):
            ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl')
    assert len(seen) == 1


@pytest.mark.parametrize(
    'cut',
    [
        whole(GOOD)[:-20],
        b'HTTP/1.0 200 OK\r\n\r\n' + GOOD[:-20],
        b'HTTP/1.0 200 OK\r\n\r\n',
        b'HTTP/1.0 2',
        b'',
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{"choi',
        whole(b'overloaded', '503 Busy')[:-5],
    ],
    ids=[
        'shorter than it says',
        'JSON that ends early',
        'empty',
        'half a status',
        'closed',
        'half a chunk',
        'half an error',
    ],
)
def test_an_answer_that_was_cut_off_is_asked_for_again(cut, tmp_path, short_waits):
    with raw_server(lambda i: whole(GOOD) if i else cut) as (host, seen):
        path = ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl')
    assert len(seen) == 2
    assert json.loads(path.read_text()) == dict(prompt_logprobs=[None, {'1': -0.1}], key='a')


def test_an_answer_that_would_fill_the_memory_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(http_teacher, 'MAX_MANIFEST', 100)
    with (
        server() as (url, seen),
        pytest.raises(DistillError, match="'a' .the answer has more than 100 bytes: request fewer"),
    ):
        ask_server(url, dict(a=[1, 2, 3, 4]), tmp_path / 'a.jsonl', body={})
    assert len(seen) == 1


def test_an_answer_of_another_kind_is_not_asked_for_again(tmp_path):
    with raw_server(lambda i: whole(b'<html>log in</html>')) as (host, seen):
        with pytest.raises(
            DistillError, match="gave no answer for sample 'a' .the answer is not JSON"
        ):
            ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl')
    assert len(seen) == 1


@pytest.mark.parametrize('after', ['3600', '9' * 400, 'Fri, 31 Dec 2100 23:59:59 GMT'])
def test_a_wait_has_a_limit_and_is_shown(after, tmp_path, monkeypatch, capsys):
    import fastdistill.cache.http_teacher as module

    monkeypatch.setattr(module, 'LONGEST_WAIT', 1)
    begin = time.monotonic()
    with raw_server(
        lambda i: whole(GOOD) if i else whole(b'slow down', '429 Too Many', Retry_After=after)
    ) as (host, seen):
        ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl')
    assert 1 <= seen[1]['at'] - seen[0]['at'] < 5
    assert time.monotonic() - begin < 6
    shown = capsys.readouterr().err
    assert f'http://{host}/v1: 429: slow down; waiting for 1 s (the server asks for ' in shown
    assert shown.count('waiting') == 1


@pytest.mark.parametrize('after', ['soon', '-5', '²', ''])
def test_a_wait_that_makes_no_sense_is_not_waited_for(after, tmp_path, short_waits):
    bad = f'HTTP/1.0 429 Too Many\r\nRetry-After: {after}\r\n\r\n'.encode('latin-1')
    with raw_server(lambda i: whole(GOOD) if i else bad) as (host, seen):
        ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl')
    assert len(seen) == 2


def test_all_requests_wait_when_the_server_asks_one_to(tmp_path):
    with raw_server(
        lambda i: whole(b'', '429 Too Many', Retry_After='1') if i == 0 else whole(GOOD)
    ) as (host, seen):
        ask_server(
            f'http://{host}/v1', {str(i): i for i in range(6)}, tmp_path / 'a.jsonl', at_once=1
        )
    assert seen[1]['at'] - seen[0]['at'] >= 0.99


def test_a_second_writer_of_the_same_file_is_refused(tmp_path):
    go, inside = threading.Event(), threading.Event()

    def slow(i):
        inside.set()
        assert go.wait(30)
        return whole(GOOD)

    with raw_server(slow) as (host, _), ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask_server, f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl')
        assert inside.wait(30)
        try:
            with pytest.raises(
                DistillError,
                match='Another process is writing to .*a.jsonl: wait for it, or choose a different file',
            ):
                ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl')
        finally:
            go.set()
        first.result()
    assert len((tmp_path / 'a.jsonl').read_text().splitlines()) == 1


def test_answers_that_came_before_another_failed_are_kept(tmp_path):
    late = threading.Event()

    def reply(i):
        if i == 0:
            late.set()
            time.sleep(0.3)
            return whole(GOOD)
        assert late.wait(30)
        return whole(b'no', '400 Bad')

    with raw_server(reply) as (host, _):
        with pytest.raises(DistillError, match='400: no'):
            ask_server(f'http://{host}/v1', dict(a=1, b=2), tmp_path / 'a.jsonl', at_once=2)
    assert len((tmp_path / 'a.jsonl').read_text().splitlines()) == 1


def test_a_key_that_a_server_repeats_is_not_stored_or_shown(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret')
    echo = json.dumps(
        dict(choices=[dict(index=0, logprobs=[-0.1], prompt_logprobs=['Bearer very-secret'])])
    ).encode()
    with raw_server(lambda i: whole(echo)) as (host, _):
        ask_server(
            f'http://{host}/v1',
            dict(a=1),
            tmp_path / 'a.jsonl',
            key='MY_KEY',
            body=dict(api_key='very-secret'),
        )
    assert b'very-secret' not in everything_in(tmp_path)
    assert b'Bearer ***' in (tmp_path / 'a.jsonl').read_bytes()


def test_a_key_that_is_not_a_secret_changes_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', '1')
    with raw_server(lambda i: whole(GOOD)) as (host, _):
        path = ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl', key='MY_KEY')
    assert json.loads(path.read_text()) == dict(prompt_logprobs=[None, {'1': -0.1}], key='a')


def test_a_key_is_in_no_frame_of_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret')
    long = b'x' * 495 + b'very-secret'  # the end of what is shown is in the middle of it
    with raw_server(lambda i: whole(long, '400 Bad')) as (host, _):
        url = f'http://{host}/v1?api_key=very-secret'
        with pytest.raises(DistillError) as caught:
            ask_server(url, dict(a=1), tmp_path / 'a.jsonl', key='MY_KEY')
    error = caught.value
    assert 'very' not in str(error)
    while error is not None:
        frame = error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename != __file__:
                assert 'very-secret' not in repr(frame.tb_frame.f_locals)
            frame = frame.tb_next
        error = error.__context__


@pytest.mark.parametrize(
    'said',
    [r'very\/secret+=&quot', r'very/secret\u002B=&quot', 'very/secret+=&amp;quot'],
    ids=['PHP', '.NET', 'HTML'],
)
def test_a_key_that_an_error_page_escapes_is_not_shown(said, tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very/secret+=&quot')
    with raw_server(lambda i: whole(f'wrong key {said}.'.encode(), '401 No')) as (host, _):
        with pytest.raises(DistillError, match=r'401: wrong key \*\*\*\.'):
            ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl', key='MY_KEY')


@pytest.mark.parametrize(
    'key,says',
    [
        ('', "'MY_KEY' is empty"),
        ('very secret', "'MY_KEY' has spaces, line breaks"),
        ('very-secret\nX: y', 'has spaces, line breaks'),
        ('sécret', 'characters beyond ASCII'),
    ],
)
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(
    key, says, tmp_path, monkeypatch
):
    monkeypatch.setenv('MY_KEY', key)
    with pytest.raises(DistillError, match=says) as caught:
        ask_server('http://127.0.0.1:1', SAMPLES, tmp_path / 'a.jsonl', key='MY_KEY')
    assert not key or key not in str(caught.value)


def test_a_line_break_behind_a_key_is_not_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret\n')
    with raw_server(lambda i: whole(GOOD)) as (host, seen):
        ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl', key='MY_KEY')
    assert seen[0]['headers']['Authorization'] == 'Bearer very-secret'


def test_what_is_behind_the_question_mark_of_a_url_is_not_stored_or_shown(tmp_path):
    with raw_server(lambda i: whole(b'no', '400 Bad') if i else whole(GOOD)) as (host, _):
        ask_server(f'http://{host}/v1?key=very-secret', dict(a=1), tmp_path / 'a.jsonl')
        with pytest.raises(DistillError) as caught:
            ask_server(f'http://{host}/v1?key=very-secret', dict(b=1), tmp_path / 'b.jsonl')
    assert 'very-secret' not in str(caught.value)
    assert b'very-secret' not in everything_in(tmp_path)


@pytest.mark.parametrize(
    'query',
    ['very-secret', 'key=very-secret', 'a=1&key=very%2Dsecret', 'key=very-secret&b=%C3%A4+%2F%20x'],
)
@pytest.mark.parametrize('form', ['raw', 'decoded', 'encoded', 'in JSON'])
def test_a_query_that_a_server_repeats_is_not_stored_or_shown(query, form, tmp_path):
    said = dict(
        raw=query,
        decoded=unquote(query),
        encoded=quote(unquote(query), safe=''),
    ).get(form, json.dumps(unquote(query))[1:-1])
    choice = dict(index=0, logprobs=[-0.1], prompt_logprobs=[f'POST /v1?{said}', {said: 1}])
    answer = json.dumps(dict(choices=[choice], said=said)).encode()
    cut = 'x' * 75  # the end of what is shown is in the middle of it
    mistakes = (
        lambda o: o[o['said']],
        lambda o: [o['said']],
        lambda o: cut + o['said'],
        lambda o: [dict(a=o['said']), dict(b=1)],
    )
    with raw_server(lambda i: whole(answer)) as (host, _):
        ask_server(f'http://{host}/v1?{query}', dict(a=1), tmp_path / 'a.jsonl')
        errors = [asked(host, query, tmp_path / f'{i}.jsonl', f) for i, f in enumerate(mistakes)]
    for reply in (
        lambda i: whole(f'{"x" * 490}?{said}'.encode(), '400 Bad'),
        lambda i: whole(f'no {said}'.encode()),
        lambda i: whole(b'', f'302 Found\r\nLocation: /a#{said}'),
        lambda i: whole(b'', f'302 Found\r\nLocation: /a/{said}'),
    ):
        with raw_server(reply) as (host, _):
            errors.append(asked(host, query, tmp_path / 'b.jsonl', None))
    for text in ['secret', 'very'] if 'ecret' in said else [said]:
        assert text.encode() not in everything_in(tmp_path)
        for error in errors:
            assert text not in error
    assert b'***' in everything_in(tmp_path)


def asked(host, query, path, answer):
    "The error of a request, with all its causes"
    url = f'http://{host}/v1?{query}'
    with pytest.raises(DistillError) as caught:
        ask_server(url, dict(a=1), path, answer=answer, retries=0)
    return ''.join(traceback.format_exception(caught.value, limit=0))


def test_a_short_value_in_a_query_and_a_number_change_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', '12345678')
    row = dict(prompt_logprobs=[None, {'1': -0.123456789}], text='v1, fast')
    with raw_server(lambda i: whole(json.dumps(row).encode())) as (host, _):
        path = ask_server(
            f'http://{host}/v1?api=v1&mode=fast&seed=23456789',
            {'12345678': 1},
            tmp_path / 'a.jsonl',
            key='MY_KEY',
            answer=lambda o: [o],
        )
    assert json.loads(path.read_text()) == row | dict(key='12345678')


@pytest.mark.parametrize(
    'url',
    [
        'file:///etc/passwd',
        'ftp://a/b',
        'localhost:8000/v1',
        'http://',
        'http://a b/',
        'http://a\n/',
        'http://a:99999999/',
        'http://a..b/',
        '',
        3,
    ],
)
def test_what_is_not_an_endpoint_is_refused(url, tmp_path):
    with pytest.raises(
        DistillError, match='url= must be the http:// or https:// address of an endpoint'
    ):
        ask_server(url, SAMPLES, tmp_path / 'a.jsonl')


def test_a_password_in_a_url_is_refused_without_being_shown(tmp_path):
    with pytest.raises(DistillError, match='url= has a user name or a password') as caught:
        ask_server('http://me:very-secret@127.0.0.1:1/', SAMPLES, tmp_path / 'a.jsonl')
    assert 'very-secret' not in str(caught.value)


@pytest.mark.parametrize(
    'response,kwargs,says',
    [
        (
            dict(choices=3),
            {},
            "The answer for sample 'a': there is no list 'choices' .it has: choices",
        ),
        ([], {}, "The answer for sample 'a': there is no list 'choices' .it has: list"),
        (dict(choices=['x']), {}, "The answer for sample 'a': AttributeError"),
        (
            dict(choices=[dict(index=0, text='Paris')]),
            {},
            "The answer for sample 'a': a choice has neither 'prompt_logprobs' nor 'logprobs': request them in body=",
        ),
        (
            dict(choices=[dict(index=3, logprobs=[0])]),
            {},
            r"The answer for sample 'a': the choices have the indices \[3\]",
        ),
        ({}, dict(answer=lambda r: r['probs']), "The answer for sample 'a': KeyError: 'probs'"),
        (
            {},
            dict(answer=lambda r: 3),
            "The answer for sample 'a': answer= returned 3: it must return a list with a dict for each sample",
        ),
        (
            {},
            dict(answer=lambda r: [3]),
            "The answer for sample 'a': answer= returned .3.: it must return",
        ),
        ({}, dict(answer=lambda r: [dict(x=object())]), "The answer for sample 'a': TypeError"),
        ({}, dict(request=lambda parts: dict(x=object())), "request= for sample 'a': TypeError"),
    ],
)
def test_an_answer_that_can_not_be_used_names_its_sample(response, kwargs, says, tmp_path):
    with raw_server(lambda i: whole(json.dumps(response).encode())) as (host, _):
        with pytest.raises(DistillError, match=says):
            ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl', **kwargs)


@pytest.mark.parametrize(
    'samples,kwargs,says',
    [
        (['a'], {}, 'samples is of type list: it must be a dict'),
        ({('a', 1): 2}, {}, r"The sample's name \('a', 1\) is of type tuple"),
        (dict(a=1), dict(bs=0), 'bs=0: must be a whole number of at least 1'),
        (dict(a=1), dict(at_once=0), 'at_once=0: must be'),
        (dict(a=1), dict(per_second=float('nan')), 'per_second=nan: it must be a number from'),
        (dict(a=1), dict(per_second='3'), "per_second='3': it must be a number from"),
        (dict(a=1), dict(timeout='3'), "timeout='3': it must be a number from"),
        (dict(a=1), dict(timeout=1e20), 'timeout=1e.20: it must be a number from'),
        (dict(a=1), dict(key=5), 'key= is the name of an environment variable'),
    ],
)
def test_arguments_are_checked_before_anything_is_asked(samples, kwargs, says, tmp_path):
    with pytest.raises(DistillError, match=says):
        ask_server('http://127.0.0.1:1', samples, tmp_path / 'a.jsonl', **kwargs)


@pytest.mark.parametrize(
    'head,body',
    [
        (b'Content-Length: 99999999999999999999', b'{}'),
        (b'Transfer-Encoding: chunked', b'ffffffffffffffff\r\n{}'),
        (b'Transfer-Encoding: chunked', b'-5\r\n{}'),
    ],
)
def test_a_length_that_no_answer_can_have_is_an_error_that_passes(
    head, body, tmp_path, short_waits
):
    reply = b'HTTP/1.1 200 OK\r\n' + head + b'\r\n\r\n' + body
    with raw_server(lambda i: whole(GOOD) if i else reply) as (host, _):
        path = ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl', retries=1)
    assert json.loads(path.read_text())['key'] == 'a'


@pytest.mark.parametrize(
    'response',
    [
        {'Bearer very-secret \x1b[31m': 1},
        dict(choices=[dict(index='very-secret \x1b[31m', logprobs=[0])]),
    ],
)
def test_a_key_in_an_answer_that_can_not_be_used_is_not_shown(response, tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'very-secret')
    with raw_server(lambda i: whole(json.dumps(response).encode())) as (host, _):
        with pytest.raises(DistillError, match=r'\*\*\*') as caught:
            ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl', key='MY_KEY')
    shown = ''.join(traceback.format_exception(caught.value))
    assert 'very-secret' not in shown
    assert '\x1b' not in shown


def test_a_key_that_is_given_instead_of_its_variable_is_not_shown(tmp_path):
    with pytest.raises(DistillError, match='key= is the name of an environment') as caught:
        ask_server('http://127.0.0.1:1', dict(a=1), tmp_path / 'a.jsonl', key='very' + '-secret')
    assert 'very-secret' not in str(caught.value)


def test_what_a_server_says_does_not_control_the_terminal(tmp_path, capsys):
    busy = whole(b'\x1b[31m wait', '429 Busy').replace(b'\r\n', b'\r\nRetry-After: 1\r\n', 1)
    with raw_server(lambda i: whole(GOOD) if i else busy) as (host, _):
        ask_server(f'http://{host}/v1', dict(a=1), tmp_path / 'a.jsonl')
    shown = capsys.readouterr().err
    assert 'waiting for 1 s' in shown
    assert '\x1b' not in shown


@pytest.mark.parametrize(
    'text', ['{"text": 1}\n{"text": 2}', '{"text": 1}', '[\n1]', '{"text": 1}\nend']
)
def test_a_file_of_something_else_loses_nothing(text, tmp_path):
    (tmp_path / 'a.jsonl').write_text(text)
    with pytest.raises(DistillError, match="is not an answer with a 'key'"):
        ask_server('http://127.0.0.1:1', dict(a=1), tmp_path / 'a.jsonl')
    assert (tmp_path / 'a.jsonl').read_text() == text


def test_a_whole_last_line_without_a_line_break_is_kept(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"x": 1, "key": "a"}')
    with raw_server(lambda i: whole(GOOD)) as (host, seen):
        ask_server(f'http://{host}/v1', dict(a=1, b=2), tmp_path / 'a.jsonl')
    lines = [json.loads(o) for o in (tmp_path / 'a.jsonl').read_text().splitlines()]
    assert [o['key'] for o in lines] == ['a', 'b']
    assert lines[0]['x'] == 1


def test_a_different_sample_of_the_same_name_does_not_get_the_old_answer(tmp_path):
    path = tmp_path / 'a.jsonl'
    with raw_server(lambda i: whole(GOOD)) as (host, _):
        url = f'http://{host}/v1'
        ask_server(url, {'a': 'one', 1: 'x'}, path)
        ask_server(url, {'a': 'one', 'b': 'two'}, path)  # more samples
        kept = path.read_bytes()
        with pytest.raises(
            DistillError, match="contains the answer for sample 'a', but something d"
        ):
            ask_server(url, {'a': 'changed', 'b': 'two'}, path)
        with pytest.raises(DistillError, match='contains the answer for sample 1, but something d'):
            ask_server(url, {1: 'y', '1': 'x'}, path)
    assert path.read_bytes() == kept


def test_a_line_of_another_kind_in_the_file_is_named(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"key": "a"}\n{"no": 1}\n')
    with pytest.raises(DistillError, match="a.jsonl, line 2 is not an answer with a 'key'"):
        ask_server('http://127.0.0.1:1', dict(a=1), tmp_path / 'a.jsonl')
    (tmp_path / 'a.request.json').write_text('{"url')
    with pytest.raises(DistillError, match='a.request.json is damaged'):
        ask_server('http://127.0.0.1:1', dict(a=1), tmp_path / 'a.jsonl')
