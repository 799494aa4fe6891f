"""Every public function with hundreds of bad values, one argument at a time: what is refused, and how?

`attempts` makes the calls, each on a model of its own, and tells of each one of four outcomes:

refused    an error of the library's own whose message names the argument, or says what is wrong with the data
unclear    an error of the library's own that does not name the argument
raw        an error that something else raised (torch, Python, a library)
accepted   no error at all

`touched` lists the calls after which the model was not what it was.
"""

from __future__ import annotations

import re
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import structprune
from structprune import importance, masks, training

NAN, INF = float("nan"), float("inf")
PACKAGE = str(Path(structprune.__file__).parent)
X = torch.zeros(2, 4)
SAMPLES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]


class Odd:
    """An object of a type that nothing knows."""

    def __repr__(self) -> str:
        return "Odd()"


def build() -> nn.Sequential:
    """A small model with everything that has to stay as it is: a batch norm, dropout, a frozen parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    return model


# Values by what an argument is; each of them is wrong for it.
MODELS = (None, 3, "resnet50", X, nn.Linear, Odd(), [nn.Linear(4, 2)], {})
INPUTS = (None, 3, "x", (2, 4), [2, 4], nn.Linear(4, 2), torch.zeros(2, 5), torch.zeros(0), {"y": X}, (X, X, X), Odd())
LAYERS = (3, "nope", "", [3], [""], ["0", None], 1.5, [["0"]], Odd(), nn.Linear(4, 2), True)
COUNTS = (-1, 1.5, "4", None, NAN, INF, True, [2], Odd())
SHARES = (-0.1, 1.5, "half", None, NAN, INF, True, [0.5], Odd())
FUNCTIONS = (3, "f", [], Odd())
DATA = (None, 3, "folder", X, {}, [], [None], [3], ["x"], [torch.zeros(2, 5)], [X[:0]], [X * NAN], Odd())
PATHS = (None, 3, 1.5, [], Odd(), b"\0", "/proc/nope/x", "/dev/null/x", "")
FLAGS = (3, "yes", None, [], Odd())
PLANS = (None, 3, "plan", {}, X, Odd())


@dataclass(frozen=True)
class Subject:
    """A public function, how it is called well, and the bad values of each of its arguments.

    Attributes:
        name: of the function.
        call: runs it on a model, with what is given for an argument in place of the good value.
        bad: the bad values of each argument.
    """

    name: str
    call: Callable[..., Any]
    bad: dict[str, tuple[Any, ...]]


PLAN_OPTIONS: dict[str, tuple[Any, ...]] = {
    "ratio": (
        1.0,
        -0.1,
        "half",
        True,
        NAN,
        INF,
        [0.5],
        nn.ReLU(),
        {"0": "x"},
        {0: 0.5},
        {"": 0.5},
        {"nope": 0.5},
        {},
        {"0": NAN},
        {"*": 1},
        (0.5,),
        lambda group: "x",
        lambda group: 2,
        lambda: 0.5,
    ),
    "target": (
        0.5,
        "macs",
        {},
        {"flops": 0.5},
        {"macs": INF},
        {"macs": NAN},
        {"macs": 0},
        {"macs": -1},
        {"macs": "1"},
        {"macs": True},
        {"macs": None},
        {3: 0.5},
        [0.5],
        ("macs", 0.5),
        {"latency": "fast"},
        {"macs": 1e-9},
        Odd(),
    ),
    "scope": (3, "world", [], [[]], [3], [["nope"]], [[3]], {}, True, 0.5, "", [[""]], "per_cost", nn.ReLU(), Odd()),
    "axes": (3, [3], [], ["width"], "width", "", True, {}, 0.5, [None], Odd()),
    "allocation": (None, 3, "best", "", [], True, ["exact"], "exact", Odd()),
    "uniform": (3, "yes", 0, 1.0, [], [True], NAN, Odd()),
    "tensor_parallel": (0, -1, 1.5, "2", NAN, INF, True, [2], Odd()),
    "branch_score": (3, "nope", "", [], True, "loss", Odd()),
    "ignore_outputs": (None, *LAYERS),
    "round_to": (0, -8, 1.5, None, "8", "fast", True, NAN, INF, [8], Odd()),
    "min_channels": (0, *COUNTS),
    "max_ratio": SHARES,
    "importance": (
        3,
        "l9",
        "",
        None,
        True,
        [],
        ["l2"],
        {},
        X,
        lambda: 1,
        lambda g, t: None,
        lambda g, t: torch.zeros(1),
        lambda g, t: torch.full((g.channels,), NAN),
        nn.ReLU,
        Odd(),
    ),
    "loss": FUNCTIONS,
    "forward": FUNCTIONS,
    "ignore": (None, *LAYERS),
    "outputs": ([None], 1.5, "nope", 7, -9, [[0]], {}, [], True, Odd()),
    "latency": (3, "eager", {}, True, structprune.Latency(), Odd()),
}
FITTED = {
    "data": DATA,
    "loss": (
        lambda model, batch: "x",
        lambda model, batch: model(batch),
        lambda: 1,
        lambda model, batch: model(batch).sum() * NAN,
        lambda model, batch: torch.zeros(()),
    ),
}


def _mean(model: nn.Module, batch: Any) -> Any:
    return model(batch).pow(2).mean()


def _slim(model: nn.Module) -> nn.Module:
    return structprune.prune(model, X, ratio=0.5)


def _metric(model: nn.Module, loader: Any) -> float:
    return 1.0


def _called(function: Callable[..., Any], **good: Any) -> Callable[..., Any]:
    """Call with keywords alone: `good`, of which what is None of a model is made anew, and the bad value."""

    def call(model: nn.Module, folder: Path, /, **bad: Any) -> Any:
        given = {name: value(model, folder) if isinstance(value, _Made) else value for name, value in good.items()}
        return function(**(given | bad))

    return call


class _Made:
    """An argument that is made of the model and a folder for each call."""

    def __init__(self, make: Callable[[nn.Module, Path], Any]) -> None:
        self._make = make

    def __call__(self, model: nn.Module, folder: Path) -> Any:
        return self._make(model, folder)


MODEL = _Made(lambda model, folder: model)
SLIM = _Made(lambda model, folder: _slim(model))
PLAN = _Made(lambda model, folder: structprune.plan(model, X, ratio=0.5))
GRAPH = _Made(lambda model, folder: structprune.DependencyGraph(model, X))


def _file(name: str) -> _Made:
    return _Made(lambda model, folder: folder / name)


def _transformer(model: nn.Module, folder: Path) -> Path:
    """A folder with a small model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    state = torch.get_rng_state()
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    torch.set_rng_state(state)
    return folder / "llama"


