"""A model and its example inputs from what was typed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

from structprune.errors import MissingExtraError
from structprune.extras import require
from structprune.reporting import Stage
from structprune.tracing.trace import ExampleInputs, map_tensors

_DTYPES = {
    name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")
}
_TEXT_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with example inputs, and how to make the model again."""

    model: nn.Module
    inputs: ExampleInputs
    build: Callable[[], nn.Module]


Made = tuple[nn.Module, ExampleInputs | None]


def load_model(
    spec: str, inputs: list[str], *, weights: Path | None, pretrained: bool, device: str, seed: int
) -> Loaded:
    """The model that `spec` names, in eval mode.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``hf:PATH`` or ``module:function``.
        inputs: shapes of the example inputs; those that the model's own config says, if empty.
        weights: a file with the state dict.
        pretrained: whether to load the weights that the library offers.
        device: where model and inputs go.
        seed: of random weights and inputs.
    """

    def make() -> Made:
        torch.manual_seed(seed)
        try:
            model, own = _maker(spec)(pretrained)
        except (typer.BadParameter, MissingExtraError):
            raise
        except Exception as error:  # a library that fetches may raise anything
            if not pretrained or ":" not in spec or spec.partition(":")[0] not in _LIBRARIES:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise typer.BadParameter(
                f"--pretrained: the weights of {spec} were not loaded ({lines[0]}). Without a network, give --weights."
            ) from error
        return model.eval(), own

    model, own = make()
    if weights is not None:
        model.load_state_dict(_state(weights))
    torch.manual_seed(seed)
    given = parse_inputs(inputs) if inputs else own
    if given is None:
        raise typer.BadParameter(
            f"{spec} does not say what it takes. Give the shape of its inputs, such as --input 1x3x224x224."
        )
    return Loaded(model.to(device), map_tensors(lambda tensor: tensor.to(device), given), lambda: make()[0].to(device))


def _maker(spec: str) -> Callable[[bool], Made]:
    source, colon, name = spec.partition(":")
    if not colon or not name:
        raise typer.BadParameter(
            f"{spec!r} names no model. Write torchvision:NAME, timm:NAME, hf:PATH, or module:function."
        )
    if source in _LIBRARIES:
        return lambda pretrained: _LIBRARIES[source](name, pretrained)
    return lambda _pretrained: _own(spec)


def _library(name: str) -> Any:
    return require(name, "This model", "models")


def _torchvision(name: str, pretrained: bool) -> Made:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise typer.BadParameter(f"torchvision has no model {name!r}.")
    return models.get_model(name, weights="DEFAULT" if pretrained else None), torch.randn(1, 3, 224, 224)


def _timm(name: str, pretrained: bool) -> Made:
    timm = _library("timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise typer.BadParameter(f"timm has no model {name!r}.{hint}")
    model = timm.create_model(name, pretrained=pretrained)
    return model, torch.randn(1, *model.pretrained_cfg["input_size"])


def _transformers(name: str, pretrained: bool) -> Made:
    """From a folder with its weights if it holds any, else from the config with random ones."""
    transformers = _library("transformers")
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise typer.BadParameter(f"{folder} has no config.json.")
    local = not pretrained
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
    except OSError as error:
        raise typer.BadParameter(
            f"{name!r} is neither a folder with a config.json nor in the cache of transformers. Add --pretrained to "
            "fetch it."
        ) from error
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    stored = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if stored or pretrained:
        model = kind.from_pretrained(name, local_files_only=local)
    else:
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    return model, _transformers_inputs(model, config)


def _transformers_inputs(model: Any, config: Any) -> ExampleInputs | None:
    text = getattr(config, "get_text_config", lambda: config)()
    if model.main_input_name == "input_ids":
        tokens = torch.randint(getattr(text, "vocab_size", 2), (1, _TEXT_LENGTH))
        inputs = {"input_ids": tokens}
        return inputs | ({"decoder_input_ids": tokens.clone()} if config.is_encoder_decoder else {})
    size = getattr(config, "image_size", None)
    if model.main_input_name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), height, width)}
    return None


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "hf": _transformers}

# -- the user's own code ----------------------------------------------------------------------------------------------


