"""Branches and blocks: found by their sums, taken out exactly, refused where they cannot go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.branch_nets import CHOSEN, Convolved, Looped, Parallel, Residual, Scaled, build, names, stack_of, x_of
from support.command_line import as_json
from support.depth import error_without
from support.depth_nets import transformer
from torch import Tensor, nn

import structprune
from structprune.depth import steps
from structprune.errors import PlanError

SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "add": lambda x, f: torch.add(x, f, alpha=2),
    "add_": lambda x, f: f.add_(x),
    "iadd": lambda x, f: x.clone().add_(f),
    "x - f": lambda x, f: x - f,
    "stack": lambda x, f: torch.stack([x, f]).sum(0),
    "sum": lambda x, f: sum([x, f]),
    "three": lambda x, f: x + f + x.tanh(),
    "gain on x": lambda x, f: 0.5 * x + f,
    "to": lambda x, f: x.to(torch.float64) + f,
}


@pytest.mark.parametrize("combine", SUMS.values(), ids=SUMS)
def test_a_term_of_a_sum_is_found_and_removed_exactly(combine):
    model, x = stack_of(Residual(combine), Residual(combine)), x_of()
    found = structprune.branches(model, x)
    assert len(found) == 2
    assert all(set(branch.layers) == {f"{i}.norm", f"{i}.layer"} for i, branch in zip((1, 2), found, strict=True))
    slim, error = error_without(model, x, [found[0].name])
    assert error < 1e-12
    left = sum(p.numel() for p in slim.parameters())
    assert left <= sum(p.numel() for p in model.parameters()) - found[0].params
    assert found[0].params == 6 * 6 + 6 + 2 * 6


def test_a_branch_scaled_by_a_gain_takes_it_along_and_leaves_its_stack():
    model, x = stack_of(Scaled(torch.add), Scaled(torch.add)), x_of()
    first = structprune.branches(model, x)[0]
    assert (first.name, first.identity, "1.gain" in first.tensors) == ("1", True, True)
    slim, error = error_without(model, x, ["1"])
    assert error < 1e-12
    assert len(slim) == 3
    assert torch.equal(slim[1].gain, model[2].gain)


def test_branches_of_one_input_go_alone_or_together():
    model, x = stack_of(Parallel()), x_of()
    assert names(model, x) == ["1 (left)", "1 (right)", "1"]
    for chosen in (["1 (left)"], ["1 (right)"], ["1 (left)", "1 (right)"], ["1"]):
        slim, error = error_without(model, x, chosen)
        assert error < 1e-12
    assert len(slim) == 2


def test_the_relu_behind_a_sum_goes_where_its_input_is_one_already():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), Convolved(), Convolved()).double().eval()
    x = x_of(2, 3, 8, 8)
    assert [(b.name, b.identity) for b in structprune.branches(model, x)] == [("3", True), ("4", True)]
    slim, error = error_without(model, x, ["3", "4"])
    assert error == 0
    assert len(slim) == 3


def test_the_relu_stays_where_its_input_is_none():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Convolved()).double().eval(), x_of(2, 3, 8, 8)
    (branch,) = structprune.branches(model, x)
    assert (branch.name, branch.identity) == ("1 (conv ... bn)", False)
    slim, error = error_without(model, x, [branch.name])
    assert error < 1e-12
    assert isinstance(slim[1], Convolved)
    assert slim[1].conv is None


def test_either_side_of_a_block_that_strides_may_go_but_not_both():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Convolved(stride=2)).double().eval(), x_of(2, 3, 8, 8)
    assert names(model, x) == ["1 (conv ... bn)", "1 (shortcut)"]
    for name in names(model, x):
        assert error_without(model, x, [name])[1] < 1e-12
    with pytest.raises(PlanError, match=r"nothing is left|Nothing would be left"):
        structprune.remove_branches(model, x, names(model, x))


def test_what_else_reads_inside_a_branch_stays():
    class Tapped(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inner = self.norm(x)
            return x + self.layer(inner), inner

    torch.manual_seed(0)
    model, x = Tapped(torch.add).double().eval(), x_of()
    (branch,) = structprune.branches(model, x)
    assert branch.layers == ("layer",)
    slim, error = error_without(model, x, [branch.name])
    assert error < 1e-12
    assert slim.norm is not None
    assert slim.layer is None


def test_a_list_that_is_looped_over_gets_shorter_and_its_items_know_their_numbers():
    torch.manual_seed(0)
    model, x = Looped().double().eval(), x_of()
    slim, error = error_without(model, x, ["layers.1"])
    assert error < 1e-12
    assert [layer.number for layer in slim.layers] == [0, 1]
    assert [layer.number for layer in model.layers] == [0, 1, 2]
    assert sorted(slim.state_dict()) == sorted(n for n in model.state_dict() if not n.startswith("layers.2"))


def test_an_item_of_a_list_that_is_indexed_gives_back_what_it_gets():
    torch.manual_seed(0)
    model, x = Looped(by_number=True).double().eval(), x_of()
    slim, error = error_without(model, x, ["layers.1"])
    assert error < 1e-12
    assert len(slim.layers) == 3
    assert not list(slim.layers[1].parameters())
    assert [layer.number for layer in slim.layers] == [0, 1, 2]


def test_a_forward_with_a_flag_stays_as_it_is_written():
    class Flagged(Residual):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            inner = x + self.layer(self.norm(x))
            inner = inner * self.gain
            return inner if mask is None else inner * mask

    torch.manual_seed(0)
    model, x = Flagged(torch.add).double().eval(), x_of()
    slim, error = error_without(model, x, names(model, x))
    assert error < 1e-12
    assert torch.equal(slim(x, torch.zeros_like(x)), torch.zeros_like(x))
    assert sum(p.numel() for p in slim.parameters()) == 6


def test_a_forward_that_differs_in_training_stays_as_it_is_written():
    class Noisy(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.layer(self.norm(x))
            return x * 2 if self.training else x.tanh()

    torch.manual_seed(0)
    model, x = Noisy(torch.add).double().eval(), x_of()
    slim, error = error_without(model, x, names(model, x))
    assert error < 1e-12
    assert torch.equal(slim.train()(x), x * 2)


def test_a_sum_in_place_is_rewritten_where_the_model_cannot_run_in_training_without_labels():
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Convolved(stride=2), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("labels are needed")
            return self.head(self.block(x))

    torch.manual_seed(0)
    model, x = Labelled().double().eval(), x_of(2, 4, 8, 8)
    slim, error = error_without(model, x, ["block (conv ... bn)"])
    assert error < 1e-12
    assert slim.block.conv is None
    # The block by itself can be trained.
    assert slim.block.train()(x).shape == (2, 4, 4, 4)


class Shared(nn.Module):
    """One block, run twice, and its weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled(torch.add)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.block(self.block(x)), self.block.layer.weight)


