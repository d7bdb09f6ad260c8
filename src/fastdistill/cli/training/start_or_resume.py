"""Determine the settings and the folder of a run. PyTorch is imported only to read a recipe."""

from dataclasses import asdict, replace
from pathlib import Path

from ...base.errors import DistillError
from ...search.run_folder import read_settings, write_settings
from ..recipe_names import check_recipe_text
from .config import TrainConfig, config_of_run, read_config


def settings_of(
    given: dict, config_file: Path | str | None, out: Path | str | None, resume: bool
) -> tuple[TrainConfig, Path]:
    """Return the TrainConfig and the folder of a run.

    Args:
        given: Settings by name.
        config_file: TOML file with settings. Settings in `given` override those in the file.
        out: Folder of the run. None for a new folder in runs/.
        resume: True to continue the run in `out` if there is one.
    """
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise DistillError("resume=True needs the folder of the run: out='runs/NAME'.")
    if resume and folder and (folder / 'config.toml').is_file():
        if config_file is not None:
            raise DistillError(f'{folder} has its own settings: omit config=.')
        stored = config_of_run(folder).absolute()
        check_unchanged(given, stored, folder)
        if (folder / 'report.json').is_file():
            raise DistillError(f'The run in {folder} is finished.')
        return settings_at_begin(checked(stored), folder), folder
    if resume and not given and config_file is None:
        raise DistillError(f'There is no run in {folder} (no config.toml).')
    settings = {} if config_file is None else read_config(config_file)
    for role in ('teacher', 'student'):
        if role in given:  # the layers in the file belong to the architecture in the file
            settings.pop(f'{role}_layers', None)
    settings |= given
    if missing := [k for k in ('data', 'teacher', 'student') if k not in settings]:
        raise DistillError(
            f'{"=, ".join(missing)}= is missing. Example: fastdistill train --data photos --teacher '
            'resnet34 --student resnet18'
        )
    config = checked(TrainConfig(**settings).absolute())
    if folder is None:
        folder = free_folder(config)
    # subtle: the folder of a run that was killed right after it started has no settings yet
    begins = lambda p: p.name == 'checkpoints' or p.suffix == '.tmp'
    if folder.exists() and not (folder.is_dir() and all(map(begins, folder.iterdir()))):
        what = 'a run' if (folder / 'config.toml').is_file() else 'something else'
        raise DistillError(
            f'{folder} already contains {what}. Pass a different out=, or resume=True to continue a run.'
        )
    return settings_at_begin(config, folder), folder


def checked(config: TrainConfig) -> TrainConfig:
    """Return the settings. Raise a DistillError if a file does not exist or the recipe is not
    valid.
    """
    config.check_files()
    if config.recipe != 'auto':
        check_recipe_text(config.recipe)  # fast, because it does not import PyTorch
        from ...recipes.recipe_text import recipe_from_text

        recipe_from_text(config.recipe)
    return config


def check_unchanged(given: dict, stored: TrainConfig, folder: Path) -> None:
    asked = asdict(TrainConfig(**asdict(stored) | given).absolute())
    found = read_begun(folder).get('found', ['lr', 'teacher_lr'])
    for k in given:
        if asked[k] != getattr(stored, k) and not (asked[k] == 'auto' and k in found):
            raise DistillError(
                f'{folder} contains a run with {k}={getattr(stored, k)!r}, but now {k}={asked[k]!r}. Pass '
                'a different out= for the new run.'
            )


def settings_at_begin(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the settings, with the learning rates found earlier. Raise a DistillError if config.toml
    was changed since the run began.
    """
    begun, now = read_begun(folder), asdict(config)
    before = begun.get('settings', {})
    found = {k: before[k] for k in begun.get('found', []) if now[k] == 'auto'}
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
            f'{folder / "config.toml"} has {", ".join(f"{k}={now[k]!r}" for k in wrong)}, but the run '
            f'began with {was}. Restore this to resume, or start a new run with config= and a '
            'different out=.'
        )
    return replace(config, **found)


def runs_folder(folder: Path) -> Path:
    """Return the folder with the settings, results and checkpoints of the training runs."""
    return folder / 'checkpoints'


def read_begun(folder: Path) -> dict:
    """Read what `write_begun` wrote. Return an empty dict for a new run.

    Args:
        folder: Folder of the run.

    Returns:
        A dict with the 'settings', the fingerprint of the 'data', and the names of the learning
        rates that were 'found' with lr='auto'.
    """
    return read_settings(runs_folder(folder), '*.pt') or {}


def write_begun(folder: Path, config: TrainConfig, data: dict, found: list[str]) -> None:
    """Write the settings and the data fingerprint of a run at its beginning."""
    write_settings(runs_folder(folder), dict(settings=asdict(config), data=data, found=found))


def free_folder(config: TrainConfig) -> Path:
    stem = f'{Path(config.data).name.split(".")[0]}-{config.student}'
    names = (f'{stem}-{i}' if i > 1 else stem for i in range(1, 10000))
    return next(p for p in (Path('runs') / n for n in names) if not p.exists())
