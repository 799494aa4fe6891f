"""torch-pruning's criteria on the channels inside residual blocks, pruned to a number of multiply-accumulates."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import structprune
from harness import cifar

Batch = tuple[Tensor, Tensor]
Prepared = tuple[nn.Module, Any]
BISECTIONS = 9
# Samples whose gradients are taken one by one.
SINGLE = 128


def _plain(make: Callable[[Any], Any]) -> Callable[[nn.Module, Tensor, list[Batch]], Any]:
    def prepare(model: nn.Module, x: Tensor, data: list[Batch]) -> Any:
        import torch_pruning as tp

        return make(tp.importance)

    return prepare


def _taylor(model: nn.Module, x: Tensor, data: list[Batch]) -> Any:
    import torch_pruning as tp

    _gradients(model, data)
    return tp.importance.TaylorImportance()


def _gradients(model: nn.Module, data: list[Batch]) -> None:
    """The gradient of the mean loss over all data in ``.grad``."""
    model.zero_grad()
    count = sum(len(y) for _, y in data)
    for batch in data:
        (cifar.cross_entropy(model, batch) * len(batch[1]) / count).backward()


def _hessian(model: nn.Module, x: Tensor, data: list[Batch]) -> Any:
    """The mean of the squared gradients of single samples.

    It goes straight to where the criterion puts it: its ``accumulate_grad`` of 1.6.1 keeps that of the last sample
    alone.
    """
    import torch_pruning as tp

    squares = {name: p.new_zeros(p.shape) for name, p in model.named_parameters()}
    images, labels = (part[:SINGLE] for part in _joined(data))
    for i in range(len(labels)):
        model.zero_grad()
        cifar.cross_entropy(model, (images[i : i + 1], labels[i : i + 1])).backward()
        for name, p in model.named_parameters():
            squares[name] += p.grad.square() / len(labels)
    for name, p in model.named_parameters():
        p.grad = squares[name]
    return tp.importance.HessianImportance()


def _joined(data: list[Batch]) -> Batch:
    import torch

    images, labels = zip(*data, strict=True)
    return torch.cat(images), torch.cat(labels)


def _activation(model: nn.Module, x: Tensor, data: list[Batch]) -> Any:
    """It keeps what the last call saw, so all images go in one batch."""
    import torch_pruning as tp

    importance = tp.importance.ActivationImportance()
    with importance.compute_importance(model):
        model(_joined(data)[0][:256])
    return importance


def _obdc(model: nn.Module, x: Tensor, data: list[Batch]) -> Any:
    import torch_pruning as tp

    importance = tp.importance.OBDCImportance(num_classes=10)
    # It has to know every layer, so nothing is ignored here. In 1.6.1 its preparation takes what a method for attention
    # gives, which is None for other groups: here that gives the group itself.
    pruner = _pruner(model, x, importance, 0.1, "global", [])
    pruner._downstream_node_as_root_if_attention = lambda group: group
    importance._prepare_model(model, pruner)
    for batch in data:
        model.zero_grad()
        cifar.cross_entropy(model, batch).backward()
        importance.step()
    importance._rm_hooks(model)
    return importance


# By the name of structprune's criterion: what torch-pruning calls it, and how it is made ready on data.
CRITERIA: dict[str, tuple[str, Callable[[nn.Module, Tensor, list[Batch]], Any]]] = {
    "l1": ("MagnitudeImportance(p=1)", _plain(lambda i: i.MagnitudeImportance(p=1))),
    "l2": ("MagnitudeImportance(p=2)", _plain(lambda i: i.MagnitudeImportance(p=2))),
    "bn_scale": ("BNScaleImportance", _plain(lambda i: i.BNScaleImportance())),
    "lamp": ("LAMPImportance", _plain(lambda i: i.LAMPImportance())),
    "fpgm": ("FPGMImportance", _plain(lambda i: i.FPGMImportance())),
    "random": ("RandomImportance", _plain(lambda i: i.RandomImportance())),
    "taylor": ("TaylorImportance", _taylor),
    "obd_fisher": ("HessianImportance", _hessian),
    "activation_mean": ("ActivationImportance", _activation),
    "kfac": ("OBDCImportance", _obdc),
}


def _pruner(model: nn.Module, x: Tensor, importance: Any, share: float, scope: str, ignored: list[nn.Module]) -> Any:
    import torch_pruning as tp

    return tp.pruner.MagnitudePruner(
        model, x, importance=importance, pruning_ratio=share, ignored_layers=ignored,
        global_pruning=scope != "local", isomorphic=scope == "isomorphic",
        in_channel_groups={}, out_channel_groups={}, channel_groups={},
    )  # fmt: skip


def prepared(name: str, model: nn.Module, x: Tensor, data: list[Batch]) -> Prepared:
    """A copy of the model with the gradients that the criterion reads, and the criterion."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hooks of a kind that torch advises against
        return model, CRITERIA[name][1](model, x, data)


def pruned(ready: Prepared, x: Tensor, share: float, scope: str, *, inside: bool) -> nn.Module:
    """A thinned copy.

    Args:
        ready: model and criterion.
        x: an example input.
        share: of the channels to remove.
        scope: ``"local"``, ``"global"`` or ``"isomorphic"``.
        inside: thin only what is inside of blocks, so that the residual streams stay whole.
    """
    import torch

    model, importance = copy.deepcopy(ready)  # together: criteria may hold layers of the model
    for mine, theirs in zip(model.parameters(), ready[0].parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ignored = [m for n, m in layers if (n == "conv1" or not n.endswith("conv1") if inside else n == "linear")]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _pruner(model, x, importance, share, scope, ignored).step()
    model.zero_grad()
    return model


def at_macs(ready: Prepared, x: Tensor, share: float, scope: str, *, inside: bool) -> nn.Module:
    """The least thinned copy with no more than this share of the MACs, by bisection of the pruning ratio.

    Half a percent more is let pass: its local scope takes the same share of all layers, so that its steps are coarse.
    """
    goal = structprune.cost(ready[0], x).macs * share * 1.005
    low, high = 0.0, 0.97
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        small = structprune.cost(pruned(ready, x, middle, scope, inside=inside), x).macs <= goal
        low, high = (low, middle) if small else (middle, high)
    return pruned(ready, x, high, scope, inside=inside)
