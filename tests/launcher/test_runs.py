"""Runs are found by any unique prefix, records are complete or invisible, a torn line hides nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import ledger, runs
from launcher.spec import JobSpec, UserError


def spec(**changes: object) -> JobSpec:
    fields = {
        "recipe": "ch4_fsdp", "entrypoint": "recipes.ch4.fsdp", "args": {"lr": 1e-4, "data": "a b", "note": None},
        "cluster": "box", "executor": "slurm", "nodes": 2, "tasks_per_node": 2, "gpus_per_node": 0,
        "cpus_per_task": 1, "time_minutes": 60,
    }  # fmt: skip
    return JobSpec(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_frozen_spec_reads_back_equal(tmp_path: Path) -> None:
    original = spec(exclude=("n1",), activate=("module load cuda",), environment={"A": "ü"})
    run = runs.create(tmp_path, original, ["recipe=ch4_fsdp"])
    assert run.spec() == original


def test_the_spec_of_a_newer_launcher_is_refused(tmp_path: Path) -> None:
    run = runs.create(tmp_path, spec(), [])
    newer = json.loads(run.spec_file.read_text()) | {"version": 99}
    run.spec_file.write_text(json.dumps(newer))
    with pytest.raises(UserError, match="version 99"):
        run.spec()


def test_the_recipe_gets_its_arguments_as_words() -> None:
    assert spec().recipe_argv() == ["lr=0.0001", "data=a b", "note=null"]


def test_a_run_is_found_by_prefix_by_folder_name_by_path_and_as_the_latest(tmp_path: Path) -> None:
    first = runs.create(tmp_path, spec(), [])
    latest = runs.create(tmp_path, spec(recipe="ch3_ddp"), [])
    assert runs.find([tmp_path], None) == latest
    assert runs.find([tmp_path], first.id) == first
    assert runs.find([tmp_path], first.path.name) == first
    assert runs.find([tmp_path], str(first.path)) == first
    assert runs.find([tmp_path], "ch3") == latest


def test_an_ambiguous_or_unknown_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        runs.find([tmp_path], None)
    for _ in range(2):
        runs.create(tmp_path, spec(), [])
    with pytest.raises(UserError, match="'ch4' is the start of 2 runs"):
        runs.find([tmp_path], "ch4")
    with pytest.raises(UserError, match="no run 'zzz'"):
        runs.find([tmp_path], "zzz")


def test_two_controllers_at_once_get_two_attempts(tmp_path: Path) -> None:
    run = runs.create(tmp_path, spec(), [])
    (run.path / "attempt-02").mkdir()  # another controller was faster by one
    assert run.new_attempt_dir()[0] == 3
    (run.path / "attempt-10").mkdir()
    assert [path.name for path in run.attempt_dirs()] == ["attempt-02", "attempt-03", "attempt-10"]


def test_a_torn_ledger_line_hides_no_other(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    ledger.append_line(path, {"attempt": 1})
    with path.open("a") as file:
        file.write('{"attempt": 2, "sta')  # the node died while it wrote
    assert [line["attempt"] for line in ledger.read_lines(path)] == [1]
    ledger.append_line(path, {"attempt": 3})
    assert [line["attempt"] for line in ledger.read_lines(path)] == [1, 3]


def test_a_requeued_job_finds_its_run(tmp_path: Path) -> None:
    run = runs.create(tmp_path, spec(), [])
    runs.remember_job(tmp_path, "hopper", "12", run)
    assert runs.run_of_job(tmp_path, "hopper", "12") == run
    assert runs.run_of_job(tmp_path, "hopper", "13") is None
    assert runs.run_of_job(tmp_path, "ampere", "12") is None
