"""Arguments of `ch2_pipeline_parallel`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, TrainArgs, argument
from recipes.lib.model_sizes import SIZES
from recipes.lib.pipeline_orders import SCHEDULES, Style


@dataclass(frozen=True, kw_only=True)
class PipelineParallelArgs(TrainArgs):
    """How many ranks share the layers, and who computes what when."""

    microbatch_size: int = argument(1, "sequences of one microbatch", minimum=1)
    schedule: str = argument(
        "1f1b_by_hand",
        "who does what when: written out in the recipe, or one of torch.distributed.pipelining's",
        tuple(SCHEDULES),
    )
    pipeline_parallel: int = argument(
        2, "ranks that share the layers of one copy of the model; 0 is all ranks", minimum=0
    )
    stages_per_rank: int = argument(
        0, "parts of the layers on each rank; 0 is what the schedule is made for, 1 or 2", minimum=0
    )
    microbatches: int = argument(
        0, "in one run of the schedule: fewer than a step has are several runs; 0 is all of them", minimum=0
    )
    picture: bool = argument(True, "draw who did what when in one of the last steps")

    @property
    def style(self) -> Style:
        """What is known of the schedule."""
        return SCHEDULES[self.schedule]

    @property
    def stages_on_each_rank(self) -> int:
        """`stages_per_rank`, or where that is 0 what the schedule is made for."""
        return self.stages_per_rank or self.style.stages_per_rank

    def __post_init__(self) -> None:
        """Refuse what the schedule cannot do. Raises ArgumentError."""
        style, stages = self.style, self.stages_per_rank
        if stages and stages != style.stages_per_rank and not style.any_stages:
            problem = f"schedule={self.schedule} wants {style.stages_per_rank} on each rank"
            others = ", ".join(name for name, other in SCHEDULES.items() if other.any_stages)
            raise ArgumentError("stages_per_rank", stages, f"{problem}; any number: {others}")
        if self.compile and style.splits_backward:
            # A compiled block is one node of the graph, whose backward pass cannot be split; torch only finds
            # whole compiled modules (_check_torch_compile_compatibility) and would compute each twice.
            raise ArgumentError(
                "compile", True, f"schedule={self.schedule} cannot split a compiled backward pass"
            )
        if self.activation_checkpointing == "selective" and style.splits_backward:
            # The kept results are given out once; the weights' half of the backward pass asks again.
            problem = f"schedule={self.schedule} goes backward in two halves and needs them twice; full works"
            raise ArgumentError("activation_checkpointing", "selective", problem)
        if self.pipeline_parallel:
            self.check_layers(self.pipeline_parallel, SIZES[self.model].layers)

    def check_layers(self, ranks: int, layers: int) -> None:
        """Refuse more stages than layers. Raises ArgumentError."""
        each = self.stages_on_each_rank
        if ranks * each > layers:
            problem = f"{ranks * each} stages ({ranks} ranks x {each}) want {ranks * each} layers or more"
            raise ArgumentError(
                "pipeline_parallel", self.pipeline_parallel, f"{problem}; model={self.model} has {layers}"
            )
