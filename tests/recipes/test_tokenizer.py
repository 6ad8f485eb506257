"""Tokenizers: lossless, the same each time they are trained, and the published one where there is one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tokenizers

from recipes.lib.arguments import ArgumentError
from recipes.lib.corpus import Corpus
from recipes.lib.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_identity, write_tokenizer

DOCUMENTS = ["def greet(name):\n    return f'hello {name}'\n" * 20, "größer, 日本, 🙂\n" * 20]


@pytest.fixture
def small() -> Corpus:
    return Corpus("small", hashlib.sha256(repr(DOCUMENTS).encode()).hexdigest(), lambda: iter(DOCUMENTS))


@pytest.fixture
def trained(small: Corpus, tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    folder.mkdir()
    write_tokenizer(folder, small, init_from="")
    return folder


def test_any_text_comes_back_whole(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    texts = [*DOCUMENTS, "\t new words, \x00 and ½ \n\n", ""]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert ids[-1] == tokenizer.separator
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
    assert len(tokenizer.encode([DOCUMENTS[0]])[0]) < len(DOCUMENTS[0]) / 3


def test_training_twice_gives_the_same_file(small: Corpus, trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    write_tokenizer(again, small, init_from="")
    assert (again / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_the_models_own_tokenizer_is_copied_and_used(small: Corpus, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer = write_tokenizer(copy, small, init_from=str(trained))
    assert (copy / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    assert tokenizer.encode(DOCUMENTS) == load_tokenizer(trained).encode(DOCUMENTS)


def test_a_published_file_that_truncates_and_pads_does_not_cut_documents(trained: Path) -> None:
    documents = [*DOCUMENTS, "a"]
    whole = load_tokenizer(trained).encode(documents)
    published = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    published.enable_truncation(4)
    published.enable_padding(length=6)
    published.save(str(trained / "tokenizer.json"))
    assert load_tokenizer(trained).encode(documents) == whole


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": END_OF_TEXT}),
        ("tokenizer_config.json", {"eos_token": {"content": END_OF_TEXT, "special": True}}),
        ("config.json", {"eos_token_id": 0}),
        ("config.json", {"eos_token_id": [0, 5]}),
    ],
)
def test_the_end_of_text_is_found_where_publishers_put_it(
    trained: Path, name: str, content: dict[str, object]
) -> None:
    (trained / "tokenizer_config.json").unlink()
    (trained / name).write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(trained).separator == 0


def test_no_end_of_text_is_an_error_and_not_a_guess(trained: Path) -> None:
    (trained / "tokenizer_config.json").unlink()
    with pytest.raises(ArgumentError, match="names no end-of-text token"):
        load_tokenizer(trained)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"holds no tokenizer\.json"):
        tokenizer_identity(str(tmp_path))
    with pytest.raises(ArgumentError, match="no folder /nowhere"):
        tokenizer_identity("/nowhere")


def test_the_identity_follows_every_file_that_decides_the_tokens(trained: Path) -> None:
    identities = {tokenizer_identity(""), tokenizer_identity(str(trained))}
    (trained / "tokenizer_config.json").write_text('{"eos_token": "a"}', encoding="utf-8")
    identities.add(tokenizer_identity(str(trained)))
    assert len(identities) == 3
