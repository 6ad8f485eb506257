"""GPUs that this job has, and whether somebody else uses them. Pure.

On a node that is shared with other jobs, what others do on their own GPUs is no finding, and what they do on this job's
is one. Which are this job's is told by variables, or by Slurm's hiding of all others; where nobody tells, or where the
GPUs themselves are shared, the verdict says so instead of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from checks.expectations import Expectations
from checks.facts import Gpu, Node
from checks.findings import Finding, blind, fail, result
from checks.judge_gpu import gpus_of
from checks.reading import Unread, counted
from checks.registry import check
from checks.verdict import CheckResult, Verdict

IDLE_MEMORY, IDLE_MIG_MEMORY = 15 << 20, 256 << 20
SLURM_GPUS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
"""Numbers of the GPUs on the node, as Slurm gives them to prolog, batch script and step (sbatch(1), srun(1))."""
SHARING = {
    "SLURM_SHARDS_ON_NODE": "Slurm gives out shards of a GPU",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "its processes share a GPU through MPS",
}
"""Variables of jobs that have a part of a GPU (slurm.schedmd.com/gres.html, Sharding and MPS)."""
END_IT = "end it, or leave this node out"


@dataclass(frozen=True)
class Own:
    """The job's GPUs."""

    gpus: tuple[Gpu, ...]
    told_by: str = ""
    """Who says that it is these."""
    not_judged: str = ""
    """Why nothing, or no more, can be judged; "" where all is."""


def own_gpus(node: Node, gpus: tuple[Gpu, ...], expected: Expectations) -> Own:
    """Which of the node's GPUs are this job's."""
    environment = {} if isinstance(node.environment, Unread) else node.environment
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    named = _named(visible or "", gpus)
    if expected.exclusive:
        return Own(named or gpus)
    for variable, why in SHARING.items():
        if environment.get(variable):
            return Own((), not_judged=f"{variable} is set: {why}")
    if any(gpu.mig == 1 for gpu in gpus):
        return Own((), not_judged="GPUs are in MIG mode, and their instances may be of several jobs")
    if named:
        return Own(named, f"CUDA_VISIBLE_DEVICES={visible}")
    for variable in SLURM_GPUS:
        numbers = environment.get(variable, "")
        if numbers and len(numbers.split(",")) == len(gpus):
            return Own(gpus, f"{variable}={numbers}, and no others are seen")
        if numbers and (of_slurm := _named(numbers, gpus)):
            return Own(of_slurm, f"{variable}={numbers}")
    if expected.gpus is not None and expected.gpus == len(gpus):
        return Own(gpus, "the job asks for as many as are seen")
    if visible is not None:
        return Own((), not_judged=f"CUDA_VISIBLE_DEVICES={visible} names no GPU that NVML knows")
    return Own((), not_judged=f"which of the {counted(len(gpus), 'GPU')} are this job's, no variable says")


def _named(words: str, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """By number or UUID, whose beginning is enough for CUDA; () unless every word names one."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    found = [
        next((gpu for gpu in gpus if name == str(gpu.index) or _is_uuid(name, gpu)), None) for name in names
    ]
    return tuple(gpu for gpu in found if gpu is not None) if found and None not in found else ()


def _is_uuid(name: str, gpu: Gpu) -> bool:
    return name.startswith("GPU-") and isinstance(gpu.uuid, str) and gpu.uuid.startswith(name)


def _unjudged(name: str, own: Own, expected: str) -> CheckResult:
    remedy = "CUDA_VISIBLE_DEVICES or SLURM_JOB_GPUS would say it; without --shared every GPU is judged"
    return CheckResult(name, Verdict.WARN, f"not judged: {own.not_judged}", expected, remedy)


def _healthy(own: Own, count: int, text: str) -> str:
    return (
        f"{text} on {len(own.gpus)} of {counted(count, 'GPU')}, this job's: {own.told_by}"
        if own.told_by
        else text
    )


@check(
    "gpu.processes",
    reads=["nvml nvmlDeviceGetComputeRunningProcesses *"],
    source="a GPU that was given to this job is idle before it starts",
)
def processes(node: Node, expected: Expectations) -> list[CheckResult]:
    """Nobody else computes on the job's GPUs: no process left by an earlier job, none of a neighbour."""
    name = "gpu.processes"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    own = own_gpus(node, gpus, expected)
    if own.not_judged:
        return [_unjudged(name, own, "no process")]
    remedy = "end it, or say --shared" if expected.exclusive else END_IT
    findings: list[Finding] = []
    for gpu in own.gpus:
        if isinstance(gpu.processes, Unread):
            findings.append(blind(gpu.processes, f"GPU {gpu.index}"))
            continue
        # NVML lists pids for a while after their end; those /proc does not know are dead or hidden (see gpu.memory).
        for process in gpu.processes:
            if process.alive is not False:
                title = "" if isinstance(process.name, Unread) else f" ({process.name})"
                findings.append(fail(f"GPU {gpu.index}: process {process.pid}{title}", remedy))
    return result(name, findings, _healthy(own, len(gpus), "none"), "no process")


@check(
    "gpu.memory",
    reads=["nvml nvmlDeviceGetMemoryInfo *"],
    source="more than 15 MiB on an idle GPU: facebookresearch/gcm",
)
def memory(node: Node, expected: Expectations) -> list[CheckResult]:
    """The job's GPUs are empty."""
    name = "gpu.memory"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    own = own_gpus(node, gpus, expected)
    wish = f"≤ {IDLE_MEMORY >> 20} MiB in use"
    if own.not_judged:
        return [_unjudged(name, own, wish)]
    remedy = "an earlier job's process holds it" + (
        ", or say --shared" if expected.exclusive else f": {END_IT}"
    )
    findings: list[Finding] = []
    for gpu in own.gpus:
        # The instances of a GPU in MIG mode hold some memory each before anybody uses them: 59 MiB in a capture.
        idle = IDLE_MIG_MEMORY if gpu.mig == 1 else IDLE_MEMORY
        if isinstance(gpu.memory_used, Unread):
            findings.append(blind(gpu.memory_used, f"GPU {gpu.index}"))
        elif gpu.memory_used > idle:
            findings.append(fail(f"GPU {gpu.index}: {gpu.memory_used >> 20} MiB in use", remedy))
    return result(name, findings, _healthy(own, len(gpus), f"at most {IDLE_MEMORY >> 20} MiB in use"), wish)
