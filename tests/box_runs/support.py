"""The launcher as a user runs it, and waiting for what a real Slurm does in its own time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import ledger, runs
from launcher.paths import REPOSITORY

WAIT_SECONDS = 540.0
"""For anything that a job may take on two slow cores that others use as well: three times what has been seen."""

FAST = ("args.steps=2", "args.save_every=0", "args.sequence_length=64", "args.batch_size=4")
"""The smallest training that still has a first and a last step."""


@dataclass(frozen=True)
class Launcher:
    """`python -m launcher` with a run root of its own and the shared box as cluster=box."""

    environment: Mapping[str, str]
    run_root: Path

    def __call__(
        self, *words: str, status: int | None = 0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one command; `status` is the exit status that the caller promises, None for any."""
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            env=self.environment, cwd=cwd or REPOSITORY, capture_output=True, text=True, check=False,
            timeout=WAIT_SECONDS,
        )  # fmt: skip
        if status is not None:
            assert done.returncode == status, f"launcher {' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done

    def slurm(self, *command: str, cwd: Path | None = None) -> str:
        """A Slurm command on the box; its output."""
        done = subprocess.run(
            list(command), env=self.environment, cwd=cwd or REPOSITORY, capture_output=True, text=True, check=False,
            timeout=WAIT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run_of(self, submitted: subprocess.CompletedProcess[str]) -> runs.Run:
        """The run that a `submit --json` answered with."""
        return runs.find([self.run_root], json.loads(submitted.stdout.splitlines()[0])["run"])

    def only_run(self) -> runs.Run:
        found = runs.all_runs([self.run_root])
        assert len(found) == 1, found
        return found[0]


def wait_until(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Poll until the condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
    return value


def ended(run: runs.Run, count: int = 1, seconds: float = WAIT_SECONDS) -> dict[str, Any]:
    """Wait for the ledger's line of attempt number `count`."""
    return wait_until(lambda: run.attempts()[count - 1 :], f"attempt {count} of {run.path}", seconds)[0]


def losses(run: runs.Run) -> list[float]:
    return [line["loss"] for line in ledger.read_lines(run.metrics_file)]


SUBMIT = """
import dataclasses
import json
import sys
from pathlib import Path
from launcher import executors, runs
from launcher.cluster_commands import use_cluster
from launcher.config import compose
words, changes = json.load(sys.stdin)
spec = dataclasses.replace(compose(words), **changes)
use_cluster(spec.cluster)
run = runs.create(Path(sys.argv[1]), spec, [])
executors.submit(run, spec)
print(run.path)
"""


def submit_entrypoint(
    launcher: Launcher, *words: str, module: str = "entrypoint", **args: object
) -> runs.Run:
    """Submit a module of this folder in place of a recipe, through the launcher's own submission.

    In a process with the launcher's environment: another box of this machine may have other nodes.
    """
    changes = {"entrypoint": f"tests.box_runs.{module}", "args": args}
    wanted = [["recipe=ch3_ddp", "cluster=box", *words], changes]
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, str(launcher.run_root)], input=json.dumps(wanted),
        env=launcher.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return runs.Run(Path(done.stdout.strip()))
