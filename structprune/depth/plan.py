"""`DepthPlan`: one plan of branches that go and of channels that go of what is left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.table import Column, Table
from torch import nn

from structprune.depth.removal import Removal, cut_model, shell_of, take_back
from structprune.errors import PlanError
from structprune.offloading import held_in_place
from structprune.planning.plan import KINDS, SCHEMA, Plan
from structprune.schema import FormError
from structprune.surgery.verify import Report, verify
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import prunable, rewrapped, unwrapped

KIND = "depth"


@dataclass(frozen=True, slots=True)
class Tried:
    """A number of branches that was tried when a plan was made.

    Attributes:
        branches: how many went.
        lost: what the network lost, with as many channels gone as the target took; None where it could not be met.
        recovered: what it still lost once its layers were solved again; None where that was not tried.
    """

    branches: int
    lost: float | None
    recovered: float | None = None


@dataclass(frozen=True, kw_only=True)
class DepthPlan(Plan):
    """A `Plan` that removes branches first, and then channels of what is left.

    Its slices, edits, layers and axes are those of the model without the branches, by the names that tensors have
    there; `before` is the cost of the whole model. A model that it was applied to has been through two records: the
    removal and the plan of channels (`widths`), so that `structprune.save`, `load` and all else know of both.

    Attributes:
        slices: what is removed from which tensor of what is left.
        attribute_edits: attributes of it to set.
        rescales: factors that keep the function where a size changes it.
        literal_edits: literals in its forwards to change.
        caches: dicts of its modules in which the forward keeps results.
        inputs: shapes and types of the example inputs, nested as they were given.
        outputs: names of the outputs that keep their shape; None if all do.
        layers: output channels of each layer that loses some.
        axes: channels by what they are to the network, of what is left.
        before: cost of the model as it is.
        after: cost of the model that `apply` makes.
        settings: what the plan was asked for, what is reached of the whole model, measured and left.
        removal: the branches, and what becomes of the names of tensors.
        tried: how many branches were tried, and what was lost with each.

    Example:
        >>> import torch, structprune
        >>> class Residual(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(x).relu())
        >>> model = torch.nn.Sequential(*(Residual() for _ in range(4)), torch.nn.Linear(4, 2))
        >>> x = torch.randn(16, 4)
        >>> plan = structprune.plan(model, x, ratio=0.5, axes=("blocks", "mlp", "channels"))
        >>> len(plan.removal.branches), len(plan.apply(model))
        (2, 3)
    """

    removal: Removal
    tried: tuple[Tried, ...] = ()

    @classmethod
    def of(cls, removal: Removal, widths: Plan, tried: tuple[Tried, ...] = ()) -> DepthPlan:
        """Both as one plan; `widths` was made for the model without the branches."""
        parts: dict[str, Any] = {each.name: getattr(widths, each.name) for each in fields(Plan)}
        parts["before"] = removal.before
        return cls(**parts, removal=removal, tried=tried)

    @property
    def widths(self) -> Plan:
        """The channels that go of the model without the branches."""
        parts: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(Plan)}
        parts["before"] = self.removal.after
        return Plan(**parts)

    @property
    def names(self) -> Mapping[str, str | None]:
        """The new name of each tensor that has another one now; None if it went."""
        return self.removal.names

    def apply(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """The smaller model.

        Args:
            model: the model that the plan was made for, or another of the same shapes.
            inplace: change `model` itself and return it; otherwise it stays untouched.

        Raises:
            PlanError: the model has no such branches; it is as it was.
            SurgeryError: the plan does not fit the model; it is as it was.
        """
        if not inplace:
            inner = prunable(model)
            # The structure alone is copied here, and the tensors that are left by the plan of channels.
            return rewrapped(model, self.widths.apply(self.removal.apply(shell_of(inner), inplace=True)))
        undo: list[Any] = []
        with held_in_place(unwrapped(model)):
            self.removal.carry_out(model, undo)
            try:
                return self.widths.apply(model, inplace=True)
            except BaseException:  # an interrupt too must leave the model as it was; raised again
                take_back(undo)
                raise

    def verified(self, original: nn.Module, slim: nn.Module, example_inputs: ExampleInputs) -> Report:
        """What `structprune.verify` finds.

        The model without the branches is compared with the original that takes them as zero, and the smaller model
        with that whose channels are switched off. The larger errors count.
        """
        inner = prunable(original)
        cut = cut_model(inner, example_inputs, self.removal.branches)
        first = self.removal.verified(inner, cut, example_inputs)
        then = verify(cut, slim, self.widths, example_inputs)
        return first if first.max_relative_error > then.max_relative_error else then

    # -- reading -------------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """The branches that go, then layers and axes of what is left with their channels, and the cost."""
        table = super().table()
        whole = Table(*(Column(str(column.header), overflow=column.overflow) for column in table.columns))
        for name in self.removal.branches:
            whole.add_row(name, "removed", "")
        whole.add_section()
        cells = [list(column.cells) for column in table.columns]
        for row, line in zip(table.rows, zip(*cells, strict=True), strict=True):
            whole.add_row(*line, end_section=row.end_section)
        return whole

    def __str__(self) -> str:
        """The table as text."""
        lines = [super().__str__()]
        if self.tried:
            lost = (f"{n.branches}: {'target not met' if n.lost is None else f'{n.lost:.4g}'}" for n in self.tried)
            lines.append(f"lost by the number of branches removed: {', '.join(lost)}")
        if recovered := [f"{n.branches}: {n.recovered:.4g}" for n in self.tried if n.recovered is not None]:
            lines.append(f"lost when recovered: {', '.join(recovered)}")
        return "\n".join(lines)

    # -- JSON ----------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """SHA-256 of what the plan changes, in hexadecimal: equal for plans that make the same model."""
        return hashlib.sha256(json.dumps([KIND, self.removal.digest, self.widths.digest]).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON text, with its schema version."""
        return json.dumps({"schema": SCHEMA, "kind": KIND, **asdict(self)}, indent=1)

    @classmethod
    def from_data(cls, data: Any) -> DepthPlan:
        """The same from what the JSON text says.

        Raises:
            PlanError: it is no such plan.
        """
        if not isinstance(data, dict) or not isinstance(data.get("removal"), dict):
            raise PlanError("This plan cannot be used: it names no branches. Pass what to_json returned.")
        widths = Plan.from_data({key: value for key, value in data.items() if key not in ("kind", "removal", "tried")})
        removal = Removal.from_data({"schema": data.get("schema"), **data["removal"]})
        try:
            tried = tuple(_tried(each) for each in _list(data["tried"]))
        except (FormError, KeyError) as error:
            raise PlanError(f"This plan cannot be used: {error}. Pass what to_json returned.") from error
        return cls.of(removal, widths, tried)


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise FormError(f"what was tried is {data!r:.60}")
    return data


def _tried(data: Any) -> Tried:
    if not isinstance(data, dict) or not {"branches", "lost"} <= data.keys() <= {"branches", "lost", "recovered"}:
        raise FormError(f"what was tried is {data!r:.60}")
    losses = [data[key] for key in ("lost", "recovered") if data.get(key) is not None]
    if type(data["branches"]) is not int or not all(type(loss) in (int, float) for loss in losses):
        raise FormError(f"what was tried is {data!r:.60}")
    return Tried(**data)


KINDS[KIND] = DepthPlan.from_data
