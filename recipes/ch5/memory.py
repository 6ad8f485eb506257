"""Whether a recipe of this chapter fits its GPUs, and what nearest to it would. Pure; no torch.

The memory of ZeRO and of a pipeline is predicted by part and moment, as that of the chapters before
(recipes/lib/memory_model.py, zero_memory.py). Of the mixture only what is kept between steps is counted, and
Megatron-Core has its own arithmetic (megatron_memory.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.ch5 import megatron_memory
from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.ch5.deepspeed_moe_args import DeepSpeedMoeArgs
from recipes.ch5.deepspeed_pipeline_args import DeepSpeedPipelineArgs
from recipes.ch5.megatron_args import MegatronArgs
from recipes.lib.arguments import ArgumentError, TrainArgs
from recipes.lib.calibration import GIB
from recipes.lib.fitting import Misfit, Needs, judge
from recipes.lib.flops import parameter_count
from recipes.lib.gpus import Gpu
from recipes.lib.memory_model import predict_memory
from recipes.lib.planner import model_size
from recipes.lib.workload import Workload
from recipes.lib.zero_memory import zero_states

LEAN = {"activation_checkpointing": "full", "microbatch_size": 1}
OFFLOADED = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}


@dataclass(frozen=True)
class Kept:
    """Where activations are not predicted: what is there between two steps."""

    certain: float

    @property
    def needed(self) -> float:
        """The same: no more is known."""
        return self.certain


Needed = Callable[[Any, int], Needs]
"""Of arguments, on so many ranks."""
Changes = Iterator[tuple[dict[str, Any], int]]
"""Other arguments, and times as many nodes."""


def misfit(recipe: str, args: Mapping[str, Any], nodes: int, ranks_per_node: int, gpu: Gpu) -> Misfit | None:
    """What is wrong with this recipe on this GPU; None where it fits, or nothing can be said."""
    if recipe not in PREDICTED or args.get("device") == "cpu":
        return None
    arguments, needed, changes = PREDICTED[recipe]
    asked = arguments(**args)

    def others() -> Iterator[tuple[str, Needs]]:
        for change, times in changes(asked):
            try:
                changed = dataclasses.replace(asked, **change)
                if isinstance(changed, DeepSpeedMoeArgs | DeepSpeedPipelineArgs | MegatronArgs):
                    changed.check_ranks(nodes * times * ranks_per_node, ranks_per_node)
            except ArgumentError:
                continue  # what does not go together, and sizes that do not divide
            words = [f"nodes={nodes * times}"] if times > 1 else []
            words += [
                f"args.{key}={str(value).lower() if isinstance(value, bool) else value}"
                for key, value in change.items()
                if value != getattr(asked, key)
            ]
            if words:
                if host := _host_bytes(changed, nodes * times):
                    words.append(f"and {host / GIB:,.0f} GiB of each node's own memory")
                yield " ".join(words), needed(changed, nodes * times * ranks_per_node)

    return judge(needed(asked, nodes * ranks_per_node), gpu, others())


def _workload(args: TrainArgs, share: int, **more: Any) -> Workload:
    """What is the same for all: a rank of `share` sequences in each step."""
    rows = min(args.microbatch_size or share, share)
    compute = 4 if args.dtype == "float32" else 2
    return Workload(
        size=model_size(args.model, args.vocab_size),
        sequence_length=args.sequence_length,
        microbatch=rows,
        microbatches=math.ceil(share / rows),
        checkpointing=args.activation_checkpointing,
        compiled=args.compile,
        compute_bytes=compute,
        **more,
    )


def _zero(args: DeepSpeedArgs, ranks: int) -> Needs:
    work = _workload(
        args,
        math.ceil(args.batch_size / ranks),
        strategy=f"zero{args.stage}",
        data=ranks,
        optimizer_offloaded=args.offload_optimizer != "none",
        parameters_offloaded=args.offload_parameters != "none",
        bucket=args.bucket,
    )
    return predict_memory(work)


def _host_bytes(args: TrainArgs, nodes: int) -> float:
    """What offload moves to a node's memory: what is updated, two moments and the gradients in float32.

    In stage 3 gradients are there twice (stage3.py, 0.19.8: `grad_partitions_flat_buffer`, and what the update takes),
    which DeepSpeed's own estimate_zero3_model_states_mem_needs does not count.
    """
    if not isinstance(args, DeepSpeedArgs) or args.offload_optimizer != "cpu":
        return 0.0
    each = 16 + 4 * (args.stage == 3) + 2 * (args.offload_parameters == "cpu")
    return parameter_count(model_size(args.model, args.vocab_size)) * each / nodes


def _zero_changes(args: DeepSpeedArgs) -> Changes:
    for mode in ("selective", "full"):
        yield {"activation_checkpointing": mode}, 1
    yield LEAN, 1
    for stage in range(args.stage + 1, 4):
        yield {"stage": stage}, 1
        yield {"stage": stage, **LEAN}, 1
    if args.offload_optimizer == "none" and args.stage:
        yield {"offload_optimizer": "cpu", **LEAN}, 1
    for doublings in range(1, 5):
        yield {"stage": 3, **LEAN}, 2**doublings
    yield {"stage": 3, "offload_optimizer": "cpu", **LEAN}, 1
    yield {"stage": 3, **OFFLOADED, **LEAN}, 1
    for doublings in range(5, 11):
        yield {"stage": 3, **LEAN}, 2**doublings


def _pipeline(args: DeepSpeedPipelineArgs, ranks: int) -> Needs:
    stages = args.stages(ranks)
    share = math.ceil(args.batch_size * stages / ranks)
    return predict_memory(_workload(args, share, strategy="single", data=ranks // stages, pipeline=stages))


def _pipeline_changes(args: DeepSpeedPipelineArgs) -> Changes:
    yield {"activation_checkpointing": "full"}, 1
    yield LEAN, 1
    for doublings in range(1, 6):
        yield {"pipeline_parallel": 2**doublings, **LEAN}, 1
    for doublings in range(1, 6):
        yield {"pipeline_parallel": 2 ** (doublings + 3), **LEAN}, 2**doublings


def _mixture(args: DeepSpeedMoeArgs, ranks: int) -> Needs:
    work = _workload(args, 1, strategy=f"zero{args.stage}")
    size, together = work.size, args.ranks_with_experts(ranks)
    network = 3 * size.width * size.ffn_width * size.layers
    router = args.experts * size.width * size.layers
    shared = zero_states(work, parameter_count(size) - network + router, ranks)
    experts = zero_states(work, network * args.experts / together, ranks // together)
    return Kept(sum(shared.values()) + sum(experts.values()))


def _mixture_changes(args: DeepSpeedMoeArgs) -> Changes:
    for doublings in range(7):
        for stage in range(args.stage, 3):
            yield {"stage": stage}, 2**doublings
            yield {"stage": stage, "expert_parallel": args.experts}, 2**doublings


PREDICTED: dict[str, tuple[type[TrainArgs], Needed, Callable[[Any], Changes]]] = {
    "ch5_deepspeed": (DeepSpeedArgs, _zero, _zero_changes),
    "ch5_deepspeed_pipeline": (DeepSpeedPipelineArgs, _pipeline, _pipeline_changes),
    "ch5_deepspeed_moe": (DeepSpeedMoeArgs, _mixture, _mixture_changes),
    "ch5_megatron": (MegatronArgs, megatron_memory.needed, megatron_memory.changes),
}
