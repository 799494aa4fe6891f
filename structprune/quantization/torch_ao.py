"""Programs of torch with integers, by torchao: PT2E for convolutional networks, weights of linear layers for others."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from structprune.errors import ExportError
from structprune.export.files import tensors
from structprune.export.program import FreeDims
from structprune.export.torch_files import program_of, save_program
from structprune.export.verified import converting
from structprune.inputs import device_of
from structprune.tracing.trace import as_call

# The observers of PT2E by how they take ranges: the extremes, or the range of least squared error.
RANGES = {"minmax": "MinMaxObserver", "squared_error": "HistogramObserver"}
# So many weights of four bits share one scale.
GROUP = 32
# Scales are at least this, as in torchao's own default.
_LEAST_SCALE = 2**-12
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_WEIGHTY = (*_CONVOLUTIONS, "linear", "matmul", "mm", "addmm", "bmm")


def write_integers(
    model: nn.Module, draft: Path, free: FreeDims, batches: list[Any], scheme: str, ranges: str
) -> tuple[int, int]:
    """Write a program of ``torch.export`` whose layers have integers for weights.

    Args:
        model: in eval mode; it stays as it is.
        draft: where the file goes.
        free: the inputs, and which of their dimensions are free.
        batches: what ranges of activations are taken from.
        scheme: one of those of `structprune.quantize`.
        ranges: one of `RANGES`.

    Returns:
        How many layers of the file have integers for weights, and how many have not.

    Raises:
        ExportError: torch cannot export the model, torchao cannot quantise it, or it cannot run on a batch.
    """
    with converting(model, "torch.export with integers of torchao"):
        if scheme == "int8":
            program, counts = _static(model, free, batches, ranges)
        else:
            program, counts = _weights(model, free, scheme)
        # Weights of four bits are unpacked by operations of torch alone.
        save_program(program, draft, model, free.names, torchao=scheme != "int4_weights")
    return counts


# -- activations and weights, by PT2E ---------------------------------------------------------------------------------


def _static(
    model: nn.Module, free: FreeDims, batches: list[Any], ranges: str
) -> tuple[torch.export.ExportedProgram, tuple[int, int]]:
    if device_of(model).type != "cpu":
        raise ExportError(
            f"scheme='int8' of torchao is for processors, and the model is on {device_of(model)}; move it to the CPU, "
            "or take 'int8_dynamic'"
        )
    pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    prepared = pt2e.prepare_pt2e(_calls_apart(program_of(model, free).module()), _quantizer(ranges))
    for batch in batches:
        try:
            prepared(*tensors(as_call(batch)))
        except (RuntimeError, AssertionError) as error:
            raise ExportError(
                f"{type(model).__name__} cannot run on a batch of the data: {str(error).splitlines()[0]}"
            ) from error
    converted = pt2e.convert_pt2e(prepared)
    _drop_unused(converted)
    traced = tuple(tensor.contiguous() for tensor in tensors(as_call(free.traced())))
    dims: Any = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(each, dims) or None for each in free.dims) if any(free.dims) else None
    return torch.export.export(converted, traced, dynamic_shapes=shapes), _counts(converted)


def _calls_apart(program: Any) -> GraphModule:
    """The calls of one module told apart, in place.

    torchao takes what stands under one path for one layer with one result, and refuses a ReLU that a residual block
    calls twice. Torch keeps the modules around each operation as ``{"L__self__relu@1": ("relu", type)}``: the key
    counts the calls, the path does not.
    """
    for node in program.graph.nodes:
        modules = node.meta.get("nn_module_stack")
        if modules:
            key, (path, kind) = list(modules.items())[-1]
            _, at, call = key.rpartition("@")
            node.meta["nn_module_stack"] = {**modules, key: (f"{path}{at}{call}" if at else path, kind)}
    return program


def _quantizer(ranges: str) -> Any:
    """The recipe for x86, one scale for each output channel of a weight; other processors run the result too."""
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    observer = getattr(importlib.import_module("torchao.quantization.pt2e.observer"), RANGES[ranges])
    # Without instructions for eight bits, products of two are added in sixteen, which seven bits do not overflow.
    narrow = importlib.import_module("torchao.utils").should_reduce_range(torch.device("cpu"))
    recipe = x86.get_default_x86_inductor_quantization_config(reduce_range=narrow)
    observed = observer.with_args(eps=_LEAST_SCALE)
    recipe = replace(
        recipe,
        input_activation=replace(recipe.input_activation, observer_or_fake_quant_ctr=observed),
        output_activation=replace(recipe.output_activation, observer_or_fake_quant_ctr=observed),
    )
    return x86.X86InductorQuantizer().set_global(recipe)


def _drop_unused(module: GraphModule) -> None:
    """Leave out tensors that the graph no longer reads: weights whose integers have taken their place."""
    module.graph.eliminate_dead_code()
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    for name in held:
        if name not in read:
            path, _, own = name.rpartition(".")
            delattr(module.get_submodule(path), own)
    module.recompile()


def _counts(module: GraphModule) -> tuple[int, int]:
    """How many layers read weights that were integers, and how many read others."""
    quantised = left = 0
    for node in module.graph.nodes:
        if node.op != "call_function" or str(node.target).split(".")[1:2] not in [[name] for name in _WEIGHTY]:
            continue
        weight = node.args[1]
        if isinstance(weight, Node) and weight.op == "get_attr":
            left += 1
        elif isinstance(weight, Node) and "dequantize_per_channel" in str(weight.target):
            quantised += 1
    return quantised, left


# -- weights of linear layers -----------------------------------------------------------------------------------------


def _weights(model: nn.Module, free: FreeDims, scheme: str) -> tuple[torch.export.ExportedProgram, tuple[int, int]]:
    held = nn.Sequential(copy.deepcopy(model))  # so that a model that is a linear layer has an owner too
    library = importlib.import_module("torchao.quantization")
    chosen = [path for path, module in held.named_modules() if _taken(module, scheme)]
    layers = [module for module in held.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
    library.quantize_(held, _RECIPES[scheme](library), filter_fn=lambda _, path: path in chosen)
    if scheme == "int4_weights":
        for path in chosen:
            _replace(held, path, Nibbles(held.get_submodule(path)))
    # Plain tensors, so that the file holds no pickled class of torchao.
    importlib.import_module("torchao.utils").unwrap_tensor_subclass(held)
    return program_of(held[0], free), (len(chosen), len(layers) - len(chosen))


def _taken(module: nn.Module, scheme: str) -> bool:
    """Whether the weight of a module is quantised: of linear layers that are called, not read by their owner."""
    read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if not isinstance(module, nn.Linear) or read:
        return False
    return scheme != "int4_weights" or module.in_features % GROUP == 0


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, new)


class Nibbles(nn.Module):
    """A linear layer that holds its weights as numbers of four bits, two in a byte.

    torchao gives each number a byte of its own, for others to pack. Here the first half of each group lies in the lower
    four bits, and the second half in the upper ones, so that unpacking is two shifts and nothing is reordered.

    Args:
        layer: a linear layer whose weight torchao has quantised: ``qdata`` of shape ``(out, in)`` between -8 and 7 and
            ``scale`` of shape ``(out, in / 32)``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight: Any = layer.weight
        low, high = weight.qdata.unflatten(1, (-1, GROUP)).chunk(2, dim=2)  # (out, groups, 16) each
        self.register_buffer("packed", (high << 4) | (low & 15))  # signed bytes
        self.register_buffer("scale", weight.scale.detach().unsqueeze(2))  # (out, groups, 1)
        self.bias: Any = layer.bias

    @property
    def weight(self) -> Tensor:
        """The weight, shape ``(out, in)``."""
        packed: Any = self.packed
        scale: Any = self.scale
        # Shifts of signed numbers keep the sign: -8 to 7.
        numbers = torch.cat(((packed << 4) >> 4, packed >> 4), dim=2)
        return (numbers.to(scale.dtype) * scale).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """The layer; ``x`` has the shape ``(..., in)``."""
        return F.linear(x, self.weight, self.bias)


def _dynamic(library: Any) -> Any:
    return library.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _eight(library: Any) -> Any:
    return library.Int8WeightOnlyConfig(set_inductor_config=False)


def _four(library: Any) -> Any:
    kind: Any = vars(torch)["int4"]  # of which type checkers do not know
    return library.IntxWeightOnlyConfig(weight_dtype=kind, granularity=library.PerGroup(GROUP))


_RECIPES: dict[str, Callable[[Any], Any]] = {"int8_dynamic": _dynamic, "int8_weights": _eight, "int4_weights": _four}
