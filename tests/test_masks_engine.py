"""`PruningEngine`: steps, events, kills, graphs, and the trainers that it runs beside."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from structprune import masks
from structprune.errors import PlanError
from structprune.masks import PruningEngine, Saliency, gradual
from structprune.masks.unit_graph import unit_graph

F64 = torch.float64
X = torch.randn(4, 3, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = nn.functional.max_pool2d(x + torch.relu(self.conv(x)), 2)
        return self.fc(x.flatten(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Residual().double().eval()


def engine_of(model: nn.Module, schedule=(0.3, 0.5, 0.6), **options) -> PruningEngine:
    return PruningEngine(model, Saliency.magnitude, schedule, example_inputs=X[:1], **options)


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["model", "layer", "tensor"])
def test_shares_are_of_everything_and_what_is_gone_stays_gone(scope):
    engine = engine_of(net(), scope=scope)
    seen = [engine.mask]
    while not engine.done:
        mask = engine.step()
        groups = [list(mask)] if scope == "model" else [[name] for name in mask]
        for names in groups:
            part = mask.only(names)
            assert part.entries - part.kept == round(engine.schedule[engine.taken - 1] * part.entries)
        assert (mask & ~seen[-1]).kept == 0
        seen.append(mask)
    assert [engine.mask_of(step).hamming(mask) for step, mask in enumerate(seen)] == [0, 0, 0, 0]
    with pytest.raises(PlanError, match="All 3 steps are taken"):
        engine.step()


def test_what_ten_per_cent_is_depends_on_the_scope():
    model = net()
    with torch.no_grad():
        model.stem.weight.mul_(1e-3)
    over_model, by_tensor = engine_of(model), engine_of(net(), scope="tensor")
    over_model.step()
    by_tensor.step()
    assert over_model.mask.only(["stem.weight"]).kept == 0
    assert by_tensor.mask.only(["stem.weight"]).kept == 113  # 70% of 162


def test_masks_hold_while_it_is_trained():
    model = net()
    engine = engine_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    while not engine.done:
        engine.step()
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    assert masks.sparsity(model).zeros == engine.mask.entries - engine.mask.kept
    used = model(X)
    values = {name: tensor.clone() for name, tensor in model.named_parameters()}
    engine.undo()
    assert not prune.is_pruned(model)
    assert all(torch.equal(values[f"{name}_orig"], model.get_parameter(name)) for name in engine.mask)
    assert not torch.allclose(model(X), used)


@pytest.mark.parametrize(
    ("schedule", "shares"), [("linear", [0.2, 0.4]), ("cubic", [0.35, 0.4]), ("one-shot", [0.4, 0.4])]
)
def test_schedules(schedule, shares):
    assert gradual(0.4, 2, schedule) == pytest.approx(shares)
    assert gradual(0.4, 2, lambda t: t) == pytest.approx([0.2, 0.4])


# -- events ----------------------------------------------------------------------------------------------------------


def test_events_come_in_order_and_handlers_by_priority():
    engine, seen = engine_of(net()), []
    for event in ("started", "step_started", "saliency_computed", "mask_updated", "step_completed", "compacted"):
        engine.on(event, lambda _, event=event: seen.append(event))
    engine.on("step_completed", lambda _: seen.append("late"), priority=-1)
    engine.on("step_completed", lambda e: seen.append(f"first of {e.taken}"), priority=5)
    engine.step()
    engine.compact()
    assert seen == [
        "started", "step_started", "saliency_computed", "mask_updated", "first of 1", "step_completed", "late",
        "compacted",
    ]  # fmt: skip


def test_handlers_are_filtered():
    engine, seen = engine_of(net(), [0.1, 0.2, 0.3, 0.4]), []

    @engine.on("step_completed", every=2)
    def even(engine):
        seen.append(("every", engine.taken))

    @engine.on("step_completed", once=3)
    def third(engine):
        seen.append(("once", engine.taken))

    while not engine.done:
        engine.step()
    assert seen == [("every", 2), ("once", 3), ("every", 4)]


# -- graph and compact -----------------------------------------------------------------------------------------------


def test_the_graph_of_a_dense_network_has_all_units():
    graph = engine_of(net()).graph()
    # The sum ties stem and conv, so they are one set of six channels.
    assert len(graph) == 3 + 6 + 4
    assert graph.edges[("input", 0), ("stem", 0)]["weights"] == 9
    assert graph.edges[("stem", 0), ("fc", 3)]["weights"] == 16
    assert graph.edges[("stem", 0), ("stem", 1)]["weights"] == 9


def test_the_graph_follows_the_steps():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    scores = {"0.weight": torch.tensor([[1.0, 1], [9, 9], [9, 9]]), "2.weight": torch.tensor([[9.0, 9, 2], [9, 9, 2]])}
    engine = PruningEngine(model, lambda _: Saliency(scores), [2 / 12, 4 / 12], example_inputs=X[0, 0, :1, :2])
    engine.step()
    engine.step()
    assert sorted(engine.graph(0).nodes) == sorted(
        [("input", 0), ("input", 1), ("0", 0), ("0", 1), ("0", 2), ("2", 0), ("2", 1)]
    )
    assert ("0", 0) not in engine.graph(1)  # nothing comes in
    assert ("0", 2) in engine.graph(1)
    assert {("0", 0), ("0", 2)}.isdisjoint(engine.graph())  # nothing comes in; nothing goes out
    assert engine.graph().number_of_edges() == 4


def test_units_of_a_transposed_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 2, 2)).double()
    mask = Saliency.random(model, ["1.weight"]).mask(0.5)
    mask.apply(model)
    x = torch.randn(1, 4, 3, 3, dtype=F64)
    living = {"1.weight": mask["1.weight"]}
    graph = unit_graph(model, x, living)
    edges = {(a[1], b[1]): data["weights"] for a, b, data in graph.edges(data=True) if b[0] == "1"}
    left = mask["1.weight"].sum((2, 3))
    assert edges == {(i, o): int(left[i, o]) for i in range(6) for o in range(2) if left[i, o]}


def test_channels_that_a_grouped_convolution_couples_are_one_unit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 1, 1)).double()
    graph = unit_graph(model, torch.randn(1, 4, 3, 3, dtype=F64), {})
    inside = sum(data["weights"] for a, b, data in graph.edges(data=True) if (a[0], b[0]) == ("0", "1"))
    assert inside == model[1].weight.numel()
    assert {unit[0] for unit in graph} == {"input", "0", "1", "2"}


@pytest.mark.parametrize("step", [None, 1, 2, 3])
def test_compact_computes_what_the_masks_of_the_step_make(step):
    model = net()
    engine = engine_of(model, dim=0, scope="tensor", names=["stem.weight", "conv.weight"])
    while not engine.done:
        engine.step()
    now = model(X)
    slim = engine.compact(step)
    assert torch.equal(model(X), now)
    engine.undo()
    undo = engine.mask_of(step).apply(model)
    assert torch.allclose(slim(X), model(X), rtol=1e-10)
    undo()
    assert engine.compaction is not None
    assert engine.compaction.model is slim


def test_only_the_last_mask_is_kept_if_asked():
    engine = engine_of(net(), keep_masks=False)
    engine.step()
    engine.step()
    assert engine.mask_of(2).hamming(engine.mask) == 0
    with pytest.raises(PlanError, match=r"no mask of step 1: known are those of \[2\]"):
        engine.mask_of(1)


# -- kills -----------------------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def test_it_goes_on_after_a_kill_as_if_nothing_had_been(tmp_path):
    def run(killed_after: int) -> tuple[nn.Module, PruningEngine, list[int]]:
        seen: list[int] = []
        for start in (0, killed_after):
            model = net()
            engine = engine_of(model)
            engine.on("step_completed", lambda e: seen.append(e.taken), every=2)
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            if start:
                saved = torch.load(tmp_path / "checkpoint", weights_only=True)
                engine.load_state_dict(saved["engine"])
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
            while not engine.done and not (start == 0 and engine.taken == killed_after > 0):
                engine.step()
                train(model, optimizer)
            saved = {"engine": engine.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, tmp_path / "checkpoint")
            if engine.done:
                break
        return model, engine, seen

    whole, resumed = run(0), run(2)
    assert whole[1].mask_of(3).hamming(resumed[1].mask_of(3)) == 0
    assert whole[1].mask_of(1).hamming(resumed[1].mask_of(1)) == 0
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True))
    assert resumed[2] == whole[2] == [2]


# -- trainers --------------------------------------------------------------------------------------------------------


def test_beside_an_engine_of_ignite():
    ignite = pytest.importorskip("ignite.engine")
    model = net()
    trainer = ignite.Engine(lambda _engine, batch: model(batch).sum().item())
    engine = engine_of(model).attach(trainer)
    seen = []
    trainer.add_event_handler(ignite.Events.EPOCH_COMPLETED, lambda e: seen.append((e.state.epoch, engine.taken)))
    trainer.run([X], max_epochs=5)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3)]
    other = engine_of(net()).attach(trainer, ignite.Events.EPOCH_COMPLETED(every=2))
    trainer.run([X], max_epochs=9)
    assert other.taken == 2


# -- what is refused -------------------------------------------------------------------------------------------------


def nan_scores(model: nn.Module) -> Saliency:
    scores = dict(Saliency.magnitude(model))
    scores["fc.weight"][0, 0] = float("nan")
    return Saliency(scores)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (nan_scores, "The saliency of 'fc.weight' holds NaN"),
        (lambda model: Saliency.magnitude(model, ["fc.weight"]), "no tensor 'stem.weight'"),
        (
            lambda _: Saliency(dict.fromkeys(["stem.weight", "conv.weight", "fc.weight"], torch.ones(2))),
            "'stem.weight'",
        ),
    ],
)
def test_scores_that_do_not_fit_leave_the_masks_as_they_were(score, message):
    model = net()
    engine = PruningEngine(model, Saliency.magnitude, [0.3, 0.5])
    engine.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine._score = score
    with pytest.raises(PlanError, match=re.escape(message)):
        engine.step()
    assert engine.taken == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def masked_already() -> None:
    model = net()
    prune.l1_unstructured(model.fc, "weight", 0.5)
    engine_of(model).step()


def state_of(**changed) -> None:
    engine = engine_of(net())
    engine.load_state_dict({**engine.state_dict(), **changed})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: engine_of(net(), [0.5, 0.3]), "schedule is [0.5, 0.3]"),
        (lambda: engine_of(net(), [0.5, 1.3]), "schedule is [0.5, 1.3]"),
        (lambda: engine_of(net(), []), "schedule is []"),
        (lambda: engine_of(net(), scope="world"), "no scope 'world'"),
        (lambda: engine_of(net(), names=["nothing"]), "no parameter 'nothing'"),
        (lambda: engine_of(net()).on("stopped", print), "no event 'stopped'"),
        (lambda: engine_of(net()).on("started", print, every=0), "counted from 1"),
        (lambda: engine_of(net()).on("started", print, every=2, once=1), "not both"),
        (lambda: PruningEngine(net(), Saliency.magnitude, [0.5]).compact(), "no example inputs"),
        (lambda: engine_of(net()).graph(2), "no mask of step 2"),
        (lambda: gradual(0.5, 0), "steps is 0"),
        (lambda: gradual(0.5, 2, "slow"), "no schedule 'slow'"),
        (masked_already, "'fc.weight' is masked already"),
        (lambda: state_of(schedule=[0.1]), "The state belongs to the schedule [0.1]"),
        (lambda: state_of(masks={0: {}}), "'conv.weight' is masked in the state or in this engine alone"),
    ],
)
def test_bad_input_is_refused(bad, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        bad()
