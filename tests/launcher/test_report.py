"""A report says how much of a run's time was training that counts, and never passes off the unknown as zero."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher import ledger, runs
from launcher.__main__ import main
from launcher.commands.report import records_of
from launcher.paths import REPOSITORY
from launcher.report import Records, Report, build
from launcher.report_page import Title, page
from launcher.spec import JobSpec

TOKENS_PER_STEP = 100
STEP_SECONDS = 10.0

SPEC = JobSpec(
    recipe="ch4_fsdp", entrypoint="recipes.ch4.fsdp", args={}, cluster="box", executor="slurm", nodes=2,
    tasks_per_node=2, gpus_per_node=0, cpus_per_task=1, time_minutes=60,
)  # fmt: skip


def logged(attempt: int, *ends: tuple[int, float]) -> list[dict[str, Any]]:
    """Metrics lines of one attempt: (step, time at its end), every step STEP_SECONDS long."""
    rate = TOKENS_PER_STEP / STEP_SECONDS
    return [
        {"time": end, "attempt": attempt, "step": step, "steps": 8, "loss": 9.0 - step,
         "tokens": step * TOKENS_PER_STEP, "tokens_per_second": rate}
        for step, end in ends
    ]  # fmt: skip


def saved(attempt: int, step: int, begin: float, blocked: float) -> list[dict[str, Any]]:
    about = {"attempt": attempt, "step": step}
    return [
        {**about, "event": "started", "time": begin},
        # On disk five seconds after the training went on: an asynchronous save blocks for its staging alone.
        {**about, "event": "saved", "seconds_blocked": blocked, "seconds_total": blocked + 5,
         "time": begin + blocked + 5},
    ]  # fmt: skip


def interrupted() -> Records:
    """Eight steps in three attempts. A node fails after step 6 (saved: 4), a rank hangs after step 7 (saved: 6).

    clock  1000 submitted, 1100 attempt 1 starts, preflight to 1105, tasks at 1106, first step from 1120
           steps 1 2 to 1140, save 3 s, steps 3 4 to 1163, save 3 s, steps 5 6 to 1186, over at 1200
           back in the queue; 1230 attempt 2 starts, preflight to 1235, tasks at 1236, first step from 1250
           steps 5 6 to 1270, save 3 s, step 7 to 1283, hangs, over at 1343
           1345 attempt 3 starts in the same job, first step from 1355, steps 7 8 to 1375, save 3 s, over at 1380
    """
    common = {"job_id": "7", "nodes": ["n1", "n2"], "world_size": 4}
    attempts = [
        {**common, "attempt": 1, "state": "node_failure", "cause": "node_failure", "evidence": ["n2 is DOWN"],
         "action": "requeued", "started": 1100.0, "tasks_started": 1106.0, "ended": 1200.0, "step_out": 6,
         "seconds": {"preflight": 5.0}},
        {**common, "attempt": 2, "state": "failed", "cause": "hang", "evidence": ["rank 3: all_reduce"],
         "action": "restarted", "started": 1230.0, "tasks_started": 1236.0, "ended": 1343.0, "step_out": 7,
         "seconds": {"preflight": 5.0}},
        {**common, "attempt": 3, "state": "done", "cause": "done", "evidence": [], "action": "done",
         "started": 1345.0, "tasks_started": 1345.0, "ended": 1380.0, "step_out": 8, "seconds": {"preflight": 0.0}},
    ]  # fmt: skip
    metrics = [
        *logged(1, (1, 1130.0), (2, 1140.0), (3, 1153.0), (4, 1163.0), (5, 1176.0), (6, 1186.0)),
        *logged(2, (5, 1260.0), (6, 1270.0), (7, 1283.0)),
        *logged(3, (7, 1365.0), (8, 1375.0)),
    ]
    checkpoints = [
        *saved(1, 2, 1140.0, 3.0), *saved(1, 4, 1163.0, 3.0), *saved(2, 6, 1270.0, 3.0), *saved(3, 8, 1375.0, 3.0)
    ]  # fmt: skip
    return Records(attempts, metrics, checkpoints, [{"job_id": "7", "executor": "slurm", "time": 1000.0}])


def seconds(report: Report) -> dict[str, float | None]:
    return {part.kind: part.seconds for part in report.parts}


def without(records: Records, *, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in keys} for line in records.attempts]


# --- the figures


def test_the_effective_training_time_is_what_one_computes_by_hand() -> None:
    report = build(interrupted())
    # Each step takes 10 s. Of attempt 1, steps 1 to 4 are in the final run, of attempt 2 steps 5 and 6, of attempt 3
    # steps 7 and 8; steps 5 and 6 of attempt 1 and step 7 of attempt 2 were run again.
    train, lost = (4 + 2 + 2) * 10.0, (2 + 1) * 10.0
    assert seconds(report) == pytest.approx({
        "train": train,
        "lost": lost,
        "save": 4 * 3.0,
        "start": (1 + 14) + (1 + 14) + 10.0,  # from preflight's end to the first step, in each attempt
        "stop": 14.0 + 60.0 + 2.0,  # from the last step, or the save after it, to the attempt's end
        "preflight": 5.0 + 5.0 + 0.0,
        "queue": 100.0 + 30.0,
        "idle": 2.0,  # the restart in the same job
        "unknown": 0.0,
    })  # fmt: skip
    assert sum(part.seconds or 0.0 for part in report.parts) == pytest.approx(380.0)
    assert report.ettr == pytest.approx(80 / 380)
    assert report.ettr_without_queue == pytest.approx(80 / 280)  # from 1100 on
    assert report.lost_steps == 3
    # Attempts ran 100, 113 and 35 s, and two of the three failed.
    assert report.mttf_seconds == pytest.approx((100 + 113 + 35) / 2)
    assert (report.failures, report.interruptions) == (2, 2)
    assert report.notes == ()


def test_a_job_file_waits_in_the_queue_before_its_controller_writes_anything() -> None:
    """`sbatch jobs/…`: the line of the job is as old as the controller, and only Slurm knows since when it waited."""
    records = interrupted()
    attempts = [dict(line) for line in records.attempts]
    attempts[0]["seconds"] = {"preflight": 5.0, "queue": 100.0}
    jobs = [{"job_id": "7", "executor": "slurm", "time": 1099.0}]
    report = build(dataclasses.replace(records, attempts=attempts, jobs=jobs))
    assert report.ettr == pytest.approx(80 / 380)


def test_every_second_is_counted_once() -> None:
    stretches = sorted(build(interrupted()).stretches, key=lambda each: each.begin)
    assert stretches[0].begin == 1000.0
    for earlier, later in itertools.pairwise(stretches):
        assert later.begin == pytest.approx(earlier.end)
    assert stretches[-1].end == 1380.0


def test_repeated_steps_are_told_from_those_that_count_also_between_two_lines() -> None:
    """One line per four steps; the newest checkpoint is of step 6, in the middle of a line's steps."""
    lines = logged(1, (4, 1040.0), (8, 1080.0)) + logged(2, (8, 1220.0), (12, 1260.0))
    attempts = [
        {"attempt": 1, "cause": "hardware", "started": 1000.0, "tasks_started": 1000.0, "ended": 1080.0},
        {
            "attempt": 2,
            "cause": "done",
            "state": "done",
            "started": 1200.0,
            "tasks_started": 1200.0,
            "ended": 1260.0,
        },
    ]
    report = build(Records(attempts, lines, saved(1, 6, 1060.0, 0.0)))
    assert [each.resumed_after for each in report.attempts] == [0, 6]
    assert seconds(report)["train"] == pytest.approx(6 * 10 + 2 * 10 + 4 * 10)
    assert seconds(report)["lost"] == pytest.approx(2 * 10)
    assert report.lost_steps == 2


