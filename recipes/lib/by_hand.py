"""Carrying out a schedule with nothing but send and receive."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.lib.collectives import Place
from recipes.lib.schedules import ROOT, Schedule, Transfer

NOTHING = -1.0
"""What stands where nothing has arrived yet. Memory that is merely uninitialized may hold the last call's right result,
and then a message that never came would go unnoticed."""


def carry_out(
    schedule: Schedule, place: Place, array: Tensor, after_round: Callable[[int], None] | None = None
) -> None:
    """Do this rank's part of the schedule on its array, in place; the array's length is a multiple of the parts.

    `after_round` is called with the number of each round, from 0, when this rank has its messages.
    """
    parts = array.chunk(schedule.parts)
    taken_from = array.clone().chunk(schedule.parts) if schedule.from_copy else parts
    arriving = torch.empty_like(parts[0])
    for number, messages in enumerate(schedule.rounds):
        mine = [each for each in messages if place.rank in (each.sender, each.receiver)]
        # All at once, not send then receive: two ranks that both send first would wait for each other for ever.
        operations = [_operation(each, place, taken_from, parts, arriving) for each in mine]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for transfer in mine:
            if transfer.receiver == place.rank and transfer.adds:
                parts[transfer.put_into].add_(arriving)
        if after_round is not None:
            after_round(number)


def _operation(
    transfer: Transfer,
    place: Place,
    taken_from: tuple[Tensor, ...],
    parts: tuple[Tensor, ...],
    arriving: Tensor,
) -> dist.P2POp:
    if transfer.sender == place.rank:
        return dist.P2POp(
            dist.isend, taken_from[transfer.taken_from], place.peer(transfer.receiver), place.group
        )
    into = arriving if transfer.adds else parts[transfer.put_into]
    return dist.P2POp(dist.irecv, into, place.peer(transfer.sender), place.group)


def like_torch(schedule: Schedule) -> Callable[[Place, Tensor, Tensor], None]:
    """The schedule as `Collective.run` is called: input and output where torch's own has them."""

    def run(place: Place, given: Tensor, out: Tensor) -> None:
        if schedule.collective in ("all_reduce", "broadcast"):
            carry_out(schedule, place, out)
        elif schedule.collective == "all_to_all":
            out.copy_(given)
            carry_out(schedule, place, out)
        elif schedule.collective == "scatter":
            # A rank other than the root has room for its own part alone; the others' parts never pass it.
            whole = given.clone() if place.rank == ROOT else out.new_full((len(out) * place.size,), NOTHING)
            carry_out(schedule, place, whole)
            out.copy_(whole.chunk(place.size)[place.rank])
        else:  # gather
            whole = out if place.rank == ROOT else out.new_full((len(given) * place.size,), NOTHING)
            whole.chunk(place.size)[place.rank].copy_(given)
            carry_out(schedule, place, whole)

    return run
