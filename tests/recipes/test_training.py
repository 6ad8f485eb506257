"""The shared loop: what it writes, how it goes on, and how a recipe starts and ends as a process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.ch1.baseline import Baseline
from recipes.lib import checkpoint, manifest, metrics
from recipes.lib.arguments import TrainArgs
from recipes.lib.distributed import LaunchError, World, alone, world_from_environment
from recipes.lib.finite import NotFinite
from recipes.lib.flops import FlopsPerToken
from recipes.lib.layout import Layout
from recipes.lib.metrics import Metrics
from recipes.lib.model import IGNORE
from recipes.lib.optimizer import learning_rate
from recipes.lib.parallelism import precision
from recipes.lib.training import Plan, microbatches, train
from tests.recipes.parity import SEQUENCE_LENGTH, Case, make_data, plan_for

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
ONE = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)


class Killed(Exception):
    """Stands for the end of a process in the middle of a run."""


@dataclasses.dataclass(frozen=True)
class KilledInStep:
    """A technique that trains as the baseline does, until a step in which it dies."""

    baseline: Baseline
    dies_in: int
    begun: list[None] = dataclasses.field(default_factory=list)

    @property
    def model(self) -> torch.nn.Module:
        """The baseline's."""
        return self.baseline.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The baseline's."""
        return self.baseline.optimizer

    def accumulate_gradients(self, batches: Sequence[tuple[Tensor, Tensor]], token_count: Tensor) -> Tensor:
        """The baseline's, or death."""
        self.begun.append(None)
        if len(self.begun) == self.dies_in:
            raise Killed
        return self.baseline.accumulate_gradients(batches, token_count)


def newest(run_directory: Path) -> Path | None:
    """The checkpoint that a resumed run goes on from."""
    return checkpoint.newest(run_directory, ONE)[0]


def plan_in(folder: Path, **args: Any) -> Plan:
    """The baseline's plan over a few tokens, with its run directory `folder`/run."""
    if not (folder / "data").exists():
        make_data(folder / "data")
    case = Case("run", "baseline", 1, args={"batch_size": 4, "dtype": "float32", **args})
    plan = plan_for(case, folder, ONE)
    plan.run_directory.mkdir(exist_ok=True)
    return dataclasses.replace(plan, resume_from=newest(plan.run_directory))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The run's lines."""
    return [json.loads(line) for line in (folder / metrics.METRICS_FILE).read_text().splitlines()]


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = plan_in(tmp_path / "straight", steps=6)
    train(straight, Baseline.build(straight))
    first = plan_in(tmp_path / "killed", steps=6, save_every=2)
    with pytest.raises(Killed):
        train(first, KilledInStep(Baseline.build(first), dies_in=6))
    monkeypatch.setenv("ATTEMPT", "2")
    second = plan_in(tmp_path / "killed", steps=6, save_every=2)
    train(second, Baseline.build(second))

    expected = metrics_of(straight.run_directory)
    lines = metrics_of(second.run_directory)
    assert [(line["attempt"], line["step"]) for line in lines] == [
        *((1, step) for step in (1, 2, 3, 4, 5)),
        *((2, step) for step in (5, 6)),
    ]
    by_step = {line["step"]: line for line in lines}
    for line in expected:
        ours = by_step[line["step"]]
        for name in ("loss", "grad_norm", "lr", "tokens"):
            assert ours[name] == line[name]


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, steps=2)
    train(plan, Baseline.build(plan))
    again = plan_in(tmp_path, steps=2)
    train(again, KilledInStep(Baseline.build(again), dies_in=1))
    assert [line["step"] for line in metrics_of(plan.run_directory)] == [1, 2]


