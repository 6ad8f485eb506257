"""How many nodes, ranks, GPUs and CPUs a job gets: what was typed, what the recipe wishes, what the cluster
has. Pure.

What a person types is taken or refused, never changed. What a recipe wishes is cut to what the cluster has,
so that the same recipe runs on a laptop and on eight nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.clusters import BOX, Capacity
from launcher.spec import Executor, UserError


@dataclass(frozen=True)
class Shape:
    """The four numbers of a job."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int


SHAPE_KEYS = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task")


def resolve_shape(
    typed: Mapping[str, int],
    wished: Mapping[str, int],
    capacity: Capacity,
    *,
    cluster: str,
    executor: Executor,
    max_world_size: int | None = None,
    on_cpu: bool = False,
) -> Shape:
    """The numbers of a job on the cluster. `typed` and `wished` hold those of SHAPE_KEYS that somebody gave.

    Where nobody gave them: one node; one rank per GPU, or `cpu_tasks_per_node` ranks without a GPU (`on_cpu`:
    none is used); the node's CPUs shared among the ranks, as far as their GPUs go. Raises UserError for a typed
    number that the cluster does not have.
    """
    nodes = _nodes(typed, wished, capacity, cluster, executor)
    gpus_there = 0 if on_cpu else capacity.gpus_per_node
    if executor == "debug":
        _refuse_more_than_one(typed, cluster)
        gpus_there, wished = min(1, gpus_there), {**wished, "tasks_per_node": 1}
    gpus = _typed_gpus(typed, capacity, cluster)
    if gpus is None and "gpus_per_node" in wished:
        gpus = min(wished["gpus_per_node"], gpus_there)
    tasks = typed.get("tasks_per_node", wished.get("tasks_per_node"))
    if tasks is None:
        tasks = (gpus_there if gpus is None else gpus) or capacity.cpu_tasks_per_node
        if max_world_size is not None:
            tasks = max(1, min(tasks, max_world_size // nodes))
    if gpus is None:
        gpus = min(tasks, gpus_there)
    if "tasks_per_node" not in typed and gpus:
        tasks = min(tasks, gpus)
    if 0 < gpus < tasks:
        raise UserError(
            f"tasks_per_node={tasks}: cluster '{cluster}' gives {gpus} GPUs per node, one per rank; "
            "gpus_per_node=0 runs the ranks on CPUs"
        )
    return Shape(nodes, tasks, gpus, _cpus_per_task(typed, wished, tasks, gpus, capacity, cluster, executor))


def _nodes(
    typed: Mapping[str, int], wished: Mapping[str, int], capacity: Capacity, cluster: str, executor: Executor
) -> int:
    most = capacity.max_nodes if executor == "slurm" else 1
    nodes = typed.get("nodes")
    if nodes is None:
        nodes = wished.get("nodes", 1)
        return nodes if most is None else min(nodes, most)
    if most is not None and nodes > most:
        if executor == "slurm":
            hint = f"; make a larger one: box down, then box up --nodes {nodes}" if cluster == BOX else ""
            raise UserError(f"nodes={nodes}: cluster '{cluster}' gives a job {most} nodes at most{hint}")
        raise UserError(
            f"nodes={nodes}: cluster '{cluster}' is this one machine; cluster=box tries several nodes on it"
        )
    return nodes


def _refuse_more_than_one(typed: Mapping[str, int], cluster: str) -> None:
    for key in ("tasks_per_node", "gpus_per_node"):
        if typed.get(key, 1) > 1:
            raise UserError(
                f"{key}={typed[key]}: cluster '{cluster}' runs one task; cluster=local runs several"
            )


def _typed_gpus(typed: Mapping[str, int], capacity: Capacity, cluster: str) -> int | None:
    gpus = typed.get("gpus_per_node")
    if gpus is not None and gpus > capacity.gpus_per_node:
        raise UserError(f"gpus_per_node={gpus}: cluster '{cluster}' has {capacity.gpus_per_node} per node")
    return gpus


def _cpus_per_task(
    typed: Mapping[str, int],
    wished: Mapping[str, int],
    tasks: int,
    gpus: int,
    capacity: Capacity,
    cluster: str,
    executor: Executor,
) -> int:
    there = capacity.cpus_per_node
    cpus = typed.get("cpus_per_task", wished.get("cpus_per_task"))
    if there is None:
        return cpus or 1
    # A job with one of eight GPUs gets an eighth of the CPUs: all of them would keep others from the other seven.
    ours = there * gpus // capacity.gpus_per_node if gpus and executor == "slurm" else there
    share = max(1, ours // tasks)
    if "cpus_per_task" not in typed:
        cpus = min(cpus or share, share)
    assert cpus is not None
    # Slurm leaves a job that no node can hold pending for ever, or refuses it in a line that names no key.
    # On this machine and in the box ranks may share a core.
    if executor == "slurm" and capacity.cores_per_node is None and cpus * tasks > there:
        key, value = ("cpus_per_task", cpus) if "cpus_per_task" in typed else ("tasks_per_node", tasks)
        raise UserError(
            f"{key}={value}: {tasks} tasks of {cpus} CPUs; cluster '{cluster}' has {there} per node"
        )
    return cpus
