"""`masks.compact`: the smaller network computes exactly what the masked one computes."""

from __future__ import annotations

import pytest
import torch
from support.zoo import each_of, entry_of
from torch import Tensor, nn
from torch.nn.utils import prune

from structprune import masks
from structprune.errors import PlanError

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


def two(first: nn.Module, between: nn.Module, second: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(first, between, second).double().eval()


def off_with_bias(model: nn.Module, channels: tuple[int, ...] = (1, 3)) -> nn.Module:
    """The weights of these channels are zero, their biases are not."""
    with torch.no_grad():
        model[0].weight[list(channels)] = 0.0
        model[0].bias[list(channels)] = 0.7
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_the_report_tells_what_is_off_behind_an_activation_in_place(inplace):
    model = off_with_bias(two(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=inplace), nn.Conv2d(6, 4, 3)))
    assert masks.compaction(model, torch.randn(1, 3, 9, 9, dtype=F64)).layers[0].off == (1, 3)


def test_a_constant_goes_into_the_bias_where_no_border_is_seen():
    model = off_with_bias(two(nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 4, 3)))
    found = masks.compaction(model, torch.randn(1, 3, 9, 9, dtype=F64))
    assert found.layers[0].removed == found.layers[0].off == (1, 3)
    assert found.layers[1].folded == 2
    same(model, found.model, (2, 3, 11, 13))


def test_a_constant_stays_where_the_border_would_be_wrong_and_the_report_says_so():
    model = off_with_bias(two(nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 4, 3, padding=1)))
    # The image is so small that the border cannot be seen in it.
    found = masks.compaction(model, torch.randn(1, 3, 3, 3, dtype=F64))
    assert found.plan is None
    (why,) = found.layers[0].stays
    assert found.layers[0].stays[why] == (1, 3)
    assert "less at the border" in why
    assert why in str(found)
    same(model, found.model, (1, 3, 9, 9))


def test_only_the_channels_that_the_border_changes_stay():
    model = off_with_bias(two(nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 4, 3, padding=1)))
    with torch.no_grad():
        centre = model[2].weight[:, 1, 1, 1].clone()
        model[2].weight[:, 1] = 0.0
        model[2].weight[:, 1, 1, 1] = centre
    found = masks.compaction(model, torch.randn(1, 3, 5, 5, dtype=F64))
    assert found.layers[0].removed == (1,)
    same(model, found.model, (2, 3, 9, 7))


