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
    if "params" not in of:
        return f"{key}: {of.get('died', '-')}"
    left = of["params"][0] / of["params"][1]
    return (
        f"{key}: saved {of.get('saved')}, params {left:.3f}, file {_share(ratio(of))}, error {_error(of.get('slim'))}"
        + (f", with a fixed batch {_error(of['slim_fixed'])}" if "slim_fixed" in of else "")
        + (f"; {of['died']}" if "died" in of else "")
    )


def _reason(of: dict[str, Any], slim: str, dense: str) -> str:
    """Why a pruned model was not exported, and whether the dense one is."""
    if "error" not in of.get(dense, {}):
        return f"the dense model is exported, the pruned one is not: {of[slim]['error']}"
    return f"nor is the dense model: {of[dense]['error']}"


def as_markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    models: dict[str, Any] = result["models"]
    done = [of for of in models.values() if "params" in of]
    free = [of for of in done if "bytes" in of.get("slim", {})]
    fixed = [of for of in done if "bytes" in of.get("slim_fixed", {})]
    errors = [
        of[kind]["max_relative_error"] for of in done for kind in ("slim", "slim_fixed") if "bytes" in of.get(kind, {})
    ]
    lines = [
        "# Models of the zoo's tests, carried away",
        "",
        f"Each model is pruned by one plain call at ratio {result['ratio']}, saved, loaded into one of other weights, "
        "and exported to ONNX with its batch free. Every file is checked by onnx and run by ONNX Runtime at two batch "
        "sizes. Where that is refused, the dense model is tried too, and then the pruned one with its batch fixed.",
        "",
        f"- saved and loaded, bit for bit: {sum(of.get('saved') == 'exact' for of in done)} of {len(models)}",
        f"- exported and right: {len(free)} of {len(models)} with the batch free, and {len(fixed)} more with it fixed",
        f"- largest error, relative to an output's largest entry: {max(errors, default=0):.1e}",
        "",
        "| model | params kept | file, bytes | file over that of the dense model | error | saved and loaded |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for key, of in models.items():
        if "params" not in of:
            lines.append(f"| {key} | {of.get('died', '-')} | | | | |")
            continue
        written = of["slim"] if "bytes" in of.get("slim", {}) else of.get("slim_fixed", {})
        note = " (batch fixed)" if written is not of.get("slim") and "bytes" in written else ""
        cells = (
            f"{of['params'][0] / of['params'][1]:.3f}",
            f"{written['bytes']:,}{note}" if "bytes" in written else "-",
            _share(ratio(of)),
            _error(written),
            str(of.get("saved", of.get("died", "-"))),
        )
        lines.append(f"| {key} | {' | '.join(cells)} |")
    missing = [key for key in result["asked"] if key not in models]
    lines += ["", f"Not run yet: {', '.join(missing)}."] if missing else []
    refused = [
        f"- {key}, {what}: {_reason(of, slim, dense)}"
        for key, of in models.items()
        for slim, dense, what in (("slim", "dense", "batch free"), ("slim_fixed", "dense_fixed", "batch fixed"))
        if "error" in of.get(slim, {})
    ]
    lines += ["", "What was refused:", "", *refused] if refused else []
    lines += ["", "Parameters of branches that run in training alone (auxiliary heads) are in no file."]
    hardware = ", ".join(f"{key} {value}" for key, value in result["environment"].items() if isinstance(value, str))
    return "\n".join([*lines, "", f"Measured on: {hardware}.", ""])
