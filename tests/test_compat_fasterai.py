"""fasterai's `Pruner`, written for torch-pruning, on the adapter: the same smaller network as on torch-pruning."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from support.as_torch_pruning import adapter_as_torch_pruning
from torch import nn

pytest.importorskip(
    "fasterai.prune.pruner",
    reason="fasterai and fastai are not among the project's packages: pip install fasterai 'fastprogress<1.1'",
    exc_type=ImportError,
)
pytestmark = pytest.mark.filterwarnings("default")  # fastai's own

X = torch.randn(1, 3, 64, 64)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=10),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=10),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=10),
}


def pruned(monkeypatch: pytest.MonkeyPatch, name: str, *, on_adapter: bool, **options: Any) -> nn.Module:
    """A model after fasterai's pruner, imported anew over torch-pruning or over the adapter."""
    with monkeypatch.context() as patch:
        for module, adapter in adapter_as_torch_pruning().items() if on_adapter else ():
            patch.setitem(sys.modules, module, adapter)
        patch.delitem(sys.modules, "fasterai.prune.pruner", raising=False)
        fasterai = importlib.import_module("fasterai.prune.pruner")
        criteria = importlib.import_module("fasterai.core.criteria")
        torch.manual_seed(0)
        model = MODELS[name]()
        context = options.pop("context", "local")
        pruner = fasterai.Pruner(model, 0.4, context, criteria.large_final, example_inputs=X, **options)
        for _ in range(options.get("iterative_steps", 1)):
            pruner.prune_model()
    return model


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("options", [{}, {"iterative_steps": 3}, {"round_to": 8}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_network_as_on_torch_pruning(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    theirs, ours = (pruned(monkeypatch, name, on_adapter=on, **options) for on in (False, True))
    left, right = theirs.state_dict(), ours.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert ours.training  # torch-pruning leaves eval mode
    assert torch.equal(theirs.eval()(X), ours.eval()(X))


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_compete(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    theirs, ours = (pruned(monkeypatch, name, on_adapter=on, context="global") for on in (False, True))
    assert ours.eval()(X).shape == (1, 10)
    # fasterai's scores differ in scale from layer to layer. Where all channels of a layer are among the lowest,
    # torch-pruning leaves it whole, and the network loses far less than was asked for; here one channel stays.
    assert params(ours) <= params(theirs)
    if params(ours) == params(theirs):
        assert torch.equal(theirs.eval()(X), ours(X))
