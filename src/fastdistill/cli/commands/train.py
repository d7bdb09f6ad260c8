"`fastdistill train`: from data to a distilled student and a report, in one command."

import os
import sys
from dataclasses import fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.config import TrainConfig
from ..training.run_settings import settings_of

# {setting of a run: help text of its flag}
HELP = dict(
    data='Folder or CSV file.',
    teacher='Architecture to train first, a file (Learner .pkl, trees .joblib ...), or a run.',
    student='Architecture: resnet18, mobilenet_v3_small, cnn, awd_lstm, tabular ...',
    teacher_layers="Layer sizes of a cnn, awd_lstm, embedding_bag or tabular teacher: '64,32'.",
    student_layers='Layer sizes of the student, in the same form.',
    teacher_weights="A .safetensors file with the teacher's weights.",
    task='images, masks, texts or table. (default: auto, inferred from the data)',
    recipe="Such as 'kd(T=4, alpha=.9) + at()'. (default: auto)",
    epochs='Epochs of each training. (default: 10)',
    teacher_epochs='Epochs of the teacher. (default: --epochs)',
    lr='Learning rate of the students. (default: auto, by short trainings)',
    teacher_lr='Learning rate of the teacher. (default: auto)',
    x='Column of the input; columns of a table, with commas.',
    y='Column of the label.',
    delimiter='Delimiter between the labels of a sample, if it has several.',
    header='Whether the CSV begins with the names of its columns. (default: yes)',
    valid='Validation set: a fraction, a column that marks it, or a CSV file. (default: 0.2)',
    ignore='Class or value of masks to ignore, such as 255. (default: a class named void)',
    y_range="Lowest and highest number to predict: '0,100'. (default: no limits)",
    size='Size of images: 224, or 72x96 (height, width). (default: auto)',
    augment='Augmentation of images: flip, full (also rotation, zoom, lighting) or none. '
    '(default: flip)',
    batch_size='Batch size. (default: images and texts 64, masks 8, table 256)',
    pretrained='Start with published weights, which are downloaded. (default: no)',
    baseline='Also train the student without the teacher. (default: yes)',
    check='Check the teacher for mistakes first. (default: yes)',
    onnx='Also write the student as ONNX, if it can be exported. (default: yes)',
    seed='Seed of all random numbers. (default: 0)',
    seeds='Number of seeds to train each student with, to see how the gain varies. (default: 1)',
    device='cpu, cuda, cuda:1, mps ... (default: auto)',
    workers='Processes that load data. (default: 0)',
    log='tensorboard; history.csv is always written.',
)


def option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, show_default=False)


def flags_of_settings() -> list[Parameter]:
    """Return a flag for each setting of a run. Its default is None, for a setting that is not given."""
    types = {f.name: f.type if isinstance(f.type, type) else str for f in fields(TrainConfig)}
    return [
        Parameter(
            k,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[of | None, option(HELP[k])],
        )
        for k, of in types.items()
    ]


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
    """Train a student with a teacher, from files on disk, and show what was gained.

    The command trains the teacher (unless it is given), the student without the teacher, and the
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
    Your own teacher, which learn.export wrote:
      fastdistill train --data photos --teacher teacher.pkl --student resnet18 --epochs 20
    After Ctrl-C or a crash; and a finished run once more:
      fastdistill train --resume --out runs/photos-resnet18
      fastdistill train --config runs/photos-resnet18/config.toml

    The folder of the run gets report.html, report.json, changed.csv (what the teacher changed),
    history.csv, config.toml, environment.json, student.pkl (for fastai's load_learner), student/
    (weights as safetensors, a card, ONNX if possible) and teacher.safetensors.
    """
    given = {k: v for k, v in settings.items() if v is not None}
    # report mistakes in the settings before PyTorch is imported, or, by the first of several
    # processes, before fastai is imported
    if os.environ.get('WORLD_SIZE', '1') == '1':
        settings_of(given, config, out, resume)
    from ...base.distributed import joined_processes, on_first

    with joined_processes() as first:
        run_settings = on_first(lambda: settings_of(given, config, out, resume))
        from ...evaluation.number_format import over_seeds
        from ..training import TrainRun

        run = TrainRun(*run_settings, say=typer.echo, bar=sys.stdout.isatty())
        try:
            report = run()
        except KeyboardInterrupt:
            again = f'fastdistill train --resume --out {run.folder}'
            if first:
                typer.echo(f'\nInterrupted. Finished epochs are kept: {again}')
            raise typer.Exit(130) from None
    if not first:
        return
    report.show()
    typer.echo(f'Written: {Path(run.folder) / "report.html"}, and the student beside it')
    if len(report.seeds.seeds) > 1:
        typer.echo(over_seeds(report)[1])


own = [p for p in signature(train_command).parameters.values() if p.kind != p.VAR_KEYWORD]
train_command.__signature__ = Signature([*flags_of_settings(), *own])  # type: ignore[attr-defined]
