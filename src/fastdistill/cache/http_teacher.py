"""Query a teacher over HTTP and store its responses as JSON lines.

`cache_from` converts the responses to a cache.
"""

import html
import http.client
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus, urlsplit

from ..base.atomic_files import check_regular_file, file_errors, write_atomically
from ..base.errors import DistillError, check_whole, is_whole
from .digests import behavior_of, checksum
from .file_store import Folder
from .json_checks import load_json, shortened
from .manifest import MAX_MANIFEST

LONGEST_WAIT = 60  # maximum wait before a retry in seconds, even if the server asks for more


def ask_server(
    url: str,
    samples: dict,
    path: Path | str,
    *,
    body: Mapping | None = None,
    request: Callable | None = None,
    answer: Callable | None = None,
    key: str | None = None,
    bs: int = 1,
    at_once: int = 8,
    per_second: float | None = None,
    retries: int = 5,
    timeout: float | None = 120,
) -> Path:
    """Query a server for each sample and write the responses to a file.

    `cache_from(path, 'cache', n=...)` converts the file to a cache.

    Args:
        url: URL of the endpoint, e.g. 'http://localhost:8000/v1/completions'.
        samples: {name of a sample: prompt or any JSON value to send}.
        path: .jsonl file for the responses. If the file exists, only missing responses are
            requested.
        body: Other entries of the request body, e.g. dict(model='big', max_tokens=1,
            prompt_logprobs=20).
        request: fn(list of samples) -> JSON body. If None, send `body` with the samples as
            'prompt'.
        answer: fn(response) -> list with one dict for each sample. If None, read 'choices', as in
            the OpenAI API.
        key: Name of the environment variable that holds the API key. The key is never stored.
        bs: Number of samples per request.
        at_once: Number of simultaneous requests.
        per_second: Maximum number of requests started per second. None for no limit.
        retries: Number of retries after a temporary error.
        timeout: Time to wait for a response, in seconds. None to wait forever.
    """
    path = Path(path).expanduser()
    if path.suffix != '.jsonl':
        raise DistillError(f'path={str(path)!r}: the name of the file must end in .jsonl.')
    check_samples(samples)
    for k, v, least in ('bs', bs, 1), ('at_once', at_once, 1), ('retries', retries, 0):
        check_whole(k, v, least)
    for k, number in ('per_second', per_second), ('timeout', timeout):
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if number is not None and not (is_number and 1e-6 <= number <= 1e6):
            raise DistillError(
                f'{k}={number!r}: it must be a number from 0.000001 to 1,000,000, or None.'
            )
    url = Secret(url)  # its query may contain a key
    server = Server(url, secret(key), per_second, retries, timeout)
    given = dict(request=request, answer=answer)
    functions = {k: None if f is None else behavior_of(f) for k, f in given.items()}
    request = request or (lambda parts: {**(body or {}), 'prompt': parts})
    answer = answer or choices_of

    def ask(names: Sequence[str]) -> str:
        of = texts_of(names)
        with naming(f'request= for {of}', server, Exception):
            data = json.dumps(request([samples[k] for k in names])).encode()
        got = server.post(data, of)
        with naming(f'The answer for {of}', server):
            return lines_of(answer(got), names)

    try:
        asked = json.dumps(dict(url=server.shown, body=body), default=str)
    except ValueError as e:
        raise DistillError(f"body= can't be sent as JSON: {e}.") from e
    now = server.hidden(json.loads(asked)) | functions
    with Folder(path.parent).lock(f'.{path.name}.lock', path), file_errors(f"Can't write {path}"):
        known = digests_before(path, now)
        done = names_in(path)
        note_samples(path, now, known, samples, done)
        todo = [k for k in samples if k not in done]
        with ThreadPoolExecutor(at_once) as pool, open(path, 'a') as f:
            jobs = {pool.submit(ask, todo[i : i + bs]) for i in range(0, len(todo), bs)}

            def write(job: Any) -> None:
                jobs.discard(job)
                f.write(job.result())
                f.flush()

            try:
                for job in as_completed([*jobs]):
                    write(job)
            except BaseException:
                server.stopped.set()
                pool.shutdown(cancel_futures=True)
                # write the responses that arrived before the error
                for job in [*jobs]:
                    if not job.cancelled() and job.exception() is None:
                        write(job)
                raise
    return path


