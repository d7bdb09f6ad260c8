"`fastdistill cache`: write, inspect, verify and share a teacher's outputs."

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...base.errors import DistillError
from ..arguments import CacheArg, DataArg, NoCheck, TeacherArg
from ..named_objects import dataloaders, load_object, load_teacher

cache_app = typer.Typer(
    no_args_is_help=True,
    help="Store a teacher's outputs on disk: run the teacher once, train as many students as you like.",
)

# largest allowed difference of stored numbers, relative to the largest number of the same row
TOLERANCE = dict(float32=1e-3, float16=0.01, int8=0.03)


@cache_app.command()
def write(
    teacher: TeacherArg,
    data: DataArg,
    path: Annotated[str, typer.Argument(help='Folder of the cache, or its URL.')],
    views: Annotated[
        int,
        typer.Option(help='Augmented views of each sample. 0 for the view without augmentation.'),
    ] = 1,
    store: Annotated[
        str,
        typer.Option(
            help='auto, logits, topk, hidden, draws, float32, float16 or int8; or options, such as '
            "'topk=10, dtype=int8'."
        ),
    ] = 'auto',
    layers: Annotated[
        list[str] | None,
        typer.Option(help='Layer whose output is also stored; may be given several times.'),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe that the stored outputs must be suitable for, such as 'kd(T=2)'."
        ),
    ] = None,
    valid: Annotated[
        bool, typer.Option('--valid', help='Also store outputs for the validation set.')
    ] = False,
    bs: Annotated[
        int | None, typer.Option(help='Batch size; default: same as the DataLoaders.')
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help='Number of workers; default: same as the DataLoaders.')
    ] = None,
    seed: Annotated[int, typer.Option(help='Seed of all random numbers.')] = 0,
    check: NoCheck = True,
    force: Annotated[
        bool, typer.Option('--force', help="Overwrite a cache that doesn't match.")
    ] = False,
    yes: Annotated[bool, typer.Option('--yes', '-y', help='Do not ask for confirmation.')] = False,
) -> None:
    """Run the teacher on the data and store its outputs. An interrupted run is resumed by the same
    command.

    Under torchrun or accelerate launch, each process writes part of the cache.
    """
    from ...base.distributed import joined_processes
    from ...fastai.cache_data import cache_teacher

    dls, model = load_object(data, dataloaders), load_teacher(teacher)
    with joined_processes() as first:

        def forecast(plan: Any) -> None:
            """Print the size of the cache before the teacher runs. Ask for confirmation if the
            cache needs more than half of the free disk space.
            """
            if not first:
                return
            typer.echo(str(plan) if plan.bytes else 'Nothing is missing.')
            # the writer itself raises an error if the cache needs more than the free disk space
            large = plan.free is not None and plan.free / 2 < plan.bytes <= plan.free
            if large and not yes:
                typer.confirm(
                    'That is more than half of the free disk space. Continue?', abort=True
                )

        try:
            cache = cache_teacher(
                model,
                dls,
                path,
                views,
                store_from_text(store),
                layers or None,
                recipe=recipe,
                valid=valid,
                run=dict(bs=bs, num_workers=workers, seed=seed, forecast=forecast),
                check=check and first,
                force=force,
            )
        except KeyboardInterrupt:
            if first:
                typer.echo(
                    f'\nInterrupted. Finished files are kept in {path}. To resume, run the same command.'
                )
            raise typer.Exit(130) from None
    if first:
        typer.echo(str(cache))


def store_from_text(text: str) -> str | dict[str, Any]:
    """Convert text such as 'topk=10, dtype=int8' to a dict of options. Return a single word
    unchanged.
    """
    if '=' not in text:
        return text
    pairs = [o.partition('=')[::2] for o in text.split(',')]
    return {k.strip(): number_or_text(v.strip()) for k, v in pairs}


def number_or_text(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@cache_app.command()
def verify(
    path: CacheArg,
    teacher: TeacherArg,
    data: DataArg,
    n: Annotated[int, typer.Option(help='Number of rows.', min=1)] = 64,
    tol: Annotated[
        float | None,
        typer.Option(
            help='Largest allowed difference of a logit, relative to the largest logit of the same row.'
        ),
    ] = None,
) -> None:
    """Run the teacher again on some samples. The exit code is 1 if the outputs differ from the
    stored ones.
    """
    from ...fastai.cache_data import verify_cache

    v = verify_cache(path, load_teacher(teacher), load_object(data, dataloaders), n)
    typer.echo(str(v))
    if not v.share <= (TOLERANCE[v.dtype] if tol is None else tol):
        raise typer.Exit(1)


@cache_app.command()
def info(
    path: CacheArg,
    check: Annotated[
        bool, typer.Option('--check', help='Compare every file with its checksum.')
    ] = False,
) -> None:
    "Show the contents of a cache and information about the teacher."
    from ...cache.file_store import open_folder
    from ...cache.manifest import Manifest
    from ...cache.pack import cache_facts
    from ...cache.reader import TeacherCache

    where = open_folder(path)
    if where.size('manifest.json') is None:
        raise DistillError(f'There is no cache at {path} (no manifest.json).')
    m = Manifest.read(where)
    table = Table(
        show_header=False,
        box=None,
        title=f'Teacher outputs in {escape(path)}',
        title_justify='left',
    )
    for k, v in cache_facts(where, m):
        table.add_row(escape(k), escape(v))
    Console().print(table)
    if check:
        TeacherCache(path).check()
        typer.echo('Every file matches its checksum.')


@cache_app.command('pack')
def pack_command(
    path: CacheArg,
    out: Annotated[
        Path, typer.Argument(help="'targets.zip' (one file, not compressed), or a new folder.")
    ],
    title: Annotated[
        str | None,
        typer.Option(help='Title of the card; default: derived from the name of the teacher.'),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help='What the samples are, and where to get them.')
    ] = None,
    note: Annotated[str, typer.Option(help='More text for the card.')] = '',
    license: Annotated[
        str | None, typer.Option(help="License of the stored outputs, such as 'cc-by-4.0'.")
    ] = None,
    teacher_license: Annotated[str | None, typer.Option(help='License of the teacher.')] = None,
    data_license: Annotated[str | None, typer.Option(help='License of the data.')] = None,
    force: Annotated[bool, typer.Option('--force', help='Overwrite a file of this name.')] = False,
) -> None:
    """Copy a cache to share it, and add a card (README.md). All files are first compared with their
    checksums.

    Example: fastdistill cache pack targets targets.zip --license cc-by-4.0.
    """
    from ...cache.pack import pack_cache

    out = pack_cache(
        path,
        out,
        title=title,
        data=data,
        note=note,
        license=license,
        teacher_license=teacher_license,
        data_license=data_license,
        force=force,
    )
    typer.echo(f'Written: {out}')


@cache_app.command('unpack')
def unpack_command(
    packed: Annotated[Path, typer.Argument(help='File written by `fastdistill cache pack`.')],
    path: Annotated[Path, typer.Argument(help='Folder of the cache, new or empty.')],
) -> None:
    "Unpack a cache into a folder, and compare all files with their checksums."
    from ...cache.pack import unpack_cache

    typer.echo(str(unpack_cache(packed, path)))
