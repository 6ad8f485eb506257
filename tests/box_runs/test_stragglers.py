"""One rank of a real recipe is ten times slower: the log, `status`, the ledger and `report` name it and its node."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launcher import runs
from tests.box_runs.support import Launcher, ended, submit_entrypoint, wait_until
from tests.box_runs.survival import runs_log

TRAINING = {"module": "faulty", "batch_size": 8, "sequence_length": 128, "log_every": 1, "save_every": -1}


def trained(launcher: Launcher, recipe: str, fault: str, steps: int) -> runs.Run:
    return submit_entrypoint(
        launcher, "nodes=2", "tasks_per_node=1",
        recipe=recipe, fault=fault, faulty_rank=1, steps=steps, **TRAINING,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "fault"), [("recipes.ch4.fsdp", "slow_compute"), ("recipes.ch3.ddp", "slow_input")]
)
def test_a_slow_rank_is_named_with_its_node(launcher: Launcher, recipe: str, fault: str) -> None:
    run = trained(launcher, recipe, fault, steps=30)
    wait_until(lambda: run.state().get("slow") or run.attempts(), "the slow rank in the run's state")
    assert not run.attempts(), "it was named after the end only, or never"
    shown = launcher("status", run.id).stdout
    record = ended(run)
    assert record["cause"] == "done"
    (slow,) = record["slow"]
    assert (slow["rank"], slow["host"]) == (1, record["nodes"][1])
    assert slow["own"] > 3 * slow["others"]
    sentence = f"rank 1 on {record['nodes'][1]} is slow: "
    assert sentence in runs_log(run)
    assert sentence in shown
    assert sentence in launcher("status", run.id).stdout
    assert sentence in launcher("report", run.id).stdout
    assert sentence in (run.path / "report.html").read_text()
    assert json.loads(launcher("report", run.id, "--json").stdout)["attempts"][0]["slow"][0].startswith(
        sentence
    )


@contextmanager
def busy_cores() -> Iterator[None]:
    """Two processes that only burn time, on a machine that has few cores."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_where_all_ranks_share_busy_cores_nobody_is_named(launcher: Launcher) -> None:
    with busy_cores():
        run = trained(launcher, "recipes.ch4.fsdp", "none", steps=40)
        record = ended(run)
    assert record["cause"] == "done"
    assert record["slow"] == []
    assert " is slow" not in runs_log(run)
    assert " slow" not in launcher("report", run.id).stdout
