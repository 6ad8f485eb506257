"""What one node's processes reported in the active tier, as facts for its checks. Pure.

Every figure is a number, or an Unread with the reason why there is none: what an agent sends may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checks.baselines import Baseline
from checks.covering import between
from checks.pairs import Blame
from checks.rails import Figure, Rail, rails_of
from checks.reading import Problem, Unread


@dataclass(frozen=True)
class Rank:
    device: str
    burn: Figure
    """TFLOP/s."""
    copy: Figure
    """GB/s, as everything that follows."""
    host: Mapping[str, Figure] | Unread
    peers: Mapping[str, Figure] | Unread
    """From one GPU to another one of the node, as the node's first rank measured it."""
    collectives: Mapping[tuple[str, int], Figure] | Unread
    """By name and bytes of the array."""


@dataclass(frozen=True)
class Job:
    """What is the same on all nodes of a round."""

    nodes: int = 1
    best_burn: float = 0.0
    baselines: tuple[Baseline, ...] = ()
    blames: tuple[Blame, ...] = ()
    paired: int = 0
    """Rounds of pairs that were measured."""
    expects_pairs: bool = False
    """The whole job fell short, hung, or has nothing to be compared with."""
    expects_rails: bool = False
    """It has RDMA ports that ib_write_bw measures one by one."""
    rail_blames: tuple[Blame, ...] = ()

    @property
    def culprits(self) -> tuple[str, ...]:
        """Nodes that are to blame for what the whole job could not do."""
        bad = [one for one in (*self.blames, *self.rail_blames) if one.kind in ("node", "rail")]
        return tuple(dict.fromkeys(node for one in bad for node in one.nodes))

    @property
    def bad_links(self) -> tuple[Blame, ...]:
        """What two nodes are to blame for together, or what lies between them."""
        return tuple(between((*self.blames, *self.rail_blames)))


@dataclass(frozen=True)
class Measured:
    name: str
    ranks: tuple[Rank, ...] | Unread
    gpus: int
    transports: tuple[str, ...] | Unread
    rails: Mapping[str, Rail] | Unread
    job: Job

    @property
    def device(self) -> str:
        return "" if isinstance(self.ranks, Unread) or not self.ranks else self.ranks[0].device


def measured(name: str, record: Any, job: Job) -> Measured:
    """From a node's record, None where it never reported."""
    if record is None:
        silent = Unread(Problem.TIMED_OUT, "this node never reported")
        return Measured(name, silent, 0, silent, silent, job)
    if not isinstance(record, dict):
        strange = Unread(Problem.ERROR, "a report of another form")
        return Measured(name, strange, 0, strange, strange, job)
    ranks = record.get("ranks")
    gpus = record.get("gpus")
    return Measured(
        name,
        tuple(rank_of(one) for one in ranks)
        if isinstance(ranks, list) and ranks
        else problem_of(ranks, "no rank reported"),
        gpus if isinstance(gpus, int) else 0,
        _texts(record.get("transport")),
        rails_of(record.get("rails")),
        job,
    )


def rank_of(said: Any) -> Rank:
    said = said if isinstance(said, dict) else {}
    trouble = str(said.get("trouble") or "")
    lost = Unread(problem_in(trouble), trouble) if trouble else Unread(Problem.MISSING, "not reported")
    keys = [key.rpartition(" ") for key in said if isinstance(key, str) and key.rpartition(" ")[2].isdigit()]
    collectives = {(name, int(size)): figure(said[f"{name} {size}"], lost) for name, _, size in keys}
    return Rank(
        device=str(said.get("device") or ""),
        burn=figure(said.get("burn"), lost),
        copy=figure(said.get("copy"), lost),
        host=_figures(said.get("host"), lost),
        peers=_figures(said.get("peers"), lost),
        # A rank that stopped in the middle has no figures to judge: the first ones were measured before it failed.
        collectives=lost if trouble or not collectives else collectives,
    )


def figure(value: Any, lost: Unread) -> Figure:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return lost if value is None else problem_of(value, f"{value!r} is no figure")
    return (
        float(value)
        if math.isfinite(value) and value >= 0
        else Unread(Problem.ERROR, f"{value} is no figure")
    )


def problem_of(value: Any, otherwise: str) -> Unread:
    """{"problem": "not permitted", "detail": …} as Unread."""
    if isinstance(value, dict) and value.get("problem") in list(Problem):
        return Unread(Problem(value["problem"]), str(value.get("detail", "")))
    return Unread(Problem.ERROR if value is not None else Problem.MISSING, otherwise)


def problem_in(trouble: str) -> Problem:
    """Which of the reasons a rank's last words are."""
    text = trouble.lower()
    if text.startswith("hung at") or "timed out" in text or "timeout" in text:
        return Problem.TIMED_OUT
    if "permission" in text or "not permitted" in text:
        return Problem.NOT_PERMITTED
    if "no module named" in text:
        return Problem.MISSING
    return Problem.ERROR


def _figures(value: Any, lost: Unread) -> Mapping[str, Figure] | Unread:
    if value is None:
        return lost
    if not isinstance(value, dict) or "problem" in value:
        return problem_of(value, f"{value!r} are no figures")
    return {str(key): figure(one, lost) for key, one in value.items()}


def _texts(value: Any) -> tuple[str, ...] | Unread:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return problem_of(value, "no transports were reported")
    return tuple(value)


def best_burn(records: Sequence[Any]) -> float:
    """TFLOP/s of the job's best GPU; 0.0 where none was measured."""
    ranks = [
        rank_of(one)
        for record in records
        if isinstance(record, dict) and isinstance(record.get("ranks"), list)
        for one in record["ranks"]
    ]
    return max((rank.burn for rank in ranks if isinstance(rank.burn, float)), default=0.0)
