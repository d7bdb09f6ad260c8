from . import losses as losses
from . import recipes as recipes
from .base.errors import DistillError as DistillError
from .base.errors import DistillWarning as DistillWarning
from .base.outputs import LinearLogits as LinearLogits
from .base.outputs import Outputs as Outputs
from .distiller import Distilled as Distilled
from .distiller import Distiller as Distiller
from .distiller import Heads as Heads
from .features import layers as layers
from .recipes import (
    ab as ab,
)
from .recipes import (
    abkd as abkd,
)
from .recipes import (
    at as at,
)
from .recipes import (
    cc as cc,
)
from .recipes import (
    cwd as cwd,
)
from .recipes import (
    dist as dist,
)
from .recipes import (
    dkd as dkd,
)
from .recipes import (
    fsp as fsp,
)
from .recipes import (
    gram as gram,
)
from .recipes import (
    hard_labels as hard_labels,
)
from .recipes import (
    hint as hint,
)
from .recipes import (
    ickd as ickd,
)
from .recipes import (
    ifvd as ifvd,
)
from .recipes import (
    kd as kd,
)
from .recipes import (
    logit_std as logit_std,
)
from .recipes import (
    nkd as nkd,
)
from .recipes import (
    nst as nst,
)
from .recipes import (
    ofd as ofd,
)
from .recipes import (
    pairwise as pairwise,
)
from .recipes import (
    pkd as pkd,
)
from .recipes import (
    pkt as pkt,
)
from .recipes import (
    pretrain as pretrain,
)
from .recipes import (
    rkd as rkd,
)
from .recipes import (
    rld as rld,
)
from .recipes import (
    seed as seed,
)
from .recipes import (
    soft_labels as soft_labels,
)
from .recipes import (
    sp as sp,
)
from .recipes import (
    taid as taid,
)
from .recipes import (
    ttm as ttm,
)
from .recipes import (
    uld as uld,
)
from .recipes import (
    vid as vid,
)
from .recipes import (
    wttm as wttm,
)
from .recipes.default import auto as auto
from .recipes.schedule import Schedule as Schedule
from .recipes.term import Recipe as Recipe
from .recipes.term import Term as Term
from .teachers import Teacher as Teacher
from .teachers import with_items as with_items
