"""When a run counts as hung, which rank is named, and which one is slow."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.hangs import HangWatch, Place, judge, parse_stacks
from launcher.heartbeats import STRAGGLER_BEATS, Heartbeat, Monitor, Stalled, Straggler, parse, sentences
from launcher.spec import UserError
from launcher.traces import Call, Held


def beat(rank: int, step: int, now: float, phase: str = "step", own: float | None = None) -> Heartbeat:
    return Heartbeat(rank, step, phase, f"n{rank}", 100 + rank, now, own)


def run_of(monitor: Monitor, steps: int, seconds: float, ranks: int = 2) -> float:
    """Let all ranks do some steps; gives the time of the last."""
    for step in range(1, steps + 1):
        monitor.take([beat(rank, step, step * seconds) for rank in range(ranks)], step * seconds)
    return steps * seconds


def test_nothing_moves_for_long_enough() -> None:
    monitor = Monitor()
    end = run_of(monitor, 5, 1.0)
    assert monitor.stalled(end + 29.0) is None
    found = monitor.stalled(end + 31.0)
    assert found is not None
    assert (found.step, found.behind, round(found.seconds)) == (5, (), 31)


def test_slow_steps_make_patient() -> None:
    monitor = Monitor()
    end = run_of(monitor, 5, 20.0)
    assert monitor.median_step == 20.0
    assert monitor.stalled(end + 199.0) is None
    assert monitor.stalled(end + 201.0) is not None


def test_before_two_steps_nobody_knows_how_long_one_takes() -> None:
    monitor = Monitor()
    end = run_of(monitor, 2, 1.0)
    assert monitor.stalled(end + 1000.0) is None


def test_a_save_may_take_ten_times_as_long() -> None:
    monitor = Monitor()
    end = run_of(monitor, 5, 1.0)
    monitor.take([beat(0, 5, end, "save"), beat(1, 5, end, "save")], end)
    assert monitor.stalled(end + 299.0) is None
    assert monitor.stalled(end + 301.0) is not None


def test_ranks_that_are_done_hang_no_more() -> None:
    monitor = Monitor()
    end = run_of(monitor, 5, 1.0)
    monitor.take([beat(0, 5, end, "done"), beat(1, 5, end, "done")], end)
    assert monitor.stalled(end + 1000.0) is None


def test_a_rank_that_repeats_its_heartbeat_does_not_move_whatever_its_clock_says() -> None:
    monitor = Monitor()
    end = run_of(monitor, 5, 1.0)
    monitor.take([beat(0, 5, end + 30.0)], end + 30.0)
    assert monitor.stalled(end + 31.0) is not None


def named(monitor: Monitor, beats: int, own: Callable[[int, int], float], ranks: int = 4) -> list[Straggler]:
    """Who is called slow in so many beats, `own` being a rank's own seconds at a step."""
    found = []
    for step in range(1, beats + 1):
        monitor.take([beat(rank, step, 1.0, own=own(rank, step)) for rank in range(ranks)], 1.0)
        found += monitor.stragglers()
        found += monitor.stragglers()  # a second look at the same beats is no second beat
    return found


def test_a_slow_rank_is_named_once_with_its_time_and_the_others() -> None:
    found = named(Monitor(), 3 * STRAGGLER_BEATS, lambda rank, step: 1.0 if rank == 2 else 0.1)
    assert found == [Straggler(2, "n2", STRAGGLER_BEATS, 1.0, 0.1)]
    assert str(found[0]) == (
        "rank 2 on n2 is slow: 1 s of its own work in a step, the others 0.1 s (10 times); seen at step 5"
    )


def test_a_rank_that_is_slow_now_and_then_is_not_named() -> None:
    assert named(Monitor(), 40, lambda rank, step: 1.0 if rank == 2 and step % STRAGGLER_BEATS else 0.1) == []


def test_what_another_version_wrote_of_a_slow_rank_is_left_out() -> None:
    record = {"rank": 2, "host": "n2", "step": 5, "own": 1.0, "others": 0.1}
    assert sentences([record, {**record, "why": "?"}, "rank 2"]) == (str(Straggler(**record)),)
    assert sentences(None) == ()


def test_equal_ranks_are_not_slow() -> None:
    assert named(Monitor(), 40, lambda rank, step: 0.1 + 0.05 * rank) == []


def test_of_steps_of_milliseconds_a_factor_says_nothing() -> None:
    assert named(Monitor(), 40, lambda rank, step: 0.09 if rank == 2 else 0.001) == []


def test_one_rank_alone_is_not_slow() -> None:
    assert named(Monitor(), 40, lambda rank, step: 1.0, ranks=1) == []


