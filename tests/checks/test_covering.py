"""The fewest nodes are left out that leave no bad link between two others."""

from __future__ import annotations

import itertools
import random

import pytest

from checks.covering import MOST_EXACT, between, cover, nobody_passes
from checks.pairs import Blame

NODES = [f"n{number}" for number in range(1, 9)]


def blame(kind: str, *nodes: str, rails: tuple[str, ...] = ()) -> Blame:
    return Blame(kind, nodes, "slow", rails)


@pytest.mark.parametrize(
    ("links", "wanted"),
    [
        ([], ()),
        (["n1 n2"], ("n2",)),
        (["n1 n2", "n2 n1"], ("n2",)),
        (["n1 n2", "n1 n3", "n1 n4"], ("n1",)),
        (["n1 n2", "n2 n3", "n3 n4"], ("n2", "n4")),
        (["n1 n2", "n5 n6"], ("n2", "n6")),
        (["n1 n2", "n2 n3", "n3 n1"], ("n2", "n3")),
        (["n1 n5", "n2 n5", "n3 n5", "n3 n6", "n3 n7"], ("n3", "n5")),
    ],
)
def test_one_end_of_every_link_goes_and_no_more(links: list[str], wanted: tuple[str, ...]) -> None:
    assert cover(NODES, [link.split() for link in links]) == wanted


def test_a_node_that_goes_anyway_takes_its_links_with_it() -> None:
    assert cover(NODES, [("n1", "n2"), ("n3", "n4")], out=["n1"]) == ("n4",)


def test_who_was_in_a_bad_pair_before_goes_rather_than_its_partner() -> None:
    assert cover(NODES, [("n1", "n2")], doubts={"n1": 1}) == ("n1",)
    # But never two nodes for one.
    assert cover(NODES, [("n1", "n2"), ("n1", "n3")], doubts={"n2": 5, "n3": 5}) == ("n1",)


def test_no_smaller_set_would_do() -> None:
    dice = random.Random(7)
    for _ in range(200):
        links = [tuple(dice.sample(NODES, 2)) for _ in range(dice.randint(1, MOST_EXACT))]
        found = cover(NODES, links)
        assert all({*link} & {*found} for link in links)
        smaller = itertools.combinations(NODES, len(found) - 1)
        assert not any(all({*link} & {*few} for link in links) for few in smaller), (links, found)


def test_many_links_of_many_nodes_are_covered_all_the_same() -> None:
    nodes = [f"n{number}" for number in range(1024)]
    ring = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    found = cover(nodes, ring)
    assert all({*link} & {*found} for link in ring)
    assert len(found) < 700


def test_what_two_nodes_share_is_a_link_or_undetermined() -> None:
    shared = [blame("link", "n1", "n2"), blame("undetermined", "n3", "n4")]
    alone = [blame("node", "n5"), blame("rail", "n6"), blame("undetermined", "n7"), blame("once", "n1", "n8")]
    assert between([*shared, *alone]) == shared


def test_where_no_pair_passes_it_is_no_nodes_fault() -> None:
    every = [blame("undetermined", *pair) for pair in itertools.combinations(NODES[:4], 2)]
    assert nobody_passes(NODES[:4], every)
    assert not nobody_passes(NODES[:5], every), "one node passes"
    assert not nobody_passes(NODES[:2], every[:1]), "of two nodes one may be bad"
    assert not nobody_passes(NODES[:4], [*every, blame("link", "n1", "n2")]), "a link's ends pass with others"
    # A rail that fails on all nodes, beside others that pass.
    assert nobody_passes(NODES[:4], [blame("undetermined", "n1", "n2", rails=("mlx5_3",)),
                                     blame("undetermined", "n3", "n4", rails=("mlx5_3",))])  # fmt: skip
