"""Watching a run: live progress in a terminal, plain lines elsewhere, and the summary at its end. Prints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from launcher import ledger, runs, status
from launcher.slurm import SlurmError

POLL_SECONDS = 0.25
SLURM_EVERY_SECONDS = 1.0
"""How often Slurm is asked; slurmctld serves the whole cluster, our own files cost nothing."""

PLAIN_EVERY_SECONDS = 5.0


class MetricsTail:
    """The lines that were added to metrics.jsonl since the last look."""

    def __init__(self, path: Path, skip: int = 0) -> None:
        self._path = path
        self._seen = skip

    def new_lines(self) -> list[dict[str, Any]]:
        lines = ledger.read_lines(self._path)
        fresh = lines[self._seen :]
        self._seen = len(lines)
        return fresh


def follow(run: runs.Run, console: Console) -> status.RunStatus:
    """Show the run until it is over and return its last status. KeyboardInterrupt leaves the run alone."""
    if console.is_terminal:
        return _follow_live(run, console)
    return _follow_plain(run, console)


def _follow_live(run: runs.Run, console: Console) -> status.RunStatus:
    columns = (
        TextColumn("[bold]{task.description:<8}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        bar = progress.add_task("waiting", total=None, text="")
        for seen in _watch(run):
            current, metrics = seen
            if metrics:
                progress.update(
                    bar, description="running", total=metrics["steps"], completed=metrics["step"],
                    text=describe(metrics),
                )  # fmt: skip
            else:
                progress.update(bar, description=current.state, text=current.reason)
        progress.update(bar, description=current.state)
    return current


def _follow_plain(run: runs.Run, console: Console) -> status.RunStatus:
    said, last = "", 0.0
    for current, metrics in _watch(run):
        text = describe(metrics) if metrics else current.reason
        due = time.monotonic() - last > PLAIN_EVERY_SECONDS or current.is_over
        if text != said and (due or not metrics):
            console.print(f"{current.state}: {text}" if not metrics else text, highlight=False)
            said, last = text, time.monotonic()
    return current


def _watch(run: runs.Run) -> Iterator[tuple[status.RunStatus, dict[str, Any]]]:
    """The run's status and the newest metrics of this job, again and again until the run is over."""
    began = run.jobs()[-1]["time"] if run.jobs() else 0.0
    tail, newest = MetricsTail(run.metrics_file), dict[str, Any]()
    asked, current = 0.0, status.status_of(run)
    while True:
        for line in tail.new_lines():
            if line.get("time", 0.0) >= began:
                newest = line
        record = run.state()
        ended = record.get("state") in status.ENDS and record.get("updated", 0.0) >= began
        if ended or time.monotonic() - asked > SLURM_EVERY_SECONDS:
            try:
                current = status.status_of(run)
            except SlurmError as error:  # slurmctld may be away for a minute; the run goes on without it
                current = _unknown(current, str(error))
            asked = time.monotonic()
        yield current, newest
        if current.is_over:
            return
        time.sleep(POLL_SECONDS)


def _unknown(last: status.RunStatus, why: str) -> status.RunStatus:
    return status.RunStatus(**{**last.as_json(), "reason": f"Slurm does not answer: {why}"})


def describe(metrics: dict[str, Any]) -> str:
    """One line of a step: "step 40/200  loss 3.214  1,234 tokens/s  0:42 left".

    A recipe that measures has no loss and says what it measured: "step 3/12  all_reduce 1 MiB: 12.3 GB/s".
    """
    parts = [f"step {metrics['step']}/{metrics['steps']}"]
    if metrics.get("loss") is not None:
        parts.append(f"loss {metrics['loss']:.4f}")
    if metrics.get("what"):
        parts.append(str(metrics["what"]))
    rate = metrics.get("tokens_per_second")
    if rate:
        parts.append(f"{rate:,.0f} tokens/s")
        left = metrics["steps"] - metrics["step"]
        per_step = metrics["tokens"] / max(1, metrics["step"])
        seconds = round(left * per_step / rate)
        parts.append(f"{seconds // 60}:{seconds % 60:02d} left")
    if metrics.get("mfu"):
        parts.append(f"MFU {metrics['mfu']:.1%}")
    return "  ".join(parts)


def summary(run: runs.Run, current: status.RunStatus, console: Console, *, curve: bool = True) -> None:
    """What a person wants at the end: the state, the loss curve, where everything is, what failed."""
    colour = "green" if current.state == "done" else "red"
    console.print(f"[bold {colour}]{current.state}[/]: {current.reason}", highlight=False)
    if current.state != "done":
        show_failure(run, console)
    if curve and sum("loss" in line for line in ledger.read_lines(run.metrics_file)) > 1:
        from recipes.lib import plots

        picture = run.path / "loss.png"
        plots.loss_curve_png(run.metrics_file, picture)
        width = min(console.width, 100)
        console.print(plots.loss_curve_terminal(run.metrics_file, width, 16), markup=False, highlight=False)
        console.print(f"loss curve     {picture}", highlight=False, soft_wrap=True)
    elif curve and (shown := run.path / "results.txt").exists():
        # A recipe that measures: its tables, and where its pictures are.
        console.print(
            shown.read_text(errors="replace").strip("\n"), markup=False, highlight=False, soft_wrap=True
        )
    console.print(f"run directory  {run.path}", highlight=False, soft_wrap=True)


def show_failure(run: runs.Run, console: Console) -> None:
    failure = status.failure_of(run)
    if failure is not None:
        if not failure.traceback:
            return  # one line says it all, and is the run's reason
        console.print(f"rank {failure.rank} on {failure.node} failed first:", highlight=False)
        console.print(failure.traceback.rstrip(), markup=False, highlight=False, soft_wrap=True)
        return
    log = status.telling_log(run)
    if log is not None:
        console.print(f"the end of {log}:", highlight=False, soft_wrap=True)
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        console.print(end, markup=False, highlight=False, soft_wrap=True)
