"""`demo`: a real two-node Slurm on this machine, one recipe through it, and what to try next. `make demo`
calls it.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from launcher import box, runs
from launcher.commands import submit
from launcher.machine import box_name
from launcher.paths import known_run_roots

RECIPE = "ch4_fsdp"
NODES = 2


def run(options: argparse.Namespace) -> int:
    console = Console()
    cluster = _start_box(console)
    words = [f"recipe={RECIPE}", f"cluster={cluster}", *options.words]
    console.print(
        f"[bold]$[/] python -m launcher submit {' '.join(words)} --wait", highlight=False, soft_wrap=True
    )
    status = submit.run(argparse.Namespace(words=words, dry_run=False, wait=True, json=False))
    if status == 0:
        latest = runs.find(known_run_roots(), None)
        console.print("\nNext:", highlight=False)
        for command in _next_commands(cluster, latest.id):
            console.print(f"  {command}", highlight=False, soft_wrap=True)
    return status


def _start_box(console: Console) -> str:
    """The cluster to use: the box, or this machine alone where the box cannot run, which is said in one line."""
    try:
        running = box.find(box_name())
        if running is None:
            console.print(f"starting a Slurm of {NODES} nodes on this machine", highlight=False)
            running = box.up(nodes=NODES, name=box_name())
        console.print(f"Slurm answers: {', '.join(running.nodes)}", highlight=False)
    except box.BoxUnavailable as error:
        console.print(
            f"no Slurm here, so the run uses the local executor: {error}", highlight=False, soft_wrap=True
        )
        return "local"
    return "box"


def _next_commands(cluster: str, run_id: str) -> list[str]:
    again = f"python -m launcher submit recipe={RECIPE} cluster={cluster} --wait"
    commands = [
        ". .venv/bin/activate",
        f"python -m launcher status {run_id}",
        f"{again} args.strategy=hybrid_shard",
        f"{again} args.lr=1e-4,3e-4",
    ]
    return [*commands, "python -m launcher box down"] if cluster == "box" else commands
