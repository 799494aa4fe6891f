"""Why a smaller model is not as much faster as it is smaller, and which layer takes most of its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from structprune.benchmarking.counting import Counted
from structprune.benchmarking.machine import Machine
from structprune.benchmarking.profiling import Profile, by_layer

# A cause is named if it accounts for so much of the smaller model's time.
SHARE = 0.4
# What odd widths cost beyond the price of their MACs is named from this share on.
LOST = 0.05
# Below this efficiency it is asked why.
POOR = 0.8

_ADVICE = {
    "launch": "Use larger batches, or a backend that fuses operations (compile, onnxruntime).",
    "memory": "Prune what carries these tensors too (the residual stream), or fuse elementwise operations.",
    "widths": "Let the plan round widths (round_to='auto'), or give a greater round_to.",
    "untouched": "Allow these layers to be pruned, or take the rest of the network for what it is.",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a model gains less than its MACs promise.

    Attributes:
        model: its name.
        backend: where it ran.
        batch_size: samples in one run.
        causes: the share of its time that each cause accounts for, the largest first: ``"launch"`` (starting
            operations), ``"memory"`` (moving bytes), ``"widths"`` (padding and slower kernels), ``"untouched"``
            (layers that lost nothing). Shares of two causes may overlap; none, if no single cause stands out.
        layer: the layer that takes most of its time.
        share: the share of the time of all operations that this layer takes.
        text: all of it in words.
    """

    model: str
    backend: str
    batch_size: int
    causes: Mapping[str, float]
    layer: str
    share: float
    text: str


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models that are compared.

    Attributes:
        seconds: its median time.
        counted: what its layers take, counted.
        profile: where its time goes, measured.
    """

    seconds: float
    counted: Mapping[str, Counted]
    profile: Profile


def causes(dense: Side, slim: Side, machine: Machine, step: int, *, starts_counted: bool) -> dict[str, float]:
    """Shares of the smaller model's time by cause, those that are large enough to be named, the largest first.

    Args:
        dense: the model that the other one is compared with.
        slim: the smaller model.
        machine: what the device can do.
        step: the number of channels that kernels take at a time.
        starts_counted: whether the time of starting operations is part of what the profile tells; otherwise it is
            what the run takes beyond that.
    """
    times = by_layer(slim.profile.spent)
    total = sum(times.values())
    if not total:
        return {}
    starts = {layer: _start(counted, machine) for layer, counted in slim.counted.items()}
    known = {layer: seconds / total for layer, seconds in times.items() if layer in slim.counted}
    beyond_profile = 1 - total / (slim.profile.seconds or slim.seconds)
    shares = {
        "launch": sum(starts.values()) / slim.seconds if starts_counted else beyond_profile,
        "memory": _of_layers(known, lambda layer: _moves(slim.counted[layer], machine, starts[layer])),
        "untouched": _of_layers(known, lambda layer: _untouched(layer, dense, slim)),
    }
    named = {name: min(1.0, share) for name, share in shares.items() if share >= SHARE}
    # Where starting takes longer than computing, widths do not matter.
    busy = [layer for layer in known if slim.counted[layer].macs / machine.macs > starts[layer]]
    lost = sum(_lost(layer, dense, slim, step) for layer in busy) / total
    if lost >= LOST:
        named["widths"] = lost
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def _of_layers(shares: Mapping[str, float], which: Callable[[str], bool]) -> float:
    return sum(share for layer, share in shares.items() if which(layer))


def _start(counted: Counted, machine: Machine) -> float:
    """Seconds that starting the operations of a layer takes."""
    return sum(machine.start[kind] * number for kind, number in counted.operations.items())


def _moves(layer: Counted, machine: Machine, start: float) -> bool:
    """Whether a layer's bytes take longer than its MACs, and than starting its operations."""
    moving = layer.bytes / machine.bytes
    return moving > layer.macs / machine.macs and moving > start