FOLDER = _Made(_transformer)


def _stepped(**given: Any) -> Any:
    return structprune.Pruner(**given).step()


def _softened(**given: Any) -> Any:
    return training.SoftPruner(**given).step()


class Residual(nn.Module):
    """A layer beside its input: a branch that may go."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x)


RESIDUAL = nn.Sequential(Residual(), Residual(), Residual())


def _graph_method(name: str, **good: Any) -> Callable[..., Any]:
    def call(model: nn.Module, folder: Path, /, **bad: Any) -> Any:
        return getattr(structprune.DependencyGraph(model, X), name)(**(good | bad))

    return call


def _criterion(make: Callable[..., Any], needs_data: bool = False) -> Callable[..., Any]:
    def call(model: nn.Module, folder: Path, /, **bad: Any) -> Any:
        data = {"data": SAMPLES, "loss": _mean} if needs_data else {}
        return structprune.plan(model, X, ratio=0.5, importance=make(**bad), **data)

    return call


BATCHES = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))] * 2
OF_MODEL = {"model": MODELS, "example_inputs": INPUTS}
GOOD = {"model": MODEL, "example_inputs": X}


def subjects() -> Iterator[Subject]:
    """All public functions and classes that take anything."""
    fitted = {"importance": "taylor", "data": SAMPLES, "loss": _mean}
    for name, function in (("plan", structprune.plan), ("prune", structprune.prune)):
        yield Subject(name, _called(function, **GOOD), OF_MODEL | PLAN_OPTIONS)
        yield Subject(name, _called(function, **GOOD, **fitted), FITTED)
    yield Subject("prune", _called(structprune.prune, **GOOD), {"inplace": FLAGS, "verify": FLAGS})
    yield Subject(
        "Pruner",
        _called(_stepped, **GOOD, steps=2),
        OF_MODEL
        | PLAN_OPTIONS
        | {
            "steps": (0, *COUNTS),
            "schedule": (None, 3, "fast", [], lambda t: "x", lambda t: 2.0, lambda: 1.0, lambda t: NAN, Odd()),
            "optimizer": (3, "sgd", torch.optim.SGD, Odd()),
            "state": (
                3,
                "x",
                {},
                [],
                {"steps": 2},
                {"steps": 2, "taken": "x", "ends": 3, "plans": 5},
                Odd(),
                {"steps": 2, "taken": 9, "ends": [], "plans": []},
                {"steps": 2, "taken": 1, "ends": [], "plans": []},
            ),
        },
    )
    yield Subject(
        "DependencyGraph",
        _called(structprune.DependencyGraph, **GOOD),
        {**OF_MODEL, "ignore": PLAN_OPTIONS["ignore"], "outputs": PLAN_OPTIONS["outputs"]},
    )
    yield Subject(
        "DependencyGraph.prune_group",
        _graph_method("prune_group", target="0", indices=[1]),
        {
            "target": (None, *LAYERS),
            "indices": (None, 3, "1", [1.9], ["3"], [True], [-1], [99], [1, 1], [None], X, {}, [[1]], range(8), Odd()),
        },
    )
    for method in ("explain", "group"):
        yield Subject(f"DependencyGraph.{method}", _graph_method(method, layer="0"), {"layer": (None, *LAYERS)})
    yield Subject(
        "Plan.apply",
        lambda model, folder, /, **bad: structprune.plan(model, X).apply(**({"model": model} | bad)),
        {"model": (*MODELS, nn.Linear(4, 2)), "inplace": FLAGS},
    )
    yield Subject(
        "Plan.from_json", _called(structprune.Plan.from_json), {"text": (None, 3, "", "x", "{}", "[]", b"", Odd())}
    )
    yield Subject(
        "verify",
        _called(structprune.verify, original=MODEL, slim=SLIM, plan=PLAN, example_inputs=X),
        {"original": MODELS, "slim": MODELS, "plan": PLANS, "example_inputs": INPUTS},
    )
    yield Subject(
        "materialize_weights",
        _called(structprune.materialize_weights, **GOOD),
        {**OF_MODEL, "inplace": FLAGS},
    )
    yield Subject(
        "prune_folder",
        _called(structprune.prune_folder, folder=FOLDER, into=_file("smaller"), ratio=0.5),
        {"folder": (*PATHS, "/tmp"), "into": (None, 3, [], Odd(), b"\0", "/proc/nope/x", "/dev/null", "")}
        | {"example_inputs": (3, "x", (2, 4), nn.Linear(4, 2), torch.zeros(2, 5), {"y": X}, Odd())}
        | {"data": ([torch.ones(1, 4, dtype=torch.long)],), "importance": ("taylor", "l9", 3, Odd())}
        | {
            name: PLAN_OPTIONS[name] for name in ("ratio", "target", "allocation", "uniform", "tensor_parallel", "axes")
        },
    )
    yield Subject("cost", _called(structprune.cost, **GOOD), OF_MODEL)
    yield Subject(
        "recover",
        _called(structprune.recover, slim=SLIM, original=MODEL, data=[torch.randn(64, 4)]),
        {
            "slim": MODELS,
            "original": (*MODELS, nn.Linear(4, 2)),
            "data": DATA,
            "rows": (0, *COUNTS),
            "rounds": COUNTS,
            "seed": COUNTS,
            "forward": (*FUNCTIONS, lambda model, batch: None, lambda: 1),
        },
    )
    yield Subject(
        "recalibrate",
        _called(structprune.recalibrate, model=MODEL, data=[torch.randn(64, 4)]),
        {"model": MODELS, "data": DATA, "forward": (*FUNCTIONS, lambda model, batch: None, lambda: 1)},
    )
    yield Subject(
        "fold",
        _called(structprune.fold, slim=SLIM, original=MODEL, example_inputs=X),
        {
            "slim": MODELS,
            "original": (*MODELS, nn.Linear(4, 2)),
            "example_inputs": INPUTS,
            "how": (None, 3, "nope", "", True, Odd()),
            "data": tuple(value for value in DATA if value is not None),
            "verify": FLAGS,
        },
    )
    yield Subject(
        "recovery_report", _called(structprune.recovery_report, model=MODEL), {"model": (*MODELS, nn.Linear(4, 2))}
    )
    yield Subject("kept", _called(structprune.kept, model=MODEL), {"model": MODELS})
    yield Subject(
        "Reconstruction",
        _criterion(structprune.Reconstruction, True),
        {
            "per": (None, 3, "nope", "", True),
            "levels": (None, 3, (), "x", (0.5, NAN), (2.0,), ("a",), (0.0,)),
            "probes": (0, *(bad for bad in COUNTS if bad is not None)),
            "rows": (0, *COUNTS),
            "axes": (3, [3], ["width"], "width", ()),
            "distance": (None, 3, "kl"),
            "seed": COUNTS,
        },
    )
    yield Subject(
        "benchmark",
        _called(
            structprune.benchmark,
            models=_Made(lambda m, f: {"a": m}),
            example_inputs=X,
            runs=2,
            warmup=0,
            memory=False,
            explanations=False,
        ),
        {
            "models": (
                None,
                3,
                [nn.Linear(4, 2)],
                nn.Linear(4, 2),
                {},
                {1: nn.Linear(4, 2)},
                {"a": 3},
                {"": nn.Linear(4, 2)},
                Odd(),
            ),
            "example_inputs": INPUTS,
            "backends": (None, 3, "eager", [], ["nope"], [3], ["eager", "eager"]),
            "batch_size": (0, -1, 1.5, "4", NAN, True, [2]),
            "batch_sizes": (4, [], ["a"], [0], [1.5], [2, 2], "4", [True]),
            "device": (3, "nope", "cuda:99", Odd()),
            "threads": (0, -1, 1.5, "2", NAN, True, [1]),
            "runs": (0, 1, *COUNTS),
            "warmup": COUNTS,
            "clock": (None, 3, "sun", ""),
            "memory": FLAGS,
            "explanations": FLAGS,
            "progress": (3, "yes", [], Odd()),
        },
    )
    yield Subject(
        "layer_times",
        _called(structprune.layer_times, **GOOD),
        OF_MODEL
        | {
            "backend": (None, 3, "nope", ""),
            "batch_size": (0, -1, 1.5, "4", NAN, True),
            "device": (3, "nope", "cuda:99"),
            "threads": (0, -1, 1.5, "2", NAN, True),
        },
    )
    yield Subject(
        "sensitivity",
        _called(structprune.sensitivity, **GOOD, loader=X, metric=_metric, ratios=(0.5,)),
        OF_MODEL
        | {
            "metric": (None, 3, "x", lambda *_: "x", lambda *_: NAN, lambda *_: None, lambda *_: X, lambda: 1, Odd()),
            "ratios": (None, 0.5, (), ["a"], [0.0], [1.0], [NAN], "x", [True], {}, Odd()),
            "importance": PLAN_OPTIONS["importance"],
            "data": (3, "x", nn.ReLU(), Odd()),
            "loss": FUNCTIONS,
            "forward": FUNCTIONS,
            "ignore": PLAN_OPTIONS["ignore"],
            "checkpoint": (3, [], Odd(), "/proc/nope/x", "/dev/null"),
            "progress": FLAGS,
        },
    )
    yield Subject(
        "finetune",
        _called(training.finetune, model=MODEL, train=BATCHES, validate=BATCHES, epochs=1, progress=False),
        {
            "model": MODELS,
            "train": (
                None,
                3,
                "x",
                [],
                [3],
                [None],
                X,
                [(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))],
                [X],
                Odd(),
                [(torch.full((8, 4), NAN), torch.zeros(8, dtype=torch.long))],
            ),
            "validate": (None, 3, "x", [], [3], [None], lambda model: "x", lambda model: NAN, lambda: 1, Odd()),
            "epochs": (0, *COUNTS),
            "loss": (*FUNCTIONS, lambda model, batch: "x", lambda model, batch: NAN, lambda: 1),
            "teacher": (3, "x", nn.Linear, nn.Linear(3, 2), nn.Linear(4, 5), Odd()),
            "temperature": (0, -1, NAN, INF, "4", None, True),
            "soft": SHARES,
            "penalty": (*FUNCTIONS, lambda model: "x", lambda: 1),
            "optimizer": (3, "sgd", torch.optim.SGD, Odd()),
            "lr": (-1, NAN, INF, "x", None, True),
            "weight_decay": (-1, NAN, INF, "x", None, True),
            "warmup": (-0.1, 1.5, NAN, "x", None, True),
            "clip": (0, -1, NAN, "x", True),
            "amp": (3, "x", torch.int8, None, Odd()),
            "ema": (-0.1, 1.0, NAN, "x", True),
            "on_epoch": FUNCTIONS,
            "checkpoint": (3, [], Odd(), "/proc/nope/x", "/dev/null/x"),
            "seed": COUNTS,
            "progress": (3, "x", [], Odd()),
        },
    )
    yield Subject(
        "export_onnx",
        _called(structprune.export_onnx, model=MODEL, path=_file("m.onnx"), example_inputs=X),
        {
            "model": MODELS,
            "path": PATHS,
            "example_inputs": INPUTS,
            "dynamic_batch": FLAGS,
            "dynamic_dims": (
                3,
                "x",
                ["input"],
                {"input": "batch"},
                {"nope": {0: "n"}},
                {"input": {9: "n"}},
                {"input": {0: 3}},
            ),
            "check_inputs": (None, 3, X, "x", [3], [None]),
            "opset": (0, -1, 1.5, "x", 3, 999, NAN, True),
            "tolerance": (-1, NAN, "x", True, [], Odd()),
        },
    )
    yield Subject("onnx_info", _called(structprune.onnx_info), {"path": (*PATHS, "/nope.onnx", __file__, "/tmp")})
    yield Subject("save", _called(structprune.save, model=SLIM, path=_file("s")), {"model": MODELS, "path": PATHS})
    yield Subject(
        "load",
        _called(structprune.load, build_model=build, path=_Made(lambda m, f: structprune.save(_slim(m), f / "s"))),
        {
            "build_model": (None, 3, "x", nn.Linear(4, 2), lambda: None, nn.Flatten, lambda a: a, Odd()),
            "path": (*PATHS, "/nope", "/tmp", __file__),
        },
    )
    yield Subject(
        "remap_optimizer",
        _called(
            structprune.remap_optimizer,
            plan=PLAN,
            model=MODEL,
            slim=SLIM,
            optimizer=_Made(lambda m, f: torch.optim.SGD(m.parameters(), 0.1)),
        ),
        {
            "optimizer": (None, 3, "sgd", torch.optim.SGD, Odd()),
            "plan": PLANS,
            "model": (3, "x", nn.Linear, Odd()),
            "slim": (3, "x", nn.Linear, nn.Linear(4, 2), Odd()),
        },
    )
    yield Subject(
        "report",
        _called(structprune.report, **GOOD, path=_file("r.html")),
        OF_MODEL
        | {
            "path": PATHS,
            "plan": (3, "x", {}, Odd()),
            "verification": (3, "x", Odd()),
            "sensitivity": (3, "x", {}, Odd()),
            "points": (None, 3, "x", [3], [("a", "b")], [(1,)], [(NAN, 1.0)], Odd()),
            "point_axes": (None, 3, "x", (), ("a",)),
            "recovery": (3, "x", Odd()),
            "times": (None, 3, "x", [3], [{"0": "x"}], [{3: 1.0}], Odd()),
            "benchmark": (3, "x", {}, Odd()),
            "title": (3, [], Odd()),
        },
    )
    for name in ("plot_graph", "plot_widths", "plot_costs"):
        yield Subject(
            name,
            _called(getattr(structprune, name), **GOOD, path=_file("f.svg")),
            OF_MODEL | {"path": (*PATHS[1:], "picture.xyz"), "plan": (3, "x", {}, Odd())},
        )
    yield Subject(
        "plot_costs",
        _called(structprune.plot_costs, **GOOD, path=_file("f.svg")),
        {"of": (None, 3, "nope", ""), "times": (None, 3, "x", [3], [{"0": "x"}], Odd())},
    )
    yield Subject(
        "plot_curve",
        _called(structprune.plot_curve, points=[(1.0, 2.0)], path=_file("f.svg")),
        {
            "points": (None, 3, "x", [], [3], [("a", "b")], [(1,)], [(NAN, 1.0)], Odd()),
            "path": PATHS[1:],
            "axes": (None, 3, "x", (), ("a",), (1, 2)),
        },
    )
    yield Subject(
        "plot_recovery",
        _called(structprune.plot_recovery, path=_file("f.svg")),
        {"recovery": (None, 3, "x", [], Odd())},
    )
    yield Subject("branches", _called(structprune.branches, **GOOD), OF_MODEL)
    yield Subject(
        "remove_branches",
        _called(structprune.remove_branches, **GOOD, branches=["0"]),
        OF_MODEL | {"branches": (None, 3, "x", [], [3], ["nope"], [None], {}, Odd())},
    )
    yield Subject(
        "choose_branches",
        _called(structprune.choose_branches, model=RESIDUAL, example_inputs=X, data=SAMPLES, count=1),
        OF_MODEL
        | {
            "data": DATA,
            "count": (0, 99, *COUNTS),
            "target": PLAN_OPTIONS["target"],
            "score": (None, 3, "nope"),
            "kind": (None, 3, "nope"),
            "greedy": FLAGS,
            "loss": FUNCTIONS,
            "forward": FUNCTIONS,
        },
    )
    for name in ("compact", "compaction"):
        yield Subject(f"masks.{name}", _called(getattr(masks, name), **GOOD), OF_MODEL)
    for name in ("sparsity", "remove"):
        yield Subject(f"masks.{name}", _called(getattr(masks, name), model=MODEL), {"model": MODELS})
    yield Subject("masks.from_plan", _called(masks.from_plan, plan=PLAN, model=MODEL), {"plan": PLANS, "model": MODELS})
    yield Subject(
        "Latency",
        _called(structprune.Latency),
        {
            "backend": (None, 3, "nope", "", True),
            "threads": (0, -1, 1.5, "2", NAN, True),
            "runs": (0, 2, *COUNTS),
            "cache": (3, True, [], Odd()),
            "timer": (3, "x", Odd()),
        },
    )
    yield from _criteria()
    yield from _training()
    yield Subject(
        "register_op",
        _called(lambda names: structprune.register_op(*names)(lambda c, x: x)),
        {"names": ((), (3,), ("",), (None,), ("aten::add",), ("relu",))},
    )
    yield Subject(
        "register_module_rule",
        _called(lambda kind: structprune.register_module_rule(kind)(lambda c, x: x)),
        {"kind": (None, 3, "Linear", nn.Linear(4, 2), int, Odd())},
    )


def _criteria() -> Iterator[Subject]:
    reduces = (None, 3, "nope", "", True)
    orders = (None, 0, -1, "2", NAN, True, [2])
    yield Subject("LnNorm", _criterion(structprune.LnNorm), {"n": orders, "root": FLAGS})
    yield Subject("Random", _criterion(structprune.Random), {"seed": COUNTS})
    yield Subject("SliceNorm", _criterion(importance.SliceNorm), {"n": orders, "reduce": reduces})
    yield Subject("FPGM", _criterion(importance.FPGM), {"slices": reduces, "squared": FLAGS})
    yield Subject(
        "GeometricMedian",
        _criterion(importance.GeometricMedian),
        {"slices": reduces, "steps": (0, *COUNTS), "tolerance": (-1, NAN, "x", None, True)},
    )
    yield Subject("Cosine", _criterion(importance.Cosine), {"against": reduces, "slices": reduces})
    yield Subject(
        "NormScale", _criterion(importance.NormScale), {"kinds": (None, 3, "nope", ("nope",), ()), "reduce": reduces}
    )
    yield Subject(
        "PerLayer",
        _criterion(lambda **given: importance.PerLayer(**({"part": "l2"} | given))),
        {"part": (None, 3, "nope", Odd()), "how": reduces, "power": (None, "x", NAN, True)},
    )
    for name, numbers in (("Sum", "weights"), ("Product", "powers")):
        kind = getattr(importance, name)
        yield Subject(
            name,
            _criterion(lambda kind=kind, **given: kind(**({"parts": ("l2", "l1")} | given))),
            {
                "parts": (None, 3, "l2", (), (3,), ("nope",), Odd()),
                numbers: (3, "x", (1.0,), ("a", "b"), (NAN, 1.0)),
            },
        )
    for name in (
        "APoZ",
        "L2Activation",
        "MeanActivation",
        "FLAP",
        "HRank",
        "Wanda",
        "SNIP",
        "OBS",
        "KFAC",
        "OBD",
        "WeightTaylor",
    ):
        yield Subject(name, _criterion(getattr(importance, name), True), {"reduce": reduces})
    yield Subject("APoZ", _criterion(importance.APoZ, True), {"threshold": (None, "x", NAN, True)})
    yield Subject("Wanda", _criterion(importance.Wanda, True), {"n": orders})
    yield Subject("KFAC", _criterion(importance.KFAC, True), {"inverse": FLAGS, "damping": (None, -1, "x", NAN, True)})
    yield Subject("OBS", _criterion(importance.OBS, True), {"damping": (None, -1, "x", NAN, True)})
    yield Subject(
        "OBD",
        _criterion(importance.OBD, True),
        {"curvature": reduces, "variables": reduces, "probes": (0, *COUNTS), "seed": COUNTS},
    )
    yield Subject("Taylor", _criterion(importance.Taylor, True), {"average": reduces})
    yield Subject("WeightTaylor", _criterion(importance.WeightTaylor, True), {"form": reduces})
    yield Subject(
        "ThiNet",
        _criterion(importance.ThiNet, True),
        {"centred": FLAGS, "positions": (0, -1, 1.5, "x", NAN, True), "seed": COUNTS},
    )
    yield Subject("Folding", _criterion(importance.Folding), {"of": (None, 3, "nope", "", True), "centred": FLAGS})
    yield Subject(
        "Batches",
        _called(lambda **given: list(importance.Batches(**given).once("x")), data=[X]),
        {
            "data": (None, 3, "x", X, {}, [], [X[:0]], Odd()),
            "forward": FUNCTIONS,
            "loss": FUNCTIONS,
            "reduction": (None, 3, "nope"),
            "progress": (3, "x", [], Odd()),
        },
    )


def _training() -> Iterator[Subject]:
    rates = (None, -1, "x", NAN, INF, True)
    graphs = (None, 3, "x", nn.Linear(4, 2), Odd())
    yield Subject(
        "GroupLasso",
        _called(training.GroupLasso, graph=GRAPH),
        {"graph": graphs, "strength": rates, "groups": (3, "x", [3], [], Odd())},
    )
    yield Subject(
        "NormScalePenalty",
        _called(training.NormScalePenalty, graph=GRAPH),
        {
            "graph": graphs,
            "strength": rates,
            "kinds": (None, 3, "nope", ("nope",), ()),
            "groups": (3, "x", [3], [], Odd()),
        },
    )
    yield Subject(
        "GrowingRegularisation",
        _called(training.GrowingRegularisation, plan=PLAN),
        {"plan": PLANS, "increment": rates, "ceiling": rates},
    )
    yield Subject(
        "FeatureDistillation",
        _called(training.FeatureDistillation, student=MODEL, teacher=MODEL, layers=["0"]),
        {"student": MODELS, "teacher": MODELS, "layers": (None, 3, "nope", [], [3], ["nope"], Odd())},
    )
    yield Subject(
        "WeightAverage",
        _called(training.WeightAverage, model=MODEL, decay=0.9),
        {"model": MODELS, "decay": (None, -0.1, 1.0, "x", NAN, True)},
    )
    yield Subject(
        "distillation_loss",
        _called(training.distillation_loss, student_logits=X, teacher_logits=X),
        {
            "student_logits": (None, 3, "x", torch.zeros(2, 5)),
            "teacher_logits": (None, 3, "x", torch.zeros(2, 5)),
            "temperature": (0, -1, NAN, "x", None, True),
            "dim": (9, 1.5, "x", None),
            "mask": (3, "x", torch.zeros(7)),
        },
    )
    yield Subject(
        "split", _called(training.split, count=10), {"count": (0, *COUNTS), "share": (0, *SHARES), "seed": COUNTS}
    )
    yield Subject(
        "SoftPruner",
        _called(_softened, **GOOD),
        OF_MODEL | {name: PLAN_OPTIONS[name] for name in ("ratio", "scope", "ignore", "round_to")},
    )


@dataclass(frozen=True)
class Attempt:
    """One call with one bad value, and what came of it."""

    function: str
    argument: str
    given: str
    outcome: str
    error: str
    touched: bool


def _shown(value: Any) -> str:
    return f"{value!r}".replace("\n", " ")[:60]


def _state(model: nn.Module) -> dict[str, Any]:
    flags = {f"{name} training": module.training for name, module in model.named_modules()}
    hooks = {
        f"{name} hooks": len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
    }
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needed = {f"{name} grad": (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    return flags | hooks | tensors | needed | {"random": torch.get_rng_state()}


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value: a message that shows one of them tells which value is meant."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value:
            yield from _texts(item)


def _outcome(error: Exception, argument: str, value: Any) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return "refused"  # it names the path
    ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)
    if not ours or not isinstance(error, (structprune.errors.StructpruneError, TypeError, ValueError)):
        return "raw"
    words = re.sub(r"[_\W]+", " ", str(error).lower())
    stem = re.sub(r"[_\W]+", " ", argument.lower())
    told = [text for text in _texts(value) if len(text) > 1]
    told += [f"The {type(value).__name__} given", f"{type(value).__name__} cannot run"]
    of_data = argument in ("train", "validate", "data") and "batch" in words
    named = of_data or any(form in words for form in (stem, stem.removesuffix("s"), stem.removesuffix("es")))
    named = named or any(form in str(error) for form in told)
    return "refused" if named else "unclear"


def attempts(only: str = "") -> Iterator[Attempt]:
    """Make all the calls, or those of the function of this name."""
    for subject in subjects():
        for argument, values in subject.bad.items():
            for value in values if only in ("", subject.name) else ():
                model = build()
                with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    before = _state(model)
                    outcome, message = "accepted", ""
                    try:
                        subject.call(model, Path(folder), **{argument: value})
                    except Exception as error:  # whatever comes is the outcome
                        outcome, message = _outcome(error, argument, value), f"{type(error).__name__}: {error}"
                    after = _state(model)
                touched = outcome != "accepted" and not all(_same(before[name], after[name]) for name in before)
                yield Attempt(subject.name, argument, _shown(value), outcome, message, touched)


def count(found: list[Attempt]) -> dict[str, int]:
    """How many calls there were, and how many of each outcome."""
    outcomes = Counter(attempt.outcome for attempt in found)
    return {
        "calls": len(found),
        "raw": outcomes["raw"],
        "unclear": outcomes["unclear"],
        "accepted": outcomes["accepted"],
        "touched": sum(attempt.touched for attempt in found),
    }
