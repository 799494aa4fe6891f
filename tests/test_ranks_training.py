"""`finetune` by two ranks: a model in DistributedDataParallel, and one that is sharded by ``fully_shard``."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_model
from support.ranks import needs_distributed, on_two_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import structprune
from structprune.distributed import rank_and_count
from structprune.errors import LoadError, PlanError
from structprune.training import FeatureDistillation, distillation_loss, finetune, load_pruned
from structprune.training.average import fill
from structprune.training.ranks import whole_of

EPOCHS, BATCH = 3, 8
KINDS = ("distributed", "sharded")


def dense(norm=True):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16)] if norm else [nn.Linear(6, 16)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def pruned(norm=True):
    return structprune.prune(dense(norm), torch.randn(2, 6).double(), ratio=0.3, round_to=1)


def wrapped(kind, norm=True):
    """A pruned model for all ranks together; 11 channels do not divide evenly by two ranks."""
    model = pruned(norm)
    if kind == "distributed":
        return DistributedDataParallel(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def batches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count * BATCH, 6, generator=generator).double()
    return list(zip(x.split(BATCH), (x[:, 0] > x[:, 1]).long().add((x[:, 2] > 1).long()).split(BATCH), strict=True))


def share(batches):
    """Each rank gets its half of every batch, so that a step of both is the step of one process."""
    rank, count = rank_and_count()
    size = BATCH // count
    return [tuple(part[rank * size : (rank + 1) * size] for part in batch) for batch in batches]


def weights(model):
    return {name.removeprefix("module."): whole_of(value).clone() for name, value in model.state_dict().items()}


def trained(model, **options):
    options = {"epochs": EPOCHS, "lr": 0.05, "clip": 1.0, "progress": False, **options}
    return finetune(model, share(batches(4, 1)), share(batches(3, 2)), **options)


def of_both(rank):
    """Weights, scores and losses after training with a teacher and an average, and without norms; by kind."""
    found = {}
    for kind in KINDS:
        model = wrapped(kind, norm=False)
        result = trained(model, teacher=dense(norm=False), ema=0.9)
        found[kind] = weights(model), result.score, result.epoch, [epoch.loss for epoch in result.history]
    return found


@needs_distributed
def test_two_ranks_train_as_one_process_with_both_shares(tmp_path):
    alone = pruned(norm=False)
    expected = trained(alone, teacher=dense(norm=False), ema=0.9)
    for found in on_two_ranks(of_both, tmp_path):
        for kind in KINDS:
            after, score, epoch, losses = found[kind]
            torch.testing.assert_close(after, weights(alone), rtol=1e-9, atol=1e-9)
            assert (score, epoch) == (pytest.approx(expected.score), expected.epoch)
            assert losses == pytest.approx([epoch.loss for epoch in expected.history])


# -- going on from a checkpoint --------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for a kill."""


def killed_and_resumed(rank, folder):
    """Weights of an uninterrupted run, and of one that both ranks leave after the second epoch, and go on with."""

    def kill(epoch):
        if epoch == 2:
            raise KilledError

    found = {}
    for kind in KINDS:
        options = {"ema": 0.9, "teacher": dense()}
        whole = wrapped(kind)
        whole_run = trained(whole, **options)
        with pytest.raises(KilledError):
            trained(wrapped(kind), on_epoch=kill, checkpoint=folder / kind, **options)
        model = wrapped(kind)
        resumed = trained(model, checkpoint=folder / kind, **options)
        same = all(torch.equal(value, weights(whole)[name]) for name, value in weights(model).items())
        found[kind] = same, resumed.score == whole_run.score, weights(model)
    return found


@needs_distributed
def test_killed_ranks_end_as_uninterrupted_ones_and_one_process_goes_on_from_them(tmp_path):
    first, second = on_two_ranks(killed_and_resumed, tmp_path, tmp_path)
    for kind in KINDS:
        assert first[kind][:2] == second[kind][:2] == (True, True)
        torch.testing.assert_close(first[kind][2], second[kind][2], rtol=0, atol=0)
        # The checkpoint of a finished run holds whole tensors: a single process finds the best ones there.
        model = pruned()
        result = trained(model, checkpoint=tmp_path / kind, ema=0.9, teacher=dense())
        assert len(result.history) == EPOCHS
        torch.testing.assert_close(weights(model), first[kind][2], rtol=0, atol=0)
        assert json.loads((tmp_path / kind / "progress.json").read_text())["epoch"] == EPOCHS


# -- what all ranks have to have alike -------------------------------------------------------------------------------


def unequal(rank):
    """What is said of other numbers of batches, and of a rank that fails; then whether the model is as it was."""
    said = []
    data = share(batches(4, 1))

    def broken():
        yield from data[:2]
        if rank:
            raise OSError("the disk is gone")
        yield from data[2:]

    class Loader:
        def __init__(self, make):
            self.make = make

        def __iter__(self):
            return iter(self.make())

    for train in (data[: 4 - rank], Loader(lambda: data[: 4 - rank]), Loader(broken)):
        model = wrapped("distributed")
        before = copy.deepcopy(weights(model))
        try:
            finetune(model, train, data, epochs=1, progress=False)
        except (PlanError, OSError) as error:
            said.append(str(error))
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    return said


