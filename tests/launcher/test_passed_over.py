"""What is known of a run's checkpoints when one was passed over, not saved, or cannot be written at a stop."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import durations, killed, ledger, runs, status
from launcher.ownjob import Exclusion, affordable, parse_own_job
from launcher.paths import REPOSITORY
from launcher.report import Records, build
from tests.launcher.test_runs import spec


def event(attempt: int, kind: str, step: int, **more: object) -> dict[str, Any]:
    return {"attempt": attempt, "event": kind, "step": step, "time": 100.0 * attempt + step, **more}


PASSED_OVER = event(2, "passed_over", 20, reason="__0_0.distcp is corrupt")
EVENTS = [event(1, "saved", 10), event(1, "saved", 20), PASSED_OVER, event(2, "failed", 15, reason="full")]


def test_what_was_passed_over_is_saved_no_longer() -> None:
    assert durations.last_saved(EVENTS[:2]) == 20
    assert durations.last_saved(EVENTS) == 10
    assert durations.last_saved([*EVENTS, event(2, "saved", 15)]) == 15
    assert durations.last_saved([*EVENTS, event(2, "saved", 20)]) == 20, "written again"


def test_an_attempt_that_began_below_a_passed_over_step_may_make_progress() -> None:
    """By the highest step alone, attempt 2 would have saved nothing new until it was past step 20."""
    events = [*EVENTS, event(2, "saved", 15)]
    assert (durations.saved_before(2, events), durations.saved_before(3, events)) == (10, 15)
    record = {"saved_in": durations.saved_before(2, events), "saved_out": durations.last_saved(events)}
    assert ledger.past_of(record).saved


def test_each_trouble_is_one_line_of_the_attempt_that_had_it() -> None:
    assert durations.troubles(1, EVENTS) == ()
    assert durations.troubles(2, EVENTS) == (
        "step-00000020 was passed over: __0_0.distcp is corrupt",
        "step-00000015 was not saved: full",
    )


def test_status_and_report_tell_it(tmp_path: Path) -> None:
    run = runs.create(tmp_path, spec(), [])
    for _ in range(2):
        run.new_attempt_dir()
    for line in EVENTS:
        ledger.append_line(run.path / durations.CHECKPOINTS_FILE, line)
    assert status.status_of(run).passed_over == ("step-00000020: __0_0.distcp is corrupt",)
    command = [sys.executable, "-m", "launcher", "status", str(run.path)]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "passed over  step-00000020: __0_0.distcp is corrupt" in shown
    run.new_attempt_dir()
    assert status.status_of(run).passed_over == (), "the newest attempt passed nothing over"


def test_the_report_knows_where_an_attempt_began_when_a_checkpoint_was_passed_over() -> None:
    """Logged every 15 steps: the first line of attempt 2 is after both saves, and only one of them was loaded."""
    logged = [(1, 15), (1, 30), (2, 30), (2, 45)]
    metrics = [{"attempt": a, "step": s, "time": 100.0 * a + s, "steps": 45, "loss": 1.0} for a, s in logged]
    events = [event(1, "saved", 18), event(1, "saved", 25), event(2, "passed_over", 25, reason="torn")]
    report = build(Records(attempts=[{"attempt": 1, "state": "failed"}], metrics=metrics, checkpoints=events))
    assert report.attempts[1].resumed_after == 18
    assert "attempt 2 passed over step-00000025: torn" in report.notes


# --- nodes that a run must leave behind


def job_of(nodes: int, excluded: str = "(null)") -> Any:
    return parse_own_job({"NumNodes": f"{nodes}-{nodes}", "Partition": "main", "ExcNodeList": excluded})


FOUR = ("n1", "n2", "n3", "n4")


def test_broken_nodes_are_excluded_as_long_as_enough_remain() -> None:
    assert affordable(job_of(2), ["n2"], FOUR) == Exclusion(("n2",))
    assert affordable(job_of(2), ["n2", "n3"], FOUR) == Exclusion(("n2", "n3"))


def test_what_the_user_excluded_stays_excluded() -> None:
    assert affordable(job_of(2, "n[1,3]"), ["n2"], FOUR) == Exclusion(
        ("n1", "n3"),
        ("n2",),
        "n2 cannot be excluded: the job needs 2 nodes, and partition main would have 1 left",
    )
    assert affordable(job_of(1, "n[1,3]"), ["n2"], FOUR).nodes == ("n1", "n3", "n2")


def test_the_newest_broken_node_is_excluded_first() -> None:
    found = affordable(job_of(3), ["n1", "n2"], FOUR)
    assert (found.nodes, found.dropped) == (("n2",), ("n1",))


def test_a_job_that_needs_every_node_excludes_none() -> None:
    found = affordable(job_of(4), ["n2"], FOUR)
    assert (found.nodes, found.dropped) == ((), ("n2",))
    assert (
        found.reason == "n2 cannot be excluded: the job needs 4 nodes, and partition main would have 3 left"
    )


def test_a_node_of_another_partition_costs_nothing() -> None:
    assert affordable(job_of(4), ["other"], FOUR) == Exclusion(("other",))


# --- controllers that are killed one after the other


def test_only_so_many_controllers_in_a_row_are_followed(tmp_path: Path) -> None:
    run = runs.create(tmp_path, spec(), [])
    for number in range(4):
        assert killed._in_a_row(run) == number
        run.add_job(str(number), "slurm", controller_killed=True)
    run.add_job("5", "slurm")
    assert killed._in_a_row(run) == 4
    ledger.append_line(run.attempts_file, {"attempt": 1, "ended": time.time() + 1})
    assert killed._in_a_row(run) == 0


# --- a stop whose save fails


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: a checkpoint does not fit."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_stop_whose_save_fails_is_no_stop_after_saving(
    full_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCHER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def launcher(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher", *words]
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
        )

    small = ["args.sequence_length=32", "args.batch_size=2", "args.steps=100000", "args.save_every=0"]
    said = launcher("submit", "--json", "recipe=ch1_baseline", "cluster=local", *small).stdout
    run = runs.Run(Path(json.loads(said)["directory"]))
    (run.path / "checkpoints").symlink_to(full_disk)
    until(lambda: len(ledger.read_lines(run.metrics_file)) > 2)
    launcher("cancel", run.id)
    until(run.attempts)
    (record,) = run.attempts()
    assert (record["cause"], record["action"], record["saved_out"]) == ("cancelled", "stopped", None)
    assert record["exit_code"] not in (0, 75)
    not_saved = f"step-{record['step_out']:08d} was not saved: it needs "
    assert any(line.startswith(not_saved) for line in record["evidence"]), record["evidence"]
    assert list(full_disk.iterdir()) == []
