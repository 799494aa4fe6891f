"""Models with adapters, and models prepared for quantization: pruned with what was put into them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from support import oracle
from support.cases import normal
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx

import structprune
from structprune.errors import UnsupportedModelError

INPUTS = normal(4, 3, 7, 7).double()
# What torch and peft say about their own future.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "torch.ao.quantization is deprecated",
        "Please use quant_min and quant_max",
        "torch.quantize_per_tensor, torch.quantize_per_channel",
        "`is_gradient_checkpointing` is deprecated",
    )
]


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
        "0.base.weight": {0}, "0.base.bias": {0}, "0.a": {0}, "0.b": {0, 1}, "2.base.weight": {0, 1},
        "2.base.bias": {0}, "2.a": {0, 1}, "2.b": {0, 1}, "4.weight": {1},
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


def in_float64(model: nn.Module) -> nn.Module:
    """Random weights; scales stay in float32, which is all that torch's operations take."""
    model = oracle.jitter(model, seed=0)
    for module in model.modules():
        if isinstance(module, ao.FakeQuantizeBase):
            module.float()
    return model


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


def test_a_convolution_fused_with_its_batch_norm() -> None:
    """It divides by the norm's scale, which is zero where a channel is off."""
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
    with pytest.raises(UnsupportedModelError, match=r"Linear cannot be pruned: its weight is of torch.sparse_coo"):
        structprune.prune(sparse, normal(2, 6))
