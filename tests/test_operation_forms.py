"""Forms of movements, slices and indexing: exact where channels go, pinned where they may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from torch import Tensor, nn

import structprune

Use = Callable[["Around", Tensor], Tensor]


class Around(nn.Module):
    """A linear layer of 8 channels, something done to them, and a linear layer."""

    order: Tensor
    mask: Tensor
    places: Tensor
    repeats: Tensor

    def __init__(self, use: Use, width: int) -> None:
        super().__init__()
        self.a, self.h, self.use = nn.Linear(6, 8), nn.Linear(width, 3), use
        self.other = nn.Parameter(torch.randn(5, 8))
        self.register_buffer("order", torch.tensor([3, 0, 7, 1, 6, 2, 5, 4]))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))
        self.register_buffer("places", torch.tensor([4, 0]))
        self.register_buffer("repeats", torch.tensor([1, 2, 1, 1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.use(self, self.a(x)))


def written(place: Callable[[Tensor], Tensor], value: float = 1.0) -> Use:
    def use(m: Around, y: Tensor) -> Tensor:
        y = y.clone()
        place(y).fill_(value)
        return y

    return use


def put(index: object, value: object, summed: bool = True) -> Use:
    def use(m: Around, y: Tensor) -> Tensor:
        y = y.clone()
        y[index] = value(m, y) if callable(value) else value
        return y * y.sum(-1, keepdim=True) if summed else y

    return use


def summed(part: Callable[[Tensor], Tensor]) -> Use:
    return lambda m, y: y * part(y).sum(-1, keepdim=True)


def largest(part: Callable[[Tensor], Tensor]) -> Use:
    return lambda m, y: y * part(y).amax(-1, keepdim=True)


# (name, what is done, width behind it, whether channels go)
SLICES: list[tuple[str, Use, int, bool]] = [
    ("last two", summed(lambda y: y[..., -2:]), 8, True),
    ("all but the last two", summed(lambda y: y[..., :-2]), 8, True),
    ("last but one", summed(lambda y: y[..., -2:-1]), 8, True),
    ("between two from the end", summed(lambda y: y[..., -5:-2]), 8, True),
    ("from the start to one from the end", summed(lambda y: y[..., 2:-3]), 8, True),
    ("from the end to one from the start", summed(lambda y: y[..., -7:3]), 8, True),
    ("last one", summed(lambda y: y[..., -1:]), 8, True),
    ("beyond both ends", summed(lambda y: y[..., -20:20]), 8, True),
    ("beyond the end", summed(lambda y: y[..., 3:20]), 8, True),
    ("narrow from the end", summed(lambda y: y.narrow(-1, -3, 2)), 8, True),
    ("narrow to the end", summed(lambda y: y.narrow(-1, -2, 2)), 8, True),
    ("narrow", summed(lambda y: torch.narrow(y, 2, 1, 3)), 8, True),
    ("largest of a piece", largest(lambda y: y[..., 2:4]), 8, True),
    ("half of it", lambda m, y: y[..., :4] * y[..., 4:], 4, True),
    ("aten.slice", summed(lambda y: torch.ops.aten.slice(y, 2, -3, -1)), 8, True),
    ("split in pieces", summed(lambda y: y.split([3, 1, 4], -1)[1]), 8, True),
    ("split at positions", summed(lambda y: torch.tensor_split(y, (2, -3), -1)[1]), 8, True),
    ("written over at the end", put((..., -1), 1.0), 8, True),
    ("written over from the end", put((..., slice(-3, None)), 1.0, summed=False), 8, True),
    ("written over up to the end", put((..., slice(None, -2)), 1.0, summed=False), 8, True),
    ("written over within", put((..., slice(2, 4)), 2.0, summed=False), 8, True),
    ("zeroed within", put((..., slice(2, 4)), 0.0), 8, True),
    # A removed channel would be summed, though not zero.
    ("written over and summed", put((..., slice(2, 4)), 2.0), 8, False),
    ("positions written over and summed", put((slice(None), 1), 2.0), 8, False),
    (
        "written over in a view and summed",
        lambda m, y: summed(lambda y: y)(m, written(lambda y: y[..., 2:4])(m, y)),
        8,
        False,
    ),
    (
        "zeroed in a view and summed",
        lambda m, y: summed(lambda y: y)(m, written(lambda y: y[..., 2:4], 0.0)(m, y)),
        8,
        True,
    ),
    ("written over by its own", put((..., slice(-2, None)), lambda m, y: y[..., :2] * 1.0), 8, True),
]


def check(use: Use, width: int, goes: bool) -> None:
    for seed in range(4):
        model = oracle.jitter(Around(use, width), seed=seed)
        x = torch.randn(2, 5, 6).double()
        with torch.no_grad():  # the channels at one end go first
            model.a.weight[[-1, -2, -3, -4] if seed % 2 else [0, 1, 2, 3]] *= 1e-3
        for ratio in (0.5, 0.8):
            importance = structprune.Random(seed) if seed > 1 else "l2"
            plan = structprune.plan(model, x, ratio=ratio, round_to=1, importance=importance)
            assert bool(plan.removed.get("a.weight")) == goes, structprune.DependencyGraph(model, x).pinned()
            oracle.check(model, plan.apply(model), plan, x)


@pytest.mark.parametrize(("name", "use", "width", "goes"), SLICES, ids=[case[0] for case in SLICES])
def test_slices(name: str, use: Use, width: int, goes: bool) -> None:
    check(use, width, goes)


def scattered(name: str, **named: object) -> Use:
    def use(m: Around, y: Tensor) -> Tensor:
        index = m.places[:, None].expand(2, 8)[None].expand(2, 2, 8)
        return getattr(y, name)(1, index, y[:, :2] * 2, **named)

    return use


# Over positions, the channels go along; over channels, they stay.
INDEXING: list[tuple[str, Use, int, bool]] = [
    ("list of positions", lambda m, y: y[:, [0, 3]], 8, True),
    ("list of channels", lambda m, y: y[..., [0, 3]], 2, False),
    ("range of channels", lambda m, y: y[..., range(2, 4)], 2, False),
    ("list first", lambda m, y: y[[1, 0]], 8, True),
    ("mask of positions", lambda m, y: y[:, m.mask], 8, True),
    ("mask and a slice", lambda m, y: y[:, m.mask, 1:], 7, True),
    ("mask of two dimensions", lambda m, y: y[m.mask[None].expand(2, 5)], 8, True),
    ("mask of channels", lambda m, y: y[..., m.order > 3], 4, False),
    ("permuted by a buffer", lambda m, y: y[..., m.order], 8, False),
    ("two tensors", lambda m, y: y[m.places[1:], m.places], 8, True),
    ("number between tensors", lambda m, y: y[m.places[1:], 2], 8, True),
    ("index_select", lambda m, y: y.index_select(1, m.places), 8, True),
    ("index_fill", lambda m, y: y.index_fill(1, m.places, 0.5), 8, True),
    ("index_fill of channels", lambda m, y: y.index_fill(2, m.places, 0.5), 8, False),
    ("index_add", lambda m, y: y.index_add(1, m.places, y[:, 2:4], alpha=2), 8, True),
    ("index_copy", lambda m, y: y.index_copy(1, m.places, y[:, 2:4] * 2), 8, True),
    ("index_put", lambda m, y: y.index_put((m.places[1:], m.places), y[0, 2:4] * 2), 8, True),
    ("index_put of channels", lambda m, y: y.index_put((m.places[1:], m.places[1:], m.places), y[0, 0, :2]), 8, False),
    ("scatter", scattered("scatter"), 8, True),
    ("scatter_add", scattered("scatter_add"), 8, True),
    ("scatter_reduce", scattered("scatter_reduce", reduce="amax"), 8, True),
    ("repeated by a buffer", lambda m, y: y.repeat_interleave(m.repeats, 1), 8, True),
    ("repeated by a buffer, by keyword", lambda m, y: torch.repeat_interleave(y, repeats=m.repeats, dim=1), 8, True),
    ("channels repeated by a buffer", lambda m, y: y.repeat_interleave(m.order, 2), 28, False),
    ("take_along_dim", lambda m, y: y.take_along_dim(m.places[None, :, None], 1), 8, True),
    ("take_along_dim of all", lambda m, y: y.take_along_dim(m.places), 2, False),
    ("gather", lambda m, y: y.gather(1, m.places[None, :, None].expand(2, 2, 8)), 8, True),
    ("take", lambda m, y: y.take(m.order), 8, False),
    ("searchsorted", lambda m, y: torch.searchsorted(m.other[0].sort()[0], y).double(), 8, True),
    ("bucketize", lambda m, y: torch.bucketize(y, m.other[0].sort()[0]).double(), 8, True),
    ("written at a list", put((slice(None), [0, 2]), lambda m, y: y[:, 3:] * 2), 8, True),
    ("channels written at a list", put((..., [0, 2]), lambda m, y: y[..., 3:5] * 2), 8, False),
    ("written through a mask", lambda m, y: put((slice(None), m.mask), 0.0)(m, y), 8, True),
    ("a tensor written through a mask", lambda m, y: put((slice(None), m.mask), y[:, 2:] * 2)(m, y), 8, False),
    ("written at a buffer", lambda m, y: put((slice(None), m.places), 0.0)(m, y), 8, True),
]


@pytest.mark.parametrize(("name", "use", "width", "goes"), INDEXING, ids=[case[0] for case in INDEXING])
def test_indexing(name: str, use: Use, width: int, goes: bool) -> None:
    check(use, width, goes)


MOVEMENTS: list[tuple[str, Use, int, bool]] = [
    ("view_copy", lambda m, y: torch.ops.aten.view_copy(y, [10, 8]), 8, True),
    ("permute_copy", lambda m, y: torch.permute_copy(y, (1, 0, 2)), 8, True),
    ("rot90", lambda m, y: torch.rot90(y, 1, (1, 2)).transpose(1, 2), 8, True),
    ("fliplr", lambda m, y: torch.fliplr(y), 8, True),
    ("flipud of channels", lambda m, y: torch.flipud(y.permute(2, 0, 1)).permute(1, 2, 0), 8, True),
    ("atleast_3d", lambda m, y: torch.atleast_3d(y[0]).squeeze(-1), 8, True),
    ("atleast_1d of two", lambda m, y: torch.atleast_1d(y, m.other)[0], 8, True),
    ("hstack", lambda m, y: torch.hstack([y, y * 2]), 8, True),
    ("vstack of vectors", lambda m, y: torch.vstack([y[0, 0], y[0, 1]]), 8, True),
    ("dstack", lambda m, y: torch.dstack([y, y * 2]), 16, True),
    ("column_stack", lambda m, y: torch.column_stack([y[0], y[1]]), 16, True),
    ("hsplit", lambda m, y: y[0].hsplit(2)[1], 4, True),
    ("dsplit", lambda m, y: y.dsplit([3])[1], 5, True),
    ("block_diag", lambda m, y: torch.block_diag(y[0], m.other), 16, True),
    ("diag_embed", lambda m, y: torch.diag_embed(y).sum(-2), 8, True),
    ("diag_embed beside", lambda m, y: torch.diag_embed(y, 1), 9, False),
    ("diagonal", lambda m, y: (y[0].mT @ y[0]).diagonal(), 8, True),
    ("diagonal beside", lambda m, y: (y[0].mT @ y[0]).diagonal(1), 7, False),
    ("diagonal of no square", lambda m, y: y[0].diagonal(), 5, False),
    ("diag of one", lambda m, y: torch.diag(y[0, 0]).sum(0), 8, True),
    ("slice_scatter", lambda m, y: y.slice_scatter(y[..., :3] * 2, 2, 5), 8, True),
    ("select_scatter", lambda m, y: y.select_scatter(y[:, 0], 1, 2), 8, True),
    ("diagonal_scatter", lambda m, y: torch.diagonal_scatter(y[0].mT @ y[0], y[0, 0]).sum(0), 8, True),
    ("tensor_split by a tensor", lambda m, y: y.tensor_split(torch.tensor(2), 2)[0], 4, False),
    ("view_as a parameter", lambda m, y: y[0].reshape(40).view_as(m.other), 8, True),
    ("ravel", lambda m, y: y[0].ravel().reshape(5, -1), 8, True),
    ("repeat_interleave of all", lambda m, y: y[0, :1].repeat_interleave(2), 16, True),
    ("as_strided", lambda m, y: y.as_strided((2, 8), (40, 1)), 8, False),
]


@pytest.mark.parametrize(("name", "use", "width", "goes"), MOVEMENTS, ids=[case[0] for case in MOVEMENTS])
def test_movements(name: str, use: Use, width: int, goes: bool) -> None:
    check(use, width, goes)


class SegNet(nn.Module):
    """Max-unpooling at the places that another pooling found."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.dec = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, where = F.max_pool2d(self.enc(x), 2, return_indices=True)
        return self.dec(F.max_unpool2d(self.mid(x), where, 2))


