"""What a user of a running box relies on, on the box that all tests share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from launcher import box as boxes


def in_box(box: boxes.Box, *command: str, **variables: str) -> str:
    """Output of a command that runs in the box's environment. Raises CalledProcessError with what it said."""
    result = subprocess.run(
        command,
        env={**os.environ, **boxes.environment(box), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, f"{command} failed: {result.stderr}"
    return result.stdout


def test_srun_reaches_two_nodes(box: boxes.Box) -> None:
    names = in_box(box, "srun", "-N2", "sh", "-c", "echo $SLURMD_NODENAME").split()
    assert len(set(names)) == 2
    assert set(names) <= set(box.nodes)


def test_a_job_submits_another_job(box: boxes.Box, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    script = f"sbatch --wait --output=/dev/null --wrap 'echo $SLURM_JOB_ID > {inner}'"
    in_box(box, "srun", "-N1", "sh", "-c", script)
    assert inner.read_text("utf-8").strip()
