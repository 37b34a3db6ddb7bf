"""Fine-tuning: a `Recipe` says what, `train` does it.

`config` has the recipes, `losses` what they minimise, `trainer` the stages that run the backbone,
`cached_stage` the fast stage 2, `interpolation` what lies between two models, `recipes` the order of things.
"""

from deebert.training.config import (
    ALTERNATING,
    BEST,
    JOINT,
    OFF_RAMPS,
    PAPER_EPOCHS,
    PAPER_STAGE_2,
    RECIPES,
    TWO_STAGE,
    Alternating,
    BackboneStage,
    BornAgain,
    Distillation,
    EarlyStopping,
    FinalOnly,
    Interpolation,
    Joint,
    OffRampStage,
    Recipe,
    StageConfig,
    Teacher,
)
from deebert.training.data import check_labels
from deebert.training.interpolation import interpolate, snapshot
from deebert.training.log import read_log
from deebert.training.processes import processes
from deebert.training.recipes import LOG_NAME, TrainingReport, train, unfinished
from deebert.training.stage import StageReport

__all__ = [
    "ALTERNATING",
    "BEST",
    "JOINT",
    "LOG_NAME",
    "OFF_RAMPS",
    "PAPER_EPOCHS",
    "PAPER_STAGE_2",
    "RECIPES",
    "TWO_STAGE",
    "Alternating",
    "BackboneStage",
    "BornAgain",
    "Distillation",
    "EarlyStopping",
    "FinalOnly",
    "Interpolation",
    "Joint",
    "OffRampStage",
    "Recipe",
    "StageConfig",
    "StageReport",
    "Teacher",
    "TrainingReport",
    "check_labels",
    "interpolate",
    "processes",
    "read_log",
    "snapshot",
    "train",
    "unfinished",
]
