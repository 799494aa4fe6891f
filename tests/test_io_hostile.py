"""Files that were truncated, edited, or made to do harm: refused by name, and nothing in them is run."""

from __future__ import annotations

import collections
import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import frozen
from torch import nn

import structprune
from structprune import io
from structprune.errors import LoadError, PlanError
from structprune.planning.plan import SCHEMA

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def slim() -> nn.Module:
    return structprune.prune(build(), X, ratio=0.5)


def first_plan(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Changes fields of the first plan."""
    return lambda record: record["plans"][0].update(changes)


def sliced(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["plans"][0]["slices"][0].update(changes)


def added(kind: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["plans"][0][kind].append(fields)


def example_inputs(data: Any) -> Callable[[dict[str, Any]], None]:
    """Other example inputs, and a literal to rewrite, so that the model is traced on them."""

    def change(record: dict[str, Any]) -> None:
        first_plan(inputs=data)(record)
        added("literal_edits", module="", operation=0, place=[1], old=2, new=1)(record)

    return change


def damaged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "plan.json").read_text())
    change(record)
    (folder / "plan.json").write_text(json.dumps(record))


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a later schema": (lambda r: r.update(schema=99), "schema 99; this version reads up to 1"),
    "a plan of a later schema": (lambda r: r["plans"][0].update(schema=99), "it has schema 99"),
    "a schema that is a bool": (lambda r: r.update(schema=True), "no schema version"),
    "a schema before the first": (lambda r: r.update(schema=0), "no schema version"),
    "no schema": (lambda r: r.pop("schema"), "no schema version"),
    "no plans": (lambda r: r.pop("plans"), "is not whole"),
    "plans that are no list": (lambda r: r.update(plans="x"), "is not whole"),
    "another digest": (lambda r: r["weights"].update(sha256="0" * 64), "missing, truncated or was changed"),
    "an alias of nothing": (lambda r: r["weights"]["aliases"].update({"a": "b"}), "not among the tensors"),
    "a channel that is not there": (lambda r: r["plans"][0]["slices"][0].update(removed=[99]), "does not fit"),
    "channels that are no numbers": (lambda r: r["plans"][0]["slices"][0].update(removed=["x"]), "does not fit"),
    "another tensor": (lambda r: r["plans"][0]["slices"][0].update(tensor="9.weight"), "does not fit"),
    "one removed slice less": (lambda r: r["plans"][0]["slices"].pop(), r"does not fit|has the shape"),
    "an attribute that calls": (
        lambda r: r["plans"][0]["attribute_edits"].append({"module": "0", "chain": ["forward"], "old": 1, "new": 2}),
        "does not fit",
    ),
    "an attribute that is a path": (
        lambda r: r["plans"][0]["attribute_edits"].append(
            {"module": "0", "chain": ["__class__", "x"], "old": 1, "new": 2}
        ),
        "does not fit",
    ),
    "defaults of a function": (
        added("attribute_edits", module="0", chain=["forward", "__func__", "__defaults__", 0], old=1, new=2),
        "AttributeEdit.chain is",
    ),
    "a size that is no size": (sliced(size=10**18), "from 1000000000000000000 entries"),
    "a channel beyond all numbers": (sliced(removed=[10**30]), "RemovedSlice.removed is"),
    "a channel twice": (sliced(removed=[1, 1]), "RemovedSlice.removed is"),
    "an order of other channels": (sliced(order=[0, 1, 99, 3]), "does not fit what goes"),
    "a dimension from the end": (sliced(dim=-1), "RemovedSlice.dim is -1"),
    "all channels": (sliced(removed=list(range(8))), "has the shape"),
    "a field too many": (sliced(tesnor="0.weight"), "RemovedSlice.tesnor is"),
    "a field too few": (lambda r: r["plans"][0]["slices"][0].pop("size"), "does not fit .*'size'"),
    "a removed slice twice": (lambda r: r["plans"][0]["slices"].append(r["plans"][0]["slices"][0]), "twice"),
    "a cost that is no number": (lambda r: r["plans"][0]["before"].update(params=float("nan")), "Cost.params is nan"),
    "a width that is no number": (lambda r: r["plans"][0]["layers"][0].update(after="x"), "LayerWidth.after is 'x'"),
    "settings that are none": (first_plan(settings=[1]), "the settings are"),
    "parameters for a cache": (first_plan(caches=[["0", "_parameters"]]), "is no cache"),
    "all attributes for a cache": (first_plan(caches=[["0", "__dict__"]]), "has no cache"),
    "a cache of no module": (first_plan(caches=[["9", "x"]]), "has no cache"),
    "a cache without a name": (first_plan(caches=[["0"]]), "2 names are"),
    "a factor for a dimension that is not there": (
        added("rescales", tensor="0.weight", dim=9, positions=[0], factor=2.0),
        "rescales dimension 9",
    ),
    "a factor beyond all numbers": (
        added("rescales", tensor="0.weight", dim=0, positions=None, factor=float("inf")),
        "Rescale.factor is inf",
    ),
    "a literal that is not there": (
        added("literal_edits", module="", operation=0, place=[1], old=2, new=1),
        "no longer holds the literals",
    ),
    "inputs of no type": (example_inputs({"tensor": [2, 4], "dtype": "load"}), "type 'load'"),
    "inputs that fill the memory": (
        example_inputs({"tensor": [10**9, 10**10], "dtype": "float32"}),
        "a tensor of shape",
    ),
    "inputs of another shape": (example_inputs({"tensor": [2, 5], "dtype": "float32"}), "does not run on inputs like"),
    "inputs that are none": (example_inputs({"value": 3}), "does not run on inputs like"),
    "inputs of nothing known": (example_inputs({"call": "print"}), "a description of inputs is"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_an_edited_plan_is_refused(slim: nn.Module, tmp_path: Path, what: str) -> None:
    change, message = DAMAGE[what]
    structprune.save(slim, tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(LoadError, match=message):
        structprune.load(build, tmp_path)


SAVED = Path(__file__).parent / "data" / f"schema_{SCHEMA}"


def frozen_save(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A save with attributes to repair and literals to rewrite, edited."""
    for name in ("plan.json", "model.safetensors"):
        shutil.copy(SAVED / name, folder / name)
    damaged(folder, change)
    return folder


@pytest.mark.parametrize("kind", ["attribute_edits", "literal_edits"])
@pytest.mark.parametrize("new", [0, -1, 10**18, 97])
def test_a_number_that_counts_no_channels_is_refused(tmp_path: Path, kind: str, new: int) -> None:
    folder = frozen_save(tmp_path, lambda record: record["plans"][-1][kind][0].update(new=new))
    with pytest.raises(LoadError, match=r"no number of channels|do not fit each other"):
        structprune.load(frozen.build, folder)


@pytest.mark.parametrize(
    ("module", "chain"),
    [
        ("attention", ["training"]),
        ("attention", ["_parameters", "weight"]),
        ("attention.qkv", ["weight", "_version"]),
        ("attention.qkv", ["weight", "shape", 0]),
        ("attention", ["forward", "calls"]),
        ("attention", ["note"]),
        ("attention", ["size"]),
        ("attention", ["named", 0]),
        ("attention.qkv.weight", ["x"]),
    ],
)
def test_a_repair_of_anything_but_a_number_of_a_module_is_refused(
    tmp_path: Path, module: str, chain: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is 1 or 8 there: computed, counted by Python or torch, or in a container of another kind."""
    kind = frozen.Attention
    monkeypatch.setattr(kind.forward, "calls", 8, raising=False)
    monkeypatch.setattr(kind, "note", "8", raising=False)
    monkeypatch.setattr(kind, "size", property(lambda self: 8), raising=False)
    monkeypatch.setattr(kind, "named", collections.namedtuple("Named", "x")(8), raising=False)
    edit = added("attribute_edits", module=module, chain=chain, old=8, new=1)
    with pytest.raises(LoadError, match=r"is not there|cannot be set|where the plan expects"):
        structprune.load(frozen.build, frozen_save(tmp_path, edit))
    assert kind.forward.calls == 8


MANY = 600_000
TOO_MANY: dict[str, Callable[[dict[str, Any]], Any]] = {
    "inputs": first_plan(inputs={"tuple": [{"value": 1}] * MANY}),
    "layers": first_plan(layers=[{"layer": "0", "before": 8, "after": 4}] * MANY),
    "aliases": lambda record: record["weights"]["aliases"].update({f"{i}": "0.weight" for i in range(MANY)}),
}


@pytest.mark.parametrize("what", TOO_MANY)
def test_too_many_of_anything_is_refused_at_once(slim: nn.Module, tmp_path: Path, what: str) -> None:
    structprune.save(slim, tmp_path)
    damaged(tmp_path, TOO_MANY[what])
    with pytest.raises(LoadError, match="more than 524,288 objects"):
        structprune.load(build, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("plan.json", "a device or a pipe"), ("model.safetensors", "No file in")]
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(slim: nn.Module, tmp_path: Path, name: str, message: str) -> None:
    structprune.save(slim, tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(LoadError, match=message):
        structprune.load(build, tmp_path)


@pytest.mark.parametrize("file", ["plan.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(slim: nn.Module, tmp_path: Path, file: str, share: float) -> None:
    structprune.save(slim, tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(LoadError):
        structprune.load(build, tmp_path)


def test_a_pickle_in_place_of_the_tensors_is_not_run(slim: nn.Module, tmp_path: Path) -> None:
    structprune.save(slim, tmp_path)
    torch.save({"0.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    digest = io._digest(tmp_path / "model.safetensors")
    damaged(tmp_path, lambda r: r["weights"].update(sha256=digest))
    with pytest.raises(LoadError, match="no safetensors file"):
        structprune.load(build, tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": ' + "1" * 5000 + "}", "\0", "", "NaN"])
def test_what_is_no_json_is_refused(slim: nn.Module, tmp_path: Path, text: str) -> None:
    structprune.save(slim, tmp_path)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(LoadError, match=r"damaged|no schema version"):
        structprune.load(build, tmp_path)
    with pytest.raises(PlanError, match=r"not the JSON of a plan|no schema version"):
        structprune.Plan.from_json(text)


@pytest.mark.parametrize("field", ["settings", "inputs"])
def test_what_is_nested_too_deep_is_refused(slim: nn.Module, tmp_path: Path, field: str) -> None:
    nested: dict[str, Any] = {"value": 1}
    for _ in range(200):
        nested = {"dict": {"x": nested}}
    structprune.save(slim, tmp_path)
    damaged(tmp_path, first_plan(**{field: nested}))
    with pytest.raises(LoadError, match=r"nested too deep|a description of inputs is"):
        structprune.load(build, tmp_path)


def with_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors, with the digest that they have."""
    save_file(tensors, folder / "model.safetensors")
    damaged(folder, lambda r: r["weights"].update(sha256=io._digest(folder / "model.safetensors")))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("0.weight", torch.int64),
        ("0.weight", torch.bool),
        ("0.weight", torch.complex64),
        ("0.weight", torch.float8_e4m3fn),
        ("0.weight", torch.float8_e5m2),
        ("1.num_batches_tracked", torch.float32),
        ("1.running_mean", torch.int32),
    ],
)
def test_numbers_of_another_kind_are_refused(slim: nn.Module, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensors = load_file(structprune.save(slim, tmp_path) / "model.safetensors")
    with_tensors(tmp_path, tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(LoadError, match=f"{name!r} is of {dtype}"):
        structprune.load(build, tmp_path)


@pytest.mark.parametrize("header", [b"\xff" * 8, (10**9).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}"])
def test_a_header_that_lies_is_refused(slim: nn.Module, tmp_path: Path, header: bytes) -> None:
    path = structprune.save(slim, tmp_path) / "model.safetensors"
    path.write_bytes(header + path.read_bytes())
    damaged(tmp_path, lambda r: r["weights"].update(sha256=io._digest(path)))
    with pytest.raises(LoadError, match="is no safetensors file"):
        structprune.load(build, tmp_path)


def test_a_folder_in_place_of_a_file(slim: nn.Module, tmp_path: Path) -> None:
    for name, message in (("model.safetensors", "No file in"), ("plan.json", "cannot be read")):
        structprune.save(slim, tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(LoadError, match=message):
            structprune.load(build, tmp_path)
        (tmp_path / name).rmdir()


HOSTILE = (None, True, -1, 0, 1, 2.5, 10**30, float("nan"), "", "../../x", "__class__", [], [[]], {}, {"tensor": [1]})


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside `data`."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_changed_the_answer_is_a_model_of_the_saved_tensors_or_a_refusal(tmp_path: Path, seed: int) -> None:
    """A tenth of a thousand edits each time; none may end in another error, or touch what it is not about."""
    rng = random.Random(seed)
    (tmp_path / "model.safetensors").write_bytes((SAVED / "model.safetensors").read_bytes())
    good = json.loads((SAVED / "plan.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    attributes = dir(frozen.Frozen)
    refused = 0
    for place in rng.sample(list(places(good)), 100):
        record = copy.deepcopy(good)
        *way, last = place
        inner = record
        for step in way:
            inner = inner[step]
        inner[last] = rng.choice(HOSTILE)
        (tmp_path / "plan.json").write_text(json.dumps(record))
        try:
            model = structprune.load(frozen.build, tmp_path)
        except LoadError:
            refused += 1
        else:
            assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert refused > 50
    assert dir(frozen.Frozen) == attributes


def test_another_model_is_refused(slim: nn.Module, tmp_path: Path) -> None:
    structprune.save(slim, tmp_path)
    with pytest.raises(LoadError, match="does not fit the model"):
        structprune.load(lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2)), tmp_path)
    structprune.save(build(), tmp_path)
    with pytest.raises(LoadError, match=r"unknown \['1.bias'"):
        structprune.load(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 3)), tmp_path)
    with pytest.raises(LoadError, match="does not exist"):
        structprune.load(build, tmp_path / "nowhere")
