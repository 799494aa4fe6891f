"""Models that are wrapped, converted or prepared already: pruned through the wrapper, or refused by name."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm.utils
import torch
import torch.distributed as dist
from support import oracle
from support.cases import normal
from support.networks import PIXELS, Named, named_network
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import structprune
from structprune.errors import UnknownLayerError, UnsupportedModelError
from structprune.planning.plan import plans_of
from structprune.wrapping import WRAPPERS, rewrapped, unwrapped


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@functools.cache
def _counting() -> list[int]:
    return [0]


def compiled(model: nn.Module) -> nn.Module:
    def backend(graph: Any, inputs: Any) -> Any:
        _counting()[0] += 1
        return graph.forward

    return torch.compile(model, backend=backend, dynamic=False)


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "average": lambda m: AveragedModel(m, use_buffers=True),
    "ema": lambda m: timm.utils.ModelEmaV3(m, decay=0.5, use_warmup=True),
    "compiled data parallel": lambda m: compiled(nn.DataParallel(m)),
    "average of data parallel": lambda m: AveragedModel(nn.DataParallel(m)),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_pruned_through_the_wrapper(kind: str, inplace: bool) -> None:
    twin = named_network()
    wrapped = WRAPPED[kind](named_network())
    plan = structprune.plan(wrapped, PIXELS, ratio=0.5, ignore=["head"])
    assert set(plan.removed) == {"conv1.weight", "conv1.bias", "norm.weight", "norm.bias", "norm.running_mean",
                                 "norm.running_var", "conv2.weight"}  # fmt: skip
    assert plan.removed == structprune.plan(twin, PIXELS, ratio=0.5, ignore=["head"]).removed
    slim = structprune.prune(wrapped, PIXELS, ratio=0.5, ignore=["head"], inplace=inplace)
    assert type(slim) is type(wrapped)
    assert (slim is wrapped) == inplace
    oracle.check(twin, unwrapped(slim), plan, PIXELS)
    assert oracle.relative_error(oracle.call(slim, PIXELS), oracle.call(unwrapped(slim), PIXELS)) < 1e-12
    if not inplace:
        assert unwrapped(wrapped).conv1.out_channels == 8
        assert oracle.relative_error(oracle.call(wrapped, PIXELS), oracle.call(twin, PIXELS)) < 1e-12
    assert structprune.verify(wrapped if not inplace else twin, slim, plan, PIXELS).ok
    assert structprune.cost(slim, PIXELS) == plan.after
    assert plans_of(structprune.prune(slim, PIXELS, ratio=0.5))[0] == plan, "both rounds are known"
    assert "8 channels" in structprune.DependencyGraph(WRAPPED[kind](twin), PIXELS).explain("conv1")


def test_names_of_the_wrapper_are_unknown_and_the_right_one_is_told() -> None:
    with pytest.raises(UnknownLayerError, match=r"has no layer 'module.conv1'. Did you mean 'conv1'"):
        structprune.plan(nn.DataParallel(named_network()), PIXELS, ignore=["module.conv1"])


def test_every_wrapper_that_is_known_exists() -> None:
    """A class that is renamed in a later release would no longer be recognised."""
    for name in WRAPPERS:
        module, _, kind = name.rpartition(".")
        assert f"{getattr(__import__(module, fromlist=[kind]), kind).__module__}.{kind}" == name


# -- torch.compile -----------------------------------------------------------------------------------------------------


def test_a_compiled_model_keeps_its_options_and_compiles_anew() -> None:
    torch.compiler.reset()
    model = compiled(named_network())
    model(PIXELS)
    slim = structprune.prune(model, PIXELS, ratio=0.5)
    assert slim.get_compiler_config is not None
    assert slim.dynamo_ctx is model.dynamo_ctx
    before = _counting()[0]
    slim(PIXELS)
    assert _counting()[0] == before + 1, "the same backend has compiled it"
    torch.compiler.reset()
    model(PIXELS)
    structprune.prune(model, PIXELS, ratio=0.25, inplace=True)
    before = _counting()[0]
    model(PIXELS)
    assert _counting()[0] == before + 1, "guards on the old shapes have failed"


def test_a_model_compiled_in_place() -> None:
    """In place it stays compiled; a copy is not, as ``copy.deepcopy`` of such a model is not."""
    model, twin = named_network(), named_network()
    model.compile(backend="eager", fullgraph=True)
    model(PIXELS)
    before = snapshot(model)
    plan = structprune.plan(model, PIXELS, ratio=0.5)
    slim = plan.apply(model)
    assert_untouched(model, before)
    assert slim._compiled_call_impl is None
    oracle.check(twin, slim, plan, PIXELS)
    plan.apply(model, inplace=True)
    assert model._compiled_call_impl is not None
    assert oracle.relative_error(oracle.call(model, PIXELS), oracle.call(slim, PIXELS)) < 1e-12


class PartlyCompiled(nn.Module):
    """A compiled child, and a compiled function."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = Named(), nn.Linear(5, 6)
        self.last = nn.Linear(6, 3)

    @torch.compile(backend="eager")
    def act(self, x: Tensor) -> Tensor:
        return torch.tanh(self.out(x)) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.body(x)))


