"""In: what a layer costs on each device, in bytes and seconds. Out: which layers lie where, exactly the best for a schedule. Pure.

Layers are alike, so a placement is an order of devices and how many layers each takes; embedding and head lie at the ends. Two
aims: `naive` (one device computes at a time) makes the sum of all stages smallest, `pipelined` (all compute at once) the sum and m − 1
times the slowest of them, m micro batches of a step: the first goes through all stages, the others follow as fast as the slowest lets
them. The search goes from the last layer to the first over sets of devices: how much a stage of a pipeline has in flight depends
only on how many stages come after it. It is exact, of devices that are alike any one is taken, and 8 unlike ones with 80 layers take
less than a second.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.pipeline import Order, in_flight

Schedule = Literal["naive", "pipelined"]

# A pipeline's search ends where nothing can be better by more than this, or after so many bounds on its slowest stage; sets of many
# unlike devices are large.
_AS_GOOD, _MOST_BOUNDS, _FEW_BOUNDS, _FEW_KINDS = 1e-4, 200, 4, 5


@dataclass(frozen=True)
class Moment:
    """What a device holds at one moment of a step, in bytes.

    Args:
        layer: of each of its layers: weights, adapter, optimizer state, gradients that are there.
        flying: of each layer and each micro batch in flight: what it keeps for the backward pass.
        working: of the one layer that computes; nothing on a device without layers.
        embedding, head: at the two ends, where they lie.
    """

    layer: int = 0
    flying: int = 0
    working: int = 0
    embedding: int = 0
    head: int = 0


@dataclass(frozen=True)
class Layers:
    """What the model needs, whatever device it lies on; bytes of one micro batch.

    Args:
        num: layers.
        keeping, recomputing: the moments at which a device can be fullest, where activations are kept or computed again.
        input_bytes: hidden states, which go from one device to the next, forward and backward; a stage of a pipeline keeps its output
            until the gradient of it has come.
        logits_bytes: logits and loss of a further micro batch in flight, where the head is.
        ends_together: embedding and head share weights, or code that cannot have them apart.
    """

    num: int
    keeping: tuple[Moment, ...]
    recomputing: tuple[Moment, ...]
    ends_together: bool = False
    input_bytes: int = 0
    logits_bytes: int = 0


@dataclass(frozen=True)
class Place:
    """A device that layers can lie on.

    Args:
        budget_bytes: free memory, less what the process itself takes.
        keep_s, recompute_s: seconds of one layer, forward and backward, a micro batch; with its activations kept, or computed again.
        embedding_s, head_s: the same of the ends.
        hand_over_s: seconds in which the hidden states of a micro batch leave or reach it, forward and backward.
    """

    budget_bytes: int
    keep_s: float
    recompute_s: float
    embedding_s: float
    head_s: float
    hand_over_s: float


@dataclass(frozen=True)
class Stage:
    """Layers [start, stop) on a device, which is a position in the list of places."""

    device: int
    start: int
    stop: int
    recompute: bool
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Placement:
    """Stages in the order of the layers; `seconds` is what the search makes smallest: of a micro batch (naive), of a step (pipelined)."""

    stages: tuple[Stage, ...]
    seconds: float


@dataclass(frozen=True)
class _Piece:
    """Seconds of a device with `low` to `high` layers: fixed + slope × layers."""

    low: int
    high: int
    fixed: float
    slope: float
    recompute: bool


_Adding = Callable[
    [list[float], _Piece], Iterator[tuple[int, float, int]]
]  # (i, seconds, layers taken), as `_added_sum`


def place(
    layers: Layers,
    places: Sequence[Place],
    schedule: Schedule,
    micro_batches: int = 1,
    recompute: bool | None = None,
    order: Order = "1f1b",
) -> Placement | None:
    """The best placement, or None where nothing fits; the arguments are `Search`'s."""
    return Search(layers, places, schedule, micro_batches, recompute, order).best()


def _slowest(placement: Placement) -> float:
    return max(stage.seconds for stage in placement.stages)


def _sum(placement: Placement) -> float:
    return sum(stage.seconds for stage in placement.stages)


