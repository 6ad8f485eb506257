"""The full table of checks: importing this module fills `checks.registry.CHECKS`. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from checks import (
    judge_active,
    judge_adapter_log,
    judge_environment,
    judge_gpu,
    judge_gpu_use,
    judge_host,
    judge_links,
    judge_pcie,
    judge_rdma,
    judge_roce,
)
from checks.registry import CHECKS, Check, Tier

JUDGES = (
    judge_gpu,
    judge_gpu_use,
    judge_links,
    judge_pcie,
    judge_rdma,
    judge_adapter_log,
    judge_roce,
    judge_host,
    judge_environment,
    judge_active,
)
"""Each entered its checks when it was imported; reports show them in this order."""


class UnknownCheck(ValueError):
    """One line: what is unknown, and the nearest right thing."""


def named(names: Sequence[str], tier: Tier | None) -> list[Check]:
    """The checks of a tier, or of all; with names only those, each a check (`gpu.ecc`) or a subject (`gpu`).

    Raises:
        UnknownCheck: there is no such check.
    """
    order = {module.__name__: place for place, module in enumerate(JUDGES)}
    every = [check for check in CHECKS.values() if tier in (None, check.tier)]
    every.sort(key=lambda check: order.get(check.judge.__module__, len(order)))
    if not names:
        return every
    known = dict.fromkeys([check.name for check in every] + [check.subject for check in every])
    for name in names:
        if name not in known:
            where = f" in tier {tier}" if tier else ""
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`python -m checks list` shows them"
            raise UnknownCheck(f"no check {name!r}{where}: {hint}")
    return [check for check in every if check.name in names or check.subject in names]
