"""Prepared tokens: written once, complete or invisible, and exactly what the corpus holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest

from recipes.lib import prepare as module
from recipes.lib.arguments import ArgumentError
from recipes.lib.prepare import cache_root, prepare
from recipes.lib.shards import TokenShards, UnreadableShards, write_shards
from recipes.lib.tokenizer import load_tokenizer


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(
            f"text {number}: " + "größer und größer. " * 30, encoding="utf-8"
        )
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files_of(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_the_tokens_are_the_documents_one_after_the_other(texts: Path, cache: Path) -> None:
    folder = prepare(str(texts), cache_dir=cache)
    shards, tokenizer = TokenShards(folder), load_tokenizer(folder)
    documents = [file.read_text(encoding="utf-8") for file in sorted(texts.iterdir())]
    wanted = [token for ids in tokenizer.encode(documents) for token in ids]
    assert shards.read(0, len(shards)).tolist() == wanted
    assert shards.index.vocab_size == tokenizer.vocab_size
    assert folder.parent == cache / "tokens"


def test_a_second_start_reads_what_the_first_prepared(
    texts: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(str(texts), cache_dir=cache)
    before = files_of(folder)
    assert "prepared" in capsys.readouterr().out
    assert prepare(str(texts), cache_dir=cache) == folder
    assert files_of(folder) == before
    assert capsys.readouterr().out == ""


def test_other_text_or_another_tokenizer_is_another_folder(texts: Path, cache: Path) -> None:
    first = prepare(str(texts), cache_dir=cache)
    other_tokenizer = prepare(str(texts), init_from=str(first), cache_dir=cache)
    (texts / "0.txt").write_text("changed", encoding="utf-8")
    assert len({first, other_tokenizer, prepare(str(texts), cache_dir=cache)}) == 3
    assert TokenShards(first).index.content == TokenShards(other_tokenizer).index.content


def test_a_failure_leaves_nothing_behind(texts: Path, cache: Path) -> None:
    (texts / "4.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ArgumentError, match="is not UTF-8"):
        prepare(str(texts), cache_dir=cache)
    assert [file for file in (cache / "tokens").iterdir() if file.suffix != ".lock"] == []


def test_what_a_killed_process_left_is_never_taken_for_complete_and_is_cleared(
    texts: Path, cache: Path
) -> None:
    folder = prepare(str(texts), cache_dir=cache)
    leftover = folder.rename(folder.with_name(f".{folder.name}.othernode-17"))
    assert prepare(str(texts), cache_dir=cache) == folder
    assert not leftover.exists()


def test_a_purged_file_is_noticed_and_the_tokens_are_made_again(
    texts: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(str(texts), cache_dir=cache)
    content = TokenShards(folder).index.content
    (folder / "tokens-00000.bin").unlink()
    with pytest.raises(UnreadableShards, match=r"tokens-00000\.bin has None bytes"):
        TokenShards(folder)
    assert prepare(str(texts), cache_dir=cache) == folder
    assert TokenShards(folder).index.content == content
    assert "will be prepared anew" in capsys.readouterr().out


def test_who_comes_second_waits_for_the_first_and_takes_its_tokens(texts: Path, cache: Path) -> None:
    folder = prepare(str(texts), cache_dir=cache)
    prepared_by_first = folder.rename(cache / "first")
    environment = {**os.environ, "CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "recipes.lib.prepare", f"data={texts}"]
    with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
        second = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline() == f"waiting for the process that prepares {folder}\n"
        prepared_by_first.rename(folder)
        before = files_of(folder)
    assert second.communicate(timeout=60)[0] == f"{folder}\n"
    assert files_of(folder) == before


def test_a_corpus_without_text_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").touch()
    with pytest.raises(ArgumentError, match="holds no text"):
        prepare(str(tmp_path / "blank"), cache_dir=cache)


def test_the_cache_is_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "from environment"))
    assert cache_root() == tmp_path / "from environment"
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("CACHE_DIR")
    assert cache_root().name == "distributed-recipes"


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, "<u2"), (65_536, "<u4"), (128_255, "<u4")])
def test_a_shard_holds_every_id_of_its_vocabulary(tmp_path: Path, largest: int, dtype: str) -> None:
    index = write_shards(
        tmp_path, [[0, largest, 7]], vocab_size=largest + 1, separator=0, tokenizer="", corpus=""
    )
    assert index.dtype == dtype
    assert TokenShards(tmp_path).read(0, 3).tolist() == [0, largest, 7]


def test_reading_does_not_notice_where_a_file_ends(tmp_path: Path) -> None:
    documents = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    index = write_shards(
        tmp_path, documents, vocab_size=12, separator=0, tokenizer="", corpus="", tokens_per_shard=3
    )
    assert index.shards == [3, 3, 3, 2]
    shards, whole = TokenShards(tmp_path), np.arange(1, 12)
    for start in range(12):
        for count in range(12 - start):
            assert shards.read(start, count).tolist() == whole[start : start + count].tolist()
    with pytest.raises(IndexError):
        shards.read(5, 7)


def test_the_content_does_not_depend_on_how_it_is_cut_into_files(tmp_path: Path) -> None:
    contents = set()
    for size in (2, 3, 100):
        folder = tmp_path / str(size)
        folder.mkdir()
        options = {"vocab_size": 9, "separator": 0, "tokenizer": "", "corpus": ""}
        contents.add(write_shards(folder, [[1, 2], [3, 4, 5]], tokens_per_shard=size, **options).content)
    assert len(contents) == 1


def test_the_command_line_prints_the_folder(
    texts: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIR", str(cache))
    monkeypatch.setattr("sys.argv", ["prepare", f"data={texts}"])
    module.main()
    assert Path(capsys.readouterr().out.splitlines()[-1]) == prepare(str(texts), cache_dir=cache)
    shutil.rmtree(texts)
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: data={texts}: no folder {texts}\n"
