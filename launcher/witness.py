"""What a rank tells of itself when it is asked by SIGUSR2: its stacks, and its collectives. Runs in the rank.

The stacks come first and from C (faulthandler), so they come even from a rank that holds Python's lock for ever. The
collectives are in torch's flight recorders, of which a thread of this process writes a copy: the main thread is stuck
in C++ inside of a collective when somebody asks, and answers no signal. A signal's number goes through the wakeup pipe
straight from the C handler to that thread.

torch has a way of its own to ask NCCL's recorder, a named pipe per rank (TORCH_NCCL_DEBUG_INFO_PIPE_FILE). It is not
used: a named pipe ends at its node, so that the controller could write to those of its own node alone; gloo has none;
and what comes out is a pickle.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

RECORDERS = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}
"""Functions of torch._C._distributed_c10d in 2.11 and 2.13; the second exists in CUDA builds alone."""
KEPT_PENDING, KEPT_DONE = 50, 5
"""Calls that are written of each process group and recorder. Whole, a buffer of 2000 makes a megabyte per rank."""


def collectives_file(attempt_dir: Path, rank: int) -> Path:
    return attempt_dir / f"collectives-{rank}.json"


def dump_stacks_on_signal(path: Path) -> None:
    """On SIGUSR2 every thread's stack goes into `path`: what the controller looks at when nothing moves."""
    # After its dump faulthandler hands the signal on to this handler, which has nothing to do but to be there.
    signal.signal(signal.SIGUSR2, lambda number, frame: None)
    faulthandler.register(signal.SIGUSR2, file=path.open("a"), all_threads=True, chain=True)


def dump_collectives_on_signal(path: Path) -> None:
    """On SIGUSR2 a copy of torch's flight recorders goes into `path`. Called after `dump_stacks_on_signal`."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # A recipe that sets a wakeup pipe of its own (asyncio's signal handlers do) takes this one away: then the stacks
    # are all that it tells.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_answer, args=(read_end, path), name="witness", daemon=True).start()


def _answer(read_end: int, path: Path) -> None:
    while numbers := os.read(read_end, 64):
        if signal.SIGUSR2 not in numbers:
            continue  # the pipe tells of every signal that Python handles
        text = json.dumps(recorded())
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)


def recorded() -> dict[str, Any]:
    """The process groups with their ranks, and the newest calls of each recorder with torch's own keys."""
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is None:
        return {"groups": {}, "calls": {}}  # a recipe that has not come to import torch, or never will
    native = sys.modules["torch._C._distributed_c10d"]
    # gloo's recorder says nothing of who is in a group.
    groups = {
        name: {"ranks": c10d.get_process_group_ranks(group), "description": group.group_desc}
        for group, name in c10d._world.pg_names.items()
    }
    dumps = {name: getattr(native, function, None) for name, function in RECORDERS.items()}
    calls = {
        name: newest(json.loads(dump()).get("entries", []))
        for name, dump in dumps.items()
        if dump is not None
    }
    return {"groups": groups, "calls": calls}


def newest(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each process group the first calls that are not over and the last that are, in the order of the calls."""
    pending: dict[Any, int] = {}
    done: dict[Any, int] = {}
    kept = []
    for entry in entries:
        group = entry["process_group"][0]
        if not entry["retired"] and pending.setdefault(group, 0) < KEPT_PENDING:
            pending[group] += 1
            kept.append(entry)
    for entry in reversed(entries):
        group = entry["process_group"][0]
        if entry["retired"] and done.setdefault(group, 0) < KEPT_DONE:
            done[group] += 1
            kept.append(entry)
    return sorted(kept, key=lambda entry: int(entry["record_id"]))
