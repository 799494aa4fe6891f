"""Models that are wrapped, converted or prepared already: pruned through the wrapper, or refused by name."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import timm.utils
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from support import oracle
from support.cases import normal
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masks
from torch.nn.utils import spectral_norm as spectral_norm_hook
from torch.nn.utils import weight_norm as weight_norm_hook
from torch.optim.swa_utils import AveragedModel

import structprune
from structprune.errors import UnknownLayerError, UnsupportedModelError
from structprune.wrapping import WRAPPERS, rewrapped, unwrapped

INPUTS = normal(4, 3, 7, 7).double()


class Network(nn.Module):
    """Layers by name, so that names inside a wrapper can be told from those outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.head = nn.Conv2d(8, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv1(x)))
        return self.head(F.adaptive_avg_pool2d(F.gelu(self.conv2(x)), 1).flatten(1))


def network() -> Network:
    return oracle.jitter(Network(), seed=0)  # pyright: ignore[reportReturnType]


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
    twin = network()
    wrapped = WRAPPED[kind](network())
    plan = structprune.plan(wrapped, INPUTS, ratio=0.5, ignore=["head"])
    assert set(plan.removed) == {"conv1.weight", "conv1.bias", "norm.weight", "norm.bias", "norm.running_mean",
                                 "norm.running_var", "conv2.weight"}  # fmt: skip
    assert plan.removed == structprune.plan(twin, INPUTS, ratio=0.5, ignore=["head"]).removed
    slim = structprune.prune(wrapped, INPUTS, ratio=0.5, ignore=["head"], inplace=inplace)
    assert type(slim) is type(wrapped)
    assert (slim is wrapped) == inplace
    oracle.check(twin, unwrapped(slim), plan, INPUTS)
    assert oracle.relative_error(oracle.call(slim, INPUTS), oracle.call(unwrapped(slim), INPUTS)) < 1e-12
    if not inplace:
        assert unwrapped(wrapped).conv1.out_channels == 8
        assert oracle.relative_error(oracle.call(wrapped, INPUTS), oracle.call(twin, INPUTS)) < 1e-12
    assert structprune.verify(wrapped if not inplace else twin, slim, plan, INPUTS).ok
    assert structprune.cost(slim, INPUTS) == plan.after
    assert "8 channels" in structprune.DependencyGraph(WRAPPED[kind](twin), INPUTS).explain("conv1")


def test_names_of_the_wrapper_are_unknown_and_the_right_one_is_told() -> None:
    with pytest.raises(UnknownLayerError, match="has no layer 'module.conv1'. Did you mean 'conv1'"):
        structprune.plan(nn.DataParallel(network()), INPUTS, ignore=["module.conv1"])


def test_every_wrapper_that_is_known_exists() -> None:
    """A class that is renamed in a later release would no longer be recognised."""
    for name in WRAPPERS:
        module, _, kind = name.rpartition(".")
        assert f"{getattr(__import__(module, fromlist=[kind]), kind).__module__}.{kind}" == name


# -- torch.compile -----------------------------------------------------------------------------------------------------


def test_a_compiled_model_keeps_its_options_and_compiles_anew() -> None:
    torch.compiler.reset()
    model = compiled(network())
    model(INPUTS)
    slim = structprune.prune(model, INPUTS, ratio=0.5)
    assert slim.get_compiler_config is not None
    assert slim.dynamo_ctx is model.dynamo_ctx
    before = _counting()[0]
    slim(INPUTS)
    assert _counting()[0] == before + 1, "the same backend has compiled it"
    torch.compiler.reset()
    model(INPUTS)
    structprune.prune(model, INPUTS, ratio=0.25, inplace=True)
    before = _counting()[0]
    model(INPUTS)
    assert _counting()[0] == before + 1, "guards on the old shapes have failed"


def test_a_model_compiled_in_place() -> None:
    """In place it stays compiled; a copy is not, as ``copy.deepcopy`` of such a model is not."""
    model, twin = network(), network()
    model.compile(backend="eager", fullgraph=True)
    model(INPUTS)
    before = snapshot(model)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim = plan.apply(model)
    assert_untouched(model, before)
    assert slim._compiled_call_impl is None
    oracle.check(twin, slim, plan, INPUTS)
    plan.apply(model, inplace=True)
    assert model._compiled_call_impl is not None
    assert oracle.relative_error(oracle.call(model, INPUTS), oracle.call(slim, INPUTS)) < 1e-12


