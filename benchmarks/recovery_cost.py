"""What recovery without training costs, in passes over the calibration data.

For each network, in one process on one thread: processor seconds of one forward and backward pass over the calibration
data (the mean square of the outputs is the loss), then of `structprune.Reconstruction` and `structprune.recover` on the
same data, split into their parts. Run ``python benchmarks/recovery_cost.py``; rows that are known are kept, unless
``--again``. ResNets need the data (see `harness.cifar`) and so does the small Llama; they are left out without it.
Results go to ``results/recovery_cost.*``, or into the folder of ``--to``.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import RESULTS, cifar, costly, stories
from harness.environment import as_line, environment
from torch import Tensor, nn

import structprune
from structprune.forwards.batches import compared
from structprune.recovery import candidates, joint_solver, layer_solver, recover, selection
from structprune.recovery.selection import Distance, divergence, squared_error
from structprune.tracing.trace import as_call

Data = list[Any]


@dataclass(frozen=True)
class Case:
    """A network, its calibration data, and how it is pruned and recovered.

    Where `flipped`, layers are solved on the data and on their mirror images, and the pass is over both.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Data]]
    target: dict[str, float]
    axes: tuple[str, ...] | None = None
    probes: int | None = None
    rows: int = 65536
    rounds: int = 3
    distance: Distance = divergence
    flipped: bool = False
    score: Callable[[nn.Module], float] | None = None  # where the network is trained; the data have to be at hand

    @property
    def needs_data(self) -> bool:
        """Whether it is left out without the data."""
        return self.score is not None


def _resnet(depth: int) -> tuple[nn.Module, Data]:
    images = cifar.train_images(1024, 0)[0].contiguous(memory_format=torch.channels_last)
    return cifar.load_resnet(depth), list(images.split(128))


def _stories() -> tuple[nn.Module, Data]:
    found = stories.windows(0)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: len(found) // 8 * 8]
    return stories.load_stories(), [stories.as_batch(part) for part in found[order].split(8)]


def _perplexity(model: nn.Module) -> float:
    return stories.perplexity(model, stories.windows(1))


def _gpt(width: int, layers: int, heads: int, vocabulary: int, windows: int) -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    model = costly.gpt(width, layers, heads, vocabulary)
    return model, [{"input_ids": part} for part in torch.randint(vocabulary, (windows, 256)).split(8)]


def _wide_kernels() -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    # A walk, whose neighbouring steps are alike as those of a signal are.
    data = torch.randn(256, 1, 128, 1).cumsum(2) / 8
    return costly.spread_norms(costly.WideKernels(), data[:64]), list(data.split(32))


def _conformer() -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    data = torch.randn(32, 256, 80)
    return costly.spread_norms(costly.Conformer(256, 6, 4), data[:4]), list(data.split(4))


_IMAGES: dict[str, Any] = {"rows": 32768, "rounds": 4, "flipped": True, "score": cifar.accuracy, "axes": ("channels",)}
_TOKENS: dict[str, Any] = {"rounds": 4, "rows": 65536, "score": _perplexity}
# ResNets as in `recovery.py`, but for 128 images to measure on; the small Llama with smaller batches, half the rounds.
# The others have the defaults of the library.
CASES = (
    Case("ResNet-56, 2x fewer MACs", partial(_resnet, 56), {"macs": 1 / 2}, probes=128, **_IMAGES),
    Case(
        "ResNet-20, 2x fewer MACs", partial(_resnet, 20), {"macs": 1 / 2}, probes=128, distance=squared_error, **_IMAGES
    ),
    Case("stories260k, 20 % of all parameters", _stories, {"params": 0.8}, ("mlp", "heads"), **_TOKENS),
    Case("GPT of 1.4 M, 2x fewer MACs", partial(_gpt, 160, 4, 4, 1000, 128), {"macs": 1 / 2}, ("mlp", "heads")),
    Case("GPT of 12.7 M, 2x fewer MACs", partial(_gpt, 384, 6, 6, 5000, 64), {"macs": 1 / 2}, ("mlp", "heads")),
    Case("kernels of 64x1 over 128 channels, 2x fewer MACs", _wide_kernels, {"macs": 1 / 2}),
    Case("conformer, 2x fewer MACs", _conformer, {"macs": 1 / 2}, ("channels", "mlp", "heads")),
)

# Where the seconds are spent: what is called, and whether parts inside of it are counted apart.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "order of channels": [(selection.Reconstruction, "_removals")],
    "prices of channels": [(selection.Reconstruction, "_distances")],
    "norms recalibrated": [(recover, "set_statistics")],
    "layers alone": [(layer_solver.LayerSolver, "solve")],
    "layers with producers": [(joint_solver.JointSolver, "solve")],
    "held-out comparison": [(candidates.Candidates, "__init__"), (candidates.Candidates, "offer")],
}


