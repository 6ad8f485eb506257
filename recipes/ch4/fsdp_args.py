"""Arguments of `ch4_fsdp`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, TrainArgs, argument
from recipes.lib.divisors import check_tensor_and_context
from recipes.lib.model_sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class FsdpArgs(TrainArgs):
    """What fully sharded data parallelism takes beside the rest."""

    strategy: str = argument(
        "full_shard",
        "full_shard frees a layer after its forward pass; shard_grad_op keeps it until its backward pass; "
        "hybrid_shard shards within a group of ranks and replicates over groups",
        ("full_shard", "shard_grad_op", "hybrid_shard"),
    )
    shard_size: int = argument(0, "hybrid_shard: ranks that share one copy; 0 is one node's ranks", minimum=0)
    tensor_parallel: int = argument(1, "ranks that split every layer; FSDP slices what each has", minimum=1)
    context_parallel: int = argument(
        1, "ranks that split every sequence, each with all of it in attention", minimum=1
    )
    param_dtype: str = argument(
        "auto",
        "of kept parameters and moments: auto is float32; bfloat16 halves them and loses small updates",
        ("auto", "bfloat16"),
    )
    reduce_dtype: str = argument(
        "auto",
        "of gradients while ranks sum them: auto is float32; bfloat16 halves the traffic",
        ("auto", "bfloat16"),
    )
    prefetch: int = argument(
        0,
        "layers that are gathered ahead of the one that computes; 0 leaves it to FSDP, about one",
        minimum=0,
    )
    kept: list[str] = argument(
        ["matmul", "attention"],
        "activation_checkpointing=selective: operations whose results are kept, not computed again",
        ("matmul", "attention", "collectives"),
    )
    recomputed_layers: int = argument(
        0,
        "activation_checkpointing=selective or full: layers that recompute, the first so many; 0 is all",
        minimum=0,
    )
    float8: str = argument(
        "none",
        "scaling of float8 numbers in the layers' matrix products: by row, or one for a whole tensor",
        ("none", "rowwise", "tensorwise"),
    )
    cpu_offload: bool = argument(False, "keep parameters and moments in host memory, and update them there")
    optimizer_folder: str = argument(
        "", "folder on each node's own disk (NVMe) for the optimizer's moments; empty: beside the parameters"
    )
    defer_reduction: bool = argument(
        False, "with microbatches, reduce gradients once per step: less traffic, whole gradients in memory"
    )

    def __post_init__(self) -> None:
        """Refuse what would be ignored, and what the model's shape does not allow. Raises ArgumentError."""
        super().__post_init__()
        if self.shard_size and self.strategy != "hybrid_shard":
            raise ArgumentError("shard_size", self.shard_size, "wants strategy=hybrid_shard")
        if self.kept != ["matmul", "attention"] and self.activation_checkpointing != "selective":
            raise ArgumentError("kept", ",".join(self.kept), "wants activation_checkpointing=selective")
        if self.recomputed_layers and self.activation_checkpointing == "none":
            problem = "wants activation_checkpointing=selective or full"
            raise ArgumentError("recomputed_layers", self.recomputed_layers, problem)
        if self.recomputed_layers > SIZES[self.model].layers:
            problem = f"wants at most {SIZES[self.model].layers}, the layers of {self.model}"
            raise ArgumentError("recomputed_layers", self.recomputed_layers, problem)
        if self.float8 != "none" and self.tensor_parallel > 1:
            raise ArgumentError(
                "float8", self.float8, "wants tensor_parallel=1: its products are of whole matrices"
            )
        if self.float8 != "none" and self.sequence_length % 16:
            problem = f"wants sequence_length in multiples of 16, not {self.sequence_length}"
            raise ArgumentError("float8", self.float8, problem)
        tensor, context = self.tensor_parallel, self.context_parallel
        check_tensor_and_context(self.model, tensor, context)
        if self.sequence_length % (tensor * context):
            key = "context_parallel" if self.sequence_length % context else "tensor_parallel"
            length = f"sequence_length={self.sequence_length}"
            problem = f"{tensor * context} ranks share a sequence, and do not divide {length}"
            raise ArgumentError(key, getattr(self, key), problem)

    def check_ranks(self, ranks: int, ranks_per_node: int) -> None:
        """Refuse a grid that so many ranks do not fill. Raises ArgumentError."""
        tensor, context = self.tensor_parallel, self.context_parallel
        together = tensor * context
        shown = f"tensor_parallel={tensor} times context_parallel={context}"
        if ranks % together:
            key = "context_parallel" if tensor == 1 else "tensor_parallel"
            problem = f"{together} ranks share each sequence ({shown}), and do not divide {ranks} ranks"
            raise ArgumentError(key, getattr(self, key), problem)
        slices = ranks // tensor
        if self.strategy == "hybrid_shard":
            copy = self.shard_size or ranks_per_node
            if ranks % copy:
                raise ArgumentError("shard_size", copy, f"wants a divisor of {ranks}, the number of ranks")
            if copy % together:
                raise ArgumentError("shard_size", copy, f"wants a multiple of {shown}")
            slices = copy // tensor
        width = SIZES[self.model].width
        if tensor > 1 and width % slices:
            # FSDP slices the columns of what tensor parallelism has split by rows, and those only evenly.
            which = f"the width {width} of model={self.model}"
            problem = f"leaves {slices} ranks to slice {which}, which they do not divide"
            raise ArgumentError("tensor_parallel", tensor, problem)
