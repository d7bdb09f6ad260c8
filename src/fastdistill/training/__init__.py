"A whole training from files: data, teacher, student, comparison. The command `fastdistill train` calls it."
from .config import TrainConfig
from .run import TrainRun, opened_run

__all__ = ['TrainRun', 'TrainConfig', 'opened_run']
