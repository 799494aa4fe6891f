"""The command that searches for the cheapest network which is still good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from structprune.cli.images import batches_of
from structprune.cli.improving import Data, Folder, Samples, Size, agreement, held_out
from structprune.cli.models import named_object
from structprune.cli.options import AsJson, ModelFlags, among, new_folder
from structprune.cli.output import reporting
from structprune.files import write_text
from structprune.io import save
from structprune.latency.measure import LATENCY_BACKENDS, Latency
from structprune.search.network_costs import COUNTED
from structprune.search.optimize import Searching, optimize
from structprune.search.space import Space
from structprune.search.strategies import STRATEGIES

Eps = Annotated[float, typer.Option(help="How much of the quality may be lost, in its own unit.", min=0)]
Objective = Annotated[
    str, typer.Option(help="latency, macs, params or memory.", autocompletion=among(("latency", *COUNTED)))
]
Quality = Annotated[
    str | None,
    typer.Option(help="module:function of a model, the greater the better; else agreement with the dense one in %."),
]
Storage = Annotated[
    str | None, typer.Option(help="File (.db or .journal) or URL of the study: runs go on, and may share it.")
]
Backend = Annotated[str, typer.Option(help="How latency is measured.", autocompletion=among(LATENCY_BACKENDS))]
Strategy = Annotated[str, typer.Option(help=", ".join(STRATEGIES), autocompletion=among(STRATEGIES))]


def optimize_command(
    source: ModelFlags, data: Data, out: Folder, eps: Eps = 1.0, minimize: Objective = "latency",
    quality: Quality = None, trials: Annotated[int, typer.Option(help="Trials in all.", min=1)] = 20,
    strategy: Strategy = "tpe", storage: Storage = None,
    per_group: Annotated[bool, typer.Option("--per-group", help="Choose the width of every group.")] = False,
    backend: Backend = "eager", samples: Samples = 256, batch: Size = 64, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Search for the fastest or smallest network that loses no more than --eps, and save it."""
    new_folder(out)
    with reporting(as_json) as output:
        how = Searching(
            strategy=strategy, seed=source.seed, space=Space(per_group=per_group), latency=Latency(backend=backend)
        )
        loaded = source.load()
        train, rest = held_out(batches_of(data, loaded, samples, batch, source.seed))
        asked = None if quality is None else named_object(quality)

        def evaluate(model: nn.Module) -> float:
            return agreement(model, loaded.model, rest) if asked is None else asked(model)

        output.step("searching")
        optimized = optimize(
            loaded.model, loaded.inputs, train, evaluate, eps=eps, minimize=minimize, trials=trials, storage=storage,
            how=how,
        )  # fmt: skip
        told: dict[str, Any] = {"objective": optimized.objective, "dense": optimized.dense, "least": optimized.least}
        told |= {"evaluations": optimized.evaluations, "gain": optimized.gain, "folder": None}
        told["trials"] = [
            {"number": t.number, "point": dict(t.point), "state": t.state, "cost": t.cost, "quality": t.quality}
            for t in optimized.trials
        ]
        if optimized.model is not None and optimized.plan is not None:
            save(optimized.model, out)
            told |= {"folder": str(out), "quality": None if optimized.best is None else optimized.best.quality}
            write_text(Path(out) / "search.html", optimized._repr_html_())
        saved = f"saved to {out}" if optimized.model is not None else "nothing was saved: raise --eps or --trials"
        output.result(told, optimized.table(), f"{optimized!r}\n{saved}")
