"""Pipelines: orders and their bubbles, stages and their names, what is refused, and a run from the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.pipelining import schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from recipes.ch2.pipeline_parallel import Pipeline, make_layout
from recipes.ch2.pipeline_parallel_args import PipelineParallelArgs
from recipes.lib.arguments import ArgumentError, parse
from recipes.lib.distributed import World, joined
from recipes.lib.model import Transformer
from recipes.lib.own_time import OwnTime
from recipes.lib.parallelism import precision
from recipes.lib.pipeline_clock import Clock
from recipes.lib.pipeline_orders import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    Action,
    Order,
    Stuck,
    best_case,
    bubble,
    gpipe,
    one_forward_one_backward,
)
from recipes.lib.pipeline_pictures import Panel, draw_pipeline
from recipes.lib.pipeline_report import bubbles
from recipes.lib.pipeline_stages import Stage, activations, keep_stages, layers_of
from recipes.lib.pipeline_torch import TorchSchedule, schedule_class
from recipes.lib.training import optimizer_step
from tests.recipes.parity import SIZE, Case, build, make_data, plan_for
from tests.recipes.ranks import run_ranks, told

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("write_out", [gpipe, one_forward_one_backward])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 1), (2, 8), (4, 2), (4, 8), (8, 32)])
def test_the_bubble_by_hand_is_that_of_the_formula(write_out, ranks: int, microbatches: int) -> None:
    order = write_out(ranks, microbatches)
    assert bubble(best_case(order)) == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


def in_flight(actions: list[Action]) -> int:
    """Microbatches between their forward and their backward pass, at most: what a rank's memory must hold."""
    count = np.cumsum([{FORWARD: 1, BACKWARD: -1}[action.kind] for action in actions])
    return int(count.max())


def test_1f1b_keeps_fewer_activations_than_gpipe() -> None:
    assert [in_flight(list(each)) for each in one_forward_one_backward(4, 16)] == [4, 3, 2, 1]
    assert [in_flight(list(each)) for each in gpipe(4, 16)] == [16] * 4


def test_an_order_in_which_all_wait_is_refused() -> None:
    with pytest.raises(Stuck, match="0B0, 1F0 wait for one another"):
        best_case(
            [[Action(BACKWARD, 0, 0), Action(FORWARD, 0, 0)], [Action(FORWARD, 1, 0), Action(BACKWARD, 1, 0)]]
        )


def test_slow_stages_show_apart_from_slow_messages() -> None:
    """Four numbers of one run, in which the last stage takes twice as long and everything begins late."""
    order = one_forward_one_backward(2, 4)
    slow = best_case(order, lambda a: (1 + a.stage) * (1.0 if a.kind == FORWARD else 2.0))
    late = [dataclasses.replace(s, begin=1.5 * s.begin, end=0.5 * s.begin + s.end) for s in slow]
    found = bubbles(order, late, 0.2)
    assert found.ideal == pytest.approx(0.2) == found.formula
    assert found.own_durations == pytest.approx(bubble(slow))
    assert found.ideal < found.own_durations < found.measured == pytest.approx(bubble(late))


@pytest.fixture
def second_of_four() -> Iterator[World]:
    """A world of four ranks, of which this process is the second; nothing is sent."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        yield World(rank=1, size=4, local_rank=1, local_size=4, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def torch_order(name: str, world: World, microbatches: int) -> Order:
    """The order of one of torch's schedules over all ranks of the world."""
    style, exact = SCHEDULES[name], precision("float64", world.device)
    numbers = style.stages_of(world.rank, world.size, style.stages_per_rank)
    count = world.size * style.stages_per_rank
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(SIZE, layers=count))
    keep_stages(model, numbers, count)
    stages = [Stage(model, number, count, exact) for number in numbers]
    hidden, clock = activations(model, 1, 8, exact), Clock(world, None, running=False)
    return TorchSchedule(name, stages, count, microbatches, hidden, dist.group.WORLD, clock).order


