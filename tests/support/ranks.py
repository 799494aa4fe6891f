"""Work done by two processes of ``torch.distributed``."""

from __future__ import annotations

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


def on_two_ranks(work: Callable[..., Any], folder: Path, *args: Any) -> tuple[Any, Any]:
    """What ``work(rank, *args)`` returns on each of two ranks; a function of a module, whose results torch can save."""
    mp.spawn(_one_rank, (folder, work, args), nprocs=2)
    first, second = (torch.load(folder / f"rank{rank}") for rank in (0, 1))
    return first, second


def _one_rank(rank: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # The ranks meet in a file: a port that is free now may be taken by another process a moment later.
    store = dist.FileStore(str(folder / "meeting"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=PATIENCE)
    torch.save(work(rank, *args), folder / f"rank{rank}")
    dist.destroy_process_group()
