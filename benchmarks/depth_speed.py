"""Blocks and channels against time and size: a ResNet-56 at a measured speed, a small Llama at a number of parameters.

Parts of ``benchmarks/depth.py``, which runs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import cifar
from harness import stories as small_llama
from harness.vit import load_vit
from support.torchvision_shim import make_torchvision_importable
from torch import nn

import structprune
from structprune.errors import PlanError

SEED = 0
# Backend, batch and how many times as fast.
WANTED = [(*place, speed) for place in (("onnxruntime", 1), ("onnxruntime", 8)) for speed in (1.5, 2.0)]
WANTED += [("eager", 1, 1.5), ("eager", 1, 2.0), ("onnxruntime", 1, 3.0), ("onnxruntime", 8, 3.0), ("eager", 1, 3.0)]
# What may go: kinds of channels, blocks, or both.
METHODS: dict[str, tuple[str, ...]] = {"channels": ("widths",), "blocks": ("blocks",), "both": ("blocks", "widths")}
PLANNED_ON, RECOVERED_ON, TESTED_ON = 128, 256, 2000
ROWS, ROUNDS = 8192, 0  # of `recover`: a short run


def resnet56(facts: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """A trained ResNet-56 at each speed, by each method: accuracy as it is, with new statistics, and recovered."""
    model = cifar.load_resnet(56)
    images, _ = cifar.train_images(RECOVERED_ON, seed=SEED)
    pictures, labels = (part[:TESTED_ON] for part in cifar.test_set())
    data = list(images.split(128))
    if "dense" not in facts:
        facts["dense"] = cifar.accuracy(model, pictures, labels)
    rows: list[dict[str, Any]] = facts.setdefault("rows", [])
    done = {(row["backend"], row["batch"], row["asked"], row["method"]) for row in rows}
    for backend, batch, speed, method in ((*wanted, method) for wanted in WANTED for method in METHODS):
        if (backend, batch, speed, method) in done:
            continue
        row: dict[str, Any] = {"backend": backend, "batch": batch, "asked": speed, "method": method}
        start = time.perf_counter()
        try:
            plan = structprune.plan(
                model,
                images[:batch],
                target={"latency": 1 / speed},
                axes=METHODS[method],
                data=list(images[:PLANNED_ON].split(64)),
                latency=structprune.Latency(backend=backend, threads=1),
                **({} if method == "channels" else {"branch_score": "influence"}),
            )
        except PlanError as error:
            row["refused"] = str(error)[:200]
        else:
            row |= {"planned_s": round(time.perf_counter() - start, 1), **_plan_facts(plan)}
            slim = plan.apply(model)
            row["as it is"] = cifar.accuracy(slim, pictures, labels)
            row["recalibrated"] = cifar.accuracy(structprune.recalibrate(slim, data), pictures, labels)
            recovered = structprune.recover(slim, model, data, rows=ROWS, rounds=ROUNDS)
            row["recovered"] = cifar.accuracy(recovered, pictures, labels)
        rows.append(row)
        print(row, flush=True)
        write(facts)


MACS = (1 / 1.5, 1 / 2, 1 / 3)
NETWORKS: dict[str, Callable[[], nn.Module]] = {"ResNet-56": lambda: cifar.load_resnet(56), "ViT": load_vit}


def at_equal_macs(name: str, facts: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """A network trained on CIFAR-10 at equal MACs, by each method: accuracy, and times beside the dense network."""
    model = NETWORKS[name]()
    images, _ = cifar.train_images(RECOVERED_ON, seed=SEED)
    pictures, labels = (part[:TESTED_ON] for part in cifar.test_set())
    data = list(images.split(128))
    facts["dense"] = cifar.accuracy(model, pictures, labels)
    rows: list[dict[str, Any]] = facts.setdefault("rows", [])
    for share, method in ((s, m) for s in MACS for m in METHODS):
        if any((row["share"], row["method"]) == (share, method) for row in rows):
            continue
        row: dict[str, Any] = {"share": share, "method": method}
        rows.append(row)
        start = time.perf_counter()
        try:
            plan = structprune.plan(
                model,
                images[:1],
                target={"macs": share},
                axes=METHODS[method],
                data=list(images[:PLANNED_ON].split(64)),
                **({} if method == "channels" else {"branch_score": "influence"}),
            )
        except PlanError as error:
            row["refused"] = str(error)[:200]
            write(facts)
            continue
        row["planned_s"] = round(time.perf_counter() - start, 1)
        slim = plan.apply(model)
        row |= {"macs": plan.after.macs, "params": plan.after.params, **_depth_facts(plan)}
        row["recalibrated"] = _recalibrated(slim, data, pictures, labels)
        recovered = structprune.recover(slim, model, data, rows=ROWS, rounds=ROUNDS)
        row["recovered"] = cifar.accuracy(recovered, pictures, labels)
        networks, backends, sizes = {"dense": model, method: slim}, ("onnxruntime", "eager"), (1, 8)
        timed = structprune.benchmark(
            networks, images[:1], backends=backends, batch_sizes=sizes, threads=1, memory=False, explanations=False
        )
        row["speed"] = {f"{b}, {n}": round(timed.speedup(method, b, n).ratio, 3) for b in backends for n in sizes}
        print(row, flush=True)
        write(facts)


def _recalibrated(slim: nn.Module, data: list[torch.Tensor], pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy with new statistics; as it is where there are no batch norms."""
    norms = any(isinstance(module, nn.BatchNorm2d) for module in slim.modules())
    return cifar.accuracy(structprune.recalibrate(slim, data) if norms else slim, pictures, labels)


