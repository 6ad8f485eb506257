"""What a thousand ranks cost the launcher, by simulation on one machine: `python -m tests.bench.scale`.

A thousand ranks do not fit on two cores, but what each of them does to the shared run directory does: it keeps one
heartbeat file, it looks for the address that rank 0 publishes, and the controller reads all heartbeats and keeps the
ledger. Each is done here for 10, 100 and 1,000 ranks, in a folder that holds as many logs and heartbeats as a real
attempt's does; a cost per rank that stays flat is what lets a job grow. Processes are forked from this one and hold
nothing but Python.

Columns are the median of the rounds, `per rank` is that divided by the ranks. CPU seconds where the cost is all of that
kind: on two busy cores a round of a thousand is interrupted and one of ten is not. The disk is this machine's own; a
network file system adds its round trip to every call, for every number of ranks alike.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher import ledger, rendezvous
from launcher.report import Records, build
from launcher.task import ENDPOINT_FILE

RANKS = (10, 100, 1000)
ROUNDS = 15
LEDGER_LINES = 10_000
APPENDS = 40
HEARTBEAT_BYTES = 256
"""A line is padded to this size and written in place: a reader finds one whole line, whatever was there before."""

WAIT_BEFORE_PUBLISHING_SECONDS = 4.0
ADDRESS = rendezvous.Endpoint("127.0.0.1", 29400)


def main() -> int:
    _allow_open_files(max(RANKS) + 100)
    print("| cost to the launcher | " + " | ".join(f"{ranks:,} ranks" for ranks in RANKS) + " | per rank |")
    print("|---" * (len(RANKS) + 2) + "|")
    rows: list[tuple[str, Callable[[int], float]]] = [
        ("write every rank's heartbeat once, ms CPU", lambda ranks: 1e3 * writing_heartbeats(ranks)),
        ("read every heartbeat once, ms CPU", lambda ranks: 1e3 * reading_heartbeats(ranks)),
        (
            "one look of every rank for the address, ms CPU",
            lambda ranks: 1e3 * looking_for_the_address(ranks),
        ),
    ]
    for name, measure in rows:
        _row(name, [measure(ranks) for ranks in RANKS])
    delays, busy = zip(*(meeting(ranks) for ranks in RANKS), strict=True)
    _row("address published to last rank has it, ms", [1e3 * each for each in delays], of_ranks=False)
    _row("all ranks, per second of waiting, ms CPU", [1e3 * each for each in busy])
    costs = [ledger_of(LEDGER_LINES, ranks) for ranks in RANKS]
    for name, place in (("append to", 0), ("read", 1), ("report from", 2)):
        _row(f"{name} a ledger of {LEDGER_LINES:,} lines, ms", [1e3 * each[place] for each in costs])
    return 0


def _row(name: str, values: Sequence[float], *, of_ranks: bool = True) -> None:
    """One line; `of_ranks`: the value is a sum over the ranks, or kept for all of them."""
    shares = [f"{1e3 * value / ranks:.3g}" for value, ranks in zip(values, RANKS, strict=True)]
    each = f"{' / '.join(shares)} µs" if of_ranks else ""
    print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + f" | {each} |", flush=True)


# --- heartbeats ------------------------------------------------------------------------------------------------------


def heartbeat_line(rank: int, step: int) -> bytes:
    content = {
        "step": step,
        "time": time.time(),
        "phase": "step",
        "host": f"n{rank // 8}",
        "pid": 4000 + rank,
    }
    return json.dumps(content).ljust(HEARTBEAT_BYTES - 1).encode() + b"\n"


def read_heartbeats(folder: Path) -> dict[int, dict[str, object]]:
    """Every rank's newest heartbeat, by rank: one listing of the folder and one read per file."""
    found = {}
    for entry in os.scandir(folder):
        descriptor = os.open(entry.path, os.O_RDONLY)
        try:
            found[int(entry.name.removeprefix("rank-"))] = json.loads(
                os.pread(descriptor, HEARTBEAT_BYTES, 0)
            )
        finally:
            os.close(descriptor)
    return found


def writing_heartbeats(ranks: int) -> float:
    with (
        tempfile.TemporaryDirectory(prefix="scale") as folder,
        _open_heartbeats(Path(folder), ranks) as files,
    ):
        return _median(
            lambda: [os.pwrite(file, heartbeat_line(rank, 1), 0) for rank, file in enumerate(files)],
            clock=time.process_time,
        )


