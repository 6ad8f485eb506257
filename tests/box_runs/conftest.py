"""The launcher as a user runs it, against the real Slurm of the shared box."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import box as box_module
from tests.box_runs.support import Launcher


@pytest.fixture
def launcher(box: box_module.Box, tmp_path: Path) -> Launcher:
    run_root = tmp_path / "runs of a user"
    environment = {
        **os.environ,
        **box_module.environment(box),
        "LAUNCHER_BOX": box.name,
        "LAUNCHER_RUNS": str(run_root),
    }
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return Launcher(environment, run_root)


@pytest.fixture
def own_box(launcher: Launcher) -> Iterator[tuple[Launcher, box_module.Box]]:
    """A box whose daemons a test may kill."""
    name = f"fragile-{os.getpid()}"
    made = box_module.up(nodes=3, name=name, gpus=0)
    try:
        environment = {**launcher.environment, **box_module.environment(made), "LAUNCHER_BOX": name}
        yield dataclasses.replace(launcher, environment=environment), made
    finally:
        box_module.down(name)
