"""A copy of the working tree in which commands of the documentation run as a reader would run them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.docs.blocks import Command

INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "USER", "LOGNAME", "TMPDIR", "SSL_CERT_FILE", "OMP_NUM_THREADS")
"""The rest of the environment stays outside: a reader has no pytest, make or Slurm job around the shell."""

TAIL_LINES = 40


@dataclass(frozen=True)
class Failure:
    """The command that failed, and what it printed last."""

    command: Command
    how: str
    tail: str

    def __str__(self) -> str:
        return f"line {self.command.line}: {self.command.text}\n{self.how}; its last lines:\n{self.tail}"


@dataclass(frozen=True)
class Sandbox:
    """A tree of files and the environment of a shell that stands in it."""

    tree: Path
    environment: dict[str, str]
    scratch: Path
    """Where scripts and their output go."""

    def run(self, commands: Sequence[Command], seconds_each: float) -> Failure | None:
        """Run commands one after another in one bash, so that `cd` and variables carry over.

        Stops at the first that fails or takes longer than `seconds_each`, and returns it; None: all is well.
        """
        begun, output, script = (self.scratch / name for name in ("begun", "output", "script.sh"))
        begun.write_text("")
        # Files, not pipes: a daemon that a command leaves behind would hold a pipe open for ever.
        # An explicit test in place of `set -e`, which does not see `false && true`.
        lines = ["set -o pipefail"]
        for number, command in enumerate(commands):
            lines += [
                f"echo {number} >>'{begun}'",
                command.text,
                'status=$?; ((status == 0)) || exit "$status"',
            ]
        script.write_text("\n".join(lines) + "\n")
        with output.open("w") as sink:
            shell = subprocess.Popen(
                ["bash", str(script)], cwd=self.tree, env=self.environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
            )  # fmt: skip
        number, since = -1, time.monotonic()
        try:
            while shell.poll() is None:
                last = len(begun.read_text().split()) - 1
                if last != number:
                    number, since = last, time.monotonic()
                if time.monotonic() - since > seconds_each:
                    return Failure(
                        commands[max(0, number)], f"still running after {seconds_each:.0f} s", _tail(output)
                    )
                time.sleep(0.05)
        finally:
            _end(shell)
        if shell.returncode == 0:
            return None
        number = max(0, len(begun.read_text().split()) - 1)
        return Failure(commands[number], f"exit status {shell.returncode}", _tail(output))


def make_sandbox(repository: Path, folder: Path, home: Path) -> Sandbox:
    """Copy a working tree (tracked and new files, nothing ignored) into `folder`, under a name with spaces.

    `home` is the reader's home, and holds what runs keep in the user's cache; several sandboxes may share it.
    """
    tree = folder / "a reader's copy"
    tree.mkdir(parents=True)
    for name in files_of(repository):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / name, target, follow_symlinks=False)
    (tree / ".venv").symlink_to(repository / ".venv")
    home.mkdir(exist_ok=True)
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environment |= {
        "HOME": str(home),
        "CACHE_DIR": str(home / "cache"),
        "PATH": f"{tree / '.venv' / 'bin'}:{os.environ['PATH']}",
        # The installed `launcher` script belongs to the original tree; this makes it import the copy.
        "PYTHONPATH": str(tree),
        # Half a minute less for each `make lint`: what mypy knows of the packages holds for the copy too.
        "MYPY_CACHE_DIR": str(repository / ".mypy_cache"),
        "GIT_AUTHOR_NAME": "reader", "GIT_AUTHOR_EMAIL": "reader@example.invalid",
        "GIT_COMMITTER_NAME": "reader", "GIT_COMMITTER_EMAIL": "reader@example.invalid",
    }  # fmt: skip
    sandbox = Sandbox(tree, environment, folder)
    setting_up = [
        Command(0, line)
        for line in (
            "git init --quiet",
            "echo /.venv >>.git/info/exclude",
            "git add --all",
            "git commit --quiet --message 'the tree as it is'",
        )
    ]
    failure = sandbox.run(setting_up, seconds_each=60)
    if failure:
        raise RuntimeError(str(failure))
    return sandbox


def files_of(repository: Path) -> list[str]:
    """Tracked files, and new ones that git does not ignore, as paths from the repository."""
    listing = ["git", "-C", str(repository), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing, text=True).split("\0")
    return sorted({name for name in names if name and (repository / name).is_file()})


def _tail(output: Path) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-TAIL_LINES:]) or "(nothing)"


def _end(shell: subprocess.Popen[bytes]) -> None:
    """End the shell and what it started, except for what made a session of its own, as daemons do."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(shell.pid, kind)
        except ProcessLookupError:
            break
        try:
            shell.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
