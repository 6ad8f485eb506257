"""Collectives as a benchmark needs them: what goes in, what must come out, and what the figures mean.

Sizes and bandwidths are nccl-tests' (doc/PERFORMANCE.md there), so that figures can be laid side by side:

    algorithm bandwidth = S / t                  S: bytes of the whole array, see `Collective.size_is`
    bus bandwidth       = S / t * bus_factor     what a link carried, comparable between numbers of ranks

A benchmark of a wrong result is worth nothing: `verify` runs a collective once on known numbers and says on which
rank which sender's numbers were wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.lib.distributed import World

MODULUS = 4093
"""Numbers are below this prime, so that sums over up to 4,096 ranks stay below 2**24: exact in float32."""

ELEMENT_BYTES = 4
"""float32 throughout: its sums of whole numbers are exact, in any order of additions."""

ROOT = 0

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One rank's place in the group that communicates."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """None is all ranks."""

    @classmethod
    def of(cls, world: World, group: dist.ProcessGroup | None = None) -> Place:
        """The place in `group`, or among all ranks."""
        if group is None:
            return cls(world.rank, world.size, world.device)
        return cls(dist.get_rank(group), dist.get_world_size(group), world.device, group)

    def peer(self, rank: int) -> int:
        """The rank among all of the group's rank: torch wants that for roots and partners."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


@dataclass(frozen=True)
class Collective:
    """One collective. `given`, `expected` and `run` agree about S = `elements` float32 numbers."""

    name: str
    size_is: str
    """What S counts."""
    bus_factor: Callable[[int], float]
    """Of the number of ranks."""
    given: Callable[[Place, int], Tensor]
    """What a rank puts in."""
    expected: Callable[[Place, int], Tensor | None]
    """What must come out on a rank; None where nothing comes out."""
    empty: Callable[[Place, int, Tensor], Tensor]
    """Where the result goes: a new tensor, or the input itself."""
    run: Callable[[Place, Tensor, Tensor], None]
    """Input and output to be communicated; queued on a GPU, done on a CPU."""
    senders: Callable[[Place], Sequence[int]] | None
    """Whose numbers the output holds, part by part, by rank of the group; None where they are added up."""


def bandwidths(name: str, size: int, seconds: float, ranks: int) -> tuple[float, float]:
    """Algorithm and bus bandwidth in GB/s (10**9) of `size` bytes in `seconds`."""
    algorithm = size / seconds / 1e9
    return algorithm, algorithm * COLLECTIVES[name].bus_factor(ranks)


def rounded_elements(size: int, ranks: int) -> int:
    """Numbers in about `size` bytes: at least one for every rank, and as many for each."""
    return max(1, size // ELEMENT_BYTES // ranks) * ranks


# --- numbers that tell where they come from -----------------------------------------------------------------


def numbers(start: int, count: int, device: torch.device) -> Tensor:
    """`count` whole numbers from `start` up, modulo MODULUS."""
    return _repeated((torch.arange(MODULUS, device=device) + start) % MODULUS, count)


def summed(start: int, count: int, ranks: int, device: torch.device) -> Tensor:
    """Sum over all ranks r of numbers(start + r): by a table, since it repeats after MODULUS."""
    one = torch.arange(MODULUS, dtype=torch.float64)
    until = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cat([one, one]).cumsum(0)])
    whole, rest = divmod(ranks, MODULUS)
    table = until[rest : rest + MODULUS] - until[:MODULUS] + whole * one.sum()
    return _repeated(table.roll(-(start % MODULUS)).to(device), count)


