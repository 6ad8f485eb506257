"""One rank of a measurement: burn, copies, and collectives in the group that it is told. Imports torch; a subprocess.

`checks.agent` starts one of these per GPU (one per node where there is none) and kills it at the deadline. It prints
one JSON object a line: {"at": stage} before what may hang, {"set": name, "value": figure} after. It waits on its
standard input for its place: {"rank", "world", "address", "port"}; rank 0 opens the store and prints {"port"}.

Bus bandwidth is defined as in nccl-tests' doc/PERFORMANCE.md: bytes / seconds times a factor that makes figures of any
number of ranks comparable with the links' speed.
"""

from __future__ import annotations

import atexit
import datetime
import fcntl
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined] # public, but torch lists it nowhere

from checks.trial import tried

MIB = 1 << 20
SIZES = {"cuda": (MIB, 16 * MIB, 256 * MIB), "cpu": (MIB // 16, MIB, 4 * MIB)}
PAIR_SIZE = {"cuda": 256 * MIB, "cpu": 4 * MIB}
REPEATS = 3
"""The best of so many: whatever else happens on a machine only makes it slower."""
ROUND_SECONDS, MOST_CALLS = 0.02, 100
"""A round has as many calls of a collective as take so long, by one call; two on a slow network."""

# Since torch 2.13 these have new names, and the old ones warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Collective = Callable[[torch.Tensor, torch.Tensor], Any]
COLLECTIVES: dict[str, tuple[Collective, Callable[[int], float]]] = {
    # The bytes are those of the whole array: of all ranks' parts together where each has a part.
    "all_reduce": (lambda whole, part: dist.all_reduce(whole), lambda n: 2 * (n - 1) / n),
    "all_gather": (lambda whole, part: _all_gather(whole, part), lambda n: (n - 1) / n),
    "reduce_scatter": (lambda whole, part: _reduce_scatter(part, whole), lambda n: (n - 1) / n),
    "all_to_all": (
        lambda whole, part: dist.all_to_all_single(torch.empty_like(whole), whole),
        lambda n: (n - 1) / n,
    ),
}


def main() -> None:
    # At its end Python looks for garbage in all that torch has made, half a second long; but not in what is frozen.
    atexit.register(gc.freeze)
    task = json.loads(sys.argv[1])
    local = int(task["local_rank"])
    kind = "cuda" if task["gpus"] else "cpu"
    device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        seen = torch.cuda.device_count()
        if local >= seen:
            words = (
                f"torch sees {seen} GPUs, not {task['gpus']}: in a job, ask for them (srun --gpus-per-node)"
            )
            raise SystemExit(words)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, min(int(task["threads"]), torch.get_num_threads())))
    say(set="device", value=torch.cuda.get_device_name(device) if kind == "cuda" else "cpu")
    if task["kind"] == "whole":
        local_figures(device)
    at("wait for the others")
    place = json.loads(sys.stdin.readline())
    at("join the group")
    join(place, kind, float(task["seconds"]))
    if task["kind"] == "whole":
        if kind == "cuda":
            at("peers")
            settled(device)
            if local == 0:
                say(set="peers", value=peers())
            settled(device)
        whole(device)
    else:
        pair(device)
    say(set="done", value=True)
    sys.stdout.flush()
    # Leaving the group may hang where a partner was killed, and there is nothing left to do.
    os._exit(0)


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def at(stage: str) -> None:
    say(at=stage)
    tried(stage)


# --- on this device alone ---------------------------------------------------------------------------------


def local_figures(device: torch.device) -> None:
    at("burn")
    say(set="burn", value=burn(device))
    at("copy")
    say(set="copy", value=copy(device))
    if device.type == "cuda":
        at("host copies")
        say(set="host", value=host(device))


def burn(device: torch.device) -> float:
    """TFLOP/s of a square matrix product: 8192 in bf16 on a GPU, 768 in float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        tried("product")
        torch.mm(a, b)

    return 2 * size**3 / best(device, product, 40 if device.type == "cuda" else 4) / 1e12


def copy(device: torch.device) -> float:
    """GB/s read and written by a copy within the device's memory: its bytes count twice."""
    count = (1 << 30) if device.type == "cuda" else 32 * MIB
    given = torch.ones(count, dtype=torch.uint8, device=device)
    out = torch.empty_like(given)
    return 2 * count / best(device, lambda: out.copy_(given), 4) / 1e9


