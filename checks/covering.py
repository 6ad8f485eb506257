"""Which nodes to leave out so that no bad link is left between two that stay. Pure.

Leaving out one end of a link is enough, and which one the measurements do not say. So the smallest set of nodes that
has an end of each: a vertex cover. Bad links are few and form small groups, in which it is found exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from checks.pairs import Blame

BETWEEN = ("link", "undetermined")
"""Kinds of blame that two nodes share."""
MOST_EXACT = 12
"""Links of a group up to which every choice is tried; above that the node with the most links goes first."""

Link = frozenset[str]


def between(blames: Iterable[Blame]) -> list[Blame]:
    """Those that two nodes share, so that leaving out one of them is enough."""
    return [one for one in blames if one.kind in BETWEEN and len(one.nodes) > 1]


def nobody_passes(nodes: Sequence[str], blames: Sequence[Blame]) -> bool:
    """Whether of three nodes or more not one passes with any other: what is wrong then is not in some of them."""
    by_rails: dict[tuple[str, ...], list[Blame]] = {}
    for one in blames:
        by_rails.setdefault(one.rails, []).append(one)
    return len(nodes) > 2 and any(
        {one.kind for one in each} == {"undetermined"}
        and {node for one in each for node in one.nodes} >= set(nodes)
        for each in by_rails.values()
    )


def cover(
    nodes: Sequence[str],
    links: Iterable[Collection[str]],
    *,
    out: Collection[str] = (),
    doubts: Mapping[str, int] | None = None,
) -> tuple[str, ...]:
    """The fewest of `nodes` that have an end of every link, beside those that are `out` anyway.

    Of sets of the same size: the one with the most `doubts` (how often a node was suspected before), then the one
    whose nodes come last, so that the answer is the same on every call.
    """
    place = {node: number for number, node in enumerate(nodes)}
    open_links = {frozenset(link) for link in links if not {*link} & {*out}}

    def rank(chosen: Collection[str]) -> tuple[int, int, list[int]]:
        known = sum((doubts or {}).get(node, 0) for node in chosen)
        return (len(chosen), -known, sorted(-place.get(node, 0) for node in chosen))

    found: set[str] = set()
    for group in _groups(open_links):
        if len(group) <= MOST_EXACT:
            found |= min(_covers(sorted(group, key=sorted)), key=rank)
        else:
            found |= _greedy(group, doubts or {}, place)
    return tuple(sorted(found, key=lambda node: place.get(node, 0)))


def _groups(links: Collection[Link]) -> list[set[Link]]:
    """Links that hang together by their nodes."""
    groups: list[set[Link]] = []
    for link in links:
        touched = [group for group in groups if any(link & other for other in group)]
        groups = [group for group in groups if group not in touched]
        groups.append({link}.union(*touched))
    return groups


def _covers(links: Sequence[Link]) -> list[frozenset[str]]:
    """Every cover that takes an end of the first link that is open: all the smallest ones are among them."""
    if not links:
        return [frozenset()]
    return [
        frozenset((node, *rest))
        for node in sorted(links[0])
        for rest in _covers([link for link in links if node not in link])
    ]


def _greedy(links: Collection[Link], doubts: Mapping[str, int], place: Mapping[str, int]) -> set[str]:
    left, chosen = set(links), set[str]()
    while left:
        count = Counter(node for link in left for node in link)
        node = max(count, key=lambda one: (count[one], doubts.get(one, 0), place.get(one, 0)))
        chosen.add(node)
        left = {link for link in left if node not in link}
    return chosen
