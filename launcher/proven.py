"""What has run, where, and what never has: the records behind PROVEN.md. File system and git.

    python -m launcher.proven record --recipe ch4_fsdp --place box --command '...' --result 'loss 3.1'
    python -m launcher.proven reason --recipe ch4_fsdp --place gpu --reason 'wants two hosts with GPUs'
    python -m launcher.proven write

A recipe has run in a place, or a reason says why not; tests/launcher/test_proven.py holds every pair to that.
jobs/preflight.sbatch has no recipe; its runs are on record as `preflight`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.preflight_job import NAME as PREFLIGHT
from launcher.spec import JobSpec, UserError
from launcher.suggest import did_you_mean

DATA = Path(__file__).with_name("proven.json")
PAGE = Path(__file__).resolve().parent.parent / "PROVEN.md"

PLACES = {
    "torchrun": "a bare `torchrun` on one machine, without the launcher",
    "local": "`cluster=local`: processes of this machine, without Slurm",
    "box": "`cluster=box`: a real Slurm with several nodes on one machine",
    "gpu": "NVIDIA GPUs; the table of runs says which and how many",
}
IMPLIED_OPTIONS = {"local": ("executor=local",)}
"""What a run in a place proves besides the options that were typed."""


@dataclass(frozen=True)
class Run:
    """The last time that a recipe ran in a place with these options."""

    recipe: str
    place: str
    options: tuple[str, ...]
    """What differed from the defaults, as typed: `launch=torchrun`."""
    commit: str
    """Short hash; `+changes` after it where the tree had uncommitted ones."""
    date: str
    torch: str
    hardware: str
    command: str
    result: str


@dataclass(frozen=True)
class Reason:
    """Why a recipe has not run in a place."""

    recipe: str
    place: str
    reason: str


@dataclass(frozen=True)
class Option:
    """One value of a job's setting, and whether this project ever ran it."""

    option: str
    """As typed: `container.kind=pyxis`."""
    proven: bool
    reason: str
    """Why it has not run; empty where it has."""


@dataclass(frozen=True)
class Proven:
    runs: tuple[Run, ...]
    reasons: tuple[Reason, ...]
    options: tuple[Option, ...]


def unproven_options(spec: JobSpec) -> list[str]:
    """One warning for each setting of the job that has never run in this project's tests."""
    return [
        f"{option.option} has never run in this project's tests: {option.reason}"
        for option in load().options
        if not option.proven and _has(spec, option.option)
    ]


def _has(spec: JobSpec, option: str) -> bool:
    key, _, value = option.partition("=")
    setting: object = spec
    for name in key.split("."):
        setting = getattr(setting, name)
    return str(setting) == value


# --- the records ------------------------------------------------------------------------------------------


def load(path: Path = DATA) -> Proven:
    data = json.loads(path.read_text())
    return Proven(
        runs=tuple(Run(**{**run, "options": tuple(run["options"])}) for run in data["runs"]),
        reasons=tuple(Reason(**reason) for reason in data["reasons"]),
        options=tuple(Option(**option) for option in data["options"]),
    )


def to_json(proven: Proven) -> str:
    return json.dumps(dataclasses.asdict(proven), indent=2, ensure_ascii=False) + "\n"


def with_run(proven: Proven, run: Run) -> Proven:
    """`run` in place of the earlier one of the same recipe, place and options; its options are proven now.

    Raises UserError for an option that the records do not list.
    """
    listed = [option.option for option in proven.options]
    for option in run.options:
        if option not in listed:
            raise UserError(f"--option {option}: not among the options; {did_you_mean(option, listed)}")

    def same(other: Run) -> bool:
        return (other.recipe, other.place, other.options) == (run.recipe, run.place, run.options)

    def said_no(reason: Reason) -> bool:
        return (reason.recipe, reason.place) == (run.recipe, run.place)

    return Proven(
        runs=(*(other for other in proven.runs if not same(other)), run),
        reasons=tuple(reason for reason in proven.reasons if not said_no(reason)),
        options=tuple(
            Option(option.option, proven=True, reason="") if option.option in run.options else option
            for option in proven.options
        ),
    )


def with_reason(proven: Proven, reason: Reason) -> Proven:
    """`reason` in place of the earlier one. Raises UserError where the recipe did run in that place."""
    if any((run.recipe, run.place) == (reason.recipe, reason.place) for run in proven.runs):
        raise UserError(f"{reason.recipe} has a run in {reason.place}; there is nothing to excuse")
    kept = (other for other in proven.reasons if (other.recipe, other.place) != (reason.recipe, reason.place))
    return dataclasses.replace(proven, reasons=(*kept, reason))


def unanswered(proven: Proven, recipes: Iterable[str]) -> list[str]:
    """The pairs of recipe and place with neither a run nor a reason."""
    answered = {(run.recipe, run.place) for run in proven.runs}
    answered |= {(reason.recipe, reason.place) for reason in proven.reasons}
    return [
        f"{recipe} in {place}" for recipe in recipes for place in PLACES if (recipe, place) not in answered
    ]


# --- the page ---------------------------------------------------------------------------------------------


_PAGE = """\
# What has run, and where

Written by `python -m launcher.proven write` from `launcher/proven.json`.
A cell holds the commit at which the recipe last ran in that place; `-` has its reason below.

{overview}

{places}

## Runs

{runs}

## Not run

{reasons}

## Options that have never run

`launcher submit` says so when a job uses one of them.

{options}
"""


