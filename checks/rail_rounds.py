"""The rounds of rails: who measures with whom, how often, and what it came to. Pure; it is given what runs a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checks import pairs, perftest, rails
from checks.expectations import Expectations
from checks.pairs import Blame
from checks.reading import Problem

FABRICS = ("infiniband", "roce")
ROUND_SECONDS = 20.0
"""A round of healthy nodes takes 5: a second until perftest has its connection, twice, and srun."""
SHARE = 1 / 3
"""Of what is left of the budget, for each of these rounds: the pairs come after them."""

ARound = Callable[[Sequence[Sequence[str]], str, float], Mapping[str, Any]]
"""Groups of nodes, the kind of the round, seconds -> what each node reported."""


@dataclass(frozen=True)
class Found:
    """What the rounds came to."""

    records: Mapping[str, Any]
    """By node, its rails as they were measured last, or the problem that kept them all from it."""
    blames: tuple[Blame, ...] = ()
    rounds: int = 0


def are_measured(nodes: Sequence[str], records: Mapping[str, Any], expected: Expectations) -> bool:
    """Whether this job has rails: its fabric has, or nobody has named a fabric and there are RDMA devices."""
    if len(nodes) < 2:
        return False
    there = any(isinstance(one, dict) and one.get("rdma") for one in records.values())
    return expected.fabric in FABRICS or (expected.fabric is None and there)


def measured(
    nodes: Sequence[str],
    records: Mapping[str, Any],
    a_round: ARound,
    left: Callable[[], float],
    *,
    baseline: float | None,
    least_seconds: float,
) -> Found:
    """Rounds of pairs until every rail has its answer or no time is left. `records` are those of the whole job."""
    able = [node for node in nodes if _has_tool(records.get(node))]
    missing = {"problem": Problem.MISSING.value, "detail": f"command {perftest.TOOL}"}
    if len(able) < 2:
        return Found(dict.fromkeys(nodes, missing))
    history: list[rails.Round] = []
    latest: dict[str, dict[str, Any]] = {}
    own: dict[str, dict[str, str]] = {}
    while left() > least_seconds:
        wanted = pairs.next_round(able, rails.together(history))
        if not wanted:
            break
        answers = a_round([(pair.a, pair.b) for pair in wanted], "rails", min(ROUND_SECONDS, SHARE * left()))
        said = {node: one.get("rails") for node, one in answers.items()}
        found = {node: rails.rails_of(one) for node, one in said.items()}
        history.append(rails.outcomes(wanted, found, baseline))
        for node, faults in rails.own_faults(found).items():
            own.setdefault(node, {}).update(faults)
        for node, one in said.items():
            # A later round need not have asked all of a node's rails; what it said last of each counts.
            latest[node] = {**latest.get(node, {}), **one} if isinstance(one, dict) else {}
    if not history:
        late = {"problem": Problem.TIMED_OUT.value, "detail": "no time was left to measure it"}
        return Found(dict.fromkeys(nodes, late))
    silent = {"problem": Problem.TIMED_OUT.value, "detail": "this node never reported its rails"}
    answered = {node: latest.get(node, silent) if node in able else missing for node in nodes}
    return Found(answered, tuple(rails.blamed(able, history, own)), len(history))


def _has_tool(record: Any) -> bool:
    return isinstance(record, dict) and bool(record.get("perftest"))
