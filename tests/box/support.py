"""What the tests of boxes share: commands in a box, and the processes that a box left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from launcher import box as boxes


def in_box(box: boxes.Box, *command: str, **variables: str) -> str:
    """Output of a command that runs in the box's environment; a failure shows what it said."""
    result = subprocess.run(
        command,
        env={**os.environ, **boxes.environment(box), **variables},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, f"{command} failed: {result.stderr}"
    return result.stdout


def marked(marker: str) -> list[str]:
    """Command lines of all live processes that have `marker` in command line or environment.

    The environment is read as the kernel has it: psutil's ends at the gap that slurmstepd's title leaves in it.
    """
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            own = process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE
            words = process.cmdline()
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().replace(b"\0", b"\n")
            if not own and marker in "\n".join([*words, os.fsdecode(environment)]):
                lines.append(" ".join(words))
    return lines


@contextlib.contextmanager
def brought_up(name: str, **wanted: object) -> Iterator[boxes.Box]:
    """A box of one test, gone afterwards."""
    try:
        yield boxes.up(name=name, **{"gpus": 0, **wanted})  # type: ignore[arg-type]
    finally:
        boxes.down(name)


def unique(name: str) -> str:
    """A box name that no other test session on this machine uses."""
    return f"test-{os.getpid()}-{name}"


def submit(box: boxes.Box, *words: str, **variables: str) -> str:
    """Submit a job and return its id."""
    return in_box(box, "sbatch", "--parsable", *words, **variables).strip()


def finish(box: boxes.Box, job: str) -> str:
    """Wait for a job's end and return its state. `sbatch --wait` would look only every ten seconds."""

    def ended() -> bool:
        return state() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

    def state() -> str:
        shown = in_box(box, "scontrol", "show", "job", job, "-o").split()
        return next(word.removeprefix("JobState=") for word in shown if word.startswith("JobState="))

    wait_until(ended, f"end of job {job}", seconds=240)
    return state()


def wait_until(true: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    """Return when the condition holds; fail, saying what was awaited, if it does not in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(0.05)


def lines_of(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()
