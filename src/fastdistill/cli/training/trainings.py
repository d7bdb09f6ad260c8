"Train each model of a run once."

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...base.distributed import on_first
from ...base.errors import DistillError
from ...search.resumable_runs import Run, Runs
from .config import TrainConfig
from .exported_student import FOR_STUDENT, FOR_TEACHER
from .resumable_fit import Checkpoints, fit_stage
from .start_or_resume import runs_folder


class Trainings:
    """Trains the models of a run, or restores the models whose training is finished.

    Args:
        config: Settings of the run.
        folder: Folder of the run.
        models: {name: Learner} of the first seed, and the teacher.
        new_student: fn(seed) -> a new Learner.
        kd: fn() -> callback that adds the trained teacher.
        scores: fn(name, Learner) -> measures on the validation set.
        loggers: fn(label of a training run) -> callback, for each logger.
        say: fn(text) that prints a line.
        bar: True to show fastai's progress bars.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        models: dict[str, Any],
        new_student: Callable,
        kd: Callable,
        scores: Callable,
        loggers: Sequence[Callable],
        say: Callable[[str], Any],
        bar: bool,
    ):
        self.config, self.files, self.models = config, runs_folder(folder), models
        self.new_student, self.kd, self.scores, self.loggers = new_student, kd, scores, loggers
        self.say, self.bar = say, bar
        self.runs = Runs(self.train, self.files)

    def complete(self, name: str, seed: int) -> None:
        """Train a model, unless its training is finished. Afterwards, the models of the first seed
        have the weights after the last epoch.
        """
        c = self.config
        lr: Any = c.teacher_lr if name == 'teacher' else c.lr
        run = Run(name, lr=lr, seed=seed)
        kept = seed == c.seed
        if run.file not in {r.file for r in self.runs.finished()}:
            self.runs.once(run)
            if not kept:
                on_first(self.checkpoint_file(run).unlink)
            return
        self.say(f'{self.label(run)}: is finished')
        if kept:
            state = self.checkpoints(run)
            if not state.done:
                raise DistillError(
                    f'{state.file} is missing. To train this model again, also delete {run.file} in the '
                    'same folder.'
                )
            state.restore(self.models[name])

    def train(self, run: Run, *_: Any) -> dict:
        """Train the model of a run. Return its results as plain data (see `Runs`)."""
        c, label = self.config, self.label(run)
        learn = self.models[run.name] if run.seed == c.seed else self.new_student(run.seed)
        epochs = c.teacher_epochs or c.epochs if run.name == 'teacher' else c.epochs
        state = self.checkpoints(run, self.kd() if run.name == 'distilled' else None)
        if state.done:
            self.say(f'{label}: continues after epoch {state.done} of {epochs}')
        elif self.bar:
            self.say(f'{label}:')
        loggers = [make(label) for make in self.loggers]
        history = fit_stage(learn, epochs, run.lr, state, loggers, self.bar)
        scores = {} if run.seed == c.seed else on_first(lambda: self.scores(run.name, learn))
        return dict(history=history, scores=scores)

    def label(self, run: Run) -> str:
        several = self.config.seeds > 1 and run.name != 'teacher'
        return f'{run.name}, seed {run.seed}' if several else run.name

    def checkpoints(self, run: Run, kd: Any = None) -> Checkpoints:
        number = FOR_TEACHER if run.name == 'teacher' else FOR_STUDENT
        say = None if self.bar else lambda text: self.say(f'{self.label(run)}: {text}')
        return Checkpoints(self.checkpoint_file(run), (run.seed, number), kd, say)

    def checkpoint_file(self, run: Run) -> Path:
        return self.files / f'{run.name}_{run.seed}.pt'
