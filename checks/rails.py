"""Which rail, link or node it is: what ib_write_bw gave between pairs of nodes, rail by rail, round after round. Pure.

The pairs of a round are those of `checks.pairs`: a pair passes when all of its rails do. Each rail then has a history
of its own, from which the same rules tell a node's end of the rail, a link, or nothing certain. A node all of whose
rails are to blame is a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checks import pairs, perftest
from checks.evidence import opened
from checks.pairs import Blame, Outcome, Pair
from checks.reading import Problem, Unread, parsed

NO_RAIL = "it has no such rail"
LEAST = 0.9
"""Share of the port's own rate: 180 of HDR's 200 Gb/s, 360 of NDR's 400, as the cloud providers' checks demand."""
LEAST_OF_MEDIAN = 0.8
"""Share of the rail's median pair, where the rate of a port could not be read."""

Figure = float | Unread


@dataclass(frozen=True)
class Rail:
    """One node's end of one rail, as it was measured last."""

    sent: Figure
    """Gb/s from this node to its partner."""
    rate: float | None
    """Gb/s of the slower of the two ports."""
    partner: str
    own_fault: str = ""
    """What ib_write_bw said of this node alone; "" where it said nothing of that kind."""


def rails_of(said: Any) -> Mapping[str, Rail] | Unread:
    """The rails in a node's record: {"mlx5_0": {"partner", "rate", "sent": a record, "served": a record}}."""
    if isinstance(said, dict) and "problem" in said:
        answer = _opened(said, "the rails")
        return answer if isinstance(answer, Unread) else Unread(Problem.ERROR, "a report of another form")
    if not isinstance(said, dict) or not all(isinstance(one, dict) for one in said.values()):
        return Unread(Problem.ERROR, "a report of another form")
    return {str(name): _rail(one) for name, one in said.items()}


def _rail(said: Mapping[str, Any]) -> Rail:
    answers = [_opened(said[key], key) for key in ("sent", "served") if key in said]
    sent = answers[0] if "sent" in said else Unread(Problem.MISSING, "not measured")
    rate = said.get("rate")
    return Rail(
        sent=sent if isinstance(sent, Unread) else parsed(sent, perftest.gigabits, perftest.TOOL),
        rate=float(rate) if isinstance(rate, int | float) and rate > 0 else None,
        partner=str(said.get("partner") or ""),
        own_fault=next((str(one) for one in answers if _is_own_fault(one)), ""),
    )


def _opened(record: Any, key: str) -> str | Unread:
    answer = opened(record, key) if isinstance(record, dict) else None
    return answer if isinstance(answer, str | Unread) else Unread(Problem.ERROR, f"{key}: no text")


def _is_own_fault(answer: Any) -> bool:
    if not isinstance(answer, Unread):
        return False
    forbidden = answer.problem is Problem.NOT_PERMITTED
    return forbidden or bool(perftest.OWN_FAULTS.search(answer.detail))


def floor_of(rate: float | None, baseline: float | None) -> float:
    """Gb/s that a rail of this rate must give: a baseline's where there is one. 0.0 where nothing says."""
    return baseline if baseline is not None else LEAST * (rate or 0.0)


# --- a round ----------------------------------------------------------------------------------------------

Round = Mapping[str, Sequence[Outcome]]
"""By rail, what each pair came to."""


