"""A stack that is not torch's own and writes its own files: how it is imported, and how they get into a checkpoint."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

STACK_FOLDER = "stack"
"""Of a checkpoint, where such a stack has its files. Beside it are the progress and the random states, as ever."""


@contextmanager
def needs(environment: str) -> Iterator[None]:
    """Around the imports of a stack, which only its own environment has; without it, one line and exit status 2."""
    try:
        with warnings.catch_warnings():
            # Of what is not installed beside it, and of names that will be others one day.
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        if os.environ.get("RANK", "0") == "0":
            way = f"python -m launcher env install {environment} makes a Python that has it"
            print(f"error: {error.name} is not installed here: {way}", file=sys.stderr)
        raise SystemExit(2) from None


@runtime_checkable
class OwnFiles(Protocol):
    """A technique whose stack has a format of its own for checkpoints."""

    @property
    def stack(self) -> str:
        """Who can read the files; the manifest says it, and other recipes refuse them by it."""

    def size(self) -> int:
        """Bytes that all ranks together are about to write, roughly."""

    def write(self, folder: Path) -> None:
        """Write model and optimizer into an empty folder, on the disk when this returns; all ranks call it together."""

    def read(self, folder: Path) -> None:
        """Fill model and optimizer from what `write` wrote; all ranks call it together."""
