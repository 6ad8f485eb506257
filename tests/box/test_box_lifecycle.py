"""Boxes from up to down, each test with its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from launcher import box as boxes
from launcher.box import config, lifecycle, packages, paths, startup
from launcher.spec import UserError
from tests.box.support import brought_up, finish, in_box, lines_of, marked, submit, unique, wait_until

NOBODY = 65534


@pytest.fixture(scope="module", autouse=True)
def _a_box_can_run_here(box: boxes.Box) -> None:
    """Skip, or fail where CI is set, as the shared box does."""


def test_up_twice_is_up_once(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with brought_up(unique("twice"), nodes=2) as first:
        controller = (first.state_dir / "run/slurmctld.pid").read_text("utf-8")
        assert boxes.up(nodes=2, name=first.name, gpus=0, say=said.append) == first
        assert said == [f"box {first.name!r} is up already"]
        assert (first.state_dir / "run/slurmctld.pid").read_text("utf-8") == controller
        with pytest.raises(UserError, match=r"runs with 2 nodes, .* not 3 nodes"):
            boxes.up(nodes=3, name=first.name, gpus=0)


def test_down_leaves_no_process_and_no_file() -> None:
    with brought_up(unique("down"), nodes=2) as box:
        # One child of the batch script forgets its environment and leads a session of its own.
        seconds = str(10_000_000 + os.getpid())  # tells these apart from other sessions' processes
        script = f"srun sleep {seconds} & env -i setsid sleep {seconds} & wait"
        submit(box, "-N2", "--output=/dev/null", "--wrap", script)
        in_box(box, "srun", "-w", "n1,n2", "true")
        wait_until(lambda: len(marked(f"sleep\n{seconds}")) >= 3, "the job's processes")
        assert boxes.down(box.name)
        assert marked(str(box.state_dir)) == []
        assert marked(f"sleep\n{seconds}") == []
        assert not box.state_dir.exists()
        assert not boxes.down(box.name), "the second time there is nothing to do"
        assert boxes.find(box.name) is None


def test_a_shell_that_uses_the_box_survives_its_end() -> None:
    with brought_up(unique("shell"), nodes=1) as box:
        shell = subprocess.Popen(["sleep", "60"], env={**os.environ, **boxes.environment(box)})
        try:
            boxes.down(box.name)
            assert shell.poll() is None
        finally:
            shell.kill()
            shell.wait()


def test_a_job_does_not_end_its_own_box(tmp_path: Path) -> None:
    with brought_up(unique("inside"), nodes=1) as box:
        command = [sys.executable, "-m", "launcher", "box", "down", "--name", box.name]
        output = in_box(
            box, "srun", "sh", "-c", f"{shlex.join(command)} 2>&1; true", PYTHONPATH=_import_path()[0]
        )
        assert "this is a job of box" in output
        assert boxes.find(box.name)


def test_what_a_dead_box_left_is_cleared_away() -> None:
    with brought_up(unique("dead"), nodes=1) as box:
        for process in psutil.process_iter():
            if str(box.slurm_conf) in _environment_of(process).values():
                process.kill()
        wait_until(lambda: boxes.find(box.name) is None, "the controller's end")
        assert boxes.status(box.name).state == "broken"
        again = boxes.up(nodes=1, name=box.name, gpus=0)
        assert in_box(again, "srun", "echo", "alive") == "alive\n"


def test_a_box_that_does_not_answer_keeps_its_jobs() -> None:
    with brought_up(unique("mute"), nodes=1) as box:
        psutil.Process(int((box.state_dir / "run/slurmctld.pid").read_text("utf-8"))).kill()
        wait_until(lambda: boxes.find(box.name) is None, "the controller's end")
        with pytest.raises(boxes.BoxUnavailable, match="runs but does not answer"):
            boxes.up(nodes=1, name=box.name, gpus=0)


def test_boxes_that_start_together_do_not_meet() -> None:
    names = [unique("left"), unique("right")]
    found: dict[str, str] = {}

    def use(name: str) -> None:
        box = boxes.up(nodes=2, name=name, gpus=0)
        found[name] = in_box(box, "srun", "-N2", "sh", "-c", "echo $BOX_JOB")

    threads = [threading.Thread(target=use, args=(name,)) for name in [*names, *names]]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {name: f"{paths.state_dir(name)}/slurm.conf\n" * 2 for name in names}
    finally:
        for name in names:
            boxes.down(name)


def test_a_port_that_somebody_took_meanwhile_costs_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    with brought_up(unique("first"), nodes=1) as first:
        taken = int(_setting(first, "SlurmctldPort"))
        chosen = iter([[taken, 0, taken], startup._free_ports(3)])
        monkeypatch.setattr(startup, "_free_ports", lambda count: next(chosen))
        with brought_up(unique("second"), nodes=1) as second:
            assert _setting(second, "SlurmctldPort") != str(taken)
            assert in_box(second, "srun", "echo", "alive") == "alive\n"


def test_a_start_that_fails_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = unique("broken")
    write = startup.write

    def write_nonsense(layout: config.Layout, unpacked: packages.Packages) -> None:
        write(layout, unpacked)
        with layout.slurm_conf.open("a", encoding="utf-8") as conf:
            conf.write("SelectType=select/nonsense\n")

    monkeypatch.setattr(startup, "write", write_nonsense)
    with pytest.raises(boxes.BoxUnavailable, match=r"did not start: .*nonsense"):
        boxes.up(nodes=1, name=name, gpus=0)
    assert not paths.state_dir(name).exists()
    assert marked(str(paths.state_dir(name))) == []


def test_thirty_two_nodes_run_one_job() -> None:
    with brought_up(unique("large"), nodes=32) as box:
        names = in_box(box, "srun", "-N32", "sh", "-c", "echo $SLURMD_NODENAME").split()
        assert sorted(names) == sorted(box.nodes)


def test_nodes_share_the_machines_gpus_out(tmp_path: Path) -> None:
    devices = [tmp_path / f"nvidia{index}" for index in range(4)]
    for device in devices:
        device.symlink_to("/dev/null")
    output = tmp_path / "out"
    show = 'echo "$1 $SLURMD_NODENAME.$SLURM_LOCALID $CUDA_VISIBLE_DEVICES"'
    script = tmp_path / "job.sh"
    script.write_text(
        f'#!/bin/sh\nshow=\'{show}\'\nsh -c "$show" - batch\nsrun sh -c "$show" - step\n', "utf-8"
    )
    with brought_up(unique("gpus"), nodes=2, gpus=None, gpu_device_files=devices) as box:
        wanted = ["-N2", "--ntasks-per-node=2", "--gpus-per-task=1", f"--output={output}"]
        finish(box, submit(box, *wanted, str(script), CUDA_VISIBLE_DEVICES="0"))
        assert sorted(lines_of(output)) == [
            "batch n1.0 0,1",
            "step n1.0 0",
            "step n1.1 1",
            "step n2.0 2",
            "step n2.1 3",
        ]
        assert in_box(box, "srun", "sh", "-c", "echo GPUs: $CUDA_VISIBLE_DEVICES") == "GPUs:\n"


def test_with_accounting_sacct_knows_finished_jobs() -> None:
    with brought_up(unique("sacct"), nodes=1, accounting=True) as box:
        job = submit(box, "--output=/dev/null", "--wrap", "exit 3")
        assert finish(box, job) == "FAILED"
        wait_until(
            lambda: "FAILED|3:0" in in_box(box, "sacct", "-nPXj", job, "-o", "State,ExitCode"), "sacct"
        )
        boxes.down(box.name)
        assert marked(str(box.state_dir)) == []


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as an ordinary user already")
def test_an_ordinary_user_needs_no_rights(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One without a home folder too: `nobody`, with a cache folder of its own and no other permission."""
    interpreter = _interpreter_for_all()
    cache = Path("/tmp") / unique("nobody")
    name = unique("user")
    program = (
        "import subprocess, sys; from launcher import box as b;"
        f" x = b.up(nodes=2, name={name!r}, gpus=0);"
        " run = lambda *w: subprocess.run(w, env=b.environment(x), cwd='/tmp', check=True);"
        " run('srun', '-N2', 'id', '-un'); run('sbatch', '--wait', '-o', '/dev/null', '--wrap', 'srun true');"
        f" assert b.down({name!r})"
    )
    try:
        shutil.copytree(packages.fetch().root, cache / "slurm" / packages.fetch().root.name, symlinks=True)
        for path in (cache, *cache.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        result = subprocess.run(
            [
                "setpriv",
                f"--reuid={NOBODY}",
                f"--regid={NOBODY}",
                "--clear-groups",
                interpreter,
                "-c",
                program,
            ],
            env={
                "PATH": "/usr/bin:/bin",
                "CACHE_DIR": str(cache),
                "PYTHONPATH": os.pathsep.join(_import_path()),
            },
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[:2] == ["nobody", "nobody"]
        assert marked(str(cache)) == []
    finally:
        shutil.rmtree(cache)


def _interpreter_for_all() -> str:
    """A Python that `nobody` may run: this one may lie in root's home folder."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [
            "setpriv",
            f"--reuid={NOBODY}",
            f"--regid={NOBODY}",
            "--clear-groups",
            python,
            "-c",
            _SUPPORTED,
        ]
        if subprocess.run(command, capture_output=True, cwd="/", check=False).returncode == 0:
            return python
    pytest.skip("no Python 3.11 that other users may run")


_SUPPORTED = "import sys; sys.exit(sys.version_info < (3, 11))"


def _import_path() -> list[str]:
    return [
        str(Path(lifecycle.__file__).parents[2]),
        *(entry for entry in sys.path if entry.endswith("-packages")),
    ]


def _setting(box: boxes.Box, key: str) -> str:
    return next(line.split("=", 1)[1] for line in lines_of(box.slurm_conf) if line.startswith(f"{key}="))


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}