def outcomes(
    round_: Sequence[Pair], found: Mapping[str, Mapping[str, Rail] | Unread], baseline: float | None
) -> Round:
    """The pairs of a round, rail by rail. A node that said nothing of a rail has failed on it."""
    names = common(found)
    by_rail: dict[str, list[Outcome]] = {}
    for name in names:
        ends = {pair: [_end(found, node, name) for node in (pair.a, pair.b)] for pair in round_}
        figures = [one.sent for both in ends.values() for one in both if isinstance(one.sent, float)]
        median = sorted(figures)[len(figures) // 2] if len(figures) > 2 else 0.0
        by_rail[name] = [_outcome(pair, both, baseline, median) for pair, both in ends.items()]
    return by_rail


def _end(found: Mapping[str, Mapping[str, Rail] | Unread], node: str, name: str) -> Rail:
    one = found.get(node, Unread(Problem.TIMED_OUT, "never reported"))
    if isinstance(one, Unread):
        return Rail(one, None, "")
    return one.get(name) or Rail(Unread(Problem.MISSING, NO_RAIL), None, "", NO_RAIL)


def common(found: Mapping[str, Mapping[str, Rail] | Unread]) -> list[str]:
    """The rails that most of the nodes have; who lacks one of them is not like the others."""
    said = [one for one in found.values() if not isinstance(one, Unread)]
    names = dict.fromkeys(name for one in said for name in one)
    return [name for name in names if 2 * sum(name in one for one in said) >= len(said)]


def own_faults(found: Mapping[str, Mapping[str, Rail] | Unread]) -> dict[str, dict[str, str]]:
    """By node and rail, what nobody else can be to blame for."""
    faults: dict[str, dict[str, str]] = {}
    for node, one in found.items():
        if isinstance(one, Unread):
            continue
        for name in common(found):
            if fault := one[name].own_fault if name in one else NO_RAIL:
                faults.setdefault(node, {})[name] = fault
    return faults


def _outcome(pair: Pair, ends: Sequence[Rail], baseline: float | None, median: float) -> Outcome:
    rates = [one.rate for one in ends if one.rate is not None]
    least = floor_of(min(rates, default=None), baseline) or LEAST_OF_MEDIAN * median
    said, passed = [], True
    for node, end in zip((pair.a, pair.b), ends, strict=True):
        if isinstance(end.sent, Unread):
            said.append(f"{node} to {pair.other(node)}: {end.sent}")
        else:
            said.append(f"{node} to {pair.other(node)} {end.sent:.3g} Gb/s")
        passed = passed and isinstance(end.sent, float) and end.sent > 0 and end.sent >= least
        passed = passed and not end.own_fault
    figure = min((one.sent for one in ends if isinstance(one.sent, float)), default=None)
    return Outcome(pair, passed, f"{', '.join(said)}, expected {least:.3g} Gb/s", figure)


def together(history: Sequence[Round]) -> list[list[Outcome]]:
    """The history of whole pairs, from which the next round follows: passed where every rail has."""
    whole = []
    for round_ in history:
        by_pair: dict[Pair, list[Outcome]] = {}
        for each in round_.values():
            for one in each:
                by_pair.setdefault(one.pair, []).append(one)
        whole.append(
            [
                Outcome(pair, all(one.passed for one in each), "; ".join(o.why for o in each if not o.passed))
                for pair, each in by_pair.items()
            ]
        )
    return whole


# --- who it is --------------------------------------------------------------------------------------------


def blamed(
    nodes: Sequence[str], history: Sequence[Round], own: Mapping[str, Mapping[str, str]]
) -> list[Blame]:
    """Who is to blame after these rounds, rails with the same answer together. `own` are the nodes' `own_faults`."""
    rails = list(dict.fromkeys(name for round_ in history for name in round_))
    found: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {}
    for rail in rails:
        bad = {node: faults[rail] for node, faults in own.items() if rail in faults}
        for node, why in bad.items():
            found.setdefault(("rail", (node,)), []).append((rail, why))
        # Of a pair with such a node nothing is learnt about the other one.
        rest = [
            [one for one in round_.get(rail, ()) if not one.pair.nodes & bad.keys()] for round_ in history
        ]
        met = {node for round_ in rest for one in round_ for node in one.pair.nodes}
        for blame in pairs.blamed([node for node in nodes if node in met], rest):
            kind = "rail" if blame.kind == "node" else blame.kind
            found.setdefault((kind, blame.nodes), []).append((rail, blame.why))
    blames = []
    for (kind, whose), reasons in found.items():
        names = tuple(rail for rail, _ in reasons)
        every = kind == "rail" and len(names) == len(rails) > 1
        blames.append(Blame("node" if every else kind, whose, reasons[0][1], names))
    return blames
