"""Criteria that look at second derivatives of the loss, or at what stands for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from structprune.checking import SEED, one_of, require, whole
from structprune.coupling.graph import ChannelGraph
from structprune.errors import PlanError
from structprune.importance.activations import Activation, Sums
from structprune.importance.base import REDUCTION, Importance, Unfitted, criterion
from structprune.importance.data import Batches, require_data
from structprune.importance.gradient import EntryScores, Gates, gate_sums, weight_gradients
from structprune.importance.observe import descend, losses, trained


def _probe(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs, drawn on the CPU so that they do not depend on the device."""
    signs = torch.randint(0, 2, tuple(shape), generator=generator).mul_(2).sub_(1)
    return signs.to(like.device, like.dtype)


def hessian_diagonal(value: Tensor, variables: Sequence[Tensor], probes: int, seed: int) -> list[Tensor]:
    """Hutchinson's estimate of the diagonal of a scalar's Hessian: the mean over random signs v of ``v * (H v)``.

    Bekas et al., An Estimator for the Diagonal of a Matrix, 2007. The same signs are drawn at each call, so
    that the estimate is linear in the Hessian and may be summed over batches.

    Args:
        value: a scalar.
        variables: what it is derived by.
        probes: how many random vectors are drawn.
        seed: of their generator.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True, materialize_grads=True)
    total = [torch.zeros_like(variable) for variable in variables]
    for _ in range(probes):
        signs = [_probe(variable.shape, generator, variable) for variable in variables]
        product = torch.stack([(g * v).sum() for g, v in zip(first, signs, strict=True)]).sum()
        if not product.requires_grad:
            break  # the value is linear in all variables
        second = torch.autograd.grad(product, variables, retain_graph=True, allow_unused=True, materialize_grads=True)
        for known, v, hv in zip(total, signs, second, strict=True):
            known.add_(v * hv.detach(), alpha=1 / probes)
    return total


def _weight_hessian(graph: ChannelGraph, batches: Batches, probes: int, seed: int) -> dict[str, Tensor]:
    """The diagonal of the Hessian of the mean loss, by name of parameter."""
    sums = Sums()
    with trained(graph) as (parameters, watch), sdpa_kernel(SDPBackend.MATH):
        for value, samples in losses(graph.model, batches, watch, "looking at curvature"):
            diagonals = hessian_diagonal(value, list(parameters.values()), probes, seed)
            for name, diagonal in zip(parameters, diagonals, strict=True):
                sums.add(name, diagonal)
            sums.add("", torch.tensor(float(samples)))
        sums.reduce()
        return {name: sums[name] / float(sums[""]) for name in parameters}


def _gate_hessian(graph: ChannelGraph, batches: Batches, probes: int, seed: int) -> tuple[Gates, Tensor]:
    """The diagonal of the Hessian of the mean loss by gates that all samples share, shape ``(gates,)``."""
    gates, sums = Gates(graph), Sums()
    shared: list[Tensor] = []

    def place(activation: Activation) -> Tensor:
        if not shared:
            kind = torch.promote_types(activation.x.dtype, torch.float32)
            shared.append(torch.ones(gates.count, dtype=kind, device=activation.x.device, requires_grad=True))
        z = shared[0]
        # Where several gates stand on one position (a head and its column), one plus the sum of what they differ by
        # has the derivatives of their product, but for mixed ones.
        factor = z.new_ones(activation.x.shape[activation.dim])
        for positions, channels in gates.at[activation.number]:
            factor = factor.index_add(0, positions.to(z.device), (z - 1)[channels.to(z.device)])
        return activation.gated(factor.expand(activation.samples, -1))

    def after(value: Tensor, samples: int) -> None:
        (diagonal,) = hessian_diagonal(value, shared, probes, seed)
        sums.add("sum", diagonal.cpu())
        sums.add("count", torch.tensor(float(samples)))
        shared.clear()

    with sdpa_kernel(SDPBackend.MATH):
        descend(graph, batches, gates.sites.all, place, None, after)
    sums.reduce()
    return gates, sums["sum"] / sums["count"]


@dataclass(frozen=True, slots=True)
class OBD(Unfitted):
    """Optimal Brain Damage: half the diagonal of the Hessian times the square of what goes.

    LeCun et al., Optimal Brain Damage, 1990: ``1/2 * h_kk * w_k^2``. The size of a
    negative curvature, which Hutchinson's method can give, counts alike: the loss depends on what goes.

    Args:
        curvature: ``"fisher"``: the diagonal of the empirical Fisher matrix, the mean of squared gradients of single
            samples (for weights, samples are run one by one); ``"hutchinson"``: the diagonal of the Hessian by
            Hutchinson's estimator (Yao et al., PyHessian, 2020), which needs a model that can be derived twice.
        variables: ``"weights"``: summed over the weights that go with a channel; ``"gates"``: the derivative by the
            factor of one on a channel, which is what is switched off, so that its weights' joint effect counts.
        probes: random vectors for Hutchinson's estimator.
        seed: of their generator; the global random state is not touched.
        reduce: how the slices of a group are joined, for weights: ``"sum"``, ``"mean"``, ``"max"``, ``"prod"`` or
            ``"first"``.
    """

    curvature: str = "fisher"
    variables: str = "weights"
    probes: int = 8
    seed: int = 0
    reduce: str = "sum"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("curvature", "variables", "probes", "seed", "reduce")}
        kinds = {"curvature": one_of(("fisher", "hutchinson")), "variables": one_of(("weights", "gates"))}
        require(given, reduce=REDUCTION, probes=whole(1), seed=SEED, **kinds)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data or no loss, or they do not fit the model.
        """
        if self.variables == "weights":
            return EntryScores(self.weight_scores(graph, batches), "element", self.reduce)
        batches = require_data(batches, self)
        batches.require_loss(self)
        if self.curvature == "fisher":
            gates, diagonal = gate_sums(graph, batches, torch.square)
        else:
            gates, diagonal = _gate_hessian(graph, batches, self.probes, self.seed)
        return gates.scores(diagonal.abs() / 2)

    def weight_scores(self, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
        """``1/2 * |h_kk| * w_k^2`` for each weight; see `structprune.importance.base.WeightCriterion`.

        Raises:
            PlanError: the criterion is for gates, or there is no data or no loss, or they do not fit the model.
        """
        batches = require_data(batches, self)
        batches.require_loss(self)
        if self.variables == "gates":
            raise PlanError("OBD of gates scores channels, not weights. Give variables='weights'.")
        if self.curvature == "fisher":
            hessian = weight_gradients(graph, batches, squares=True)
        else:
            hessian = _weight_hessian(graph, batches, self.probes, self.seed)
        weights = dict(graph.model.named_parameters())
        return {n: h.abs() * weights[n].detach().to(h.dtype).square() / 2 for n, h in hessian.items()}


@dataclass(frozen=True, slots=True)
class GroupFisher(Unfitted):
    """Fisher information of the gate on a channel and all that is coupled to it.

    Liu et al., Group Fisher Pruning for Practical Network Compression, 2021: the squared derivative
    of a sample's loss by the gate that all coupled layers share, half its mean over samples. The paper divides it by
    the memory that the channel takes; compare `structprune.importance.compose.CostPenalty`.
    """

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data or no loss, or they do not fit the model.
        """
        batches = require_data(batches, self)
        batches.require_loss(self)
        gates, squares = gate_sums(graph, batches, torch.square)
        return gates.scores(squares / 2)


criterion("obd_fisher")(OBD)
criterion("obd_hutchinson")(lambda: OBD("hutchinson"))
criterion("obd_gates")(lambda: OBD("hutchinson", "gates"))
criterion("group_fisher")(GroupFisher)
