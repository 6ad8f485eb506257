"""What the tests of survival share: a run of tests.box_runs.steps, and the proof that it lost nothing."""

from __future__ import annotations

import subprocess
import time
from datetime import datetime
from typing import Any

from launcher import ledger, runs, slurm
from tests.box_runs.support import Launcher, ended, wait_until

SAME_SECOND = 2.0
"""slurmd counts in seconds: a credential made in the second in which it ended the job is refused with it ("already
killed, do not launch batch job"), and slurmctld then fails the job. For that, too, Slurm lets a requeued job wait."""
STEPS = {"module": "steps", "seconds": 0.1, "save_every": 5}


def steps_of(run: runs.Run) -> list[int]:
    return [line["step"] for line in ledger.read_lines(run.metrics_file)]


def started_from(run: runs.Run, attempt: int) -> int:
    return int((run.path / f"attempt-{attempt:02d}" / "from-0").read_text())


def after_step(run: runs.Run, step: int) -> None:
    wait_until(lambda: step in steps_of(run), f"step {step} of {run.path}")


def job(launcher: Launcher, run: runs.Run, which: int = -1) -> dict[str, str]:
    said = launcher.slurm("scontrol", "show", "job", "-o", run.jobs()[which]["job_id"])
    return slurm.parse_key_values(said)


def start_now(launcher: Launcher, run: runs.Run, restarts: int = 1, within: float = 400.0) -> None:
    """A requeued job waits for its credential to expire; an administrator may let it start almost at once."""
    command = ["scontrol", "update", f"jobid={run.jobs()[-1]['job_id']}", "starttime=now"]
    seen: dict[str, str] = {}

    def runs_again() -> bool:
        seen.update(job(launcher, run))
        requeued_at = datetime.fromisoformat(seen["SubmitTime"]).timestamp()
        if seen["JobState"] == "PENDING" and time.time() > requeued_at + SAME_SECOND:
            subprocess.run(command, env=launcher.environment, capture_output=True, check=False)
        assert seen["JobState"] != "FAILED", f"Slurm gave up the requeued job: {seen}"
        return seen["JobState"] == "RUNNING" and seen["Restarts"] == str(restarts)

    try:
        wait_until(runs_again, f"start {restarts + 1}", within)
    except AssertionError as error:
        raise AssertionError(f"{error}: {seen}") from None


def check_continued(run: runs.Run, last: int, *causes: str) -> list[dict[str, Any]]:
    """The run's attempts ended so, and each began where something was saved: nothing announced was lost."""
    records = [ended(run, number) for number in range(1, len(causes) + 1)]
    assert [record["cause"] for record in records] == list(causes), [record["reason"] for record in records]
    assert len(run.attempts()) == len(causes)
    assert steps_of(run)[-1] == last
    for record in records[1:]:
        assert started_from(run, record["attempt"]) == record["saved_in"]
        assert record["saved_in"] > 0
    for number, step in enumerate(range(1, last + 1), start=1):
        assert step in steps_of(run), f"step {number} was skipped"
    return records


def runs_log(run: runs.Run) -> str:
    return (run.submitit_folder / f"{run.jobs()[0]['job_id']}_0_log.out").read_text()
