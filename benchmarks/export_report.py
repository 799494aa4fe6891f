"""The results of ``export_zoo.py`` as lines and as a page."""

from __future__ import annotations

from typing import Any


def ratio(of: dict[str, Any]) -> float | None:
    """Bytes of the pruned model's file over those of the dense one's."""
    slim, dense = of.get("slim", {}).get("bytes"), of.get("dense", {}).get("bytes")
    return slim / dense if slim and dense else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _error(of: dict[str, Any] | None) -> str:
    if not of:
        return "-"
    return f"{of['max_relative_error']:.1e}" if "bytes" in of else "refused"


def line(key: str, of: dict[str, Any]) -> str:
    """One model on one line."""
    if "died" in of:
        return f"{key}: {of['died']}"
    left = of["params"][0] / of["params"][1]
    return (
        f"{key}: saved {of['saved']}, params {left:.3f}, file {_share(ratio(of))}, error {_error(of.get('slim'))}, "
        f"with a free batch {_error(of.get('slim_dynamic'))}"
    )


def _reason(of: dict[str, Any], which: str) -> str:
    """Why a pruned model was not exported, and whether the dense one is."""
    slim, dense = of[f"slim{which}"], of[f"dense{which}"]
    if "error" not in dense:
        return f"the dense model is exported, the pruned one is not: {slim['error']}"
    return f"nor is the dense model: {dense['error']}"


def as_markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    models: dict[str, Any] = result["models"]
    whole = {key: of for key, of in models.items() if "slim_dynamic" in of}
    fixed = [of for of in whole.values() if "bytes" in of["slim"]]
    free = [of for of in whole.values() if "bytes" in of["slim_dynamic"]]
    exact = [of for of in models.values() if of.get("saved") == "exact"]
    errors = [of[which]["max_relative_error"] for which in ("slim", "slim_dynamic") for of in whole.values()
              if "bytes" in of[which]]  # fmt: skip
    lines = [
        "# Models of the zoo's tests, carried away",
        "",
        f"Each model is pruned by one plain call at ratio {result['ratio']}, saved and loaded into a model with other "
        "weights, and exported to ONNX, once with its batch fixed and once with it free. Every file is checked by onnx "
        "and run by ONNX Runtime (with a free batch at two sizes).",
        "",
        f"- saved and loaded, bit for bit: {len(exact)} of {len(models)}",
        f"- exported and right: {len(fixed)} of {len(models)} with the batch fixed, {len(free)} with it free",
        f"- largest error relative to an output's largest entry: {max(errors, default=0):.1e}",
        "",
        "| model | params kept | file kept | error | error, free batch | saved and loaded |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for key, of in models.items():
        if "params" not in of:
            lines.append(f"| {key} | {of.get('died', '-')} | | | | |")
            continue
        left = of["params"][0] / of["params"][1]
        cells = f"{left:.3f} | {_share(ratio(of))} | {_error(of.get('slim'))} | {_error(of.get('slim_dynamic'))}"
        lines.append(f"| {key} | {cells} | {of.get('saved', of.get('died'))} |")
    refused = [
        f"- {key}, {what}: {_reason(of, which)}"
        for key, of in whole.items()
        for which, what in (("", "batch fixed"), ("_dynamic", "batch free"))
        if "error" in of[f"slim{which}"]
    ]
    lines += ["", "What was refused:", "", *refused] if refused else []
    lines += [
        "",
        "Parameters of branches that run in training alone (auxiliary heads) are counted in the second column and are "
        "in no file.",
    ]
    hardware = ", ".join(f"{key} {value}" for key, value in result["environment"].items() if isinstance(value, str))
    return "\n".join([*lines, "", f"Measured on: {hardware}.", ""])
