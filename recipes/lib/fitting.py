"""Whether a training recipe with its arguments fits a GPU, and what nearest to it would. Pure; no torch.

The launcher asks before it submits: a job that waits for hours in a queue and then runs out of memory in its first step
has wasted both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from recipes.lib.calibration import GIB
from recipes.lib.gpus import Gpu
from recipes.lib.memory_model import predict_memory
from recipes.lib.planner import model_size
from recipes.lib.workload import Workload

TRAINING = {"ch1_baseline": "single", "ch3_ddp": "ddp", "ch4_fsdp": "full_shard"}
"""The recipes whose memory is predicted, with the strategy where their arguments name none."""

_NOT_PREDICTED = ("optimizer_folder", "optimizer_sharding")
"""Arguments that keep moments where the memory model does not look."""


class Needs(Protocol):
    """What a GPU must have, in bytes: `recipes.lib.memory_model.Memory`, or what a stack's own arithmetic says."""

    @property
    def certain(self) -> float:
        """Parameters, gradients and moments."""

    @property
    def needed(self) -> float:
        """All that is known of, at the fullest moment."""


@dataclass(frozen=True)
class Misfit:
    """Why a recipe does not fit."""

    certain: bool
    """Parameters, gradients and moments alone are more than the GPU has: arithmetic, not an estimate."""
    needed_gib: float
    missing_gib: float
    nearest: str
    """Changes that would fit, as words of a command line; empty where none was found."""


def workload_of(recipe: str, args: Mapping[str, Any], nodes: int, ranks_per_node: int) -> Workload | None:
    """The recipe as the memory model sees it on GPUs; None for one whose memory is not predicted."""
    if (
        recipe not in TRAINING
        or args.get("device") == "cpu"
        or any(args.get(name) for name in _NOT_PREDICTED)
    ):
        return None
    if max(args.get("tensor_parallel", 1), args.get("context_parallel", 1)) > 1:
        return None
    ranks = nodes * ranks_per_node
    strategy = args.get("strategy") or TRAINING[recipe]
    share = math.ceil(args["batch_size"] / ranks)
    rows = min(args["microbatch_size"] or share, share)
    number = {"float32": 4, "float64": 8}.get(args["dtype"], 2)
    master = 8 if number == 8 else 2 if args.get("param_dtype") == "bfloat16" else 4
    summed = 2 if args.get("reduce_dtype") == "bfloat16" else max(4, master)
    shards = {
        "full_shard": ranks,
        "shard_grad_op": ranks,
        "hybrid_shard": args.get("shard_size") or ranks_per_node,
    }
    return Workload(
        size=model_size(args["model"], args["vocab_size"]),
        sequence_length=args["sequence_length"],
        microbatch=rows,
        microbatches=math.ceil(share / rows),
        strategy=strategy,
        data=ranks,
        shard=shards.get(strategy, 1),
        checkpointing=args["activation_checkpointing"],
        recomputed_layers=args.get("recomputed_layers", 0),
        compiled=args["compile"],
        compute_bytes=number,
        master_bytes=master,
        reduce_bytes=summed,
        cpu_offload=bool(args.get("cpu_offload")),
        defer_reduction=bool(args.get("defer_reduction")),
        bucket_view=bool(args.get("gradient_as_bucket_view", True)),
    )


def misfit(recipe: str, args: Mapping[str, Any], nodes: int, ranks_per_node: int, gpu: Gpu) -> Misfit | None:
    """What is wrong with this recipe on this GPU; None where it fits, or nothing can be said."""
    work = workload_of(recipe, args, nodes, ranks_per_node)
    if work is None:
        return None
    return judge(predict_memory(work), gpu, _others(recipe, args, nodes, ranks_per_node))


def judge(needs: Needs, gpu: Gpu, others: Iterable[tuple[str, Needs]]) -> Misfit | None:
    """None where it fits; else by how much it does not, and the first of `others` (words, their needs) that does."""
    has = gpu.memory_gib * GIB
    if needs.needed <= has:
        return None
    certain = needs.certain > has
    needed = (needs.certain if certain else needs.needed) / GIB
    nearest = (f"{words} ({other.needed / GIB:.1f} GiB)" for words, other in others if other.needed <= has)
    return Misfit(certain, needed, needed - gpu.memory_gib, next(nearest, ""))


def _others(
    recipe: str, args: Mapping[str, Any], nodes: int, ranks_per_node: int
) -> Iterator[tuple[str, Needs]]:
    """Changes and what they need, those first that change least: the arguments, then the machine, then formats."""
    for words, other, changed, more in _changes(recipe, args, nodes, ranks_per_node):
        work = workload_of(other, changed, more, ranks_per_node)
        assert work is not None
        yield words, predict_memory(work)


def _changes(
    recipe: str, args: Mapping[str, Any], nodes: int, ranks_per_node: int
) -> Iterator[tuple[str, str, dict[str, Any], int]]:
    lean = {"activation_checkpointing": "full", "microbatch_size": 1}
    if args.get("recomputed_layers"):
        args = {**args, "recomputed_layers": 0}
        yield "args.recomputed_layers=0", recipe, args, nodes
    for mode in ("selective", "full"):
        yield _words(mode=mode), recipe, {**args, "activation_checkpointing": mode}, nodes
    yield _words(mode="full", rows=1), recipe, {**args, **lean}, nodes
    several = nodes * ranks_per_node > 1
    start = "" if recipe == "ch4_fsdp" else "recipe=ch4_fsdp "
    sharded = {**args, "strategy": "full_shard"}
    if recipe != "ch4_fsdp" or args["strategy"] != "full_shard":
        name = start or "args.strategy=full_shard "
        if several:
            yield name.strip(), "ch4_fsdp", sharded, nodes
            yield f"{name}{_words(mode='full', rows=1)}", "ch4_fsdp", {**sharded, **lean}, nodes
    more = nodes
    while more < 1024:
        more *= 2
        # As many sequences as before in all: each GPU has fewer.
        yield f"{start}nodes={more} {_words(mode='full', rows=1)}", "ch4_fsdp", {**sharded, **lean}, more
    halves = {**sharded, **lean, "param_dtype": "bfloat16"}
    yield f"{start}{_words(mode='full', rows=1)} args.param_dtype=bfloat16", "ch4_fsdp", halves, nodes
    offloaded = {**sharded, **lean, "cpu_offload": True}
    yield f"{start}{_words(mode='full', rows=1)} args.cpu_offload=true", "ch4_fsdp", offloaded, nodes


def _words(mode: str, rows: int = 0) -> str:
    return f"args.activation_checkpointing={mode}" + (f" args.microbatch_size={rows}" if rows else "")
