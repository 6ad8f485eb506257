"""`python -m checks`: check this node and say what was found; exit 0 pass, 1 fail, 2 warn, 3 unknown, 64 usage.

With --json it prints one line that a program reads: the launcher runs it so on every node before a job's tasks start.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from checks import minimal
from checks.verdict import EXIT_CODES, CheckResult, worst

EXIT_USAGE = 64


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    results = run_checks(options)
    verdict = worst([result.verdict for result in results])
    if options.json:
        print(
            json.dumps({"node": options.node, "checks": [dataclasses.asdict(result) for result in results]})
        )
    else:
        _print_table(results)
    return EXIT_CODES[verdict]


def run_checks(options: argparse.Namespace) -> list[CheckResult]:
    """The checks that the options ask for; GPUs are always counted."""
    results = [
        minimal.gpus_present(
            options.gpus, visible=os.environ.get("CUDA_VISIBLE_DEVICES") if options.gpus else None
        )
    ]
    if options.master is not None:
        host, _, port = options.master.rpartition(":")
        results.append(minimal.name_resolves(host))
        results.append(minimal.reachable(host, int(port)))
    if options.writable is not None:
        results.append(minimal.writable(options.writable, node=options.node))
    return results


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m checks", description=__doc__)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that this node must have (default 0)")
    parser.add_argument("--master", metavar="HOST:PORT", help="connect to the job's first node")
    parser.add_argument("--writable", type=Path, metavar="FOLDER", help="write a file into the run directory")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    parser.add_argument(
        "--node", default=os.environ.get("SLURMD_NODENAME", socket.gethostname()), help=argparse.SUPPRESS
    )
    return parser


def _print_table(results: list[CheckResult]) -> None:
    rows = [("check", "verdict", "read", "expected", "what to do")]
    rows += [
        (r.check, r.verdict.value, r.read, r.expected, r.remedy if r.verdict.blocks else "") for r in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]
            ).rstrip()
        )


if __name__ == "__main__":
    sys.exit(main())
