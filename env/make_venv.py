#!/usr/bin/env python3
"""Makes .venv at the repository root: torch, the locked packages, this project. `make setup` calls it.

Safe to run again: it returns at once when nothing that decides the environment has changed. Two settings:

    TORCH=cpu|cuda   which build of torch; unset: the one already installed, else CUDA where a driver is found
    PYTHON=…         the interpreter that runs this file (make setup PYTHON=python3.12)

Prints one line per stage; what pip says goes to .venv/setup.log. Needs nothing but the standard library, and
every Python since 3.8 runs it far enough to find a newer one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
STAMP = VENV / ".setup-stamp"
LOCKED = Path("env/requirements/dev.txt")
TORCH = Path("env/requirements/torch.txt")
DEEPSPEED = Path("env/requirements/deepspeed.txt")
INPUTS = (Path("pyproject.toml"), Path("env/make_venv.py"), LOCKED, TORCH, DEEPSPEED)
"""Everything that decides what .venv holds; a change in one of them makes the next call work again."""

MEGATRON = "megatron-core==0.16.1"
"""What the tests of chapter 5 run: the newest that takes Python 3.11. Its own environment has a later one."""

OLDEST = (3, 11)
NEWER = ("python3.13", "python3.12", "python3.11")
"""Where the default interpreter is too old, these are tried, in this order."""

MEDDLING = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "VIRTUAL_ENV")
"""Settings of the person's own shell that install into the wrong place, or hide what .venv lacks."""


class SetupError(Exception):
    """One line that says what failed and what to do."""


def main() -> int:
    os.chdir(ROOT)
    try:
        use_new_enough_python()
        make_environment(wanted=os.environ.get("TORCH", ""))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


def use_new_enough_python() -> None:
    """Start again under a newer interpreter where this one is too old."""
    if sys.version_info >= OLDEST:
        return
    for name in NEWER:
        if runs([name, "-c", ""]):  # a name on PATH can be a version manager's stand-in for nothing
            os.execvp(name, [name, *sys.argv])
    raise SetupError(
        f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed; {sys.executable} is {sys.version.split()[0]}: "
        "install one, or name one with make setup PYTHON=/path/to/python"
    )


def make_environment(wanted: str) -> None:
    """Bring .venv up to date. `wanted` is the build of torch: cpu, cuda, or empty. Raises SetupError."""
    if wanted not in ("", "cpu", "cuda"):
        raise SetupError(f"TORCH={wanted} is not known: it is cpu or cuda")
    if VENV.is_symlink():
        # A copy of the tree that borrows another one's environment must not change it.
        if read(STAMP) != fingerprint():
            raise SetupError(f".venv links to {VENV.resolve()}, set up for another tree: make setup there")
        return say("done", f"{VENV.resolve()} is up to date")

    started = time.monotonic()
    VENV.mkdir(exist_ok=True)
    with (VENV / ".setup-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two calls at once would install over each other
        if not made_here():
            STAMP.unlink(missing_ok=True)
            new_venv()
        if read(STAMP) == fingerprint() and wanted in ("", build_of(installed_torch())):
            return say("done", ".venv is up to date")
        STAMP.unlink(missing_ok=True)
        LOG.write_text("")
        say("python", f"{sys.version.split()[0]} in .venv; details in .venv/setup.log")
        install_torch(wanted)
        install_locked()
        install_deepspeed()
        install_project()
        install_megatron()
        STAMP.write_text(fingerprint())
    return say("done", f"in {time.monotonic() - started:.0f} s")


# --- the virtual environment --------------------------------------------------------------------------------


def made_here() -> bool:
    """Whether .venv works and was made at this path: its scripts carry the path, so none can move."""
    made_by = [line for line in read(VENV / "pyvenv.cfg").splitlines() if line.startswith("command = ")]
    return bool(made_by) and made_by[0].endswith(f" -m venv {VENV}") and runs([PYTHON, "-c", ""])


def new_venv() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not runs([sys.executable, "-c", "import ensurepip, venv"]):
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: on Debian and Ubuntu, "
            f"sudo apt-get install python{version}-venv"
        )
    for part in ("bin", "include", "lib", "lib64", "share"):  # .setup-lock stays: this call holds it
        path = VENV / part
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    if not logged([sys.executable, "-m", "venv", VENV]):
        raise SetupError(f"python -m venv failed: {last_complaint()}")


def fingerprint() -> str:
    return hashlib.sha256(b"\0".join((ROOT / path).read_bytes() for path in INPUTS)).hexdigest()


# --- torch --------------------------------------------------------------------------------------------------


def install_torch(wanted: str) -> None:
    """torch comes first and alone: which build it is decides what everything after it gets."""
    pinned = next(line for line in (ROOT / TORCH).read_text().splitlines() if line.startswith("torch=="))
    present = installed_torch()
    # What is installed stays unless told otherwise: a login node without a driver must not undo a GPU node's.
    build = wanted or build_of(present) or ("cuda" if has_driver() else "cpu")
    if present and present.split("+")[0] == pinned.split("==")[1] and build_of(present) == build:
        say("torch", f"{present}, already there")
        return
    if present:
        logged(pip("uninstall", "--yes", "torch"))
    if build == "cpu":
        say("torch", f"{pinned}, CPU build (make setup TORCH=cuda takes the CUDA build) ...")
        way = install_cpu_build(pinned)
    else:
        say("torch", f"{pinned}, CUDA build, several GB (make setup TORCH=cpu takes the CPU build) ...")
        way = install_cuda_build(pinned)
    say("torch", f"{installed_torch()} by {way}")


