"`fastdistill cache`: write a teacher's outputs, inspect them, verify them."
from typing import Annotated
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from ..cache.folder import open_folder
from ..cache.manifest import Manifest
from ..cache.reader import TeacherCache
from ..cache.writer import finished
from ..outputs import DistillError
from ..ranks import joined_processes
from .objects import dataloaders, load_object, load_teacher

__all__ = ['cache_app']

cache_app = typer.Typer(no_args_is_help=True, help="A teacher's outputs on disk: run it once, train as many students as you like.")

TEACHER = typer.Argument(help="A file that Teacher takes, as an exported Learner (.pkl), or 'file.py:name' of a teacher or its maker.")
DATA = typer.Argument(help="'file.py:name' of DataLoaders, or of a function that makes them.")
PATH = typer.Argument(help='Folder of the cache, or its URL.')
# what stored numbers may be off by, rounding included, over the largest of their row
TOLERANCE = dict(float32=1e-3, float16=.01, int8=.03)


@cache_app.command()
def write(
    teacher:Annotated[str, TEACHER],
    data:Annotated[str, DATA],
    path:Annotated[str, PATH],
    views:Annotated[int, typer.Option(help='Augmented views of each sample; 0: the clean one.')]=1,
    topk:Annotated[int|None, typer.Option(help='Keep the likeliest classes only.')]=None,
    dtype:Annotated[str, typer.Option(help='float32, float16 or int8.')]='float16',
    layers:Annotated[list[str]|None, typer.Option(help='A layer to store too; may be given several times.')]=None,
    tail:Annotated[str, typer.Option(help='What is assumed of classes that are not kept: mean, uniform, zero or bucket.')]='mean',
    size:Annotated[tuple[int, int]|None, typer.Option(help='Height and width to which maps are reduced.')]=None,
    valid:Annotated[bool, typer.Option('--valid', help='The validation set too.')]=False,
    bs:Annotated[int|None, typer.Option(help="Batch size; else the DataLoaders' own.")]=None,
    workers:Annotated[int|None, typer.Option(help="Workers; else the DataLoaders' own.")]=None,
    seed:Annotated[int, typer.Option(help='Of all random numbers.')]=0,
    check:Annotated[bool, typer.Option(help='Look for mistakes first.')]=True,
    force:Annotated[bool, typer.Option('--force', help="Write anew over a cache that doesn't fit.")]=False,
    yes:Annotated[bool, typer.Option('--yes', '-y', help='Ask nothing.')]=False
):
    """Run the teacher over the data and store what it says; one that was stopped goes on where it was. Under torchrun or accelerate
    launch, each process writes its share"""
    dls,model = load_object(data, dataloaders),load_teacher(teacher)
    with joined_processes() as first, Bar(console := Console(quiet=not first), yes or not first) as bar:
        try:
            from ..fastai.cache_data import cache_teacher
            cache = cache_teacher(model, dls, path, views, topk, dtype, layers or None, tail=tail, size=size, valid=valid, bs=bs,
                                  num_workers=workers, seed=seed, check=check and first, force=force,
                                  progress=bar.progress, forecast=bar.forecast)
        except KeyboardInterrupt:
            bar.stop()
            console.print(f'\nStopped. What was finished is kept in {path}: the same command goes on from there.', highlight=False)
            raise typer.Exit(130) from None
    console.print(str(cache), highlight=False, markup=False)


@cache_app.command()
def verify(
    path:Annotated[str, PATH],
    teacher:Annotated[str, TEACHER],
    data:Annotated[str, DATA],
    n:Annotated[int, typer.Option(help='How many rows.', min=1)]=64,
    tol:Annotated[float|None, typer.Option(help='How far off a logit may be, over the largest in its row.')]=None
):
    "Ask the teacher again about some of the rows; ends with 1 if its answers are others."
    from ..fastai.cache_data import verify_cache
    v = verify_cache(path, load_teacher(teacher), load_object(data, dataloaders), n)
    typer.echo(str(v))
    if not v.share <= (TOLERANCE[v.dtype] if tol is None else tol): raise typer.Exit(1)


@cache_app.command()
def info(
    path:Annotated[str, PATH],
    check:Annotated[bool, typer.Option('--check', help='Compare every file with its checksum.')]=False
):
    "What a cache holds, and whose answers they are."
    where = open_folder(path)
    if where.size('manifest.json') is None: raise DistillError(f"There is no cache at {path} (no manifest.json).")
    m = Manifest.from_json(where.read('manifest.json'), where)
    table = Table(show_header=False, box=None, title=f'Teacher outputs in {path}', title_justify='left')
    for k,v in facts(where, m): table.add_row(k, v)
    Console().print(table)
    if check: TeacherCache(path).check()
    if check: typer.echo('Every file is as its checksum says.')


def facts(where, m):
    "What is worth knowing of a cache, in words"
    yield 'samples',f'{m.count:,}'
    yield 'views',f'{m.views} of each, augmented' if m.views else 'the clean one of each'
    yield 'a row',f'{m.layout.bytes} bytes: ' + ', '.join(f'{f.name} {f.dtype} {"x".join(map(str, f.shape)) or 1}' for f in m.layout.fields)
    if m.layout.n: yield 'of',f'{m.layout.n} classes, the rest: {m.layout.tail}'
    shards = list(m.all_shards())
    done = len(shards) if m.complete else sum(finished(where, s) for s in shards)
    yield 'files',f'{done} of {len(shards)} written, {m.bytes/1e6:.1f} MB' + ('' if m.complete else ' in all: write it once more to go on')
    yield 'teacher',', '.join(f'{k} {v}' for k,v in m.teacher.items())
    if m.vocab: yield 'classes',', '.join(m.vocab[:10]) + (f' ... ({len(m.vocab)})' if len(m.vocab) > 10 else '')
    for k,v in m.transforms.items(): yield k,v
    yield 'written with',', '.join(f'{k} {v}' for k,v in m.versions.items())
    if where.sub('valid').size('manifest.json') is not None: yield 'validation set','is there too'


class Speed(ProgressColumn):
    def render(self, task): return '' if task.speed is None else f'{task.speed:,.0f} samples/s'


class Bar:
    "The forecast of each pass, and how far it is"
    def __init__(self, console, yes):
        self.console,self.yes,self.task = console,yes,None
        self.bar = Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), Speed(),
                            TextColumn('{task.fields[mb]:.1f} MB'), TimeRemainingColumn(), console=console)

    def __enter__(self): return self
    def __exit__(self, *_): self.stop()
    def stop(self): self.bar.stop()

    def forecast(self, plan):
        "Before the teacher runs: what it will take, and whether that is wanted"
        self.stop()
        self.task = None
        self.console.print(str(plan) if plan.bytes else 'Nothing is missing.', highlight=False)
        # more than there is, is refused by whoever called this
        if plan.free is not None and plan.free/2 < plan.bytes <= plan.free and not self.yes:
            typer.confirm('That is more than half of the free disk. Go on?', abort=True)

    def progress(self, done, total, n_bytes):
        if self.task is None:
            self.task = self.bar.add_task('teacher', total=total, mb=0.)
            self.bar.start()
        self.bar.update(self.task, completed=done, mb=n_bytes/1e6)
