"""Arguments of `python -m recipes.ch2.plan`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument
from recipes.lib.model_sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class PlanArgs:
    """What is to be trained on what; zeros and "auto" are for the planner to choose."""

    model: str = argument("llama_8b", "size of the model", tuple(SIZES))
    gpu: str = argument("h200", "kind of GPU: a100, a100_40, h100, h100_pcie, h100_nvl, h200, h200_nvl, b200")
    nodes: int = argument(1, "nodes", minimum=1)
    gpus_per_node: int = argument(8, "GPUs in each", minimum=1)
    network_gb_s: float = argument(
        50.0, "GB/s between nodes, per GPU and direction: 50 is one port of 400 Gb/s for each GPU", above=0
    )
    sequence_length: int = argument(4096, "tokens per sequence", minimum=1)
    batch_size: int = argument(
        0, "sequences per optimizer step over all GPUs; 0: one forward pass of each GPU", minimum=0
    )
    microbatch_size: int = argument(0, "sequences per forward pass on one GPU; 0: what is fastest", minimum=0)
    activation_checkpointing: str = argument(
        "auto", "auto: what is fastest", ("auto", "none", "selective", "full")
    )
    compile: bool = argument(True, "torch.compile each transformer block")
    param_dtype: str = argument(
        "auto", "of kept parameters and moments: auto is float32", ("auto", "bfloat16")
    )
    tensor: int = argument(0, "GPUs that split each layer; 0: what is fastest, within a node", minimum=0)
    pipeline: int = argument(0, "stages of layers; 0: what is fastest", minimum=0)
    dry_run: int = argument(
        0,
        "build the sharded model for so many GPUs without one, and compare its bytes; needs torch",
        minimum=0,
    )
    json: bool = argument(False, "everything as one JSON object")
