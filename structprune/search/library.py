"""`library`: each group of channels at several widths, solved and measured once; plans for any target come from it.

The data pass through the model once for as many groups as memory allows. Each group is then cut to each of its widths,
alone, with the layers that consume it solved again, and the output of that network is compared with the whole one's.
These losses are taken to add up, so that a plan for a target is a choice of one width for each group: a small
mixed-integer programme, without any data. What is not additive is left to `Library.evolve`, which compares whole
networks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from structprune.api import coupled_channels
from structprune.api import plan as make_plan
from structprune.checking import (
    DATA,
    FLAG,
    INPUTS,
    MODEL,
    ON_BATCH,
    PATH,
    SEED,
    Check,
    instance,
    real,
    require,
    several,
    whole,
)
from structprune.coupling.groups import Group
from structprune.distributed import apart, failing_together, gathered
from structprune.errors import PlanError, RecoveryError
from structprune.forwards.batches import Forward
from structprune.forwards.turns import Turns
from structprune.html import html_table
from structprune.importance.weight import LnNorm
from structprune.planning.options import PlanKeywords, PlanOptions
from structprune.planning.plan import Plan
from structprune.recovery.prices import prices
from structprune.recovery.probes import Probes
from structprune.search.entries import Entry, Shelf, key_of
from structprune.search.evolution import Evolution, Evolved, Search
from structprune.search.making import Making, Measuring
from structprune.search.outputs import DISTANCE, Distance, Outputs, distance_of, name_of
from structprune.search.solving import Stream, changed
from structprune.search.widths import Widths
from structprune.tracing.state import copy_buffer, held_tensors, swapped_tensors
from structprune.tracing.trace import ExampleInputs, preserved_random_state
from structprune.wrapping import prunable

LEVELS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
# What is asked of `plan` and means nothing while a library is made, or is what the library itself decides.
_NOT_HERE = ("ratio", "target", "importance", "scope", "allocation", "uniform", "data", "loss", "latency", "forward")


class Library:
    """What every group of channels loses at several widths, with the layers solved for each.

    See `structprune.library` for an example. It is a criterion and a scope of its own: ``structprune.plan(...,
    importance=library, scope=library)``.

    Args:
        model: the whole network.
        example_inputs: what it is traced on.
        options: those of `structprune.plan` that it was made with.
        shelf: the entries.
        distance: how outputs were compared.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        options: Mapping[str, Any],
        shelf: Shelf,
        distance: Distance,
    ) -> None:
        self._model, self._inputs, self._options = model, example_inputs, dict(options)
        self._shelf, self._distance = shelf, distance
        self._norm = LnNorm(2.0)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """One for each group."""
        return tuple(self._shelf.values())

    def __repr__(self) -> str:
        """How much was measured; the table is shown by notebooks, and in `entries`."""
        widths = sum(len(entry.kept) for entry in self.entries)
        return f"Library({type(self._model).__name__}: {len(self._shelf)} groups, {widths} widths)"

    def _repr_html_(self) -> str:
        """A line for each group: what is lost at each width."""
        most = max((len(entry.kept) for entry in self.entries), default=0)
        lines = [
            [entry.group, entry.axis, str(entry.channels)]
            + [f"{loss:.3g} ({kept})" for kept, loss in zip(entry.kept, entry.loss, strict=True)]
            for entry in self.entries
        ]
        return html_table(["group", "axis", "channels", *(f"level {i + 1}" for i in range(most))], lines, repr(self))

    @property
    def distance(self) -> Distance:
        """How outputs were compared: a sum over the samples."""
        return self._distance

    @property
    def made_with(self) -> dict[str, Any]:
        """The options of `structprune.plan` that it was made with."""
        return dict(self._options)

    # -- a criterion and a scope -----------------------------------------------------------------------------------

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``: the place of each channel in the order in which they go."""
        entry = self._entry(group)
        if entry is None:
            return self._norm(group, tensors)
        scores = np.empty(entry.channels)
        scores[entry.order] = np.arange(entry.channels)
        return torch.from_numpy(scores)

    def depth(self, group: Group, kept: NDArray[Any]) -> NDArray[np.float64]:
        """What the last channel that goes costs, over what it saves: the slope of the losses' convex hull."""
        entry = self._known(group)
        counts = [entry.channels - int(count) for count in entry.kept]
        price = prices(np.maximum(entry.error, 1e-30), counts, entry.loss.tolist()) / entry.saved
        return price[np.minimum(entry.channels - kept, entry.channels - 1) - 1]

    def total(self, group: Group, kept: NDArray[Any]) -> NDArray[np.float64]:
        """What is lost when the group alone keeps so many channels: as measured, and in between on straight lines."""
        entry = self._known(group)
        gone = np.append(0, entry.channels - entry.kept)
        return np.interp(entry.channels - kept, gone, np.maximum.accumulate(np.append(0.0, entry.loss)))

    def known(self, group: Group, feasible: NDArray[Any]) -> NDArray[Any]:
        """The feasible numbers of channels that the group was measured with, and all of them."""
        entry = self._entry(group)
        measured = np.empty(0, dtype=np.int64) if entry is None else entry.kept
        return feasible[np.isin(feasible, np.append(measured, group.channels))]

    def _entry(self, group: Group) -> Entry | None:
        return self._shelf.get(key_of(group))

    def _known(self, group: Group) -> Entry:
        entry = self._entry(group)
        if entry is None:
            raise PlanError(f"{group.name!r} is not in the library. Make it of this very model, with all its axes.")
        return entry

    # -- plans -----------------------------------------------------------------------------------------------------

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a plan by this library: what it was made with, and what is given beside it."""
        return {"allocation": "exact", **self._options, **given, "importance": self, "scope": self, "round_to": 1}

    def plan(self, **options: Unpack[PlanKeywords]) -> Plan:
        """The plan that loses least within a target; no data are looked at.

        Args:
            options: ``target``, and others of `structprune.plan`; widths are those of the library.

        Raises:
            PlanError: what is asked for cannot be planned.
        """
        return make_plan(self._model, self._inputs, **self.options(options))

    def evolve(
        self,
        data: Iterable[Any],
        *,
        how: Evolution | None = None,
        probes: int = 256,
        forward: Forward | None = None,
        **options: Any,
    ) -> Evolved:
        """The plan of `plan`, refined: widths are exchanged between groups as long as the whole network loses less.

        What is compared are networks with the layers of the library (`assemble`), by their true outputs.

        Args:
            data: batches as for `library`; best the same, since layers were not solved on the first of them.
            how: how many generations, offspring and switches; by default those of `Evolution`.
            probes: samples to compare on: those that come first, batch by batch. The smaller the batches, the sooner
                bad offspring are dropped. Each rank of ``torch.distributed`` searches for itself: give all of them the
                same data.
            forward: as for `library`.
            options: as for `plan`; there is a target.

        Raises:
            PlanError: what is asked for cannot be planned.
            RecoveryError: there is no data, or it does not fit the model.
        """
        require(locals(), data=DATA, how=_EVOLUTION.or_none, probes=whole(1), forward=ON_BATCH.or_none)
        with apart():
            return self._evolved(Stream(self._model, data, forward).probes(probes), how or Evolution(), options)

    def _evolved(self, probes: Probes, how: Evolution, options: Mapping[str, Any]) -> Evolved:
        outputs = Outputs(self._model, probes, self._distance)
        while True:
            widths = self.widths(options)
            search = Search(widths.problem, outputs, lambda states, widths=widths: widths.network(states), how)
            best, history = search.go(widths.start)
            if (plan := widths.plan(best)) is not None:
                break
        lost = search.lost(widths.start, len(outputs)), search.lost(best, len(outputs))
        return Evolved(plan, *lost, tuple(history), search.evaluations)

    def widths(self, options: Mapping[str, Any]) -> Widths:
        """The widths that there are to choose from; see `Widths`.

        Args:
            options: as for `plan`; there is a target.
        """
        return Widths(self, coupled_channels(self._model, self._inputs, PlanOptions(**self.options(options))), options)

    def assemble(self, plan: Plan) -> nn.Module:
        """The pruned model with the layers that were solved for its widths.

        Args:
            plan: of this library.

        Raises:
            PlanError: the plan takes other channels than the library does, or other numbers of them.
        """
        require(locals(), plan=_PLAN)
        graph = coupled_channels(self._model, self._inputs, PlanOptions(**self._options))
        return self.assembled(plan, {group: self._kept_by(plan, group) for group in graph.groups()})

    def assembled(self, plan: Plan, kept: Mapping[Group, int]) -> nn.Module:
        """The same where it is known how many channels each group keeps."""
        changes: dict[str, Tensor] = {}
        for group, count in kept.items():
            if count < group.channels:
                for name, change in self._shelf.changes(key_of(group), count).items():
                    changes[name] = changes.get(name, 0) + change
        return changed(plan.apply(self._model), plan, changes)

    def _kept_by(self, plan: Plan, group: Group) -> int:
        """How many channels of a group a plan keeps.

        Raises:
            PlanError: they are none of the library.
        """
        member = group.members[0]
        gone = np.array(plan.removed.get(member.tensor, {}).get(member.dim, ()), dtype=np.int64)
        channels = np.unique(member.channels[np.isin(member.positions, gone)])
        kept = group.channels - len(channels)
        if len(channels):
            entry = self._known(group)
            if kept not in entry.kept or not np.array_equal(np.sort(entry.order[: len(channels)]), channels):
                raise PlanError(
                    f"The plan keeps {kept} channels of {group.name!r}, which is none of the widths of the library "
                    f"({', '.join(map(str, entry.kept))}), or other ones. Give a plan that this library made."
                )
        return kept


_EVOLUTION = instance(Evolution, "give a structprune.search.evolution.Evolution")
_PLAN = Check(lambda value: isinstance(value, Plan), "give a plan of this library")


# -- made ----------------------------------------------------------------------------------------------------------


def library(
    model: nn.Module,
    example_inputs: ExampleInputs,
    data: Iterable[Any] | None = None,
    *,
    levels: Sequence[float] = LEVELS,
    folder: str | os.PathLike[str] | None = None,
    distance: str | Distance = "kl",
    probes: int = 256,
    rows: int = 65536,
    memory: int = 1 << 30,
    seed: int = 0,
    forward: Forward | None = None,
    progress: bool = False,
    **options: Any,
) -> Library:
    """Every group of channels at several widths: the layers that consume it solved for each, and what the output loses.

    Made once, it gives plans for any target without a look at the data: `Library.plan`. Neither labels nor gradients
    are needed. Which channels go first, and how consumers are solved, is as in `structprune.Reconstruction`; what is
    lost is measured on the network that is really cut, on samples that no layer was solved on.

    Frantar and Alistarh, SPDY, 2022 and Kurtic et al., ZipLM, 2023 keep such a database for one kind of layer; here it
    is for whatever is coupled.

    Where ``torch.distributed`` is in use, every rank gives its share of the data, in turns as for
    `structprune.recover`, and all get the same library; each writes it to its `folder`, which may be one and the same.

    Args:
        model: any ``nn.Module`` whose forward can be traced; it is left as it was.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        data: batches as for `structprune.recover`. They are run through one at a time, a few times over: a
            ``DataLoader`` has to give the same batches each time. Not needed where `folder` holds the whole library.
        levels: shares of the channels of each group to remove, above 0 and below 1.
        folder: where the entries are kept, a safetensors file for each group. A run that was cut short goes on from
            there. None: in memory.
        distance: ``"kl"``, the divergence of the softmax over the last dimension, for classifiers and language
            models; ``"squared_error"`` for all else, and for classifiers on images that they were trained on, of
            which they are too sure; or a function of the two outputs, summed over samples.
        probes: samples to measure on, at least one batch: those that come first. Layers are not solved on them if the
            others are at least as many; else on the first three quarters of each batch.
        rows: how many positions (pixels, tokens) of all batches together a layer is solved on; drawn at random.
        memory: bytes that second moments may take; where they do not fit, the data pass through more often.
        seed: of the draw.
        forward: called with the model and a batch, where batches are something else than the above.
        progress: whether to draw a progress bar.
        options: ``axes``, ``round_to``, ``min_channels``, ``ignore`` and others of `structprune.plan` that say what
            may go.

    Raises:
        PlanError: an argument is none that can be, the folder holds another library, or there is nothing to prune.
        RecoveryError: there is no data where it is needed, or it does not fit the model.
        LoadError: a file in the folder is damaged.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = [torch.randn(64, 4)]
        >>> library = structprune.library(model, data[0], data, levels=(0.25, 0.5), round_to=1)
        >>> plan = library.plan(target={"macs": 0.5})
        >>> plan.layers
        (LayerWidth(layer='0', before=8, after=4),)
        >>> slim = structprune.recover(library.assemble(plan), model, data)
    """
    shares = several(real(above=0, below=1), "shares of channels to remove, above 0 and below 1")
    named = {"model": MODEL, "example_inputs": INPUTS, "data": DATA.or_none, "levels": shares, "folder": PATH.or_none}
    named |= {"distance": DISTANCE, "probes": whole(1), "rows": whole(1), "memory": whole(1), "seed": SEED}
    require(locals(), **named, forward=ON_BATCH.or_none, progress=FLAG)
    if wrong := sorted(set(options).intersection(_NOT_HERE)):
        raise PlanError(f"{wrong[0]} is no option of a library, which holds all widths. Give it to library.plan.")
    model = prunable(model)
    asked = PlanOptions(**options)
    settings: dict[str, Any] = {
        "weights": _digest(model),
        "options": {name: repr(value) for name, value in sorted(options.items())},
        "levels": sorted(set(levels)),
        "distance": name_of(distance),
        "data": None,
    }
    how = Measuring(
        distance=distance_of(distance), probes=probes, rows=rows, memory=memory, seed=seed, progress=progress
    )
    with failing_together(RecoveryError, "library"):
        stream = None if data is None else Stream(model, data, forward)
        if stream is not None:
            samples = list(Turns.of(stream.sizes).sizes)
            settings["data"] = {"samples": samples, "probes": probes, "rows": rows, "seed": seed}
        shelf = Shelf(None if folder is None else Path(folder), settings)
        making = Making(model, example_inputs, asked, sorted(set(levels)))
        missing = max(gathered(len(making.missing(shelf))))  # all ranks have opened the folder before one writes to it
        if missing and stream is None:
            raise PlanError(f"The library lacks {missing} groups. Give data, so that they can be measured.")
        if missing and stream is not None:
            graph_inputs = next(iter(stream))  # forwards may branch on the size of the batch
            making = Making(model, graph_inputs, asked, sorted(set(levels)))
            with preserved_random_state(), torch.no_grad(), swapped_tensors(model, copy_buffer, track=False):
                model.eval()
                making.fill(shelf, stream, how)
    return Library(model, example_inputs, options, shelf, how.distance)


def _digest(model: nn.Module) -> str:
    """Names, shapes and values of all tensors of a model."""
    digest = hashlib.sha256()
    for name, held in sorted(held_tensors(model).items()):
        digest.update(f"{name} {tuple(held.tensor.shape)} {held.tensor.dtype} ".encode())
        if not held.tensor.is_meta:
            digest.update(held.tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]
