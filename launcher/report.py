"""What a run's records say about it: effective training time, where the time went, why attempts ended. Pure.

**Effective training time ratio** (ETTR) = productive seconds / wall seconds.

- productive: time inside optimizer steps whose result is in the final run. Steps that a later attempt ran again do not
  count; nor do, where the last attempt ended before the run was done, its steps after the last saved one. Waiting for a
  save is not productive.
- wall: from the first submission to the last record, with every queue. `ettr_without_queue` begins at the first
  attempt's start instead; waits between attempts stay in it.

The ratio is that of Meta's fleet study (arXiv 2410.21680: productive runtime over the time in which the run was
scheduled or waited for it) and of ByteRobust (arXiv 2509.16293: effective training time over wall time). One thing is
stricter here: time in which nobody had submitted a job counts as wall time too, and is shown as idle.

**MTTF** = seconds that attempts ran / number of attempts that failed. A time limit, a preemption, a requeue and a
cancellation end an attempt but are no failures.

What no record tells is None, and a sum that lacks a part names the attempts in which it is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher import heartbeats, timeline
from launcher.timeline import KINDS, Kind, Logged, Steps, Stretch, number

CAUSE_OF_STATE = {
    "done": "done",
    "cancelled": "cancelled",
    "timeout": "time_limit",
    "preempted": "preemption",
    "requeued": "requeued",
    "node_failure": "node_failure",
}
"""For ledgers whose lines have a state but no cause. `failed` says nothing about the cause."""

NO_FAILURES = frozenset({"done", "cancelled", "time_limit", "preemption", "requeued"})


@dataclass(frozen=True)
class Records:
    """A run's files, line by line, as plain mappings: any key may be missing in any of them."""

    attempts: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]] = ()
    checkpoints: Sequence[Mapping[str, Any]] = ()
    jobs: Sequence[Mapping[str, Any]] = ()
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """state.json: what the controller is doing now."""


@dataclass(frozen=True)
class Attempt:
    """One attempt. None: not on record."""

    number: int
    on_record: bool
    """Whether the ledger has a line of it; without one it is running, or its controller was killed."""
    state: str
    cause: str | None
    evidence: tuple[str, ...]
    slow: tuple[str, ...]
    """Ranks that held the others up: a sentence each."""
    action: str | None
    restarts: int | None
    job_id: str | None
    nodes: tuple[str, ...]
    excluded: tuple[str, ...]
    world_size: int | None
    code: str | None
    started: float | None
    ended: float | None
    resumed_after: int | None
    last_step: int | None
    lost_steps: int | None
    """Logged steps whose result is not in the final run."""
    seconds: Mapping[Kind, float]
    """By kind, without the wait before the attempt."""
    missing: tuple[Kind, ...]

    @property
    def failed(self) -> bool:
        """Whether it counts for MTTF. An attempt that left no line was killed with its controller, or goes on."""
        if not self.on_record:
            return self.state == "no line"
        return self.cause not in NO_FAILURES


@dataclass(frozen=True)
class Part:
    """One kind of time over the whole run."""

    kind: Kind
    label: str
    seconds: float | None
    """None: no attempt has it on record."""
    share: float | None
    """Of the wall time."""
    missing_in: tuple[int, ...]
    """Attempts whose records lack it: the sum is a lower bound then."""


@dataclass(frozen=True)
class Report:
    """Everything that is printed and drawn. Seconds, and ratios from 0 to 1."""

    state: str
    ettr: float | None
    ettr_without_queue: float | None
    productive_seconds: float | None
    wall_seconds: float | None
    wall_without_queue_seconds: float | None
    mttf_seconds: float | None
    """None where nothing failed, or where no attempt's time is known."""
    attempt_seconds: float | None
    failures: int
    interruptions: int
    """Attempts that ended before the run was done, whatever the cause."""
    lost_steps: int | None
    step: int | None
    steps: int | None
    parts: tuple[Part, ...]
    attempts: tuple[Attempt, ...]
    stretches: tuple[Stretch, ...]
    steps_of_attempt: Mapping[int, Steps]
    notes: tuple[str, ...]
    """What is not on record, for people."""

    def as_json(self) -> dict[str, Any]:
        """Without the metrics lines, which are in metrics.jsonl."""
        content = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.name not in ("attempts", "parts", "stretches", "steps_of_attempt")
        }
        for name in ("parts", "attempts", "stretches"):
            content[name] = [dataclasses.asdict(each) for each in getattr(self, name)]
        return content