def _repeated(table: Tensor, count: int) -> Tensor:
    return table.to(torch.float32).repeat(-(-count // MODULUS))[:count].contiguous()


def _addressed(sender: int, receiver: int, place: Place, elements: int) -> Tensor:
    """What `sender` has for `receiver`: another part for every pair."""
    return numbers(sender * place.size + receiver, elements // place.size, place.device)


def _for_everybody(sender: int, place: Place, elements: int) -> Tensor:
    return torch.cat([_addressed(sender, receiver, place, elements) for receiver in range(place.size)])


def _from_everybody(receiver: int, place: Place, elements: int) -> Tensor:
    return torch.cat([_addressed(sender, receiver, place, elements) for sender in range(place.size)])


def _own(place: Place, elements: int) -> Tensor:
    return numbers(place.rank, elements, place.device)


def _own_part(place: Place, elements: int) -> Tensor:
    return _addressed(place.rank, ROOT, place, elements)


def _before(place: Place) -> int:
    return (place.rank - 1) % place.size


def _unset(place: Place, count: int) -> Tensor:
    return torch.full((count,), -1.0, device=place.device)


def _in_place(place: Place, elements: int, given: Tensor) -> Tensor:
    return given


def _whole(place: Place, elements: int, given: Tensor) -> Tensor:
    return _unset(place, elements)


def _part(place: Place, elements: int, given: Tensor) -> Tensor:
    return _unset(place, elements // place.size)


# --- how torch is called ------------------------------------------------------------------------------------


# torch 2.13 gave both a new name and warns of the old one; 2.11 has the old one alone.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _scatter(place: Place, given: Tensor, out: Tensor) -> None:
    parts = list(given.chunk(place.size)) if place.rank == ROOT else None
    dist.scatter(out, parts, src=place.peer(ROOT), group=place.group)


def _gather(place: Place, given: Tensor, out: Tensor) -> None:
    parts = list(out.chunk(place.size)) if place.rank == ROOT else None
    dist.gather(given, parts, dst=place.peer(ROOT), group=place.group)


def _shift(place: Place, given: Tensor, out: Tensor) -> None:
    """Every rank to the next one. Batched: NCCL would make a communicator of two for a lone send."""
    after, before = place.peer((place.rank + 1) % place.size), place.peer(_before(place))
    sending = dist.P2POp(dist.isend, given, after, place.group)
    receiving = dist.P2POp(dist.irecv, out, before, place.group)
    for work in dist.batch_isend_irecv([sending, receiving]):
        work.wait()


_RING = "bytes of the array on each rank"
_PARTS = "bytes of all ranks' parts together"

COLLECTIVES: Mapping[str, Collective] = {
    each.name: each
    for each in (
        Collective(
            "all_reduce",
            _RING,
            lambda n: 2 * (n - 1) / n,
            given=_own,
            expected=lambda place, count: summed(0, count, place.size, place.device),
            empty=_in_place,
            run=lambda place, given, out: dist.all_reduce(out, group=place.group),
            senders=None,
        ),
        Collective(
            "all_gather",
            _PARTS,
            lambda n: (n - 1) / n,
            given=_own_part,
            expected=lambda place, count: _from_everybody(ROOT, place, count),
            empty=_whole,
            run=lambda place, given, out: all_gather_single(out, given, group=place.group),
            senders=lambda place: range(place.size),
        ),
        Collective(
            "reduce_scatter",
            _PARTS,
            lambda n: (n - 1) / n,
            given=_own,
            expected=lambda place, count: (
                summed(0, count, place.size, place.device).chunk(place.size)[place.rank].clone()
            ),
            empty=_part,
            run=lambda place, given, out: reduce_scatter_single(out, given, group=place.group),
            senders=None,
        ),
        Collective(
            "all_to_all",
            "bytes that each rank sends, its own part included",
            lambda n: (n - 1) / n,
            given=lambda place, count: _for_everybody(place.rank, place, count),
            expected=lambda place, count: _from_everybody(place.rank, place, count),
            empty=_whole,
            run=lambda place, given, out: dist.all_to_all_single(out, given, group=place.group),
            senders=lambda place: range(place.size),
        ),
        Collective(
            "broadcast",
            _RING,
            lambda n: 1.0,
            given=lambda place, count: _own(place, count) if place.rank == ROOT else _unset(place, count),
            expected=lambda place, count: numbers(ROOT, count, place.device),
            empty=_in_place,
            run=lambda place, given, out: dist.broadcast(out, place.peer(ROOT), group=place.group),
            senders=lambda place: [ROOT],
        ),
        Collective(
            "reduce",
            _RING,
            lambda n: 1.0,
            given=_own,
            expected=lambda place, count: (
                summed(0, count, place.size, place.device) if place.rank == ROOT else None
            ),
            empty=_in_place,
            run=lambda place, given, out: dist.reduce(out, place.peer(ROOT), group=place.group),
            senders=None,
        ),
        Collective(
            "scatter",
            _PARTS,
            lambda n: (n - 1) / n,
            given=lambda place, count: _for_everybody(ROOT, place, count),
            expected=lambda place, count: _addressed(ROOT, place.rank, place, count),
            empty=_part,
            run=_scatter,
            senders=lambda place: [ROOT],
        ),
        Collective(
            "gather",
            _PARTS,
            lambda n: (n - 1) / n,
            given=_own_part,
            expected=lambda place, count: _from_everybody(ROOT, place, count) if place.rank == ROOT else None,
            empty=_whole,
            run=_gather,
            senders=lambda place: range(place.size),
        ),
        Collective(
            "send_recv",
            "bytes that each rank sends to the next one",
            lambda n: 1.0,
            given=_own,
            expected=lambda place, count: numbers(_before(place), count, place.device),
            empty=_whole,
            run=_shift,
            senders=lambda place: [_before(place)],
        ),
    )
}


# --- is the result right? -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """What one rank received wrong."""

    receiver: int
    senders: tuple[int, ...]
    """Whose numbers were wrong."""


class WrongResult(Exception):
    """A collective gave another result than it must: its figures would mean nothing."""


def verify(
    collective: Collective,
    place: Place,
    elements: int,
    *,
    spoilt: int = -1,
    run: Callable[[Place, Tensor, Tensor], None] | None = None,
) -> list[Wrong]:
    """What is wrong with the result of one call, over all ranks and on all of them alike; [] for nothing.

    `run` in place of torch's own is another implementation of the same collective. Rank `spoilt` changes a number
    before it sends, as a broken one would.
    """
    given = collective.given(place, elements)
    if place.rank == spoilt:
        given[len(given) // 2] += 1
    kept = given.clone()
    out = collective.empty(place, elements, given)
    (run or collective.run)(place, given, out)
    expected = collective.expected(place, elements)
    mine: Wrong | None = None
    if expected is not None and not torch.equal(out, expected):
        senders = collective.senders(place) if collective.senders else ()
        parts = zip(senders, out.chunk(len(senders) or 1), expected.chunk(len(senders) or 1), strict=False)
        mine = Wrong(place.rank, tuple(who for who, found, right in parts if not torch.equal(found, right)))
    wrong = [each for each in _on_every_rank(mine, place) if each is not None]
    if wrong and collective.senders is None:
        # A sum does not tell whose part of it is wrong: look at the parts as they arrive elsewhere.
        return _traced(collective, place, elements, kept, wrong)
    return wrong


def _traced(
    collective: Collective, place: Place, elements: int, given: Tensor, wrong: list[Wrong]
) -> list[Wrong]:
    """The same errors with the ranks whose contributions reach the others wrong; empty where all arrive right."""
    arrived = [torch.empty_like(given) for _ in range(place.size)]
    dist.all_gather(arrived, given, group=place.group)
    spoilt = [
        rank
        for rank, found in enumerate(arrived)
        if not torch.equal(found, numbers(rank, elements, place.device))
    ]
    mine = tuple(spoilt) if any(each.receiver == place.rank for each in wrong) else None
    found = _on_every_rank(mine, place)
    return [Wrong(each.receiver, found[each.receiver] or ()) for each in wrong]


def _on_every_rank(mine: T, place: Place) -> list[T]:
    gathered: list[T] = [mine] * place.size
    dist.all_gather_object(gathered, mine, group=place.group)
    return gathered


def merged(wrong: Sequence[Wrong]) -> list[Wrong]:
    """One for each receiver, with every sender whose numbers reached it wrong. Pure."""
    receivers = sorted({each.receiver for each in wrong})
    senders = {
        receiver: {sender for each in wrong if each.receiver == receiver for sender in each.senders}
        for receiver in receivers
    }
    return [Wrong(receiver, tuple(sorted(senders[receiver]))) for receiver in receivers]


def blamed(wrong: Sequence[Wrong]) -> str:
    """Who is to blame, in words: the sender whose numbers are wrong wherever they arrive, or the receiver. Pure."""
    receivers = sorted({each.receiver for each in wrong})
    senders = {sender for each in wrong for sender in each.senders}
    if not senders:
        return f"the sum is wrong on {_ranks(receivers)}, though every rank's numbers arrive right"
    common = set.intersection(*(set(each.senders) for each in wrong))
    if len(receivers) == 1 and len(senders) > 1:
        return f"rank {receivers[0]} receives wrong numbers from {_ranks(sorted(senders))}"
    if len(common) == 1 and senders == common:
        (sender,) = common
        if receivers == [sender]:
            return f"rank {sender} has wrong numbers of its own"
        if len(receivers) == 1:
            return f"rank {receivers[0]} receives wrong numbers from rank {sender}: one of the two, or the way between"
        return f"rank {sender} sends wrong numbers"
    pairs = ", ".join(f"{_ranks(sorted(each.senders))} to {each.receiver}" for each in wrong)
    return f"wrong numbers arrive from {pairs}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
