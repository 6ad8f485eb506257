"""Which code and which packages a run used. Subprocess (git) and file system."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

GIT_SECONDS = 30.0


def record_code(repository: Path, run_dir: Path) -> dict[str, Any]:
    """Write code.json, and code.diff where tracked files differ from the commit. Returns code.json's content.

    A checkout without git gives {"commit": null, "why": …}: known not to be known.
    """
    commit = _git(repository, "rev-parse", "HEAD")
    if isinstance(commit, subprocess.CompletedProcess):
        about: dict[str, Any] = {"commit": None, "why": _why(commit)}
    else:
        status = _text(_git(repository, "status", "--porcelain"))
        changed = [line for line in status.splitlines() if not line.startswith("??")]
        untracked = [line[3:] for line in status.splitlines() if line.startswith("??")]
        about = {"commit": commit.strip(), "dirty": bool(changed), "untracked": untracked}
        if changed:
            (run_dir / "code.diff").write_text(_text(_git(repository, "diff", "HEAD", "--binary")))
    (run_dir / "code.json").write_text(json.dumps(about) + "\n")
    return about


def _git(repository: Path, *arguments: str) -> str | subprocess.CompletedProcess[str]:
    """git's output, or the failed process. The repository counts only if it is its own work tree's root, so that a
    copy unpacked inside some other checkout does not report that one's commit."""
    command = ["git", "-c", f"safe.directory={repository}", "-C", str(repository), *arguments]
    environment = {"GIT_CEILING_DIRECTORIES": str(repository.parent), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["env", *(f"{name}={value}" for name, value in environment.items()), *command],
            capture_output=True, text=True, errors="replace", timeout=GIT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"git gave no answer within {GIT_SECONDS:.0f} s")
    return done.stdout if done.returncode == 0 else done


def _why(failed: subprocess.CompletedProcess[str]) -> str:
    lines = failed.stderr.strip().splitlines()
    return lines[-1] if lines else f"git ended with status {failed.returncode}"


def _text(answer: str | subprocess.CompletedProcess[str]) -> str:
    return answer if isinstance(answer, str) else f"(not known: {_why(answer)})"


def record_packages(path: Path) -> None:
    """Write name==version of every installed distribution of this interpreter, sorted, one a line."""
    import importlib.metadata

    found = {
        (item.metadata["Name"] or "?").lower(): item.version for item in importlib.metadata.distributions()
    }
    lines = [f"# Python {platform.python_version()}", *(f"{name}=={found[name]}" for name in sorted(found))]
    path.write_text("\n".join(lines) + "\n")


def version_of(package: str) -> str | None:
    """The installed version of a package without importing it, None where it is not installed."""
    import importlib.metadata  # e-mail parsing and more: every submission would pay for it

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def recorded(run_dir: Path) -> str:
    """The commit in a run's code.json, with a + where the tree was changed; "" where it is not known."""
    try:
        about = json.loads((run_dir / "code.json").read_text())
    except FileNotFoundError:
        return ""
    return f"{about['commit']}{'+' if about.get('dirty') else ''}" if about.get("commit") else ""
