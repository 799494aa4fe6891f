"""Work done by several processes of ``torch.distributed``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

needs_distributed = pytest.mark.skipif(
    not dist.is_available(), reason="this build of torch has no torch.distributed, so there are no ranks to test"
)
# Of one sum: a rank that waits in vain fails its test instead of holding up all of them.
PATIENCE = timedelta(minutes=5)


def on_ranks(count: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returns on each rank; a function of a module, whose results torch can save."""
    mp.spawn(_one_rank, (count, folder, work, args), nprocs=count)
    return [torch.load(folder / f"rank{rank}") for rank in range(count)]


def on_two_ranks(work: Callable[..., Any], folder: Path, *args: Any) -> tuple[Any, Any]:
    """The same on two ranks."""
    first, second = on_ranks(2, work, folder, *args)
    return first, second


def _one_rank(rank: int, count: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # The ranks meet in a file: a port that is free now may be taken by another process a moment later.
    store = dist.FileStore(str(folder / "meeting"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
    torch.save(work(rank, *args), folder / f"draft{rank}")
    os.replace(folder / f"draft{rank}", folder / f"rank{rank}")
    # Where the group is destroyed, or Python ends by itself, one process in some twenty is aborted by threads of gloo
    # that still run ("terminate called without an active exception", torch 2.13). So all wait for the last result, and
    # end at once. Of one that failed, `spawn` ends the others.
    while not all((folder / f"rank{number}").exists() for number in range(count)):
        time.sleep(0.01)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
