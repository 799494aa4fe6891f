"""`recover`: the layers of a pruned model solved again, so that it computes what the original computes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import FLAG, MODEL, ON_BATCH, PATH, SEED, require, whole
from structprune.coupling.graph import ChannelGraph
from structprune.distributed import failing_together, nobody_failed
from structprune.errors import RecoveryError
from structprune.forwards.activation_files import runs_of
from structprune.forwards.batches import Forward, batches_of
from structprune.forwards.parallel_forward import Event, parallel_runs
from structprune.forwards.prefix import PrefixCache
from structprune.forwards.widened import wide, widened
from structprune.offloading import at_hand, hooked, is_placed
from structprune.recovery.candidates import Candidates, HeldOut
from structprune.recovery.depth import Shorter
from structprune.recovery.history import removed_between, stages
from structprune.recovery.recalibrate import set_statistics
from structprune.recovery.report import LayerRecovery, RecoveryReport, keep_report, recovery_report
from structprune.recovery.solving import How, Solver, Solving, schedule_of
from structprune.surgery.apply import _memo
from structprune.surgery.verify import removed_components
from structprune.tracing.state import copy_buffer, held_tensors, swapped_tensors
from structprune.tracing.trace import map_tensors, preserved_random_state, tensors_in

AS_GIVEN, RECALIBRATED = "as given", "norms recalibrated"
SOLVED_ALONE, SOLVED_WITH_PRODUCERS = "layers solved", "layers solved with producers"
MOST_IN_VAIN = 1 << 27  # bytes that forwards may hold of what they do not need any more


def recover(
    slim: nn.Module,
    original: nn.Module,
    data: Iterable[Any],
    *,
    rows: int = 65536,
    rounds: int = 3,
    seed: int = 0,
    forward: Forward | None = None,
    weights: bool = True,
    offload: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A copy of `slim` whose layers are solved again to meet `original`: no labels, no gradients, no training.

    Each convolution, linear layer or matrix product with a held weight whose result has changed is solved by ridge
    least squares, one after the other in the order of the forward, on the network as solved so far. It has to meet the
    original's result on the same data: the result of its batch norm where one follows, or the whole residual sum that
    it goes into, so that it makes up for errors before it. Norms with no solved layer in front are scaled and shifted
    channel by channel. The ridge is chosen on a fifth of the data, on which the layer is not solved; a layer that does
    not get better there is left. Matrices are in float64; sums over float32 data are computed in float32, and once more
    in float64 where an error of less than 0.3 % is left. `recovery_report` tells the errors of each layer. Weights that
    are used in several places are left.

    Then the layer is solved together with the layers that make its channels, where all operations between them treat
    each entry alone: activations, norms with fixed statistics, gates. The kept channels may then compute something new,
    so that a few do the work of many. This is damped Gauss-Newton (`structprune.recovery.gauss_newton`): linear least
    squares by conjugate gradients, a few times over, on four fifths of the samples. A step is made only if it lowers
    the error on the other samples. Where that helped, a last step uses all samples, and is made if the error on all of
    them falls; the errors that the report gives are those before it.

    With ``weights=False`` biases alone change: each takes the constant that its layer lacks on average, which is the
    mean of what the removed channels gave it (An et al., Fluctuation-based Adaptive Structured Pruning for Large
    Language Models, 2024, section 3.4), and that of the errors before it. Least squares does this too, and more; the
    constants alone take less time and fewer samples. Layers without a bias are left, and recurrent ones.

    Recurrent layers (LSTM, GRU, RNN) are solved gate by gate, on the input of each step and the state before it: first
    on the original's states, then on their own as well (`structprune.recovery.recurrent_cells`). Cells that the forward
    calls in a loop are left.

    One of 16 samples is kept out of all this, and at least one of each batch. On these the output of the solved model
    is compared with that of `slim` and of `slim` with its batch norms recalibrated, and the best of the three is
    returned: with few samples, solving may fit what is an accident of them. `recovery_report` tells the errors, and
    which model was kept. With fewer than five samples none is held out, and they are compared on all.

    He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017 (equation 3 and section 3.3, of single
    layers and of residual sums); here each layer also corrects the errors of the layers before it.

    A model without some of its branches (`structprune.remove_branches`), and perhaps without channels of what was left,
    is solved where it meets the original; the report then names layers as the original does. One that lost them in
    another order is made again step by step, and each step is recovered, if its weights are still the original's.

    Models in half precision compute and are solved in float32: each operation gets a float32 copy of the weights that
    it takes, and new weights are rounded at once, so that the layers behind make up for that. In all `recover` needs
    memory for the new model, and for what all batches hold at one layer. With `offload` that is in files, and memory
    holds what one batch computes from one layer to the next.

    Where ``torch.distributed`` is in use, every rank gives its share of the data, and all get the same model. If one
    fails, all raise. The batches of the ranks are taken in turns: what comes of it is, to rounding, what a single
    process makes of the first batch of each rank, then the second of each, and so on. (A layer that is left for want of
    memory, as `recovery_report` tells, may fit there or here.)

    Args:
        slim: a pruned model: what `structprune.prune` or ``plan.apply`` made of `original`, in one round or several.
        original: the model before the first pruning.
        data: batches as the model takes them: tensors, dicts of keyword arguments, or pairs of one of these and labels,
            which are ignored. All of them are held by the model at once at one layer: some hundred samples are enough.
            Of dicts with an ``attention_mask``, what it leaves out at the ends of sequences is left out; sequences of
            one length run together.
        rows: how many positions (pixels, tokens) of all batches together a layer is solved on; drawn at random.
        rounds: how often a layer and its producers are solved together at most; with 0 the layers alone are solved.
        seed: of the draw. Random generators outside are not touched.
        forward: called with the model and a batch, where batches are something else than the above; as for
            `structprune.plan`. It runs once on each batch, to see what it calls the model with.
        weights: whether weights are solved, or biases alone.
        offload: a folder for what batches hold between layers, for data whose activations do not fit into memory; it is
            made if it is missing. Nothing stays in it. Weights are the same as without. CPU alone.

    Returns:
        A new model; `slim` and `original` are as they were.

    Raises:
        RecoveryError: there is no data, or it does not fit the models or makes them compute NaN, or the models do not
            fit each other; or a number is none that can be; or the folder of `offload` is full or cannot be used; or
            another rank has failed.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> slim = structprune.prune(model, x, ratio=0.25, round_to=1)
        >>> recovered = structprune.recover(slim, model, [x])
        >>> print([row.layer for row in structprune.recovery_report(recovered).layers])
        ['2']
    """
    with failing_together(RecoveryError, "recover"):
        numbers = {"rows": whole(1), "rounds": whole(0), "seed": SEED}
        named = {"forward": ON_BATCH.or_none, "weights": FLAG, "offload": PATH.or_none}
        require(locals(), RecoveryError, slim=MODEL, original=MODEL, **named, **numbers)
        how = How(rows, rounds if weights else 0, seed, weights, offload)
        given, slim, original = slim, at_hand(slim), at_hand(original)
        batches = batches_of(original, data, forward, "is nothing to solve the layers on", padding=False)
        shorter = Shorter.of(slim, original, batches[0])
        done = stages(slim, original) if shorter is None else []
        if len(done) < 2:
            recovered = _recovered(slim, original, batches, how, shorter)
        else:
            recovered = _in_stages(done, original, batches, how)
        return hooked(recovered) if is_placed(given) else recovered


