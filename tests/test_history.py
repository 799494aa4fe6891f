"""`kept`: every surviving channel's index in the first model, after any number of rounds."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import CASES, all_cases, normal
from support.snapshot import assert_untouched, snapshot
from torch import fx, nn

import structprune
from structprune.errors import SurgeryError
from structprune.surgery import apply as surgery
from structprune.surgery.history import first_shapes
from structprune.tracing.state import held_tensors

all_cases()
INPUTS = normal(2, 3, 7, 7)


def network() -> Any:
    """Batch norm, a depthwise convolution, a skip connection."""
    return CASES["InvertedResidual"].build().eval()


def marked(model: nn.Module) -> nn.Module:
    """Every entry of every tensor is its own flat position, so that a survivor tells where it came from."""
    with torch.no_grad():
        for held in held_tensors(model).values():
            held.tensor.copy_(torch.arange(held.tensor.numel()).reshape(held.tensor.shape))
    return model


def assert_true(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """The record says the same as the marks do, for every tensor."""
    record = structprune.kept(model)
    for name, held in held_tensors(model).items():
        dims = record.get(name, {})
        index = [torch.tensor(dims.get(dim, range(size))) for dim, size in enumerate(shapes[name])]
        expected = torch.arange(torch.Size(shapes[name]).numel()).reshape(shapes[name])
        if index:
            expected = expected[torch.meshgrid(*index, indexing="ij")]
        assert torch.equal(held.tensor.detach().long(), expected), name
        assert all(len(kept) < shapes[name][dim] for dim, kept in dims.items()), "whole dimensions are left out"
    assert first_shapes(model) == shapes


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["InvertedResidual", "TimmAttention", "GroupedShuffle", "EncoderLayer"])
def test_three_rounds(name: str, inplace: bool) -> None:
    inputs = CASES[name].inputs()
    model = marked(CASES[name].build().double().eval())
    shapes = {tensor: tuple(held.tensor.shape) for tensor, held in held_tensors(model).items()}
    assert structprune.kept(model) == {}
    for seed in range(3):
        plan = structprune.plan(model, inputs.double(), ratio=0.3, importance=structprune.Random(seed))
        if plan.rescales:  # they change the numbers, which are marks here
            plan = type(plan)(**{**vars(plan), "rescales": ()})
        before = structprune.kept(model)
        slim = plan.apply(model, inplace=inplace)
        assert inplace or structprune.kept(model) == before, "the original's record is its own"
        assert_true(slim, shapes)
        model = slim


def test_prune_group_records() -> None:
    model = marked(network())
    shapes = {tensor: tuple(held.tensor.shape) for tensor, held in held_tensors(model).items()}
    graph = structprune.DependencyGraph(model, INPUTS)
    graph.prune_group("expand", [0, 5])
    graph.prune_group("expand", [0, 5])
    assert structprune.kept(model)["expand.weight"][0] == tuple(i for i in range(24) if i not in (0, 1, 5, 7))
    assert_true(model, shapes)


class Tied(nn.Module):
    """One weight under two names; and a bare parameter at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x):  # with annotations that are strings, torch.fx cannot save it
        return self.head(F.relu(self.up(self.embed(x))) * self.gain + self.embed(x))


def test_a_tied_tensor_is_noted_under_each_of_its_names() -> None:
    slim = structprune.prune(Tied(), torch.arange(6).reshape(2, 3), ratio=0.5)
    record = structprune.kept(slim)
    assert record["embed.weight"] == record["head.weight"]
    assert record["gain"][0] == record["embed.weight"][1]
    assert slim.head.weight is slim.embed.weight


def pruned_twice() -> nn.Module:
    model = structprune.prune(network(), INPUTS, ratio=0.25)
    return structprune.prune(model, INPUTS, ratio=0.25)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_record_survives_copies(copied: Any) -> None:
    model = pruned_twice()
    twin = copied(model)
    assert structprune.kept(twin) == structprune.kept(model) != {}
    structprune.prune(twin, INPUTS, ratio=0.5, inplace=True)
    assert structprune.kept(twin) != structprune.kept(model)


def test_graph_modules() -> None:
    """Their copies are built anew from the graph, and lose the attributes of their root."""
    tokens = torch.arange(6).reshape(2, 3)
    model = structprune.prune(fx.symbolic_trace(Tied()), tokens, ratio=0.25)
    record = structprune.kept(model)
    assert record.keys() == {"gain", "embed.weight", "up.weight", "up.bias", "head.weight"}
    assert structprune.kept(copy.deepcopy(model)) == structprune.kept(saved_and_loaded(model)) == record
    plan = structprune.plan(model, tokens, ratio=0.5)
    gone = plan.removed["gain"][0]
    expected = tuple(x for i, x in enumerate(record["gain"][0]) if i not in gone)
    assert structprune.kept(plan.apply(model))["gain"][0] == expected
    assert structprune.kept(model) == record
    plan.apply(model, inplace=True)
    assert structprune.kept(model)["gain"][0] == structprune.kept(copy.deepcopy(model))["gain"][0] == expected


