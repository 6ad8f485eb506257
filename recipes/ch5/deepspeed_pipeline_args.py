"""Arguments of `ch5_deepspeed_pipeline`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, TrainArgs, argument
from recipes.lib.divisors import nearest_divisor
from recipes.lib.model_sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class DeepSpeedPipelineArgs(TrainArgs):
    """How many ranks share the layers, and how they are cut."""

    microbatch_size: int = argument(1, "sequences of one microbatch", minimum=1)
    pipeline_parallel: int = argument(
        0, "ranks that share the layers of one copy of the model; 0 is two, or the only one", minimum=0
    )
    partition: str = argument(
        "layers",
        "where DeepSpeed cuts: so that stages have equally many layers, parameters, or entries of the list",
        ("layers", "parameters", "uniform"),
    )
    picture: bool = argument(True, "draw who did what when in one of the last steps")

    def __post_init__(self) -> None:
        """Refuse what a pipeline of DeepSpeed cannot do. Raises ArgumentError."""
        super().__post_init__()
        if self.dtype == "float64":
            problem = "DeepSpeed sums gradients of float32 at most; nearest: float32"
            raise ArgumentError("dtype", "float64", problem)
        layers = SIZES[self.model].layers
        if self.pipeline_parallel > layers:
            problem = f"each stage wants a layer, and model={self.model} has {layers}; nearest: {layers}"
            raise ArgumentError("pipeline_parallel", self.pipeline_parallel, problem)
        if self.compile:
            raise ArgumentError(
                "compile", True, "DeepSpeed's pipeline runs its layers one by one, as they are"
            )
        if self.init_from:
            raise ArgumentError("init_from", self.init_from, "ch5_deepspeed starts from published weights")

    def check_ranks(self, ranks: int, ranks_per_node: int) -> None:
        """Refuse a number of ranks that are no whole pipelines. Raises ArgumentError."""
        if ranks % self.stages(ranks):
            nearest = nearest_divisor(ranks, self.stages(ranks))
            problem = f"wants a divisor of {ranks}, the number of ranks; nearest: {nearest}"
            raise ArgumentError("pipeline_parallel", self.stages(ranks), problem)

    def stages(self, ranks: int) -> int:
        """Of so many ranks, those that share one copy of the model."""
        return self.pipeline_parallel or min(2, ranks)

    @property
    def method(self) -> str:
        """DeepSpeed's word for `partition`."""
        return "type:Layer" if self.partition == "layers" else self.partition