@needs_distributed
def test_unequal_shares_and_a_rank_that_fails_are_told(tmp_path):
    first, second = on_two_ranks(unequal, tmp_path)
    for said in (first, second):
        assert said[0].startswith("The ranks have [4, 3] batches in train.")
        assert "The ranks are not at the same place of finetune" in said[1]
    assert first[2].startswith("Rank 1 of 2 failed in finetune")
    assert second[2] == "the disk is gone"


# -- distillation in a loop of one's own, and models that are not wrapped --------------------------------------------


def by_hand(rank):
    """Steps on the teacher's logits and features; and a model that each rank trains for itself."""
    found = {}
    for kind in KINDS:
        model, teacher = wrapped(kind), dense().eval()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        (x, _), losses = share(batches(1, 1))[0], []
        for _ in range(3):
            with FeatureDistillation(model, teacher, ["3"]) as features:
                with torch.no_grad():
                    wanted = teacher(x)
                loss = distillation_loss(model(x), wanted) + features.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found[kind] = losses[-1] < losses[0], {k: v for k, v in weights(model).items() if k.startswith("3.")}
    alone = pruned()
    finetune(alone, batches(2 + rank, 1), batches(1, 2), epochs=1, progress=False)
    found["alone"] = weights(alone)
    return found


@needs_distributed
def test_features_are_distilled_and_an_unwrapped_model_is_trained_by_each_rank_for_itself(tmp_path):
    first, second = on_two_ranks(by_hand, tmp_path)
    for kind in KINDS:
        assert first[kind][0]
        assert second[kind][0]
        torch.testing.assert_close(first[kind][1], second[kind][1], rtol=0, atol=0)
    alone = pruned()
    finetune(alone, batches(2, 1), batches(1, 2), epochs=1, progress=False)
    torch.testing.assert_close(first["alone"], weights(alone), rtol=0, atol=0)
    assert not torch.equal(first["alone"]["0.weight"], second["alone"]["0.weight"])


def test_parts_of_a_model_that_is_not_sharded_are_the_whole():
    model, other = dense(), dense()
    nn.init.zeros_(other[0].weight)
    fill(other, dict(model.state_dict()))
    assert torch.equal(other[0].weight, model[0].weight)


# -- planned without weights, sharded, and loaded --------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weight is the head's, and a norm with statistics."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.norm = nn.Embedding(7, 6), nn.Linear(6, 9), nn.BatchNorm1d(9)
        self.down, self.head = nn.Linear(9, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.relu(self.norm(self.up(x)))))


def loaded(rank, folder):
    """A model that is pruned on meta, sharded, given its weights, trained; its weights before and after."""
    plan = structprune.Plan.from_json((folder / "plan.json").read_text())
    with torch.device("meta"):
        model = Tied()
    model = plan.apply(model)
    for layer in (model.up, model.down):
        fully_shard(layer)
    model = load_pruned(fully_shard(model), plan, folder)
    before = weights(model)
    size = max(tensor.to_local().numel() / tensor.numel() for tensor in model.parameters())
    tokens = [(torch.arange(4) + number, torch.arange(4)) for number in range(rank, 4, 2)]
    result = finetune(model, tokens, tokens, epochs=2, progress=False)
    return before, size, len(result.history), weights(model)


@needs_distributed
def test_a_plan_made_without_weights_is_applied_while_shards_are_loaded(tmp_path):
    whole = Tied()
    nn.init.uniform_(whole.norm.running_var, 0.5, 2)
    save_model(whole, str(tmp_path / "model.safetensors"))
    with torch.device("meta"):
        model = Tied()
    tokens = torch.zeros(2, dtype=torch.long)
    plan = structprune.plan(model, tokens, ratio=0.4, importance="random", round_to=1, ignore=["embedding"])
    (tmp_path / "plan.json").write_text(plan.to_json())
    first, second = on_two_ranks(loaded, tmp_path, tmp_path)
    torch.testing.assert_close(first[0], weights(plan.apply(whole)), rtol=0, atol=0)
    assert first[0]["up.weight"].shape[0] < 9
    assert first[1] < 0.7  # a rank holds about half of each tensor
    assert first[2] == 2
    torch.testing.assert_close(first[3], second[3], rtol=0, atol=0)
    assert not torch.equal(first[3]["up.weight"], first[0]["up.weight"])


def test_weights_that_do_not_fit_are_refused():
    whole = dense()
    plan = structprune.plan(whole, torch.randn(2, 6).double(), ratio=0.3, round_to=1)
    slim, state = plan.apply(whole), whole.state_dict()
    for wrong, text in (
        ({name: value for name, value in state.items() if name != "3.bias"}, "weights lacks '3.bias'"),
        ({**state, "extra": torch.zeros(1)}, "weights holds 'extra'"),
        ({**state, "3.bias": torch.zeros(40)}, r"'3.bias' has the shape \[40\] in weights"),
        ({**state, "5.bias": torch.zeros(4)}, r"'5.bias' has the shape \[4\] after pruning and \[3\] in the model"),
    ):
        with pytest.raises(LoadError, match=text):
            load_pruned(slim, plan, wrong)
    with torch.device("meta"):
        other = dense()
        other.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(LoadError, match="The buffer 'table' is on the meta device"):
        load_pruned(plan.apply(other), plan, state)
