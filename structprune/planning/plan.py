"""`Plan`: what will be removed, repaired and rewritten; decided, printable, and not yet done."""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from html import escape
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Column, Table
from torch import nn

from structprune.checking import FLAG, MODEL, TEXT, require
from structprune.coupling.costs import Cost
from structprune.errors import PlanError, SurgeryError
from structprune.ops.gains import Gain
from structprune.schema import FormError, Migration, inputs, record, settings, texts, up_to_date
from structprune.surgery.apply import apply
from structprune.surgery.edits import (
    AttributeEdit,
    Edits,
    LiteralEdit,
    RemovedSlice,
    Rescale,
    SectionedSlice,
    ShiftedRescale,
)
from structprune.surgery.history import recalled, remember
from structprune.wrapping import unwrapped

T = TypeVar("T")

SCHEMA = 4
# So many of those norms are printed; the plan holds all of them.
SHOWN = 20
# Under this name a pruned model remembers its plans; no parameter and no buffer, so it is not in the state dict.
RECORD = "_structprune_plans"
# What else may have been done to a model between two plans, by its kind: how it is made from the data of a file.
KINDS: dict[str, Callable[[Any], Any]] = {}


@dataclass(frozen=True, slots=True)
class LayerWidth:
    """Output channels of a layer before and after."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class AxisWidth:
    """Channels of one axis (see `structprune.coupling.roles.AXES`), over all its groups, before and after."""

    axis: str
    groups: int
    before: int
    after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(Mapping[str, Any]):
    """What a plan was asked for and what came of it, as plain data.

    As a mapping it gives all of it by name: ``settings["ratio"]``, ``settings["reached"]``, ``settings["latency"]``
    (what was measured), ``settings["config"]``, ``settings["over_survivors"]``; what is empty is left out.

    Attributes:
        asked: the options (see `structprune.planning.options.PlanOptions`).
        reached: for each limit of a target, the share that remains.
        measured: for a target of latency: how time was measured, what was predicted and measured, in milliseconds, and
            whether the target is met.
        left: what was left as it is, with the reason: ``"nothing"``, if no channel goes; ``"config"``, the model's
            configuration; ``"training"``, layers that only a forward in training mode would reach.
        over_survivors: the norms, by module and operation, that run over the channels that stay.
    """

    asked: Mapping[str, Any] = field(default_factory=dict)
    reached: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    over_survivors: tuple[str, ...] = ()

    def _by_name(self) -> dict[str, Any]:
        others = {"reached": self.reached, "latency": self.measured, "over_survivors": list(self.over_survivors)}
        return {**self.asked, **{name: value for name, value in others.items() if value}, **self.left}

    def __getitem__(self, name: str) -> Any:
        return self._by_name()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name())

    def __len__(self) -> int:
        return len(self._by_name())


def _split_settings(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 held the settings side by side."""
    rest = dict(settings(data["settings"]))
    split: dict[str, Any] = {
        "reached": rest.pop("reached", {}),
        "measured": rest.pop("latency", {}),
        "left": {name: rest.pop(name) for name in ("config", "training") if name in rest},
        "over_survivors": rest.pop("over_survivors", []),
        "asked": rest,
    }
    return data | {"settings": split}


# For every older schema, what lifts a plan to the next one.
# What the fields of a plan were called up to schema 2. Digests go by these names, so that they stay what they were.
_RENAMED = {"thinnings": "slices", "repairs": "attribute_edits", "rewrites": "literal_edits"}


