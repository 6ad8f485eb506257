"""`python -m checks.fabric_report --kind=infiniband`: derive this node's fabric variables, print one JSON line.

The launcher runs it once on every node of a job, in the environment of the tasks: what is set there is what somebody
has set, and stays. Exit 0, or 1 where the fabric cannot be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from checks.fabric_environment import Derivation, derive
from checks.fabric_facts import FabricKind
from checks.fabric_reading import Glance, read_facts
from checks.given import Given, given_by


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    derivation = on_this_node(
        options.kind,
        os.environ,
        configured=frozenset(options.configured.split(",")),
        peer=options.peer,
        root=str(options.root),
    )
    print(json.dumps(as_json(derivation)))
    return 1 if derivation.errors else 0


def on_this_node(
    kind: FabricKind,
    environment: Mapping[str, str],
    *,
    configured: frozenset[str] = frozenset(),
    peer: str | None = None,
    root: str = "/",
) -> Derivation:
    """Read this node and derive. `configured` are the variables that the job's configuration has set."""
    given = {
        name: Given(
            one.value, "the job's configuration" if name in configured else "the environment of the job"
        )
        for name, one in given_by(environment, "").items()
    }
    with Glance(root) as source:
        facts = read_facts(source, node_name(environment), environment)
    return derive(facts, kind, given, peer)


def node_name(environment: Mapping[str, str]) -> str:
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def as_json(derivation: Derivation) -> dict[str, object]:
    return dataclasses.asdict(derivation)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m checks.fabric_report", description=__doc__)
    parser.add_argument("--kind", choices=get_args(FabricKind), default="auto")
    parser.add_argument("--peer", metavar="ADDRESS", help="IPv4 address that the ranks meet at")
    parser.add_argument(
        "--configured", metavar="A,B", default="", help="variables that the job's configuration sets"
    )
    parser.add_argument("--root", type=Path, default=Path("/"), help="folder that holds sys/ and proc/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
