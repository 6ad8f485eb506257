"""Where a box and Slurm's packages lie on disk, and the locks beside them. File system only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import filelock
import platformdirs

from launcher.spec import UserError

_PLAIN = re.compile(r"[A-Za-z0-9_./@+-]+")
"""slurm.conf splits values at blanks, commas and `=`, and expands `%`: its paths have none of them."""

_LONGEST_STATE_DIR = 72
"""slurmstepd listens on <state>/spool/n128/n128_<job>.4294967291; a Unix socket's path ends at 107 bytes."""

_WAY_OUT = "set CACHE_DIR to a folder of your own, with a short path"

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,29}")


class BoxUnavailable(UserError):
    """This machine cannot run a box, or not this one: one line that says why."""


def check_name(name: str) -> str:
    """Return a box's name unchanged. Raises UserError for one that is no safe folder and cluster name."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"box name {name!r}: use at most 30 of a-z, 0-9 and '-', such as 'default' or 'test-2'"
        )
    return name


def root() -> Path:
    """Folder of everything that boxes keep: $CACHE_DIR, or the user's cache folder.

    Where that path holds a blank or another character that slurm.conf cannot carry, a folder under /tmp.
    """
    cache = Path(os.environ.get("CACHE_DIR") or platformdirs.user_cache_dir("distributed-recipes")).absolute()
    return cache if _PLAIN.fullmatch(str(cache)) else _short_root(cache)


def packages_root() -> Path:
    """Folder of Slurm's unpacked packages, shared by all boxes."""
    return root() / "slurm"


def state_dir(name: str) -> Path:
    """Folder of one box: configuration, logs, spool, sockets. Removed by `down`."""
    folder = root() / "boxes" / name
    if len(os.fsencode(folder)) <= _LONGEST_STATE_DIR:
        return folder
    return _short_root(root()) / "boxes" / name


def names() -> list[str]:
    """Names of all boxes that left a folder, running or not."""
    folders = {state_dir("a").parent, state_dir("a" * 30).parent}
    return sorted(
        path.name for folder in folders if is_folder(folder) for path in folder.iterdir() if path.is_dir()
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the kernel lets go of it when the process dies.

    Raises BoxUnavailable if the file cannot be made.
    """
    private_folder(path.parent)
    with filelock.FileLock(path):
        yield


def is_folder(path: Path) -> bool:
    """Whether there is a folder that this user may know of."""
    try:
        return path.is_dir()
    except PermissionError:
        return False


def private_folder(path: Path) -> Path:
    """Make a folder and its parents. Raises BoxUnavailable, with a way out, if this user cannot use it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BoxUnavailable(f"cannot make {path}: {error.strerror}; {_WAY_OUT}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise BoxUnavailable(f"you may not write in {path}; {_WAY_OUT}")
    return path


def _short_root(instead_of: Path) -> Path:
    """Path of a short, plain folder for this user and that cache folder. Makes nothing.

    Always under /tmp, never $TMPDIR: a login shell and a job must agree on it. Raises BoxUnavailable if
    somebody else owns it already: the owner of the folder decides what this user's Slurm runs.
    """
    digest = hashlib.sha256(os.fsencode(instead_of)).hexdigest()[:8]
    folder = Path("/tmp") / f"recipes-{os.getuid()}-{digest}"
    with contextlib.suppress(FileNotFoundError):
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            raise BoxUnavailable(f"{folder} is not yours; {_WAY_OUT}")
    return folder