class PartlyCompiled(nn.Module):
    """A compiled child, and a compiled function."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = Network(), nn.Linear(5, 6)
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
    model(INPUTS)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim = plan.apply(model)
    assert {"body._orig_mod.conv1.weight", "body._orig_mod.head.weight", "out.weight", "last.weight"} <= set(
        plan.removed
    )
    oracle.check(model, slim, plan, INPUTS)
    assert slim.body.conv1.out_channels == 4
    assert oracle.relative_error(oracle.call(model, INPUTS), oracle.call(twin, INPUTS)) < 1e-12


# -- several devices and processes -------------------------------------------------------------------------------------


def distributed(model: nn.Module, **options: Any) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated")
        return DistributedDataParallel(model, **options)


def test_distributed_data_parallel(process_group: None) -> None:
    model = distributed(
        network(), find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False, bucket_cap_mb=3
    )
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    model(INPUTS).square().mean().backward()
    optimizer.step()
    twin = copy.deepcopy(model.module)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim = plan.apply(model)
    assert type(slim) is DistributedDataParallel
    options = ("find_unused_parameters", "gradient_as_bucket_view", "broadcast_buffers", "bucket_bytes_cap",
               "static_graph", "device_ids", "process_group", "_comm_hooks", "training")  # fmt: skip
    assert all(getattr(slim, name) == getattr(model, name) for name in options)
    oracle.check(twin, slim.module, plan, INPUTS)
    structprune.remap_optimizer(optimizer, plan, model, slim)
    for p in slim.parameters():
        p.grad = None
    slim(INPUTS).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.parameters())
    optimizer.step()
    model(INPUTS).square().mean().backward()  # the original goes on too


def test_distributed_data_parallel_in_place_is_refused(process_group: None) -> None:
    model = distributed(network())
    before = snapshot(model.module)
    for call in (
        lambda: structprune.prune(model, INPUTS, inplace=True),
        lambda: structprune.plan(model, INPUTS).apply(model, inplace=True),
        lambda: structprune.plan(model, INPUTS).apply(nn.Sequential(model), inplace=True),
    ):
        with pytest.raises(UnsupportedModelError, match="DistributedDataParallel.* reducer .* prune without inplace"):
            call()
    assert_untouched(model.module, before)
    structprune.prune(model.module, INPUTS, inplace=True)


def test_sharded_models_are_refused(process_group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for model in (fully_shard(network(), mesh=mesh), nn.Sequential(fully_shard(network(), mesh=mesh))):
        with pytest.raises(UnsupportedModelError, match="Network.* cannot be pruned: its parameters are spread over"):
            structprune.prune(model, INPUTS)
    sharded = network()
    sharded.head.weight = nn.Parameter(DTensor.from_local(sharded.head.weight.detach(), mesh))
    with pytest.raises(UnsupportedModelError, match="'head', a Linear, cannot be pruned: its weight is a DTensor"):
        structprune.prune(sharded, INPUTS)


def test_a_fully_sharded_wrapper_is_refused() -> None:
    # Made without its constructor, which asks for an accelerator.
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    with pytest.raises(
        UnsupportedModelError, match="FullyShardedDataParallel cannot be pruned: .* before it is sharded"
    ):
        structprune.plan(model, INPUTS)


# -- adapters ----------------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen layer with a trainable product of two thin ones beside it."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.rank, self.scaling = base.requires_grad_(False), rank, alpha / rank
        self.a = nn.Parameter(torch.zeros(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(F.dropout(x, 0.1, self.training), self.a), self.b) * self.scaling


def test_low_rank_adapters() -> None:
    model = nn.Sequential(
        Lora(nn.Linear(6, 8), 4, 8.0), nn.ReLU(), Lora(nn.Linear(8, 8), 4, 8.0), nn.ReLU(), nn.Linear(8, 3)
    )
    model, inputs = oracle.jitter(model, seed=0), normal(4, 6).double()
    plan = structprune.plan(model, inputs, ratio=0.5)
    assert {name: set(dims) for name, dims in plan.removed.items()} == {
        "0.base.weight": {0}, "0.base.bias": {0}, "0.a": {0}, "0.b": {0, 1}, "2.base.weight": {0, 1}, "2.base.bias": {0},
        "2.a": {0, 1}, "2.b": {0, 1}, "4.weight": {1},
    }  # fmt: skip
    slim = plan.apply(model)
    oracle.check(model, slim, plan, inputs)
    assert [n for n, p in slim.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    whole = structprune.prune(model, inputs, ratio=0.5, ignore=["0.a", "2.a"])
    assert whole[2].a.shape == (4, 8), "an ignored tensor stays whole, its inputs too"


def small_llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("merged", [False, True])
def test_peft(merged: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    model = oracle.jitter(peft.get_peft_model(small_llama(), config), seed=0)
    if merged:
        model.merge_adapter()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    plan = structprune.plan(model, inputs, ratio=0.5)
    slim = plan.apply(model)
    assert type(slim) is peft.PeftModel
    layer = "base_model.model.model.layers.1.mlp.gate_proj."
    assert plan.removed[f"{layer}base_layer.weight"].keys() == {0, 1}
    assert (f"{layer}lora_A.default.weight" in plan.removed) == (not merged), "a merged adapter is not used"
    oracle.check(model, slim, plan, inputs)
    assert [n for n, p in slim.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    if not merged:
        whole = copy.deepcopy(slim).merge_and_unload()
        assert isinstance(whole, transformers.LlamaForCausalLM)
        assert oracle.relative_error(oracle.call(whole, inputs).logits, oracle.call(slim, inputs).logits) < 1e-9


# -- quantization ------------------------------------------------------------------------------------------------------


class Quantizable(nn.Module):
    """As eager quantization wants it: stubs, and a sum as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.add, self.head = torch.ao.nn.quantized.FloatFunctional(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(self.quant(x)))
        x = self.add.add(x, self.relu2(self.conv2(x)))
        return self.dequant(self.head(x.mean([2, 3])))


