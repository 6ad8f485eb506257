"""Text to token ids: the tokenizer of a published model, or a small one trained on the corpus."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from recipes.lib.arguments import ArgumentError
from recipes.lib.corpus import Corpus

TRAINED_VOCAB_SIZE = 4096
"""3.6 characters of Python a token, and an embedding that does not dwarf the `tiny` model it feeds."""
TRAINING_CHARACTERS = 8 * 2**20
"""More text moves few merges, and training on this much takes three seconds on one core."""
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE as Hugging Face stores it, and the token that ends a document."""

    vocabulary: tokenizers.Tokenizer
    separator: int
    """Id of the token that follows every document."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can give."""
        return max(self.vocabulary.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """The ids of each document: begun as the tokenizer begins a text, ended by the separator."""
        encoded = self.vocabulary.encode_batch_fast(list(documents))
        return [[*document.ids, self.separator] for document in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without its special tokens."""
        return str(self.vocabulary.decode(list(ids)))


def tokenizer_identity(init_from: str) -> str:
    """SHA-256 of what decides the tokenizer for a given corpus, before one is trained.

    Raises ArgumentError where the folder `init_from` has no tokenizer.
    """
    if not init_from:
        version = importlib.metadata.version("tokenizers")
        facts = f"bpe {TRAINED_VOCAB_SIZE} {TRAINING_CHARACTERS} tokenizers-{version}".encode()
        return hashlib.sha256(facts).hexdigest()
    folder = Path(init_from).expanduser()
    load_tokenizer(folder)
    digest = hashlib.sha256()
    for name in (TOKENIZER_FILE, CONFIG_FILE, "config.json"):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def write_tokenizer(folder: Path, corpus: Corpus, init_from: str) -> Tokenizer:
    """Put the tokenizer for `corpus` into `folder`: a copy of the one in `init_from`, or a newly trained one.

    What is written loads with transformers' AutoTokenizer too.
    """
    if init_from:
        source = Path(init_from).expanduser()
        for name in (TOKENIZER_FILE, CONFIG_FILE, "config.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
    else:
        _train(corpus).save(str(folder / TOKENIZER_FILE))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder of Hugging Face files, or in one that `write_tokenizer` filled.

    Raises ArgumentError (about `init_from`) where there is none, or none whose end-of-text token is known.
    """
    if not folder.is_dir():
        raise ArgumentError("init_from", str(folder), f"no folder {folder.absolute()}")
    if not (folder / TOKENIZER_FILE).is_file():
        raise ArgumentError("init_from", str(folder), f"holds no {TOKENIZER_FILE}")
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    # Published files may carry the truncation and padding of their last training run: documents would be cut.
    vocabulary.no_truncation()
    vocabulary.no_padding()
    return Tokenizer(vocabulary, _separator(folder, vocabulary))


def _train(corpus: Corpus) -> tokenizers.Tokenizer:
    vocabulary = tokenizers.Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    vocabulary.train_from_iterator(_first_characters(corpus, TRAINING_CHARACTERS), trainer)
    return vocabulary


def _first_characters(corpus: Corpus, limit: int) -> Iterator[str]:
    characters = 0
    for document in corpus.documents():
        yield document
        characters += len(document)
        if characters > limit:
            return


def _separator(folder: Path, vocabulary: tokenizers.Tokenizer) -> int:
    """The end-of-text id: by name in tokenizer_config.json, or else by number in the model's config.json."""
    token = _read_json(folder / CONFIG_FILE).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    number = vocabulary.token_to_id(text) if text else None
    if number is None:
        number = _read_json(folder / "config.json").get("eos_token_id")
        number = number[0] if isinstance(number, list) else number
    if number is None:
        problem = f"names no end-of-text token: eos_token in {CONFIG_FILE} or eos_token_id in config.json"
        raise ArgumentError("init_from", str(folder), problem)
    return int(number)


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
