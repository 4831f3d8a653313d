"""Recipes: optimizers made of a chain, each on one screen (without AdaLomo's family), and the registry by name."""

from optstate.recipes.ada_rank_grad import AdaRankGrad
from optstate.recipes.adam_mini import AdamMini
from optstate.recipes.adam_relatives import AdamSMN, AdEMAMix
from optstate.recipes.adamem import AdaMeM
from optstate.recipes.adamfactor import AdamFactor
from optstate.recipes.adamw import AdamW
from optstate.recipes.apollo import Apollo, ApolloMini
from optstate.recipes.came import CAME
from optstate.recipes.fira import Fira
from optstate.recipes.galore import GaLore, GaLore2
from optstate.recipes.grass import Grass
from optstate.recipes.ldadam import LDAdam
from optstate.recipes.lion import Lion
from optstate.recipes.low_bit import AdamW4bit, AdamW8bit, Lion8bit, SGDM8bit
from optstate.recipes.mlorc import MLorc, MLorcLion
from optstate.recipes.muon import Muon, Muon8bit
from optstate.recipes.q_galore import QGaLore
from optstate.recipes.registry import describe, get, names
from optstate.recipes.scale import Scale
from optstate.recipes.schedule_free import ScheduleFreeAdamW
from optstate.recipes.sgd import SGD
from optstate.recipes.sm3 import SM3
from optstate.recipes.smmf import SMMF
from optstate.recipes.soap import SOAP
from optstate.recipes.sumo import SUMO

__all__ = [
    "CAME",
    "SGD",
    "SM3",
    "SMMF",
    "SOAP",
    "SUMO",
    "AdEMAMix",
    "AdaMeM",
    "AdaRankGrad",
    "AdamFactor",
    "AdamMini",
    "AdamSMN",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "Apollo",
    "ApolloMini",
    "Fira",
    "GaLore",
    "GaLore2",
    "Grass",
    "LDAdam",
    "Lion",
    "Lion8bit",
    "MLorc",
    "MLorcLion",
    "Muon",
    "Muon8bit",
    "QGaLore",
    "SGDM8bit",
    "Scale",
    "ScheduleFreeAdamW",
    "describe",
    "get",
    "names",
]