class Search:
    """A table of sets of devices (of bits): the last i layers, and the head, on the devices of a set take so many seconds at least.

    Args:
        micro_batches: of a step; in a pipeline several are in flight, by its order.
        recompute: True or False for every device; None chooses for each.
    """

    def __init__(
        self,
        layers: Layers,
        places: Sequence[Place],
        schedule: Schedule,
        micro_batches: int = 1,
        recompute: bool | None = None,
        order: Order = "1f1b",
    ) -> None:
        self.layers = layers
        self.places = places
        self.naive = schedule == "naive"
        self.micro_batches = micro_batches
        self.order = order
        # Of places that are alike the first is used before the next: any other order costs the same.
        self.twins = [max((j for j in range(i) if places[j] == place), default=i) for i, place in enumerate(places)]
        self.kinds = [next(j for j, other in enumerate(places) if other == place) for place in places]
        self.modes = (False, True) if recompute is None else (recompute,)
        # Every stage of a pipeline needs a micro batch to work on; one that is alone is none.
        self.least_stages, self.most_stages = 1, len(places)
        if not self.naive:
            self.least_stages, self.most_stages = 2, min(len(places), micro_batches)
        self.most_bounds = _MOST_BOUNDS if len(set(places)) <= _FEW_KINDS else _FEW_BOUNDS

    def placement(self, stages: Sequence[Stage]) -> Placement:
        """These stages with the seconds that the search compares."""
        seconds = [stage.seconds for stage in stages]
        waiting = 0.0 if self.naive else (self.micro_batches - 1) * max(seconds)
        return Placement(tuple(stages), sum(seconds) + waiting)

    def given(self, parts: Sequence[tuple[int, int]]) -> Placement | None:
        """The placement of these (device, number of layers) in this order, of all layers; None where it does not fit."""
        stages: list[Stage] = []
        for at, (device, num) in enumerate(parts):
            after_it, start = len(parts) - 1 - at, stages[-1].stop if stages else 0
            pieces = [piece for piece in self.pieces(device, after_it, at == 0) if piece.low <= num <= piece.high]
            if not pieces:
                return None
            stages.append(self.stage(device, start, num, after_it, pieces[0].recompute, at == 0))
        return self.placement(stages)

    def best(self) -> Placement | None:
        """Of a pipeline the sum is made smallest under bounds on the slowest stage, until no other bound can be better.

        Between two bounds nothing takes less than the sum at the larger one and (m − 1) × the smaller one.
        """
        if self.naive:
            return self._smallest_sum(math.inf)
        slowest = self._fill(self._added_max, math.inf)
        if slowest is None:
            return None
        tight, loose = self._smallest_sum(_slowest(slowest)), self._smallest_sum(math.inf)
        assert tight is not None, "it has the slowest stage of one that was found"
        assert loose is not None, "it may be any"
        best, others = min(tight, loose, key=lambda found: found.seconds), self.micro_batches - 1
        between = [(_sum(loose) + others * _slowest(tight), _slowest(tight), _slowest(loose), _sum(loose))]
        for _ in range(self.most_bounds):
            if not between or min(between)[0] >= best.seconds * (1 - _AS_GOOD):
                break
            _, lower, upper, sum_at_upper = heapq.heappop(between)
            bound = (lower + upper) / 2
            found = self._smallest_sum(bound)
            if found is None:
                continue
            best = min(best, found, key=lambda one: one.seconds)
            heapq.heappush(between, (_sum(found) + others * lower, lower, _slowest(found), _sum(found)))
            heapq.heappush(between, (sum_at_upper + others * bound, bound, upper, sum_at_upper))
        return best

    def _smallest_sum(self, bound: float) -> Placement | None:
        """The placement with the smallest sum of which no stage takes longer than `bound`."""
        return self._fill(self._added_sum, bound * (1 + 1e-9))

    def _fill(self, added: _Adding, bound: float) -> Placement | None:
        """Fill the table set by set, those of one device first, then read the best way back."""
        num = self.layers.num
        sets: dict[int, list[float]] = {0: [0.0 if i == 0 else math.inf for i in range(num + 1)]}
        came: dict[tuple[int, int], tuple[int, int, bool]] = {}
        ending: tuple[float, int, int, int, bool] | None = None
        for num_used in range(self.most_stages):
            larger: dict[int, list[float]] = {}
            for used, cost in sets.items():
                for device in self._free(used):
                    after = used | 1 << device
                    for piece in self.pieces(device, num_used, is_first=False, bound=bound):
                        reached = larger.setdefault(after, [math.inf] * (num + 1))
                        for i, value, taken in added(cost, piece):
                            if value < reached[i]:
                                reached[i] = value
                                came[after, i] = (device, taken, piece.recompute)
                    if num_used + 1 < self.least_stages:
                        continue
                    for piece in self.pieces(device, num_used, is_first=True, bound=bound):
                        for i, value, taken in added(cost, piece):
                            if i == num and (ending is None or value < ending[0]):
                                ending = (value, used, device, taken, piece.recompute)
            sets = {used: cost for used, cost in larger.items() if min(cost) < math.inf}
        return None if ending is None else self._read_back(ending, came)

    def unused(self, devices: Sequence[int]) -> list[int]:
        """Devices beside these; of those that are alike the first."""
        return list(self._free(sum(1 << device for device in devices)))

    def _free(self, used: int) -> Iterator[int]:
        """Devices that are not in a set; of those that are alike the first."""
        for device, twin in enumerate(self.twins):
            if not used >> device & 1 and (twin == device or used >> twin & 1):
                yield device

    def pieces(self, device: int, after_it: int, is_first: bool, bound: float = math.inf) -> Iterator[_Piece]:
        """Times of a device as a stage with so many stages after it, none beyond `bound`; nothing where not even its ends fit."""
        layers, here, is_last = self.layers, self.places[device], after_it == 0
        has_head = is_first if layers.ends_together else is_last
        hand_overs = (not is_last) + (not is_first)
        if layers.ends_together and not (is_first and is_last):
            hand_overs += is_first + is_last  # the hidden states go back to where the head is
        fixed = here.embedding_s * is_first + here.head_s * has_head + here.hand_over_s * hand_overs
        low = 0 if is_first or is_last else 1  # an end may hold no layer
        for recompute in self.modes:
            high = self._fit(device, after_it, is_first, recompute)
            if high >= low:
                slope = here.recompute_s if recompute else here.keep_s
                in_time = high if bound == math.inf else math.floor((bound - fixed) / slope) if slope else high
                if min(high, in_time) >= low:
                    yield _Piece(low, min(high, in_time), fixed, slope, recompute)
                low = high + 1  # computing again is for what does not fit otherwise

    def _fit(self, device: int, after_it: int, is_first: bool, recompute: bool) -> int:
        """The most layers of which it has room; -1 where there is none even for its ends."""
        budget, most = self.places[device].budget_bytes, self.layers.num
        for ends, working, each in self._memory(after_it, is_first, recompute):
            if ends > budget:
                return -1
            most = min(most, (budget - ends - working) // max(1, each))
        return max(0, most)  # ends without a layer have no layer at work

    def _memory(self, after_it: int, is_first: bool, recompute: bool) -> Iterator[tuple[int, int, int]]:
        """Bytes of a stage at each moment: of the ends that lie there, of the layer at work, of each layer."""
        layers, is_last = self.layers, after_it == 0
        flying, passing = 1, 0
        has_head = is_first if layers.ends_together else is_last
        if not self.naive:
            flying = in_flight(self.order, after_it, self.micro_batches)
            # Outputs in flight, the gradient of one that comes, and that of an input which goes.
            passing = layers.input_bytes * ((flying + 1) * (not is_last) + (not is_first))
            passing += (flying - 1) * layers.logits_bytes * has_head
        for moment in layers.recomputing if recompute else layers.keeping:
            each = moment.layer + flying * moment.flying
            yield moment.embedding * is_first + moment.head * has_head + passing, moment.working, each

    def _added_sum(self, before: list[float], piece: _Piece) -> Iterator[tuple[int, float, int]]:
        """(i, seconds, layers taken) of the best way to reach i layers with this piece on top of what was there before.

        before[j] + fixed + slope (i - j): the least over a window of j that slides with i.
        """
        window: deque[int] = deque()
        for i in range(piece.low, self.layers.num + 1):
            j = i - piece.low
            if before[j] < math.inf:
                level = before[j] - piece.slope * j
                while window and before[window[-1]] - piece.slope * window[-1] >= level:
                    window.pop()
                window.append(j)
            while window and i - window[0] > piece.high:
                window.popleft()
            if window:
                j = window[0]
                yield i, before[j] + piece.fixed + piece.slope * (i - j), i - j

    def _added_max(self, before: list[float], piece: _Piece) -> Iterator[tuple[int, float, int]]:
        """The same of max(before[i - n], fixed + slope n): taking more layers makes one side larger and the other smaller."""
        reached = [j for j, value in enumerate(before) if value < math.inf]  # a range without gaps
        if not reached:
            return
        for i in range(reached[0] + piece.low, min(self.layers.num, reached[-1] + piece.high) + 1):
            least, most = max(piece.low, i - reached[-1]), min(piece.high, i - reached[0])
            low, high = least, most
            while low < high:
                middle = (low + high) // 2
                if piece.fixed + piece.slope * middle >= before[i - middle]:
                    high = middle
                else:
                    low = middle + 1
            for n in {low, max(least, low - 1)}:
                yield i, max(before[i - n], piece.fixed + piece.slope * n), n

    def _read_back(
        self, ending: tuple[float, int, int, int, bool], came: dict[tuple[int, int], tuple[int, int, bool]]
    ) -> Placement:
        """The stages from the first to the last layer."""
        _, used, device, taken, recompute = ending
        stages, start, is_first = [], 0, True
        while True:
            after_it = used.bit_count()
            stages.append(self.stage(device, start, taken, after_it, recompute, is_first))
            start, is_first = start + taken, False
            if not used:
                return self.placement(stages)
            device, taken, recompute = came[used, self.layers.num - start]
            used &= ~(1 << device)

    def stage(self, device: int, start: int, taken: int, after_it: int, recompute: bool, is_first: bool) -> Stage:
        """A device with that many layers, priced."""
        piece = next(p for p in self.pieces(device, after_it, is_first) if p.recompute == recompute)
        fullest = self.fullest(after_it, is_first, recompute, taken)
        return Stage(device, start, start + taken, recompute, fullest, piece.fixed + piece.slope * taken)

    def least_bytes(self, parts: Sequence[tuple[int, int]]) -> list[int]:
        """What each device of a placement (as `given` has it) needs at least, whatever it has."""
        last = len(parts) - 1
        return [
            min(self.fullest(last - at, at == 0, mode, num) for mode in self.modes) for at, (_, num) in enumerate(parts)
        ]

    def fullest(self, after_it: int, is_first: bool, recompute: bool, taken: int) -> int:
        """Bytes of a stage with so many layers when it holds most."""
        moments = self._memory(after_it, is_first, recompute)
        return max(ends + (working + taken * each if taken else 0) for ends, working, each in moments)
