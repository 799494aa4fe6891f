"""Networks around single operations, with the inputs of torch's own test database.

``Linear along one dimension of the sample -> operation -> Linear along the dimension of the result that corresponds``.
The layer before the operation gives back exactly the sample's values, so that an operation is always called on numbers
that it is made for, and sums that are ordered in another way cannot turn a tie.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.testing._internal import common_methods_invocations
from torch.utils import _pytree as pytree

Operation = Callable[..., Any]
DTYPES = (torch.float64, torch.float32, torch.complex128)


def _as_it_is(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    """In place of ``wrapper_set_seed``: a random operation is to be seen as one."""
    return operation(*args, **kwargs)


vars(common_methods_invocations)["wrapper_set_seed"] = _as_it_is


class Sample(NamedTuple):
    """A call of an operation.

    Attributes:
        operation: a function or a module, called with the leaves put back in place.
        leaves: all arguments, flat.
        tree: where each of them stands; unflattened it is ``(args, kwargs)``.
        main: the position of the leaf that the network makes.
    """

    operation: Operation
    leaves: list[Any]
    tree: pytree.TreeSpec
    main: int

    @property
    def value(self) -> Tensor:
        """The tensor that the network makes."""
        return self.leaves[self.main]

    def others(self) -> list[int]:
        """The positions of all other tensors."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and i != self.main]

    def run(self, value: Tensor) -> Any:
        """The operation on `value`, with copies of all else."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else copy.copy(leaf) for leaf in self.leaves]
        leaves[self.main] = value.clone()
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        operation = copy.deepcopy(self.operation) if isinstance(self.operation, nn.Module) else self.operation
        return operation(*args, **kwargs)


def sample_of(operation: Operation, args: Any, kwargs: Any) -> Sample | None:
    """The call, if its first floating tensor has a dimension of three entries or more."""
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            plain = leaf.layout is torch.strided and max(leaf.shape, default=0) >= 3 and leaf.numel() > 0
            if not plain:
                return None
            leaves[position] = torch.where(leaf.isfinite(), leaf, 1.0)
            return Sample(operation, leaves, tree, position)
    return None


def floating_results(result: Any) -> list[Tensor]:
    """The tensors that a result holds: the floating ones if there are any."""
    found = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    return [leaf for leaf in found if leaf.is_floating_point() or leaf.is_complex()] or found


class Before(nn.Linear):
    """A linear layer that makes exactly the tensor `value` with its channels last, from `inputs`.

    Each channel reads one input, scaled by a power of two, so its value does not depend on how a product is summed.
    """

    def __init__(self, value: Tensor, seed: int) -> None:
        channels = value.shape[-1]
        super().__init__(channels + 1, channels, dtype=value.dtype)
        generator = torch.Generator().manual_seed(seed)
        scales = 2.0 ** (torch.randperm(channels, generator=generator) % 11 - 5)
        bias = torch.randint(1, 8, (channels,), generator=generator) / 4
        with torch.no_grad():
            self.weight.zero_()
            self.weight[range(channels), range(channels)] = scales.to(value.dtype)
            self.bias.copy_(bias.to(value.dtype))
        made = (value - self.bias.detach()) / scales
        self.inputs = torch.cat([made, torch.ones_like(made[..., :1])], -1)


class Reader(nn.Module):
    """A linear layer along one dimension, in the type of the network."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dim, self.dtype = dim, dtype
        self.linear = nn.Linear(size, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not self.dtype:
            x = x.to(self.dtype)
        return self.linear(x if self.dim == x.ndim - 1 else x.movedim(self.dim, -1))


class OperationNetwork(nn.Module):
    """Linear, the operation, and a linear layer for each of its results.

    Args:
        sample: the call.
        dim: the dimension of the sample that becomes channels.
        held: whether its other tensors are parameters and buffers, or inputs of the network.
        seed: of the weights.
    """

    def __init__(self, sample: Sample, dim: int, held: bool, seed: int = 0) -> None:
        super().__init__()
        value = sample.value
        self.before = Before(value.movedim(dim, -1), seed)
        self.dim, self.rank, self.held = dim, value.ndim, held
        self.operation = (
            copy.deepcopy(sample.operation) if isinstance(sample.operation, nn.Module) else sample.operation
        )
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in sample.leaves]
        self.main, self.tree = sample.main, sample.tree
        self.places = sample.others()
        if held:
            for place in self.places:
                tensor = sample.leaves[place].clone()
                if tensor.is_floating_point() or tensor.is_complex():
                    self.register_parameter(f"other{place}", nn.Parameter(tensor))
                else:
                    self.register_buffer(f"other{place}", tensor)
        results = floating_results(sample.run(value))
        places = corresponding(sample, dim, results)
        self.readers = nn.ModuleList()
        torch.manual_seed(seed)
        for result, place in zip(results, places, strict=True):
            dtype = torch.promote_types(result.dtype, value.dtype)
            self.readers.append(nn.Identity() if place is None else Reader(result.shape[place], place, dtype))

    def forward(self, x: Tensor, *others: Tensor) -> list[Tensor]:
        y = self.before(x)
        if self.dim != self.rank - 1:
            y = y.movedim(-1, self.dim)
        leaves = list(self.leaves)
        leaves[self.main] = y
        held = [getattr(self, f"other{place}") for place in self.places] if self.held else others
        for place, tensor in zip(self.places, held, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        results = floating_results(self.operation(*args, **kwargs))
        return [reader(result) for reader, result in zip(self.readers, results, strict=True)]


def _differs(a: Tensor, b: Tensor) -> Tensor:
    return ~((a == b) | (a.isnan() & b.isnan()))


def _moves(value: Tensor, dim: int, channel: int) -> Iterator[Tensor]:
    """The sample with other values in one of its channels."""
    for move in (lambda x: x + 0.37, lambda x: x * 0.5, lambda x: x.flip(0) if x.ndim else -x):
        moved = value.clone()
        moved.select(dim, channel).copy_(move(value.select(dim, channel)))
        yield moved


def corresponding(sample: Sample, dim: int, results: Sequence[Tensor]) -> list[int | None]:
    """The dimension of each result along which channels of the sample's `dim` stand apart; none for a single number.

    Found by experiment: another value of channel 0 changes other slices of it than another value of channel 1. Where
    that shows nothing, it is the same dimension if there is one, and the last otherwise.
    """
    value, changed = sample.value, []
    for channel in range(2):
        seen = [torch.zeros_like(result, dtype=torch.bool) for result in results]
        for moved in _moves(value, dim, channel):
            try:
                others = floating_results(sample.run(moved))
            except (RuntimeError, ValueError, IndexError):  # a number that the operation does not take
                continue
            if [o.shape for o in others] == [r.shape for r in results]:
                seen = [s | _differs(o, r) for s, o, r in zip(seen, others, results, strict=True)]
        changed.append(seen)
    found: list[int | None] = []
    for result, first, second in zip(results, *changed, strict=True):
        fitting = [d for d in range(result.ndim) if result.shape[d] > 1 and result.numel() and _apart(first, second, d)]
        usual = dim if dim < result.ndim else result.ndim - 1
        none = result.ndim == 0 or result.numel() == 0
        found.append(None if none else usual if usual in fitting or not fitting else fitting[0])
    return found


def _apart(first: Tensor, second: Tensor, dim: int) -> bool:
    rest = [d for d in range(first.ndim) if d != dim]
    a, b = (x.amax(rest) if rest else x for x in (first, second))
    return bool(a.any() and b.any() and not (a & b).any())


# ------------------------------------------------------------------------------------------------------ the database


def name_of(info: Any) -> str:
    """The name of an entry, with its variant."""
    return info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")


def database() -> dict[str, Any]:
    """All entries by name."""
    return {name_of(info): info for info in common_methods_invocations.op_db}


def dtype_of(info: Any) -> torch.dtype | None:
    """The type in which an operation is tried."""
    return next((dtype for dtype in DTYPES if info.supports_dtype(dtype, "cpu")), None)


def samples(info: Any, limit: int) -> list[tuple[int, Sample]]:
    """Up to `limit` calls of an entry, spread over all that there are, with their numbers."""
    dtype = dtype_of(info)
    if dtype is None:
        return []
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = list(info.sample_inputs("cpu", dtype, requires_grad=False))
    fitting = [
        (number, sample)
        for number, each in enumerate(every)
        if (sample := sample_of(info.op, (each.input, *each.args), each.kwargs)) is not None
    ]
    return spread(fitting, limit)


class Case(NamedTuple):
    """One network to be judged.

    Attributes:
        name: of the entry, with the spelling if it is not the function itself.
        number: of the sample.
        sample: the call.
        dim: the dimension that becomes channels.
        held: whether the sample's other tensors are parameters and buffers, or inputs.
        training: the mode in which the network is judged.
    """

    name: str
    number: int
    sample: Sample
    dim: int
    held: bool = True
    training: bool = False

    def __str__(self) -> str:
        where = "" if not self.sample.others() else ", others held" if self.held else ", others as inputs"
        mode = ", training" if self.training else ""
        return f"{self.name}[{self.number}] over dim {self.dim} of {list(self.sample.value.shape)}{where}{mode}"

    def network(self, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The network, and its inputs; the operation's own error where it does not take the sample."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = OperationNetwork(self.sample, self.dim, self.held, seed)
        others = [] if self.held else [self.sample.leaves[place].clone() for place in self.sample.others()]
        return model.train(self.training), (model.before.__dict__.pop("inputs"), *others)


def along_each(name: str, number: int, sample: Sample, training: bool = False) -> list[Case]:
    """A network for each dimension with three entries or more, with other tensors held and given.

    A sample without other tensors gives one network a dimension.
    """
    ways = (True, False) if sample.others() else (True,)
    sizes = sample.value.shape
    return [Case(name, number, sample, d, held, training) for d in range(len(sizes)) if sizes[d] >= 3 for held in ways]


def spread(every: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of them, evenly spread."""
    step = max(len(every) / limit, 1)
    return [every[int(i * step)] for i in range(min(limit, len(every)))]


def spellings(info: Any) -> dict[str, Operation]:
    """The other ways to write an operation: method, in place, aliases and theirs."""
    found = {}
    for label, entry in (("", info), *((f"{alias.name} ", alias) for alias in info.aliases)):
        forms = {"method": entry.method_variant, "in place": entry.inplace_variant}
        if label:
            forms = {"alias": entry.op, **forms}
        found |= {label + form: function for form, function in forms.items() if function is not None}
    return found


def cases(info: Any, limit: int) -> Iterator[Case]:
    """The networks of an entry: of up to `limit` samples, and of the first sample in every other spelling."""
    chosen = samples(info, limit)
    for number, sample in chosen:
        yield from along_each(name_of(info), number, sample)
    for number, sample in chosen[:1]:
        for label, function in spellings(info).items():
            yield from along_each(f"{name_of(info)} ({label})", number, sample._replace(operation=function))