def _plan_facts(plan: structprune.Plan) -> dict[str, Any]:
    measured = plan.settings.measured
    facts: dict[str, Any] = {
        "speed": round(measured["before_ms"] / measured["measured_ms"], 3),
        "macs": plan.after.macs,
        "params": plan.after.params,
    }
    return facts | _depth_facts(plan)


def _depth_facts(plan: structprune.Plan) -> dict[str, Any]:
    """How many blocks went, and what was lost with other numbers of them, before and after recovery."""
    if not isinstance(plan, structprune.DepthPlan):
        return {"blocks removed": 0}
    return {
        "blocks removed": len(plan.removal.branches),
        "tried": {str(each.branches): each.lost for each in plan.tried},
        "tried, recovered": {str(each.branches): each.recovered for each in plan.tried if each.recovered is not None},
    }


# -- a small language model -------------------------------------------------------------------------------------------

SHARES = (0.8, 0.65, 0.5)
CALIBRATED_ON = 16  # windows
NEW_TOKENS, REPEATS = 64, 5
LANGUAGE_METHODS: dict[str, tuple[str, ...]] = {
    "channels": ("mlp", "heads"),
    "blocks": ("blocks",),
    "branches": ("branches",),
    "both": ("blocks", "branches", "mlp", "heads"),
}


