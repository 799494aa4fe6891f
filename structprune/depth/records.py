"""What is known of a branch: for users, and where it stands in a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from structprune.tracing.containers import leaves_of

Edge = tuple[int, int]  # a sum, by its number in the trace, and the position of one of its terms


@dataclass(frozen=True, slots=True)
class Branch:
    """Something that can be taken out of a model by name. See `structprune.branches` for an example.

    Attributes:
        name: what to call it by.
        kind: ``"branch"``: a term of a sum, which then counts as zero; ``"block"``: a module of a stack, whose result
            is then what it got.
        module: path of the module whose forward adds the branch, or of the block.
        layers: paths of the modules whose tensors only it uses, in order.
        tensors: names of the parameters and buffers that only it uses.
        params: entries of those parameters.
        macs: multiply-accumulates of what only it computes, on the example inputs.
        identity: whether nothing is left to do for `module`: it gives back what it gets.
    """

    name: str
    kind: str
    module: str
    layers: tuple[str, ...]
    tensors: tuple[str, ...]
    params: int
    macs: int
    identity: bool

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.name}: {self.kind}, {self.params:,} parameters, {self.macs:,} MACs"


@dataclass(frozen=True, slots=True)
class PlacedBranch:
    """A `Branch` with where it stands in the trace.

    Attributes:
        branch: what users see.
        off: the terms that count as zero, as (sum, position).
        skipped: the block's result and what it got, by number; one pair for each call of the block.
        own_nodes: what only it computes and uses.
    """

    branch: Branch
    off: tuple[Edge, ...]
    skipped: tuple[tuple[int, int], ...]
    own_nodes: frozenset[fx.Node]


def name_of(module: str, layers: tuple[str, ...]) -> str:
    """The smallest module around a branch, and the first and last of its layers.

    Example:
        >>> name_of("block.output", ("block.attention.query", "block.attention.key", "block.output.dense"))
        'block (attention.query ... output.dense)'
    """
    paths = [module.split("."), *(layer.split(".")[:-1] for layer in layers)]
    steps: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        steps.append(parts[0])
    prefix = ".".join(steps)
    inner = [layer[len(prefix) + 1 :] if prefix else layer for layer in layers]
    inner = list(dict.fromkeys(name for name in inner if name)) or [layer.rpartition(".")[2] for layer in layers]
    text = inner[0] if len(inner) == 1 else f"{inner[0]} ... {inner[-1]}"
    return f"{prefix} ({text})" if prefix else f"({text})"


def named_apart(branches: list[PlacedBranch]) -> Iterator[PlacedBranch]:
    """The same, with numbers behind names that more than one has."""
    counts: dict[str, int] = {}
    for item in branches:
        branch = item.branch
        number = counts[branch.name] = counts.get(branch.name, 0) + 1
        if number == 1:
            yield item
            continue
        named = replace(branch, name=f"{branch.name} #{number}")
        yield PlacedBranch(named, item.off, item.skipped, item.own_nodes)


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """The nodes in nested containers, in order."""
    return leaves_of(value, fx.Node)
