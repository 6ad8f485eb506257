"""`status`: how the latest run is (or one, or all of them), and why it failed."""

from __future__ import annotations

import argparse
import json
import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher import heartbeats, progress, runs, slurm
from launcher import status as run_status
from launcher.cluster_commands import use_cluster_of
from launcher.paths import known_run_roots
from launcher.spec import UserError

"""Rows of `status --all` without --limit."""


def run(options: argparse.Namespace) -> int:
    console = Console()
    if options.all:
        return _show_all(options, console)
    found = runs.find(known_run_roots(), options.run)
    current = _ask(found)
    if options.json:
        print(json.dumps(current.as_json(), ensure_ascii=False))
    else:
        _show_one(found, current, console)
    return 0


def _ask(found: runs.Run) -> run_status.RunStatus:
    """The status, or one that says what could not be asked: a box that is down must not hide the run's own
    record.
    """
    try:
        use_cluster_of(found)
        return run_status.status_of(found)
    except (UserError, slurm.SlurmError) as error:
        record, spec, metrics = found.state(), found.spec(), runs.last_metrics(found)
        ended = record.get("state") in run_status.ENDS
        return run_status.RunStatus(
            run=found.id, recipe=spec.recipe, state=record["state"] if ended else "unknown",
            reason=record["reason"] if ended else str(error), job_id=record.get("job_id", ""),
            executor=spec.executor, attempts=len(found.attempt_dirs()), step=metrics.get("step"),
            steps=metrics.get("steps"), loss=metrics.get("loss"),
            tokens_per_second=metrics.get("tokens_per_second"), directory=str(found.path),
            slow=heartbeats.sentences(record.get("slow")),
            passed_over=run_status.passed_over(found),
        )  # fmt: skip


def _show_all(options: argparse.Namespace, console: Console) -> int:
    listed = [_ask(each) for each in runs.all_runs(known_run_roots())[-options.limit :]]
    if options.json:
        print(json.dumps([each.as_json() for each in listed], ensure_ascii=False))
        return 0
    table = Table("run", "recipe", "state", "step", "loss", "job", "reason", box=None, pad_edge=False)
    for each in listed:
        step = f"{each.step}/{each.steps}" if each.step is not None else ""
        loss = f"{each.loss:.4f}" if each.loss is not None else ""
        table.add_row(each.run, each.recipe, _coloured(each.state), step, loss, each.job_id, each.reason)
    console.print(table)
    return 0


def _show_one(found: runs.Run, current: run_status.RunStatus, console: Console) -> None:
    spec = found.spec()
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.info().get("created", 0.0)))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("run", f"{current.run}  {current.recipe} on {spec.cluster}, created {created}")
    table.add_row("state", f"{_coloured(current.state)}: {current.reason}")
    table.add_row("job", f"{current.job_id or 'none'} ({current.executor}), attempt {current.attempts}")
    metrics = runs.last_metrics(found)
    if metrics:
        table.add_row("progress", progress.describe(dict(metrics)))
    for line in current.slow:
        table.add_row("[yellow]slow[/]", escape(line))
    for line in current.passed_over:
        table.add_row("[yellow]passed over[/]", escape(line))
    table.add_row("directory", current.directory)
    console.print(table, soft_wrap=True)
    if current.is_over and current.state != "done":
        progress.show_failure(found, console)


def _coloured(state: str) -> str:
    colours = {"done": "green", "running": "cyan", "starting": "cyan", "pending": "yellow"}
    return f"[{colours.get(state, 'red')}]{state}[/]"
