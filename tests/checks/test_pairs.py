"""The bad node, link or pair of nodes is named, whichever it is and however many nodes there are."""

from __future__ import annotations

import itertools

import pytest

from checks.pairs import MOST_ROUNDS, Blame, Outcome, Pair, blamed, next_round, relative_outcomes

Bad = frozenset[str]


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(1, count + 1)]


def played(nodes: list[str], bad: set[str], links: set[Bad] = frozenset()) -> tuple[list[Blame], int]:  # type: ignore[assignment]
    """What is blamed in a cluster with these bad nodes and links, and the number of rounds that it took."""
    history: list[list[Outcome]] = []
    while pairs := next_round(nodes, history):
        everybody = [node for pair in pairs for node in (pair.a, pair.b)]
        assert len(everybody) == len(set(everybody)), "a node is in two pairs of a round"
        assert all(pair.a != pair.b for pair in pairs)
        history.append(
            [Outcome(pair, not (pair.nodes & bad or pair.nodes in links), "slow") for pair in pairs]
        )
        assert len(history) <= MOST_ROUNDS
    return blamed(nodes, history), len(history)


def blamed_nodes(blames: list[Blame]) -> set[str]:
    return {node for blame in blames if blame.kind == "node" for node in blame.nodes}


@pytest.mark.parametrize("count", range(2, 18))
def test_healthy_nodes_take_one_round_and_an_odd_one_a_second(count: int) -> None:
    assert played(names(count), set()) == ([], 1 + count % 2)


@pytest.mark.parametrize("count", range(4, 18))
def test_every_single_bad_node_is_named_alone(count: int) -> None:
    for bad in names(count):
        blames, rounds = played(names(count), {bad})
        assert [(blame.kind, blame.nodes) for blame in blames] == [("node", (bad,))], (count, bad)
        assert rounds <= 3


def test_of_three_nodes_the_bad_one_is_never_missed_and_no_good_one_blamed() -> None:
    for bad in names(3):
        blames, _ = played(names(3), {bad})
        assert blamed_nodes(blames) <= {bad}
        assert bad in {node for blame in blames for node in blame.nodes}


def test_two_nodes_that_fail_together_are_undetermined() -> None:
    assert played(names(2), {"n2"}) == ([Blame("undetermined", ("n1", "n2"), "slow")], 1)


@pytest.mark.parametrize("count", range(6, 15))
def test_two_bad_nodes_are_both_named_and_nobody_else(count: int) -> None:
    for pair in itertools.combinations(names(count), 2):
        blames, _ = played(names(count), set(pair))
        assert {blame.kind for blame in blames} == {"node"}, (count, pair, blames)
        assert blamed_nodes(blames) == set(pair)


@pytest.mark.parametrize("count", range(4, 13))
def test_a_bad_link_is_no_node(count: int) -> None:
    """Where a pair crosses the link it is named as a link; no node is ever blamed for it."""
    seen = set()
    for ends in itertools.combinations(names(count), 2):
        blames, _ = played(names(count), set(), {frozenset(ends)})
        assert blamed_nodes(blames) == set()
        assert len(blames) <= 1
        seen |= {blame.kind for blame in blames}
        assert all(set(blame.nodes) == set(ends) for blame in blames)
    assert "link" in seen


@pytest.mark.parametrize("bad", ["n1", "n2", "n511", "n1024"])
def test_1024_nodes_take_two_rounds(bad: str) -> None:
    blames, rounds = played(names(1024), {bad})
    assert ([blame.nodes for blame in blames], rounds) == ([(bad,)], 2)


def test_as_many_bad_nodes_as_good_ones_are_never_a_pass() -> None:
    for bad in itertools.combinations(names(6), 3):
        blames, _ = played(names(6), set(bad))
        assert set(bad) <= {node for blame in blames for node in blame.nodes}
        assert blamed_nodes(blames) <= set(bad)


def test_all_nodes_bad_is_undetermined_for_each() -> None:
    blames, _ = played(names(5), set(names(5)))
    assert {node for blame in blames for node in blame.nodes} == set(names(5))
    assert {blame.kind for blame in blames} == {"undetermined"}


def test_a_failure_that_does_not_come_back_is_said_and_no_more() -> None:
    nodes, history = names(4), []
    while pairs := next_round(nodes, history):
        first = not history
        history.append([Outcome(pair, not (first and pair.a == "n1"), "slow") for pair in pairs])
    assert [(blame.kind, blame.nodes) for blame in blamed(nodes, history)] == [("once", ("n1", "n2"))]
    assert "passed when it was asked again" in blamed(nodes, history)[0].why


def test_a_pair_is_judged_by_the_baseline_or_by_the_median_pair() -> None:
    one, two, three = Pair("a", "b"), Pair("c", "d"), Pair("e", "f")
    measured: dict[Pair, float | str] = {one: 10.0, two: 4.0, three: 9.0}
    assert [each.passed for each in relative_outcomes(measured, floor=None, share=0.5)] == [True, False, True]
    assert [each.passed for each in relative_outcomes(measured, floor=9.5, share=0.5)] == [True, False, False]
    hung = relative_outcomes({one: "hung in all_reduce", two: 4.0}, floor=None, share=0.5)
    assert [(each.passed, each.why[:4]) for each in hung] == [(False, "hung"), (True, "4 GB")]
