"""The locks and the images of the stacks agree with each other, and with what the project itself asks for."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from launcher.container_files import CONTAINERS, base_image, container_files
from launcher.paths import REPOSITORY
from launcher.spec import UserError
from launcher.stacks import FOLDER, Stack, load_stacks

STACKS = load_stacks()
BUILT_FOR_TORCH_2_11 = {"vllm": ((0, 20, 2), (0, 22, 1)), "sglang": ((0, 5, 11), (0, 5, 14))}
"""Versions that pin torch 2.11.0 exactly: the oldest and the newest."""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_every_stack_is_there_with_reasons_lock_and_containers() -> None:
    assert list(STACKS) == ["train", "deepspeed", "megatron", "vllm", "sglang"]
    files = {path for stack in STACKS.values() for path in container_files(stack)}
    assert set((REPOSITORY / CONTAINERS).iterdir()) == files, "no file is left over"
    for stack in STACKS.values():
        comments = [line for line in stack.wanted.read_text().splitlines() if line.startswith("#")]
        assert comments, f"{stack.wanted.name} gives no reason"


@pytest.mark.parametrize("name", STACKS)
def test_the_containers_are_what_make_lock_writes(name: str) -> None:
    for path, text in container_files(STACKS[name]).items():
        assert path.read_text() == text, f"{path.name}: python env/lock_stacks.py {name} writes it"


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("kind", ["Dockerfile", "def"])
def test_a_container_names_the_pins_of_its_lock(name: str, kind: str) -> None:
    """Read as text, without the code that wrote it."""
    text = (REPOSITORY / CONTAINERS / f"{name}.{kind}").read_text()
    lock = (REPOSITORY / FOLDER / f"{name}.txt").read_text()
    commands = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert f"--requirement /tmp/{name}.txt" in commands
    assert f"{FOLDER}/{name}.txt /tmp/{name}.txt" in commands
    for label, package in (
        ("torch", "torch"),
        ("cuda-toolkit", "cuda-toolkit"),
        ("nccl", "nvidia-nccl-cu13"),
    ):
        (version,) = re.findall(rf"^{package}==(\S+)$", lock, re.MULTILINE)
        assert re.search(rf'^\W*(?:LABEL )?{label}[= ]"?{re.escape(version)}"?', commands, re.MULTILINE), (
            label
        )
    (image_cuda,) = re.findall(
        r"(?:FROM|From:) nvidia/cuda:(\d+\.\d+)\.\d+-(?:base|devel)-ubuntu24\.04", commands
    )
    (lock_cuda,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)", lock, re.MULTILINE)
    assert image_cuda == lock_cuda
    assert "libibverbs1" in commands, "NCCL would fall back to sockets"
    assert not re.findall(r"pip install (?!--no-cache-dir --no-deps --requirement)", commands), (
        "only the lock"
    )


@pytest.mark.parametrize("name", STACKS)
def test_a_lock_satisfies_the_project_and_what_was_asked_for(name: str) -> None:
    pins = {key.lower().replace("_", "-"): version for key, version in STACKS[name].pins().items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) - pins.keys() == set(), "the recipes run in it, too"
    wanted = [line for line in STACKS[name].wanted.read_text().splitlines() if line and line[0] not in "#-"]
    assert wanted
    for line in wanted:
        package, _, version = line.partition("==")
        assert pins.get(package, "missing") == (version or pins.get(package)), line


def test_stacks_that_train_have_the_project_s_torch_and_those_that_serve_the_one_they_pin() -> None:
    pinned = re.findall(r"^torch==(\S+)$", (REPOSITORY / FOLDER / "torch.txt").read_text(), re.MULTILINE)
    for name, stack in STACKS.items():
        if name in BUILT_FOR_TORCH_2_11:
            oldest, newest = BUILT_FOR_TORCH_2_11[name]
            assert oldest <= numbers(stack.pins()[name]) <= newest
            assert stack.pins()["torch"] == "2.11.0"
        else:
            assert [stack.pins()["torch"]] == pinned


def test_a_cuda_without_an_image_is_said(tmp_path: Path) -> None:
    train = STACKS["train"]
    (tmp_path / FOLDER).mkdir(parents=True)
    lock = re.sub(r"cuda-toolkit==\S+", "cuda-toolkit==14.1.0", train.lock.read_text())
    (tmp_path / FOLDER / "train.txt").write_text(lock)
    elsewhere = Stack(**{**vars(train), "repository": tmp_path})
    with pytest.raises(UserError, match=r"train\.txt locks CUDA 14\.1: add its image"):
        base_image(elsewhere)


@pytest.mark.parametrize("name", STACKS)
def test_the_shell_of_an_image_has_no_mistake(name: str) -> None:
    shellcheck = shutil.which("shellcheck") or str(REPOSITORY / ".venv" / "bin" / "shellcheck")
    definition = (REPOSITORY / CONTAINERS / f"{name}.def").read_text()
    (post,) = re.findall(r"%post\n(.*?)\n\n%", definition, re.DOTALL)
    docker = (REPOSITORY / CONTAINERS / f"{name}.Dockerfile").read_text()
    runs = re.findall(r"^RUN (.*?[^\\])$", docker, re.DOTALL | re.MULTILINE)
    assert len(runs) == 2
    for shell, script in (("sh", post), *(("bash", run) for run in runs)):
        checked = subprocess.run(
            [shellcheck, f"--shell={shell}", "-"],
            input=script + "\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout
