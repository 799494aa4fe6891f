"""Operations and modules of users: pinned until they have a rule, exact once they have one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import oracle
from support.cases import normal
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn

import structprune
from structprune.benchmarking.backends import BACKENDS
from structprune.errors import RuleError, TraceError, VerificationError
from structprune.importance.base import CRITERIA
from structprune.ops import OPS
from structprune.tracing.opaque import OPAQUE

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    registries: list[dict[Any, Any]] = [OPS, OPAQUE, CRITERIA, BACKENDS]
    tables = [(table, dict(table)) for table in registries]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


def check(model: nn.Module, inputs: Any, *sliced: str) -> nn.Module:
    """Prune by half, at random, compare with the oracle; the tensors named must have lost channels."""
    model = oracle.jitter(model, seed=0)
    before = snapshot(model)
    plan = structprune.plan(model, inputs, ratio=0.5, importance=structprune.Random(1))
    assert set(sliced) <= set(plan.removed), f"still whole: {set(sliced) - set(plan.removed)}"
    slim = plan.apply(model)
    assert_untouched(model, before)
    oracle.check(model, slim, plan, inputs)
    assert structprune.verify(model, slim, plan, inputs).ok
    return slim


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    rules = [block for block in blocks if "@structprune.register" in block]
    assert len(rules) == 3
    tasks = [block for block in blocks if re.match(r"# \w+\.py\n", block)]
    assert len(tasks) == 4
    assert all(len(block.strip().splitlines()) <= 15 for block in (*rules, *tasks))
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.startswith(
        "up: 12 channels, pinned: there is no rule for the operation mylib::gate in the model ("
    )
    inputs = normal(3, 8).double()
    check(names["Gated"](), inputs, "up.weight", "weight", "bias", "down.weight")
    fused = names["Fused"]
    slim = check(nn.Sequential(nn.Linear(8, 16), fused(16, 12), nn.Linear(12, 4)), inputs, "1.weight", "1.bias")
    structprune.prune(slim, inputs, ratio=0.5, inplace=True)
    assert (slim[1].inputs, slim[1].outputs) == slim[1].weight.shape == (4, 3)


# -- custom operations -------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("structprune_test", "DEF")
LIBRARY.define("swap(Tensor x, Tensor y) -> (Tensor, Tensor)")
LIBRARY.define("halve(Tensor x) -> Tensor")


@torch.library.impl(LIBRARY, "swap", "CompositeExplicitAutograd")
def _swap(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y * 2, x * 3


@torch.library.impl(LIBRARY, "halve", "CPU")
def _halve(x: Tensor) -> Tensor:
    return x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]


class Swapped(nn.Module):
    """An operation of two results, called as an overload and as a packet."""

    def __init__(self, overload: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(8, 4)
        self.operation = torch.ops.structprune_test.swap.default if overload else torch.ops.structprune_test.swap

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.operation(self.a(x), self.b(x))
        return self.c(left) + self.d(right)


@pytest.mark.parametrize("overload", [False, True])
def test_an_operation_of_two_results(overload: bool) -> None:
    inputs = normal(3, 6).double()
    graph = structprune.DependencyGraph(Swapped(overload).double(), inputs)
    for layer in ("a", "b"):
        assert re.search(
            r"no rule for the operation structprune_test::swap in the model \(.*:\d+\)", graph.explain(layer)
        )

    @structprune.register_op("structprune_test::swap")
    def swap(c: Any, x: Any, y: Any) -> Any:
        return [y.axes, x.axes]

    check(Swapped(overload), inputs, "a.weight", "b.weight", "c.weight", "d.weight")


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(torch.ops.structprune_test.halve(self.up(x))))


def test_an_operation_without_a_shape_function_is_traced_on_real_values() -> None:
    """It has no kernel for ``meta``; what is not coupled to it can be pruned all the same."""
    inputs = normal(3, 6).double()
    graph = structprune.DependencyGraph(Halved().double(), inputs)
    assert graph.trace.real
    assert "no rule for the operation structprune_test::halve" in graph.explain("up")
    check(Halved(), inputs, "down.weight", "out.weight")

    @structprune.register_op("structprune_test::halve")
    def halve(c: Any, x: Any) -> Any:
        first, _ = c.sections(x.axes[-1], 2)
        return (*x.axes[:-1], first)

    check(Halved(), inputs, "up.weight", "down.weight", "out.weight")


def test_rows_that_a_rule_of_an_operation_does_not_ask_for_stay_whole() -> None:
    @structprune.register_op("structprune_test::swap")
    def swap(c: Any, x: Any, y: Any) -> Any:
        return [(*y.axes[:-1], c.new_axis(10)), x.axes]

    pinned = structprune.DependencyGraph(Swapped(False), normal(3, 6)).pinned()
    assert pinned["b.weight, dim 0"] == "the rule for structprune_test::swap does not say what it is"
    assert "a.weight, dim 0" not in pinned


def test_a_wrong_rule_is_noticed() -> None:
    @structprune.register_op("structprune_test::halve")
    def halve(c: Any, x: Any) -> Any:
        c.sections(x.axes[-1], 2)
        return (*x.axes[:-1], c.new_axis(x.axes[-1].size // 2))  # the result has channels of its own, it says

    model, inputs = oracle.jitter(Halved(), seed=0), normal(3, 6).double()
    plan = structprune.plan(model, inputs, ratio=0.5, importance=structprune.Random(0))
    with pytest.raises((VerificationError, RuntimeError)):
        structprune.verify(model, plan.apply(model), plan, inputs).raise_for_error()


def test_rules_of_the_wrong_size_and_rules_that_fail_are_named() -> None:
    @structprune.register_op("structprune_test::swap")
    def swap(c: Any, x: Any, y: Any) -> Any:
        return [x.axes, y.axes]

    with pytest.raises(RuleError, match=r"gives axes of sizes \[3, 8\].*, in structprune_test::swap in the model"):
        structprune.plan(Swapped(False), normal(3, 6))

    OPS["structprune_test::swap"] = dataclasses.replace(OPS["structprune_test::swap"], coupling=lambda c, x: x.axes)
    with pytest.raises(RuleError, match="failed on structprune_test::swap in the model"):
        structprune.plan(Swapped(False), normal(3, 6))


# -- opaque modules ----------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Two results, a child with weights, an optional bias; computed by NumPy."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * width, bias=bias)
        self.sizes = (width, 2 * width)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        w = self.proj.weight.detach().numpy()
        assert w.shape == self.sizes[::-1]
        y = x.detach().numpy() @ w.T + (0 if self.proj.bias is None else self.proj.bias.detach().numpy())
        a, b = np.split(scale * y, 2, -1)
        return torch.from_numpy(a / (1 + np.exp(-b))), torch.from_numpy(a.copy())


class Outer(nn.Module):
    """It calls the gate twice, with an argument by name; hooks add to what goes in and comes out."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(6, 8), Gate(8, bias)
        self.gate.shift = nn.Parameter(torch.rand(8))
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)
        self.gate.register_forward_pre_hook(lambda m, args: (torch.relu(args[0]),))
        self.gate.register_forward_hook(lambda m, args, out: (out[0] * m.shift, out[1]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x, _ = self.gate(x, scale=0.7)
        a, b = self.gate(x)
        return self.left(a) + self.right(b)


def declare(shape: Any = None) -> None:
    @structprune.register_module_rule(Gate, shape=shape)
    def gate(c: Any, m: Any, x: Any, scale: Any = 1.0) -> Any:
        c.same(x.axes[-1], m.proj.weight.axes[1])
        first, _ = c.sections(m.proj.weight.axes[0], 2)
        if m.proj.bias is not None:
            c.same(m.proj.weight.axes[0], m.proj.bias.axes[0])
        if hasattr(m, "shift"):  # a hook's, which is traced: there is nothing to say, but it is seen
            _ = m.shift.axes[0]
        c.expect(m.sizes[0], m.proj.weight.axes[1])
        c.expect(m.sizes[1], m.proj.weight.axes[0])
        rows = (*x.axes[:-1], first)
        return [rows, rows]


def two(m: Any, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    result = x.new_empty(*x.shape[:-1], m.proj.weight.shape[0] // 2)
    return result, torch.empty_like(result)


def test_what_a_rule_does_not_ask_for_stays_whole() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.table = nn.Parameter(torch.rand(8, 6)), nn.Parameter(torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy() @ self.weight.detach().numpy().T * len(self.table))

    @structprune.register_module_rule(Table)
    def table(c: Any, m: Any, x: Any) -> Any:
        return (*x.axes[:-1], m.weight.axes[0])

    model = nn.Sequential(nn.Linear(6, 6), Table(), nn.Linear(8, 4))
    pinned = structprune.DependencyGraph(model.double(), normal(3, 6).double()).pinned()
    reason = "the rule for Table does not say what it is"
    assert pinned["1.table, dim 0"] == pinned["1.weight, dim 1"] == pinned["0.weight, dim 0"] == reason
    check(model, normal(3, 6).double(), "1.weight", "2.weight")


@pytest.mark.parametrize("shape", [None, two], ids=["real", "meta"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_opaque_module(shape: Any, bias: bool) -> None:
    declare(shape)
    inputs = normal(3, 6).double()
    assert structprune.DependencyGraph(Outer(bias).double(), inputs).trace.real == (shape is None)
    slim = check(Outer(bias), inputs, "stem.weight", "gate.proj.weight", "gate.shift", "left.weight", "right.weight")
    assert slim.gate.sizes == (4, 8)
    assert (slim.gate.proj.in_features, slim.gate.proj.out_features) == (4, 8)
    assert "forward" not in vars(slim.gate)
    check(slim, inputs, "gate.proj.weight")


def test_a_subclass_with_its_own_forward_is_not_meant() -> None:
    declare(two)

    class Own(Gate):
        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
            a, b = (scale * self.proj(x)).chunk(2, -1)
            return a * torch.sigmoid(b), a

    class Heir(Gate):
        pass

    for kind, whole in ((Own, False), (Heir, True)):
        model = Outer()
        model.gate = kind(8, True)
        graph = structprune.DependencyGraph(model.double(), normal(3, 6).double())
        assert any(str(node.meta["name"]).startswith("module.") for node in graph.trace.nodes) == whole


def test_a_forward_patched_on_the_instance_is_put_back() -> None:
    declare(two)
    model = Outer().double()
    own = model.gate.forward
    model.gate.forward = own
    before = snapshot(model)
    structprune.plan(model, normal(3, 6).double())
    assert_untouched(model, before)
    assert vars(model.gate)["forward"] is own


def test_a_module_around_an_opaque_one_can_be_rewritten() -> None:
    """A literal in its forward changes; the opaque module stays a call."""
    declare(two)

    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate, self.head = nn.Linear(6, 8), Gate(8, True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gate(self.stem(x))[0].view(-1, 8))

    slim = check(Reshaped(), normal(3, 6).double(), "stem.weight", "gate.proj.weight", "head.weight")
    assert slim.head.in_features == 4


def test_refusals() -> None:
    with pytest.raises(RuleError, match="not a class of modules"):
        structprune.register_module_rule(nn.Linear(2, 2))
    declare(two)
    with pytest.raises(RuleError, match="Gate has a rule already"):
        declare(two)

    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    structprune.register_module_rule(Named)(lambda c, m, x: x.axes)
    with pytest.raises(TraceError, match="Named is taken as a whole, but gives a dict"):
        structprune.plan(Named(), normal(3, 6))


def test_two_classes_of_one_name() -> None:
    def make() -> type[nn.Module]:
        class Twin(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.from_numpy(x.detach().numpy() * 2)

        return Twin

    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    for position in (1, 3):
        kind = make()
        structprune.register_module_rule(kind, shape=lambda m, x: torch.empty_like(x))(lambda c, m, x: x.axes)
        model.insert(position, kind())
    check(model, normal(3, 6).double(), "0.weight")
