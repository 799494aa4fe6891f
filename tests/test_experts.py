"""Mixtures of experts: the width of the experts, the width through them, and whole experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from torch import Tensor, nn

import structprune
from structprune.errors import PlanError


class Stacked(nn.Module):
    """Experts as stacked weights; each token goes to the best two of them."""

    def __init__(self, experts: int = 6, how: str = "batched") -> None:
        super().__init__()
        self.num_experts, self.how = experts, how
        self.embed, self.head = nn.Embedding(13, 16), nn.Linear(16, 5)
        self.router = nn.Linear(16, experts)
        self.up = nn.Parameter(0.2 * torch.randn(experts, 24, 16))
        self.down = nn.Parameter(0.2 * torch.randn(experts, 16, 24))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        return weight / weight.sum(-1, keepdim=True), chosen

    def batched(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = F.relu(self.up[chosen] @ x[:, None, :, None])
        return (self.down[chosen] @ y).squeeze(-1)

    def grouped(self, x: Tensor, chosen: Tensor) -> Tensor:
        flat, order = chosen.flatten().sort()
        ends = flat.float().histc(self.num_experts, min=0, max=self.num_experts - 1).cumsum(0, dtype=torch.int32)
        y = F.grouped_mm(x[order // 2], self.up.transpose(1, 2), offs=ends)
        y = F.grouped_mm(F.relu(y), self.down.transpose(1, 2), offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return y[back].view(len(x), 2, -1)

    def counted(self, x: Tensor, chosen: Tensor) -> Tensor:
        one = F.one_hot(chosen, self.num_experts).to(x.dtype)
        y = F.relu(torch.einsum("nke,eih,nh->nki", one, self.up, x))
        return torch.einsum("nke,ehi,nki->nkh", one, self.down, y)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        weight, chosen = self.route(x)
        y = getattr(self, self.how)(x, chosen)
        return self.head(x + (y * weight[..., None]).sum(1))


class LogitsFirst(Stacked):
    """The best logits are found first, and a softmax is taken of those."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, chosen = self.router(x).topk(2, dim=-1)
        return logits.softmax(-1), chosen


def ids(tokens: int = 20) -> Tensor:
    return torch.randint(0, 13, (2, tokens))


MODELS = [
    pytest.param(lambda: Stacked(), id="looked up"),
    pytest.param(lambda: Stacked(how="grouped"), id="sorted and grouped"),
    pytest.param(lambda: Stacked(how="counted"), id="one hot"),
    pytest.param(lambda: LogitsFirst(), id="logits first"),
]


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_experts_and_widths_go_and_the_rest_is_exact(build, ratio):
    torch.manual_seed(0)
    model, x = oracle.jitter(build(), seed=1), ids()
    for seed in range(3):
        plan = structprune.plan(model, x, ratio=ratio, importance=structprune.Random(seed), round_to=1)
        slim = plan.apply(model)
        assert {0, 1, 2} <= set(plan.removed["up"])
        assert slim.router.out_features == slim.up.shape[0] < 6
        oracle.check(model, slim, plan, x)


def test_a_grouped_product_keeps_lines_that_its_kernel_takes():
    torch.manual_seed(0)
    model, x = Stacked(how="grouped"), ids()
    slim = structprune.prune(model, x, ratio=0.4, round_to=1)
    assert slim.up.shape[1] == 16
    assert slim.up.shape[2] == 8
    graph = structprune.DependencyGraph(model, x)
    with pytest.raises(PlanError, match="multiple of 8 are needed, by _grouped_mm"):
        graph.prune_group("embed", [0])


def test_as_many_experts_stay_as_a_token_chooses():
    torch.manual_seed(0)
    model, x = Stacked(experts=4), ids()
    assert structprune.prune(model, x, ratio=0.9, round_to=1).up.shape[0] == 2
    with pytest.raises(PlanError, match="at least 2"):
        structprune.DependencyGraph(model, x).prune_group("router", [0, 1, 3])


class NumbersLeak(Stacked):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        return super().forward(ids) + self.route(x)[1].sum()


class NumbersReturned(Stacked):
    def forward(self, ids: Tensor):
        return super().forward(ids), self.route(self.embed(ids).flatten(0, 1))[1]