def check_samples(samples: Any) -> None:
    if not isinstance(samples, Mapping):
        raise DistillError(
            f'samples is of type {type(samples).__name__}: it must be a dict {{name: prompt}}.'
        )
    for k in samples:
        if not isinstance(k, str) and not is_whole(k):
            raise DistillError(
                f"The sample's name {k!r} is of type {type(k).__name__}: it must be a string or a "
                'whole number, which JSON lines can hold.'
            )


def texts_of(names: Sequence) -> str:
    return f'sample {names[0]!r}' + (f' and {len(names) - 1} more' if len(names) > 1 else '')


@contextmanager
def naming(
    what: str,
    server: 'Server',
    errors: Any = (KeyError, TypeError, ValueError, IndexError, AttributeError),
) -> Iterator[None]:
    """Replace errors in this context with a `DistillError` that starts with `what`."""
    failed = None
    try:
        yield
    except errors as e:
        text = str(e) if isinstance(e, DistillError) else f'{type(e).__name__}: {e}'
        failed, cause = f'{what}: {server.shown_text(text)}', e
        # subtle: if the server repeats the key in its response, the original error may show it
        if isinstance(e, DistillError) or server.hide(text) != text:
            cause = None
    if failed is not None:
        raise DistillError(failed) from cause


def lines_of(rows: Iterable[Mapping], names: Sequence) -> str:
    """Format rows as JSON lines that include the names of the samples."""
    if not isinstance(rows, (list, tuple)) or not all(isinstance(r, Mapping) for r in rows):
        raise DistillError(
            f'answer= returned {shortened(repr(rows), 100)}: it must return a list with a dict for each '
            'sample.'
        )
    if len(rows) != len(names):
        raise DistillError(
            f'the server gave {len(rows)} answers for {len(names)} samples: answer= must return one for '
            'each sample, in the same order.'
        )
    return ''.join(json.dumps({**r, 'key': k}) + '\n' for k, r in zip(names, rows))


def secret(key: str | None) -> Any:
    if key is None:
        return None
    # subtle: the error does not show the name, because the user may have passed the key itself
    if not isinstance(key, str) or key not in os.environ:
        raise DistillError(
            "key= is the name of an environment variable with the server's key, but there is no such "
            'variable.'
        )
    value = Secret(os.environ[key].strip())
    # subtle: for an invalid header, http.client would raise an error that shows the key
    if value and value.isascii() and value.isprintable() and ' ' not in value:
        return value
    what = 'has spaces, line breaks or characters beyond ASCII' if value else 'is empty'
    raise DistillError(f"The environment variable {key!r} {what}: set it to the server's key.")


class Secret(str):
    """A string whose repr is hidden, e.g. in tracebacks that show local variables."""

    def __repr__(self) -> str:
        return "'***'"


def beside(path: Path) -> Path:
    return path.with_suffix('.request.json')


def digests_before(path: Path, now: Any) -> dict:
    """Return {name as JSON: digest} of the samples that were sent for the responses in a file. Raise a
    DistillError if the file contains responses to different requests.

    Args:
        now: URL and body of the requests, and fingerprints of the functions `request` and `answer`.
    """
    check_regular_file(path)
    check_regular_file(beside(path))
    if not path.exists() or not beside(path).exists():
        return {}
    try:
        was = json.loads(beside(path).read_text())
        known = dict(was.pop('samples', {}))
    except (ValueError, TypeError, AttributeError) as e:
        raise DistillError(
            f"{beside(path)} is damaged ({e}), so the requests can't be compared. If the answers in "
            f'{path} are to the same requests, remove this file.'
        ) from e
    other = [k for k in now if was.get(k) != now[k]]
    if changed := [f'{k}=' for k in other if k in ('request', 'answer')]:
        raise DistillError(
            f'{path} contains answers to different requests: {" and ".join(changed)} has changed. Use '
            'a different file, or the function with which the answers were requested.'
        )
    if other:
        was, now = ({k: o.get(k) for k in other} for o in (was, now))
        raise DistillError(
            f'{path} contains answers to different requests ({was}, now {now}): use a different file.'
        )
    return known