def test_a_run_that_ended_early_holds_no_more_than_it_saved() -> None:
    records = interrupted()
    cut = Records(records.attempts[:1], records.metrics[:6], records.checkpoints[:4], records.jobs)
    report = build(cut)
    assert (seconds(report)["train"], seconds(report)["lost"]) == (pytest.approx(40.0), pytest.approx(20.0))
    assert report.ettr == pytest.approx(40 / 200)


def test_time_limits_and_preemptions_are_no_failures() -> None:
    records = interrupted()
    causes = ("preemption", "time_limit", "done")
    changed = [{**line, "cause": cause} for line, cause in zip(records.attempts, causes, strict=True)]
    report = build(Records(changed, records.metrics, records.checkpoints, records.jobs))
    assert (report.failures, report.interruptions, report.mttf_seconds) == (0, 2, None)


# --- what is not on record


def test_a_ledger_of_an_older_launcher_leaves_unknown_what_it_does_not_say() -> None:
    records = interrupted()
    old = without(records, keys=("cause", "evidence", "action", "seconds"))
    report = build(Records(old, records.metrics, (), records.jobs))
    found = seconds(report)
    assert (found["preflight"], found["save"]) == (None, None)
    # The clock of the metrics stood still 3 s after steps 2, 4 and 6: no step's time, and nobody says a save's. The
    # last save hides in the time after the last step, 6 s of preflight twice are not told apart.
    assert found["unknown"] == pytest.approx(3 * 3.0 + 6.0 + 6.0)
    assert found["train"] == pytest.approx(80.0)
    assert sum(value or 0.0 for value in found.values()) == pytest.approx(380.0)
    assert [each.cause for each in report.attempts] == ["node_failure", None, "done"]
    assert report.failures == 2, "an attempt whose cause is unknown did fail"
    assert "not on record in attempts 1-3: how long preflight took" in report.notes
    assert "not on record in attempt 2: the cause of the failure" in report.notes
    assert json.loads(json.dumps(report.as_json()))["parts"][5]["seconds"] is None


