"""What was measured, or where that is missing estimated, in place of physics: the planner's adjustable numbers.

Each says where it comes from. `recipes.ch2.predictions` prints what the planner says beside what was measured, and
which measurements were used here.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MEASURED = "benchmarks/llama_8b_h200_2026-11-21.md"


@dataclass(frozen=True)
class Calibration:
    """Each field's note is its source; fractions are of a GPU's data sheet."""

    workspace_bytes: float = 64 * 2**20
    """Of cuBLAS: 32 MiB on Hopper for each of the two threads that multiply (forward, backward). Every run of MEASURED
    has 64.3 MiB beyond its 16 bytes per parameter at the end of its first step."""
    compiled_backward_f: float = 4.0
    """Arrays [tokens, F] that the compiled backward pass of a feed-forward holds at once under selective recomputation.
    From 4gpu_compiled_selective of MEASURED."""
    context_gib: float = 0.6
    """Of the driver, outside of torch's allocator. Estimate: 0.5 to 0.7 is usual on Hopper; not measured here."""
    nccl_gib: float = 1.0
    """Of NCCL's communicators, outside of the allocator, where there are several GPUs. Estimate; not measured here."""
    fragmentation: float = 0.02
    """Of the allocated memory, lost between blocks with expandable_segments. Estimate; not measured here."""

    matrix_share: float = 0.80
    """Of the data sheet's rate, by a large bf16 product alone: 790 of 989 TFLOP/s (checks/baselines.json, burn H200)."""
    model_share: float = 0.96
    """Of that rate, by the model's own products. Fitted to 1gpu_eager_full_b1, _b2 and 1gpu_compiled_full_b2 of MEASURED.
    """
    attention_forward_share: float = 0.55
    attention_backward_share: float = 0.45
    """Of the data sheet's rate, by cuDNN's causal attention of heads of 128. Estimate after the FlashAttention-3 paper,
    arXiv 2407.08608, figures 5 and 6 (causal: 550 to 640 forward, 430 to 560 backward); not measured here."""
    memory_share: float = 0.85
    """Of the memory's bandwidth, by element-wise kernels. Estimate; not measured here."""
    network_share: float = 0.80
    """Of NVLink's bandwidth, as all-gather and reduce-scatter reach it on large messages: 367 of 450 GB/s on eight H200
    as a ring (checks/baselines.json)."""
    contention: float = 0.06
    """By which a collective that runs beside computation slows it: NCCL's kernels hold some of the multiprocessors.
    Fitted to 2gpu_compiled_none of MEASURED."""
    launch_seconds: float = 0.0
    """Of a step that no GPU work hides. Not seen at these sizes."""


CALIBRATION = Calibration()
