"""Whether a model fits GPUs when Megatron-Core splits it: parameters, gradients and moments alone. Pure; no torch.

Arithmetic, not an estimate: activations come on top, and what they take nobody has measured yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from recipes.ch5.megatron_args import MegatronArgs
from recipes.lib.arguments import ArgumentError
from recipes.lib.calibration import GIB
from recipes.lib.fitting import Misfit
from recipes.lib.gpus import Gpu
from recipes.lib.planner import model_size
from recipes.lib.workload import Workload, stages

_SPLITS = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (8, 1), (4, 2), (2, 4), (8, 2), (4, 4), (8, 4))
"""Of a copy, over tensor and pipeline parallel ranks, those first that cost least."""


def kept_bytes(args: MegatronArgs, ranks: int) -> int:
    """Bytes between two steps on the rank that has most, of `ranks` that the sizes divide."""
    size, split = model_size(args.model, args.vocab_size), args.tensor_parallel * args.pipeline_parallel
    work = Workload(
        size=size,
        sequence_length=args.sequence_length,
        microbatch=1,
        tensor=args.tensor_parallel,
        pipeline=args.pipeline_parallel,
    )
    fullest = max(stages(work), key=lambda stage: stage.parameters)
    one_network = 3 * size.width * size.ffn_width // args.tensor_parallel
    experts = fullest.layers * args.experts // args.expert_parallel * one_network
    others = fullest.parameters - (fullest.layers * one_network if args.experts else 0)
    # The optimizer's share of a parameter is split over the ranks that have the same one.
    copies = ranks // split if args.distributed_optimizer else 1
    copies_of_experts = max(1, copies // args.expert_parallel)
    rounded = args.dtype in ("auto", "bfloat16")  # then it also keeps what was rounded
    weight_and_gradient, own = (2 + 4, 12) if rounded else (4 + 4, 8)
    return round(
        others * (weight_and_gradient + own / copies)
        + experts * (weight_and_gradient + own / copies_of_experts)
    )


def misfit(args: Mapping[str, Any], nodes: int, ranks_per_node: int, gpu: Gpu) -> Misfit | None:
    """What is wrong with these arguments on this GPU; None where it may fit."""
    if args.get("device") == "cpu":
        return None
    needed = kept_bytes(MegatronArgs(**args), nodes * ranks_per_node) / GIB
    if needed <= gpu.memory_gib:
        return None
    nearest = next(_that_fit(MegatronArgs(**args), nodes, ranks_per_node, gpu), "")
    return Misfit(True, needed, needed - gpu.memory_gib, nearest)


def _that_fit(args: MegatronArgs, nodes: int, ranks_per_node: int, gpu: Gpu) -> Iterator[str]:
    """Changes that fit, those first that change least."""
    for words, changes, more in _changes(args, nodes):
        try:
            changed = dataclasses.replace(args, **changes)
            changed.check_ranks(more * ranks_per_node, ranks_per_node)
        except ArgumentError:
            continue  # sizes that do not divide
        needed = kept_bytes(changed, more * ranks_per_node) / GIB
        if needed <= gpu.memory_gib:
            yield f"{words} ({needed:.1f} GiB)"


def _changes(args: MegatronArgs, nodes: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    if not args.distributed_optimizer:
        yield "args.distributed_optimizer=true", {"distributed_optimizer": True}, nodes
    for doublings in range(11):
        more = nodes * 2**doublings
        start = f"nodes={more} " if doublings else ""
        for tensor, pipeline in _SPLITS:
            if (tensor, pipeline, doublings) == (1, 1, 0):
                continue
            sizes = {
                "tensor_parallel": max(tensor, args.tensor_parallel),
                "pipeline_parallel": max(pipeline, args.pipeline_parallel),
                "distributed_optimizer": True,
            }
            words = [
                f"args.{name}={sizes[name]}" for name in list(sizes)[:2] if sizes[name] != getattr(args, name)
            ]
            if not args.distributed_optimizer:
                words.append("args.distributed_optimizer=true")
            yield f"{start}{' '.join(words)}".strip(), sizes, more
