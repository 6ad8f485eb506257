"""Six faults that stop a distributed training, and for each one the tool that names rank, collective and line.

    torchrun --nproc-per-node 2 -m recipes.ch3.debug
    torchrun --nproc-per-node 4 -m recipes.ch3.debug fault=deadlock rank=2

Every rank starts a process of its own for each fault: a tiny training (`faulty`) in which the fault is planted. It
hangs or fails as any training would, ends by itself, and leaves what its rank knew. Here the ranks put together what
was left, and the tool has to name the planted rank (`diagnosis`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from recipes.ch3.debug_args import FAULTS, DebugArgs
from recipes.ch3.diagnosis import TOOLS, Finding, NotNamed, Testimony
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.distributed import World, from_first, joined
from recipes.lib.flight_record import Call
from recipes.lib.measurements import Measurements, several
from recipes.lib.training import recipe_main

SECONDS_TO_START = 300.0
"""For a rank's process to import torch and to meet the others, on a busy node and a cold file system."""

MEANING = {
    "mismatched_shapes": "a rank logs one figure more than the others: its all-reduce has another shape",
    "unused_parameter": "a rank leaves out a layer: the gradients of its bucket never come together",
    "skipped_collective": "a rank does not log: the others wait for it in an all-reduce",
    "deadlock": "a rank sums its loss before its gradients, the others after: each waits for the other",
    "straggler": "a rank's input takes very long: the others wait",
    "nan_on_one_rank": "a rank has an empty sample: the root of 0 has no gradient",
}


@recipe_main
def main() -> None:
    """Let each fault happen, and print who the tool says it was."""
    args = parse_or_exit(DebugArgs)
    faults = FAULTS if args.fault == "all" else (args.fault,)
    # On the CPU whatever the trainings compute on: this process only waits, and shares their GPU with nobody.
    with joined("cpu") as world:
        several(world)
        if args.rank >= world.size:
            raise ArgumentError("rank", args.rank, f"wants less than {world.size}, the number of ranks")
        with Measurements("ch3_debug", world, len(faults)) as results:
            for fault in faults:
                testimonies = let_happen(fault, args, world, results.directory / fault)
                finding = diagnose(fault, args, testimonies)
                results.show(report(fault, finding, args, testimonies))
                results.add(f"{fault}: rank {finding.rank}, by {finding.tool}", fault=fault, **vars(finding))


def let_happen(fault: str, args: DebugArgs, world: World, folder: Path) -> dict[int, Testimony]:
    """Start the training of this rank, wait for its end, and exchange what the ranks left."""
    # A meeting point of its own: what the fault breaks is not what the recipes' ranks talk over.
    address = os.environ["MASTER_ADDR"]
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if world.is_first else None
    port = from_first(store.port if store else 0, world)
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / f"testimony-{world.rank}.json", folder / f"rank-{world.rank}.log"
    file.unlink(missing_ok=True)
    dist.barrier()  # no rank may take another's testimony of an earlier attempt for a new one
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TORCHELASTIC_ERROR_FILE"},
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already, none of the ranks is to open it
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCH_DISTRIBUTED_DEBUG": "INFO",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TESTIMONY": str(file),
    }
    words = [
        f"fault={fault}",
        *(f"{name}={getattr(args, name)}" for name in ("rank", "step", "seconds", "device")),
    ]
    with log.open("w") as output:
        command = [sys.executable, "-m", "recipes.ch3.faulty", *words]
        limit = SECONDS_TO_START + 10 * args.seconds
        ended = subprocess.run(
            command, env=environment, stdout=output, stderr=output, timeout=limit, check=False
        )
    mine = read(file, log, ended.returncode)
    everyone = [mine] * world.size
    dist.all_gather_object(everyone, mine, group=world.patient)
    return dict(enumerate(everyone))


def read(file: Path, log: Path, status: int) -> Testimony:
    """What a rank left; the end of its log where it left nothing."""
    text = log.read_text(errors="replace")
    if not file.exists():
        return Testimony(f"left with status {status}", text[-2000:], "", (), text)
    found = json.loads(file.read_text())
    calls = tuple(Call(**call) for call in found["calls"])
    return Testimony(found["end"], found["said"], found["line"], calls, text)


def diagnose(fault: str, args: DebugArgs, testimonies: dict[int, Testimony]) -> Finding:
    """What the tool for the fault says. Raises NotNamed where it is not what was planted."""
    try:
        finding = TOOLS[fault](testimonies)
    except NotNamed as error:
        ends = "; ".join(f"rank {rank} {each.end}: {each.said[:200]}" for rank, each in testimonies.items())
        raise NotNamed(f"{fault}: {error} ({ends})") from None
    if finding.rank != args.rank:
        raise NotNamed(f"{fault}: planted on rank {args.rank}, {finding.tool} names rank {finding.rank}")
    return finding


def report(fault: str, finding: Finding, args: DebugArgs, testimonies: dict[int, Testimony]) -> str:
    """How each rank ended, and what the tool says of it."""
    seen = [
        f"rank {rank} {each.end} at {each.line or 'an unknown line'}" for rank, each in testimonies.items()
    ]
    rows = [
        *(("ends" if number == 0 else "", line) for number, line in enumerate(seen)),
        ("tool", finding.tool),
        ("says", finding.said),
        ("rank", str(finding.rank)),
        ("collective", finding.collective),
        ("called at", finding.called_at),
        ("culprit at", finding.line),
    ]
    title = f"{fault} in step {args.step}: {MEANING[fault]}"
    return "\n".join([title, *(f"  {name:<11} {value}" for name, value in rows), ""])


if __name__ == "__main__":
    main()
