"""Pruned models go through ``torch.export`` and ``torch.compile``, also where forwards or attributes were changed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import frozen
from support.cases import CASES, all_cases
from torch import Tensor, nn

import structprune
from structprune.planning.plan import plans_of
from structprune.tracing.trace import as_call

all_cases()
# Residual and depthwise convolutions, groups and a shuffle, a literal, attention with heads that are repaired, grouped
# queries; and a network with all that a plan can hold. No recurrence: Dynamo takes none, pruned or not.
NAMES = ("InvertedResidual", "GroupedShuffle", "ViewLiteral", "TimmAttention", "GroupedQueryRepeatKv", "Frozen")
COMPILER = shutil.which("g++") or shutil.which("clang++")


def made(name: str) -> tuple[Callable[[], nn.Module], Any]:
    """How the model is made, and its inputs."""
    if name == "Frozen":
        return frozen.build, frozen.INPUTS
    case = CASES[name]
    return lambda: case.build().eval(), case.inputs()


def pruned(name: str, tmp_path: Path, loaded: bool) -> tuple[nn.Module, Any]:
    """The model at half its channels, straight from pruning or from a folder."""
    build, inputs = made(name)
    torch.manual_seed(0)
    slim = structprune.prune(build(), inputs, ratio=0.5, round_to=1)
    if loaded:
        slim = structprune.load(build, structprune.save(slim, tmp_path / "slim"))
    return slim.eval(), inputs


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_close(model: Callable[..., Any], reference: nn.Module, inputs: Any) -> None:
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        expected, found = tensors(reference(*args, **kwargs)), tensors(model(*args, **kwargs))
    assert expected
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_the_models_need_what_is_tested() -> None:
    plans = {name: structprune.plan(made(name)[0](), made(name)[1], ratio=0.5, round_to=1) for name in NAMES}
    assert all(plan.slices for plan in plans.values())
    assert plans["Frozen"].literal_edits
    assert any(plan.attribute_edits for name, plan in plans.items() if name != "Frozen")


@pytest.mark.parametrize("loaded", [False, True], ids=["pruned", "loaded"])
@pytest.mark.parametrize("name", NAMES)
def test_torch_export(name: str, loaded: bool, tmp_path: Path) -> None:
    slim, inputs = pruned(name, tmp_path, loaded)
    args, kwargs = as_call(inputs)
    program = torch.export.export(slim, args, kwargs)
    assert_close(program.module(), slim, inputs)
    held = sum(tensor.numel() for tensor in program.state_dict.values())
    assert held == sum(tensor.numel() for tensor in slim.state_dict().values())
    assert not [key for key in program.state_dict if "structprune" in key]


@pytest.mark.parametrize("loaded", [False, True], ids=["pruned", "loaded"])
@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_in_one_graph(name: str, loaded: bool, tmp_path: Path) -> None:
    """Everything of inductor but its code generation, which the next test runs too."""
    slim, inputs = pruned(name, tmp_path, loaded)
    torch.compiler.reset()
    assert_close(torch.compile(slim, backend="aot_eager", fullgraph=True), slim, inputs)


# torch's own code, which inductor imports on its first use.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler, and none is on the path")
@pytest.mark.parametrize("name", ["InvertedResidual", "Frozen"])
def test_torch_compile_to_machine_code(name: str, tmp_path: Path) -> None:
    slim, inputs = pruned(name, tmp_path, True)
    torch.compiler.reset()
    assert_close(torch.compile(slim, fullgraph=True), slim, inputs)


def test_a_compiled_model_is_pruned_and_runs_compiled(tmp_path: Path) -> None:
    build, inputs = made("Frozen")
    torch.compiler.reset()
    compiled = torch.compile(build(), backend="aot_eager")
    slim = structprune.prune(compiled, inputs, ratio=0.5)
    assert plans_of(slim)[0].literal_edits
    again = structprune.load(build, structprune.save(slim._orig_mod, tmp_path))
    assert_close(slim, again, inputs)


def test_the_compiled_original_is_not_disturbed() -> None:
    build, inputs = made("Frozen")
    torch.compiler.reset()
    model = build()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled, twin, inputs)
    slim = structprune.prune(model, inputs, ratio=0.5)
    assert_close(torch.compile(slim, backend="aot_eager"), slim, inputs)
    assert_close(compiled, twin, inputs)


def test_another_batch_size_through_an_exported_program(tmp_path: Path) -> None:
    slim, (image, ids) = pruned("Frozen", tmp_path, True)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(slim, (image, ids), dynamic_shapes=({0: batch}, {0: batch}))
    assert_close(program.module(), slim, (image.repeat(3, 1, 1, 1), ids.repeat(3, 1)))