def test_the_record_is_no_state() -> None:
    model = network()
    slim = structprune.prune(model, INPUTS, ratio=0.5)
    assert list(slim.state_dict()) == list(model.state_dict())
    assert [name for name, _ in slim.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in slim.named_buffers()] == [name for name, _ in model.named_buffers()]
    twin = structprune.prune(network(), INPUTS, ratio=0.5)
    before = structprune.kept(twin)
    twin.load_state_dict(slim.state_dict())
    assert structprune.kept(twin) == before


def test_the_record_does_not_disturb_compilation_and_export() -> None:
    slim = structprune.prune(network(), INPUTS, ratio=0.5)
    expected = slim(INPUTS)
    compiled = torch.compile(slim, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(INPUTS), expected)
    exported = torch.export.export(slim, (INPUTS,))
    torch.testing.assert_close(exported.module()(INPUTS), expected)
    assert not [name for name in exported.state_dict if "structprune" in name]


def test_the_record_does_not_disturb_onnx(tmp_path: Any) -> None:
    slim = structprune.prune(network(), INPUTS, ratio=0.5)
    assert structprune.export_onnx(slim, tmp_path / "slim.onnx", INPUTS)


def test_a_failed_apply_leaves_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model = structprune.prune(network(), INPUTS, ratio=0.25)
    plan = structprune.plan(model, INPUTS, ratio=0.25)
    before, record = snapshot(model), structprune.kept(model)
    recorded = surgery.record_kept

    def fails(*args: Any) -> None:
        recorded(*args)
        assert structprune.kept(model) != record, "it was written before this fails"
        raise RuntimeError("stop")

    monkeypatch.setattr(surgery, "record_kept", fails)
    with pytest.raises(RuntimeError, match="stop"):
        plan.apply(model, inplace=True)
    assert structprune.kept(model) == record
    assert_untouched(model, before)


def test_a_failed_first_apply_leaves_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    plan, before = structprune.plan(model, INPUTS, ratio=0.25), snapshot(model)
    recorded = surgery.record_kept

    def fails(*args: Any) -> None:
        recorded(*args)
        raise RuntimeError("stop")

    monkeypatch.setattr(surgery, "record_kept", fails)
    with pytest.raises(RuntimeError, match="stop"):
        plan.apply(model, inplace=True)
    assert structprune.kept(model) == {}
    assert_untouched(model, before)


def test_layers_carry_their_record_into_other_models() -> None:
    slim = structprune.prune(network(), INPUTS, ratio=0.5)
    record = structprune.kept(slim)
    outer = nn.Sequential()
    outer.add_module("body", slim)
    assert structprune.kept(outer) == {f"body.{name}": dims for name, dims in record.items()}
    assert structprune.kept(nn.DataParallel(slim)) == record
    assert structprune.kept(torch.compile(slim, backend="eager")) == record
    outer.body.expand = nn.Conv2d(*outer.body.expand.weight.shape[1::-1], 1)
    assert not [name for name in structprune.kept(outer) if name.startswith("body.expand.")], "a new layer is whole"


def test_pruning_a_part_and_then_the_whole() -> None:
    body = structprune.prune(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), normal(2, 6), ratio=0.25)
    whole = nn.Sequential(nn.Linear(6, 6), body, nn.Linear(6, 2))
    part = structprune.kept(body)["0.weight"][0]
    plan = structprune.plan(whole, normal(2, 6), ratio=0.5)
    slim = plan.apply(whole)
    gone = plan.removed["1.0.weight"][0]
    assert structprune.kept(slim)["1.0.weight"][0] == tuple(x for i, x in enumerate(part) if i not in gone)
    assert structprune.kept(slim)["0.weight"].keys() == {0}


def test_a_tensor_that_something_else_resized_is_not_guessed() -> None:
    slim = structprune.prune(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), normal(2, 4), ratio=0.5)
    slim[0].weight, slim[0].bias = nn.Parameter(torch.rand(6, 4)), nn.Parameter(torch.rand(6))
    slim[2].weight = nn.Parameter(torch.rand(2, 6))
    with pytest.raises(SurgeryError, match=r"Dimension 0 of '0.weight' had 8 channels in the first model"):
        structprune.kept(slim)
    # Pruned again it may have as many channels as the old record, which says nothing about them all the same.
    structprune.DependencyGraph(slim, normal(2, 4)).prune_group("0", [0, 1])
    with pytest.raises(SurgeryError, match="which channels are left is not known"):
        structprune.kept(slim)
