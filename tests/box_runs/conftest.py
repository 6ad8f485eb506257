"""The launcher as a user runs it, against the real Slurm of the shared box."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from launcher import box as box_module
from tests.box_runs.conformance import check, losses_by_step, start
from tests.box_runs.support import Launcher, ended


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


@pytest.fixture
def undisturbed(
    launcher: Launcher, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, float]:
    """The losses of the recipe on two nodes when nothing happens: of one run, for all files and workers."""
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            started = start(launcher, tmp_path / "undisturbed")
            assert ended(started.run)["cause"] == "done"
            losses = losses_by_step(started.run)
            with pytest.raises(AssertionError, match="nothing ended the run"):
                check(started, losses, ["done"])
            file.write_text(json.dumps(losses))
    return {int(step): loss for step, loss in json.loads(file.read_text()).items()}
