"""A call of recurrent layers as rows, one for each step of each sequence, and one direction of one layer by itself.

Rows stand as in a packed sequence, whether the call packs them or not: of two sequences of 3 and 2 steps, the first
steps are rows 0 and 1, the second steps rows 2 and 3, and row 4 is the last step of the first. Padded sequences have
equally many steps each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from structprune.ops.recurrent import GATES


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the steps of sequences stand among the rows.

    Attributes:
        sizes: how many sequences have a first step, a second, and so on; shape ``(steps,)``, falling, on the CPU.
        sequence: the sequence of each row, shape ``(rows,)``.
        step: its step, shape ``(rows,)``.
        before: for each row, the place of the step before it among first states and rows, one behind the other.
        reversal: for each row, the row of the same sequence that is as far from its end as this one from its start.

    Example:
        >>> layout = Layout.of(torch.tensor([2, 2, 1]))
        >>> layout.sequence.tolist(), layout.step.tolist()
        ([0, 1, 0, 1, 0], [0, 0, 1, 1, 2])
        >>> layout.before.tolist(), layout.reversal.tolist()
        ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0])
    """

    sizes: Tensor
    sequence: Tensor
    step: Tensor
    before: Tensor
    reversal: Tensor

    @classmethod
    def of(cls, sizes: Tensor) -> Layout:
        """The layout of sequences with these sizes of batches."""
        numbers: list[int] = sizes.tolist()
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        sequence = torch.cat([torch.arange(size) for size in numbers])
        step = torch.repeat_interleave(torch.arange(len(numbers)), sizes)
        # A row is ``start of its step + sequence``; in front of all rows stands one state for each sequence.
        before = torch.where(step == 0, sequence, numbers[0] + starts[(step - 1).clamp_min(0)] + sequence)
        lengths = (sizes[:, None] > torch.arange(numbers[0])).sum(0)
        return cls(sizes, sequence, step, before, starts[lengths[sequence] - 1 - step] + sequence)

    def shifted(self, states: Tensor, first: Tensor) -> Tensor:
        """The state before each row: states ``(rows, width)`` and first ones ``(sequences, width)``."""
        return torch.cat([first, states])[self.before.to(states.device)]

    def reversed(self, rows: Tensor) -> Tensor:
        """Rows with each sequence turned around; done twice, as they were."""
        return rows[self.reversal.to(rows.device)]


@dataclass(frozen=True, slots=True)
class Cell:
    """One direction of one recurrent layer.

    Attributes:
        name: of the operation: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        into: what its input is multiplied by, shape ``(gates * hidden, inputs)``.
        again: what the state of the step before is multiplied by, shape ``(gates * hidden, state)``.
        biases: of the two, shape ``(gates * hidden,)`` each; empty if it has none.
        projection: what makes the state of the hidden channels, shape ``(state, hidden)``; None without `proj_size`.
    """

    name: str
    into: Tensor
    again: Tensor
    biases: tuple[Tensor, ...]
    projection: Tensor | None

    @property
    def gates(self) -> int:
        """How many gates each hidden channel has."""
        return GATES[self.name]

    @property
    def hidden(self) -> int:
        """How many hidden channels there are."""
        return self.into.shape[0] // self.gates

    @property
    def parameters(self) -> list[Tensor]:
        """In torch's order."""
        return [self.into, self.again, *self.biases, *([] if self.projection is None else [self.projection])]

    def with_parameters(self, parameters: Sequence[Tensor]) -> Cell:
        """The same with other parameters, in torch's order."""
        into, again, *others = parameters
        projection = None if self.projection is None else others.pop()
        return replace(self, into=into, again=again, biases=tuple(others), projection=projection)

    def run(self, x: Tensor, first: Sequence[Tensor], layout: Layout) -> Tensor:
        """The states ``(rows, state)`` on an input ``(rows, inputs)``, step by step from the first ones.

        Args:
            x: its input.
            first: state, and cells of an LSTM, before the first step, shape ``(sequences, width)`` each.
            layout: of the rows.
        """
        states = [tensor[None].contiguous() for tensor in first]
        function: Any = getattr(torch, self.name)
        hx = states if self.name == "lstm" else states[0]
        options = bool(self.biases), 1, 0.0, False, False  # layers, dropout, training, both directions
        with torch.backends.cudnn.flags(enabled=False):  # it wants the parameters in one piece of memory
            return function(x, layout.sizes, hx, self.parameters, *options)[0]

    def from_input(self, x: Tensor) -> Tensor:
        """The part of the gates, in front of their activations, that an input makes, ``(rows, gates * hidden)``."""
        return x @ self.into.T + (self.biases[0] if self.biases else 0)

    def from_state(self, states: Tensor) -> Tensor:
        """The part that the states of the steps before make."""
        return states @ self.again.T + (self.biases[1] if self.biases else 0)

    def before_projection(self, gates: Tensor, first: Tensor, layout: Layout) -> Tensor:
        """The hidden channels of an LSTM that its projection takes, ``(rows, hidden)``, given what goes into its gates.

        Args:
            gates: shape ``(rows, 4 * hidden)``, in front of their activations.
            first: the cells before the first step, ``(sequences, hidden)``.
            layout: of the rows.
        """
        entering, kept, new, out = gates.chunk(4, 1)
        added, share = (entering.sigmoid() * new.tanh()), kept.sigmoid()
        cells, cell, start = list[Tensor](), first, 0
        for size in layout.sizes.tolist():
            cell = share[start : start + size] * cell[:size] + added[start : start + size]
            cells.append(cell)
            start += size
        return out.sigmoid() * torch.cat(cells).tanh()


