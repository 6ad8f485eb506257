"""What limits a step, from traces made by hand: every bottleneck can be named, and the parts add up to the step."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.lib.roofline import Roof, product_intensity
from recipes.lib.step_trace import CATEGORIES, PREFIX, bottleneck, memory_of, times_of

Event = dict[str, Any]
LARGE = [[4096, 4096], [4096, 4096]]
"""Two matrices whose product is limited by arithmetic on every device."""
RIDGE = 10.0


def span(name: str, begin: float, end: float) -> Event:
    return {
        "ph": "X", "cat": "user_annotation", "name": PREFIX + name, "ts": begin, "dur": end - begin, "tid": 1,
        "args": {},
    }  # fmt: skip


def op(name: str, begin: float, end: float, dims: list[list[int]] | None = None, number: int = 0) -> Event:
    args = {"Input Dims": dims or [[8, 8]], "Input type": ["float"], "External id": number}
    return {
        "ph": "X", "cat": "cpu_op", "name": name, "ts": begin, "dur": end - begin, "tid": 1, "args": args
    }  # fmt: skip


def gloo(begin: float, end: float) -> Event:
    return {
        "ph": "X", "cat": "user_annotation", "name": "gloo:all_reduce", "ts": begin, "dur": end - begin, "tid": 9,
        "args": {},
    }  # fmt: skip


def allocated(at: float, total: int, device: int = 0) -> Event:
    args = {"Total Allocated": total, "Device Type": device}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": at, "args": args}


def kernel(
    name: str, launched: float, begin: float, end: float, number: int, operation: int = 0
) -> list[Event]:
    """A kernel and its launch on the host."""
    args = {"correlation": number, "External id": operation}
    launch = {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": launched,
        "dur": 1,
        "tid": 1,
    }
    run = {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "tid": 7, "args": args}
    return [{**launch, "args": {"correlation": number}}, run]


def step(*inside: Event, end: float = 1000) -> list[Event]:
    """A step of 1 ms with its ranges."""
    return [
        span("step", 0, end),
        span("input", 0, 100),
        span("gradients", 100, 800),
        span("forward", 100, 400),
        span("attention", 150, 250),
        span("optimizer", 850, end),
        *inside,
    ]


CASES: dict[str, list[Event]] = {
    "compute": step(op("aten::mm", 150, 700, LARGE)),
    "memory": step(op("aten::mul", 150, 700)),
    "network": step(op("aten::mm", 150, 300, LARGE), gloo(200, 800)),
    "input": [
        span("step", 0, 1000), span("input", 0, 600), span("gradients", 600, 900), op("aten::copy_", 0, 300),
        op("aten::mm", 600, 900, LARGE),
    ],
    "host": step(op("aten::mul", 150, 200)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_bottleneck_can_be_named(name: str) -> None:
    times = times_of(CASES[name], RIDGE)
    assert bottleneck([{each: times.category(each) for each in CATEGORIES}]) == (name, 0)
    assert times.seconds == pytest.approx(1e-3), "every moment belongs to one part"


def test_a_small_product_is_limited_by_memory_and_a_large_one_by_arithmetic() -> None:
    small = times_of(step(op("aten::mm", 150, 700, [[1, 4096], [4096, 4096]])), RIDGE)
    assert (small.category("compute"), small.category("memory")) == (0, pytest.approx(550e-6))
    assert Roof(1e15, 4e12).limit(249) == "memory"
    assert Roof(1e15, 4e12).limit(250) == "compute"


def test_time_goes_to_the_part_in_which_it_was_spent() -> None:
    events = step(
        op("aten::mm", 160, 240, LARGE),  # in attention, in forward
        op("aten::mm", 300, 350, LARGE),  # in forward
        op("autograd::engine::evaluate_function: MmBackward0", 400, 800),  # waits, and holds the next
        op("aten::mm", 500, 600, LARGE),
        op("aten::_fused_adamw_", 900, 950),
        span("feed-forward", 610, 700),  # a module outside of the forward pass: recomputed
        op("aten::mul", 620, 660),
    )
    times = times_of(events, RIDGE)
    in_parts = {part: round(seconds * 1e6) for part, seconds in times.parts()}
    assert in_parts == {
        "input": 100,
        "forward: attention": 80,
        "forward: rest": 50,
        "backward": 100,
        "backward: recomputation": 40,
        "optimizer": 50,
        "host": 580,
    }


def test_what_is_hidden_behind_arithmetic_costs_no_time() -> None:
    times = times_of(step(op("aten::mm", 150, 700, LARGE), gloo(200, 750), gloo(600, 760)), RIDGE)
    assert times.exchange == pytest.approx(560e-6)
    assert times.category("network") == pytest.approx(60e-6)


def test_a_gpu_s_step_is_what_its_kernels_take_and_each_belongs_to_where_it_was_launched() -> None:
    """The host is 2 ms ahead: by the host's clock, nothing would belong together."""
    one = [
        *step(), op("aten::mm", 150, 160, LARGE, number=1), *kernel("nvjet_gemm", 155, 2000, 2600, 1, 1),
        op("aten::mul", 500, 510, number=2), *kernel("elementwise", 505, 2600, 2700, 2, 2),
        *kernel("ncclDevKernel_AllReduce", 700, 2650, 3000, 3),
    ]  # fmt: skip
    two = [
        {
            **event,
            "ts": event["ts"] + 1000,
            "args": {name: value + 10 for name, value in event["args"].items() if isinstance(value, int)}
            | {name: value for name, value in event["args"].items() if not isinstance(value, int)},
        }
        for event in one
    ]  # fmt: skip
    times = times_of([*one, *two], RIDGE)
    in_parts = {key: round(seconds * 1e6) for key, seconds in times.by_part.items()}
    # From the end of the first step's last kernel (3000) to that of the second's (4000).
    assert in_parts == {
        ("forward: attention", "compute"): 600,
        ("backward", "memory"): 100,
        ("exchange", "network"): 300,
    }
    assert times.steps == 1


def test_the_rank_that_waits_least_decides() -> None:
    waiting = {"compute": 0.1, "network": 0.5}
    slow = {"compute": 0.1, "input": 0.45, "network": 0.05}
    assert bottleneck([waiting, slow, waiting]) == ("input", 1)


def test_memory_is_counted_from_the_step_s_beginning_and_by_device() -> None:
    events = step(
        allocated(-5, 900),
        allocated(10, 1000),
        allocated(200, 5000),
        allocated(500, 7000),
        allocated(900, 950),
    )
    memory = memory_of([*events, allocated(300, 10**9, device=1)], cuda=False)
    assert dict(memory.peaks) == {"input": 100, "forward: attention": 4100, "backward": 6100, "optimizer": 50}
    assert memory.curve[-1] == (pytest.approx(900e-6), 50)


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole step"):
        times_of([op("aten::mm", 0, 5)], RIDGE)


@pytest.mark.parametrize(
    ("name", "dims", "intensity"),
    [
        ("aten::mm", [[2, 3], [3, 5]], 60 / (4 * 31)),
        ("aten::addmm", [[5], [2, 3], [3, 5]], 60 / (4 * 31)),
        ("aten::bmm", [[7, 2, 3], [7, 3, 5]], 60 / (4 * 31)),
        ("aten::mul", [[2, 3], [2, 3]], None),
        ("aten::mm", [], None),
    ],
)
def test_the_intensity_of_a_product(name: str, dims: list[list[int]], intensity: float | None) -> None:
    assert product_intensity(name, dims, "float") == (pytest.approx(intensity) if intensity else None)
