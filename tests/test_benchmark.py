"""The benchmark: models run in turns, under the conditions asked for, and nothing of the caller's is changed."""

from __future__ import annotations

import gc
import io
import json
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from support.timed_nets import ALONE, Recorder, Sleeper
from torch import nn

import structprune
from structprune.benchmarking import Benchmark, Timing, benchmark, timing
from structprune.benchmarking.results import bootstrap_speedup
from structprune.errors import MissingExtraError

# Runs beside those that are timed are left out where calls are counted.


def test_models_run_in_turns_after_the_warmup():
    log = []
    models = {name: Recorder(name, log) for name in "abc"}
    result = benchmark(models, torch.zeros(2, 3), runs=3, warmup=2, **ALONE)
    assert [entry["name"] for entry in log] == list("abc") * 5
    assert [entry["collector"] for entry in log] == [True] * 6 + [False] * 9
    assert gc.isenabled()
    assert [len(timing.seconds) for timing in result.timings] == [3, 3, 3]


def test_conditions_inside_and_state_afterwards():
    model = Recorder()
    model.train()
    model.drop.eval()
    before, random = torch.get_num_threads(), torch.get_rng_state()
    result = benchmark({"a": model}, torch.zeros(2, 3), threads=before + 1, runs=2, warmup=0, **ALONE)
    for entry in model.log:
        assert not entry["training"]
        assert not entry["gradients"]
        assert entry["threads"] == before + 1
    assert result.threads == before + 1
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.training, model.drop.training) == (True, False)
    assert torch.is_grad_enabled()


def test_state_is_restored_when_a_model_fails():
    model = nn.Linear(3, 2).train()
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"example_inputs.*shapes cannot be multiplied"):
        benchmark({"a": model}, torch.zeros(2, 5), threads=before + 1)
    assert model.training
    assert torch.get_num_threads() == before
    assert gc.isenabled()


@pytest.mark.parametrize("size", [1, 5])
def test_batch_size_repeats_or_cuts_the_samples(size):
    model = Recorder()
    inputs = {"x": torch.zeros(3, 4), "mask": torch.zeros(3), "table": torch.zeros(7)}
    result = benchmark({"a": model}, inputs, batch_size=size, runs=2, warmup=0, **ALONE)
    assert model.log[0]["shape"] == (size, 4)
    assert model.log[0]["more"] == {"mask": (size,), "table": (7,)}
    assert result.batch_size == size


class Clock:
    """In place of the module `time`: goes on only when a `Taking` runs, so that a busy machine changes nothing."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Taking(nn.Module):
    """Takes a little more time with every run."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.runs = clock, seconds, 0

    def forward(self, x):
        self.clock.now += self.seconds * (1 + 0.01 * self.runs)
        self.runs += 1
        return x


def test_durations_and_speedup_are_those_of_the_models(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    models = {"slow": Taking(clock, 0.02), "fast": Taking(clock, 0.01)}
    result = benchmark(models, torch.zeros(4, 1), runs=11, warmup=1, **ALONE)
    # The run of the warm-up is not counted, so that the sixth of the eleven is the seventh.
    assert result.timing("slow").median == pytest.approx(0.02 * 1.06)
    assert result.timing("fast").quartiles == pytest.approx((0.01 * 1.035, 0.01 * 1.085))
    speedup = result.speedup("fast")
    assert speedup.low <= speedup.ratio <= speedup.high
    assert (speedup.low, speedup.ratio, speedup.high) == pytest.approx((2, 2, 2), rel=0.1)
    assert result.speedup("slow").ratio == 1


def test_the_wall_clock_counts_waiting():
    result = benchmark({"a": Sleeper(0.02)}, torch.zeros(4, 1), runs=2, warmup=0, **ALONE)
    assert min(result.timing("a").seconds) >= 0.02


def test_onnxruntime_backend():
    models = {"wide": nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)), "narrow": nn.Linear(8, 2)}
    result = benchmark(models, torch.randn(4, 8), backends=("eager", "onnxruntime"), runs=3, warmup=1)
    found = [(timing.model, timing.backend) for timing in result.timings]
    assert found == [(name, backend) for backend in ("eager", "onnxruntime") for name in ("wide", "narrow")]
    assert all(second > 0 for timing in result.timings for second in timing.seconds)


