"""Batches that wait with their results in files, for data whose activations do not fit into memory.

Where many batches pause side by side (`parallel_forward`), memory holds the results of all of them that later
operations need. A run of this kind writes its own into files each time that it pauses, maps them into memory, and goes
on from there: the system reads a page when it is needed and drops it when memory is short. Then memory holds what one
batch computes between two pauses. Of a language model of width 4096, 131,072 tokens of a stream in float32 are 2 GB.

A file is removed from its folder as soon as it is mapped, where the system allows that; its space is free again once
the tensors are gone, even if the process is killed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Container, Generator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import RecoveryError
from structprune.forwards.parallel_forward import Event, Pause, Run, Side
from structprune.forwards.prefix import PrefixCache
from structprune.inputs import device_of
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import Trace, map_tensors, tensors_in

LEAST = 1 << 20  # bytes: what a batch holds below this stays in memory


class ActivationFiles:
    """Tensors in files of a folder, mapped into memory.

    Args:
        folder: of these files alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()

    def moved(self, value: Any, left: Container[int]) -> Any:
        """The tensors of a nested value with their numbers in files; views of one storage stay views of one file.

        Args:
            value: tensors in tuples, lists and dicts.
            left: storages, by their address, that stay where they are.

        Raises:
            RecoveryError: the folder cannot take them.
        """
        files: dict[int, torch.UntypedStorage] = {}

        def in_file(tensor: Tensor) -> Tensor:
            if not in_memory(tensor) or (place := tensor.untyped_storage().data_ptr()) in left:
                return tensor
            if place not in files:
                files[place] = self._file_of(tensor.untyped_storage())
            return tensor.new_empty(0).set_(files[place], tensor.storage_offset(), tensor.size(), tensor.stride())

        return map_tensors(in_file, value)

    def _file_of(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        path = self._folder / str(next(self._numbers))
        numbers = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        try:
            # Written, and not through the map: pages of a full disk would end the process.
            path.write_bytes(numbers.data)
            mapped = torch.from_file(str(path), shared=True, size=storage.nbytes(), dtype=torch.uint8)
        except OSError as error:
            raise RecoveryError(
                f"The activations of the data do not fit into {self._folder.parent}: {error.strerror}, at "
                f"{storage.nbytes()} bytes more. Give offload= a folder with more space, or less data."
            ) from error
        if os.name == "posix":
            path.unlink()
        return mapped.untyped_storage()


def in_memory(tensor: Tensor) -> bool:
    """Whether a tensor has numbers in memory, and none in a file that was mapped; one that wraps another has none."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    storage = tensor.untyped_storage()
    return storage.nbytes() > 0 and storage.filename is None


@contextmanager
def runs_of(
    kind: type[Run], offload: str | os.PathLike[str] | None, model: nn.Module
) -> Generator[Callable[..., Run | OffloadedRun]]:
    """What makes the runs of `parallel_forward.parallel_runs`: `kind`, or one whose results are in files of a folder.

    Args:
        kind: of runs whose results are in memory.
        offload: where a folder for the files is made, which is removed when the block is left; None for memory.
        model: what is to run.

    Raises:
        RecoveryError: the folder cannot be made, or the model is not in the memory of the CPU.
    """
    if offload is None:
        yield kind
        return
    if device_of(model).type != "cpu":
        raise RecoveryError(
            f"offload= keeps what is in the memory of the CPU in files, and the model is on {device_of(model)}. Leave "
            "it out, or move the model to the CPU."
        )
    try:
        Path(offload).mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="activations-", dir=offload, ignore_cleanup_errors=True)
    except OSError as error:
        raise RecoveryError(f"offload={str(offload)!r} can be no folder for activations: {error.strerror}.") from error
    with folder as path:
        yield partial(OffloadedRun, ActivationFiles(Path(path)))


class OffloadedRun(PrefixCache):
    """A run whose results lie in files while it is paused.

    Args:
        files: where.
        model: as for `PrefixCache`, as are the other arguments.
        inputs: the batch.
        trace: of the original.
        events: where the run can be asked to pause.
    """

    def __init__(self, files: ActivationFiles, model: nn.Module, inputs: Any, trace: Trace, events: set[Event]) -> None:
        self._files = files
        # What is solved is written into the model's own tensors, which stay where they are.
        self._left = _sizes([[held.tensor for held in held_tensors(model).values()], inputs])
        super().__init__(model, inputs, trace, events)

    def run_to(self, event: Event) -> Pause:
        """Let the batch run to this event; what it holds then is in files.

        Raises:
            RecoveryError: the forward ends without it, or cannot begin in the middle, or the folder is full.
        """
        pause = super().run_to(event)
        needed = {number: self.results[number] for number in self._needed | self._same}
        mine = _sizes([needed, pause.args, pause.kwargs, pause.result])
        if sum(size for place, size in mine.items() if place not in self._left) < LEAST:
            return pause
        if not self.can_restart:
            raise RecoveryError(
                "The forward writes over its input or asks for the value of a tensor, so that it cannot begin in the "
                "middle from activations in files. Leave out offload=, and give less data if memory is short."
            )
        number, side = event
        if side is Side.BEFORE:  # the arguments are results that are needed
            self.results.update(self._files.moved(needed, self._left))
            self.restart(number)
            return super().run_to(event)
        needed, args, kwargs, result = self._files.moved((needed, pause.args, pause.kwargs, pause.result), self._left)
        self.results.update(needed)
        self.restart(number + 1)
        return Pause(event, args, kwargs, result)


def _sizes(value: Any) -> dict[int, int]:
    """The bytes of each storage in memory that tensors of a nested value share, by its address."""
    storages = (tensor.untyped_storage() for tensor in tensors_in(value) if in_memory(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
