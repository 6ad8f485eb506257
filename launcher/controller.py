"""Runs in the batch step: preflight -> start -> watch -> ledger. `python -m launcher.controller`.

Two ways in, one way on. A submitted run names its directory (--run-dir). A file of jobs/ gives the words that the CLI
would have got; the configuration is then composed here, before any task starts, and the run directory is made here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from launcher import codeversion, ledger, outcome, preflight, rendezvous, runs, slurm
from launcher.allocation import Allocation, fit, local_allocation, slurm_allocation
from launcher.machine import box_name
from launcher.paths import REPOSITORY, run_root
from launcher.spec import JobSpec, UserError
from launcher.steps import Launch, LocalStep, SlurmStep

POLL_SECONDS = 0.1
EXIT_USAGE = 2


class Step(Protocol):
    """Tasks that run somewhere."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def last_lines(self) -> list[str]: ...
    def task_exits(self) -> list[slurm.TaskExit]: ...


@dataclass
class StopRequest:
    """Set by a signal handler and read by the watch loop; nothing else happens inside the handler."""

    signal_name: str = ""

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attempt. Returns 0 when the run is done, 1 when it is not, 2 for a mistake in the configuration."""
    stop = StopRequest()
    stop.install()
    try:
        run, spec, allocation = _prepare(list(sys.argv[1:] if argv is None else argv), os.environ)
        return control(run, spec, allocation, stop)
    except (UserError, slurm.SlurmError, rendezvous.RendezvousError) as error:
        print(f"launcher: {error}", file=sys.stderr)
        return EXIT_USAGE


def _prepare(argv: list[str], environment: Mapping[str, str]) -> tuple[runs.Run, JobSpec, Allocation]:
    if argv and argv[0].startswith("--run-dir="):
        run = runs.Run(Path(argv[0].removeprefix("--run-dir=")))
        spec = run.spec()
        allocation = slurm_allocation(environment) if spec.executor == "slurm" else local_allocation(spec)
        return run, fit(spec, allocation), allocation
    return _prepare_from_job_file(argv, environment)


def _prepare_from_job_file(
    words: list[str], environment: Mapping[str, str]
) -> tuple[runs.Run, JobSpec, Allocation]:
    """`sbatch jobs/ch4_fsdp.sbatch args.model=llama_8b`: compose, make the run directory or find it after a requeue."""
    from launcher.config import compose

    allocation = slurm_allocation(environment)
    asked = compose(_last_of_each(words))
    spec = fit(asked, allocation)
    _refuse_sizes(words, asked, spec)
    root = run_root(spec.run_root)
    run = runs.run_of_job(root, allocation.cluster, allocation.job_id) if allocation.restart_count else None
    if run is None:
        run = runs.create(root, spec, words)
        runs.remember_job(root, allocation.cluster, allocation.job_id, run)
        where = {"box": box_name()} if spec.cluster == "box" else {}
        run.add_job(allocation.job_id, "slurm", log=_own_log(), **where)
        codeversion.record_code(REPOSITORY, run.path)
    return run, spec, allocation


def _last_of_each(words: list[str]) -> list[str]:
    """recipe= and cluster= stand first in the job file; the user's own cluster= after them replaces the file's.

    Another recipe is refused: the headers above it were made for this one.
    """
    chosen: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key == "recipe" and chosen.get(key, word) != word:
            raise UserError(f"{word}: this job file is for {chosen[key]}; use sbatch jobs/{value}.sbatch")
        chosen[key] = word
    return list(chosen.values())


def _refuse_sizes(words: list[str], asked: JobSpec, given: JobSpec) -> None:
    """A size in the words cannot change a job that has already started; a word without effect would be a lie."""
    flags = {"nodes": "nodes", "tasks_per_node": "ntasks-per-node", "cpus_per_task": "cpus-per-task"}
    for word in words:
        key = word.partition("=")[0]
        if key in flags and getattr(asked, key) != getattr(given, key):
            raise UserError(
                f"{word}: the job already has {key}={getattr(given, key)}; "
                f"use sbatch --{flags[key]}={getattr(asked, key)} jobs/{asked.recipe}.sbatch"
            )


def control(run: runs.Run, spec: JobSpec, allocation: Allocation, stop: StopRequest) -> int:
    """One attempt from preflight to the ledger line. Returns the batch step's exit status."""
    attempt, attempt_dir = run.new_attempt_dir()
    about = {"attempt": attempt, "job_id": allocation.job_id, "pid": os.getpid()}
    started, step_in = time.time(), runs.last_metrics(run).get("step")
    say(
        f"run {run.id} attempt {attempt}: {spec.recipe} on {', '.join(allocation.nodes)}; directory {run.path}"
    )
    run.write_state(state="starting", reason="preflight", **about)

    environment = _step_environment(os.environ)
    python = _interpreter(spec)
    ending, timings, master = None, {}, ""
    try:
        master = _master_address(allocation)
        clock = time.monotonic()
        findings = _preflight(spec, allocation, master, attempt_dir, python, environment)
        timings["preflight"] = round(time.monotonic() - clock, 3)
        if findings:
            ending = outcome.Outcome("failed", f"preflight: {findings[0]}")
    except (UserError, slurm.SlurmError) as error:
        ending = outcome.Outcome("failed", str(error))

    tasks_started = None
    if ending is None and not stop.signal_name:
        run.write_state(state="running", reason=f"{spec.world_size} ranks", **about)
        launch = Launch(
            spec, allocation, REPOSITORY, run.path, attempt_dir, master, python,
            _contract(spec, run, attempt, environment),
        )  # fmt: skip
        tasks_started = time.time()
        if batch := os.environ.get("LAUNCHER_BATCH_STARTED"):
            timings["controller"] = round(tasks_started - float(batch.replace(",", ".")), 3)
        how = "under torchrun" if spec.launch == "torchrun" else "one task each"
        say(f"starting {spec.world_size} ranks, {how}, master {master}")
        step = _start(launch, environment)
        codeversion.record_packages(attempt_dir / "packages.txt")
        ending, exit_code = _watch(step, spec, allocation, attempt_dir, stop)
    else:
        exit_code = 1
        ending = ending or outcome.Outcome("cancelled", f"the controller received {stop.signal_name}")

    ended = time.time()
    timings["tasks"] = round(ended - (tasks_started or ended), 3)
    record = ledger.AttemptRecord(
        attempt, allocation.job_id, allocation.nodes, spec.world_size, ending.state, ending.reason, exit_code,
        started, tasks_started, ended, ending.rank, step_in, runs.last_metrics(run).get("step"), spec.launch, timings,
        {"torch": codeversion.version_of("torch") or "", "submitit": codeversion.version_of("submitit") or ""},
    )  # fmt: skip
    ledger.append(run.attempts_file, record)
    run.write_state(state=ending.state, reason=ending.reason, rank=ending.rank, **about)
    say(f"{ending.state}: {ending.reason}")
    return 0 if ending.state == "done" else 1


