"""Slurm from the distribution's packages, unpacked into a cache folder, never installed. Network."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.box import paths
from launcher.box.paths import BoxUnavailable

SLURM = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libmunge2", "munge")
ACCOUNTING = ("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server-core")

_TREE_VERSION = "2"
"""Counted up when this module comes to unpack differently, so that no older tree is taken for a new one."""

_APT_TIMEOUT_SECONDS = 300

Say = Callable[[str], None]


@dataclass(frozen=True)
class Packages:
    """A folder with the file tree of the unpacked packages."""

    root: Path

    @property
    def plugin_dir(self) -> Path:
        """Slurm's plugins and its private libslurmfull.so."""
        return self._one("usr/lib/*/slurm-wlm", "usr/lib/*/slurm", "usr/lib/slurm*")

    @property
    def library_dirs(self) -> tuple[Path, ...]:
        """Folders of the shared libraries that the packages' programs need and the host lacks."""
        plain = {library.parent for library in self.root.glob("usr/lib/*/*.so*")}
        plain |= {library.parent for library in self.root.glob("lib/*/*.so*")}
        return (*sorted(plain - {self.plugin_dir}), self.plugin_dir)

    @property
    def library_path(self) -> str:
        """`library_dirs` as LD_LIBRARY_PATH and the dynamic linker's --library-path take it."""
        return ":".join(map(str, self.library_dirs))

    @property
    def loader(self) -> str:
        """Path of the host's dynamic linker, as the packages' programs name it."""
        named = re.search(rb"/lib[^\0]*/ld-[^\0]+", self.program("sinfo").read_bytes()[:4096])
        if named is None:
            raise BoxUnavailable(f"{self.program('sinfo')} names no dynamic linker")
        return named.group().decode()

    def program(self, name: str) -> Path:
        """A program by its usual name. Raises BoxUnavailable if the packages hold none."""
        return self._one(f"usr/sbin/{name}", f"usr/bin/{name}")

    def clients(self) -> tuple[Path, ...]:
        """Slurm's user commands: sbatch, srun, squeue, …"""
        found = sorted(self.root.glob("usr/bin/s*"))
        return tuple(path for path in found if not path.name.endswith("-wlm"))

    def _one(self, *patterns: str) -> Path:
        for pattern in patterns:
            if found := sorted(self.root.glob(pattern)):
                return found[0]
        raise BoxUnavailable(
            f"{patterns[0]} is not among the unpacked packages; delete {self.root} and try again"
        )


def fetch(wanted: Sequence[str] = SLURM, say: Say = lambda line: None) -> Packages:
    """Return the unpacked packages `wanted`, downloading them once per machine kind and cache folder.

    Safe to call from many processes at once: one downloads, the others wait for it. The folder appears by a
    rename at the very end, so that an interrupted download is never taken for a whole one.

    Raises BoxUnavailable if there is no apt-get or dpkg, or with apt's own last word if the download failed.
    """
    folder = paths.packages_root() / _key(wanted)
    if paths.is_folder(folder):
        return Packages(folder)
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise BoxUnavailable(
                f"a box needs {tool} to unpack Slurm: it runs on Debian and Ubuntu, not here"
            )
    with paths.locked(paths.packages_root() / f"{folder.name}.lock"):
        if not folder.is_dir():
            say("fetching Slurm's packages into the cache folder, once")
            scratch = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted download left; the lock is ours
            _download(wanted, scratch)
            (scratch / "tree").rename(folder)
            shutil.rmtree(scratch)
    return Packages(folder)


def _key(wanted: Sequence[str]) -> str:
    """Folder name that differs wherever the packages would: unlike machines may share a home folder."""
    system = platform.freedesktop_os_release()
    label = f"{system.get('ID', 'linux')}-{system.get('VERSION_ID', 'rolling')}-{platform.machine()}"
    digest = hashlib.sha256(" ".join((*wanted, _TREE_VERSION)).encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9.-]", "_", f"{label}-{digest}")


def _download(wanted: Sequence[str], scratch: Path) -> None:
    """Fill `scratch/tree` from the configured package archives, as any user, apart from apt's own state."""
    lists, cache, archives, tree = (scratch / part for part in ("lists", "cache", "archives", "tree"))
    for folder in (lists / "partial", cache / "archives/partial", archives, tree):
        folder.mkdir(parents=True)
    apt = (
        "apt-get", "-q",
        "-o", f"Dir::State::lists={lists}",
        "-o", f"Dir::Cache={cache}",
        # Root's apt would download as the user _apt, who may not read this folder.
        "-o", "APT::Sandbox::User=root",
        "-o", "Acquire::Languages=none",
        "-o", "Acquire::Retries=3",
        "-o", "Debug::NoLocking=1",
    )  # fmt: skip
    # A broken third-party archive fails an update that fetched all that counts here: the download decides.
    update = _run([*apt, "update"], cwd=archives)
    plan = _run([*apt, "install", "--simulate", "--no-install-recommends", *wanted], cwd=archives)
    _raise_unless_ok(plan, update)
    # The plan names what this host lacks. Of all that, only shared libraries are of use without installation.
    missing = re.findall(r"^Inst (lib\S+)", plan.stdout, flags=re.MULTILINE)
    fetched = _run([*apt, "download", *dict.fromkeys([*wanted, *missing])], cwd=archives)
    _raise_unless_ok(fetched, update)
    for archive in sorted(archives.glob("*.deb")):
        _raise_unless_ok(_run(["dpkg", "-x", str(archive), str(tree)], cwd=archives))
    _use_plain_names(tree)


def _use_plain_names(tree: Path) -> None:
    """Link slurmd to slurmd-wlm and so on, as Debian's installation does.

    The name matters: under another one than its own a Slurm daemon takes itself for a user command, and then
    overlooks Gres= in slurm.conf.
    """
    for folder in (tree / "usr/sbin", tree / "usr/bin"):
        for program in folder.glob("*-wlm"):
            plain = program.with_name(program.name.removesuffix("-wlm"))
            if not plain.exists():
                plain.symlink_to(program.name)


def _run(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_APT_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        raise BoxUnavailable(
            f"{command[0]} {command[-1]} took longer than {_APT_TIMEOUT_SECONDS} s"
        ) from expired


def _raise_unless_ok(*results: subprocess.CompletedProcess[str]) -> None:
    """Raise BoxUnavailable if the first command failed; the others are earlier ones that may say why."""
    if results[0].returncode == 0:
        return
    said = [
        line for result in reversed(results) for line in result.stderr.splitlines() if line.startswith("E: ")
    ]
    last = said[0] if said else (results[0].stderr.strip().splitlines() or ["no message"])[-1]
    raise BoxUnavailable(f"cannot fetch Slurm's packages: {last.removeprefix('E: ')}")
