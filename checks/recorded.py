"""`python -m checks baseline`: a cluster's own figures, from a measurement of nodes known to be good. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from checks import perftest
from checks.baselines import Baseline
from checks.expectations import Expectations
from checks.judge_active import job_fabric
from checks.measured import Job, Rank, measured
from checks.rails import Rail
from checks.reading import Unread, counted

LEAST = 0.9
"""Share of its own figure that a cluster must reach again; CPUs and plain TCP differ more from hour to hour."""
LEAST_OF_CPUS = 0.4


class NotWhole(ValueError):
    """One line: which node has no figures."""


def own_baselines(records: Mapping[str, Any], nodes: Sequence[str], expected: Expectations) -> list[Baseline]:
    """An entry for each figure: the median over all ranks, for this GPU, fabric, number of nodes, ranks and payload.

    Raises NotWhole: a node did not report everything, and its absence would lower every figure.
    """
    ranks: list[Rank] = []
    ends: list[Rail] = []
    job = Job(nodes=len(nodes))
    of_node = 0
    for node in nodes:
        one = measured(node, records.get(node), job)
        if not isinstance(one.ranks, tuple):
            raise NotWhole(f"{node}: {one.ranks}")
        of_node = len(one.ranks)
        ranks += one.ranks
        ends += [] if isinstance(one.rails, Unread) else list(one.rails.values())
    figures: dict[tuple[str, int], list[float]] = {}
    for rank in ranks:
        alone = len(nodes) * of_node == 1  # a world of one sends nothing
        for key, value in _figures(rank).items():
            if alone and key[1]:
                continue
            if not isinstance(value, float):
                raise NotWhole(f"{key[0]}: {value}")
            figures.setdefault(key, []).append(value)
    for end in ends:
        if not isinstance(end.sent, float):
            raise NotWhole(f"ib_write_bw to {end.partner}: {end.sent}")
        figures.setdefault((perftest.TOOL, 0), []).append(end.sent)
    gpu = ranks[0].device
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    how = f"median of {counted(len(ranks), 'rank')} on {counted(len(nodes), 'node')}"
    source = f"python -m checks baseline, {today}, {how}"
    return [
        Baseline(
            what,
            gpu,
            job_fabric(len(nodes), expected),
            (len(nodes), len(nodes)),
            of_node,
            payload,
            median(values),
            LEAST_OF_CPUS if gpu == "cpu" else LEAST,
            source,
        )
        for (what, payload), values in figures.items()
    ]


def _figures(rank: Rank) -> dict[tuple[str, int], Any]:
    found: dict[tuple[str, int], Any] = {("burn", 0): rank.burn, ("copy", 0): rank.copy}
    if isinstance(rank.host, Mapping):
        found |= {(what, 0): value for what, value in rank.host.items()}
    if isinstance(rank.collectives, Mapping):
        found |= dict(rank.collectives)
    return found
