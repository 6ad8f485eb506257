"""Seconds of an optimizer step on one GPU, by part. Pure; no torch.

Arithmetic takes its FLOP over a measured rate; what moves memory its bytes over a part of the memory's bandwidth; a
collective its bytes over the narrowest link. Communication that runs beside computation costs only what sticks out,
and a little for the multiprocessors that it holds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from recipes.lib.calibration import CALIBRATION, Calibration
from recipes.lib.gpus import Gpu
from recipes.lib.layer_memory import chunks
from recipes.lib.workload import Stage, Workload, stages


@dataclass(frozen=True)
class Fabric:
    """What joins the GPUs."""

    gpus_per_node: int
    network_gb_s: float
    """Per GPU and direction, between nodes."""


@dataclass(frozen=True)
class StepTime:
    """Seconds by part; the step is their sum."""

    parts: dict[str, float]
    hidden: float
    """Seconds of communication beside computation; not in the sum."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def predict_step_time(
    work: Workload, gpu: Gpu, fabric: Fabric, calibration: Calibration = CALIBRATION
) -> StepTime:
    """The slowest stage's step."""
    times = [_stage_time(work, stage, gpu, fabric, calibration) for stage in stages(work)]
    return max(times, key=lambda each: each.seconds)


def _stage_time(work: Workload, stage: Stage, gpu: Gpu, fabric: Fabric, calibration: Calibration) -> StepTime:
    rounds = work.microbatches
    products = _product_flop(work, stage) / (gpu.peak * calibration.matrix_share * calibration.model_share)
    attention = _attention_seconds(work, stage, gpu, calibration)
    streamed = gpu.memory_tb_s * 1e12 * calibration.memory_share
    elements = _element_bytes(work, stage) / streamed
    computing = rounds * (products + attention + elements)
    once, per_round = _parameter_bytes(work, stage)
    # With offload the update is the host's: neither its rate nor the copies' is known here.
    update = (once + rounds * per_round) / streamed
    beside, alone = _communication(work, stage, fabric, gpu, calibration)
    hidden = min(beside, 0.9 * computing)  # the first and the last layer's have nothing to hide behind
    # The multiprocessors and the memory's bandwidth that a collective takes depend on its bytes, not on a slow network.
    nearby = dataclasses.replace(fabric, gpus_per_node=work.gpus)
    busy = calibration.contention * min(hidden, _communication(work, stage, nearby, gpu, calibration)[0])
    bubble = (work.pipeline - 1) / rounds * (computing + beside - hidden) if work.pipeline > 1 else 0.0
    parts = {
        "matrix products": rounds * products,
        "attention": rounds * attention,
        "element-wise": rounds * elements,
        "optimizer and casts": update,
        "communication, exposed": alone + beside - hidden,
        "slowed by communication": busy,
        "pipeline bubble": bubble,
    }
    return StepTime({name: seconds for name, seconds in parts.items() if seconds}, hidden)


def _repeated_layers(work: Workload, stage: Stage) -> int:
    """Those whose whole forward pass the backward pass does again."""
    return stage.recomputed(work) if work.checkpointing == "full" else 0


def _product_flop(work: Workload, stage: Stage) -> float:
    """Of one microbatch: 2 FLOP per multiplied parameter and token forward, 4 backward, 2 again where recomputed."""
    norms = 2 * work.size.width
    layers = stage.layers * (stage.layer - norms)
    head = stage.vocabulary * work.size.width
    # Recomputation stops before down_proj: nothing of the layer's backward pass needs its result.
    down = work.size.width * work.size.ffn_width / work.tensor
    again = _repeated_layers(work, stage) * (stage.layer - norms - down)
    head_again = head if chunks(work) > 1 and not work.fused_loss else 0
    return work.tokens * (6.0 * (layers + head) + 2.0 * (again + head_again))


def _attention_seconds(work: Workload, stage: Stage, gpu: Gpu, calibration: Calibration) -> float:
    """The causal half only, which is all that the kernel computes: 2 S A FLOP per token forward, 5 S A backward."""
    width = work.size.heads * work.size.head_dim / work.tensor
    once = work.tokens * work.sequence_length * width
    forward = 2.0 * once * (stage.layers + _repeated_layers(work, stage))
    backward = 5.0 * once * stage.layers
    rates = calibration.attention_forward_share, calibration.attention_backward_share
    return forward / (rates[0] * gpu.peak) + backward / (rates[1] * gpu.peak)


