"""Metrics: per logged optimizer step one JSON object in RUN_DIR/metrics.jsonl and one line on the console."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recipes.lib.distributed import World
from recipes.lib.flops import FlopsPerToken, peak_flops
from recipes.lib.lines import Lines

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Rank 0 writes; on the other ranks every call does nothing.

    Rates are over the time since the line before, without what `paused` encloses. `mfu` is by the `full`
    convention of `flops` (torchtitan's and MaxText's), and absent where the device's peak is unknown or the
    matrix products are not in bfloat16, which the peak is for.
    """

    def __init__(
        self,
        run_directory: Path,
        world: World,
        *,
        attempt: int,
        steps: int,
        flops: FlopsPerToken,
        compute: torch.dtype,
    ) -> None:
        self._world, self._attempt, self._steps = world, attempt, steps
        self._flops = flops
        cuda = world.device.type == "cuda"
        known = cuda and compute == torch.bfloat16
        self._peak = peak_flops(torch.cuda.get_device_name(world.device)) if known else None
        self._file = Lines(run_directory / METRICS_FILE) if world.is_first else None
        self._began = time.perf_counter()
        self._tokens_before: int | None = None

    def start(self, tokens: int) -> None:
        """The clock of the first line runs from here; `tokens` is the run's total so far."""
        self._began, self._tokens_before = time.perf_counter(), tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count: saving is not training, and its cost is reported apart."""
        paused = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused

    def log(self, *, step: int, tokens: int, loss: float, grad_norm: float, lr: float) -> None:
        """One step's line. `tokens` is the total of the run."""
        assert self._tokens_before is not None, "start() comes first"
        now = time.perf_counter()
        rate = (tokens - self._tokens_before) / (now - self._began)
        self._began, self._tokens_before = now, tokens
        if self._file is None:
            return
        per_device = rate / self._world.size
        line: dict[str, Any] = {
            "time": time.time(),
            "attempt": self._attempt,
            "step": step,
            "steps": self._steps,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": per_device,
        }
        if self._peak is not None:
            line["mfu"] = per_device * self._flops.full / self._peak
        if self._world.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated(self._world.device) / 2**30
        self._file.append(line)
        self.say(_console_line(line))

    def say(self, text: str) -> None:
        """A line for the log, from rank 0."""
        if self._world.is_first:
            say(text)

    def close(self) -> None:
        """Close the file; nothing is logged afterwards."""
        if self._file is not None:
            self._file.close()


def say(text: str) -> None:
    """Print a line for the log, which may be a file on a disk that is full: that does not end a run."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # else the line stays in the stream's buffer and goes out with a later one


def _console_line(line: dict[str, Any]) -> str:
    parts = [
        f"step {line['step']:>{len(str(line['steps']))}}/{line['steps']}",
        f"loss {line['loss']:.4f}",
        f"grad norm {line['grad_norm']:.3f}",
        f"lr {line['lr']:.2e}",
        f"{line['tokens_per_second']:,.0f} tok/s",
    ]
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    if "memory_gib" in line:
        parts.append(f"{line['memory_gib']:.1f} GiB")
    return "  ".join(parts)
