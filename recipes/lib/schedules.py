"""Collectives by hand: who sends which part of what to whom, round by round. Pure, no torch.

A schedule is plain data: the same one is drawn, checked here without any process (`contents`), and carried out with
nothing but send and receive (`recipes.lib.by_hand`). In a round every rank may send and receive at the same time, as
a network card can.

The parts of an array of S bytes are numbered. A schedule with `parts == ranks` moves S/n bytes in a transfer, one with
`parts == 1` all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

ROOT = 0


@dataclass(frozen=True)
class Transfer:
    """One message of a round."""

    sender: int
    receiver: int
    taken_from: int
    """The part that the sender sends."""
    put_into: int
    """The part into which the receiver puts it."""
    adds: bool = False
    """The receiver adds it to what it has, instead of replacing that."""


@dataclass(frozen=True)
class Schedule:
    """A collective by hand, for so many ranks."""

    name: str
    collective: str
    """The one of torch that does the same."""
    ranks: int
    parts: int
    rounds: tuple[tuple[Transfer, ...], ...]
    from_copy: bool = False
    """Parts are taken from the array as it was at first: what arrives must not overwrite what is still to be sent."""

    def bytes_sent(self, size: int) -> int:
        """By the rank that sends most, for an array of `size` bytes."""
        counts = [0] * self.ranks
        for messages in self.rounds:
            for transfer in messages:
                counts[transfer.sender] += 1
        return max(counts) * size // self.parts


def ring_all_reduce(ranks: int) -> Schedule:
    """Each part travels once around the ring and is added up, then once more and is handed out.

    2(n-1) rounds of S/n bytes: every rank sends 2(n-1)/n S in all, whatever n is. Nothing needs fewer bytes; but the
    number of rounds, and so the time of a small message, grows with n.
    """
    adding = [
        tuple(
            Transfer(rank, (rank + 1) % ranks, (rank - step) % ranks, (rank - step) % ranks, adds=True)
            for rank in range(ranks)
        )
        for step in range(ranks - 1)
    ]
    # Rank r now holds the whole sum of part r+1.
    handing = [
        tuple(
            Transfer(rank, (rank + 1) % ranks, (rank + 1 - step) % ranks, (rank + 1 - step) % ranks)
            for rank in range(ranks)
        )
        for step in range(ranks - 1)
    ]
    return Schedule("ring all-reduce", "all_reduce", ranks, ranks, (*adding, *handing))


def tree_all_reduce(ranks: int) -> Schedule:
    """Sums go up a binary tree to rank 0, and the result comes down again.

    2 log2(n) rounds: few, so that small messages are fast; but each moves all S bytes, and most ranks wait.
    """
    up = tuple(
        tuple(Transfer(receiver, sender, 0, 0, adds=True) for sender, receiver in messages)
        for messages in reversed(list(_doubling(ranks)))
    )
    return Schedule("tree all-reduce", "all_reduce", ranks, 1, up + tree_broadcast(ranks).rounds)


def tree_broadcast(ranks: int) -> Schedule:
    """Who has it sends it on: 1, 2, 4, ... ranks have it after each round."""
    rounds = tuple(
        tuple(Transfer(sender, receiver, 0, 0) for sender, receiver in messages)
        for messages in _doubling(ranks)
    )
    return Schedule("tree broadcast", "broadcast", ranks, 1, rounds)


def direct_scatter(ranks: int) -> Schedule:
    """The root sends every rank its part, one after the other: the root's link is the narrow place."""
    rounds = tuple((Transfer(ROOT, rank, rank, rank),) for rank in range(1, ranks))
    return Schedule("scatter", "scatter", ranks, ranks, rounds)


def direct_gather(ranks: int) -> Schedule:
    """Every rank sends its part to the root."""
    rounds = tuple((Transfer(rank, ROOT, rank, rank),) for rank in range(1, ranks))
    return Schedule("gather", "gather", ranks, ranks, rounds)


def shifted_all_to_all(ranks: int) -> Schedule:
    """In round k every rank sends to the k-th after it, so that nobody receives from two at once."""
    rounds = tuple(
        tuple(Transfer(rank, (rank + shift) % ranks, (rank + shift) % ranks, rank) for rank in range(ranks))
        for shift in range(1, ranks)
    )
    return Schedule("all-to-all", "all_to_all", ranks, ranks, rounds, from_copy=True)


def _doubling(ranks: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds of (has it, gets it): distances 1, 2, 4, ... from the root."""
    distance = 1
    while distance < ranks:
        yield [(rank, rank + distance) for rank in range(min(distance, ranks - distance))]
        distance *= 2


SCHEDULES: Mapping[str, Callable[[int], Schedule]] = {
    "broadcast": tree_broadcast,
    "scatter": direct_scatter,
    "gather": direct_gather,
    "ring_all_reduce": ring_all_reduce,
    "tree_all_reduce": tree_all_reduce,
    "all_to_all": shifted_all_to_all,
}

Content = frozenset[tuple[int, int]]
"""What a part of a rank's array is made of: (rank, part) of the arrays at first, added up. Empty: nothing yet."""


def contents(schedule: Schedule) -> list[list[list[Content]]]:
    """What every part on every rank holds before the first round and after each: [round][rank][part].

    Raises ValueError for a schedule that adds the same number twice, sends what is not there, or makes a rank send or
    receive two messages in one round.
    """
    state = [
        [_at_first(schedule, rank, part) for part in range(schedule.parts)] for rank in range(schedule.ranks)
    ]
    first, seen = [list(row) for row in state], [[list(row) for row in state]]
    for number, messages in enumerate(schedule.rounds, start=1):
        where = f"{schedule.name}, round {number}"
        for ends in ([each.sender for each in messages], [each.receiver for each in messages]):
            if len(set(ends)) < len(ends):
                raise ValueError(f"{where}: a rank sends or receives twice")
        sent = [(first if schedule.from_copy else state)[each.sender][each.taken_from] for each in messages]
        for transfer, content in zip(messages, sent, strict=True):
            mine = state[transfer.receiver][transfer.put_into]
            if not content or (transfer.adds and mine & content):
                raise ValueError(f"{where}: {transfer} sends nothing, or what is there already")
            state[transfer.receiver][transfer.put_into] = mine | content if transfer.adds else content
        seen.append([list(row) for row in state])
    return seen


def _at_first(schedule: Schedule, rank: int, part: int) -> Content:
    holds = {
        "broadcast": rank == ROOT,
        "scatter": rank == ROOT,
        "gather": rank == part,
        "all_reduce": True,
        "all_to_all": True,
    }[schedule.collective]
    return frozenset({(rank, part)}) if holds else frozenset()
