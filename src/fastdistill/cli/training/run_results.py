"Compare the trained models of a run, and write the results to its folder."

import csv
import io
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...base.atomic_files import new_file, write_atomically
from ...base.errors import DistillWarning
from ...evaluation.report_data import Difference, SeedResults
from ...evaluation.verdicts import verdict_of
from ...fastai import compare, save_student
from ...search.resumable_runs import Run
from ...search.significance import difference_by_seed
from .config import TrainConfig
from .data_files import Samples
from .data_fingerprint import csv_text
from .mask_examples import mask_examples
from .valid_predictions import changed_table, changes_in_words

# caption of the masks in the report
EXAMPLES = 'Validation images on which the models differ most'
CHANGED = 'changed.csv'  # validation samples that both students predict differently
NO_SEEDS = (
    'The seeds are not compared, because the main measure of a training run is not a finite number.'
)


def compare_quietly(models: dict[str, Any], dls: Any, **options: Any) -> Any:
    """Compare models on the validation set without warnings, progress and time measurements."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return compare(models, dls, seconds=0, progress=False, **options)


def validation_scores(name: str, learn: Any, dls: Any) -> dict[str, float | None]:
    """Return the measures of a model on the validation set."""
    report = compare_quietly({name: learn}, dls, repeats=1)
    return {k: e.value for k, e in report.models[name].measures.items()}


def lead_in_words(models: Mapping[str, Any], dls: Any, trained: bool) -> str:
    """Return a line if the teacher is not significantly better than the student alone in the main
    measure, otherwise ''.

    Args:
        models: {name: model}, with the models 'teacher' and 'alone'.
        dls: DataLoaders of the run.
        trained: True if the run trained the teacher.
    """
    models = {k: models[k] for k in ('teacher', 'alone')}
    report = compare_quietly(models, dls)
    k, apart = report.headline, report.comparison('alone', 'teacher')
    if apart is None:
        return ''
    better = [m for m in report.info if verdict_of(apart, report, m) == 'worse']
    if k in better:
        return ''
    info = report.info[k]
    scores = [info.text(report.models[n].measures[k].value) + info.unit for n in models]
    so = (
        f'but it is significantly better in {", ".join(report.info[m].label for m in better)}, which '
        'the student can learn'
        if better
        else 'so there is little to learn from it'
    )
    longer = (
        'train it longer (--teacher-epochs), try other learning rates (--teacher-lr), or ' * trained
    )
    return (
        f'The teacher has no significant lead over the student alone in {info.label} ({scores[0]} '
        f'and {scores[1]}), {so}. If it should be better, {longer}use a better teacher. The run '
        'continues.'
    )


def seed_results(report: Any, config: TrainConfig, runs: Iterable[Run]) -> SeedResults:
    """Return the main measure of the students for each seed.

    Args:
        report: Report on the models of the first seed.
        config: Settings of the run.
        runs: The finished training runs.
    """
    k, scores = report.headline, {(r.name, r.seed): r.result['scores'] for r in runs}
    values = {
        name: [report.models[name].measures[k].value]
        + [scores[name, seed][k] for seed in config.all_seeds[1:]]
        for name in ('alone', 'distilled')
        if name in report.models
    }
    numbers = [math.nan if o is None else o for v in values.values() for o in v]
    if len(values) < 2 or not all(map(math.isfinite, numbers)):
        return SeedResults()
    d = difference_by_seed(values['distilled'], values['alone'])
    # with two seeds, the interval is too wide to be informative
    return SeedResults(config.all_seeds, values, d if config.seeds > 2 else Difference(d.value))


def write_history(folder: Path, runs: Iterable[Run]) -> None:
    """Write history.csv, with one row per training run and epoch."""
    order = lambda r: (r.name != 'teacher', r.seed, r.name)
    tables = {(r.name, r.seed): r.result['history'] for r in sorted(runs, key=order)}
    columns = list(dict.fromkeys(k for t in tables.values() for k in t))
    text = io.StringIO(newline='')
    rows = csv.writer(text)
    rows.writerow(['model', 'seed', 'epoch', *columns])
    for run, t in tables.items():
        for i, values in enumerate(zip(*t.values())):
            row = dict(zip(t, values))
            rows.writerow([*run, i, *(row.get(k, '') for k in columns)])
    write_atomically(folder / 'history.csv', text.getvalue())


def write_results(
    folder: Path,
    config: TrainConfig,
    models: dict[str, Any],
    dls: Any,
    s: Samples,
    runs: Iterable[Run],
    *,
    notes: Iterable[str],
    few_steps: str,
    bar: bool,
) -> Any:
    """Write all results to the folder of a run and return the report.

    Args:
        folder: Folder of the run.
        config: Settings of the run.
        models: {name: model}.
        dls: DataLoaders of the run.
        s: The `Samples` from which `dls` was built.
        runs: The finished training runs.
        notes: Notes for the report.
        few_steps: Note for the report if the teacher did not help.
        bar: True to show progress bars.
    """
    runs = [*runs]
    write_history(folder, runs)
    data, figures = Path(config.data).name, {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        warnings.filterwarnings('always', 'no ONNX file', DistillWarning)
        title = f'{config.student}, taught by {Path(config.teacher).name}, on {data}'
        report: Any = compare(models, dls, title=title, progress=bar)
        gain = report.comparison('distilled', 'alone')
        no_gain = gain is not None and verdict_of(gain, report) != 'better'
        report.notes += filter(None, [*notes, few_steps * no_gain])
        report.seeds = seed_results(report, config, runs)
        if config.seeds > 1 and not report.seeds.seeds:
            report.notes.append(NO_SEEDS)
        student, title = models['distilled'], f'{config.student} on {data}'
        onnx = None if config.onnx else False
        save_student(student, folder / 'student', report, onnx=onnx, title=title)
        with new_file(Path.cwd() / folder / 'student.pkl') as tmp:
            student.export(tmp)
        if s.task == 'masks':
            figures[EXAMPLES] = mask_examples(models, dls, s)
        elif s.target == 'classes' and config.baseline:
            changed = changed_table(models, dls, s)
            write_atomically(folder / CHANGED, csv_text(changed))
            report.notes.append(changes_in_words(changed, len(dls.valid_ds)))
    with new_file(folder / 'report.html') as tmp:
        report.to_html(tmp, figures)
    with new_file(folder / 'report.json') as tmp:
        report.to_json(tmp)
    return report
