"""The JSON configuration of DeepSpeed, composed from a recipe's arguments. Pure, and no torch.

Every key is DeepSpeed's own: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

import math
from typing import Any

from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.lib.planner import model_size

BETAS = (0.9, 0.95)
"""Those of recipes/lib/optimizer.py."""


def deepspeed_config(
    args: DeepSpeedArgs, *, rows: int, microbatches: int, shares: int, bfloat16: bool, on_gpu: bool
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes.

    Each of `shares` ranks computes `microbatches` microbatches of `rows` sequences in a step. Where shares are uneven
    that counts the rows of padding: to DeepSpeed, the three numbers multiply out or it refuses to start.
    """
    config: dict[str, Any] = {
        "train_batch_size": rows * microbatches * shares,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": microbatches,
        # In stage 0 it is the training loop's own clipping, which knows the norm; ZeRO clips its slices itself.
        "gradient_clipping": args.clip_norm if args.stage else 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": args.peak_lr,  # the training loop sets the rate of every step
                "betas": list(BETAS),
                "weight_decay": args.weight_decay,
                **({"torch_adam": True, "fused": True} if args.adam == "torch" else {}),
            },
        },
        "zero_optimization": zero(args, on_gpu, shares),
        "steps_per_print": None,  # the training loop prints
    }
    if bfloat16 and args.stage:
        config["bf16"] = {"enabled": True}
        # DeepSpeed's default sums microbatches and ranks in bfloat16: every addend is rounded to 8 bits.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def zero(args: DeepSpeedArgs, on_gpu: bool, ranks: int) -> dict[str, Any]:
    """The section `zero_optimization`."""
    section: dict[str, Any] = {"stage": args.stage}
    if args.stage:
        section |= {
            "reduce_bucket_size": args.bucket,
            "allgather_bucket_size": args.bucket,
            # A CPU has no streams that could do two things at once.
            "overlap_comm": args.overlap and on_gpu,
        }
    if args.stage == 3:
        section |= {
            "stage3_param_persistence_threshold": args.persistence_threshold,
            "stage3_prefetch_bucket_size": args.bucket,
        }
    for key, device in (
        ("offload_optimizer", args.offload_optimizer),
        ("offload_param", args.offload_parameters),
    ):
        if device != "none":
            # Pinned memory is for copies to a GPU, and cannot be had without one.
            section[key] = {"device": device, "pin_memory": on_gpu}
            if device == "nvme":
                section[key]["nvme_path"] = args.nvme_folder
                if key == "offload_param":
                    # DeepSpeed's 100 million numbers are too few for a rank's part of a large table, and would be
                    # 2 GiB of float32 for the smallest model. A block more, because it aligns what it writes.
                    size = model_size(args.model, args.vocab_size)
                    section[key]["buffer_size"] = math.ceil(size.vocab_size * size.width / ranks) + 2**19
    return section
