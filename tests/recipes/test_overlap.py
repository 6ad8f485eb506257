"""How much of the all-reduces is hidden: read off traces, of which one is real."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from recipes.ch3.ddp import Replicated
from recipes.lib.distributed import World
from recipes.lib.overlap import REDUCING, Overlap, overlap, traced
from recipes.lib.training import train
from tests.recipes.parity import Case, make_data, plan_for


def span(name: str, start: float, end: float, category: str = "cpu_op", **args: Any) -> dict[str, Any]:
    """An event of a trace; milliseconds."""
    event = {"ph": "X", "cat": category, "name": name, "ts": start * 1000, "dur": (end - start) * 1000}
    return {**event, "args": args}


MARK = span(REDUCING, 10, 50, "user_annotation")


def test_on_a_cpu_gloo_s_threads_are_compared_with_the_engine() -> None:
    engine = "autograd::engine::evaluate_function: MmBackward0"
    events = [
        MARK,
        span("gloo:all_reduce", 1, 9, "user_annotation"),  # before the backward pass: the number of tokens
        span(engine, 2, 8),  # of a microbatch that does not reduce
        span(engine, 10, 20),
        span(engine, 22, 30),
        span("gloo:all_reduce", 15, 25, "user_annotation"),
        span("gloo:all_reduce", 24, 40, "user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]
    found = overlap(events)
    assert found == Overlap(computing=18.0, reducing=25.0, hidden=13.0, calls=2)
    assert found.share == pytest.approx(13 / 25)


def test_on_a_gpu_a_kernel_belongs_to_who_launched_it() -> None:
    """The kernels run after the host has left the backward pass; the last all-reduce is of the next step's loss."""
    reduce = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    launches = {1: 11.0, 2: 12.0, 3: 13.0, 4: 60.0, 5: 5.0}
    events = [
        MARK,
        *(
            span("cudaLaunchKernel", at, at + 0.1, "cuda_runtime", correlation=n)
            for n, at in launches.items()
        ),
        span("sm90_gemm", 100, 120, "kernel", correlation=1),
        span(reduce, 110, 130, "kernel", correlation=2),
        span("sm90_gemm", 120, 125, "kernel", correlation=3),
        span(reduce, 140, 150, "kernel", correlation=4),
        span("sm90_gemm", 126, 130, "kernel", correlation=5),
    ]
    assert overlap(events) == Overlap(computing=25.0, reducing=20.0, hidden=15.0, calls=1)


def test_without_all_reduces_nothing_is_left_over() -> None:
    assert overlap([MARK]).share == 1.0


def test_a_real_training_is_traced(
    tmp_path: Path, one_rank: World, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path / "data")
    args = {
        "batch_size": 2,
        "microbatch_size": 1,
        "bucket_mb": 0.05,
        "steps": 6,
        "save_every": -1,
        "profile": 2,
    }
    plan = plan_for(Case("traced", "ddp", 1, args=args), tmp_path, one_rank)
    plan.run_directory.mkdir()
    technique = Replicated.build(plan, plan.args)
    with traced(technique.optimizer, plan, skip=3, steps=2):
        train(plan, technique)
    (found,) = json.loads((plan.run_directory / "profile" / "overlap.json").read_text())
    with gzip.open(plan.run_directory / "profile" / "rank-0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert found == vars(overlap(events))
    assert sum(event["name"] == REDUCING and event["ph"] == "X" for event in events) == 2, (
        "one a step, of two"
    )
    assert found["calls"] >= 2 * 5, "several buckets a step"
    assert 0 <= found["hidden"] <= min(found["reducing"], found["computing"])
    assert "overlap of 2 steps" in capsys.readouterr().out
    with traced(technique.optimizer, plan, skip=3, steps=2):
        pass
    assert "nothing was traced: this attempt ended before its step 5" in capsys.readouterr().out
