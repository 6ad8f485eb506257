"""Corpora: the same documents on every machine, and a wrong `data=…` found before anything is submitted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.lib import corpus
from recipes.lib.arguments import ArgumentError
from recipes.lib.corpus import check_data, open_corpus


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "my texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_text("second\n", encoding="utf-8")
    (folder / "a.md").write_text("# first, größer\n", encoding="utf-8")
    (folder / "inner" / "c.jsonl").write_text(
        '{"text": "third"}\n\n{"text": "fourth", "id": 4}\n', encoding="utf-8"
    )
    (folder / "inner" / "d.py").write_text("fifth = 5\n", encoding="utf-8")
    (folder / "ignored.bin").write_bytes(b"\xff\xfe")
    (folder / ".hidden.txt").write_text("hidden\n", encoding="utf-8")
    return folder


@pytest.fixture
def no_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))


def test_the_standard_library_is_text_enough_and_the_same_each_time() -> None:
    first, second = open_corpus("stdlib"), open_corpus("stdlib")
    documents = list(first.documents())
    assert documents == list(second.documents()) == list(first.documents())
    assert first.fingerprint == second.fingerprint
    assert sum(map(len, documents)) > 4_000_000
    assert max(map(len, documents)) < 500_000


def test_a_folder_gives_its_documents_in_the_order_of_their_names(texts: Path) -> None:
    found = open_corpus(str(texts))
    assert list(found.documents()) == ["# first, größer\n", "second\n", "third", "fourth", "fifth = 5\n"]
    assert found.label == "my-texts"


def test_a_folders_fingerprint_follows_its_contents_and_not_its_place(texts: Path, tmp_path: Path) -> None:
    before = open_corpus(str(texts)).fingerprint
    moved = texts.rename(tmp_path / "elsewhere")
    assert open_corpus(str(moved)).fingerprint == before
    (moved / "b.txt").write_text("changed\n", encoding="utf-8")
    changed = open_corpus(str(moved)).fingerprint
    assert changed != before
    status = (moved / "b.txt").stat()
    (moved / "b.txt").write_text("CHANGED\n", encoding="utf-8")
    os.utime(moved / "b.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_corpus(str(moved)).fingerprint not in (before, changed)
    (moved / "b.txt").rename(moved / "c.txt")
    assert open_corpus(str(moved)).fingerprint not in (before, changed)


def test_a_long_file_becomes_several_documents_cut_at_line_ends(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "DOCUMENT_CHARACTERS", 10)
    (texts / "b.txt").write_text("123456789\nabcdefghi jkl\nend", encoding="utf-8")
    assert list(open_corpus(str(texts)).documents())[1:3] == ["123456789\nabcdefghi jkl\n", "end"]


@pytest.mark.parametrize("line", ['{"txt": "x"}', '{"text": 3}', '["text"]', "{", "3"])
def test_a_line_that_is_not_a_text_is_named(texts: Path, line: str) -> None:
    (texts / "inner" / "c.jsonl").write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match=r'c\.jsonl:2: wants \{"text"'):
        list(open_corpus(str(texts)).documents())


def test_a_file_that_is_not_utf8_is_named(texts: Path) -> None:
    (texts / "b.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ArgumentError, match=r"b\.txt is not UTF-8"):
        list(open_corpus(str(texts)).documents())


@pytest.mark.parametrize("path", ["/nowhere/corpus", "./corpus", "~/nowhere-corpus", "../corpus"])
def test_a_missing_folder_is_one_line_with_the_absolute_path(path: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_data(path)
    assert str(caught.value) == f"data={path}: no folder {Path(path).expanduser().absolute()}"


def test_a_file_or_an_empty_folder_is_no_corpus(texts: Path) -> None:
    with pytest.raises(ArgumentError, match="is a file; wants the folder that holds it"):
        check_data(str(texts / "b.txt"))
    empty = texts / "empty"
    empty.mkdir()
    with pytest.raises(ArgumentError, match=r"holds no \.txt, \.md, \.py, \.jsonl file"):
        check_data(str(empty))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("stdlb", "stdlib"), ("", "stdlib"), ("org/stories", "hf:org/stories"), ("tales", "hf:tales")],
)
def test_a_name_that_is_no_folder_is_answered_with_the_nearest_right_one(name: str, hint: str) -> None:
    with pytest.raises(ArgumentError, match=f"no folder /.*; nearest: {hint}$"):
        check_data(name)


@pytest.mark.usefixtures("no_datasets")
def test_a_dataset_needs_the_library_that_reads_it() -> None:
    with pytest.raises(ArgumentError, match=r"data=hf:org/stories: .* pip install datasets"):
        check_data("hf:org/stories")


@pytest.mark.parametrize("name", ["hf:", "hf:two words", "hf:a/b/c", "hf:a:b:c"])
def test_what_cannot_be_a_datasets_name_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="wants hf:NAME or hf:NAME:CONFIG"):
        check_data(name)


def test_good_corpora_pass_the_check(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_data("stdlib")
    check_data(str(texts))
    monkeypatch.chdir(texts.parent)
    check_data(texts.name)


def _pretend_datasets(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> list[Any]:
    """Put a `datasets` in place whose load_dataset gives `rows`; returns the list of calls."""
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        calls.append((args, options))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_dataset_is_streamed_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pretend_datasets(monkeypatch, [{"text": "one"}, {"text": "two"}, {"text": "three"}])
    monkeypatch.setattr(corpus, "HUGGING_FACE_CHARACTERS", 5)
    found = open_corpus("hf:org/stories:small")
    assert not calls, "opening must not need the network"
    assert list(found.documents()) == ["one", "two"]
    assert calls == [(("org/stories", "small"), {"split": "train", "streaming": True})]
    assert found.label == "hf-org-stories-small"


def test_a_dataset_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_datasets(monkeypatch, ConnectionError("Couldn't reach the Hub\nmany\nmore lines"))
    with pytest.raises(ArgumentError) as caught:
        list(open_corpus("hf:org/stories").documents())
    assert str(caught.value) == (
        "data=hf:org/stories: cannot be read from Hugging Face: ConnectionError: Couldn't reach the Hub; "
        "where there is a network: python -m recipes.lib.prepare data=hf:org/stories"
    )


def test_a_dataset_without_text_names_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_datasets(monkeypatch, [{"question": "?", "answer": "!"}])
    with pytest.raises(ArgumentError, match='no column "text"; its columns are question, answer'):
        list(open_corpus("hf:org/quiz").documents())


def test_the_check_imports_neither_torch_nor_numpy_nor_tokenizers() -> None:
    script = (
        "import sys; from recipes.lib.corpus import check_data; check_data('stdlib');"
        "print(*{'torch', 'numpy', 'tokenizers'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == ""


def test_json_lines_may_hold_any_unicode(texts: Path) -> None:
    text = "日本 \u2028 line separator \x85 next line"
    (texts / "inner" / "c.jsonl").write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert text in list(open_corpus(str(texts)).documents())
