"""Models whose weights hooks of accelerate keep in memory or on disk: pruned, recovered and saved through the hooks."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import structprune
from structprune.errors import SurgeryError, UnsupportedModelError
from structprune.offloading import MARK, at_hand
from structprune.planning.plan import plans_of

IDS = torch.randint(0, 50, (24, 12), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
Wrap = Callable[[nn.Module, Path], nn.Module]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 64, "tie_word_embeddings": tied,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    places = {"embed_tokens": "cpu", "rotary_emb": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu"}
    places = {f"model.{name}": place for name, place in places.items()} | {"model.norm": "disk", "lm_head": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


WRAPPED: dict[str, Wrap] = {
    "memory": lambda model, _: cpu_offload(model, CPU),
    "memory, buffers too": lambda model, _: cpu_offload(model, CPU, offload_buffers=True),
    "memory, whole blocks": lambda model, _: cpu_offload(model, CPU, preload_module_classes=["LlamaMLP"]),
    "disk": lambda model, folder: disk_offload(model, folder, CPU),
    "memory and disk": dispatched,
}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models give the same, and hold the same by name."""
    ours, theirs = at_hand(one).state_dict(), at_hand(other).state_dict()
    held = ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    return held and torch.equal(outputs(one), outputs(other))


def places(model: nn.Module) -> dict[str, str]:
    return {name: tensor.device.type for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "one table"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_pruned_and_recovered_as_without_hooks(kind: str, tied: bool, tmp_path: Path) -> None:
    twin, model = llama(tied), WRAPPED[kind](llama(tied), tmp_path / "offloaded")
    before = snapshot(model)
    plan = structprune.plan(model, IDS, ratio=0.5)
    assert plan.removed == structprune.plan(twin, IDS, ratio=0.5).removed
    slim, expected = structprune.prune(model, IDS, ratio=0.5), structprune.prune(twin, IDS, ratio=0.5)
    assert same(slim, expected)
    assert places(slim) == places(model), "as much is offloaded as was before"
    assert "meta" in places(slim).values()
    assert not any(MARK in vars(module) for module in slim.modules())
    assert structprune.verify(model, slim, plan, IDS).ok
    assert structprune.kept(slim) == structprune.kept(expected)
    assert_untouched(model, before)
    recovered = structprune.recover(slim, model, [IDS])
    assert same(recovered, structprune.recover(expected, twin, [IDS]))
    assert places(recovered) == places(slim)
    assert_untouched(model, before)
    again = structprune.prune(recovered, IDS, ratio=0.25, inplace=True)
    assert len(plans_of(again)) == 2
    assert outputs(again).shape == (24, 12, 50)


@pytest.mark.parametrize("kind", WRAPPED)
def test_in_place(kind: str, tmp_path: Path) -> None:
    model = WRAPPED[kind](llama(), tmp_path / "offloaded")
    where = places(model)
    slim = structprune.prune(model, IDS, ratio=0.5, inplace=True)
    assert slim is model
    assert places(model) == where
    assert same(model, structprune.prune(llama(), IDS, ratio=0.5))


@pytest.mark.parametrize("kind", WRAPPED)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    slim = structprune.prune(WRAPPED[kind](llama(), tmp_path / "offloaded"), IDS, ratio=0.5)
    again = structprune.load(llama, structprune.save(slim, tmp_path / "ours"))
    assert torch.equal(outputs(again.eval()), outputs(slim))
    expected = outputs(slim)
    if hasattr(slim, "hf_device_map"):
        with pytest.warns(UserWarning, match="save a model with offloaded modules"):
            slim.save_pretrained(tmp_path / "theirs")
    else:  # transformers saves no other offloaded models
        remove_hook_from_submodules(slim)
        slim.save_pretrained(tmp_path / "theirs")
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "theirs").eval()), expected)


def test_criteria_that_look_at_data(tmp_path: Path) -> None:
    model = dispatched(llama(), tmp_path / "offloaded")
    ours = structprune.plan(model, IDS, ratio=0.5, importance="wanda", data=[IDS])
    assert ours.removed == structprune.plan(llama(), IDS, ratio=0.5, importance="wanda", data=[IDS]).removed


def test_a_folder_goes_with_the_last_model_that_reads_it(tmp_path: Path) -> None:
    model = disk_offload(llama(), tmp_path / "offloaded", CPU)
    slim = structprune.prune(model, IDS, ratio=0.5)
    (folder,) = [path for path in tmp_path.iterdir() if path.name != "offloaded"]
    twin, expected = copy.deepcopy(slim), outputs(slim)
    del slim
    gc.collect()
    assert torch.equal(outputs(twin), expected)
    del twin
    gc.collect()
    assert not folder.exists()
    assert outputs(model).shape == expected.shape


class Twice(ModelHook):
    """A hook of the user's own, which changes what comes out."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 2


def test_hooks_of_ones_own_stay() -> None:
    model, twin = llama(), llama()
    for each in (model, twin):
        add_hook_to_module(each.get_submodule("model.layers.1.mlp.gate_proj"), Twice())
    model = cpu_offload(model, CPU)
    slim = structprune.prune(model, IDS, ratio=0.5)
    assert same(slim, structprune.prune(twin, IDS, ratio=0.5))


def test_a_plan_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    model = dispatched(llama(), tmp_path / "offloaded")
    plan = structprune.plan(model, IDS, ratio=0.5)
    plan.apply(model, inplace=True)
    result = outputs(model)
    before = snapshot(model)
    with pytest.raises(SurgeryError, match="Make a new plan"):
        plan.apply(model, inplace=True)
    assert_untouched(model, before)
    assert torch.equal(outputs(model), result)


def test_what_cannot_be_done_in_place_says_what_to_do() -> None:
    graph = structprune.DependencyGraph(cpu_offload(llama(), CPU), IDS)
    with pytest.raises(UnsupportedModelError, match="remove_hook_from_submodules"):
        graph.prune_group("model.layers.0.mlp.gate_proj", [0])


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_without_blocks(inplace: bool, tmp_path: Path) -> None:
    model, twin = dispatched(llama(), tmp_path / "offloaded"), llama()
    names = [branch.name for branch in structprune.branches(model, IDS) if branch.kind == "block"][:1]
    slim = structprune.remove_branches(model, IDS, names, inplace=inplace)
    assert same(slim, structprune.remove_branches(twin, IDS, names))
    assert "meta" in places(slim).values()
    assert (slim is model) == inplace
