"""The options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

from structprune.allocation.ratios import Ratio
from structprune.allocation.scopes import SCOPES
from structprune.allocation.targets import TARGETS
from structprune.api import Options, plan
from structprune.axes import AXES
from structprune.cli.models import Loaded, load_model, named_object
from structprune.importance.base import CRITERIA
from structprune.io import load
from structprune.plan import Plan
from structprune.sensitivity import Sensitivity
from structprune.surgery.verify import verify

_SOURCES = ("torchvision:", "timm:", "hf:")


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What completes a word to one of `names`."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")]
File = Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file.", dir_okay=False)]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, on which inputs."""

    model: Annotated[
        str,
        typer.Argument(
            help="torchvision:NAME, timm:NAME, hf:PATH, module:function or file.py:function.",
            autocompletion=among(_SOURCES),
            show_default=False,
        ),
    ]
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="[NAME=][TYPE:]SHAPE[:BOUND] of an input, as 1x3x224x224 or int64:1x16."),
    ] = None
    weights: Annotated[
        Path | None, typer.Option(help="State dict to load: safetensors, or torch.save's.", exists=True, dir_okay=False)
    ] = None
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Load the weights that the library offers.")] = False
    device: Annotated[str, typer.Option(help="Where model and inputs go: cpu, cuda, cuda:1, meta.")] = "cpu"
    seed: Annotated[int, typer.Option(help="Of random weights and inputs.")] = 0

    def load(self) -> Loaded:
        """The model and its inputs."""
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise typer.BadParameter(f"There is no device {self.device!r}.") from error
        return load_model(
            self.model,
            self.inputs or [],
            weights=self.weights,
            pretrained=self.pretrained,
            device=self.device,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How much goes, and of what; the options of `structprune.plan`."""

    ratio: Annotated[
        list[str] | None,
        typer.Option("--ratio", "-r", help="Share to remove: NUMBER, or LAYER=NUMBER (name or pattern), repeated."),
    ] = None
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help=f"What is to remain: NAME=NUMBER of {', '.join(TARGETS)}, repeated."),
    ] = None
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(SCOPES)}; a JSON file of `structprune sensitivity`; or LAYER,LAYER,... repeated.",
            autocompletion=among(SCOPES),
        ),
    ] = None
    axes: Annotated[
        list[str] | None, typer.Option(help=f"What may go: {', '.join(AXES)}.", autocompletion=among(AXES))
    ] = None
    round_to: Annotated[str, typer.Option(help="Widths become multiples of this number, or auto.")] = "auto"
    min_channels: Annotated[int, typer.Option(help="No group keeps fewer.", min=1)] = 1
    max_ratio: Annotated[float, typer.Option(help="No group loses a greater share.")] = 1.0
    importance: Annotated[
        str,
        typer.Option(help="A criterion by name, or module:object for one of your own.", autocompletion=among(CRITERIA)),
    ] = "l2"
    data: Annotated[
        str | None, typer.Option(help="module:function that makes the batches, for criteria that look at data.")
    ] = None
    loss: Annotated[
        str | None,
        typer.Option(help="module:function of (model, batch): a mean loss, for criteria that need gradients."),
    ] = None
    ignore: Annotated[list[str] | None, typer.Option(help="Layer to leave whole, repeated.")] = None
    outputs: Annotated[
        list[str] | None, typer.Option(help="Output that keeps its shape, repeated; by default all do.")
    ] = None
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="A file of `structprune plan --out`, in place of these.", exists=True, dir_okay=False
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether it was said how much goes."""
        return bool(self.ratio or self.target or self.plan_file)

    def plan(self, loaded: Loaded) -> Plan:
        """The plan that was asked for."""
        if self.plan_file is not None:
            if self.ratio or self.target:
                raise typer.BadParameter("A plan says how much goes: give --plan alone, or --ratio or --target.")
            found = Plan.from_json(self.plan_file.read_text(encoding="utf-8"))
            if not isinstance(found, Plan):  # a removal of branches is read by the same door
                raise typer.BadParameter(f"{self.plan_file} removes branches: it is no plan of channels.")
            return found
        return plan(loaded.model, loaded.inputs, **self._options())

    def _options(self) -> Options:
        options: Options = {
            "importance": named_object(self.importance) if ":" in self.importance else self.importance,
            "ignore": self.ignore or (),
            "axes": _commas(self.axes),
            "round_to": "auto" if self.round_to == "auto" else _whole(self.round_to),
            "min_channels": self.min_channels,
            "max_ratio": self.max_ratio,
            "outputs": self.outputs or None,
        }
        if self.ratio:
            options["ratio"] = _ratio(self.ratio)
        if self.target:
            options["target"] = dict(_pair(text) for text in self.target)
        if self.scope:
            options["scope"] = _scope(self.scope)
        if self.data:
            options["data"] = named_object(self.data)()
        if self.loss:
            options["loss"] = named_object(self.loss)
        return options


@dataclass(frozen=True, kw_only=True)
class SlimOptions(PlanOptions):
    """Where the smaller model comes from: a saved folder, or a plan."""

    saved: Annotated[
        Path | None,
        typer.Option(help="A folder of `structprune prune`, in place of a plan.", exists=True, file_okay=False),
    ] = None

    def slim(self, loaded: Loaded) -> Any:
        """The smaller model, verified if it is made here."""
        if self.saved is not None:
            if self.given:
                raise typer.BadParameter("Give --saved, or say how much goes, not both.")
            return load(loaded.build, self.saved).to(next(loaded.model.parameters()).device)
        if not self.given:
            raise typer.BadParameter("Say which smaller model is meant: --saved, --plan, --ratio or --target.")
        decided = self.plan(loaded)
        slim = decided.apply(loaded.model)
        verify(loaded.model, slim, decided, loaded.inputs).raise_for_error()
        return slim


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no number.") from error


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise typer.BadParameter(f"--round-to is {text!r}; give a whole number, or auto.")
    return int(text)


def _pair(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not of the form NAME=NUMBER.")
    return name, _number(number)


def _ratio(texts: list[str]) -> Ratio:
    """One number; or numbers by name, where a number alone is for all that is not named."""
    if len(texts) == 1 and "=" not in texts[0]:
        return _number(texts[0])
    return dict(_pair(text if "=" in text else f"*={text}") for text in texts)


def _commas(texts: list[str] | None) -> list[str] | None:
    return [name for text in texts for name in text.split(",")] if texts else None


def _scope(texts: list[str]) -> Any:
    (first, *others) = texts
    if not others and first in SCOPES:
        return first
    if not others and first.endswith(".json"):
        if not Path(first).is_file():
            raise typer.BadParameter(f"There is no file {first}.")
        return Sensitivity.from_json(Path(first).read_text(encoding="utf-8"))
    if not others and "," not in first and "*" not in first:
        raise typer.BadParameter(f"--scope is {first!r}; give {', '.join(SCOPES)}, a JSON file, or LAYER,LAYER,...")
    return [text.split(",") for text in texts]


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose parameters may be dataclasses of options: their fields become its options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        given = inspect.signature(function, eval_str=True).parameters.values()
        bundles: dict[str, Any] = {p.name: p.annotation for p in given if dataclasses.is_dataclass(p.annotation)}
        parameters: list[inspect.Parameter] = []
        for parameter in given:
            parameters += _fields(bundles[parameter.name]) if parameter.name in bundles else [parameter]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            made = {
                key: kind(**{f.name: values.pop(f.name) for f in dataclasses.fields(kind)})
                for key, kind in bundles.items()
            }
            function(**values, **made)

        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__dict__["__signature__"] = inspect.Signature(keyword)
        run.__annotations__ = {p.name: p.annotation for p in keyword}
        app.command(name, no_args_is_help=name != "info")(run)
        return run

    return register


def _fields(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(kind)
    ]
