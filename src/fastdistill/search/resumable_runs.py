"""Execute each training run once, and store the results in a folder from which the same call
resumes.
"""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import sleep, time
from typing import Any

import torch
from torch import Tensor

from ..base.atomic_files import file_errors, write_json
from ..base.content import first_difference
from ..base.distributed import of_first, on_first, world_size
from ..base.errors import DistillError
from ..base.folder_lock import BusyError, locked_folder
from .run_folder import read_json, read_settings, write_settings


@dataclass
class Run:
    """A training run with a recipe.

    Attributes:
        name: Name of the recipe.
        options: Options of the recipe.
        scores: Score after each epoch.
        stopped: True if the run was stopped early because of its scores.
        result: Return value of the training function, as plain data. None if the training did not
            finish.
        ended: End time, in seconds since 1970.
    """

    name: str
    options: dict = field(default_factory=dict)
    lr: float | None = None
    seed: int = 0
    scores: list = field(default_factory=list)
    stopped: bool = False
    result: Any = None
    seconds: float = 0.0
    ended: float = 0.0

    @property
    def key(self) -> tuple:
        return self.name, tuple(sorted(self.options.items())), self.lr

    @property
    def score(self) -> float:
        return self.scores[-1] if self.scores else -math.inf

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key of a run: (number of epochs, score).

        Runs with more epochs rank higher, because the other runs were stopped for low scores.
        """
        return len(self.scores), self.score

    @property
    def items(self) -> Tensor:
        """Scores of the individual test items, (N,), if the training function returned them."""
        return torch.tensor(self.result)

    @property
    def file(self) -> str:
        """File name of the run. The name depends on the recipe, options, learning rate and seed,
        but not on the result.
        """
        text = json.dumps([self.name, self.options, self.lr, self.seed], sort_keys=True)
        return f'run_{hashlib.sha256(text.encode()).hexdigest()[:16]}.json'


class Runs:
    """Executes each `Run` once. Several processes can share a folder without training the same run
    twice.

    In distributed training with a folder, all ranks must call the same methods in the same order.
    Only the first rank reads and writes files.

    Args:
        train: fn(run, after_epoch, late) -> result as plain data, or None if training ended early.
            after_epoch(score) and late() return True if training has to stop.
        folder: Folder with one JSON file per finished run, and one for the settings. None to store
            nothing.
        settings: {name: value} of plain data that must be the same when the runs are resumed. None
            if the caller reads, compares and writes the settings.
    """

    def __init__(
        self, train: Callable, folder: str | Path | None = None, settings: dict | None = None
    ) -> None:
        self.train = train
        self.folder = None if folder is None else Path(folder)
        self.known: dict[str, Run] = {}  # {file name: finished run}
        if self.folder is not None and settings is not None:
            open_experiment(self.folder, json.loads(json.dumps(settings)))

    def finished(self) -> list[Run]:
        """Return all finished runs in the order in which they ended, including those of other
        processes.
        """
        if (folder := self.folder) is not None:
            self.known |= on_first(lambda: self._new(folder))
        return sorted(self.known.values(), key=lambda r: r.ended)

    def _new(self, folder: Path) -> dict[str, Run]:
        """Read the finished runs in the folder that are not known yet. Return {file name: run}."""
        again = 'Delete it to train its run again.'
        return {
            p.name: read_json(p, lambda data: Run(**data), again)
            for p in folder.glob('run_*.json')
            if p.name not in self.known
        }

    def once(
        self,
        run: Run,
        after_epoch: Callable[[Run], bool] = lambda run: False,
        late: Callable[[], bool] = lambda: False,
    ) -> Run | None:
        """Train a run unless it is already finished, and return the finished run.

        A run that ended early has no result. Return None if another process is training the run.

        Args:
            run: The run.
            after_epoch: fn(run) -> True to stop the run. It is called for each new score.
            late: fn() -> True if there is not enough time to finish the run.
        """

        def add_score(score: float) -> bool:
            run.scores.append(score if math.isfinite(score) else -math.inf)
            run.stopped = bool(after_epoch(run))
            return run.stopped

        folder = self.folder
        with ExitStack() as stack:
            if folder is not None and not on_first(lambda: lock_run(run, folder, stack)):
                return None
            self.finished()
            if run.file not in self.known:
                began = time()
                run.result = self.train(run, add_score, late)
                run.ended = time()
                run.seconds = run.ended - began
                if run.result is None and not run.stopped:
                    return run
                if folder is not None:
                    run = of_first(run)  # times and results differ between ranks
                    on_first(lambda: write_json(folder / run.file, asdict(run)))
                self.known[run.file] = run
            return self.known[run.file]

    def all(
        self, runs: list[Run], after_epoch: Callable[[Run], bool] = lambda run: False
    ) -> list[Run]:
        """Train all of these runs and return them when they have finished.

        Args:
            runs: The runs.
            after_epoch: As in `once`.
        """
        left = list(runs)
        try:
            while left := [r for r in left if self.once(r, after_epoch) is None]:
                sleep(1)  # other processes are training the remaining runs
        except KeyboardInterrupt:
            if self.folder is not None:
                done = sum(r.file in self.known for r in runs)
                print(
                    f'fastdistill: {done} of {len(runs)} training runs are finished. To continue from '
                    f'{self.folder}, make the same call again'
                )
            raise
        return [self.known[r.file] for r in runs]


def lock_run(run: Run, folder: Path, stack: ExitStack) -> bool:
    """Lock a run until the stack is closed. Return False if another process is training the run."""
    lock = f'{run.file}.lock'
    try:
        stack.enter_context(locked_folder(folder, file=lock))
    except BusyError:
        return False

    @stack.callback
    def delete() -> None:
        with suppress(OSError):  # Windows does not delete open files
            (folder / lock).unlink()

    return True


def open_experiment(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of an experiment to a new folder, or raise a DistillError if the experiment
    in the folder has different settings.
    """
    if world_size() > 1:
        raise DistillError(
            'folder= is for independent processes, not for the ranks of distributed training '
            '(torchrun). Start the processes separately, with the same folder.'
        )
    if ':/' in str(folder):
        raise DistillError(f'folder={str(folder)!r}: must be a local or shared folder.')
    with file_errors(f"{folder} can't be the folder of an experiment"):
        folder.mkdir(parents=True, exist_ok=True)
    before = read_settings(folder)
    if before is None:
        write_settings(folder, settings)
    elif (found := first_difference(before, settings)) is not None:
        name, there, here = found
        raise DistillError(
            f'{folder} contains an experiment with {name}={there}, but now it is {here}. Use a '
            'different folder.'
        )
