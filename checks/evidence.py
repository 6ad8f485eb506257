"""Where evidence comes from: this machine, or a record of one. Subprocess.

A `Source` answers questions and never raises: `read` a file, `list` a folder, follow a `link`, `run` a command, `ask`
anything else that `checks.worker` can do. Every question has a deadline, all of them together have a budget, and every
answer is kept under a readable key (`read /sys/class/infiniband/mlx5_0/fw_ver`). `Recorded` answers from those keys,
so the collectors run unchanged on a bundle.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checks import starvation
from checks.reading import Problem, Reading, Unread, shortened

READ_SECONDS = 1.0
"""sysfs and procfs answer in microseconds, a live NFS in milliseconds."""

NVML_SECONDS = 3.5
"""nvmlInit takes seconds where persistence mode is off: the driver wakes every GPU."""

RUN_SECONDS = 3.5
BUDGET_SECONDS = 4.0
"""The passive tier may take 5 s on a node, whatever hangs there, and starting Python takes some of them."""

Record = dict[str, Any]
"""{"value": …} or {"problem": …, "detail": …}."""

Runner = Callable[[Sequence[str], float], Reading]


def key_of(op: str, args: Sequence[Any], sample: int = 0) -> str:
    words = [arg if isinstance(arg, str) else json.dumps(arg) for arg in args]
    return " ".join([op, *words]) + (f" @{sample}" if sample else "")


class Source:
    """Answers, each kept in `records`. Sample 1 is the same question at the end of the collection."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    def read(self, path: str, sample: int = 0) -> Reading:
        return _text(self._answer("read", [path], sample))

    def list(self, path: str) -> tuple[str, ...] | Unread:
        found = self._answer("list", [path], 0)
        if isinstance(found, Unread):
            return found
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            return Unread(Problem.ERROR, f"{path}: not a listing")
        return tuple(found)

    def link(self, path: str) -> Reading:
        return _text(self._answer("link", [path], 0))

    def run(self, argv: Sequence[str], keep: str = "") -> Reading:
        """What the command prints. Of a long answer only the lines with a match of `keep` are kept and recorded."""
        return _text(self._answer("run", list(argv), 0, keep))

    def ask(self, op: str, *args: Any, sample: int = 0) -> Any | Unread:
        """What the worker's operation says: JSON of any form, or Unread."""
        return self._answer(op, list(args), sample)

    def wait(self, seconds: float) -> None:
        """Let time pass between two samples; a record has no need to."""

    def close(self) -> None:
        pass

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, op: str, args: Sequence[Any], sample: int, keep: str = "") -> Any | Unread:
        raise NotImplementedError