def stories(facts: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """A trained Llama of 260 K parameters at each number of parameters, by each method."""
    model = small_llama.load_stories()
    calibration = [small_llama.as_batch(ids) for ids in small_llama.windows(0)[:CALIBRATED_ON].split(8)]
    example = small_llama.as_batch(calibration[0]["input_ids"][:1])
    held_out = small_llama.windows(1)
    facts["dense"] = {"perplexity": small_llama.perplexity(model, held_out), "params": _params(model), **_speed(model)}
    rows: list[dict[str, Any]] = []
    facts["rows"] = rows
    for share, method in ((s, m) for s in SHARES for m in LANGUAGE_METHODS):
        row: dict[str, Any] = {"share": share, "method": method}
        try:
            plan = structprune.plan(
                model,
                example,
                target={"params": share},
                axes=LANGUAGE_METHODS[method],
                scope="global",
                uniform=False,
                round_to=1,
                data=calibration,
                **({} if method == "channels" else {"branch_score": "kl"}),
            )
        except PlanError as error:
            row["refused"] = str(error)[:200]
        else:
            slim = plan.apply(model)
            recovered = structprune.recover(slim, model, calibration, rows=ROWS, rounds=ROUNDS)
            row |= {"params": plan.after.params, "perplexity": small_llama.perplexity(slim, held_out), **_speed(slim)}
            row["recovered"] = small_llama.perplexity(recovered, held_out)
            row["removed"] = list(plan.removal.branches) if isinstance(plan, structprune.DepthPlan) else []
        rows.append(row)
        print(row, flush=True)
        write(facts)


LARGE_SHARES = (0.75, 0.5)
LARGE_TOKENS, LARGE_REPEATS = 16, 3


def large_llama(facts: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """A Llama of half a billion random weights at equal parameters: tokens a second, narrower against shallower.

    Nothing can be said of what it has lost. Its widths are planned as they load elsewhere: one for all layers.
    """
    make_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=24,
        num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    example = {"input_ids": torch.ones(1, 16, dtype=torch.long)}
    facts["dense"] = {"params": _params(model), **_speed(model, LARGE_TOKENS, LARGE_REPEATS)}
    rows: list[dict[str, Any]] = []
    facts["rows"] = rows
    for share, method in ((s, m) for s in LARGE_SHARES for m in ("channels", "blocks")):
        axes = LANGUAGE_METHODS[method]
        branches = {} if method == "channels" else {"branch_score": "influence", "data": [example]}
        plan = structprune.plan(model, example, target={"params": share}, axes=axes, **branches)
        slim = plan.apply(model)
        removed = list(plan.removal.branches) if isinstance(plan, structprune.DepthPlan) else []
        row = {"share": share, "method": method, "params": plan.after.params, "blocks removed": len(removed)}
        rows.append(row | _speed(slim, LARGE_TOKENS, LARGE_REPEATS))
        print(rows[-1], flush=True)
        write(facts)


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _speed(model: nn.Module, tokens: int = NEW_TOKENS, repeats: int = REPEATS) -> dict[str, float]:
    """Tokens a second of greedy generation with a cache; the median of some runs."""
    seconds = sorted(_generations(model, tokens, repeats))
    return {"tokens_per_s": tokens / seconds[len(seconds) // 2]}


@torch.no_grad()
def _generations(model: Any, tokens: int, repeats: int) -> Iterator[float]:
    prompt = torch.ones(1, 4, dtype=torch.long)
    for run in range(repeats + 1):
        start = time.process_time()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        if run:
            yield time.process_time() - start


def markdown(facts: dict[str, Any]) -> list[str]:
    """The results as lines of a page."""
    lines: list[str] = []
    if "speed" in facts:
        net = facts["speed"]
        lines += [
            "## ResNet-56 at a measured speed, without training", "",
            f"Dense {net['dense']:.2f}% of {TESTED_ON} test images (one standard error at 85% is 0.8 points). Planned "
            f"on {PLANNED_ON} training images without labels, one thread, channels by their L2 norm, blocks by "
            f"influence; recovered on {RECOVERED_ON} images ({ROWS} rows, {ROUNDS} rounds of joint "
            "solving); one draw. The speed is measured with the dense network in turns, on a machine that others "
            "used.", "",
            "| backend, batch | asked | may go | speed | gone | MACs each | as it is | new norms | recovered |",
            "|---|--:|---|--:|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        for row in net["rows"]:
            head = f"| {row['backend']}, {row['batch']} | {row['asked']}x | {row['method']} | "
            if "refused" in row:
                lines.append(f"{head}refused: {row['refused']} | | | | | |")
                continue
            parts = (f"{row[key]:.2f}%" for key in ("as it is", "recalibrated", "recovered"))
            lines.append(
                f"{head}{row['speed']:.2f}x | {row['blocks removed']} | {row['macs'] / row['batch'] / 1e6:.1f} M | "
                + " | ".join(parts)
                + " |"
            )
        lines.append("")
    for name in NETWORKS:
        if name in facts.get("at equal MACs", {}):
            lines += _equal_macs_lines(name, facts["at equal MACs"][name])
    if "large llama" in facts:
        lines += _large_llama_lines(facts["large llama"])
    if "stories" in facts:
        net = facts["stories"]
        dense = net["dense"]
        lines += [
            "## A Llama of 260 K parameters, without training", "",
            f"Dense: perplexity {dense['perplexity']:.3f}, {dense['params']:,} parameters, {dense['tokens_per_s']:.0f} "
            f"tokens a second of CPU time (greedy generation of {NEW_TOKENS} tokens with a cache, one thread, median "
            f"of {REPEATS}; the machine was in use, and runs of one network differ by a quarter). Planned and "
            f"recovered on {CALIBRATED_ON} windows of {small_llama.WINDOW} tokens.", "",
            "| asked | method | parameters | perplexity | recovered | tokens/s | removed |",
            "|--:|---|--:|--:|--:|--:|---|",
        ]  # fmt: skip
        for row in net["rows"]:
            head = f"| {row['share']:.0%} | {row['method']} | "
            if "refused" in row:
                lines.append(f"{head}refused: {row['refused']} | | | | |")
                continue
            lines.append(
                f"{head}{row['params']:,} | {row['perplexity']:.2f} | {row['recovered']:.2f} | "
                f"{row['tokens_per_s']:.0f} | {', '.join(row['removed'])} |"
            )
        lines.append("")
    return lines


def _equal_macs_lines(name: str, net: dict[str, Any]) -> list[str]:
    trained = "" if name == "ResNet-56" else " It was trained for a few minutes by `benchmarks/train_vit.py`."
    lines = [
        f"## {name} at equal MACs, without training", "",
        f"Dense {net['dense']:.2f}% of {TESTED_ON} test images (one standard error at 85% is 0.8 points).{trained} "
        f"Planned on {PLANNED_ON} training images without labels, channels by their L2 norm, blocks by influence; "
        f"recovered on {RECOVERED_ON} images ({ROWS} rows, {ROUNDS} rounds of joint solving); one draw. Speed is that "
        "of the dense network and this one in turns, one thread: ONNX Runtime and eager, batches of 1 and 8.", "",
        "| MACs | may go | blocks gone | new norms | recovered | ORT, 1 | ORT, 8 | eager, 1 | eager, 8 |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in net["rows"]:
        head = f"| {1 / row['share']:.1f}x fewer | {row['method']} | "
        if "refused" in row:
            lines.append(f"{head}refused: {row['refused']} | | | | | | |")
            continue
        speeds = " | ".join(
            f"{row['speed'][key]:.2f}x" for key in ("onnxruntime, 1", "onnxruntime, 8", "eager, 1", "eager, 8")
        )
        lines.append(
            f"{head}{row['blocks removed']} | {row['recalibrated']:.2f}% | {row['recovered']:.2f}% | {speeds} |"
        )
    return [*lines, ""]


def _large_llama_lines(net: dict[str, Any]) -> list[str]:
    dense = net["dense"]
    lines = [
        "## A Llama of half a billion random weights", "",
        f"Dense: {dense['params']:,} parameters in bfloat16, {dense['tokens_per_s']:.2f} tokens a second of CPU time "
        f"(greedy generation of {LARGE_TOKENS} tokens with a cache, one thread, median of {LARGE_REPEATS}).", "",
        "| parameters | may go | blocks gone | parameters left | tokens/s |", "|--:|---|--:|--:|--:|",
    ]  # fmt: skip
    for row in net["rows"]:
        lines.append(
            f"| {row['share']:.0%} | {row['method']} | {row['blocks removed']} | {row['params']:,} | "
            f"{row['tokens_per_s']:.2f} |"
        )
    return [*lines, ""]
