"""Read and write the settings for the runs in a folder. PyTorch is not imported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..base.atomic_files import write_json
from ..base.errors import DistillError

RUNS_FORMAT = 4  # version of the folder's format
SETTINGS = 'settings.json'


def read_settings(folder: Path, results: str = 'run_*.json') -> dict[str, Any] | None:
    """Return the settings with which the runs in a folder were started. Return None for a new
    folder.

    Args:
        folder: Folder of the runs.
        results: Pattern of the files that only a folder with settings may contain.
    """
    path = folder / SETTINGS
    if not path.is_file():
        if any(folder.glob(results)):
            raise DistillError(
                f'{path} is missing: it was deleted, or a different version of fastdistill wrote this '
                'folder. Use a different folder.'
            )
        return None
    unknown = "It can't be checked whether the settings changed. Use a different folder."
    settings = read_json(path, dict, unknown)
    if (there := settings.pop('format', 1)) != RUNS_FORMAT:
        raise DistillError(
            f'{folder} contains an experiment in the format of a different version of fastdistill '
            f'({there} there, {RUNS_FORMAT} here). Use a different folder.'
        )
    return settings


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings for the runs in a folder."""
    write_json(folder / SETTINGS, dict(settings, format=RUNS_FORMAT))


def read_json(path: Path, made: Callable[[Any], Any], advice: str) -> Any:
    """Read a JSON file. Raise a DistillError if it is damaged.

    Args:
        path: Path of the file.
        made: fn(content) -> what to return.
        advice: What to do if the file is damaged.
    """
    try:
        return made(json.loads(path.read_text(encoding='utf-8')))
    except (ValueError, TypeError) as e:
        raise DistillError(f'{path} is damaged ({e}). {advice}') from e