# Not the fused ones of the defaults, which compute in float32 alone.
QAT = ao.QConfig(
    activation=ao.FakeQuantize.with_args(observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=255),
    weight=ao.default_per_channel_weight_fake_quant,
)
MAPPING = ao.QConfigMapping().set_global(QAT)


def eager() -> nn.Module:
    model = Quantizable().eval()
    model.qconfig = ao.get_default_qconfig("fbgemm")
    return ao.prepare(ao.fuse_modules(model, [["conv1", "relu1"]]))


def eager_aware() -> nn.Module:
    model = Quantizable().train()
    model.qconfig = QAT
    return ao.prepare_qat(model)


PREPARED: dict[str, Callable[[], nn.Module]] = {
    "eager": eager,
    "aware, eager": eager_aware,
    "fx": lambda: quantize_fx.prepare_fx(
        Quantizable().eval(), ao.get_default_qconfig_mapping("fbgemm"), (INPUTS.float(),)
    ),
    "aware, fx": lambda: quantize_fx.prepare_qat_fx(Quantizable().train(), MAPPING, (INPUTS.float(),)),
}
DEPRECATED = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range.*:UserWarning"),
]


def in_float64(model: nn.Module) -> nn.Module:
    """Random weights; scales stay in float32, which is all that torch's operations take."""
    model = oracle.jitter(model, seed=0)
    for module in model.modules():
        if isinstance(module, ao.FakeQuantizeBase):
            module.float()
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", PREPARED)
def test_prepared_for_quantization(kind: str, calibrated: bool) -> None:
    model = PREPARED[kind]()
    if calibrated:
        model(INPUTS.float())
    model = in_float64(model)
    model.apply(ao.disable_observer)  # of fake quantization: its statistics follow what they see
    before = snapshot(model)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim = plan.apply(model)
    assert structprune.verify(model, slim, plan, INPUTS).ok
    assert_untouched(model, before)
    assert slim.get_submodule("conv2").get_parameter(
        "weight" if "aware" in kind or kind == "eager" else "0.weight"
    ).shape[:2] == (4, 4)
    if "aware" in kind and calibrated:
        assert slim.conv2.weight_fake_quant.scale.shape == (4,)
        assert slim.conv2.weight_fake_quant.activation_post_process.min_val.shape == (4,)
    if calibrated or "aware" not in kind:  # fake quantization that saw nothing yet rounds everything to 0
        # Of the oracle only the part that casts no scale to float64; nothing here is normalised over channels.
        off, whole = oracle.call(oracle.switch_off(model, plan.removed), INPUTS), oracle.call(model, INPUTS)
        assert oracle.relative_error(oracle.call(slim, INPUTS), off) < 1e-10
        assert oracle.relative_error(whole, off) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["eager", "fx"])
