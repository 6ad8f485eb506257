"""`box up | down | status | shell`: arguments in, lines out. Thin."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping

from launcher.box import lifecycle, paths
from launcher.box.lifecycle import Box, Status
from launcher.spec import UserError


def run(namespace: argparse.Namespace) -> int:
    """Do what the namespace says and return the exit status. Raises UserError."""
    match namespace.box_action:
        case "up":
            return _up(namespace)
        case "down":
            return _down(paths.names() if namespace.all else [namespace.name])
        case "status":
            return _status(namespace.name, namespace.json)
        case "shell":
            return _shell(namespace.name, namespace.command)
    raise AssertionError(f"unknown action {namespace.box_action!r}")


def shell_environment(box: Box, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a shell in the box.

    Inside a job of another cluster the variables of that job must go, or srun would look for its job here.
    Inside a job of this box they stay.
    """
    own = inherited.get("SLURM_CONF") == str(box.slurm_conf)
    foreign = () if own else ("SLURM_", "SLURMD_")
    kept = {key: value for key, value in inherited.items() if not key.startswith(foreign)}
    return {**kept, **lifecycle.environment(box)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _up(namespace: argparse.Namespace) -> int:
    box = lifecycle.up(
        nodes=namespace.nodes, name=namespace.name, cpus_per_node=namespace.cpus_per_node,
        gpus=namespace.gpus, accounting=namespace.accounting, say=_say,
    )  # fmt: skip
    print(f"box {box.name!r} is up with {len(box.nodes)} nodes; use it in this shell with:")
    print(f'  export PATH={box.bin_dir}:"$PATH"')
    return 0


def _down(names: list[str]) -> int:
    for name in names:
        print(f"box {name!r} is down" if lifecycle.down(name) else f"box {name!r} was not up")
    if not names:
        print("no box was up")
    return 0


def _status(name: str | None, as_json: bool) -> int:
    """Exit status 0 if all boxes asked for are up, 1 if one is not."""
    found = [lifecycle.status(each) for each in ([name] if name else paths.names())]
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    else:
        print("\n".join(map(_describe, found)) or "no box is up")
    return 0 if all(each.state == "up" for each in found) else 1


def _describe(box: Status) -> str:
    if box.state == "down":
        return f"{box.name}: down"
    if box.state == "broken":
        return f"{box.name}: does not answer; python -m launcher box down --name {box.name}"
    by_state: dict[str, int] = {}
    for state in box.nodes.values():
        by_state[state] = by_state.get(state, 0) + 1
    nodes = ", ".join(f"{count} {state}" for state, count in sorted(by_state.items()))
    jobs = ", ".join(f"{count} {state.lower()}" for state, count in sorted(box.jobs.items())) or "none"
    head = f"{box.name}: up, {box.shape}, {box.slurm_version}"
    return f"{head}\n  nodes: {nodes}\n  jobs: {jobs}\n  logs: {box.state_dir}/log"


def _shell(name: str, command: list[str]) -> int:
    box = lifecycle.find(name)
    if box is None:
        raise UserError(f"box {name!r} is not up; start it with: python -m launcher box up --name {name}")
    words = command[1:] if command[:1] == ["--"] else command
    try:
        code = subprocess.run(
            words or [os.environ.get("SHELL", "/bin/sh")], env=shell_environment(box, os.environ), check=False
        ).returncode
    except OSError as error:
        raise UserError(f"cannot run {words[0] if words else '$SHELL'}: {error.strerror}") from error
    return code if code >= 0 else 128 - code