def reading_heartbeats(ranks: int) -> float:
    with (
        tempfile.TemporaryDirectory(prefix="scale") as folder,
        _open_heartbeats(Path(folder), ranks) as files,
    ):
        for rank, file in enumerate(files):
            os.pwrite(file, heartbeat_line(rank, 1), 0)
        assert read_heartbeats(Path(folder)).keys() == set(range(ranks))
        return _median(lambda: read_heartbeats(Path(folder)), clock=time.process_time)


@contextmanager
def _open_heartbeats(folder: Path, ranks: int) -> Iterator[list[int]]:
    files = [os.open(folder / f"rank-{rank}", os.O_WRONLY | os.O_CREAT) for rank in range(ranks)]
    try:
        yield files
    finally:
        for file in files:
            os.close(file)


# --- rendezvous ------------------------------------------------------------------------------------------------------


def looking_for_the_address(ranks: int) -> float:
    """Seconds in which every rank has found and read a published address, one rank after the other."""
    with tempfile.TemporaryDirectory(prefix="scale") as name:
        path = _attempt_folder(Path(name), ranks)
        rendezvous.publish(path, ADDRESS)
        return _median(
            lambda: [rendezvous.wait_for(path, deadline_seconds=1.0) for _ in range(ranks)],
            rounds=3,
            clock=time.process_time,
        )


def meeting(ranks: int) -> tuple[float, float]:
    """As many processes as ranks wait for the address. (Delay of the last one, CPU seconds per second of waiting.)"""
    with tempfile.TemporaryDirectory(prefix="scale") as name:
        path = _attempt_folder(Path(name), ranks)
        reading, writing = os.pipe()
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        children = [_waiting_rank(path, reading, writing) for _ in range(ranks)]
        time.sleep(WAIT_BEFORE_PUBLISHING_SECONDS)
        published = time.monotonic()
        rendezvous.publish(path, ADDRESS)
        os.close(writing)
        arrivals = []
        with os.fdopen(reading, "rb") as stream:
            arrivals = [float(line) for line in stream]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        assert statuses == [0] * ranks, f"{sum(map(bool, statuses))} ranks of {ranks} did not meet"
        assert len(arrivals) == ranks
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return max(arrivals) - published, busy / (max(arrivals) - began)


def _waiting_rank(path: Path, reading: int, writing: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.close(reading)
        assert rendezvous.wait_for(path, deadline_seconds=120.0) == ADDRESS
        os.write(writing, f"{time.monotonic():.6f}\n".encode())  # short: a pipe takes it in one piece
        status = 0
    finally:
        os._exit(status)  # without the parent's clean-up, which would remove its folder


def _attempt_folder(folder: Path, ranks: int) -> Path:
    """An attempt's folder with what srun has opened in it before the first rank runs; the path of the address."""
    for rank in range(ranks):
        (folder / f"rank-{rank}.log").touch()
    return folder / ENDPOINT_FILE


# --- ledger ----------------------------------------------------------------------------------------------------------


def ledger_of(lines: int, ranks: int) -> tuple[float, float, float]:
    """Seconds to append a line (flushed to the disk), to read all lines, and to make a report of them."""
    nodes = [f"n{node:03d}" for node in range(max(1, ranks // 8))]
    record = {
        "job_id": "812", "nodes": nodes, "world_size": ranks, "state": "failed", "cause": "hang", "exit_code": 1,
        "evidence": ["rank 5 on n000 stood still for 130 s in all_reduce"], "seconds": {"preflight": 3.0},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="scale", dir=Path.cwd()) as folder:  # a disk: /tmp may be memory
        path = Path(folder) / "attempts.jsonl"
        with path.open("w") as file:
            for number in range(1, lines + 1):
                times = {
                    "started": number * 10.0,
                    "tasks_started": number * 10.0 + 3,
                    "ended": number * 10.0 + 9,
                }
                file.write(json.dumps({"attempt": number, **record, **times}) + "\n")
        numbers = itertools.count(lines + 1)  # an attempt's second line amends its first
        appending = _median(
            lambda: ledger.append_line(path, {"attempt": next(numbers), **record}), rounds=APPENDS
        )
        reading = _median(lambda: ledger.attempts(path), rounds=3)
        read = ledger.attempts(path)
        assert len(read) == lines + APPENDS
        return appending, reading, _median(lambda: build(Records(read)), rounds=1)


# --- measuring -------------------------------------------------------------------------------------------------------


def _median(
    work: Callable[[], object], rounds: int = ROUNDS, clock: Callable[[], float] = time.perf_counter
) -> float:
    taken = []
    for _ in range(rounds):
        began = clock()
        work()
        taken.append(clock() - began)
    return statistics.median(taken)


def _allow_open_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


if __name__ == "__main__":
    sys.exit(main())
