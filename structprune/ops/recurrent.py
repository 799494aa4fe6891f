"""Recurrent layers: gates are sections of the weights that keep the same hidden channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops.context import Context, Operand
from structprune.ops.op import AxesOf, Contraction, Count, like, register_op
from structprune.ops.relations import Axes, Axis
from structprune.ops.zeros import ZeroContext, Zeros
from structprune.tracing.provenance import plain

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _cell(c: Context, gates: int, inputs: Axis, hidden: Axis, state: Axis, parameters: Sequence[Operand]) -> None:
    """Tie one direction of one layer: weights ``(gates * hidden, in)`` and ``(gates * hidden, state)``, two biases."""
    into, again, *biases = parameters
    c.same(inputs, into.axes[1])
    c.same(state, again.axes[1])
    for parameter in (into, again, *biases):
        c.same(c.sections(parameter.axes[0], gates)[0], hidden)


def _hidden(z: ZeroContext) -> Zeros:
    """Zero in the last dimension, whose gates are removed."""
    return (False,) * (len(z.axes) - 1) + (True,)


def _macs(node: fx.Node, axes: AxesOf, count: Count) -> int:
    """Each step multiplies with all matrices of all layers."""
    x, *others = node.all_input_nodes
    weights = [axes(n) for n in others if n.meta["name"] == "parameter"]
    steps = prod(count(axis) for axis in axes(x)[:-1])
    return steps * sum(prod(count(axis) for axis in matrix) for matrix in weights if len(matrix) == 2)


def _stack_shape(x: Any, hx: Any, weights: Any, *rest: Any) -> tuple[Tensor, ...] | None:
    """A stack of recurrent layers over padded sequences; its steps are a loop in Python on ``meta``."""
    states: list[Any] = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    if x.dim() != 3 or len(rest) != 6 or not isinstance(weights, (tuple, list)):
        return None  # packed sequences hand over their lengths in place of `hx`
    layers, both, batch_first = plain(rest[1]), bool(rest[4]), bool(rest[5])
    batch = x.shape[0] if batch_first else x.shape[1]
    first = weights[0]
    fits = all(state.dim() == 3 and tuple(state.shape[:2]) == (layers * (1 + both), batch) for state in states)
    if not fits or first.shape[1] != x.shape[2] or any(t.dtype != x.dtype for t in (*states, *weights)):
        return None
    # As the operation gives it: steps are outer to samples in memory.
    steps = x.shape[1] if batch_first else x.shape[0]
    out = torch.empty((steps, batch, states[0].shape[2] * (1 + both)), dtype=x.dtype, device=x.device)
    return (out.transpose(0, 1) if batch_first else out, *(like(state) for state in states))


# What it sums away is inside of it: no other operation sees those channels.
_LAYERS = Contraction("recurrent", lambda _: ())


@register_op("lstm", "gru", "rnn_tanh", "rnn_relu", zeros=_hidden, macs=_macs, contraction=_LAYERS, shape=_stack_shape)
def recurrent(c: Context, x: Operand, *args: Any) -> list[Axes | None]:
    """A stack of recurrent layers; one hidden size, so the same channels in all layers and directions."""
    given = _stack(c.node.meta["name"], args)
    hidden, state = given.states[-1].axes[-1], given.states[0].axes[-1]
    inputs = _layers(c, given, x.axes[-1], hidden, state)
    # Steps follow each other: none of them can go. Packed sequences have steps and samples in one dimension.
    c.pin(x.axes[1 if given.batch_first else 0], f"it is a step of {c.where()}")
    numbers, batch = given.states[0].axes[0], given.states[0].axes[1:-1]
    c.pin(numbers, f"it numbers the layers of {c.where()}")
    for other in given.states[1:]:
        for a, b in zip(given.states[0].axes[:-1], other.axes[:-1], strict=True):
            c.same(a, b)
    results: list[Axes | None] = [(*x.axes[:-1], inputs)]
    results += [(numbers, *batch, axis) for axis in ((state, hidden) if given.name == "lstm" else (state,))]
    return results


@dataclass(frozen=True, slots=True)
class _Stack:
    """The arguments of a stack of recurrent layers, however they were given."""

    name: str
    states: list[Operand]
    parameters: list[Operand]
    has_biases: bool
    layers: int
    directions: int
    batch_first: bool


def _stack(name: str, args: tuple[Any, ...]) -> _Stack:
    """``(hx, parameters, has_biases, layers, dropout, train, bidirectional, batch_first)``.

    Packed sequences hand over their lengths before these, and lack the last.
    """
    packed = (
        isinstance(args[0], Operand)
        and len(args) > 1
        and isinstance(args[1], (Operand, tuple, list))
        and isinstance(args[2], (tuple, list))
    )
    given: list[Any] = list(args[1:] if packed else args)
    hx, parameters, has_biases, layers, bidirectional = (given[i] for i in (0, 1, 2, 3, 6))
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    directions = 2 if bidirectional else 1
    batch_first = not packed and bool(given[7])
    return _Stack(name, states, list(parameters), bool(has_biases), int(layers), directions, batch_first)


def _layers(c: Context, given: _Stack, inputs: Axis, hidden: Axis, state: Axis) -> Axis:
    """Tie the parameters of all layers; what the last one gives.

    Two layers in two directions with biases have 4 parameters each: those of layer 1, direction 0 are 8 to 11.
    """
    projected = given.name == "lstm" and state.size != hidden.size
    if projected:
        c.bounded(hidden, state.size + 1)  # torch takes a state as wide as the cell for one that is not projected
    else:
        c.same(state, hidden)
    each = 2 + (2 if given.has_biases else 0) + (1 if projected else 0)
    for layer in range(given.layers):
        for direction in range(given.directions):
            first = (layer * given.directions + direction) * each
            mine = given.parameters[first : first + each]
            if projected:
                c.same(mine[-1].axes[0], state)
                c.same(mine[-1].axes[1], hidden)
                mine = mine[:-1]
            _cell(c, GATES[given.name], inputs, hidden, state, mine)
        inputs = c.concatenated([state] * given.directions)
    return inputs


@register_op("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", zeros=_hidden, macs=_macs, contraction=_LAYERS)
def cell(c: Context, x: Operand, hx: Any, *parameters: Any) -> Axes | list[Axes | None]:
    """One step of a recurrent layer."""
    name = c.node.meta["name"].removesuffix("_cell")
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    hidden = states[0].axes[-1]
    for other in states[1:]:
        c.broadcast([states[0], other])
    _cell(c, GATES[name], x.axes[-1], hidden, hidden, [p for p in parameters if isinstance(p, Operand)])
    axes = (*x.axes[:-1], hidden)
    return [axes, axes] if name == "lstm" else axes


@register_op("_pack_padded_sequence")
def pack(c: Context, x: Operand, lengths: Operand, *_: Any) -> list[Axes | None]:
    """``(batch, time, *channels)`` or ``(time, batch, *channels)`` to ``(steps of all samples, *channels)``."""
    for axis in x.axes[:2]:
        c.pin(axis, f"it is packed by the lengths of the sequences in {c.where()}")
    for axis in lengths.axes:
        c.pin(axis, f"it counts the sequences in {c.where()}")
    c.node.meta["part_of_operand"] = {1: lengths.node}  # the sizes of the batches come from the lengths alone
    steps, sizes = (c.fresh(shape[:1], f"it is packed in {c.where()}") for shape in c.shape)
    return [(*steps, *x.axes[2:]), sizes]


@register_op("_pad_packed_sequence")
def pad_packed(c: Context, data: Operand, batch_sizes: Operand, *_: Any) -> list[Axes | None]:
    """What `pack` does, undone."""
    for axis in (data.axes[0], *batch_sizes.axes):
        c.pin(axis, f"it is packed, and padded in {c.where()}")
    padded, lengths = (c.fresh(shape, f"it is padded in {c.where()}") for shape in c.shape)
    return [(*padded[:2], *data.axes[1:]), lengths]
