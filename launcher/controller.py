"""Runs in the batch step: attempt -> ledger -> what comes next. `python -m launcher.controller`.

Two ways in, one way on. A submitted run names its directory (--run-dir). A file of jobs/ gives the words that the CLI
would have got; the configuration is then composed here, before any task starts, and the run directory is made here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher import (
    badnodes,
    codeversion,
    durations,
    ledger,
    lost,
    ownership,
    ownjob,
    recovery,
    rendezvous,
    runs,
    slurm,
    status,
    successor,
)
from launcher.allocation import Allocation, fit, local_allocation, slurm_allocation
from launcher.attempt import Ended, Here, run_attempt
from launcher.machine import box_name
from launcher.outcome import STOPPED_EXIT
from launcher.ownership import Owner
from launcher.paths import REPOSITORY, run_root
from launcher.recovery import Decision
from launcher.saying import own_log, say
from launcher.spec import JobSpec, UserError
from launcher.stopping import Signals

EXIT_USAGE = 2
EXIT_GOES_ON = STOPPED_EXIT
"""The run is not done, and another job or this one again continues it."""
KEPT_SECONDS = 5.0
"""Before the time limit: after it a requeue is no longer possible."""
LONGEST_RETRY_SECONDS = 1800.0
ASK_SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Work on a run until it is done or this job's part in it is.

    Returns 0 when the run is done, 75 when it goes on in the queue, 1 when it stopped, 2 for a mistake.
    """
    signals = Signals()
    signals.install()
    try:
        run, spec, allocation = _prepare(list(sys.argv[1:] if argv is None else argv), os.environ)
        me = ownership.this_process(allocation.cluster, allocation.job_id)
        replaced = ownership.acquire(run.path, me, _is_alive)
        if replaced is not None:
            say(f"{replaced} no longer runs; this job goes on in its place")
        try:
            return control(_here(run, spec, allocation, signals))
        finally:
            ownership.release(run.path, me)
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
    asked = compose(last_of_each(words))
    spec = fit(asked, allocation)
    _refuse_sizes(words, asked, spec)
    root = run_root(spec.run_root)
    run = runs.run_of_job(root, allocation.cluster, allocation.job_id) if allocation.restart_count else None
    if run is None:
        run = runs.create(root, spec, [*words, *_given_sizes(asked, spec)])
        runs.remember_job(root, allocation.cluster, allocation.job_id, run)
        where = {"box": box_name()} if spec.cluster == "box" else {}
        run.add_job(allocation.job_id, "slurm", log=own_log(), **where)
        codeversion.record_code(REPOSITORY, run.path)
    return run, spec, allocation


def last_of_each(words: list[str]) -> list[str]:
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


def _given_sizes(asked: JobSpec, given: JobSpec) -> list[str]:
    """What sbatch's own flags changed, as words: a later `resume args.lr=…` keeps it."""
    sizes = ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node")
    return [
        f"{size}={getattr(given, size)}" for size in sizes if getattr(asked, size) != getattr(given, size)
    ]


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


def _is_alive(owner: Owner) -> bool:
    """Whether another owner of the run still works. Raises SlurmError where Slurm cannot say: unknown blocks."""
    if owner.job_id:
        state = slurm.job_state(owner.job_id)
        return state is not None and not state.is_over and state.name != "PENDING"
    return owner.host == ownership.this_process("", "").host and status.is_alive(owner.pid)


def _here(run: runs.Run, spec: JobSpec, allocation: Allocation, signals: Signals) -> Here:
    watcher, kill_wait, deadline = None, ownjob.DEFAULT_KILL_WAIT, None
    if allocation.job_id:
        try:
            first, kill_wait = ownjob.look(allocation.job_id), ownjob.kill_wait()
        except slurm.SlurmError as error:
            if not ownjob.is_away(error):
                raise
            first = None  # the watcher learns it when slurmctld is back
            say(f"slurmctld does not answer: {error}")
        watcher = ownjob.Watcher(allocation.job_id, first)
    elif spec.executor == "local":
        deadline = time.time() + spec.time_minutes * 60
    return Here(
        run, spec, allocation, _step_environment(os.environ), spec.python or sys.executable, signals, watcher,
        kill_wait, durations.measured_stop_seconds(run), deadline,
    )  # fmt: skip


def control(here: Here) -> int:
    """Attempts in this allocation until one is not followed by another here. Returns the batch step's exit status."""
    run = here.run
    refusal = lost.settle(run, here.allocation)
    if refusal:
        say(f"stopped: {refusal}")
        here.write_state("lost", refusal, action="stopped")
        return 1
    known = bad = _known_bad(here)
    while True:
        decision = _one_attempt(here, bad, lost_nodes=bad != known)
        if decision.action != "restarted":
            return {"done": 0, "stopped": 1}.get(decision.action, EXIT_GOES_ON)
        bad = tuple(dict.fromkeys((*bad, *decision.exclude)))


