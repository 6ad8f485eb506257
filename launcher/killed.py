"""What the batch shell starts when its controller was killed and the job may not be requeued: another job follows.

    python -m launcher.killed follow --run-dir=…     (or the words that the controller got)
    python -m launcher.killed began --run-dir=…

`follow` ends with 0 when there is nothing left to try, and with 75 when the shell should try again: slurmctld is away,
or it would requeue the job and failed to this time. `began` ends with 0 when the killed controller had begun an
attempt: then the next one counts it, and stops a run that does not get on; a controller that dies before that would
be started for ever.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher import ledger, lost, ownjob, runs, slurm, successor
from launcher.allocation import slurm_allocation
from launcher.controller import last_of_each
from launcher.paths import run_root
from launcher.saying import say
from launcher.spec import UserError

AGAIN = 75
BATCH_STARTED = "LAUNCHER_BATCH_STARTED"
"""When the batch script began, in unix seconds, with the comma of some locales."""
INSIST_SECONDS = 60.0
MOST_IN_A_ROW = 3
"""Controllers that may be killed before any of them writes a ledger line; after that no job follows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a job that goes on with the run of this one, or say whether its controller had begun."""
    question, *words = sys.argv[1:] if argv is None else argv
    try:
        run, job_id = _run_of(words, os.environ)
        if question == "began":
            return int(
                run is None or not _began(run, job_id, float(os.environ[BATCH_STARTED].replace(",", ".")))
            )
        if run is None:
            say("the controller had made no run directory yet: submit it again")
            return 0
        if ownjob.look(job_id).may_requeue:
            return AGAIN
        if _in_a_row(run) >= MOST_IN_A_ROW:
            say(
                f"{MOST_IN_A_ROW} controllers in a row were killed; no other job follows, resume continues it"
            )
            return 0
        follower = successor.submit(
            run, run.spec(), job_id, (), time.time() + INSIST_SECONDS, say, controller_killed=True
        )
    except slurm.SlurmError as error:
        say(f"no job follows yet: {error}")
        return AGAIN if ownjob.is_away(error) else 0
    except UserError as error:
        say(f"no job follows: {error}")
        return 0
    say(f"job {follower} follows job {job_id}")
    return 0


def _run_of(words: list[str], environment: Mapping[str, str]) -> tuple[runs.Run | None, str]:
    """The run that the killed controller worked on, as far as it came, and this job's id."""
    from launcher.config import compose

    allocation = slurm_allocation(environment)
    if words and words[0].startswith("--run-dir="):
        return runs.Run(Path(words[0].removeprefix("--run-dir="))), allocation.job_id
    root = run_root(compose(last_of_each(words)).run_root)
    return runs.run_of_job(root, allocation.cluster, allocation.job_id), allocation.job_id


def _began(run: runs.Run, job_id: str, since: float) -> bool:
    """Whether an attempt of this job began after its batch script did."""
    noted = (runs.read_json(folder / lost.START_FILE) or {} for folder in run.attempt_dirs())
    return any(about.get("job_id") == job_id and float(about["started"]) >= since for about in noted)


def _in_a_row(run: runs.Run) -> int:
    """How many jobs were submitted from here since the newest line of the ledger."""
    ended = max((float(line.get("ended") or 0.0) for line in ledger.attempts(run.attempts_file)), default=0.0)
    return sum(bool(job.get("controller_killed")) and float(job["time"]) > ended for job in run.jobs())


if __name__ == "__main__":
    sys.exit(main())
