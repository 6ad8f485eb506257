"""`python -m tests.bench.preflight`: what the preflight's first node does for 16, 128 and 1,024 nodes.

The evidence is synthetic (tests/checks/nodes.py: two GPUs and two adapters a node), one node in 512 differs. Measured:
judging evidence; the reports of all nodes through one TCP server, 32 clients at a time; the vote and the table.
The cost for each node should not grow with their number.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from checks import catalog, consensus, gather, report
from checks.collect import collect_node
from checks.evidence import Recorded, key_of
from checks.expectations import Expectations
from checks.registry import judge
from tests.checks.nodes import healthy, value

SIZES = (16, 128, 1024)
EXPECTED = Expectations(gpus=2, fabric="infiniband")


def main() -> int:
    began = time.perf_counter()
    good = _report("n", "590.48.01")
    single = time.perf_counter() - began
    bad = _report("n", "570.10")
    size = len(json.dumps(good))
    print(
        f"One node's evidence collected from a record and judged: {single * 1000:.0f} ms; its report: {size} bytes\n"
    )
    print("| nodes | ms a node: taking reports | vote | table | lines of the table |\n|---|---|---|---|---|")
    for count in SIZES:
        names = tuple(f"n{number}" for number in range(count))
        reports = {
            name: {**(bad if place % 512 == 7 else good), "node": name} for place, name in enumerate(names)
        }
        taking, taken = _timed(lambda reports=reports, names=names: _taken(names, reports))
        vote, results = _timed(lambda taken=taken, names=names: gather.judged_together(names, taken, 20.0))
        table, text = _timed(lambda results=results: report.folded_table(results))
        each = " | ".join(f"{seconds / count * 1000:.2f}" for seconds in (taking, vote, table))
        print(f"| {count} | {each} | {len(text.splitlines())} |")
    return 0


def _report(name: str, driver: str) -> dict[str, Any]:
    records = {**healthy(), key_of("nvml", ["nvmlSystemGetDriverVersion"]): value(driver)}
    node = collect_node(Recorded(records), name, EXPECTED)
    results = judge(node, EXPECTED, catalog.named((), "passive"))
    return {"node": name, "results": [asdict(one) for one in results], "traits": consensus.traits_of(node)}


def _taken(names: tuple[str, ...], reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All reports through the server of the first node; its own needs no connection."""
    first = gather.Step(uuid.uuid4().hex, ("localhost", *names[1:]), 0, 0)
    server = gather.Server(first)
    with ThreadPoolExecutor(32) as clients:
        ends = time.monotonic() + 120
        troubles = clients.map(
            lambda place: gather.deliver(replace(first, place=place), reports[names[place]], ends),
            range(1, len(names)),
        )
        assert not any(troubles)
    return {names[0]: reports[names[0]], **server.wait(set(names[1:]), ends)}


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        done = work()
    return time.perf_counter() - began, done


if __name__ == "__main__":
    sys.exit(main())
