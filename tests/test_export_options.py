"""Options of the ONNX export: free dimensions with names, operator sets; and what the file says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune.errors import ExportError, LoadError
from structprune.planning.plan import plans_of


class Encoder(nn.Module):
    """Tokens with their places and a mask, a transformer layer, the mean over what is not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(40, 32), nn.Embedding(24, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.down(torch.relu(self.up(x)))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[:, length // 2 + 1 :] = False
    return {"ids": torch.randint(0, 40, (batch, length), generator=generator), "mask": mask}


NAMES = {"ids": {1: "sequence"}, "mask": {1: "sequence"}}


@pytest.fixture(scope="module")
def slim() -> nn.Module:
    torch.manual_seed(0)
    return structprune.prune(Encoder().eval(), tokens(2, 6), ratio=0.5)


def run(path: Path, inputs: dict[str, Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def assert_right(path: Path, model: nn.Module, sizes: Iterable[tuple[int, int]]) -> None:
    for batch, length in sizes:
        inputs = tokens(batch, length)
        with torch.no_grad():
            expected = model(**inputs).numpy()
        np.testing.assert_allclose(run(path, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_file_with_free_batch_and_length_is_right_at_any(slim: nn.Module, tmp_path: Path, batch: int) -> None:
    path = tmp_path / "slim.onnx"
    structprune.export_onnx(slim, path, tokens(batch, 6), dynamic_dims=NAMES)
    assert_right(path, slim, [(1, 2), (1, 24), (2, 6), (5, 7)])
    shapes = structprune.onnx_info(path)
    assert shapes.inputs == {"ids": ("batch", "sequence"), "mask": ("batch", "sequence")}
    assert list(shapes.outputs.values()) == [("batch", 5)]


def test_a_name_may_be_free_where_the_batch_is_not(slim: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "slim.onnx"
    structprune.export_onnx(slim, path, tokens(2, 6), dynamic_batch=False, dynamic_dims=NAMES)
    assert structprune.onnx_info(path).inputs["ids"] == (2, "sequence")
    assert_right(path, slim, [(2, 3), (2, 24)])


def test_a_length_that_cannot_be_doubled_is_halved(slim: nn.Module, tmp_path: Path) -> None:
    """There are 24 places."""
    path = tmp_path / "slim.onnx"
    structprune.export_onnx(slim, path, tokens(2, 24), dynamic_dims=NAMES)
    assert_right(path, slim, [(3, 5)])


class OnlyAt(nn.Module):
    """Runs at these widths alone; beyond the first it adds one, which the tracer does not see."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            if x.shape[1] not in self.widths:
                raise KeyError(f"no width {x.shape[1]}")
            return x * 2 + (x.shape[1] != self.widths[0])
        return x * 2


X = torch.ones(2, 6)
WIDTH = {"x": {1: "width"}}


def test_a_file_that_is_wrong_at_another_size_is_refused(tmp_path: Path) -> None:
    for widths, size in (((6, 12), 12), ((6, 3), 3)):
        with pytest.raises(ExportError, match=f"OnlyAt at width = {size}: output 0 differs"):
            structprune.export_onnx(OnlyAt(*widths), tmp_path / "m.onnx", X, dynamic_dims=WIDTH)
    message = r"'width' was to be free, but OnlyAt itself runs neither at 12 nor at 3 \(KeyError: 'no width 3'\)"
    with pytest.raises(ExportError, match=message):
        structprune.export_onnx(OnlyAt(6), tmp_path / "m.onnx", X, dynamic_dims=WIDTH)
    with pytest.raises(ExportError, match="OnlyAt at check_inputs: output 0 differs"):
        structprune.export_onnx(
            OnlyAt(6, 7), tmp_path / "m.onnx", X, dynamic_dims=WIDTH, check_inputs=[torch.ones(2, 7)]
        )
    assert list(tmp_path.iterdir()) == []
    structprune.export_onnx(OnlyAt(6), tmp_path / "m.onnx", X, dynamic_dims=WIDTH, check_inputs=[torch.ones(1, 6)])


class Square(nn.Module):
    """Both dimensions are of one size, whatever they are called."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 6) * 2


@pytest.mark.parametrize(
    ("model", "inputs", "names", "message"),
    [
        (Square(), torch.ones(4, 4), {"y": {1: "width"}}, "names the input 'y'; the inputs are x"),
        (Square(), torch.ones(4, 4), {"x": {2: "width"}}, r"dimension 2 of 'x', whose shape is \[4, 4\]"),
        (Square(), torch.ones(4, 4), {"x": {1: "a b"}}, "give letters, digits and underscores"),
        (OnlyAt(1), torch.ones(4, 1), WIDTH, "has size 1 in the example"),
        (OnlyAt(6), torch.ones(4, 6), {"x": {0: "width", 1: "width"}}, "to dimensions of size 4 and 6"),
        (Square(), torch.ones(4, 4), {"x": {0: "rows", 1: "columns"}}, "always equals 'rows'; give both one name"),
        (Fixed(), X, WIDTH, "cannot be exported|fixes it to 6"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, model: nn.Module, inputs: Tensor, names: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        structprune.export_onnx(model, tmp_path / "m.onnx", inputs, dynamic_batch=False, dynamic_dims=names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_operator_sets(slim: nn.Module, tmp_path: Path, opset: int) -> None:
    path = tmp_path / "slim.onnx"
    assert structprune.export_onnx(slim, path, tokens(2, 6), opset=opset).opset == opset
    assert structprune.onnx_info(path).opset == opset
    assert_right(path, slim, [(3, 6)])


def test_an_operator_set_that_the_exporter_does_not_reach_is_refused(slim: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot write operator set 7"):
        structprune.export_onnx(slim, tmp_path / "slim.onnx", tokens(2, 6), opset=7)
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_which_plans_made_it(tmp_path: Path) -> None:
    x = torch.randn(2, 16)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    path = tmp_path / "m.onnx"
    structprune.export_onnx(model, path, x)
    info = structprune.onnx_info(path)
    assert (info.version, info.digests, info.before, info.after) == (structprune.__version__, (), None, None)
    before = structprune.cost(model, x)
    for _ in range(2):
        model = structprune.prune(model, x, ratio=0.5)
    result = structprune.export_onnx(model, path, x)
    info = structprune.onnx_info(path)
    assert info.digests == tuple(plan.digest for plan in plans_of(model))
    assert len(info.digests) == 2
    assert (info.before, info.after) == (before, structprune.cost(model, x))
    assert (info.path, info.bytes, info.opset) == (path, result.bytes, result.opset)


def test_the_file_holds_no_paths_of_this_machine(slim: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "slim.onnx"
    structprune.export_onnx(slim, path, tokens(2, 6))
    assert not re.search(rb"\.py|site-packages|/home/|/root/|/tmp/|stack_trace|class_hierarchy", path.read_bytes())


def test_the_file_shrinks_as_the_parameters_do(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    slim = structprune.prune(model, x, ratio=0.5)
    sizes = [structprune.export_onnx(net, tmp_path / "m.onnx", x).bytes for net in (slim, model)]
    params = [sum(p.numel() for p in net.parameters()) for net in (slim, model)]
    assert sizes[0] / sizes[1] == pytest.approx(params[0] / params[1], rel=0.05)


def test_external_weights_are_counted_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structprune.export.onnx._EXTERNAL_DATA_ABOVE", 0)
    path = tmp_path / "m.onnx"
    result = structprune.export_onnx(nn.Linear(64, 64), path, torch.randn(2, 64))
    assert structprune.onnx_info(path).bytes == result.bytes > 4 * 64 * 64
    (tmp_path / "m.onnx.data").unlink()
    assert structprune.onnx_info(path).bytes == path.stat().st_size


def test_files_of_others_and_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    structprune.export_onnx(nn.Linear(4, 3), path, torch.randn(2, 4))
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert structprune.onnx_info(path).version is None
    for value in ("{", json.dumps({"params": -1}), json.dumps([1]), "[" * 100_000):
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {"structprune.before": value})
        onnx.save(model, path)
        with pytest.raises(LoadError, match="that structprune wrote was changed"):
            structprune.onnx_info(path)
    path.write_bytes(b"no onnx file")
    with pytest.raises(LoadError, match=r"cannot be read as an ONNX file|no ONNX file"):
        structprune.onnx_info(path)
    with pytest.raises(LoadError, match="cannot be read as an ONNX file"):
        structprune.onnx_info(tmp_path / "nowhere.onnx")
