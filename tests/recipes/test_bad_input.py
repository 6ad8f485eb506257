"""What a person gets wrong about a run directory: one clear line through the real command line, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import runs
from launcher.paths import REPOSITORY
from recipes.lib import manifest

ARGUMENTS = {
    "data": "texts", "sequence_length": "32", "batch_size": "2", "save_every": "2", "steps": "4", "model": "tiny",
    "device": "cpu",
}  # fmt: skip


def command(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A module with its words, as a person starts it in `folder`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RUN_"))}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env={**inherited, **own, **variables},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and `runs/`, which holds one run of the launcher's with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("bad-input")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    words = [f"args.{key}={value}" for key, value in ARGUMENTS.items() if key != "data"]
    words += [f"args.data={folder / 'texts'}", "recipe=ch1_baseline", "cluster=local", "--wait"]
    done = command(folder, "launcher", "submit", *words, LAUNCHER_RUNS=str(folder / "runs"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> runs.Run:
    """A copy of that run, to be mistreated."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return runs.all_runs([tmp_path / "runs"])[0]


def contents(run: runs.Run) -> dict[Path, bytes]:
    """Every file of a run directory, byte for byte."""
    return {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a mistake is answered with."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def trained_on(run: runs.Run, tmp_path: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The recipe with other arguments in the same run directory."""
    arguments = {**ARGUMENTS, "data": str(tmp_path / "texts"), "steps": "6", **changes}
    words = [f"{key}={value}" for key, value in arguments.items()]
    return command(tmp_path, "recipes.ch1.baseline", *words, RUN_DIR=str(run.path), ATTEMPT="2")


def change_manifest(run: runs.Run, step: int, **changes: object) -> Path:
    file = manifest.folder_of(run.path, step) / manifest.MANIFEST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file.parent


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": "small"}, "was trained with model=tiny, this run has model=small: set it back"),
        ({"vocab_size": "8192"}, "this run has vocab_size=8192: set it back, or start another run"),
        ({"sequence_length": "64"}, "was trained with sequence_length=32, this run has sequence_length=64"),
    ],
)
def test_a_checkpoint_of_another_model_or_shape(
    changes: dict[str, str], line: str, run: runs.Run, tmp_path: Path
) -> None:
    before = contents(run)
    assert line in one_line(trained_on(run, tmp_path, **changes))
    assert contents(run) == before


def test_a_checkpoint_of_another_stack(run: runs.Run, tmp_path: Path) -> None:
    folder = change_manifest(run, 4, stack="megatron", technique="ch5_megatron")
    before = contents(run)
    line = one_line(trained_on(run, tmp_path))
    assert line == (
        f"error: {folder} was written by megatron; this recipe reads torch.distributed.checkpoint: "
        "go on with ch5_megatron, or start another run\n"
    )
    assert contents(run) == before


def test_a_checkpoint_of_a_newer_version(run: runs.Run, tmp_path: Path) -> None:
    folder = change_manifest(run, 4, format=99, something="new")
    before = contents(run)
    line = one_line(trained_on(run, tmp_path))
    assert line.startswith(f"error: {folder} was written by a newer version (format 99, this one reads 1)")
    assert contents(run) == before


@pytest.mark.parametrize(
    "words", [["status"], ["resume"], ["report"], ["checkpoints", "--prune", "--keep=1", "--yes"]]
)
def test_a_run_directory_of_a_newer_version(words: list[str], run: runs.Run, tmp_path: Path) -> None:
    run.spec_file.write_text(json.dumps({**json.loads(run.spec_file.read_text()), "version": 99}))
    before = contents(run)
    name, *options = words
    done = command(tmp_path, "launcher", name, run.id, *options, LAUNCHER_RUNS=str(tmp_path / "runs"))
    assert one_line(done) == "error: the run's spec has version 99; this launcher reads version 1\n"
    assert contents(run) == before


def test_a_resume_of_a_run_that_is_still_going(run: runs.Run, tmp_path: Path) -> None:
    root = {"LAUNCHER_RUNS": str(tmp_path / "runs")}
    words = ["launcher", "resume", run.id, "args.steps=100000"]
    assert command(tmp_path, *words, **root).returncode == 0
    try:
        until = time.monotonic() + 120
        while run.state().get("state") != "running" or len(contents_of_metrics(run)) < 5:
            assert time.monotonic() < until, run.state()
            time.sleep(0.1)
        spec, jobs = run.spec_file.read_bytes(), run.jobs_file.read_bytes()
        line = one_line(command(tmp_path, *words, "args.lr=1", **root))
        assert line.startswith(f"error: run {run.id} is running (job ")
        assert line.endswith("cancel it first, or wait for it\n")
        assert (run.spec_file.read_bytes(), run.jobs_file.read_bytes()) == (spec, jobs)
        assert len(run.attempt_dirs()) == 2
    finally:
        command(tmp_path, "launcher", "cancel", run.id, **root)
    until = time.monotonic() + 60
    while len(run.attempts()) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert run.attempts()[1]["cause"] == "cancelled"


