"""What a checkpoint must hold: manifest.json lists every file with its size and checksums. Standard library only.

    RUN_DIR/checkpoints/step-00000100.tmp/                being written, or left by a process that was killed
    RUN_DIR/checkpoints/step-00000100/manifest.json       complete: written last, before the folder got its name

Checksums are CRC-32 of blocks of 64 MiB: computed while a file is written, and checked by any number of ranks and
threads at once, however many files there are. They find what disks and copies do by accident, not a forger.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Version of the manifest and of what it describes. A reader refuses a higher one instead of guessing."""
STACK = "torch.distributed.checkpoint"
"""Who can read the files."""
BLOCK_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20
_COMPLETE = re.compile(r"step-(\d{8})")


class Unsound(Exception):
    """The checkpoint is torn or corrupt; the message says which file and how."""


class TooNew(Exception):
    """The checkpoint was written by a newer version of this project, which alone knows how to read it."""


class Checksums:
    """CRC-32 of each block of a file that is written from beginning to end."""

    def __init__(self) -> None:
        self.size = 0
        self._finished: list[int] = []
        self._current = 0

    def update(self, data: memoryview) -> None:
        """Take the file's next bytes."""
        while len(data):
            part = data[: BLOCK_BYTES - self.size % BLOCK_BYTES]
            self._current = zlib.crc32(part, self._current)
            self.size += len(part)
            data = data[len(part) :]
            if self.size % BLOCK_BYTES == 0:
                self._finished.append(self._current)
                self._current = 0

    def entry(self) -> FileEntry:
        """What the manifest says of the file."""
        last = [self._current] if self.size % BLOCK_BYTES else []
        return FileEntry(self.size, tuple(f"{crc:08x}" for crc in (*self._finished, *last)))


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    crc32: tuple[str, ...]
    """Of each block of BLOCK_BYTES, the last one shorter; eight hexadecimal digits each."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a checkpoint without reading its tensors."""

    step: int
    world_size: int
    technique: str
    """The recipe that wrote it."""
    facts: dict[str, Any]
    """What a run that goes on from it must have equal."""
    model: dict[str, Any]
    """The model's size, by the fields of ModelSize; empty where the writer did not say."""
    context: int
    """Tokens per sequence that it was trained on."""
    torch: str
    time: float
    """Unix seconds."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    stack: str = STACK
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(entry.size for entry in self.files.values())

    def write(self, folder: Path) -> None:
        """Put it into `folder`, on the disk when this returns."""
        with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as stream:
            json.dump(asdict(self), stream)
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in `folder`. Raises Unsound where it is missing or broken, TooNew for a later format."""
        try:
            content = json.loads((folder / MANIFEST_FILE).read_bytes())
        except FileNotFoundError:
            raise Unsound(f"{MANIFEST_FILE} is missing") from None
        except (OSError, ValueError) as error:
            raise Unsound(f"{MANIFEST_FILE} cannot be read: {error}") from None
        found = content.get("format") if isinstance(content, dict) else None
        if not isinstance(found, int):
            raise Unsound(f"{MANIFEST_FILE} says no format")
        if found > FORMAT:
            raise TooNew(
                f"{folder} was written by a newer version (format {found}, this one reads {FORMAT}): "
                "use that version, or start another run"
            )
        try:
            files = {
                name: FileEntry(e["size"], tuple(e["crc32"])) for name, e in content.pop("files").items()
            }
            return cls(files=files, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise Unsound(f"{MANIFEST_FILE} is not one: {error}") from None


def folder_of(run_directory: Path, step: int) -> Path:
    """Where the complete checkpoint of optimizer step `step` is."""
    return run_directory / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step of a complete checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def folders(run_directory: Path) -> list[Path]:
    """Every checkpoint that has its final name, the newest first; whether each is sound has not been looked at."""
    parent = run_directory / "checkpoints"
    if not parent.is_dir():
        return []
    complete = [entry for entry in parent.iterdir() if _COMPLETE.fullmatch(entry.name)]
    return sorted(complete, key=lambda entry: entry.name, reverse=True)


def check_sizes(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there in full. Raises Unsound, or TooNew.

    Milliseconds: it reads no file but the manifest. What it cannot see is a byte that changed.
    """
    manifest = Manifest.read(folder)
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise Unsound(f"{name} is missing") from None
        if size != entry.size:
            raise Unsound(f"{name} has {size} bytes, its manifest says {entry.size}")
    return manifest


def check_blocks(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Read every `parts`-th block, from number `part` on, and compare its checksum. Raises Unsound.

    Together, `parts` ranks have then read all of it once.
    """
    blocks = [
        (name, number, checksum)
        for name, entry in sorted(manifest.files.items())
        for number, checksum in enumerate(entry.crc32)
    ]
    # zlib and read() let other threads run: several read as fast as the file system can.
    with concurrent.futures.ThreadPoolExecutor(max(1, min(8, len(os.sched_getaffinity(0)) // 2))) as pool:
        for found in pool.map(lambda block: _wrong(folder, *block), blocks[part::parts]):
            if found:
                raise Unsound(found)


def check(folder: Path) -> Manifest:
    """Sizes and checksums of a whole checkpoint, by this process alone. Raises Unsound, or TooNew."""
    manifest = check_sizes(folder)
    check_blocks(folder, manifest)
    return manifest


def surplus(steps: Sequence[int], keep: int, keep_every: int) -> list[int]:
    """The steps that are kept no longer, of sound checkpoints alone: not the newest `keep`, no multiple of
    `keep_every` (0: multiples do not matter).
    """
    assert keep >= 1, "a run without any checkpoint could not go on"
    older = sorted(steps, reverse=True)[keep:]
    return sorted(step for step in older if not (keep_every and step % keep_every == 0))


def remove(folder: Path) -> None:
    """Delete a complete checkpoint, which is invisible before the first of its files goes. Raises OSError."""
    shutil.rmtree(aside(folder))


def aside(folder: Path) -> Path:
    """Give a complete checkpoint a name under which nobody goes on from it; what had that name goes."""
    renamed = folder.with_name(f"{folder.name}.old.tmp")
    if renamed.exists():
        shutil.rmtree(renamed)
    return folder.rename(renamed)


def _wrong(folder: Path, name: str, number: int, checksum: str) -> str | None:
    """What is wrong with one block."""
    found, left = 0, BLOCK_BYTES
    try:
        with (folder / name).open("rb", buffering=0) as stream:
            stream.seek(number * BLOCK_BYTES)
            while left and (data := stream.read(min(left, _READ_BYTES))):
                found = zlib.crc32(data, found)
                left -= len(data)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if f"{found:08x}" == checksum:
        return None
    start = number * BLOCK_BYTES
    return f"{name} is corrupt: its checksum is another between byte {start} and {start + BLOCK_BYTES - left}"
