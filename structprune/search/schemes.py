"""Compression schemes: what is compressed and how far, apart from how accuracy is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from structprune.checking import FLAG, Check, one_of, require, shown, whole
from structprune.errors import LoadError, PlanError
from structprune.importance.base import Importance, importance_of
from structprune.search.projections import Blocks, Channels, Projection, Rounding, Sequential, Weights
from structprune.search.scheme import LayerScheme, Scheme, check_names, registered, scheme_of
from structprune.tracing.trace import ExampleInputs

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_ALIGN = whole(1).or_none
_BLOCK = Check(
    lambda value: isinstance(value, tuple) and len(value) > 1 and all(whole(1).fits(size) for size in value),
    "give the size of a block for each dimension of a weight, such as (4, 4)",
)


@registered
@dataclass(frozen=True)
class Prune(LayerScheme):
    """Unstructured pruning: single weights of linear layers and convolutions, below one threshold over all of them.

    Joseph et al., Condensa, 2020 (section 3, ``Prune``); Han et al., 2015.

    Args:
        density: share of the weights that stay, above 0; None to have it found by an objective.
        layers: names or patterns (``"stage1.*"``) of layers or blocks; by default all.
        ignore: those to leave out.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sparse = Prune(0.25).compressed(model)
        >>> int((sparse[0].weight != 0).sum() + (sparse[2].weight != 0).sum())
        12
    """

    def on(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> Projection:
        """See `Scheme.on`."""
        return Weights(model, self.layers, self.ignore, self.required_density())


@registered
@dataclass(frozen=True)
class BlockPrune(LayerScheme):
    """Blocks of weights, below one threshold over all blocks of all layers.

    Joseph et al., Condensa, 2020 (``BlockPrune``); there of linear layers alone.

    Args:
        density: share of the blocks that stay, above 0; None to have it found by an objective.
        layers: names or patterns of layers or blocks of the model; by default all.
        ignore: those to leave out.
        block_size: a size for each dimension of a weight, so ``(4, 4)`` is for linear layers and ``(4, 4, 1, 1)`` for
            convolutions of images. Weights of other numbers of dimensions stay.
        criterion: the norm of a block: ``"l1"``, ``"l2"`` or ``"linf"``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sparse = BlockPrune(0.25, block_size=(2, 4)).compressed(model)
        >>> int((sparse[0].weight != 0).sum() + (sparse[2].weight != 0).sum()) % 8
        0
    """

    block_size: tuple[int, ...] = (4, 4)
    criterion: str = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.block_size, list):
            object.__setattr__(self, "block_size", tuple(self.block_size))
        require(vars(self), block_size=_BLOCK, criterion=one_of(("l1", "l2", "linf")))

    def on(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> Projection:
        """See `Scheme.on`."""
        return Blocks(model, self.layers, self.ignore, self.required_density(), self.block_size, self.criterion)


@dataclass(frozen=True)
class _Structured(LayerScheme):
    """Whole coupled channels, below one threshold over all of them."""

    align: int | None = None
    criterion: str | Importance = "l2"
    relative: bool = True
    bias: bool = True

    removes_channels: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(vars(self), align=_ALIGN, relative=FLAG, bias=FLAG)
        importance_of(self.criterion, "criterion")

    def on(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> Projection:
        """See `Scheme.on`."""
        if example_inputs is None:
            raise PlanError(
                f"{type(self).__name__} removes coupled channels, which are found by running the model on "
                "example_inputs: give a tensor, a tuple or a dict that the model accepts."
            )
        return Channels(
            model,
            example_inputs,
            self.layers,
            self.ignore,
            self.required_density(),
            kinds=self.kinds,
            align=self.align,
            criterion=self.criterion,
            relative=self.relative,
            bias=self.bias,
        )


@registered
@dataclass(frozen=True)
class FilterPrune(_Structured):
    """Filters of convolutions: channels that convolutions make go as a whole, with all that is coupled to them.

    A channel is off when its filters, its biases and shifts and what reads it are zero. So
    `structprune.masks.compact` cuts out exactly what the scheme set to zero. Channels over which a norm or a mean runs
    (a layer norm, a group norm) are left whole, since the others would not stay what they are.

    Joseph et al., Condensa, 2020 (``FilterPrune``); here over coupled channels, not the rows of single layers.

    Args:
        density: share of the channels that stay, above 0; None to have it found by an objective. A channel that many
            layers share counts once; each group of coupled channels keeps at least one.
        layers: names or patterns of layers or blocks; channels go if all layers that make them are named. By default
            all.
        ignore: layers or blocks whose channels stay.
        align: widths that change become multiples of this; where no multiple is left, channels stay.
        criterion: what a channel is worth. ``"l1"``, ``"l2"`` or ``"linf"``: the norm of its filter, as in the paper;
            where several layers make the channel, the mean of theirs. Or another criterion that needs no data: a name
            of `structprune.importance.CRITERIA`, or an object.
        relative: whether what channels are worth is divided by its mean over the channels that are alike (of a layer,
            or of layers that share them) before the threshold. If not, norms are compared as they are, as in the paper,
            which takes most from layers of few inputs.
        bias: whether biases, shifts and readers of a channel are set to zero too. If not, a channel stays a constant,
            which `compact` folds into the layers behind where that is exact.

    Example:
        >>> from structprune import masks
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> x = torch.randn(1, 1, 8, 8)
        >>> sparse = FilterPrune(0.5).compressed(model, x)
        >>> slim = masks.compact(sparse, x)
        >>> slim[0].out_channels + slim[2].out_channels, torch.allclose(sparse(x), slim(x), atol=1e-6)
        (6, True)
    """

    kinds: ClassVar[tuple[str, ...]] = ("filters",)


@registered
@dataclass(frozen=True)
class NeuronPrune(_Structured):
    """Neurons: channels that linear layers make go as a whole, with all that is coupled to them.

    Joseph et al., Condensa, 2020 (``NeuronPrune``); see `FilterPrune`, whose settings these are. Heads and the
    positions in them stay: they are products of sizes (see `structprune.plan` for those).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sparse = NeuronPrune(0.5).compressed(model, torch.randn(1, 4))
        >>> int((sparse[0].weight != 0).any(1).sum()), int((sparse[2].weight != 0).any(0).sum())
        (4, 4)
    """

    kinds: ClassVar[tuple[str, ...]] = ("neurons",)


@registered
@dataclass(frozen=True)
class StructurePrune(_Structured):
    """Filters and neurons, below one threshold over both.

    Joseph et al., Condensa, 2020 (``StructurePrune``); see `FilterPrune`, whose settings these are.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 2))
        >>> sparse = StructurePrune(0.5).compressed(model, torch.randn(1, 1, 4, 4))
        >>> int((sparse[0].weight != 0).flatten(1).any(1).sum() + (sparse[3].weight != 0).any(1).sum())
        8
    """

    kinds: ClassVar[tuple[str, ...]] = ("filters", "neurons")


@registered
@dataclass(frozen=True)
class Quantize(Scheme):
    """Linear layers and convolutions held and computed in float16 or bfloat16.

    Such a layer rounds what it is given and gives its result in the type that it had, so all else of the network stays.
    While weights are projected they keep their type, with values that the narrow type can say.

    Joseph et al., Condensa, 2020 (``Quantize``).

    Args:
        dtype: ``"float16"`` or ``"bfloat16"``, or the type of torch.
        layers: names or patterns of layers or blocks; by default all.
        ignore: those to leave out.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> half = Quantize("bfloat16").compressed(model)
        >>> half[0].weight.dtype, half(torch.randn(1, 4)).dtype, Quantize().restored(half)[0].weight.dtype
        (torch.bfloat16, torch.float32, torch.float32)
    """

    dtype: str = "float16"
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        check_names(self)
        require(vars(self), dtype=one_of(DTYPES))

    def on(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> Projection:
        """See `Scheme.on`."""
        return Rounding(model, self.layers, self.ignore, DTYPES[self.dtype])

    def parts(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def with_densities(self, densities: Iterable[float]) -> Scheme:
        """Itself: it has no density."""
        return self


@registered
@dataclass(frozen=True, init=False)
class Compose(Scheme):
    """Several schemes one after the other, each on what those before it left; the inverses run backwards.

    Joseph et al., Condensa, 2020 (``Compose``).

    Args:
        schemes: in a list; at least one.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> scheme = Compose([NeuronPrune(0.5), Quantize("float16")])
        >>> scheme.compressed(model, torch.randn(1, 4))[0].weight.dtype
        torch.float16
        >>> Compose.from_json(scheme.to_json()) == scheme
        True
    """

    schemes: tuple[Scheme, ...]

    def __init__(self, schemes: Iterable[Scheme]) -> None:
        wanted = Check(
            lambda value: (
                isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Scheme) for each in value)
            ),
            "give schemes in a list",
        )
        require({"schemes": schemes}, schemes=wanted)
        object.__setattr__(self, "schemes", tuple(part for scheme in schemes for part in scheme.parts()))

    def on(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> Projection:
        """See `Scheme.on`."""
        return Sequential(tuple(scheme.on(model, example_inputs) for scheme in self.schemes))

    def parts(self) -> tuple[Scheme, ...]:
        """The schemes, those of schemes composed inside it one by one."""
        return self.schemes

    def with_densities(self, densities: Iterable[float]) -> Scheme:
        """The same with these densities where none were given, in order."""
        waiting = iter(densities)
        return Compose([part.with_densities(waiting) for part in self.schemes])

    def to_dict(self) -> dict[str, Any]:
        """See `Scheme.to_dict`."""
        return {"scheme": type(self).__name__, "schemes": [scheme.to_dict() for scheme in self.schemes]}

    @classmethod
    def _of(cls, given: Mapping[str, Any]) -> Self:
        held = given.get("schemes")
        if not isinstance(held, list):
            raise LoadError(f"The schemes of Compose are {shown(held)}; a list of schemes is meant.")
        return cls([scheme_of(scheme) for scheme in held])
