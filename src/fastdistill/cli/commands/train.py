"`fastdistill train`: from data to a distilled student and a report, in one command."

import os
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from ..training.run_settings import settings_of

__all__ = ['train_command']

Text: TypeAlias = str | None
Number: TypeAlias = int | None
Flag: TypeAlias = bool | None


def option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, show_default=False)


def train_command(
    data: Annotated[Text, option('Folder or CSV file.')] = None,
    teacher: Annotated[
        Text,
        option('Architecture to train first, a file (Learner .pkl, trees .joblib ...), or a run.'),
    ] = None,
    student: Annotated[
        Text, option('Architecture: resnet18, mobilenet_v3_small, cnn, awd_lstm, tabular ...')
    ] = None,
    teacher_layers: Annotated[
        Text, option("Layer sizes of a cnn, awd_lstm, embedding_bag or tabular teacher: '64,32'.")
    ] = None,
    student_layers: Annotated[Text, option('Layer sizes of the student, in the same form.')] = None,
    teacher_weights: Annotated[
        Text, option("A .safetensors file with the teacher's weights.")
    ] = None,
    task: Annotated[
        Text, option('images, masks, texts or table. (default: auto, inferred from the data)')
    ] = None,
    recipe: Annotated[Text, option("Such as 'kd(T=4, alpha=.9) + at()'. (default: auto)")] = None,
    epochs: Annotated[Number, option('Epochs of each training. (default: 10)')] = None,
    teacher_epochs: Annotated[Number, option('Epochs of the teacher. (default: --epochs)')] = None,
    lr: Annotated[
        Text, option('Learning rate of the students. (default: auto, by lr_find)')
    ] = None,
    teacher_lr: Annotated[Text, option('Learning rate of the teacher. (default: auto)')] = None,
    x: Annotated[
        Text, option('Column of the input; columns of a table, with commas.', '--x')
    ] = None,
    y: Annotated[Text, option('Column of the label.', '--y')] = None,
    delimiter: Annotated[
        Text, option('Delimiter between the labels of a sample, if it has several.')
    ] = None,
    header: Annotated[
        Flag, option('Whether the CSV begins with the names of its columns. (default: yes)')
    ] = None,
    valid: Annotated[
        Text,
        option('Validation set: a fraction, a column that marks it, or a CSV file. (default: 0.2)'),
    ] = None,
    ignore: Annotated[
        Text,
        option('Class or value of masks to ignore, such as 255. (default: a class named void)'),
    ] = None,
    y_range: Annotated[
        Text, option("Lowest and highest number to predict: '0,100'. (default: no limits)")
    ] = None,
    size: Annotated[
        Text, option('Size of images: 224, or 72x96 (height, width). (default: auto)')
    ] = None,
    augment: Annotated[
        Text,
        option(
            'Augmentation of images: flip, full (also rotation, zoom, lighting) or '
            'none. (default: flip)'
        ),
    ] = None,
    batch_size: Annotated[
        Number, option('Batch size. (default: images and texts 64, masks 8, table 256)')
    ] = None,
    pretrained: Annotated[
        Flag, option('Start with published weights, which are downloaded. (default: no)')
    ] = None,
    baseline: Annotated[
        Flag, option('Also train the student without the teacher. (default: yes)')
    ] = None,
    check: Annotated[Flag, option('Check the teacher for mistakes first. (default: yes)')] = None,
    onnx: Annotated[
        Flag, option('Also write the student as ONNX, if it can be exported. (default: yes)')
    ] = None,
    seed: Annotated[Number, option('Seed of all random numbers. (default: 0)')] = None,
    device: Annotated[Text, option('cpu, cuda, cuda:1, mps ... (default: auto)')] = None,
    workers: Annotated[Number, option('Processes that load data. (default: 0)')] = None,
    log: Annotated[Text, option('tensorboard; history.csv is always written.')] = None,
    out: Annotated[Text, option('Folder of the run. (default: a new one in runs/)')] = None,
    config: Annotated[Text, option('Settings of a previous run: runs/NAME/config.toml.')] = None,
    resume: Annotated[
        bool, option('Continue the run in the folder, with the same result.', '--resume')
    ] = False,
) -> None:
    """Train a student with a teacher, from files on disk, and show what was gained.

    The command trains the teacher (unless it is given), the student without the teacher, and the
    student with the teacher. Then it compares the models.

    
    Images, a folder for each class (or train/CLASS and valid/CLASS):
      fastdistill train --data photos --teacher resnet34 --student resnet18
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

    The folder of the run gets report.html, report.json, history.csv, config.toml, environment.json,
    student.pkl (for fastai's load_learner), student/ (weights as safetensors, a card, ONNX if
    possible) and teacher.safetensors.
    """
    given = {
        k: v for k, v in locals().items() if v is not None and k not in ('out', 'config', 'resume')
    }
    # report mistakes in the settings before PyTorch is imported, or, by the first of several
    # processes, before fastai is imported
    if os.environ.get('WORLD_SIZE', '1') == '1':
        settings_of(given, config, out, resume)
    from ...base.distributed import joined_processes, on_first

    with joined_processes() as first:
        settings = on_first(lambda: settings_of(given, config, out, resume))
        from ..training import TrainRun

        run = TrainRun(*settings, say=typer.echo, bar=sys.stdout.isatty())
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
