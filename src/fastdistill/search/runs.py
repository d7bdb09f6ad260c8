"""Trainings of recipes, each of which happens once: what is finished is kept in a folder, from which
the same call continues.
"""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import sleep, time

import torch

from ..base.atomic_files import BusyError, file_errors, locked_folder, write_json
from ..base.distributed import world_size
from ..base.errors import DistillError

__all__ = ['Run', 'Runs']

RUNS_FORMAT = 2  # of the folder


@dataclass
class Run:
    """One training with a recipe.

    Attributes:
        name: Of the recipe.
        options: Of the recipe.
        scores: After each epoch.
        stopped: Before its last epoch, for its scores.
        result: What the training returned, as plain data; None if it did not get to its end.
        ended: When; in seconds since 1970.
    """

    name: str
    options: dict = field(default_factory=dict)
    lr: float | None = None
    seed: int = 0
    scores: list = field(default_factory=list)
    stopped: bool = False
    result: object = None
    seconds: float = 0.0
    ended: float = 0.0

    @property
    def key(self):
        return self.name, tuple(sorted(self.options.items())), self.lr

    @property
    def score(self):
        return self.scores[-1] if self.scores else -math.inf

    @property
    def rank(self):
        """Runs that went on longer are better, since others were stopped for their scores; then the
        score decides.
        """
        return len(self.scores), self.score

    @property
    def items(self):
        """(N,) scores of single items, if the training returned these."""
        return torch.tensor(self.result)

    @property
    def file(self):
        """The same for the same training, whatever came of it."""
        text = json.dumps([self.name, self.options, self.lr, self.seed], sort_keys=True)
        return f'run_{hashlib.sha256(text.encode()).hexdigest()[:16]}.json'


class Runs:
    """Trains each `Run` once. Several processes may share a folder; each trains what no other one
    trains.

    Args:
        train: fn(run, after_epoch, late) -> the result, as plain data; None if it ended early.
            after_epoch(score) and late() are true where the training has to end.
        folder: Has a JSON file for each finished run, and one for the settings; None: nothing is
            kept.
        settings: Name -> what must be the same for whoever continues, as plain data.
    """

    def __init__(self, train: Callable, folder=None, settings: dict | None = None):
        self.train = train
        self.folder = None if folder is None else Path(folder)
        self.known = {}  # file -> finished run
        if self.folder is not None:
            self._open(json.loads(json.dumps(dict(settings or {}, format=RUNS_FORMAT))))

    def _open(self, settings):
        if world_size() > 1:
            raise DistillError(
                'folder= is for processes that train by themselves, not for those of one training '
                '(torchrun). Start them one by one, with the same folder.'
            )
        if ':/' in str(self.folder):
            raise DistillError(
                f'folder={str(self.folder)!r}: give a folder of this machine, or one that machines share.'
            )
        with file_errors(f"{self.folder} can't be the folder of an experiment"):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / 'settings.json'
        if not path.is_file():
            return write_json(path, settings)
        before = read_json(path, dict)
        if before.get('format') != RUNS_FORMAT:
            raise DistillError(
                f'{self.folder} holds an experiment in the format of a different version of fastdistill '
                f'({before.get("format", 1)} there, {RUNS_FORMAT} here). Give this one another folder.'
            )
        if changed := [k for k in settings if before.get(k) != settings[k]]:
            k = changed[0]
            raise DistillError(
                f'{self.folder} holds an experiment with another {k}: {before.get(k)!r} there, '
                f'{settings[k]!r} now. Give this one another folder.'
            )

    def finished(self) -> list[Run]:
        """All finished runs, the first one first. Those of other processes are among them."""
        if self.folder is not None:
            for path in self.folder.glob('run_*.json'):
                if path.name not in self.known:
                    self.known[path.name] = read_json(path, lambda data: Run(**data))
        return sorted(self.known.values(), key=lambda r: r.ended)

    def once(self, run: Run, after_epoch=lambda run: False, late=lambda: False) -> Run | None:
        """Return the finished run; train it first, unless that was done before. Without a result,
        it ended early. None if another process trains it now.

        Args:
            after_epoch: fn(run) -> is it to be stopped? It has a new score.
            late: fn() -> is there no time for the rest of it?
        """

        def add_score(score):
            run.scores.append(score if math.isfinite(score) else -math.inf)
            run.stopped = bool(after_epoch(run))
            return run.stopped

        with self._claimed(run) as mine:
            if not mine:
                return None
            self.finished()
            if run.file not in self.known:
                began = time()
                run.result = self.train(run, add_score, late)
                run.ended = time()
                run.seconds = run.ended - began
                if run.result is None and not run.stopped:
                    return run
                self.known[run.file] = run
                if self.folder is not None:
                    write_json(self.folder / run.file, asdict(run))
            return self.known[run.file]

    def all(self, runs: list[Run], after_epoch=lambda run: False) -> list[Run]:
        """Return all these runs, finished."""
        left = list(runs)
        try:
            while left := [r for r in left if self.once(r, after_epoch) is None]:
                sleep(1)  # other processes train these
        except KeyboardInterrupt:
            if self.folder is not None:
                done = sum(r.file in self.known for r in runs)
                print(
                    f'fastdistill: {done} of {len(runs)} trainings are finished. The same call continues '
                    f'from {self.folder}'
                )
            raise
        return [self.known[r.file] for r in runs]

    @contextmanager
    def _claimed(self, run):
        """Yield whether this process may train the run."""
        if self.folder is None:
            yield True
            return
        lock = f'{run.file}.lock'
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(self.folder, file=lock))
            except BusyError:
                yield False
                return
            try:
                yield True
            finally:
                with suppress(OSError):  # Windows keeps an open file
                    (self.folder / lock).unlink()


def read_json(path, made):
    try:
        return made(json.loads(path.read_text(encoding='utf-8')))
    except (ValueError, TypeError) as e:
        raise DistillError(f'{path} is damaged ({e}). Delete it: its run is trained again.') from e
