"""Scales that a class computes from its configuration: weights make up for them, so that it can be built anew."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import oracle
from support.transformers_models import MODELS, made, outputs, reloaded
from torch import Tensor, nn

import structprune
from structprune.errors import SurgeryError

X = torch.arange(12).reshape(2, 6) % 10


class Settings(SimpleNamespace):
    """A configuration as those of transformers: what is built from it can be built anew."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Scaled(nn.Module):
    """Embeddings times a scale that follows from the width, a gated layer, and a head; with a switch for each form."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.table = nn.Embedding(10, width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.gain = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, 10, bias=False)
        if config.tied:
            self.head.weight = self.table.weight
        self.number = math.sqrt(width)
        self.register_buffer("scale", torch.tensor(width**0.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        kind = self.config.kind
        x = {"number": lambda: x * self.number, "buffer": lambda: x * self.scale, "quotient": lambda: x / self.number,
             "attribute": lambda: x * self.config.width**0.5, "power": lambda: x**self.number}[kind]()  # fmt: skip
        x = x + self.down(self.up(x).relu())
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.gain)
        return self.head(x)


def network(kind: str, tied: bool = True) -> Scaled:
    torch.manual_seed(0)
    model = Scaled(Settings(width=16, kind=kind, tied=tied))
    with torch.no_grad():
        model.gain.normal_(0, 0.3)
    return model.double().eval()


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "one table"])
@pytest.mark.parametrize("kind", ["number", "buffer", "quotient", "attribute"])
def test_a_scale_is_made_up_for(kind: str, tied: bool) -> None:
    model = network(kind, tied)
    plan = structprune.plan(model, X, ratio=0.5)
    assert "config" not in plan.settings.left
    slim = structprune.Plan.from_json(plan.to_json()).apply(model)
    assert slim.config.width == 8
    oracle.check(model, slim, plan, X, tol=1e-9)
    built = Scaled(slim.config).double().eval()
    built.load_state_dict(slim.state_dict())
    assert torch.allclose(built(X), slim(X), rtol=1e-6)
    gains = [rescale for rescale in plan.rescales if rescale.tensor == "gain"]
    assert [rescale.offset for rescale in gains] == ([1.0] if tied else [])


def test_what_is_no_factor_is_told() -> None:
    model = network("power")
    plan = structprune.plan(model, X, ratio=0.5, axes=["hidden"])
    assert "number is 4.0 in the pruned model, and would be 2.8" in plan.settings.left["config"]
    assert not plan.rescales
    oracle.check(model, plan.apply(model), plan, X, tol=1e-9)


def test_a_float_of_another_model_is_refused() -> None:
    plan = structprune.plan(network("number"), X, ratio=0.5)
    other = network("number")
    other.number = 3.0
    with pytest.raises(SurgeryError, match=r"number of 'the model' is 3.0, where the plan expects 4.0"):
        plan.apply(other)


LOADED = (
    "gemma", "gemma2", "gemma3", "recurrentgemma", "t5", "bloom", "mpt", "codegen", "falcon", "zamba2", "mamba2", "opt",
    "gpt2", "phi3", "qwen3",
)  # fmt: skip


@pytest.mark.parametrize("name", LOADED)
def test_a_plain_call_is_right_and_loads(name: str, tmp_path: Any) -> None:
    model, inputs = made(MODELS[name])
    inputs["use_cache"] = False
    plan = structprune.plan(model, inputs, ratio=0.5, **MODELS[name].options)
    slim = plan.apply(model)
    structprune.verify(model, slim, plan, inputs).raise_for_error()
    assert "config" not in plan.settings.left
    assert torch.equal(outputs(reloaded(slim, tmp_path), inputs), outputs(slim, inputs))
    kept = sum(p.numel() for p in slim.parameters()) / sum(p.numel() for p in model.parameters())
    assert kept < (0.75 if name in ("falcon", "codegen") else 0.45)


def test_half_precision(tmp_path: Any) -> None:
    """What is multiplied is rounded, in the network that it is compared with too."""
    model, inputs = made(MODELS["gemma"])
    inputs["use_cache"] = False
    model.save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval()
    slim = structprune.prune(model, inputs, ratio=0.5)
    slim.save_pretrained(tmp_path / "slim")
    again = type(slim).from_pretrained(tmp_path / "slim", dtype=torch.bfloat16).eval()
    assert torch.equal(outputs(again, inputs), outputs(slim, inputs))


def test_an_inner_width_that_was_left_to_the_class(tmp_path: Any) -> None:
    model, inputs = made(MODELS["gpt2"])
    slim = structprune.prune(model, inputs, ratio=0.5, axes=["mlp"])
    assert (slim.config.n_embd, slim.config.n_inner, model.config.n_inner) == (64, 128, None)
    assert torch.equal(outputs(reloaded(slim, tmp_path), inputs), outputs(slim, inputs))


class ReadTied(Settings):
    """A configuration that sets a number after another one whenever it is read, as some set that of a part inside."""

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> ReadTied:
        return cls(**{**numbers, "aside": numbers["width"]})


class Aside(nn.Module):
    """A layer, and another one that these inputs do not use, as wide."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(8, config.width), nn.Linear(config.width, 4)
        self.aside = nn.Linear(3, config.aside)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_a_configuration_that_ties_a_number_when_it_is_read_does_not_describe_it_apart() -> None:
    """Built from the configuration as it is, both layers have the right widths; once it is read, the other has not."""
    model = Aside(ReadTied(width=32, aside=32)).eval()
    plan = structprune.plan(model, torch.randn(2, 8), ratio=0.5)
    assert "'aside.weight'" in plan.settings.left["config"]
    apart = structprune.plan(Aside(Settings(width=32, aside=32)).eval(), torch.randn(2, 8), ratio=0.5)
    assert "config" not in apart.settings.left