def test_max_unpooling_ties_channels_to_the_indices() -> None:
    model, x = oracle.jitter(SegNet(), seed=0), torch.randn(2, 3, 16, 16).double()
    plan = structprune.plan(model, x, ratio=0.5)
    assert plan.removed["enc.weight"][0] == plan.removed["mid.weight"][0]
    oracle.check(model, plan.apply(model), plan, x)


class Cropped(nn.Module):
    """A crop to a length that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv1d(4, 32, 3, padding=1), nn.Conv1d(32, 4, 1)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(x))[:, :, : length.max()])


@pytest.mark.parametrize("length", [torch.tensor(5), torch.tensor([5, 3])])
def test_a_slice_up_to_a_tensor(length: Tensor) -> None:
    model, inputs = oracle.jitter(Cropped(), seed=0), (torch.randn(2, 4, 8).double(), length)
    plan = structprune.plan(model, inputs, ratio=0.5)
    assert plan.removed
    oracle.check(model, plan.apply(model), plan, inputs)


class WrittenAt(nn.Module):
    """Rows and columns that were taken apart into sequences of single numbers say where is written."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        y = self.a(x).relu()
        rows, columns = zip(*places, strict=True)
        kept = torch.ones_like(y[..., 0])
        kept[rows, columns] = 0.0
        y[list(rows), columns] = 1.0
        return self.h(y * kept[..., None] + y.mean(1, keepdim=True))


def test_places_may_be_sequences_of_tensors():
    torch.manual_seed(0)
    model, inputs = WrittenAt().eval(), (torch.randn(3, 5, 6), torch.tensor([[0, 1], [2, 3]]))
    plan = structprune.plan(model, inputs, ratio=0.5, round_to=1)
    slim = plan.apply(model)
    assert slim.a.out_features < 16
    structprune.verify(model, slim, plan, inputs).raise_for_error()
