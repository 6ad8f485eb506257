"""Three ranks that really talk: right results are called right, a wrong number is traced to the rank that sent it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.lib.collectives import COLLECTIVES
from recipes.lib.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
RANKS = 3


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the ranks of communication_worker.py found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    done = subprocess.run(
        [*command, "-m", "tests.recipes.communication_worker"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    answer: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return answer


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_right_result_is_called_right(found: dict[str, Any], name: str) -> None:
    assert found["right"][name] == []


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_wrong_number_is_traced_to_its_sender(found: dict[str, Any], name: str) -> None:
    """Rank 1 changes one number of many by one; from the root alone, rank 0, comes what it has in a broadcast."""
    said = found["spoilt"][name]
    if name in ("broadcast", "scatter"):
        assert said is None
    else:
        assert said.startswith("rank 1 ") or said.split(":")[0].endswith("from rank 1"), said


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_hand_gives_what_torch_gives(found: dict[str, Any], name: str) -> None:
    assert found["like_torch"][name]
    assert found["by_hand"][name] == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_forgotten_round_is_noticed(found: dict[str, Any], name: str) -> None:
    assert found["cut_short"][name] > 0


def test_a_pair_is_timed_and_checked(found: dict[str, Any]) -> None:
    assert found["pair"] == {"trials": 2, "wrong": 0}
    assert found["spoilt_pair"].startswith("rank 2 receives wrong numbers from rank 1")


def test_the_rank_that_the_others_wait_for_is_named(found: dict[str, Any]) -> None:
    assert found["late"] == 2


def test_a_timing_has_its_trials_and_repeats_short_calls(found: dict[str, Any]) -> None:
    assert found["timing"]["trials"] == 3
    assert found["timing"]["calls"] > 1
    assert 0 < found["timing"]["seconds"] < 1


def test_the_interface_in_use_is_read_from_open_connections(found: dict[str, Any]) -> None:
    """torchrun's ranks on one machine meet at its own name's address."""
    assert len(found["interfaces"]) == 1
    assert "(" in found["interfaces"][0]
    assert "unknown" not in found["interfaces"][0]
