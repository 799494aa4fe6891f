"""Weights that a forward computes from parameters by normalising them over their inputs.

    w / w.norm(dim=1, keepdim=True)       weight normalisation; spectral norm divides by u @ (w @ v)
    (w - w.mean(1)) / w.std(1)            weight standardisation

Such a layer's weight for one input depends on the parameters for all inputs. Removing an input must leave the weights
for the others as they were, so it may go only where another parameter takes up the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, fx

from structprune.coupling.compensation_ahead import run_movement
from structprune.coupling.propagate import Channels
from structprune.ops import op_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.gains import Gain, as_matrix
from structprune.ops.op import Pair
from structprune.ops.relations import Axis
from structprune.tracing.provenance import plain
from structprune.tracing.trace import Trace, describe


@dataclass(frozen=True, slots=True)
class Normalised:
    """A weight that is divided by a norm of itself, of which a parameter can make up for the changes.

    Attributes:
        node: the operation that gives the weight as it is used.
        parts: the operations that compute it.
        gain: what makes up for the changes.
    """

    node: fx.Node
    parts: frozenset[fx.Node]
    gain: Gain


def normalised_weights(trace: Trace, channels: Channels) -> list[Normalised]:
    """Weights that are normalised over their inputs, where a parameter takes up the change; others are pinned."""
    gains, together = _normalised(_Computed(trace, channels))
    for node, axes in together:
        for axis in axes:
            where = describe(node, trace)
            reason = f"the weights for it are normalised together by {where} (see structprune.materialize_weights)"
            channels.relations.pin(axis, reason)
    return gains


def normalised_together(trace: Trace, channels: Channels) -> list[fx.Node]:
    """The weights, as layers use them, that are normalised over their inputs where no parameter takes up the change."""
    computed = _Computed(trace, channels)
    together = {node for node, _ in _normalised(computed)[1]}
    return [weight for weight in computed.used if together & {weight, *computed.sources(weight)}]


def _normalised(computed: _Computed) -> tuple[list[Normalised], list[tuple[fx.Node, list[Axis]]]]:
    """Those for which a parameter makes up, and the operations that normalise others, with their channels."""
    normalisations = list(computed.normalisations())
    if not normalisations:
        return [], []
    gains = [gain for node in computed.trace.all_nodes if (gain := computed.gain(node)) is not None]
    covered = {part for gain in gains for part in gain.parts}
    return gains, [(node, axes) for node, axes in normalisations if node not in covered]


class _Computed:
    """What a forward computes from the model's own tensors alone."""

    def __init__(self, trace: Trace, channels: Channels) -> None:
        self.trace, self._axes = trace, channels.axes
        self._relations = channels.relations
        self._held = trace.held
        self._outputs = {*trace.outputs.values(), *trace.training_outputs}

    def normalisations(self) -> Iterator[tuple[fx.Node, list[Axis]]]:
        """Operations that mix weights over channels that the weights have, with these channels."""
        computed = [node for node in self.trace.all_nodes if node in self._held and node.op != "get_attr"]
        weights = self._weights if computed else set()
        for node in computed if weights else ():
            axes = [axis for axis in self._mixed(node) if axis.free]
            if axes and self.sources(node) & weights and not self._only_way(node):
                yield node, axes

    @cached_property
    def _weights(self) -> set[fx.Node]:
        """The parameters, and products of such, that layers use as weights or compute these from."""
        return set[fx.Node]().union(*[self._made_of(weight) for weight in self.used])

    @cached_property
    def used(self) -> list[fx.Node]:
        """What layers use as weights, and is a parameter or is computed from such, each once and in order."""
        weights: dict[fx.Node, None] = {}
        for node in self.trace.all_nodes:
            if node in self._held:
                continue
            operands = tensors(node)
            for pair in self._pairs(node):
                for mine, other in ((pair.operand, pair.weight), (pair.weight, pair.operand)):
                    if operands[mine] in self._held and operands[other] not in self._held:
                        weights[operands[mine]] = None
        return list(weights)

    def _pairs(self, node: fx.Node) -> list[Pair]:
        known = op_of(node.meta["name"])
        if known is None or known.contraction is None or known.contraction.kind == "embedding":
            return []
        return list(known.contraction.pairs(node))

    @cached_property
    def _reduced(self) -> dict[int, list[Axis]]:
        """The channels that each operation reduces or normalises over, by its number."""
        axes: dict[int, list[Axis]] = {}
        for reduction in self._relations.reductions:
            axes.setdefault(reduction.node, []).extend(reduction.axes)
        for scale in self._relations.scales:
            if self.trace.all_nodes[scale.node].meta["name"] == "mean":
                axes.setdefault(scale.node, []).append(scale.axis)
        return axes

    def _mixed(self, node: fx.Node) -> list[Axis]:
        operands = tensors(node)
        axes = list(self._reduced.get(node.meta["index"], ()))
        for pair in self._pairs(node):
            for place, dim in ((pair.operand, pair.dim), (pair.weight, pair.weight_dim)):
                mine = self._axes[operands[place].meta["index"]]
                axes.append(mine[dim] if len(mine) > 1 else mine[0])
        return axes

    def sources(self, node: fx.Node) -> set[fx.Node]:
        """All that `node` is computed from."""
        waiting, seen = [node], set[fx.Node]()
        while waiting:
            sources = set(waiting.pop().all_input_nodes) - seen
            seen |= sources
            waiting += sources
        return seen

    def _made_of(self, weight: fx.Node) -> set[fx.Node]:
        """The parameters, and the products of such, that a weight is computed from.

        A product is not looked into: the factors of a low rank, or learnt queries and the weights that project them,
        are other channels.
        """
        waiting, seen, origins = [weight], {weight}, set[fx.Node]()
        while waiting:
            at = waiting.pop()
            if at.meta["name"] == "parameter" or self._pairs(at):
                origins.add(at)
                continue
            sources = set(at.all_input_nodes) - seen
            seen |= sources
            waiting += sources
        return origins

    def _only_way(self, node: fx.Node) -> bool:
        """Whether the parameters that `node` mixes are used through it alone, as the two factors of a low rank are."""
        waiting = [source for source in self.sources(node) if source.meta["name"] == "parameter"]
        seen = set(waiting)
        while waiting:
            for user in waiting.pop().users:
                if user is node or user in seen:
                    continue
                if user.op == "output" or user not in self._held or user in self._outputs:
                    return False
                seen.add(user)
                waiting.append(user)
        # Of what keeps the channels that it mixes, as a softmax does, all that is used is mixed.
        kept = {axis.key for axes in [self._axes[node.meta["index"]]] for axis in axes if isinstance(axis, Axis)}
        return not any(axis.free and axis.key in kept for axis in self._reduced.get(node.meta["index"], ()))

    # -- what can be made up for -----------------------------------------------------------------------------------

    def gain(self, node: fx.Node) -> Normalised | None:
        """How the change of a norm can be made up for, if `node` divides a weight by it."""
        if node not in self._held:
            return None
        if node.meta["name"] == "_weight_norm":
            return self._weight_norm(node)
        return self._spectral_norm(node) if node.meta["name"] == "div" and len(tensors(node)) == 2 else None

    def _weight_norm(self, node: fx.Node) -> Normalised | None:
        """``g * v / |v|``: `g` takes up the change, if it makes nothing but these weights."""
        v, g = tensors(node)
        dim = plain(arguments(node).get("dim", 0))
        alike = all(user.meta["name"] == "_weight_norm" and tensors(user) == [v, g] for user in g.users)
        if not (alike and self._parameter(v) and self._parameter(g) and isinstance(dim, int) and dim >= 0):
            return None
        return Normalised(node, frozenset([node]), Gain(str(g.target), str(v.target), dim))

    def _spectral_norm(self, node: fx.Node) -> Normalised | None:
        """``w / (u @ (w @ v))``: `v` takes up the change, if it makes nothing but these weights."""
        divided, sigma = tensors(node)
        if sigma.meta["name"] not in ("dot", "vdot"):
            return None
        left, product = tensors(sigma)
        if product.meta["name"] != "mv":
            return None
        matrix, right = tensors(product)
        u, v, weight = self._copied(left), self._copied(right), self._moved(divided)
        if u is None or v is None or weight is None or not self._feeds_only(v, "dot", "vdot"):
            return None
        numbers = torch.arange(prod(weight.meta["shape"])).view(weight.meta["shape"])
        dim = self._rows_of_matrix(weight, matrix, numbers)
        if dim is None or not torch.equal(self._replayed(weight, divided, numbers), numbers):
            return None
        gain = Gain(str(v.target), str(weight.target), dim, (str(u.target), str(v.target)))
        return Normalised(node, frozenset([node, sigma, product]), gain)

    def _parameter(self, node: fx.Node) -> bool:
        return node.meta["name"] == "parameter"

    def _copied(self, node: fx.Node) -> fx.Node | None:
        """The parameter that `node` is, or is a copy of."""
        while node.meta["name"] in ("clone", "detach", "contiguous"):
            node = tensors(node)[0]
        return node if self._parameter(node) else None

    def _feeds_only(self, node: fx.Node, *ends: str) -> bool:
        """Whether a parameter is used, copied or multiplied by a matrix, for nothing but operations named in `ends`."""
        passed = ("clone", "detach", "contiguous", "mv")
        return all(
            user.op != "output"
            and (user.meta["name"] in ends or (user.meta["name"] in passed and self._feeds_only(user, *ends)))
            for user in node.users
        )

    def _moved(self, node: fx.Node) -> fx.Node | None:
        """The parameter whose entries `node` holds, in another shape or order."""
        while (known := op_of(node.meta["name"])) is not None and known.moves and len(tensors(node)) == 1:
            node = tensors(node)[0]
        return node if self._parameter(node) else None

    def _replayed(self, weight: fx.Node, node: fx.Node, numbers: Tensor) -> Tensor:
        """What becomes of `numbers`, in the place of `weight`, in `node`, which holds its entries moved."""
        moves: list[fx.Node] = []
        while node is not weight:
            moves.append(node)
            node = tensors(node)[0]
        for move in reversed(moves):
            numbers = run_movement(move, {tensors(move)[0]: numbers})
        return numbers

    def _rows_of_matrix(self, weight: fx.Node, matrix: fx.Node, numbers: Tensor) -> int | None:
        """The dimension of `weight` that numbers the axes of `matrix`, if that is `weight` with the others flat."""
        if self._moved(matrix) is not weight:
            return None
        moved = self._replayed(weight, matrix, numbers)
        dims = range(len(weight.meta["shape"]))
        return next((dim for dim in dims if torch.equal(as_matrix(numbers, dim), moved)), None)