@contextmanager
def timed_parts() -> Generator[dict[str, float]]:
    """Processor seconds of each part while the block runs; a part inside of another does not count for that."""
    spent = dict.fromkeys(PARTS, 0.0)
    open_parts: list[str] = []
    since = time.process_time()

    def lap() -> None:
        nonlocal since
        now = time.process_time()
        if open_parts:
            spent[open_parts[-1]] += now - since
        since = now

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            lap()
            open_parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                lap()
                open_parts.pop()

        return run

    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield spent


def one_pass(model: nn.Module, data: Data) -> float:
    """Processor seconds of a forward and a backward pass over the data: the least of two."""
    found: list[float] = []
    for _ in range(2):
        begin = time.process_time()
        for batch in data:
            args, kwargs = as_call(batch)
            result = compared(model(*args, **kwargs))
            assert result is not None
            result.square().mean().backward()
        found.append(time.process_time() - begin)
        model.zero_grad(set_to_none=True)
    return min(found)


def run(case: Case) -> dict[str, Any]:
    """One row."""
    model, data = case.make()
    shown = [*data, *(part.flip(3) for part in data)] if case.flipped else data
    unit = one_pass(model, shown)
    gc.collect()
    (kind,) = case.target
    x = data[0]
    with timed_parts() as parts:
        begin = time.process_time()
        criterion = structprune.Reconstruction(
            per=kind, probes=case.probes, rows=case.rows, axes=case.axes, distance=case.distance
        )
        chosen = criterion.fit(structprune.DependencyGraph(model, x), data)
        plan = structprune.plan(
            model, x, importance=chosen, scope=chosen, target=case.target, axes=case.axes, round_to=1
        )
        slim = plan.apply(model)
        planned = time.process_time()
        best = structprune.recover(slim, model, shown, rows=case.rows, rounds=case.rounds)
        end = time.process_time()
    report = structprune.recovery_report(best)
    with torch.no_grad():
        error = distance(best, model, data)
    return {
        "case": case.name,
        "params": sum(p.numel() for p in model.parameters()),
        "pass": unit,
        "choice": planned - begin,
        "recover": end - planned,
        "parts": parts,
        "ratio": (end - begin) / unit,
        "kept": report.kept,
        "candidates": {row.name: row.error for row in report.candidates},
        "error": error,
        **({} if case.score is None else {"score": case.score(best)}),
    }


def distance(slim: nn.Module, model: nn.Module, data: Data) -> float:
    """The relative error of the outputs on the data."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in data:
        args, kwargs = as_call(batch)
        ours, goal = (as_numbers(one(*args, **kwargs)) for one in (slim, model))
        sums += torch.stack([(ours - goal).square().sum(), goal.square().sum()])
    return float(sums[0] / sums[1]) ** 0.5


def as_numbers(result: Any) -> Tensor:
    """What is compared of a result, in float64."""
    found = compared(result)
    assert found is not None
    return found.double()


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; parts are in passes."""
    names = [*PARTS, "all else"]
    lines = [
        "# What recovery without training costs",
        "",
        "In passes: one forward and one backward over the calibration data that `recover` is given. `Reconstruction`, "
        "the plan and `recover` together, processor seconds on one thread, and the parts they consist of. Forwards "
        "through the original and through the pruned model, tracing and surgery are in the last column. Made by "
        "`python benchmarks/recovery_cost.py`.",
        "",
        f"| network | parameters | seconds of a pass | passes | {' | '.join(names)} | accuracy, perplexity |",
        f"|---|{'--:|' * (4 + len(names))}",
    ]
    for row in rows:
        parts = {**row["parts"], "all else": row["choice"] + row["recover"] - sum(row["parts"].values())}
        cells = " | ".join(f"{parts[name] / row['pass']:.2f}" for name in names)
        score = f"{row['score']:.2f}" if "score" in row else "-"
        first = f"| {row['case']} | {row['params'] / 1e6:.2f} M | {row['pass']:.1f} | {row['ratio']:.1f} "
        lines.append(f"{first}| {cells} | {score} |")
    return "\n".join([*lines, "", as_line(environment()), ""])


def main(name: str, again: bool, to: Path) -> None:
    """Run the cases whose name holds `name`."""
    torch.set_num_threads(1)
    file = to / "recovery_cost.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    for case in CASES:
        known = any(row["case"] == case.name for row in rows)
        if name not in case.name or (known and not again):
            continue
        if case.needs_data and cifar.data_folder() is None:
            print(f"{case.name}: left out, the data are not here", flush=True)
            continue
        row = run(case)
        print(json.dumps(row), flush=True)
        rows = [row if other["case"] == case.name else other for other in rows] + ([] if known else [row])
        order = [each.name for each in CASES]
        rows.sort(key=lambda each: order.index(each["case"]))
        file.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
        (to / "recovery_cost.md").write_text(page(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="", help="run only the cases whose name holds this")
    parser.add_argument("--again", action="store_true", help="measure what is known once more")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args()
    main(given.case, given.again, given.to)
