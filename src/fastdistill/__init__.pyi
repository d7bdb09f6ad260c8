from . import losses as losses, recipes as recipes
from .distiller import Distilled as Distilled, Distiller as Distiller, Recipe as Recipe, Term as Term
from .errors import DistillError as DistillError, DistillWarning as DistillWarning
from .features import layers as layers
from .outputs import Outputs as Outputs
from .recipes import (
    ab as ab,
    at as at,
    cc as cc,
    cwd as cwd,
    dist as dist,
    dkd as dkd,
    fsp as fsp,
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
    rkd as rkd,
    soft_labels as soft_labels,
    sp as sp,
    vid as vid,
)
from .schedule import Schedule as Schedule
from .teacher import Teacher as Teacher
