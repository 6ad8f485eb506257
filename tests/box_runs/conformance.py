"""Faults for a real recipe that was started with `sbatch` of its rendered file, and what must be true afterwards.

A test freezes the ranks (SIGSTOP) at the moment that it wants, strikes, and thaws them: so a fault lands in the middle
of a step, or of a save, on a fast machine and on a slow one alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import durations, heartbeats, ledger, runs
from launcher.paths import REPOSITORY
from tests.box_runs.support import WAIT_SECONDS, Launcher, ended, wait_until
from tests.box_runs.survival import job, start_now

STEPS, SAVE_EVERY = 40, 8
WORDS = (
    f"args.steps={STEPS}", f"args.save_every={SAVE_EVERY}", "args.sequence_length=16", "args.batch_size=12",
    "env.HANG_SECONDS=0",
)  # fmt: skip
"""12 sequences in a batch: two, three and four ranks get equal shares. Frozen ranks look hung: nobody watches."""
SAME_ORDER, OTHER_ORDER = 0.0, 1e-5
"""Largest relative difference of a loss: none at one world size; sums of other parts round differently."""


@dataclasses.dataclass(frozen=True)
class Started:
    """A run that a job file started."""

    launcher: Launcher
    run: runs.Run
    log: Path
    """The batch steps' output, of all attempts."""
    submitted: float
    """Unix time, before sbatch."""

    def job(self) -> dict[str, str]:
        return job(self.launcher, self.run)

    def ranks(self, attempt: int = 1) -> dict[int, int]:
        """The process of each rank of an attempt."""
        return {beat.rank: beat.pid for beat in heartbeats.read(self.run.path / f"attempt-{attempt:02d}")}

    def steps(self, attempt: int) -> list[int]:
        return [
            line["step"] for line in ledger.read_lines(self.run.metrics_file) if line["attempt"] == attempt
        ]

    def events(self) -> list[dict[str, Any]]:
        return durations.announcements(self.run)

    def saved(self) -> int:
        return durations.last_saved(self.events()) or 0

    def goes_on(self, within: float = 400.0, restarts: int = 1) -> None:
        """Let a requeued job start without the wait that its credential asks for."""
        start_now(self.launcher, self.run, restarts, within)


def start(
    launcher: Launcher,
    folder: Path,
    *words: str,
    recipe: str = "ch4_fsdp",
    nodes: int = 2,
    flags: Sequence[str] = (),
) -> Started:
    """Render the recipe's job file and give it to sbatch, as a reader does."""
    folder.mkdir(exist_ok=True)
    known = {run.path for run in runs.all_runs([launcher.run_root])}
    file, log = folder / f"{recipe}.sbatch", folder / "batch.log"
    rendered = launcher("render", f"recipe={recipe}", "cluster=box", "tasks_per_node=1", *words)
    file.write_text(rendered.stdout)
    submitted = time.time()
    launcher.slurm(
        "sbatch", f"--nodes={nodes}", f"--output={log}", *flags, str(file), *WORDS, *words, cwd=REPOSITORY
    )

    def made() -> list[runs.Run]:
        return [run for run in runs.all_runs([launcher.run_root]) if run.path not in known and run.jobs()]

    return Started(launcher, wait_until(made, f"the run directory; {log}")[0], log, submitted)


@contextlib.contextmanager
def frozen(started: Started, moment: Callable[[], bool], attempt: int = 1) -> Iterator[dict[int, int]]:
    """Stop every rank at the moment that `moment` is true, for as long as the block lasts. Gives rank -> process.

    A moment that has passed before all of them stand still is waited for again: a save may be over so soon.
    """
    wait_until(lambda: started.steps(attempt), f"a step of attempt {attempt}; {started.log}")
    ranks = started.ranks(attempt)
    end = time.monotonic() + WAIT_SECONDS
    while True:
        while not moment():
            assert time.monotonic() < end, f"the moment never came; {started.log}"
            assert len(started.run.attempts()) < attempt, (
                f"the attempt ended before its moment; {started.log}"
            )
            time.sleep(0.002)
        tell(ranks.values(), signal.SIGSTOP)
        if moment():
            break
        tell(ranks.values(), signal.SIGCONT)
    try:
        yield ranks
    finally:
        tell(ranks.values(), signal.SIGCONT)


