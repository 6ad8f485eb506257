"""Several ranks that talk for real, over gloo. Run by test_communication.py under torchrun; rank 0 prints JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recipes.lib.by_hand import carry_out, like_torch
from recipes.lib.collectives import COLLECTIVES, Place, blamed, verify
from recipes.lib.distributed import World, joined
from recipes.lib.late_ranks import late_rank, waits
from recipes.lib.pairs import measure_pairs
from recipes.lib.schedules import SCHEDULES, Schedule
from recipes.lib.timing import measure
from recipes.lib.transports import interfaces_in_use

ELEMENTS = 3 * 4 * 1021
"""Parts for three and for four ranks; their size is no power of two, so that offsets cannot hide."""


def result_of(run: Callable[[Place, Tensor, Tensor], None], name: str, place: Place) -> list[float]:
    collective = COLLECTIVES[name]
    given = collective.given(place, ELEMENTS)
    out = collective.empty(place, ELEMENTS, given)
    run(place, given, out)
    return out.tolist()


def broken(schedule: Schedule) -> Schedule:
    """The schedule without its last round: what a forgotten message does."""
    return dataclasses.replace(schedule, rounds=schedule.rounds[:-1])


def look(world: World) -> dict[str, Any]:
    place = Place.of(world)
    found: dict[str, Any] = {"right": {}, "spoilt": {}, "by_hand": {}, "cut_short": {}, "like_torch": {}}
    for name, collective in COLLECTIVES.items():
        found["right"][name] = [dataclasses.astuple(each) for each in verify(collective, place, ELEMENTS)]
        wrong = verify(collective, place, ELEMENTS, spoilt=1)
        found["spoilt"][name] = blamed(wrong) if wrong else None
    for name, make in SCHEDULES.items():
        schedule = make(world.size)
        collective = COLLECTIVES[schedule.collective]
        same = result_of(like_torch(schedule), schedule.collective, place) == result_of(
            collective.run, schedule.collective, place
        )
        # On ranks into which nothing comes out, torch may leave there what it likes.
        found["like_torch"][name] = same or collective.expected(place, ELEMENTS) is None
        found["by_hand"][name] = len(verify(collective, place, ELEMENTS, run=like_torch(schedule)))
        cut = verify(collective, place, ELEMENTS, run=like_torch(broken(schedule)))
        found["cut_short"][name] = len(cut)
    timings, wrong = measure_pairs([(0, 1)], world, ELEMENTS, trials=2, budget=0.01)
    found["pair"] = {"trials": len(timings[0, 1].trials), "wrong": len(wrong)}
    found["spoilt_pair"] = blamed(
        measure_pairs([(1, 2)], world, ELEMENTS, trials=2, budget=0.01, spoilt=1)[1]
    )
    late = late_rank(waits(world, rounds=12, slowed=2, pause=0.05))
    found["late"] = late.rank if late else None
    array = torch.zeros(world.size)
    timing = measure(
        lambda: carry_out(SCHEDULES["ring_all_reduce"](world.size), place, array), world, trials=3
    )
    found["timing"] = {"trials": len(timing.trials), "calls": timing.calls, "seconds": timing.seconds}
    found["interfaces"] = interfaces_in_use(os.environ)
    return found


def main() -> None:
    with joined("cpu") as world:
        found = look(world)
        same: list[Any] = [None] * world.size
        torch.distributed.all_gather_object(same, found["like_torch"])
        found["like_torch"] = {name: all(each[name] for each in same) for name in found["like_torch"]}
        if world.is_first:
            print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
