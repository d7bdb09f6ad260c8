"""Run `fastdistill train`: train a teacher, train a student with and without the teacher, compare
the models, and write the results to a folder.
"""

import csv
import io
import math
import platform
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fastai.basics import Learner
from fastai.tabular.core import cont_cat_split
from safetensors.torch import save_model

from ...base.atomic_files import enough_space, locked_folder, new_file, write_atomically, write_json
from ...base.distributed import first_then_others, leave_processes, on_first, rank, world_size
from ...base.errors import DistillError, DistillWarning
from ...evaluation.number_format import verdict_of
from ...evaluation.report_data import Difference, SeedResults
from ...fastai import Distiller, KnowledgeDistillation, cache_teacher, compare, save_student
from ...fastai.probe_batches import prepared_batches
from ...fastai.raw_items import items_shown
from ...fastai.task import task_of
from ...fastai.teachers import teacher_of
from ...recipes.recipe_text import recipe_from_text
from ...search.resumable_runs import Run, Runs
from ...search.significance import difference_by_seed
from ...teachers.estimator import is_estimator
from ...teachers.fast_copy import AS_IT_IS
from .architectures import check_arch, learner_of
from .config import TrainConfig, write_config
from .data_checks import checked_samples
from .data_files import Samples, read_samples
from .data_fingerprint import csv_text, data_changes, data_fingerprint, first_few, split_table
from .dataloaders import loaders_of
from .exported_student import FOR_STUDENT, FOR_TEACHER
from .mask_examples import mask_examples
from .resumable_fit import (
    IF_NONE_IS_FOUND,
    RATES,
    STEPS,
    Checkpoints,
    find_rate,
    fit_stage,
    seed_everything,
    silent,
)
from .run_settings import read_begun, runs_folder, write_begun
from .teachers import file_teacher, teacher_of_texts, with_weights
from .time_estimate import time_in_words
from .valid_predictions import changed_table, changes_in_words

