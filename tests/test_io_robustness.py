"""Real processes that are killed while they save, and that save and load side by side.

A small part of ``benchmarks/robustness.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys

from support.zoo import BENCHMARKS

CODE = """
import json, multiprocessing, torch
import robustness
torch.set_num_threads(1)
multiprocessing.set_start_method("fork")
print(json.dumps([robustness.kills(12), robustness.side_by_side(2.0, writers=2, readers=2)]))
"""


def test_no_model_is_lost() -> None:
    """In a process of its own: one that has run threads of torch is not safely forked."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=BENCHMARKS)
    kills, together = json.loads(done.stdout)
    assert kills["killed"] >= 12
    assert (kills["lost"], kills["left behind"]) == (0, 0)
    assert together["saves"]
    assert together["loads"]
    assert (together["saves that failed"], together["loads that failed"], together["left behind"]) == (0, 0, 0)
