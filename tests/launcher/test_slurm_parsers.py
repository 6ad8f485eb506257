"""What Slurm prints is read exactly: fixtures are lines that Slurm 22.05 printed."""

from __future__ import annotations

import pytest

from launcher.slurm import (
    TaskExit,
    expand_hostlist,
    for_steps,
    parse_cancellation,
    parse_key_values,
    parse_task_exits,
    without_outer_job,
)


@pytest.mark.parametrize(
    ("hostlist", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
        ("gpu-a,gpu-b[1,3]", ["gpu-a", "gpu-b1", "gpu-b3"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[1-2]-ib,login", ["a1-ib", "a2-ib", "login"]),
    ],
)
def test_hostlists_expand_in_order(hostlist: str, names: list[str]) -> None:
    assert expand_hostlist(hostlist) == names


@pytest.mark.parametrize("hostlist", ["n[1-3", "n1]", "n[a-b]", "n[]", "n[[1]]"])
def test_a_broken_hostlist_is_refused(hostlist: str) -> None:
    with pytest.raises(ValueError, match="hostlist"):
        expand_hostlist(hostlist)


def test_a_record_with_spaces_in_its_values_is_read() -> None:
    line = (
        "JobId=12 JobName=ch4_fsdp JobState=RUNNING Reason=None Restarts=0 NumNodes=2 NodeList=n[1-2] "
        "Command=/a folder/jobs/ch4_fsdp.sbatch args.model=tiny WorkDir=/a folder StdOut=/x/y.out"
    )
    record = parse_key_values(line)
    assert record["JobState"] == "RUNNING"
    assert record["NodeList"] == "n[1-2]"
    assert record["Command"] == "/a folder/jobs/ch4_fsdp.sbatch args.model=tiny"
    assert record["WorkDir"] == "/a folder"


def test_task_ends_are_read_from_srun() -> None:
    text = (
        "srun: error: n2: tasks 2-3: Exited with exit code 1\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=12.1\n"
        "srun: error: n1: task 0: Killed\n"
        "srun: error: n1: task 1: Segmentation fault (core dumped)\n"
    )
    assert parse_task_exits(text) == [
        TaskExit("n2", (2, 3), 1, ""),
        TaskExit("n1", (0,), None, "Killed"),
        TaskExit("n1", (1,), None, "Segmentation fault (core dumped)"),
    ]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("slurmstepd-n1: error: *** JOB 8 ON n1 CANCELLED AT 2026-11-21T08:32:52 ***", "CANCELLED"),
        (
            "slurmstepd-n1: error: *** JOB 9 ON n1 CANCELLED AT 2026-11-21T08:34:42 DUE TO TIME LIMIT ***",
            "TIMEOUT",
        ),
        (
            "slurmstepd-n1: error: *** JOB 10 ON n1 CANCELLED AT 2026-11-21T08:33:37 DUE TO JOB REQUEUE ***",
            "REQUEUED",
        ),
        (
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T08:33:37 DUE TO PREEMPTION ***",
            "PREEMPTED",
        ),
        (
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T08:33:37 DUE TO NODE FAILURE, "
            "SEE SLURMCTLD LOG FOR DETAILS ***",
            "NODE_FAIL",
        ),
        ("slurmstepd: error: *** STEP 7.1 ON n1 CANCELLED AT 2026-11-21T08:33:37 ***", ""),
        ("", ""),
    ],
)
def test_why_slurm_ended_a_job_is_read_from_the_batch_log(line: str, cause: str) -> None:
    assert parse_cancellation(f"before\n{line}\nafter\n") == cause


def test_submitting_forgets_the_outer_job_but_not_the_cluster() -> None:
    inherited = {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_JOB_ID": "7",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_NTASKS": "2",
        "SBATCH_PARTITION": "debug",
        "RANK": "0",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "x",
        "CUDA_VISIBLE_DEVICES": "3",
    }
    assert without_outer_job(inherited) == {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf"}


def test_outside_a_job_the_users_own_device_choice_stays() -> None:
    assert without_outer_job({"CUDA_VISIBLE_DEVICES": "3"}) == {"CUDA_VISIBLE_DEVICES": "3"}


def test_a_step_keeps_its_job_and_loses_options_given_by_variable() -> None:
    batch = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_TRES_PER_TASK": "cpu:4",
        "SLURM_CPU_BIND": "quiet",
        "SLURM_EXPORT_ENV": "NONE",
        "SRUN_CPUS_PER_TASK": "4",
        "LANG": "C",
    }
    assert for_steps(batch) == {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "LANG": "C"}
