"""Start, find and end the processes of a box. Subprocesses and the process table."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.box.config import JOB_MARKER
from launcher.box.packages import Packages

_START_TIMEOUT_SECONDS = 60
_KILL_TIMEOUT_SECONDS = 20


class DaemonFailed(Exception):
    """A daemon did not start or does not end; the message says why, in its own words where it left any."""


@dataclass(frozen=True)
class Daemon:
    """A program that puts itself in the background once it runs."""

    command: tuple[str, ...]
    log: Path


def start(
    daemons: Sequence[Daemon], packages: Packages, conf: Path, variables: Mapping[str, str] | None = None
) -> None:
    """Start daemons side by side, with further variables, and return when each has gone to the background.

    Raises DaemonFailed for the first that exited with an error or does not get there.
    """
    environment = {**daemon_environment(packages, conf), **(variables or {})}
    started = [_spawn(daemon, environment) for daemon in daemons]
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    for daemon, process in zip(daemons, started, strict=True):
        program = Path(daemon.command[0]).name
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as expired:
            raise DaemonFailed(f"{program} did not start in {_START_TIMEOUT_SECONDS} s") from expired
        if code != 0:
            raise DaemonFailed(f"{program}: {last_line(daemon.log) or f'exit code {code}'}")


def daemon_environment(packages: Packages, conf: Path) -> dict[str, str]:
    """What a daemon sees: nothing of the caller's shell, which may itself be a job of another Slurm.

    SLURM_CONF also marks the process, and slurmstepd after it, as the box's. Jobs do not inherit
    LD_LIBRARY_PATH: slurmstepd gives them the environment of their submission.
    """
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "SLURM_CONF": str(conf),
        "LD_LIBRARY_PATH": packages.library_path,
    }


def last_line(log: Path) -> str:
    """The last fatal error in a log file, or its last line, without Slurm's time stamp."""
    if not log.exists():
        return ""
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    # Only fatal ones: Slurm also logs as errors what it did not find at a first start.
    telling = [line for line in lines if "fatal:" in line] or lines
    return telling[-1].split("] ", 1)[-1].strip() if telling else ""


def of_box(conf: Path, packages_root: Path) -> list[psutil.Process]:
    """Everything that runs in or for the box, with all descendants; never this process.

    A shell in which somebody set SLURM_CONF to use the box is not part of it: daemons and commands are known
    by SLURM_CONF and their program, jobs by a variable that only jobs have.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ended, or is another user's
            if _belongs(process, conf, packages_root):
                found |= {process, *process.children(recursive=True)}
    return [process for process in found if process.pid != os.getpid() and _is_alive(process)]


def _belongs(process: psutil.Process, conf: Path, packages_root: Path) -> bool:
    environment = _environment(process)
    if f"{JOB_MARKER}={conf}" in environment:
        return True
    if f"SLURM_CONF={conf}" not in environment:
        return False
    # The commands' wrappers start them through the dynamic linker: the program is then an argument.
    return any(Path(word).is_relative_to(packages_root) for word in (process.exe(), *process.cmdline()))


def _environment(process: psutil.Process) -> list[str]:
    """The process's NAME=value words. psutil's own stop at the first gap, and slurmstepd leaves one at the beginning:
    its title ("slurmstepd: [1.batch]") is written over them.
    """
    try:
        found = Path(f"/proc/{process.pid}/environ").read_bytes()
    except PermissionError:
        raise psutil.AccessDenied(process.pid) from None
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(process.pid) from None
    return [os.fsdecode(word) for word in found.split(b"\0") if word]


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def kill_all(conf: Path, packages_root: Path) -> None:
    """Kill every process of the box and return when none is left.

    Looks again after each round, since a daemon may have started a process in between. Raises DaemonFailed if
    some survive (a process that waits for a dead network file system, say).
    """
    deadline = time.monotonic() + _KILL_TIMEOUT_SECONDS
    while alive := of_box(conf, packages_root):
        if time.monotonic() > deadline:
            raise DaemonFailed(f"processes {sorted(process.pid for process in alive)} do not end")
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)


def ask(command: Sequence[str | Path], timeout: float = 10.0) -> str | None:
    """Standard output of one of the box's commands; None if it failed or took over `timeout` seconds."""
    words = [str(word) for word in command]
    try:
        result = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _spawn(daemon: Daemon, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with daemon.log.open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            daemon.command,
            env=environment,
            cwd=daemon.log.parent,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