def _rename_edits(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 had other names for the edits."""
    return {_RENAMED.get(name, name): value for name, value in data.items()}


# Schema 4 added scales that are numbers of their own, which older plans do not have.
MIGRATIONS: dict[int, Migration] = {1: _split_settings, 2: _rename_edits, 3: dict}


@dataclass(frozen=True, kw_only=True)
class Plan(Edits):
    """A decision that can be printed, costed, saved, compared and applied.

    Attributes:
        slices: what is removed from which tensor.
        attribute_edits: attributes to set.
        rescales: factors that keep the function where a size changes it.
        literal_edits: literals in forwards to change.
        layers: output channels of each layer that loses some.
        axes: channels by what they are to the network.
        before: cost of the model as it is.
        after: cost of the model that `apply` makes.
        caches: dicts of modules in which the forward keeps results: they are emptied.
        inputs: shapes and types of the example inputs, nested as they were given.
        outputs: names of the outputs that keep their shape; None if all do.
        settings: what the plan was asked for, what is reached, measured and left. ``settings.over_survivors`` are the
            norms, by module and operation, that run over the channels that stay: a layer norm over 8 of 16 channels is
            not the one over 8 channels and 8 zeros. All else computes exactly what the original does with the removed
            channels switched off.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = structprune.plan(model, torch.randn(1, 4), ratio=0.5)
        >>> plan = structprune.Plan.from_json(plan.to_json())
        >>> plan.before.params, plan.after.params, plan.apply(model)[0]
        (58, 30, Linear(in_features=4, out_features=4, bias=True))
    """

    layers: tuple[LayerWidth, ...]
    axes: tuple[AxisWidth, ...]
    before: Cost
    after: Cost
    settings: Settings = field(default_factory=Settings)

    @property
    def removed(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Original indices that go, by tensor name and dimension.

        Where each group of a grouped convolution loses other inputs, no index of its weight goes as a whole: that
        dimension is left out.
        """
        removed: dict[str, dict[int, tuple[int, ...]]] = {}
        for sliced in self.slices:
            if isinstance(sliced, SectionedSlice):
                continue
            removed.setdefault(sliced.tensor, {})[sliced.dim] = sliced.removed
        return removed

    def left(self, tensor: str, dim: int, indices: Iterable[int]) -> tuple[int, ...]:
        """What indices of a dimension are called afterwards; those that go are left out.

        Raises:
            PlanError: each group of a grouped convolution loses other ones.
        """
        slices = [sliced for sliced in self.slices if (sliced.tensor, sliced.dim) == (tensor, dim)]
        if any(isinstance(sliced, SectionedSlice) for sliced in slices):
            raise PlanError(f"Of dimension {dim} of {tensor!r}, each group of the convolution loses other indices.")
        gone = slices[0].removed if slices else ()
        return tuple(index - bisect_left(gone, index) for index in indices if index not in set(gone))

    def apply(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """The smaller model.

        Args:
            model: the model that the plan was made for, or another of the same shapes.
            inplace: change `model` itself and return it; otherwise it stays untouched.

        Raises:
            SurgeryError: the plan does not fit the model; the model is as it was.
        """
        require(locals(), SurgeryError, model=MODEL, inplace=FLAG)
        result = apply(model, self, inplace=inplace)
        if self.slices or self.attribute_edits or self.rescales or self.literal_edits:
            remember_plan(unwrapped(result), (*plans_of(result), self))
        return result

    # -- reading -------------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """Layers and axes with their channels before and after, and the cost."""
        table = Table(Column("layer", overflow="fold"), "channels", "kept", title=None)
        for layer in self.layers:
            table.add_row(layer.layer, str(layer.before), str(layer.after))
        table.add_section()
        for axis in self.axes:
            groups = f"{axis.groups} group{'s' if axis.groups > 1 else ''}"
            table.add_row(f"{axis.axis} ({groups})", str(axis.before), str(axis.after))
        table.add_section()
        for name, before in asdict(self.before).items():
            after = getattr(self.after, name)
            share = f" ({after / before:.1%})" if before else ""
            table.add_row(name.replace("_", " "), f"{before:,}", f"{after:,}{share}")
        return table

    def __repr__(self) -> str:
        """What goes, in short; the table is in ``print(plan)``, all of it in the fields and in `to_json`."""
        macs = f"{self.after.macs / self.before.macs:.1%} of the MACs" if self.before.macs else "no MACs"
        params = f"{self.after.params / max(1, self.before.params):.1%} of the parameters"
        return f"Plan({self.digest[:12]}: {len(self.layers)} weights thinned, {macs} and {params} remain)"

    def __str__(self) -> str:
        """The table as text."""
        text = io.StringIO()
        console = Console(file=text, width=100)
        console.print(self.table())
        if "nothing" in self.settings.left:
            text_of = f"nothing is removed: {self.settings.left['nothing']}"
            console.print(text_of, highlight=False, markup=False, soft_wrap=True)
        shown = {
            key: value
            for key, value in self.settings.items()
            if key not in ("over_survivors", "nothing") and value is not None
        }
        asked = (f"{key} {value}" for key, value in shown.items())
        console.print("asked for: " + ", ".join(asked), highlight=False, markup=False, soft_wrap=True)
        if norms := self.settings.over_survivors:
            more = f" and {len(norms) - SHOWN} more" if len(norms) > SHOWN else ""
            text_of = ", ".join(norms[:SHOWN]) + more
            console.print(f"over the channels that stay: {text_of}", highlight=False, markup=False, soft_wrap=True)
        for edit in self.attribute_edits:
            place = ".".join([edit.module or "model", *map(str, edit.chain)])
            console.print(f"{place}: {edit.old} -> {edit.new}", highlight=False)
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """A small table for notebooks: the network as a whole, then the layers."""
        left = asdict(self.after)
        rows = [(name.replace("_", " "), before, left[name]) for name, before in asdict(self.before).items()]
        rows += [(f"{axis.axis} ({axis.groups})", axis.before, axis.after) for axis in self.axes]
        layers = [(layer.layer, layer.before, layer.after) for layer in self.layers]
        return _html(("", "before", "after"), rows) + (
            f"<details><summary>{len(layers)} layers</summary>{_html(('layer', 'channels', 'kept'), layers)}</details>"
        )

    # -- JSON ----------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """SHA-256 of what the plan changes, in hexadecimal: equal for plans that make the same model."""
        first = {new: old for old, new in _RENAMED.items()}
        parts = {first.get(key, key): value for key, value in asdict(self).items()}
        changes = {key: value for key, value in parts.items() if key not in ("settings", "before", "after")}
        return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON text, with its schema version."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is no plan, or one of a later schema.
        """
        require(locals(), text=TEXT)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(
                f"This text is not the JSON of a plan: {error}. Pass what Plan.to_json returned."
            ) from error
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Plan:
        """The same from what the JSON text says.

        Raises:
            PlanError: the data is no plan, or one of a later schema.
        """
        try:
            data = up_to_date(data, SCHEMA, MIGRATIONS, "it")
            if isinstance(kind := data.get("kind"), str) and kind in KINDS:
                return KINDS[kind](data)
            return Plan(
                slices=tuple(record(SectionedSlice if "sections" in t else RemovedSlice, t) for t in data["slices"]),
                attribute_edits=_records(AttributeEdit, data["attribute_edits"]),
                rescales=tuple(record(_kind_of_rescale(r), r) for r in data["rescales"]),
                literal_edits=_records(LiteralEdit, data["literal_edits"]),
                caches=tuple((module, name) for module, name in (texts(cache, 2) for cache in data["caches"])),
                inputs=inputs(data["inputs"]),
                outputs=None if data["outputs"] is None else texts(data["outputs"]),
                layers=_records(LayerWidth, data["layers"]),
                axes=_records(AxisWidth, data["axes"]),
                before=record(Cost, data["before"]),
                after=record(Cost, data["after"]),
                settings=_read_settings(data["settings"]),
            )
        except (FormError, KeyError, TypeError) as error:
            what = str(error) if isinstance(error, FormError) else f"{type(error).__name__}: {error}"
            raise PlanError(f"This text of a plan cannot be used: {what}. Pass what Plan.to_json returned.") from error


def _kind_of_rescale(data: Any) -> type[Rescale | Gain]:
    return Gain if "weight" in data else ShiftedRescale if "offset" in data else Rescale


def _records(kind: type[T], data: Any) -> tuple[T, ...]:
    """The records of a list of JSON objects."""
    return tuple(record(kind, each) for each in data)


def _read_settings(data: Any) -> Settings:
    """The settings from their JSON object.

    Raises:
        FormError: a field is missing, unknown or of another kind than it should be.
    """
    given = settings(data)
    names = [each.name for each in fields(Settings)]
    if sorted(given) != sorted(names):
        raise FormError(f"the settings have the fields {sorted(given)!r:.200}, not {sorted(names)}")
    parts = {name: settings(given[name]) for name in names if name != "over_survivors"}
    return Settings(**parts, over_survivors=texts(given["over_survivors"]))


def remember_plan(model: nn.Module, plans: tuple[Any, ...], undo: list[Callable[[], None]] | None = None) -> None:
    """Let a model know what has been done to it, the first plan first; how to take that back is added to `undo`."""
    remember(model, RECORD, plans, [] if undo is None else undo)


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that were applied to a model or to what it is a copy of, the first one first."""
    return recalled(unwrapped(model), RECORD, ())


def replay(model: nn.Module, plans: Iterable[Plan]) -> None:
    """Carry out, in place, those of `plans` that `model` has not been through yet.

    Args:
        model: the model as it was built, or after the first of the plans.
        plans: what `plans_of` gives for the model that it is to become.

    Raises:
        PlanError: the model has been through other plans, or through more.
    """
    wanted, done = tuple(plans), plans_of(model)
    if [plan.digest for plan in done] != [plan.digest for plan in wanted[: len(done)]]:
        raise PlanError(
            f"The model has been pruned {len(done)} times, which are not the first of the {len(wanted)} times that are "
            "recorded, and what is gone cannot come back. Give the model as it was built."
        )
    for plan in wanted[len(done) :]:
        plan.apply(model, inplace=True)


def _html(headings: tuple[str, ...], rows: Iterable[tuple[str, int, int]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{before:,}</td><td>{after:,}{_share(before, after)}</td></tr>"
        for name, before, after in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _share(before: int, after: int) -> str:
    return f" ({after / before:.1%})" if before > after else ""
