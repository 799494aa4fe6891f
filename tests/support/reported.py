"""Models, their plans, and reports with everything in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import timm
import torch

import structprune
from structprune.benchmarking import Benchmark, Explanation, Timing
from structprune.planning.sensitivities import GroupCurve, Sensitivity

IMAGE = torch.zeros(1, 3, 64, 64)
MODELS = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
}

TIMES = {
    "resnet50": [{"conv1": 2.5e-3, "layer1.0.act1": 5e-4}, {"conv1": 1.25e-3, "layer1.0.act1": 3e-4}],
    "vit": [{"blocks.0.mlp.fc1": 2.5e-3, "blocks.0.mlp.act": 5e-4}],
}
BENCHMARK = Benchmark(
    tuple(
        Timing(model, backend, tuple(size * seconds * (1 + 0.01 * i) for i in range(5)), size, 10**7)
        for backend in ("eager", "onnxruntime")
        for size in (1, 8)
        for model, seconds in (("dense", 4e-3), ("slim <1>", 2e-3))
    ),
    "cpu", 1, 1, macs={"dense": 300, "slim <1>": 100}, environment={"processor": "A processor"},
    explanations=(Explanation("slim <1>", "eager", 8, {"memory": 0.6}, "conv1", 0.3, "Memory-bound: <60%> of it."),),
)  # fmt: skip
CHAIN = [
    structprune.Stage("dense", 93.4, 3_000_000, 1000, {"ONNX <Runtime>": 2e-3}),
    structprune.Stage("pruned <&> int8", 92.9, 400_000, 500, {"ONNX <Runtime>": 2.5e-3, "OpenVINO": 1e-3}),
]


def reported(name: str, folder: Path) -> SimpleNamespace:
    """A model, its plan, and a report with everything in it."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    plan = structprune.plan(model, IMAGE, ratio=0.5)
    graph = structprune.DependencyGraph(model, IMAGE)
    curves = tuple(
        GroupCurve(g.name, g.axis, g.channels, (g.channels - 1, 1), (0.7, 0.5 / (1 + i)))
        for i, g in enumerate(graph.groups())
    )
    recovery = SimpleNamespace(
        layers=[SimpleNamespace(layer="conv<1>", before=0.5, after=0.125)], skipped={"fc": "its input is <the same>"}
    )
    file = structprune.report(
        model,
        IMAGE,
        folder / "report.html",
        plan=plan,
        verification=structprune.verify(model, plan.apply(model), plan, IMAGE),
        sensitivity=Sensitivity(0.75, curves),
        points=[(4e9, 0.76, "dense"), (2e9, 0.75), (1e9, 0.7, "</script><b>quarter")],
        recovery=recovery,
        times=TIMES[name],
        benchmark=BENCHMARK,
        chain=CHAIN,
    )
    modules = dict(model.named_modules())
    return SimpleNamespace(
        model=model, plan=plan, graph=graph, file=file, text=file.read_text(), has=modules.__contains__
    )


def data_of(text: str) -> dict:
    """What the page's script works on."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