# caption of the masks in the report
EXAMPLES = 'Validation images on which the models differ most'
CHANGED = 'changed.csv'  # validation samples that both students predict differently
SPLIT = 'split.csv'  # which samples were trained on, in the folder of the run
MAY_KNOW = (
    'The teacher may have been trained on some of these validation samples, which were chosen at random; its '
    'score may be too high. --valid can name the samples that it was not trained on.'
)
NO_SEEDS = (
    'The seeds are not compared, because the main measure of a training is not a finite number.'
)
MANY_STEPS = 2000  # with fewer, many recipes show no gain
PACKAGES = 'fastdistill', 'fastai', 'torch', 'torchvision', 'timm', 'numpy', 'pandas', 'safetensors'


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
        self.config, self.folder, self.first, self.processes = (
            config,
            folder,
            rank() == 0,
            world_size(),
        )
        self.say: Callable[[str], Any] = say if self.first else silent
        self.bar = bar and self.first
        self.recipe = recipe_from_text(config.recipe)
        self.files, self.locks = runs_folder(folder), ExitStack()
        self.runs = Runs(self.train, self.files)
        self.split = self.note = ''  # set by `samples` in the first process
        self.few_steps = ''  # set by `make_models`
        self.found: list[str] = []  # names of the learning rates that find_rate found

    def __call__(self) -> Any:
        """Complete the run. Return the Report in the first process, and None in all others."""
        with warnings.catch_warnings(), self.locks:
            # fastai's tables cause this warning with pandas 3, although they do not write to the
            # arrays
            warnings.filterwarnings('ignore', message='The given NumPy array is not writable')
            models = self.trained()
            leave_processes()
            report = self.write_results(models) if self.first else None
        if self.first:
            shutil.rmtree(self.files)  # only after the lock in this folder is released
        return report

    def trained(self) -> dict[str, Any]:
        """Train all models that are not finished. Return {name: model}."""
        self.config = c = on_first(self.check_start)
        loaded = first_then_others(lambda: file_teacher(c.teacher) if c.teacher_file else None)
        s = on_first(lambda: self.samples(loaded))
        student, teacher, make = first_then_others(lambda: self.make_models(s, loaded))
        # the inputs of such a teacher are the same in each epoch, so its outputs are stored
        stores = is_estimator(loaded) and s.task == 'texts'
        on_first(lambda: self.check(student, teacher, bool(c.teacher_files), stores))
        on_first(self.write_start)
        self.say_time(teacher, make, stores)
        self.config = on_first(lambda: self.find_rates(make))
        self.new_student = lambda seed: self.seeded(
            FOR_STUDENT, lambda: make(c.arch('student')), seed
        )
        alone = dict(alone=self.new_student(c.seed)) if c.baseline else {}
        self.models = dict(teacher=teacher, **alone, distilled=student)
        if not c.teacher_files:
            self.complete('teacher', c.seed)
            if self.first:
                self.write_weights(teacher)
        self.source = self.as_teacher(teacher, student)
        if stores:
            self.source = first_then_others(lambda: self.stored(self.source, student))
        for seed in c.all_seeds:
            if c.baseline:
                self.complete('alone', seed)
                if seed == c.seed:
                    on_first(self.say_lead)
            self.complete('distilled', seed)
        return self.models

    def check_start(self) -> TrainConfig:
        """Run the checks that do not need the data. Return the settings."""
        config = self.settings_at_begin()
        self.loggers()
        if self.processes == 1:
            return config
        if find_spec('accelerate') is None:
            raise ImportError(
                'Training in several processes needs accelerate: pip install accelerate'
            )
        if ':' in self.config.device:
            raise DistillError(
                f'device={self.config.device!r} is one device, for {self.processes} processes. Each '
                "takes its own with device='auto'."
            )
        return config

    def settings_at_begin(self) -> TrainConfig:
        """Return the settings, with the learning rates found earlier. Raise a DistillError if
        config.toml was changed since the run began.
        """
        begun, now = read_begun(self.folder), asdict(self.config)
        before, self.found = begun.get('settings', {}), begun.get('found', [])
        found = {k: before[k] for k in self.found if now[k] == 'auto'}
        # if both values are paths, they may differ, because the contents of the files are compared
        # instead
        same_kind = lambda k: all(
            isinstance(o[k], str) and Path(o[k]).is_absolute() for o in (before, now)
        )
        wrong = [
            k
            for k in now
            if k in before and k not in found and before[k] != now[k] and not same_kind(k)
        ]
        if wrong:
            was = ', '.join(f'{k}={before[k]!r}' for k in wrong)
            raise DistillError(
                f'{self.folder / "config.toml"} has {", ".join(f"{k}={now[k]!r}" for k in wrong)}, but '
                f'the run began with {was}. Restore that to resume, or start a new run with config= and '
                'a different out=.'
            )
        return replace(self.config, **found)

    def check_data_unchanged(self) -> None:
        before = read_begun(self.folder).get('data')
        if before is None or not (changes := data_changes(before, self.data)):
            return
        raise DistillError(
            f'The data of the run in {self.folder} changed since it began: {"; ".join(changes)}. '
            'Continuing would train on different samples, and perhaps validate on samples that were '
            'trained on. Restore the data to resume, or start a new run with config= and a different '
            'out=.'
        )

    def make_models(self, s: Samples, loaded: Any) -> tuple:
        """Return (student, teacher, fn(Arch) -> a new Learner)."""
        c, self.table = self.config, s
        self.dls = loaders_of(
            s, c, loaded if isinstance(loaded, Learner) and s.task in ('texts', 'table') else None
        )
        self.say(f'data: {samples_in_words(s)}')
        make = partial(learner_of, dls=self.dls, s=s, config=c, pretrained=c.pretrained)
        student = self.seeded(FOR_STUDENT, lambda: make(c.arch('student')))
        teacher = self.teacher(loaded, make, s)
        self.say(
            f'teacher: {c.arch("teacher")}, {parameters(teacher)}; student: {c.arch("student")}, '
            f'{parameters(student)}'
        )
        if self.note:
            self.say(self.note)
        if not c.pretrained:
            self.say(
                'All models begin with random weights; --pretrained begins with published ones.'
            )
        steps = c.epochs * len(self.dls.train) // self.processes
        if steps < MANY_STEPS:
            self.few_steps = (
                f'{steps} steps: many recipes need a few thousand to show a gain. Use more --epochs, or a '
                'smaller --batch-size.'
            )
            self.say(self.few_steps)
        return student, teacher, make

    def samples(self, loaded: Any) -> Samples:
        s = read_samples(self.config)
        if is_estimator(loaded) and s.task not in ('table', 'texts'):
            raise DistillError(
                f'{self.config.teacher} holds an estimator ({type(loaded).__name__}), which reads the '
                f'rows of a table or texts, but {self.config.data} holds {s.task}.'
            )
        check_arch(self.config.arch('student'), s.task)
        if loaded is None:
            check_arch(self.config.arch('teacher'), s.task)
        checked = checked_samples(s, self.config)
        self.split = split_table(checked)
        self.note = self.note_on_teacher(random=s.valid is None)
        self.data = data_fingerprint(checked, s.valid, self.config)
        self.check_data_unchanged()
        return checked

    def note_on_teacher(self, random: bool) -> str:
        """Return a note if the teacher may have been trained on the validation set, otherwise ''.

        Args:
            random: True if the validation set is a random fraction of the data.
        """
        files = self.config.teacher_files.values() if random else ()
        # the teacher of a previous run was trained on the split in the folder of that run
        splits = [p.parent / SPLIT for p in files]
        same = lambda p: p.is_file() and p.read_text(encoding='utf-8') == self.split
        return '' if all(map(same, splits)) else MAY_KNOW

    def seeded(self, number: int, make: Callable, seed: int | None = None) -> Any:
        seed_everything(self.config.seed if seed is None else seed, number)
        return make()

    def teacher(self, loaded: Any, make: Callable, s: Samples) -> Any:
        if loaded is not None:
            return teacher_of_texts(loaded) if s.task == 'texts' else loaded
        if self.config.teacher_weights:
            return with_weights(self.config, self.dls, s)
        return self.seeded(FOR_TEACHER, lambda: make(self.config.arch('teacher')))

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
        """Run the teacher once. Return its outputs, which are stored among the checkpoints."""
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
            stores: True if its outputs will be stored. A fit checks only a teacher that runs.
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

    def say_time(self, teacher: Any, make: Callable, stores: bool) -> None:
        """Print how long the run will take, unless it is continued or has several processes."""
        if self.processes > 1 or any(self.files.glob('*.pt')):
            return

        def kd(student: Any) -> KnowledgeDistillation:
            return KnowledgeDistillation(
                self.as_teacher(teacher, student), self.recipe, check=False
            )

        line = time_in_words(self.config, self.dls, make, None if stores else kd, self.table.size)
        if line:
            self.say(line)

    def find_rates(self, make: Callable) -> TrainConfig:
        """Find learning rates for the settings that are 'auto', write the settings to config.toml,
        and return them.
        """
        c = self.config
        wanted = [
            k
            for k in ('lr', 'teacher_lr')
            if getattr(c, k) == 'auto' and not (k == 'teacher_lr' and c.teacher_files)
        ]
        for k in wanted:
            role, number = ('student', FOR_STUDENT) if k == 'lr' else ('teacher', FOR_TEACHER)
            arch = c.arch(role)
            learn = self.seeded(number, lambda arch=arch: make(arch))
            self.say(
                f'learning rate of {arch}: trying rates from {RATES[0]:g} to {RATES[-1]:g}, '
                f'{STEPS} steps each'
            )
            lr = find_rate(learn, self.config.seed, number)
            limits = {
                None: 'a guess, because no rate had a finite loss',
                RATES[0]: 'the lowest that is tried',
                RATES[-1]: 'the highest that is tried',
            }
            how = limits.get(lr, 'which had the lowest loss')
            found: dict[str, Any] = {k: lr or IF_NONE_IS_FOUND}
            self.config = replace(self.config, **found)
            self.say(f'learning rate of {arch}: {found[k]:g}, {how}')
        if wanted:
            self.found = [*self.found, *wanted]
            self.write_settings()
        return self.config

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
                    f'{state.file} is missing. To train this model again, also delete {run.file} beside it.'
                )
            state.restore(self.models[name])

    def train(self, run: Run, *_: Any) -> dict:
        """Train the model of a run. Return its results as plain data (see `Runs`)."""
        c = self.config
        learn = self.models[run.name] if run.seed == c.seed else self.new_student(run.seed)
        kd = None
        if run.name == 'distilled':
            kd = KnowledgeDistillation(self.source, self.recipe, check=c.check)
        epochs = c.teacher_epochs or c.epochs if run.name == 'teacher' else c.epochs
        label, state = self.label(run), self.checkpoints(run, kd)
        if state.done:
            self.say(f'{label}: continues after epoch {state.done} of {epochs}')
        elif self.bar:
            self.say(f'{label}:')
        loggers = [make(label) for make in self.loggers()] if self.first else []
        history = fit_stage(learn, epochs, run.lr, state, loggers, self.bar)
        scores = {} if run.seed == c.seed else on_first(lambda: self.scores(run.name, learn))
        return dict(history=history, scores=scores)

    def label(self, run: Run) -> str:
        several = self.config.seeds > 1 and run.name != 'teacher'
        return f'{run.name}, seed {run.seed}' if several else run.name

    def checkpoint_file(self, run: Run) -> Path:
        return self.files / f'{run.name}_{run.seed}.pt'

    def checkpoints(self, run: Run, kd: Any = None) -> Checkpoints:
        number = FOR_TEACHER if run.name == 'teacher' else FOR_STUDENT
        say = None if self.bar else lambda text: self.say(f'{self.label(run)}: {text}')
        return Checkpoints(self.checkpoint_file(run), (run.seed, number), kd, say)

    def scores(self, name: str, learn: Any) -> dict[str, float | None]:
        """Return the measures of a model on the validation set."""
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            report: Any = compare({name: learn}, self.dls, seconds=0, repeats=1, progress=False)
        return {k: e.value for k, e in report.models[name].measures.items()}

    def seed_results(self, report: Any) -> SeedResults:
        """Return the main measure of the students with each seed."""
        c, k = self.config, report.headline
        scores = {(r.name, r.seed): r.result['scores'] for r in self.runs.finished()}
        values = {
            name: [report.models[name].measures[k].value]
            + [scores[name, seed][k] for seed in c.all_seeds[1:]]
            for name in ('alone', 'distilled')
            if name in report.models
        }
        numbers = [math.nan if o is None else o for v in values.values() for o in v]
        if len(values) < 2 or not all(map(math.isfinite, numbers)):
            return SeedResults()
        d = difference_by_seed(values['distilled'], values['alone'])
        # the interval of two seeds is too wide to tell anything
        return SeedResults(c.all_seeds, values, d if c.seeds > 2 else Difference(d.value))

    def say_lead(self) -> None:
        """Print a line if the teacher is not significantly better than the student alone in the main
        measure.
        """
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            models = {k: self.models[k] for k in ('teacher', 'alone')}
            report: Any = compare(models, self.dls, seconds=0, progress=False)
        k, apart = report.headline, report.comparison('alone', 'teacher')
        if apart is None:
            return
        better = [m for m in report.info if verdict_of(apart, report, m) == 'worse']
        if k in better:
            return
        info = report.info[k]
        scores = [info.text(report.models[n].measures[k].value) + info.unit for n in models]
        so = (
            f'but it is significantly better in {", ".join(report.info[m].label for m in better)}, which '
            'the student can learn'
            if better
            else 'so there is little to learn from it'
        )
        trained = not self.config.teacher_files
        longer = 'train it longer (--teacher-epochs), try other rates (--teacher-lr), or ' * trained
        self.say(
            f'The teacher has no significant lead over the student alone in {info.label} ({scores[0]} '
            f'and {scores[1]}), {so}. If it should be better, {longer}use a better teacher. The run '
            'goes on.'
        )

    def loggers(self) -> list[Callable]:
        """Return a list of functions fn(label of a training) -> callback."""
        return [self.tensorboard()] if 'tensorboard' in self.config.loggers else []

    def tensorboard(self) -> Callable:
        try:
            from fastai.callback.tensorboard import TensorBoardCallback
        except ImportError as e:
            raise ImportError("log='tensorboard': pip install tensorboard") from e
        return lambda name: TensorBoardCallback(
            self.folder / 'tensorboard' / name, trace_model=False, log_preds=False
        )

    def write_start(self) -> None:
        self.locks.enter_context(locked_folder(self.files, self.folder))
        if (self.folder / 'report.json').is_file():
            raise DistillError(f'The run in {self.folder} is finished.')
        for folder in (self.folder, self.files):
            for p in folder.glob('*.tmp'):
                p.unlink()  # left by a process that was killed
        self.write_settings()
        write_atomically(self.folder / SPLIT, self.split)
        facts = dict(
            python=platform.python_version(),
            platform=platform.platform(),
            threads=torch.get_num_threads(),
            processes=self.processes,
            **{n: v for n in PACKAGES if (v := installed(n))},
        )
        write_json(self.folder / 'environment.json', facts)

    def write_settings(self) -> None:
        # subtle: write this file first, because learning rates that are 'auto' in config.toml are
        # read from it
        write_begun(self.folder, self.config, self.data, self.found)
        write_config(self.config, self.folder / 'config.toml')

    def write_results(self, models: Mapping[str, Any]) -> Any:
        with enough_space(self.folder):
            return self.written(models)

    def written(self, models: Mapping[str, Any]) -> Any:
        """Write all results to the folder of the run and return the report."""
        self.write_history()
        c = self.config
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            warnings.filterwarnings('always', 'no ONNX file', DistillWarning)
            title = f'{c.student}, taught by {Path(c.teacher).name}, on {Path(c.data).name}'
            report: Any = compare(dict(models), self.dls, title=title, progress=self.bar)
            gain = report.comparison('distilled', 'alone')
            no_gain = gain is not None and verdict_of(gain, report) != 'better'
            report.notes += filter(None, [self.note, self.few_steps * no_gain])
            report.seeds = self.seed_results(report)
            if c.seeds > 1 and not report.seeds.seeds:
                report.notes.append(NO_SEEDS)
            student = models['distilled']
            save_student(
                student,
                self.folder / 'student',
                report,
                onnx=None if c.onnx else False,
                title=f'{c.student} on {Path(c.data).name}',
            )
            with new_file(Path.cwd() / self.folder / 'student.pkl') as tmp:
                student.export(tmp)
            figures = {}
            if self.table.task == 'masks':
                figures[EXAMPLES] = mask_examples(models, self.dls, self.table)
            elif self.table.target == 'classes' and c.baseline:
                changed = changed_table(models, self.dls, self.table)
                write_atomically(self.folder / CHANGED, csv_text(changed))
                report.notes.append(changes_in_words(changed, len(self.dls.valid_ds)))
        with new_file(self.folder / 'report.html') as tmp:
            report.to_html(tmp, figures)
        with new_file(self.folder / 'report.json') as tmp:
            report.to_json(tmp)
        return report

    def write_weights(self, teacher: Any) -> None:
        with new_file(self.folder / 'teacher.safetensors') as tmp:
            save_model(teacher.model, str(tmp))

    def write_history(self) -> None:
        """Write history.csv, with one row per training and epoch."""
        order = lambda r: (r.name != 'teacher', r.seed, r.name)
        runs = sorted(self.runs.finished(), key=order)
        tables = {(r.name, r.seed): r.result['history'] for r in runs}
        columns = list(dict.fromkeys(k for t in tables.values() for k in t))
        text = io.StringIO(newline='')
        rows = csv.writer(text)
        rows.writerow(['model', 'seed', 'epoch', *columns])
        for run, t in tables.items():
            for i, values in enumerate(zip(*t.values())):
                row = dict(zip(t, values))
                rows.writerow([*run, i, *(row.get(k, '') for k in columns)])
        write_atomically(self.folder / 'history.csv', text.getvalue())


def samples_in_words(s: Samples) -> str:
    """Describe the samples in one line of text."""
    held = int(s.valid.sum())
    what = {
        'classes': f'{len(s.classes or [])} classes ({first_few(s.classes or [])})',
        'labels': f'{len(s.classes or [])} labels ({first_few(s.classes or [])})',
        'numbers': f'numbers of column {s.y}',
    }[s.target]
    x = f'column {s.x[0]}'
    if s.task == 'table':
        numbers, categories = map(len, cont_cat_split(s.frame[s.x]))
        x = f'{categories} {"category" if categories == 1 else "categories"}'
        x += f', {numbers} {"number" if numbers == 1 else "numbers"}'
    x = f', {s.size[0]} x {s.size[1]} pixels' if s.size else f', {x}'
    if s.ignored is not None:
        name = s.classes[s.ignored] if s.ignored < len(s.classes) else s.ignored
        what += f', {name} ignored (foreground_acc: accuracy of the other pixels)'
    return f'{s.task}{x}, {what}; {len(s) - held:,} samples for training, {held:,} for validation'


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
