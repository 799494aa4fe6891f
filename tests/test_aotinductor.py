"""Packages of AOTInductor: they compute what the model computes, are timed, and a missing compiler is told."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import pytest
import torch
from support.quantised import Block, batches, convolutions
from torch import _inductor, nn
from torch._dynamo.utils import counters

import structprune
from structprune.errors import ExportError
from structprune.export.aotinductor import compiler_lacking

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler is installed here",
)
needs_torchao = pytest.mark.skipif(not find_spec("torchao"), reason="the extra torchao is not installed here")


@pytest.fixture
def slim():
    torch.manual_seed(0)
    return structprune.prune(convolutions(), torch.randn(2, 3, 12, 12), ratio=0.5, round_to=1)


@needs_compiler
def test_what_is_written_computes_what_the_pruned_model_computes(slim, tmp_path):
    found = structprune.export_aotinductor(slim, tmp_path / "slim.pt2", torch.randn(2, 3, 12, 12))
    assert slim.training
    assert 0 < found.max_relative_error < 1e-4
    assert found.bytes == (tmp_path / "slim.pt2").stat().st_size
    assert [each.name for each in tmp_path.iterdir()] == ["slim.pt2"]
    module = structprune.torch_model(found.path)
    slim.eval()
    for size in (1, 2, 7):
        (x,) = batches(size, 3, 12, 12, count=1)
        torch.testing.assert_close(module(x), slim(x), rtol=1e-3, atol=1e-5)
        assert torch.equal(module(input=x), module(x))
    with pytest.raises(ExportError, match="takes the inputs input; got other"):
        module(other=x)
    # Compiled code checks neither, and would read other memory.
    torch.testing.assert_close(module(x.contiguous(memory_format=torch.channels_last)), slim(x), rtol=1e-3, atol=1e-5)
    wanted = r"was compiled for torch.float32 and \[free, 3, 12, 12\] on cpu"
    for wrong in (x[:, :, :11], x.double(), x[0]):
        with pytest.raises(ExportError, match=wanted):
            module(wrong)


@needs_compiler
def test_free_dimensions_and_several_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x, *, scale):
            return {"scores": self.block(x) * scale, "mean": x.mean()}

    torch.manual_seed(0)
    model = Two().eval()
    inputs = {"x": torch.randn(2, 6, 64), "scale": torch.tensor(2.0)}
    structprune.export_aotinductor(model, tmp_path / "m.pt2", inputs, dynamic_dims={"x": {1: "n"}})
    module = structprune.torch_model(tmp_path / "m.pt2")
    assert module.inputs == ("x", "scale")
    inputs = {"scale": torch.tensor(0.5), "x": torch.randn(3, 11, 64)}
    for found, expected in zip(module(**inputs), model(**inputs).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
@needs_torchao
def test_integers_stay_integers_when_they_are_compiled(tmp_path):
    torch.manual_seed(0)
    wide = nn.Sequential(*(m for _ in range(2) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()))).eval()
    x = torch.randn(4, 32, 12, 12)
    small = structprune.quantize(wide, tmp_path / "q.pt2", x, [x], backend="torchao")
    module = structprune.torch_model(small.path)
    # Traced on strided inputs, and run on others.
    strided = x.contiguous(memory_format=torch.channels_last)
    counters.clear()
    package = structprune.export_aotinductor(module, tmp_path / "p.pt2", strided)
    assert in_integers() == 2
    assert package.max_relative_error < 0.05
    packed = structprune.torch_model(package.path)
    assert torch.equal(packed(strided), packed(x))
    for size in (1, 6):
        images = x.repeat(2, 1, 1, 1)[:size]
        assert (packed(images) - wide(images)).abs().max() < 0.1 * wide(images).abs().max()
    # Not by torch.compile alone: weights have to be constants for it.
    counters.clear()
    structprune.benchmark({"int8": module}, x, backends=("compile",), runs=2, memory=False, explanations=False)
    assert in_integers() == 2


def in_integers() -> int:
    """How many convolutions became those of integers where torch compiled last."""
    return counters["inductor"]["qconv_weight_prepack_matcher_count"]


@needs_compiler
def test_each_of_many_models_of_one_class_is_compiled(monkeypatch):
    """By itself torch gives up after eight of them, and runs the others as they are."""
    compile_model, graphs = torch.compile, []

    def eager(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_model(model, backend=eager, **options))
    models = {str(width): nn.Sequential(nn.Linear(4, width), nn.ReLU()) for width in range(2, 12)}
    structprune.benchmark(models, torch.randn(3, 4), backends=("compile",), runs=2, explanations=False)
    assert len(graphs) == len(models)


@pytest.mark.parametrize("backend", ["compile", "aotinductor"])
def test_a_missing_compiler_is_told(tmp_path, backend):
    x = torch.randn(2, 4)
    with _inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert "apt install g++" in compiler_lacking()
        with pytest.raises(ValueError, match=rf"a C\+\+ compiler, and torch finds none .*or leave '{backend}' out"):
            structprune.benchmark({"a": nn.Linear(4, 2)}, x, backends=(backend,))
        with pytest.raises(ExportError, match=r"AOTInductor compiles with a C\+\+ compiler, and torch finds none"):
            structprune.export_aotinductor(nn.Linear(4, 2), tmp_path / "m.pt2", x)
    assert list(tmp_path.iterdir()) == []


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ExportError, match=r"files that end in \.pt2"):
        structprune.export_aotinductor(nn.Linear(4, 2), tmp_path / "m.so", torch.randn(2, 4))
