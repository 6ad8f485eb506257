"""What had no CPU to answer is told from what hangs: by the kernel's own books, on real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checks import starvation
from checks.evidence import Live, run_command
from checks.reading import Unread
from checks.starvation import Scheduled, described, is_starved, scheduled

SPINS = "import time\nends = time.monotonic() + 300\nwhile time.monotonic() < ends: pass"


@contextmanager
def a_crowded_cpu() -> Iterator[int]:
    """The number of a CPU on which so many processes compute that one of low priority hardly gets to run."""
    cpu = min(os.sched_getaffinity(0))
    words = ["taskset", "--cpu-list", str(cpu), sys.executable, "-c", SPINS]
    crowd = [subprocess.Popen(words) for _ in range(4)]
    try:
        time.sleep(0.3)
        yield cpu
    finally:
        for one in crowd:
            one.kill()
            one.wait()


def test_a_process_without_a_cpu_is_told_from_one_that_sleeps() -> None:
    with a_crowded_cpu() as cpu:
        # Not Python, which would read its files first, and wait for the disk instead.
        spins = ["sh", "-c", "while :; do :; done"]
        poor = subprocess.Popen(["taskset", "--cpu-list", str(cpu), "nice", "-n", "19", *spins])
        lazy = subprocess.Popen(["sleep", "300"])
        try:
            time.sleep(0.3)
            ends = time.monotonic() + 60  # until both have begun, also on a busy machine
            while (scheduled(poor.pid).state, scheduled(lazy.pid).state) != ("R", "S"):
                assert time.monotonic() < ends
            before = {one.pid: scheduled(one.pid) for one in (poor, lazy)}
            if before[poor.pid].waited is None:
                pytest.skip("this kernel keeps no schedstat")
            time.sleep(1.0)
            assert is_starved(scheduled(poor.pid))
            assert not is_starved(scheduled(lazy.pid))
            # The kernel adds a wait up when it is over: on a crowded machine that takes longer than a second.
            while (
                seconds_in(r"state R, (\S+) s of them", described(before[poor.pid], scheduled(poor.pid)))
                <= 0.3
            ):
                assert time.monotonic() < ends
                time.sleep(0.1)
            assert "sleeps (state S)" in described(before[lazy.pid], scheduled(lazy.pid))
        finally:
            for one in (poor, lazy):
                one.kill()
                one.wait()


def seconds_in(pattern: str, text: str) -> float:
    """How long it was waited, which on a busy machine is a little more than was meant."""
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def test_a_read_that_hangs_says_that_its_reader_sleeps(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with Live(str(tmp_path)) as source:
        answer = source.read("/fifo")
    assert isinstance(answer, Unread)
    # Opening a FIFO that nobody writes to waits in the kernel, interruptibly (fs/pipe.c, fifo_open).
    assert (
        seconds_in(r"no answer within (\S+) s; the reader sleeps \(state S\): what it asked", answer.detail)
        >= 1.0
    )


def test_a_command_that_hangs_says_so_too() -> None:
    answer = run_command(["sleep", "20"], 0.3)
    assert isinstance(answer, Unread)
    assert seconds_in(r"no answer within (\S+) s; it sleeps \(state S\)", answer.detail) >= 0.3


def stopped(process: int) -> None:
    """Stop a process, and return when it stands still."""
    os.kill(process, signal.SIGSTOP)
    ends = time.monotonic() + 60
    while scheduled(process).state != "T":
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_reader_without_a_cpu_gets_as_much_time_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reader is stopped and goes on after its deadline; the books say here that it stood ready meanwhile."""
    (tmp_path / "file").write_text("here")
    (tmp_path / "other").write_text("there")
    looks: list[Scheduled] = []
    goes_on = True

    def books(process: int) -> Scheduled:
        looks.append(Scheduled("R", 5.0) if looks else Scheduled("S", 0.0))
        if len(looks) == 2 and goes_on:
            os.kill(process, signal.SIGCONT)  # at the deadline, when it is looked for the second time
        return looks[-1]

    with Live(str(tmp_path)) as source:
        assert source.read("/other") == "there"  # a worker is there
        worker = source._lanes["proc"]._worker  # type: ignore[attr-defined]
        monkeypatch.setattr(starvation, "scheduled", books)
        stopped(worker.pid)
        assert source.read("/file") == "here"
        assert len(looks) == 2, "it did not wait for its deadline"
        looks.clear()
        goes_on = False
        stopped(worker.pid)
        began = time.monotonic()
        answer = source.read("/file")
        assert isinstance(answer, Unread)
        assert (
            "ready to run (state R, 5.0 s of them without a CPU): this machine is overloaded" in answer.detail
        )
        # Before, at its deadline, and when it had got as much time again: then its silence counts.
        assert len(looks) == 3
        assert time.monotonic() - began >= 2.0


@pytest.mark.parametrize(
    ("before", "after", "starved", "says"),
    [
        (Scheduled("S", 1.0), Scheduled("R", 1.6), True, "state R, 0.6 s of them without a CPU"),
        (Scheduled("S", 1.0), Scheduled("S", 1.6), False, "sleeps"),
        (Scheduled("S", 1.0), Scheduled("D", 1.0), False, "stuck in the kernel (state D)"),
        (Scheduled("S"), Scheduled("R"), True, "(state R): this machine is overloaded"),
        (Scheduled("S"), Scheduled(""), False, ""),
        (Scheduled("S"), Scheduled("Z", 3.0), False, ""),
    ],
)
def test_the_books_decide(before: Scheduled, after: Scheduled, starved: bool, says: str) -> None:
    assert is_starved(after) is starved
    assert says in described(before, after)


@pytest.mark.parametrize(
    ("stat", "schedstat", "known"),
    [
        ("7 (a) b (c) D 1 2", "10 2500000000 3", Scheduled("D", 2.5)),
        ("7 (python) R 1 2", None, Scheduled("R")),
        ("7 (python) R 1 2", "0 0", Scheduled("R")),
        ("7 (python) R 1 2", "x y z", Scheduled("R")),
        ("", "10 20 30", Scheduled("", 2e-8)),
        (None, None, Scheduled("")),
    ],
)
def test_what_proc_says_is_read_whatever_it_says(
    tmp_path: Path, stat: str | None, schedstat: str | None, known: Scheduled
) -> None:
    (tmp_path / "7").mkdir()
    for name, text in (("stat", stat), ("schedstat", schedstat)):
        if text is not None:
            (tmp_path / "7" / name).write_text(text)
    assert scheduled(7, tmp_path) == known
