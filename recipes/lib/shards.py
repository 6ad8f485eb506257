"""A corpus as token ids on disk: memory-mapped files of little-endian integers, and an index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TOKENS_PER_SHARD = 2**26
"""128 MiB of 16-bit tokens: few files, and none that a copy or a quota trips over."""


class UnreadableShards(Exception):
    """A folder does not hold the shards that it should; says what is missing or differs."""


@dataclass(frozen=True)
class ShardIndex:
    """What the shards of one folder are: the content of index.json."""

    version: int
    dtype: str
    """NumPy's name of the integers in the files: `<u2` or `<u4`."""
    shards: list[int]
    """Tokens in each file, in order."""
    vocab_size: int
    separator: int
    """Id of the token that ends each document."""
    tokenizer: str
    """SHA-256 of tokenizer.json."""
    corpus: str
    """Fingerprint of the corpus."""
    content: str
    """SHA-256 of all tokens: two folders with the same content give the same batches."""

    @property
    def tokens(self) -> int:
        """Tokens in all files together."""
        return sum(self.shards)


def write_shards(
    folder: Path,
    documents: Iterable[list[int]],
    *,
    vocab_size: int,
    separator: int,
    tokenizer: str,
    corpus: str,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> ShardIndex:
    """Write the token ids of `documents`, one after the other, and the index into the existing `folder`.

    Every file is on the disk before this returns, so that a rename afterwards publishes all or nothing.
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    digest = hashlib.sha256()
    shards: list[int] = []
    pending = np.empty(0, dtype)
    buffered: list[int] = []

    def flush(*, last: bool) -> None:
        nonlocal pending
        pending = np.concatenate([pending, np.asarray(buffered, dtype)])
        buffered.clear()
        while len(pending) >= tokens_per_shard or (last and len(pending)):
            shard, pending = pending[:tokens_per_shard], pending[tokens_per_shard:]
            data = shard.tobytes()
            digest.update(data)
            _write_durably(shard_file(folder, len(shards)), data)
            shards.append(len(shard))

    for ids in documents:
        buffered.extend(ids)
        if len(buffered) >= min(tokens_per_shard, 2**20):
            flush(last=False)
    flush(last=True)
    index = ShardIndex(
        version=FORMAT_VERSION,
        dtype=dtype.str,
        shards=shards,
        vocab_size=vocab_size,
        separator=separator,
        tokenizer=tokenizer,
        corpus=corpus,
        content=digest.hexdigest(),
    )
    _write_durably(folder / INDEX_FILE, (json.dumps(asdict(index), indent=2) + "\n").encode())
    return index


class TokenShards:
    """One long sequence of tokens, read from the files of a folder without loading them."""

    def __init__(self, folder: Path) -> None:
        """Map the shards of `folder`. Raises UnreadableShards where one is missing or cut."""
        self.folder = folder
        self.index = read_index(folder)
        self._files: list[npt.NDArray[Any]] = []
        for number, tokens in enumerate(self.index.shards):
            file = shard_file(folder, number)
            wanted = tokens * np.dtype(self.index.dtype).itemsize
            size = file.stat().st_size if file.exists() else None
            if size != wanted:
                raise UnreadableShards(f"{file} has {size} bytes, its index says {wanted}")
            self._files.append(np.memmap(file, dtype=self.index.dtype, mode="r"))
        self._starts = np.cumsum([0, *self.index.shards])

    def __len__(self) -> int:
        return self.index.tokens

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `start + count`, also across the end of a file."""
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        pieces = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while count:
            offset = start - int(self._starts[number])
            piece = self._files[number][offset : offset + count]
            pieces.append(piece)
            start, count, number = start + len(piece), count - len(piece), number + 1
        return np.concatenate(pieces or [np.empty(0)]).astype(np.int64)


def read_index(folder: Path) -> ShardIndex:
    """The index of `folder`. Raises UnreadableShards where there is none or it is of another version."""
    file = folder / INDEX_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnreadableShards(f"there is no {file}") from None
    if fields.get("version") != FORMAT_VERSION:
        raise UnreadableShards(f"{file} has version {fields.get('version')}; wants {FORMAT_VERSION}")
    return ShardIndex(**fields)


def shard_file(folder: Path, number: int) -> Path:
    """Where shard `number` of a folder is."""
    return folder / f"tokens-{number:05d}.bin"


def _write_durably(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
