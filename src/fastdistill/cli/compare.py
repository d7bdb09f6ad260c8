"`fastdistill compare`, `report` and `export`: what was gained, and the student as a file."
from pathlib import Path
from typing import Annotated
import typer
from ..errors import DistillError
from .objects import dataloaders, learner, load_object, load_teacher

__all__ = ['compare_command', 'export_command', 'report_command']

MODELS = typer.Argument(metavar='NAME=MODEL ...', help="teacher=teacher.pkl alone=train.py:alone ... A model is a file "
                                                       "that Teacher takes, or 'file.py:name'.")


def compare_command(
    models:Annotated[list[str], MODELS],
    data:Annotated[str|None, typer.Option(help="'file.py:name' of DataLoaders; default: the last Learner's.")]=None,
    out:Annotated[Path|None, typer.Option(help='Folder for report.html, report.json and report.md.')]=None,
    teacher:Annotated[str|None, typer.Option(help="Name of the teacher; default: 'teacher'.")]=None,
    baseline:Annotated[str|None, typer.Option(help="Name of the model without a teacher; default: 'alone'.")]=None,
    headline:Annotated[str|None, typer.Option(help="The measure that counts first, such as 'nll'.")]=None,
    seconds:Annotated[float, typer.Option(help='For each measurement of time; 0: none.')]=.5,
    title:Annotated[str, typer.Option(help='Of the report.')]=''
):
    """Measure models side by side on the same validation data, and say which differences are more than chance.

    Example: fastdistill compare teacher=t.pkl alone=a.pkl distilled=s.pkl --data train.py:dls --out runs/a"""
    from ..fastai import compare as compare_models
    named = dict(map(split_name, models))
    dls = None if data is None else load_object(data, dataloaders)
    r = compare_models({k: load_teacher(v) for k,v in named.items()}, dls, teacher=teacher, baseline=baseline,
                       headline=headline, seconds=seconds, title=title)
    r.show()
    if out is None: return
    out.mkdir(parents=True, exist_ok=True)
    r.to_json(out/'report.json')
    r.to_html(out/'report.html')
    (out/'report.md').write_text(r.to_markdown(level=1), encoding='utf-8')
    typer.echo(f'Written: {out}/report.html, report.json, report.md')


def split_name(text):
    "('teacher', 'teacher.pkl') of 'teacher=teacher.pkl'"
    name,_,what = text.partition('=')
    if not name or not what: raise DistillError(f"{text!r}: give a name and a model, as in big=teacher.pkl")
    return name,what


def report_command(
    runs:Annotated[list[Path], typer.Argument(help='report.json files, or folders with one.')],
    html:Annotated[Path|None, typer.Option(help='Write the page of a single report.')]=None,
    plot:Annotated[Path|None, typer.Option(help='Write a picture of all runs.')]=None
):
    """Show reports again: one in full, several as a table of all students, the best first.

    Example: fastdistill report runs/* --plot runs.png"""
    from ..plots import plot_runs
    from ..report import Report, print_runs
    if html is not None and len(runs) > 1:
        raise DistillError(f"html= is the page of one report, but there are {len(runs)}.")
    found = {str(p.parent if p.is_file() else p): Report.from_json(p if p.is_file() else p/'report.json') for p in runs}
    if len(found) == 1:
        r, = found.values()
        r.show()
        if html is not None: r.to_html(html)
    else: print_runs(found)
    if plot is not None: plot_runs(found).savefig(plot, dpi=110)


def export_command(
    student:Annotated[str, typer.Argument(help="'file.py:name' of the Learner, with its data.")],
    path:Annotated[Path, typer.Argument(help="'student.onnx', 'student.pt2', or a folder for weights and a card.")],
    int8:Annotated[bool, typer.Option('--int8', help='Of an .onnx file: quantize, and measure what it costs.')]=False
):
    """Write a trained student as a file that needs neither fastai nor fastdistill, and check it against the Learner.

    Example: fastdistill export train.py:student student.onnx --int8"""
    from ..fastai import export_student, save_student
    learn = load_object(student, learner)
    if path.suffix in ('.onnx', '.pt2'): typer.echo(str(export_student(learn, path, int8=int8)))
    elif int8: raise DistillError("int8=True needs an .onnx file.")
    else: typer.echo(f'Written: {save_student(learn, path)}')
