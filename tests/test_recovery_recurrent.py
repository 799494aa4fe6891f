"""Recovery of recurrent layers: their gates are solved, step by step, for what the kept channels can express."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.ranks import needs_distributed, on_two_ranks
from support.recovery_nets import COPIED_FROM, GONE, data_of, error, jittered, removal
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import structprune
from structprune.recovery import recurrent
from structprune.recovery.recurrent_calls import Cell, Layout, RecurrentCall

SEQUENCES = (48, 7, 6)
EXACT = 1e-7  # a ridge of 1e-12 of the moments stays


class Tagged(nn.Module):
    """A recurrent stack, and a layer for each of its steps."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear((rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        return self.head(self.rnn(x)[0])


def copied(rnn: nn.RNNBase) -> None:
    """Make hidden channels that are removed copies of kept ones, in all layers and directions."""
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if not name.startswith("weight_hr"):
                by_gate = parameter.unflatten(0, (-1, rnn.hidden_size))
                by_gate[:, GONE] = by_gate[:, COPIED_FROM]


def hidden_dimension(rnn: nn.RNNBase) -> tuple[str, int]:
    return ("rnn.weight_hr_l0" if rnn.proj_size else "rnn.weight_hh_l0"), 1


STACKS = {
    "lstm": lambda: nn.LSTM(6, 8, batch_first=True),
    "gru": lambda: nn.GRU(6, 8, batch_first=True),
    "tanh": lambda: nn.RNN(6, 8, batch_first=True),
    "relu": lambda: nn.RNN(6, 8, batch_first=True, nonlinearity="relu"),
    "steps first": lambda: nn.LSTM(6, 8),
    "three layers": lambda: nn.GRU(6, 8, 3, batch_first=True),
    "both directions": lambda: nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True),
    "both directions of a gru": lambda: nn.GRU(6, 8, 2, bidirectional=True),
    "without bias": lambda: nn.LSTM(6, 8, 2, bias=False, batch_first=True),
    "gru without bias": lambda: nn.GRU(6, 8, bias=False, batch_first=True),
    "projected": lambda: nn.LSTM(6, 8, 2, batch_first=True, proj_size=3),
    "projected in both directions": lambda: nn.LSTM(6, 8, 2, bidirectional=True, proj_size=3, bias=False),
}


@pytest.mark.parametrize("name", STACKS)
def test_what_the_kept_channels_can_express_comes_back(name: str) -> None:
    model, data = jittered(Tagged(STACKS[name]())), data_of(SEQUENCES)
    copied(model.rnn)
    slim = removal(model, data[0], hidden_dimension(model.rnn)).apply(model)
    before = {key: value.clone() for key, value in slim.state_dict().items()}
    recovered = structprune.recover(slim, model, data)
    assert slim.rnn.hidden_size == recovered.rnn.hidden_size == 5
    assert error(slim, model, data) > 1e-2
    assert error(recovered, model, data) < EXACT
    assert error(recovered, model, data_of((4, 11, 6), 1)) < EXACT
    row = next(row for row in structprune.recovery_report(recovered).layers if row.layer == "rnn")
    assert row.before > 1e-2 > 1e-6 > row.after
    assert row.changed
    assert all(torch.equal(value, before[key]) for key, value in slim.state_dict().items())


def test_channels_that_are_zero_cost_nothing_and_change_nothing() -> None:
    model, data = jittered(Tagged(nn.LSTM(6, 8, 2, batch_first=True))), data_of(SEQUENCES)
    with torch.no_grad():
        for _, parameter in model.rnn.named_parameters():
            parameter.unflatten(0, (4, 8))[:, GONE] = 0
    slim = removal(model, data[0], hidden_dimension(model.rnn)).apply(model)
    recovered = structprune.recover(slim, model, data)
    assert error(slim, model, data) < 1e-12
    assert torch.equal(recovered.rnn.weight_hh_l0, slim.rnn.weight_hh_l0)
    assert not any(row.changed for row in structprune.recovery_report(recovered).layers)


