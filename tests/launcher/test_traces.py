"""From the ranks' flight recorders: the collective that cannot finish, and who is missing in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import traces, witness
from launcher.traces import held, parse
from launcher.witness import newest
from tests.recipes.ranks import place_of_rank

WORKER = Path(__file__).with_name("witness_worker.py")


def entry(number: int, name: str = "gloo:all_reduce", group: str = "0", **more: Any) -> dict[str, Any]:
    """A call as the recorder of torch 2.11 and 2.13 writes it, without the keys that nobody reads."""
    record = {
        "record_id": number, "process_group": [group, "default_pg"], "profiling_name": name,
        "collective_seq_id": number, "p2p_seq_id": 0, "is_p2p": False, "state": "scheduled", "retired": True,
        "input_sizes": [[3, 4]], "input_dtypes": ["Float"],
    }  # fmt: skip
    return {**record, **more}


def trace(*entries: dict[str, Any], backend: str = "gloo", ranks: int = 3) -> traces.Trace:
    groups = {"0": {"ranks": list(range(ranks)), "description": "default_pg"}}
    return parse(json.dumps({"groups": groups, "calls": {backend: entries}}))


DONE = [entry(number) for number in (1, 2)]
WAITS = entry(3, retired=False)


def test_who_did_not_make_the_call_that_the_others_wait_in_is_missing() -> None:
    found = held({0: trace(*DONE, WAITS), 1: trace(*DONE), 2: trace(*DONE, WAITS)}, range(3))
    assert found is not None
    assert (found.waiting, found.missing) == ((0, 2), {1: "made call 2 last"})
    assert str(found) == "gloo all_reduce of [3, 4] Float, call 3 of group 0 (default_pg)"


def test_who_called_something_else_in_its_place_is_missing_too() -> None:
    wrong = entry(3, "gloo:broadcast", retired=False)
    found = held({0: trace(*DONE, WAITS), 1: trace(*DONE, wrong), 2: trace(*DONE, WAITS)}, range(3))
    assert found is not None
    assert (found.call.name, found.missing) == ("all_reduce", {1: "called broadcast instead"})


def test_a_rank_without_a_trace_is_missing() -> None:
    found = held({0: trace(*DONE, WAITS), 2: trace(*DONE, WAITS)}, range(3))
    assert found is not None
    assert found.missing == {1: "gave no trace"}


def test_who_has_gone_on_is_not_missing_and_who_waits_in_no_call_is_none() -> None:
    """A rank may leave a broadcast before the others have it; and where all have come the network is to blame."""
    found = held({0: trace(*DONE, WAITS), 1: trace(*DONE, entry(3)), 2: trace(*DONE, WAITS)}, range(3))
    assert found is not None
    assert (found.waiting, found.missing) == ((0, 2), {})
    assert held({rank: trace(*DONE) for rank in range(3)}, range(3)) is None
    assert held({}, range(3)) is None


def test_of_calls_that_wait_behind_each_other_the_first_counts() -> None:
    queued = [entry(number, retired=False, state="started") for number in (3, 4, 5)]
    found = held({0: trace(*DONE, *queued), 1: trace(*DONE, entry(3, retired=False)), 2: trace()}, range(3))
    assert found is not None
    assert (found.call.number, found.missing) == (3, {2: "made no call there"})


def test_a_call_of_nccl_that_its_watchdog_has_not_come_to_retire_is_over_when_completed() -> None:
    over = entry(3, "nccl:all_reduce", retired=False, state="completed")
    assert held({rank: trace(*DONE, over, backend="nccl") for rank in range(3)}, range(3)) is None


def test_a_collective_with_somebody_missing_comes_before_one_that_more_ranks_wait_in() -> None:
    """Threads that write checkpoints wait in a group of their own; that says nothing."""
    both = [*DONE, WAITS, entry(9, "gloo:barrier", "1", retired=False)]
    found = held({0: trace(*both), 1: trace(*DONE, both[-1]), 2: trace(*DONE, both[-1])}, range(3))
    assert found is not None
    assert (found.call.key, found.missing.keys()) == (("gloo", "0", 3), {1, 2})


def test_of_a_long_record_the_first_pending_and_the_last_finished_calls_are_kept() -> None:
    entries = [entry(number) for number in range(1, 1000)]
    entries += [entry(number, retired=False) for number in range(1000, 2000)]
    kept = [each["record_id"] for each in newest(entries)]
    assert kept == list(range(1000 - witness.KEPT_DONE, 1000 + witness.KEPT_PENDING))


def test_variables_of_the_user_are_left_alone_by_their_older_names_too(tmp_path: Path) -> None:
    assert traces.variables(tmp_path, {}) == {
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/nccl-trace-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
    given = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/scratch/mine"}
    assert traces.variables(tmp_path, given).keys() == {"TORCH_NCCL_DUMP_ON_TIMEOUT"}


@contextmanager
def two_ranks(folder: Path, backend: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two real ranks, of which the first waits for the second for ever."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), backend],
            env={
                **os.environ,
                "RANK": str(rank),
                "PYTHONPATH": str(WORKER.parents[2]),
                **place_of_rank(rank, 2, "cuda" if backend == "nccl" else "cpu"),
            },
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def told_by(processes: list[subprocess.Popen[bytes]], folder: Path, end: float) -> object:
    """What the ranks say when they are asked now: the collective, who waits in it, and who is missing."""
    for path in traces.written(folder):
        path.unlink()
    for process in processes:
        process.send_signal(signal.SIGUSR2)
    while len(traces.written(folder)) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    found = held(traces.read(folder), range(2))
    return found and (str(found), found.waiting, found.missing)


def check_two_ranks(folder: Path, backend: str) -> None:
    with two_ranks(folder, backend) as processes:
        end = time.monotonic() + 180.0
        while not (folder / "stuck").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        # From there into the call takes a moment, and so does the note that the one before it is over: asked again.
        expected = (
            f"{backend} all_reduce of [7] Float, call 3 of group 0 (default_pg)",
            (0,),
            {1: "made call 2 last"},
        )
        while (told := told_by(processes, folder, end)) != expected:
            assert time.monotonic() < end, told
            time.sleep(0.5)
        assert [process.poll() for process in processes] == [None, None]
    assert all("most recent call first" in (folder / f"stacks-{rank}.txt").read_text() for rank in range(2))


def test_two_real_ranks_on_gloo_tell_from_within_a_collective(tmp_path: Path) -> None:
    check_two_ranks(tmp_path, "gloo")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_real_ranks_on_nccl_tell_from_within_a_collective(tmp_path: Path) -> None:
    check_two_ranks(tmp_path, "nccl")
