"""A tiny training in which one thing goes wrong on one rank: what `ch3_debug` starts on every rank, once per fault.

Each fault is one line, marked with `planted`. The process ends by itself whatever happens: a rank that stands still for
`seconds` says where it is and gives up. What a rank knows at its end it leaves in the file TESTIMONY.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recipes.ch3.debug_args import DebugArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.distributed import World, joined
from recipes.lib.flight_record import own_line, recorded

WIDTH, SAMPLES = 8, 4


class Tiny(nn.Module):
    """Two layers, and one aside that a step may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.aside = nn.Linear(WIDTH, 1)

    def forward(self, samples: Tensor, with_aside: bool) -> Tensor:
        hidden = self.inner(samples)
        lengths = hidden.pow(2).sum(1).sqrt()  # of a sample of zeros: 0, and its gradient is 0 times infinity
        return lengths.sum() + (self.aside(hidden).sum() if with_aside else 0.0)


def train(args: DebugArgs, world: World, alarm: Alarm) -> None:
    """Some steps, one of them with the fault."""
    gradients = dist.new_group(group_desc="gradients")
    reached = dist.new_group(
        group_desc="reached", backend="gloo"
    )  # the one backend that has monitored barriers
    torch.manual_seed(0)
    model = DistributedDataParallel(Tiny().to(world.device), process_group=gradients)
    if args.fault == "mismatched_shapes":
        # From here on, and not from the start by TORCH_DISTRIBUTED_DEBUG=DETAIL: with that, torch 2.13 dies of a
        # segmentation fault where DistributedDataParallel is made over gloo.
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    figures = dist.new_group(
        group_desc="figures"
    )  # in detail, every call in it is compared among the ranks first
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(world.rank)
    torch.autograd.set_detect_anomaly(args.fault == "nan_on_one_rank")
    for step in range(1, args.step + 3):
        alarm.set()
        planted = args.fault if (world.rank, step) == (args.rank, args.step) else ""
        samples = torch.randn(SAMPLES, WIDTH, device=world.device)
        if planted == "nan_on_one_rank":
            samples[0] = 0.0
        if planted == "straggler":
            time.sleep(10 * args.seconds)
        if args.fault == "straggler":
            dist.monitored_barrier(reached, timedelta(seconds=args.seconds / 2), wait_all_ranks=True)
        loss = model(samples, with_aside=planted != "unused_parameter")
        figure = loss.detach().clone()[None]
        if planted == "deadlock":
            dist.all_reduce(figure, group=figures)  # before its gradients, the others after theirs
            print(f"step {step}: loss {figure.item()}")  # until here the host waits, also for a GPU
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if planted == "mismatched_shapes":
            figure = torch.cat([figure, figure])
        if planted != "skipped_collective" and args.fault != "unused_parameter":
            dist.all_reduce(figure, group=figures)  # what a training logs
            print(f"step {step}: loss {figure.tolist()}")


class Alarm:
    """Ends this process when a step takes longer than it may."""

    def __init__(self, witness: Witness, seconds: float) -> None:
        self._witness, self._seconds = witness, seconds
        self._deadline = float("inf")
        self._main = threading.get_ident()
        threading.Thread(target=self._watch, name="alarm", daemon=True).start()

    def set(self) -> None:
        """A step begins."""
        self._deadline = time.monotonic() + self._seconds

    def _watch(self) -> None:
        while time.monotonic() < self._deadline:
            time.sleep(0.05)
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        self._witness.testify("stands still", f"for {self._seconds:g} s", stack)
        self._witness.leave(3)


class Witness:
    """Leaves what this rank knows, once."""

    def __init__(self, world: World, seconds: float) -> None:
        self._file = Path(os.environ["TESTIMONY"])
        self._ranks, self._seconds = world.size, seconds
        self._first = threading.Lock()

    def testify(self, end: str, said: str, stack: Sequence[traceback.FrameSummary]) -> None:
        """`stack`: the innermost frame last."""
        if not self._first.acquire(blocking=False):
            time.sleep(2 * self._seconds)  # the other thread is at it, and ends the process
        line = own_line([(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(stack)])
        calls = [dataclasses.asdict(call) for call in recorded()]
        text = json.dumps({"end": end, "said": said, "line": line, "calls": calls})
        self._file.with_suffix(".tmp").write_text(text)
        self._file.with_suffix(".tmp").replace(self._file)

    def leave(self, status: int) -> None:
        """End the process when all ranks have testified: the end of one would break the connections of the others."""
        until = time.monotonic() + 2 * self._seconds
        while (
            len(list(self._file.parent.glob("testimony-*.json"))) < self._ranks and time.monotonic() < until
        ):
            time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Train, and testify."""
    args = parse_or_exit(DebugArgs)
    with joined(args.device) as world:
        witness = Witness(world, args.seconds)
        try:
            train(args, world, Alarm(witness, args.seconds))
        except Exception as error:  # noqa: BLE001 - whatever the fault brings is the subject of the recipe
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            witness.testify("fails", said, traceback.extract_tb(error.__traceback__))
            witness.leave(1)
        witness.testify("is done", "", [])
        witness.leave(0)


if __name__ == "__main__":
    main()
