"""`layer_times`: where the time of one model goes, layer by layer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.benchmarking.backends import BACKENDS
from structprune.benchmarking.profiling import by_layer
from structprune.benchmarking.timing import device_of, known_device, placed, said_if_not_running, threads_set
from structprune.checking import INPUTS, MODEL, one_of, require, whole
from structprune.inputs import evaluating, resize_batch
from structprune.tracing.trace import ExampleInputs


def layer_times(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    backend: str = "eager",
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
) -> dict[str, float]:
    """Measure how long the operations of each layer take, by the profiler of torch or of ONNX Runtime.

    An operation belongs to the innermost module whose forward runs it, ``""`` being the model itself; what ONNX Runtime
    has fused, to the layer whose weight it multiplies with. Backends that fuse operations across layers (``"compile"``,
    ``"tensorrt"``) tell nothing of layers: for them the times of eager mode are given. The model is left as it was.

    Args:
        model: The model.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        backend: ``"eager"``, ``"channels_last"``, ``"compile"``, ``"onnxruntime"`` or ``"tensorrt"``.
        batch_size: Samples in one run; those given are repeated or cut. As given, if not set.
        device: Where to run, on a copy of the model if it is elsewhere; where the inputs are, if not set.
        threads: Threads that an operation may use on the CPU; as many as torch uses now, if not set.

    Returns:
        Seconds of one forward by layer, the greatest first.

    Raises:
        ValueError: There is no such backend, or it cannot use the device.
        MissingExtraError: A backend's package is not installed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8))
        >>> sorted(layer_times(model, torch.randn(32, 64)))
        ['0', '1', '2']
    """
    counts = {"batch_size": whole(1).or_none, "threads": whole(1).or_none}
    require(locals(), ValueError, model=MODEL, example_inputs=INPUTS, backend=one_of(BACKENDS), **counts)
    where = known_device(device) if device is not None else device_of(example_inputs)
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(where), example_inputs)
    if batch_size is not None:
        inputs = resize_batch(inputs, batch_size)
    model = placed(model, where)
    with evaluating(model), threads_set(threads) as count, tempfile.TemporaryDirectory() as folder:
        with said_if_not_running([model], inputs):
            run = BACKENDS[backend](model, inputs, where, count, Path(folder))
            run()
        return by_layer(run.profile().spent)
