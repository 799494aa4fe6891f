"""The options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from structprune.api import plan
from structprune.benchmarking.timing import known_device
from structprune.cli.models import Loaded, load_model, named_object
from structprune.files import target_of
from structprune.io import load
from structprune.latency.measure import Latency
from structprune.planning.option import Form
from structprune.planning.options import OPTIONS, PlanOptions
from structprune.planning.plan import Plan
from structprune.planning.ratios import Ratio
from structprune.planning.scopes import SCOPES
from structprune.planning.sensitivities import Sensitivity
from structprune.surgery.verify import verify

_SOURCES = ("torchvision:", "timm:", "hf:")


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What completes a word to one of `names`."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def new_folder(path: Path) -> None:
    """Check that a folder for results can be made, before the work for them; none is left behind.

    Raises:
        typer.BadParameter: it cannot be made.
    """
    there = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not there:
            path.rmdir()
    except OSError as error:
        raise typer.BadParameter(f"--out: the folder {path} cannot be made: {error.strerror}.") from error


def new_file(path: Path | None) -> None:
    """Check that a file can be written, before the work for it.

    Raises:
        typer.BadParameter: its folder does not exist, or it is no regular file.
    """
    try:
        if path is not None:
            target_of(path)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}.") from error


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")]
File = Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file.", dir_okay=False)]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
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
            known_device(self.device)
        except ValueError as error:
            raise typer.BadParameter(f"There is no device {self.device!r}: {error}") from error
        return load_model(
            self.model,
            self.inputs or [],
            weights=self.weights,
            pretrained=self.pretrained,
            device=self.device,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """How much goes, and of what: the options of `structprune.plan`, each as text, or a plan that was made before."""

    # For each option of a plan, what was written; see `_plan_flags`.
    options: Mapping[str, Any]
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="A file of `structprune plan --out`, in place of these.", exists=True, dir_okay=False
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether it was said how much goes."""
        return bool(self._amount or self.plan_file)

    @property
    def _amount(self) -> bool:
        return bool(self.options["ratio"] or self.options["target"])

    def plan(self, loaded: Loaded, data: Any = None) -> Plan:
        """The plan that was asked for; `data` is for criteria that look at some, if no other is named."""
        if self.plan_file is not None:
            if self._amount:
                raise typer.BadParameter("A plan says how much goes: give --plan alone, or --ratio or --target.")
            made = Plan.from_json(self.plan_file.read_text(encoding="utf-8"))
            if not isinstance(made, Plan):  # a removal of branches is read by the same function
                raise typer.BadParameter(f"{self.plan_file} removes branches: it is no plan of channels.")
            return made
        given = {name: text for name, text in self.options.items() if text not in (None, [])}
        options: Any = {name: FORMS[OPTIONS[name].form].read(_flag(name), text) for name, text in given.items()}
        return plan(loaded.model, loaded.inputs, **({} if data is None else {"data": data}) | options)


@dataclass(frozen=True, kw_only=True)
class SlimFlags(PlanFlags):
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


# -- from text to values ----------------------------------------------------------------------------------------------


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{flag}: {text!r} is no number.") from error


def _whole(flag: str, text: str) -> int:
    if not text.isdecimal():
        raise typer.BadParameter(f"{flag} is {text!r}; give a whole number.")
    return int(text)


def _step(flag: str, text: str) -> int | Literal["auto"]:
    if text != "auto" and not text.isdecimal():
        raise typer.BadParameter(f"{flag} is {text!r}; give a whole number, or auto.")
    return "auto" if text == "auto" else int(text)


