"""`masks.compact`: the smaller network computes exactly what the masked one computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from structprune import masks

F64 = torch.float64


class Residual(nn.Module):
    """Two convolutions with batch norms around a sum, pooling, and a linear layer."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=padding)
        self.bn = nn.BatchNorm2d(12)
        self.conv1 = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(12, 20, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(self.last(self.pool(x)))
        return self.head(x.mean((2, 3)))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12),
        nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(12, 12, 2, groups=4), nn.Sigmoid(), nn.Dropout(), nn.Flatten(),
        nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 5, bias=False),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 32), nn.Sigmoid(), nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 24), nn.ReLU(),
        nn.Linear(24, 3),
    )  # fmt: skip


NETS = {"residual": (Residual, (2, 3, 8, 8)), "chain": (chain, (2, 3, 10, 10)), "mlp": (mlp, (2, 7))}


def randomized(build) -> nn.Module:
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def same(masked: nn.Module, slim: nn.Module, shape: tuple[int, ...]) -> None:
    for seed in (1, 2):
        x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert torch.allclose(masked(x), slim(x), rtol=1e-10, atol=1e-10)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def zero_some(model: nn.Module, kind: str, amount: float) -> None:
    """Mask all layers but the last one."""
    pairs = [(layer, "weight") for layer in layers(model)[:-1]]
    biases = [(layer, "bias") for layer, _ in pairs if layer.bias is not None]
    norms = [(module, "weight") for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if kind == "global":
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=amount)
        return
    how = {
        "ln": [(pairs, prune.ln_structured, {"n": 2, "dim": 0})],
        "random": [(pairs, prune.random_structured, {"dim": 0})],
        "inputs": [(pairs, prune.random_structured, {"dim": 1})],
        "unstructured": [(pairs, prune.random_unstructured, {})],
        "biases": [(pairs, prune.ln_structured, {"n": 1, "dim": 0}), (biases, prune.random_unstructured, {})],
        "gammas": [(norms, prune.l1_unstructured, {})],
        "stacked": [(pairs, prune.ln_structured, {"n": 1, "dim": 0}), (pairs, prune.random_unstructured, {})],
    }
    for targets, method, options in how[kind]:
        for layer, name in targets:
            method(layer, name, amount=amount, **options)


KINDS = ("ln", "random", "inputs", "unstructured", "global", "biases", "gammas", "stacked")


@pytest.mark.parametrize("amount", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_masked_model(name, kind, amount):
    build, shape = NETS[name]
    model = randomized(build)
    zero_some(model, kind, amount)
    slim = masks.compact(model, torch.randn(shape, dtype=F64))
    same(model, slim, shape)
    if kind in ("ln", "random", "biases", "stacked"):
        assert size(slim) < size(model)
    assert not any(name.endswith(("_mask", "_orig")) for name in slim.state_dict())
    assert masks.compaction(slim, torch.randn(shape, dtype=F64)).plan is None
