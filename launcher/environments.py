"""Makes a stack's environment: a virtual environment with exactly the packages of the lock. File system, uv.

Safe to repeat: it returns at once where the lock has not changed, and goes on where an earlier call was cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.container_files import CONTAINERS
from launcher.spec import UserError
from launcher.stacks import Stack

STAMP = ".made-from"
LOG = "install.log"
MEDDLING = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")
"""Settings of the person's own shell that would install into another place."""


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def make_environment(stack: Stack, folder: Path, say: Callable[[str, str], None]) -> None:
    """Bring the environment in `folder` up to the lock. `say` gets a stage and what happens in it.

    Raises UserError, one line, where this machine cannot run the stack or uv cannot install it.
    """
    check_machine(stack, platform.machine(), platform.libc_ver()[1])
    if importlib.util.find_spec("uv") is None:
        raise UserError("uv is not installed here, and it is what installs a lock: make setup brings it")
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
            raise UserError(
                f"{folder} holds something else than an environment: choose another with into=FOLDER"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made: {error.strerror}: choose another with into=FOLDER"
        ) from None
    started = time.monotonic()
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two calls at once would install over each other
        stamp = folder / STAMP
        if stamp.is_file() and stamp.read_text() == fingerprint(stack) and python_of(folder).exists():
            return say("done", f"{folder} is up to date")
        stamp.unlink(missing_ok=True)
        say("python", f"{stack.python} in {folder}")
        _uv(
            folder,
            f"no Python {stack.python} (install it and put it on PATH: uv finds none and cannot fetch one)",
            "venv",
            "--allow-existing",
            "--python",
            stack.python,
            str(folder),
        )
        say(
            "packages",
            f"{len(stack.pins())} as locked in {stack.lock.name}; several GB where torch is among them ...",
        )
        _uv(
            folder,
            f"{stack.lock.name} could not be installed",
            "pip",
            "sync",
            "--python",
            str(python_of(folder)),
            str(stack.lock),
        )
        _add_project(stack, folder)
        stamp.write_text(fingerprint(stack))
    return say("done", f"in {time.monotonic() - started:.0f} s")


def check_machine(stack: Stack, machine: str, glibc: str) -> None:
    """Refuse a machine on which no package of the lock would run. Pure. Raises UserError."""
    container = f"{CONTAINERS}/{stack.name}.def has it as an image"
    if machine != "x86_64":
        raise UserError(f"{stack.name} is locked for x86_64, and this machine is {machine}")
    if glibc and _numbers(glibc) < _numbers(stack.glibc):
        raise UserError(f"{stack.name} wants glibc {stack.glibc} or newer, and here is {glibc}: {container}")


def fingerprint(stack: Stack) -> str:
    """Of everything that decides what the environment holds."""
    return hashlib.sha256(f"{stack.python}\n{stack.lock.read_text()}".encode()).hexdigest()


def _add_project(stack: Stack, folder: Path) -> None:
    """This project, as an editable installation has it: one entry of the path, and nothing to build."""
    (packages,) = (folder / "lib").glob("python3*/site-packages")
    (packages / "distributed_recipes.pth").write_text(f"{stack.repository}\n")


def _uv(folder: Path, failed: str, *words: str) -> None:
    """Run uv with its output in the log. Raises UserError with its last complaint."""
    command: Sequence[str] = [sys.executable, "-m", "uv", *words]
    environment = {name: value for name, value in os.environ.items() if name not in MEDDLING}
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
    )
    with (folder / LOG).open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n{ended.stdout}{ended.stderr}")
    if ended.returncode:
        said = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
        worst = [line for line in said if line.lower().startswith(("error", "cause", "× ", "╰"))] or said
        raise UserError(f"{failed}: {worst[-1] if worst else 'uv says nothing'}; see {folder / LOG}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
