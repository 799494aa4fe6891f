"""Channels of one layer alone, of a dimension of a tensor, and what indices are called after a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch_pruning as peer
from torch import Tensor, nn

import structprune
from structprune.errors import PinnedError, PlanError, UnknownLayerError
from structprune.surgery.one_layer import remove_channels, side

LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "conv": ("conv", lambda: nn.Conv2d(5, 8, 3)),
    "transposed": ("conv", lambda: nn.ConvTranspose2d(5, 8, 3)),
    "depthwise": ("depthwise_conv", lambda: nn.Conv2d(8, 8, 3, groups=8)),
    "linear": ("linear", lambda: nn.Linear(5, 8)),
    "batch norm": ("batchnorm", lambda: nn.BatchNorm2d(8)),
    "batch norm without weights": ("batchnorm", lambda: nn.BatchNorm2d(8, affine=False)),
    "instance norm": ("instancenorm", lambda: nn.InstanceNorm2d(8, affine=True)),
    "prelu": ("prelu", lambda: nn.PReLU(8)),
    "embedding": ("embedding", lambda: nn.Embedding(3, 8)),
}


@pytest.mark.parametrize("outputs", [True, False], ids=["outputs", "inputs"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_as_in_torch_pruning(name: str, outputs: bool) -> None:
    kind, make = LAYERS[name]
    theirs = make()
    ours = copy.deepcopy(theirs)
    getattr(peer, f"prune_{kind}_{'out' if outputs else 'in'}_channels")(theirs, [0, 3])
    assert remove_channels(ours, [3, 0, 3], outputs=outputs) is ours
    assert str(ours) == str(theirs)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    known = side(ours, outputs)
    assert known is not None
    assert getattr(ours, known[1]) == getattr(theirs, known[1])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 1, groups=2),
        nn.GroupNorm(2, 4),
        nn.LSTM(4, 4),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.ReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_no_layer_loses_alone_is_refused(layer: nn.Module) -> None:
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(PlanError, match="cannot be removed from it alone"):
        remove_channels(layer, [0])
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("indices", [[8], [-1], [*range(8)]], ids=str)
def test_indices_are_some_of_the_channels(indices: list[int]) -> None:
    with pytest.raises(PlanError, match="some of the channels 0 to 7"):
        remove_channels(nn.Linear(2, 8), indices)
    layer = nn.Linear(2, 8)
    assert remove_channels(layer, []).out_features == 8


class Flat(nn.Module):
    """Four columns of the classifier belong to each channel of the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


X = torch.randn(1, 3, 4, 4)


def test_channels_by_a_dimension_of_a_tensor() -> None:
    first = Flat()
    second = copy.deepcopy(first)
    plan = structprune.DependencyGraph(first, X).prune_group("conv", [1, 4])
    other = structprune.DependencyGraph(second, X).prune_group(("fc.weight", 1), [4, 5, 6, 7, 17])
    assert plan.digest == other.digest
    assert plan.left("fc.weight", 1, [3, 4, 8, 9, 16, 20]) == (3, 4, 5, 12)
    assert plan.left("fc.weight", 0, [0, 4]) == (0, 4)
    graph = structprune.DependencyGraph(Flat(), X)
    group = graph.group(("fc.weight", 1), [20, 8])
    assert group.channels == 2
    assert group.first_positions("fc.weight", 1).tolist() == [8, 20]
    assert group.first_positions("conv.weight", 0).tolist() == [2, 5]
    with pytest.raises(UnknownLayerError, match="has a dimension 2"):
        graph.prune_group(("fc.weight", 2), [0])
    with pytest.raises(PinnedError, match="it is a dimension of the model's input"):
        graph.prune_group(("conv.weight", 1), [0])
    with pytest.raises(PlanError, match="a pair of a tensor's name and a dimension"):
        graph.prune_group(("fc.weight", "1"), [0])  # pyright: ignore[reportArgumentType]


def test_no_output_need_keep_its_shape() -> None:
    model = Flat()
    structprune.DependencyGraph(model, X, outputs=()).prune_group("fc", [0])
    assert model(X).shape == (1, 4)
    with pytest.raises(PlanError):
        structprune.DependencyGraph(model, X, outputs=[])


def test_which_groups_compete_may_be_a_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    with torch.no_grad():
        model[1].weight.mul_(0.1)
    inputs = torch.randn(1, 8)
    asked = {"ratio": 0.25, "round_to": 1}
    whole = structprune.plan(model, inputs, scope="global", **asked)
    assert structprune.plan(model, inputs, scope=lambda group: "all", **asked).digest == whole.digest
    apart = structprune.plan(model, inputs, scope=lambda group: group.name, **asked)
    assert apart.digest == structprune.plan(model, inputs, scope="local", **asked).digest
    pairs = structprune.plan(model, inputs, scope=lambda group: group.name in ("0", "1"), **asked)
    assert pairs.digest == structprune.plan(model, inputs, scope=[["0", "1"]], **asked).digest
    assert pairs.settings["scope"] == "a function of the group"
