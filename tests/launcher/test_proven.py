"""PROVEN.md: for every recipe and place a run or a reason, for every option whether it ever ran."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from launcher import proven, spec
from launcher.preflight_job import NAME as PREFLIGHT
from launcher.recipes import recipe_files
from launcher.spec import Container, JobSpec, UserError

ROOT = proven.PAGE.parent
RUN = proven.Run(
    recipe="ch4_fsdp",
    place="box",
    options=(),
    commit="0123456789",
    date="2026-01-31",
    torch="2.13.0",
    hardware="2 CPU cores",
    command="python -m launcher submit recipe=ch4_fsdp | tee log",
    result="loss 3.1",
)
EMPTY = proven.Proven(runs=(), reasons=(), options=())
JOB = JobSpec(
    recipe="ch4_fsdp",
    entrypoint="recipes.ch4.fsdp",
    args={},
    cluster="box",
    executor="slurm",
    nodes=2,
    tasks_per_node=1,
    gpus_per_node=0,
    cpus_per_task=1,
    time_minutes=10,
)


# --- the records of this tree -----------------------------------------------------------------------------


def test_the_page_is_what_the_records_say() -> None:
    written = proven.page(proven.load(), list(recipe_files()))
    assert proven.PAGE.read_text() == written, "run: python -m launcher.proven write"


def test_every_recipe_has_run_in_every_place_or_says_why_not() -> None:
    assert proven.unanswered(proven.load(), recipe_files()) == []


def test_records_name_recipes_that_exist() -> None:
    records = proven.load()
    named = {run.recipe for run in records.runs} | {reason.recipe for reason in records.reasons}
    assert named <= {*recipe_files(), PREFLIGHT}


def test_no_run_was_made_with_uncommitted_changes() -> None:
    assert [run for run in proven.load().runs if run.commit.endswith("+changes")] == []


def test_every_choice_that_a_job_offers_is_listed_as_proven_or_not() -> None:
    """A new executor, launch or container kind cannot be forgotten here."""
    offered = {
        f"{key}={value}"
        for key, choices, default in (
            ("executor", spec.Executor, "slurm"),
            ("launch", spec.Launch, JOB.launch),
            ("preflight", spec.Preflight, JOB.preflight),
            ("container.kind", spec.ContainerKind, JOB.container.kind),
        )
        for value in typing.get_args(choices)
        if value != default
    }
    offered |= {f"fabric={path.stem}" for path in (ROOT / "env/fabrics").glob("*.yaml")} - {"fabric=loopback"}
    assert offered <= {option.option for option in proven.load().options}


def test_an_option_that_a_run_used_is_not_called_unproven() -> None:
    records = proven.load()
    used = {option for run in records.runs for option in run.options}
    assert [option for option in records.options if option.proven != (option.option in used)] == []
    assert [option for option in records.options if option.proven == bool(option.reason)] == []


# --- warnings at submission -------------------------------------------------------------------------------


def test_a_job_is_warned_of_each_option_that_never_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    records = dataclasses.replace(
        EMPTY,
        options=(
            proven.Option("container.kind=pyxis", proven=False, reason="no such cluster"),
            proven.Option("launch=torchrun", proven=False, reason="not tried"),
            proven.Option("fabric=tcp", proven=True, reason=""),
        ),
    )
    monkeypatch.setattr(proven, "load", lambda: records)
    in_container = dataclasses.replace(JOB, container=Container(kind="pyxis", image="some/image"))
    assert proven.unproven_options(in_container) == [
        "container.kind=pyxis has never run in this project's tests: no such cluster"
    ]
    assert proven.unproven_options(JOB) == []


def test_every_listed_option_is_one_that_a_job_can_have() -> None:
    for option in proven.load().options:
        proven._has(JOB, option.option)  # AttributeError for a setting that does not exist


def test_asking_for_warnings_costs_submission_no_heavy_import() -> None:
    code = (
        "import sys, launcher.proven; print({'torch', 'numpy', 'yaml', 'submitit'} & set(sys.modules) or '')"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == ""


# --- recording --------------------------------------------------------------------------------------------


def test_a_run_replaces_the_earlier_one_and_the_reason() -> None:
    before = proven.Proven(
        runs=(RUN, dataclasses.replace(RUN, place="local")),
        reasons=(proven.Reason("ch4_fsdp", "box", "no time"), proven.Reason("ch4_fsdp", "gpu", "none here")),
        options=(),
    )
    later = dataclasses.replace(RUN, commit="fedcba9876")
    after = proven.with_run(before, later)
    assert after.runs == (dataclasses.replace(RUN, place="local"), later)
    assert after.reasons == (proven.Reason("ch4_fsdp", "gpu", "none here"),)


def test_a_run_with_an_option_proves_it() -> None:
    option = proven.Option("launch=torchrun", proven=False, reason="not tried")
    before = dataclasses.replace(EMPTY, options=(option,))
    after = proven.with_run(before, dataclasses.replace(RUN, options=("launch=torchrun",)))
    assert after.options == (proven.Option("launch=torchrun", proven=True, reason=""),)
    with pytest.raises(UserError, match="did you mean launch=torchrun"):
        proven.with_run(before, dataclasses.replace(RUN, options=("launch=torchrum",)))


def test_what_has_run_cannot_be_excused() -> None:
    with pytest.raises(UserError, match="ch4_fsdp has a run in box"):
        proven.with_reason(dataclasses.replace(EMPTY, runs=(RUN,)), proven.Reason("ch4_fsdp", "box", "no"))


def test_the_records_survive_being_written_and_read(tmp_path: Path) -> None:
    records = proven.Proven(
        runs=(RUN,),
        reasons=(proven.Reason("a", "gpu", "b"),),
        options=(proven.Option("launch=torchrun", proven=False, reason="c"),),
    )
    (tmp_path / "proven.json").write_text(proven.to_json(records))
    assert proven.load(tmp_path / "proven.json") == records


def test_the_page_shows_runs_reasons_and_a_dash_where_nothing_ran() -> None:
    records = proven.Proven(
        runs=(RUN,),
        reasons=(proven.Reason("ch4_fsdp", "gpu", "none here"),),
        options=(proven.Option("launch=torchrun", proven=False, reason="not tried"),),
    )
    lines = proven.page(records, ["ch4_fsdp"]).splitlines()
    assert "| `ch4_fsdp` | - | - | 0123456789 | - |" in lines
    assert "| `ch4_fsdp` | gpu | none here |" in lines
    assert "| `launch=torchrun` | not tried |" in lines
    assert any("submit recipe=ch4_fsdp \\| tee log" in line for line in lines), "a pipe would end the cell"


def test_a_pair_with_neither_run_nor_reason_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.recipes.recipe_files", lambda: {"ch4_fsdp": tmp_path})
    data, target = tmp_path / "proven.json", tmp_path / "PROVEN.md"
    local = proven.Option("executor=local", proven=False, reason="not tried")
    data.write_text(proven.to_json(dataclasses.replace(EMPTY, options=(local,))))

    def command(*words: str) -> int:
        return proven.main(words, data, target)

    for place in ("torchrun", "local", "box"):
        shared = ("--recipe", "ch4_fsdp", "--place", place)
        assert command("record", *shared, "--command", "c", "--result", "r", "--commit", "0123456789") == 0
    assert command("write") == 1
    assert "neither a run nor a reason: ch4_fsdp in gpu" in capsys.readouterr().err
    assert command("reason", "--recipe", "ch4_fsdp", "--place", "gpu", "--reason", "none here") == 0
    assert command("write") == 0
    assert len(json.loads(data.read_text())["runs"]) == 3
    assert proven.load(data).options[0].proven, "a run with cluster=local is one of the local executor"
    assert "none here" in target.read_text()


def test_an_unknown_recipe_is_named_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.recipes.recipe_files", lambda: {"ch4_fsdp": tmp_path})
    data = tmp_path / "proven.json"
    data.write_text(proven.to_json(EMPTY))
    words = ("reason", "--recipe", "ch4_fdsp", "--place", "gpu", "--reason", "none")
    assert proven.main(words, data, tmp_path / "PROVEN.md") == 2
    assert capsys.readouterr().err == "error: --recipe ch4_fdsp: no such recipe; did you mean ch4_fsdp?\n"


def test_the_commit_tells_of_uncommitted_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
        return subprocess.check_output(["git", *identity, "-C", str(tmp_path), *words], text=True).strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    head = git("rev-parse", "--short=10", "HEAD")
    assert proven.current_commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert proven.current_commit(tmp_path) == f"{head}+changes"


def test_without_git_a_commit_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --commit"):
        proven.current_commit(tmp_path)
