"""Forwards that start in the middle, from what an earlier part of the forward of the same batch left.

A `PrefixCache` keeps the results that later operations need. To measure what a change of one layer does to the output
takes a forward for each change; all of them agree up to that layer, and only what follows is computed again.

And a run can itself begin anew in the middle. The frames of a forward, and what a model keeps beside (the keys and
values of a language model), hold results that no operation needs any more; where one block of a chain follows the
other, what is needed is a single tensor. So many batches that pause side by side hold little more than that.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.errors import RecoveryError
from structprune.forwards.batches import compared
from structprune.forwards.parallel_forward import BatchRun, Event
from structprune.hardware import allocated
from structprune.tracing.replay import Hook, Replay, ReplayedCall
from structprune.tracing.trace import Trace, as_call, map_tensors, tensors_in

# Operations that give what the model was given or holds; nothing of it may be written over.
_GIVEN = ("input", "parameter", "constant")


class PrefixCache(BatchRun):
    """A run that keeps the results that later operations need.

    Attributes:
        results: what each operation so far returned, by its number. Where no later operation needs it, there is a
            tensor of the same shape without memory.
    """

    def __init__(self, model: nn.Module, inputs: Any, trace: Trace, events: set[Event]) -> None:
        self.results: dict[int, Any] = {}
        self._last_uses = _last_uses([trace.nodes[number] for number in trace.keys])
        self._needed: set[int] = set()  # the numbers of the results that are held for later operations
        self._same: set[int] = (
            set()
        )  # those that no later operation needs, but that are the same tensors as some that are
        self._dropped: list[weakref.ref[Tensor]] = []
        super().__init__(model, inputs, trace, events)

    def _hooks(self, numbers: set[int]) -> dict[int, Hook]:
        return dict.fromkeys(self._trace.keys, self._with_pauses)

    def _result(self, operation: ReplayedCall) -> Any:
        assert operation.node is not None
        number = operation.node.meta["index"]
        result = self.results[number] = operation()
        allocated(sum(tensor.nbytes for tensor in tensors_in(result)))
        self._needed.add(number)
        ended = self._needed.intersection(self._last_uses.get(number, ()))  # a parameter or an input is no result
        if ended:
            self._needed -= ended
            self._drop(self._same | ended)
        return result

    def _drop(self, numbers: set[int]) -> None:
        """Hold no memory for these results, but for tensors that are needed as the result of another operation.

        In ``y = x.float(); z = x + norm(y)`` the sum is recorded as one of ``y``, which is ``x`` itself; a forward that
        begins in the middle has ``x`` from the operation that made it.
        """
        needed = {id(tensor) for number in self._needed for tensor in tensors_in(self.results[number])}
        self._same = {n for n in numbers if any(id(tensor) in needed for tensor in tensors_in(self.results[n]))}
        for number in numbers - self._same:
            self._dropped += map(weakref.ref, tensors_in(self.results[number]))
            self.results[number] = map_tensors(_without_memory, self.results[number])

    def finish(self) -> Any:
        """Let the batch run to the end; what the model returned. Nothing is kept."""
        output = super().finish()
        self.results.clear()
        self._needed.clear()
        self._same.clear()
        return output

    def held_in_vain(self) -> int:
        """Bytes of the results that no later operation needs and that the forward holds nevertheless."""
        results = [self.results[number] for number in self._needed]
        needed = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(results)}
        alive = [tensor for dropped in self._dropped if (tensor := dropped()) is not None]
        self._dropped = list(map(weakref.ref, alive))
        sizes = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in alive)}
        return sum(size for place, size in sizes.items() if place not in needed)

    @property
    def can_restart(self) -> bool:
        """Whether a forward may start where this one is: it writes over nothing given, and nothing was asked for."""
        return can_restart(self._trace) and not self.replay.asked

    def restart(self, start: int) -> None:
        """Begin anew behind a pause, with the results that operations from number `start` on need and nothing else."""
        self.cancel()
        self._dropped = []
        self._start({**self._hooks(set()), **prefix_hooks(self._trace, start, self.results)})

    def output_from(self, start: int, model: nn.Module, inputs: Any, hooks: Mapping[int, Hook], trace: Trace) -> Tensor:
        """What is compared of the model's output with `hooks`, none of which comes before operation `start`.

        What comes before is taken from this run, which has paused before `start`; where that is not safe, because the
        model writes over what it was given or asks for the value of a tensor, the whole forward runs.
        """
        if self.can_restart:
            hooks = {**hooks, **prefix_hooks(trace, start, separate_results(trace, start, self.results))}
        return output_of(model, inputs, hooks, trace)


def output_of(model: nn.Module, inputs: Any, hooks: Mapping[int, Hook], trace: Trace) -> Tensor:
    """What is compared of the model's output (`compared`), with hooks at some operations of the trace."""
    args, kwargs = as_call(inputs)
    with Replay(trace, hooks, whole=True, error=RecoveryError).over(model):
        result = compared(model(*args, **kwargs))
    assert result is not None
    return result


