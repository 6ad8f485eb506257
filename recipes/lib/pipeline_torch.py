"""The schedules of torch.distributed.pipelining behind one call, for torch 2.11 to 2.13.

What torch's classes want differs: one stage or a list, microbatches in multiples of something, stages placed in a loop
or in a V. Its scaling of gradients stays off: the training loop divides by the tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules

from recipes.lib.arguments import ArgumentError, nearest_name
from recipes.lib.pipeline_clock import Clock
from recipes.lib.pipeline_orders import BACKWARD, FORWARD, INPUT, SCHEDULES, WEIGHT, Action, Order, gpipe
from recipes.lib.pipeline_orders import one_forward_one_backward as _1f1b
from recipes.lib.pipeline_stages import Stage


class TorchSchedule:
    """One of torch's schedules over the stages of this rank."""

    def __init__(
        self, name: str, stages: Sequence[Stage], count: int, microbatches: int, hidden: Tensor,
        group: dist.ProcessGroup | None, clock: Clock,
    ) -> None:  # fmt: skip
        """`count` stages in all; `hidden` is what one hands to the next, on the meta device.

        Raises ArgumentError where this torch lacks the schedule or the schedule refuses the microbatches.
        """
        self._stages = {stage.number: stage for stage in stages}
        self._last = self._stages.get(count - 1)
        self._clock = clock
        self._hidden = hidden
        self._loss_sum = self._token_count = torch.zeros((), device=clock.device)
        timed = [_Timed(stage, count, hidden, group, clock) for stage in stages]
        kind = schedule_class(name)
        single = issubclass(kind, schedules.PipelineScheduleSingle)
        try:
            self._schedule = kind(
                timed[0] if single else timed, microbatches, loss_fn=self._loss, scale_grads=False
            )
        except ValueError as error:
            problem = f"schedule={name} on {count} stages: {' '.join(str(error).split())}"
            raise ArgumentError("microbatches", microbatches, problem) from None
        self.order = self._order(name, count, microbatches)

    def run(self, microbatches: Sequence[tuple[Tensor, Tensor]], token_count: Tensor) -> Tensor:
        """Forward and backward of all `microbatches`; gives their summed loss, 0 without the last stage."""
        self._token_count = token_count
        self._loss_sum = torch.zeros((), dtype=self._hidden.dtype, device=token_count.device)
        tokens, targets = (torch.cat(parts) for parts in zip(*microbatches, strict=True))
        given = (tokens,) if 0 in self._stages else ()
        self._clock.start()
        self._schedule.step(*given, target=targets if self._last else None, return_outputs=False)
        return self._loss_sum

    def _loss(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """What torch goes backward from; the head is part of the last stage's forward pass."""
        assert self._last is not None
        with self._clock.measure_more():
            loss = self._last.loss(x_BSD, targets_BS)
            self._loss_sum = self._loss_sum + loss.detach()
            return loss / self._token_count

    def _order(self, name: str, count: int, microbatches: int) -> Order:
        if name == "GPipe":
            return gpipe(count, microbatches)
        if name == "1F1B":
            # Not the schedule's own `pipeline_order`, which is for show alone: up to 2.13 it begins with the last
            # stage's second microbatch (_get_pipeline_order counts up before it appends).
            return _1f1b(count, microbatches)
        order = self._schedule.pipeline_order
        return [_actions(order[rank]) for rank in sorted(order)]


def schedule_class(name: str) -> Any:
    """torch's class. Raises ArgumentError where this torch has none of that name."""
    known = [each for each in SCHEDULES if hasattr(schedules, f"Schedule{each}")]
    if name not in known:
        nearest = nearest_name(name, known) or known[-1]
        problem = f"torch {torch.__version__} has no such schedule; nearest: {nearest}"
        raise ArgumentError("schedule", name, problem)
    return getattr(schedules, f"Schedule{name}")


def _actions(planned: Sequence[Any]) -> list[Action]:
    """Our form of torch's: without pauses, and a pair that may overlap as one after the other, as torch does it."""
    singles = [each for action in planned if action is not None for each in action.sub_actions or (action,)]
    return [
        Action(each.computation_type.value, each.stage_index, each.microbatch_index)
        for each in singles
        if each.computation_type.value in (FORWARD, BACKWARD, INPUT, WEIGHT)
    ]


class _Timed(PipelineStage):
    """A stage as torch wants it, which notes when it computes."""

    def __init__(
        self, stage: Stage, count: int, hidden: Tensor, group: dist.ProcessGroup | None, clock: Clock
    ) -> None:
        hidden = hidden.detach().requires_grad_()
        # Both shapes are given: to find them out, torch would run every stage once more (since 2.12 backward, too).
        tokens = torch.empty(hidden.shape[:2], dtype=torch.long, device="meta")
        super().__init__(
            stage,
            stage.number,
            count,
            clock.device,
            (tokens if stage.is_first else hidden,),
            (hidden,),
            group=group,
        )
        self._clock = clock

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with self._clock.measure(Action(FORWARD, self.stage_index, fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, *args, **options)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        with self._clock.measure(
            Action(BACKWARD if full_backward else INPUT, self.stage_index, bwd_chunk_id)
        ):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._clock.measure(Action(WEIGHT, self.stage_index, bwd_chunk_id)):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 connects neighbouring stages in the first step, also two on one rank, in the corner of a V.
        # gloo cannot send to itself (github.com/pytorch/gloo/issues/344), and they exchange nothing later.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]