@pytest.mark.parametrize(
    ("between", "shape"),
    [
        (nn.AvgPool2d(3, stride=1, padding=1), (2, 3, 3, 3)),
        (nn.Softmax(2), (2, 3, 6, 6)),
        (nn.ZeroPad2d(1), (2, 3, 6, 6)),
        (nn.Softmax(1), (2, 3, 6, 6)),
        (nn.GroupNorm(2, 6), (2, 3, 6, 6)),
        (nn.LocalResponseNorm(3), (2, 3, 6, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_constant_does_not_pass_unchanged_keeps_it(between, shape):
    model = off_with_bias(two(nn.Conv2d(3, 6, 1), between, nn.Conv2d(6, 4, 1)))
    slim = masks.compact(model, torch.randn(shape, dtype=F64))
    assert slim[0].out_channels == 6
    same(model, slim, shape)


def test_constants_travel_on_through_layers_that_read_nothing_else():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 2)).double().eval()
    off_with_bias(model)
    with torch.no_grad():
        model[2].weight[0] = 0.0
        model[2].weight[0, 1] = 2.0  # reads the constant alone
    found = masks.compaction(model, torch.randn(3, 4, dtype=F64))
    assert [layer.removed for layer in found.layers[:2]] == [(1, 3), (0,)]
    same(model, found.model, (3, 4))


def test_a_layer_of_zeros_keeps_one_channel():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    prune.ln_structured(model[0], "weight", amount=6, n=2, dim=0)
    found = masks.compaction(model, torch.randn(3, 4, dtype=F64))
    assert found.model[0].out_features == 1
    assert list(found.layers[0].stays) == ["a layer keeps at least one channel"]
    same(model, found.model, (3, 4))


def test_the_model_is_left_as_it_was_and_may_be_frozen_or_training():
    model = randomized(Residual)
    zero_some(model, "ln", 0.5)
    model.train()
    model.head.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slim = masks.compact(model, torch.randn(2, 3, 8, 8, dtype=F64))
    assert model.training
    assert prune.is_pruned(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    same(model.eval(), slim.eval(), (2, 3, 8, 8))


def test_a_bias_that_serves_two_operations_takes_no_constant():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.shared = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.shared(torch.sigmoid(self.first(x)))
            return self.shared(torch.sigmoid(x)).sum(1, keepdim=True)

    model = Twice().double().eval()
    with torch.no_grad():
        model.first.weight[2] = 0.0
    same(model, masks.compact(model, torch.randn(3, 4, dtype=F64)), (3, 4))


def test_zeros_on_meta_cannot_be_seen():
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(PlanError, match="'weight' is on the meta device"):
        masks.compact(model, torch.randn(1, 2))


ZOO = ("resnet18", "densenet121", "shufflenet_v2_x1_0", "mobilenet_v3_small", "googlenet", "swin_t")


@each_of([f"torchvision/{name}" for name in ZOO])
def test_models_of_the_zoo(key):
    entry = entry_of(key)
    torch.manual_seed(0)
    model, x = entry.build()
    model, x = model.double().eval(), x.double()
    zero_some(model, "ln", 0.6)
    slim = masks.compact(model, x)
    assert size(slim) < size(model)
    same(model, slim, tuple(x.shape))


class EveryThird(prune.BasePruningMethod):
    """A user's own method: every third filter goes."""

    PRUNING_TYPE = "structured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask[::3] = 0
        return mask


@pytest.mark.parametrize("still_masked", [True, False])
def test_methods_of_ones_own_and_masks_made_permanent(still_masked):
    model = randomized(Residual)
    EveryThird.apply(model.conv1, "weight")
    prune.custom_from_mask(model.last, "weight", torch.ones(20, 12, 1, 1).index_fill(0, torch.tensor([4]), 0))
    if not still_masked:
        prune.remove(model.conv1, "weight")
        prune.remove(model.last, "weight")
    found = masks.compaction(model, torch.randn(2, 3, 8, 8, dtype=F64))
    assert {layer.layer: layer.off for layer in found.layers}["conv1"] == (0, 3, 6, 9, 12, 15)
    assert found.model.last.out_channels == 19
    same(model, found.model, (2, 3, 8, 8))


def test_a_write_into_shared_memory_is_no_constant():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.other = nn.Linear(4, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.first(x))
            view = y[:]
            view.add_(self.other(x))
            return self.last(y)

    model = Writes().double().eval()
    with torch.no_grad():
        model.first.weight[2] = 0.0
    slim = masks.compact(model, torch.randn(3, 4, dtype=F64))
    assert slim.first.out_features == 6
    same(model, slim, (3, 4))


@pytest.mark.parametrize("name", ["cumsum", "cumsum_"])
def test_a_sum_that_grows_along_positions_is_no_constant(name):
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(getattr(self.first(x), name)(1))

    torch.manual_seed(0)
    model = Summed().double().eval()
    with torch.no_grad():
        model.first.weight[:2] = 0
    same(model, masks.compact(model, torch.randn(2, 3, 4, dtype=F64)), (2, 3, 4))


def test_transposed_convolutions():
    model = off_with_bias(two(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2)))
    same(model, masks.compact(model, torch.randn(1, 3, 6, 6, dtype=F64)), (2, 3, 7, 7))
    with torch.no_grad():
        model[0].bias[3] = -0.5  # zero behind the ReLU
    slim = masks.compact(model, torch.randn(1, 3, 6, 6, dtype=F64))
    assert slim[2].in_channels == 5
    same(model, slim, (2, 3, 7, 7))


@pytest.mark.parametrize("reduce", [torch.any, torch.all])
def test_a_reduction_that_gives_bool_hands_no_constant_on(reduce):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y * reduce(y, -1, keepdim=True))

    torch.manual_seed(0)
    model = Gated().double().eval()
    with torch.no_grad():
        model.first.weight[:2] = 0
    shape = (1, 3, 8, 8)
    same(model, masks.compact(model, torch.randn(shape, dtype=F64)), shape)


def test_a_move_to_the_device_of_another_tensor_is_no_failure():
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x).to(x.device)) * torch.full((), 2.0, device=x.device))

    torch.manual_seed(0)
    model = Moved().double().eval()
    with torch.no_grad():
        model.first.weight[:2] = 0
    same(model, masks.compact(model, torch.randn(2, 4, dtype=F64)), (2, 4))


def test_what_is_sampled_where_the_network_says_is_no_constant():
    """Numbered entries as a grid lie all outside of the image, where zeros are found whatever the image holds."""

    class Sampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor, grid: Tensor) -> Tensor:
            return self.second(nn.functional.grid_sample(self.first(x), grid, align_corners=False))

    torch.manual_seed(0)
    model = Sampled().double().eval()
    inputs = torch.randn(1, 3, 8, 8, dtype=F64), torch.rand(1, 4, 4, 2, dtype=F64)
    with torch.no_grad():
        model.second.weight[:, 4:] = 0
    slim = masks.compact(model, inputs)
    with torch.no_grad():
        assert torch.allclose(model(*inputs), slim(*inputs), atol=1e-10)


def test_inputs_without_a_batch():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    with torch.no_grad():
        model[0].weight[:2] = 0
    slim = masks.compact(model, torch.randn(6, dtype=F64))
    assert slim[0].out_features == 3
    same(model, slim, (6,))
