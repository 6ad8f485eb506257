"""Submission through submitit's executors: Slurm, this machine in the background, this terminal. Subprocess.

submitit keeps paths and job handles; what a job runs is our rendered script, or our controller, never a pickle of the
recipe. Importing submitit costs 0.2 s, so only commands that submit import this module.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launcher import durations, runs, slurm
from launcher.machine import box_name
from launcher.paths import REPOSITORY
from launcher.spec import JobSpec, UserError
from launcher.successor import script_for

LOCAL_GRACE_MINUTES = 2
"""submitit's own limit lies this much behind ours, so that the controller ends the tasks and writes the ledger."""


class RenderedSlurmJob(submitit.SlurmJob[None]):
    """A handle whose state does not need sacct: submitit's own is UNKNOWN for ever on a cluster without accounting."""

    @property
    def state(self) -> str:
        state = slurm.job_state(self.job_id)
        return state.name if state is not None else "UNKNOWN"


class RenderedSlurmExecutor(submitit.SlurmExecutor):
    """submitit's Slurm executor, submitting a script that is already rendered."""

    job_class = RenderedSlurmJob

    def __init__(self, folder: Path, script: str) -> None:
        super().__init__(folder=folder)
        self._script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        """`sbatch` without what an enclosing job left in the environment."""
        kept = slurm.without_outer_job(os.environ)
        forget = [f"--unset={name}" for name in os.environ if name not in kept]
        return ["env", *forget, "sbatch", str(submission_file_path)]

    def submit_script(self) -> RenderedSlurmJob:
        """Submit. Raises UserError with sbatch's own words when it refuses."""
        try:
            # submitit prints sbatch's complaint before it raises with it; one of the two is enough.
            with contextlib.redirect_stderr(io.StringIO()):
                job = self._submit_command("")
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"sbatch refused the job: {_complaint(str(error))}") from error
        assert isinstance(job, RenderedSlurmJob)
        return job


def _complaint(complaint: str) -> str:
    """sbatch's first error line, which says what is wrong; its last one only that the submission failed."""
    lines = [line.removeprefix("sbatch: error: ") for line in complaint.splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def submit(run: runs.Run, spec: JobSpec) -> str:
    """Hand the run to its executor and return the job's id (Slurm's number, or a process id of this machine).

    `debug` returns only when the run is over.
    """
    if spec.executor == "slurm":
        return _submit_to_slurm(run, spec)
    if spec.executor == "local":
        return _start_here(run, spec)
    return _run_in_this_terminal(run)


def _submit_to_slurm(run: runs.Run, spec: JobSpec) -> str:
    script = script_for(run, spec, durations.measured_stop_seconds(run))
    runs.write_text(run.script_file, script)
    job = RenderedSlurmExecutor(run.submitit_folder, script).submit_script()
    where = {"box": box_name()} if spec.cluster == "box" else {}
    run.add_job(job.job_id, "slurm", **where)
    return str(job.job_id)


def _start_here(run: runs.Run, spec: JobSpec) -> str:
    executor = submitit.LocalExecutor(folder=run.submitit_folder)
    executor.update_parameters(timeout_min=spec.time_minutes + LOCAL_GRACE_MINUTES)
    controller = _controller_command(run)
    with _output_into(run.submitit_folder / "helper.log"):
        job = executor.submit(_run_controller, controller, os.environ.get("CUDA_VISIBLE_DEVICES"))
    run.add_job(str(job.job_id), "local")
    return str(job.job_id)


@contextlib.contextmanager
def _output_into(log: Path) -> Iterator[None]:
    """submitit's own process outlives this one and would keep its output open: `id=$(launcher submit …)` waited for
    the run's end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        yield
    finally:
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(file)


def _run_in_this_terminal(run: runs.Run) -> str:
    executor = submitit.DebugExecutor(folder=run.submitit_folder)
    run.add_job(str(os.getpid()), "debug")
    job = executor.submit(subprocess.run, _controller_command(run), check=False)
    job.results()
    return str(os.getpid())


def _controller_command(run: runs.Run) -> list[str]:
    return [sys.executable, "-P", "-m", "launcher.controller", f"--run-dir={run.path}"]


def _run_controller(command: Sequence[str], visible_devices: str | None) -> int:
    """Body of a local job. The controller gets a session of its own: Ctrl-C in the terminal that submitted must not
    end the run. submitit sets CUDA_VISIBLE_DEVICES by its own count; the submitting shell's value goes back in."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices
    paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(command, env=environment, start_new_session=True, check=False).returncode