def named_object(spec: str) -> Any:
    """What ``module:name`` or ``file.py:name`` names; modules are looked for in the working directory too."""
    place, colon, name = spec.partition(":")
    if not colon or not name:
        raise typer.BadParameter(f"{spec!r} is not of the form module:function.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    value: Any = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    for part in name.split("."):
        if not hasattr(value, part):
            raise typer.BadParameter(f"{place} has no {name!r}.")
        value = getattr(value, part)
    return value


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # what the module itself imports is missing
        raise typer.BadParameter(f"There is no module {name!r} on the path or in {Path.cwd()}.") from error


def _module_of_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise typer.BadParameter(f"There is no file {file}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    spec.loader.exec_module(module)
    return module


def _own(spec: str) -> Made:
    value = named_object(spec)
    made = value if isinstance(value, nn.Module) else value()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(
            f"{spec} gives a {type(model).__name__}. It must give a torch.nn.Module, or a pair of one and its inputs."
        )
    return model, inputs


def _state(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise typer.BadParameter(f"{file} holds a {type(state).__name__}, not a state dict.")
    return state


# -- inputs -----------------------------------------------------------------------------------------------------------


def parse_inputs(texts: list[str]) -> ExampleInputs:
    """Example inputs from shapes: positional, or by name where all are given as ``name=shape``.

    Example:
        >>> [list(x.shape) for x in parse_inputs(["1x3x8x8", "int64:1x16"])]
        [[1, 3, 8, 8], [1, 16]]
        >>> parse_inputs(["ids=int64:2x4:100"])["ids"].shape
        torch.Size([2, 4])
    """
    named = [text.partition("=") for text in texts]
    if all(equals for _, equals, _ in named):
        return {name: _tensor(shape) for name, _, shape in named}
    if any(equals for _, equals, _ in named):
        raise typer.BadParameter("Give all inputs by name, or none.")
    inputs = tuple(_tensor(text) for text in texts)
    return inputs[0] if len(inputs) == 1 else inputs


def _tensor(text: str) -> Tensor:
    """A random tensor: ``[TYPE:]SHAPE[:BOUND]``; integers run from 0 to below the bound, by default 2."""
    parts = text.split(":")
    dtype = _DTYPES[parts.pop(0)] if parts[0] in _DTYPES else torch.float32
    try:
        shape = [int(size) for size in parts[0].split("x")] if parts[0] else []
        bound = int(parts[1]) if len(parts) > 1 else 2
    except ValueError:
        shape, bound = [-1], 1
    if min(shape, default=1) < 1 or bound < 1 or len(parts) > 2:
        raise typer.BadParameter(
            f"{text!r} is no shape. Write 1x3x224x224, or int64:1x16 with one of the types {', '.join(_DTYPES)}, or "
            "int64:1x16:30000 for integers below 30000."
        )
    if dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(bound, shape, dtype=dtype)


def parse_points(file: Path) -> list[Any]:
    """Cost and accuracy of several models, from JSON: a list of ``[cost, accuracy]`` or ``[cost, accuracy, label]``."""
    try:
        points = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{file} is no JSON: {error}.") from error

    def good(point: Any) -> bool:
        numbers = isinstance(point, list) and all(isinstance(v, (int, float)) for v in point[:2])
        return numbers and (len(point) == 2 or (len(point) == 3 and isinstance(point[2], str)))

    if not isinstance(points, list) or not all(map(good, points)):
        raise typer.BadParameter(f"{file} is no list of [cost, accuracy] or [cost, accuracy, label].")
    return [tuple(point) for point in points]


def parse_stages(file: Path) -> list[Stage]:
    """Stages of a chain, from JSON: a list of objects with the fields of `structprune.Stage`."""
    try:
        return [Stage(**each) for each in json.loads(file.read_text("utf-8"))]
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise typer.BadParameter(
            f"{file} is no list of objects with name, accuracy, bytes, macs and seconds: {error}."
        ) from error


def parse_dimensions(texts: Iterable[str]) -> dict[str, dict[int, str]]:
    """Free dimensions of inputs, each written ``INPUT:DIM=NAME``."""
    dimensions: dict[str, dict[int, str]] = {}
    for text in texts:
        match = re.fullmatch(r"(.+):(\d+)=(\w+)", text)
        if match is None:
            raise typer.BadParameter(
                f"{text!r} is no free dimension; write INPUT:DIM=NAME, as in input_ids:1=sequence."
            )
        name, dim, label = match.groups()
        dimensions.setdefault(name, {})[int(dim)] = label
    return dimensions
