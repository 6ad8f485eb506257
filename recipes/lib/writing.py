"""How one checkpoint gets onto the disk: all ranks write, one publishes, and all learn the same outcome."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.utils.serialization import config as serialization

from recipes.lib.distributed import World
from recipes.lib.manifest import Checksums, FileEntry, Manifest, aside, folder_of
from recipes.lib.stack import STACK_FOLDER, OwnFiles

T = TypeVar("T")
_READ_BYTES = 4 * 2**20
MOST_THREADS = 4
"""Of one rank that write; a thousand ranks make as many files each."""


class NotSaved(Exception):
    """The checkpoint was not written, on any rank; the message says why. What was there before still is."""


def write_checkpoint(
    state: dict[str, Any],
    manifest: Manifest,
    run_directory: Path,
    world: World,
    group: dist.ProcessGroup | None,
    own: OwnFiles | None = None,
) -> Manifest:
    """Write `state` as the checkpoint of `manifest.step`; all ranks call this together. Gives the manifest in full.

    What `own` writes is a part of it.

    When it returns on any rank, the checkpoint is complete, on the disk and visible on all of them. `group` is
    that of all ranks on gloo, which nothing else uses meanwhile; None in a world of one. Raises NotSaved on every
    rank alike where a disk is full or an input/output error occurs anywhere; the partial folder is gone then.
    """
    final = folder_of(run_directory, manifest.step)
    beside = final.with_name(f"{final.name}.tmp")
    first = world.is_first
    try:
        _together(lambda: _clear(beside) if first else None, group)
        written = _write_shards(state, beside, world, group)
        sizes = _together(lambda: _as_on_disk(beside, written), group)
        if own is not None:
            sizes += _write_own(own, beside, world, group)
        files = {name: entry for entries in sizes for name, entry in entries.items()}
        manifest = dataclasses.replace(manifest, files=files, time=time.time())
        _together(lambda: _publish(manifest, beside, final) if first else None, group)
    except NotSaved as error:
        # Every rank is here: none still writes into the folder.
        if first and beside.exists():
            try:
                shutil.rmtree(beside)
            except OSError as second:
                raise NotSaved(f"{error}; and its partial folder stays: {second}") from None
        raise
    return manifest


def _together(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Do `action` on every rank and give all results to all; what fails on one rank raises NotSaved on each.

    An error that one rank kept for itself would leave the others waiting for it in the next collective.
    """
    mine: tuple[T | None, str | None]
    try:
        mine = action(), None
    except Exception as error:  # noqa: BLE001 - every rank raises it below
        mine = None, f"{type(error).__name__}: {error}"
    everyone = [mine]
    if group is not None:
        everyone = [mine] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    for rank, (_, problem) in enumerate(everyone):
        if problem is not None:
            raise NotSaved(f"rank {rank}: {problem}")
    return [cast(T, value) for value, _ in everyone]


class _ChecksummedFile(io.BufferedWriter):
    """A new file that knows the checksums of what was written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"), 2**20)
        self.checksums = Checksums()

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        # First, so that a partial write, which raises, is not taken for a whole one.
        count = super().write(view)
        self.checksums.update(view)
        return count


class _ChecksummingFileSystem(FileSystem):
    """torch's access to files, with the checksums of every new one by its name."""

    def __init__(self) -> None:
        self.written: dict[str, Checksums] = {}
        self.error: OSError | None = None
        """The first one: torch's zip writer reports only that a position is not the expected one."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A file to write."""
        assert mode == "wb", mode
        try:
            stream = _ChecksummedFile(Path(path))
            try:
                yield _Noting(stream, self)
            finally:
                stream.close()
        except OSError as error:
            self.error = self.error or error
            raise
        self.written[Path(path).name] = stream.checksums

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file that was written."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _Noting(io.IOBase):
    """A stream whose first error is noted before torch can replace it with its own."""

    def __init__(self, stream: _ChecksummedFile, owner: _ChecksummingFileSystem) -> None:
        self._stream, self._owner = stream, owner

    def write(self, data: Any) -> int:
        if self._owner.error is not None:
            # torch's zip writer writes its end after an error, too; what follows must not look like success.
            raise self._owner.error
        try:
            return self._stream.write(data)
        except OSError as error:
            self._owner.error = error
            raise

    def flush(self) -> None:
        if not self._stream.closed and self._owner.error is None:
            self._stream.flush()

    def tell(self) -> int:
        return self._stream.tell()

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


