"""The active tier on a real Slurm of four nodes: real processes, gloo, and nodes that stop or are slow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from launcher import box as boxes
from tests.checks import test_rails

PATIENT = "--active-budget=150"
"""Three rounds in which four nodes load torch on this machine's few cores, whatever else runs there."""
ROOT = Path(__file__).resolve().parent.parent.parent


def checked(
    box: boxes.Box, *words: str, before: tuple[str, ...] = (), **variables: str
) -> tuple[int, str, float]:
    """Status, output and seconds of the active tier in an allocation of four nodes."""
    command = [*before, sys.executable, "-m", "checks", "--tier=active", "--gpus=0", "--fabric=tcp", *words]
    began = time.monotonic()
    done = subprocess.run(
        ["salloc", "--quiet", "--nodes=4", *command],
        env={
            **os.environ, **boxes.environment(box), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1", **variables,
        },
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_healthy_nodes_pass_within_the_budget(box: boxes.Box) -> None:
    status, out, seconds = checked(box)
    assert "net.all_reduce: pass: n[1-4]: 64 KiB" in out, out
    assert "net.pairs: pass: n[1-4]" in out, out
    assert "undetermined" not in out
    # Four nodes share this machine's cores: one of them may well compute at half the speed of another.
    assert status in (0, 2), out
    assert seconds < 95


def test_a_node_that_stops_is_named(box: boxes.Box) -> None:
    status, out, seconds = checked(box, CHECKS_TRIAL="n3 stop")
    assert status == 1, out
    assert "leave out: sbatch --exclude=n3\n" in out, out
    assert "hung at: all_reduce" in out
    assert seconds < 95


def test_a_node_that_is_slow_is_named(box: boxes.Box) -> None:
    status, out, _ = checked(box, PATIENT, CHECKS_TRIAL="n2 slow")
    assert status == 1, out
    assert "leave out: sbatch --exclude=n2\n" in out, out


def test_a_link_that_is_slow_is_no_node(box: boxes.Box) -> None:
    _, out, _ = checked(box, PATIENT, CHECKS_TRIAL="n1-n2 slow")
    assert "link: n1 - n2: " in out, out
    assert "leave out: sbatch --exclude=n2\nof n2 it is not known that they are bad" in out, out


def test_one_task_of_a_step_conducts_and_the_others_go_home(box: boxes.Box) -> None:
    status, out, _ = checked(box, before=("srun", "--ntasks-per-node=1"))
    assert out.count(" of pairs") == 1, out
    assert "net.pairs: pass: n[1-4]" in out, out
    assert status in (0, 2)


def test_a_slow_rail_is_named_with_its_node(box: boxes.Box, tmp_path: Path) -> None:
    """Every node has two ports, and a stand-in where perftest's ib_write_bw would be."""
    for name in test_rails.NODES:
        test_rails.tree(tmp_path, name)
    test_rails.install(tmp_path)
    words = ("--fabric=infiniband", f"--root={tmp_path}/{{node}}", PATIENT)
    path = f"{tmp_path}:{boxes.environment(box)['PATH']}"
    status, out, _ = checked(box, *words, PATH=path, STAND_IN_FAULTS="n2/mlx5_1 45")
    assert status == 1, out
    assert (
        "rail: n2 (mlx5_1): with n1: n1 to n2 45 Gb/s, n2 to n1 45 Gb/s, expected 360 Gb/s; with " in out
    ), out
    assert "leave out: sbatch --exclude=n2\n" in out, out
    assert "net.pairs: pass: n[1-4]" in out, out
