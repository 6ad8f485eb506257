"""Breaking a box: its slurmctld, and its nodes with everything that runs on them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable

import psutil

from launcher import box as boxes
from launcher import runs
from tests.box_runs.support import Launcher, wait_until


def end_slurmctld(box: boxes.Box) -> Callable[[], None]:
    """End slurmctld, and give what starts it again as it was started."""
    process = psutil.Process(int((box.state_dir / "run" / "slurmctld.pid").read_text()))
    command, environment = process.cmdline(), process.environ()
    process.terminate()
    wait_until(
        lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "the end of slurmctld"
    )

    def start_again() -> None:
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return start_again


def answers(launcher: Launcher) -> bool:
    """Whether slurmctld does."""
    done = subprocess.run(
        ["scontrol", "ping"],
        env=launcher.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return "is UP" in done.stdout


def shell_of(run: runs.Run) -> int:
    """The batch shell: the controller's parent."""
    return psutil.Process(run.state()["pid"]).ppid()


def kill_node(box: boxes.Box, node: str) -> None:
    """End a node's slurmd, its slurmstepds and their tasks without a word, as a power cut does."""
    os.kill(int((box.state_dir / "run" / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
    wanted = {f"SLURMD_NODENAME={node}", f"BOX_JOB={box.slurm_conf}"}
    tasks = [
        process
        for process in psutil.process_iter()
        if wanted <= {f"{name}={value}" for name, value in _environment_of(process).items()}
    ]
    above = {
        parent for task in tasks for parent in [task.parent()] if parent and "slurmstepd" in parent.name()
    }
    below = {
        child for task in tasks for child in _children_of(task)
    }  # the controller's srun has another environment
    # The slurmstepds first: one that sees its task die tells slurmctld that the job has ended, as no dead node can.
    for process in [*above, *tasks, *below]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
