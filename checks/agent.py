"""One node's part in one round: starts a process per GPU, brings them together, and kills them at the deadline.

    python -m checks.agent '{"name": "n1", "address": …, "port": …, "token": …, "seconds": 30, "gpus": null}'

srun starts one on each node of a round. It asks the board (`checks.board`) what to do, and hands its results to it.
Standard library only; torch lives in the processes that it starts, which may hang or be killed.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from checks import perftest, rail_agent
from checks.evidence import tool_path

SPARE_SECONDS = 1.5
"""Kept for killing, reporting and going home before the board stops listening."""


def main() -> int:
    task = json.loads(sys.argv[1])
    name = task["name"] or os.environ["SLURMD_NODENAME"]
    ends = time.monotonic() + float(task["seconds"]) - SPARE_SECONDS
    with socket.create_connection((task["address"], task["port"]), timeout=10) as connection:
        connection.settimeout(None)
        # Two files: one that reads and writes forgets what it has read ahead when it writes.
        line, heard = connection.makefile("w", encoding="utf-8"), connection.makefile("r", encoding="utf-8")
        if task["kind"] == "rails":
            rails = rail_agent.Rails(
                task["root"].replace("{node}", name), task["fabric"] or "auto", os.environ
            )
            tell(line, token=task["token"], node=name, ranks=1, services=rails.services)
        else:
            gpus = gpus_here() if task["gpus"] is None else int(task["gpus"])
            tell(line, token=task["token"], node=name, ranks=max(1, gpus))
        order = json.loads(heard.readline() or "null")
        if order is None:
            print(f"{name}: the board has nothing for this node", file=sys.stderr)
            return 1
        places = heard_by_a_thread(heard)
        if task["kind"] == "rails":
            tell(line, result={"node": name, "rails": with_a_partner(rails, places, task["address"], ends)})
            return told(name, places)
        with tempfile.TemporaryDirectory(prefix="checks-") as folder:
            ranks = [Rank(local, gpus, name, order, Path(folder), ends) for local in range(max(1, gpus))]
            try:
                together(ranks, line, places, task["address"], ends)
            finally:
                for rank in ranks:
                    rank.kill()
            tell(line, result={"node": name, "gpus": gpus, "ranks": [rank.report() for rank in ranks],
                               "transport": transports(Path(folder)),
                               **rdma_here(task["root"].replace("{node}", name))})  # fmt: skip
        return told(name, places)


def told(name: str, places: queue.Queue[dict[str, Any]]) -> int:
    """Wait until the board has taken the report. Returns this process's exit status."""
    try:
        while "thanks" not in places.get(timeout=SPARE_SECONDS):
            pass  # a place in a group that came too late
    except queue.Empty:
        print(f"{name}: the board did not take this node's report", file=sys.stderr)
        return 1
    return 0


def rdma_here(root: str) -> dict[str, Any]:
    """Whether a round of rails is worth its time: the RDMA devices of this node, and where perftest is."""
    folder = Path(root.rstrip("/") + rail_agent.SYSFS)
    devices = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    return {"rdma": devices, "perftest": shutil.which(perftest.TOOL, path=tool_path())}


def with_a_partner(
    rails: rail_agent.Rails, places: queue.Queue[dict[str, Any]], board: str, ends: float
) -> dict[str, Any]:
    """What each rail came to; where the partner never came, that."""
    try:
        place = places.get(timeout=max(0.0, ends - time.monotonic()))
    except queue.Empty:
        return {"problem": "timed out", "detail": "its partner in the pair never came"}
    try:
        return rail_agent.measured(rails, place, board=board, ends=ends)
    finally:
        rails.close()


