"""`make setup`: which torch it takes, when it works again, and what it says when it cannot.

pip, uv and venv are played by `Machine`, so that no test installs anything; the real set-up is what made the
environment that runs these tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = tuple(f"env/requirements/{name}.txt" for name in ("torch", "dev", "deepspeed"))
INPUTS = ("pyproject.toml", "env/make_venv.py", *LOCKS)


class Machine:
    """Answers the commands that make_venv.py runs, and remembers them as lines of words."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.commands: list[str] = []
        self.torch = ""
        """Version of torch in .venv; empty: none."""
        self.pip_knows = {"torch==2.13.0+cpu": "2.13.0+cpu", "torch==2.13.0": "2.13.0"}
        """What pip installs for a requirement of torch."""
        self.uv_knows = {"torch==2.13.0": "2.13.0+cpu"}
        self.has_ensurepip = True
        self.module = self._load()
        play = SimpleNamespace(run=self._run, check_output=self._check_output, DEVNULL=subprocess.DEVNULL)
        monkeypatch.setattr(self.module, "subprocess", play)
        monkeypatch.setattr(self.module, "has_driver", lambda: False)
        monkeypatch.delenv("TORCH", raising=False)
        monkeypatch.chdir(root)  # restored at the end: the script changes folder

    def setup(self) -> int:
        self.commands.clear()
        return int(self.module.main())

    @property
    def asked_for_torch(self) -> list[str]:
        """Who was asked for which torch, in order: `pip torch==2.13.0+cpu`."""
        installs = [line.split() for line in self.commands if " install " in line and "torch==" in line]
        return [f"{words[0]} {words[-1]}" for words in installs]

    def _load(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("make_venv_in_test", self.root / "env" / "make_venv.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _run(self, command: Sequence[str | Path], stdout: Any = None, **_: Any) -> SimpleNamespace:
        words = [str(word) for word in command]
        if words[1] == "-m":
            self.commands.append(" ".join(words[2:]))
        return SimpleNamespace(returncode=0 if self._succeeds(words, stdout) else 1)

    def _succeeds(self, words: list[str], log: Any) -> bool:
        wanted = words[-1]
        match words[1:]:
            case ["-m", "venv", path]:
                (Path(path) / "pyvenv.cfg").write_text(f"command = python -m venv {path}\n")
            case ["-m", "pip", "uninstall", *_]:
                self.torch = ""
            case ["-m", "pip" | "uv" as tool, *_] if wanted.startswith("torch=="):
                known = self.pip_knows if tool == "pip" else self.uv_knows
                if wanted not in known:
                    log.write(f"ERROR: {tool} has no {wanted}\nsome advice\n")
                    return False
                self.torch = known[wanted]
            case ["-c", "import ensurepip, venv"]:
                return self.has_ensurepip
        return True

    def _check_output(self, *_: Any, **__: Any) -> str:
        return self.torch + "\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    root = tmp_path / "with a space"
    for name in INPUTS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return Machine(root, monkeypatch)


def test_without_a_driver_the_cpu_build_comes_from_pip(machine: Machine) -> None:
    assert machine.setup() == 0
    assert machine.asked_for_torch == ["pip torch==2.13.0+cpu"]


def test_a_pip_without_the_cpu_build_is_followed_by_uv_and_said(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.pip_knows.clear()
    assert machine.setup() == 0
    assert machine.asked_for_torch == ["pip torch==2.13.0+cpu", "uv torch==2.13.0"]
    assert any("--torch-backend cpu" in line for line in machine.commands)
    assert "2.13.0+cpu by uv" in capsys.readouterr().out


def test_no_cpu_build_anywhere_is_one_line_with_what_both_said(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.pip_knows.clear()
    machine.uv_knows.clear()
    assert machine.setup() == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "pip: ERROR: pip has no torch==2.13.0+cpu; uv: ERROR: uv has no torch==2.13.0" in said[0]


def test_a_driver_asks_for_the_cuda_build(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.module, "has_driver", lambda: True)
    assert machine.setup() == 0
    assert machine.asked_for_torch == ["pip torch==2.13.0"]


def test_a_cpu_build_in_place_of_the_cuda_build_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH", "cuda")
    machine.pip_knows["torch==2.13.0"] = "2.13.0+cpu"  # a configured folder of wheels is preferred
    assert machine.setup() == 1
    assert "for the CUDA build this pip gives torch 2.13.0+cpu" in capsys.readouterr().err
    assert not (machine.root / ".venv" / ".setup-stamp").exists()


def test_a_node_without_a_driver_keeps_the_cuda_build_that_is_there(machine: Machine) -> None:
    machine.torch = "2.13.0"
    assert machine.setup() == 0
    assert machine.asked_for_torch == []


def test_the_other_build_replaces_the_one_that_is_there_when_asked_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.setup()
    monkeypatch.setenv("TORCH", "cuda")
    assert machine.setup() == 0
    assert machine.commands[0] == "pip uninstall --yes torch"
    assert machine.torch == "2.13.0"


def test_an_unknown_build_is_a_mistake(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH", "gpu")
    assert machine.setup() == 1
    assert capsys.readouterr().err == "setup: TORCH=gpu is not known: it is cpu or cuda\n"


def test_a_second_call_installs_nothing(machine: Machine) -> None:
    machine.setup()
    assert machine.setup() == 0
    assert machine.commands == []


@pytest.mark.parametrize("changed", INPUTS)
def test_a_change_of_what_decides_the_environment_installs_again(machine: Machine, changed: str) -> None:
    machine.setup()
    with (machine.root / changed).open("a") as file:
        file.write("# changed\n")
    machine.setup()
    assert any(line.endswith("--editable .") for line in machine.commands)


def test_an_interrupted_setup_is_taken_up_again(machine: Machine) -> None:
    machine.pip_knows.clear()
    machine.uv_knows.clear()
    machine.setup()
    machine.pip_knows["torch==2.13.0+cpu"] = "2.13.0+cpu"
    assert machine.setup() == 0
    assert machine.asked_for_torch == ["pip torch==2.13.0+cpu"]


def test_a_moved_tree_gets_a_new_environment(machine: Machine, tmp_path: Path) -> None:
    machine.setup()
    cfg = machine.root / ".venv" / "pyvenv.cfg"
    cfg.write_text(f"command = python -m venv {tmp_path / 'elsewhere' / '.venv'}\n")
    machine.setup()
    assert machine.commands[0] == f"venv {machine.root / '.venv'}"


def test_a_borrowed_environment_is_never_changed(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = tmp_path / "owner"
    owner.mkdir()
    (machine.root / ".venv").symlink_to(owner)
    assert machine.setup() == 1
    assert "make setup there" in capsys.readouterr().err
    assert machine.commands == []
    assert list(owner.iterdir()) == []


def test_a_python_without_venv_names_the_package_to_install(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.has_ensurepip = False
    assert machine.setup() == 1
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert f"sudo apt-get install {package}" in capsys.readouterr().err


def test_make_alone_lists_every_target_with_what_it_does() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = subprocess.check_output(["make", "--silent", "-C", str(ROOT)], text=True).splitlines()
    assert sorted(line.split()[1] for line in listed if len(line.split()) > 2) == sorted(phony[1].split())


def locked() -> dict[str, str]:
    """Name to version, as env/requirements/dev.txt locks them."""
    text = (ROOT / "env/requirements/dev.txt").read_text()
    lines = [line.split("==") for line in text.splitlines() if "==" in line]
    return {normal(name): version for name, version in lines}


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def names(requirements: Sequence[str]) -> set[str]:
    """The bare names of requirement lines such as `setuptools>=77.0.3 ; python_version < "3.13"`."""
    plain = [requirement.split(";")[0] for requirement in requirements if "extra ==" not in requirement]
    return {normal(name.split(">")[0].split("=")[0].split("<")[0].split("[")[0].strip()) for name in plain}


def test_this_environment_is_the_locked_one() -> None:
    here = {name: importlib.metadata.version(name) for name in locked()}
    assert here == locked()


def test_everything_that_pyproject_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"] + project["optional-dependencies"]["dev"]) <= set(locked())


def test_deepspeed_is_the_one_of_its_locked_environment(machine: Machine) -> None:
    """And comes without a torch of its own: pip would take the CUDA build."""
    machine.setup()
    (command,) = [line for line in machine.commands if "deepspeed==" in line]
    version = importlib.metadata.version("deepspeed")
    assert command == f"pip install --no-deps --no-build-isolation deepspeed=={version}"


def test_what_deepspeed_itself_needs_is_locked() -> None:
    needed = names(importlib.metadata.requires("deepspeed") or [])
    assert needed - {"torch"} <= set(locked())


def test_megatron_core_is_the_pinned_one_and_brings_no_torch(machine: Machine) -> None:
    machine.setup()
    (command,) = [line for line in machine.commands if "megatron-core" in line]
    assert command == f"pip install --no-deps megatron-core=={importlib.metadata.version('megatron-core')}"
    assert names(importlib.metadata.requires("megatron-core") or []) - {"torch"} <= set(locked())


def test_what_torch_itself_needs_is_locked() -> None:
    cuda_only = ("nvidia-", "cuda-", "triton")
    needed = names(importlib.metadata.requires("torch") or [])
    assert {name for name in needed if not name.startswith(cuda_only)} <= set(locked())
