"""Ranks find each other, or fail within seconds; nothing becomes a world of one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from launcher import rendezvous
from launcher.rendezvous import Endpoint, Rank, RendezvousError, rank_from_environment
from launcher.spec import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
SLURM = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}
SUBMITIT = {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [(TORCHRUN, Rank(5, 8, 1, 4, 1)), (SLURM, Rank(6, 8, 2, 4, 1)), (SUBMITIT, Rank(1, 2, 1, 2, 0))],
)
def test_the_rank_comes_from_whoever_started_the_task(environment: dict[str, str], rank: Rank) -> None:
    assert rank_from_environment(environment) == rank
    assert rank_from_environment(rank.environment()) == rank, "the contract's own variables must read back"


def test_a_torchrun_worker_inside_a_slurm_step_is_numbered_by_torchrun() -> None:
    assert rank_from_environment({**SLURM, **TORCHRUN}).rank == 5


def test_a_batch_step_is_no_rank_and_never_a_world_of_one() -> None:
    with pytest.raises(RendezvousError, match="no rank in the environment"):
        rank_from_environment({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"})


def test_an_address_that_does_not_resolve_is_an_error_within_seconds() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"'no-such-node\.invalid' does not resolve on"):
        rendezvous.resolve("no-such-node.invalid")
    assert time.monotonic() - began < 10
    assert rendezvous.resolve("127.0.0.11") == "127.0.0.11"
    assert rendezvous.resolve("localhost") in ("127.0.0.1", "::1")


def test_the_endpoint_is_seen_by_who_waits_for_it(tmp_path: Path) -> None:
    path = tmp_path / "rendezvous.json"
    threading.Timer(0.2, rendezvous.publish, [path, Endpoint("10.0.0.1", 4711)]).start()
    assert rendezvous.wait_for(path, deadline_seconds=60) == Endpoint("10.0.0.1", 4711)
    assert os.listdir(tmp_path) == ["rendezvous.json"], "a temporary file was left"


def test_waiting_ends_at_the_deadline_and_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(RendezvousError, match=r"rank 0 published no address in .*its log says why"):
        rendezvous.wait_for(tmp_path / "rendezvous.json", deadline_seconds=0.1)
