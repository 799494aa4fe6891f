"""Randomness that begins anew with each epoch, so that a run that goes on after a kill is the run that was killed."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from structprune.tracing.trace import preserved_random_state


def _owners(data: Any) -> Iterator[Any]:
    """What may shuffle: the loader itself, and its samplers."""
    yield data
    for name in ("sampler", "batch_sampler", "dataset"):
        part = getattr(data, name, None)
        if part is not None:
            yield part
            inner = getattr(part, "sampler", None)
            if inner is not None:
                yield inner


def _generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    held = (getattr(owner, "generator", None) for data in loaders for owner in _owners(data))
    return list({id(found): found for found in held if isinstance(found, torch.Generator)}.values())


def begin_epoch(train: Any, validate: Any, seed: int, epoch: int) -> None:
    """Set all random generators by seed and epoch: those of torch, numpy and Python, and those of the loaders.

    Samplers of `train` that have ``set_epoch`` (as ``DistributedSampler`` does) are told the epoch.
    """
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    for generator in _generators((train, validate)):
        generator.manual_seed(mixed)
    for owner in _owners(train):
        tell = getattr(owner, "set_epoch", None)
        if callable(tell):
            tell(epoch)


@contextmanager
def preserved(*loaders: Any) -> Generator[None]:
    """All of these generators are afterwards as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    own = [(generator, generator.get_state()) for generator in _generators(loaders)]
    try:
        with preserved_random_state():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for generator, state in own:
            generator.set_state(state)
