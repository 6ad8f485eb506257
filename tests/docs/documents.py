"""The documents whose commands are tests, and the test that runs them: each ```bash block in a copy of the tree.

A document has a test module of its own, because pytest-xdist gives a worker whole files (`--dist=loadfile`), and all
documents in one file would be what the other workers wait for in the end. Blocks of one document run in order in the
same copy, so that a later one may use what an earlier one made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.blocks import Block, blocks, commands
from tests.docs.sandbox import Sandbox, files_of

ROOT = Path(__file__).resolve().parents[2]
SECONDS_EACH = 600
"""Longest that one command of a document may take, on a machine that is busy with other tests: three times what has
been seen."""

DOCUMENTS = [name for name in files_of(ROOT) if Path(name).name in ("README.md", "CONTRIBUTING.md")]


def blocks_of(document: str) -> list[Block]:
    """Every ```bash block of a document, in order; the document's name is its path from the root."""
    return blocks((ROOT / document).read_text(), document)


def commands_of(document: str) -> Callable[..., None]:
    """The test of a document, for its module: every command works as it is printed."""

    @pytest.mark.timeout(3 * SECONDS_EACH)
    @pytest.mark.parametrize(
        "block", [block for block in blocks_of(document) if not block.marked], ids=lambda block: block.name
    )
    def test_commands_work_as_printed(block: Block, sandbox_for: Callable[[str], Sandbox]) -> None:
        failure = sandbox_for(block.file).run(commands(block), SECONDS_EACH)
        if failure:
            pytest.fail(f"{block.file}, {failure}", pytrace=False)

    return test_commands_work_as_printed
