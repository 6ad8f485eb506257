"""Healthy measurements of four nodes with two H100s each, and what a fault changes in them."""

from __future__ import annotations

import copy
from typing import Any

from checks.baselines import Baseline
from checks.measured import Job
from tests.checks.stand_in_ib_write_bw import report

MIB = 1 << 20
WHAT = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def rank() -> dict[str, Any]:
    figures = {f"{what} {size}": value for what in WHAT for size, value in ((MIB, 10.0), (256 * MIB, 180.0))}
    return {
        "device": "NVIDIA H100 80GB HBM3", "burn": 700.0, "copy": 2500.0, "done": True, "trouble": "",
        "host": {"to device": 50.0, "to host": 50.0}, "peers": {"0-1": 330.0, "1-0": 332.0}, **figures,
    }  # fmt: skip


def node() -> dict[str, Any]:
    rails = {f"mlx5_{number}": rail(391.0 + number) for number in range(2)}
    return {
        "node": "n1", "gpus": 2, "ranks": [rank(), rank()], "transport": ["NET/IB/GDRDMA", "P2P"], "rails": rails,
    }  # fmt: skip


def rail(sent: float) -> dict[str, Any]:
    return {
        "partner": "n2",
        "rate": 400.0,
        "sent": {"value": report(sent)},
        "served": {"value": report(392.0)},
    }


def changed(where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A healthy node whose value at this place is another one."""
    whole = copy.deepcopy(node())
    inner: Any = whole
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    return whole


def baseline(what: str, value: float) -> Baseline:
    return Baseline(what, "H100", "any", (1, 100), 0, 0, value, 0.9, "a test")


BASELINES = tuple(
    baseline(*one) for one in (*((what, 180.0) for what in WHAT), ("copy", 2500.0), ("to device", 50.0))
)
JOB = Job(nodes=4, best_burn=700.0, baselines=BASELINES, expects_pairs=True, paired=2, expects_rails=True)