def _known_bad(here: Here) -> tuple[str, ...]:
    """Nodes of this job that are on record, as far as there are others: `sbatch jobs/...` has read no record."""
    allocation = here.allocation
    if not allocation.job_id:
        return ()
    records = badnodes.everything(here.run.path.parent, allocation.cluster)
    found = [bad for bad in badnodes.current(records, time.time()) if bad.node in allocation.nodes]
    if not found:
        return ()
    unfit = ownjob.unfit(allocation.nodes) if here.spec.spares else ()
    usable = [node for node in allocation.nodes if node not in unfit]
    left_out = badnodes.in_a_job(found, usable, max(0, len(usable) - here.spec.nodes))
    for line in left_out.lines:
        say(line)
    return left_out.nodes


def _one_attempt(here: Here, bad: tuple[str, ...], *, lost_nodes: bool) -> Decision:
    """One attempt, its ledger line, and what was decided, done as far as it can be done from here."""
    run, spec = here.run, here.spec
    nodes = _working_nodes(here, bad)
    number, attempt_dir = run.new_attempt_dir()
    started, step_in = time.time(), runs.last_metrics(run).get("step")
    # Asked now: a job that is put back has a new StartTime, and would have been in the queue for as long as it ran.
    queued = _queue_seconds(here, number)
    lost.note_start(attempt_dir, here.allocation.job_id, nodes, started, queued)
    say(f"run {run.id} attempt {number}: {spec.recipe} on {', '.join(nodes)}; directory {run.path}")
    here.write_state("starting", "preflight", attempt=number)
    here.write_state("running", f"{spec.world_size} ranks", attempt=number)
    ended = run_attempt(here, number, attempt_dir, nodes, lost_nodes=lost_nodes)

    metrics, events = ledger.read_lines(run.metrics_file), durations.announcements(run)
    now = time.time()
    seconds = {**ended.seconds, **durations.of_attempt(number, ended.tasks_started, now, metrics, events)}
    if queued is None:  # slurmctld was away when the attempt began
        queued = _queue_seconds(here, number)
    if queued is not None:
        seconds["queue"] = queued
    outcome = ended.outcome
    evidence = tuple(dict.fromkeys((*outcome.evidence, *durations.troubles(number, events))))
    record = ledger.AttemptRecord(
        number, here.allocation.job_id, nodes, spec.world_size, outcome.state, outcome.reason, ended.exit_code,
        started, ended.tasks_started, now, outcome.rank, step_in, _last_step(metrics), spec.launch, seconds,
        {"torch": codeversion.version_of("torch") or "", "submitit": codeversion.version_of("submitit") or ""},
        cause=outcome.cause, evidence=evidence, restarts=here.allocation.restart_count,
        made_steps="train" in seconds, saved_in=durations.saved_before(number, events),
        saved_out=durations.last_saved(events), code=codeversion.recorded(run.path),
        excluded=bad, slow=ended.slow,
    )  # fmt: skip
    _put_on_record(here, number, ended)
    job = _now(here)
    decision = recovery.decide(
        outcome, [*ledger.past(run.attempts_file), ledger.past_of(dataclasses.asdict(record))],
        _possible(here, ended, nodes, bad, job),
    )  # fmt: skip
    excluded = tuple(dict.fromkeys((*bad, *decision.exclude)))
    ledger.append(
        run.attempts_file,
        dataclasses.replace(record, action=decision.action, decision=decision.reason, excluded=excluded),
    )
    say(f"{outcome.cause}: {outcome.reason}")
    for line in evidence:
        say(f"  {line}")
    say(f"{decision.action}: {decision.reason}")
    if decision.action == "restarted":
        here.write_state("starting", f"again, after: {outcome.reason}", attempt=number)
        return decision
    _write_end(here, ended, number, decision.action, outcome.reason)
    return _carry_out(here, decision, excluded, number, ended)


def _carry_out(
    here: Here, decision: Decision, exclude: tuple[str, ...], number: int, ended: Ended
) -> Decision:
    """Requeue, or submit a successor. Where Slurm refuses the first the second is tried, and both are in the ledger."""
    if decision.action not in ("requeued", "successor") or (
        decision.action == "requeued" and ended.slurm_cause
    ):
        return decision
    run, job_id = here.run, here.allocation.job_id
    end = (job.end_time if (job := here.job()) is not None else None) or time.time() + LONGEST_RETRY_SECONDS
    until = min(end - KEPT_SECONDS, time.time() + LONGEST_RETRY_SECONDS)
    action: recovery.Action = decision.action
    why = decision.reason
    if exclude:
        try:
            exclusion = ownjob.exclusion(job_id, exclude, until, say)
        except slurm.SlurmError as error:
            say(f"whether enough nodes remain without {', '.join(exclude)} is not known: {error}")
        else:
            if exclusion.dropped:
                why = f"{why}; {exclusion.reason}"
                say(exclusion.reason)
                left = [node for node in exclude if node not in exclusion.dropped]
                ledger.amend(run.attempts_file, number, excluded=left, decision=why)
            exclude = exclusion.nodes
    if action == "requeued":
        try:
            ownjob.requeue(job_id, exclude, until, say)
        except slurm.SlurmError as error:
            action, why = "successor", f"Slurm does not requeue the job: {error}"
            say(why)
        else:
            return decision
    try:
        new_job = successor.submit(run, here.spec, job_id, exclude, until, say)
    except slurm.SlurmError as error:
        action, why = "stopped", f"Slurm takes no successor: {error}"
        say(f"stopped: {why}; resume continues it")
    else:
        say(f"job {new_job} follows job {job_id}")
    if action != decision.action:
        ledger.amend(run.attempts_file, number, action=action, decision=why)
        _write_end(here, ended, number, action, f"{ended.outcome.reason}; {why}")
    return Decision(action, why, exclude)