def test_removed_inputs_are_made_up_for() -> None:
    model, data = (
        jittered(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.GRU(8, 5, batch_first=True))),
        data_of(SEQUENCES),
    )
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[GONE] = 2 * tensor[COPIED_FROM]
    slim = removal(model, data[0], "0").apply(model)
    recovered = structprune.recover(slim, model, data)
    assert recovered[2].input_size == 5
    assert states_apart(slim, model, data[0]) > 1e-2
    assert states_apart(recovered, model, data[0]) < EXACT


def states_apart(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """Relative difference of what recurrent layers return first."""
    with torch.no_grad():
        ours, theirs = model(x)[0], original(x)[0]
    return float((ours - theirs).norm() / theirs.norm())


def test_state_channels_of_a_projection() -> None:
    model, data = jittered(Tagged(nn.LSTM(6, 12, 2, batch_first=True, proj_size=8))), data_of(SEQUENCES)
    with torch.no_grad():
        for layer in (0, 1):
            projection = getattr(model.rnn, f"weight_hr_l{layer}")
            projection[GONE] = 2 * projection[COPIED_FROM]
    slim = removal(model, data[0], ("rnn.weight_hh_l0", 1)).apply(model)
    recovered = structprune.recover(slim, model, data)
    assert (recovered.rnn.hidden_size, recovered.rnn.proj_size) == (12, 5)
    assert error(slim, model, data) > 1e-2
    assert error(recovered, model, data) < EXACT


class Started(nn.Module):
    """The first state and the first cells come from layers of their own; the last ones are what is used."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.cell = nn.Linear(6, 8), nn.Linear(6, 8)
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        start = x.mean(1)
        _, (state, cells) = self.rnn(x, (self.state(start)[None], self.cell(start)[None]))
        return self.head(state[0] + cells[0])


def test_first_and_last_states() -> None:
    model, data = jittered(Started()), data_of(SEQUENCES)
    copied(model.rnn)
    with torch.no_grad():
        for layer in (model.state, model.cell):
            layer.weight[GONE], layer.bias[GONE] = layer.weight[COPIED_FROM], layer.bias[COPIED_FROM]
    slim = removal(model, data[0], ("rnn.weight_hh_l0", 1)).apply(model)
    recovered = structprune.recover(slim, model, data)
    assert slim.state.out_features == 5
    assert error(slim, model, data) > 1e-2
    assert error(recovered, model, data) < EXACT


class Packed(nn.Module):
    """Sequences of several lengths, by their last states."""

    def __init__(self, kind: str, in_order: bool) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, 8, 2, batch_first=True, bidirectional=True)
        self.in_order, self.head = in_order, nn.Linear(16, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, True, enforce_sorted=self.in_order)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences(kind: str, in_order: bool) -> None:
    model = jittered(Packed(kind, in_order))
    copied(model.rnn)
    random = torch.Generator().manual_seed(0)
    lengths = [torch.cat([torch.tensor([7]), torch.randint(3, 8, (15,), generator=random)]) for _ in range(3)]
    lengths = [each.sort(descending=True).values if in_order else each for each in lengths]
    data = [{"x": x, "lengths": each} for x, each in zip(data_of(SEQUENCES), lengths, strict=True)]
    slim = removal(model, data[0], ("rnn.weight_hh_l0", 1)).apply(model)
    recovered = structprune.recover(slim, model, data)

    def apart(one: nn.Module) -> float:
        with torch.no_grad():
            pairs = [(one(**batch), model(**batch)) for batch in data]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    assert apart(slim) > 1e-2
    assert apart(recovered) < EXACT


@pytest.fixture
def solved_on(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the rows that recurrent layers are solved on and chosen by, of each batch."""
    seen: list[Tensor] = []
    solved_on = recurrent.RecurrentSolver._solved_on

    def noted(self: recurrent.RecurrentSolver, number: int, call: RecurrentCall) -> Tensor:
        rows = solved_on(self, number, call)
        seen.append(call.x[rows])
        return rows

    monkeypatch.setattr(recurrent.RecurrentSolver, "_solved_on", noted)
    return seen


def test_held_out_samples_of_packed_sequences_are_left_out(solved_on: list[Tensor]) -> None:
    """Packing sorts samples by their length; the last ones of the batch are held out nevertheless."""
    model = jittered(Packed("LSTM", False))
    x = data_of((16, 7, 6), 1)[0]
    x[-1] = 100.0  # the longest, so that it is sorted to the front
    batch = {"x": x, "lengths": torch.tensor([3, 4, 5, 6] * 3 + [3, 3, 3, 7])}
    slim = structprune.prune(model, batch, ratio=0.5, round_to=1)
    structprune.recover(slim, model, [batch])
    assert len(solved_on[0]) == 18 * 3 + 3 * 3
    assert all(bool((rows < 50).all()) for rows in solved_on)


def test_random_channels_come_nearer_and_held_out_samples_get_no_worse() -> None:
    for seed, kind in enumerate((nn.LSTM, nn.GRU, nn.RNN)):
        torch.manual_seed(seed)
        model = Tagged(kind(6, 32, 2, batch_first=True)).double().eval()
        with torch.no_grad():  # states of one scale, made of few directions, as in trained networks
            for name, parameter in model.rnn.named_parameters():
                if name.startswith("weight"):
                    u, s, v = torch.linalg.svd(parameter, full_matrices=False)
                    parameter.copy_(3 * u @ torch.diag(s * 0.7 ** torch.arange(len(s))) @ v)
        data = data_of((96, 7, 6), 3)
        slim = structprune.prune(model, data[0], target={"macs": 0.5}, round_to=1)
        recovered = structprune.recover(slim, model, data)
        report = structprune.recovery_report(recovered)
        errors = {each.name: each.error for each in report.candidates}
        assert report.kept == "layers solved with producers"
        assert errors[report.kept] < 0.5 * errors["as given"]
        fresh = [torch.randn(50, 9, 6, dtype=torch.float64)]
        assert error(recovered, model, fresh) < 0.6 * error(slim, model, fresh)


def test_noise_is_not_fitted() -> None:
    """With three short sequences to solve 13 features on, what is worse on others is not returned."""
    model = jittered(Tagged(nn.LSTM(6, 8, batch_first=True)))
    data = [data_of((6, 2, 6), 1)[0]]
    slim = removal(model, data[0], hidden_dimension(model.rnn)).apply(model)
    recovered = structprune.recover(slim, model, data)
    report = structprune.recovery_report(recovered)
    errors = {each.name: each.error for each in report.candidates}
    assert errors[report.kept] == min(errors.values())
    assert all(row.after <= row.before for row in report.layers)


class Siamese(nn.Module):
    """The same layer on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0] + self.rnn(x.flip(1))[0])


class Unrolled(nn.Module):
    """A cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


@pytest.mark.parametrize(
    ("make", "dimension", "layer", "why"),
    [(Siamese, "rnn.weight_hh_l0", "rnn", "several places"), (Unrolled, "cell.weight_hh", "cell", "loop")],
)
def test_what_is_not_solved_is_left_with_the_reason(
    make: type[nn.Module], dimension: str, layer: str, why: str
) -> None:
    model, data = jittered(make()), data_of(SEQUENCES)
    slim = removal(model, data[0], (dimension, 1)).apply(model)
    recovered = structprune.recover(slim, model, data)
    assert why in structprune.recovery_report(recovered).skipped[layer]
    name = dimension.replace("hh", "ih")
    assert torch.equal(recovered.get_parameter(name), slim.get_parameter(name))
    assert error(recovered, model, data) <= error(slim, model, data)


def test_half_precision() -> None:
    model, data = jittered(Tagged(nn.LSTM(6, 8, 2, batch_first=True))), data_of(SEQUENCES)
    copied(model.rnn)
    slim = removal(model, data[0], hidden_dimension(model.rnn)).apply(model)
    narrow = copy.deepcopy(slim).bfloat16()
    recovered = structprune.recover(narrow, copy.deepcopy(model).bfloat16(), [x.bfloat16() for x in data])
    assert recovered.rnn.weight_hh_l0.dtype == torch.bfloat16
    assert error(recovered.double(), model, data) < 0.1 * error(slim, model, data)


class Unbatched(nn.Module):
    """A single sequence, whose steps are the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize("shape", [(160, 6), (40, 3, 6)])
def test_steps_that_are_the_first_dimension_are_held_out(shape: tuple[int, ...], solved_on: list[Tensor]) -> None:
    model, data = jittered(Unbatched()), data_of(shape, 1)
    data[0][-(shape[0] // 16) :] = 100.0
    copied(model.rnn)
    slim = removal(model, data[0], ("rnn.weight_hh_l0", 1)).apply(model)
    recovered = structprune.recover(slim, model, data)
    held_out = structprune.recovery_report(recovered).held_out
    assert held_out == shape[0] // 16
    assert len(solved_on[0]) == (shape[0] - held_out) * (shape[1] if len(shape) == 3 else 1)
    assert all(bool((rows < 50).all()) for rows in solved_on)
    assert error(slim, model, data) > 1e-2
    assert error(recovered, model, data) < EXACT


def test_layout_of_packed_rows() -> None:
    """Three sequences of 3, 2 and 1 steps."""
    layout = Layout.of(torch.tensor([3, 2, 1]))
    assert layout.before.tolist() == [0, 1, 2, 3, 4, 6]
    assert layout.reversal.tolist() == [5, 4, 2, 3, 1, 0]
    rows, first = torch.arange(6.0)[:, None], torch.tensor([[-1.0], [-2.0], [-3.0]])
    assert layout.shifted(rows, first).flatten().tolist() == [-1, -2, -3, 0, 1, 3]
    assert torch.equal(layout.reversed(layout.reversed(rows)), rows)


@pytest.mark.parametrize("projected", [False, True])
def test_a_cell_runs_as_torch_does(projected: bool) -> None:
    """The gates in front of their activations, and the hidden channels in front of the projection, give the states."""
    rnn = nn.LSTM(6, 8, proj_size=3 if projected else 0).double()
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    start = torch.zeros(1, 4, 3 if projected else 8).double(), torch.zeros(1, 4, 8).double()
    parameters = list(rnn.parameters())
    call = RecurrentCall.of("lstm", (x, start, parameters, True, 1, 0.0, False, False, False))
    (cell,) = call.cells
    assert isinstance(cell, Cell)
    assert (cell.projection is not None) == projected
    states = cell.run(call.x, call.first(0), call.layout)
    torch.testing.assert_close(states, call.as_rows(rnn(x)[0]))
    gates = cell.from_input(call.x) + cell.from_state(call.layout.shifted(states, start[0][0]))
    hidden = cell.before_projection(gates, start[1][0], call.layout)
    torch.testing.assert_close(hidden if cell.projection is None else hidden @ cell.projection.T, states)


def _recovered_on(data: list[Tensor]) -> dict[str, Tensor]:
    model = jittered(Tagged(nn.GRU(6, 8, batch_first=True)))
    slim = removal(model, data[0], hidden_dimension(model.rnn)).apply(model)
    return structprune.recover(slim, model, data).state_dict()


def _on_a_rank(rank: int) -> dict[str, Tensor]:
    return _recovered_on(data_of(SEQUENCES, 4)[2 * rank : 2 * rank + 2])


@needs_distributed
def test_two_ranks_solve_what_one_process_does(tmp_path: Path) -> None:
    one, other = on_two_ranks(_on_a_rank, tmp_path)
    alone = _recovered_on(data_of(SEQUENCES, 4))
    for key, value in alone.items():
        torch.testing.assert_close(one[key], value)
        assert torch.equal(one[key], other[key])
