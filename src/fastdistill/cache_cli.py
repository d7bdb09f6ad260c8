"`fastdistill cache`: write what a teacher says, look at it, ask it again."
import importlib.util, inspect, os, sys
from contextlib import contextmanager
from functools import cache as once
from pathlib import Path
from typing import Annotated
import torch, typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from .cache import TeacherCache
from .cache.folder import folder
from .cache.manifest import Manifest
from .cache.writer import finished, ranks
from .outputs import DistillError

__all__ = ['app']

app = typer.Typer(no_args_is_help=True, help="A teacher's outputs on disk: run it once, train as many students as you like.")

TEACHER = typer.Argument(help="A file that Teacher takes, as an exported Learner (.pkl), or 'file.py:name' of a teacher or its maker.")
DATA = typer.Argument(help="'file.py:name' of DataLoaders, or of a function that makes them.")
PATH = typer.Argument(help='Folder of the cache, or its URL.')
# what stored numbers may be off by, rounding included, over the largest of their row
TOLERANCE = dict(float32=1e-3, float16=.01, int8=.03)


@app.command()
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
    dls,model = loaded(data, dataloaders),loaded_teacher(teacher)
    with joined() as first, Bar(console := Console(quiet=not first), yes or not first) as bar:
        try:
            from .fastai.cached import cache_teacher
            cache = cache_teacher(model, dls, path, views, topk, dtype, layers or None, tail=tail, size=size, valid=valid, bs=bs,
                                  num_workers=workers, seed=seed, check=check and first, force=force,
                                  progress=bar.progress, forecast=bar.forecast)
        except KeyboardInterrupt:
            bar.stop()
            console.print(f'\nStopped. What was finished is kept in {path}: the same command goes on from there.', highlight=False)
            raise typer.Exit(130) from None
    console.print(str(cache), highlight=False, markup=False)


@contextmanager
def joined():
    "Meet the other processes that torchrun or accelerate launch started, if any; gives whether this is the first one"
    d = torch.distributed
    world,met = int(os.environ.get('WORLD_SIZE', 1)),d.is_available() and d.is_initialized()
    if world == 1 or met:
        yield ranks()[0] == 0
        return
    if torch.cuda.is_available(): torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    d.init_process_group('gloo')        # it is for words, not for tensors
    try:
        yield ranks()[0] == 0
        d.barrier()     # gloo's threads abort a process that ends while another still speaks to it
    finally: d.destroy_process_group()


@app.command()
def verify(
    path:Annotated[str, PATH],
    teacher:Annotated[str, TEACHER],
    data:Annotated[str, DATA],
    n:Annotated[int, typer.Option(help='How many rows.', min=1)]=64,
    tol:Annotated[float|None, typer.Option(help='How far off a logit may be, over the largest in its row.')]=None
):
    "Ask the teacher again about some of the rows; ends with 1 if its answers are others."
    from .fastai.cached import verify_cache
    v = verify_cache(path, loaded_teacher(teacher), loaded(data, dataloaders), n)
    typer.echo(str(v))
    if not v.share <= (TOLERANCE[v.dtype] if tol is None else tol): raise typer.Exit(1)


@app.command()
def info(
    path:Annotated[str, PATH],
    check:Annotated[bool, typer.Option('--check', help='Compare every file with its checksum.')]=False
):
    "What a cache holds, and whose answers they are."
    where = folder(path)
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


# what the user named

def loaded_teacher(name): return loaded(name, teacher_in) if '.py:' in name else name


def loaded(
    name, # 'file.py:name'
    use # fn(object) -> what is wanted of it
):
    file,_,attr = name.rpartition(':')
    if not file.endswith('.py') or not attr: raise DistillError(f"{name!r}: say which file and which name in it, as in 'train.py:dls'.")
    if not Path(file).is_file(): raise DistillError(f"There is no file {file!r}.")
    module = module_of(Path(file).resolve())
    if not hasattr(module, attr):
        of = lambda v: None if inspect.ismodule(v) else getattr(v, '__module__', module.__name__)
        own = [k for k,v in vars(module).items() if k[0] != '_' and of(v) == module.__name__]
        raise DistillError(f"{file} has no {attr!r}. It has: {', '.join(own)}")
    return use(getattr(module, attr))


@once
def module_of(file):
    "The file as a module, once: data and teacher may come from the same one"
    # subtle: under its own name where that is free, so that what was pickled by a program that imported it can be loaded
    name = file.stem if file.stem not in sys.modules else f'{file.stem}_'
    spec = importlib.util.spec_from_file_location(name, file)
    sys.path.insert(0, str(file.parent))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def makes(o):
    "Is this a function that needs no arguments?"
    return inspect.isroutine(o) and all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                                        for p in inspect.signature(o).parameters.values())


def teacher_in(o): return o() if makes(o) else o


def dataloaders(o):
    o = o() if makes(o) else o
    o = getattr(o, 'dls', o)       # a Learner's
    if not hasattr(o, 'loaders'):
        raise DistillError(f"A {type(o).__name__} is no fastai DataLoaders, nor a function without arguments that makes one.")
    return o


# what the user sees

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
