"""`launcher env install`: an environment is exactly its lock, and what cannot be is one line.

uv makes real environments here, of a package of three lines that lies in a folder: nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.environments import STAMP, check_machine, make_environment, python_of
from launcher.spec import UserError
from launcher.stacks import Stack, load_stack, load_stacks

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one stack, and a folder in which uv finds two versions of its package."""
    root = tmp_path / "a tree"
    wheels = tmp_path / "wheels"
    folder = root / "env" / "requirements"
    folder.mkdir(parents=True)
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        write_wheel(wheels, version)
    (folder / "stacks.yaml").write_text(
        f'small: {{summary: a test, python: "{VERSION}", glibc: "2.17", base: {{base: nothing is compiled}}}}\n'
    )
    (folder / "small.in").write_text("small-thing\n")
    (folder / "small.txt").write_text("small-thing==1.0\n    # via -r small.in\n")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return root


def write_wheel(folder: Path, version: str) -> None:
    info = f"small_thing-{version}.dist-info"
    with zipfile.ZipFile(folder / f"small_thing-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small_thing.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: small-thing\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def installed(folder: Path) -> str:
    code = "import small_thing; print(small_thing.VERSION)"
    # -B: the bytecode of 1.0 would be taken for that of a 2.0 of the same length, written in the same second.
    return subprocess.check_output([python_of(folder), "-B", "-c", code], text=True, cwd="/").strip()


def made(stack: Stack, folder: Path) -> list[str]:
    said: list[str] = []
    make_environment(stack, folder, say=lambda stage, what: said.append(f"{stage} {what}"))
    return said


def test_an_environment_follows_its_lock(repository: Path, tmp_path: Path) -> None:
    stack, folder = load_stack("small", repository), tmp_path / "environments" / "small"
    assert made(stack, folder)[-1].startswith("done in ")
    assert installed(folder) == "1.0"
    paths = subprocess.check_output(
        [python_of(folder), "-c", "import sys; print(*sys.path, sep='\\n')"], text=True
    )
    assert str(repository) in paths.splitlines(), "the recipes can be imported"

    assert made(stack, folder) == [f"done {folder} is up to date"]

    stack.lock.write_text("small-thing==2.0\n")
    made(stack, folder)
    assert installed(folder) == "2.0"


def test_an_installation_that_failed_is_one_line_and_is_not_taken_for_done(
    repository: Path, tmp_path: Path
) -> None:
    stack, folder = load_stack("small", repository), tmp_path / "small"
    right = stack.lock.read_text()
    made(stack, folder)  # what was whole before is not whole any more
    stack.lock.write_text("small-thing==3.0\n")
    with pytest.raises(UserError, match=r"^small\.txt could not be installed: .*small-thing") as caught:
        made(stack, folder)
    assert "\n" not in str(caught.value)
    assert not (folder / STAMP).exists()
    stack.lock.write_text(right)
    made(stack, folder)
    assert installed(folder) == "1.0"


def test_a_folder_with_something_else_is_left_alone(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="holds something else than an environment"):
        made(load_stack("small", repository), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_place_where_no_folder_can_be_made_is_one_line(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(
            UserError, match=r"cannot be made: Not a directory: choose another with into=FOLDER"
        ):
            made(load_stack("small", repository), tmp_path / place)


def test_a_python_that_is_nowhere_is_one_line_that_says_what_to_do(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    stack = dataclasses.replace(load_stack("small", repository), python="3.99")
    with pytest.raises(UserError, match=r"^no Python 3\.99 \(install it and put it on PATH: .*\): .*"):
        made(stack, tmp_path / "small")


@pytest.mark.parametrize(
    ("machine", "glibc", "said"),
    [
        ("aarch64", "2.39", "vllm is locked for x86_64, and this machine is aarch64"),
        ("x86_64", "2.28", "vllm wants glibc 2.35 or newer, and here is 2.28: env/containers/vllm.def"),
    ],
)
def test_a_machine_that_cannot_run_a_stack_is_refused_before_anything_is_made(
    machine: str, glibc: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_machine(load_stack("vllm"), machine, glibc)
    check_machine(load_stack("vllm"), "x86_64", "2.100")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "unknown stack 'trian': did you mean train?"),
        (["train", "vllm"], "env install takes one name, not 2"),
        (["into=x"], "env install takes one name, not 0"),
        (["train", "to=x"], "unknown key 'to': env install NAME into=FOLDER"),
        (["train", "--json"], "--json, --shell and --root are of plain env"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "install", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_without_a_name_the_stacks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "install"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(load_stacks())
    assert all("torch 2." in line for line in lines)


def test_plain_env_is_still_the_network_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "fabric=loopback"]) in (0, 1)
    assert capsys.readouterr().out.startswith("fabric loopback")
