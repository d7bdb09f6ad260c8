"A whole training from files: data, teacher, student, comparison. The command `fastdistill train` calls it."
from .config import TrainConfig
from .run import Run, opened_run

__all__ = ['Run', 'TrainConfig', 'opened_run']
