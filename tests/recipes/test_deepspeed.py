"""ZeRO trains as one process does, goes on from its checkpoints and from everybody else's, and refuses what cannot be.

DeepSpeed keeps float32 at most, where the order of summation costs up to 1e-6 of the loss and 5e-5 of the norm.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.lib.deepspeed_stack import missing_for_disks
from recipes.lib.distributed import alone
from recipes.lib.workload import Workload
from recipes.lib.zero_memory import zero_states
from tests.recipes.parity import (
    DEVICE,
    SAVED_AGAIN_AT,
    SAVED_AT,
    SIZE,
    STEPS,
    Case,
    Outcome,
    launch,
    make_data,
    run_cases,
)
from tests.recipes.ranks import run_ranks, told
from tests.recipes.test_training import metrics_of, start

# The first test waits for every process of the file: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(1800)

SLICED = {"stage": 3, "persistence_threshold": 100}
"""By default parameters as small as those of these models stay whole."""
HOST = {**SLICED, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
WAYS: dict[str, dict[str, object]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": SLICED,
    "zero3-some-whole": {"stage": 3},
    "zero2-host": {"stage": 2, "offload_optimizer": "cpu"},
    "zero3-host": HOST,
}
EVEN = {"batch_size": 8, "dtype": "float32"}
# On four ranks 1, 2, 1 and 2 sequences, one at a time; targets that do not count, unevenly; tied tables.
UNEVEN = {"batch_size": 6, "microbatch_size": 1, "dtype": "float32"}
DEEP = {"batch_size": 6, "microbatch_size": 1, "dtype": "float32"}
WHOLE: dict[str, Any] = {"layers": 4, "ragged": True}
LAYOUTS = {"even": {"args": EVEN}, "uneven": {"args": UNEVEN, "ragged": True, "tied": True}}


def cases(world_size: int, layout: str, *ways: str) -> list[Case]:
    facts = LAYOUTS[layout]
    return [
        Case(
            f"{way}-{layout}-x{world_size}",
            "zero",
            world_size,
            **{**facts, "args": {**facts["args"], **WAYS[way]}},
        )
        for way in ways
    ]


PARITY = [
    *cases(2, "uneven", *WAYS),
    *cases(2, "even", "zero3"),
    *cases(4, "uneven", "zero2", "zero3"),
]
RECOMPUTED = [
    Case(f"{way}-{mode}-recompute-uneven-x2", "zero", 2, ragged=True, tied=True,
         args={**UNEVEN, **WAYS[way], "activation_checkpointing": mode})
    for way, mode in (("zero2", "selective"), ("zero3", "full"))
]  # fmt: skip
PIPELINES = [
    # The uneven layout on two pipelines, and where DeepSpeed cuts by parameters: the first stage has no whole layer.
    Case("pipeline2-deep-tied-x2", "deepspeed_pipeline", 2, args=DEEP, **{**WHOLE, "tied": True}),
    Case("pipeline2-deep-x2", "deepspeed_pipeline", 2, args={**DEEP, "partition": "parameters"}, **WHOLE),
    Case("pipeline4-deep-tied-x4", "deepspeed_pipeline", 4,
         args={**DEEP, "pipeline_parallel": 4, "activation_checkpointing": "full"}, **{**WHOLE, "tied": True}),
    Case("pipeline2-twice-deep-tied-x4", "deepspeed_pipeline", 4, args=DEEP, **{**WHOLE, "tied": True}),
]  # fmt: skip
ROUNDED = [
    Case(f"zero{stage}-rounded", "zero", 2, args={**EVEN, **WAYS[f"zero{stage}"], "dtype": "bfloat16"})
    for stage in range(4)
]


def leaving(name: str, technique: str, world_size: int, **args: object) -> Case:
    """Trains all steps and leaves a checkpoint on the way."""
    return Case(name, technique, world_size, args={**UNEVEN, **args}, tied=True, save=True)


def going_on(name: str, technique: str, world_size: int, **args: object) -> Case:
    """Begins with other weights, and with the checkpoint that its name begins with."""
    load = name.partition("-to-")[0]
    return Case(name, technique, world_size, args={**UNEVEN, "seed": 1, **args}, tied=True, load=load)


PIPELINE = {"pipeline_parallel": 2}
LEAVING = [
    leaving("p2", "deepspeed_pipeline", 4, **PIPELINE),
    leaving("z1", "zero", 4, stage=1),
    leaving("z3", "zero", 4, **SLICED),
    leaving("host", "zero", 4, **HOST),
    leaving("f4", "fsdp", 4),
]
AT_THE_SAME_SIZE = [
    going_on("z1-to-z1", "zero", 4, stage=1),
    going_on("z3-to-z3", "zero", 4, **SLICED),
    going_on("host-to-host", "zero", 4, **HOST),
    going_on("p2-to-p2", "deepspeed_pipeline", 4, **PIPELINE),
]
ELSEWHERE = [
    going_on("z3-to-fsdp", "fsdp", 4),
    going_on("f4-to-z3", "zero", 4, **SLICED),
    dataclasses.replace(going_on("two-to-four", "zero", 4, **SLICED), save=True),
    going_on("z3-to-two-z2", "zero", 2, stage=2),
    going_on("z3-to-two-z0", "zero", 2, stage=0),
    going_on("host-to-ddp", "ddp", 2),
    going_on("z1-to-pipeline", "deepspeed_pipeline", 2, **PIPELINE),
    going_on("p2-to-two-z3", "zero", 2, **SLICED),
]
TWO = leaving("two", "zero", 2, **SLICED)
BACK = dataclasses.replace(going_on("back", "zero", 2, **SLICED), load="two-to-four")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What every case computed. The order of the launches has each checkpoint written before it is read."""
    folder: Path = tmp_path_factory.mktemp("zero")
    make_data(folder / "data")
    references = [
        Case(
            f"baseline-{layout}", "baseline", 1, **{**facts, "args": {**facts["args"], "microbatch_size": 0}}
        )
        for layout, facts in LAYOUTS.items()
    ]
    references += [
        Case(f"baseline-deep{tied}", "baseline", 1, args=DEEP, **{**WHOLE, "tied": bool(tied)})
        for tied in ("", "-tied")
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with alone(DEVICE) as world:
        found = run_cases(folder, references, world)
    torch.set_num_threads(threads)
    everything = [
        TWO,
        *PARITY,
        *RECOMPUTED,
        *ROUNDED,
        *PIPELINES,
        *LEAVING,
        *AT_THE_SAME_SIZE,
        *ELSEWHERE,
        BACK,
    ]
    from_four = [case for case in everything if case.world_size == 2 and case.load]
    in_two = [case for case in everything if case.world_size == 2 and not case.load]
    in_four = [case for case in everything if case.world_size == 4]
    for size, cases_here in ((2, in_two), (4, in_four), (2, from_four)):
        # Pipelines last: DeepSpeed keeps their grid of ranks for the whole process.
        cases_here.sort(key=lambda case: case.technique == "deepspeed_pipeline")
        found |= launch(folder, size, cases_here)
    return found


def relative(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two series."""
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", [*PARITY, *RECOMPUTED], ids=lambda case: case.name)
def test_trains_as_one_process_does(case: Case, outcomes: dict[str, Outcome]) -> None:
    ours = outcomes[case.name]
    reference = outcomes["baseline-uneven" if "uneven" in case.name else "baseline-even"]
    loss_error, norm_error = (
        relative(ours.losses, reference.losses),
        relative(ours.grad_norms, reference.grad_norms),
    )
    print(f"PARITY {case.name} loss {loss_error:.2e} norm {norm_error:.2e}")
    assert len(ours.losses) == STEPS
    assert ours.weights_before == reference.weights_before
    assert loss_error < 1e-6
    assert norm_error < 5e-5


@pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.name)
def test_a_pipeline_trains_as_one_process_does(case: Case, outcomes: dict[str, Outcome]) -> None:
    ours, reference = outcomes[case.name], outcomes["baseline-deep-tied" if case.tied else "baseline-deep"]
    loss_error, norm_error = (
        relative(ours.losses, reference.losses),
        relative(ours.grad_norms, reference.grad_norms),
    )
    print(f"PARITY {case.name} loss {loss_error:.2e} norm {norm_error:.2e}")
    assert len(ours.losses) == STEPS
    assert loss_error < 1e-6
    assert norm_error < 5e-5


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_bfloat16_begins_with_the_same_weights_and_stays_near(
    case: Case, outcomes: dict[str, Outcome]
) -> None:
    """And is not equal, or nothing was computed in it."""
    ours, exact = outcomes[case.name], outcomes["baseline-even"]
    assert ours.weights_before == exact.weights_before
    assert 1e-6 < relative(ours.losses, exact.losses) < 1e-2
    assert relative(ours.grad_norms, exact.grad_norms) < 5e-2


def test_each_rank_has_its_part_of_the_moments_only(outcomes: dict[str, Outcome]) -> None:
    whole = outcomes["zero0-uneven-x2"].moments
    assert len(set(whole)) == 1
    for way in ("zero1", "zero2", "zero3", "zero2-host", "zero3-host"):
        for size in (2, 4) if f"{way}-uneven-x4" in outcomes else (2,):
            parts = outcomes[f"{way}-uneven-x{size}"].moments
            assert max(parts) == pytest.approx(whole[0] / size, rel=0.01)


@pytest.mark.parametrize(
    "name", [f"{way}-uneven-x2" for way in [*WAYS][1:]] + ["zero2-rounded", "zero3-rounded"]
)
def test_what_a_rank_is_said_to_hold_is_in_its_memory(name: str, outcomes: dict[str, Outcome]) -> None:
    """In float32, too, parameters are there twice; those that stay whole a third time; offloaded gradients twice."""
    said, found = outcomes[name].kept, outcomes[name].held
    freed = () if "zero3" in name or "host" in name else ("gradients",)
    for kind in said.keys() - freed:
        assert said[kind] == pytest.approx(found[kind], rel=0.01), kind


def test_what_zero_keeps_is_predicted(outcomes: dict[str, Outcome]) -> None:
    """The launcher's formulas, by which it refuses what GPUs cannot hold, against the ranks' memory."""
    for name, compute in (("uneven-x2", 4), ("rounded", 2)):
        numbers = outcomes[f"zero0-{name}"].moments[0] // 2
        for way in ("zero1", "zero2", "zero3"):
            work = Workload(size=SIZE, sequence_length=24, microbatch=1, strategy=way, compute_bytes=compute)
            predicted, found = zero_states(work, numbers, 2), outcomes[f"{way}-{name}"].held
            assert predicted["parameters"] == pytest.approx(found["parameters"], rel=0.02), (way, name)
            assert predicted["optimizer"] == pytest.approx(found["moments"], rel=0.02), (way, name)


@pytest.mark.parametrize("case", AT_THE_SAME_SIZE, ids=lambda case: case.name)
def test_goes_on_bit_for_bit_at_the_same_world_size(case: Case, outcomes: dict[str, Outcome]) -> None:
    resumed, straight = outcomes[case.name], outcomes[case.load]
    assert resumed.weights_before != straight.weights_before
    assert resumed.losses == straight.losses[SAVED_AT:]
    assert resumed.grad_norms == straight.grad_norms[SAVED_AT:]
    assert resumed.weights_after == straight.weights_after
    assert resumed.random == straight.random
    assert len({tuple(numbers) for numbers in resumed.random}) == case.world_size


@pytest.mark.parametrize("case", [*ELSEWHERE, BACK], ids=lambda case: case.name)
def test_goes_on_in_another_world_size_stage_and_technique(case: Case, outcomes: dict[str, Outcome]) -> None:
    """Only the order of summation changes."""
    resumed = outcomes[case.name]
    straight = outcomes["two" if case is BACK else case.load]
    steps = STEPS - (SAVED_AGAIN_AT if case is BACK else SAVED_AT)
    assert len(resumed.losses) == steps
    assert resumed.losses == pytest.approx(straight.losses[-steps:], rel=1e-6)
    assert resumed.grad_norms == pytest.approx(straight.grad_norms[-steps:], rel=5e-5)


def test_a_checkpoint_s_size_is_that_of_all_ranks_together(outcomes: dict[str, Outcome]) -> None:
    """Also where a rank has one stage of a pipeline, and knows nothing of the others."""
    announced = {case.name: outcomes[case.name].announced for case in LEAVING}
    assert len(set(announced.values())) == 1, announced
    whole = outcomes["zero0-uneven-x2"].moments[0] // 2  # two moments of every parameter
    assert announced["p2"] - 16 * 2**20 == pytest.approx(12 * whole, rel=0.01)


def test_the_recipe_saves_goes_on_and_shows_its_configuration(tmp_path: Path) -> None:
    """Two ranks under a bare torchrun; then one process alone, in another stage."""
    words = ["recipes.ch5.deepspeed", "warmup_steps=0", "min_lr_ratio=1"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    run = tmp_path / "run"
    first = start([*torchrun, *words, "stage=3", "steps=2"], tmp_path, RUN_DIR=str(run), ATTEMPT="1")
    assert first.returncode == 0, first.stderr
    config = json.loads((run / "deepspeed.json").read_text())
    assert config["zero_optimization"]["stage"] == 3
    assert '"train_micro_batch_size_per_gpu": 4' in first.stdout
    second = start([*words, "stage=1", "steps=3"], tmp_path, RUN_DIR=str(run), ATTEMPT="2")
    assert second.returncode == 0, second.stderr
    assert [(line["attempt"], line["step"]) for line in metrics_of(run)] == [(1, 1), (1, 2), (2, 3)]


def where_is_libaio() -> str | None:
    """Why a disk cannot be offloaded to here; None where it can. DeepSpeed's operator is compiled against it."""
    if "THOROUGH" not in os.environ:
        return "compiles DeepSpeed's async_io and AdamW, which takes minutes; THOROUGH=1 runs it, and wants libaio-dev"
    return missing_for_disks()


def test_with_state_on_a_disk_it_trains_as_without_and_goes_on(tmp_path: Path) -> None:
    """The recipe's own smallest model: of the other cases here nothing is large enough to be moved."""
    if reason := where_is_libaio():
        pytest.skip(reason)
    disk = tmp_path / "disk"
    disk.mkdir()
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "recipes.ch5.deepspeed"]
    words = [*two, "stage=3", "warmup_steps=0", "min_lr_ratio=1", "lr=1e-3"]
    moved = ["offload_optimizer=nvme", f"nvme_folder={disk}", "adam=deepspeed", "async_save=false"]

    def run(name: str, attempt: int, *more: str) -> None:
        done = start([*words, *more], tmp_path, 1800, RUN_DIR=str(tmp_path / name), ATTEMPT=str(attempt))
        assert done.returncode == 0, done.stderr[-3000:]

    run("memory", 1, "steps=5")
    run("disk", 1, *moved, "steps=2")
    for rank in (0, 1):
        names = {file.name.partition("-")[0] for file in disk.glob(f"*/optimizer/rank{rank}/*.swp")}
        assert {"exp_avg", "exp_avg_sq"} <= names
    run("disk", 2, *moved, "offload_parameters=nvme", "steps=4")
    run("disk", 3, "steps=5")  # and a checkpoint of it loads where nothing is offloaded
    ours, theirs = metrics_of(tmp_path / "disk"), metrics_of(tmp_path / "memory")
    assert [line["attempt"] for line in ours] == [1, 1, 2, 2, 3]
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 5e-5)):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=tolerance)


