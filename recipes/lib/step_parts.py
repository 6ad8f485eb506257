"""Names a training step's parts for the profiler: ranges around input, kinds of modules, gradients, optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from recipes.lib.model import Attention, Block, FeedForward, Head
from recipes.lib.own_time import OwnTime
from recipes.lib.step_trace import PREFIX
from recipes.lib.training import Microbatch, Technique

KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Embedding, "embedding"),
    (Attention, "attention"),
    (FeedForward, "feed-forward"),
    (nn.RMSNorm, "norms"),
    (Head, "head and loss"),
)


class NamedParts(OwnTime):
    """A technique whose steps appear in a trace by part. It is a technique itself, and the loop's own-time clock."""

    def __init__(
        self, technique: Technique, device: torch.device, *, compiled: bool, input_delay: float = 0.0
    ) -> None:
        """`input_delay` is how many seconds the input pretends to take longer."""
        super().__init__(technique.model, device)
        self.model, self.optimizer = technique.model, technique.optimizer
        self._technique, self._delay = technique, input_delay
        self._open: list[record_function] = []
        for module in technique.model.modules():
            # torch.compile sees a layer whole, and nothing may break its graph.
            kind = "whole layers" if isinstance(module, Block) and compiled else _kind(module)
            inside = compiled and not isinstance(module, Block) and _is_in_block(module, technique.model)
            if kind is not None and not inside:
                self._name(module, kind)
        self._name(technique.model, "forward")

    @contextmanager
    def input(self) -> Iterator[None]:
        with record_function(PREFIX + "input"):
            time.sleep(self._delay)
            yield

    @contextmanager
    def update(self) -> Iterator[None]:
        with record_function(PREFIX + "optimizer"):
            yield

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """The technique's own."""
        with record_function(PREFIX + "gradients"):
            return self._technique.accumulate_gradients(microbatches, token_count)

    def _name(self, module: nn.Module, kind: str) -> None:
        def enter(*_: Any) -> None:
            self._open.append(record_function(PREFIX + kind))
            self._open[-1].__enter__()

        def leave(*_: Any) -> None:
            self._open.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        # Also when the recomputation ends a module early by an exception of its own: no range stays open.
        module.register_forward_hook(leave, always_call=True)


def _kind(module: nn.Module) -> str | None:
    # isinstance: fully_shard gives a module a subclass of its class.
    return next((kind for cls, kind in KINDS if isinstance(module, cls)), None)


def _is_in_block(module: nn.Module, model: nn.Module) -> bool:
    blocks = (each for each in model.modules() if isinstance(each, Block))
    return any(module is inner for block in blocks for inner in block.modules())