def test_a_module_that_is_called_twice_loses_its_branch_in_both_and_keeps_what_lives():
    torch.manual_seed(0)
    model, x = Shared().double().eval(), x_of()
    (branch,) = structprune.branches(model, x)
    assert "block.layer.weight" not in branch.tensors
    slim, error = error_without(model, x, [branch.name])
    assert error < 1e-12
    assert sorted(slim.state_dict()) == ["block.layer.weight"]


def test_a_tied_weight_lives_on_under_its_other_name():
    torch.manual_seed(0)
    model, x = stack_of(Scaled(torch.add), Scaled(torch.add)), x_of()
    model[2].layer.weight = model[1].layer.weight
    slim, error = error_without(model, x, ["1"])
    assert error < 1e-12
    assert torch.equal(slim[1].layer.weight, model[1].layer.weight)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_plain_network_has_no_branches():
    model, x = stack_of(nn.ReLU()), x_of()
    assert structprune.branches(model, x) == ()
    with pytest.raises(PlanError, match=r"no branch 'anything'.*It has none"):
        structprune.remove_branches(model, x, ["anything"])


def test_an_unknown_name_is_answered_with_those_that_are_there():
    with pytest.raises(PlanError, match=r"no branch '9'.*It has '1'"):
        structprune.remove_branches(stack_of(Scaled(torch.add)), x_of(), ["9"])


