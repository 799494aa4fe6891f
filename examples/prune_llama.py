r"""Prune a Llama in a folder so that `from_pretrained` loads what is left, recover it, and measure its perplexity.

    python examples/prune_llama.py TinyLlama-1.1B small-llama --text wiki.test.raw --share 0.8
    python examples/prune_llama.py Llama-3-8B small --text wiki.test.raw --calibration wiki.train.raw \
        --sizes intermediate_size=10752 num_hidden_layers=28 --dtype bfloat16 --lm-eval arc_easy hellaswag

Any causal language model of transformers will do. The text is a plain file: a part of WikiText, or any other. Without
`--calibration` its first half calibrates, and the second half judges. Nothing is trained, and no labels are used. All
layers get the same widths, which the configuration can say. What comes out is a folder for `from_pretrained`, with the
tokenizer.

This script was run on a tiny Llama alone, not on the two above. Recovery takes minutes a layer there:
fewer windows and `--rounds 0` are faster. `docs/recovery.md` says what it holds in memory.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _torchvision  # noqa: F401  (only for a torchvision that does not fit torch)
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import structprune
from structprune.errors import PlanError


def windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """The tokens of a text in windows of shape ``(n, length)``; what is left over at the end is dropped."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    return ids[: len(ids) // length * length].view(-1, length)


def as_batches(ids: Tensor, count: int, device: torch.device) -> list[dict[str, Any]]:
    """What the model takes: keys and values need not be kept, as nothing is generated."""
    return [{"input_ids": part.to(device), "use_cache": False} for part in ids.split(count)]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, count: int = 4) -> float:
    """Of all tokens of the windows but their first."""
    total, seen = 0.0, 0
    for batch in as_batches(ids, count, next(model.parameters()).device):
        logits, aim = model(**batch).logits[:, :-1].float(), batch["input_ids"][:, 1:]
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), aim.flatten(), reduction="sum"))
        seen += aim.numel()
    return math.exp(total / seen)


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """That of the next token, for criteria that need gradients."""
    return model(**batch, labels=batch["input_ids"]).loss


def texts(args: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, drawn at random, and windows to judge by."""
    judge = windows(tokenizer, args.text.read_text(encoding="utf-8"), args.length)
    if args.calibration is None:
        half = len(judge) // 2
        known, judge = judge[:half], judge[half:]
    else:
        known = windows(tokenizer, args.calibration.read_text(encoding="utf-8"), args.length)
    if not len(known) or not len(judge):
        raise SystemExit(
            f"The text is too short for windows of {args.length} tokens. Give more, or a smaller --length."
        )
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(args.seed))
    return known[order[: args.windows]], judge[: args.judged]


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prune, recover, save; parameters and perplexity of the dense, the pruned and the recovered network."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    known, judge = texts(args, tokenizer)
    data = as_batches(known, args.batch, torch.device(args.device))
    how_much: Any = {"target": {"params": args.share}, "axes": args.axes or None, "scope": "global", "uniform": True}
    if args.sizes:
        how_much = {"target": dict(map(size, args.sizes))}  # what goes is said by these
    one = {**data[0], "input_ids": data[0]["input_ids"][:1]}
    plan = structprune.plan(dense, one, importance=args.importance, data=data, loss=loss, **how_much)
    if reason := plan.settings.left.get("config"):
        raise PlanError(f"No configuration can say what comes of it ({reason}). Name other --axes or --sizes.")
    print(plan)
    slim = plan.apply(dense)
    found = {name: measured(model, judge) for name, model in (("dense", dense), ("pruned", slim))}
    if not args.no_recover:
        slim = structprune.recover(slim, dense, data, rows=args.rows, rounds=args.rounds)
        found["recovered"] = measured(slim, judge)
    slim.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    again = AutoModelForCausalLM.from_pretrained(args.out, dtype=args.dtype).to(args.device).eval()
    print(f"{args.out} is loaded again: perplexity {perplexity(again, judge):.2f}")
    return found


def size(text: str) -> tuple[str, int]:
    """``intermediate_size=4096`` as name and number."""
    name, equals, number = text.partition("=")
    if not equals or not number.isdigit():
        raise SystemExit(f"--sizes takes NAME=NUMBER, as intermediate_size=4096, not {text!r}.")
    return name, int(number)


def measured(model: nn.Module, judge: Tensor) -> dict[str, float]:
    return {"params": sum(p.numel() for p in model.parameters()), "perplexity": perplexity(model, judge)}


def harness() -> Any:
    """The package of the Language Model Evaluation Harness.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise SystemExit("--lm-eval needs the package lm-eval: pip install 'lm-eval[hf]'") from error
    return lm_eval


def evaluated(folder: Path, tasks: Sequence[str], device: str) -> dict[str, dict[str, float]]:
    """What the Language Model Evaluation Harness says of a folder: figures by task."""
    answer = harness().simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": "auto"}, tasks=list(tasks), device=device
    )
    return {
        task: {name: value for name, value in known.items() if isinstance(value, float)}
        for task, known in answer["results"].items()
    }


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model and its tokenizer")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--text", type=Path, required=True, help="a text file that judges")
    parser.add_argument("--calibration", type=Path, help="another one to calibrate on; else the first half of --text")
    parser.add_argument("--share", type=float, default=0.8, help="of all parameters that remains")
    parser.add_argument("--sizes", nargs="+", metavar="NAME=NUMBER", help="instead: sizes in the configuration's words")
    parser.add_argument("--axes", nargs="*", default=["mlp", "heads"], help="what may go; none: whatever is asked for")
    parser.add_argument("--importance", default="flap", help="flap, wanda_square, thinet, l2, or taylor (gradients)")
    parser.add_argument("--windows", type=int, default=32, help="to calibrate on")
    parser.add_argument("--judged", type=int, default=1 << 30, help="windows to judge by at most")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16384, help="tokens that a layer is solved on")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of solving a layer together with those in front; 0: alone"
    )
    parser.add_argument("--no-recover", action="store_true")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of windows")
    parser.add_argument("--lm-eval", nargs="+", metavar="TASK", help="tasks of the package lm-eval, dense and pruned")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    args = parsed(words)
    if args.lm_eval:
        harness()  # said before hours of work, not after
    if args.out.exists():
        raise SystemExit(f"{args.out} exists already. Name a folder that does not.")
    found: dict[str, Any] = run(args)
    for name, row in found.items():
        print(f"{name:10} {row['params']:>14,} parameters, perplexity {row['perplexity']:.2f}")
    if args.lm_eval:
        found["lm_eval"] = {str(f): evaluated(f, args.lm_eval, args.device) for f in (args.model, args.out)}
        print(json.dumps(found["lm_eval"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
