"""Which node is it? Parallel pairs of nodes, round after round, until the bad one is told from its partners. Pure.

All nodes are measured two by two at the same time. Who fell short is paired again with a node that passed, so after two
rounds a bad node has failed with two partners that pass with others, for any number of nodes. What is still open gets a
third round: another partner, or the same pair again where both of its nodes pass with others (then it is the link).
The method is that of Google's cluster health scanner; a tournament of all pairs would take N-1 rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_ROUNDS = 3
GOOD_PARTNERS = 2
"""So many partners that pass with others must have failed with a node before it is blamed: one may be its link."""


@dataclass(frozen=True)
class Pair:
    a: str
    b: str

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset((self.a, self.b))

    def other(self, node: str) -> str:
        return self.b if node == self.a else self.a

    def __str__(self) -> str:
        return f"{self.a}-{self.b}"


Round = tuple[Pair, ...]


@dataclass(frozen=True)
class Outcome:
    """What one pair came to in one round."""

    pair: Pair
    passed: bool
    why: str = ""
    """What was measured, or at which point it hung."""
    figure: float | None = None
    """GB/s."""


History = Sequence[Sequence[Outcome]]
"""The rounds so far."""


@dataclass(frozen=True)
class Blame:
    """`node`: it failed with every partner. `rail`: one of its RDMA ports did, others of its ports did not. `link`: its
    two ends pass with others, and failed together twice. `once`: the same, but the second time it passed.
    `undetermined`: one of these nodes or what connects them; the measurements do not say which."""

    kind: str
    nodes: tuple[str, ...]
    why: str
    rails: tuple[str, ...] = ()
    """The RDMA ports that it is about, where each was measured for itself; () for the nodes as a whole."""

    def __str__(self) -> str:
        rails = f" ({', '.join(self.rails)})" if self.rails else ""
        return f"{self.kind}: {' - '.join(self.nodes)}{rails}: {self.why}"


def next_round(nodes: Sequence[str], history: History) -> Round:
    """The pairs to measure now, each node in at most one; () when nothing is open or every round is used."""
    if len(history) >= MOST_ROUNDS:
        return ()
    if not history:
        return tuple(Pair(a, b) for a, b in zip(nodes[::2], nodes[1::2], strict=False))
    good = _good(history)
    met = {outcome.pair.nodes for one in history for outcome in one}
    bad = _bad(history)
    open_nodes = [node for node in nodes if node not in good and node not in bad]
    chosen: list[Pair] = []
    free = dict.fromkeys(node for node in nodes if node in good)
    waiting: list[str] = []
    # A link that failed once is asked again; its nodes are not partners of others in this round.
    for pair in _open_links(history):
        if pair.a in free and pair.b in free:
            chosen.append(pair)
            del free[pair.a], free[pair.b]
    for node in open_nodes:
        partner = next((one for one in free if frozenset((node, one)) not in met), None)
        if partner is None:
            waiting.append(node)
        else:
            chosen.append(Pair(partner, node))
            del free[partner]
    # No node that passed is left: strangers among the suspects.
    while waiting:
        node = waiting.pop(0)
        partner = next((one for one in waiting if frozenset((node, one)) not in met), None)
        if partner is not None:
            waiting.remove(partner)
            chosen.append(Pair(node, partner))
    return tuple(chosen)


def blamed(nodes: Sequence[str], history: History) -> list[Blame]:
    """Who is to blame after these rounds; [] where every node passed and no pair failed."""
    good = _good(history)
    failures = _failures(history)
    blames: list[Blame] = []
    settled: set[str] = set()
    bad = _bad(history)
    for node in nodes:
        if node in bad:
            why = "; ".join(
                f"with {one.pair.other(node)}: {one.why}" for one in failures if node in one.pair.nodes
            )
            blames.append(Blame("node", (node,), why))
            settled.add(node)
    for pair, failed in _by_pair(failures).items():
        if pair & settled:
            continue
        why = "; ".join(one.why for one in failed)
        ends = tuple(node for node in nodes if node in pair)
        if pair <= good and len(failed) >= 2:
            blames.append(Blame("link", ends, f"{why}; each passes with another node"))
        elif pair <= good and _passed_later(pair, history):
            blames.append(Blame("once", ends, f"{why}; passed when it was asked again"))
        else:
            blames.append(Blame("undetermined", ends, why))
    covered = {node for blame in blames for node in blame.nodes}
    blames += [
        Blame("undetermined", (node,), "no partner was left to measure it with")
        for node in nodes
        if node not in good and node not in covered and len(nodes) > 1 and history
    ]
    return blames


def relative_outcomes(
    measured: Mapping[Pair, float | str], *, floor: float | None, share: float
) -> list[Outcome]:
    """Pass or fail for each pair: GB/s against `floor`, or where there is none against `share` of the median pair.

    A text in place of a figure says why there is none. With one pair and no floor a figure is a pass: nothing says
    that it is too low.
    """
    figures = sorted(value for value in measured.values() if isinstance(value, float))
    least = floor
    if least is None:
        least = share * figures[len(figures) // 2] if len(figures) > 1 else 0.0
    return [
        Outcome(pair, False, value)
        if isinstance(value, str)
        else Outcome(pair, value >= least, f"{value:.3g} GB/s, expected {least:.3g}", value)
        for pair, value in measured.items()
    ]


def _good(history: History) -> set[str]:
    return {node for one in history for outcome in one if outcome.passed for node in outcome.pair.nodes}


def _failures(history: History) -> list[Outcome]:
    return [outcome for one in history for outcome in one if not outcome.passed]


def _by_pair(outcomes: Sequence[Outcome]) -> dict[frozenset[str], list[Outcome]]:
    found: dict[frozenset[str], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.pair.nodes, []).append(outcome)
    return found


def _bad(history: History) -> set[str]:
    """Nodes that failed with enough partners that pass with others. Once for all nodes: there may be a thousand."""
    good = _good(history)
    failed_with: dict[str, set[str]] = {}
    for outcome in _failures(history):
        for node in outcome.pair.nodes - good:
            failed_with.setdefault(node, set()).update({outcome.pair.other(node)} & good)
    return {node for node, partners in failed_with.items() if len(partners) >= GOOD_PARTNERS}


def _open_links(history: History) -> list[Pair]:
    """Pairs that failed once and were not asked again, although both of their nodes pass with others."""
    good = _good(history)
    asked = [outcome.pair.nodes for one in history for outcome in one]
    return [
        outcome.pair
        for outcome in _failures(history)
        if outcome.pair.nodes <= good and asked.count(outcome.pair.nodes) == 1
    ]


def _passed_later(pair: frozenset[str], history: History) -> bool:
    return any(outcome.passed and outcome.pair.nodes == pair for one in history for outcome in one)
