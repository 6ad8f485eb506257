"""The command lines that start tasks, and processes of this machine that end together."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest

from launcher.allocation import Allocation, fit, slurm_allocation
from launcher.config import compose
from launcher.spec import Container, JobSpec, UserError
from launcher.steps import Launch, LocalStep, srun_command, task_command

ALLOCATION = Allocation("12", "hopper", ("n1", "n2"), 8, 8, 8)


def launch(spec: JobSpec | None = None, *, tmp: Path = Path("/runs/a b 100%"), **changes: object) -> Launch:
    spec = spec or compose(["recipe=ch4_fsdp", "cluster=slurm", "cpus_per_task=8"])
    spec = dataclasses.replace(fit(spec, ALLOCATION), **changes)  # type: ignore[arg-type]
    environment = {"RUN_DIR": str(tmp), "NCCL_SOCKET_IFNAME": "eth0"}
    return Launch(
        spec, ALLOCATION, Path("/re po"), tmp, tmp / "attempt-01", "10.0.0.1", "/venv/bin/python", environment
    )


def test_one_task_per_rank_with_every_size_on_the_command_line() -> None:
    command = srun_command(launch())
    for flag in (
        "--nodes=2",
        "--ntasks=16",
        "--ntasks-per-node=8",
        "--cpus-per-task=8",
        "--kill-on-bad-exit=1",
    ):
        assert flag in command
    assert "--output=/runs/a b 100%%/attempt-01/rank-%t.log" in command
    start = command.index("/venv/bin/python")
    assert command[start + 1 : start + 4] == ["-m", "launcher.task", "rank"]
    assert command[command.index("--") + 1] == "recipes.ch4.fsdp"


def test_srun_options_are_key_equals_value() -> None:
    command = srun_command(launch())
    options = command[1 : command.index("/venv/bin/python")]
    assert all(option.startswith("--") and "=" in option for option in options), options


def test_torchrun_is_one_task_per_node_with_all_of_its_cpus() -> None:
    command = srun_command(launch(launch="torchrun"))
    for flag in ("--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64", "--workers=8"):
        assert flag in command


def test_pyxis_names_our_variables_so_that_the_image_does_not_win() -> None:
    command = srun_command(launch(container=Container("pyxis", "image.sqsh", ("/data:/data",))))
    assert "--container-image=image.sqsh" in command
    assert "--container-env=NCCL_SOCKET_IFNAME,RUN_DIR" in command
    assert "--container-mounts=/re po:/re po,/runs/a b 100%:/runs/a b 100%,/data:/data" in command
    assert "python3" in command
    assert "/venv/bin/python" not in command


def test_apptainer_wraps_the_task() -> None:
    command = task_command(launch(container=Container("apptainer", "image.sif")), mounts=[Path("/re po")])
    assert command[:4] == ["apptainer", "exec", "--nv", "--bind=/re po:/re po"]
    assert "--env=NCCL_SOCKET_IFNAME=eth0" in command
    assert command[command.index("image.sif") + 1] == "python3"


BATCH = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CLUSTER_NAME": "hopper",
    "SLURM_RESTART_COUNT": "1",
}


def test_the_allocation_is_what_slurm_gave() -> None:
    assert slurm_allocation(BATCH) == Allocation("12", "hopper", ("n1", "n2"), 4, 3, 8, 1)


def test_unequal_nodes_are_refused_with_the_flags_that_help() -> None:
    with pytest.raises(UserError, match=r"unequal tasks \(4,3\).*--ntasks-per-node"):
        slurm_allocation({**BATCH, "SLURM_TASKS_PER_NODE": "4,3"})


def test_outside_a_job_the_controller_says_how_to_start() -> None:
    with pytest.raises(UserError, match="python -m launcher submit"):
        slurm_allocation({})


def test_more_tasks_than_gpus_on_a_node_is_refused() -> None:
    spec = compose(["recipe=ch4_fsdp", "cluster=slurm"])
    with pytest.raises(UserError, match="--gpus-per-node=8"):
        fit(spec, dataclasses.replace(ALLOCATION, gpus_per_node=4))


def local(tmp_path: Path, code: str, tasks: int = 2) -> LocalStep:
    """A step whose tasks run `code` in place of the task wrapper."""
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").touch()
    (tmp_path / "launcher" / "task.py").write_text(
        "import os, signal, sys, time\nrank = int(os.environ['SUBMITIT_LOCAL_GLOBALID'])\n" + code
    )
    attempt = tmp_path / "attempt-01"
    attempt.mkdir()
    spec = compose(["recipe=ch4_fsdp", "cluster=local", f"tasks_per_node={tasks}"])
    allocation = Allocation("", "", ("localhost",), tasks, 1, 0)
    environment = {"PYTHONPATH": str(tmp_path)}
    made = Launch(spec, allocation, tmp_path, tmp_path, attempt, "127.0.0.1", sys.executable, environment)
    return LocalStep(made, dict(os.environ))


def wait(step: LocalStep, seconds: float = 45.0) -> int:
    end = time.monotonic() + seconds
    while (code := step.poll()) is None:
        assert time.monotonic() < end, "the step does not end"
        time.sleep(0.05)
    return code


def test_a_failing_task_ends_the_others(tmp_path: Path) -> None:
    step = local(tmp_path, "sys.exit(7) if rank == 1 else time.sleep(60)")
    assert wait(step) == 7
    assert next((exit_.tasks, exit_.exit_code) for exit_ in step.task_exits()) == ((1,), 7)


def test_a_killed_task_is_reported_by_its_signal(tmp_path: Path) -> None:
    step = local(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)")
    assert wait(step) == 137
    assert step.task_exits()[0].signal == "Killed"


def test_terminate_reaches_the_tasks_children(tmp_path: Path) -> None:
    marker = tmp_path / "child"
    step = local(
        tmp_path,
        "import subprocess\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(marker)!r}, 'w').write(str(child.pid)); time.sleep(60)",
        tasks=1,
    )
    while not marker.exists() or not marker.read_text():
        time.sleep(0.05)
    step.ask_to_stop()
    assert wait(step) == 143
    end = time.monotonic() + 45
    while (
        Path(f"/proc/{marker.read_text()}/cmdline").exists()
        and Path(f"/proc/{marker.read_text()}/cmdline").read_text()
    ):
        assert time.monotonic() < end, "the child outlived the step"
        time.sleep(0.05)