def test_without_a_submission_on_record_there_is_no_ratio_over_all_time() -> None:
    records = interrupted()
    report = build(Records(records.attempts, records.metrics, records.checkpoints))
    assert (report.ettr, report.wall_seconds) == (None, None)
    assert report.ettr_without_queue == pytest.approx(80 / 280)
    assert "not on record in attempt 1: when the job was submitted" in report.notes


def test_the_time_of_a_step_without_a_rate_is_unknown_not_zero() -> None:
    records = interrupted()
    bare = [
        {key: value for key, value in line.items() if key != "tokens_per_second"} for line in records.metrics
    ]
    report = build(Records(records.attempts, bare, records.checkpoints, records.jobs))
    part = next(part for part in report.parts if part.kind == "train")
    # Of each attempt, the first step has no beginning: 1, 5 and 7 are missing from the sum.
    assert (part.seconds, part.missing_in) == (pytest.approx(50.0), (1, 2, 3))


def test_an_attempt_that_left_no_line_is_shown_and_its_steps_count() -> None:
    records = interrupted()
    lost_line = [records.attempts[0], records.attempts[2]]
    report = build(Records(lost_line, records.metrics, records.checkpoints, records.jobs))
    assert [(each.number, each.state) for each in report.attempts] == [
        (1, "node_failure"), (2, "no line"), (3, "done")
    ]  # fmt: skip
    assert seconds(report)["train"] == pytest.approx(80.0)
    assert report.failures == 2
    going = build(
        Records(lost_line[:1], records.metrics[:9], (), records.jobs, {"attempt": 2, "state": "running"})
    )
    assert (going.attempts[-1].state, going.failures) == ("running", 1)


@pytest.mark.parametrize(
    "junk",
    [{}, {"attempt": "two"}, {"attempt": 2, "started": None, "seconds": [], "nodes": 7, "evidence": 3},
     {"attempt": 2, "started": float("nan"), "ended": True}],
)  # fmt: skip
def test_no_line_is_so_odd_that_there_is_no_report(junk: dict[str, Any]) -> None:
    records = interrupted()
    lines = [records.attempts[0], junk]
    report = build(Records(lines, [*records.metrics, {}, {"step": 4}], [junk], [junk, *records.jobs]))
    assert report.attempts[0].number == 1
    assert "2 metrics lines without attempt, step or time were left out" in report.notes
    assert page(report, Title("k3f9xq", "ch4_fsdp", "box", None))


# --- few attempts, torn files


def test_a_run_without_an_attempt_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.create(tmp_path, SPEC, [])
    assert main(["report", str(run.path)]) == 0
    assert "ch4_fsdp: no attempt yet" in capsys.readouterr().out
    report = build(records_of(run))
    assert (report.ettr, report.mttf_seconds, report.attempts) == (None, None, ())
    assert_self_contained((run.path / "report.html").read_text())


def test_one_attempt_that_never_reached_a_step() -> None:
    record = {"attempt": 1, "state": "failed", "cause": "user_error", "started": 10.0, "tasks_started": None,
              "ended": 13.0, "seconds": {"preflight": 2.0}}  # fmt: skip
    report = build(Records([record], jobs=[{"job_id": "1", "executor": "local", "time": 9.0}]))
    assert seconds(report) == pytest.approx({
        "train": 0.0, "lost": 0.0, "save": 0.0, "start": 1.0, "stop": 1.0, "preflight": 2.0, "queue": 0.0, "idle": 0.0,
        "unknown": 0.0,
    })  # fmt: skip
    assert (report.ettr, report.mttf_seconds) == (0.0, 3.0)


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    """The interrupted run on disk; each file has a line torn in its middle and a torn end."""
    made, records = runs.create(tmp_path, SPEC, []), interrupted()
    files = {
        made.attempts_file: records.attempts, made.metrics_file: records.metrics, made.jobs_file: records.jobs,
        made.path / "checkpoints.jsonl": records.checkpoints,
    }  # fmt: skip
    for file, lines in files.items():
        file.write_text(
            '{"attempt": 1, "st\n' + "".join(json.dumps(line) + "\n" for line in lines) + '{"atte'
        )
    return made