@dataclass(frozen=True, slots=True)
class RecurrentCall:
    """A call of a stack of recurrent layers.

    Attributes:
        x: its input as rows, ``(rows, features)``.
        layout: of the rows.
        states: what it starts from: states, and cells of an LSTM, ``(layers * directions, sequences, width)`` each.
        cells: in torch's order: by layer, and by direction within.
        directions: 1 or 2.
        padded: whether the steps are a dimension of their own: the second if `batch_first`, else the first.
        batch_first: whether sequences are the first dimension.
    """

    x: Tensor
    layout: Layout
    states: tuple[Tensor, ...]
    cells: tuple[Cell, ...]
    directions: int
    padded: bool
    batch_first: bool

    @classmethod
    def of(cls, name: str, args: Sequence[Any]) -> RecurrentCall:
        """A call by its arguments, as `torch.lstm` takes them; of packed sequences or of padded ones.

        Parameters become plain tensors of the input's type.
        """
        packed = isinstance(args[3], (tuple, list))
        x, hx, parameters, has_biases = args[0], *(args[2:5] if packed else args[1:4])
        both, batch_first = bool(args[8 if packed else 7]), not packed and bool(args[8])
        directions = 2 if both else 1
        states: tuple[Tensor, ...] = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        # `double` makes a plain tensor of a parameter that stands for one in half precision.
        plain = [tensor.detach().double().to(x.dtype) for tensor in parameters]
        each = len(plain) // states[0].shape[0]
        empty = Cell(name, x, x, (), x if each == (5 if has_biases else 3) else None)
        cells = tuple(empty.with_parameters(plain[at : at + each]) for at in range(0, len(plain), each))
        if packed:
            return cls(x, Layout.of(args[1].cpu()), states, cells, directions, False, False)
        sequences, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        layout = Layout.of(torch.full((steps,), sequences))
        call = cls(x, layout, states, cells, directions, True, batch_first)
        return replace(call, x=call.as_rows(x))

    def as_rows(self, tensor: Tensor) -> Tensor:
        """Its input or its result as rows: ``(2, 3, 5)`` becomes ``(6, 5)``, the first steps first."""
        if not self.padded:
            return tensor
        return (tensor.transpose(0, 1) if self.batch_first else tensor).flatten(0, 1)

    def first(self, number: int) -> list[Tensor]:
        """What one of its cells starts from."""
        return [state[number] for state in self.states]
