"""Recurrent networks and gates along a sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, tokens


class Recurrent(nn.Module):
    """Embed, run a recurrent module, read out, so that its input and hidden sizes can both be thinned."""

    def __init__(self, rnn: nn.Module, hidden: int) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(8, 12), rnn, nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.tanh(self.embed(x)))[0])


@case(tokens(), {"embed.weight": 0, "rnn.weight_ih_l0": (0, 1), "rnn.weight_hh_l0": (0, 1), "rnn.bias_hh_l0": 0})
class Lstm(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.LSTM(12, 16, batch_first=True), 16)


@case(tokens(), {"embed.weight": 0, **{f"rnn.weight_{s}_l{n}": (0, 1) for s in ("ih", "hh") for n in (0, 1)}})
class LstmTwoLayers(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.LSTM(12, 16, num_layers=2), 16)


@case(tokens(), {"embed.weight": 0, "rnn.weight_ih_l0": (0, 1), "rnn.weight_hh_l0_reverse": (0, 1), "head.weight": 1})
class LstmBidirectional(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.LSTM(12, 16, num_layers=2, bidirectional=True, batch_first=True), 32)


@case(tokens(), {"embed.weight": 0, "rnn.weight_ih_l0": (0, 1), "rnn.weight_hh_l0": (0, 1), "head.weight": 1})
class Gru(Recurrent):
    """Outputs, and the last state used too."""

    def __init__(self) -> None:
        super().__init__(nn.GRU(12, 16, batch_first=True), 16)

    def forward(self, x: Tensor) -> Tensor:
        y, last = self.rnn(self.embed(x))
        return self.head(y + last.transpose(0, 1))


@case(tokens(), {"embed.weight": 0, "rnn.weight_ih_l1": (0, 1), "rnn.weight_hh_l1_reverse": (0, 1), "head.weight": 1})
class GruBidirectional(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.GRU(12, 16, num_layers=2, bidirectional=True, bias=False), 32)


@case(tokens(), {"embed.weight": 0, "rnn.weight_ih_l0": (0, 1), "rnn.weight_hh_l0": (0, 1), "head.weight": 1})
class RnnTanh(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.RNN(12, 16, batch_first=True), 16)


@case(tokens(), {"start.weight": 0, "rnn.weight_hh_l0": (0, 1), "head.weight": 1})
class LstmGivenState(nn.Module):
    """The initial states come from layers."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell = nn.Linear(8, 16), nn.Linear(8, 16)
        self.rnn, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x[:, 0]
        y, (h, c) = self.rnn(x, (self.start(first)[None], self.cell(first)[None]))
        return self.head(y), self.head(h[-1] + c[-1])


@case(tokens(), {"embed.weight": 0, "cell.weight_ih": (0, 1), "cell.weight_hh": (0, 1), "head.weight": 1})
class UnrolledLstmCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(8, 12), nn.LSTMCell(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state, outputs = None, []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            outputs.append(state[0])
        return self.head(torch.stack(outputs, dim=1))


@case(tokens(), {"embed.weight": 0, "cell.weight_ih": (0, 1), "cell.weight_hh": (0, 1), "head.weight": 1})
class UnrolledGruCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = 16
        self.embed, self.cell, self.head = nn.Linear(8, 12), nn.GRUCell(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.hidden)
        for part in self.embed(x).unbind(1):
            state = self.cell(part, state)
        return self.head(state)


@case(tokens(), {"inp.weight": 0, "rec.weight": (0, 1), "head.weight": 1})
class HandLstm(nn.Module):
    """Four gates from one projection, unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 8
        self.inp, self.rec, self.head = nn.Linear(8, 32), nn.Linear(8, 32, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], self.hidden, dtype=x.dtype)
        for step in range(x.shape[1]):
            i, f, g, o = (self.inp(x[:, step]) + self.rec(h)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


@case(tokens(), {"up.weight": 0, "down.weight": 1})
class GluFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x), dim=-1))


@case(tokens(), {"up.weight": 0, "down.weight": 1})
class HandGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.up(x).chunk(2, dim=-1)
        return self.down(x * F.gelu(gate))


@case(tokens(), {"up.weight": 0, "depth.weight": 0, "down.weight": 1})
class ConformerConv(nn.Module):
    """A gate over channels-first series, then a depthwise convolution along time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.glu = nn.Conv1d(8, 32, 1), nn.GLU(dim=1)
        self.depth, self.norm = nn.Conv1d(16, 16, 3, padding=1, groups=16), nn.BatchNorm1d(16)
        self.down = nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.depth(self.glu(self.up(x.transpose(1, 2))))))
        return x + self.down(y).transpose(1, 2)


@case(tokens(), {"fc1.weight": 0, "fc2.weight": 1})
class AlongTheSequence(nn.Module):
    """Sums, flips, rolls, maxima and softmax along the sequence leave the channels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x.cumsum(dim=1) + x.flip(1) + torch.roll(x, 1, 1) + x.max(dim=1, keepdim=True).values
        x = x * x.softmax(1) + x.sort(dim=1)[0] + x.logsumexp(1, keepdim=True)
        return self.fc2(torch.where(x > 0, x, x.new_zeros(())))
