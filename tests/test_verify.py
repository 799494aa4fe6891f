"""`verify` runs both networks on their own weights, and says what it cannot compare number for number."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.peak_memory import needs_proc, peak_over_weights
from torch import Tensor, nn
from torch.nn import functional as F

import structprune
from structprune.ops import OPS
from structprune.surgery import streamed
from structprune.surgery.verify import relative_errors


class Drawing(nn.Module):
    """A hidden layer whose activations are changed at random, in eval mode too."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(8, 32), nn.Linear(32, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.draw(torch.relu(self.first(x))))


DRAWS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "dropout": ("dropout", lambda h: F.dropout(h, 0.3, training=True)),
    "dropout in place": ("dropout", lambda h: F.dropout(h, 0.3, training=True, inplace=True)),
    "alpha dropout": ("alpha_dropout", lambda h: F.alpha_dropout(h, 0.3, training=True)),
    "noise": ("randn_like", lambda h: h * (1 + torch.randn_like(h))),
    "written noise": ("uniform", lambda h: h * torch.empty_like(h).uniform_(0.5, 1.5)),
    "latent": ("normal", lambda h: torch.normal(h, 0.1) * (h != 0)),
    "coin": ("bernoulli", lambda h: h * torch.bernoulli(torch.full_like(h, 0.5))),
    "coin in place": ("bernoulli", lambda h: h * torch.empty_like(h).bernoulli_(0.5)),
    "leak": ("rrelu", lambda h: F.rrelu(-h, training=True)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_draws_are_held_still(name: str) -> None:
    operation, draw = DRAWS[name]
    model, x = Drawing(draw).eval(), torch.randn(2, 8)
    plan = structprune.plan(model, x, ratio=0.5)
    assert plan.layers
    slim = plan.apply(model)
    report = structprune.verify(model, slim, plan, x)
    assert report.ok
    assert report.drawn == (operation,)
    assert f"with {operation} held still" in str(report)
    with torch.no_grad():
        slim.last.weight.mul_(2)
    assert not structprune.verify(model, slim, plan, x).ok


FRESH: dict[str, Callable[[int], Tensor]] = {
    "rand": lambda width: torch.rand(2, width),
    "rand of a size": lambda width: torch.rand((2, width), dtype=torch.float64),
    "randn": lambda width: torch.randn(size=(2, width)),
    "randint": lambda width: torch.randint(9, (2, width)),
    "randint of a range": lambda width: torch.randint(3, 9, size=(2, width)),
    "normal": lambda width: torch.normal(1.0, 2.0, (2, width)),
    "gumbel": lambda width: F.gumbel_softmax(torch.ones(width, 2), dim=1).T,
    "hard gumbel": lambda width: F.gumbel_softmax(torch.ones(width, 2), hard=True, dim=1).T,
}


@pytest.mark.parametrize("name", FRESH)
def test_draws_do_not_depend_on_the_width(name: str) -> None:
    drawn: list[Tensor] = []
    for width in (40, 5):
        torch.manual_seed(0)
        with streamed.Streamed(None):
            drawn.append(torch.stack([FRESH[name](width), FRESH[name](width)]))
    wide, narrow = drawn
    assert narrow.shape == (2, 2, 5)
    assert torch.equal(wide[..., :5], narrow)


def test_the_random_state_is_left_alone() -> None:
    model, x = Drawing(lambda h: h + torch.randn_like(h)).eval(), torch.randn(2, 8)
    before = torch.get_rng_state()
    structprune.prune(model, x, ratio=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_said_of_dropout_that_is_off() -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 3)).eval(), torch.randn(2, 8)
    plan = structprune.plan(model, x, ratio=0.5)
    assert structprune.verify(model, plan.apply(model), plan, x).drawn == ()


class Tied(nn.Module):
    """A table that is read by rows and multiplied by, beside weights that are used bare, as a view, and by a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.cell = nn.GRUCell(24, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.bare = nn.Parameter(torch.randn(24, 40))
        self.back = nn.Parameter(torch.randn(24, 40))
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        state = x.new_zeros(x.shape[0], 24)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        hidden = torch.einsum("bc,cd->bd", state, self.bare)
        return self.head(x + (F.silu(hidden) @ self.back.t()).unsqueeze(1))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.GroupNorm(4, 16),
        nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "tied": (Tied, lambda: torch.randint(0, 50, (2, 5))),
    "convolutions": (_convolutions, lambda: torch.randn(2, 3, 8, 8)),
    "recurrent": (lambda: Recurrent(), lambda: torch.randn(2, 5, 6)),
}


class Recurrent(nn.Module):
    """An LSTM whose weights are held in a list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(6, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0])


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_weights_made_one_at_a_time_give_the_same(
    name: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, inputs = CASES[name]
    model, x = make().to(kind).eval(), inputs()
    x = x.to(kind) if x.is_floating_point() else x
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    slim = plan.apply(model)
    wrong = copy.deepcopy(slim)
    with torch.no_grad():
        next(iter(p for p in wrong.parameters() if p.dim() > 1)).mul_(1.5)
    at_once = structprune.verify(model, slim, plan, x)
    for constant, value in (("SMALL", 0), ("KEPT", 0), ("PIECE", 256)):
        monkeypatch.setattr(streamed, constant, value)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.named_parameters()}
    one_at_a_time = structprune.verify(model, slim, plan, x)
    assert at_once.ok
    assert one_at_a_time.ok
    assert one_at_a_time.max_relative_error == pytest.approx(at_once.max_relative_error, abs=at_once.tolerance / 10)
    assert not structprune.verify(model, wrong, plan, x).ok
    for name, tensor in model.named_parameters():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_a_forward_that_writes_into_a_weight_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.last.weight.clamp_(-0.1, 0.1)
            return self.last(self.first(x))

    monkeypatch.setattr(streamed, "SMALL", 0)
    model, x = Normed().eval(), torch.randn(2, 8)
    with torch.no_grad():
        slim = structprune.prune(model, x, ratio=0.5)
        assert slim.first.out_features == 16