def test_a_hand_written_norm_and_an_embedding_are_no_branches():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 6), nn.Embedding(5, 6)
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            return (x - x.mean(-1, keepdim=True)) * self.scale + self.scale

    assert structprune.branches(Summed().eval(), torch.randint(0, 9, (2, 5))) == ()


def test_memory_that_is_written_to_and_still_read_is_refused():
    class Written(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = x + self.layer(self.norm(x))
            y.mul_(self.gain)
            return y + x

    torch.manual_seed(0)
    model, x = Written(torch.add).double().eval(), x_of()
    name = next(b.name for b in structprune.branches(model, x) if "layer" in b.name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="write into a tensor"):
        structprune.remove_branches(model, x, [name], inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model) is Written


def test_a_branch_whose_size_others_use_is_refused_and_nothing_changes():
    class Measured(Residual):
        def forward(self, x: Tensor) -> Tensor:
            inner = self.layer(self.norm(x))
            flat = inner.flatten()
            return (x + inner).reshape(flat.shape[0] // 6, 6)

    torch.manual_seed(0)
    model, x = Measured(torch.add).double().eval(), x_of()
    (branch,) = structprune.branches(model, x)
    slim = None
    try:
        slim = structprune.remove_branches(model, x, [branch], inplace=True)
    except PlanError:
        assert type(model) is Measured
        assert model.layer is not None
    if slim is not None:
        assert torch.allclose(slim(x), x.reshape(2, 6))


def test_a_removal_that_does_not_do_what_was_meant_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    model, x = build(), x_of()
    wanted, parts = model(x), [*model]

    def too_little(model, steps, undo):
        return {}

    monkeypatch.setattr("structprune.depth.removal.carry_out", too_little)
    with pytest.raises(PlanError, match=r"it (still )?runs"):
        structprune.remove_branches(model, x, ["1"], inplace=True)

    def too_much(model, steps, undo):
        moved = carry_out(model, steps, undo)
        del model._modules["1"]
        return moved

    carry_out = steps.carry_out
    monkeypatch.setattr("structprune.depth.removal.carry_out", too_much)
    with pytest.raises(PlanError, match=r"it (lacks|runs)"):
        structprune.remove_branches(model, x, ["1"], inplace=True)
    assert [*model] == parts
    assert torch.equal(model(x), wanted)


def test_wrappers_stay_around_the_model():
    model, x = nn.DataParallel(build()), x_of()
    slim = structprune.remove_branches(model, x, CHOSEN)
    assert isinstance(slim, nn.DataParallel)
    assert torch.equal(slim.module(x), structprune.remove_branches(model.module, x, CHOSEN)(x))


def test_a_rewritten_forward_refuses_flags_that_it_was_not_made_for():
    class Choosing(Convolved):
        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            out = self.bn(self.conv(x))
            out += self.shortcut(x)
            return out * 2 if twice else out

    torch.manual_seed(0)
    model, x = nn.Sequential(Choosing(3, 2)).double().eval(), x_of(2, 3, 8, 8)
    slim, error = error_without(model, x, ["0 (conv ... bn)"])
    assert error < 1e-12
    with pytest.raises(structprune.errors.TraceError, match="argument twice of 0 is True"):
        slim[0](x, twice=True)


def test_info_and_explain_name_the_branches_of_a_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    model, x = transformer()
    found = as_json("info", "support.depth_nets:residuals", "--layer", "2.up")
    assert [(each["name"], each["layers"]) for each in found["branches"]] == [
        (str(n), [f"{n}.up", f"{n}.down"]) for n in range(1, 6)
    ]
    assert "goes as a whole with branch '2': 280 parameters" in found["layers"]["2.up"]
    graph = structprune.DependencyGraph(model, x)
    assert graph.branches() == structprune.branches(model, x)
    named = [line.strip() for line in graph.explain("1.up").splitlines() if "goes as a whole" in line]
    # The block, and the branch of its MLP.
    assert [line.split("'")[1] for line in named] == ["1", "1 (norm2 ... down)"]
