"""One way of training one model, as numbers: what the planner's formulas are about. Pure; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.lib.flops import parameter_count
from recipes.lib.model_sizes import ModelSize

STRATEGIES = ("single", "ddp", "full_shard", "shard_grad_op", "hybrid_shard")
SHARDED = ("full_shard", "shard_grad_op", "hybrid_shard")
ZERO = ("zero0", "zero1", "zero2", "zero3")
"""DeepSpeed's stages: the memory model knows them, the planner, which also says how fast, does not."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What each of `data * tensor * pipeline` GPUs does in one optimizer step."""

    size: ModelSize
    """With its vocabulary."""
    sequence_length: int
    microbatch: int
    """Sequences per forward pass of one share of the batch."""
    microbatches: int = 1
    """Forward passes of one share in an optimizer step."""
    strategy: str = "full_shard"
    data: int = 1
    """Shares of the batch."""
    shard: int = 1
    """GPUs that keep one copy of the parameters together; `data` for full_shard, 1 for single and ddp."""
    tensor: int = 1
    pipeline: int = 1
    checkpointing: str = "none"
    recomputed_layers: int = 0
    """Of a stage, the first so many, as `checkpointing` says; the others keep everything. 0: all."""
    compiled: bool = False
    compute_bytes: int = 2
    """Of one number of the computation."""
    master_bytes: int = 4
    """Of one parameter that the optimizer updates, and of each of its two moments."""
    reduce_bytes: int = 4
    """Of one gradient while ranks sum it."""
    cpu_offload: bool = False
    defer_reduction: bool = False
    fused_loss: bool = True
    """The loss makes its gradients in the forward pass (recipes.lib.fused_loss). Before there was that, the logits of
    long batches were computed twice."""
    bucket_view: bool = True
    """ddp: gradients live in the buckets."""
    optimizer_offloaded: bool = False
    """ZeRO: moments and what they update are not on the GPU."""
    parameters_offloaded: bool = False
    """ZeRO 3: nor are the parts from which layers are gathered."""
    bucket: int = 50_000_000
    """ZeRO: numbers of one message."""

    @property
    def gpus(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def tokens(self) -> int:
        """Of one forward pass on one GPU."""
        return self.microbatch * self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Of one optimizer step, over all GPUs."""
        return self.tokens * self.microbatches * self.data

    @property
    def sharded(self) -> bool:
        return self.strategy in SHARDED

    @property
    def zero(self) -> int:
        """ZeRO's stage; 0 without ZeRO."""
        return int(self.strategy[-1]) if self.strategy in ZERO else 0

    @property
    def residual_bytes(self) -> int:
        """Of one number of the residual stream: under autocast the embedding's output stays in float32."""
        return self.compute_bytes if self.sharded or self.zero else self.master_bytes

    @property
    def name(self) -> str:
        """ "full_shard x 16, tp 2, pp 2"."""
        parts = [f"{self.strategy} x {self.data}"]
        if self.strategy == "single":
            parts = ["one GPU"] if self.gpus == 1 else []
        if self.strategy == "hybrid_shard":
            parts[0] = f"hybrid_shard {self.data // self.shard} x {self.shard}"
        parts += [f"tp {self.tensor}"] if self.tensor > 1 else []
        parts += [f"pp {self.pipeline}"] if self.pipeline > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Stage:
    """The part of the model on one GPU before sharding over `data`: some layers, perhaps the ends."""

    layers: int
    layer: int
    """Parameters of one layer here."""
    table: int
    """Parameters of the input embedding here; 0 on a stage without it."""
    head: int
    """Parameters of the output projection here, with the last norm; 0 where it is tied, or on another stage."""
    vocabulary: int
    """Rows of the output projection that this GPU multiplies; 0 on a stage without it."""
    in_flight: int
    """Microbatches whose activations are kept at once."""

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.table + self.head

    def recomputed(self, work: Workload) -> int:
        """Layers here whose backward pass computes again what `work.checkpointing` does not keep."""
        if work.checkpointing == "none":
            return 0
        return min(work.recomputed_layers or self.layers, self.layers)


def stages(work: Workload) -> list[Stage]:
    """The stages that can be the fullest: the only one, or the first and the last of a pipeline."""
    size, split = work.size, work.tensor
    norms = 2 * size.width
    tables = size.vocab_size * size.width * (1 if size.tied else 2)
    matrices = (parameter_count(size) - tables - size.width) // size.layers - norms
    layer = math.ceil(matrices / split) + norms
    rows = math.ceil(size.vocab_size / split)
    table = rows * size.width
    head = size.width if size.tied else table + size.width
    if work.pipeline == 1:
        return [Stage(size.layers, layer, table, head, rows, 1)]
    layers = math.ceil(size.layers / work.pipeline)
    # 1F1B: the first stage keeps one microbatch for each stage before the first comes back.
    first = Stage(layers, layer, table, 0, 0, min(work.pipeline, work.microbatches))
    last = Stage(layers, layer, table if size.tied else 0, head, rows, 1)
    return [first, last]
