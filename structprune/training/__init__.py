"""Training pruned models: losses and penalties for your own loop, and `finetune`, which does it with one call."""

from structprune.training.average import WeightAverage
from structprune.training.channel_decay import ChannelDecay, shrinkage
from structprune.training.distillation import FeatureDistillation, distillation_loss
from structprune.training.evaluation import split
from structprune.training.finetuning import Epoch, Finetuned, finetune
from structprune.training.loading import load_pruned
from structprune.training.penalties import GroupLasso, GrowingRegularisation, NormScalePenalty, add_gradient
from structprune.training.soft import SoftPruner

__all__ = [
    "ChannelDecay",
    "Epoch",
    "FeatureDistillation",
    "Finetuned",
    "GroupLasso",
    "GrowingRegularisation",
    "NormScalePenalty",
    "SoftPruner",
    "WeightAverage",
    "add_gradient",
    "distillation_loss",
    "finetune",
    "load_pruned",
    "shrinkage",
    "split",
]
