"""Collectives by hand: each schedule does what it says for any number of ranks, in as many rounds and bytes."""

from __future__ import annotations

import dataclasses
import math

import pytest

from recipes.lib.schedules import SCHEDULES, Schedule, Transfer, contents

RANKS = [2, 3, 4, 5, 7, 8, 16]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rank_ends_with_what_the_collective_promises(name: str, ranks: int) -> None:
    schedule = SCHEDULES[name](ranks)
    end = contents(schedule)[-1]
    everybody = range(ranks)
    for rank in everybody:
        if schedule.collective == "all_reduce":
            for part in range(schedule.parts):
                assert end[rank][part] == {(other, part) for other in everybody}
        elif schedule.collective == "broadcast":
            assert end[rank] == [{(0, 0)}]
        elif schedule.collective == "scatter":
            assert end[rank][rank] == {(0, rank)}
        elif schedule.collective == "all_to_all":
            assert end[rank] == [{(other, rank)} for other in everybody]
    if schedule.collective == "gather":
        assert end[0] == [{(other, other)} for other in everybody]


@pytest.mark.parametrize("ranks", RANKS)
def test_rounds_and_bytes(ranks: int) -> None:
    size = 1000 * ranks
    ring, tree = SCHEDULES["ring_all_reduce"](ranks), SCHEDULES["tree_all_reduce"](ranks)
    assert len(ring.rounds) == 2 * (ranks - 1)
    assert ring.bytes_sent(size) == 2 * (ranks - 1) * size // ranks
    assert len(tree.rounds) == 2 * math.ceil(math.log2(ranks))
    assert len(SCHEDULES["broadcast"](ranks).rounds) == math.ceil(math.log2(ranks))
    assert len(SCHEDULES["all_to_all"](ranks).rounds) == ranks - 1


def schedule(*rounds: tuple[Transfer, ...]) -> Schedule:
    return Schedule("wrong", "all_reduce", 3, 1, rounds)


@pytest.mark.parametrize(
    "rounds",
    [
        [(Transfer(0, 1, 0, 0, adds=True), Transfer(0, 2, 0, 0, adds=True))],  # sends twice
        [(Transfer(0, 2, 0, 0, adds=True), Transfer(1, 2, 0, 0, adds=True))],  # receives twice
        [(Transfer(0, 1, 0, 0, adds=True),), (Transfer(0, 1, 0, 0, adds=True),)],  # adds the same again
    ],
)
def test_a_wrong_schedule_is_refused(rounds: list[tuple[Transfer, ...]]) -> None:
    with pytest.raises(ValueError, match="wrong, round"):
        contents(schedule(*rounds))


def test_sending_what_is_not_there_is_refused() -> None:
    empty = dataclasses.replace(SCHEDULES["broadcast"](3), rounds=((Transfer(1, 2, 0, 0),),))
    with pytest.raises(ValueError, match="sends nothing"):
        contents(empty)
