"""What Slurm prints, as our types: pure parsers first, thin callers of its commands below. Subprocess.

Works with and without accounting: a job's state is asked of slurmctld first (scontrol knows live jobs and, for
MinJobAge, ended ones), and only then of sacct, which many clusters do not have.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.spec import UserError

COMMAND_TIMEOUT_SECONDS = 60.0
"""A slurmctld that is down makes a command fail after about 9 s; a hung one must not hang us for ever."""

TERMINAL_STATES = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)


class SlurmError(UserError):
    """A Slurm command failed: the command, its status and the last line that it printed."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job. `name` is Slurm's word in capitals (PENDING, RUNNING, COMPLETED, …)."""

    name: str
    reason: str
    nodes: str
    source: str

    @property
    def is_over(self) -> bool:
        return self.name in TERMINAL_STATES


@dataclass(frozen=True)
class TaskExit:
    """How one task of a step ended, as srun reports it. `signal` is a name like "Killed", empty for an exit code."""

    node: str
    tasks: tuple[int, ...]
    exit_code: int | None
    signal: str


# --- pure parsers ---------------------------------------------------------------------------------------------------


def parse_key_values(line: str) -> dict[str, str]:
    """One record of `scontrol show … -o`. Values may hold spaces (Command=, Reason=), so a key starts at a word
    boundary with an upper-case letter and ends in "="."""
    matches = list(re.finditer(r"(?:^|\s)([A-Z][A-Za-z:/_]*)=", line))
    ends = [match.start() for match in matches[1:]] + [len(line)]
    return {match[1]: line[match.end() : end].strip() for match, end in zip(matches, ends, strict=True)}


def expand_hostlist(hostlist: str) -> list[str]:
    """Expand Slurm's notation: "n[1-3,07],gpu-a" -> n1 n2 n3 n07 gpu-a. Several brackets in one name multiply.

    Raises ValueError on unbalanced brackets or an empty range.
    """
    names: list[str] = []
    for group in _split_outside_brackets(hostlist):
        names.extend(_expand_group(group))
    return names


def _split_outside_brackets(hostlist: str) -> list[str]:
    groups, depth, start = [], 0, 0
    for position, character in enumerate(hostlist):
        depth += (character == "[") - (character == "]")
        if depth not in (0, 1):
            raise ValueError(f"unbalanced brackets in hostlist {hostlist!r}")
        if character == "," and depth == 0:
            groups.append(hostlist[start:position])
            start = position + 1
    if depth:
        raise ValueError(f"unbalanced brackets in hostlist {hostlist!r}")
    return [group for group in [*groups, hostlist[start:]] if group]


def _expand_group(group: str) -> list[str]:
    match = re.search(r"\[([^]]*)\]", group)
    if match is None:
        return [group]
    names: list[str] = []
    for part in match[1].split(","):
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"cannot read range {part!r} in hostlist {group!r}")
        for number in range(int(low), int(high or low) + 1):
            head = group[: match.start()] + str(number).zfill(len(low))
            names.extend(head + tail for tail in _expand_group(group[match.end() :]))
    return names


_TASK_EXIT = re.compile(
    r"srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,\-]+): "
    r"(?:Exited with exit code (?P<code>\d+)|(?P<signal>[A-Z][\w \-/()]*))\s*$"
)


def parse_task_exits(srun_stderr: str) -> list[TaskExit]:
    """The lines with which srun reports tasks that ended badly, in the order in which it saw them."""
    exits = []
    for line in srun_stderr.splitlines():
        match = _TASK_EXIT.match(line.strip())
        if match is not None:
            code = int(match["code"]) if match["code"] is not None else None
            tasks = tuple(int(task) for task in expand_hostlist(f"[{match['tasks']}]"))
            exits.append(TaskExit(match["node"], tasks, code, match["signal"] or ""))
    return exits


_CANCELLATION = re.compile(
    r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO (?P<cause>[A-Z ]+?))?(?:,[^*]*)? \*\*\*"
)
_CAUSES = {
    "TIME LIMIT": "TIMEOUT",
    "PREEMPTION": "PREEMPTED",
    "JOB REQUEUE": "REQUEUED",
    "NODE FAILURE": "NODE_FAIL",
}


def parse_cancellation(batch_log: str) -> str:
    """Why Slurm ended the job, as a state name, from the line that slurmstepd writes into the batch step's log before
    it signals: CANCELLED, TIMEOUT, PREEMPTED, REQUEUED, NODE_FAIL; "" where there is no such line.

    scontrol cannot say it then: until the last process is gone the state reads COMPLETING, whatever the cause.
    """
    causes = [match["cause"] for match in _CANCELLATION.finditer(batch_log)]
    if not causes:
        return ""
    return "CANCELLED" if causes[-1] is None else _CAUSES.get(causes[-1], "CANCELLED")


# --- environment ----------------------------------------------------------------------------------------------------

_CLUSTER_WIDE = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT"})
"""Variables that say which cluster to speak to. Scrubbing them breaks every later command (submitit#1814)."""

