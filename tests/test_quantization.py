"""Quantised files: what is narrow, how far they are from the model, and what is refused."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
import torch
from support.quantised import Block, batches, convolutions
from torch import nn

import structprune
from structprune.errors import ExportError, LoadError, RecoveryError, StructpruneError
from structprune.quantization.onnx_runtime import _overflows


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    return structprune.prune(convolutions(), torch.randn(2, 3, 12, 12), ratio=0.25, round_to=1)


def initializers(path):
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def test_weights_and_activations_of_a_pruned_network(pruned, tmp_path):
    data = batches(4, 3, 12, 12)
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    found = structprune.quantize(pruned, tmp_path / "q.onnx", data[0], data)
    assert (found.layers, found.left) == (3, 0)
    assert 1e-3 < found.max_relative_error < 0.1  # eight bits show, and are enough
    assert found.bytes == (tmp_path / "q.onnx").stat().st_size
    assert pruned.training
    assert all(torch.equal(state[name], tensor) for name, tensor in pruned.state_dict().items())
    weights = [each for each in initializers(found.path).values() if each.ndim > 1]
    assert {each.dtype for each in weights} == {np.dtype(np.int8)}
    assert sum(each.size for each in weights) == sum(p.numel() for p in pruned.parameters() if p.ndim > 1)
    # Of every channel its own scale, with the batch norm folded in: the largest number is reached in each.
    first = next(each for each in weights if each.ndim == 4 and each.shape[1] == 3)
    assert (np.abs(first.reshape(len(first), -1).astype(int)).max(1) >= (63 if _overflows() else 126)).all()
    # Unsigned activations, which x86 multiplies fast.
    graph = onnx.load(found.path).graph
    zeros = {each.input[2] for each in graph.node if each.op_type == "QuantizeLinear"}
    assert {str(initializers(found.path)[name].dtype) for name in zeros} == {"uint8"}
    info = structprune.onnx_info(found.path)
    assert len(info.digests) == 1
    assert info.before.params > info.after.params


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic"])
def test_weights_have_seven_bits_where_sums_would_overflow(pruned, tmp_path, monkeypatch, scheme):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    data = batches(4, 3, 12, 12)
    found = structprune.quantize(pruned, tmp_path / "q.onnx", data[0], data, scheme=scheme)
    largest = max(np.abs(each.astype(int)).max() for each in initializers(found.path).values() if each.ndim > 1)
    assert 32 < largest <= 64


def test_the_file_holds_no_long_names_and_no_zeros_twice(pruned, tmp_path):
    data = batches(4, 3, 12, 12)
    graph = onnx.load(structprune.quantize(pruned, tmp_path / "q.onnx", data[0], data).path).graph
    weights = [each.name for each in graph.initializer if len(each.dims) > 1]
    assert all(name.startswith("model.") for name in weights)
    small = [onnx.numpy_helper.to_array(each) for each in graph.initializer if len(each.dims) < 2]
    assert len({(each.dtype, each.shape, each.tobytes()) for each in small}) == len(small)
    read = {name for node in graph.node for name in (*node.input, *node.output)}
    assert read >= {"input", *weights}
    assert max(len(name) for name in read - {"input", graph.output[0].name, *weights}) < 7
    # Times of a profile go to layers by these.
    assert all(node.name for node in graph.node if node.op_type in ("Conv", "Gemm"))


def test_graphs_inside_of_nodes_find_the_names_around_them(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)

        def forward(self, x):
            hidden = torch.relu(self.first(x))
            hidden = torch.cond(x.sum() > 0, lambda h: h * 2.0, lambda h: h - 1.0, (hidden,))
            return self.last(hidden)

    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(4, 64)
    options = {"scheme": "int8_dynamic", "dynamic_batch": False}
    found = structprune.quantize(model, tmp_path / "q.onnx", x + 1, [x + 1, x - 1], **options)
    assert any(node.op_type == "If" for node in onnx.load(found.path).graph.node)
    assert (found.layers, found.max_relative_error < 0.1) == (2, True)


def test_the_file_as_a_module_takes_batches_of_any_size(pruned, tmp_path):
    data = batches(4, 3, 12, 12)
    module = structprune.onnx_model(structprune.quantize(pruned, tmp_path / "q.onnx", data[0], data).path, threads=1)
    pruned.eval()
    for size in (1, 7):
        (x,) = batches(size, 3, 12, 12, count=1)
        expected = pruned(x)
        assert (module(x) - expected).abs().max() < 0.2 * expected.abs().max()
        assert torch.equal(module(x), module(input=x))
    with pytest.raises(ExportError, match="takes the inputs input; got other"):
        module(other=x)
    with pytest.raises(ExportError, match="cannot run"):
        module(x[:, :2])
    times = structprune.benchmark({"float": pruned, "int8": module}, x, runs=3, explanations=False)
    assert [each.model for each in times.timings] == ["float", "int8"]


@pytest.mark.parametrize(
    ("scheme", "layers", "left", "off"),
    [("int8_dynamic", 3, 0, (1e-4, 0.1)), ("int8_weights", 2, 1, (1e-4, 0.02)), ("int4_weights", 2, 1, (0.01, 0.2))],
)
def test_matrix_products(tmp_path, scheme, layers, left, off):
    torch.manual_seed(0)
    model, data = Block(), batches(2, 7, 64)
    # Data is only to compare on.
    found = structprune.quantize(
        model, tmp_path / "q.onnx", data[0], data[:1], scheme=scheme, dynamic_dims={"x": {1: "n"}}
    )
    assert (found.layers, found.left, found.scheme) == (layers, left, scheme)
    assert off[0] < found.max_relative_error < off[1]
    assert found.bytes < 2.5 * sum(p.numel() for p in model.parameters())  # of four bytes each


def test_nothing_is_said_nor_logged(pruned, tmp_path, caplog, capfd):
    root = logging.getLogger()
    before = list(root.handlers), root.manager.disable
    data = batches(4, 3, 12, 12)
    structprune.quantize(pruned, tmp_path / "q.onnx", data[0], data)
    assert (list(root.handlers), root.manager.disable) == before
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes the ranges of activations from data="),
        ({"scheme": "int2"}, "scheme is 'int2'"),
        ({"scheme": "int8_weights"}, "no layer of Sequential was quantised .* use scheme='int8'"),
        ({"data": [], "scheme": "int8"}, "no batch"),
        ({"data": [torch.randn(2, 5, 12, 12)]}, "cannot run|does not fit|not run|runs on"),
        ({"data": batches(2, 3, 12, 12), "tolerance": 1e-6}, "more than 1e-06"),
        ({"data": batches(2, 3, 12, 12), "ranges": "guessed"}, "ranges is 'guessed'"),
        ({"data": batches(2, 3, 12, 12), "tolerance": -1.0}, "tolerance is -1.0"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(pruned, tmp_path, options, message):
    options = dict(options)
    data = options.pop("data", None)
    with pytest.raises((ExportError, RecoveryError, StructpruneError), match=message):
        structprune.quantize(
            nn.Sequential(*list(pruned)), tmp_path / "q.onnx", torch.randn(2, 3, 12, 12), data, **options
        )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_onnx_file_is_no_module(tmp_path):
    (tmp_path / "text.onnx").write_text("no protobuf")
    for name in ("text.onnx", "absent.onnx"):
        with pytest.raises(LoadError, match="cannot be loaded by ONNX Runtime"):
            structprune.onnx_model(tmp_path / name)