@pytest.mark.parametrize("name", [name for name, style in SCHEDULES.items() if not style.by_hand])
@pytest.mark.parametrize("microbatches", [8, 16])
def test_the_bubble_of_torch_is_that_of_the_formula(
    name: str, microbatches: int, second_of_four: World
) -> None:
    order, style = torch_order(name, second_of_four, microbatches), SCHEDULES[name]
    found = bubble(best_case(order))
    predicted = style.predicted.of(4, microbatches, style.stages_per_rank)
    if name == "DualPipeV":  # its authors' formula is for an order in steps: an upper bound
        assert predicted / 2 < found <= predicted
    else:
        assert found == pytest.approx(predicted)
    for rank, actions in enumerate(order):
        assert {a.stage for a in actions} == set(style.stages_of(rank, 4, style.stages_per_rank))


@pytest.mark.parametrize(("stages", "layers"), [(1, 1), (2, 5), (4, 11), (8, 11), (8, 32)])
def test_every_layer_is_in_one_stage(stages: int, layers: int) -> None:
    found = [layers_of(stage, stages, layers) for stage in range(stages)]
    assert [layer for part in found for layer in part] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_keep_the_names_of_the_whole_model(tied: bool) -> None:
    size = dataclasses.replace(SIZE, layers=5, tied=tied)
    with torch.device("meta"):
        whole = Transformer(size)
        parts = [Transformer(size) for _ in range(4)]
    names = []
    for stage, part in enumerate(parts):
        keep_stages(part, [stage], 4)
        names.append([name for name, _ in part.named_parameters()])
    assert names[1] == [name for name, _ in whole.named_parameters() if name.startswith("layers.2.")]
    together = sorted(name for each in names for name in each)
    assert together == sorted([*dict(whole.named_parameters()), *(["embed_tokens.weight"] if tied else [])])


