"""`recover` returns the best of what it was given, the same with its norms recalibrated, and what it solved."""

from __future__ import annotations

import pytest
import torch
from support.recovery_nets import IMAGES, data_of, jittered, removal
from torch import nn

import structprune
from structprune.forwards.turns import Turns
from structprune.recovery import candidates
from structprune.recovery.candidates import HeldOut, pieces_of


def wide_net(seed):
    """Layers of 64 features, far more than the few samples that the tests give; norms with statistics of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        widths = ((12, 64), (64, 64), (64, 64))
        blocks = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in widths]
        model = nn.Sequential(*blocks, nn.Linear(64, 8)).double().train()
        with torch.no_grad():
            for _ in range(50):
                model(torch.randn(256, 12, dtype=torch.float64))
    return model.eval()


def few(samples, seed):
    return torch.randn(samples, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(model, original, x):
    with torch.no_grad():
        return float((model(x) - original(x)).norm() / original(x).norm())


@pytest.mark.parametrize("samples", [6, 8, 16])
def test_it_is_never_worse_on_held_out_samples_than_what_came_in_or_recalibrated(samples):
    kept = set()
    for seed in range(6):
        model, x = wide_net(seed), few(samples, seed)
        slim = structprune.prune(model, x, ratio=0.5)
        recovered = structprune.recover(slim, model, [x])
        report = structprune.recovery_report(recovered)
        held_out = x[-1:]
        found = error(recovered, model, held_out)
        assert found <= error(slim, model, held_out) * (1 + 1e-9)
        assert found <= error(structprune.recalibrate(slim, [x]), model, held_out) * (1 + 1e-9)
        errors = {row.name: row.error for row in report.candidates}
        assert errors[report.kept] == pytest.approx(found) == pytest.approx(min(errors.values()))
        kept.add(report.kept)
    assert len(kept) > 1  # so few samples do not always suffice to solve on


def test_what_solving_makes_worse_is_not_returned():
    model, x = wide_net(0), few(8, 0)
    slim = structprune.prune(model, x, ratio=0.5)
    # The held-out sample is another kind of data: nothing that is learned of the rest can be right there.
    x[:-1] = x[:1] + 1e-3 * x[:-1]
    recovered = structprune.recover(slim, model, [x])
    report = structprune.recovery_report(recovered)
    assert report.kept in ("as given", "norms recalibrated")
    assert not any(row.changed or row.producers for row in report.layers)
    assert f"output, {report.kept}: error" in str(report)
    parameters = dict(slim.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in recovered.named_parameters())


def test_the_layers_alone_are_tried_where_producers_make_it_worse(monkeypatch):
    model, data = jittered(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))), data_of(IMAGES)
    slim = removal(model, data[0], "0").apply(model)
    offer = candidates.Candidates.offer

    def spoiled(self, name, model):
        if name.endswith("producers"):
            model[2].bias += 1e3
        return offer(self, name, model)

    monkeypatch.setattr(candidates.Candidates, "offer", spoiled)
    recovered = structprune.recover(slim, model, data)
    assert structprune.recovery_report(recovered).kept == "layers solved"
    alone = structprune.recover(slim, model, data, rounds=0)
    assert torch.equal(recovered[2].weight, alone[2].weight)


class TwoOutputs(nn.Module):
    """Features that nobody needs, and the answer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)

    def forward(self, x):
        features = torch.relu(self.first(x))
        return features, self.second(features)


def test_an_output_that_lost_channels_is_compared_on_those_that_are_left():
    model, data = jittered(TwoOutputs()), data_of(IMAGES)
    slim = structprune.prune(model, data[0], ratio=0.5, round_to=1, outputs=["1"])
    assert slim(data[0])[0].shape[1] == 4
    report = structprune.recovery_report(structprune.recover(slim, model, data))
    assert all(row.error < 1e-12 for row in report.candidates)  # the channels that are left are the original's


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ((128, 128, 40), (8, 8, 2)),
        ((24, 6), (1, 1)),
        ((4, 4, 4, 4), (0, 0, 0, 1)),
        ((1,) * 6, (0,) * 5 + (1,)),
        ((4,), (0,)),
    ],
)
def test_which_samples_are_held_out(sizes, held):
    assert HeldOut.of([torch.zeros(size, 3) for size in sizes]).held == held


