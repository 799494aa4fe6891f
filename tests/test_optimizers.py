"""`remap_optimizer`: training goes on as it would have with the removed channels masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
import transformers.optimization
from support import oracle
from support.cases import CASES, all_cases, normal
from torch import Tensor, nn

import structprune
from structprune.errors import SurgeryError

all_cases()
INPUTS = normal(4, 3, 7, 7).double()


def network() -> Any:
    return oracle.jitter(CASES["InvertedResidual"].build(), seed=0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, x: Tensor = INPUTS) -> None:
    optimizer.zero_grad()
    x = x + 0.1 * normal(*x.shape, seed=seed).double()
    y = model(x)
    F.mse_loss(y, normal(*y.shape, seed=1000).double()).backward()
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw, capturable later": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "timm lookahead": lambda p: timm.optim.Lookahead(torch.optim.SGD(p, lr=1e-2, momentum=0.9), k=2),
}
# Before Rprop's and Adadelta's first step on a survivor nothing depends on its neighbours either, so all are exact.


def masked_step(model: nn.Module, optimizer: torch.optim.Optimizer, plan: structprune.Plan, seed: int) -> None:
    """A step in which the removed channels stay off."""
    step(model, optimizer, seed)
    tensors = oracle.floating_tensors(model)
    with torch.no_grad():
        for name, dims in plan.removed.items():
            for dim, indices in dims.items():
                tensors[name].index_fill_(dim, torch.tensor(indices), 0.0)


def survivors(model: nn.Module, plan: structprune.Plan) -> dict[str, Tensor]:
    found = dict(oracle.floating_tensors(model))
    for name, dims in plan.removed.items():
        for dim, indices in dims.items():
            gone = set(indices)
            size = oracle.floating_tensors(model)[name].shape[dim]
            found[name] = found[name].index_select(dim, torch.tensor([i for i in range(size) if i not in gone]))
    return found


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_with_masks(kind: str, inplace: bool) -> None:
    model = network().train()
    for module in model.modules():  # a masked channel has no variance; what it is divided by is no matter of ours
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    plan = structprune.plan(model, INPUTS, ratio=0.5)

    reference = oracle.switch_off(model, plan.removed)
    masked = OPTIMIZERS[kind](reference.parameters())
    twin = copy.deepcopy(optimizer.state_dict())
    masked.load_state_dict(twin)

    slim = plan.apply(model, inplace=inplace)
    result = structprune.remap_optimizer(optimizer, plan, model, None if inplace else slim)
    assert result is optimizer
    for seed in range(3, 8):
        step(slim, optimizer, seed)
        masked_step(reference, masked, plan, seed)
    expected = survivors(reference, plan)
    for name, tensor in oracle.floating_tensors(slim).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_without_the_state_training_would_go_elsewhere(kind: str) -> None:
    """The comparison above can fail: an optimizer made anew ends at other weights."""
    model = network().eval()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim, other = plan.apply(model), plan.apply(model)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    new = OPTIMIZERS[kind](other.parameters())
    step(slim, optimizer, 3)
    step(other, new, 3)
    assert not torch.allclose(slim.expand.weight, other.expand.weight, rtol=1e-6)


def test_groups_options_schedulers_and_other_parameters() -> None:
    model, loss = network(), nn.Linear(3, 3)
    first = [model.head.weight, *loss.parameters()]
    rest = [p for n, p in model.named_parameters() if not n.startswith(("head", "stem"))]
    optimizer = torch.optim.AdamW(
        [{"params": first, "lr": 1e-2, "name": "head"}, {"params": rest, "weight_decay": 0.3}]
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    loss(normal(2, 3)).sum().backward()
    step(model, optimizer, 0)
    scheduler.step()
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    kept = dict(optimizer.state[loss.weight])
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim = plan.apply(model)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert all(group["params"] is before for group, before in zip(optimizer.param_groups, lists, strict=True))
    assert (groups[0]["lr"], groups[0]["name"], groups[1]["weight_decay"]) == (5e-3, "head", 0.3)
    assert [id(p) for p in lists[0]] == [id(slim.head.weight), id(loss.weight), id(loss.bias)]
    names = [n for n, _ in model.named_parameters() if not n.startswith(("head", "stem"))]
    assert [id(p) for p in lists[1]] == [id(slim.get_parameter(n)) for n in names]
    assert all(optimizer.state[loss.weight][key] is value for key, value in kept.items())
    assert not any(p is q for p in optimizer.state for q in model.parameters())
    scheduler.step()
    step(slim, optimizer, 1)
    assert groups[0]["lr"] == 2.5e-3
    optimizer.load_state_dict(optimizer.state_dict())
    step(slim, optimizer, 2)


def test_a_tied_parameter_is_sliced_once() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)).double()
    model[3].weight = model[1].weight
    x = normal(2, 6).double()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, 0, x)
    plan = structprune.plan(model, x, ratio=0.5)
    slim = plan.apply(model)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    assert slim[3].weight is slim[1].weight
    assert optimizer.state[slim[1].weight]["exp_avg"].shape == slim[1].weight.shape == (4, 4)
    step(slim, optimizer, 1, x)


def test_an_optimizer_of_named_parameters_needs_no_model() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.named_parameters())
    step(model, optimizer, 0)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    plan.apply(model, inplace=True)
    structprune.remap_optimizer(optimizer, plan)
    step(model, optimizer, 1)


def test_an_optimizer_that_made_no_step_yet() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim = plan.apply(model)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    optimizer.step(lambda: slim(INPUTS).square().mean())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adafactor(p),
        lambda p: transformers.optimization.Adafactor(p, relative_step=False, lr=1e-3),
    ],
    ids=["torch", "transformers"],
)
def test_factored_second_moments(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    x = normal(2, 6).double()
    optimizer = make(model.parameters())
    step(model, optimizer, 0, x)
    rows = {k: v.clone() for k, v in optimizer.state[model[2].weight].items() if isinstance(v, Tensor) and v.dim()}
    plan = structprune.plan(model, x, ratio=0.5)
    slim = plan.apply(model)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    left = torch.tensor(structprune.kept(slim)["2.weight"][0]), torch.tensor(structprune.kept(slim)["2.weight"][1])
    new = optimizer.state[slim[2].weight]
    for name, before in rows.items():
        along = 0 if "row" in name else 1
        assert torch.equal(new[name].flatten(), before.flatten()[left[along]]), name
    step(slim, optimizer, 1, x)


def test_statistics_of_rescaled_weights_change_their_unit() -> None:
    """Pruning a head's size scales the query's weights; their gradients scale the other way."""
    case = CASES["TimmAttention"]
    model, inputs = oracle.jitter(case.build(), seed=0), case.inputs().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    step(model, optimizer, 0, inputs)
    graph = structprune.DependencyGraph(copy.deepcopy(model), inputs)
    _, inside = (group for group in graph.groups() if "attn.qkv.weight, dim 0: 12 a" in str(group))
    plan = graph.prune_group(inside, [1])
    assert plan.rescales
    before = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    slim = plan.apply(model)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    for rescale in plan.rescales:
        record = structprune.kept(slim)[rescale.tensor]
        for name, power in (("exp_avg", -1), ("exp_avg_sq", -2)):
            expected = before[rescale.tensor][name]
            if rescale.positions is not None:
                factor = torch.ones(expected.shape[rescale.dim], dtype=expected.dtype)
                factor[list(rescale.positions)] = rescale.factor**power
                expected = expected * factor.view([-1 if d == rescale.dim else 1 for d in range(expected.dim())])
            else:
                expected = expected * rescale.factor**power
            for dim, indices in record.items():
                expected = expected.index_select(dim, torch.tensor(indices))
            torch.testing.assert_close(optimizer.state[slim.get_parameter(rescale.tensor)][name], expected)


def stepped(make: Callable[[Any], torch.optim.Optimizer]) -> Any:
    model = network()
    optimizer = make(model.parameters())
    loss = model(INPUTS).square().mean()
    loss.backward()
    optimizer.step(lambda: loss)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    return model, optimizer, plan, plan.apply(model)


def assert_refused(optimizer: torch.optim.Optimizer, message: str, *args: Any) -> None:
    state, groups = dict(optimizer.state), [list(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(SurgeryError, match=message):
        structprune.remap_optimizer(optimizer, *args)
    assert list(optimizer.state) == list(state)
    assert all(optimizer.state[p] is entries for p, entries in state.items())
    assert all(
        a is b
        for old, new in zip(groups, optimizer.param_groups, strict=True)
        for a, b in zip(old, new["params"], strict=True)
    )


def test_lbfgs_is_refused() -> None:
    model, optimizer, plan, slim = stepped(torch.optim.LBFGS)
    assert_refused(optimizer, "LBFGS keeps flat histories", plan, model, slim)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (lambda p: [torch.eye(n) for n in p.shape], "a list of tensors"),
        (lambda p: torch.eye(p.shape[0]), "a tensor of shape"),
    ],
)
def test_state_of_unknown_form_is_refused(state: Callable[[Tensor], Any], what: str) -> None:
    """As Shampoo keeps it: matrices over rows and over columns."""
    model, optimizer, plan, slim = stepped(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    for parameter in model.parameters():
        optimizer.state[parameter]["preconditioner"] = state(parameter)
    assert_refused(optimizer, f"keeps 'preconditioner' of '.*' as {what}", plan, model, slim)


@pytest.mark.parametrize("kind", [timm.optim.Adafactor, timm.optim.AdafactorBigVision])
def test_factors_chosen_by_size_are_refused(kind: Any) -> None:
    make = lambda p: kind(p, lr=1e-3, min_dim_size_to_factor=4)  # noqa: E731, one of several makers
    model, optimizer, plan, slim = stepped(make)
    assert_refused(optimizer, "keeps 'exp_avg_sq_r.*' of '.*' as a tensor of shape", plan, model, slim)


def test_what_does_not_fit_is_refused() -> None:
    model, optimizer, plan, slim = stepped(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    assert_refused(optimizer, "does not know its parameters' names", plan)
    assert_refused(optimizer, "given the pruned model alone", plan, None, slim)
    assert_refused(optimizer, "The plan takes '.*' from .* to .*, but", plan, model)
    assert_refused(optimizer, "The plan takes '.*' from .* to .*, but", plan, slim, model)
    assert_refused(optimizer, "None of the optimizer's parameters", plan, network(), slim)
    assert_refused(optimizer, "has no tensor", plan, model, nn.Linear(2, 2))
    structprune.remap_optimizer(optimizer, plan, model, slim)
    assert_refused(optimizer, "None of the optimizer's parameters", plan, model, slim)


def test_twice_in_place_is_refused() -> None:
    model, optimizer, plan, _ = stepped(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    plan.apply(model, inplace=True)
    structprune.remap_optimizer(optimizer, plan, model)
    assert_refused(optimizer, "Was the optimizer remapped before", plan, model)


def test_averages_of_weights_are_pruned_like_the_model() -> None:
    model = network()
    emas = {
        "average": torch.optim.swa_utils.AveragedModel(model, use_buffers=True),
        "timm": timm.utils.ModelEmaV3(model, decay=0.5),
        "copy": copy.deepcopy(model),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    step(model, optimizer, 0)
    emas["average"].update_parameters(model)
    emas["timm"].update(model)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    for name, ema in emas.items():
        slim = plan.apply(ema)
        assert type(slim) is type(ema)
        inner = getattr(slim, "module", slim)
        for key, tensor in survivors(getattr(ema, "module", ema), plan).items():
            assert torch.equal(oracle.floating_tensors(inner)[key], tensor), (name, key)
        emas[name] = slim
    slim = plan.apply(model)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    step(slim, optimizer, 1)
    before = int(emas["average"].n_averaged)
    emas["average"].update_parameters(slim)
    assert int(emas["average"].n_averaged) == before + 1
    emas["timm"].update(slim)


def test_a_gradient_scaler_goes_on() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    for round_ in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(INPUTS).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        if round_ == 0:
            plan.apply(model, inplace=True)
            structprune.remap_optimizer(optimizer, plan, model)
    assert scaler.get_scale() == 32.0
