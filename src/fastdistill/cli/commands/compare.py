"""`fastdistill compare`, `report` and `export`: compare models, show reports, and export the
student to a file.
"""

import csv
import warnings
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

import typer

from ...base.atomic_files import write_atomically
from ...base.errors import DistillError, DistillWarning
from ..arguments import (
    DataOption,
    ModelsArg,
    StudentArg,
    in_python,
    picture_file,
    split_name,
)
from ..named_objects import (
    dataloaders,
    load_named_learner,
    load_object,
    load_teacher,
    of_run,
)


def named_once(pairs: Iterable) -> dict:
    """Build a dict. Raise a DistillError if two pairs have the same name."""
    out = {}
    for name, what in pairs:
        if name in out:
            raise DistillError(f'The name {name!r} is used twice: all names must be different.')
        out[name] = what
    return out


def check_splits(runs: Iterable[str]) -> None:
    """Raise a DistillError if one run was trained on validation samples of a different run.

    Args:
        runs: Files in folders of runs.
    """
    sets = {}
    for run in runs:
        if (file := Path(run).parent / 'split.csv').is_file():
            header, *rows = csv.reader(file.read_text(encoding='utf-8').splitlines())
            # row numbers are comparable only if the number of rows is the same
            data = len(rows) if header[0] == 'row' else ''
            part = lambda k, i, data='', rows=rows: {(data, r[i]) for r in rows if r[-1] == k}
            sets[run] = [[part(k, 0, data) for k in ('train', 'valid')]]
            if 'content' in header:
                at = header.index('content')
                train, valid = (part(k, at) for k in ('train', 'valid'))
                sets[run].append([train - valid, valid])  # equal rows may be in both sets
    for a, b in permutations(sets, 2):
        # subtle: equal rows may have different numbers, if the data were written again
        last = sets[a][-1], sets[b][-1]
        same = len(sets[a]) == len(sets[b]) and (last[0][0] | last[0][1]) & (
            last[1][0] | last[1][1]
        )
        (train, _), (_, valid) = last if same else (sets[a][0], sets[b][0])
        if known := train & valid:
            raise DistillError(
                f'{a} was trained on {len(known)} of the {len(valid)} validation samples of {b}, '
                'so their scores would not be comparable. Pass --data with samples that neither was '
                'trained on, or train both with the same --valid and --seed.'
            )


def compare_command(
    models: ModelsArg,
    data: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help='Folder for report.html, report.json and report.md.'),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Name of the teacher; default: 'teacher'.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Name of the model without a teacher; default: 'alone'.")
    ] = None,
    headline: Annotated[str | None, typer.Option(help="The main measure, such as 'nll'.")] = None,
    seconds: Annotated[
        float, typer.Option(help='Seconds for each time measurement; 0 to skip them.')
    ] = 0.5,
    title: Annotated[str, typer.Option(help='Title of the report.')] = '',
) -> None:
    """Compare models on the same validation data, and show which differences are statistically
    significant.

    Example: fastdistill compare teacher=t.pkl alone=a.pkl distilled=s.pkl --data train.py:dls --out
    runs/a.
    """
    named = named_once(map(split_name, models))
    if out is not None and (out / 'config.toml').is_file():
        raise DistillError(
            f'out={str(out)!r} is the folder of a run, whose own report would be overwritten: choose a '
            'different folder.'
        )
    if data is None:
        check_splits(v for v in named.values() if of_run(v))
    from ...fastai import compare as compare_models

    dls = None if data is None else load_object(data, dataloaders)
    runs = {k: load_named_learner(v) for k, v in named.items() if dls is None and of_run(v)}
    run = next(reversed(runs.values()), None)
    r: Any = compare_models(
        {k: runs[k] if k in runs else load_teacher(v, run) for k, v in named.items()},
        dls,
        teacher=teacher,
        baseline=baseline,
        headline=headline,
        seconds=seconds,
        title=title,
    )
    r.show()
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    r.to_json(out / 'report.json')
    r.to_html(out / 'report.html')
    write_atomically(out / 'report.md', r.to_markdown(level=1))
    typer.echo(f'Written: {out}/report.html, report.json, report.md')


def report_files(paths: list[Path]) -> list[Path]:
    """Check arguments that specify reports. Replace a folder with the report inside. If there are
    several folders, leave out runs that are not finished.
    """
    files = [p / 'report.json' if p.is_dir() else p for p in paths]
    begun = [p for p in files if not p.is_file() and (p.parent / 'config.toml').is_file()]
    if len(begun) < len(files):
        for p in begun:
            typer.echo(f'{p.parent} is left out: the run is not finished.', err=True)
            files.remove(p)
    if missing := [p for p in files if not p.is_file()]:
        raise DistillError(f'There is no file {str(missing[0])!r}.')
    return files


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(callback=report_files, help='report.json files, or folders with one.'),
    ],
    html: Annotated[Path | None, typer.Option(help='Write the page of a single report.')] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=picture_file, help='Write a picture of all runs.')
    ] = None,
) -> None:
    """Show saved reports. A single report is shown in full. Several reports are shown as a table of
    all students, sorted by score.

    Example: fastdistill report runs/* --plot runs.png.
    """
    if html is not None and len(runs) > 1:
        raise DistillError(f'html= writes the page of one report, but there are {len(runs)}.')
    from ...evaluation import Report, plot_runs, print_runs

    folders = [p.parent for p in runs]
    found = named_once(
        (str(folder if folders.count(folder) == 1 else p), Report.from_json(p))
        for p, folder in zip(runs, folders)
    )
    if len(found) == 1:
        (r,) = found.values()
        r.show()
        if html is not None:
            r.to_html(html)
    else:
        print_runs(found)
    if plot is not None:
        plot_runs(found).savefig(plot, dpi=110)


def export_command(
    student: StudentArg,
    path: Annotated[
        Path,
        typer.Argument(help="'student.onnx', 'student.pt2', or a folder for weights and a card."),
    ],
    data: DataOption = None,
    int8: Annotated[
        bool,
        typer.Option(
            '--int8', help='For an .onnx file: quantize, and measure the loss in quality.'
        ),
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option('--calibrate', help='Fit a temperature on the validation data first.'),
    ] = False,
) -> None:
    """Export a trained student to a file that can be used without fastai and fastdistill, and
    compare its outputs with those of the Learner.

    Example: fastdistill export runs/photos-resnet18 student.onnx --int8.
    """
    if int8 and path.suffix != '.onnx':
        raise DistillError('int8=True needs an .onnx file.')
    if path.suffix and path.suffix not in ('.onnx', '.pt2'):
        raise DistillError(
            f'{str(path)!r}: the file must end in .onnx or .pt2; a name without a suffix is a folder. '
            'For other formats, such as TFLite or Core ML, export one of these and convert it with '
            "that format's tools."
        )
    from ...fastai import export_student, save_student
    from ...fastai.student_export import weak_score

    learn = load_named_learner(student, data)
    if why := weak_score(learn):
        hint = (
            f' {student} is run again, so its Learner has new weights unless it loads trained ones: export a '
            "trained Learner with learn.export('student.pkl'), and pass that file."
            if in_python(student)
            else ''
        )
        warnings.warn(
            f'{student} is hardly better than a constant prediction: {why}. Has it been trained?{hint}',
            DistillWarning,
        )
    if calibrate:
        typer.echo(str(learn.calibrate()))
    if path.suffix:
        typer.echo(str(export_student(learn, path, int8=int8)))
    else:
        typer.echo(f'Written: {save_student(learn, path)}')