def test_what_is_pruned_when_prepared_can_be_converted(kind: str) -> None:
    model = PREPARED[kind]()
    model(INPUTS.float())
    slim = structprune.prune(model, INPUTS.float(), ratio=0.5)
    expected = slim(INPUTS.float())
    converted = ao.convert(slim.eval()) if kind == "eager" else quantize_fx.convert_fx(slim.eval())
    assert (converted(INPUTS.float()) - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(
        UnsupportedModelError, match="cannot be pruned: its weights are packed; prune the model in floating"
    ):
        structprune.prune(converted, INPUTS.float())


@pytest.mark.filterwarnings("ignore")
def test_a_convolution_fused_with_its_batch_norm() -> None:
    """It divides by the norm's scale, which is zero where a channel is off; what follows says that the channel is gone."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = quantize_fx.prepare_qat_fx(model.train(), MAPPING, (INPUTS.float(),))
    model(INPUTS.float())
    model = in_float64(model)
    model.apply(ao.disable_observer)
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim = plan.apply(model)
    assert structprune.verify(model, slim, plan, INPUTS).ok
    assert slim.get_submodule("0").bn.num_features == 4
    reference = copy.deepcopy(model)
    (gone,) = plan.removed["3.weight"].values()
    with torch.no_grad():
        reference.get_submodule("3").weight[:, list(gone)] = 0
    assert oracle.relative_error(oracle.call(slim, INPUTS), oracle.call(reference, INPUTS)) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_default_fake_quantization() -> None:
    """The fused kind, in float32; it is off while numbers are compared, and its observers are left alone."""
    mapping = ao.get_default_qat_qconfig_mapping("fbgemm")
    model = quantize_fx.prepare_qat_fx(Quantizable().train(), mapping, (INPUTS.float(),))
    model(INPUTS.float())
    before = snapshot(model)
    slim = structprune.prune(model, INPUTS.float(), ratio=0.5)
    assert_untouched(model, before)
    assert slim.conv2.weight_fake_quant.scale.shape == (4,)
    assert int(slim.conv2.weight_fake_quant.observer_enabled) == 1
    slim.train()(INPUTS.float()).square().mean().backward()


def test_packed_weights_are_refused() -> None:
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model = nn.Sequential(nn.Linear(6, 8), kind(8, 4))
    with pytest.raises(UnsupportedModelError, match="'1', a Linear4bit, cannot be pruned: its weights are packed"):
        structprune.prune(model, normal(2, 6))
    sparse = nn.Linear(6, 8)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    with pytest.raises(UnsupportedModelError, match="Linear cannot be pruned: its weight is of torch.sparse_coo"):
        structprune.prune(sparse, normal(2, 6))


# -- hooks, masks and parametrizations ---------------------------------------------------------------------------------


def test_hooks_are_kept_and_run() -> None:
    model, seen = network(), []
    model.conv1.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model.conv1.register_forward_hook(lambda m, args, out: torch.tanh(out[:, :, 1:-1]))
    model.conv2.register_forward_hook(lambda m, args, kwargs, out: seen.append(tuple(out.shape)), with_kwargs=True)
    model.norm.register_full_backward_hook(lambda m, before, after: seen.append("backward"))
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    slim = plan.apply(model)
    oracle.check(model, slim, plan, INPUTS)
    seen.clear()
    slim(INPUTS).sum().backward()
    assert seen == [(4, 6, 3, 5), "backward"]


def test_a_hook_that_ties_channels_is_seen() -> None:
    """It adds what another layer gave: the two must lose the same channels."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].register_forward_hook(lambda m, args, out: out + args[0])
    model, inputs = oracle.jitter(model, seed=0), normal(4, 6).double()
    plan = structprune.plan(model, inputs, ratio=0.5)
    assert plan.removed["0.weight"][0] == plan.removed["2.weight"][0] == plan.removed["4.weight"][1]
    oracle.check(model, plan.apply(model), plan, inputs)


def masked(model: Network) -> nn.Module:
    masks.l1_unstructured(model.conv2, "weight", amount=0.5)
    masks.random_structured(model.conv2, "weight", amount=2, dim=0)
    masks.random_unstructured(model.conv1, "bias", amount=0.5)
    return model


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "masks": masked,
    "weight norm hook": lambda m: (weight_norm_hook(m.conv2), weight_norm_hook(m.head, dim=1), m)[-1],
    "weight norm": lambda m: (parametrizations.weight_norm(m.conv2), parametrizations.weight_norm(m.head, dim=1), m)[
        -1
    ],
    "spectral norm hook": lambda m: (spectral_norm_hook(m.conv2), m)[-1],
    "spectral norm": lambda m: (parametrizations.spectral_norm(m.conv2), m)[-1],
    "scaled": lambda m: (parametrize.register_parametrization(m.conv2, "weight", Scaled(12)), m)[-1],
}


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain[:, None, None, None]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed(kind: str, inplace: bool) -> None:
    model = COMPUTED[kind](Network())
    with torch.no_grad():
        model(INPUTS.float())
    twin = oracle.jitter(model, seed=0)
    with torch.no_grad():
        twin(INPUTS)
    model = copy.deepcopy(twin).train()
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slim = plan.apply(model, inplace=inplace)
    assert (slim.conv2.in_channels, slim.conv2.out_channels, slim.head.in_features) == (4, 6, 6)
    assert slim.training
    for name, tensor in slim.state_dict().items():  # reading the weight has moved no power iteration on
        for dim, indices in structprune.kept(slim).get(name, {}).items():
            state[name] = state[name].index_select(dim, torch.tensor(indices))
        assert torch.equal(tensor, state[name]), name
    assert slim.eval().conv2.weight.shape == (6, 4, 3, 3), "up to date before the first forward"
    oracle.check(twin, slim, plan, INPUTS)
    slim.train()(INPUTS).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["masks", "weight norm hook", "spectral norm hook"])
