"""Who does what when in a pipeline of stages: the order of each rank, and how long it takes in the best case. No torch.

A stage is a part of the layers; several stages may be on one rank. In each stage every microbatch is computed forward
(F), then backward: at once (B), or in two halves (zero bubble), first what the stage before waits for, the gradient of
the input (I), and some time later what nobody waits for, the gradient of the weights (W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
UNITS: Mapping[str, float] = {FORWARD: 1.0, BACKWARD: 2.0, INPUT: 1.0, WEIGHT: 1.0}
"""Time of each kind in units of a forward pass: a matrix product has two products in its backward pass."""


@dataclass(frozen=True)
class Action:
    """One thing that a rank does, without a break."""

    kind: str
    """F, B, I or W."""
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Order = Sequence[Sequence[Action]]
"""For each rank its actions, one after the other."""


@dataclass(frozen=True)
class Span:
    """When something was done. The unit is the caller's."""

    rank: int
    action: Action
    begin: float
    end: float


class Stuck(ValueError):
    """Every rank waits for another: the order cannot be carried out."""


def gpipe(ranks: int, microbatches: int) -> Order:
    """All forward, then all backward (arXiv 1811.06965): simple, and every microbatch's activations are kept."""
    return [
        [Action(kind, rank, number) for kind in (FORWARD, BACKWARD) for number in range(microbatches)]
        for rank in range(ranks)
    ]


def one_forward_one_backward(ranks: int, microbatches: int) -> Order:
    """1F1B (PipeDream-flush, arXiv 2006.09503): each microbatch goes backward as soon as it can.

    The same bubble as GPipe's, but a rank keeps the activations of at most as many microbatches as there are ranks
    from it to the end.
    """
    order = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, microbatches)
        actions = [Action(FORWARD, rank, number) for number in range(ahead)]
        for number in range(microbatches):
            if ahead + number < microbatches:
                actions.append(Action(FORWARD, rank, ahead + number))
            actions.append(Action(BACKWARD, rank, number))
        order.append(actions)
    return order


def best_case(
    order: Order, seconds_of: Callable[[Action], float] = lambda action: UNITS[action.kind]
) -> list[Span]:
    """When each action begins and ends if messages take no time and every rank begins as soon as it may.

    Raises Stuck.
    """
    last_stage = max(action.stage for actions in order for action in actions)
    ends: dict[Action, float] = {}
    free = [0.0] * len(order)
    position = [0] * len(order)
    spans: list[Span] = []
    while len(spans) < sum(map(len, order)):
        before = len(spans)
        for rank, actions in enumerate(order):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                needed = [_first_known(ends, each) for each in _needed_by(action, last_stage)]
                if None in needed:
                    break
                begin = max([free[rank], *(end for end in needed if end is not None)])
                ends[action] = free[rank] = begin + seconds_of(action)
                spans.append(Span(rank, action, begin, free[rank]))
                position[rank] += 1
        if len(spans) == before:
            waiting = [str(a[p]) for a, p in zip(order, position, strict=True) if p < len(a)]
            raise Stuck(f"{', '.join(waiting)} wait for one another")
    return spans


def _needed_by(action: Action, last_stage: int) -> list[list[Action]]:
    """What must have ended before; of each inner list, one."""
    stage, number = action.stage, action.microbatch
    if action.kind == FORWARD:
        return [[Action(FORWARD, stage - 1, number)]] if stage else []
    if action.kind == WEIGHT:
        return [[Action(INPUT, stage, number)]]
    needed = [[Action(FORWARD, stage, number)]]
    if stage < last_stage:
        needed.append([Action(BACKWARD, stage + 1, number), Action(INPUT, stage + 1, number)])
    return needed


def _first_known(ends: Mapping[Action, float], any_of: Sequence[Action]) -> float | None:
    return next((ends[action] for action in any_of if action in ends), None)


