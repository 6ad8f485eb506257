"""Making a cluster's Slurm commands reachable from this process. Changes this process's environment.

Only the box needs it: its commands are in a folder of its own, and its SLURM_CONF is not the machine's.
"""

from __future__ import annotations

import os

from launcher.spec import UserError

BOX_NAME_VARIABLE = "LAUNCHER_BOX"
"""Which box `cluster=box` means where several run side by side; "default" when unset."""


def box_name() -> str:
    return os.environ.get(BOX_NAME_VARIABLE, "default")


def use_cluster(cluster: str) -> None:
    """Put the commands of `cluster` on PATH. Raises UserError when cluster=box and no box runs."""
    if cluster != "box":
        return
    from launcher import box

    found = box.find(box_name())
    if found is None:
        raise UserError("cluster=box: no box is running; start one with: python -m launcher box up")
    os.environ.update(box.environment(found))
