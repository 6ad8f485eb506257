#!/usr/bin/env python3
"""Locks every stack of env/requirements/stacks.yaml and writes its containers. `make lock` calls it.

    python env/lock_stacks.py [NAME ...]

Nothing is downloaded but descriptions of packages, and what has no wheel. The locks are for Linux on x86-64 with CUDA,
on whatever machine this runs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from launcher.container_files import container_files
from launcher.paths import REPOSITORY
from launcher.spec import UserError
from launcher.stacks import Stack, load_stacks


def main(names: Sequence[str]) -> int:
    """Lock the stacks called `names`, or all; gives the exit status."""
    stacks = load_stacks()
    for name in names or stacks:
        if name not in stacks:
            raise UserError(f"unknown stack '{name}': {', '.join(stacks)}")
        subprocess.run(compile_command(stacks[name]), cwd=REPOSITORY, check=True)
        for path, text in container_files(stacks[name]).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        print(f"locked {name}: {len(stacks[name].pins())} packages")
    return 0


def compile_command(stack: Stack) -> list[str]:
    """uv's command. Pure."""
    wheels_only = [
        "--only-binary",
        ":all:",
        *(word for name in stack.from_source for word in ("--no-binary", name)),
    ]
    return [
        *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--upgrade"),
        *("--python-version", stack.python),
        *("--python-platform", f"x86_64-manylinux_{stack.glibc.replace('.', '_')}"),
        *wheels_only,
        *("--custom-compile-command", "make lock"),
        *("--output-file", str(stack.lock.relative_to(REPOSITORY))),
        "pyproject.toml",
        str(stack.wanted.relative_to(REPOSITORY)),
    ]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
