"""Arguments of `ch2_mfu`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument
from recipes.lib.model_sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class MfuArgs:
    """What is counted and timed."""

    model: str = argument("tiny", "size of the model", tuple(SIZES))
    sequence_length: int = argument(256, "tokens per sequence", minimum=1)
    batch_size: int = argument(2, "sequences per forward pass on each rank", minimum=1)
    activation_checkpointing: str = argument(
        "none",
        "recompute activations: more arithmetic, the same MFU per token",
        ("none", "full", "selective"),
    )
    compile: bool = argument(False, "torch.compile each transformer block")
    matrix_sizes: list[int] = argument(
        [256, 512, 1024],
        "side lengths of the square products that find the matrix rate; a GPU wants up to 8192",
    )
    dtype: str = argument(
        "auto",
        "of the products: auto is bfloat16 on a GPU, float32 on a CPU",
        ("auto", "float32", "bfloat16"),
    )
    trials: int = argument(5, "trials of each measurement; the median counts, the spread is shown", minimum=2)
    budget: float = argument(0.2, "seconds of a trial; short calls are repeated so long", above=0)
    device: str = argument("auto", "auto is the GPU where there is one", ("auto", "cpu", "cuda"))