def bubble(spans: Sequence[Span]) -> float:
    """The part of all ranks' time, from the first begin to the last end, in which they do nothing."""
    ranks = {span.rank for span in spans}
    length = max(span.end for span in spans) - min(span.begin for span in spans)
    busy = sum(span.end - span.begin for span in spans)
    return 1 - busy / (length * len(ranks))


@dataclass(frozen=True)
class Prediction:
    """A published formula for the bubble as a part of all time; p ranks, m microbatches, v stages on each rank.

    Publications divide the bubble by the time of the work. The backward pass takes twice the forward pass here, in two
    equal halves where it is split.
    """

    formula: str
    source: str
    of: Callable[[int, int, int], float]
    """Of p, m and v."""


def _fill_and_drain(p: int, m: int, v: int) -> float:
    return (p - 1) / (v * m + p - 1)


def _zero_bubble(p: int, m: int, v: int) -> float:
    return (p - 1) / (3 * v * m + p - 1)


def _dual_pipe(p: int, m: int, v: int) -> float:
    return 2 * (p - 1) / (3 * v * m + 2 * (p - 1))


_GPIPE = Prediction("(p-1)/(m+p-1)", "GPipe, arXiv 1811.06965", _fill_and_drain)
_1F1B = Prediction("(p-1)/(m+p-1)", "Megatron-LM, arXiv 2104.04473", _fill_and_drain)
_INTERLEAVED = Prediction("(p-1)/(vm+p-1)", "Megatron-LM, arXiv 2104.04473", _fill_and_drain)
_BREADTH_FIRST = Prediction("(p-1)/(vm+p-1)", "breadth-first, arXiv 2211.05953", _fill_and_drain)
_ZB1P = Prediction("(p-1)/(3vm+p-1)", "ZB-H1 in arXiv 2401.10241", _zero_bubble)
# The paper calls it zero because it counts each rank from its own beginning. What is left is that rank r cannot begin
# before r forward passes of others.
_ZBV = Prediction("(p-1)/(3vm+p-1) for m >= 2p", "ZB-V in arXiv 2401.10241", _zero_bubble)
_DUAL_PIPE_V = Prediction("at most 2(p-1)/(3vm+2(p-1))", "github.com/deepseek-ai/DualPipe", _dual_pipe)


@dataclass(frozen=True)
class Style:
    """What is known of a schedule before it is built."""

    predicted: Prediction
    by_hand: bool = False
    stages_per_rank: int = 1
    """What it is made for."""
    any_stages: bool = False
    """Whether another number will do."""
    is_v: bool = False
    """Whether the stages go from the first rank to the last and back (two ranks: 0 3 and 1 2), or each time begin
    again at the first (0 2 and 1 3)."""
    splits_backward: bool = False

    def stages_of(self, rank: int, ranks: int, stages_per_rank: int) -> list[int]:
        """The numbers of the stages on a rank, ascending."""
        if self.is_v:
            return [rank, 2 * ranks - 1 - rank]
        return [rank + ranks * turn for turn in range(stages_per_rank)]


SCHEDULES: Mapping[str, Style] = {
    "gpipe_by_hand": Style(_GPIPE, by_hand=True),
    "1f1b_by_hand": Style(_1F1B, by_hand=True),
    "GPipe": Style(_GPIPE),
    "1F1B": Style(_1F1B),
    "LoopedBFS": Style(_BREADTH_FIRST, stages_per_rank=2, any_stages=True),
    "Interleaved1F1B": Style(_INTERLEAVED, stages_per_rank=2, any_stages=True),
    "InterleavedZeroBubble": Style(_ZB1P, stages_per_rank=2, any_stages=True, splits_backward=True),
    "ZBVZeroBubble": Style(_ZBV, stages_per_rank=2, is_v=True, splits_backward=True),
    "DualPipeV": Style(_DUAL_PIPE_V, stages_per_rank=2, is_v=True, splits_backward=True),
}
"""By the value of the argument `schedule`: ours, then those of torch.distributed.pipelining under torch's names."""
