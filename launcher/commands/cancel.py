"""`cancel`: end a run's job, or the processes of a run on this machine."""

from __future__ import annotations

import argparse
import signal

from launcher import runs, slurm, status
from launcher.cluster_commands import use_cluster_of
from launcher.paths import known_run_roots


def run(options: argparse.Namespace) -> int:
    found = runs.find(known_run_roots(), options.run)
    use_cluster_of(found)
    current = status.status_of(found)
    if current.is_over:
        print(f"run {found.id} is already {current.state}: {current.reason}")
        return 0
    if current.executor == "slurm":
        slurm.run(["scancel", current.job_id])
    elif not status.signal_local(found, signal.SIGTERM):
        print(f"run {found.id}: its controller has not started yet or is gone; try again in a second")
        return 1
    print(
        f"run {found.id} is being cancelled (job {current.job_id}); "
        f"it can go on later: python -m launcher resume {found.id}"
    )
    return 0
