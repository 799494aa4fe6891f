"""Several batch sizes, memory, and how much of the arithmetic that went is time that went."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.timed_nets import ALONE, Recorder, Sleeper
from torch import nn

from structprune.benchmarking import Benchmark, Timing, backends, benchmark
from structprune.export.onnx import export_onnx
from structprune.export.runtimes import session

# Runs beside those that are timed are left out where calls are counted.


def test_several_batch_sizes_stand_apart():
    model = Recorder()
    result = benchmark({"a": model, "b": model}, torch.zeros(2, 3), batch_sizes=(1, 4), runs=2, warmup=0, **ALONE)
    assert [entry["shape"][0] for entry in model.log] == [1] * 4 + [4] * 4
    assert result.batch_sizes == (1, 4)
    assert result.timing("b", batch_size=4).batch_size == 4
    with pytest.raises(KeyError, match="at batch size 3"):
        result.timing("b", batch_size=3)
    assert "batch" in str(result).splitlines()[2]


@pytest.mark.parametrize("sizes", [(), (1, 1)])
def test_bad_batch_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="must be different sizes"):
        benchmark({"a": nn.ReLU()}, torch.zeros(2, 2), batch_sizes=sizes)
    with pytest.raises(ValueError, match="must be different sizes"):
        benchmark({"a": nn.ReLU()}, torch.zeros(2, 2), batch_sizes=(1,), batch_size=2)


def test_process_time_leaves_waiting_out():
    result = benchmark({"a": Sleeper(0.03)}, torch.zeros(1, 1), runs=3, threads=1, clock="process", **ALONE)
    assert result.timing("a").median < 0.01
    assert result.environment["clock"] == "process"
    with pytest.raises(ValueError, match="clock is 'process' with 2 threads"):
        benchmark({"a": nn.ReLU()}, torch.zeros(1, 1), threads=2, clock="process")


def test_memory_is_that_of_weights_inputs_and_what_is_alive_at_once():
    """A chain keeps two results at a time: 4 bytes * 8 samples * (1024 + 256) numbers, beside what is there."""
    model = nn.Sequential(nn.Linear(16, 1024, bias=False), nn.Linear(1024, 256, bias=False))
    held = 4 * (16 * 1024 + 1024 * 256 + 8 * 16)
    result = benchmark({"a": model}, torch.zeros(8, 16), runs=2, explanations=False)
    assert result.timing("a").memory == held + 4 * 8 * (1024 + 256)


def test_memory_of_onnxruntime_holds_the_weights():
    wide, narrow = nn.Linear(2048, 4096), nn.Linear(2048, 64)
    result = benchmark({"a": wide, "b": narrow}, torch.zeros(1, 2048), backends=("onnxruntime",), runs=2)
    saved = 4 * 2048 * (4096 - 64)
    assert result.timing("a").memory - result.timing("b").memory > 0.8 * saved


def test_efficiency_is_the_gain_over_the_ratio_of_macs():
    result = Benchmark(
        (Timing("dense", "eager", (0.004, 0.004)), Timing("slim", "eager", (0.002, 0.002))),
        "cpu", 1, 8, macs={"dense": 400, "slim": 100},
    )  # fmt: skip
    assert (result.macs_ratio("slim"), result.efficiency("slim")) == (4.0, 0.5)
    row = next(line for line in str(result).splitlines() if "slim" in line)
    assert "4.00x" in row
    assert "0.50" in row
    assert "0.50" in result._repr_html_()
    assert Benchmark.from_json(result.to_json()).efficiency("slim") == 0.5


def test_json_comes_back_whole():
    models = {"dense": nn.Linear(8, 64), "slim": nn.Linear(8, 8)}
    result = benchmark(models, torch.randn(2, 8), runs=3, batch_sizes=(1, 2))
    assert Benchmark.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match="not the JSON of a benchmark"):
        Benchmark.from_json('{"timings": 3}')


def test_a_model_that_cannot_be_traced_is_timed_without_macs():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.from_numpy(x.numpy() * 2)

    result = benchmark({"a": Odd(), "b": Odd()}, torch.ones(2, 2), runs=2)
    assert result.efficiency("b") is None
    assert result.explanations == ()


def test_channels_last_runs_on_a_copy_laid_out_so():
    seen = []

    class Layout(nn.Conv2d):
        def forward(self, x):
            last = torch.channels_last
            seen.append((x.is_contiguous(memory_format=last), self.weight.is_contiguous(memory_format=last)))
            return super().forward(x)

    model = Layout(4, 8, 3)
    benchmark({"a": model}, torch.zeros(1, 4, 6, 6), backends=("channels_last",), runs=2, warmup=0, **ALONE)
    assert seen == [(True, True)] * 2
    assert model.weight.is_contiguous()


def test_tensorrt_without_a_gpu_or_a_package_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="TensorRT runs on a CUDA device, and the inputs are on cpu"):
        benchmark({"a": nn.Linear(2, 2)}, torch.zeros(1, 2), backends=("tensorrt",))
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="TensorRT is not here"):
        backends.tensorrt(nn.Linear(2, 2), torch.zeros(1, 2), torch.device("cuda"), 1, Path())


def test_inputs_and_outputs_are_bound_to_the_device(tmp_path):
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    export_onnx(model, tmp_path / "m.onnx", x, dynamic_batch=False)
    loaded = session(tmp_path / "m.onnx")
    binding = backends.bound(loaded, {loaded.get_inputs()[0].name: x.numpy()}, torch.device("cpu"))
    loaded.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], model(x).detach().numpy(), atol=1e-5)


def test_a_figure_of_it(tmp_path):
    models = {"dense": nn.Linear(8, 64), "slim": nn.Linear(8, 8)}
    result = benchmark(models, torch.randn(2, 8), runs=3, batch_sizes=(1, 2))
    text = result.plot(tmp_path / "b.svg").read_text()
    assert text.count("<path") > 2 * 2 * 3
