"""`render`: print an sbatch file, or write all of jobs/."""

from __future__ import annotations

import argparse

from launcher.config import compose
from launcher.paths import REPOSITORY
from launcher.preflight_job import NAME as PREFLIGHT
from launcher.preflight_job import render_preflight
from launcher.recipes import recipe_files
from launcher.render import render
from launcher.spec import UserError

JOBS_CLUSTER = "slurm"
"""The profile behind the files of jobs/: the plain one."""


def run(options: argparse.Namespace) -> int:
    if options.write and not options.all:
        raise UserError("--write goes with --all: one file alone would leave jobs/ and the recipes apart")
    if not options.all:
        print(render(compose(options.words), words=options.words), end="")
        return 0
    if options.words:
        raise UserError(f"{options.words[0]}: --all renders every recipe as it is, without overrides")
    for name, text in job_files().items():
        if options.write:
            folder = REPOSITORY / "jobs"
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(text)
            print(f"jobs/{name}")
        else:
            print(text, end="")
    if options.write:
        _remove_orphans(set(job_files()))
    return 0


def job_files() -> dict[str, str]:
    """File name -> text of every file that belongs in jobs/."""
    recipes = {
        f"{name}.sbatch": render(compose([f"recipe={name}", f"cluster={JOBS_CLUSTER}"]))
        for name in recipe_files(REPOSITORY)
    }
    return {**recipes, f"{PREFLIGHT}.sbatch": render_preflight()}


def _remove_orphans(wanted: set[str]) -> None:
    for path in (REPOSITORY / "jobs").glob("*.sbatch"):
        if path.name not in wanted:
            path.unlink()
            print(f"removed jobs/{path.name}: no such recipe")
