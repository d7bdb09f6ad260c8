from . import losses as losses
from . import recipes as recipes
from .base.errors import DistillError as DistillError
from .base.errors import DistillWarning as DistillWarning
from .base.outputs import LinearLogits as LinearLogits
from .base.outputs import Outputs as Outputs
from .distiller import Distilled as Distilled
from .distiller import Distiller as Distiller
from .features import layers as layers
from .recipes import at as at
from .recipes import dist as dist
from .recipes import dkd as dkd
from .recipes import hard_labels as hard_labels
from .recipes import hint as hint
from .recipes import kd as kd
from .recipes import logit_std as logit_std
from .recipes import soft_labels as soft_labels
from .recipes.default import auto as auto
from .recipes.schedule import Schedule as Schedule
from .recipes.term import Recipe as Recipe
from .recipes.term import Term as Term
from .teachers import Teacher as Teacher
from .teachers import with_items as with_items

__version__: str
