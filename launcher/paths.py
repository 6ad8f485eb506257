"""The one place that decides paths: repository, run directories, caches. File system (looks, writes nothing).

Run directories are in `run_root` where the job names one; else in the folder LAUNCHER_RUNS; else in `runs/`
of the checkout where the user may write there; else in the user's state folder, as for a checkout that an
administrator keeps for everybody. The rule looks at permissions alone, before anything is written: it is no
retry after a failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs

from launcher.spec import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
"""The checkout that this launcher is part of."""

APPLICATION = "distributed-recipes"
"""Name of the project's folders below the user's cache and state folders."""


def run_root(
    chosen: str = "",
    *,
    repository: Path = REPOSITORY,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """Absolute folder that holds the run directories; it need not exist yet."""
    named = chosen or environment.get("LAUNCHER_RUNS", "")
    if named:
        return absolute(named, Path.cwd())
    if os.access(repository, os.W_OK) and _writable_if_there(repository / "runs"):
        return repository / "runs"
    return _of_user(platformdirs.user_state_dir, "LAUNCHER_RUNS") / "runs"


def known_run_roots(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Every folder in which this user's runs may be: the one of today's rule first, then the remembered ones."""
    file = _roots_file()
    remembered = [Path(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return list(dict.fromkeys([run_root(environment=environment), *remembered]))


def remember_run_root(root: Path) -> None:
    """Note a folder that a job named with run_root=, so that `status` finds its runs without being told.

    Raises OSError where the user's state folder cannot be written.
    """
    file = _roots_file()
    if root in known_run_roots():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(f"{root}\n")


def _roots_file() -> Path:
    return Path(platformdirs.user_state_dir(APPLICATION)) / "run_roots"


def cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Absolute folder for prepared corpora: CACHE_DIR, else the user's cache folder (HOME may be unset)."""
    named = environment.get("CACHE_DIR", "")
    if named:
        return absolute(named, Path.cwd())
    return _of_user(platformdirs.user_cache_dir, "CACHE_DIR")


def environments_root(*, repository: Path = REPOSITORY, environment: Mapping[str, str] = os.environ) -> Path:
    """Absolute folder of the stacks' environments: LAUNCHER_ENVIRONMENTS, else beside .venv, else the user's."""
    named = environment.get("LAUNCHER_ENVIRONMENTS", "")
    if named:
        return absolute(named, Path.cwd())
    if os.access(repository, os.W_OK):
        return repository / ".environments"
    return _of_user(platformdirs.user_state_dir, "LAUNCHER_ENVIRONMENTS") / "environments"


def absolute(path: str, start: Path) -> Path:
    """`path` with `~` expanded, relative to `start`; links stay as they are, `..` is taken out."""
    # Path.resolve() would follow links, Path.expanduser() raises where there is no home.
    return Path(os.path.abspath(start / os.path.expanduser(path)))


def _of_user(folder: Callable[[str], str], variable: str) -> Path:
    """A folder of the user's. Without a home platformdirs raises, older ones answer `~/…`."""
    try:
        path = Path(folder(APPLICATION))
    except RuntimeError:
        path = Path()
    if not path.is_absolute():
        raise UserError(f"HOME is not set and this user has no home; name a folder in {variable}")
    return path


def _writable_if_there(folder: Path) -> bool:
    return not folder.exists() or os.access(folder, os.W_OK)