def prefix_hooks(trace: Trace, start: int, results: Mapping[int, Any]) -> dict[int, Hook]:
    """Hooks for a forward that computes from operation `start` on: earlier ones return what is in `results`."""

    def cached(operation: ReplayedCall) -> Any:
        assert operation.node is not None
        result = results[operation.node.meta["index"]]
        # An operation in place returns its argument, which the cache holds as it was after the last write before start.
        return operation.args[0] if "writes" in operation.node.meta and isinstance(result, Tensor) else result

    return dict.fromkeys((number for number in trace.keys if number < start), cached)


def can_restart(trace: Trace) -> bool:
    """Whether the forward writes over nothing that the model was given or holds; a prefix left out would not do so."""
    return all(_creator(node).meta["name"] not in _GIVEN for node in trace.nodes if "writes" in node.meta)


def separate_results(trace: Trace, start: int, results: Mapping[int, Any]) -> dict[int, Any]:
    """The results of a cache, safe to be written over from operation `start` on.

    They are copied only if an operation from `start` on writes in place. Views of one storage stay views of one copy:
    with ``x`` and ``x[:, :2]`` cached, writing into the copy of the first still changes the copy of the second.
    """
    if not any("writes" in node.meta and node.meta["index"] >= start for node in trace.nodes):
        return dict(results)
    copies: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        copy = copies.setdefault(storage.data_ptr(), storage.clone()) if storage.nbytes() else storage
        return tensor.new_empty(0).set_(copy, tensor.storage_offset(), tensor.size(), tensor.stride())

    return {number: map_tensors(copied, result) for number, result in results.items()}


def _creator(node: fx.Node) -> fx.Node:
    """The operation that created the tensor that `node` returns: one in place returns a tensor that was there before.

    For ``y = relu(x); y.mul_(2)`` both nodes lead to ``relu``.
    """
    while "writes" in node.meta or node.meta["name"] == "part":
        source: Any = node.meta["writes"] if "writes" in node.meta else node.args[0]
        node = source
    return node


def _last_uses(nodes: Sequence[fx.Node]) -> dict[int, list[int]]:
    """For the number of an operation, the operations whose results nothing needs once it has run.

    For ``1: a = relu(x); 2: b = a * 2; 3: c = a + b`` it is ``{3: [1, 2]}``; ``c`` is the output and is kept to the
    end.
    """
    last: dict[int, float] = {}
    for node in nodes:
        creator = _creator(node).meta["index"]
        uses = [float("inf") if user.op == "output" else user.meta["index"] for user in _users(node)]
        last[creator] = max(last.get(creator, 0), node.meta["index"], *uses)
    ended: dict[int, list[int]] = {}
    for number, end in last.items():
        if end != float("inf"):
            ended.setdefault(int(end), []).append(number)
    return ended


def _users(node: fx.Node) -> list[fx.Node]:
    """The operations that use a result, or a part of it."""
    users: list[fx.Node] = []
    for user in node.users:
        users += user.users if user.meta.get("name") == "part" else [user]
    return users


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, all of whose entries are one number in memory."""
    if not tensor.numel():
        return tensor
    return tensor.new_empty(1).as_strided(tensor.shape, (0,) * tensor.dim())
