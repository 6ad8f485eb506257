r"""Pipeline parallelism: every rank holds a part of the layers, and microbatches go through them one after another.

    torchrun --nproc-per-node 2 -m recipes.ch2.pipeline_parallel steps=20
    torchrun --nproc-per-node 2 -m recipes.ch2.pipeline_parallel schedule=ZBVZeroBubble steps=20

A rank sends its output (activations) to the next one and gets back the gradient of it: the smallest messages of all
forms of parallelism, and the only one in which ranks have to wait for one another by design. How long they wait, the
bubble, is a matter of the schedule: who computes what when. GPipe and 1F1B are carried out here with nothing but sends
and receives; torch.distributed.pipelining has these two and better ones. After the last step pipeline.png shows one
step as it should have been and as it was.

With fewer ranks in a pipeline than there are, the rest are copies of it (data parallelism): ranks r, r+d, r+2d, ... are
one pipeline where d is the number of copies. Neighbouring ranks, on one node, thus sum gradients, which are many more
bytes than activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from recipes.ch2.pipeline_parallel_args import PipelineParallelArgs
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.distributed import World, joined, sum_over_ranks
from recipes.lib.layout import Layout
from recipes.lib.model import Transformer
from recipes.lib.optimizer import build_optimizer, mark_copy
from recipes.lib.parallelism import checkpoint_activations, compile_blocks
from recipes.lib.pipeline_clock import Clock
from recipes.lib.pipeline_orders import FORWARD, Action, gpipe, one_forward_one_backward
from recipes.lib.pipeline_report import show_pipeline
from recipes.lib.pipeline_stages import Stage, activations, keep_stages
from recipes.lib.pipeline_torch import TorchSchedule
from recipes.lib.training import Microbatch, Plan, initialize, make_plan, microbatch_rows, recipe_main, train


class ByHand:
    """A schedule carried out with sends and receives, one stage on each rank."""

    def __init__(
        self, name: str, stage: Stage, microbatches: int, hidden: Tensor, layout: Layout, clock: Clock
    ) -> None:
        """`hidden` is what one stage hands to the next, on the meta device."""
        self._stage, self._hidden, self._clock = stage, hidden, clock
        self._group, self._ranks = layout.stage_group, dist.get_process_group_ranks(layout.stage_group)
        write_out = gpipe if name == "gpipe_by_hand" else one_forward_one_backward
        self.order = write_out(len(self._ranks), microbatches)

    def run(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of all `microbatches`; gives their summed loss, 0 but in the last stage."""
        stage = self._stage
        loss_sum = torch.zeros((), dtype=self._hidden.dtype, device=token_count.device)
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # between forward and backward: a schedule's memory
        outgoing: tuple[Tensor, int] | None = None
        self._clock.start()
        for action in self.order[stage.number]:
            incoming = self._exchange(outgoing, self._source(action))
            tokens_BS, targets_BS = microbatches[action.microbatch]
            if action.kind == FORWARD:
                with self._clock.measure(action):
                    input = tokens_BS if incoming is None else incoming.requires_grad_()
                    output = stage(input)
                    if stage.is_last:
                        output = stage.loss(output, targets_BS)
                        loss_sum = loss_sum + output.detach()
                        output = output / token_count
                kept[action.microbatch] = input, output
                outgoing = None if stage.is_last else (output.detach(), stage.number + 1)
            else:
                input, output = kept.pop(action.microbatch)
                with self._clock.measure(action):
                    output.backward(incoming)
                outgoing = None if stage.is_first else (input.grad, stage.number - 1)
        self._exchange(outgoing, None)
        return loss_sum

    def _source(self, action: Action) -> int | None:
        """The stage whose output or gradient `action` waits for."""
        if action.kind == FORWARD:
            return None if self._stage.is_first else self._stage.number - 1
        return None if self._stage.is_last else self._stage.number + 1

    def _exchange(self, outgoing: tuple[Tensor, int] | None, source: int | None) -> Tensor | None:
        """Send what the last action made to a stage, and receive what the next one needs.

        Both in one batch: in 1F1B a rank has an output for the next one just when that one has a gradient for it.
        If each sent first and received then, both would wait for ever: a send may not end before the other side
        receives. Each direction between two ranks has its messages in the order of the microbatches, on both sides.
        """
        batch, incoming = [], None
        if outgoing is not None:
            batch.append(dist.P2POp(dist.isend, outgoing[0], self._ranks[outgoing[1]], self._group))
        if source is not None:
            incoming = torch.empty_like(self._hidden, device=self._clock.device)
            batch.append(dist.P2POp(dist.irecv, incoming, self._ranks[source], self._group))
        for work in dist.batch_isend_irecv(batch) if batch else ():
            work.wait()
        return incoming


