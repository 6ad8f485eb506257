"""Making a cluster's Slurm commands reachable from this process. Changes this process's environment.

Only the box needs it: its commands are in a folder of its own, and its SLURM_CONF is not the machine's.
"""

from __future__ import annotations

import os

from launcher.machine import box_name
from launcher.runs import Run
from launcher.spec import UserError


def use_cluster(cluster: str) -> None:
    """Put the commands of `cluster` on PATH. Raises UserError when cluster=box and no box runs."""
    if cluster == "box":
        _use_box(box_name())


def use_cluster_of(run: Run) -> None:
    """The same for the cluster that ran the newest job of `run`, which may be another box than today's."""
    jobs = run.jobs()
    if run.spec().cluster == "box":
        _use_box(jobs[-1].get("box", box_name()) if jobs else box_name())


def _use_box(name: str) -> None:
    from launcher import box

    found = box.find(name)
    if found is None:
        which = "" if name == "default" else f" --name {name}"
        raise UserError(
            f"cluster=box: box {name!r} is not running; start it with: python -m launcher box up{which}"
        )
    os.environ.update(box.environment(found))