def _element_bytes(work: Workload, stage: Stage) -> float:
    """Read and written by what is neither a product nor attention, of one microbatch.

    Counted over the model's code in arrays of [tokens, D] (d), of query and key heads (h) and of [tokens, F] (f), in
    numbers of `compute_bytes`. Eager: each norm 2 d; rotation 15 h (it computes in float32, array by array); a residual
    3 d; SiLU 2 f, the product 3 f; about twice of it backward. Compiled: neighbours are one kernel, and arrays between
    them are never written.
    """
    size, number = work.size, work.compute_bytes
    widen = work.residual_bytes / number
    d = work.tokens * size.width * widen / work.tensor
    h = work.tokens * (size.heads + size.kv_heads) * size.head_dim / work.tensor
    f = work.tokens * size.ffn_width / work.tensor
    if work.compiled:
        forward, backward = 8 * d + 2 * h + 3 * f, 12 * d + 3 * h + 6 * f
        head = 6 * work.tokens * stage.vocabulary
    else:
        forward, backward = 10 * d + 15 * h + 5 * f, 20 * d + 24 * h + 11 * f
        head = 18 * work.tokens * stage.vocabulary
    again = {"none": 0.0, "selective": forward * (0.3 if work.compiled else 1.0), "full": forward}
    repeated = stage.recomputed(work) * again[work.checkpointing]
    return number * (stage.layers * (forward + backward) + repeated + head)


def _parameter_bytes(work: Workload, stage: Stage) -> tuple[float, float]:
    """Bytes moved over parameters: once a step (clip and AdamW), and for each microbatch (rounding, summing)."""
    mine = stage.parameters / (work.shard if work.sharded else 1)
    master, number = work.master_bytes, work.compute_bytes
    # The norm reads the gradients, clipping reads and writes them; AdamW reads four arrays and writes three.
    once = mine * master * (3 + 7)
    if not work.sharded:
        return once, stage.parameters * ((master + number) + (number + 2 * master)) * (number != master)
    gathers = 1 if work.strategy == "shard_grad_op" else 2
    rounding = mine * (master + number) * gathers
    # Copied out of the buffer that was gathered into; copied into the one that is summed; the sum of shards written.
    copies = stage.parameters * (2 * number * gathers * (work.shard > 1) + number + work.reduce_bytes)
    # A sum over one rank is still scaled and copied.
    copies += 4 * stage.parameters * work.reduce_bytes * (work.shard == 1)
    return once, rounding + copies


def _communication(
    work: Workload, stage: Stage, fabric: Fabric, gpu: Gpu, calibration: Calibration
) -> tuple[float, float]:
    """Seconds of collectives in a step: beside computation, and those that the computation waits for."""
    rounds = work.microbatches
    inner = work.tensor  # tensor parallelism takes neighbours
    alone = beside = 0.0
    if work.tensor > 1:
        # Sequence parallel: gather before and scatter after each of the two halves, forward and backward; a gather
        # again for the gradients of weights. Nothing else can run meanwhile.
        passes = stage.layers * (4 + 4 + 2) + _repeated_layers(work, stage) * 4
        array = work.tokens * work.size.width * work.compute_bytes
        alone += rounds * passes * _ring(array, work.tensor, 1, fabric, gpu, calibration)
    if work.pipeline > 1:
        array = work.tokens * work.size.width * work.compute_bytes / work.tensor
        rate = _rate(work.gpus, fabric, gpu, calibration)
        beside += 2 * rounds * array / rate
    if work.strategy == "ddp" and work.data > 1:
        beside += 2 * _ring(stage.parameters * work.master_bytes, work.data, inner, fabric, gpu, calibration)
    if work.sharded and work.shard > 1:
        gathers = 1 if work.strategy == "shard_grad_op" else 2
        weights = stage.parameters * work.compute_bytes
        sums = stage.parameters * work.reduce_bytes
        summed = 1 if work.defer_reduction else rounds
        beside += rounds * gathers * _ring(weights, work.shard, inner, fabric, gpu, calibration)
        beside += summed * _ring(sums, work.shard, inner, fabric, gpu, calibration)
        # The first gather and the last sum have nothing to hide behind.
        first = (stage.table or stage.layer) * work.compute_bytes
        last = (stage.table or stage.layer) * work.reduce_bytes
        ends = _ring(first, work.shard, inner, fabric, gpu, calibration)
        ends += _ring(last, work.shard, inner, fabric, gpu, calibration)
        beside -= ends
        alone += ends
    copies = work.data // work.shard
    if work.strategy == "hybrid_shard" and copies > 1:
        sums = stage.parameters / work.shard * work.reduce_bytes
        beside += 2 * _ring(sums, copies, inner * work.shard, fabric, gpu, calibration)
    return beside, alone


def _ring(size: float, ranks: int, stride: int, fabric: Fabric, gpu: Gpu, calibration: Calibration) -> float:
    """Seconds to gather, or to sum and scatter, `size` bytes over `ranks` that are `stride` apart."""
    if ranks < 2:
        return 0.0
    return size * (ranks - 1) / ranks / _rate(ranks * stride, fabric, gpu, calibration)


def _rate(span: int, fabric: Fabric, gpu: Gpu, calibration: Calibration) -> float:
    """Bytes per second of a collective over so many neighbouring GPUs: NVLink within a node, else the network."""
    narrow = gpu.nvlink_gb_s if span <= fabric.gpus_per_node else min(fabric.network_gb_s, gpu.nvlink_gb_s)
    return narrow * 1e9 * calibration.network_share