def _watch(
    step: Step, spec: JobSpec, allocation: Allocation, attempt_dir: Path, stop: StopRequest
) -> tuple[outcome.Outcome, int]:
    """Wait for the tasks; a signal or the time limit of a run without Slurm ends them."""
    log = _OwnLog.begin() if allocation.job_id else None
    deadline = None if allocation.job_id else time.monotonic() + spec.time_minutes * 60
    late = False
    while (exit_code := step.poll()) is None:
        if stop.signal_name and not allocation.job_id:
            step.terminate()  # under Slurm the tasks receive what the job receives
        if deadline is not None and time.monotonic() > deadline:
            late = True
            step.terminate()
        time.sleep(POLL_SECONDS)
    ending = outcome.Ending(
        exit_code=exit_code,
        task_exits=tuple(step.task_exits()),
        errors=rank_errors(attempt_dir),
        stop_signal=stop.signal_name,
        slurm_cause=_cause_of_the_end(log) if stop.signal_name else "",
        deadline_passed=late,
        last_lines=tuple(step.last_lines()),
    )
    return outcome.classify(ending), exit_code


def rank_errors(attempt_dir: Path) -> tuple[outcome.RankError, ...]:
    """The exceptions that task wrappers recorded in this attempt."""
    records = (runs.read_json(path) for path in sorted(attempt_dir.glob("error-*.json")))
    return tuple(outcome.RankError.from_record(record) for record in records if record is not None)


def _preflight(
    spec: JobSpec,
    allocation: Allocation,
    master: str,
    attempt_dir: Path,
    python: str,
    environment: Mapping[str, str],
) -> list[preflight.Finding]:
    if spec.preflight == "off":
        say("preflight is off")
        return []
    findings = preflight.run(
        spec, allocation, master=master, attempt_dir=attempt_dir, python=python, environment=environment
    )
    for finding in findings:
        say(f"preflight: {finding}")
    return findings


def _start(launch: Launch, environment: Mapping[str, str]) -> Step:
    if launch.allocation.job_id:
        return SlurmStep(launch, environment)
    return LocalStep(launch, environment, attached=launch.spec.executor == "debug")


def _master_address(allocation: Allocation) -> str:
    """The first node's NodeAddr, resolved; 127.0.0.1 only where the whole run is on this machine."""
    if not allocation.job_id:
        return "127.0.0.1"
    first = allocation.nodes[0]
    return rendezvous.resolve(slurm.node_addresses([first])[first])


def _step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What srun and local tasks inherit: this process's environment without stale inputs."""
    return {**slurm.for_steps(environment), "PYTHONUNBUFFERED": "1"}


def _contract(spec: JobSpec, run: runs.Run, attempt: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a recipe may rely on, beyond torch's own (which the task wrapper sets)."""
    paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
    return {
        **spec.environment,
        "RUN_DIR": str(run.path),
        "ATTEMPT": str(attempt),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
    }


def _interpreter(spec: JobSpec) -> str:
    return spec.python or sys.executable


def _own_log() -> str:
    """The file behind our standard error, "" where that is no file (a terminal, a pipe)."""
    path = Path("/proc/self/fd/2").resolve()
    return str(path) if path.is_file() else ""


@dataclass(frozen=True)
class _OwnLog:
    """The batch step's log from here on: slurmstepd writes into it why it ends the job."""

    path: Path
    offset: int

    @classmethod
    def begin(cls) -> _OwnLog | None:
        path = _own_log()
        return cls(Path(path), os.stat(path).st_size) if path else None

    def added(self) -> str:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read().decode(errors="replace")


def _cause_of_the_end(log: _OwnLog | None) -> str:
    return slurm.parse_cancellation(log.added()) if log is not None else ""


def say(message: str) -> None:
    """One dated line in the batch step's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
