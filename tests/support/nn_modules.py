"""Networks around single modules of ``torch.nn``, with the inputs of torch's own test database of modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.testing._internal.common_modules import module_db

from support.operations import Case, along_each, sample_of, spread


def module_database() -> dict[str, Any]:
    """All entries by name."""
    return {info.name: info for info in module_db}


def module_cases(info: Any, limit: int) -> Iterator[Case]:
    """The networks of an entry: of up to `limit` samples, in evaluation and in training mode."""
    for training in (False, True):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            every = info.module_inputs_func(info, "cpu", torch.float64, False, training)
            for number, each in spread(list(enumerate(every)), limit):
                if each.forward_input is None:
                    continue
                built = info.module_cls(*each.constructor_input.args, **each.constructor_input.kwargs)
                body = built.to(torch.float64).train(training)
                sample = sample_of(body, each.forward_input.args, each.forward_input.kwargs)
                if sample is not None:
                    if info.is_lazy:
                        body(*each.forward_input.args, **each.forward_input.kwargs)
                    yield from along_each(info.name, number, sample, training)
