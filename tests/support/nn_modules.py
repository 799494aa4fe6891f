"""Networks around single modules of ``torch.nn``, with the inputs of torch's own test database of modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

from support.operations import Case, Sample, along_each, sample_of, spread


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
            calls = [(number, each, _sample(each)) for number, each in enumerate(every) if each.forward_input]
            for number, each, sample in spread([call for call in calls if call[-1] is not None], limit):
                built = info.module_cls(*each.constructor_input.args, **each.constructor_input.kwargs)
                body = built.to(torch.float64).train(training)
                if info.is_lazy:
                    body(*each.forward_input.args, **each.forward_input.kwargs)
                yield from along_each(info.name, number, sample._replace(operation=body), training)


def _sample(each: Any) -> Sample | None:
    return sample_of(nn.Identity(), each.forward_input.args, each.forward_input.kwargs)
