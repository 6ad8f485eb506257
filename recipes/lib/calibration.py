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
    """Of the data sheet's rate, by a bf16 product alone: 790 of 989 TFLOP/s (burn H200 in checks/baselines.json)."""
    model_share: float = 0.89
    """Of that rate, by the model's own products. Fitted, with the two that say so, to four runs of MEASURED:
    1gpu_eager_full_b1, 1gpu_eager_full_b2, 1gpu_compiled_full_b2, 2gpu_compiled_none."""
    attention_forward_share: float = 0.55
    attention_backward_share: float = 0.45
    """Of the data sheet's rate, by cuDNN's causal attention of heads of 128. Estimate after the FlashAttention-3 paper,
    arXiv 2407.08608, figures 5 and 6 (causal: 550 to 640 forward, 430 to 560 backward); not measured here."""
    memory_share: float = 0.70
    """Of the memory's bandwidth, by element-wise kernels and AdamW. Fitted."""
    network_share: float = 0.80
    """Of NVLink's bandwidth, and of a network's, as large collectives reach it: 367 of 450 GB/s on eight H200 as a ring
    (checks/baselines.json)."""
    contention: float = 1.0
    """Seconds by which a collective at NVLink's speed slows the computation beside it, for each of its own: it takes
    multiprocessors, memory bandwidth and power. Fitted, with 1 as the most that was allowed: beyond it,
    hiding would cost more than waiting."""


CALIBRATION = Calibration()