def test_the_picture_has_each_microbatch_in_its_colour(tmp_path: Path) -> None:
    order = one_forward_one_backward(3, 4)
    paths = [tmp_path / "a.png", tmp_path / "a.svg"]
    draw_pipeline(paths, "three ranks", [Panel("ideal", best_case(order), "time")])
    pixels = np.asarray(Image.open(paths[0]).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    boxes = {tuple(map(int, colour)) for colour, count in zip(colours, counts, strict=True) if count > 2000}
    assert {(0x1F, 0x5F, 0xA8), (0xD9, 0x73, 0x0D), (0x3A, 0x8F, 0x4F), (0x8E, 0x44, 0xAD)} <= boxes
    assert "<svg" in paths[1].read_text()[:600]


STAGES = "LoopedBFS, Interleaved1F1B, InterleavedZeroBubble"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "pipeline_parallel=8",
            "pipeline_parallel=8: 8 stages (8 ranks x 1) want 8 layers or more; model=tiny has 4",
        ),
        (
            "schedule=ZBVZeroBubble pipeline_parallel=4",
            "pipeline_parallel=4: 8 stages (4 ranks x 2) want 8 layers or more; model=tiny has 4",
        ),
        (
            "schedule=Interleaved1f1b",
            f"schedule=Interleaved1f1b: wants one of {', '.join(SCHEDULES)}; nearest: Interleaved1F1B",
        ),
        (
            "schedule=gpipe",
            f"schedule=gpipe: wants one of {', '.join(SCHEDULES)}; nearest: GPipe",
        ),
        (
            "schedule=GPipe stages_per_rank=2",
            f"stages_per_rank=2: schedule=GPipe wants 1 on each rank; any number: {STAGES}",
        ),
        (
            "schedule=ZBVZeroBubble stages_per_rank=1",
            f"stages_per_rank=1: schedule=ZBVZeroBubble wants 2 on each rank; any number: {STAGES}",
        ),
        (
            "schedule=DualPipeV compile=true",
            "compile=true: schedule=DualPipeV cannot split a compiled backward pass",
        ),
        (
            "schedule=DualPipeV activation_checkpointing=selective",
            "activation_checkpointing=selective: schedule=DualPipeV goes backward in two halves and needs them twice; "
            "full works",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(words: str, line: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(PipelineParallelArgs, words.split())
    assert str(caught.value) == line


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A process group of this process alone, left also when the test fails."""
    make_data(tmp_path / "data")
    try:
        with joined("cpu") as world:
            yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def pipeline(folder: Path, world: World, **args: object) -> Pipeline:
    """A pipeline of one rank."""
    case = Case("one", "pipeline", 1, args={"pipeline_parallel": 0, **args})
    built = build(case, plan_for(case, folder, world))
    assert isinstance(built, Pipeline)
    return built


def test_a_number_that_does_not_divide_the_ranks(alone: World) -> None:
    with pytest.raises(ArgumentError, match="pipeline_parallel=3: wants a divisor of 1, the number of ranks"):
        make_layout(alone, PipelineParallelArgs(pipeline_parallel=3))


def test_microbatches_that_the_schedule_refuses(alone: World, tmp_path: Path) -> None:
    line = "microbatches=1: schedule=DualPipeV on 2 stages: DualPipeV requires at least as many microbatches as stages"
    with pytest.raises(ArgumentError, match=line):
        pipeline(tmp_path, alone, schedule="DualPipeV", batch_size=1)
    with pytest.raises(
        ArgumentError, match="microbatches=3: wants a divisor of 8, the microbatches of a step"
    ):
        pipeline(tmp_path, alone, microbatches=3)
    with pytest.raises(ArgumentError, match=r"3 stages \(1 ranks x 3\) want 3 layers or more"):
        pipeline(tmp_path, alone, schedule="LoopedBFS", stages_per_rank=3)


def test_a_schedule_that_this_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(schedules, "ScheduleZBVZeroBubble")
    with pytest.raises(ArgumentError) as caught:
        schedule_class("ZBVZeroBubble")
    version = torch.__version__
    line = f"schedule=ZBVZeroBubble: torch {version} has no such schedule; nearest: InterleavedZeroBubble"
    assert str(caught.value) == line


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_measured_is_what_was_planned(schedule: str, alone: World, tmp_path: Path) -> None:
    """Each action of the order once, in the order's order, one after the other."""
    case = Case("one", "pipeline", 1, args={"pipeline_parallel": 0, "schedule": schedule})
    plan = plan_for(case, tmp_path, alone)
    built = build(case, plan)
    assert isinstance(built, Pipeline)
    optimizer_step(plan, built, 1, OwnTime(built.model, alone.device))
    (run,) = built.clock.runs()
    assert [span.action for span in run] == list(built.schedule.order[0])
    assert all(before.end <= after.begin for before, after in itertools.pairwise(run))
    assert all(span.end > span.begin > 0 for span in run)


def on_two_ranks(folder: Path, schedule: str, device: str) -> tuple[dict[str, Any], str]:
    """A short run: pipeline.json and what was printed."""
    arguments = {
        "schedule": schedule, "steps": 3, "sequence_length": 32, "batch_size": 4, "save_every": -1,
        "device": device,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in arguments.items()]
    run_dir = {**os.environ, "RUN_DIR": str(folder)}
    ended = run_ranks(["-m", "recipes.ch2.pipeline_parallel", *words], 2, device, run_dir)
    assert not told(ended), told(ended)
    return json.loads((folder / "pipeline.json").read_text()), ended[0].out


def test_from_the_command_line(tmp_path: Path) -> None:
    """Two ranks, a schedule that splits the backward pass, and what is left behind."""
    report, printed = on_two_ranks(tmp_path, "ZBVZeroBubble", "cpu")
    assert (report["ranks"], report["stages_per_rank"], report["microbatches"]) == (2, 2, 4)
    assert {action[1] for _, action, _, _ in report["spans"]} == {"F", "I", "W"}
    assert {(rank, action[0]) for rank, action, _, _ in report["spans"]} == {
        (0, "0"),
        (0, "3"),
        (1, "1"),
        (1, "2"),
    }
    found = report["bubble"]
    assert found["formula"] == pytest.approx(1 / 25) == found["ideal"]
    assert 0 < found["measured"] < 1
    assert f"bubble measured      {found['measured']:6.1%}" in printed
    assert Image.open(tmp_path / "pipeline.png").size[0] == 1800
    assert (tmp_path / "pipeline.svg").stat().st_size > 10_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_gpus(schedule: str, tmp_path: Path) -> None:
    """NCCL's sends wait for the other side, unlike gloo's: an order that could block would not end."""
    report, _ = on_two_ranks(tmp_path, schedule, "cuda")
    assert 0 < report["bubble"]["measured"] < 1
