"""torch-pruning's ways of calling: ``import structprune.compat.torch_pruning as tp``.

The names and arguments of torch-pruning 1.6 on structprune's engine, for code that is to be moved step by step. What it
finds may differ where torch-pruning is wrong: outputs of the model keep their shape, heads need not be listed,
attributes that a forward reads are repaired, and what is not understood stays or is refused. What each call is in
structprune itself is told in docs/coming-from-torch-pruning.md.

Example:
    >>> import torch
    >>> import structprune.compat.torch_pruning as tp
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    >>> pruner = tp.pruner.MagnitudePruner(
    ...     model, torch.randn(1, 3, 8, 8), importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5
    ... )
    >>> pruner.step()
    >>> model[0].out_channels
    4
"""

from torch import load as load
from torch import save as save

from structprune.compat.torch_pruning import function as function
from structprune.compat.torch_pruning import importance as importance
from structprune.compat.torch_pruning import pruner as pruner
from structprune.compat.torch_pruning import utils as utils
from structprune.compat.torch_pruning.dependency import DependencyGraph as DependencyGraph
from structprune.compat.torch_pruning.dependency import Group as Group
from structprune.compat.torch_pruning.utils import load_state_dict as load_state_dict
from structprune.compat.torch_pruning.utils import state_dict as state_dict

globals().update(function.PRUNING_FUNCTIONS)
