"""What the benchmarks share: processes with a time limit, memory, versions, the peer, and the tests' own support."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# The oracle and the torchvision workaround live with the tests.
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))
