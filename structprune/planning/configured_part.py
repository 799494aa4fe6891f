"""The part of a model that a configuration describes, where adapters stand around its layers.

An adapter puts a module of its own where a layer was, and holds that layer; the whole may be wrapped once more. The
class that the configuration builds knows nothing of that. Its modules are found in the model by what they hold, so that
no library of adapters has to be known. With a linear layer and an adapter around it::

    the class    mlp.up            Linear, holds "weight"
    the model    base.mlp.up       holds no tensor of its own, so that it is no such layer; what it holds is looked at:
                 base.mlp.up.layer holds "weight", and is the layer; its sisters are not described
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from structprune.errors import PlanError
from structprune.planning.built_from_config import (
    Chain,
    UnknownError,
    assign,
    is_built_from_config,
    read_back,
    rebuilt,
    state_shapes,
)
from structprune.surgery.edits import Edits
from structprune.tracing.state import join
from structprune.tracing.trace import preserved_random_state

Shapes = dict[str, tuple[int, ...]]
OTHER = "the class built from it has other tensors than this model"


@dataclass(frozen=True)
class ConfiguredPart:
    """Where the modules of a class are in a model.

    Attributes:
        path: of the object of the class.
        outer: path in the model, by the path in the class.
        inner: path in the class, by the path in the model.
    """

    path: str
    outer: Mapping[str, str]
    inner: Mapping[str, str]

    @property
    def whole(self) -> bool:
        """Whether it is all of the model, under the same names."""
        return all(path == name for path, name in self.outer.items())

    def tensor(self, name: str) -> str | None:
        """What the class calls a tensor of the model; None if it has none such."""
        path, _, key = name.rpartition(".")
        return join(self.inner[path], key) if path in self.inner else None

    def name(self, tensor: str) -> str:
        """What the model calls a tensor of the class; the same where the class as it is has none such."""
        path, _, key = tensor.rpartition(".")
        return join(self.outer[path], key) if path in self.outer else tensor

    def place(self, path: str, chain: tuple[str | int, ...]) -> tuple[str, tuple[str | int, ...]] | None:
        """Where the class has an attribute of the model; the configuration may be held by what is around the part."""
        around = not path or self.path.startswith(f"{path}.")
        if path not in self.inner and around and chain[0] == "config":
            return "", chain
        return (self.inner[path], chain) if path in self.inner else None

    def shapes(self, model: nn.Module) -> Shapes:
        """Shapes of the tensors of the model that a state dict holds, by the names that the class has for them."""
        held = model.state_dict(keep_vars=True)
        named = ((self.tensor(name), tensor) for name, tensor in held.items())
        return {name: tuple(map(int, tensor.shape)) for name, tensor in named if name is not None}

    def edits(self, edits: Edits) -> Edits:
        """What changes of the class, under its names; values of tensors are left alone, unless all is described."""
        if self.whole:
            return replace(edits, caches=())
        slices = [replace(sliced, tensor=self.tensor(sliced.tensor) or "") for sliced in edits.slices]
        places = [(self.place(edit.module, edit.chain), edit) for edit in edits.attribute_edits]
        return replace(
            edits,
            slices=tuple(sliced for sliced in slices if sliced.tensor),
            attribute_edits=tuple(replace(edit, module=place[0]) for place, edit in places if place is not None),
            rescales=(),
            caches=(),
        )


def described_module(model: nn.Module) -> tuple[str, Any]:
    """The outermost module of a class that takes the configuration of `model` alone, and its path."""
    config: Any = model.config
    for path, module in model.named_modules():
        if is_built_from_config(module) and module.config is config and _takes_one(type(module)):
            return path, module
    return "", model


def _takes_one(kind: type[nn.Module]) -> bool:
    try:
        inspect.signature(kind).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def not_rebuilt(model: nn.Module) -> str | None:
    """Why the class of `model`, built from its configuration, is not this model; None if it is."""
    try:
        with preserved_random_state():
            built = rebuilt(type(described_module(model)[1]), copy.deepcopy(model.config))
            same = state_shapes(built) == part_like(model, built).shapes(model)
    except UnknownError as reason:
        return str(reason)
    return None if same else OTHER


def shapes_of(model: nn.Module, numbers: Mapping[Chain, int]) -> tuple[Shapes, Shapes]:
    """Shapes of all tensors that the configuration of `model` describes, as they are and with other numbers.

    Args:
        model: a model with a configuration.
        numbers: by their chains.

    Returns:
        Those of the model, and those of its class built from the other numbers; by the names that the model has.

    Raises:
        PlanError: it cannot be built from them.
    """
    config: Any = copy.deepcopy(model.config)
    for chain, value in numbers.items():
        assign(config, chain[1:], value)
    kind = type(described_module(model)[1])
    try:
        with preserved_random_state():
            read_back(config)
            wanted = state_shapes(rebuilt(kind, config))
            part = part_like(model, rebuilt(kind, copy.deepcopy(model.config)))
    except UnknownError as reason:
        raise PlanError(f"target gives numbers of the configuration that do not fit together: {reason}.") from reason
    now, new = ({part.name(name): shape for name, shape in shapes.items()} for shapes in (part.shapes(model), wanted))
    return now, new


def part_like(model: nn.Module, built: nn.Module, used: Collection[str] = ()) -> ConfiguredPart:
    """The part of `model` that has the modules of `built`.

    Args:
        model: any model with a configuration.
        built: the class of `described_module`, built from it.
        used: names of tensors that the forward uses; a module that holds one goes before others that could be meant.

    Raises:
        UnknownError: some module of `built` is not there.
    """
    path, module = described_module(model)
    modules = {name.rpartition(".")[0] for name in used}
    outer = dict(_pairs(built, module, "", path, modules))
    return ConfiguredPart(path, outer, {there: here for here, there in outer.items()})


def _pairs(
    built: nn.Module, module: nn.Module, here: str, there: str, used: Collection[str]
) -> Iterator[tuple[str, str]]:
    like = [(path, found) for path, found in _around(module, there) if _holds(found) == _holds(built)]
    if not like:
        raise UnknownError(OTHER)
    path, found = next((pair for pair in like if pair[0] in used), like[0])
    yield here, path
    for name, child in built._modules.items():
        if child is None:
            continue
        inside: Any = found._modules[name]
        yield from _pairs(child, inside, join(here, name), join(path, name), used)


def _around(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and all that it holds, what is nearer first."""
    level = [(path, module)]
    while level:
        yield from level
        level = [
            (join(path, name), child)
            for path, module in level
            for name, child in module._modules.items()
            if child is not None
        ]


def _holds(module: nn.Module) -> tuple[Shapes, frozenset[str]]:
    """Shapes of the tensors that a module itself holds and that are saved, and names of its modules."""
    unsaved = module._non_persistent_buffers_set
    shapes = {
        name: tuple(map(int, held.shape))
        for store in (module._parameters, module._buffers)
        for name, held in store.items()
        if held is not None and name not in unsaved
    }
    return shapes, frozenset(name for name, child in module._modules.items() if child is not None)
