"""How much memory a run takes at most."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.profiler import profile

from structprune.benchmarking import session_memory
from structprune.benchmarking.profiling import quiet_profiler
from structprune.export.files import tensors
from structprune.tracing.trace import ExampleInputs, as_call


def held_bytes(model: nn.Module, inputs: ExampleInputs) -> int:
    """Bytes of parameters, buffers and inputs, shared ones once."""
    held = {
        id(tensor): tensor.numel() * tensor.element_size()
        for tensor in chain(model.parameters(), model.buffers(), tensors(as_call(inputs)))
    }
    return sum(held.values())


def peak_of_run(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that one call has at most of torch's allocator, above what lay there before.

    On the CPU each allocation is read off torch's profiler; on CUDA the allocator itself keeps the peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The events of memory are no part of the profiler's typed surface.
    profiler: Any = profile(profile_memory=True)
    with quiet_profiler(), profiler:
        result = call()
    del result
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def peak_of_session(runtime: str, file: Path, feed: Mapping[str, Any], threads: int) -> int | None:
    """Bytes by which a process grows at most when a runtime loads and runs a file on the CPU.

    A process of its own is asked, as ONNX Runtime, for one, tells nothing of its arena, and memory that was freed
    before would hide what it takes. None where the kernel does not tell (elsewhere than on Linux).
    """
    if not Path("/proc/self/status").exists():
        return None
    inputs = file.with_suffix(".npz")
    np.savez(inputs, **feed)
    command = [sys.executable, str(Path(session_memory.__file__)), runtime, str(file), str(inputs), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)