def test_a_heartbeat_that_is_being_written_is_no_heartbeat() -> None:
    assert parse(0, "") is None
    assert parse(0, '{"step": 3, "time": 1.0, "phase": "step"}   ') == Heartbeat(0, 3, "step", "", 0, 1.0)


IN_BARRIER = """Thread 0x00007f01 (most recent call first):
  File "/lib/python3.11/threading.py", line 324 in wait
  File "/lib/python3.11/threading.py", line 995 in _bootstrap

Current thread 0x00007f00 (most recent call first):
  File "/venv/site-packages/torch/distributed/distributed_c10d.py", line 4818 in barrier
  File "/venv/site-packages/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/repo/recipes/lib/training.py", line 80 in train
  File "/repo/recipes/ch4/fsdp.py", line 9 in <module>
  File "<frozen runpy>", line 88 in _run_code
  File "/repo/launcher/task.py", line 50 in <module>
"""
IN_LOADER = """Current thread 0x00007f00 (most recent call first):
  File "/lib/python3.11/socket.py", line 706 in readinto
  File "/repo/recipes/lib/dataset.py", line 44 in batch
  File "/repo/recipes/lib/training.py", line 70 in train
  File "/repo/recipes/ch4/fsdp.py", line 9 in <module>
"""


def place(text: str) -> Place:
    found = parse_stacks(text)
    assert found is not None
    return found


def test_the_rank_outside_of_the_collective_is_named_with_its_line_and_the_collective() -> None:
    stalled = Stalled(40.0, tuple(beat(rank, 7, 1.0) for rank in range(3)))
    hang = judge(stalled, {0: place(IN_BARRIER), 1: place(IN_LOADER), 2: place(IN_BARRIER)})
    assert hang.rank == 1
    assert hang.lines == (
        "nothing moved for 40 s after step 7: rank 1 on n1 stands in batch (dataset.py:44) "
        "while the others wait in barrier",
        "rank 1 on n1: batch (dataset.py:44)",
        "rank 0 on n0: barrier, called from train (training.py:80)",
        "rank 2 on n2: barrier, called from train (training.py:80)",
    )


def test_the_flight_recorder_names_the_call_and_the_rank_that_did_not_make_it() -> None:
    """Rank 2 stands in a collective too, but in another one: by the stacks alone rank 1 would be named, or nobody."""
    stalled = Stalled(40.0, tuple(beat(rank, 7, 1.0) for rank in range(3)))
    call = Call("nccl", "0", 13, "all_reduce", "[3, 4] Float", 20, is_over=False)
    held = Held(call, "default_pg", (0, 1), {2: "made call 12 last"})
    hang = judge(stalled, {rank: place(IN_BARRIER) for rank in range(3)}, held)
    assert hang.rank == 2
    assert hang.lines[:2] == (
        "nothing moved for 40 s after step 7: rank 2 on n2 stands in train (training.py:80) while the others wait in "
        "barrier: nccl all_reduce of [3, 4] Float, call 13 of group 0 (default_pg)",
        "rank 2 on n2: barrier, called from train (training.py:80); made call 12 last",
    )


def test_a_rank_that_cannot_answer_is_named_first() -> None:
    stalled = Stalled(40.0, tuple(beat(rank, 7, 1.0) for rank in range(3)))
    hang = judge(stalled, {0: place(IN_BARRIER), 1: place(IN_LOADER)})
    assert (hang.rank, hang.lines[1]) == (2, "rank 2 on n2: no stack")


def test_all_in_one_collective_names_nobody_but_the_collective() -> None:
    stalled = Stalled(40.0, tuple(beat(rank, 7, 1.0) for rank in range(2)))
    hang = judge(stalled, {0: place(IN_BARRIER), 1: place(IN_BARRIER)})
    assert hang.rank is None
    assert hang.lines[0] == "nothing moved for 40 s after step 7: all ranks wait in barrier"


def test_without_a_collective_the_rank_behind_is_named() -> None:
    stalled = Stalled(40.0, (beat(0, 8, 1.0), beat(1, 7, 1.0)))
    assert judge(stalled, {}).rank == 1


def test_a_real_dump_is_read(tmp_path: Path) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    path = tmp_path / "stacks-0.txt"
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    over.set()
    thread.join()
    own = place(path.read_text()).own
    assert own is not None
    assert (own.name, Path(own.file).name) == ("test_a_real_dump_is_read", "test_hangs.py")


def test_a_limit_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^env\.HANG_SECONDS=soon: seconds are wanted$"):
        HangWatch.from_environment({"HANG_SECONDS": "soon"}, tmp_path)
    off = HangWatch.from_environment({"HANG_SECONDS": "0"}, tmp_path)
    assert off.look(time.time()) == []