class Recorded(Source):
    """Answers from a bundle's records."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        super().__init__()
        self.records = dict(records)

    def _answer(self, op: str, args: Sequence[Any], sample: int, keep: str = "") -> Any | Unread:
        key = key_of(op, args, sample)
        record = self.records.get(key)
        if record is None:
            return Unread(Problem.NOT_RECORDED, key)
        return opened(record, key)


class Live(Source):
    """Answers of this machine, with paths under `root`."""

    def __init__(
        self, root: str = "/", *, budget: float = BUDGET_SECONDS, runner: Runner | None = None
    ) -> None:
        super().__init__()
        self._root = root.rstrip("/")
        self._ends = time.monotonic() + budget
        # Who gives a machine more time in all, because it is busy or a person waits, means each answer too.
        self._patience = max(1.0, budget / BUDGET_SECONDS)
        self._run = runner or run_command
        # What hangs in one lane must not cost the answers of another.
        self._lanes = {name: _Lane() for name in ("nvml", "sys", "proc", "own", "mounts", "network")}

    def wait(self, seconds: float) -> None:
        time.sleep(max(0.0, min(seconds, self._left())))

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _answer(self, op: str, args: Sequence[Any], sample: int, keep: str = "") -> Any | Unread:
        key = key_of(op, args, sample)
        if self._left() <= 0:
            record: Record = {"problem": "timed out", "detail": f"{key}: no time was left"}
        elif op == "run":
            reading = self._run(args, min(RUN_SECONDS * self._patience, self._left()))
            record = closed(reading if isinstance(reading, Unread) else matching_lines(reading, keep))
        else:
            lane, seconds = _lane_of(op, args)
            seconds = min(seconds * self._patience, self._left())
            record = self._lanes[lane].ask(op, self._placed(op, args), seconds, key, ends=self._ends)
        self.records[key] = record
        return opened(record, key)

    def _placed(self, op: str, args: Sequence[Any]) -> Sequence[Any]:
        if op not in _PATH_OPERATIONS:
            return args
        placed = [self._root + str(args[0]), *args[1:]]
        return [*placed, self._root or "/"] if op == "link" else placed


_PATH_OPERATIONS = frozenset({"read", "start", "list", "link", "statvfs", "written"})
_LANES: dict[str, tuple[str, float]] = {
    "nvml": ("nvml", NVML_SECONDS),
    "nvml_field": ("nvml", NVML_SECONDS),
    "statvfs": ("mounts", 2.0),
    "written": ("mounts", 2.0),
    "resolve": ("network", 2.0),
    "connect": ("network", 4.0),
}


def _lane_of(op: str, args: Sequence[Any]) -> tuple[str, float]:
    """Which worker is asked, and how long it may take. Drivers answer for /sys and /dev, and they are what hangs."""
    if op in _PATH_OPERATIONS and op not in _LANES:
        return ("sys" if str(args[0]).startswith(("/sys/", "/dev")) else "proc"), READ_SECONDS
    return _LANES.get(op, ("own", READ_SECONDS))


class _Lane:
    """One worker process at a time; a request that outlasts its deadline costs the worker its life."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._abandoned: list[subprocess.Popen[bytes]] = []

    def ask(self, op: str, args: Sequence[Any], seconds: float, key: str, *, ends: float) -> Record:
        """The worker's answer within `seconds`; within twice as many where it had no CPU; never after `ends`."""
        with self._lock:
            worker = self._worker or self._start()
            assert worker.stdin is not None
            try:
                worker.stdin.write(json.dumps({"op": op, "args": [*args]}).encode() + b"\n")
                worker.stdin.flush()
            except OSError as error:
                self._abandon()
                return {"problem": "error", "detail": f"{key}: the worker has died: {error.strerror}"}
            before, began, answer = starvation.scheduled(worker.pid), time.monotonic(), bytearray()
            done = _line_of(worker, min(began + seconds, ends), answer)
            if not done and starvation.is_starved(starvation.scheduled(worker.pid)):
                # It is not the machine's answer that is late. Once more, and then it counts as silence too.
                done = _line_of(worker, min(began + 2 * seconds, ends), answer)
            if not done:
                took = time.monotonic() - began
                why = starvation.described(before, starvation.scheduled(worker.pid))
                self._abandon()
                return {"problem": "timed out", "detail": f"{key}: no answer within {took:.1f} s{why}"}
            if not answer.endswith(b"\n"):
                self._abandon()
                return {"problem": "error", "detail": f"{key}: the worker died while it looked"}
            record: Record = json.loads(answer)
            return record

    def close(self) -> None:
        with self._lock:
            self._abandon()

    def _start(self) -> subprocess.Popen[bytes]:
        self._abandoned = [worker for worker in self._abandoned if worker.poll() is None]
        path = Path(__file__).with_name("worker.py")
        # -P: the folder of this package must not stand in sys.path, where its modules would hide others.
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._worker

    def _abandon(self) -> None:
        """Kill the worker and do not wait: stuck in the kernel, it dies when the kernel lets it go."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # a request that the dead worker did not take
        self._abandoned.append(worker)


def _line_of(worker: subprocess.Popen[bytes], ends: float, parts: bytearray) -> bool:
    """Add to `parts` up to the end of the line, or to a part of it where the worker has died. False at the deadline."""
    assert worker.stdout is not None
    descriptor = worker.stdout.fileno()
    while not parts.endswith(b"\n"):
        left = ends - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return False
        part = os.read(descriptor, 1 << 20)
        if not part:
            return True
        parts += part
    return True


def tool_path() -> str:
    """PATH, and where the tools of administrators lie, at which an ordinary user's PATH does not look."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin"


def run_command(argv: Sequence[str], seconds: float) -> Reading:
    """What the command prints, in the C locale; Unread where it is missing, fails, or outlasts its deadline."""
    try:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C", "PATH": tool_path()},
            start_new_session=True,
        )
    except FileNotFoundError:
        return Unread(Problem.MISSING, f"command {argv[0]}")
    except PermissionError:
        return Unread(Problem.NOT_PERMITTED, f"command {argv[0]}")
    except OSError as error:
        return Unread(Problem.ERROR, f"{argv[0]}: {error.strerror}")
    before = starvation.scheduled(child.pid)
    try:
        printed, complaint = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        why = starvation.described(before, starvation.scheduled(child.pid), "it")
        try:
            os.killpg(child.pid, signal.SIGKILL)  # with what it started; not waited for: see checks.worker
        except ProcessLookupError:
            return Unread(Problem.TIMED_OUT, f"{' '.join(argv)}: ended at its deadline")
        return Unread(Problem.TIMED_OUT, f"{' '.join(argv)}: no answer within {seconds:.1f} s{why}")
    text, said = (part.decode(errors="surrogateescape") for part in (printed, complaint))
    if child.returncode == 0:
        return text
    last = shortened((said.strip() or text.strip() or "no word").splitlines()[-1])
    refused = any(word in said.lower() for word in ("not permitted", "permission denied", "must be root"))
    problem = Problem.NOT_PERMITTED if refused else Problem.ERROR
    return Unread(problem, f"{' '.join(argv)}: status {child.returncode}: {last}")


def matching_lines(text: str, keep: str) -> str:
    return "".join(row for row in text.splitlines(keepends=True) if re.search(keep, row)) if keep else text


def closed(answer: Any | Unread) -> Record:
    if isinstance(answer, Unread):
        return {"problem": answer.problem.value, "detail": answer.detail}
    return {"value": answer}


def opened(record: Record, key: str) -> Any | Unread:
    """The answer inside a record, however the record came to be."""
    if "value" in record:
        return record["value"]
    try:
        return Unread(Problem(record["problem"]), str(record.get("detail", key)))
    except (KeyError, ValueError):
        return Unread(Problem.ERROR, f"{key}: not a record: {shortened(str(record))}")


def _text(answer: Any | Unread) -> Reading:
    if isinstance(answer, str | Unread):
        return answer
    return Unread(Problem.ERROR, f"not a text: {shortened(str(answer))}")