def _in_stages(done: list[tuple[Any, ...]], original: nn.Module, batches: list[Any], how: How) -> nn.Module:
    """A model that lost branches and channels, made again step by step and recovered after each of them."""
    layers: list[LayerRecovery] = []
    skipped: dict[str, str] = {}
    for plans in done:
        smaller = original
        for plan in plans:
            smaller = plan.apply(smaller)
        original = _recovered(smaller, original, batches, how, Shorter.of(smaller, original, batches[0]))
        report = recovery_report(original)
        layers += report.layers
        skipped |= report.skipped
    keep_report(original, replace(recovery_report(original), layers=tuple(layers), skipped=skipped))
    return original


def _recovered(
    slim: nn.Module, original: nn.Module, batches: list[Any], how: How, shorter: Shorter | None
) -> nn.Module:
    nobody_failed()
    edits = removed_between(slim, original) if shorter is None else shorter.edits
    recovered = copy.deepcopy(slim, _memo(held_tensors(slim), {})) if shorter is None else shorter.aligned
    given = {
        name: held.tensor if shorter is None else held.tensor.detach().clone()
        for name, held in held_tensors(slim if shorter is None else recovered).items()
    }
    with widened(original, recovered) as in_float32:
        batches = [map_tensors(wide, batch) for batch in batches] if in_float32 else batches
        graph = ChannelGraph(original, batches[0])
        removed = removed_components(graph, edits)
        begins, without = ((), ()) if shorter is None else shorter.places(original, graph.trace)
        solving = Solving.of(graph, removed, batches, (begins, without), how, given)
        with preserved_random_state(), torch.no_grad():
            report = _best(recovered, original, batches, solving)
        report = replace(report, skipped={**solving.left, **report.skipped})
    if shorter is not None:
        recovered = shorter.shortened(slim)
    keep_report(recovered, report)
    return recovered


