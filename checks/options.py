"""Words of the command line that say what is expected of a node. Pure."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from checks.expectations import FABRICS, Expectations

EXIT_USAGE = 64


class Parser(argparse.ArgumentParser):
    """Status 64 for wrong usage: 2 means a warning here."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def add_expectations(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is expected of a node")
    group.add_argument("--gpus", type=_count, help="GPUs that the job needs on a node; 0: none are missed")
    group.add_argument(
        "--fabric", choices=FABRICS, help="the job's network; tcp and none: no RDMA device is missed"
    )
    group.add_argument("--sku", help="part of the GPU's name, as H100")
    group.add_argument("--rails", type=_count, help="RDMA devices that must be up")
    group.add_argument("--shared", action="store_true", help="other jobs may use this node's other GPUs")
    group.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="CHECK",
        help="a check or subject that has no evidence here",
    )
    group.add_argument(
        "--demand-permission",
        action="store_true",
        help="what only root may read blocks where it was not read",
    )
    group.add_argument("--master", metavar="HOST:PORT", type=_address, help="connect to the job's first node")
    group.add_argument("--folder", action="append", default=[], help="a folder that the job writes to")


def expectations(options: argparse.Namespace, recorded: Expectations | None = None) -> Expectations:
    """What the options say; what they leave open is as a bundle recorded it."""
    base = recorded or Expectations()
    said = {
        name: getattr(options, name)
        for name in ("gpus", "fabric", "sku", "rails", "master")
        if getattr(options, name) is not None
    }
    folders = [
        *base.folders,
        *options.folder,
        *([options.writable] if getattr(options, "writable", None) else []),
    ]
    return replace(
        base,
        **said,
        exclusive=base.exclusive and not options.shared,
        without=(*base.without, *options.without),
        demand_permission=base.demand_permission or options.demand_permission,
        folders=tuple(dict.fromkeys(str(Path(folder).absolute()) for folder in folders)),
    )


def arguments(expected: Expectations) -> Sequence[str]:
    """The words that give these expectations: what one process passes on to another."""
    words = [f"--{name}={value}" for name in ("gpus", "fabric", "sku", "rails", "master")
             if (value := getattr(expected, name)) is not None]  # fmt: skip
    words += [f"--without={name}" for name in expected.without] + [
        f"--folder={name}" for name in expected.folders
    ]
    words += ["--shared"] * (not expected.exclusive) + ["--demand-permission"] * expected.demand_permission
    return words


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of zero or more")
    return int(text)


def seconds(text: str) -> float:
    """A time limit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above zero")
    return value


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text
