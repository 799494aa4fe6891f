"""Models whose forward was rewritten, and modules that run a graph: copies and pickles are what they are copies of."""

from __future__ import annotations

import abc
import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import normal
from torch import Tensor, fx, nn

import structprune
from structprune.errors import SurgeryError
from structprune.planning.plan import plans_of

INPUTS = normal(2, 3, 8, 8)


class Literal(nn.Module):
    """The width stands as a number in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(128, 8), nn.Linear(8, 5)

    def forward(self, x):  # with annotations that are strings, torch.fx cannot save it
        x = F.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.head(torch.relu(self.up(x.view(-1, 128))))


class Abstract(abc.ABC):
    """Its subclasses have another metaclass."""

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class WithMetaclass(Abstract, Literal):
    def forward(self, x: Tensor) -> Tensor:
        return Literal.forward(self, x)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MODELS = {"module": Literal, "metaclass": WithMetaclass, "graph module": lambda: fx.symbolic_trace(Literal())}
COPIES: dict[str, Any] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_copies_compute_the_same_and_know_their_plans(kind: str, how: str, inplace: bool) -> None:
    model = structprune.prune(MODELS[kind](), INPUTS, ratio=0.5, inplace=inplace)
    assert plans_of(model)[0].literal_edits
    twin = COPIES[how](model)
    assert torch.equal(twin(INPUTS), model(INPUTS))
    assert structprune.kept(twin) == structprune.kept(model) != {}
    assert plans_of(twin) == plans_of(model)


@pytest.mark.parametrize("kind", MODELS)
def test_a_second_round_rewrites_the_number_again(kind: str) -> None:
    model = structprune.prune(MODELS[kind](), INPUTS, ratio=0.5, round_to=1)
    slim = structprune.prune(model, INPUTS, ratio=0.5, round_to=1)
    assert slim.get_submodule("up").in_features == 32
    assert len(plans_of(slim)) == 2
    for twin in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(twin(INPUTS), slim(INPUTS))
        assert plans_of(twin) == plans_of(slim)
    assert len(plans_of(model)) == 1


def test_the_class_stays_a_subclass_with_its_name() -> None:
    slim = structprune.prune(WithMetaclass(), INPUTS, ratio=0.5)
    twin = pickle.loads(pickle.dumps(slim))
    assert isinstance(twin, WithMetaclass)
    assert type(twin).__qualname__ == "WithMetaclass"


def test_a_graph_module_that_fails_to_change_keeps_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fx.symbolic_trace(Literal())
    expected, code = model(INPUTS), model.code
    plan = structprune.plan(model, INPUTS, ratio=0.5)

    def fails(*_: Any) -> None:
        assert model.code != code, "it was changed before this fails"
        raise RuntimeError("stop")

    monkeypatch.setattr("structprune.surgery.apply.record_kept", fails)
    with pytest.raises(RuntimeError, match="stop"):
        plan.apply(model, inplace=True)
    assert model.code == code
    assert torch.equal(model(INPUTS), expected)
    assert plans_of(model) == ()


class TwoGraphs(fx.GraphModule):
    """One graph for each mode, as feature extractors have."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph)
        self.eval_graph, self.train_graph = graph, fx.symbolic_trace(root).graph


def test_a_module_with_two_graphs_is_refused() -> None:
    root = Literal()
    model = TwoGraphs(root, fx.symbolic_trace(root).graph).eval()
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    with pytest.raises(SurgeryError, match=r"keeps further graphs in train_graph .* which hold the size too"):
        plan.apply(model)
    assert model(INPUTS).shape == (2, 5)
