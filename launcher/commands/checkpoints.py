"""`checkpoints`: list what a run can go on from, verify it, delete what is not wanted, export it. No torch here."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher import runs
from launcher.paths import REPOSITORY, known_run_roots
from launcher.spec import UserError
from recipes.lib import manifest


@dataclass(frozen=True)
class Found:
    """One checkpoint as it was found."""

    folder: Path
    described: manifest.Manifest | None
    problem: str
    """Why a resume would pass it over; empty where it would not."""

    def as_json(self, verified: bool) -> dict[str, Any]:
        described = self.described
        return {
            "step": manifest.step_of(self.folder),
            "folder": str(self.folder),
            "bytes": described and described.size,
            "world_size": described and described.world_size,
            "recipe": described and described.technique,
            "time": described and described.time,
            "sound": not self.problem,
            "verified": verified,
            "problem": self.problem,
        }


def run(options: argparse.Namespace) -> int:
    _check(options)
    found = runs.find(known_run_roots(), options.run)
    found.spec()  # refuses the directory of a newer version, whose checkpoints may mean something else
    folders = manifest.folders(found.path)
    checkpoints = (
        _look_before_pruning(folders, options.keep)
        if options.prune
        else [_look(folder, options.verify) for folder in folders]
    )
    if options.export is not None:
        return _export(found, checkpoints, options)
    if options.prune:
        return _prune(checkpoints, options)
    if options.json:
        print(json.dumps([one.as_json(options.verify) for one in checkpoints], ensure_ascii=False))
    elif not checkpoints:
        print(f"run {found.id} has no checkpoint in {found.path / 'checkpoints'}")
    else:
        _show(checkpoints, verified=options.verify)
    return 1 if options.verify and any(one.problem for one in checkpoints) else 0


def _check(options: argparse.Namespace) -> None:
    """Options that would be ignored, or delete everything, are mistakes."""
    if options.prune and options.export is not None:
        raise UserError("--prune and --export: one at a time")
    if options.prune and options.keep is None:
        raise UserError("--prune wants --keep N, the number of newest checkpoints that stay")
    if options.keep is not None and options.keep < 1:
        raise UserError(f"--keep={options.keep}: wants 1 or more; a run without a checkpoint begins again")
    if options.keep_every is not None and options.keep_every < 0:
        raise UserError(f"--keep-every={options.keep_every}: wants 0 or more")
    for name, needed in (("keep", "prune"), ("keep_every", "prune"), ("step", "export"), ("dtype", "export")):
        if getattr(options, name) is not None and not getattr(options, needed):
            raise UserError(f"--{name.replace('_', '-')} goes with --{needed}")
    if options.yes and not options.prune:
        raise UserError("--yes goes with --prune")


def _look(folder: Path, verify: bool) -> Found:
    described = None
    try:
        described = manifest.check_sizes(folder)
        if verify:
            manifest.check_blocks(folder, described)
    except (manifest.Unsound, manifest.TooNew) as error:
        return Found(folder, described, str(error))
    return Found(folder, described, "")


def _look_before_pruning(folders: list[Path], keep: int) -> list[Found]:
    """Every byte of those that are to stay is read: a corrupt one in their place would be all that is left."""
    checkpoints: list[Found] = []
    for folder in folders:
        stay = sum(not one.problem for one in checkpoints)
        checkpoints.append(_look(folder, verify=stay < keep))
    return checkpoints


def _show(checkpoints: list[Found], *, verified: bool) -> None:
    table = Table("step", "size", "ranks", "recipe", "saved", "state", box=None)
    for one in checkpoints:
        step, described = str(manifest.step_of(one.folder)), one.described
        facts = ["-"] * 4
        if described is not None:
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(described.time))
            size = f"{described.size / 2**20:,.1f} MiB"
            facts = [size, str(described.world_size), described.technique, saved]
        table.add_row(step, *facts, one.problem or ("verified" if verified else "complete"))
    Console(soft_wrap=True).print(table)


def _prune(checkpoints: list[Found], options: argparse.Namespace) -> int:
    sound = {manifest.step_of(one.folder): one.folder for one in checkpoints if not one.problem}
    surplus = manifest.surplus(list(sound), options.keep, options.keep_every or 0)
    for one in checkpoints:
        if one.problem:
            print(f"{one.folder.name} is left alone: {one.problem}", file=sys.stderr)
    for step in surplus:
        if options.yes:
            manifest.remove(sound[step])
        print(f"{'deleted' if options.yes else 'would delete'} {sound[step]}")
    if not surplus:
        print("nothing to delete")
    elif not options.yes:
        print("nothing was deleted; add --yes to do it")
    return 0


def _export(found: runs.Run, checkpoints: list[Found], options: argparse.Namespace) -> int:
    """In a process of its own, which imports torch."""
    wanted = [one for one in checkpoints if options.step in (None, manifest.step_of(one.folder))]
    source = next((one.folder for one in wanted if not one.problem), None)
    if source is None:
        steps = ", ".join(str(manifest.step_of(one.folder)) for one in checkpoints) or "none"
        problem = wanted[0].problem if wanted else f"it has: {steps}"
        raise UserError(f"run {found.id} has no such checkpoint to export ({problem})")
    words = [sys.executable, "-m", "recipes.lib.export", str(source), str(options.export.absolute())]
    if options.dtype is not None:
        words.append(f"--dtype={options.dtype}")
    return subprocess.run(words, cwd=REPOSITORY, check=False).returncode
