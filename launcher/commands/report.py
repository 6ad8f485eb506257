"""`report`: what a run's ledger says, in the terminal, as JSON, and as an HTML page to look at."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher import ledger, runs
from launcher.commands.arguments import REPORT_PAGE
from launcher.paths import known_run_roots
from launcher.report import Part, Records, Report, build
from launcher.report_charts import duration
from launcher.report_page import Title, page, percent
from launcher.spec import UserError
from launcher.timeline import Kind

COLOURS: dict[Kind, tuple[str, str]] = {
    "train": ("blue", "█"),
    "lost": ("red", "▓"),
    "save": ("magenta", "▒"),
    "start": ("yellow", "▚"),
    "stop": ("dark_orange3", "▞"),
    "preflight": ("cyan", "▤"),
    "queue": ("bright_black", "░"),
    "idle": ("bright_black", "·"),
    "unknown": ("white", "?"),
}
"""A colour and a sign for each kind of time: the bar is read without colours too."""


def run(options: argparse.Namespace) -> int:
    found = runs.find(known_run_roots(), options.run)
    report = build(records_of(found))
    file = options.html if options.html is not None else found.path / REPORT_PAGE
    if options.html is not None or not options.json:
        write_page(report, found, file)  # first: a reader of the text may leave early (`| head`)
    if options.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        console = Console()
        show(report, found, console)
        console.print(f"page      {file}", highlight=False, soft_wrap=True, markup=False)
    return 0


def records_of(found: runs.Run) -> Records:
    """Everything that the run wrote down, torn lines left out."""
    return Records(
        attempts=found.attempts(),
        metrics=ledger.read_lines(found.metrics_file),
        checkpoints=ledger.read_lines(found.path / "checkpoints.jsonl"),
        jobs=found.jobs(),
        state=found.state(),
    )


def write_page(report: Report, found: runs.Run, file: Path) -> None:
    """Raises UserError where the file cannot be written, as in somebody else's run directory."""
    spec, created = found.spec(), found.info().get("created")
    title = Title(found.id, spec.recipe, spec.cluster, created if isinstance(created, int | float) else None)
    try:
        runs.write_text(file, page(report, title))
    except OSError as error:
        raise UserError(
            f"{file}: the page cannot be written: {error.strerror}; name a file with --html"
        ) from error


def show(report: Report, found: runs.Run, console: Console) -> None:
    """The figures, one stacked bar with its legend, and the attempts."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("run", f"{found.id}  {found.spec().recipe}: {report.state}{_progress(report)}")
    facts.add_row(
        "ETTR",
        f"[bold]{percent(report.ettr)}[/]  ({percent(report.ettr_without_queue)} without the first queue)",
    )
    wall = report.wall_seconds if report.wall_seconds is not None else report.wall_without_queue_seconds
    facts.add_row("training", f"{duration(report.productive_seconds)} that count, in {duration(wall)}")
    facts.add_row("MTTF", _mttf(report))
    console.print(facts, highlight=False, soft_wrap=True)
    if report.stretches:
        console.print()
        console.print(_bar(report, min(console.width, 100)), soft_wrap=True)
        console.print(_legend(report.parts), highlight=False)
    if report.attempts:
        console.print()
        console.print(_attempts(report), highlight=False)
        _show_evidence(report, console)
    for note in report.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False, soft_wrap=True)


def _progress(report: Report) -> str:
    if report.step is None:
        return ""
    return f", step {report.step}" + (f" of {report.steps}" if report.steps is not None else "")


def _mttf(report: Report) -> str:
    counted = f"{report.failures} of {len(report.attempts)} attempts failed"
    if report.mttf_seconds is None:
        return counted
    return f"{duration(report.mttf_seconds)}  ({counted}, {report.interruptions} were interrupted)"


def _bar(report: Report, width: int) -> Text:
    """Every kind that took time gets a cell at least; the largest gives up what the others gained."""
    parts = [(part, part.share) for part in report.parts if part.share]
    cells = {part.kind: max(1, round(share * width)) for part, share in parts}
    largest = max(cells, key=lambda kind: cells[kind])
    cells[largest] = max(1, cells[largest] + width - sum(cells.values()))
    bar = Text()
    for part, _ in parts:
        colour, sign = COLOURS[part.kind]
        bar.append(sign * cells[part.kind], style=colour)
    return bar


def _legend(parts: tuple[Part, ...]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for part in parts:
        if part.seconds == 0 and not part.missing_in:
            continue
        colour, sign = COLOURS[part.kind]
        least = "at least " if part.seconds is not None and part.missing_in else ""
        share = f"{part.share:.1%}" if part.share is not None else ""
        table.add_row(f"[{colour}]{sign}[/]", part.label, f"{least}{duration(part.seconds)}", share)
    return table


def _attempts(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, side in (("attempt", "right"), ("ended", "left"), ("took", "right"), ("steps", "right")):
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=True)
    table.add_column("repeated", justify="right", no_wrap=True)
    table.add_column("job", no_wrap=True)
    for each in report.attempts:
        took = (
            duration(each.ended - each.started)
            if each.ended is not None and each.started is not None
            else "?"
        )
        begun = "?" if each.resumed_after is None else each.resumed_after
        steps = f"{begun} → {each.last_step}" if each.last_step is not None else "none"
        cause = (each.cause or each.state).replace("_", " ")
        colour = "green" if each.cause == "done" else "red" if each.failed else "yellow"
        ended = Text(cause, style=colour)
        if each.action and each.cause != "done":
            ended.append(f", {each.action}", style="default")
        lost = str(each.lost_steps) if each.lost_steps else ""
        table.add_row(str(each.number), ended, took, steps, lost, each.job_id or "")
    return table


def _show_evidence(report: Report, console: Console) -> None:
    """Below the table, where a line has room; an attempt that is done needs none, but may have had a slow rank."""
    for each in report.attempts:
        for line in each.evidence[:3] if each.cause != "done" else ():
            console.print(f"attempt {each.number}: {line}", highlight=False, markup=False, soft_wrap=True)
        for line in each.slow:
            console.print(f"attempt {each.number}: {line}", highlight=False, markup=False, soft_wrap=True)
