"""Typed values: times, sizes and YAML scalars mean what a person means by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.settings import items, memory, minutes
from launcher.spec import UserError
from launcher.yaml_files import read_mapping


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (90, 90),
        ("90", 90),
        ("90m", 90),
        ("90min", 90),
        ("2h", 120),
        ("1h30m", 90),
        ("1d", 1440),
        ("00:45:00", 45),
        ("01:00:01", 61),
        ("45s", 1),
        ("100:00:00", 6000),
        ("1-12", 36 * 60),
        ("1-12:30", 36 * 60 + 30),
        ("2-00:00:30", 2 * 1440 + 1),
    ],
)
def test_a_time_is_read_in_every_common_spelling_and_rounded_up(text: object, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "1.5h", "00:00:00", "UNLIMITED", "10:30", True, 1.5])
def test_a_time_that_is_unclear_or_endless_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"time limit|for hours or"):
        minutes(text)


@pytest.mark.parametrize("amount", ["64G", "0", "512000M", "1T"])
def test_memory_is_taken_in_slurm_s_notation(amount: str) -> None:
    assert memory(amount) == amount


@pytest.mark.parametrize(
    ("amount", "nearest"), [("64", "64G"), ("64GB", "64G"), ("100 mb", "100M"), ("all", "64G")]
)
def test_memory_without_a_clear_unit_is_refused(amount: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest):
        memory(amount)


def test_a_list_takes_commas_in_a_word_and_a_list_in_a_file() -> None:
    assert items("a,b[1,2]") == items(["a", "b[1,2]"]) == ("a", "b[1,2]")
    assert items("") == items([]) == ()


# --- YAML


def read(folder: Path, text: str) -> dict[str, object]:
    path = folder / "file.yaml"
    path.write_text(text)
    return read_mapping(path, frozenset("abcdef"), shown="file.yaml")


def test_scalars_mean_what_they_look_like(tmp_path: Path) -> None:
    text = "a: off\nb: 10:30:00\nc: 1e-4\nd: no\ne: 010\nf: 2026-01-01\n"
    assert read(tmp_path, text) == {
        "a": "off",
        "b": "10:30:00",
        "c": 1e-4,
        "d": "no",
        "e": 10,
        "f": "2026-01-01",
    }


def test_a_variable_of_the_environment_is_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM", "a b")
    assert read(tmp_path, "a: ${oc.env:TEAM}/x\nb: ${oc.env:NOT_SET,other}") == {"a": "a b/x", "b": "other"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a: ${oc.env:NOT_SET}",
            "a: the variable NOT_SET is not set; set it, or give a default: ${oc.env:NOT_SET,DEFAULT}",
        ),
        (
            "a: ['export PATH=${HOME}/bin']",
            "a[0]: Interpolation key 'HOME' not found; ${oc.env:NAME} is the launcher's variable, "
            "\\${NAME} the shell's",
        ),
        ("aa: 1", "unknown key 'aa': did you mean a?"),
        ("- a", "a mapping of keys to values is wanted, not a list"),
        ("a: 1\na: 2", "not YAML: line 2: the key 'a' is there twice"),
        ("? [a]\n: 1", "not YAML: line 1: found unhashable key"),
        (
            "a: !!python/name:os.system",
            "not YAML: line 1: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'",
        ),
    ],
)
def test_a_mistake_in_yaml_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert str(caught.value) == f"file.yaml: {line}"


def test_the_shell_s_own_variables_can_be_kept(tmp_path: Path) -> None:
    assert read(tmp_path, "a: ['export PATH=\\${HOME}/bin:$PATH']") == {
        "a": ["export PATH=${HOME}/bin:$PATH"]
    }


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").mkdir()
    with pytest.raises(UserError, match=r"^file.yaml: cannot be read: Is a directory$"):
        read_mapping(tmp_path / "file.yaml", frozenset("a"), shown="file.yaml")
