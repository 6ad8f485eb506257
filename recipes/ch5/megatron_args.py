"""Arguments of `ch5_megatron`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from recipes.lib.arguments import ArgumentError, TrainArgs, argument
from recipes.lib.divisors import check_tensor_and_context, nearest_divisor
from recipes.lib.model_sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class MegatronArgs(TrainArgs):
    """How many ranks split what; what is left over are copies, which share out the batch."""

    microbatch_size: int = argument(
        1, "sequences of one microbatch; 0 is a copy's whole share at once", minimum=0
    )
    async_save: bool = argument(
        False, "Megatron-Core writes its checkpoints while the steps wait: false only"
    )
    tensor_parallel: int = argument(1, "ranks that split every matrix", minimum=1)
    sequence_parallel: bool = argument(
        True, "these ranks split the sequence, too, where tokens are worked on one by one (norms, sums)"
    )
    pipeline_parallel: int = argument(1, "ranks that have a part of the layers each", minimum=1)
    stages_per_rank: int = argument(
        1, "virtual stages: parts of the layers on each of these ranks; more of them wait less", minimum=1
    )
    context_parallel: int = argument(
        1, "ranks that split every sequence, each with all of it in attention", minimum=1
    )
    experts: int = argument(
        0,
        "feed-forward networks in each layer, of which a router picks some for every token; 0 is dense",
        minimum=0,
    )
    experts_per_token: int = argument(2, "experts that work on a token", minimum=1)
    expert_parallel: int = argument(1, "ranks that have a part of the experts each", minimum=1)
    distributed_optimizer: bool = argument(
        True,
        "each copy keeps a part of the moments (and of bfloat16's float32 parameters); false: all of them",
    )
    overlap: bool = argument(False, "sum gradients over the copies during the backward pass, not after it")

    def __post_init__(self) -> None:
        """Refuse what would be ignored, and what the model's shape does not allow. Raises ArgumentError."""
        super().__post_init__()
        self._check_unsupported()
        tensor, context = self.tensor_parallel, self.context_parallel
        check_tensor_and_context(self.model, tensor, context)
        # Under context parallelism each rank has two pieces, an early and a late one.
        pieces = (2 * context if context > 1 else 1) * (tensor if self.sequence_parallel else 1)
        if self.sequence_length % pieces:
            key = "context_parallel" if context > 1 else "tensor_parallel"
            length = f"sequence_length={self.sequence_length}"
            nearest = max(1, round(self.sequence_length / pieces)) * pieces
            problem = (
                f"cuts a sequence into {pieces} pieces, which do not divide {length}; nearest: {nearest}"
            )
            raise ArgumentError(key, getattr(self, key), problem)
        self.check_layers(SIZES[self.model].layers)
        self._check_experts()

    def _check_unsupported(self) -> None:
        """Refuse what every other recipe takes and this one does not. Raises ArgumentError."""
        if self.async_save:
            raise ArgumentError("async_save", True, "wants false: Megatron-Core writes while the steps wait")
        if self.compile:
            raise ArgumentError("compile", True, "wants false: Megatron-Core compiles what it can itself")
        if self.dtype == "float64":
            raise ArgumentError("dtype", "float64", "wants float32 or bfloat16: its optimizer has no other")
        if self.activation_checkpointing == "selective":
            problem = (
                "wants none or full: what others keep selectively, attention's result, it computes again"
            )
            raise ArgumentError("activation_checkpointing", "selective", problem)

    def check_layers(self, layers: int) -> None:
        """Refuse stages that do not divide the layers. Raises ArgumentError."""
        ranks, each = self.pipeline_parallel, self.stages_per_rank
        if ranks == 1 and each > 1:
            raise ArgumentError("stages_per_rank", each, "wants pipeline_parallel=2 or more")
        if layers % (ranks * each):
            stages = f"{ranks * each} stages ({ranks} ranks x {each})"
            if layers % ranks == 0:
                key, nearest = "stages_per_rank", f"{nearest_divisor(layers // ranks, each)}"
            else:
                key, nearest = "pipeline_parallel", f"{nearest_divisor(layers, ranks)}"
                nearest += " with stages_per_rank=1" if each > 1 else ""
            problem = f"{stages} do not divide the {layers} layers of model={self.model}; nearest: {nearest}"
            raise ArgumentError(key, getattr(self, key), problem)

    def _check_experts(self) -> None:
        experts, ranks = self.experts, self.expert_parallel
        if experts == 0 and ranks > 1:
            raise ArgumentError(
                "expert_parallel", ranks, "wants experts=2 or more; experts=0 is a dense model"
            )
        if experts % ranks:
            nearest = nearest_divisor(experts, ranks)
            problem = f"wants a divisor of experts={experts}; nearest: {nearest}"
            raise ArgumentError("expert_parallel", ranks, problem)
        if experts and self.experts_per_token > experts:
            raise ArgumentError(
                "experts_per_token", self.experts_per_token, f"wants at most experts={experts}"
            )
        if experts and self.tensor_parallel > 1 and not self.sequence_parallel:
            problem = f"wants true with experts={experts} and tensor_parallel={self.tensor_parallel}"
            raise ArgumentError("sequence_parallel", False, problem)

    def check_ranks(self, ranks: int, ranks_per_node: int) -> None:
        """Refuse a grid that so many ranks do not fill. Raises ArgumentError."""
        sizes = {
            "tensor_parallel": self.tensor_parallel,
            "context_parallel": self.context_parallel,
            "pipeline_parallel": self.pipeline_parallel,
        }
        one_copy = math.prod(sizes.values())
        if ranks % one_copy:
            shown = " times ".join(f"{key}={number}" for key, number in sizes.items() if number > 1)
            largest = max(sizes, key=lambda key: sizes[key])
            takes = f"one copy of the model takes {one_copy} ranks ({shown})"
            nearest = self._nearest(largest, one_copy, ranks)
            problem = f"{takes}, which do not divide {ranks} rank{'s' * (ranks > 1)}; nearest: {nearest}"
            raise ArgumentError(largest, sizes[largest], problem)
        copies = ranks // one_copy
        if (copies * self.context_parallel) % self.expert_parallel:
            has = f"{copies} cop{'y' if copies == 1 else 'ies'} of the rest"
            has += f" times context_parallel={self.context_parallel}" if self.context_parallel > 1 else ""
            nearest = nearest_divisor(
                math.gcd(copies * self.context_parallel, self.experts), self.expert_parallel
            )
            problem = f"{ranks} ranks have {has}, over which experts are spread: wants a divisor; nearest: {nearest}"
            raise ArgumentError("expert_parallel", self.expert_parallel, problem)
        share = math.ceil(self.batch_size / copies)
        microbatches = math.ceil(share / (self.microbatch_size or share))
        if self.stages_per_rank > 1 and microbatches % self.pipeline_parallel:
            problem = (
                f"virtual stages go round in groups of pipeline_parallel={self.pipeline_parallel} microbatches, and a "
                f"copy has {microbatches} (batch_size={self.batch_size} over {copies} copies, microbatch_size="
                f"{self.microbatch_size})"
            )
            raise ArgumentError("stages_per_rank", self.stages_per_rank, problem)

    def _nearest(self, key: str, one_copy: int, ranks: int) -> str:
        """The value of `key`, nearest to its own, with which whole copies fill so many ranks; or enough ranks."""
        own: int = getattr(self, key)
        others = one_copy // own
        for value in sorted(range(1, ranks + 1), key=lambda value: (abs(value - own), value)):
            if ranks % (others * value) == 0:
                try:
                    replace(self, **{key: value})
                except ArgumentError:
                    continue  # the model's shape does not allow it
                return str(value)
        return f"{math.ceil(ranks / one_copy) * one_copy} ranks"