def without_zip_checksums() -> AbstractContextManager[None]:
    """Within it torch.save computes no CRC-32 of its own, at 0.26 GB/s of a core: three quarters of all the work.

    The manifest has one of every byte, by zlib, and is what a resume reads.
    """
    unchecked: AbstractContextManager[None] = serialization.patch("save.compute_crc32", False)
    return unchecked


def writing_threads(world: World) -> int:
    """That write, a file each: one does about 1 GB/s, and the step beside it wants its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // world.local_size // 4))


def _write_shards(
    state: dict[str, Any], beside: Path, world: World, group: dist.ProcessGroup | None
) -> dict[str, Checksums]:
    """This rank's files. Raises NotSaved on every rank alike: torch's own collectives carry each one's error."""
    on_host = all(not tensor.is_cuda for part in state.values() if isinstance(part, dict)
                  for tensor in part.values() if isinstance(tensor, torch.Tensor))  # fmt: skip
    # Copying ahead is for tensors on a GPU. For those in host memory it would wait for the GPU's training step.
    writer = FileSystemWriter(
        beside, thread_count=writing_threads(world), per_thread_copy_ahead=0 if on_host else 2**26
    )
    writer.fs = files = _ChecksummingFileSystem()
    failed: CheckpointException | None = None
    try:
        with without_zip_checksums():
            state_dict_saver.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failed = error
    if failed is not None:

        def raise_own() -> None:
            if files.error is not None:
                raise files.error

        _together(raise_own, group)  # raises where it was a file system's error
        rank, (error, _) = next(iter(failed.failures.items()))
        raise NotSaved(f"rank {rank}: {type(error).__name__}: {error}") from failed
    return files.written


def _as_on_disk(folder: Path, written: dict[str, Checksums]) -> dict[str, Any]:
    """The manifest's entries of this rank's files. Raises OSError where one is not as long as what was written."""
    entries = {}
    for name, checksums in written.items():
        entries[name] = checksums.entry()
        size = (folder / name).stat().st_size
        if size != checksums.size:
            raise OSError(f"{name} has {size} bytes on the disk, {checksums.size} were written")
    return entries


def _write_own(
    own: OwnFiles, beside: Path, world: World, group: dist.ProcessGroup | None
) -> list[dict[str, FileEntry]]:
    """The files of another stack, and the manifest's entries of each. Raises NotSaved on every rank alike."""
    folder = beside / STACK_FOLDER
    _together(lambda: folder.mkdir() if world.is_first else None, group)
    _together(lambda: own.write(folder), group)
    # What rank 0 sees, not each its own: on a network file system the others may see less for a while.
    names = _together(lambda: _files_in(beside, folder) if world.is_first else [], group)[0]
    # Its writers know no checksums, so each rank reads a part of the files again, from the page cache on one node.
    mine = names[world.rank :: world.size]
    return _together(lambda: {name: _entry_of(beside / name) for name in mine}, group)


def _files_in(beside: Path, folder: Path) -> list[str]:
    return sorted(str(path.relative_to(beside)) for path in folder.rglob("*") if path.is_file())


def _entry_of(path: Path) -> FileEntry:
    """Of a file that is there: its size and checksums, and on the disk afterwards."""
    checksums = Checksums()
    with path.open("rb", buffering=0) as stream:
        while data := stream.read(_READ_BYTES):
            checksums.update(memoryview(data))
        os.fsync(stream.fileno())
    return checksums.entry()


def _clear(beside: Path) -> None:
    """Remove what a process left that was killed while writing or deleting."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    for left in {beside, *beside.parent.glob("*.old.tmp")}:
        if left.exists():
            shutil.rmtree(left)
    beside.mkdir()


def _publish(manifest: Manifest, beside: Path, final: Path) -> None:
    """Rename a fully written folder into place."""
    manifest.write(beside)
    _sync(beside)
    if final.exists():
        # The step was saved before, and passed over by a resume. A folder cannot be renamed onto another;
        # between these two renames there is none of this step, and never a partial one.
        replaced = aside(final)
        beside.rename(final)
        shutil.rmtree(replaced)
    else:
        beside.rename(final)
    _sync(final.parent)


def _sync(folder: Path) -> None:
    """Have the folder's entries on the disk: a rename that survives a power cut must not name lost files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
