"""Combinations of widths that a configuration accepts, near one that it refuses.

Without a target, the nearest are taken first. Within a target, widths that the configuration ties to each other are set
to states that it accepts together, and all others are fitted to the target beside them; what loses least importance
comes first. So a number of heads that is refused is made up for by the widths that go in finer steps.

For example, of a Llama with a width of 256 and 8 heads, whose target 6 heads and inner widths of 464 would meet::

    refused      6 heads, by which 256 cannot be divided
    fitted       4 heads beside inner widths of 528, 8 heads beside 400
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from itertools import islice

from structprune.coupling.groups import Group
from structprune.planning.scopes import CoupledGroups
from structprune.planning.targets import Kept

# How many steps each width may move from where it was decided, and how many states of all widths are looked at.
NEAR = 4
STATES = 512
# So many states of one width are asked, on each side, for some that the configuration accepts.
ASKED = 64
# For so many states of widths that are tied, the others are fitted to a target, and the best of them are given.
FITTED = 32
BEST = 4

State = tuple[int, ...]  # for each of the coupled groups, a line of `CoupledGroups.counts`


@dataclass(frozen=True, slots=True)
class Fit:
    """How widths are fitted to a target.

    Attributes:
        misses: by how much the target is missed when groups keep so many channels; see `Target.misses`.
        lost: how much importance is lost then.
        fitted: how many channels each group keeps so that the target is met, where some groups alone may change; None
            where it cannot be met so.
    """

    misses: Callable[[Kept], float]
    lost: Callable[[Kept], float]
    fitted: Callable[[Kept, Collection[Group]], Kept | None]


class Neighbourhood:
    """The states of all widths around one.

    Args:
        coupled: the groups of each width.
        kept: how many channels each group keeps in the one.
        accepted: whether a configuration accepts that each width keeps such a share.
    """

    def __init__(
        self,
        coupled: Sequence[CoupledGroups],
        kept: Mapping[Group, int],
        accepted: Callable[[Sequence[Fraction]], bool],
    ) -> None:
        self._coupled, self._kept, self._accepts = coupled, kept, accepted
        self._known: dict[State, bool] = {}
        self._at = self._state(kept)

    def nearest(self) -> Iterator[Kept]:
        """How many channels each group keeps in states that the configuration accepts, the nearest first."""
        lines = [self._lines(number) for number in range(len(self._coupled))]
        for state in islice(_cheapest([self._far(number, found) for number, found in enumerate(lines)]), STATES):
            if self._accepted(state):
                yield self._kept_in(state)

    def within(self, fit: Fit) -> list[Kept]:
        """The same for states that meet a target, those first that lose least importance."""
        finest = self._finest(fit)
        if finest is None:
            return []
        numbers = range(len(self._coupled))
        lines = [self._lines(number) for number in numbers]
        free = self._free(lines) or [finest]
        fixed = [self._far(number, [self._at[number]] if number in free else lines[number]) for number in numbers]
        states = (state for state in islice(_cheapest(fixed), STATES) if free == [finest] or self._accepted(state))
        best: list[tuple[float, Kept]] = []
        for state in islice(states, FITTED):
            # What the others lose before anything of the free widths goes is lost in any case.
            if len(best) == BEST and fit.lost(self._kept_in(self._whole(state, free))) >= best[-1][0]:
                continue
            fitted = self._fitted(state, free, fit)
            if fitted is not None:
                best = sorted([*best, (fit.lost(fitted), fitted)], key=lambda pair: pair[0])[:BEST]
        return [kept for _, kept in best]

    def _fitted(self, state: State, free: Sequence[int], fit: Fit) -> Kept | None:
        """The widths at this state, but for the free ones, which meet the target; one of them in accepted steps."""
        groups = {group for number in free for group in self._coupled[number].groups}
        kept = fit.fitted(self._kept_in(state), groups)
        if kept is None:
            return None
        found = self._state(kept)
        for line in range(found[free[0]], max(-1, found[free[0]] - ASKED), -1):
            lower = _moved(found, free[0], line)
            if self._accepted(lower):
                return self._kept_in(lower)
        return None

    def _finest(self, fit: Fit) -> int | None:
        """The width of which one step changes least of what the target limits."""
        effects: list[tuple[float, int]] = []
        for number, coupled in enumerate(self._coupled):
            last = len(coupled.counts) - 1
            ends = [fit.misses(self._kept_in(_moved(self._at, number, line))) for line in (0, last)]
            if ends[1] > ends[0]:
                effects.append(((ends[1] - ends[0]) / last, number))
        return min(effects)[1] if effects else None

    def _free(self, lines: Sequence[Sequence[int]]) -> list[int]:
        """The widths that the configuration ties to no other; none where it ties none, since then the class does."""
        free = [number for number in range(len(lines)) if self._is_free(number, lines)]
        return free if len(free) < len(lines) else []

    def _is_free(self, number: int, lines: Sequence[Sequence[int]]) -> bool:
        """Whether what the configuration accepts of the other widths, one by one, is the same beside each of this."""
        own = [line for line in lines[number] if abs(line - self._at[number]) <= 1]
        for other in range(len(self._coupled)):
            for line in lines[other] if other != number else ():
                state = _moved(self._at, other, line)
                if len({self._accepted(_moved(state, number, mine)) for mine in own}) > 1:
                    return False
        return True

    def _lines(self, number: int) -> list[int]:
        """States of one width that are near, and the nearest that are accepted beside the others as they are."""
        at, count = self._at[number], len(self._coupled[number].counts)
        chosen = set(range(max(0, at - NEAR), min(count, at + NEAR + 1)))
        for way in (range(at - 1, -1, -1), range(at + 1, count)):
            fit = (line for line in islice(way, ASKED) if self._accepted(_moved(self._at, number, line)))
            chosen.update(islice(fit, NEAR))
        return sorted(chosen)

    def _far(self, number: int, lines: Sequence[int]) -> list[tuple[float, int]]:
        """Each line with how far its share is from that which was decided, the nearest first."""
        counts = self._coupled[number].counts[:, 0]
        share = counts / counts[-1]
        return sorted((abs(float(share[line] - share[self._at[number]])), line) for line in lines)

    def _state(self, kept: Mapping[Group, int]) -> State:
        """The state in which groups keep so many channels, or the nearest one."""
        return tuple(int(abs(one.counts[:, 0] - kept[one.groups[0]]).argmin()) for one in self._coupled)

    def _whole(self, state: State, free: Collection[int]) -> State:
        """A state with these widths whole."""
        return tuple(len(self._coupled[i].counts) - 1 if i in free else line for i, line in enumerate(state))

    def _kept_in(self, state: State) -> Kept:
        kept = dict(self._kept)
        for one, line in zip(self._coupled, state, strict=True):
            kept.update(zip(one.groups, one.counts[line].tolist(), strict=True))
        return kept

    def _accepted(self, state: State) -> bool:
        if state not in self._known:
            lines = [one.counts[line, 0] for one, line in zip(self._coupled, state, strict=True)]
            shares = [Fraction(int(n), one.groups[0].channels) for n, one in zip(lines, self._coupled, strict=True)]
            self._known[state] = self._accepts(shares)
        return self._known[state]


def _moved(state: State, number: int, line: int) -> State:
    return (*state[:number], line, *state[number + 1 :])


def _cheapest(options: Sequence[Sequence[tuple[float, int]]]) -> Iterator[State]:
    """One of each of `options`, which are pairs of a cost and a value, the cheapest first; those of least sum first.

    Example:
        >>> list(_cheapest([[(0, 5), (2, 6)], [(0, 7), (1, 8)]]))
        [(5, 7), (5, 8), (6, 7), (6, 8)]
    """
    start: State = (0,) * len(options)
    waiting: list[tuple[float, State]] = [(sum(one[0][0] for one in options), start)]
    seen: set[State] = {start}
    while waiting:
        _, places = heappop(waiting)
        yield tuple(one[place][1] for one, place in zip(options, places, strict=True))
        for i in range(len(options)):
            following = _moved(places, i, places[i] + 1)
            if following[i] < len(options[i]) and following not in seen:
                seen.add(following)
                cost = sum(one[place][0] for one, place in zip(options, following, strict=True))
                heappush(waiting, (cost, following))