def note_samples(path: Path, now: Any, known: dict, samples: Mapping, done: Iterable) -> None:
    """Store what the requests send. Raise a DistillError if something different was sent for a
    sample that has a response.

    Args:
        known: {name as JSON: digest} of earlier requests.
        done: Names of the samples that have a response.
    """
    found = {json.dumps(k): digest for k, v in samples.items() if (digest := digest_of(v))}
    others = {k for k, digest in found.items() if known.get(k, digest) != digest}
    if different := [k for k in samples if k in done and json.dumps(k) in others]:
        raise DistillError(
            f'{path} contains the answer for {texts_of(different)}, but something different was sent '
            'for it: use a different file, or remove these lines to request them again.'
        )
    if not known or not found.items() <= known.items():
        write_atomically(beside(path), json.dumps(now | dict(samples=known | found)))


def digest_of(sample: Any) -> str | None:
    """Return a digest of what is sent for a sample. Return None if it is not a JSON value."""
    try:
        return checksum(json.dumps(sample, sort_keys=True).encode())
    except (TypeError, ValueError, RecursionError):
        return None


def names_in(path: Path) -> set:
    """Return the names of the samples that have a response.

    An incomplete last line is removed from the file.
    """
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole, end = text[: text.rfind(b'\n') + 1], text[text.rfind(b'\n') + 1 :]
    names = {name_in(path, i, line) for i, line in enumerate(whole.split(b'\n'), 1) if line.strip()}
    # subtle: change the file only after its lines were checked, since it may be a different file
    try:
        json.loads(end)
    except ValueError:
        os.truncate(path, len(whole))
        return names
    names.add(name_in(path, whole.count(b'\n') + 1, end))
    with open(path, 'ab') as f:
        f.write(b'\n')
    return names


def name_in(path: Path, i: int, line: Any) -> str:
    """Return the name of the sample that a line is about."""
    try:
        name = json.loads(line)['key']
        hash(name)
        return name
    except (ValueError, KeyError, TypeError) as e:
        raise DistillError(
            f"{path}, line {i} is not an answer with a 'key' ({type(e).__name__}: {e}): remove the "
            'line to request it again, or use a different file.'
        ) from e


