"""What the cluster does to a job, a training run survives: nothing announced is lost, and every loss is as undisturbed.

Each fault is real, and strikes a recipe that `sbatch` of its rendered file started, between the first save and the last
step. `conformance.check` fails for a run that nothing struck.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher import ownership
from launcher.paths import REPOSITORY
from tests.box_runs.conformance import (
    OTHER_ORDER,
    SAVE_EVERY,
    Started,
    check,
    frozen,
    in_a_save,
    in_a_step,
    logs_of,
    start,
    stop,
)
from tests.box_runs.support import WAIT_SECONDS, Launcher, ended, wait_until

Losses = dict[int, float]
DAMAGES = ("truncated", "flipped", "no manifest")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "job"


def test_the_time_limit(launcher: Launcher, folder: Path, undisturbed: Losses) -> None:
    # Two minutes: after one a slow machine has hardly begun, and the warning comes well before the end.
    started = start(launcher, folder, flags=["--time=2"])
    with frozen(started, in_a_step(started)):
        wait_until(lambda: (started.run.path / "attempt-01" / "stop.json").exists(), "the warning")
    first = ended(started.run)
    # So that the second attempt is the last one, however slow this machine is today.
    launcher.slurm("scontrol", "update", f"jobid={first['job_id']}", "timelimit=10")
    started.goes_on()
    check(started, undisturbed, ["time_limit", "done"])
    assert first["action"] == "requeued"
    assert first["saved_out"] == first["step_out"], "there was time, and the last step was not saved"
    assert started.job()["Restarts"] == "1"


# Under torchrun at one moment: what its agent adds, the request's way in and the exit status's way out, knows no saves.
@pytest.mark.parametrize(
    ("moment", "launch"), [(in_a_step, "srun"), (in_a_save, "srun"), (in_a_save, "torchrun")]
)
def test_a_requeue(
    launcher: Launcher,
    folder: Path,
    undisturbed: Losses,
    moment: Callable[[Started], Callable[[], bool]],
    launch: str,
) -> None:
    started = start(launcher, folder, f"launch={launch}")
    with frozen(started, moment(started)):
        launcher.slurm("scontrol", "requeue", started.run.jobs()[0]["job_id"])
    started.goes_on()
    first, _ = check(started, undisturbed, ["requeued", "done"])
    assert first["saved_out"] == first["step_out"]
    assert started.job()["Restarts"] == "1"


@pytest.mark.parametrize("moment", [in_a_step, in_a_save])
def test_the_kill_of_one_rank(
    launcher: Launcher, folder: Path, undisturbed: Losses, moment: Callable[[Started], Callable[[], bool]]
) -> None:
    started = start(launcher, folder)
    with frozen(started, moment(started)) as ranks:
        saved = started.saved()
        os.kill(ranks[1], signal.SIGKILL)
    first, second = check(started, undisturbed, ["killed", "done"])
    assert (first["rank"], first["action"]) == (1, "restarted")
    assert first["saved_out"] == second["saved_in"] == saved, "a save that no rank finished counts"
    assert second["job_id"] == first["job_id"]
    assert started.job()["Restarts"] == "0"


def test_the_kill_of_the_controller(launcher: Launcher, folder: Path, undisturbed: Losses) -> None:
    started = start(launcher, folder)
    with frozen(started, in_a_step(started)):
        os.kill(started.run.state()["pid"], signal.SIGKILL)
        wait_until(lambda: started.job()["Restarts"] == "1", "the requeue by the shell")
    started.goes_on()
    first, _ = check(started, undisturbed, ["controller_lost", "done"])
    assert first["action"] == "requeued"


def test_a_rank_that_hangs(launcher: Launcher, folder: Path, undisturbed: Losses) -> None:
    started = start(launcher, folder, "env.HANG_SECONDS=6")
    with frozen(started, in_a_step(started)) as ranks:
        os.kill(ranks[0], signal.SIGCONT)
        first = ended(started.run)
    check(started, undisturbed, ["hang", "done"])
    assert (first["rank"], first["action"]) == (1, "restarted")
    assert ": rank 1 on " in first["reason"]
    assert "gave no stack while the others wait in" in first["reason"], "a stopped process writes nothing"


def test_damaged_checkpoints(launcher: Launcher, folder: Path, undisturbed: Losses) -> None:
    """The newest three, each in its own way; one that nobody noticed would be where the run goes on."""
    started = start(launcher, folder, f"args.keep={len(DAMAGES) + 2}")
    with frozen(started, in_a_step(started, step=3 * SAVE_EVERY + 4)):
        launcher.slurm("scontrol", "requeue", started.run.jobs()[0]["job_id"])
    newest = ended(started.run)["saved_out"]
    checkpoints = sorted(
        path for path in (started.run.path / "checkpoints").iterdir() if path.suffix != ".tmp"
    )
    sound, *damaged = checkpoints[-len(DAMAGES) - 1 :]
    assert damaged[-1].name == f"step-{newest:08d}"
    for checkpoint, damage in zip(damaged, DAMAGES, strict=True):
        hurt(checkpoint, damage)
    started.goes_on()
    before = int(sound.name.removeprefix("step-"))
    _, second = check(started, undisturbed, ["requeued", "done"], starts=[before])
    report = launcher("report", started.run.id).stdout
    said = (started.run.path / "attempt-02" / "rank-0.log").read_text()
    for checkpoint in damaged:
        assert any(line.startswith(f"{checkpoint.name} was passed over: ") for line in second["evidence"])
        assert f"attempt 2 passed over {checkpoint.name}: " in report
        assert f"warning: {checkpoint.name}" in said, said


def hurt(checkpoint: Path, damage: str) -> None:
    file = checkpoint / "__1_0.distcp"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "no manifest":
        (checkpoint / "manifest.json").unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own: what is written beyond its size fails as on any full disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_at_save(launcher: Launcher, folder: Path, undisturbed: Losses, small_disk: Path) -> None:
    root = small_disk / "runs"
    environment = {**launcher.environment, "LAUNCHER_RUNS": str(root)}
    started = start(dataclasses.replace(launcher, environment=environment, run_root=root), folder)
    with frozen(started, in_a_save(started)):
        fill(small_disk / "filler", leave=1 << 20)
    with frozen(
        started, lambda: [e["event"] for e in started.events()][-1] in ("failed", "skipped")
    ) as ranks:
        failed = started.events()[-1]
        saved = started.saved()
        (small_disk / "filler").unlink()
        os.kill(ranks[1], signal.SIGKILL)
    first, second = check(started, undisturbed, ["killed", "done"])
    assert "No space left on device" in failed["reason"]
    assert failed["step"] > saved == first["saved_out"] == second["saved_in"]


def fill(file: Path, leave: int) -> None:
    """Write until only so many bytes are free."""
    with file.open("wb") as filler:
        while (free := os.statvfs(file).f_bavail * os.statvfs(file).f_frsize) > leave:
            filler.write(bytes(min(free - leave, 1 << 20)))
            filler.flush()


def test_two_launchers_that_resume_one_run_at_once(
    launcher: Launcher, folder: Path, undisturbed: Losses
) -> None:
    started = start(launcher, folder)
    stop(started)
    command = [sys.executable, "-m", "launcher", "resume", started.run.id]
    both = [
        subprocess.Popen(
            command, env=launcher.environment, cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=WAIT_SECONDS)[0] for process in both]
    assert 0 in [process.returncode for process in both], said
    check(started, undisturbed, ["cancelled", "done"])
    logs = [log.read_text() for log in logs_of(started.run)[1:]]
    assert sum(f"run {started.run.id} attempt 2:" in text for text in logs) == 1
    others = [text for text in [*logs, *said] if "it first, or wait for it" in text]
    assert len(others) == 1, "the second one was not told why it may not"
    assert ownership.read(started.run.path) is None


def test_four_nodes_then_two_then_three(launcher: Launcher, folder: Path, undisturbed: Losses) -> None:
    started = start(launcher, folder, nodes=4)
    stop(started, 1)
    launcher("resume", started.run.id, "nodes=2")
    stop(started, 2)
    launcher("resume", started.run.id, "nodes=3")
    records = check(started, undisturbed, ["cancelled", "cancelled", "done"], tolerance=OTHER_ORDER)
    assert [len(record["nodes"]) for record in records] == [4, 2, 3]


def test_ddp_goes_on_as_fsdp(launcher: Launcher, folder: Path, undisturbed: Losses) -> None:
    started = start(launcher, folder, recipe="ch3_ddp")
    stop(started)
    launcher("resume", started.run.id, "recipe=ch4_fsdp")
    check(started, undisturbed, ["cancelled", "done"], tolerance=OTHER_ORDER)
    assert started.run.spec().recipe == "ch4_fsdp"


def test_a_change_keeps_those_before_it(launcher: Launcher, folder: Path) -> None:
    started = start(launcher, folder, nodes=1)  # the recipes themselves ask for two
    stop(started)
    launcher("resume", started.run.id, "recipe=ch4_fsdp", "args.keep=2")
    stop(started, 2)
    launcher("resume", started.run.id, "args.keep=1")
    assert ended(started.run, 3)["cause"] == "done"
    spec = started.run.spec()
    assert (spec.recipe, spec.nodes, spec.args["keep"]) == ("ch4_fsdp", 1, 1)
    assert len(list((started.run.path / "checkpoints").glob("step-*"))) == 1