def test_without_libaio_it_is_one_line(tmp_path: Path) -> None:
    """In a compiler's eyes: its search for the library finds nothing."""
    words = ["recipes.ch5.deepspeed", "stage=3", "offload_optimizer=nvme", f"nvme_folder={tmp_path}"]
    words += ["adam=deepspeed", "async_save=false", "steps=1"]
    compiler = tmp_path / "bin" / "gcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    done = start(words, tmp_path, CC=str(compiler), PATH=f"{compiler.parent}:{os.environ['PATH']}")
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "offload_optimizer=nvme: wants libaio with its headers (Debian's libaio-dev)" in errors[0]


def test_without_deepspeed_it_is_one_line(tmp_path: Path) -> None:
    """In a Python that has torch, and no deepspeed."""
    run_it = "runpy.run_module('recipes.ch5.deepspeed', run_name='__main__')"
    hidden = f"import runpy, sys; sys.modules['deepspeed'] = None; {run_it}"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "steps=1"],
        cwd=Path(__file__).parents[2], env={**os.environ, "RUN_DIR": str(tmp_path / "run")},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "needs deepspeed" in done.stderr
    assert "python -m launcher env install deepspeed" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_gpus_it_learns_and_goes_on(stage: int, tmp_path: Path) -> None:
    words = [
        "-m",
        "recipes.ch5.deepspeed",
        f"stage={stage}",
        "data=stdlib",
        "sequence_length=64",
        "save_every=5",
    ]
    run = {**os.environ, "RUN_DIR": str(tmp_path / "run"), "CACHE_DIR": str(tmp_path)}
    for steps in (5, 8):
        failed = told(run_ranks([*words, f"steps={steps}"], 2, "cuda", run))
        assert not failed, failed
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"]
