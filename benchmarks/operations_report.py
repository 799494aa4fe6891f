"""The table of single operations: what came of each, and why channels were kept."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from harness.environment import as_line
from support.judging import FAULTS, GOOD, NOT_COMPARABLE, RIGHT, SURVIVORS, WHOLE

_DATABASES = ("operations", "modules")

_EXPLANATION = f"""Every entry of torch's own databases of test inputs (`op_db` and `module_db` of
`torch.testing._internal`): up to {{samples}} samples of each, spread over all that it has, and the first one in each
other spelling (method, in place, aliases). For every dimension with three entries or more of the first floating
tensor: a linear layer that makes exactly this tensor, the operation, and a linear layer along the dimension of each
result along which the channels stand apart. The other tensors of the sample are parameters and buffers once, and inputs
once; modules are judged in evaluation and in training mode. Half of the channels go by one plain call, in float64 where
the operation has it, and the result is compared with the original whose removed slices are zero
(`tests/support/judging.py`).

- *{RIGHT}*: equal to plain zeroing. *{SURVIVORS}*: equal where norms and means run over what is left.
- *{WHOLE}*: no channel of the first layer may go; the reasons are listed below.
- *faults*: {", ".join(FAULTS)}, or a process that died.
- *not comparable*: {", ".join(NOT_COMPARABLE)}: random values or memory that is not written to; an original that has no
  value with these channels at zero; a sample that the operation itself does not take.
- *went*: cases in which channels of the first layer went, of those that can be compared."""


def faults(result: dict[str, Any]) -> list[dict[str, str]]:
    """Every fault of every entry."""
    return [fault for kind in _DATABASES for facts in result[kind].values() for fault in facts["faults"]]


def _sum(entries: dict[str, Any]) -> tuple[Counter[str], int]:
    counts: Counter[str] = Counter()
    for facts in entries.values():
        counts.update(facts["counts"])
        counts["died"] += sum(fault["kind"] == "died" for fault in facts["faults"])
    return counts, sum(facts["went"] for facts in entries.values())


def _compared(counts: Counter[str]) -> int:
    return sum(counts[kind] for kind in (*GOOD, *FAULTS))


def totals(result: dict[str, Any]) -> dict[str, Any]:
    """Cases of each class, and the share of those compared in which channels went."""
    found = {}
    for kind in _DATABASES:
        counts, went = _sum(result[kind])
        compared = _compared(counts)
        share = round(went / compared, 4) if compared else None
        found[kind] = {"entries": len(result[kind]), "compared": compared, "went": went, "share": share, **+counts}
    return found


def _general(reason: str) -> str:
    """A reason without the place and the numbers of one network."""
    reason = re.sub(r" in the model \(.*?\)| at \S+\.py:\d+| in \S+ \(.*?\.py:\d+\)", "", reason)
    return re.sub(r"\d+", "#", reason)


def _table(title: str, entries: dict[str, Any]) -> list[str]:
    columns = [title, RIGHT, "over survivors", WHOLE, *FAULTS, "not comparable", "went", "most frequent reason"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, facts in entries.items():
        counts = Counter(facts["counts"])
        compared = _compared(counts)
        cells: list[Any] = [name, counts[RIGHT], counts[SURVIVORS], counts[WHOLE], *(counts[kind] for kind in FAULTS)]
        cells += [sum(counts[kind] for kind in NOT_COMPARABLE), f"{facts['went'] / compared:.0%}" if compared else ""]
        reasons = Counter(facts["reasons"]).most_common(1)
        cells.append(_general(reasons[0][0]).replace("|", "\\|") if reasons else "")
        lines.append("| " + " | ".join("" if cell == 0 else str(cell) for cell in cells) + " |")
    return [*lines, ""]


def _totals_table(result: dict[str, Any]) -> list[str]:
    kinds = (*GOOD, *FAULTS, "died", *NOT_COMPARABLE)
    columns = ["", "entries", "compared", "went", *kinds]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, found in totals(result).items():
        share = f"{found['went']} ({found['share'] or 0:.1%})"
        cells = [name, found["entries"], found["compared"], share, *(found.get(kind, 0) for kind in kinds)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def as_markdown(result: dict[str, Any]) -> str:
    """For the results folder."""
    reasons: Counter[str] = Counter()
    for kind in _DATABASES:
        for facts in result[kind].values():
            for reason, count in facts["reasons"].items():
                reasons[_general(reason)] += count
    found = faults(result)
    lines = ["# Single operations", "", _EXPLANATION.format(samples=result["samples"]), ""]
    lines += [as_line(result["environment"]) + ".", "", *_totals_table(result)]
    lines += ["## Faults", "", *(f"- {f['case']}: **{f['kind']}**: {f['note'][:300]}" for f in found)] if found else []
    lines += ["", "## Why channels were kept", "", *(f"- {n}: {reason}" for reason, n in reasons.most_common(100)), ""]
    for kind in _DATABASES:
        lines += [f"## By {kind.removesuffix('s')}", "", *_table(kind.removesuffix("s"), result[kind])]
    return "\n".join(lines).rstrip() + "\n"
