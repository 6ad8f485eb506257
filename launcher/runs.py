"""Run directories: where a run's files are, how a run is made, found and named. File system.

RUN_ROOT/ch4_fsdp-k3f9xq/
  run.json         id, recipe, time of creation, the words that the user typed
  spec.json        the frozen spec (of the newest submission)
  code.json        git commit and whether the tree was dirty; code.diff holds the difference
  job.sbatch       the script that was submitted
  jobs.jsonl       one line per Slurm job or local start of this run
  state.json       what the controller is doing now, or how it ended
  attempts.jsonl   the ledger: one line per attempt
  metrics.jsonl    one line per logged optimizer step, over all attempts
  results.txt      of a recipe that measures: its tables; results.jsonl has every figure
  attempt-01/      logs and evidence of the first attempt: rank-0.log, preflight.json, packages.txt, …
  checkpoints/
  submitit/        submitit's own files: job handles and the batch step's log
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import ledger
from launcher.outcome import RankError
from launcher.spec import JobSpec, UserError

ID_LETTERS = "abcdefghjkmnpqrstuvwxyz"
ID_CHARACTERS = ID_LETTERS + "23456789"
"""No 0/o, 1/l/i: an id is read aloud and retyped."""


@dataclass(frozen=True)
class Run:
    """One run by its directory."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name.rpartition("-")[2]

    @property
    def spec_file(self) -> Path:
        return self.path / "spec.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def jobs_file(self) -> Path:
        return self.path / "jobs.jsonl"

    @property
    def attempts_file(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def script_file(self) -> Path:
        return self.path / "job.sbatch"

    @property
    def submitit_folder(self) -> Path:
        return self.path / "submitit"

    def spec(self) -> JobSpec:
        return JobSpec.from_json(self.spec_file.read_text())

    def info(self) -> dict[str, Any]:
        return read_json(self.path / "run.json") or {}

    def state(self) -> dict[str, Any]:
        """What the controller last wrote; empty before the first attempt."""
        return read_json(self.state_file) or {}

    def jobs(self) -> list[dict[str, Any]]:
        return ledger.read_lines(self.jobs_file)

    def attempts(self) -> list[dict[str, Any]]:
        return ledger.attempts(self.attempts_file)

    def attempt_dirs(self) -> list[Path]:
        """The attempts' folders, oldest first."""
        return sorted(self.path.glob("attempt-*"), key=lambda path: int(path.name.partition("-")[2]))

    def write_spec(self, spec: JobSpec) -> None:
        write_text(self.spec_file, spec.to_json() + "\n")

    def write_words(self, words: Sequence[str]) -> None:
        """Note the words as they are after a change: the next change is one to these."""
        about = {**self.info(), "words": list(words)}
        write_text(self.path / "run.json", json.dumps(about, ensure_ascii=False) + "\n")

    def write_state(self, **fields: Any) -> None:
        write_text(self.state_file, json.dumps({**fields, "updated": time.time()}, ensure_ascii=False) + "\n")

    def add_job(self, job_id: str, executor: str, **more: Any) -> None:
        ledger.append_line(
            self.jobs_file, {"job_id": job_id, "executor": executor, "time": time.time(), **more}
        )

    def new_attempt_dir(self) -> tuple[int, Path]:
        """Make the next attempt's folder; two controllers at once get two numbers."""
        number = len(self.attempt_dirs()) + 1
        while True:
            path = self.path / f"attempt-{number:02d}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            else:
                return number, path


def create(root: Path, spec: JobSpec, words: Sequence[str]) -> Run:
    """Make a new run directory under `root` with a fresh id. Raises UserError where it cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            run_id = secrets.choice(ID_LETTERS) + "".join(secrets.choice(ID_CHARACTERS) for _ in range(5))
            if not list(root.glob(f"*-{run_id}")):
                break
        run = Run(root / f"{spec.recipe}-{run_id}")
        run.path.mkdir()
        run.submitit_folder.mkdir()
    except OSError as error:
        raise UserError(f"run_root={root}: cannot make a run directory there: {error.strerror}") from error
    about = {"id": run_id, "recipe": spec.recipe, "created": time.time(), "words": list(words)}
    write_text(run.path / "run.json", json.dumps(about, ensure_ascii=False) + "\n")
    run.write_spec(spec)
    return run


def all_runs(roots: Sequence[Path]) -> list[Run]:
    """Every run in these folders, oldest first."""
    found = [Run(path.parent) for root in roots for path in root.glob("*/run.json")]
    return sorted(found, key=lambda run: float(run.info().get("created", 0.0)))


def find(roots: Sequence[Path], name: str | None) -> Run:
    """The run whose id or folder name starts with `name`; the latest one for None. A path to a run works too.

    Raises UserError when there is none, or more than one.
    """
    if name is not None and os.sep in name:
        if (Path(name) / "run.json").is_file():
            return Run(Path(name).resolve())
        raise UserError(f"{name}: no run directory")
    runs, where = all_runs(roots), " or ".join(map(str, roots))
    if not runs:
        raise UserError(
            f"no run in {where} yet; start one with: python -m launcher submit recipe=ch1_baseline"
        )
    if name is None:
        return runs[-1]
    found = [run for run in runs if run.id.startswith(name) or run.path.name.startswith(name)]
    exact = [run for run in found if name in (run.id, run.path.name)]
    if len(exact) == 1:
        return exact[0]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"no run {name!r} in {where}; the latest is {runs[-1].id}, all: python -m launcher status --all"
        )
    names = ", ".join(run.id for run in found[-5:])
    raise UserError(f"{name!r} is the start of {len(found)} runs ({names}): type more of the one you mean")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object written by `write_text`, or None where there is no such file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content if isinstance(content, dict) else None


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def remember_job(root: Path, cluster: str, job_id: str, run: Run) -> None:
    """Note which run a job started by `sbatch jobs/…` made, so that its requeue continues it."""
    folder = root / ".jobs"
    folder.mkdir(exist_ok=True)
    write_text(folder / f"{cluster}-{job_id}", run.path.name)


def run_of_job(root: Path, cluster: str, job_id: str) -> Run | None:
    path = root / ".jobs" / f"{cluster}-{job_id}"
    return Run(root / path.read_text().strip()) if path.exists() else None


def rank_errors(attempt_dir: Path) -> tuple[RankError, ...]:
    """The exceptions that the task wrappers of an attempt recorded."""
    records = (read_json(path) for path in sorted(attempt_dir.glob("error-*.json")))
    return tuple(RankError.from_record(record) for record in records if record is not None)


def last_metrics(run: Run) -> Mapping[str, Any]:
    """The newest metrics line, empty before the first."""
    lines = ledger.read_lines(run.metrics_file)
    return lines[-1] if lines else {}