def page(proven: Proven, recipes: Sequence[str]) -> str:
    """PROVEN.md. Recipes come in the order given."""
    oldest_first = sorted(proven.runs, key=lambda run: run.date)
    ran = {(run.recipe, run.place): run.commit for run in oldest_first}
    overview = [[f"`{recipe}`", *(ran.get((recipe, place), "-") for place in PLACES)] for recipe in recipes]
    runs = [
        [
            *(f"`{run.recipe}`", run.place, " ".join(run.options), run.commit, run.date),
            *(run.torch, run.hardware, run.result, f"`{run.command}`"),
        ]
        for run in sorted(proven.runs, key=lambda run: _position(run, recipes))
    ]
    reasons = [
        [f"`{reason.recipe}`", reason.place, reason.reason]
        for reason in sorted(proven.reasons, key=lambda reason: _position(reason, recipes))
    ]
    options = [[f"`{option.option}`", option.reason] for option in proven.options if not option.proven]
    return _PAGE.format(
        overview=_table(["recipe", *PLACES], overview),
        places="\n".join(f"- **{place}**: {meaning}" for place, meaning in PLACES.items()),
        runs=_table(
            ["recipe", "place", "options", "commit", "date", "torch", "hardware", "result", "command"], runs
        ),
        reasons=_table(["recipe", "place", "why"], reasons),
        options=_table(["option", "why"], options),
    )


def _position(entry: Run | Reason, recipes: Sequence[str]) -> tuple[int, int]:
    known = recipes.index(entry.recipe) if entry.recipe in recipes else len(recipes)
    return known, list(PLACES).index(entry.place)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "None."
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the command line -------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None, data: Path = DATA, target: Path = PAGE) -> int:
    arguments = _parser().parse_args(words)
    from launcher.recipes import recipe_files  # reads YAML: not on submit's way

    recipes = list(recipe_files())
    try:
        proven = arguments.change(load(data), arguments, recipes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data.write_text(to_json(proven))
    target.write_text(page(proven, recipes))
    if arguments.change is not _unchanged:
        return 0
    for pair in unanswered(proven, recipes):
        print(f"neither a run nor a reason: {pair}", file=sys.stderr)
    return 1 if unanswered(proven, recipes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.proven", description="What has run, and where.")
    commands = parser.add_subparsers(required=True)

    def command(name: str, change: Callable[..., Proven], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help)
        added.set_defaults(change=change)
        return added

    record = command("record", _record, "note that a recipe has run")
    reason = command("reason", _excuse, "note why a recipe has not run")
    command("write", _unchanged, "write PROVEN.md again; fails where a recipe has neither a run nor a reason")
    for each in (record, reason):
        each.add_argument("--recipe", required=True)
        each.add_argument("--place", required=True, choices=list(PLACES))
    reason.add_argument("--reason", required=True)
    record.add_argument("--command", required=True, help="what was typed")
    record.add_argument("--result", required=True, help="what came out, with a figure")
    record.add_argument("--option", action="append", default=[], help="KEY=VALUE that was not the default")
    record.add_argument("--hardware", help="default: the number of CPU cores here; needed for --place gpu")
    record.add_argument("--torch", help="version (default: the one installed here)")
    record.add_argument("--commit", help="default: this tree's")
    record.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    return parser


def _unchanged(proven: Proven, arguments: Any, recipes: Sequence[str]) -> Proven:
    return proven


def _record(proven: Proven, arguments: Any, recipes: Sequence[str]) -> Proven:
    _check_recipe(arguments.recipe, [*recipes, PREFLIGHT])  # a job file without a recipe, which runs as well
    if arguments.place == "gpu" and not arguments.hardware:
        raise UserError("--hardware: wanted with --place gpu, such as '2 x NVIDIA H200, one host'")
    return with_run(
        proven,
        Run(
            recipe=arguments.recipe,
            place=arguments.place,
            options=tuple(sorted({*arguments.option, *IMPLIED_OPTIONS.get(arguments.place, ())})),
            commit=arguments.commit or current_commit(PAGE.parent),
            date=arguments.date,
            torch=arguments.torch or _installed_torch(),
            hardware=arguments.hardware or f"{os.cpu_count()} CPU cores",
            command=arguments.command,
            result=arguments.result,
        ),
    )


def _excuse(proven: Proven, arguments: Any, recipes: Sequence[str]) -> Proven:
    _check_recipe(arguments.recipe, recipes)
    return with_reason(proven, Reason(arguments.recipe, arguments.place, arguments.reason))


def _check_recipe(recipe: str, recipes: Sequence[str]) -> None:
    if recipe not in recipes:
        raise UserError(f"--recipe {recipe}: no such recipe; {did_you_mean(recipe, recipes)}")


def current_commit(repository: Path) -> str:
    """Short hash of HEAD, with `+changes` where anything but the records themselves is not committed.

    Raises UserError without git or outside a checkout: a record without its commit proves nothing.
    """
    git = ["git", "-C", str(repository)]
    own = [
        f":!{path.relative_to(repository).as_posix()}"
        for path in (DATA, PAGE)
        if path.is_relative_to(repository)
    ]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True).strip()
        changes = subprocess.check_output([*git, "status", "--porcelain", "--", ".", *own], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"git does not tell the commit ({error}); give --commit") from None
    return f"{commit}+changes" if changes else commit


def _installed_torch() -> str:
    import importlib.metadata  # 15 ms: not on submit's way

    return importlib.metadata.version("torch")


if __name__ == "__main__":
    sys.exit(main())
