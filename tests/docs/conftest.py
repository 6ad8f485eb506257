"""A reader's machine for the documents of one test module: a home, and in it one box."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.box.paths import packages_root
from tests.docs.blocks import Command
from tests.docs.documents import ROOT, SECONDS_EACH, blocks_of
from tests.docs.sandbox import Sandbox, make_sandbox


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all readers of this session share, whichever worker runs their documents."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "readers"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def sandbox_for(
    tmp_path_factory: pytest.TempPathFactory, shared_folder: Path
) -> Iterator[Callable[[str], Sandbox]]:
    """One copy of the tree per document, in a home of this module's own: two modules may run at once.

    A document that starts the box itself finds none; the others find it up, as a reader would.
    """
    home = tmp_path_factory.mktemp("home")
    (home / "cache").mkdir()
    # Slurm's packages are downloaded once for a machine, not once for a test.
    packages_root().mkdir(parents=True, exist_ok=True)
    (home / "cache" / "slurm").symlink_to(packages_root())
    # What takes a while to make and is the same for every reader: the corpus, which whoever comes first prepares
    # under a lock, and matplotlib's list of fonts.
    for name, there in (("cache/tokens", "tokens"), (".cache", "user-cache")):
        (shared_folder / there).mkdir(exist_ok=True)
        (home / name).symlink_to(shared_folder / there)
    made: dict[str, Sandbox] = {}

    def get(document: str) -> Sandbox:
        if document not in made:
            made[document] = make_sandbox(ROOT, tmp_path_factory.mktemp("docs"), home)
            text = "\n".join(block.text for block in blocks_of(document) if not block.marked)
            if not re.search(r"\bbox up\b|\bdemo\b", text) and re.search(
                r"\bcluster=box\b|\bbox (shell|status)\b", text
            ):
                must_run(made[document], "python -m launcher box up")
        return made[document]

    yield get
    for sandbox in list(made.values())[:1]:
        must_run(sandbox, "python -m launcher box down --all")


def must_run(sandbox: Sandbox, line: str) -> None:
    """Run what the documents take for granted."""
    failure = sandbox.run([Command(0, line)], SECONDS_EACH)
    assert failure is None, str(failure)
