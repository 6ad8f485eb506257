"""One attempt: preflight -> start -> watch -> why it ended. Runs in the controller's process.

The loop here is the only place that acts while tasks run. Signals, slurmctld's answers and heartbeats come in as facts;
a stop file, stacks or the end of the tasks go out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from launcher import (
    codeversion,
    fabric,
    hangs,
    outcome,
    ownjob,
    preflight,
    rendezvous,
    runs,
    slurm,
    stopping,
    traces,
    verdicts,
)
from launcher.allocation import Allocation
from launcher.heartbeats import Straggler
from launcher.outcome import Outcome
from launcher.paths import REPOSITORY
from launcher.saying import OwnLog, say
from launcher.spec import JobSpec, UserError
from launcher.steps import Launch, LocalStep, SlurmStep

POLL_SECONDS = 0.1
LOOK_SECONDS = 0.5
"""Between two looks at the heartbeats: one small file per rank."""
LOG_TAIL_BYTES = 16_384
EXIT_TERMINATED = 128 + 15


class Step(Protocol):
    """Tasks that run somewhere."""

    def poll(self) -> int | None: ...
    def ask_to_stop(self) -> None: ...
    def dump_stacks(self) -> None: ...
    def kill(self) -> None: ...
    def last_lines(self) -> list[str]: ...
    def task_exits(self) -> list[slurm.TaskExit]: ...


@dataclass(frozen=True)
class Here:
    """What stays the same over all attempts of one controller."""

    run: runs.Run
    spec: JobSpec
    allocation: Allocation
    """Everything that the job has, spares included."""
    environment: Mapping[str, str]
    python: str
    signals: stopping.Signals
    watcher: ownjob.Watcher | None
    """None where there is no Slurm, or it did not answer."""
    kill_wait: float
    stop_seconds: float | None
    """What stopping takes, measured; None for a run without a measurement."""
    deadline: float | None = None
    """Unix time of the limit of a run without Slurm."""

    def job(self) -> ownjob.OwnJob | None:
        if self.deadline is not None:
            limit = self.spec.time_minutes * 60
            nodes = self.allocation.nodes
            return ownjob.OwnJob(self.deadline - limit, self.deadline, None, None, False, 0, nodes)
        return self.watcher.newest if self.watcher is not None else None

    def write_state(self, state: str, reason: str, **more: object) -> None:
        """What `status` shows, in the run directory."""
        self.run.write_state(
            state=state, reason=reason, job_id=self.allocation.job_id, pid=os.getpid(), **more
        )


@dataclass(frozen=True)
class Ended:
    """How an attempt went."""

    outcome: Outcome
    exit_code: int
    tasks_started: float | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    slurm_cause: str = ""
    """Why Slurm ended the job; empty where the job lives on."""
    slow: tuple[Straggler, ...] = ()
    """Ranks that held the others up meanwhile."""


def run_attempt(
    here: Here, number: int, attempt_dir: Path, nodes: tuple[str, ...], *, lost_nodes: bool = False
) -> Ended:
    """Run the tasks once on these nodes of the allocation; `lost_nodes` says that it had others before."""
    attempt = _Attempt(here, number, attempt_dir, nodes, lost_nodes=lost_nodes)
    try:
        blocked = attempt.check()
    except slurm.SlurmError as error:
        blocked = Outcome("unknown", str(error))
    except UserError as error:
        blocked = Outcome("user_error", str(error))
    if here.signals.end:
        blocked = Outcome("cancelled", f"the controller received {here.signals.end}")
        cause = attempt.slurm_cause()
        known = outcome.classify(outcome.Ending(EXIT_TERMINATED, slurm_cause=cause)) if cause else blocked
        return Ended(known, 1, None, attempt.seconds, cause)
    if blocked is not None:
        return Ended(blocked, 1, None, attempt.seconds)
    attempt.start()
    return attempt.watch()


class _Attempt:
    def __init__(
        self, here: Here, number: int, attempt_dir: Path, nodes: tuple[str, ...], *, lost_nodes: bool
    ) -> None:
        self.here, self.number, self.dir = here, number, attempt_dir
        self._lost_nodes = lost_nodes
        allocation = here.allocation
        self.allocation = Allocation(
            allocation.job_id, allocation.cluster, nodes, allocation.tasks_per_node, allocation.cpus_per_task,
            allocation.gpus_per_node, allocation.restart_count,
        )  # fmt: skip
        self.seconds: dict[str, float] = {}
        self.stop: stopping.Stop | None = None
        self.killed_at: float | None = None
        self._asked = False
        self.hang: hangs.Hang | None = None
        self._log = OwnLog.begin() if allocation.job_id else None
        self._master = ""
        self._started = 0.0
        self._fabric: Mapping[str, str] = {}

    # --- before the tasks ---------------------------------------------------------------------------------------

    def check(self) -> Outcome | None:
        """Find the master's address and look at every node; what blocks the start, or None."""
        self._master = _master_address(self.allocation)
        clock = time.monotonic()
        judged = self._preflight()
        if judged is None or not judged.blocks:
            fabric_findings = self._derive_fabric()
            nodes = (
                self.allocation.nodes
                if self.allocation.job_id
                else tuple(f.node for f in fabric_findings[:1])
            )
            judged = verdicts.Judged(nodes, tuple(fabric_findings))
        self.seconds["preflight"] = round(time.monotonic() - clock, 3)
        return verdicts.outcome_of(judged, preflight.failed_earlier(self.here.run.path, self.dir))

    def _preflight(self) -> verdicts.Judged | None:
        if self.here.spec.preflight == "off":
            say("preflight is off")
            return None
        return preflight.run(
            self.here.spec, self.allocation, master=self._master, attempt_dir=self.dir, python=self.here.python,
            environment=self.here.environment, say=say,
        )  # fmt: skip

    def _derive_fabric(self) -> list[verdicts.Finding]:
        """Without preflight too: a fabric that somebody has named is a promise about the job's network."""
        prepared = fabric.prepare(
            self.here.spec, self.allocation, master=self._master, attempt_dir=self.dir, python=self.here.python,
            environment=self.here.environment,
        )  # fmt: skip
        for line in prepared.lines:
            say(line)
        self._fabric = prepared.variables
        return prepared.findings

    def start(self) -> None:
        here = self.here
        launch = Launch(
            here.spec, self.allocation, REPOSITORY, here.run.path, self.dir, self._master, here.python,
            _contract(here, self.number, self.dir, self._fabric), self._lost_nodes,
        )  # fmt: skip
        self._started = time.time()
        if batch := os.environ.get("LAUNCHER_BATCH_STARTED"):
            self.seconds["controller"] = round(self._started - float(batch.replace(",", ".")), 3)
        how = "under torchrun" if here.spec.launch == "torchrun" else "one task each"
        say(f"starting {here.spec.world_size} ranks, {how}, master {self._master}")
        self.step: Step
        if self.allocation.job_id:
            self.step = SlurmStep(launch, here.environment)
        else:
            self.step = LocalStep(launch, here.environment, attached=here.spec.executor == "debug")
        codeversion.record_packages(self.dir / "packages.txt")

    # --- while they run -----------------------------------------------------------------------------------------

    def watch(self) -> Ended:
        """Wait for the tasks and act on what comes in meanwhile."""
        watch = self._watch = hangs.HangWatch.from_environment(self.here.spec.environment, self.dir)
        looked = 0.0
        while (exit_code := self.step.poll()) is None:
            now = time.time()
            self._heed_requests(now)
            if now - looked > LOOK_SECONDS and self.killed_at is None:
                looked = now
                if self.stop is None:
                    self._heed_heartbeats(watch, now)
            if self._is_too_late(now):
                break
            time.sleep(POLL_SECONDS)
        # Slurm kills what is left soon, and us as well: the ledger line comes before that.
        return self._ended(EXIT_TERMINATED if exit_code is None else exit_code)

    def _heed_requests(self, now: float) -> None:
        signals = self.here.signals
        if signals.end and (self.stop is None or self.stop.reason not in ("cancel", "requeue")):
            cause = self.slurm_cause()
            grace = 0.6 * self.here.kill_wait if self.allocation.job_id else stopping.LOCAL_GRACE_SECONDS
            reason: outcome.StopReason = (
                "requeue" if cause in ("REQUEUED", "NODE_FAIL", "PREEMPTED") else "cancel"
            )
            self._ask(stopping.Stop(reason, signals.end_time + grace, f"{signals.end} {cause}".strip()))
            if not self.allocation.job_id:
                self.step.ask_to_stop()  # under Slurm the tasks receive what the job receives
        elif self.stop is None:
            if signals.warning and self.here.watcher is not None and not self._asked:
                self._asked = True
                self.here.watcher.ask_now()
            stop = stopping.due(
                self.here.job(), warned=bool(signals.warning), now=now, measured=self.here.stop_seconds
            )
            if stop is not None:
                self._ask(stop)

    def _ask(self, stop: stopping.Stop) -> None:
        self.stop = stop
        left = "" if stop.deadline is None else f", within {stop.deadline - time.time():.0f} s"
        say(f"the ranks are asked to save and stop{left}: {stop.reason} ({stop.evidence})")
        stopping.write(self.dir, stop)

    def _heed_heartbeats(self, watch: hangs.HangWatch, now: float) -> None:
        for straggler in watch.look(now):
            say(str(straggler))
            self.here.write_state(
                "running",
                f"{self.here.spec.world_size} ranks",
                attempt=self.number,
                slow=list(map(asdict, watch.slow)),
            )
        if watch.stalled is None:
            return
        self.step.dump_stacks()
        self.hang = hangs.examine(self.dir, watch.stalled)
        for line in self.hang.lines:
            say(line)
        self._kill()

    def _is_too_late(self, now: float) -> bool:
        """Whether the tasks had their time; True when there is nothing left to wait for."""
        deadline = self.stop.deadline if self.stop is not None else None
        if deadline is not None and now > deadline and self.slurm_cause():
            return True  # Slurm kills them itself, a moment later than we would, and then us
        if deadline is not None and now > deadline and self.killed_at is None:
            say("the ranks did not stop in time; they are killed")
            self._kill()
        return self.killed_at is not None and now > self.killed_at + max(self.here.kill_wait, 15.0)

    def _kill(self) -> None:
        self.step.kill()
        self.killed_at = time.time()

    # --- why it ended -------------------------------------------------------------------------------------------

    def slurm_cause(self) -> str:
        return slurm.parse_cancellation(self._log.added()) if self._log is not None else ""

    def _ended(self, exit_code: int) -> Ended:
        signals, reason = self.here.signals, self.stop.reason if self.stop else None
        cause = self.slurm_cause()
        if exit_code and not cause and reason is None and self.allocation.job_id:
            reason = self._preempted()
        ending = outcome.Ending(
            exit_code=exit_code,
            task_exits=tuple(self.step.task_exits()),
            errors=runs.rank_errors(self.dir),
            hang=self.hang.lines if self.hang else (),
            hung_rank=self.hang.rank if self.hang else None,
            stop_signal=signals.end,
            stop_reason=reason,
            slurm_cause=cause,
            failed_nodes=self._failed_nodes() if exit_code and reason is None and not cause else (),
            last_lines=tuple(self.step.last_lines()),
            log_lines=_log_tails(self.dir) if exit_code else (),
        )
        self.seconds["tasks"] = round(time.time() - self._started, 3)
        slow = tuple(self._watch.slow)
        return Ended(outcome.classify(ending), exit_code, self._started, self.seconds, cause, slow)

    def _preempted(self) -> outcome.StopReason | None:
        """In a preemption's grace time the tasks get SIGTERM, and may be gone before anybody told us."""
        try:
            job = ownjob.look(self.allocation.job_id)
        except slurm.SlurmError as error:
            say(f"whether the job is preempted is not known: {error}")
            return None
        return "preemption" if job.preempt_time is not None else None

    def _failed_nodes(self) -> tuple[str, ...]:
        if not self.allocation.job_id:
            return ()
        named = tuple(
            match["node"] or match["down"]
            for line in self.step.last_lines()
            if (match := verdicts.LAUNCH_FAILED_ON.search(line))
        )
        try:
            job = ownjob.look(self.allocation.job_id)
            down = ownjob.gone(self.allocation.nodes)
        except slurm.SlurmError as error:
            say(f"the state of the nodes is not known: {error}")
            return named
        gone = tuple(node for node in self.allocation.nodes if job.nodes and node not in job.nodes)
        return tuple(dict.fromkeys((*named, *gone, *down)))


