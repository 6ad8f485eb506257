"""`logs`: what the controller and the ranks printed; `-f` follows until the run is over."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from launcher import runs, status
from launcher.cluster_commands import use_cluster_of
from launcher.paths import known_run_roots
from launcher.slurm import SlurmError
from launcher.spec import UserError

POLL_SECONDS = 0.3
STATUS_EVERY_SECONDS = 2.0


def run(options: argparse.Namespace) -> int:
    found = runs.find(known_run_roots(), options.run)
    reader = _Reader()
    if not options.follow:
        shown = [path for path in _files(found, options) if path.exists()]
        if not shown:
            raise UserError(_nothing_yet(found, options))
        for path in shown:
            reader.show(path, header=len(shown) > 1)
        return 0
    use_cluster_of(found)
    asked, over = 0.0, False
    while True:
        for path in _files(found, options):
            reader.show(path, header=options.rank is None)
        if over:
            return 0
        if time.monotonic() - asked > STATUS_EVERY_SECONDS:
            over, asked = _is_over(found), time.monotonic()  # one more look at the files after the end
        time.sleep(POLL_SECONDS)


def _is_over(found: runs.Run) -> bool:
    try:
        return status.status_of(found).is_over
    except SlurmError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return False


def _files(found: runs.Run, options: argparse.Namespace) -> list[Path]:
    """The logs that were asked for, in reading order; some may not exist yet."""
    folder = _attempt_dir(found, options.attempt)
    if options.rank is not None:
        return [folder / f"rank-{options.rank}.log"] if folder else []
    batch = status.batch_log(found)
    return [path for path in (batch, folder / "rank-0.log" if folder else None) if path is not None]


def _attempt_dir(found: runs.Run, attempt: int | None) -> Path | None:
    folders = found.attempt_dirs()
    if attempt is None:
        return folders[-1] if folders else None
    chosen = [folder for folder in folders if folder.name == f"attempt-{attempt:02d}"]
    if not chosen:
        raise UserError(f"--attempt={attempt}: run {found.id} has {len(folders)} attempts")
    return chosen[0]


def _nothing_yet(found: runs.Run, options: argparse.Namespace) -> str:
    folder = _attempt_dir(found, options.attempt)
    ranks = sorted(int(path.stem.partition("-")[2]) for path in folder.glob("rank-*.log")) if folder else []
    if options.rank is not None and ranks:
        return f"--rank={options.rank}: run {found.id} has logs of ranks {ranks[0]} to {ranks[-1]}"
    return f"run {found.id} has no log yet; see: python -m launcher status {found.id}"


class _Reader:
    """Prints what was added to each file since the last look, with a header where the file changes."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}
        self._last: Path | None = None

    def show(self, path: Path, *, header: bool) -> None:
        try:
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                added = file.read()
        except FileNotFoundError:
            return  # not started yet
        if not added:
            return
        self._offsets[path] = self._offsets.get(path, 0) + len(added)
        if header and path != self._last:
            print(f"==> {path.parent.name}/{path.name} <==")
        self._last = path
        sys.stdout.write(added.decode(errors="replace"))
        sys.stdout.flush()
