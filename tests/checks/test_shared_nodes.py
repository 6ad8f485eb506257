"""On a shared node everything is judged of the job's own GPUs, nothing of others; of doubtful ones it says so."""

from __future__ import annotations

import pytest

from checks import catalog
from checks.collect import collect_node
from checks.collect_host import ENVIRONMENT
from checks.evidence import Record, Recorded, key_of
from checks.expectations import Expectations
from checks.registry import judge
from checks.verdict import CheckResult, Verdict
from tests.checks.nodes import healthy, problem, value, with_answers

FAIL, WARN, PASS = Verdict.FAIL, Verdict.WARN, Verdict.PASS
UUID = "GPU-00000000-0000-0000-0000-00000000000"
FOREIGN = {
    "gpu.processes": {key_of("nvml", ["nvmlDeviceGetComputeRunningProcesses", 1]): value([{"pid": 77}])},
    "gpu.memory": {
        key_of("nvml", ["nvmlDeviceGetMemoryInfo", 1]): value({"total": 1 << 36, "used": 1 << 30})
    },
}
"""Somebody uses GPU 1 of the two."""


def judged(
    check: str, answers: dict[str, Record], *, gpus: int = 1, exclusive: bool = False, **environment: str
) -> CheckResult:
    records = with_answers(healthy(), {**answers, key_of("environment", ENVIRONMENT): value(environment)})
    expected = Expectations(gpus=gpus, fabric="infiniband", exclusive=exclusive)
    node = collect_node(Recorded(records), "n1", expected)
    (result,) = judge(node, expected, catalog.named([check], "passive"))
    return result


@pytest.mark.parametrize("check", FOREIGN)
@pytest.mark.parametrize(
    ("variable", "own", "other"),
    [
        ("CUDA_VISIBLE_DEVICES", "1", "0"),
        ("CUDA_VISIBLE_DEVICES", f"{UUID}1", f"{UUID}0"),
        ("SLURM_STEP_GPUS", "1", "0"),
        ("SLURM_JOB_GPUS", "1", "0"),
        ("SLURM_JOB_GPUS", "0,1", "0"),
    ],
)
def test_a_stranger_on_the_jobs_gpu_fails_and_on_another_one_does_not(
    check: str, variable: str, own: str, other: str
) -> None:
    bad = judged(check, FOREIGN[check], **{variable: own})
    assert (bad.verdict, "GPU 1: " in bad.read) == (FAIL, True), bad
    assert "--shared" not in bad.remedy, "that is said already"
    good = judged(check, FOREIGN[check], **{variable: other})
    assert good.verdict is PASS
    assert f"on 1 of 2 GPUs, this job's: {variable}={other}" in good.read


@pytest.mark.parametrize("check", FOREIGN)
def test_gpus_that_slurm_shows_alone_are_the_jobs(check: str) -> None:
    """Slurm numbers them as on the node; where it hides the others (ConstrainDevices), NVML counts from 0 again."""
    assert judged(check, FOREIGN[check], SLURM_JOB_GPUS="6,7").verdict is FAIL
    assert judged(check, FOREIGN[check], gpus=2).verdict is FAIL
    assert "the job asks for as many as are seen" in judged(check, {}, gpus=2).read


@pytest.mark.parametrize("check", FOREIGN)
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "which of the 2 GPUs are this job's, no variable says"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "names no GPU that NVML knows"),
        ({"CUDA_VISIBLE_DEVICES": "7"}, "CUDA_VISIBLE_DEVICES=7 names no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_SHARDS_ON_NODE": "4"}, "shards of a GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50"}, "through MPS"),
    ],
)
def test_what_nobody_can_tell_is_said_and_is_no_pass(
    check: str, environment: dict[str, str], says: str
) -> None:
    result = judged(check, FOREIGN[check], **environment)
    assert (result.verdict, says in result.read) == (WARN, True), result
    assert result.read.startswith("not judged: ")


def test_instances_of_a_gpu_are_of_several_jobs() -> None:
    mig = {key_of("nvml", ["nvmlDeviceGetMigMode", 0]): value([1, 1])}
    result = judged("gpu.processes", {**mig, **FOREIGN["gpu.processes"]}, CUDA_VISIBLE_DEVICES="1")
    assert (result.verdict, "MIG mode" in result.read) == (WARN, True)


@pytest.mark.parametrize("check", FOREIGN)
def test_a_job_alone_on_its_node_minds_everybody(check: str) -> None:
    """Unless it hides GPUs from itself."""
    assert judged(check, FOREIGN[check], exclusive=True).verdict is FAIL
    assert judged(check, FOREIGN[check], exclusive=True, CUDA_VISIBLE_DEVICES="0").verdict is PASS


@pytest.mark.parametrize("check", FOREIGN)
def test_an_own_gpu_that_does_not_answer_is_unknown(check: str) -> None:
    silent = dict.fromkeys(FOREIGN[check], problem("timed out"))
    assert judged(check, silent, CUDA_VISIBLE_DEVICES="1").verdict is Verdict.UNKNOWN
    assert judged(check, silent, CUDA_VISIBLE_DEVICES="0").verdict is PASS
