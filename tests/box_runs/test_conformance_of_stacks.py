"""DeepSpeed and Megatron-Core keep the contract of the launcher: what is announced as saved is never lost.

As in test_conformance: real faults, between the first save and the last step, in runs that `sbatch` started. At the
same number of ranks every loss equals the undisturbed run's bit for bit, also where a stack writes its own files; at
another number only the order of summation differs. A few cases are in every suite, THOROUGH=1 runs all.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.paths import REPOSITORY
from tests.box_runs.conformance import (
    OTHER_ORDER,
    SAME_ORDER,
    Started,
    check,
    frozen,
    in_a_save,
    in_a_step,
    losses_by_step,
    start,
    stop,
)
from tests.box_runs.support import Launcher, ended

Losses = dict[int, float]

# Each waits for several starts of a stack: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(900)

thorough = pytest.mark.skipif(
    "THOROUGH" not in os.environ, reason="a minute or two of two cores each; THOROUGH=1 runs them"
)


@dataclasses.dataclass(frozen=True)
class Way:
    """A recipe of chapter 5 and its arguments."""

    recipe: str
    words: tuple[str, ...]


SAME_FOR_ALL = ("args.sequence_length=16", "args.warmup_steps=10")
SLICED = ("args.stage=3", "args.persistence_threshold=100")
"""By default parameters as small as this model's stay whole."""
WAYS = {
    "zero1": Way("ch5_deepspeed", ("args.stage=1",)),
    "zero2": Way("ch5_deepspeed", ("args.stage=2",)),
    "zero3": Way("ch5_deepspeed", SLICED),
    "zero3-host": Way(
        "ch5_deepspeed", (*SLICED, "args.offload_optimizer=cpu", "args.offload_parameters=cpu")
    ),
    "pipeline": Way("ch5_deepspeed_pipeline", ("args.microbatch_size=3",)),
    "megatron-tensor": Way("ch5_megatron", ("args.microbatch_size=6", "args.tensor_parallel=2")),
    "megatron-stages": Way(
        "ch5_megatron",
        # One sequence at a time: virtual stages take microbatches in pairs, and of two copies each has six.
        ("args.microbatch_size=1", "args.pipeline_parallel=2", "args.stages_per_rank=2"),
    ),
    "megatron-copies": Way("ch5_megatron", ("args.microbatch_size=6",)),
    "megatron-torchrun": Way(
        "ch5_megatron", ("args.microbatch_size=6", "args.tensor_parallel=2", "launch=torchrun")
    ),
    "mixture-torchrun": Way("ch5_deepspeed_moe", ("args.microbatch_size=6", "launch=torchrun")),
}

LENDING = REPOSITORY / "tests" / "recipes" / "python_with_megatron_on_cpu"


@dataclasses.dataclass(frozen=True)
class Starter:
    """Starts a way on two nodes, and knows its losses when nothing happens."""

    launcher: Launcher
    folder: Path
    found: dict[str, Losses]

    def __call__(self, name: str, folder: str = "job", tasks_per_node: int = 1) -> Started:
        way = WAYS[name]
        lent = (f"python={LENDING}",) if way.recipe == "ch5_megatron" else ()
        words = (f"tasks_per_node={tasks_per_node}", *SAME_FOR_ALL, *lent, *way.words)
        return start(self.launcher, self.folder / folder, *words, recipe=way.recipe)

    def undisturbed(self, name: str) -> Losses:
        """Of two ranks, one on each node."""
        if name not in self.found:
            started = self(name, "undisturbed")
            assert ended(started.run)["cause"] == "done"
            self.found[name] = losses_by_step(started.run)
        return self.found[name]


@pytest.fixture(scope="module")
def found() -> dict[str, Losses]:
    """What `Starter.undisturbed` keeps between the tests."""
    return {}


@pytest.fixture
def starter(launcher: Launcher, tmp_path: Path, found: dict[str, Losses]) -> Starter:
    return Starter(launcher, tmp_path, found)


Moment = Callable[[Started], Callable[[], bool]]


def ways(*in_every_suite: str) -> list[object]:
    """All of WAYS; those that are not named only where one asks for all."""
    return [name if name in in_every_suite else pytest.param(name, marks=thorough) for name in WAYS]


@pytest.mark.parametrize("name", ways("zero2"))
def test_a_requeue_in_a_save(starter: Starter, name: str) -> None:
    requeue_in_a_save(starter, name, starter.undisturbed(name))


def test_a_requeue_of_megatron_core_in_a_save(starter: Starter) -> None:
    """Its losses are ZeRO's, before and after: another order of summation. Bit for bit its own: THOROUGH=1, above."""
    requeue_in_a_save(starter, "megatron-tensor", starter.undisturbed("zero2"), OTHER_ORDER)


def requeue_in_a_save(starter: Starter, name: str, reference: Losses, tolerance: float = SAME_ORDER) -> None:
    started = starter(name)
    with frozen(started, in_a_save(started)):
        starter.launcher.slurm("scontrol", "requeue", started.run.jobs()[0]["job_id"])
    started.goes_on()
    check(started, reference, ["requeued", "done"], tolerance=tolerance)
    # Not that the last step is saved: on a busy machine that may take longer than Slurm waits.
    assert [event for event in started.events() if event["event"] == "failed"] == []
    assert started.job()["Restarts"] == "1"


@pytest.mark.parametrize("moment", [in_a_step, in_a_save])
@pytest.mark.parametrize("name", ways())
def test_the_kill_of_one_rank(starter: Starter, name: str, moment: Moment) -> None:
    reference = starter.undisturbed(name)
    started = starter(name)
    with frozen(started, moment(started)) as ranks:
        saved = started.saved()
        os.kill(ranks[1], signal.SIGKILL)
    first, second = check(started, reference, ["killed", "done"])
    assert (first["rank"], first["action"]) == (1, "restarted")
    assert first["saved_out"] == second["saved_in"] == saved, "a save that no rank finished counts"
    assert second["job_id"] == first["job_id"]


@pytest.mark.parametrize("name", ways("zero2"))
def test_four_ranks_then_two_then_four(starter: Starter, name: str) -> None:
    """Two on each of two nodes, then both on one."""
    reference = starter.undisturbed(name)
    started = starter(name, tasks_per_node=2)
    stop(started, 1)
    starter.launcher("resume", started.run.id, "nodes=1")
    stop(started, 2)
    starter.launcher("resume", started.run.id, "nodes=2")
    records = check(started, reference, ["cancelled", "cancelled", "done"], tolerance=OTHER_ORDER)
    assert [record["world_size"] for record in records] == [4, 2, 4]
    assert [len(record["nodes"]) for record in records] == [2, 1, 2]
