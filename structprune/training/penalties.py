"""Penalties that drive whole channels to zero while a model trains, to add to its loss.

Each is built once, from the coupled groups of a model or from a plan, and then called with the model: it finds the
parameters by name, so that it goes on after the model was moved to another device, wrapped or loaded anew. Once
channels were removed it raises, and has to be built again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import instance, real, require, some_of
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.importance.weight import NORMS, norm_scales
from structprune.surgery.edits import Edits, SectionedSlice
from structprune.training.channel_slices import (
    GRAPH,
    GROUPS,
    NAMES,
    STRENGTH,
    ChannelSlices,
    checked,
    parameters_of,
    trainable,
)


def add_gradient(penalty: Callable[[nn.Module], Tensor], model: nn.Module) -> None:
    """Add what a penalty gives to the gradients that are there, for loops whose loss is out of reach.

    Call it between ``backward`` and the optimizer's step. Parameters without a gradient get none.

    Args:
        penalty: called with the model, gives a scalar.
        model: the model that was trained on.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> add_gradient(lambda model: model.bias.sum(), model)
        >>> model.bias.grad
        tensor([2.])
    """
    held = [each for each in model.parameters() if each.grad is not None and each.requires_grad]
    if not held:
        return
    with torch.enable_grad():
        gradients = torch.autograd.grad(penalty(model), held, allow_unused=True, materialize_grads=True)
    for parameter, gradient in zip(held, gradients, strict=True):
        assert parameter.grad is not None
        parameter.grad += gradient


class GroupLasso:
    """The sum over all channels of the L2 norm of everything that goes with a channel, times the root of its size.

    Yuan & Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006 (equation 2.1, with the
    penalty's usual weights). A group of variables is here a channel with all its coupled slices: filter, bias, norm,
    the columns of its consumers. Where a norm is exactly zero, its gradient is taken as zero.

    Args:
        graph: the coupled channels of the model.
        strength: the factor.
        groups: those of ``graph.groups()`` to penalise; None for all. Where heads and their sizes are groups both, an
            entry counts for both.
        parameters: names of those that count; None for all. With the scales of norms alone it is Network Slimming for
            channels that go through several norms.

    Raises:
        PlanError: there is nothing to penalise, or strength is negative.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> penalty = GroupLasso(structprune.DependencyGraph(model, torch.randn(1, 2)), strength=1e-3)
        >>> loss = model(torch.randn(8, 2)).square().mean() + penalty(model)
        >>> loss.backward()
    """

    def __init__(
        self,
        graph: ChannelGraph,
        strength: float = 1e-4,
        groups: Iterable[Group] | None = None,
        parameters: Iterable[str] | None = None,
    ) -> None:
        require(locals(), graph=GRAPH, strength=STRENGTH, groups=GROUPS, parameters=NAMES.or_none)
        self.strength = strength
        self._slices = ChannelSlices(graph, groups, None if parameters is None else frozenset(parameters))

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, a scalar.

        Raises:
            PlanError: the model was pruned since, or is another.
        """
        parameters = checked(model, self._slices.shapes, "DependencyGraph")
        squares = self._slices.sums({name: value.square() for name, value in parameters.items()})
        # The root of zero has no gradient; what stands in its place must not be seen by it either.
        positive = squares > 0
        norms = torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
        return self.strength * (norms * self._slices.sizes(norms.device).sqrt().to(norms.dtype)).sum()


class NormScalePenalty:
    """The sum of the absolute values of the scales that channels have in their batch norms.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017 (equation 1, with g the
    absolute value). Rank with ``importance="bn_scale"`` afterwards. Only channels that can be removed count.

    Args:
        graph: the coupled channels of the model.
        strength: the factor.
        kinds: of norms, as for `structprune.importance.NormScale`.
        groups: those of ``graph.groups()`` to penalise; None for all.

    Raises:
        PlanError: no channel has such a scale, or strength is negative.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 3))
        >>> penalty = NormScalePenalty(structprune.DependencyGraph(model, torch.randn(1, 1, 8, 8)), strength=0.5)
        >>> float(penalty(model).detach())  # four scales of one
        2.0
    """

    def __init__(
        self,
        graph: ChannelGraph,
        strength: float = 1e-4,
        kinds: tuple[str, ...] = ("batch_norm",),
        groups: Iterable[Group] | None = None,
    ) -> None:
        require(locals(), graph=GRAPH, strength=STRENGTH, kinds=some_of(NORMS), groups=GROUPS)
        self.strength = strength
        self._slices = ChannelSlices(graph, groups, norm_scales(graph, kinds))

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, a scalar.

        Raises:
            PlanError: the model was pruned since, or is another.
        """
        parameters = checked(model, self._slices.shapes, "DependencyGraph")
        return self.strength * self._slices.sums({name: value.abs() for name, value in parameters.items()}).sum()


class GrowingRegularisation:
    """Weight decay on the channels that a plan removes, growing until they are next to nothing.

    Half of the coefficient times the sum of squares of all entries that the plan removes; each entry counts once. Wang
    et al., Neural Pruning via Growing Regularization, 2021 (section 3.2, GReg-1: the coefficient grows by `increment`
    every few iterations up to `ceiling`); there it weighs on the filters, here on everything that goes with a channel.
    When `done`, train a little longer, then apply the plan.

    Args:
        plan: for the model as it is; nothing is removed yet.
        increment: what each `step` adds to the coefficient.
        ceiling: where it stops growing.

    Raises:
        PlanError: the plan removes nothing, or a number is not above 0.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> plan = structprune.plan(model, torch.randn(1, 2), ratio=0.5)
        >>> penalty = GrowingRegularisation(plan, increment=0.5, ceiling=1.0)
        >>> while not penalty.done:
        ...     penalty.step()  # every five to ten iterations, with penalty(model) in the loss
        >>> penalty.coefficient
        1.0
    """

    def __init__(self, plan: Edits, increment: float = 1e-4, ceiling: float = 1.0) -> None:
        planned = instance(Edits, "give a plan for the model as it is")
        require(locals(), plan=planned, increment=real(above=0), ceiling=real(above=0))
        self.increment, self.ceiling, self.coefficient = increment, ceiling, 0.0
        self._stays: dict[str, dict[int, Tensor]] = {}
        for sliced in plan.slices:
            if isinstance(sliced, SectionedSlice):
                continue  # what makes these channels is penalised; here no index goes as a whole
            stays = torch.ones(sliced.size)
            stays[list(sliced.removed)] = 0
            self._stays.setdefault(sliced.tensor, {})[sliced.dim] = stays
        if not self._stays:
            raise PlanError("The plan removes nothing, so there is nothing to penalise.")

    @property
    def done(self) -> bool:
        """Whether the coefficient has reached the ceiling."""
        return self.coefficient >= self.ceiling

    def step(self, *_: Any) -> None:
        """Let the coefficient grow; arguments, such as the number of an epoch, are ignored."""
        self.coefficient = min(self.ceiling, self.coefficient + self.increment)

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, a scalar.

        Raises:
            PlanError: the model was pruned since, or is another.
        """
        parameters = parameters_of(model)
        wanted = {
            name: tuple(stays[dim].numel() if dim in stays else size for dim, size in enumerate(parameters[name].shape))
            for name, stays in self._stays.items()
            if name in parameters and trainable(parameters[name])  # buffers are sliced too
        }
        if not wanted:
            raise PlanError(f"{type(model).__name__} has none of the plan's parameters. Give the model of the plan.")
        total: Tensor | None = None
        for name, value in checked(model, wanted, "plan").items():
            part = (value.square() * (1 - self._kept(name, value))).sum()
            total = part if total is None else total + part.to(total.device, total.dtype)
        assert total is not None
        return 0.5 * self.coefficient * total

    def _kept(self, name: str, like: Tensor) -> Tensor:
        """One where an entry stays, zero where the plan removes it; of a shape that fits by broadcasting."""
        result = like.new_ones(())
        for dim, stays in self._stays[name].items():
            if stays.device != like.device:
                self._stays[name][dim] = stays.to(like.device)
            shape = [-1 if d == dim else 1 for d in range(like.dim())]
            result = result * self._stays[name][dim].to(like.dtype).view(shape)
        return result

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs: the coefficient."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what `state_dict` gave."""
        self.coefficient = float(state["coefficient"])