def install_cpu_build(pinned: str) -> str:
    """Install the build without CUDA libraries, 0.2 GB instead of several. Returns what did it.

    Only a pip that is configured for it (a folder of wheels, a mirror) knows the CPU build, as 2.13.0+cpu.
    uv knows by itself where CPU builds are published: it is the second way, and no address stands here.
    """
    if logged(pip("install", "--constraint", LOCKED, f"{pinned}+cpu")):
        return "pip"
    pip_said = last_complaint()
    say("torch", f"this pip has no {pinned}+cpu; asking uv for it ...")
    uv_install = module("uv", "pip", "install", "--python", PYTHON, "--torch-backend", "cpu")
    if logged(pip("install", "--constraint", LOCKED, "uv")) and logged([*uv_install, "-c", LOCKED, pinned]):
        return "uv"
    raise SetupError(f"no CPU build of {pinned}: pip: {pip_said}; uv: {last_complaint()}; see {LOG}")


def install_cuda_build(pinned: str) -> str:
    if not logged(pip("install", "--constraint", LOCKED, pinned)):
        raise SetupError(f"no CUDA build of {pinned}: pip: {last_complaint()}; see {LOG}")
    if build_of(installed_torch()) != "cuda":
        # A pip configured with a folder of CPU builds prefers those; on a GPU that must not pass in silence.
        raise SetupError(f"for the CUDA build this pip gives torch {installed_torch()}: see pip config list")
    return "pip"


def installed_torch() -> str:
    """The version of torch in .venv; empty without one. Reads its metadata: importing torch takes seconds."""
    code = "import importlib.metadata as m; print(*(d.version for d in m.distributions(name='torch')))"
    return subprocess.check_output([PYTHON, "-I", "-c", code], text=True).strip()


def build_of(version: str) -> str:
    """`cpu` or `cuda`; empty for no version."""
    return "" if not version else "cpu" if version.endswith("+cpu") else "cuda"


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


# --- everything else ----------------------------------------------------------------------------------------


def install_locked() -> None:
    # torch is a constraint here: no package may replace the build that was just chosen.
    if not logged(pip("install", "--constraint", TORCH, "--requirement", LOCKED)):
        raise SetupError(f"pip could not install {LOCKED}: {last_complaint()}; see {LOG}")
    say("packages", f"{(ROOT / LOCKED).read_text().count('==')} as locked in {LOCKED}")


def install_deepspeed() -> None:
    """What chapter 5 runs on, for the tests: the version of its own locked environment, over this torch.

    Alone, because it asks for a torch; what else it needs is in LOCKED. There is no wheel of it. It is Python as
    long as no operator is built ahead, and looks for a CUDA compiler unless it is told that this is a CPU.
    """
    pinned = next(
        line for line in (ROOT / DEEPSPEED).read_text().splitlines() if line.startswith("deepspeed==")
    )
    told = {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    if not logged(pip("install", "--no-deps", "--no-build-isolation", pinned), told):
        raise SetupError(f"pip could not install {pinned}: {last_complaint()}; see {LOG}")
    say(
        "deepspeed",
        f"{pinned.split('==')[1]}, as locked in {DEEPSPEED}; its operators are compiled at first use",
    )


def install_project() -> None:
    # Without build isolation: setuptools is locked and installed already, so nothing more is downloaded.
    if not logged(pip("install", "--no-deps", "--no-build-isolation", "--editable", ".")):
        raise SetupError(f"pip could not install this project: {last_complaint()}; see {LOG}")
    say("project", "editable: python -m launcher works from any folder")


def install_megatron() -> None:
    # Without what it asks for: a torch, which was chosen above, and packages that are locked.
    if not logged(pip("install", "--no-deps", MEGATRON)):
        raise SetupError(f"pip could not install {MEGATRON}: {last_complaint()}; see {LOG}")
    say("megatron", f"{MEGATRON}, for the tests of chapter 5")


# --- running and telling ------------------------------------------------------------------------------------


def module(name: str, *words: str | Path) -> list[str | Path]:
    return [PYTHON, "-m", name, *words]


def pip(*words: str | Path) -> list[str | Path]:
    return module("pip", *words)


def logged(command: Sequence[str | Path], told: Mapping[str, str] = MappingProxyType({})) -> bool:
    """Run a command with its output in the log, and with the variables `told`. Returns whether it succeeded."""
    environment = {name: value for name, value in os.environ.items() if name not in MEDDLING}
    environment.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", **told)
    with LOG.open("a") as log:
        print("\n$", *command, file=log, flush=True)
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False
        )
    return ended.returncode == 0


def runs(command: Sequence[str | Path]) -> bool:
    """Whether a command ends well; False too for an interpreter that is not there or has lost its home."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def last_complaint() -> str:
    """What the last command in the log complained about last, as one line."""
    lines = [line.strip() for line in read(LOG).rsplit("\n$ ", 1)[-1].splitlines()[1:] if line.strip()]
    complaints = [line for line in lines if re.match(r"(error|fatal|cause)\b", line, re.IGNORECASE)]
    return (complaints or lines or ["no message"])[-1]


def read(path: Path) -> str:
    """The text of a file; empty where there is none."""
    return path.read_text() if path.is_file() else ""


def say(stage: str, what: str) -> None:
    print(f"setup: {stage:<9}{what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
