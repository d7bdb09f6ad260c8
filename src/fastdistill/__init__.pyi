from . import losses as losses, recipes as recipes
from .distiller import Distilled as Distilled, Distiller as Distiller, Heads as Heads
from .base.errors import DistillError as DistillError, DistillWarning as DistillWarning
from .features import layers as layers
from .base.outputs import Outputs as Outputs
from .recipes import (
    ab as ab,
    abkd as abkd,
    at as at,
    cc as cc,
    cwd as cwd,
    dist as dist,
    dkd as dkd,
    fsp as fsp,
    gram as gram,
    hard_labels as hard_labels,
    hint as hint,
    ickd as ickd,
    ifvd as ifvd,
    kd as kd,
    logit_std as logit_std,
    nkd as nkd,
    nst as nst,
    ofd as ofd,
    pairwise as pairwise,
    pkd as pkd,
    pkt as pkt,
    pretrain as pretrain,
    rkd as rkd,
    rld as rld,
    seed as seed,
    soft_labels as soft_labels,
    sp as sp,
    taid as taid,
    ttm as ttm,
    uld as uld,
    vid as vid,
    wttm as wttm,
)
from .recipes.default import auto as auto
from .recipes.schedule import Schedule as Schedule
from .recipes.term import Recipe as Recipe, Term as Term
from .teachers import Teacher as Teacher, with_items as with_items