def build(records: Records) -> Report:
    """The report of a run, finished, interrupted, going on or not yet begun."""
    ledger: dict[int, Mapping[str, Any]] = {}
    for record in records.attempts:
        number_of = number(record.get("attempt"))
        if number_of is not None:
            ledger[int(number_of)] = record  # a later line of the same attempt corrects an earlier one
    logged, saves = timeline.logged_lines(records.metrics), timeline.save_events(records.checkpoints)
    last = ledger[max(ledger)] if ledger else {}
    newest = max([*ledger, *(line.attempt for line in logged)], default=0)
    ended_early = bool(ledger) and newest == max(ledger) and last.get("state") != "done"
    step_in = {attempt: number(record.get("step_in")) for attempt, record in ledger.items()}
    steps = timeline.steps_by_attempt(logged, saves, step_in, ended_early=ended_early)

    stretches: list[Stretch] = []
    attempts: list[Attempt] = []
    missing: dict[Kind, list[int]] = {kind: [] for kind in KINDS}
    end: float | None = None
    first_start: float | None = None
    before: Mapping[str, Any] = {}
    for attempt in sorted({*ledger, *steps}):
        record = ledger.get(attempt, {})
        inside, lacking = timeline.paint_attempt(
            record, attempt, steps.get(attempt), saves, steps_are_logged=bool(logged)
        )
        first = min((each.begin for each in inside), default=number(record.get("started")))
        if first is not None:
            first_start = first if first_start is None else first_start
            wait, lacking_before = timeline.paint_wait(before, record, attempt, records.jobs, (end, first))
            stretches += wait
            for kind in lacking_before:
                missing[kind].append(attempt)
        stretches += inside
        for kind in sorted(lacking):
            missing[kind].append(attempt)
        attempts.append(_attempt(attempt, record, steps.get(attempt), inside, lacking, records.state))
        end = max([each.end for each in inside] + ([] if end is None else [end]), default=end)
        before = record
    return _report(
        records, tuple(attempts), tuple(stretches), missing, steps, logged,
        ended_early=ended_early, first_start=first_start,
    )  # fmt: skip


def _attempt(
    attempt: int,
    record: Mapping[str, Any],
    steps: Steps | None,
    inside: Sequence[Stretch],
    missing: set[Kind],
    state: Mapping[str, Any],
) -> Attempt:
    word = str(record.get("state", "")) or "unknown"
    if not record:
        goes_on = state.get("attempt") == attempt and state.get("state") in ("starting", "running")
        word = str(state["state"]) if goes_on else "no line"
    cause = record.get("cause") or CAUSE_OF_STATE.get(word)
    said = record.get("evidence") or ([record["reason"]] if record.get("reason") else [])
    reached = [number(record.get("step_out")), steps.lines[-1].step if steps is not None else None]
    last = max((step for step in reached if step is not None), default=None)
    seconds: dict[Kind, float] = {}
    for each in inside:
        seconds[each.kind] = seconds.get(each.kind, 0.0) + each.seconds
    code = record.get("code") or record.get("code_version")
    return Attempt(
        number=attempt,
        on_record=bool(record),
        state=word,
        cause=str(cause) if cause else None,
        evidence=tuple(map(str, said)) if isinstance(said, list | tuple) else (str(said),),
        slow=heartbeats.sentences(record.get("slow")),
        action=_text(record.get("action")),
        restarts=_whole(record.get("restarts")),
        job_id=_text(record.get("job_id")),
        nodes=_names(record.get("nodes")),
        excluded=_names(record.get("excluded") or record.get("excluded_nodes")),
        world_size=_whole(record.get("world_size")),
        code=_text(code),
        started=number(record.get("started")),
        ended=number(record.get("ended")),
        resumed_after=steps.resumed_after if steps is not None else _whole(record.get("step_in")),
        last_step=int(last) if last is not None else None,
        lost_steps=steps.lost if steps is not None else None,
        seconds=seconds,
        missing=tuple(sorted(missing)),
    )


