"""The oracle itself, on networks pruned by hand: it accepts what is right and sees each kind of error."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from torch import Tensor, nn

torch.set_num_threads(1)


@dataclass(frozen=True)
class Removal:
    """Stands for a plan: the oracle reads nothing else."""

    removed: dict[str, dict[int, tuple[int, ...]]]
    settings: dict[str, Any] = field(default_factory=dict)


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.inputs = (2, 3, 7, 7)
        self.slices = {"conv1.weight": 0, "conv1.bias": 0, "conv2.weight": 1} | {
            f"bn.{name}": 0 for name in ("weight", "bias", "running_mean", "running_var")
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn(self.conv1(x))))


class NormMlp(nn.Module):
    """A hidden layer normalised over the channels that are thinned."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.inputs = (3, 6)
        self.slices = {"fc1.weight": 0, "fc1.bias": 0, "norm.weight": 0, "norm.bias": 0, "fc2.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.norm(F.relu(self.fc1(x)))))


class BareNormMlp(NormMlp):
    """Two norms without weights in a row, after an activation that does not keep zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.slices = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(torch.sigmoid(self.fc1(x)), self.fc2.weight.shape[1:])
        x = (x - x.mean(-1, keepdim=True)) / x.std(dim=-1, keepdim=True)
        return self.fc2(x)


class HandRms(NormMlp):
    """RMSNorm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.scale = nn.Parameter(torch.ones(8))
        self.norms = ["the model (mean)"]
        self.slices = {"fc1.weight": 0, "fc1.bias": 0, "scale": 0, "fc2.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)


class SqueezeExcite(nn.Module):
    """A gate whose dead channels are one half, not zero, before they meet the dead channels of the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.inputs = (2, 3, 7, 7)
        self.slices = {"conv1.weight": 0, "conv1.bias": 0, "conv2.weight": 1}
        self.slices |= {"down.weight": 1, "up.weight": 0, "up.bias": 0}

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.conv2(x * gate)


class GroupNormNet(nn.Module):
    """Group norm, of which one channel in each group goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)
        self.inputs = (2, 3, 7, 7)
        self.slices = {"conv1.weight": 0, "conv1.bias": 0, "norm.weight": 0, "norm.bias": 0, "conv2.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.pad(F.silu(self.norm(self.conv1(F.pad(x, (1, 1, 1, 1))))), (2, 2, 2, 2)).relu())


class PaddedMean(nn.Module):
    """A mean over channels and over zero padding, named as a norm: the padding counts, the dead channels do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.head = nn.Conv2d(3, 8, 3), nn.Linear(9, 4)
        self.norms = ["the model (mean)"]
        self.inputs = (2, 3, 7, 7)
        self.slices = {"conv1.weight": 0, "conv1.bias": 0}

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.conv1(x), (2, 2, 2, 2)) + 0
        rows = x.mean((1, 3)) + x.softmax(dim=1).amax((1, 3)) + x.var((1, 2))
        return self.head(F.layer_norm(rows, (9,)))


class StandardisedWeights(ConvNet):
    """Weights standardised over their input channels, by batch statistics, as big-transfer networks do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv2.weight
        flat = F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True, momentum=0.0)
        return F.conv2d(F.relu(self.bn(self.conv1(x))), flat.reshape_as(weight), self.conv2.bias)


class Clamped(NormMlp):
    """Integers are clamped before they index."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.table = nn.Parameter(torch.randn(2, 8))
        self.slices = {"fc1.weight": 0, "fc1.bias": 0, "table": 1, "fc2.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * self.table[torch.arange(len(x)).clamp(max=1)])


class Pooled(NormMlp):
    """The largest and the least entry of each channel, of which some are off altogether."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.slices = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x.amax(0) + x.min(0).values)


class Shifted(Pooled):
    """A softmax of what is over the largest entry of each row, which is zero once in each row whatever the values."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = (32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.fc1(x))
        return (x - x.max(dim=-1, keepdim=True).values).softmax(-1)


class Shares(NormMlp):
    """Each channel's entries over their sum, which is nothing where the channel is off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.slices = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        share = x / x.sum(0)
        share /= share.abs().amax(0)
        return self.fc2(share)


class Casting(HandRms):
    """Casts to float32 and back, which would hide anything below 1e-7."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        wide = x.float().to(torch.float32)
        return self.fc2((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype) * self.scale)


NETWORKS = [
    ConvNet,
    NormMlp,
    BareNormMlp,
    HandRms,
    SqueezeExcite,
    GroupNormNet,
    PaddedMean,
    Clamped,
    Pooled,
    Shifted,
    Shares,
    Casting,
]
GONE = (1, 6)  # one in each half, so that both groups of the group norm stay equal


def hand_sliced(model: Any, gone: tuple[int, ...] = GONE) -> nn.Module:
    """Slice by the network's own list; the tests' second, independent, surgery."""
    slim = copy.deepcopy(model)
    for name, dim in model.slices.items():
        path, _, key = name.rpartition(".")
        owner = slim.get_submodule(path)
        tensor = getattr(owner, key).detach()
        kept = tensor.index_select(dim, torch.tensor([i for i in range(tensor.shape[dim]) if i not in gone]))
        setattr(owner, key, nn.Parameter(kept) if isinstance(getattr(owner, key), nn.Parameter) else kept)
    for module in slim.modules():
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (8 - len(gone),)
        if isinstance(module, nn.GroupNorm):
            module.num_channels = 8 - len(gone)
    return slim


def example(network: type[nn.Module], seed: int = 0) -> tuple[Any, Tensor, Removal]:
    model: Any = oracle.jitter(network(), seed)
    inputs = torch.randn(model.inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norms = {"over_survivors": getattr(model, "norms", [])}
    return model, inputs, Removal({name: {dim: GONE} for name, dim in model.slices.items()}, norms)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_accepts_a_network_sliced_by_hand(network: type[nn.Module], seed: int) -> None:
    model, inputs, plan = example(network, seed)
    oracle.check(model, hand_sliced(model), plan, inputs)


@pytest.mark.parametrize("network", NETWORKS)
def test_sees_the_wrong_channels_removed(network: type[nn.Module]) -> None:
    model, inputs, plan = example(network)
    with pytest.raises(AssertionError, match="relative error"):
        oracle.check(model, hand_sliced(model, (2, 6)), plan, inputs)


@pytest.mark.parametrize("network", NETWORKS)
def test_sees_one_tensor_sliced_elsewhere_than_the_rest(network: type[nn.Module]) -> None:
    model, inputs, plan = example(network)
    for name in model.slices:
        slim, other = hand_sliced(model), hand_sliced(model, (2, 6))
        with torch.no_grad():
            slim.get_parameter(name).copy_(other.get_parameter(name)) if name in dict(slim.named_parameters()) else (
                slim.get_buffer(name).copy_(other.get_buffer(name))
            )
        with pytest.raises(AssertionError, match="relative error"):
            oracle.check(model, slim, plan, inputs)


@pytest.mark.parametrize("network", NETWORKS)
def test_sees_a_wrong_bias(network: type[nn.Module]) -> None:
    model, inputs, plan = example(network)
    slim = hand_sliced(model)
    with torch.no_grad():
        next(p for name, p in slim.named_parameters() if name.endswith("bias"))[2] += 1e-6
    with pytest.raises(AssertionError, match="relative error"):
        oracle.check(model, slim, plan, inputs)


@pytest.mark.parametrize("named", [[], ["fc1 (mean)"], ["the model (layer_norm)"]])
def test_a_mean_that_is_not_named_counts_all_channels(named: list[str]) -> None:
    model, inputs, plan = example(HandRms)
    plan.settings["over_survivors"] = named
    with pytest.raises(AssertionError, match="relative error"):
        oracle.check(model, hand_sliced(model), plan, inputs)


def test_standardised_weights_over_fewer_inputs_are_others() -> None:
    model, inputs, plan = example(StandardisedWeights)
    with pytest.raises(AssertionError, match="relative error"):
        oracle.check(model, hand_sliced(model), plan, inputs)


def test_sees_a_shape_that_the_plan_does_not_speak_of() -> None:
    model, inputs, plan = example(ConvNet)
    del plan.removed["bn.running_var"]
    with pytest.raises(AssertionError, match=r"bn\.running_var"):
        oracle.check(model, hand_sliced(model), plan, inputs)


def test_refuses_a_removal_that_changes_nothing() -> None:
    model, inputs, _ = example(ConvNet)
    plan = Removal({"conv2.weight": {1: (3,)}})
    with torch.no_grad():
        model.conv2.weight[:, 3] = 0
    slim = copy.deepcopy(model)
    kept = [0, 1, 2, 4, 5, 6, 7]
    slim.conv2.weight = nn.Parameter(model.conv2.weight[:, kept].detach())
    slim.conv1, slim.bn = copy.deepcopy(model.conv1), copy.deepcopy(model.bn)
    slim.forward = lambda x: slim.conv2(F.relu(slim.bn(slim.conv1(x)))[:, kept])
    with pytest.raises(AssertionError, match="proves nothing"):
        oracle.check(model, slim, plan, inputs)


class Choosy(NormMlp):
    """Takes a mean of what is positive, of which there is more or less."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x) + x[x > 0].mean()


def test_refuses_a_forward_that_depends_on_its_data() -> None:
    model = oracle.jitter(Choosy(), 0)
    with pytest.raises(AssertionError, match="depends on its data"):
        oracle.Oracle(model, torch.ones(3, 6, dtype=torch.float64))


def test_relative_error_walks_nested_outputs() -> None:
    a = torch.tensor([1.0, 2.0])
    nested = {"x": (a, [a]), "n": None}
    assert oracle.relative_error(nested, nested) == 0
    assert oracle.relative_error({"x": (a, [a + 0.5]), "n": None}, nested) == pytest.approx(0.25)
    assert oracle.relative_error({"y": (a, [a])}, nested) == float("inf")
    assert oracle.relative_error(a.double(), a) == float("inf")
    assert oracle.relative_error(a[:1], a) == float("inf")
    assert oracle.relative_error(a * float("nan"), a) == float("inf")
    assert oracle.relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")


def test_jitter_makes_every_entry_distinct_and_variances_positive() -> None:
    model = oracle.jitter(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LSTM(4, 4)).train(), 0)
    values = torch.cat([t.flatten() for t in oracle.floating_tensors(model).values()])
    assert values.dtype == torch.float64
    assert len(values.unique()) == len(values)
    assert (model[1].running_var > 0).all()
    assert not any(module.training for module in model.modules())
