"""One of two ranks: rank 0 waits in a collective that rank 1 never calls. `witness_worker.py FOLDER gloo|nccl`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from launcher import witness

folder, backend = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
witness.dump_stacks_on_signal(folder / f"stacks-{rank}.txt")
witness.dump_collectives_on_signal(witness.collectives_file(folder, rank))
if backend == "nccl":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
other = dist.new_group([0, 1])
for _ in range(2):
    dist.all_reduce(torch.ones(3, 4, device=device))
dist.broadcast(torch.ones(5, device=device), src=0, group=other)
if device.type == "cuda":
    torch.cuda.synchronize()
if rank == 0:
    (folder / "stuck").touch()
    dist.all_reduce(torch.ones(7, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()
time.sleep(1000)