def test_what_the_mode_does_not_see_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.first(x))
            if not self.first.weight.is_meta:
                with torch._C.DisableTorchFunction():
                    y = y + 0 * self.first.weight.sum()
            return y

    monkeypatch.setattr(streamed, "SMALL", 0)
    model, x = Hidden().eval(), torch.randn(2, 8)
    plan = structprune.plan(model, x, ratio=0.5)
    assert not structprune.verify(model, plan.apply(model), plan, x).ok


def test_prune_traces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = sys.modules["structprune.coupling.graph"]
    traced: list[object] = []

    def counting(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        traced.append(model)
        return structprune.tracing.trace.trace(model, *args, **kwargs)

    monkeypatch.setattr(graphs, "trace", counting)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for inplace in (False, True):
        traced.clear()
        slim = structprune.prune(model, torch.randn(1, 4), ratio=0.5, round_to=1, inplace=inplace)
        assert slim[0].out_features == 4
        assert len(traced) == 1


PREPARED = """
with torch.no_grad():
    layers = [nn.Linear(1536, 1536, dtype=torch.bfloat16) for _ in range(24)]
model, x = nn.Sequential(*layers), torch.randn(2, 1536, dtype=torch.bfloat16)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
plan = structprune.plan(model, x, ratio=0.5, importance="random")
slim = plan.apply(model)
"""


@needs_proc
def test_verifying_takes_little_memory_beyond_the_two_models() -> None:
    assert 0 <= peak_over_weights(PREPARED, "assert structprune.verify(model, slim, plan, x).ok") < 0.5


LARGE_OUTPUTS = """
with torch.no_grad():
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4096)), torch.randn(4096, 8)
plan = structprune.plan(model, x[:1], ratio=0.5)
slim = plan.apply(model)
weights = 4096 * 4096 * 4  # what one output takes
"""


@needs_proc
def test_large_outputs_are_compared_by_pieces() -> None:
    # Each model gives one, and what is computed of them in float64 would take four times as much.
    verify = "assert structprune.verify(model, slim, plan, x).ok"
    assert 1.9 < peak_over_weights(LARGE_OUTPUTS, verify) < 3.5


# -- what is not plain zeroing is named ------------------------------------------------------------------------------


class Normed(nn.Module):
    """A norm of a module's, one of the forward's own, and a sum, all over a thinned axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return self.last(h) + h.sum(-1, keepdim=True)


def test_a_plan_names_the_norms_that_run_over_the_channels_that_stay() -> None:
    model, x = Normed().eval(), torch.randn(2, 8)
    plan = structprune.plan(model, x, ratio=0.5)
    assert plan.layers
    assert plan.settings["over_survivors"] == ["norm (layer_norm)", "the model (mean)"]
    assert "over the channels that stay: norm (layer_norm), the model (mean)" in str(plan)
    assert structprune.Plan.from_json(plan.to_json()).settings == plan.settings
    assert structprune.verify(model, plan.apply(model), plan, x).ok


def test_nothing_is_named_where_the_plan_is_exact() -> None:
    model, x = _convolutions()[:3], torch.randn(2, 3, 8, 8)
    plan = structprune.plan(nn.Sequential(model, nn.Conv2d(16, 4, 1)).eval(), x, ratio=0.5)
    assert plan.layers
    assert "over_survivors" not in plan.settings


def test_every_random_operation_is_held_still() -> None:
    memory = {"empty", "empty_like", "empty_strided", "new_empty"}  # nothing is drawn
    counted = {"multinomial", "randperm"}  # of a fixed number of things: those that would change with it are pinned
    drawn = {name for name, op in OPS.items() if op.random}
    assert drawn - set(streamed._DRAWS) == memory | counted


def test_imaginary_parts_are_compared():
    ours, theirs = torch.tensor([3 + 4j, 1 + 1j]), torch.tensor([3 + 4j, 1 - 1j])
    assert relative_errors(ours, ours) == (0.0,)
    assert relative_errors(ours, theirs) == (0.5,)
