r"""DeepSpeed's pipeline: the layers are a list, each rank makes a part of it, and an engine carries out instructions.

    torchrun --nproc-per-node 2 -m recipes.ch5.deepspeed_pipeline steps=20

What chapter 2 writes out by hand is here a `PipelineModule`, which cuts the list into stages, and a schedule of
instructions: LoadMicroBatch, ForwardPass, SendActivation, RecvGrad, BackwardPass, ... DeepSpeed has one schedule, 1F1B.
Its `train_batch` carries it out and updates the parameters; here the update is left out of the schedule, because
clipping, learning rate, checkpoints and the stop at a step boundary are the training loop's, as in every recipe. After
the last step pipeline.png shows one step as it should have been and as it was.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from recipes.ch5.deepspeed_layers import Layer, Loss, as_list, as_model
from recipes.ch5.deepspeed_pipeline_args import DeepSpeedPipelineArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.deepspeed_stack import check_deepspeed, import_deepspeed
from recipes.lib.distributed import World, joined, sum_over_ranks
from recipes.lib.layout import Layout
from recipes.lib.model import Transformer, initial_values
from recipes.lib.optimizer import build_optimizer, mark_copy
from recipes.lib.parallelism import checkpoint_activations
from recipes.lib.pipeline_clock import Clock
from recipes.lib.pipeline_orders import BACKWARD, FORWARD, Action, Order
from recipes.lib.pipeline_report import show_pipeline
from recipes.lib.training import Microbatch, Plan, make_plan, microbatch_rows, recipe_main, train


@dataclass(frozen=True)
class Stages:
    """A pipeline in DeepSpeed's engine."""

    model: Transformer
    """With the layers of this rank's stage only."""
    optimizer: torch.optim.Optimizer
    engine: Any
    loss: Loss
    layout: Layout
    clock: Clock
    schedule: Any
    """DeepSpeed's, without the update."""

    @classmethod
    def build(cls, plan: Plan, args: DeepSpeedPipelineArgs) -> Stages:
        """This rank's stage with its initial weights, its optimizer, and the engine. Raises LaunchError."""
        deepspeed = import_deepspeed("ch5_deepspeed_pipeline", plan.world)
        from deepspeed.runtime.pipe import schedule

        world, layout, size = plan.world, plan.layout, plan.size
        loss = Loss(size, plan.precision)
        with (
            torch.no_grad()
        ):  # it sends a tied table's values around, which autograd would take for a part of the model
            module = deepspeed.pipe.PipelineModule(
                as_list(size, plan.precision, deepspeed.pipe),
                num_stages=args.stages(world.size),
                loss_fn=loss,
                partition_method=args.method,
            )
        module.to(device=world.device, dtype=plan.precision.master)
        model = as_model(module, size)
        # (Those of this stage: the others are not here.)
        checkpoint_activations(_only(model), args.activation_checkpointing)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(initial_values(name, parameter.shape, size.layers, args.seed, world.device))
        stage, stages = module.stage_id, module.num_stages
        if stage == stages - 1:
            loss.weight = (model.embed_tokens if size.tied else model.lm_head).weight
            if size.tied and stages > 1:
                mark_copy(model.embed_tokens.weight)
        rows, microbatches = microbatch_rows(args, layout)
        optimizer = build_optimizer(model, args)
        engine, *_ = deepspeed.initialize(
            args=types.SimpleNamespace(device_rank=world.device.index or 0),
            model=module,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": rows,
                "gradient_accumulation_steps": microbatches,
                "train_batch_size": rows * microbatches * layout.data_size,
                "steps_per_print": None,
            },
        )
        clock = Clock(world, layout.stage_group, running=args.picture)
        watch(engine, schedule, clock)
        return cls(
            model,
            optimizer,
            engine,
            loss,
            layout,
            clock,
            without_update(schedule)(microbatches, stages, stage),
        )

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Carry out the schedule, which ends with sums over copies of the model and of a tied table."""
        engine = self.engine
        # It divides by the number of microbatches and of copies: right for losses that are means over equal shares.
        self.loss.scale = len(microbatches) * self.layout.data_size / token_count
        # In one format on every stage, for their sum.
        self.loss.total = self.optimizer.param_groups[0]["params"][0].detach().new_zeros(())
        engine.set_dataiterator(iter(microbatches))
        engine.total_loss, engine._compute_loss = None, True
        self.clock.start()
        engine._exec_schedule(self.schedule)
        return sum_over_ranks(self.loss.total, self.layout.stage_group)  # the last stage's, on all of them


def without_update(schedule: Any) -> type[Any]:
    """DeepSpeed's 1F1B, which leaves the update to the training loop."""

    class Steps(schedule.TrainSchedule):
        def steps(self) -> Any:
            for instructions in super().steps():
                yield [each for each in instructions if not isinstance(each, schedule.OptimizerStep)]

    return Steps


