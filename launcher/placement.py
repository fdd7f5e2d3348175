"""In: what a layer costs on each device, in bytes and seconds. Out: which layers lie where, exactly the best for a schedule. Pure.

Layers are alike, so a placement is an order of devices and how many layers each takes; embedding and head lie at the ends. Two
aims: `naive` (one device computes at a time) makes the sum of all times smallest, `pipelined` (all compute at once) the slowest
stage. The search goes from the last layer to the first over sets of devices: how much a stage of a pipeline has in flight depends
only on how many stages come after it. It is exact, and 8 unlike devices with 80 layers take a fraction of a second.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.pipeline import Order, in_flight

Schedule = Literal["naive", "pipelined"]


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
    """Stages in the order of the layers; `seconds` is the sum of all (naive) or the slowest (pipelined), a micro batch."""

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


def place(
    layers: Layers,
    places: Sequence[Place],
    schedule: Schedule,
    micro_batches: int = 1,
    recompute: bool | None = None,
    order: Order = "1f1b",
) -> Placement | None:
    """The best placement, or None where nothing fits.

    Args:
        micro_batches: of a step; in a pipeline several are in flight, by its order.
        recompute: True or False for every device; None chooses for each.
    """
    search = _Search(layers, places, schedule, micro_batches, recompute, order)
    return search.best()


def cost_of(
    layers: Layers,
    places: Sequence[Place],
    schedule: Schedule,
    micro_batches: int,
    recompute: bool | None,
    order: Order,
    ranges: Sequence[tuple[int, int]],
) -> Placement | None:
    """The placement that somebody has written down, first and last layer of each device in order; None where it does not fit.

    Raises:
        ValueError: the ranges are not those of all layers, or of more devices than there are.
    """
    if len(ranges) > len(places) or not ranges or ranges[-1][1] != layers.num - 1:
        raise ValueError(f"{len(ranges)} ranges up to layer {ranges[-1][1] if ranges else 0} for {layers.num} layers")
    search = _Search(layers, places, schedule, micro_batches, recompute, order)
    stages = []
    for device, (first, last) in enumerate(ranges):
        after_it, num = len(ranges) - 1 - device, last + 1 - first
        pieces = [piece for piece in search.pieces(device, after_it, first == 0) if piece.low <= num <= piece.high]
        if not pieces:
            return None
        stages.append(search.stage(device, first, num, after_it, pieces[0].recompute, first == 0))
    seconds = [stage.seconds for stage in stages]
    return Placement(tuple(stages), sum(seconds) if schedule == "naive" else max(seconds))


def needed_by(
    layers: Layers,
    num_places: int,
    schedule: Schedule,
    micro_batches: int,
    recompute: bool | None,
    order: Order,
    ranges: Sequence[tuple[int, int]],
) -> list[int]:
    """The least bytes that each device of such a placement needs, whatever it has."""
    nothing = Place(budget_bytes=0, keep_s=0, recompute_s=0, embedding_s=0, head_s=0, hand_over_s=0)
    search = _Search(layers, [nothing] * num_places, schedule, micro_batches, recompute, order)
    last = len(ranges) - 1
    return [
        min(search.fullest(last - at, first == 0, mode, last_layer + 1 - first) for mode in search.modes)
        for at, (first, last_layer) in enumerate(ranges)
    ]


class _Search:
    """`cost[used][i]`: the last i layers, and the head, on the devices in `used` (a set of bits): the least seconds."""

    def __init__(
        self,
        layers: Layers,
        places: Sequence[Place],
        schedule: Schedule,
        micro_batches: int,
        recompute: bool | None,
        order: Order,
    ) -> None:
        self.layers = layers
        self.places = places
        self.naive = schedule == "naive"
        self.micro_batches = micro_batches
        self.order = order
        # Of places that are alike the first is used before the next: any other order costs the same.
        self.twins = [max((j for j in range(i) if places[j] == place), default=i) for i, place in enumerate(places)]
        self.modes = (False, True) if recompute is None else (recompute,)

    def best(self) -> Placement | None:
        """Fill the table set by set, then read the best way back."""
        num, whole = self.layers.num, 1 << len(self.places)
        nothing = [0.0 if i == 0 else math.inf for i in range(num + 1)]
        cost: list[list[float]] = [nothing] + [[math.inf] * (num + 1) for _ in range(whole - 1)]
        came: dict[tuple[int, int], tuple[int, int, bool]] = {}
        ending: tuple[float, int, int, int, bool] | None = None
        for used in range(whole - 1):
            if not any(value < math.inf for value in cost[used]):
                continue
            for device in range(len(self.places)):
                if used >> device & 1 or (self.twins[device] != device and not used >> self.twins[device] & 1):
                    continue
                after = used | 1 << device
                for piece in self.pieces(device, used.bit_count(), is_first=False):
                    for i, value, taken in self._added(cost[used], piece):
                        if value < cost[after][i]:
                            cost[after][i] = value
                            came[after, i] = (device, taken, piece.recompute)
                for piece in self.pieces(device, used.bit_count(), is_first=True):
                    for i, value, taken in self._added(cost[used], piece):
                        if i == num and (ending is None or value < ending[0]):
                            ending = (value, used, device, taken, piece.recompute)
        return None if ending is None else self._read_back(ending, came)

    def pieces(self, device: int, after_it: int, is_first: bool) -> Iterator[_Piece]:
        """Times of a device as a stage with so many stages after it; nothing where not even its ends fit."""
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
                yield _Piece(low, high, fixed, here.recompute_s if recompute else here.keep_s, recompute)
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

    def _added(self, before: list[float], piece: _Piece) -> Iterator[tuple[int, float, int]]:
        """(i, seconds, layers taken) of the best way to reach i layers with this piece on top of what was there before."""
        return self._added_sum(before, piece) if self.naive else self._added_max(before, piece)

    def _added_sum(self, before: list[float], piece: _Piece) -> Iterator[tuple[int, float, int]]:
        """before[j] + fixed + slope (i - j): the least over a window of j that slides with i."""
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
        """max(before[i - n], fixed + slope n): taking more layers makes one side larger and the other smaller."""
        reached = [j for j, value in enumerate(before) if value < math.inf]  # a range without gaps
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
        seconds, used, device, taken, recompute = ending
        stages, start, is_first = [], 0, True
        while True:
            after_it = used.bit_count()
            stages.append(self.stage(device, start, taken, after_it, recompute, is_first))
            start, is_first = start + taken, False
            if not used:
                return Placement(tuple(stages), seconds)
            device, taken, recompute = came[used, self.layers.num - start]
            used &= ~(1 << device)

    def stage(self, device: int, start: int, taken: int, after_it: int, recompute: bool, is_first: bool) -> Stage:
        """A device with that many layers, priced."""
        piece = next(p for p in self.pieces(device, after_it, is_first) if p.recompute == recompute)
        fullest = self.fullest(after_it, is_first, recompute, taken)
        return Stage(device, start, start + taken, recompute, fullest, piece.fixed + piece.slope * taken)

    def fullest(self, after_it: int, is_first: bool, recompute: bool, taken: int) -> int:
        """Bytes of a stage with so many layers when it holds most."""
        moments = self._memory(after_it, is_first, recompute)
        return max(ends + (working + taken * each if taken else 0) for ends, working, each in moments)
