"""Arguments of `ch5_deepspeed_moe`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.ch5.deepspeed_args import check_bucket
from recipes.lib.arguments import ArgumentError, TrainArgs, argument
from recipes.lib.divisors import nearest_divisor


@dataclass(frozen=True, kw_only=True)
class DeepSpeedMoeArgs(TrainArgs):
    """How many experts there are, who has them, and how tokens get to them."""

    experts: int = argument(
        4, "feed-forward networks in each layer, of which a router picks some for every token", minimum=2
    )
    experts_per_token: int = argument(2, "experts that work on a token: 1 or 2", minimum=1)
    expert_parallel: int = argument(
        0, "ranks that have a part of the experts each; 0 is as many as divide ranks and experts", minimum=0
    )
    capacity_factor: float = argument(
        1.25,
        "how many tokens of a microbatch an expert takes: so many times its even share, the rest are dropped",
        above=0,
    )
    drop_tokens: bool = argument(
        True, "false: every expert takes all that come, and all wait for the fullest"
    )
    load_balance: float = argument(
        0.01, "weight of the loss that grows as some experts get more tokens than others", minimum=0
    )
    random_selection: bool = argument(
        False, "draw the second expert by chance, or of one expert per token which tokens a full one drops"
    )
    stage: int = argument(
        2, "ZeRO: what the copies share: 0 nothing, 1 the optimizer's state, 2 gradients as well", minimum=0
    )
    bucket_size: int = argument(
        0,
        "numbers in one collective of gradients, or of parameters; 0: 50 million, or stage 2's largest matrix",
        minimum=0,
    )
    overlap: bool = argument(True, "on GPUs, reduce gradients while the backward pass goes on")

    def __post_init__(self) -> None:
        """Refuse what does not go together, before a rank starts. Raises ArgumentError."""
        super().__post_init__()
        if self.stage > 2:
            problem = "wants 0, 1 or 2: DeepSpeed does not cut the parameters of its MoE layers; nearest: 2"
            raise ArgumentError("stage", self.stage, problem)
        check_bucket(self)
        if self.dtype == "float64":
            problem = "DeepSpeed keeps its parameters in float32; nearest: float32"
            raise ArgumentError("dtype", "float64", problem)
        if self.experts_per_token > 2:
            problem = "wants 1 or 2, which DeepSpeed's MoE layer is made for; nearest: 2"
            raise ArgumentError("experts_per_token", self.experts_per_token, problem)
        if self.expert_parallel and self.experts % self.expert_parallel:
            nearest = nearest_divisor(self.experts, self.expert_parallel)
            problem = f"wants a divisor of experts={self.experts}; nearest: {nearest}"
            raise ArgumentError("expert_parallel", self.expert_parallel, problem)
        if self.compile:
            problem = "wants false: the router asks for numbers in the midst of a layer"
            raise ArgumentError("compile", True, problem)
        if self.activation_checkpointing == "selective":
            problem = "wants none or full: the exchange of tokens is no operation that could be kept"
            raise ArgumentError("activation_checkpointing", "selective", problem)
        if self.activation_checkpointing == "full" and self.random_selection:
            problem = "wants false with activation_checkpointing=full: the second pass would choose others"
            raise ArgumentError("random_selection", True, problem)
        if self.init_from:
            problem = "begins with random weights; ch5_megatron makes experts of published ones"
            raise ArgumentError("init_from", self.init_from, problem)

    def check_ranks(self, ranks: int, ranks_per_node: int) -> None:
        """Refuse ranks over which experts or sequences cannot be spread. Raises ArgumentError."""
        if self.expert_parallel and ranks % self.expert_parallel:
            nearest = nearest_divisor(math.gcd(ranks, self.experts), self.expert_parallel)
            problem = (
                f"wants a divisor of the {ranks} ranks and of experts={self.experts}; nearest: {nearest}"
            )
            raise ArgumentError("expert_parallel", self.expert_parallel, problem)
        least, most = self.batch_size // ranks, math.ceil(self.batch_size / ranks)
        rows = min(self.microbatch_size or most, most)
        if least % rows or most % rows:
            # A rank with fewer sequences fills up with padding. As a microbatch of its own it disturbs nothing; beside
            # sequences its tokens would take their places in the experts, and count as load.
            nearest = nearest_divisor(math.gcd(least, most), rows)
            shares = f"{most}" if least == most else f"{least} or {most}"
            problem = f"wants a divisor of the {shares} sequences that each of {ranks} ranks has; nearest: {nearest}"
            raise ArgumentError("microbatch_size", self.microbatch_size, problem)

    def ranks_with_experts(self, ranks: int) -> int:
        """Of so many ranks, those that together have all experts once."""
        return self.expert_parallel or math.gcd(self.experts, ranks)
