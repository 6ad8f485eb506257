"""Ranks that are stopped in many ways, one run after the other in the same processes; `test_stopping` starts them.

    python -m tests.recipes.stopping_worker FOLDER     (one rank; torch's variables in the environment)

Each rank writes what it saw to FOLDER/seen-RANK.json, and at last leaves as a stopped recipe does.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.lib import checkpoint, manifest, writing
from recipes.lib.distributed import World, joined
from recipes.lib.stopping import OF_THIS_PROCESS, STOP_FILE, StopFlag, Stopped
from recipes.lib.training import Plan, Technique, train
from tests.recipes.parity import Case, build, plan_for

STEPS = 6
STOPPED_IN = 3


@dataclasses.dataclass
class Disturbed:
    """A technique that does something in the middle of step STOPPED_IN."""

    technique: Technique
    disturb: Callable[[], object]
    step: int = 0

    @property
    def model(self) -> torch.nn.Module:
        """The technique's."""
        return self.technique.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The technique's."""
        return self.technique.optimizer

    def accumulate_gradients(self, batches: Sequence[tuple[Tensor, Tensor]], token_count: Tensor) -> Tensor:
        """The technique's, after the disturbance."""
        self.step += 1
        if self.step == STOPPED_IN:
            self.disturb()
        return self.technique.accumulate_gradients(batches, token_count)


def broken_once() -> Callable[..., int]:
    """A write that fails as a disk does, the first time."""
    really_write, failures = writing._ChecksummedFile.write, [OSError(errno.EIO, os.strerror(errno.EIO))]

    def write(stream: Any, data: Any) -> int:
        if failures:
            raise failures.pop()
        return really_write(stream, data)

    return write


def run(
    folder: Path,
    name: str,
    technique: str,
    world: World,
    disturb: Callable[[], object],
    save_every: int = 0,
) -> str:
    """One attempt of the run `name`; how it ended."""
    os.environ["ATTEMPT_DIR"] = str(folder / name / "attempt")
    (folder / name / "attempt").mkdir(parents=True, exist_ok=True)
    case = Case(name, technique, world.size, args={"batch_size": 6, "steps": STEPS, "save_every": save_every})
    plan: Plan = plan_for(case, folder, world)
    found, passed_over = checkpoint.newest(plan.run_directory, world)
    assert passed_over == []
    plan = dataclasses.replace(plan, resume_from=found)
    try:
        train(plan, Disturbed(build(case, plan), disturb))
    except Stopped as stopped:
        steps = [manifest.step_of(entry) for entry in manifest.folders(plan.run_directory)]
        return f"{stopped.code} with {steps}"
    finally:
        OF_THIS_PROCESS._heard = ""
    return "done"


def asked_by_file(folder: Path, name: str) -> Callable[[], object]:
    """What the launcher does."""

    def ask() -> None:
        path = folder / name / "attempt" / STOP_FILE
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps({"reason": "preemption", "deadline": None, "time": time.time()}))
        beside.rename(path)

    return ask


def seconds_to_agree(folder: Path, world: World) -> float:
    """What one step boundary costs for the agreement, in the fastest tenth: in the others somebody else had the CPU."""
    flag, durations = StopFlag(), []
    for _ in range(200):
        began = time.perf_counter()
        assert flag.agreed(world.rank, folder) is None
        durations.append(time.perf_counter() - began)
    return statistics.quantiles(durations, n=10)[0]


def main() -> None:
    """One rank."""
    folder = Path(sys.argv[1])
    OF_THIS_PROCESS.listen()

    def nothing() -> None:
        pass

    def one_signal(rank: int, number: int) -> Callable[[], object]:
        return lambda: os.kill(os.getpid(), number) if world.rank == rank else None

    with joined("cpu") as world:
        seen: dict[str, Any] = {"agreement": seconds_to_agree(folder, world)}
        seen["straight-fsdp"] = [run(folder, "straight-fsdp", "fsdp", world, nothing)]
        seen["straight-ddp"] = [run(folder, "straight-ddp", "ddp", world, nothing)]
        by_term = one_signal(1, signal.SIGTERM)
        seen["signal"] = [
            run(folder, "signal", "fsdp", world, by_term),
            run(folder, "signal", "fsdp", world, nothing),
        ]
        by_file = asked_by_file(folder, "file") if world.is_first else nothing
        seen["file"] = [run(folder, "file", "ddp", world, by_file)]
        (folder / "file" / "attempt" / STOP_FILE).unlink(missing_ok=True)
        seen["file"].append(run(folder, "file", "ddp", world, nothing))
        # A disk error on one rank, in the save after step 2: no rank may wait for the other, and both go on.
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == 1:
                patch.setattr(writing._ChecksummedFile, "write", broken_once())
            seen["broken"] = [run(folder, "broken", "fsdp", world, nothing, save_every=2)]
        # Before the first step: nothing to save.
        one_signal(0, signal.SIGUSR1)()
        seen["early"] = [run(folder, "early", "fsdp", world, nothing)]
        (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))
        raise Stopped


if __name__ == "__main__":
    main()
