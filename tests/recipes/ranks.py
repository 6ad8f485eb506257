"""Ranks of one job as processes of this machine, on its CPU or on as many GPUs as it has."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
LONGEST = 1500.0
"""Seconds that ranks may take before they are killed."""


@dataclass(frozen=True)
class Ended:
    """What a rank left behind."""

    status: int
    out: str
    err: str


def place_of_rank(rank: int, ranks: int, device: str, gpus: int | None = None) -> dict[str, str]:
    """Variables that tell a rank where it runs.

    On fewer GPUs than ranks each rank is a host of its own, by NCCL_HOSTID: NCCL refuses a GPU to two ranks of one host
    ("Duplicate GPU detected") and takes its network transport between hosts. Slow, but the code that several GPUs run.
    """
    gpus = torch.cuda.device_count() if gpus is None else gpus
    if device != "cuda" or gpus >= ranks:
        return {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    return {
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": str(rank),
        "CUDA_VISIBLE_DEVICES": str(rank % gpus),
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def run_ranks(
    words: Sequence[str], ranks: int, device: str = "cpu", environment: Mapping[str, str] = os.environ
) -> list[Ended]:
    """Run `python WORDS` once per rank, to the end of all or of the first that fails; the others are killed then.

    By rank, what each left: a status of -9 is one that was killed here.
    """
    # The port is the store's own choice: a free one that is looked for beforehand may be taken by then.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **environment,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
    }
    with tempfile.TemporaryDirectory() as temporary:
        written = [
            tuple(Path(temporary) / f"{rank}.{name}" for name in ("out", "err")) for rank in range(ranks)
        ]
        processes = []
        try:
            for rank, (out, err) in enumerate(written):
                place = {"RANK": str(rank), **place_of_rank(rank, ranks, device)}
                with out.open("w") as to, err.open("w") as errors_to:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, *words],
                            env={**shared, **place},
                            cwd=ROOT,
                            stdout=to,
                            stderr=errors_to,
                        )
                    )
            deadline = time.monotonic() + LONGEST
            while any(each.poll() is None for each in processes) and not any(
                each.poll() for each in processes
            ):
                assert time.monotonic() < deadline, f"the ranks are not done after {LONGEST:.0f} s"
                time.sleep(0.05)
        finally:
            for each in processes:
                each.kill()
                each.wait()
        return [
            Ended(each.returncode, out.read_text(), err.read_text())
            for each, (out, err) in zip(processes, written, strict=True)
        ]


def told(ended: Sequence[Ended]) -> str:
    """What the ranks that failed by themselves said; empty if none did."""
    return "\n".join(f"rank {n}:\n{each.err}" for n, each in enumerate(ended) if each.status not in (0, -9))