def contents_of_metrics(run: runs.Run) -> list[str]:
    return run.metrics_file.read_text().splitlines()


def test_a_retention_of_zero(run: runs.Run, tmp_path: Path) -> None:
    root, before = {"LAUNCHER_RUNS": str(tmp_path / "runs")}, contents(run)
    assert "keep=0: wants 1 or more" in one_line(trained_on(run, tmp_path, keep="0"))
    for words in (
        ["resume", run.id, "args.keep=0"],
        ["submit", "recipe=ch1_baseline", "cluster=local", "args.keep=0"],
    ):
        assert "args.keep=0: wants 1 or more" in one_line(command(tmp_path, "launcher", *words, **root))
    prune = ["launcher", "checkpoints", run.id, "--prune", "--keep=0", "--yes"]
    assert "--keep=0: wants 1 or more" in one_line(command(tmp_path, *prune, **root))
    assert contents(run) == before
    assert len(runs.all_runs([tmp_path / "runs"])) == 1


def test_beginning_again_where_a_run_has_been(run: runs.Run, tmp_path: Path) -> None:
    """Lower steps beside higher ones of before: nothing could say which checkpoint is the run's newest."""
    before = contents(run)
    words = [f"{key}={value}" for key, value in ARGUMENTS.items()]
    line = one_line(command(tmp_path, "recipes.ch1.baseline", *words, "resume=false", RUN_DIR=str(run.path)))
    assert line.startswith(f"error: resume=false: {run.path / 'checkpoints'} already holds step-00000004")
    root = {"LAUNCHER_RUNS": str(tmp_path / "runs")}
    refused = one_line(command(tmp_path, "launcher", "resume", run.id, "args.resume=false", **root))
    assert refused == (
        f"error: args.resume=false: run {run.id} does not go backwards; submit a new run instead\n"
    )
    assert contents(run) == before


def test_the_newest_manifest_is_missing(run: runs.Run, tmp_path: Path) -> None:
    """The one before it is gone on from, and everybody learns of it; what is passed over stays."""
    broken = manifest.folder_of(run.path, 4)
    (broken / manifest.MANIFEST_FILE).unlink()
    before = contents(run)
    # Only as far as step 3, at which nothing is written that was there before.
    done = trained_on(run, tmp_path, steps="3", save_every="-1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "warning: step-00000004 is passed over: manifest.json is missing\n"
    after = contents(run)
    grown = {run.metrics_file, run.path / "checkpoints.jsonl"}
    assert {path: after[path] for path in before if path not in grown} == {
        path: content for path, content in before.items() if path not in grown
    }
    assert all(after[path].startswith(before[path]) for path in grown)
    lines = (run.path / "checkpoints.jsonl").read_text().splitlines()[-2:]
    passed_over, loaded = map(json.loads, lines)
    assert (passed_over["event"], passed_over["step"], passed_over["attempt"], passed_over["reason"]) == (
        "passed_over", 4, 2, "manifest.json is missing",
    )  # fmt: skip
    assert (loaded["event"], loaded["step"], loaded["attempt"]) == ("loaded", 2, 2)
    assert loaded["seconds_reading"] > 0


def test_every_manifest_is_missing(run: runs.Run, tmp_path: Path) -> None:
    for step in (2, 4):
        (manifest.folder_of(run.path, step) / manifest.MANIFEST_FILE).unlink()
    before = contents(run)
    done = trained_on(run, tmp_path)
    assert done.returncode == 2
    *warnings, line = done.stderr.splitlines()
    assert warnings == [
        f"warning: step-0000000{step} is passed over: manifest.json is missing" for step in (4, 2)
    ]
    assert line.startswith(f"error: none of the 2 checkpoints in {run.path / 'checkpoints'} is sound")
    assert line.endswith("restore one, or start another run")
    after = contents(run)
    announced = run.path / "checkpoints.jsonl"
    assert {**after, announced: before[announced]} == before
    assert after[announced].startswith(before[announced])


def test_pruning_reads_what_is_to_stay(run: runs.Run, tmp_path: Path) -> None:
    """With --keep=1 a corrupt checkpoint in place of the only sound one would be all that is left."""
    file = manifest.folder_of(run.path, 4) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = contents(run)
    prune = ["launcher", "checkpoints", run.id, "--prune", "--keep=1", "--yes"]
    done = command(tmp_path, *prune, LAUNCHER_RUNS=str(tmp_path / "runs"))
    assert (done.returncode, done.stdout) == (0, "nothing to delete\n")
    assert done.stderr.startswith("step-00000004 is left alone: __0_0.distcp is corrupt")
    assert contents(run) == before