def _report(
    records: Records,
    attempts: tuple[Attempt, ...],
    stretches: tuple[Stretch, ...],
    missing: Mapping[Kind, Sequence[int]],
    steps: Mapping[int, Steps],
    logged: Sequence[Logged],
    *,
    ended_early: bool,
    first_start: float | None,
) -> Report:
    wall = max(each.end for each in stretches) - stretches[0].begin if stretches else None
    parts = tuple(_part(kind, stretches, missing[kind], wall) for kind in KINDS)
    by_kind = {part.kind: part for part in parts}
    productive = by_kind["train"].seconds
    from_start = max(each.end for each in stretches) - first_start if first_start is not None else None
    submitted = not (attempts and attempts[0].number in missing["queue"])
    ran = [
        each.ended - each.started for each in attempts if each.started is not None and each.ended is not None
    ]
    failures = sum(attempt.failed for attempt in attempts)
    state = attempts[-1].state if attempts else str(records.state.get("state", "no attempt yet"))
    total = [int(value) for line in records.metrics if (value := number(line.get("steps"))) is not None]
    return Report(
        state=state,
        ettr=_ratio(productive, wall) if submitted else None,
        ettr_without_queue=_ratio(productive, from_start),
        productive_seconds=productive,
        wall_seconds=wall if submitted else None,
        wall_without_queue_seconds=from_start,
        mttf_seconds=sum(ran) / failures if failures and ran else None,
        attempt_seconds=sum(ran) if ran else None,
        failures=failures,
        interruptions=sum(each.cause != "done" for each in attempts if each.on_record or each.failed),
        lost_steps=sum(each.lost for each in steps.values()) if steps else None,
        step=logged[-1].step if logged else None,
        steps=total[-1] if total else None,
        parts=parts,
        attempts=attempts,
        stretches=stretches,
        steps_of_attempt=steps,
        notes=_notes(records, attempts, missing, logged, ended_early=ended_early),
    )


def _part(kind: Kind, stretches: Sequence[Stretch], missing_in: Sequence[int], wall: float | None) -> Part:
    mine = [each for each in stretches if each.kind == kind]
    if not mine and missing_in:
        return Part(kind, KINDS[kind], None, None, tuple(missing_in))
    seconds = sum(each.seconds for each in mine)
    return Part(kind, KINDS[kind], seconds, _ratio(seconds, wall), tuple(missing_in))


def _notes(
    records: Records,
    attempts: Sequence[Attempt],
    missing: Mapping[Kind, Sequence[int]],
    logged: Sequence[Logged],
    *,
    ended_early: bool,
) -> tuple[str, ...]:
    texts: dict[Kind, str] = {
        "queue": "when the job was submitted",
        "preflight": "how long preflight took",
        "start": "when the first step began",
        "train": "how long some steps took",
        "save": "how long saves stopped the training (pauses count as not on record)",
        "stop": "when the attempt ended",
    }
    notes = [
        f"not on record in {_numbers(missing[kind])}: {text}" for kind, text in texts.items() if missing[kind]
    ]
    no_cause = [each.number for each in attempts if each.on_record and each.cause is None]
    if no_cause:
        notes.append(f"not on record in {_numbers(no_cause)}: the cause of the failure")
    no_line = [each.number for each in attempts if each.state == "no line"]
    if no_line:
        notes.append(
            f"{_numbers(no_line)} left no ledger line: the controller was killed, or is still at work"
        )
    if ended_early and logged and not records.checkpoints:
        notes.append("not on record: which step was saved last; all steps of the last attempt count")
    for line in records.checkpoints:
        if line.get("event") == "passed_over" and (step := _whole(line.get("step"))) is not None:
            which = _whole(line.get("attempt"))
            notes.append(f"attempt {which} passed over step-{step:08d}: {line.get('reason')}")
    dropped = len(records.metrics) - len(logged)
    if dropped:
        notes.append(f"{dropped} metrics lines without attempt, step or time were left out")
    return tuple(notes)


def _numbers(attempts: Sequence[int]) -> str:
    """ "attempt 3", "attempts 1, 2, 5-9"."""
    spans: list[list[int]] = []
    for each in sorted(set(attempts)):
        if spans and each == spans[-1][1] + 1:
            spans[-1][1] = each
        else:
            spans.append([each, each])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    return f"attempt{'s' if len(set(attempts)) > 1 else ''} {', '.join(words)}"


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _text(value: object) -> str | None:
    return str(value) if value else None


def _whole(value: object) -> int | None:
    found = number(value)
    return int(found) if found is not None else None


def _names(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()