def _pair(flag: str, text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    if not equals:
        raise typer.BadParameter(f"{flag}: {text!r} is not of the form NAME=NUMBER.")
    return name, _number(flag, number)


def _shares(flag: str, texts: list[str]) -> Ratio:
    """One number; or numbers by name, where a number alone is for all that is not named."""
    if len(texts) == 1 and "=" not in texts[0]:
        return _number(flag, texts[0])
    return dict(_pair(flag, text if "=" in text else f"*={text}") for text in texts)


def _scope(flag: str, texts: list[str]) -> Any:
    (first, *others) = texts
    if not others and first in SCOPES:
        return first
    if not others and first.endswith(".json"):
        if not Path(first).is_file():
            raise typer.BadParameter(f"There is no file {first}.")
        return Sensitivity.from_json(Path(first).read_text(encoding="utf-8"))
    if not others and "," not in first and "*" not in first:
        raise typer.BadParameter(f"{flag} is {first!r}; give {', '.join(SCOPES)}, a JSON file, or LAYER,LAYER,...")
    return [text.split(",") for text in texts]


def _latency(flag: str, text: str) -> Latency:
    """A backend alone, or NAME=VALUE with commas: ``onnxruntime``, or ``backend=onnxruntime,threads=1,runs=15``."""
    if "=" not in text:
        return Latency(backend=text)
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in ("backend", "threads", "runs"):
            raise typer.BadParameter(f"{flag}: {part!r} is none of backend=NAME, threads=N and runs=N.")
        fields[name] = value if name == "backend" else _whole(flag, value)
    return Latency(**fields)


@dataclass(frozen=True)
class TextForm:
    """How an option of one `structprune.planning.option.Form` is written.

    Attributes:
        kind: the type that typer reads.
        read: gives the value, from the name of the flag and what typer has read.
    """

    kind: Any
    read: Callable[[str, Any], Any]


FORMS: dict[Form, TextForm] = {
    "shares": TextForm(list[str] | None, _shares),
    "amounts": TextForm(list[str] | None, lambda flag, texts: dict(_pair(flag, text) for text in texts)),
    "scope": TextForm(list[str] | None, _scope),
    "words": TextForm(list[str] | None, lambda _, texts: [name for text in texts for name in text.split(",")]),
    "names": TextForm(list[str] | None, lambda _, texts: texts),
    "word": TextForm(str | None, lambda _, text: text),
    "step": TextForm(str, _step),
    "count": TextForm(int, lambda _, number: number),
    "devices": TextForm(int | None, lambda _, number: number),
    "share": TextForm(float, lambda _, number: number),
    "criterion": TextForm(str, lambda _, text: named_object(text) if ":" in text else text),
    "maker": TextForm(str | None, lambda _, text: named_object(text)()),
    "function": TextForm(str | None, lambda _, text: named_object(text)),
    "latency": TextForm(str | None, _latency),
    "flag": TextForm(bool | None, lambda _, given: given),
}
SHORT = {"ratio": "-r", "target": "-t"}


# -- commands ---------------------------------------------------------------------------------------------------------


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose parameters may be dataclasses of options: their fields become its options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        given = inspect.signature(function, eval_str=True).parameters.values()
        bundles: dict[str, Any] = {p.name: p.annotation for p in given if dataclasses.is_dataclass(p.annotation)}
        parameters: list[inspect.Parameter] = []
        for parameter in given:
            parameters += _flags(bundles[parameter.name]) if parameter.name in bundles else [parameter]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            made = {name: _made(kind, values) for name, kind in bundles.items()}
            function(**values, **made)

        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__dict__["__signature__"] = inspect.Signature(keyword)
        run.__annotations__ = {p.name: p.annotation for p in keyword}
        app.command(name, no_args_is_help=name != "info")(run)
        return run

    return register


def _made(kind: Any, values: dict[str, Any]) -> Any:
    """A bundle of options from those of `values` that are its own, which are taken out."""
    own: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name == "options":
            own[field.name] = {name: values.pop(name) for name in OPTIONS}
        else:
            own[field.name] = values.pop(field.name)
    return kind(**own)


def _flags(kind: Any) -> list[inspect.Parameter]:
    """The parameters that typer reads for a bundle: one for each field, and for each of the options of a plan."""
    hints = get_type_hints(kind, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for field in dataclasses.fields(kind):
        if field.name == "options":
            parameters += _plan_flags()
        else:
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(_parameter(field.name, hints[field.name], default))
    return parameters


def _plan_flags() -> list[inspect.Parameter]:
    parameters: list[inspect.Parameter] = []
    for field in dataclasses.fields(PlanOptions):
        option = OPTIONS[field.name]
        negative = f"/--no-{field.name.replace('_', '-')}" if option.form == "flag" else ""
        flags = [f"{_flag(field.name)}{negative}", *([SHORT[field.name]] if field.name in SHORT else [])]
        completion = among(option.words) if option.words else None
        shown = typer.Option(*flags, help=option.help, autocompletion=completion)
        default = field.default if isinstance(field.default, (str, int, float)) else None
        parameters.append(_parameter(field.name, Annotated[FORMS[option.form].kind, shown], default))
    return parameters


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