def test_torn_lines_change_nothing(run: runs.Run) -> None:
    assert build(records_of(run)) == build(interrupted())


# --- what is shown


def test_the_terminal_shows_figures_bar_and_attempts(
    run: runs.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert "21.1%  (28.6% without the first queue)" in text
    assert "attempt 2: rank 3: all_reduce" in text
    assert re.search(r"█+▓+▒+▚+▞+▤+░+·+\n", text), "one bar with every kind of time"
    assert re.search(r"training lost, repeated later +30 s +7\.9%", text)
    assert str(run.path / "report.html") in text


def test_json_has_the_same_figures_and_writes_no_page(
    run: runs.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ettr"] == pytest.approx(80 / 380)
    assert [each["cause"] for each in found["attempts"]] == ["node_failure", "hang", "done"]
    assert not (run.path / "report.html").exists()


def test_the_page_goes_where_one_says_or_one_line_says_why_not(
    run: runs.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run.path), f"--html={tmp_path}/here.html"]) == 0
    assert_self_contained((tmp_path / "here.html").read_text())
    assert main(["report", str(run.path), f"--html={tmp_path}/no/here.html"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/no/here.html: the page cannot be written: No such file or directory; "
        "name a file with --html\n"
    )


class Elements(HTMLParser):
    """Checks that every element is closed, and keeps what the page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self._look(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _look(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")
        ]


def assert_self_contained(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    elements.close()
    assert elements.open == []
    assert elements.references == []
    assert not {"script", "link", "iframe", "img", "object"} & set(elements.found)
    assert "//" not in text, "an address"
    assert set(re.findall(r"url\(.", text)) <= {"url(#"}
    assert "@import" not in text
    return elements


def test_the_page_holds_its_pictures_and_nothing_from_elsewhere() -> None:
    text = page(build(interrupted()), Title("k3f9xq", "ch4_fsdp", "box", 1.8e9))
    elements = assert_self_contained(text)
    assert elements.found.count("polyline") >= 4, "two curves, each with its repeated steps"
    assert 'aria-label="time by attempt"' in text
    assert text.count('class="attempt"') == 4, "where attempts 2 and 3 began, in both curves"
    assert text.count('class="band"') == 4, "what attempts 1 and 2 lost, in both curves"
    assert "prefers-color-scheme: dark" in text


def test_words_of_a_failure_cannot_break_the_page() -> None:
    records = interrupted()
    said = {**records.attempts[1], "evidence": ["<script>alert(1)</script> & 'x'"], "job_id": "<b>"}
    text = page(build(Records([said])), Title("<i>", "ch4_fsdp", "a&b", None))
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in text
    assert_self_contained(text)


# --- a real run


def test_a_real_run_that_was_resumed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**os.environ, "LAUNCHER_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def launcher(*words: str) -> None:
        command = [sys.executable, "-m", "launcher", *words, "--wait"]
        done = subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr

    small = ("args.save_every=2", "args.sequence_length=32", "args.batch_size=2")
    launcher("submit", "recipe=ch1_baseline", "cluster=local", "args.steps=2", *small)
    made = runs.all_runs([tmp_path])[0]
    launcher("resume", str(made.path), "args.steps=4")
    report = build(records_of(made))
    # By hand: the tokens of a step over its rate are its seconds, and no step was run twice.
    lines = ledger.read_lines(made.metrics_file)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    productive = sum(2 * 32 / line["tokens_per_second"] for line in lines)
    wall = made.attempts()[-1]["ended"] - made.jobs()[0]["time"]
    assert report.productive_seconds == pytest.approx(productive, abs=0.1)
    assert report.wall_seconds == pytest.approx(wall, abs=1e-3)
    assert sum(part.seconds or 0.0 for part in report.parts) == pytest.approx(wall, abs=1e-3)
    assert [(each.cause, each.resumed_after, each.last_step) for each in report.attempts] == [
        ("done", 0, 2), ("done", 2, 4)
    ]  # fmt: skip
    assert main(["report", str(made.path)]) == 0
    assert "ch1_baseline: done, step 4 of 4" in capsys.readouterr().out
    assert_self_contained((made.path / "report.html").read_text())
