"""What `structprune info` tells: versions, hardware, and the channels of a model."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from rich.table import Column, Table

from structprune.cli.output import costs
from structprune.dependency_graph import DependencyGraph
from structprune.export.metadata import OnnxInfo
from structprune.hardware import processor
from structprune.reporting.text import places

# Of these a report of a fault has to tell the versions.
_REPORTED = (
    "torch", "torchvision", "timm", "transformers", "numpy", "scipy", "networkx", "safetensors", "onnx", "onnxscript",
    "onnxruntime", "openvino", "rich", "typer",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Versions, extras with what they lack, and hardware."""
    versions = {"structprune": version("structprune"), "python": platform.python_version()}
    versions |= {name: version(name) for name in _REPORTED if _installed(name)}
    return {
        # Of torch the build too, which the package's own version may leave out: 2.13.0+cu130.
        "versions": versions | {"torch": str(torch.__version__)},
        "extras": {name: {"missing": missing} for name, missing in _extras()},
        "hardware": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _extras() -> Iterator[tuple[str, list[str]]]:
    """The extras that the package declares, with the packages of each that are not installed."""
    missing_by_extra: dict[str, list[str]] = {}
    for requirement in requires("structprune") or ():
        if match := re.fullmatch(r"([\w.-]+).*extra == [\"'](\w+)[\"'].*", requirement):
            name, extra = match.groups()
            missing = missing_by_extra.setdefault(extra, [])
            if not _installed(name):
                missing.append(name)
    yield from missing_by_extra.items()


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def describe_model(graph: DependencyGraph) -> dict[str, Any]:
    """Costs, groups, pinned axes, and branches and blocks of a model."""
    cost = graph.costs.at(graph.counter())
    groups = [
        {
            "name": group.name,
            "axis": group.axis,
            "channels": group.channels,
            "tensors": sorted({member.tensor for member in group.members}),
        }
        for group in graph.groups()
    ]
    pinned = {place: places(reason) for place, reason in graph.pinned().items()}
    branches = [
        {"name": each.name, "kind": each.kind, "layers": list(each.layers), "params": each.params, "macs": each.macs}
        for each in graph.branches()
    ]
    parts = {"cost": asdict(cost), "groups": groups, "pinned": pinned, "branches": branches}
    return {"class": type(graph.model).__name__, **parts}


def model_tables(data: dict[str, Any]) -> list[Any]:
    """The same as tables."""
    groups = Table(Column("group", overflow="fold"), "axis", "channels", "tensors", title=data["class"])
    for group in data["groups"]:
        groups.add_row(group["name"], group["axis"], str(group["channels"]), str(len(group["tensors"])))
    pinned = Table(Column("pinned axis", overflow="fold"), Column("reason", overflow="fold"))
    for place, reason in data["pinned"].items():
        pinned.add_row(place, reason)
    lines = [f"{name.replace('_', ' ')}: {value:,}" for name, value in data["cost"].items()]
    if not data["branches"]:
        return [groups, pinned, "\n".join(lines)]
    branches = Table(Column("branch or block", overflow="fold"), "kind", "layers", "params", "MACs")
    for each in data["branches"]:
        numbers = (len(each["layers"]), each["params"], each["macs"])
        branches.add_row(each["name"], each["kind"], *(f"{number:,}" for number in numbers))
    return [groups, pinned, branches, "\n".join(lines)]


def onnx_tables(said: OnnxInfo) -> list[Any]:
    """What an ONNX file says of itself, as tables."""
    table = Table(
        Column("input or output", overflow="fold"),
        "shape",
        title=f"{said.path}: {said.bytes:,} bytes, opset {said.opset}",
    )
    for name, shape in [*said.inputs.items(), *said.outputs.items()]:
        table.add_row(name, " x ".join(map(str, shape)))
    if said.version is None:
        return [table, "Not written by structprune."]
    if said.before is None or said.after is None:
        return [table, f"Written by structprune {said.version}, of a model that was not pruned."]
    lines = [f"Written by structprune {said.version}; plans", *said.digests]
    return [table, costs(said.before, said.after), "\n  ".join(lines)]