def _log_tails(attempt_dir: Path) -> tuple[str, ...]:
    """The last lines of every rank's log; the cause is read from those few that name one."""
    lines: list[str] = []
    for log in sorted([*attempt_dir.glob("rank-*.log"), *attempt_dir.glob("agent-*.log")]):
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
            lines += file.read().decode(errors="replace").splitlines()
    return tuple(lines)


def _master_address(allocation: Allocation) -> str:
    """The first node's NodeAddr, resolved; 127.0.0.1 only where the whole run is on this machine."""
    if not allocation.job_id:
        return "127.0.0.1"
    first = allocation.nodes[0]
    return rendezvous.resolve(slurm.node_addresses([first])[first])


def _contract(
    here: Here, number: int, attempt_dir: Path, fabric_variables: Mapping[str, str]
) -> dict[str, str]:
    """The variables that a recipe may rely on, beyond torch's own (which the task wrapper sets)."""
    paths = [str(REPOSITORY), *filter(None, [here.environment.get("PYTHONPATH")])]
    return {
        **traces.variables(attempt_dir, {**here.environment, **here.spec.environment}),
        **fabric_variables,
        **here.spec.environment,
        "RUN_DIR": str(here.run.path),
        "ATTEMPT": str(number),
        "ATTEMPT_DIR": str(attempt_dir),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
    }
