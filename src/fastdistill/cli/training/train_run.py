"""Run `fastdistill train`: train a teacher, train a student with and without the teacher, compare
the models, and write the results to a folder.
"""

import platform
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fastai.basics import Learner
from safetensors.torch import save_model

from ...base.atomic_files import enough_space, new_file, write_atomically, write_json
from ...base.distributed import first_then_others, leave_processes, on_first, rank, world_size
from ...base.errors import DistillError
from ...base.folder_lock import locked_folder
from ...fastai import Distiller, KnowledgeDistillation, cache_teacher
from ...fastai.probe_batches import prepared_batches
from ...fastai.raw_items import items_shown
from ...fastai.task import task_of
from ...fastai.teachers import teacher_of
from ...recipes.recipe_text import recipe_from_text
from ...teachers.estimator import is_estimator
from ...teachers.fast_copy import AS_IT_IS
from .architectures import learner_of
from .config import TrainConfig, write_config
from .data_fingerprint import SPLIT
from .dataloaders import loaders_of
from .exported_student import FOR_STUDENT, FOR_TEACHER
from .rate_finder import IF_NONE_IS_FOUND, RATES, STEPS, find_rate
from .resumable_fit import seed_everything, silent
from .run_data import data_of_run, samples_in_words
from .run_results import lead_in_words, validation_scores, write_results
from .start_or_resume import read_begun, runs_folder, write_begun
from .teachers import file_teacher, teacher_of_texts, with_weights
from .time_estimate import time_in_words
from .trainings import Trainings

MANY_STEPS = 2000  # with fewer steps, many recipes show no gain
PACKAGES = 'fastdistill', 'fastai', 'torchvision', 'timm', 'numpy', 'pandas', 'safetensors'