def _now(here: Here) -> ownjob.OwnJob | None:
    """What Slurm says of the job at this moment, or said last where it does not answer."""
    if here.watcher is None:
        return None
    try:
        return ownjob.look(here.allocation.job_id)
    except slurm.SlurmError as error:
        say(f"slurmctld does not answer; its last word counts: {error}")
        return here.watcher.newest


def _possible(
    here: Here, ended: Ended, nodes: Sequence[str], bad: Sequence[str], job: ownjob.OwnJob | None
) -> recovery.Possible:
    in_slurm = bool(here.allocation.job_id)
    now = time.time()
    current = here.job()
    left = total = None
    if current is not None and current.end_time is not None:
        left = current.end_time - now
        total = None if current.start_time is None else current.end_time - current.start_time
    spares = [node for node in here.allocation.nodes if node not in nodes and node not in bad]
    return recovery.Possible(
        slurm=in_slurm,
        # Slurm has ended the job at its limit: it can no longer be requeued, only followed.
        may_requeue=(job is None or job.may_requeue) and ended.slurm_cause != "TIMEOUT",
        slurm_requeues=bool(ended.slurm_cause),
        seconds_left=left,
        worth_a_restart=min(120.0, total / 3) if total else 120.0,
        spare_nodes=len(spares) if in_slurm else 0,
        interactive=here.spec.executor == "debug",
        preflight_failed=ended.tasks_started is None,
        indispensable=_indispensable(here, ended, bad),
    )


def _indispensable(here: Here, ended: Ended, bad: Sequence[str]) -> str:
    """Why the job cannot do without the nodes that the preflight found; "" where it can."""
    suspects = ended.outcome.suspects
    if not suspects or not here.allocation.job_id:
        return ""
    until = time.time() + ASK_SECONDS
    try:
        return ownjob.exclusion(here.allocation.job_id, (*bad, *suspects), until, say).reason
    except slurm.SlurmError as error:
        say(f"whether enough nodes remain without {', '.join(suspects)} is not known: {error}")
        return ""  # the requeue insists until slurmctld is back, and asks again then


def _put_on_record(here: Here, number: int, ended: Ended) -> None:
    """Nodes that ended this attempt, for those who submit after us."""
    for node in recovery.left_behind(ended.outcome) if here.allocation.job_id else ():
        badnodes.note_outcome(here.run, here.allocation.cluster, number, node, ended.outcome)


def _working_nodes(here: Here, bad: Sequence[str]) -> tuple[str, ...]:
    """The first healthy nodes of the allocation; without spares simply all of them."""
    everything, needed = here.allocation.nodes, here.spec.nodes
    if not here.spec.spares:
        return everything
    gone = {*bad, *ownjob.unfit(everything)}
    healthy = tuple(node for node in everything if node not in gone)
    if len(healthy) < needed:
        raise UserError(
            f"{needed} nodes are needed and {len(healthy)} of the job's {len(everything)} are healthy"
        )
    return healthy[:needed]


def _queue_seconds(here: Here, number: int) -> float | None:
    """How long the attempt waited in Slurm's queue; None where an attempt before it did, or nobody knows."""
    job = here.watcher.newest if here.watcher else None
    return job.queue_seconds if job and number == _first_attempt_of(here.run, here.allocation) else None


def _first_attempt_of(run: runs.Run, allocation: Allocation) -> int:
    """Number of the first attempt in this start of the job: the one that waited in the queue."""
    same = [
        line["attempt"]
        for line in run.attempts()
        if line.get("job_id") == allocation.job_id and line.get("restarts") == allocation.restart_count
    ]
    return int(min(same)) if same and allocation.job_id else len(run.attempt_dirs())


def _last_step(metrics: Sequence[Mapping[str, object]]) -> int | None:
    step = metrics[-1].get("step") if metrics else None
    return step if isinstance(step, int) else None


def _write_end(here: Here, ended: Ended, number: int, action: recovery.Action, reason: str) -> None:
    slow = [dataclasses.asdict(each) for each in ended.slow]
    outcome = ended.outcome
    here.write_state(outcome.state, reason, attempt=number, rank=outcome.rank, action=action, slow=slow)


def _step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What srun and local tasks inherit: this process's environment without stale inputs."""
    return {**slurm.for_steps(environment), "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