def _untouched(layer: str, dense: Side, slim: Side) -> bool:
    """Whether a layer computes and moves as much as before."""
    before, after = dense.counted.get(layer), slim.counted[layer]
    return before is not None and (before.macs, before.bytes) == (after.macs, after.bytes)


def _lost(layer: str, dense: Side, slim: Side, step: int) -> float:
    """Seconds that a layer takes beyond what its MACs cost before, if a new width is no multiple of `step`."""
    before, after = dense.counted.get(layer), slim.counted[layer]
    if before is None or not before.macs or not odd_widths(before, after, step):
        return 0.0
    was = sum(each.seconds for each in dense.profile.spent if each.layer == layer)
    now = sum(each.seconds for each in slim.profile.spent if each.layer == layer)
    return max(0.0, now - was * after.macs / before.macs)


def odd_widths(before: Counted, after: Counted, step: int) -> list[int]:
    """New widths of a layer that are no multiples of `step`, though the old ones were."""
    pairs = zip(before.widths, after.widths, strict=False)
    return [new for old, new in pairs if new != old and new % step and not old % step]


def explain(
    name: str,
    backend: str,
    batch_size: int,
    dense: Side,
    slim: Side,
    machine: Machine,
    step: int,
    *,
    gain: str,
    starts_counted: bool,
) -> Explanation:
    """Put into words why `slim` gains no more than `gain`.

    Args:
        name: of the smaller model.
        backend: where it ran.
        batch_size: samples in one run.
        dense: the model that the other one is compared with.
        slim: the smaller model.
        machine: what the device can do.
        step: the number of channels that kernels take at a time.
        gain: the speed-up in words.
        starts_counted: see `causes`.
    """
    reasons = causes(dense, slim, machine, step, starts_counted=starts_counted)
    times = by_layer(slim.profile.spent)
    layer = next(iter(times), "")
    share = times[layer] / sum(times.values()) if times else 0.0
    said = [f"{name} on {backend}, batch of {batch_size}: {gain}"]
    said += [_sentence(cause, part, dense, slim, machine, step) for cause, part in reasons.items()]
    if not reasons:
        said.append("No single cause stands out.")
    if times:
        where = layer or "operations outside of all layers"
        said.append(f"The largest share of the time, {share:.0%}, goes to {where}.")
    if reasons:
        said.append(_ADVICE[next(iter(reasons))])
    return Explanation(name, backend, batch_size, reasons, layer, share, " ".join(said))


def _sentence(cause: str, share: float, dense: Side, slim: Side, machine: Machine, step: int) -> str:
    if cause == "launch":
        number = sum(sum(each.operations.values()) for each in slim.counted.values())
        return (
            f"Launch-bound: {share:.0%} of the {slim.seconds * 1e3:.3g} ms go into starting {number} operations, "
            f"{slim.seconds / max(1, number) * 1e6:.3g} µs each with all they do; that does not shrink with the widths."
        )
    if cause == "memory":
        macs = sum(each.macs for each in slim.counted.values())
        moved = sum(each.bytes for each in slim.counted.values())
        return (
            f"Memory-bound: {share:.0%} of the time is spent where moving bytes takes longer than computing; in all "
            f"{moved / 1e6:.3g} MB for {macs / 1e6:.3g} M MACs, {macs / max(1, moved):.2g} MACs a byte, where this "
            f"device computes {machine.macs / machine.bytes:.2g} while it moves one."
        )
    if cause == "widths":
        odd = {
            layer: odd_widths(dense.counted[layer], after, step)
            for layer, after in slim.counted.items()
            if layer in dense.counted
        }
        layers = [layer for layer, widths in odd.items() if widths]
        worst = max(layers, key=lambda layer: _lost(layer, dense, slim, step))
        return (
            f"Odd widths: {len(layers)} layers have widths that are no multiples of {step}, which costs {share:.0%} of "
            f"the time beyond their MACs; most in {worst} ({', '.join(map(str, odd[worst]))})."
        )
    return f"Untouched: {share:.0%} of the time is spent in layers that compute and move as much as before."