def host(device: torch.device) -> dict[str, float]:
    """GB/s from pinned host memory to the device, and back.

    One GPU of the node after the other, as the published figures were taken: four H200s at once share the host's memory
    and got 44 to 55 GB/s each.
    """
    with open(Path(tempfile.gettempdir()) / f".host-copies-{os.getuid()}", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        return _host(device)


def _host(device: torch.device) -> dict[str, float]:
    count = 256 * MIB
    pinned, there = (
        torch.ones(count, dtype=torch.uint8).pin_memory(),
        torch.empty(count, dtype=torch.uint8, device=device),
    )
    return {
        "to device": count / best(device, lambda: there.copy_(pinned, non_blocking=True), 4) / 1e9,
        "to host": count / best(device, lambda: pinned.copy_(there, non_blocking=True), 4) / 1e9,
    }


def peers() -> dict[str, float]:
    """GB/s from each GPU of the node to each other one, `0-1`; 0.0 where they cannot reach each other directly."""
    count = 256 * MIB
    found = {}
    pairs = list(itertools.permutations(range(torch.cuda.device_count()), 2))
    for a, b in pairs:
        # torch opens a direction at the first copy that way. On four H200s whichever direction of a pair was measured
        # first gave 134 GB/s and the other one 388: both are opened before either is measured.
        if torch.cuda.can_device_access_peer(a, b):
            torch.ones(1, device=f"cuda:{a}").to(f"cuda:{b}")
    for a, b in pairs:
        if not torch.cuda.can_device_access_peer(a, b):
            found[f"{a}-{b}"] = 0.0
            continue
        given = torch.ones(count, dtype=torch.uint8, device=f"cuda:{a}")
        out = torch.empty(count, dtype=torch.uint8, device=f"cuda:{b}")
        seconds = best(given.device, lambda out=out, given=given: out.copy_(given, non_blocking=True), 4)  # type: ignore[misc]
        found[f"{a}-{b}"] = count / seconds / 1e9
    return found


def best(device: torch.device, call: Callable[[], Any], times: int) -> float:
    """Seconds of one call: the best of a few rounds of `times` calls, after one that is not counted."""
    call()
    found = []
    for _ in range(REPEATS):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        found.append((time.perf_counter() - began) / times)
    return min(found)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- in the group -----------------------------------------------------------------------------------------


def join(place: dict[str, Any], kind: str, seconds: float) -> None:
    rank, world = int(place["rank"]), int(place["world"])
    patience = datetime.timedelta(seconds=seconds)
    store = TCPStore(place["address"], int(place["port"]), None, rank == 0, patience, wait_for_workers=False)
    if rank == 0:
        say(port=store.port)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=patience
    )
    say(set="rank", value=rank)
    say(set="world", value=world)


def settled(device: torch.device) -> None:
    """Every rank has come here: a barrier whose kernel is done."""
    dist.all_reduce(torch.zeros(1, device=device))
    synchronize(device)


def whole(device: torch.device) -> None:
    """Each collective by message size over all ranks."""
    for name in COLLECTIVES:
        for size in SIZES[device.type]:
            at(f"{name} of {size} bytes")
            say(set=f"{name} {size}", value=bus_bandwidth(name, size, device))


def pair(device: torch.device) -> None:
    size = PAIR_SIZE[device.type]
    at(f"all_reduce of {size} bytes")
    say(set="pair", value=bus_bandwidth("all_reduce", size, device))


def bus_bandwidth(name: str, size: int, device: torch.device) -> float:
    """GB/s, the same on every rank: the slowest rank's time of the best round."""
    run, factor = COLLECTIVES[name]
    world = dist.get_world_size()
    part = torch.ones(max(1, size // 4 // world), device=device)
    array = torch.ones(part.numel() * world, device=device)

    def seconds(times: int) -> float:
        # Sums of sums overflow in the end, and denormal or infinite numbers are slow on a CPU.
        array.fill_(1.0)
        settled(device)
        began = time.perf_counter()
        for _ in range(times):
            tried(name)
            run(array, part)
        synchronize(device)
        taken = torch.tensor([(time.perf_counter() - began) / times], device=device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken)

    run(array, part)
    # Ten calls of 16 MiB read 8% less than nccl-tests' fifty on two H200s: starting and waiting are in them, once.
    times = max(2, min(MOST_CALLS, int(ROUND_SECONDS / seconds(1))))
    fastest = min(seconds(times) for _ in range(REPEATS))
    # A world of one sends nothing: its figure is that of the copy, without a factor.
    return array.numel() * 4 / fastest * (factor(world) if world > 1 else 1.0) / 1e9


if __name__ == "__main__":
    main()
