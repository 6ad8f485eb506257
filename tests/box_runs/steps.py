"""A training run without training, for tests of survival: steps, heartbeats, saves, and stopping when asked.

    python -m tests.box_runs.steps steps=50 seconds=0.1 save_every=10

`rank=1 step=12` with `fault=kill`, `hang`, `raise` or `xid` (a broken card) strikes at that step of attempt 1.
`deaf=1` ignores every request to stop; `barrier=1` meets the other ranks in a collective at each step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher.ledger import append_line, read_lines
from launcher.outcome import STOPPED_EXIT


def main() -> None:
    options = dict(word.split("=", 1) for word in sys.argv[1:])
    rank, attempt = int(os.environ["RANK"]), int(os.environ["ATTEMPT"])
    run_dir, attempt_dir = Path(os.environ["RUN_DIR"]), Path(os.environ["ATTEMPT_DIR"])
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    (attempt_dir / "heartbeat").mkdir(exist_ok=True)
    meet = collective() if options.get("barrier") else None
    saved = [line["step"] for line in read_lines(run_dir / "checkpoints.jsonl") if line["event"] == "saved"]
    step, last = max(saved, default=0), int(options["steps"])
    (attempt_dir / f"from-{rank}").write_text(str(step))
    while step < last:
        step += 1
        time.sleep(float(options["seconds"]))
        if attempt == 1 and rank == int(options.get("rank", "-1")) and step == int(options.get("step", "-1")):
            strike(options["fault"])
        if meet is not None:
            meet()
        beat(attempt_dir, rank, step, "step")
        stop = not options.get("deaf") and (bool(asked) or (attempt_dir / "stop.json").exists())
        if rank == 0:
            now = {"time": time.time(), "attempt": attempt, "step": step}
            append_line(run_dir / "metrics.jsonl", {**now, "steps": last, "loss": 1.0 / step})
            if stop or step == last or step % int(options["save_every"]) == 0:
                save = {"event": "saved", "seconds_blocked": 0.01, "seconds_total": 0.01, "bytes": 1}
                append_line(run_dir / "checkpoints.jsonl", {**now, **save})
        if stop:
            sys.exit(STOPPED_EXIT)
    beat(attempt_dir, rank, step, "done")


def beat(attempt_dir: Path, rank: int, step: int, phase: str) -> None:
    line: dict[str, Any] = {"step": step, "time": time.time(), "phase": phase}
    line |= {"host": os.environ.get("SLURMD_NODENAME", ""), "pid": os.getpid()}
    (attempt_dir / "heartbeat" / f"rank-{rank}").write_text(json.dumps(line))


def collective() -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return dist.barrier


def strike(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise":
        raise ArithmeticError("the loss is not a number")
    if fault == "xid":
        print("[ 812.4] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    stuck_in_a_loader()


def stuck_in_a_loader() -> None:
    time.sleep(1000)


if __name__ == "__main__":
    main()
