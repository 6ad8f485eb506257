"""The time that a rank works itself: what counts, what does not, and from when on it is said."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from recipes.lib import own_time
from recipes.lib.model import Block
from recipes.lib.own_time import KEPT_STEPS, LEAST_STEPS, OwnTime

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still, but for what a test lets pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(own_time.time, "perf_counter", lambda: self.now)


class Layer(Block):
    """A layer whose forward pass takes a second, and which knows what FSDP does: it waits in hooks around it."""

    def __init__(self, clock: Clock) -> None:
        nn.Module.__init__(self)
        self.clock = clock
        # Registered as fully_shard does it, before OwnTime comes.
        self.register_forward_pre_hook(lambda *_: self._wait(), prepend=True)
        self.register_forward_hook(lambda *_: self._wait(), prepend=False)

    def _wait(self) -> None:
        self.clock.now += 50.0

    def forward(self, *_: object) -> torch.Tensor:
        self.clock.now += 1.0
        return torch.zeros(())


def step(own: OwnTime, model: nn.Module, clock: Clock, load: float = 0.25) -> None:
    with own.input():
        clock.now += load
    for layer in model.children():
        layer(torch.zeros(()))
    clock.now += 20.0  # the backward pass, and what is exchanged in it
    with own.update():
        clock.now += 0.125
    own.step_is_over()
    clock.now += 30.0  # agreeing, saving


def test_input_layers_and_update_count_and_waiting_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = nn.ModuleList([Layer(clock), Layer(clock)])
    own = OwnTime(model, CPU)
    for _ in range(LEAST_STEPS + 1):
        assert own.median is None
        step(own, model, clock)
    assert own.median == 0.25 + 2 * 1.0 + 0.125


def test_the_first_step_does_not_count_and_one_slow_one_is_no_slowness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    model = nn.ModuleList([])
    own = OwnTime(model, CPU)
    step(own, model, clock, load=1000.0)
    for number in range(LEAST_STEPS):
        step(own, model, clock, load=1000.0 if number == 1 else 1.0)
    assert own.median == 1.125
    for _ in range(KEPT_STEPS):
        step(own, model, clock, load=2.0)
    assert own.median == 2.125


def test_the_clocks_cost_a_hundredth_of_the_fastest_step_at_most() -> None:
    """A step of 10 ms with the 32 layers of a large model, in CPU time: other processes must not count."""
    own = OwnTime(nn.ModuleList([]), CPU)
    start = time.process_time()
    for _ in range(1000):
        for _ in range(32):
            own._begin()
            own._end()
        own.step_is_over()
    assert (time.process_time() - start) / 1000 < 100e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels by CUDA's events")
def test_on_a_gpu_the_kernels_are_timed_and_the_host_does_not_wait() -> None:
    device = torch.device("cuda")

    class Work(Block):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            for _ in range(
                50
            ):  # few: a queue of some thousand kernels is full, and the host waits for its end
                x = x @ x
            return x

    model, x = Work(), torch.zeros(8192, 8192, device=device)
    own = OwnTime(model, device)
    model(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(x)
    torch.cuda.synchronize()
    alone = time.perf_counter() - start
    for _ in range(LEAST_STEPS + 2):
        start = time.perf_counter()
        model(x)
        own.step_is_over()
        queued = time.perf_counter() - start
        assert queued < alone / 2, "the host waited for the GPU"
    torch.cuda.synchronize()
    own.step_is_over()
    assert own.median == pytest.approx(alone, rel=0.2)
