"""What a user of a running box relies on, on the box that all tests share."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launcher import box as boxes
from tests.box.support import finish, in_box, lines_of, submit, wait_until


def test_srun_reaches_two_nodes(box: boxes.Box) -> None:
    names = in_box(box, "srun", "-N2", "sh", "-c", "echo $SLURMD_NODENAME").split()
    assert len(set(names)) == 2
    assert set(names) <= set(box.nodes)


def test_a_batch_job_reaches_two_nodes_and_starts_at_once(box: boxes.Box, tmp_path: Path) -> None:
    begun, output = tmp_path / "begun", tmp_path / "out"
    script = f"date +%s.%N > {begun}; srun sh -c 'echo $SLURMD_NODENAME'"
    asked = time.time()
    assert finish(box, submit(box, "-N2", f"--output={output}", "--wrap", script)) == "COMPLETED"
    assert len(set(lines_of(output))) == 2
    assert float(begun.read_text("utf-8")) - asked < 25, "Slurm's own rounds of scheduling come every minute"


def test_a_job_submits_another_job(box: boxes.Box) -> None:
    inner = in_box(box, "srun", "-N1", "sbatch", "--parsable", "--output=/dev/null", "--wrap", "true")
    assert finish(box, inner.strip()) == "COMPLETED"


def test_a_job_without_the_callers_environment_still_finds_slurm(box: boxes.Box) -> None:
    found = in_box(box, "srun", "--export=NONE", "/bin/sh", "-c", "command -v sbatch; squeue -h -o seen")
    assert found.splitlines()[:2] == [str(box.bin_dir / "sbatch"), "seen"]


def test_jobs_do_not_inherit_the_library_path(box: boxes.Box, tmp_path: Path) -> None:
    """Neither a step, which gets the environment of srun, nor a batch script, which a daemon starts."""
    output = tmp_path / "out"
    show = "echo ${LD_LIBRARY_PATH-unset}"
    job = submit(box, f"--output={output}", "--wrap", f"{show}; srun sh -c '{show}'")
    assert finish(box, job) == "COMPLETED"
    assert lines_of(output) == ["unset", "unset"]


def test_two_jobs_run_on_the_same_nodes_at_once(box: boxes.Box, tmp_path: Path) -> None:
    """Each of the two ends well only when it has seen the other."""
    script = "touch {0}/{1}; for _ in $(seq 1200); do [ -e {0}/{2} ] && exit 0; sleep 0.1; done; exit 1"
    jobs = [
        submit(box, "-w", "n1,n2", "--output=/dev/null", "--wrap", script.format(tmp_path, mine, other))
        for mine, other in (("a", "b"), ("b", "a"))
    ]
    assert [finish(box, job) for job in jobs] == ["COMPLETED", "COMPLETED"]


def test_a_requeued_job_comes_back_within_seconds(box: boxes.Box, tmp_path: Path) -> None:
    log = tmp_path / "out"
    requeue = '[ "$SLURM_RESTART_COUNT" ] || scontrol requeue $SLURM_JOB_ID'
    script = f'echo "restart $SLURM_RESTART_COUNT"; {requeue}; sleep 1'
    begun = time.monotonic()
    assert finish(box, submit(box, "--open-mode=append", f"--output={log}", "--wrap", script)) == "COMPLETED"
    assert [line for line in lines_of(log) if line.startswith("restart")] == ["restart ", "restart 1"]
    assert time.monotonic() - begun < 110, "the hold after a requeue is 120 s by default"


def test_a_preempted_job_is_warned_and_requeued(box: boxes.Box, tmp_path: Path) -> None:
    """Its batch script gets the signal that it asked for, which Slurm by default keeps back."""
    log, ready = tmp_path / "out", tmp_path / "ready"
    script = (
        '[ -z "$SLURM_RESTART_COUNT" ] || { echo again; exit 0; };'
        f" trap 'echo warned; warned=1' USR1; touch {ready};"
        ' until [ "$warned" ]; do sleep 0.1; done; scontrol requeue $SLURM_JOB_ID; sleep 30'
    )
    # All CPUs of one node, so that the second job has to push the first one out.
    whole = ["-w", "n4", "--exclusive"]
    options = ["--requeue", "--open-mode=append", "--signal=B:USR1@30", f"--output={log}"]
    low = submit(box, *whole, *options, "--wrap", script)
    try:
        wait_until(ready.exists, "start of the job")
        high = submit(box, "-p", "high", *whole, "--output=/dev/null", "--wrap", "true")
        assert finish(box, high) == "COMPLETED"
        assert finish(box, low) == "COMPLETED"
        assert [line for line in lines_of(log) if line in ("warned", "again")] == ["warned", "again"]
    finally:
        in_box(box, "scancel", low)


def test_a_finished_job_is_remembered_for_an_hour(box: boxes.Box) -> None:
    job = submit(box, "--output=/dev/null", "--wrap", "true")
    assert finish(box, job) == "COMPLETED"
    shown = [line.split() for line in in_box(box, "scontrol", "show", "config").splitlines()]
    assert ["MinJobAge", "=", "3600", "sec"] in shown


def test_a_box_without_accounting_says_so(box: boxes.Box) -> None:
    with pytest.raises(AssertionError, match="accounting storage is disabled"):
        in_box(box, "sacct")


def test_status_tells_people_and_programs_the_same(
    box: boxes.Box, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.__main__ import main

    assert main(["box", "status", "--name", box.name, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["state"] == "up"
    assert list(told["nodes"]) == list(box.nodes)
    assert main(["box", "status", "--name", box.name]) == 0
    assert f"{box.name}: up, 4 nodes" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "code"), [("srun -N2 true", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_a_command_in_the_box_passes_its_exit_status_on(box: boxes.Box, command: str, code: int) -> None:
    from launcher.__main__ import main

    assert main(["box", "shell", "--name", box.name, "--", "sh", "-c", command]) == code


def test_a_job_of_another_cluster_does_not_confuse_the_shell(
    box: boxes.Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`box up; box shell` inside an allocation of a real cluster: srun would look for that job here."""
    from launcher.__main__ import main

    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_NNODES", "64")
    assert main(["box", "shell", "--name", box.name, "--", "srun", "-N1", "true"]) == 0