def test_computed_weights_with_a_graph_of_their_own(kind: str) -> None:
    """After a forward with gradients the weight on the module is no leaf, which ``copy.deepcopy`` refuses."""
    model = COMPUTED[kind](Network()).eval()
    model(INPUTS.float())
    slim = structprune.prune(model, INPUTS.float(), ratio=0.5)
    assert slim.conv2.weight.shape == (6, 4, 3, 3)
    assert model.conv2.weight.grad_fn is not None
    model(INPUTS.float()).sum().backward()


# -- what cannot be pruned ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.* is not supported:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, INPUTS)], ids=["script", "trace"])
def test_torchscript_is_refused(make: Any) -> None:
    scripted = make(network())
    with pytest.raises(UnsupportedModelError, match="cannot be pruned: its forward is compiled TorchScript"):
        structprune.prune(scripted, INPUTS)
    with pytest.raises(UnsupportedModelError, match="'0', a .*, cannot be pruned: its forward is compiled TorchScript"):
        structprune.prune(nn.Sequential(scripted), INPUTS)


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
    with pytest.raises(UnsupportedModelError, match="model is a function; give an nn.Module"):
        structprune.prune(lambda x: x, INPUTS)  # pyright: ignore[reportArgumentType]


def test_rewrapping_shares_no_state() -> None:
    average = AveragedModel(network())
    twin = rewrapped(average, copy.deepcopy(average.module))
    twin.update_parameters(network())
    assert (int(twin.n_averaged), int(average.n_averaged)) == (1, 0)
    ema = timm.utils.ModelEmaV3(network())
    twin = rewrapped(ema, copy.deepcopy(ema.module))
    before = ema._sr_generator.get_state()
    torch.rand(3, generator=twin._sr_generator)
    assert torch.equal(ema._sr_generator.get_state(), before)
