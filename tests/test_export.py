"""ONNX export: what is written computes what the model computes, and everything else is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from structprune.errors import ExportError, MissingExtraError
from structprune.export.files import relative_error
from structprune.export.onnx import export_onnx


def conv_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(), nn.Linear(8, 5),
    )  # fmt: skip
    # Running statistics that differ from the batch's: an export in training mode would show.
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    return net


class Nested(nn.Module):
    """Keyword and nested arguments, a constant, and nested outputs that are no tensors in part."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x, scale=1.0, extra=None, **more):
        y = self.linear(x) * scale
        for value in extra or ():
            y = y + value
        for value in more.values():
            y = y - value
        return {"y": y, "rest": (y.sum(1), None, x.shape[-1])}


class FixedBatch(nn.Module):
    """The batch size is written into the forward."""

    def forward(self, x):
        return x.reshape(4, -1) + torch.zeros(4, 1)


class Squeezing(nn.Module):
    """Drops the batch dimension, but only of a single sample."""

    def forward(self, x):
        return x.mul(2).squeeze(0) if x.shape[0] == 1 else x.mul(2)


class Noisy(nn.Module):
    """No two runs agree."""

    def forward(self, x):
        return x + torch.randn_like(x)


class Unexportable(nn.Module):
    """Control flow that depends on the data."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return [torch.as_tensor(output) for output in outputs]


@pytest.mark.parametrize("size", [1, 4])
def test_file_computes_what_the_model_computes_at_any_batch_size(tmp_path, size):
    model = conv_net()
    path = tmp_path / "model.onnx"
    result = export_onnx(model, path, torch.randn(size, 3, 8, 8))
    assert result.path == path
    assert result.bytes == path.stat().st_size
    assert result.opset == onnx.load(path).opset_import[0].version
    assert 0 <= result.max_relative_error < 1e-5
    model.eval()
    for other in (1, 2, 7):
        x = torch.randn(other, 3, 8, 8)
        torch.testing.assert_close(run(path, x)[0], model(x).detach(), rtol=1e-4, atol=1e-5)


def test_batch_dimension_has_a_name(tmp_path):
    export_onnx(conv_net(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    (given,) = onnx.load(tmp_path / "m.onnx").graph.input
    assert given.name == "input"
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]


def test_fixed_batch(tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(FixedBatch(), path, torch.randn(4, 6), dynamic_batch=False)
    (given,) = onnx.load(path).graph.input
    assert given.type.tensor_type.shape.dim[0].dim_value == 4


def test_opset_is_the_callers(tmp_path):
    assert export_onnx(conv_net(), tmp_path / "m.onnx", torch.randn(2, 3, 8, 8), opset=21).opset == 21


def test_double_and_half_precision(tmp_path):
    for dtype, limit in ((torch.float64, 1e-6), (torch.float16, 1e-2)):
        result = export_onnx(nn.Linear(4, 3).to(dtype), tmp_path / "m.onnx", torch.randn(2, 4, dtype=dtype))
        assert result.max_relative_error <= limit


@pytest.mark.parametrize("size", [1, 3])
def test_keyword_and_nested_arguments(tmp_path, size):
    path = tmp_path / "m.onnx"
    inputs = {
        "late": torch.randn(size, 4),  # swallowed by **more, and given before x
        "extra": [torch.randn(size, 4), torch.randn(4)],
        "scale": 2.5,
        "x": torch.randn(size, 6),
    }
    result = export_onnx(Nested(), path, inputs)
    assert result.max_relative_error < 1e-5
    graph = onnx.load(path).graph
    assert [node.name for node in graph.input] == ["late", "extra_0", "extra_1", "x"]
    assert len(graph.output) == 2


def test_positional_arguments(tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(Nested(), path, (torch.randn(3, 6), 0.5, (torch.randn(3, 4),)))
    assert [node.name for node in onnx.load(path).graph.input] == ["x", "extra_0"]


def test_model_is_left_as_it_was(tmp_path):
    model = conv_net()
    model.train()
    model[1].eval()
    model[6].weight.requires_grad_(False)
    model[6].bias.grad = torch.ones(5)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 8, 8, generator=torch.Generator()))
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model[6].bias.grad, torch.ones(5))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_exporter_is_silent(tmp_path, capfd):
    export_onnx(conv_net(), tmp_path / "m.onnx", torch.randn(2, 3, 8, 8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            FixedBatch(),
            torch.randn(4, 6),
            "FixedBatch at batch size 1: the model itself does not run .* dynamic_batch=False",
        ),
        (Squeezing(), torch.randn(4, 6), r"Squeezing at batch size 1: output 0 has shape \(1, 6\) in ONNX Runtime"),
        (Noisy(), torch.randn(4, 6), r"Noisy at batch size 4: output 0 differs by .* more than 0.0001"),
        (Unexportable(), torch.randn(4, 6), "Unexportable cannot be exported to ONNX"),
        (nn.Linear(6, 4).bfloat16(), torch.randn(4, 6).bfloat16(), "is of bfloat16"),
    ],
)
def test_what_cannot_be_right_is_refused_and_nothing_is_written(tmp_path, model, inputs, message):
    model.train()
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "m.onnx", inputs)
    assert list(tmp_path.iterdir()) == []
    assert model.training


def test_a_file_that_was_there_survives_a_failed_export(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_text("precious")
    with pytest.raises(ExportError):
        export_onnx(Noisy(), path, torch.randn(2, 3))
    assert path.read_text() == "precious"


def change_weight(path: Path) -> None:
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)


def misname_operator(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)


def damage_files(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """The exporter is honest as a rule; make it write something else."""
    save = torch.onnx.ONNXProgram.save

    def damaged(program, file, **options):
        save(program, file, **options)
        damage(Path(file))

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", damaged)


@pytest.mark.parametrize(
    ("damage", "message"), [(change_weight, "output 0 differs by"), (misname_operator, "invalid ONNX file for m.onnx")]
)
def test_a_wrong_file_is_seen(tmp_path, monkeypatch, damage, message):
    damage_files(monkeypatch, damage)
    with pytest.raises(ExportError, match=message):
        export_onnx(nn.Linear(6, 4), tmp_path / "m.onnx", torch.randn(3, 6))


def test_tolerance_is_the_callers(tmp_path, monkeypatch):
    damage_files(monkeypatch, change_weight)
    result = export_onnx(nn.Linear(6, 4), tmp_path / "m.onnx", torch.ones(3, 6), tolerance=100.0)
    assert result.max_relative_error > 0.01


def test_large_weights_go_into_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("structprune.export.onnx._EXTERNAL_DATA_ABOVE", 0)
    path = tmp_path / "m.onnx"
    model = nn.Linear(64, 64).eval()
    result = export_onnx(model, path, torch.randn(2, 64))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert result.bytes == sum(file.stat().st_size for file in tmp_path.iterdir()) > 64 * 64 * 4
    x = torch.randn(5, 64)
    torch.testing.assert_close(run(path, x)[0], model(x).detach(), rtol=1e-4, atol=1e-5)


def test_missing_folder(tmp_path):
    with pytest.raises(ExportError, match="does not exist; create it first"):
        export_onnx(nn.Linear(2, 2), tmp_path / "no" / "m.onnx", torch.randn(1, 2))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*pip install 'structprune\[onnx\]'"):
        export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", torch.randn(1, 2))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([0.0, 0.0], [0.0, 1e-9], INF),
        ([INF, -INF, NAN, 2.0], [INF, -INF, NAN, 1.0], 0.5),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([NAN, 1.0], [INF, 1.0], INF),
        ([NAN], [NAN], 0.0),
        ([1.0], [INF], INF),
        ([], [], 0.0),
        ([True, False], [True, True], 1.0),
        ([3, 4], [3, 2], 0.5),
    ],
)
def test_relative_error(expected, actual, error):
    assert relative_error(torch.tensor(expected), torch.tensor(actual)) == error


def test_relative_error_of_a_nan_where_a_number_is_expected_is_above_every_limit():
    assert not relative_error(torch.tensor([1.0]), torch.tensor([NAN])) <= 1e9
