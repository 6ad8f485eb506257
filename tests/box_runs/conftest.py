"""The launcher as a user runs it, against the real Slurm of the shared box."""

from __future__ import annotations

import os
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