_OF_AN_OUTER_JOB = re.compile(
    r"^(SLURM_|SLURMD_|SRUN_|SBATCH_|SALLOC_|PMI_|PMIX_|OMPI_|SUBMITIT_|TORCHELASTIC_|LAUNCHER_TASK_)"
)
_RENDEZVOUS = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME "
    "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT RUN_DIR ATTEMPT ATTEMPT_DIR".split()
)


def without_outer_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment to submit with: nothing that an enclosing job or torchrun left behind.

    An inherited SLURM_CPU_BIND slowed a fleet threefold (goodfire-ai/spd#955), and an outer `-n2 -c2` makes the inner
    job's srun fail. CUDA_VISIBLE_DEVICES goes too where it came from an outer Slurm job: the new job gets its own.
    """
    inside_job = "SLURM_JOB_ID" in environment
    return {
        name: value
        for name, value in environment.items()
        if name in _CLUSTER_WIDE
        or not (
            _OF_AN_OUTER_JOB.match(name)
            or name in _RENDEZVOUS
            or (inside_job and name in {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"})
        )
    }


_STEP_NEEDS = frozenset(
    "SLURM_JOB_ID SLURM_JOBID SLURM_JOB_NODELIST SLURM_NODELIST SLURM_JOB_NUM_NODES SLURM_NNODES "
    "SLURM_JOB_CPUS_PER_NODE SLURM_JOB_PARTITION SLURM_JOB_NAME SLURM_JOB_ACCOUNT SLURM_JOB_QOS "
    "SLURM_JOB_UID SLURM_JOB_USER SLURM_JOB_GID "
    "SLURM_JOB_START_TIME SLURM_JOB_END_TIME SLURM_JOB_GPUS SLURM_GPUS_ON_NODE SLURM_CLUSTER_NAME SLURM_SUBMIT_DIR "
    "SLURM_SUBMIT_HOST SLURM_RESTART_COUNT SLURM_TOPOLOGY_ADDR SLURM_WORKING_CLUSTER SLURM_JOB_RESERVATION".split()
)


def for_steps(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for `srun` in the batch step: which job it is in, and no input option of srun by variable.

    Every option is passed once, on srun's command line. SLURM_CPUS_PER_TASK and SLURM_TRES_PER_TASK together are fatal
    on Slurm 25.05, and options exported by whoever called sbatch would silently win over the job's own.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in _CLUSTER_WIDE
        or name in _STEP_NEEDS
        or not (_OF_AN_OUTER_JOB.match(name) or name in _RENDEZVOUS)
    }


# --- thin callers ---------------------------------------------------------------------------------------------------


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = COMMAND_TIMEOUT_SECONDS,
) -> str:
    """Run a Slurm command and return what it printed. Raises SlurmError with its last line when it fails."""
    env = {
        **(os.environ if environment is None else environment),
        "SLURM_TIME_FORMAT": "standard",
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=env,
        )
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]}: not found on PATH") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]}: no answer within {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        last = lines[-1] if lines else "no message"
        raise SlurmError(f"{' '.join(command[:3])} … failed with status {done.returncode}: {last}")
    return done.stdout


def job_record(job_id: str, *, timeout: float = COMMAND_TIMEOUT_SECONDS) -> dict[str, str]:
    """`scontrol show job` as a mapping. Raises SlurmError when slurmctld does not know the job (any more)."""
    return parse_key_values(run(["scontrol", "show", "job", "-o", job_id], timeout=timeout))


def node_addresses(nodes: Sequence[str]) -> dict[str, str]:
    """Each node's NodeAddr: the name or address by which slurmctld itself reaches it. Raises SlurmError."""
    records = run(["scontrol", "show", "node", "-o", ",".join(nodes)])
    found = [parse_key_values(line) for line in records.splitlines() if line.strip()]
    addresses = {record["NodeName"]: record["NodeAddr"] for record in found if "NodeAddr" in record}
    missing = [node for node in nodes if node not in addresses]
    if missing:
        raise SlurmError(f"scontrol show node gave no NodeAddr for {', '.join(missing)}")
    return addresses


def job_state(job_id: str) -> JobState | None:
    """Slurm's view of a job, or None when neither slurmctld nor accounting knows it.

    Raises SlurmError when slurmctld does not answer.
    """
    return state_from_controller(job_id) or state_from_accounting(job_id)


def state_from_controller(job_id: str) -> JobState | None:
    """What slurmctld remembers: live jobs, and ended ones for MinJobAge. Raises SlurmError when it does not answer."""
    try:
        record = job_record(job_id)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return JobState(record["JobState"], record.get("Reason", ""), record.get("NodeList", ""), "scontrol")


def state_from_accounting(job_id: str) -> JobState | None:
    """What sacct says; None where it does not know the job, and on a cluster without accounting."""
    if shutil.which("sacct") is None:
        return None
    try:
        text = run(["sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,NodeList"])
    except SlurmError as error:
        if "disabled" in str(error):  # "Slurm accounting storage is disabled"
            return None
        raise
    # A requeued job has a line for each start; the last one is the newest.
    for line in reversed(text.splitlines()):
        state, _, nodes = line.partition("|")
        if state.split():
            return JobState(state.split()[0], "", nodes, "sacct")  # "CANCELLED by 1000" -> CANCELLED
    return None
