"`fastdistill train`: from data to a distilled student and a report, in one command."

import os
import sys
from dataclasses import MISSING, Field, fields
from functools import cache
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ...base.docstrings import parameter_texts
from ..training.config import TrainConfig
from ..training.start_or_resume import settings_of


def option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, show_default=False)


def flag_of(f: Field) -> Parameter:
    """Return a flag for a setting of a run. The default of the flag is None, which means that the
    setting is not given.
    """
    kind: Any = f.type if isinstance(f.type, type) else str
    text = parameter_texts(TrainConfig, 'Attributes').get(f.name, '')
    if f.default not in (MISSING, ''):
        default = {True: 'yes', False: 'no'}[f.default] if kind is bool else f.default
        text += f' (default: {default})'
    annotation = Annotated[kind | None, option(text)]
    return Parameter(f.name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def train_command(
    *,
    out: Annotated[str | None, option('Folder of the run. (default: a new one in runs/)')] = None,
    config: Annotated[
        str | None, option('Settings of a previous run: runs/NAME/config.toml.')
    ] = None,
    resume: Annotated[
        bool, option('Continue the run in the folder, with the same result.', '--resume')
    ] = False,
    **settings: Any,
) -> None:
    """Train a student with a teacher, from files on disk, and show the gain.

    The command trains the teacher (unless it is a file), the student without the teacher, and the
    student with the teacher. Then it compares the models.

    
    Images, a folder for each class (or train/CLASS and valid/CLASS):
      fastdistill train --data photos --teacher resnet34 --student resnet18
    Without a GPU, small networks on small images:
      fastdistill train --data photos --size 64 --teacher cnn --teacher-layers 32,64,128,256
        --student cnn --student-layers 8,16,32
    Images with masks (folders images and masks, codes.txt with the classes):
      fastdistill train --data scenes --teacher resnet34 --student resnet18 --task masks
    Texts, or a table, in a CSV file:
      fastdistill train --data mails.csv --x text --y label --teacher awd_lstm
        --student embedding_bag --student-layers 16
      fastdistill train --data people.csv --y income --teacher tabular --student tabular
        --student-layers 20
    Your own teacher, written by learn.export:
      fastdistill train --data photos --teacher teacher.pkl --student resnet18 --epochs 20
    To resume after Ctrl-C or a crash, and to repeat a finished run:
      fastdistill train --resume --out runs/photos-resnet18
      fastdistill train --config runs/photos-resnet18/config.toml

    The folder of the run gets report.html, report.json, changed.csv (what the teacher changed),
    history.csv, config.toml, environment.json, student.pkl (for fastai's load_learner), student/
    (weights as safetensors, a card, ONNX if possible) and teacher.safetensors.
    """
    given = {k: v for k, v in settings.items() if v is not None}
    # subtle: cached, because a pipe can be read only once
    read = cache(lambda: settings_of(given, config, out, resume))
    # report mistakes in the settings before PyTorch is imported. If there are several processes, the
    # first one reports them before fastai is imported
    if os.environ.get('WORLD_SIZE', '1') == '1':
        read()
    from ...base.distributed import joined_processes, on_first

    with joined_processes() as first:
        run_settings = on_first(read)
        from ...evaluation.verdicts import over_seeds
        from ..training import TrainRun

        run = TrainRun(*run_settings, say=typer.echo, bar=sys.stdout.isatty())
        try:
            report = run()
        except KeyboardInterrupt:
            again = f'fastdistill train --resume --out {run.folder}'
            if first:
                typer.echo(f'\nInterrupted. Finished epochs are kept. To resume, run: {again}')
            raise typer.Exit(130) from None
    if not first:
        return
    report.show()
    typer.echo(f'Written: {Path(run.folder) / "report.html"}, and the student in the same folder')
    if len(report.seeds.seeds) > 1:
        typer.echo(over_seeds(report)[1])


own = [p for p in signature(train_command).parameters.values() if p.kind != p.VAR_KEYWORD]
train_command.__signature__ = Signature([*map(flag_of, fields(TrainConfig)), *own])  # type: ignore[attr-defined]