# Dynamo looks at `.grad` of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_parts_of_a_model() -> None:
    model = oracle.jitter(PartlyCompiled(), seed=0)
    twin = copy.deepcopy(model)
    model.body = torch.compile(model.body, backend="eager")
    model(PIXELS)
    plan = structprune.plan(model, PIXELS, ratio=0.5)
    slim = plan.apply(model)
    assert {"body._orig_mod.conv1.weight", "body._orig_mod.head.weight", "out.weight", "last.weight"} <= set(
        plan.removed
    )
    oracle.check(model, slim, plan, PIXELS)
    assert slim.body.conv1.out_channels == 4
    assert oracle.relative_error(oracle.call(model, PIXELS), oracle.call(twin, PIXELS)) < 1e-12


# -- several devices and processes -------------------------------------------------------------------------------------


def distributed(model: nn.Module, **options: Any) -> DistributedDataParallel:
    with warnings.catch_warnings():  # the option is tested for as long as torch has it
        warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated")
        return DistributedDataParallel(model, **options)


def test_distributed_data_parallel(process_group: None) -> None:
    model = distributed(
        named_network(),
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        bucket_cap_mb=3,
    )
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    model(PIXELS).square().mean().backward()
    optimizer.step()
    twin = copy.deepcopy(model.module)
    plan = structprune.plan(model, PIXELS, ratio=0.5)
    slim = plan.apply(model)
    assert type(slim) is DistributedDataParallel
    options = ("find_unused_parameters", "gradient_as_bucket_view", "broadcast_buffers", "bucket_bytes_cap",
               "static_graph", "device_ids", "process_group", "_comm_hooks", "training")  # fmt: skip
    assert all(getattr(slim, name) == getattr(model, name) for name in options)
    oracle.check(twin, slim.module, plan, PIXELS)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    for p in slim.parameters():
        p.grad = None
    slim(PIXELS).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.parameters())
    optimizer.step()
    model(PIXELS).square().mean().backward()  # the original goes on too


def test_distributed_data_parallel_in_place_is_refused(process_group: None) -> None:
    model = distributed(named_network())
    before = snapshot(model.module)
    for call in (
        lambda: structprune.prune(model, PIXELS, inplace=True),
        lambda: structprune.plan(model, PIXELS).apply(model, inplace=True),
        lambda: structprune.plan(model, PIXELS).apply(nn.Sequential(model), inplace=True),
    ):
        with pytest.raises(UnsupportedModelError, match=r"DistributedDataParallel.* reducer .* prune without inplace"):
            call()
    assert_untouched(model.module, before)
    structprune.prune(model.module, PIXELS, inplace=True)


def test_sharded_models_are_refused(process_group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for model in (fully_shard(named_network(), mesh=mesh), nn.Sequential(fully_shard(named_network(), mesh=mesh))):
        with pytest.raises(UnsupportedModelError, match=r"Named.* cannot be pruned: its parameters are spread over"):
            structprune.prune(model, PIXELS)
    sharded = named_network()
    sharded.head.weight = nn.Parameter(DTensor.from_local(sharded.head.weight.detach(), mesh))
    with pytest.raises(UnsupportedModelError, match="'head', a Linear, cannot be pruned: its weight is a DTensor"):
        structprune.prune(sharded, PIXELS)


def test_a_fully_sharded_wrapper_is_refused() -> None:
    # Made without its constructor, which asks for an accelerator.
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    with pytest.raises(
        UnsupportedModelError, match=r"FullyShardedDataParallel cannot be pruned: .* before it is sharded"
    ):
        structprune.plan(model, PIXELS)


# -- what cannot be pruned ---------------------------------------------------------------------------------------------


# TorchScript is deprecated, and people still have models in it.
@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.* is not supported:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, PIXELS)], ids=["script", "trace"])
def test_torchscript_is_refused(make: Any) -> None:
    scripted = make(named_network())
    with pytest.raises(UnsupportedModelError, match="cannot be pruned: its forward is compiled TorchScript"):
        structprune.prune(scripted, PIXELS)


# torch says so of every lazy module that is made.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4))
    with pytest.raises(
        UnsupportedModelError, match="'0', a LazyLinear, cannot be pruned: its weight has no shape yet; run"
    ):
        structprune.prune(model, normal(2, 6))
    model(normal(2, 6))
    assert structprune.prune(model, normal(2, 6))[0].out_features == 4


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"model is a function; give an nn.Module"):
        structprune.prune(lambda x: x, PIXELS)  # pyright: ignore[reportArgumentType], what is refused


def test_rewrapping_shares_no_state() -> None:
    average = AveragedModel(named_network())
    twin = rewrapped(average, copy.deepcopy(average.module))
    twin.update_parameters(named_network())
    assert (int(twin.n_averaged), int(average.n_averaged)) == (1, 0)
    ema = timm.utils.ModelEmaV3(named_network())
    twin = rewrapped(ema, copy.deepcopy(ema.module))
    before = ema._sr_generator.get_state()
    torch.rand(3, generator=twin._sr_generator)
    assert torch.equal(ema._sr_generator.get_state(), before)
