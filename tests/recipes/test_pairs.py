"""Who meets whom, and which rank or way is called slow. No processes; test_communication.py has some."""

from __future__ import annotations

import itertools
import random

import pytest

from recipes.ch2.pairs import schedule
from recipes.lib.late_ranks import late_rank
from recipes.lib.pairs import Pair, described, rounds_of_pairs, slow_pairs, slow_ways
from recipes.lib.timing import Timing, slowest


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 9, 64])
def test_after_all_rounds_each_two_have_met_once(ranks: int) -> None:
    rounds = rounds_of_pairs(ranks)
    assert len(rounds) == ranks - 1 + ranks % 2
    for pairs in rounds:
        everybody = [rank for pair in pairs for rank in pair]
        assert len(everybody) == len(set(everybody)), "nobody is in two pairs"
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(range(ranks), 2))


@pytest.mark.parametrize("alone", [True, False])
def test_every_way_is_measured_in_both_directions(alone: bool) -> None:
    turns = schedule(5, alone=alone)
    assert sorted(pair for turn in turns for pair in turn) == sorted(itertools.permutations(range(5), 2))
    assert all(len(turn) == 1 for turn in turns) is alone


NODES = ["n1", "n1", "n2", "n2"]


def usual(nodes: list[str]) -> dict[Pair, float]:
    """Ten times longer between nodes, and some noise."""
    chance = random.Random(1)
    return {
        (a, b): (1.0 if nodes[a] == nodes[b] else 10.0) * chance.uniform(1.0, 1.4)
        for a, b in itertools.permutations(range(len(nodes)), 2)
    }


def said(seconds: dict[Pair, float], nodes: list[str]) -> list[str]:
    return described(slow_pairs(seconds, nodes), seconds, nodes)


def test_the_way_between_nodes_is_not_called_slow() -> None:
    assert said(usual(NODES), NODES) == []


def test_a_slow_way_is_named_in_its_direction() -> None:
    found = said({**usual(NODES), (3, 0): 40.0}, NODES)
    assert len(found) == 1
    assert found[0].startswith("the way from rank 3 (n2) to 0 (n1) is slow: 3")


@pytest.mark.parametrize("nodes", [NODES, ["n1"] * 3, ["n1"] * 8])
def test_a_rank_that_is_slow_with_everybody_is_named_and_its_partners_are_not(nodes: list[str]) -> None:
    seconds = {pair: each * (5 if 1 in pair else 1) for pair, each in usual(nodes).items()}
    (found,) = said(seconds, nodes)
    assert found.startswith("rank 1 (n1) is slow with everybody: ")


def timings(seconds: dict[Pair, float]) -> dict[Pair, Timing]:
    return {pair: Timing((each, each * 1.1), calls=1) for pair, each in seconds.items()}


def test_what_was_slow_for_a_moment_is_forgiven_after_a_second_look() -> None:
    asked: list[list[Pair]] = []

    def again(pairs: list[Pair]) -> dict[Pair, Timing]:
        asked.append(pairs)
        return timings(dict.fromkeys(pairs, 1.0))

    slow = timings({**usual(NODES), (0, 1): 9.0})
    assert slow_ways(slow, NODES, again) == []
    assert asked == [[(0, 1)]]
    stays = slow_ways(slow, NODES, lambda pairs: timings(dict.fromkeys(pairs, 9.0)))
    assert [line[:30] for line in stays] == ["the way from rank 0 (n1) to 1 "]


def test_the_slowest_rank_of_each_trial_counts() -> None:
    assert slowest([Timing((1.0, 5.0), 3), Timing((2.0, 4.0), 3)]) == Timing((2.0, 5.0), 3)
    timing = Timing((2.0, 1.0, 4.0), 3)
    assert (timing.seconds, timing.spread) == (2.0, 1.5)


# --- late ranks


def waited(
    ranks: int, late: int | None, by: float, rounds: int = 40, share: float = 1.0
) -> list[list[float]]:
    chance = random.Random(2)
    found = []
    for _ in range(rounds):
        last = late if late is not None and chance.random() < share else chance.randrange(ranks)
        lateness = by if last == late else 1e-4
        found.append(
            [1e-4 + (0 if rank == last else lateness) * chance.uniform(0.9, 1.1) for rank in range(ranks)]
        )
    return found


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_who_waits_least_is_who_comes_last(ranks: int) -> None:
    late = late_rank(waited(ranks, ranks - 1, by=0.005))
    assert late is not None
    assert late.rank == ranks - 1
    assert late.seconds == pytest.approx(0.005, rel=0.1)
    assert late.share == 1.0


def test_chance_names_nobody() -> None:
    assert late_rank(waited(4, None, by=0.0)) is None
    assert late_rank(waited(4, 2, by=0.005, share=0.6)) is None, "late in most rounds, but not reliably"
    assert late_rank(waited(4, 2, by=1e-4)) is None, "too little to matter"
