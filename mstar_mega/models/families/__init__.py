"""One file per policy: its sizes, image tiling, chat template and weight map."""

from mstar_mega.models.families.base import Family
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.families.minicpm_v2_5 import MiniCPMV25
from mstar_mega.models.families.phi3_5_vision import Phi35Vision

FAMILIES: dict[str, type[Family]] = {family.name: family for family in (InternVL2, Phi35Vision, MiniCPMV25)}
"""By ``model.family``."""
