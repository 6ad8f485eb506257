"""Prepare a corpus once: tokenize it into shards under CACHE_DIR, complete or invisible.

    python -m recipes.lib.prepare data=/shared/texts init_from=/shared/models/Llama-3-8B

does on a login node what rank 0 of a recipe would do at its start: worth it for a corpus of gigabytes,
because the other ranks hold their GPUs while they wait, and for a dataset from the hub, because compute
nodes often have no network.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from recipes.lib.arguments import ArgumentError, argument, one_line_errors, parse_or_exit
from recipes.lib.corpus import Corpus, open_corpus
from recipes.lib.shards import FORMAT_VERSION, TokenShards, UnreadableShards, write_shards
from recipes.lib.tokenizer import TOKENIZER_FILE, Tokenizer, tokenizer_identity, write_tokenizer

_DOCUMENTS_PER_BATCH = 64


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Folder for prepared corpora: `cache_dir`, else $CACHE_DIR, else the user's cache folder."""
    chosen = cache_dir or os.environ.get("CACHE_DIR") or platformdirs.user_cache_dir("distributed-recipes")
    return Path(chosen).expanduser().absolute()


def prepare(data: str, *, init_from: str = "", cache_dir: str | Path | None = None) -> Path:
    """The folder with the shards and the tokenizer of `data`; makes it where it is not there yet.

    Processes that want the same corpus at the same time wait for the one that prepares it.
    Raises ArgumentError for a corpus or tokenizer that cannot be read.
    """
    corpus = open_corpus(data)
    key = hashlib.sha256(f"{FORMAT_VERSION} {corpus.fingerprint} {tokenizer_identity(init_from)}".encode())
    folder = cache_root(cache_dir) / "tokens" / f"{corpus.label}-{key.hexdigest()[:16]}"
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for the process that prepares {folder}", flush=True)
        lock.acquire()
    try:
        if not _is_complete(folder):
            _build(folder, data, corpus, init_from)
    finally:
        lock.release()
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        TokenShards(folder)
    except UnreadableShards as problem:
        if folder.exists():
            # Scratch file systems delete files that nobody has read for weeks, one by one.
            print(f"not complete, will be prepared anew: {problem}", flush=True)
        return False
    return True


def _build(folder: Path, data: str, corpus: Corpus, init_from: str) -> None:
    begun = time.monotonic()
    print(f"preparing {corpus.label} in {folder}", flush=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover)  # We hold the lock, so whoever wrote this was killed.
    beside = folder.with_name(f".{folder.name}.{socket.gethostname()}-{os.getpid()}")
    beside.mkdir()
    try:
        tokenizer = write_tokenizer(beside, corpus, init_from)
        index = write_shards(
            beside,
            _encoded(corpus, tokenizer),
            vocab_size=tokenizer.vocab_size,
            separator=tokenizer.separator,
            tokenizer=hashlib.sha256((beside / TOKENIZER_FILE).read_bytes()).hexdigest(),
            corpus=corpus.fingerprint,
        )
        if not index.tokens:
            raise ArgumentError("data", data, "holds no text")
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside)
        raise
    seconds = time.monotonic() - begun
    print(f"prepared {index.tokens:,} tokens of {corpus.label} in {seconds:.1f} s", flush=True)


def _encoded(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[list[int]]:
    documents = (document for document in corpus.documents() if document)
    while batch := list(itertools.islice(documents, _DOCUMENTS_PER_BATCH)):
        yield from tokenizer.encode(batch)


@dataclass(frozen=True, kw_only=True)
class PrepareArgs:
    """What decides a prepared corpus."""

    data: str = argument(
        "stdlib", "stdlib, a folder of .txt/.md/.py/.jsonl files, or hf:NAME of a Hugging Face dataset"
    )
    init_from: str = argument("", "folder of a Hugging Face model whose tokenizer is used; empty trains one")


def main() -> None:
    """Command line: print the folder that holds the prepared corpus."""
    args = parse_or_exit(PrepareArgs)
    with one_line_errors():
        print(prepare(args.data, init_from=args.init_from))


if __name__ == "__main__":
    main()