def _best(recovered: nn.Module, original: nn.Module, batches: list[Any], solving: Solving) -> RecoveryReport:
    """Give `recovered` the weights of the best candidate, and tell what was done.

    Layers are solved from the better of the model as given and the same with its norms recalibrated, but for norms that
    get what they get in the original. The ridge pulls towards where a layer starts, or towards the same with the
    statistics as given, whichever is better (`NormsBehind`). If producers were solved too and the result is worse than
    that, layers alone are tried.
    """
    held_out = HeldOut.of(batches)
    candidates = Candidates(solving.graph, solving.removed, original, batches, held_out, solving.given)
    candidates.offer(AS_GIVEN, recovered)
    statistics: dict[str, Tensor] = {}
    if solving.any and held_out.count:
        statistics = set_statistics(recovered, batches, solving.graph.trace, solving.how.offload)
    if statistics and candidates.offer(RECALIBRATED, recovered):
        candidates.remember(statistics)
    reports: list[LayerRecovery] = []
    skipped: dict[str, str] = {}
    better = not solving.any
    for count in dict.fromkeys((solving.how.rounds, 0)):
        if better or (reports and not any(row.producers for row in reports)):
            break
        candidates.restore(recovered, as_given=solving.unchanged_statistics)
        solvers = solving.solvers(held_out, count)
        reports = _solve_in_order(recovered, original, batches, solving.graph, solvers, solving.how.offload)
        skipped = {solver.consumer.layer: solver.refused for solver in solvers if solver.refused}
        better = candidates.offer(SOLVED_WITH_PRODUCERS if count else SOLVED_ALONE, recovered)
    if not better:  # nothing that was solved is returned
        candidates.restore(recovered)
        reports = [replace(row, after=row.before, changed=False, producers=()) for row in reports]
    return RecoveryReport(tuple(reports), skipped, tuple(candidates.tried), candidates.kept, candidates.samples)


def _solve_in_order(
    slim: nn.Module,
    original: nn.Module,
    batches: list[Any],
    graph: ChannelGraph,
    solvers: list[Solver],
    offload: str | os.PathLike[str] | None,
) -> list[LayerRecovery]:
    """Solve layer after layer while all batches pass once through both models; the reports on them in that order.

    At each event all batches pause in the pruned model. Solvers that only observe it keep what they need. One whose
    target it is also gets the original's results there; it is solved, and the batches go on with its new weight.
    """
    schedule = schedule_of(solvers)
    targets = {solver.target for solver in solvers}
    between = _between(solvers)
    reports: list[LayerRecovery | None] = []
    with swapped_tensors(original, copy_buffer, track=False), swapped_tensors(slim, copy_buffer, track=False):
        original.eval()
        slim.eval()
        tensors = {name: held.tensor for name, held in held_tensors(slim).items()}
        trace = graph.trace
        with (
            runs_of(PrefixCache, offload, original) as kind,
            parallel_runs(kind, slim, batches, trace, set(schedule)) as slim_runs,
            parallel_runs(kind, original, batches, trace, targets) as original_runs,
        ):
            for event, at_event in schedule.items():
                reports += _at(event, at_event, slim_runs, original_runs, tensors)
                if event in between:
                    _hold_less([*slim_runs, *original_runs], event)
    return [report for report in reports if report is not None]


def _at(
    event: Event,
    solvers: list[Solver],
    slim_runs: list[PrefixCache],
    original_runs: list[PrefixCache],
    tensors: dict[str, Tensor],
) -> list[LayerRecovery | None]:
    """Let solvers observe an event or, if it is their target, solve; the reports of those that solved."""
    pauses = [run.run_to(event) for run in slim_runs]
    reports: list[LayerRecovery | None] = []
    for solver in solvers:
        if event != solver.target:
            solver.observe(event, pauses)
            continue
        goals = [run.run_to(event) for run in original_runs]
        for of, paused in (("the original", goals), ("the pruned model", pauses)):
            _require_numbers([next(tensors_in(pause.result)) for pause in paused], of, solver.consumer.layer)
        reports.append(solver.solve(pauses, goals, tensors))
    return reports


def _between(solvers: list[Solver]) -> set[Event]:
    """The targets at which no solver is left between what it has observed and its own target.

    Of solvers that observe 1 and 5 and are solved at 3 and 7, both; of those that observe 1 and 2, the second alone.
    """
    spans = [(min((*solver.observed, solver.target)), solver.target) for solver in solvers]
    return {target for _, target in spans if not any(first <= target < last for first, last in spans)}


def _hold_less(runs: list[PrefixCache], event: Event) -> None:
    """Begin all runs anew behind an event where they are paused, if they hold much that nothing needs any more."""
    if all(run.can_restart for run in runs) and sum(run.held_in_vain() for run in runs) > MOST_IN_VAIN:
        for run in runs:
            run.restart(event[0] + 1)


def _require_numbers(results: list[Tensor], of: str, layer: str) -> None:
    """Check that results are numbers: with a single NaN or infinity, sums over them say nothing."""
    wrong = [number for number, result in enumerate(results) if not _all_finite(result)]
    if wrong:
        raise RecoveryError(
            f"On batch {wrong[0]} of data, what {layer!r} is solved to meet is NaN or infinite in {of}. Check the data "
            "and the weights."
        )


def _all_finite(tensor: Tensor) -> bool:
    """Whether all entries are numbers: their sum is none else, and it takes a fraction of the time to look at each."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
