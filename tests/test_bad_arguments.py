"""What `benchmark`, `sensitivity`, `export_onnx`, `Reconstruction`, `save` and `load` cannot use is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.snapshot import assert_untouched, snapshot
from torch import nn

import structprune
from structprune.errors import ExportError, LoadError, PlanError

X = torch.zeros(2, 4)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def benchmark(model: nn.Module, **options: Any) -> Any:
    models, inputs = options.pop("models", {"a": model}), options.pop("inputs", X)
    return structprune.benchmark(models, inputs, runs=options.pop("runs", 2), warmup=0, memory=False, **options)


def sensitivity(model: nn.Module, **options: Any) -> Any:
    return structprune.sensitivity(model, X, None, options.pop("metric", lambda model, loader: 1.0), **options)


def reconstruction(model: nn.Module, data: Any, **options: Any) -> Any:
    importance = structprune.Reconstruction(**options)
    return structprune.plan(model, X, ratio=0.5, importance=importance, data=data)


def export(model: nn.Module, **options: Any) -> Any:
    """Refused before anything is written."""
    return structprune.export_onnx(model, options.pop("path", "/"), options.pop("inputs", X), **options)


BENCHMARK: dict[str, tuple[dict[str, Any], str]] = {
    "a list of models": ({"models": [nn.Linear(4, 2)]}, "models is a list; pass a dict"),
    "a model": ({"models": nn.Linear(4, 2)}, "models is a Linear; pass a dict"),
    "numbered models": ({"models": {1: nn.Linear(4, 2)}}, "models holds a int to Linear"),
    "a shape": ({"inputs": (2, 4)}, r"example_inputs is \(2, 4\); give a tensor"),
    "no sample": ({"inputs": X[:0]}, r"no sample: a tensor has the shape \[0, 4\]"),
    "half a run": ({"runs": 2.5}, "runs must be a whole number of at least 2; got 2.5"),
    "half a sample": ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1"),
    "a size for sizes": ({"batch_sizes": 4}, "batch_sizes a sequence of them"),
    "words for sizes": ({"batch_sizes": ["a"]}, "batch_sizes a sequence of them"),
    "a number of backends": ({"backends": 3}, "backends must be a sequence of different names"),
    "a device of no name": ({"device": "nope"}, "device is 'nope', which is not there"),
}
REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    **{
        f"benchmark: {name}": (lambda model, given=given: benchmark(model, **given), ValueError, message)
        for name, (given, message) in BENCHMARK.items()
    },
    "no metric": (lambda m: sensitivity(m, metric=None), PlanError, "metric is None"),
    "a metric of words": (lambda m: sensitivity(m, metric=lambda *_: "x"), PlanError, "metric returned a str"),
    "a metric of NaN": (lambda m: sensitivity(m, metric=lambda *_: float("nan")), PlanError, "metric returned NaN"),
    "a ratio for ratios": (lambda m: sensitivity(m, ratios=0.5), PlanError, "ratios is 0.5"),
    "words for ratios": (lambda m: sensitivity(m, ratios=["a"]), PlanError, r"ratios is \['a'\]"),
    "per nothing": (lambda m: reconstruction(m, [X], per="nope"), PlanError, "per is 'nope'"),
    "no rows": (lambda m: reconstruction(m, [X], rows=0), PlanError, "rows is 0"),
    "NaN": (lambda m: reconstruction(m, [X * float("nan")]), PlanError, "NaN or infinite on data"),
    "no sample": (lambda m: reconstruction(m, [X, X[:0]]), PlanError, "Batch 2 of data holds no sample"),
    "the exported model": (lambda _: export(None), ExportError, "model is a NoneType"),
    "no path": (lambda m: export(m, path=None), ExportError, "path is None"),
    "a folder": (lambda m: export(m), ExportError, "cannot write /: .*a folder"),
    "words for an opset": (lambda m: export(m, opset="x"), ExportError, "opset is 'x'"),
    "a negative tolerance": (lambda m: export(m, tolerance=-1), ExportError, "tolerance is -1"),
    "a tolerance of NaN": (lambda m: export(m, tolerance=float("nan")), ExportError, "tolerance is nan"),
    "one check": (lambda m: export(m, check_inputs=X), ExportError, "check_inputs is a Tensor; give a list"),
    "the saved model": (lambda _: structprune.save(None, "x"), PlanError, "model is None"),
    "a model for build_model": (lambda m: structprune.load(m, "x"), LoadError, "build_model is a Sequential"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, error, message = REFUSED[what]
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_untouched(model, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dims", [["input"], {"input": "batch"}])
def test_dynamic_dims_are_a_dict_of_dicts(dims: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="give a dict of inputs and their dimensions"):
        structprune.export_onnx(build(), tmp_path / "m.onnx", X, dynamic_dims=dims)


def test_a_save_needs_a_folder_and_a_load_a_model(tmp_path: Path) -> None:
    folder = structprune.save(build(), tmp_path / "saved")
    with pytest.raises(PlanError, match=r"plan\.json is a file; give the path of a folder"):
        structprune.save(build(), folder / "plan.json")
    with pytest.raises(LoadError, match="build_model returned a NoneType"):
        structprune.load(lambda: None, folder)
    with pytest.raises(OSError, match="is a folder; give the path of a file"):
        sensitivity(build(), checkpoint=folder)
