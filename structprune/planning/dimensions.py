"""A target in the configuration's own words: ``{"intermediate_size": 9216, "num_attention_heads": 24}``.

The class built from the configuration with these numbers says which shapes all tensors must have. How many channels
each group keeps follows: for groups that are alike, shares are tried until every shape comes out, and then the
configuration has to accept exactly these numbers.

For example, of a Llama with 8 heads, 4 of them for keys and values, that is asked for 4 and 2::

    q_proj     64 -> 32 rows, k_proj 32 -> 16 rows
    tried      all 4 key-value heads with 1 of 2 query heads each: k_proj would keep 32
    works      2 key-value heads with 2 query heads each
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice, product
from typing import Any

import numpy as np
from torch import nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.planning.built_from_config import Chain, is_built_from_config, number_at
from structprune.planning.configured_part import shapes_of
from structprune.planning.targets import TARGETS
from structprune.planning.uniform import alike
from structprune.tracing.state import is_config

# So many choices of shares are looked at.
CHOICES = 4096
Shapes = Mapping[str, tuple[int, ...]]


def chains_of(model: nn.Module, dimensions: Mapping[str, int]) -> dict[Chain, int]:
    """The numbers of a target by their chains from the model: ``("config", "text_config", "hidden_size")``.

    A name is one of the configuration or of one inside it, dotted where several have it.

    Raises:
        PlanError: there is no such number, or it would grow.
    """
    if not is_built_from_config(model):
        raise PlanError(
            f"target names {next(iter(dimensions))!r}; known are {', '.join(TARGETS)}, and the numbers of the "
            "configuration of a model that is built from one (model.config), which this model is not."
        )
    known = dict(_numbers(model.config))
    asked: dict[Chain, int] = {}
    for name, new in dimensions.items():
        aliases: Mapping[str, str] = getattr(type(model.config), "attribute_map", {})
        steps = aliases.get(name, name).split(".")
        matching = [chain for chain in known if list(chain[-len(steps) :]) == steps]
        asked[_only(name, matching, known, len(steps))] = new
    for chain, new in asked.items():
        old = known[chain]
        if old is not None and new > old:
            raise PlanError(f"target asks for {new} of {_dotted(chain)}, and there are {old}.")
    return asked


def _only(name: str, matching: Sequence[Chain], known: Iterable[Chain], steps: int) -> Chain:
    """The one of the `matching` numbers that a name means: that of the outermost configuration, if it has it."""
    outermost = [chain for chain in matching if len(chain) == steps + 1]
    if len(outermost or matching) == 1:
        return (outermost or matching)[0]
    if matching:
        raise PlanError(f"target names {name!r}, which may be any of {', '.join(map(_dotted, matching))}: name one.")
    raise PlanError(
        f"target names {name!r}; known are {', '.join(TARGETS)}, and of the model's configuration "
        f"{', '.join(sorted(map(_dotted, known)))}."
    )


def _dotted(chain: Chain) -> str:
    return ".".join(map(str, chain[1:]))


def _numbers(config: Any, chain: Chain = ("config",)) -> Iterator[tuple[Chain, int | None]]:
    """Every number of a configuration, and what may be one and is not given."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int or value is None:
            yield (*chain, name), value
        elif is_config(value) and callable(getattr(value, "to_dict", None)):
            yield from _numbers(value, (*chain, name))


def shorter_stacks(model: nn.Module, numbers: Mapping[Chain, int]) -> dict[str, int]:
    """How many layers go of each stack, by its path, in the class built from the configuration with these numbers.

    Raises:
        PlanError: it cannot be built from them, or lacks tensors that are in no stack of layers.
    """
    now, wanted = shapes_of(model, numbers)
    layers: dict[str, set[str]] = {}
    for name in now.keys() - wanted.keys():
        stack = next((m for m in re.finditer(r"\.(\d+)(?=\.)", name) if _gone(name[: m.end()], wanted)), None)
        if stack is None:
            raise PlanError(f"A model with the numbers in target has no {name!r}, which is in no stack of layers.")
        layers.setdefault(name[: stack.start()], set()).add(stack[1])
    return {stack: len(gone) for stack, gone in layers.items()}


def _gone(layer: str, wanted: Shapes) -> bool:
    return not any(name.startswith(f"{layer}.") for name in wanted)


def widths_for(graph: ChannelGraph, numbers: Mapping[Chain, int]) -> Iterator[dict[Group, int]]:
    """How many channels each group keeps so that all shapes are those of the class built from these numbers.

    Raises:
        PlanError: it cannot be built from them, or has other tensors.
    """
    now, wanted = shapes_of(graph.model, numbers)
    if wanted.keys() != now.keys():
        raise PlanError("target asks for other layers, which go in one step: use structprune.plan or prune for them.")
    asked = {Fraction(new, old) for chain, new in numbers.items() if (old := number_at(graph.model, chain))}
    groups = graph.groups()
    sets = [[groups[number] for number in numbers] for numbers in alike(graph).sets]
    options = [_counts(members[0], now, wanted, asked) for members in sets]
    slots = [(slot.axis, wanted[slot.tensor][slot.dim]) for slot in graph.slots if slot.tensor in wanted]
    # Sizes of heads stay whole where the number of heads can give the shape.
    choices = sorted(islice(product(*options), CHOICES), key=lambda choice: _inside_heads(sets, choice))
    for choice in choices:
        kept = {group: count for members, count in zip(sets, choice, strict=True) for group in members}
        count = graph.counter(graph.components.removed(_last(kept)))
        if all(count(axis) == size for axis, size in slots):
            yield kept


def _last(kept: Mapping[Group, int]) -> np.ndarray:
    """The components that go when each group keeps its first channels."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(g.components[count:] for g, count in kept.items())])


def _counts(group: Group, now: Shapes, wanted: Shapes, asked: set[Fraction]) -> list[int]:
    """How many channels of a group may be meant: shares by which its dimensions shrink, or quotients of these."""
    dims = [(m.tensor, m.dim) for m in group.members if m.tensor in wanted]
    shares = {Fraction(wanted[tensor][dim], now[tensor][dim]) for tensor, dim in dims}
    if shares <= {1}:
        return [group.channels]
    shares |= asked | {1}
    shares |= {a / b for a in shares for b in shares}
    counts = {share * group.channels for share in shares if share <= 1}
    return sorted((int(count) for count in counts if count.denominator == 1 and count), reverse=True)


def _inside_heads(sets: list[list[Group]], choice: tuple[int, ...]) -> int:
    pairs = zip(sets, choice, strict=True)
    return sum(members[0].axis == "head_size" and count < members[0].channels for members, count in pairs)
