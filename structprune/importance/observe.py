"""Running a model over data and looking at chosen tensors on the way, and leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structprune.coupling.graph import ChannelGraph
from structprune.errors import PlanError
from structprune.importance.activations import Activation
from structprune.importance.data import Batches, samples_of
from structprune.importance.sites import Site
from structprune.tracing.containers import leaves_of
from structprune.tracing.replay import Replay, ReplayedCall
from structprune.tracing.state import swapped_tensors
from structprune.tracing.trace import Trace, map_tensors, preserved_random_state, tensors_in

Visit = Callable[[Activation], Tensor | None]
VisitResult = Callable[[Activation, Tensor], Tensor]


class Watch:
    """Hands the tensors of sites to `visit`, and puts what that returns, if anything, in their place.

    Args:
        trace: of the model.
        sites: where to look.
        visit: called with each observed tensor.
        visit_result: called with the result of each operation that has a site on an argument.
    """

    def __init__(
        self, trace: Trace, sites: Iterable[Site], visit: Visit, visit_result: VisitResult | None = None
    ) -> None:
        self._visit, self._visit_result = visit, visit_result
        wanted: dict[int, list[tuple[int, Site]]] = {}
        for number, site in enumerate(sites):
            wanted.setdefault(site.operation, []).append((number, site))
        hooks = {operation: partial(self._operation, here) for operation, here in wanted.items()}
        self._replay = Replay(trace, hooks, error=PlanError, begin=self._begin)
        self.samples = 1

    @property
    def forwards(self) -> int:
        """How many forwards of the model ran."""
        return self._replay.forwards

    def over(self, model: nn.Module) -> AbstractContextManager[Any]:
        """While the block runs, each forward of the model is observed."""
        return self._replay.over(model)

    def _begin(self, *inputs: Any) -> None:
        self.samples = next((tensor.shape[0] for tensor in tensors_in(inputs) if tensor.dim()), 1)

    def _operation(self, wanted: list[tuple[int, Site]], operation: ReplayedCall) -> Any:
        tensors = list(leaves_of([operation.args, operation.kwargs], Tensor, slices=True))
        activations: list[Activation] = []
        for number, site in wanted:
            if site.operand >= 0:
                activations.append(self._activation(number, site, tensors[site.operand], tensors, operation))
                changed = self._visit(activations[-1])
                if changed is not None:
                    operation.args, operation.kwargs = _replaced(
                        (operation.args, operation.kwargs), site.operand, changed
                    )
        result = operation()
        for number, site in wanted:
            if site.operand < 0:
                result = self._on_result(number, site, result, tensors, operation)
        if self._visit_result is not None:
            for one in activations:
                result = self._visit_result(one, result)
        return result

    def _on_result(self, number: int, site: Site, result: Any, tensors: list[Tensor], operation: ReplayedCall) -> Any:
        several = isinstance(result, (tuple, list))
        x = result[site.part] if several else result
        changed = self._visit(self._activation(number, site, x, tensors, operation))
        if changed is None:
            return result
        if not several:
            return changed
        items = list(result)
        items[site.part] = changed
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)

    def _activation(
        self, number: int, site: Site, x: Tensor, tensors: list[Tensor], operation: ReplayedCall
    ) -> Activation:
        if x.dim() < -site.dim or x.shape[site.dim] != site.size:
            raise PlanError(
                f"On the data a tensor of {site.where} has the shape {list(x.shape)}, where dimension {site.dim} "
                f"should have {site.size} channels as on the example inputs."
            )
        weight = tensors[site.weight].detach() if site.weight >= 0 else None
        return Activation(number, x, site.dim, weight, site.weight_dim, self.samples, operation, site.where)


def _replaced(value: Any, operand: int, new: Tensor) -> Any:
    """Nested arguments with tensor number `operand` exchanged."""
    counter = iter(range(1 << 30))
    return map_tensors(lambda tensor: new if next(counter) == operand else tensor, value)


def _swapped(tensor: Tensor, gradients: bool) -> Tensor:
    """What the model computes with: a parameter that shares the memory, so that no gradient or hook of its own is met.

    Buffers are copied, since forwards write into them.
    """
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().clone()
    plain = tensor.detach().clone() if tensor.is_inference() else tensor.detach()
    return nn.Parameter(plain, requires_grad=gradients and (plain.is_floating_point() or plain.is_complex()))


@contextmanager
def on_swapped_tensors(model: nn.Module, *, gradients: bool = False) -> Generator[None]:
    """While the block runs, the model is in eval mode, and other tensors with the same values are in it.

    Afterwards the model, its mode, buffers, gradients and flags, and the random state are as they were.

    Args:
        model: the model.
        gradients: whether the parameters in it require gradients.

    Raises:
        PlanError: weights are on the ``meta`` device.
    """
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise PlanError(
            "The model's weights are on the meta device, so it cannot run on data. Load real weights, or choose "
            "importance='random'."
        )
    replace = partial(_swapped, gradients=gradients)
    with torch.inference_mode(False), preserved_random_state(), swapped_tensors(model, replace, track=False):
        model.eval()
        yield


def look(
    graph: ChannelGraph, batches: Batches, sites: Iterable[Site], visit: Callable[[Activation, Any], None]
) -> None:
    """One pass over the data without gradients; `visit` is called with each observed tensor and its batch.

    Raises:
        PlanError: the data, or what the forward does on it, is not as it should be.
    """
    batch: Any = None
    watch = Watch(graph.trace, sites, lambda activation: visit(activation, batch))
    with on_swapped_tensors(graph.model), torch.no_grad(), watch.over(graph.model):
        for batch in batches.once("looking at activations", graph.model):
            forwards = watch.forwards
            batches.forward(graph.model, batch)
            _require_forward(watch.forwards - forwards, "forward")


def _require_forward(count: int, name: str) -> None:
    if not count:
        raise PlanError(f"{name}= did not call the model that it was given, so there was nothing to look at.")


def losses(
    model: nn.Module, batches: Batches, watch: Watch, what: str, *, by_sample: bool = False
) -> Generator[tuple[Tensor, int]]:
    """The sum of the losses of a batch's samples, and how many they are, for one batch after the other.

    Args:
        model: the model, on swapped tensors.
        batches: data and loss.
        watch: follows the model.
        what: stands before the progress bar.
        by_sample: whether samples are run one by one.

    Raises:
        PlanError: the data, the loss, or what the forward does on the data is not as it should be.
    """
    for batch in batches.once(what, model):
        for piece in samples_of(batch) if by_sample else (batch,):
            forwards = watch.forwards
            value = batches.loss(model, piece)
            _require_forward(watch.forwards - forwards, "loss")
            yield (value * watch.samples if batches.reduction == "mean" else value), watch.samples


def descend(
    graph: ChannelGraph,
    batches: Batches,
    sites: Iterable[Site],
    visit: Visit,
    visit_result: VisitResult | None,
    after: Callable[[Tensor, int], None],
) -> None:
    """One pass over the data with gradients at sites; parameters need none.

    Args:
        graph: the graph of the model.
        batches: data and loss.
        sites: where to look.
        visit: may put another tensor in place of an observed one.
        visit_result: the same for results of operations with a site on an argument.
        after: called with the sum of the losses of a batch's samples, and how many they are.

    Raises:
        PlanError: the data, the loss, or what the forward does on the data is not as it should be.
    """
    watch = Watch(graph.trace, sites, visit, visit_result)
    with on_swapped_tensors(graph.model), torch.enable_grad(), watch.over(graph.model):
        for value, samples in losses(graph.model, batches, watch, "looking at gradients"):
            after(value, samples)


@contextmanager
def trained(graph: ChannelGraph) -> Generator[tuple[dict[str, Tensor], Watch]]:
    """The model's parameters by name, so that losses can be derived by them, and a watch that only counts forwards."""
    watch = Watch(graph.trace, (), lambda _: None)
    with on_swapped_tensors(graph.model, gradients=True), torch.enable_grad(), watch.over(graph.model):
        yield {name: p for name, p in graph.model.named_parameters() if p.requires_grad}, watch
