"""Every command of every README works as it is printed: each ```bash block runs in a copy of the tree.

Blocks of one file run in order in the same copy, so that a later one may use what an earlier one made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.box.paths import packages_root
from launcher.recipes import recipe_files
from tests.docs.blocks import Block, Command, blocks, commands, problems
from tests.docs.sandbox import Sandbox, files_of, make_sandbox

ROOT = Path(__file__).resolve().parents[2]
SECONDS_EACH = 300
"""Longest that one command of a README may take; a reader is told of longer ones, and they are marked."""

DOCUMENTS = [name for name in files_of(ROOT) if Path(name).name in ("README.md", "CONTRIBUTING.md")]
BLOCKS = [block for name in DOCUMENTS for block in blocks((ROOT / name).read_text(), name)]
RUN_HERE = [block for block in BLOCKS if not block.marked]
MARKED = [block for block in BLOCKS if block.marked]


@pytest.fixture(scope="session")
def sandbox_for(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Sandbox]]:
    """One copy of the tree per document; one home, and in it one box, for all of them.

    A document that starts the box itself finds none; the others find it up, as a reader would.
    """
    home = tmp_path_factory.mktemp("home")
    # Slurm's packages are downloaded once for a machine, not once for a test.
    (home / "cache").mkdir()
    packages_root().mkdir(parents=True, exist_ok=True)
    (home / "cache" / "slurm").symlink_to(packages_root())
    made: dict[str, Sandbox] = {}

    def get(document: str) -> Sandbox:
        if document not in made:
            made[document] = make_sandbox(ROOT, tmp_path_factory.mktemp("docs"), home)
            text = "\n".join(block.text for block in RUN_HERE if block.file == document)
            if re.search(r"\bbox up\b|\bdemo\b", text):
                must_run(made[document], "python -m launcher box down")
            elif re.search(r"\bcluster=box\b|\bbox (shell|status)\b", text):
                must_run(made[document], "python -m launcher box up")
        return made[document]

    yield get
    for sandbox in list(made.values())[:1]:
        must_run(sandbox, "python -m launcher box down --all")


def must_run(sandbox: Sandbox, line: str) -> None:
    """Run what the documents take for granted."""
    failure = sandbox.run([Command(0, line)], SECONDS_EACH)
    assert failure is None, str(failure)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", RUN_HERE, ids=lambda block: block.name)
def test_commands_work_as_printed(block: Block, sandbox_for: Callable[[str], Sandbox]) -> None:
    failure = sandbox_for(block.file).run(commands(block), SECONDS_EACH)
    if failure:
        pytest.fail(f"{block.file}, {failure}", pytrace=False)


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
