"""A loss or a gradient that is no number: the step and the rank that made it are named, and nothing is saved after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.lib import manifest
from recipes.lib.finite import Account, NotFinite, blame
from recipes.lib.stopping import OF_THIS_PROCESS
from recipes.lib.training import recipe_main
from tests.recipes.not_finite_worker import CULPRIT, PLACES, STEP, TECHNIQUES
from tests.recipes.parity import make_data

ROOT = Path(__file__).parents[2]
NAN = float("nan")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What each of two ranks said of each case, and the folder with the cases' run directories."""
    folder: Path = tmp_path_factory.mktemp("not-finite")
    make_data(folder / "data")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.recipes.not_finite_worker", str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, said=said)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_step_and_rank_are_named_on_every_rank(ranks: SimpleNamespace, technique: str, place: str) -> None:
    """Two steps later, when somebody looks, every loss of every rank has long been no number."""
    first, second = (each[f"{technique}-{place}"] for each in ranks.said)
    assert first == second
    assert first.startswith(f"step {STEP}: loss ")
    assert (
        f"; first wrong on rank {CULPRIT}: its " in first or f"; first wrong on rank {CULPRIT}: the " in first
    )
    assert ("the loss of its own sequences is nan" if place == "loss" else "its own loss is finite") in first
    assert first.endswith("; the last good checkpoint is step-00000003")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_nothing_is_saved_after_it(ranks: SimpleNamespace, technique: str, place: str) -> None:
    (kept,) = manifest.folders(ranks.folder / f"{technique}-{place}")
    assert kept.name == "step-00000003"
    found = manifest.check_sizes(kept)
    manifest.check_blocks(kept, found)


def test_who_is_to_blame() -> None:
    good, bad_loss, bad_gradient = Account(1.0, True), Account(NAN, False), Account(1.0, False)
    assert blame([good, bad_gradient, bad_loss]).startswith(
        "first wrong on rank 2: the loss of its own sequences is nan"
    )
    assert blame([bad_gradient, good]).startswith("first wrong on rank 0: its own loss is finite")
    assert blame([bad_loss, good, bad_loss]).startswith("first wrong on ranks 0, 2: ")
    assert blame([bad_loss, bad_loss]).startswith("first wrong on all 2 ranks: ")
    assert blame([bad_loss]).startswith("first wrong on rank 0: ")
    assert blame([good, good]).startswith("no rank is to blame")


def test_a_person_gets_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        raise NotFinite("step 4: loss nan")

    monkeypatch.setattr(
        OF_THIS_PROCESS, "listen", lambda: None
    )  # the signals of the process that tests stay its own
    for rank, line in (("0", "error: step 4: loss nan\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            recipe_main(body)()
        assert left.value.code == 1
        assert isinstance(left.value.__cause__, NotFinite), "the launcher records what it is about"
        assert capsys.readouterr().err == line