def choices_of(response: Any) -> list:
    """Return the log-probabilities in an OpenAI response, one row for each prompt."""
    if not isinstance(response, dict) or not isinstance(response.get('choices'), list):
        has = ', '.join(response) if isinstance(response, dict) else type(response).__name__
        raise DistillError(
            f"there is no list 'choices' (it has: {has}). Pass answer=, a function that returns a list "
            'with a dict for each sample.'
        )
    choices = sorted(response['choices'], key=lambda c: c.get('index', 0))
    numbers = [c['index'] for c in choices if 'index' in c]
    if numbers and numbers != [*range(len(choices))]:
        raise DistillError(
            f'the choices have the indices {numbers}: they must be 0 to {len(choices) - 1}.'
        )
    names = 'prompt_logprobs', 'logprobs'
    rows = [{n: c[n] for n in names if c.get(n) is not None} for c in choices]
    if not all(rows):
        raise DistillError(
            "a choice has neither 'prompt_logprobs' nor 'logprobs': request them in body=, as in "
            'body=dict(max_tokens=1, prompt_logprobs=20).'
        )
    return rows


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Handler that refuses redirects.

    By default, urllib would send a GET without the request body, and pass the API key to any
    server.
    """

    def redirect_request(self, *_: Any) -> None:
        return None


class Passing(Exception):
    """Temporary error of a request.

    The arguments are a message and the number of seconds that the server asks to wait, or None.
    """


class Server:
    """Client that sends POST requests, with retries and a limit on the requests per second."""

    def __init__(
        self,
        url: str,
        key: str | None,
        per_second: float | None,
        retries: int,
        timeout: float | None,
    ):
        check_url(url)
        # error messages show the URL without its query, which may contain an API key
        self.url, self.shown = url, without_query(url)
        self.secrets = secrets_of(key, urlsplit(url).query)
        self.key, self.retries, self.timeout = key, retries, timeout
        self.gap, self.next = 1 / per_second if per_second else 0.0, 0.0
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.opener = urllib.request.build_opener(NoRedirect)

    def post(self, data: Any, of: str) -> Any:
        """Return the response to a request, parsed from JSON.

        Args:
            data: Body of the request.
            of: Names of the samples, for error messages.
        """
        failed = None
        for i in range(self.retries + 1):
            self._wait()
            try:
                return self.hidden(self._post(data))
            except Passing as e:
                why, wait = self.hide(e.args[0]), e.args[1]
            except DistillError as e:
                failed = self.hide(str(e))
            # subtle: raised outside the except block, so that no frame of the traceback contains the
            # key
            if failed is not None:
                raise self._failed(failed, of)
            if i == self.retries:
                break
            if wait is not None:
                self._pause(wait, why)
            else:
                self._sleep(min(0.5 * 2**i, LONGEST_WAIT))
        raise self._failed(f'{why}, after {self.retries + 1} tries', of)

    def _sleep(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise DistillError('A different request failed.')

    def _wait(self) -> None:
        """Wait until the next request may start."""
        while True:
            with self.lock:
                now = time.monotonic()
                if self.next <= now:
                    self.next = now + self.gap
                    return
                until = self.next
            self._sleep(until - now)

    def _pause(self, seconds: float, why: str) -> None:
        """Pause all requests for the time that the server asks for, up to `LONGEST_WAIT`."""
        wait = min(seconds, LONGEST_WAIT)
        with self.lock:
            until = time.monotonic() + wait
            shown, self.next = wait >= 1 and until > self.next + 1, max(self.next, until)
        if shown:
            less = f' (the server asks for {seconds:,.0f} s)' if wait < seconds else ''
            text = f'{self.shown_text(why, 100)}; waiting for {wait:.0f} s{less}.'
            print(f'{self.shown}: {text}', file=sys.stderr)

    def _post(self, data: bytes) -> Any:
        asked = urllib.request.Request(self.url, data, {'Content-Type': 'application/json'})
        if self.key is not None:
            asked.add_unredirected_header('Authorization', f'Bearer {self.key}')
        try:
            with self.opener.open(asked, timeout=self.timeout) as r:
                text = r.read(MAX_MANIFEST + 1)
                # subtle: a read with a limit does not notice that the end of the response is missing
                if r.length and len(text) <= MAX_MANIFEST:
                    raise http.client.IncompleteRead(text, r.length)
        except urllib.error.HTTPError as e:
            with e:
                self._refused(e)
        # there is no connection, the response ends too early, or its stated length is impossible
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as e:
            raise Passing(f'{type(e).__name__}: {e}', None) from None
        if len(text) > MAX_MANIFEST:
            raise DistillError(
                f'the answer has more than {MAX_MANIFEST:,} bytes: request fewer samples (bs=) or fewer '
                'classes at once'
            )
        try:
            return load_json(text)
        except DistillError:
            raise
        except (ValueError, RecursionError) as e:
            why = f'the answer is not JSON ({e})'
            # an empty response, or one that begins like JSON, was probably truncated
            if text.lstrip()[:1] in (b'', b'{', b'['):
                raise Passing(why, None) from None
            raise DistillError(why) from None

    def _refused(self, e: Any) -> None:
        """Raise the error for an HTTP status other than 200."""
        if e.code in (301, 302, 303, 307, 308):
            to = without_query(str(e.headers.get('Location')))
            raise DistillError(
                f'{e.code}: it redirects to {to}. Redirects are not followed, since the other server would '
                'get the key and the samples: pass that URL if you trust it'
            ) from None
        try:
            text = e.read(10_000).decode(errors='replace')
        except (OSError, http.client.HTTPException) as cut:
            text = type(cut).__name__
        why = f'{e.code}: {text}'
        if e.code not in (408, 409, 425, 429) and e.code < 500:
            raise DistillError(why) from None
        raise Passing(why, seconds_of(e.headers.get('Retry-After', ''))) from None

    def hide(self, text: str) -> str:
        """Replace the API key and the query of the URL in a text by '***'.

        Call this method before the text is shortened. Otherwise, the end of the text could contain
        a part of the key.
        """
        for secret in self.secrets:
            text = text.replace(secret, '***')
        return text

    def hidden(self, o: Any) -> Any:
        """Hide the secrets in all strings of a JSON value. Numbers are unchanged."""
        if isinstance(o, str):
            return self.hide(o)
        if isinstance(o, list):
            return [self.hidden(v) for v in o]
        return {self.hide(k): self.hidden(v) for k, v in o.items()} if isinstance(o, dict) else o

    def shown_text(self, text: Any, n: int = 500) -> str:
        """Prepare a text from the server for a message: hide the key, replace control characters, and
        shorten the text.
        """
        return shortened(''.join(c if c.isprintable() else ' ' for c in self.hide(text)), n)

    def _failed(self, why: Any, of: str) -> DistillError:
        return DistillError(
            f'{self.shown} gave no answer for {of} ({self.shown_text(why)}). The answers so far are kept: make the '
            'same call again to resume.'
        )


def without_query(url: str) -> str:
    return url.partition('?')[0].partition('#')[0]


def secrets_of(key: str | None, query: str) -> list[str]:
    """Return the texts to hide: the API key, the query of the URL, and the values in the query, each
    in any encoding in which a server may repeat them.
    """
    raw = [query, *(o.partition('=')[2] for o in query.split('&'))]
    found = [key or '', *raw, *map(unquote, raw), *map(unquote_plus, raw)]
    found += [encode(o) for o in found for encode in (quote, quote_plus, partial(quote, safe=''))]
    found += [encode(o) for o in found for encode in (html.escape, lambda o: json.dumps(o)[1:-1])]
    for c, escaped in ('/', r'\/'), ('+', r'\u002B'):  # as PHP and .NET write JSON
        found += [o.replace(c, escaped) for o in found]
    # shorter texts, such as 'EMPTY', are not secret, and may occur in other words
    return sorted({Secret(o) for o in found if len(o) >= 8}, key=len, reverse=True)


def check_url(url: str) -> None:
    """Raise a DistillError for a URL that is invalid or contains a password."""
    try:
        o = urlsplit(url)
        host = o.hostname and o.hostname.encode('idna')
        good = o.scheme in ('http', 'https') and host and o.port != 0
    except (ValueError, TypeError, AttributeError):
        good = False
    if not good or any(c.isspace() or not c.isprintable() for c in url):
        raise DistillError(
            'url= must be the http:// or https:// address of an endpoint, as in '
            "'http://localhost:8000/v1/completions'."
        )
    if '@' in o.netloc:
        raise DistillError(
            'url= has a user name or a password, which would be stored with the answers: pass key=, the '
            'name of an environment variable.'
        )


def seconds_of(text: Any) -> float | None:
    """Return the number of seconds in a `Retry-After` header, given as a number or a date.

    The result is None if the header can't be parsed.
    """
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0)
    except (ValueError, TypeError, OverflowError):
        return None