def test_lines_hold_what_readers_of_a_run_rely_on(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, steps=5, log_every=2, save_every=0)
    train(plan, Baseline.build(plan))
    lines = metrics_of(plan.run_directory)
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert line["steps"] == 5
        assert line["tokens"] == line["step"] * 4 * SEQUENCE_LENGTH
        assert line["lr"] == learning_rate(line["step"], plan.args)
        assert line["tokens_per_second"] == line["tokens_per_second_per_device"] > 0
        # A CPU has neither a known peak nor memory that torch accounts for: no figure instead of a made-up
        # one.
        assert "mfu" not in line
        assert "memory_gib" not in line
    assert newest(plan.run_directory) == manifest.folder_of(plan.run_directory, 5)


def test_a_model_whose_loss_is_no_number_is_not_saved(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, log_every=5, save_every=1)
    technique = Baseline.build(plan)
    with torch.no_grad():
        technique.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="step 1:"):
        train(plan, technique)
    assert newest(plan.run_directory) is None


def make_metrics(folder: Path) -> Metrics:
    """Metrics of the one rank."""
    cost = FlopsPerToken(1.0, 1.0)
    return Metrics(folder, ONE, attempt=1, steps=9, flops=cost, compute=torch.float32)


def test_half_a_line_from_a_killed_attempt_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / metrics.METRICS_FILE
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    writer = make_metrics(tmp_path)
    writer.start(0)
    writer.log(step=2, tokens=8, loss=1.0, grad_norm=1.0, lr=0.1)
    writer.close()
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2]


def test_a_line_is_on_the_disk_when_log_returns(tmp_path: Path) -> None:
    writer = make_metrics(tmp_path)
    writer.start(0)
    writer.log(step=1, tokens=8, loss=1.0, grad_norm=1.0, lr=0.1)
    assert len(metrics_of(tmp_path)) == 1


def test_time_spent_saving_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    writer = make_metrics(tmp_path)
    writer.start(1000)
    now = 102.0
    with writer.paused():
        now = 150.0
    now = 152.0
    writer.log(step=1, tokens=1400, loss=1.0, grad_norm=1.0, lr=0.1)
    assert metrics_of(tmp_path)[0]["tokens_per_second"] == 100.0


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    rank = dataclasses.replace(ONE, rank=1, size=2)
    writer = Metrics(tmp_path, rank, attempt=1, steps=9, flops=FlopsPerToken(1, 1), compute=torch.float32)
    writer.start(0)
    writer.log(step=1, tokens=8, loss=1.0, grad_norm=1.0, lr=0.1)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_learning_rate_rises_then_falls_to_its_floor() -> None:
    args = TrainArgs(steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, args) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(1, TrainArgs(warmup_steps=0, lr=1.0)) == pytest.approx(1.0, rel=1e-3)
    assert learning_rate(5, TrainArgs(steps=5, warmup_steps=20, lr=1.0)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "microbatch_size"), [(4, 6, 1), (4, 2, 0), (3, 8, 2), (1, 5, 2)]
)
def test_ranks_have_equal_shapes_and_together_the_batch(
    tmp_path: Path, world_size: int, batch_size: int, microbatch_size: int
) -> None:
    plan = plan_in(tmp_path, batch_size=batch_size, microbatch_size=microbatch_size)
    expected, _ = plan.dataset.batch(0, 0, 1, batch_size)
    rows, shapes = [], set()
    for rank in range(world_size):
        world = dataclasses.replace(ONE, rank=rank, size=world_size)
        batches = microbatches(
            dataclasses.replace(plan, world=world, layout=Layout.each_its_own(world)), step=1
        )
        shapes.add(tuple(tokens.shape for tokens, _ in batches))
        for tokens, targets in batches:
            rows += list(tokens[(targets != IGNORE).any(1)])
    assert len(shapes) == 1
    assert torch.equal(torch.stack(rows), expected)


def test_float64_is_float64_everywhere_and_bfloat16_keeps_exact_parameters() -> None:
    assert precision("float64", CPU).master == torch.float64
    assert precision("bfloat16", CPU).master == torch.float32
    assert precision("bfloat16", CPU).compute == torch.bfloat16
    assert precision("auto", CPU).compute == torch.float32
    assert precision("auto", torch.device("cuda")).compute == torch.bfloat16