def tell(processes: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those of the processes that still live."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def in_a_step(started: Started, step: int = 20, attempt: int = 1) -> Callable[[], bool]:
    """After `step` steps of the run. The save of step 16 began after that of step 8 was safe."""
    return lambda: (started.steps(attempt) or [0])[-1] >= step


def in_a_save(started: Started, after: int = SAVE_EVERY) -> Callable[[], bool]:
    """While a save later than that of step `after` is announced as started and not as ended."""
    return lambda: saving(started) > after


def saving(started: Started) -> int:
    """The step of the save that is under way; 0 for none."""
    events = started.events()
    return int(events[-1]["step"]) if events and events[-1]["event"] == "started" else 0


def stop(started: Started, attempt: int = 1) -> None:
    """Cancel the run in the middle of an attempt, and wait for the end of its job."""
    with frozen(started, in_a_step(started, step=14 + 6 * attempt, attempt=attempt), attempt):
        started.launcher("cancel", started.run.id)
    ended(started.run, attempt)
    over = ("COMPLETED", "FAILED", "CANCELLED")
    wait_until(lambda: started.job()["JobState"] in over, "the end of the job")


def losses_by_step(run: runs.Run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in ledger.read_lines(run.metrics_file)}


def check(
    started: Started, reference: Mapping[int, float], causes: Sequence[str], *, tolerance: float = SAME_ORDER,
    starts: Sequence[int] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What is true of every run that a fault struck; gives its ledger lines.

    `starts` are the steps that the attempts after the first went on from, where that is not what was saved last.
    """
    run = started.run
    records = [ended(run, number) for number in range(1, len(causes) + 1)]
    assert [record["cause"] for record in records] == list(causes), [record["reason"] for record in records]
    assert len(run.attempts()) == len(causes)
    assert [found.path for found in runs.all_runs([run.path.parent]) if found.id == run.id] == [run.path]
    _check_that_it_struck(records)
    # Slurm counts whole seconds.
    assert records[0]["started"] - records[0]["seconds"]["queue"] > started.submitted - 2.0, (
        "a queue of before"
    )
    lines = ledger.read_lines(run.metrics_file)
    for line in lines:
        wanted = reference[line["step"]]
        difference = abs(line["loss"] - wanted) / abs(wanted)
        assert difference <= tolerance, f"step {line['step']} of attempt {line['attempt']}: {difference:.1e}"
    assert {line["step"] for line in lines} == set(range(1, STEPS + 1))
    for index, record in enumerate(records[1:]):
        went_on_from = started.steps(record["attempt"])[0] - 1
        assert went_on_from == (record["saved_in"] if starts is None else starts[index])
    _check_that_logs_were_appended(started, len(causes))
    return records


def _check_that_it_struck(records: Sequence[Mapping[str, Any]]) -> None:
    """Every attempt but the last ended between the first save and the last step: an undisturbed run fails here."""
    assert len(records) > 1, "nothing ended the run before its time"
    for record in records[:-1]:
        assert record["saved_out"] >= SAVE_EVERY, "nothing had been saved when the fault struck"
        assert record["step_out"] < STEPS, "the run was over when the fault struck"
        assert record["exit_code"] != 0
    assert records[-1]["step_out"] == STEPS


def _check_that_logs_were_appended(started: Started, attempts: int) -> None:
    text = "".join(log.read_text() for log in dict.fromkeys(logs_of(started.run)))
    for number in range(1, attempts + 1):
        assert f"run {started.run.id} attempt {number}:" in text, "an attempt erased the log of those before"
        assert (started.run.path / f"attempt-{number:02d}" / "rank-0.log").stat().st_size


def logs_of(run: runs.Run) -> list[Path]:
    """The batch step's log of each job of the run."""
    return [
        Path(line["log"]) if "log" in line else run.submitit_folder / f"{line['job_id']}_0_log.out"
        for line in run.jobs()
    ]