class Sigmoid(Stacked):
    """Without a softmax an expert that is off is chosen as often as others: its score is one half."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.router(x).sigmoid()
        chosen = score.topk(2, dim=-1)[1]
        return score * 1.0, chosen

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        score, chosen = self.route(x)
        return self.head(x + self.batched(x, chosen).sum(1) * score.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (NumbersLeak, "the numbers of its channels are used as values"),
        (NumbersReturned, "the model returns the numbers of its channels"),
        (Sigmoid, "a channel that is off is not zero there"),
    ],
)
def test_experts_whose_numbers_matter_stay_and_say_why(build, reason):
    torch.manual_seed(0)
    model, x = oracle.jitter(build(), seed=1), ids()
    graph = structprune.DependencyGraph(model, x)
    assert reason in graph.pinned()["router.weight, dim 0"]
    plan = structprune.plan(model, x, ratio=0.5, importance="random", round_to=1)
    assert set(plan.removed["up"]) == {1, 2}
    oracle.check(model, plan.apply(model), plan, x)


class Listed(nn.Module):
    """Experts as modules in a list, each run on the tokens that chose it, if there are any."""

    def __init__(self, skip: bool = True) -> None:
        super().__init__()
        self.skip = skip
        self.embed, self.router, self.head = nn.Embedding(13, 16), nn.Linear(16, 4), nn.Linear(16, 5)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16, bias=False)) for _ in range(4)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        weight, chosen = self.router(x).softmax(-1).topk(1, dim=-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, _ = torch.where(chosen == number)
            if self.skip and len(token) == 0:
                continue
            result.index_add_(0, token, expert(x[token]) * weight[token])
        return self.head(x + result)


def test_a_list_of_experts_that_all_ran_is_pruned_in_its_widths():
    torch.manual_seed(1)
    model = Listed()
    x = torch.arange(13).repeat(2, 4)
    slim = structprune.prune(model, x, ratio=0.5, importance="random", round_to=1)
    assert {tuple(e[0].weight.shape) for e in slim.experts} == {(12, 8)}
    assert slim.router.out_features == 4


def test_what_experts_share_that_no_token_chose_stays_whole():
    torch.manual_seed(1)
    model = Listed()
    with torch.no_grad():
        model.router.bias += torch.tensor([50.0, 0.0, 0.0, 0.0])
    x = ids()
    graph = structprune.DependencyGraph(model, x)
    assert "experts.1 takes it too when data choose it" in graph.explain("embed")
    slim = structprune.prune(model, x, ratio=0.5, importance="random", round_to=1)
    assert [tuple(e[0].weight.shape) for e in slim.experts] == [(12, 16), (24, 16), (24, 16), (24, 16)]
    with torch.no_grad():
        slim.router.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0]))
    assert slim(x).shape == (40, 5)


class SomeStacked(nn.Module):
    """Two experts in one tensor, and a third that gives what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 16, 16))
        self.router = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        result = torch.zeros_like(x)
        for number in chosen.unique():
            token = torch.where(chosen == number)[0]
            taken = x[token]
            result = result.index_add(0, token, taken if number == 2 else taken @ self.experts[int(number)])
        return result


def test_what_stacked_experts_take_that_no_token_chose_stays_whole():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), SomeStacked(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[3].router.bias.copy_(torch.tensor([0.0, 0.0, 50.0]))
    x = torch.randn(5, 8)
    graph = structprune.DependencyGraph(model, x)
    assert "3.experts is used where data choose it" in graph.explain("2")
    slim = structprune.prune(model, x, ratio=0.5, round_to=1)
    assert (slim[0].out_features, slim[2].out_features) == (12, 16)
    with torch.no_grad():
        slim[3].router.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    assert slim(x).shape == (5, 4)


@pytest.mark.parametrize("how", ["batched", "grouped", "counted"])
def test_axes_do_not_depend_on_how_experts_are_run(how):
    graph = structprune.DependencyGraph(Stacked(how=how), ids())
    assert {group.axis: group.channels for group in graph.groups()} == {"hidden": 16, "experts": 6, "mlp": 24}
