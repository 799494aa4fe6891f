"""What a compression scheme is: a projection of weights, a plain value, plain JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

from torch import nn

from structprune.checking import MODEL, Check, real, require, shown
from structprune.errors import LoadError, PlanError
from structprune.masks.compacting import permanent
from structprune.search.layer_types import restored_layers
from structprune.search.projections import Projection, fill, values_of
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import unwrapped

_DENSITY = real(above=0, most=1).or_none
_NAMES = Check(
    lambda value: isinstance(value, tuple) and all(isinstance(name, str) and name for name in value),
    "give names or patterns of layers, such as ('stage1.*',)",
)


class Scheme(ABC):
    """How a network is compressed: a projection of its weights, bound to a model by `on`."""

    removes_channels: ClassVar[bool] = False

    @abstractmethod
    def on(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> Projection:
        """The projection of this model's parameters.

        Args:
            model: it is looked at, and not changed.
            example_inputs: what the model accepts; schemes that remove coupled channels need them.

        Raises:
            PlanError: a density is missing, a name matches no layer, or the scheme finds nothing to compress.
        """

    @abstractmethod
    def parts(self) -> tuple[Scheme, ...]:
        """The schemes that this one is composed of; itself if it is not."""

    @abstractmethod
    def with_densities(self, densities: Iterable[float]) -> Scheme:
        """The same with these densities where none were given, in order."""

    @property
    def open_densities(self) -> int:
        """How many densities are left to be found."""
        return sum(getattr(part, "density", 0.0) is None for part in self.parts())

    @property
    def structured(self) -> bool:
        """Whether whole coupled channels go."""
        return any(part.removes_channels for part in self.parts())

    def compressed(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> nn.Module:
        """A compressed copy: zeros where something is pruned, and layers of another type where they are quantized.

        `structprune.masks.compact` then makes a smaller network of what structured schemes set to zero.

        Args:
            model: it stays as it was.
            example_inputs: what the model accepts; schemes that remove coupled channels need them.

        Raises:
            PlanError: see `on`.
        """
        require(locals(), model=MODEL)
        result = permanent(unwrapped(model))
        projection = self.on(result, example_inputs)
        fill(result, projection.compressed(values_of(result)))
        return projection.realised(result)

    def restored(self, model: nn.Module) -> nn.Module:
        """The inverse: a copy in the dense form, from which training can go on. What was lost stays lost.

        Layers that are held in another type get the one that they had. Zeros are dense weights already.

        Args:
            model: what `compressed` gave; it stays as it was.
        """
        require(locals(), model=MODEL)
        return restored_layers(permanent(unwrapped(model)))

    # -- plain JSON ----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The scheme as plain data: its name under ``"scheme"``, and its settings.

        Raises:
            PlanError: its criterion is an object of your own; give a name.
        """
        given = asdict(self)  # type: ignore[call-overload]  # each scheme is a dataclass, the base is none
        if not isinstance(given.get("criterion", ""), str):
            raise PlanError("criterion is an object, which JSON cannot say; give the name of a criterion.")
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        return {"scheme": type(self).__name__, **plain}

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> Scheme:
        """The scheme that `to_json` or `to_dict` wrote.

        Args:
            text: JSON, or what it holds.

        Raises:
            LoadError: it is no scheme.
            PlanError: a setting is out of its range.
        """
        if isinstance(text, str):
            try:
                text = json.loads(text)
            except json.JSONDecodeError as error:
                raise LoadError(f"The text is no JSON: {error}") from error
        return scheme_of(text)

    @classmethod
    def _of(cls, given: Mapping[str, Any]) -> Self:
        """The scheme with these settings, as JSON has them."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


SCHEMES: dict[str, type[Scheme]] = {}
T = TypeVar("T", bound=type[Scheme])


def registered(kind: T) -> T:
    """Let JSON name a scheme by its class."""
    SCHEMES[kind.__name__] = kind
    return kind


def scheme_of(given: Any) -> Scheme:
    """A scheme as it is, or that of a mapping with its name under ``"scheme"``.

    Raises:
        LoadError: it is none.
    """
    if isinstance(given, Scheme):
        return given
    if not isinstance(given, Mapping) or given.get("scheme") not in SCHEMES:
        raise LoadError(
            f"A scheme is {shown(given)}; give one of structprune.search, or a dict whose 'scheme' is one of "
            f"{', '.join(SCHEMES)}."
        )
    kind = SCHEMES[given["scheme"]]
    settings = {name: value for name, value in given.items() if name != "scheme"}
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # as above
    for name in settings:
        if name not in known:
            raise LoadError(f"{given['scheme']} has no setting {name!r}; those known are {', '.join(sorted(known))}.")
    return kind._of(settings)


def check_names(scheme: Scheme) -> None:
    """Names of layers as tuples; one alone need not be in a list."""
    for name in ("layers", "ignore"):
        given = getattr(scheme, name)
        if isinstance(given, (str, list)):
            object.__setattr__(scheme, name, (given,) if isinstance(given, str) else tuple(given))
    require(vars(scheme), layers=_NAMES, ignore=_NAMES)


@dataclass(frozen=True)
class LayerScheme(Scheme):
    """A scheme that is not composed of others."""

    density: float | None = None
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_names(self)
        require(vars(self), density=_DENSITY)

    def parts(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def with_densities(self, densities: Iterable[float]) -> Scheme:
        """The same with the first of these densities, if it has none."""
        return replace(self, density=next(iter(densities))) if self.open_densities else self

    def required_density(self) -> float:
        """The density.

        Raises:
            PlanError: there is none.
        """
        if self.density is None:
            raise PlanError(
                f"{type(self).__name__} has no density. Give one, from above 0 to 1, or an objective to find it by."
            )
        return self.density