def test_compile_backend(monkeypatch):
    """With dynamo alone: code generation is torch's own and takes a C++ compiler a quarter of a minute."""
    compiled, traced = [], []
    compile_model = torch.compile

    def eager(graph, _inputs):
        traced.append(gc.isenabled())
        return graph.forward

    def compile_eagerly(model, **options):
        compiled.append(options)
        return compile_model(model, backend=eager, **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    models = {"a": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "b": nn.Sequential(nn.Linear(4, 2), nn.ReLU())}
    result = benchmark(models, torch.randn(4, 4), backends=("compile",), runs=3, warmup=1)
    assert compiled == [{"dynamic": False}] * 2
    assert all(second > 0 for timing in result.timings for second in timing.seconds)
    # Tracing takes longer than all runs together: it falls into the warm-up, before the collector is stopped.
    assert traced == [True] * 2


def test_missing_onnxruntime_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'structprune\[onnx\]'"):
        benchmark({"a": nn.Linear(2, 2)}, torch.zeros(1, 2), backends=("onnxruntime",))


def test_onnxruntime_without_the_device_is_refused(monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["OtherExecutionProvider"])
    with pytest.raises(ValueError, match="cannot run on cpu: it offers OtherExecutionProvider"):
        benchmark({"a": nn.Linear(2, 2)}, torch.zeros(1, 2), backends=("onnxruntime",))


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ({}, {}, "no model to time"),
        (
            {"a": nn.ReLU()},
            {"backends": ("eager", "tpu")},
            r"out of eager, channels_last, compile, aotinductor, onnxruntime, openvino, .*; got \('eager', 'tpu'",
        ),
        ({"a": nn.ReLU()}, {"backends": "eager"}, "must be a sequence of different names"),
        ({"a": nn.ReLU()}, {"backends": ()}, "must be a sequence of different names"),
        ({"a": nn.ReLU()}, {"runs": 1}, "runs must be a whole number of at least 2; got 1"),
        ({"a": nn.ReLU()}, {"warmup": -1}, "warmup must be a whole number of at least 0"),
        ({"a": nn.ReLU()}, {"threads": 0}, "threads must be a whole number of at least 1"),
        ({"a": nn.ReLU()}, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_refused(models, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark(models, torch.zeros(2, 2), **options)


def test_a_model_that_is_elsewhere_is_copied():
    model = nn.Linear(2, 2)
    assert timing.placed(model, torch.device("cpu")) is model
    copied = timing.placed(model, torch.device("meta"))
    assert copied is not model
    assert copied.weight.is_meta
    assert not model.weight.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_times_the_work_and_not_its_launch():
    small, large = nn.Linear(64, 64), nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(16)])
    result = benchmark({"large": large}, torch.randn(4096, 4096), device="cuda", runs=5)
    assert result.timing("large").median > 1e-3
    assert benchmark({"small": small}, torch.randn(64, 64), device="cuda", runs=5).device == "cuda"
    assert large[0].weight.device.type == "cpu"


def example() -> Benchmark:
    return Benchmark(
        timings=(
            Timing(model="dense", backend="eager", seconds=(0.004, 0.004, 0.005)),
            Timing(model="slim", backend="eager", seconds=(0.002, 0.002, 0.0025)),
        ),
        device="cpu",
        threads=1,
        batch_size=8,
    )


def test_prints_as_a_table():
    text = str(example())
    assert "cpu, 1 thread, batch of 8, 3 runs" in text
    dense, slim = (next(line for line in text.splitlines() if name in line) for name in ("dense", "slim"))
    assert "4.000" in dense
    assert "2000" in dense
    assert "x" not in dense
    assert "2.00x" in slim
    assert "2.00 to 2.00" in slim


def test_json_holds_durations_and_statistics():
    data = json.loads(example().to_json())
    assert (data["device"], data["threads"], data["batch_size"], data["confidence"]) == ("cpu", 1, 8, 0.95)
    slim = data["timings"][1]
    assert slim["seconds"] == [0.002, 0.002, 0.0025]
    assert slim["median"] == 0.002
    assert slim["quartiles"] == [0.002, pytest.approx(0.00225)]
    assert slim["speedup"] == {"ratio": 2.0, "low": 2.0, "high": 2.0}


def test_a_timing_that_does_not_exist_is_named():
    with pytest.raises(KeyError, match="no timing of 'slim' on 'compile'; timed were 'dense' on 'eager', 'slim'"):
        example().speedup("slim", "compile")


def test_interval_covers_the_true_ratio():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        dense, slim = 1.25 * random.lognormal(sigma=0.2, size=30), random.lognormal(sigma=0.2, size=30)
        speedup = bootstrap_speedup(tuple(dense), tuple(slim), seed=trial)
        assert speedup.low <= speedup.ratio <= speedup.high
        covered += speedup.low <= 1.25 <= speedup.high
    # 95% is aimed at; the percentile bootstrap of a median is known to run a little conservative.
    assert 180 <= covered <= 200


def test_a_slow_spell_that_hits_both_widens_nothing():
    random = np.random.default_rng(0)
    dense = random.lognormal(sigma=1.0, size=31)
    speedup = bootstrap_speedup(tuple(dense), tuple(dense / 2))
    assert (speedup.low, speedup.high) == (pytest.approx(2), pytest.approx(2))
    assert bootstrap_speedup(tuple(dense), tuple(random.permutation(dense) / 2)).low < 1.9


@pytest.mark.parametrize("width", [60, 80, 99])
def test_narrow_tables_keep_whole_names(width):
    name = "encoder_of_a_long_name_" * 4
    model = nn.Sequential()
    model.add_module(name, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    plan = structprune.plan(model, torch.ones(1, 4), ratio=0.5, round_to=1)
    timings = tuple(Timing(each, "eager", (1e-3, 2e-3), 1, 10**7) for each in (f"dense_{name}", f"slim_{name}"))
    for shown in (Benchmark(timings, "cpu", 1, 1), plan.table()):
        console = Console(width=width, file=io.StringIO())
        console.print(shown)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        first = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
        assert name in first


def test_bars_on_a_terminal_only(capsys, monkeypatch):
    models = {"a": nn.Linear(2, 2)}
    benchmark(models, torch.ones(1, 2), runs=2, memory=False)
    assert capsys.readouterr().err == ""
    benchmark(models, torch.ones(1, 2), runs=2, memory=False, progress=True)
    assert "timing on eager" in capsys.readouterr().err
