"""What a job really got: nodes, tasks per node, CPUs and GPUs, whatever the spec asked for. Pure.

`sbatch --nodes=8 jobs/ch4_fsdp.sbatch` changes the job, not the spec, so inside a job Slurm's variables decide. The
rendered headers always state --nodes, --ntasks-per-node and --cpus-per-task, hence sbatch always sets these variables
anew and none of them can be left over from an outer job.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.slurm import expand_hostlist
from launcher.spec import JobSpec, UserError


@dataclass(frozen=True)
class Allocation:
    """The resources of one job. `job_id` and `cluster` are empty where there is no Slurm."""

    job_id: str
    cluster: str
    nodes: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    restart_count: int = 0

    @property
    def world_size(self) -> int:
        return len(self.nodes) * self.tasks_per_node


def local_allocation(spec: JobSpec) -> Allocation:
    """The allocation of a run on this machine: what the spec says."""
    return Allocation("", "", ("localhost",), spec.tasks_per_node, spec.cpus_per_task, spec.gpus_per_node)


def slurm_allocation(environment: Mapping[str, str]) -> Allocation:
    """Read the allocation from the batch step's environment.

    Raises UserError when it is not one, or when flags given to sbatch do not go together.
    """
    if "SLURM_JOB_ID" not in environment:
        raise UserError(
            "the controller runs inside a Slurm job and SLURM_JOB_ID is not set; use: python -m launcher submit"
        )
    nodes = tuple(expand_hostlist(environment["SLURM_JOB_NODELIST"]))
    tasks_per_node = _tasks_per_node(environment, len(nodes))
    return Allocation(
        job_id=environment["SLURM_JOB_ID"],
        cluster=environment.get("SLURM_CLUSTER_NAME", ""),
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK", "1")),
        gpus_per_node=_gpus_on_node(environment),
        restart_count=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


def _tasks_per_node(environment: Mapping[str, str], nodes: int) -> int:
    """SLURM_TASKS_PER_NODE is "4(x2)" or "4,3": it follows `sbatch -n` as well as --ntasks-per-node."""
    counts = []
    for part in environment["SLURM_TASKS_PER_NODE"].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={environment['SLURM_TASKS_PER_NODE']}: cannot be read")
        counts.extend([int(match[1])] * int(match[2] or 1))
    if len(set(counts)) != 1 or len(counts) != nodes:
        raise UserError(
            f"the job's {nodes} nodes have unequal tasks ({environment['SLURM_TASKS_PER_NODE']}): "
            "give sbatch --nodes and --ntasks-per-node instead of --ntasks"
        )
    return counts[0]


def _gpus_on_node(environment: Mapping[str, str]) -> int:
    """SLURM_GPUS_ON_NODE is the count on the batch node; absent where the job asked for no GPU."""
    return int(environment.get("SLURM_GPUS_ON_NODE", "0"))


def _working_nodes(spec: JobSpec, allocation: Allocation) -> int:
    working = len(allocation.nodes) - spec.spares
    if working < 1:
        raise UserError(
            f"spares={spec.spares}: the job has {len(allocation.nodes)} nodes, and none would be left to work"
        )
    return working


def fit(spec: JobSpec, allocation: Allocation) -> JobSpec:
    """The spec as it will run here: the allocation's sizes in place of the requested ones.

    Raises UserError when the allocation cannot run it (fewer GPUs than tasks on a node).
    """
    if spec.gpus_per_node and allocation.gpus_per_node < allocation.tasks_per_node:
        raise UserError(
            f"tasks_per_node={allocation.tasks_per_node}: the job has {allocation.gpus_per_node} GPUs on a node; "
            f"give sbatch --gpus-per-node={allocation.tasks_per_node} or --ntasks-per-node={allocation.gpus_per_node}"
        )
    return dataclasses.replace(
        spec,
        nodes=_working_nodes(spec, allocation),
        tasks_per_node=allocation.tasks_per_node,
        cpus_per_task=allocation.cpus_per_task,
        gpus_per_node=allocation.gpus_per_node,
    )
