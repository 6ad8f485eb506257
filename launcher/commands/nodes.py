"""`nodes`: which nodes are left out of new jobs and why; `--clear` takes them back."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher import badnodes, slurm
from launcher.badnodes import BadNode
from launcher.paths import known_run_roots
from launcher.spec import UserError
from launcher.suggest import did_you_mean


def run(options: argparse.Namespace) -> int:
    wanted = _expanded(options.nodes)
    if options.clear and not wanted:
        raise UserError("--clear: which nodes? as in: python -m launcher nodes --clear n7")
    now = time.time()
    records = {
        place: badnodes.everything(*place)
        if options.all
        else badnodes.current(badnodes.everything(*place), now)
        for place in _places(options.on)
    }
    known = {bad.node for found in records.values() for bad in found}
    if missing := [node for node in wanted if node not in known]:
        hint = did_you_mean(missing[0], sorted(known)) if known else "no node is left out"
        raise UserError(f"{missing[0]} is not on record: {hint}")
    if wanted:
        records = {place: [bad for bad in found if bad.node in wanted] for place, found in records.items()}
    if options.clear:
        return _clear(records)
    if options.json:
        lines = [
            {"cluster": cluster, **asdict(bad)} for (_, cluster), found in records.items() for bad in found
        ]
        print(json.dumps(lines, ensure_ascii=False))
    elif wanted:
        _explain(records, now)
    else:
        _show(records, now)
    return 0


def _expanded(words: list[str]) -> list[str]:
    try:
        return [node for word in words for node in slurm.expand_hostlist(word)]
    except ValueError as error:
        raise UserError(str(error)) from None


def _places(cluster: str | None) -> list[tuple[Path, str]]:
    places = [(root, name) for root in known_run_roots() for name in badnodes.clusters(root)]
    chosen = [place for place in places if cluster in (None, place[1])]
    if cluster is not None and not chosen:
        names = sorted({name for _, name in places})
        raise UserError(
            f"--on {cluster}: {did_you_mean(cluster, names) if names else 'no cluster has a record'}"
        )
    return chosen


def _clear(records: dict[tuple[Path, str], list[BadNode]]) -> int:
    for (root, cluster), found in records.items():
        nodes = list(dict.fromkeys(bad.node for bad in found))
        badnodes.clear(root, cluster, nodes)
        for node in nodes:
            print(f"new jobs on {cluster} may have {node} again")
    return 0


def _show(records: dict[tuple[Path, str], list[BadNode]], now: float) -> None:
    console = Console()
    if not any(records.values()):
        console.print("no node is left out of new jobs", highlight=False)
        return
    table = Table("node", "cluster", "until", "because", "run", box=None, pad_edge=False)
    for (_, cluster), found in records.items():
        for bad in found:
            until = bad.ends if bad.until > now else f"ended {bad.ends}"
            table.add_row(bad.node, cluster, until, escape(bad.reason), bad.run)
    console.print(table)
    console.print(
        "evidence: python -m launcher nodes NODE; take one back: python -m launcher nodes --clear NODE",
        highlight=False,
    )


def _explain(records: dict[tuple[Path, str], list[BadNode]], now: float) -> None:
    console = Console()
    for (_, cluster), found in records.items():
        for bad in found:
            table = Table(show_header=False, box=None, pad_edge=False)
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(bad.time))
            state = (
                f"left out of new jobs until {bad.ends}"
                if bad.until > now
                else f"was left out until {bad.ends}"
            )
            table.add_row("node", f"{bad.node} of {cluster}: {state}")
            table.add_row("since", f"{since}, {bad.kind}: {_WHY_SO_LONG[bad.kind]}")
            table.add_row("because", escape(bad.reason))
            for line in bad.evidence:
                if line != bad.reason:
                    table.add_row("evidence", escape(line))
            table.add_row("run", f"{bad.run}, attempt {bad.attempt}: {bad.directory}")
            console.print(table, soft_wrap=True, highlight=False)


_WHY_SO_LONG = {
    kind: f"{badnodes.HOURS[kind]:g} h, {what}"
    for kind, what in {
        "fail": "a check of the preflight failed on it",
        "unknown": "a check of the preflight could not look at it, and could at others",
        "hardware": "a rank on it ended with an error of the hardware",
        "node_failure": "it died, or no task started on it",
    }.items()
}