def test_positions_follow_their_samples():
    held_out = HeldOut((24,), (1,), Turns((24,), (0,)), 1)
    assert held_out.solved_on(0, 240) == 230
    assert held_out.solved_on(0, 24) == 23


def test_held_out_samples_change_no_weight():
    model, (x,) = jittered(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))), data_of(IMAGES, 1)
    slim = removal(model, x, "0").apply(model)
    other = x.clone()
    other[-1] = 0.5 * other[-1].flip(0)
    one, two = (structprune.recover(slim, model, [batch]) for batch in (x, other))
    assert structprune.recovery_report(one).held_out == 1
    assert torch.equal(one[2].weight, two[2].weight)


def pieces(batches):
    held_out = HeldOut.of(batches)
    return pieces_of(batches, held_out.samples, held_out.held)


def test_held_out_samples_of_like_batches_are_compared_together():
    batches = [torch.arange(20.0)[:, None] + 100 * number for number in range(4)]
    (piece,) = pieces(batches)
    assert (piece.samples, piece.held) == (20, 4)
    assert piece.inputs.flatten().tolist() == [*range(16), 19.0, 119.0, 219.0, 319.0]


def test_pieces_are_as_large_as_batches():
    batches = [{"x": torch.full((6, 2), float(number)), "mask": None, "scale": 0.5} for number in range(14)]
    found = pieces(batches)
    assert [(len(piece.inputs["x"]), piece.held) for piece in found] == [(6, 6), (6, 6), (6, 2)]
    assert [piece.inputs["x"][-1, 0] for piece in found] == [5, 11, 13]
    assert all(piece.inputs["mask"] is None and piece.inputs["scale"] == 0.5 for piece in found)


@pytest.mark.parametrize(
    "batches",
    [
        [torch.rand(20, 2)],
        [(torch.rand(20, 2), torch.zeros(7)) for _ in range(3)],  # a table that is none of samples
        [(torch.rand(20, 2), object()) for _ in range(3)],
        [torch.rand(20, 2), torch.rand(20, 3), torch.rand(24, 2)],
        [torch.rand(1, 2) for _ in range(5)],
    ],
)
def test_batches_that_cannot_be_joined_stay_whole(batches):
    chosen = [batch for batch, held in zip(batches, HeldOut.of(batches).held, strict=True) if held]
    for piece, batch in zip(pieces(batches), chosen, strict=True):
        assert tensors(piece.inputs) == pytest.approx(tensors(batch))
        assert piece.held == 1


def tensors(batch):
    first = batch[0] if isinstance(batch, tuple) else batch
    return first.flatten().tolist()


def test_a_table_that_is_in_all_batches_stays_as_it_is():
    table = torch.rand(20)
    batches = [(torch.rand(20, 2), table.clone()) for _ in range(2)]
    (piece,) = pieces(batches)
    assert torch.equal(piece.inputs[1], table)
    assert torch.equal(piece.inputs[0][-2:], torch.stack([batch[0][-1] for batch in batches]))


def test_a_tensor_that_is_given_twice_is_one_in_a_piece():
    x = [torch.rand(20, 2) for _ in range(2)]
    batches = [(each, each) for each in x]
    (piece,) = pieces(batches)
    assert piece.inputs[0] is piece.inputs[1]
    assert torch.equal(piece.inputs[0][-2:], torch.stack([each[-1] for each in x]))


def test_the_error_of_pieces_is_that_of_whole_batches(monkeypatch):
    model, data = jittered(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))), data_of(IMAGES)
    slim = removal(model, data[0], "0").apply(model)
    together = structprune.recovery_report(structprune.recover(slim, model, data))
    monkeypatch.setattr(candidates, "_form", lambda batch, samples: None)
    apart = structprune.recovery_report(structprune.recover(slim, model, data))
    assert [row.error for row in together.candidates] == pytest.approx([row.error for row in apart.candidates])
