"""Saves of every version are read by this one, and those of later versions are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import frozen

import structprune
from structprune import io
from structprune.errors import LoadError, PlanError
from structprune.planning import plan
from structprune.planning.plan import plans_of

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("schema", range(1, plan.SCHEMA + 1))
def test_a_save_of_every_schema_is_read(schema: int) -> None:
    folder = DATA / f"schema_{schema}"
    record = json.loads((folder / "plan.json").read_text())
    assert {found["schema"] for found in record["plans"]} == {schema}
    expected = json.loads((folder / "expected.json").read_text())
    model = structprune.load(frozen.build, folder)
    first = plans_of(model)[0]
    for kind in ("slices", "attribute_edits", "rescales", "literal_edits", "layers", "axes"):
        assert getattr(first, kind), "the save holds some of everything"
    assert any(sliced.order for sliced in first.slices)
    assert [found.digest for found in plans_of(model)] == expected["digests"]
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected["shapes"]
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        torch.testing.assert_close(model(*frozen.INPUTS), torch.tensor(expected["output"]), rtol=1e-5, atol=1e-6)


def test_what_is_written_now_is_of_the_last_schema(tmp_path: Path) -> None:
    """A change of the format needs a new schema, with a save of it and a step from the old one."""
    frozen.write(tmp_path)
    names = ("plan.json", "expected.json")
    ours, theirs = (
        [json.loads((folder / name).read_text()) for name in names]
        for folder in (tmp_path, DATA / f"schema_{plan.SCHEMA}")
    )
    # A later version may have more options; what is recorded of those of then is the same.
    asked = [[found["settings"].pop("asked") for found in each[0]["plans"]] for each in (ours, theirs)]
    assert all(before.items() <= now.items() for now, before in zip(*asked, strict=True))
    assert shape_of(ours[0]) == shape_of(theirs[0])
    assert ours[1]["shapes"] == theirs[1]["shapes"]


def shape_of(data: Any) -> Any:
    """The keys of all objects, and the types of all else."""
    if isinstance(data, dict):
        return {key: shape_of(value) for key, value in data.items()}
    if isinstance(data, list):
        return [shape_of(item) for item in data if isinstance(item, (dict, list))]
    return type(data).__name__ if data is not None else "int"


@pytest.mark.parametrize("module", [io, plan])
def test_every_older_schema_has_a_step_to_the_next(module: Any) -> None:
    assert set(module.MIGRATIONS) == set(range(1, module.SCHEMA))


@pytest.mark.parametrize(
    ("module", "old_form"),
    [
        (plan, lambda record: [found.update(cuts=found.pop("thinnings")) for found in record["plans"]]),
        (io, lambda record: record.update(rounds=record.pop("plans"))),
    ],
)
def test_an_older_form_is_lifted_step_by_step(
    module: Any, old_form: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if what is written now were of schema 3 or 4, and schema 1 had had another name for a field."""

    def renamed(data: dict[str, Any]) -> dict[str, Any]:
        new = {"cuts": "thinnings", "rounds": "plans"}
        return {new.get(key, key): value for key, value in data.items()}

    source = DATA / "schema_1"
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    record = json.loads((source / "plan.json").read_text())
    old_form(record)
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(LoadError):
        structprune.load(frozen.build, tmp_path)
    first, *others = [module.MIGRATIONS.get(schema, dict) for schema in range(1, module.SCHEMA + 1)]
    steps = [lambda data: first(renamed(data)), *others, dict]
    monkeypatch.setattr(module, "SCHEMA", len(steps) + 1)
    monkeypatch.setattr(module, "MIGRATIONS", dict(enumerate(steps, start=1)))
    model = structprune.load(frozen.build, tmp_path)
    expected = json.loads((source / "expected.json").read_text())
    assert [found.digest for found in plans_of(model)] == expected["digests"]


def test_a_plan_of_a_later_schema_is_refused() -> None:
    with pytest.raises(
        PlanError, match=rf"it has schema {plan.SCHEMA + 1}; this version reads up to {plan.SCHEMA}. Upgrade"
    ):
        structprune.Plan.from_json(json.dumps({"schema": plan.SCHEMA + 1}))