class TrainRun:
    """A run of `fastdistill train` in a folder. With several processes, only the first process
    prints, writes files and compares models.

    Args:
        config: Settings of the run.
        folder: Folder of the run.
        say: fn(text) that prints a line.
        bar: True to show fastai's progress bars.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        say: Callable[[str], Any] = print,
        bar: bool = False,
    ):
        self.config, self.folder, self.files = config, folder, runs_folder(folder)
        self.first, self.processes = rank() == 0, world_size()
        self.print = say if self.first else silent
        self.bar = bar and self.first
        self.recipe = recipe_from_text(config.recipe)
        self.locks = ExitStack()

    def __call__(self) -> Any:
        """Complete the run. Return the Report in the first process, and None in all others."""
        with self.locks:
            models = self.trained()
            leave_processes()
            report = self.write_results(models) if self.first else None
        if self.first:
            shutil.rmtree(self.files)  # only after the lock in this folder is released
        return report

    def trained(self) -> dict[str, Any]:
        """Train all models that are not finished. Return {name: model}."""
        c = self.config
        on_first(self.check_start)
        loaded = first_then_others(lambda: file_teacher(c.teacher) if c.teacher_file else None)
        self.data = on_first(lambda: data_of_run(c, self.folder, loaded))
        student, teacher, make = first_then_others(lambda: self.make_models(loaded))
        # the inputs of such a teacher are the same in each epoch, so its outputs are stored
        stores = is_estimator(loaded) and self.data.samples.task == 'texts'
        on_first(lambda: self.check(student, teacher, bool(c.teacher_files), stores))
        on_first(self.begin)
        self.say_time(teacher, make, stores)
        self.config = c = on_first(lambda: self.find_rates(make))
        new_student = lambda seed: made_with_seed(
            lambda: make(c.arch('student')), seed, FOR_STUDENT
        )
        alone = dict(alone=new_student(c.seed)) if c.baseline else {}
        models = dict(teacher=teacher, **alone, distilled=student)
        source: Any = None
        trainings = self.trainings = Trainings(
            c,
            self.folder,
            models,
            new_student,
            kd=lambda: KnowledgeDistillation(source, self.recipe, check=c.check),
            scores=lambda name, learn: validation_scores(name, learn, self.dls),
            loggers=loggers_of(c, self.folder) if self.first else [],
            say=self.say,
            bar=self.bar,
        )
        if not c.teacher_files:
            trainings.complete('teacher', c.seed)
            if self.first:
                with new_file(self.folder / 'teacher.safetensors') as tmp:
                    save_model(teacher.model, str(tmp))
        source = self.as_teacher(teacher, student)
        if stores:
            source = first_then_others(lambda: self.stored(source, student))
        for seed in c.all_seeds:
            if c.baseline:
                trainings.complete('alone', seed)
                if seed == c.seed:
                    self.say(on_first(lambda: lead_in_words(models, self.dls, not c.teacher_files)))
            trainings.complete('distilled', seed)
        return models

    def say(self, text: str) -> None:
        """Print a line, unless it is empty."""
        if text:
            self.print(text)

    def check_start(self) -> None:
        """Run the checks that do not need the data."""
        loggers_of(self.config, self.folder)
        if self.processes == 1:
            return
        if find_spec('accelerate') is None:
            raise ImportError(
                'Training in several processes needs accelerate: pip install accelerate'
            )
        if ':' in self.config.device:
            raise DistillError(
                f'device={self.config.device!r} is one device, but there are {self.processes} processes. '
                "With device='auto', each process uses its own device."
            )

    def make_models(self, loaded: Any) -> tuple:
        """Return (student, teacher, fn(Arch) -> a new Learner)."""
        c, s = self.config, self.data.samples
        of_teacher = isinstance(loaded, Learner) and s.task in ('texts', 'table')
        self.dls = loaders_of(s, c, loaded if of_teacher else None)
        self.say(f'data: {samples_in_words(s)}')
        make = partial(learner_of, dls=self.dls, s=s, config=c, pretrained=c.pretrained)
        student = made_with_seed(lambda: make(c.arch('student')), c.seed, FOR_STUDENT)
        if loaded is not None:
            teacher = teacher_of_texts(loaded) if s.task == 'texts' else loaded
        elif c.teacher_weights:
            teacher = with_weights(c, self.dls, s)
        else:
            teacher = made_with_seed(lambda: make(c.arch('teacher')), c.seed, FOR_TEACHER)
        self.say(
            f'teacher: {c.arch("teacher")}, {parameters(teacher)}; student: {c.arch("student")}, '
            f'{parameters(student)}'
        )
        self.say(self.data.note)
        if not c.pretrained:
            self.say(
                'All models start from random weights; --pretrained starts from published weights.'
            )
        steps = c.epochs * len(self.dls.train) // self.processes
        self.few_steps = (
            f'{steps} steps: many recipes need a few thousand to show a gain. Use more --epochs, or a '
            'smaller --batch-size.'
            if steps < MANY_STEPS
            else ''
        )
        self.say(self.few_steps)
        return student, teacher, make

    def as_teacher(self, teacher: Any, student: Any) -> Any:
        """Prepare the teacher for the student. On a CPU, the teacher runs without a faster copy,
        because the copy may round differently in a resumed run.
        """
        on_cpu = torch.device(self.dls.device or 'cpu').type == 'cpu'
        return (
            teacher_of(teacher, student, task_of(student.loss_func), run=AS_IT_IS)
            if on_cpu
            else teacher
        )

    def stored(self, teacher: Any, student: Any) -> Any:
        """Run the teacher once. Return its outputs, which are stored next to the checkpoints."""
        return cache_teacher(
            teacher,
            student,
            self.files / 'outputs',
            views=0,
            store='float32',
            valid=True,
            check=False,
            progress=self.bar,
        )

    def check(self, student: Any, teacher: Any, trained: bool, stores: bool) -> None:
        """Check that the teacher fits the task, and that the layers in the recipe exist.

        Args:
            student: Learner of the student.
            teacher: The teacher.
            trained: True if the teacher is trained already.
            stores: True if its outputs will be stored. A fit does not check stored outputs.
        """
        task = task_of(student.loss_func)
        if trained and self.config.check:
            found = student.check_teacher(self.as_teacher(teacher, student), n_epoch=None)
            if found.errors or stores:
                found.enforce(facts=stores)
        if self.recipe == 'auto':
            return
        source = teacher_of(teacher, student, task, run=AS_IT_IS)
        d = Distiller(
            student.model,
            source,
            self.recipe,
            kind=task.kind,
            axis=task.axis,
            ignore_index=task.ignore_index,
            check=False,
        )
        with items_shown(student.dls.loaders, source):
            valid, train = prepared_batches(student, 1, 1)
            with closing(valid), closing(train):
                x, _ = next(valid)
        d.setup(*x)

    def begin(self) -> None:
        """Lock the folder of the run, and write the settings, the split and the environment."""
        self.locks.enter_context(locked_folder(self.files, self.folder))
        if (self.folder / 'report.json').is_file():
            raise DistillError(f'The run in {self.folder} is finished.')
        for folder in (self.folder, self.folder / 'student', self.files):
            for p in folder.glob('*.tmp'):
                p.unlink()  # left by a process that was killed
        self.write_settings(read_begun(self.folder).get('found', []))
        write_atomically(self.folder / SPLIT, self.data.split)
        facts = dict(
            python=platform.python_version(),
            platform=platform.platform(),
            threads=torch.get_num_threads(),
            processes=self.processes,
            torch=str(torch.__version__),
            **{n: v for n in PACKAGES if (v := installed(n))},
        )
        write_json(self.folder / 'environment.json', facts)

    def write_settings(self, found: list[str]) -> None:
        """Write the settings, with the names of the learning rates that were found."""
        # subtle: write this file first, because learning rates that are 'auto' in config.toml are
        # read from it
        write_begun(self.folder, self.config, self.data.fingerprint, found)
        write_config(self.config, self.folder / 'config.toml')

    def say_time(self, teacher: Any, make: Callable, stores: bool) -> None:
        """Print how long the run will take, unless it is continued or has several processes."""
        if self.processes > 1 or any(self.files.glob('*.pt')):
            return

        def kd(student: Any) -> KnowledgeDistillation:
            return KnowledgeDistillation(
                self.as_teacher(teacher, student), self.recipe, check=False
            )

        size = self.data.samples.size
        self.say(time_in_words(self.config, self.dls, make, None if stores else kd, size))

    def find_rates(self, make: Callable) -> TrainConfig:
        """Return the settings, with found learning rates instead of 'auto'. The learning rates are
        also written to config.toml.
        """
        c = self.config
        found: dict[str, Any] = {}
        for k, role, number in (
            ('lr', 'student', FOR_STUDENT),
            ('teacher_lr', 'teacher', FOR_TEACHER),
        ):
            if getattr(c, k) != 'auto' or role == 'teacher' and c.teacher_files:
                continue
            arch = c.arch(role)
            learn = made_with_seed(lambda arch=arch: make(arch), c.seed, number)
            self.say(
                f'learning rate of {arch}: trying rates from {RATES[0]:g} to {RATES[-1]:g}, '
                f'{STEPS} steps each'
            )
            lr = find_rate(learn, c.seed, number)
            limits = {
                None: 'a guess, because no rate had a finite loss',
                RATES[0]: 'the lowest rate that is tried',
                RATES[-1]: 'the highest rate that is tried',
            }
            how = limits.get(lr, 'which had the lowest loss')
            found[k] = lr or IF_NONE_IS_FOUND
            self.say(f'learning rate of {arch}: {found[k]:g}, {how}')
        if found:
            self.config = replace(c, **found)
            self.write_settings([*read_begun(self.folder).get('found', []), *found])
        return self.config

    def write_results(self, models: dict[str, Any]) -> Any:
        """Write all results to the folder of the run and return the report."""
        with enough_space(self.folder):
            return write_results(
                self.folder,
                self.config,
                models,
                self.dls,
                self.data.samples,
                self.trainings.runs.finished(),
                notes=[self.data.note],
                few_steps=self.few_steps,
                bar=self.bar,
            )


def loggers_of(config: TrainConfig, folder: Path) -> list[Callable]:
    """Return a function fn(label of a training run) -> callback for each logger."""
    if 'tensorboard' not in config.loggers:
        return []
    try:
        from fastai.callback.tensorboard import TensorBoardCallback
    except ImportError as e:
        raise ImportError("log='tensorboard': pip install tensorboard") from e
    return [
        lambda name: TensorBoardCallback(
            folder / 'tensorboard' / name, trace_model=False, log_preds=False
        )
    ]


def made_with_seed(make: Callable, seed: int, number: int) -> Any:
    seed_everything(seed, number)
    return make()


def parameters(model: Any) -> str:
    """Format the number of parameters of a model."""
    model = getattr(model, 'model', model)
    return (
        f'{sum(p.numel() for p in model.parameters()):,} parameters'
        if hasattr(model, 'parameters')
        else 'a file'
    )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
