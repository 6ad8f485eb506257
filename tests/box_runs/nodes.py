"""Nodes of a box of one's own, and their sudden end."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil

from launcher import box as boxes


def kill_node(box: boxes.Box, node: str) -> None:
    """End a node's slurmd, its slurmstepds and their tasks without a word, as a power cut does."""
    os.kill(int((box.state_dir / "run" / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
    wanted = {f"SLURMD_NODENAME={node}", f"BOX_JOB={box.slurm_conf}"}
    tasks = [
        process
        for process in psutil.process_iter()
        if wanted <= {f"{name}={value}" for name, value in environment_of(process).items()}
    ]
    above = {
        parent for task in tasks for parent in [task.parent()] if parent and "slurmstepd" in parent.name()
    }
    below = {
        child for task in tasks for child in children_of(task)
    }  # the controller's srun has another environment
    for process in {*above, *tasks, *below}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []
