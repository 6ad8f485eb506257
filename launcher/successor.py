"""The job after this one, for a run whose job may not be requeued. Subprocess and file system."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from launcher import ownjob, runs
from launcher.machine import box_name
from launcher.paths import REPOSITORY
from launcher.render import Submission, render
from launcher.spec import JobSpec


def script_for(run: runs.Run, spec: JobSpec, stop_seconds: float | None = None) -> str:
    """The sbatch text of one run."""
    submission = Submission(
        run_dir=run.path,
        repository=REPOSITORY,
        python=spec.python or sys.executable,
        log=f"{str(run.submitit_folder).replace('%', '%%')}/%j_0_log.out",
        stop_seconds=stop_seconds,
    )
    return render(spec, submission)


def submit(
    run: runs.Run,
    spec: JobSpec,
    job_id: str,
    exclude: Sequence[str],
    until: float,
    say: Callable[[str], None],
    **more: object,
) -> str:
    """Submit the run's own script behind this job; a run that `sbatch jobs/…` started has none and gets one.

    `more` goes into the job's line. Gives the new job's id. Raises SlurmError where Slurm refuses it.
    """
    if not run.script_file.exists():
        runs.write_text(run.script_file, script_for(run, spec))
    new_job = ownjob.submit_successor(job_id, run.script_file, exclude, os.environ, until, say)
    where = {"box": box_name()} if spec.cluster == "box" else {}
    run.add_job(new_job, "slurm", after=job_id, **where, **more)
    return new_job
