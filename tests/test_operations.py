"""Single operations, with the inputs of torch's own test databases: never a wrong number, a broken forward or an error.

A fixed part of what ``benchmarks/operations.py`` judges: the first sample of every operation and module, along every
dimension, in every spelling. Each part runs in a process of its own (see `support.judged_part`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PARTS = 4
TESTS = Path(__file__).parent

# What is still at fault: nothing. An entry that must stand here for a while is taken out as soon as it is mended.
KNOWN: frozenset[str] = frozenset()


def run_apart(*arguments: str) -> Any:
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "support.judged_part", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", range(PARTS))
def test_every_operation_is_right_or_kept_whole(part: int) -> None:
    found = run_apart(str(part), str(PARTS), "1")
    new = {name: cases for name, cases in found["faults"].items() if name not in KNOWN}
    assert not new, "\n".join(case for cases in new.values() for case in cases)
    gone = KNOWN & set(found["entries"]) - set(found["faults"])
    assert not gone, f"no longer at fault, so to be taken out of KNOWN: {sorted(gone)}"
    assert found["went"] > 0.3 * sum(found["counts"].values()), found["counts"]


@pytest.mark.parametrize("part", range(2))
def test_no_operation_lets_a_masked_network_lose_too_much(part: int) -> None:
    found = run_apart(str(part), "2", "1", "--masked")
    assert not found["faults"], "\n".join(case for cases in found["faults"].values() for case in cases)
    assert found["went"] > 0.3 * sum(found["counts"].values()), found["counts"]


@pytest.mark.parametrize(("entry", "samples"), [("add", "4"), ("cat", "1")])
def test_a_broken_rule_is_seen(entry: str, samples: str) -> None:
    """A rule that gives rows of the right sizes and couples nothing, or the wrong way round."""
    found = run_apart("0", "1", samples, "--only", entry, "--broken", entry)
    assert any("wrong numbers" in case or "broken forward" in case for case in found["faults"][entry])
