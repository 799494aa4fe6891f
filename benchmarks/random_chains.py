"""Random networks of two to four operations, pruned by half and compared: how many are right, whole, wrong.

python benchmarks/random_chains.py --networks 2000
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from multiprocessing import Pool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.random_chains import Judgement, draw, judge  # noqa: E402 - the tests are no package
from torch import set_num_threads  # noqa: E402


def judged(seed: int) -> Judgement:
    """What becomes of network number `seed`."""
    warnings.simplefilter("ignore")
    set_num_threads(1)
    return judge(draw(seed), seed)


def as_markdown(document: dict[str, Any]) -> str:
    """The counts, what they mean, and every fault."""
    counts: dict[str, int] = document["counts"]
    rows = [f"| {verdict} | {count:,} |" for verdict, count in counts.items()]
    faults = [f"- {' -> '.join(f['operations'])}: {f['verdict']}: {f['reason']}" for f in document["faults"]]
    return "\n".join([
        "# Random networks",
        "",
        f"{document['networks']:,} networks from number {document['first']:,}: a linear layer, two to four operations "
        "drawn from the table of `tests/support/random_chains.py`, a linear layer. Half of the channels go by one "
        "plain call, in float64, and the result is compared with the original whose removed slices are zero.",
        "",
        "*right*: equal. *whole*: no channel may go. *nothing to see*: a constant stands between the channels and the "
        "output. *no network*: the operations do not fit each other. Anything else is a fault.",
        "",
        "| what became of it | networks |",
        "|---|---:|",
        *rows,
        "",
        *(faults or ["No fault."]),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first network")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "random_chains.json")
    given = parser.parse_args()
    start = time.perf_counter()
    with Pool(given.jobs) as pool:
        found = pool.map(judged, range(given.first, given.first + given.networks), chunksize=10)
    faults = [judgement for judgement in found if judgement.fault]
    counts = Counter(judgement.verdict for judgement in found)
    for judgement in faults:
        print(judgement)
    print(dict(counts), f"{time.perf_counter() - start:.0f} s")
    document = {
        "networks": given.networks,
        "first": given.first,
        "counts": dict(counts.most_common()),
        "faults": [{"operations": f.names, "verdict": f.verdict, "reason": f.reason} for f in faults],
    }
    given.json.write_text(json.dumps(document, indent=1) + "\n")
    given.json.with_suffix(".md").write_text(as_markdown(document))


if __name__ == "__main__":
    main()
