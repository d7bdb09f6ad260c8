"A teacher behind HTTP: its answers in a file of JSON lines, of which `cache_from` makes a cache."
import json, os, threading, time, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from ..outputs import DistillError

__all__ = ['ask_server']


def ask_server(
    url:str, # of the endpoint, as in 'http://localhost:8000/v1/completions'
    samples:dict, # name of each sample -> what is sent of it: a prompt, or anything that JSON can hold
    path, # .jsonl file of the answers. An interrupted run resumes
    *,
    body=None, # of each request, beside the samples: dict(model='big', max_tokens=1, prompt_logprobs=20)
    request=None, # fn(list of samples) -> JSON body; None: `body` with the samples as 'prompt'
    answer=None, # fn(response) -> list with a dict for each sample; None: OpenAI's 'choices'
    key:str|None=None, # name of the environment variable with the server's key. The key is stored nowhere
    bs:int=1, # samples of one request
    at_once:int=8, # requests that run at the same time
    per_second:float|None=None, # requests that begin in a second; None: no limit
    retries:int=5, # of a request, after errors that may pass
    timeout:float=120 # seconds that an answer may take
) -> Path:
    "Ask a server for each sample and write its answers. Then `cache_from(path, 'cache', n=...)` makes a cache of them"
    path = Path(path)
    if path.suffix != '.jsonl': raise DistillError(f"path={str(path)!r}: the name of the answers' file ends in .jsonl.")
    server = Server(url, secret(key), per_second, retries, timeout)
    request = request or (lambda parts: {**(body or {}), 'prompt': parts})
    check_same(path, dict(url=url, body=body))
    done = names_in(path)
    todo = [k for k in samples if k not in done]
    def ask(names):
        rows = (answer or choices_of)(server.post(request([samples[k] for k in names])))
        if len(rows) != len(names):
            raise DistillError(f"{url} gave {len(rows)} answers for {len(names)} samples: answer= must return one for "
                               "each, in their order.")
        return ''.join(json.dumps({**r, 'key': k}) + '\n' for k,r in zip(names, rows))
    with ThreadPoolExecutor(at_once) as pool, open(path, 'a') as f:
        jobs = [pool.submit(ask, todo[i:i+bs]) for i in range(0, len(todo), bs)]
        try:
            for job in as_completed(jobs):
                f.write(job.result())
                f.flush()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return path


def secret(key):
    if key is None: return None
    if key in os.environ: return os.environ[key]
    raise DistillError(f"key={key!r} is the name of an environment variable with the server's key, but there is no "
                       "such variable.")


def check_same(path, asked):
    "Refuse to mix the answers to different requests in one file"
    beside = path.with_suffix('.request.json')
    if path.exists() and beside.exists():
        if (was := json.loads(beside.read_text())) != json.loads(json.dumps(asked)):
            raise DistillError(f"{path} has answers to other requests ({was}, now {asked}): use another file.")
    else: beside.write_text(json.dumps(asked))


def names_in(path) -> set:
    "The samples that have an answer. A line that was not written to its end is removed"
    if not path.exists(): return set()
    text = path.read_bytes()
    whole = text[:text.rfind(b'\n')+1]
    if whole != text: os.truncate(path, len(whole))
    return {json.loads(o)['key'] for o in whole.splitlines() if o.strip()}


def choices_of(response):
    "The log-probabilities in an answer of OpenAI's interface, one row for each prompt"
    if not isinstance(response, dict) or 'choices' not in response:
        has = ', '.join(response) if isinstance(response, dict) else type(response).__name__
        raise DistillError(f"The answer has no 'choices' (it has: {has}): give answer=, a function that returns a list "
                           "with a dict for each sample.")
    choices = sorted(response['choices'], key=lambda c: c.get('index', 0))
    names = 'prompt_logprobs','logprobs'
    return [{n: c[n] for n in names if c.get(n) is not None} for c in choices]


class Server:
    "POST with retries, and a limit of the requests in a second"
    def __init__(self, url, key, per_second, retries, timeout):
        self.url,self.key,self.retries,self.timeout = url,key,retries,timeout
        self.gap,self.next,self.lock = 1/per_second if per_second else 0.,0.,threading.Lock()

    def post(self, body):
        "The answer to a request, as JSON"
        for i in range(self.retries + 1):
            self._wait()
            try: return self._post(body)
            except urllib.error.HTTPError as e:
                text,wait = e.read().decode(errors='replace'),e.headers.get('Retry-After', '')
                error = f'{e.code}: {text}'
                if e.code not in (408, 409, 425, 429) and e.code < 500: raise self._failed(error) from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as e: error,wait = str(e),''
            if i < self.retries: time.sleep(float(wait) if wait.isdigit() else min(.5*2**i, 60))
        raise self._failed(f'{error}, after {self.retries + 1} tries')

    def _wait(self):
        "Until the next request may begin"
        with self.lock:
            at = max(self.next, time.monotonic())
            self.next = at + self.gap
        time.sleep(max(at - time.monotonic(), 0))

    def _post(self, body):
        headers = {'Content-Type': 'application/json'}
        if self.key is not None: headers['Authorization'] = f'Bearer {self.key}'
        asked = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=self.timeout) as r: text = r.read()
        try: return json.loads(text)
        except ValueError as e: raise self._failed(f'the answer is no JSON ({e})') from None

    def _failed(self, why):
        why = why[:500] if self.key is None else why[:500].replace(self.key, '***')
        return DistillError(f"{self.url} gave no answer ({why}). The answers so far are kept: run it again to resume.")
