"""A small checkout to compose jobs in: two recipes, the real profiles, a machine without GPUs or sbatch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.config import Composed, compose, compose_points, compose_with_origins
from launcher.machine import NodeFacts
from launcher.paths import REPOSITORY
from launcher.spec import JobSpec, UserError

ARGUMENTS = """
from dataclasses import dataclass
from recipes.lib.arguments import ArgumentError, TrainArgs, argument

@dataclass(frozen=True, kw_only=True)
class SampleArgs(TrainArgs):
    strategy: str = argument("full_shard", "how to shard", ("full_shard", "hybrid_shard"))
    note: str = argument("", "any text")
    schedules: list[str] = argument([], "some names")

    def __post_init__(self) -> None:
        if self.batch_size % 2:
            raise ArgumentError("batch_size", self.batch_size, "wants an even number")
"""

BASELINE = """
summary: one device
entrypoint: recipes.ch1.baseline
arguments: sample_checkout_arguments:SampleArgs
max_world_size: 1
"""

FSDP = """
summary: sharded parameters
entrypoint: recipes.ch4.fsdp
arguments: sample_checkout_arguments:SampleArgs
job: {nodes: 2, time: 30m}
args: {steps: 100, lr: 1e-4}
"""


@dataclass(frozen=True)
class SampleCheckout:
    """A repository with the recipes ch1_baseline and ch4_fsdp, to write profiles into."""

    path: Path

    def compose(self, *words: str, cwd: Path | None = None) -> JobSpec:
        return compose(words, repository=self.path, cwd=cwd)

    def composed(self, *words: str, cwd: Path | None = None) -> Composed:
        return compose_with_origins(words, repository=self.path, cwd=cwd)

    def sweep(self, *words: str) -> list[Composed]:
        return compose_points(words, repository=self.path)

    def mistake(self, *words: str) -> str:
        """The one line that these words are answered with."""
        with pytest.raises(UserError) as caught:
            self.compose(*words)
        line = str(caught.value)
        assert len(line.splitlines()) == 1, line
        return line

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SampleCheckout]:
    sample = SampleCheckout(tmp_path / "checkout")
    sample.write("recipes/ch1/baseline.yaml", BASELINE)
    sample.write("recipes/ch4/fsdp.yaml", FSDP)
    sample.write("modules/sample_checkout_arguments.py", ARGUMENTS)
    for folder in ("clusters", "fabrics"):
        shutil.copytree(REPOSITORY / "env" / folder, sample.path / "env" / folder)
    monkeypatch.syspath_prepend(sample.path / "modules")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("LAUNCHER_CLUSTERS", raising=False)
    machine_has(monkeypatch, gpus=0, cores=4)
    yield sample
    sys.modules.pop("sample_checkout_arguments", None)


def machine_has(monkeypatch: pytest.MonkeyPatch, *, gpus: int, cores: int, box_nodes: int = 2) -> None:
    """Let the profiles find this hardware, whatever the machine of the test has."""
    cores_each = max(1, cores // box_nodes)
    share = NodeFacts(gpus // box_nodes, cores_each, cores_each, nodes=box_nodes)
    monkeypatch.setattr("launcher.clusters.this_machine", lambda: NodeFacts(gpus, cores, cores))
    monkeypatch.setattr("launcher.clusters.box_node", lambda: share)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch, checkout: SampleCheckout) -> None:
    """The machine has four GPUs and sixteen cores."""
    machine_has(monkeypatch, gpus=4, cores=16)


@pytest.fixture
def sbatch_on_path(tmp_path: Path, checkout: SampleCheckout) -> None:
    """An sbatch that PATH leads to; nothing calls it."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\nexit 1\n")
    sbatch.chmod(0o755)
