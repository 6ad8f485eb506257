"""A recipe for tests: one rank misbehaves as told, `python -m tests.box_runs.entrypoint mode=raise rank=1`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    options = dict(word.split("=", 1) for word in sys.argv[1:])
    rank = int(os.environ["RANK"])
    contract = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    seen = {name: os.environ[name] for name in (*contract, "RUN_DIR", "ATTEMPT")}
    seen["node"] = os.environ.get("SLURMD_NODENAME", "")
    seen |= {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_", "UCX_"))}
    folder = Path(os.environ["RUN_DIR"])
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    if options["mode"] == "torch":
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        print(f"sum {total.item():.0f}", flush=True)
        dist.destroy_process_group()
    if options["mode"] == "sleep":
        time.sleep(float(options["seconds"]))
    if rank != int(options.get("rank", "-1")):
        if options["mode"] in ("raise", "refuse", "kill", "exit"):
            time.sleep(60)  # the others wait in a collective when one rank fails
        return
    if options["mode"] == "raise":
        raise ArithmeticError("the loss is\nnot a number")
    if options["mode"] == "refuse":
        raise SystemExit(2) from ValueError("a mistake of a person")
    if options["mode"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if options["mode"] == "exit":
        sys.exit(7)


if __name__ == "__main__":
    main()
