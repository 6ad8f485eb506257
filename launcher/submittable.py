"""What can be known to be wrong before a job is submitted, beyond the configuration. File system.

Every path is judged from this machine: login node and compute nodes share the folders that a job names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.clusters import BOX
from launcher.paths import run_root
from launcher.spec import Container, JobSpec, UserError
from recipes.lib.arguments import ArgumentError
from recipes.lib.corpus import check_data
from recipes.lib.pretrained import check_init_from


def check_submittable(spec: JobSpec) -> None:
    """Raise UserError, one line, where the job cannot be submitted from here or would fail for want of a
    file.
    """
    if spec.executor == "slurm" and spec.cluster != BOX and shutil.which("sbatch") is None:
        raise UserError(
            f"cluster={spec.cluster}: sbatch is not on PATH; submit on a login node, "
            "or try cluster=box (a Slurm on this machine) or cluster=local"
        )
    check_run_root(run_root(spec.run_root))
    _check_arguments(spec.args)
    if spec.container.kind != "none":
        _check_image(spec.container)


def check_run_root(root: Path) -> None:
    """Raise UserError unless this user can make a directory in `root`, or make `root` itself first."""
    existing = next(folder for folder in (root, *root.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise UserError(f"run_root={root}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"run_root={root}: you may not write in {existing}; name another folder with run_root="
        )


def _check_arguments(args: Mapping[str, Any]) -> None:
    if args.get("init_from"):
        try:
            check_init_from(args["init_from"], args["model"], args["vocab_size"])
        except ArgumentError as error:
            raise UserError(f"args.{error}") from None
    if isinstance(args.get("data"), str):
        try:
            check_data(args["data"])
        except ArgumentError as error:
            raise UserError(f"args.{error}") from None


def _check_image(container: Container) -> None:
    """An image that is spelt as a path must be there; a registry's name is for the runtime to judge."""
    spelt_as_path = container.image.startswith(("/", "./", "../")) or container.image.endswith(
        (".sqsh", ".sif")
    )
    if spelt_as_path and not Path(container.image).exists():
        raise UserError(f"container.image={container.image}: there is no such file")
