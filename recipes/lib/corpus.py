"""Where training text comes from: Python's own sources, a folder of files, or a Hugging Face dataset.

Standard library only, so that the launcher can check `data=…` on the login node; `datasets` is imported when
its documents are read.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.lib.arguments import ArgumentError, nearest_name

STDLIB = "stdlib"
HUGGING_FACE = "hf:"
"""Begins the name of a dataset: without it, `data=org/name` and a mistyped folder would look the same."""
STDLIB_CHARACTERS = 8 * 2**20
"""Enough for a tiny model to learn from, and read, tokenized and written in a few seconds."""
HUGGING_FACE_CHARACTERS = 2**30
"""A dataset from the hub is streamed up to here: some of them would fill any disk."""
DOCUMENT_CHARACTERS = 2**20
"""A longer text file is cut at line ends into documents of this size: encoding takes 50 times the memory."""
SUFFIXES = (".txt", ".md", ".py", ".jsonl")

# No tests (some hold broken text on purpose), no tables of code points, nothing that pip put there.
_STDLIB_LEAVES_OUT = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}
_DATASET_NAME = re.compile(r"hf:[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Corpus:
    """Text as a sequence of documents that is the same on every machine that has the same `fingerprint`."""

    label: str
    """For people, and as part of a folder's name: letters, digits, dots, dashes."""
    fingerprint: str
    """SHA-256 of what decides the documents, in hexadecimal."""
    documents: Callable[[], Iterator[str]]
    """Reads the documents anew, in the same order each time."""


def open_corpus(data: str) -> Corpus:
    """The corpus that `data=…` names. Reads no documents of a folder or dataset yet.

    Raises ArgumentError as `check_data` does.
    """
    check_data(data)
    if data == STDLIB:
        return _stdlib()
    if data.startswith(HUGGING_FACE):
        return _hugging_face(data)
    return _folder(data)


def check_data(data: str) -> None:
    """Find a wrong `data=…` without reading the text: fit for a login node, before anything is submitted.

    Whether a dataset exists on the hub is found only when it is read: asking would need the network.
    Raises ArgumentError naming what is missing.
    """
    if data == STDLIB:
        return
    if data.startswith(HUGGING_FACE):
        if not _DATASET_NAME.fullmatch(data):
            raise ArgumentError("data", data, "wants hf:NAME or hf:NAME:CONFIG, where NAME is org/name")
        if importlib.util.find_spec("datasets") is None:
            raise ArgumentError("data", data, "wants the library `datasets`: pip install datasets")
        return
    folder = Path(data).expanduser()
    if not data or not folder.exists():
        raise ArgumentError("data", data, f"no folder {folder.absolute()}{_hint(data)}")
    if not folder.is_dir():
        raise ArgumentError("data", data, f"{folder.absolute()} is a file; wants the folder that holds it")
    if next(_files(folder, SUFFIXES), None) is None:
        raise ArgumentError("data", data, f"{folder.absolute()} holds no {', '.join(SUFFIXES)} file")


def _hint(data: str) -> str:
    if data.startswith(("/", ".", "~")):
        return ""
    nearest = nearest_name(data, [STDLIB])
    return f"; nearest: {nearest or HUGGING_FACE + data}" if data else f"; nearest: {STDLIB}"


def _files(
    folder: Path, suffixes: tuple[str, ...], leave_out: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Every file below `folder` with one of the suffixes, in the same order everywhere; no hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in leave_out)
        for name in sorted(names):
            if name.endswith(suffixes) and not name.startswith("."):
                yield Path(parent, name)


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = list(_files(root, (".py",), frozenset(_STDLIB_LEAVES_OUT)))
    # Ordered by a hash of the name: packages are neighbours, and the cap must not drop a whole subject.
    files.sort(key=lambda file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest())
    documents: list[str] = []
    characters = 0
    for file in files:
        documents.append(file.read_text(encoding="utf-8"))
        characters += len(documents[-1])
        if characters > STDLIB_CHARACTERS:
            break
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return Corpus(f"{STDLIB}-{platform.python_version()}", digest.hexdigest(), lambda: iter(documents))


def _folder(data: str) -> Corpus:
    folder = Path(data).expanduser().absolute()
    digest = hashlib.sha256()
    for file in _files(folder, SUFFIXES):
        # Names, sizes and times stand for the contents: hashing a terabyte at every start would take an hour.
        status = file.stat()
        fact = [file.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(fact).encode() + b"\n")

    def documents() -> Iterator[str]:
        for file in _files(folder, SUFFIXES):
            try:
                yield from _json_lines(file) if file.suffix == ".jsonl" else _text(file)
            except UnicodeDecodeError as error:
                raise ArgumentError("data", data, f"{file} is not UTF-8: {error.reason}") from None
            except _NotAText as error:
                raise ArgumentError("data", data, f'{error}: wants {{"text": "…"}}') from None

    return Corpus(_as_label(folder.name), digest.hexdigest(), documents)


class _NotAText(Exception):
    """A line of a .jsonl file that does not hold a text; says which."""


def _text(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as stream:
        while document := stream.read(DOCUMENT_CHARACTERS):
            yield document + stream.readline()


def _json_lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError, IndexError):
                text = None
            if not isinstance(text, str):
                raise _NotAText(f"{file}:{number}")
            yield text


def _hugging_face(data: str) -> Corpus:
    name, _, config = data.removeprefix(HUGGING_FACE).partition(":")

    def documents() -> Iterator[str]:
        datasets = importlib.import_module("datasets")
        try:
            rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            # An unknown name, a missing config, no network: the library's errors derive from these three.
            first_line = next(iter(str(error).splitlines()), "")
            problem = f"cannot be read from Hugging Face: {type(error).__name__}: {first_line}"
            if isinstance(error, ConnectionError):
                problem += f"; where there is a network: python -m recipes.lib.prepare data={data}"
            raise ArgumentError("data", data, problem) from error
        characters = 0
        for row in rows:
            if "text" not in row:
                raise ArgumentError("data", data, f'has no column "text"; its columns are {", ".join(row)}')
            yield row["text"]
            characters += len(row["text"])
            if characters > HUGGING_FACE_CHARACTERS:
                return

    # The name alone: what is prepared stays as it is, also when its owner pushes a new revision.
    identity = f"{data} {HUGGING_FACE_CHARACTERS}"
    return Corpus(_as_label(data), hashlib.sha256(identity.encode()).hexdigest(), documents)


def _as_label(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.") or "corpus"
