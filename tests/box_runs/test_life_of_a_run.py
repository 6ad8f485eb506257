"""What happens to runs on a real Slurm: side by side, inside each other, cancelled, failed, requeued, resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import box, runs
from launcher.paths import REPOSITORY
from tests.box_runs.support import FAST, Launcher, ended, losses, submit_entrypoint, wait_until


def seen(run: runs.Run) -> list[dict[str, str]]:
    found = [json.loads(path.read_text()) for path in run.path.glob("seen-*.json")]
    return sorted(found, key=lambda item: int(item["RANK"]))


@pytest.mark.parametrize("launch", ["srun", "torchrun"])
def test_ranks_follow_nodes_and_all_find_the_first_one(launcher: Launcher, launch: str) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=2", f"launch={launch}", mode="torch")
    assert ended(run)["state"] == "done"
    ranks = seen(run)
    assert [(item["RANK"], item["LOCAL_RANK"], item["NODE_RANK"]) for item in ranks] == [
        ("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1"),
    ]  # fmt: skip
    assert [item["node"] for item in ranks[::2]] == run.attempts()[0]["nodes"]
    assert {item["MASTER_ADDR"] for item in ranks} != {"localhost"}
    assert len({(item["MASTER_ADDR"], item["MASTER_PORT"]) for item in ranks}) == 1
    assert {(item["RUN_DIR"], item["ATTEMPT"]) for item in ranks} == {(str(run.path), "1")}
    assert "sum 4" in (run.path / "attempt-01" / "rank-3.log").read_text()


def test_two_runs_on_the_same_nodes_at_once_do_not_meet(launcher: Launcher) -> None:
    both = [submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", mode="torch") for _ in range(2)]
    records = [ended(run) for run in both]
    assert [record["state"] for record in records] == ["done", "done"]
    assert records[0]["nodes"] == records[1]["nodes"], "the runs were not on the same nodes"
    started, over = max(r["tasks_started"] for r in records), min(r["ended"] for r in records)
    assert started < over, "the runs were one after the other"
    assert len({seen(run)[0]["MASTER_PORT"] for run in both}) == 2
    assert [(run.path / "attempt-01" / "rank-0.log").read_text().strip()[-5:] for run in both] == [
        "sum 2"
    ] * 2


def test_a_run_submitted_from_inside_a_job_inherits_nothing_of_it(launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "outer.sh"
    words = ["recipe=ch3_ddp", "cluster=box", "nodes=2", "tasks_per_node=1", *FAST]
    command = " ".join([f"'{sys.executable}'", "-m launcher submit --wait", *words])
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=1 --ntasks=2 --cpus-per-task=2\n"
        f"export SLURM_CPU_BIND=quiet,mask_cpu:0x1 RANK=5 MASTER_PORT=1\ncd '{REPOSITORY}'\n{command}\n"
    )
    log = tmp_path / "outer.log"
    launcher.slurm("sbatch", f"--output={log}", str(script))
    wait_until(lambda: log.exists() and "run directory" in log.read_text(), f"the outer job: {log}")
    record = ended(launcher.only_run())
    assert (record["state"], record["world_size"], len(record["nodes"])) == ("done", 2, 2)


@pytest.mark.parametrize("launch", ["srun", "torchrun"])
def test_the_traceback_of_the_rank_that_raised_is_shown(launcher: Launcher, launch: str) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=2", f"launch={launch}", mode="raise", rank=2)
    record = ended(run)
    assert (record["state"], record["rank"]) == ("failed", 2)
    node = record["nodes"][1]
    assert record["reason"] == f"rank 2 on {node}: ArithmeticError: the loss is"
    shown = launcher("status", run.id).stdout
    assert f"rank 2 on {node} failed first:" in shown
    assert 'raise ArithmeticError("the loss is\\nnot a number")' in shown
    assert "runpy" not in shown
    assert json.loads(launcher("status", run.id, "--json").stdout)["state"] == "failed"


def test_a_mistake_that_a_recipe_has_named_in_one_line_is_one_line(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", mode="refuse", rank=1)
    node = ended(run)["nodes"][1]
    shown = launcher("status", run.id).stdout
    assert f"rank 1 on {node}: ValueError: a mistake of a person" in shown
    assert "Traceback" not in shown
    assert "failed first" not in shown


def test_a_rank_that_is_killed_is_named_and_its_log_shown(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", mode="kill", rank=1)
    record = ended(run)
    assert (record["state"], record["rank"]) == ("failed", 1)
    assert re.fullmatch(r"rank 1 on n\d+: Killed \(SIGKILL\)", record["reason"]), record


def test_an_exit_status_is_named(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=1", "tasks_per_node=2", mode="exit", rank=1)
    assert re.fullmatch(r"rank 1 on n\d+: SystemExit: 7", ended(run)["reason"])


@pytest.fixture
def sleeping(launcher: Launcher) -> Iterator[runs.Run]:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", mode="sleep", seconds=100)
    wait_until(lambda: len(seen(run)) == 2, "both ranks")
    yield run
    launcher.slurm("scancel", run.jobs()[-1]["job_id"])


def test_launcher_cancel_ends_the_job_and_says_so(launcher: Launcher, sleeping: runs.Run) -> None:
    assert json.loads(launcher("status", sleeping.id, "--json").stdout)["state"] == "running"
    launcher("cancel", sleeping.id)
    assert ended(sleeping)["state"] == "cancelled"
    assert "cancelled: the job was cancelled" in launcher("status", sleeping.id).stdout
    assert "already cancelled" in launcher("cancel", sleeping.id).stdout


def test_scancel_by_hand_is_the_same(launcher: Launcher, sleeping: runs.Run) -> None:
    launcher.slurm("scancel", sleeping.jobs()[-1]["job_id"])
    record = ended(sleeping)
    assert (record["state"], record["reason"]) == ("cancelled", "the job was cancelled")


def test_a_job_cancelled_while_it_waits_never_started(launcher: Launcher) -> None:
    words = ["recipe=ch3_ddp", "cluster=box", "nodes=2", "sbatch.begin=now+1hour", *FAST]
    run = launcher.run_of(launcher("submit", "--json", *words))
    assert json.loads(launcher("status", "--json").stdout)["state"] == "pending"
    launcher("cancel")
    state = wait_until(
        lambda: (found := json.loads(launcher("status", "--json").stdout))["state"] == "cancelled" and found,
        "the end",
    )
    assert state["attempts"] == 0
    assert run.attempts() == []


def test_the_time_limit_is_named(launcher: Launcher) -> None:
    """Slurm's limit is in minutes; an administrator shortens a running job's by seconds with scontrol."""
    run = submit_entrypoint(launcher, "nodes=1", "tasks_per_node=1", "time=1", mode="sleep", seconds=200)
    record = ended(run)
    launcher.slurm("scancel", run.jobs()[-1]["job_id"])
    assert (record["state"], record["reason"]) == ("timeout", "the time limit was reached")
    assert record["action"] == "requeued"


def test_a_requeued_job_goes_on_in_the_same_run_with_logs_kept(
    launcher: Launcher, sleeping: runs.Run
) -> None:
    job = sleeping.jobs()[-1]["job_id"]
    launcher.slurm("scontrol", "requeue", job)
    assert ended(sleeping)["state"] == "requeued"
    assert json.loads(launcher("status", sleeping.id, "--json").stdout)["state"] in (
        "pending",
        "starting",
        "running",
    )
    wait_until(lambda: [item["ATTEMPT"] for item in seen(sleeping)] == ["2", "2"], "the second attempt")
    launcher("cancel", sleeping.id)
    assert [ended(sleeping, n)["state"] for n in (1, 2)] == ["requeued", "cancelled"]
    assert len(runs.all_runs([launcher.run_root])) == 1
    log = (sleeping.submitit_folder / f"{job}_0_log.out").read_text()
    assert "attempt 1:" in log
    assert "attempt 2:" in log


def test_a_requeued_sbatch_job_finds_its_own_run(launcher: Launcher, tmp_path: Path) -> None:
    file = tmp_path / "ch3_ddp.sbatch"
    file.write_text(
        launcher("render", "recipe=ch3_ddp", "cluster=box", "tasks_per_node=1", "args.steps=100000").stdout
    )
    said = launcher.slurm("sbatch", "--parsable", f"--output={tmp_path}/log", str(file))
    wait_until(lambda: runs.all_runs([launcher.run_root]), "the run")
    run = launcher.only_run()
    wait_until(lambda: losses(run), "the first step")
    launcher.slurm("scontrol", "requeue", said.strip())
    assert ended(run)["state"] == "requeued"
    wait_until(lambda: len(run.attempt_dirs()) == 2, "the second attempt")
    launcher.slurm("scancel", said.strip())
    ended(run, 2)
    assert launcher.only_run() == run


def test_resume_continues_from_the_checkpoint_with_other_nodes(launcher: Launcher) -> None:
    words = ["recipe=ch4_fsdp", "cluster=box", "nodes=2", "tasks_per_node=1", *FAST]
    launcher("submit", *words, "--wait")
    run = launcher.only_run()
    launcher("resume", run.id, "nodes=1", "args.steps=4", "--wait")
    assert launcher.only_run() == run
    first, second = run.attempts()
    assert (first["step_out"], second["step_in"], second["step_out"]) == (2, 2, 4)
    assert (len(first["nodes"]), len(second["nodes"])) == (2, 1)
    assert len(losses(run)) == 4, "a step was repeated or lost"


def test_a_run_that_goes_on_cannot_be_resumed(launcher: Launcher, sleeping: runs.Run) -> None:
    refused = launcher("resume", sleeping.id, status=2)
    assert refused.stderr.startswith(f"error: run {sleeping.id} is running (job ")


def test_logs_show_controller_and_ranks(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", mode="torch")
    ended(run)
    both = launcher("logs", run.id).stdout
    assert f"run {run.id} attempt 1" in both
    assert "==> attempt-01/rank-0.log <==" in both
    assert launcher("logs", run.id, "--rank=1").stdout == (run.path / "attempt-01" / "rank-1.log").read_text()
    followed = launcher("logs", "-f", run.id).stdout
    assert "done: all ranks finished" in followed
    wrong = launcher("logs", run.id, "--rank=9", status=2).stderr
    assert wrong == f"error: --rank=9: run {run.id} has logs of ranks 0 to 1\n"


def test_a_sweep_is_one_run_each(launcher: Launcher) -> None:
    words = ["recipe=ch3_ddp", "cluster=box", "nodes=1", "tasks_per_node=1", *FAST, "args.lr=1e-4,3e-4"]
    answered = [json.loads(line) for line in launcher("submit", "--json", *words).stdout.splitlines()]
    assert len(answered) == 2
    found = [runs.find([launcher.run_root], each["run"]) for each in answered]
    assert [ended(run)["state"] for run in found] == ["done", "done"]
    assert [run.spec().args["lr"] for run in found] == [1e-4, 3e-4]


def test_what_sbatch_refuses_is_one_line_and_leaves_no_run(launcher: Launcher) -> None:
    refused = launcher("submit", "recipe=ch3_ddp", "cluster=box", "partition=nowhere", status=2)
    assert refused.stderr == ("error: sbatch refused the job: invalid partition specified: nowhere\n")
    assert runs.all_runs([launcher.run_root]) == []


def test_a_mistake_in_the_words_of_sbatch_is_found_before_any_task(
    launcher: Launcher, tmp_path: Path
) -> None:
    file = tmp_path / "ch3_ddp.sbatch"
    file.write_text(launcher("render", "recipe=ch3_ddp", "cluster=box", "nodes=1").stdout)
    log = tmp_path / "log"
    for word, message in [
        ("args.stepz=4", "launcher: args.stepz: ch3_ddp has no such argument; did you mean args.steps?"),
        (
            "nodes=3",
            "launcher: nodes=3: the job already has nodes=1; use sbatch --nodes=3 jobs/ch3_ddp.sbatch",
        ),
        (
            "recipe=ch4_fsdp",
            "launcher: recipe=ch4_fsdp: this job file is for recipe=ch3_ddp; use sbatch jobs/ch4_fsdp.sbatch",
        ),
    ]:
        log.unlink(missing_ok=True)
        launcher.slurm("sbatch", f"--output={log}", str(file), word)
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"), f"the error of {word}")
        assert log.read_text().splitlines() == [message]
    assert runs.all_runs([launcher.run_root]) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop to another user")
def test_an_ordinary_user_without_home_gets_a_clear_line_for_an_unwritable_run_root(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "LAUNCHER_RUNS": str(locked / "runs")}
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "launcher", "submit",
         "recipe=ch3_ddp", "cluster=local", *FAST],
        env=environment, cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert str(locked) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (locked / "runs").exists()


def test_a_node_without_the_gpu_that_slurm_gave_stops_the_job_before_a_task(
    launcher: Launcher, tmp_path: Path
) -> None:
    """Slurm counts a link to /dev/null as a GPU; the node's own /dev has none: as after one fell off the bus."""
    (tmp_path / "devices").mkdir()
    fakes = [tmp_path / "devices" / f"nvidia{number}" for number in range(2)]
    for fake in fakes:
        fake.symlink_to("/dev/null")
    name = f"fake-gpus-{os.getpid()}"
    made = box.up(nodes=2, name=name, gpu_device_files=fakes)
    try:
        environment = {**launcher.environment, **box.environment(made), "LAUNCHER_BOX": name}
        theirs = dataclasses.replace(launcher, environment=environment)
        shown = theirs("submit", "recipe=ch3_ddp", "cluster=box", "nodes=2", *FAST, "--wait", status=1).stdout
        record = ended(theirs.only_run())
    finally:
        box.down(name)
    assert (record["state"], record["tasks_started"]) == ("failed", None)
    assert re.fullmatch(
        r"preflight: on all 2 nodes: gpus fail: 0 device files, .*expected at least 1 GPU; .*",
        record["reason"],
    )
    assert "preflight: n" in shown
    assert not list((theirs.only_run().path / "attempt-01").glob("rank-*.log"))


