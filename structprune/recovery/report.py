"""What `recover` did to each layer; the report of a model is kept as long as the model exists."""

from __future__ import annotations

import io
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from rich.console import Console
from rich.table import Table
from torch import nn

from structprune.checking import MODEL, require
from structprune.errors import RecoveryError
from structprune.html import html_table


@dataclass(frozen=True, slots=True)
class LayerRecovery:
    """How far the result of a layer is from the original's, before and after.

    Errors are relative: the root of the mean squared difference over the root mean square of the original's values, on
    calibration data that the layer was not solved on.

    Attributes:
        layer: path of the layer.
        operation: what it does, by the torch API's name.
        target: the operation whose result has to meet the original's: the layer itself, its norm, or a residual sum.
        before: error with the old weights, when all layers before it have been solved.
        after: error with the new weights.
        changed: whether it was changed; a layer that would have got worse is left.
        ridge: the ridge that was chosen.
        producers: paths of the layers in front that were solved together with it. Where an activation follows the
            target, the share of the error that they removed is measured behind it.
        alone: why none could be; empty if they were solved together, or if that did not help.
    """

    layer: str
    operation: str
    target: str
    before: float
    after: float
    changed: bool
    ridge: float
    producers: tuple[str, ...] = ()
    alone: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that `recover` might return.

    Attributes:
        name: what was done to it.
        error: of its output: the root of the mean squared difference over the root mean square of the original's.
    """

    name: str
    error: float


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What `recover` did. See `structprune.recovery_report` for an example.

    Attributes:
        layers: in the order in which they were solved.
        skipped: layers whose input has changed but that could not be solved, with the reason.
        candidates: the models that were compared; of one made again step by step, those of the last step.
        kept: name of the one that was returned: that with the least error.
        held_out: samples that no layer was solved on, and that the candidates were compared on. With 0 there were too
            few, and they were compared on all.
    """

    layers: tuple[LayerRecovery, ...]
    skipped: dict[str, str]
    candidates: tuple[Candidate, ...] = ()
    kept: str = ""
    held_out: int = 0

    def __repr__(self) -> str:
        """How many layers were solved; the table is in ``print(report)``."""
        changed = sum(row.changed for row in self.layers)
        return f"RecoveryReport({changed} of {len(self.layers)} layers changed, {len(self.skipped)} skipped)"

    def _repr_html_(self) -> str:
        """The same table for notebooks."""
        lines = [[r.layer, r.operation, r.target, f"{r.before:.4f}", f"{r.after:.4f}"] for r in self.layers]
        return html_table(["layer", "operation", "meets", "before", "after"], lines)

    def __str__(self) -> str:
        """The table as text."""
        table = Table("layer", "operation", "meets", "before", "after", "")
        for row in self.layers:
            remark = "with " + ", ".join(row.producers) if row.producers else "" if row.changed else "left"
            table.add_row(row.layer, row.operation, row.target, f"{row.before:.4f}", f"{row.after:.4f}", remark)
        text = io.StringIO()
        console = Console(file=text, width=120)
        console.print(table)
        for candidate in self.candidates:
            mark = ", kept" if candidate.name == self.kept else ""
            console.print(f"output, {candidate.name}: error {candidate.error:.4f}{mark}", highlight=False)
        for layer, reason in self.skipped.items():
            console.print(f"{layer} is as it was: {reason}", highlight=False)
        return text.getvalue().rstrip()


_REPORTS: WeakKeyDictionary[nn.Module, RecoveryReport] = WeakKeyDictionary()


def keep_report(model: nn.Module, report: RecoveryReport) -> None:
    """Remember the report of a recovered model as long as the model exists."""
    _REPORTS[model] = report


def recovery_report(model: nn.Module) -> RecoveryReport:
    """What `recover` did to make this model.

    Args:
        model: what `recover` returned.

    Raises:
        RecoveryError: `recover` did not make it.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> slim = structprune.prune(model, torch.randn(1, 4), ratio=0.5)
        >>> slim = structprune.recover(slim, model, [torch.randn(32, 4)])
        >>> [layer.layer for layer in structprune.recovery_report(slim).layers]
        ['2']
    """
    require(locals(), RecoveryError, model=MODEL)
    if model not in _REPORTS:
        raise RecoveryError(
            f"The model, a {type(model).__name__}, does not come from structprune.recover in this process, so there is "
            "no report on it. Ask for the report of the very module that recover returned; a copy has none."
        )
    return _REPORTS[model]
