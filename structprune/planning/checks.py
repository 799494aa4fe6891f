"""The checks of all options: each gives the value as it is kept, or says what is allowed instead.

A check takes the name of the option and what was given for it. Whatever needs the model, such as whether a layer of
that name exists, is checked where it is looked up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, cast

from torch import nn

from structprune.checking import DATA, FLAG, ON_BATCH, function, is_number, require, shown, whole
from structprune.coupling.graph import Layer
from structprune.coupling.roles import AXES
from structprune.errors import PlanError
from structprune.importance.base import Importance, importance_of
from structprune.importance.data import Batches
from structprune.latency.measure import Latency
from structprune.planning.allocation import ALLOCATIONS, Allocation
from structprune.planning.ratios import Ratio, check_ratio
from structprune.planning.rounding import RoundTo
from structprune.planning.scopes import SCOPES, Curves, Scope
from structprune.planning.targets import TARGETS
from structprune.tracing.trace import OutputName

# What whole parts of a network may go by (see `structprune.branches`), and all kinds of channels as by default.
DEPTH = ("blocks", "branches")
WIDTHS = "widths"
# What a branch is worth; `structprune.depth.scoring` says how each is computed.
BRANCH_SCORES = ("angular", "error", "fisher", "influence", "kl", "loss", "taylor")


def bad(name: str, given: object, allowed: str) -> PlanError:
    """The error for an option of the wrong type or out of its range."""
    return PlanError(f"{name} is {shown(given)}; {allowed}.")


def check_ratios(name: str, given: Any) -> Ratio | None:
    """A share, a function, or shares by layer; None if there is none."""
    if isinstance(given, Mapping):
        if not given:
            raise PlanError(f"{name} is empty; give the share of the channels to remove for one layer or more.")
        shares: Mapping[Any, Any] = given
        return {
            _layer(f"a key of {name}", key): check_ratio(share, f"{name}[{key!r}]") for key, share in shares.items()
        }
    if given is None:
        return None
    if callable(given) and not isinstance(given, nn.Module):
        require({name: given}, **{name: function("group")})
        asked: Any = given
        return asked
    return check_ratio(cast("Any", given), name)


def check_target(name: str, given: Any) -> Mapping[str, float] | None:
    """Amounts by name of `structprune.planning.targets.TARGETS`, or sizes by other names; None if there is none."""
    if given is None:
        return None
    known = ", ".join(TARGETS)
    if not isinstance(given, Mapping):
        raise bad(name, given, f"give what is to remain by name, such as {{'macs': 0.5}}; the names are {known}")
    if not given:
        raise PlanError(f"{name} is empty; give a fraction or an amount for one of {known}.")
    for key, amount in given.items():
        if key not in TARGETS and not (isinstance(key, str) and is_number(amount) and amount >= 1 and amount % 1 == 0):
            raise PlanError(f"{name} names {key!r}; known are {known}, and whole numbers of a model's configuration.")
        if not is_number(amount) or amount <= 0:
            raise bad(f"{name}[{key!r}]", amount, "give what is to remain: a fraction, or a number above 1")
    return {key: float(amount) for key, amount in given.items()}


_OF_GROUP = function("group")


def check_scope(name: str, given: Any) -> Scope | None:
    """One of `structprune.planning.scopes.SCOPES`, curves, a function of the group, or sets of layer names.

    None stands for the default.
    """
    if given is None or isinstance(given, Curves) or (_OF_GROUP.fits(given) and not isinstance(given, type)):
        return given
    allowed = (
        f"it is one of {', '.join(map(repr, SCOPES))}, sets of layer names, such as [['layer1', 'layer2.*']], or a "
        "function of the group"
    )
    if isinstance(given, str):
        known = next((scope for scope in SCOPES if scope == given), None)
        if known is None:
            raise bad(name, given, allowed)
        return known
    if not isinstance(given, Iterable) or isinstance(given, (Mapping, bytes, nn.Module)):
        raise bad(name, given, allowed)
    sets = [_layer_names(names) for names in given]
    if not sets or not all(sets):
        raise bad(name, given, allowed)
    return sets


def _layer_names(given: Any) -> list[str]:
    """One name, or several, as a list; empty if it is something else."""
    names: list[Any] = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    return names if all(isinstance(name, str) and name for name in names) else []


def check_axes(name: str, given: Any) -> tuple[str, ...] | None:
    """Names of `structprune.coupling.roles.AXES`, `DEPTH` or `WIDTHS`, as a sorted tuple; None for all widths."""
    if given is None:
        return None
    known = (*AXES, WIDTHS, *DEPTH)
    allowed = f"give any of {', '.join(map(repr, known))}"
    if not isinstance(given, Iterable):
        raise bad(name, given, allowed)
    axes = (given,) if isinstance(given, str) else tuple(given)
    if not axes or not all(isinstance(axis, str) for axis in axes):
        raise bad(name, given, allowed)
    if unknown := set(axes) - set(known):
        raise PlanError(f"{name} names {', '.join(sorted(unknown))}; known are {', '.join(known)}.")
    return tuple(sorted(set(axes)))


def check_flag(name: str, given: Any) -> bool | None:
    """True or False; None for the default."""
    require({name: given}, **{name: FLAG.or_none})
    return given


def check_branch_score(name: str, given: Any) -> str | None:
    """One of `BRANCH_SCORES`; None for the default."""
    if given is not None and (not isinstance(given, str) or given not in BRANCH_SCORES):
        raise bad(name, given, f"it is one of {', '.join(map(repr, BRANCH_SCORES))}")
    return given


def check_allocation(name: str, given: Any) -> Allocation:
    """One of `structprune.planning.allocation.ALLOCATIONS`."""
    if isinstance(given, str):
        for known in ALLOCATIONS:
            if given == known:
                return known
    raise bad(name, given, f"it is one of {', '.join(map(repr, ALLOCATIONS))}")


def _layer(name: str, given: Any) -> Layer:
    if isinstance(given, nn.Module) or (isinstance(given, str) and given):
        return given
    raise bad(name, given, "a layer is a module of the model or its dotted name")


def check_ignore(name: str, given: Any) -> tuple[Layer, ...]:
    """The layers to leave whole, one alone or several, as a tuple.

    Raises:
        PlanError: one is neither a module nor a name.
    """
    if isinstance(given, (str, nn.Module)) or not isinstance(given, Iterable):
        return (_layer(name, given),)
    layers = tuple(given)
    for number, layer in enumerate(layers):
        _layer(f"{name}[{number}]", layer)
    return layers


def check_outputs(name: str, given: Any) -> tuple[OutputName, ...] | None:
    """The names of the outputs that keep their shape, one alone or several, as a tuple; None for all.

    Raises:
        PlanError: one is neither a name nor a position.
    """
    if given is None:
        return None
    names = (given,) if isinstance(given, (str, int)) or not isinstance(given, Iterable) else tuple(given)
    if not names:
        raise bad(name, given, "give names or positions of outputs, or None for all")
    for output in names:
        if isinstance(output, bool) or not isinstance(output, (str, int)):
            raise bad(name, given, "give names or positions of outputs")
    return names


def check_round_to(name: str, given: Any) -> RoundTo:
    """A whole number from 1, or ``"auto"``."""
    if given == "auto" and isinstance(given, str):
        return "auto"
    if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
        raise bad(name, given, "give a whole number from 1, or 'auto'")
    return int(given)


def check_min_channels(name: str, given: Any) -> int:
    """A whole number from 1."""
    if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
        raise bad(name, given, "a group keeps at least 1 channel: give a whole number from 1")
    return int(given)


def check_devices(name: str, given: Any) -> int | None:
    """A whole number from 1; None where no devices share layers."""
    require({name: given}, **{name: whole(1).or_none})
    return given


def check_max_ratio(name: str, given: Any) -> float:
    """A share from 0 to 1."""
    if not is_number(given) or not 0 <= given <= 1:
        raise bad(name, given, "it is a share of the channels, from 0 to 1")
    return float(given)


def check_importance(name: str, given: Any) -> str | Importance:
    """The name of a criterion, or one."""
    importance_of(given, name)
    return given


def check_data(name: str, given: Any) -> Iterable[Any] | Batches | None:
    """Batches, one after the other; None if there are none."""
    if not isinstance(given, Batches):
        require({name: given}, **{name: DATA.or_none})
    return given


def check_function(name: str, given: Any) -> Any:
    """A function of a model and a batch; None if there is none."""
    require({name: given}, **{name: ON_BATCH.or_none})
    return given


def check_latency(name: str, given: Any) -> Latency | None:
    """A `Latency`; None if there is none."""
    if given is not None and not isinstance(given, Latency):
        raise bad(name, given, "give a structprune.Latency, such as Latency(backend='onnxruntime')")
    return given