@dataclass(frozen=True)
class Pipeline:
    """This rank's stages, and the schedule by which they are computed."""

    model: Transformer
    """With the layers of this rank's stages only."""
    optimizer: torch.optim.Optimizer
    schedule: ByHand | TorchSchedule
    microbatches: int
    """In one run of the schedule."""
    layout: Layout
    clock: Clock
    tied_with: int | None
    """The rank that has the other copy of a tied table."""

    @classmethod
    def build(cls, plan: Plan, args: PipelineParallelArgs) -> Pipeline:
        """This rank's part of the model with its initial weights, and its optimizer.

        Raises ArgumentError for more stages than layers, and for microbatches that the schedule cannot do.
        """
        layout, style, per_rank = plan.layout, args.style, args.stages_on_each_rank
        ranks, rank = dist.get_world_size(layout.stage_group), dist.get_rank(layout.stage_group)
        args.check_layers(ranks, plan.size.layers)
        rows, in_a_step = microbatch_rows(plan.args, layout)
        microbatches = args.microbatches or in_a_step
        if in_a_step % microbatches:
            problem = f"wants a divisor of {in_a_step}, the microbatches of a step for each copy of the model"
            raise ArgumentError("microbatches", microbatches, problem)
        count, numbers = ranks * per_rank, style.stages_of(rank, ranks, per_rank)

        with torch.device("meta"):  # shapes only
            model = Transformer(plan.size)
        checkpoint_activations(model, args.activation_checkpointing)
        if args.compile:
            compile_blocks(model)
        keep_stages(model, numbers, count)
        model.to(plan.precision.master)
        initialize(model, plan)
        tied_with = None
        if plan.size.tied and ranks > 1 and not style.is_v and rank in (0, ranks - 1):
            tied_with = dist.get_global_rank(layout.stage_group, ranks - 1 - rank)
            if rank > 0:
                mark_copy(model.embed_tokens.weight)

        # NCCL makes the group's communicator in its first collective, and for that wants all of its ranks: in a
        # message between two of them, these would wait for the others, who wait for their messages.
        dist.all_reduce(torch.ones(1, device=plan.world.device), group=layout.stage_group)
        clock = Clock(plan.world, layout.stage_group, running=args.picture)
        stages = [Stage(model, number, count, plan.precision) for number in numbers]
        hidden = activations(model, rows, plan.args.sequence_length, plan.precision)
        schedule: ByHand | TorchSchedule
        if style.by_hand:
            schedule = ByHand(args.schedule, stages[0], microbatches, hidden, layout, clock)
        else:
            schedule = TorchSchedule(
                args.schedule, stages, count, microbatches, hidden, layout.stage_group, clock
            )
        return cls(model, build_optimizer(model, args), schedule, microbatches, layout, clock, tied_with)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """One or several runs of the schedule; then gradients are summed over copies of the model."""
        runs = [
            microbatches[n : n + self.microbatches] for n in range(0, len(microbatches), self.microbatches)
        ]
        total = torch.stack([self.schedule.run(run, token_count) for run in runs]).sum()
        if self.layout.data_size > 1:
            # Once for all runs, and not by DDP: the halves of a split backward pass do not call its hooks
            # (github.com/pytorch/pytorch/issues/144530).
            group, parameters = self.layout.data_group, list(self.model.parameters())
            for work in [dist.all_reduce(p.grad, group=group, async_op=True) for p in parameters]:
                work.wait()
        if self.tied_with is not None:
            self._sum_tied_gradients(self.tied_with)
        return sum_over_ranks(total, self.layout.stage_group)  # the last stage's, on all of them

    def _sum_tied_gradients(self, other: int) -> None:
        """Add the gradient that rank `other` has for the tied table to ours, as it adds ours to its own.

        The first stage looks tokens up in the table and the last one multiplies with it. a + b and b + a are the same
        bits, so both copies stay equal.
        """
        ours = self.model.embed_tokens.weight.grad
        theirs = torch.empty_like(ours)
        group = self.layout.stage_group
        exchange = [dist.P2POp(dist.isend, ours, other, group), dist.P2POp(dist.irecv, theirs, other, group)]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        ours += theirs


def make_layout(world: World, args: PipelineParallelArgs) -> Layout:
    """Pipelines of `pipeline_parallel` ranks; their copies are neighbours, and their stages as far apart as possible.

    Raises ArgumentError for a number that does not divide the ranks.
    """
    ranks = args.pipeline_parallel or world.size
    if world.size % ranks:
        raise ArgumentError(
            "pipeline_parallel", ranks, f"wants a divisor of {world.size}, the number of ranks"
        )
    grid = (ranks, world.size // ranks)
    mesh = init_device_mesh(world.device.type, grid, mesh_dim_names=("stage", "data"))
    data, stage = mesh.get_group("data"), mesh.get_group("stage")
    return Layout(mesh.get_local_rank("data"), grid[1], data_group=data, stage_group=stage)


@recipe_main
def main() -> None:
    """Train with a part of the layers on every rank; then draw who did what when."""
    args = parse_or_exit(PipelineParallelArgs)
    with joined(args.device) as world:
        plan = make_plan("ch2_pipeline_parallel", args, world, make_layout(world, args))
        pipeline = Pipeline.build(plan, args)
        train(plan, pipeline)
        if args.picture:
            show_pipeline(pipeline.clock, pipeline.schedule.order, args.schedule, plan.run_directory, world)


if __name__ == "__main__":
    main()