def watch(engine: Any, schedule: Any, clock: Clock) -> None:
    """Have the engine measure each pass. Its instructions name buffers; in 1F1B the microbatches come in order."""
    own = dict(engine._INSTRUCTION_MAP)

    def timed(kind: str, carry_out: Any) -> Any:
        numbers = itertools.count()

        def measured(self: Any, buffer_id: int) -> None:
            with clock.measure(Action(kind, engine.stage_id, next(numbers) % engine.micro_batches)):
                carry_out(self, buffer_id)

        return measured

    for kind, instruction in ((FORWARD, schedule.ForwardPass), (BACKWARD, schedule.BackwardPass)):
        own[instruction] = timed(kind, own[instruction])
    engine._INSTRUCTION_MAP = own


def order_of(schedule: Any, microbatches: int, stages: int) -> Order:
    """Who computes what in which order, by DeepSpeed's own schedule."""
    order = []
    for stage in range(stages):
        counts = {FORWARD: itertools.count(), BACKWARD: itertools.count()}
        kinds = {schedule.ForwardPass: FORWARD, schedule.BackwardPass: BACKWARD}
        passes = [
            kinds[type(each)]
            for instructions in schedule.TrainSchedule(microbatches, stages, stage).steps()
            for each in instructions
            if type(each) in kinds
        ]
        order.append([Action(kind, stage, next(counts[kind])) for kind in passes])
    return order


def make_layout(world: World, args: DeepSpeedPipelineArgs) -> Layout:
    """DeepSpeed's own: copies of the model are neighbours, stages as far apart as possible. Raises ArgumentError."""
    args.check_ranks(world.size, world.local_size)
    stages = args.stages(world.size)
    grid = (stages, world.size // stages)
    mesh = init_device_mesh(world.device.type, grid, mesh_dim_names=("stage", "data"))
    data, stage = mesh.get_group("data"), mesh.get_group("stage")
    return Layout(mesh.get_local_rank("data"), grid[1], data_group=data, stage_group=stage)


def _only(model: Transformer) -> Any:
    return types.SimpleNamespace(layers=[part for part in model.modules() if isinstance(part, Layer)])


@recipe_main
def main() -> None:
    """Train with a part of the layers on every rank; then draw who did what when."""
    args = parse_or_exit(DeepSpeedPipelineArgs)
    check_deepspeed("ch5_deepspeed_pipeline")
    with joined(args.device) as world:
        plan = make_plan("ch5_deepspeed_pipeline", args, world, make_layout(world, args))
        pipeline = Stages.build(plan, args)
        train(plan, pipeline)
        if args.picture:
            from deepspeed.runtime.pipe import schedule

            microbatches, stages = pipeline.engine.micro_batches, dist.get_world_size(plan.layout.stage_group)
            order = order_of(schedule, microbatches, stages)
            show_pipeline(pipeline.clock, order, "1F1B", plan.run_directory, world)


if __name__ == "__main__":
    main()
