"""What is shown of a run's progress and end: of one that trains, and of one that measures and has no loss."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher import progress, runs
from launcher.report import Records, build
from launcher.spec import JobSpec
from launcher.status import status_of

SPEC = JobSpec(
    recipe="ch2_pairs", entrypoint="recipes.ch2.pairs", args={}, cluster="local", executor="local", nodes=1,
    tasks_per_node=2, gpus_per_node=0, cpus_per_task=1, time_minutes=60,
)  # fmt: skip


def test_a_training_step_shows_its_loss_and_the_time_left() -> None:
    line = {"step": 40, "steps": 200, "loss": 3.214, "tokens": 4000, "tokens_per_second": 100.0}
    assert progress.describe(line) == "step 40/200  loss 3.2140  100 tokens/s  2:40 left"


def test_a_measurement_shows_what_was_measured() -> None:
    line = {"step": 3, "steps": 12, "what": "all_reduce 1 MiB: 12.3 GB/s"}
    assert progress.describe(line) == "step 3/12  all_reduce 1 MiB: 12.3 GB/s"


def finished(tmp_path: Path, metrics: list[dict[str, Any]]) -> runs.Run:
    run = runs.create(tmp_path, SPEC, [])
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return run


def summary(run: runs.Run) -> str:
    console = Console(file=io.StringIO(), width=120)
    progress.summary(run, status_of(run), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def measurements(count: int) -> list[dict[str, Any]]:
    return [
        {
            "time": 100.0 + step,
            "attempt": 1,
            "step": step,
            "steps": count,
            "what": f"pair {step}",
            "seconds": 1.0,
        }
        for step in range(1, count + 1)
    ]


def test_at_its_end_a_run_that_measured_shows_its_tables_and_no_loss_curve(tmp_path: Path) -> None:
    run = finished(tmp_path, measurements(3))
    (run.path / "results.txt").write_text("\nGB/s from [each] rank\npicture pairs.png\n")
    shown = summary(run)
    assert "GB/s from [each] rank\npicture pairs.png\n" in shown
    assert "loss" not in shown
    assert not (run.path / "loss.png").exists()


def test_at_its_end_a_run_that_trained_shows_its_loss_curve(tmp_path: Path) -> None:
    run = finished(tmp_path, [{**line, "loss": 8.0 / line["step"]} for line in measurements(3)])
    assert "loss curve" in summary(run)
    assert (run.path / "loss.png").exists()


def test_the_status_of_a_run_that_measures_has_steps_and_no_loss(tmp_path: Path) -> None:
    found = status_of(finished(tmp_path, measurements(3)))
    assert (found.step, found.steps, found.loss) == (3, 3, None)


@pytest.mark.parametrize("with_seconds", [True, False])
def test_the_report_counts_every_measurement_whose_length_is_known(with_seconds: bool) -> None:
    attempt = {
        "attempt": 1, "state": "done", "cause": "done", "action": "done", "started": 90.0, "tasks_started": 91.0,
        "ended": 106.0, "step_out": 5, "nodes": ["n1"], "seconds": {"preflight": 1.0}, "evidence": [],
    }  # fmt: skip
    lines = measurements(5)
    if not with_seconds:
        lines = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    report = build(Records([attempt], lines, [], [{"job_id": "1", "executor": "local", "time": 90.0}]))
    seconds = {part.kind: part.seconds for part in report.parts}
    assert seconds["train"] == pytest.approx(5.0 if with_seconds else 4.0)
    assert seconds["start"] == (pytest.approx(9.0) if with_seconds else None)
    assert (report.step, report.steps) == (5, 5)