def gpus_here() -> int:
    """GPUs that this job may use on this node."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = [one for one in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", one)]
    return (
        len(present)
        if visible is None
        else min(len(present), len([one for one in visible.split(",") if one]))
    )


def search_path() -> str:
    """PYTHONPATH under which the processes find the same `checks` as this one."""
    here = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(
        dict.fromkeys([here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )


def tell(line: TextIO, **words: Any) -> None:
    line.write(json.dumps(words) + "\n")
    line.flush()


class Rank:
    """A process that measures: what it said so far, and where it is."""

    def __init__(
        self, local: int, gpus: int, name: str, order: dict[str, Any], folder: Path, ends: float
    ) -> None:
        self.local = local
        self.said: dict[str, Any] = {}
        self.stage = "start"
        self.port: queue.Queue[int] = queue.Queue()
        self.ready = False
        self.trouble = ""
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, gpus))
        words = {
            "kind": order["kind"], "local_rank": local, "gpus": gpus, "threads": threads,
            "seconds": max(1.0, ends - time.monotonic()),
        }  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": search_path(),
            "CHECKS_NODE": name,
            "CHECKS_GROUP": ",".join(order["group"]),
            # The log says which network NCCL chose; what the job set for its own debugging must not hide that.
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_SUBSYS": "INIT,NET",
            "NCCL_DEBUG_FILE": str(folder / f"nccl-{local}.log"),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }
        self._errors = open(folder / f"errors-{local}", "w+")  # noqa: SIM115 # read after the process has ended
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "checks.measure", json.dumps(words)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if not text.startswith("{"):
                continue  # a library that prints
            line = json.loads(text)
            if "at" in line:
                self.stage = line["at"]
            elif "port" in line:
                self.port.put(line["port"])
            elif "set" in line:
                self.said[line["set"]] = line["value"]

    def place(self, **words: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(words) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.trouble = "it ended before it had its place in the group"

    def kill(self) -> None:
        """Whatever it does: a stopped or hanging process too, with everything that it started."""
        self.ended = self.process.poll()
        if self.ended is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def report(self) -> dict[str, Any]:
        if "done" not in self.said:
            self._errors.seek(0)
            lines = [line for line in self._errors.read().splitlines() if line.strip()]
            if self.ended is None:
                self.trouble = f"hung at: {self.stage}"
            else:
                last = lines[-1].strip()[-300:] if lines else f"status {self.ended}"
                self.trouble = f"ended at: {self.stage}: {last}"
        self._errors.close()
        return {**self.said, "trouble": self.trouble, "stage": self.stage}


def heard_by_a_thread(heard: TextIO) -> queue.Queue[dict[str, Any]]:
    """What the board says, in a queue that can be waited on with a deadline."""
    places: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        try:
            for text in heard:
                places.put(json.loads(text))
        except (OSError, ValueError) as error:
            print(f"the board is gone: {error}", file=sys.stderr)

    threading.Thread(target=listen, daemon=True).start()
    return places


def together(
    ranks: list[Rank], line: TextIO, places: queue.Queue[dict[str, Any]], board: str, ends: float
) -> None:
    """Give every rank its place in the group, then wait for all of them until the deadline."""
    waiting = list(ranks)
    while time.monotonic() < ends:
        try:
            place = places.get(timeout=0.05)
        except queue.Empty:
            place = {}
        if place.get("lead"):
            ranks[0].place(rank=0, world=place["size"], address="localhost", port=0)
            waiting.remove(ranks[0])
            place = {}
            threading.Thread(target=lambda: tell(line, port=ranks[0].port.get()), daemon=True).start()
        if "world" in place:
            for rank in waiting:
                rank.place(
                    rank=place["first"] + rank.local,
                    world=place["world"],
                    address=place["address"] or board,
                    port=place["port"],
                )
            waiting = []
        if all(rank.process.poll() is not None for rank in ranks):
            break
    # What the last lines of a process that ended say is still in its pipe.
    time.sleep(0.1)


def transports(folder: Path) -> list[str]:
    """How NCCL's log says that data went: `NET/IB`, `NET/Socket`, `P2P`, `SHM`, …, each once."""
    found: dict[str, None] = {}
    for path in sorted(folder.glob("nccl-*.log")):
        found |= dict.fromkeys(chosen_transports(path.read_text(errors="replace")))
    return list(found)


def chosen_transports(log: str) -> list[str]:
    """From `Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0/GDRDMA` and `via P2P/CUMEM` (NCCL, transport/*.cc),
    `Using network IB` (plugin/net.cc). Pure."""
    found: dict[str, None] = {}
    for via in re.findall(r"Channel \S+ : .* via (\S+)", log):
        parts = via.split("/")
        name = "/".join(parts[:2]) if parts[0] in ("NET", "COLLNET") else parts[0]
        found[name + ("/GDRDMA" if "GDRDMA" in parts else "")] = None
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
