"""Training pruned models: losses and penalties for your own loop, and `finetune`, which does it with one call."""

from structprune.training.average import WeightAverage
from structprune.training.distillation import FeatureDistillation, distillation_loss
from structprune.training.evaluation import split
from structprune.training.finetune import Epoch, Finetuned, finetune

__all__ = ["Epoch", "FeatureDistillation", "Finetuned", "WeightAverage", "distillation_loss", "finetune", "split"]
