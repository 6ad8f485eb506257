"""Faults for trying the active checks where no hardware is broken: CHECKS_TRIAL in the environment of a measurement.

    CHECKS_TRIAL='n3 stop'           the ranks of n3 stop (SIGSTOP) before their first collective
    CHECKS_TRIAL='n3 slow'           every collective of n3 takes 0.25 s longer
    CHECKS_TRIAL='n1-n4 slow'        the same only in groups that hold n1 and n4: their link
    CHECKS_TRIAL='n3 burn'           n3's matrix product is slow
Several with commas. Unset in every real measurement: nothing of the project sets it but its tests.
"""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "CHECKS_TRIAL"
SLOW_SECONDS = 0.25
"""Several times what a collective takes on a busy machine: what is tried has to stand out there as well."""
BURN_SECONDS = 0.1
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def tried(stage: str) -> None:
    """Suffer what CHECKS_TRIAL says for this node at this stage."""
    for fault in faults_of(
        os.environ.get(VARIABLE, ""), os.environ.get("CHECKS_NODE", ""), os.environ.get("CHECKS_GROUP", "")
    ):
        if fault == "stop" and stage.startswith(COLLECTIVES):
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "slow" and stage in COLLECTIVES:
            time.sleep(SLOW_SECONDS)
        if fault == "burn" and stage == "product":
            time.sleep(BURN_SECONDS)


def faults_of(trial: str, node: str, group: str) -> list[str]:
    """The faults that strike this node when it is measured with `group` (names with commas). Pure."""
    found = []
    for one in trial.split(","):
        where, _, fault = one.strip().partition(" ")
        ends = where.split("-")
        if node in ends and set(ends) <= set(group.split(",")):
            found.append(fault)
    return found