def test_with_accounting_sacct_knows_what_slurmctld_forgot(tmp_path: Path) -> None:
    name = f"accounted-{os.getpid()}"
    made = box.up(nodes=1, name=name, gpus=0, accounting=True)
    script = (
        "import json, sys, time\nfrom launcher import slurm\n"
        "slurm.run(['sbatch', '--wait', '--output=/dev/null', '--wrap', sys.argv[2], '--job-name=x'])\n"
        "job = sys.argv[1]\n"
        "end = time.monotonic() + 30\n"
        "while (known := slurm.state_from_accounting(job)) is None or not known.is_over:\n"
        "    assert time.monotonic() < end, known\n    time.sleep(0.5)\n"
        "print(json.dumps([slurm.state_from_controller(job).name, known.name, known.source]))\n"
    )
    try:
        environment = {**os.environ, **box.environment(made)}
        done = subprocess.run(
            [sys.executable, "-c", script, "1", "true"], env=environment, cwd=REPOSITORY,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == ["COMPLETED", "COMPLETED", "sacct"]
    finally:
        box.down(name)


def test_without_accounting_sacct_knows_nothing_and_that_is_no_error(launcher: Launcher) -> None:
    script = "from launcher import slurm; print(slurm.state_from_accounting('1'), slurm.job_state('999999'))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=launcher.environment, cwd=REPOSITORY, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "None None\n"


def test_thirty_two_nodes_run_a_job(tmp_path: Path) -> None:
    large = box.up(nodes=32, name=f"large-{os.getpid()}")
    try:
        environment = {**os.environ, **box.environment(large)}
        out = subprocess.run(
            ["srun", "--nodes=32", "--ntasks=32", "bash", "-c", "echo $SLURMD_NODENAME"],
            env=environment, capture_output=True, text=True, check=True, timeout=120,
        ).stdout  # fmt: skip
        assert len(set(out.split())) == 32
    finally:
        box.down(large.name)
