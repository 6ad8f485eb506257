"""What a document may look like, that every one has its test, and that what is not run names things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.recipes import recipe_files
from tests.docs.blocks import Block, problems
from tests.docs.documents import DOCUMENTS, ROOT, blocks_of

HERE = Path(__file__).parent
MARKED = [block for document in DOCUMENTS for block in blocks_of(document) if block.marked]


def test_every_document_has_one_module_that_runs_its_commands() -> None:
    texts = [path.read_text() for path in sorted(HERE.glob("test_commands_*.py"))]
    tested = [name for text in texts for name in re.findall(r'commands_of\("([^"]+)"\)', text)]
    assert sorted(tested) == sorted(document for document in DOCUMENTS if blocks_of(document))
    assert [text.count("\ntest_commands_work_as_printed = commands_of(") for text in texts] == [1] * len(
        texts
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_well_formed_and_only_what_cannot_run_is_marked(document: str) -> None:
    assert problems((ROOT / document).read_text(), document) == []


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.name)
def test_commands_that_are_not_run_name_things_that_exist(block: Block) -> None:
    recipes = re.findall(r"\brecipe=(\w+)", block.text)
    modules = re.findall(r"-m ((?:recipes|launcher|checks)[\w.]*)", block.text)
    files = re.findall(r"(?<![\w/])(?:jobs|env|recipes)/[\w/.-]+", block.text)
    assert [name for name in recipes if name not in recipe_files()] == []
    assert [name for name in modules if not _module_exists(name)] == []
    assert [name for name in files if not (ROOT / name).exists()] == []


def _module_exists(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
