"""Functions that take turns. Each one runs in a thread of its own, and only one of them runs at a
time.

fastai's training loop can't be left in the middle and entered again, except in a thread. Its
callbacks, schedules and cancel exceptions then work as usual. A thread also has its own gradient
mode and autocast, which a generator or a greenlet would share with the others.
"""

import signal
import threading
from contextlib import contextmanager
from contextvars import copy_context
from queue import SimpleQueue
from types import SimpleNamespace

__all__ = ['Turns', 'held_interrupts']


class Turns:
    """Runs `fn(ask)` only inside `resume`. `ask(request)` ends a turn: `resume` returns, `request`
    is what was asked, and the next `resume` sends the answer.

    Args:
        fn: fn(ask).
    """

    def __init__(self, fn):
        self.request, self.ended, self.running = None, False, False
        self._error = None
        self._answers, self._requests = SimpleQueue(), SimpleQueue()
        self.thread = threading.Thread(target=copy_context().run, args=(self._run, fn), daemon=True)

    def _run(self, fn):
        try:
            self._answer()
            fn(self._ask)
            self._requests.put((True, None, None))
        except BaseException as e:
            self._requests.put((True, None, e))

    def _ask(self, request):
        self._requests.put((False, request, None))
        return self._answer()

    def _answer(self):
        answer, error = self._answers.get()
        if error is not None:
            raise error
        return answer

    def resume(self, answer=None):
        """One turn. Raises the error that ended the function, if one did.

        Args:
            answer: What `ask` returns.
        """
        self._send(answer, None)
        self._wait()
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _send(self, answer, error):
        if not self.thread.is_alive():
            self.thread.start()
        self.running = True
        self._answers.put((answer, error))

    def _wait(self):
        self.ended, self.request, self._error = self._requests.get()
        self.running = False
        if self.ended:
            self.thread.join()

    def close(self):
        """End the function by a KeyboardInterrupt where it waits for an answer; safe to call twice."""
        if self.thread.ident is None:
            self.ended = True
        if self.running:
            self._wait()
        while not self.ended:
            self._send(None, KeyboardInterrupt())
            self._wait()


@contextmanager
def held_interrupts():
    """Inside, Ctrl-C only sets `.came` of the object that this yields; a second Ctrl-C interrupts
    as usual. In a thread other than the main one nothing changes, since Python sends it no signals.
    """
    state, usual = SimpleNamespace(came=False), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield state
        return

    def note(*_):
        state.came = True
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, usual)
