"""What Megatron-Core needs of a GPU: parameters, gradients and moments, which is arithmetic, and activations. Pure.

The formulas are those of Megatron-LM's `report_theoretical_memory` (megatron/training/theoretical_memory_usage.py): 18
bytes of each parameter, or 6 and a part of 12 with the distributed optimizer; activations after Korthikanti et al.,
arXiv 2205.05198, table 2, which leaves attention's matrix out, as fused attention does. Two things are more exact here:
a stage's own parameters are counted, and full recomputation, which theirs does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recipes.ch5.megatron_args import MegatronArgs
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


@dataclass(frozen=True)
class MegatronNeeds:
    """Bytes on the rank that has most."""

    certain: float
    """Between two steps."""
    activations: float

    @property
    def needed(self) -> float:
        """Both together: where the gradients of some layers are there, the activations of all may be."""
        return self.certain + self.activations


def needed(args: MegatronArgs, ranks: int) -> MegatronNeeds:
    """What the fullest of `ranks` ranks needs, which the sizes divide."""
    return MegatronNeeds(kept_bytes(args, ranks), activation_bytes(args, ranks))


def activation_bytes(args: MegatronArgs, ranks: int) -> float:
    """Of the first pipeline stage: it keeps the most microbatches until their backward pass."""
    size, tensor, stages = (
        model_size(args.model, args.vocab_size),
        args.tensor_parallel,
        args.pipeline_parallel,
    )
    share = math.ceil(args.batch_size * tensor * stages * args.context_parallel / ranks)
    rows = min(args.microbatch_size or share, share)
    tokens = rows * args.sequence_length / args.context_parallel
    wide = 4 if args.dtype == "float32" else 2
    networks = args.experts_per_token if args.experts else 1
    # The formula's bytes are those of 16-bit numbers.
    # Its 4 of the feed-forward are for one kernel of SiLU and product; here both results are kept, too.
    split = (8 * size.width + 8 * networks * size.ffn_width) * wide / 2
    whole = 10 * size.width * wide / 2  # of norms and sums, which sequence parallelism splits, too
    layer = tokens * (split / tensor + whole / (tensor if args.sequence_parallel else 1))
    kept = tokens * size.width * wide / (tensor if args.sequence_parallel else 1)
    in_flight: float = min(stages, math.ceil(share / rows))
    if args.stages_per_rank > 1:
        in_flight = stages * (1 + (stages - 1) / (stages * args.stages_per_rank))
    layers = size.layers / stages * in_flight
    of_layers = layers * kept + layer if args.activation_checkpointing == "full" else layers * layer
    # The output's input and its logits, rounded, in float32, and without padding, where the first stage is the last.
    # Llama-3-8B took 124.0 GiB on four H200s where this says 123.2, llama_1b recomputed 25.4 on one where it says 26.3.
    logits = (8 + wide) * size.vocab_size
    head = tokens * (4 * size.width + logits) / tensor if stages == 1 else 0.0
    return of_layers + head


def changes(args: MegatronArgs) -> Iterator[tuple[dict[str, Any], int]]:
    """Other arguments and times as many nodes, those first that change least."""
    lean = {"activation_checkpointing": "full", "microbatch_size": 1}
    for less in (
        {"distributed_optimizer": True},
        {"activation_checkpointing": "full"},
        lean,
        {**lean, "distributed_optimizer": True},
    ):
        yield less, 1
    for doublings in range(11):
        for more in ({}, lean):
            for tensor, pipeline in _SPLITS:
                sizes = {
                    "tensor_parallel": max(tensor, args.tensor_parallel),
                    "pipeline_parallel": max(pipeline, args.pipeline_parallel),
                    "distributed_optimizer": True,
                }
                yield {**sizes, **more}, 2**doublings
