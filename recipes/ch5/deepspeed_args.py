"""Arguments of `ch5_deepspeed`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from recipes.lib.arguments import ArgumentError, TrainArgs, argument
from recipes.lib.flops import largest_matrix
from recipes.lib.planner import model_size

LEAST_BUCKET, USUAL_BUCKET = 1000, 50_000_000


@dataclass(frozen=True, kw_only=True)
class DeepSpeedArgs(TrainArgs):
    """What ZeRO takes beside the rest."""

    stage: int = argument(
        2,
        "what the ranks share: 0 nothing, 1 the optimizer's state, 2 gradients as well, 3 parameters as well",
        minimum=0,
        maximum=3,
    )
    offload_optimizer: str = argument(
        "none",
        "where parameters in float32 and moments live, and the host updates them: cpu is its memory, nvme a disk",
        ("none", "cpu", "nvme"),
    )
    offload_parameters: str = argument(
        "none",
        "stage 3: where the slices live that the layers are gathered from",
        ("none", "cpu", "nvme"),
    )
    nvme_folder: str = argument("", "offload to nvme: a folder on each node's own disk")
    adam: str = argument(
        "torch",
        "whose AdamW: torch's, or DeepSpeed's, which is compiled with ninja and a compiler at first use",
        ("torch", "deepspeed"),
    )
    bucket_size: int = argument(
        0,
        "numbers in one collective of gradients, or of parameters; 0: 50 million, or stage 2's largest matrix",
        minimum=0,
    )
    overlap: bool = argument(True, "on GPUs, reduce gradients while the backward pass goes on")
    persistence_threshold: int = argument(
        100_000, "stage 3: parameters of fewer numbers stay whole on every rank", minimum=0
    )

    def __post_init__(self) -> None:
        """Refuse what does not go together, before a rank starts. Raises ArgumentError."""
        super().__post_init__()
        if self.dtype == "float64":
            raise ArgumentError(
                "dtype", "float64", "DeepSpeed keeps its parameters in float32; nearest: float32"
            )
        if self.offload_optimizer != "none" and self.stage == 0:
            problem = "wants stage=1, 2 or 3: in stage 0 there is no ZeRO that could move it"
            raise ArgumentError("offload_optimizer", self.offload_optimizer, problem)
        if self.offload_parameters != "none" and self.stage != 3:
            problem = f"wants stage=3: in stage {self.stage} every rank computes with whole parameters"
            raise ArgumentError("offload_parameters", self.offload_parameters, problem)
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ArgumentError("offload_optimizer", "nvme", f"wants stage=3; stage {self.stage} takes cpu")
        if self.offload_parameters != "none" and self.offload_optimizer == "none":
            problem = "wants offload_optimizer, too: what it keeps is four times as large"
            raise ArgumentError("offload_parameters", self.offload_parameters, problem)
        if self.on_disk and not self.nvme_folder:
            raise ArgumentError(
                "nvme_folder", "", "wants a folder on each node's own disk, for offload to nvme"
            )
        if self.on_disk and not Path(self.nvme_folder).is_absolute():
            raise ArgumentError(
                "nvme_folder", self.nvme_folder, "wants an absolute path, the same on every node"
            )
        if self.on_disk and self.adam != "deepspeed":
            problem = (
                "wants deepspeed where the moments are on a disk: what is brought back, its AdamW updates"
            )
            raise ArgumentError("adam", self.adam, problem)
        if self.on_disk and self.async_save:
            problem = (
                "wants false with offload to nvme: a copy in host memory is what the disk is there to avoid"
            )
            raise ArgumentError("async_save", True, problem)
        if self.nvme_folder and not self.on_disk:
            raise ArgumentError("nvme_folder", self.nvme_folder, "wants offload_optimizer=nvme")
        if self.compile and self.stage == 3:
            problem = "ZeRO 3 gathers parameters by hooks inside of what would be compiled; stage 2 compiles"
            raise ArgumentError("compile", True, problem)
        if self.activation_checkpointing == "selective" and self.stage == 3:
            # torch counts the operations of a layer's two forward passes: the second one gathers other parameters.
            problem = "ZeRO 3 gathers parameters inside of what is computed again; full works, and stage 2"
            raise ArgumentError("activation_checkpointing", "selective", problem)
        check_bucket(self)
        standard = DeepSpeedArgs.__dataclass_fields__["persistence_threshold"].default
        if self.persistence_threshold != standard and self.stage != 3:
            raise ArgumentError("persistence_threshold", self.persistence_threshold, "wants stage=3")

    @property
    def bucket(self) -> int:
        """Numbers in one collective.

        Stage 2 sums a gradient larger than its bucket in place, on a stream of its own, and frees it at once: the
        backward pass writes over it. With 50 million an 8B model on four H200s had a gradient norm of a million where
        stage 3 had 33, and learned (github.com/deepspeedai/DeepSpeed/issues/5347, 4298, 5523).
        """
        return self.bucket_size or max(USUAL_BUCKET, _least_bucket(self))

    @property
    def on_disk(self) -> bool:
        """Whether anything is moved to a disk."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)


class Bucketed(Protocol):
    """Arguments of a recipe that sums gradients in buckets."""

    model: str
    vocab_size: int
    stage: int
    overlap: bool
    bucket_size: int


def _least_bucket(args: Bucketed) -> int:
    return largest_matrix(model_size(args.model, args.vocab_size)) if args.stage == 2 else 0


def check_bucket(args: Bucketed) -> None:
    """Refuse a bucket that stage 2 would train wrongly with. Raises ArgumentError."""
    if 0 < args.bucket_size < LEAST_BUCKET:
        raise ArgumentError("bucket_size", args.bucket_size, f"wants 0, or at least {LEAST_BUCKET}")
    least = _least_bucket(args)
    if args.overlap and 0 < args.bucket_size < least:
        problem = (
            f"wants at least {least:,}, the largest matrix, or overlap=false: DeepSpeed gives back the memory of a "
            "larger gradient while it is being summed"
        )
        raise ArgumentError("bucket_size", args.bucket_size, problem)