def test_without_torchs_variables_the_process_is_alone() -> None:
    assert world_from_environment({}, "cpu") == ONE


def test_a_task_of_several_without_a_rank_is_an_error() -> None:
    with pytest.raises(LaunchError, match=r"SLURM_NTASKS=4 but RANK is not set"):
        world_from_environment({"SLURM_NTASKS": "4"}, "cpu")


def test_half_of_torchs_variables_are_an_error() -> None:
    with pytest.raises(LaunchError, match=r"RANK, WORLD_SIZE set but not LOCAL_RANK, MASTER_ADDR"):
        world_from_environment({"RANK": "0", "WORLD_SIZE": "2"}, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_missing_gpu_is_an_error_where_one_was_asked_for_or_allocated() -> None:
    with pytest.raises(LaunchError, match="device=cuda"):
        world_from_environment({}, "cuda")
    with pytest.raises(LaunchError, match="SLURM_GPUS_ON_NODE=8"):
        world_from_environment({"SLURM_GPUS_ON_NODE": "8"}, "auto")
    assert world_from_environment({"SLURM_GPUS_ON_NODE": "8"}, "cpu").device == CPU
    assert world_from_environment({"SLURM_GPUS_ON_NODE": "0"}, "auto").device == CPU


def test_a_recipe_for_one_device_refuses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(LaunchError, match="WORLD_SIZE=2"), alone("cpu"):
        pass


def start(
    words: list[str], folder: Path, seconds: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A recipe's process as a person starts it, in `folder`, with a few texts to train on."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        (texts / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    arguments = ["data=texts", "sequence_length=32", "save_every=2", "model=tiny", "device=cpu"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RUN_"))}
    return subprocess.run(
        [sys.executable, "-m", *words, *arguments],
        cwd=folder,
        env={
            **inherited,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "CACHE_DIR": str(folder / "cache"),
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@pytest.mark.parametrize("recipe", ["ch3.ddp", "ch4.fsdp"])
def test_a_recipe_runs_under_a_bare_torchrun(recipe: str, tmp_path: Path) -> None:
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", f"recipes.{recipe}"]
    done = start([*words, "steps=3"], tmp_path)
    assert done.returncode == 0, done.stderr
    (run_directory,) = (tmp_path / "runs").iterdir()
    assert run_directory.name.startswith(f"{recipe.replace('.', '_')}-torchrun-")
    assert [line["step"] for line in metrics_of(run_directory)] == [1, 2, 3]
    assert newest(run_directory) == manifest.folder_of(run_directory, 3)


def test_a_recipe_goes_on_in_the_run_directory_that_it_is_given(tmp_path: Path) -> None:
    run = {"RUN_DIR": str(tmp_path / "run")}
    assert start(["recipes.ch1.baseline", "steps=2"], tmp_path, **run, ATTEMPT="1").returncode == 0
    assert start(["recipes.ch1.baseline", "steps=4"], tmp_path, **run, ATTEMPT="2").returncode == 0
    lines = metrics_of(tmp_path / "run")
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    other = start(["recipes.ch1.baseline", "steps=6", "seed=1"], tmp_path, **run, ATTEMPT="3")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "was trained with seed=0, this run has seed=1" in other.stderr


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    wrong = start(["recipes.ch4.fsdp", "stpes=2"], tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "steps" in wrong.stderr
    unlaunched = start(["recipes.ch4.fsdp", "steps=2"], tmp_path, SLURM_NTASKS="2")
    assert unlaunched.returncode == 2
    assert unlaunched.stderr.strip().splitlines()[-1].startswith("error: SLURM_NTASKS=2 but RANK is not set")
    assert "Traceback" not in unlaunched.stderr
