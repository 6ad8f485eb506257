"""Stopping on request: whichever rank hears it, all of them save the same step, and nothing of the run is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher import task
from launcher.rendezvous import Rank
from recipes.lib.arguments import ArgumentError
from recipes.lib.stopping import STOP_FILE, STOPPED_EXIT, StopFlag, Stopped
from tests.recipes.parity import make_data
from tests.recipes.stopping_worker import STEPS, STOPPED_IN
from tests.recipes.test_training import metrics_of, start

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have been through everything, and left as stopped recipes do."""
    folder = tmp_path_factory.mktemp("stopping")
    make_data(folder / "data")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.recipes.stopping_worker", str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [STOPPED_EXIT] * RANKS, "\n".join(errors)
    return folder


def seen(folder: Path, name: str) -> list[Any]:
    """What each rank saw of a run."""
    return [json.loads((folder / f"seen-{rank}.json").read_text())[name] for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "technique"), [("signal", "fsdp"), ("file", "ddp")])
def test_all_ranks_save_the_same_step_and_the_run_goes_on_bit_for_bit(
    name: str, technique: str, folder: Path
) -> None:
    assert seen(folder, name) == [[f"75 with [{STOPPED_IN}]", "done"]] * RANKS
    lines, straight = metrics_of(folder / name), metrics_of(folder / f"straight-{technique}")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    for line, expected in zip(lines, straight, strict=True):
        assert (line["loss"], line["grad_norm"]) == (expected["loss"], expected["grad_norm"])


def test_a_run_that_is_stopped_before_its_first_step_saves_nothing(folder: Path) -> None:
    assert seen(folder, "early") == [["75 with []"]] * RANKS
    assert not (folder / "early" / "checkpoints").exists()


def test_a_disk_error_on_one_rank_is_every_ranks_and_the_run_goes_on(folder: Path) -> None:
    assert seen(folder, "broken") == [["done"]] * RANKS
    announced = [
        json.loads(line) for line in (folder / "broken" / "checkpoints.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["event"]) for line in announced] == [
        (2, "started"),
        (2, "failed"),
        (4, "started"),
        (4, "saved"),
        (6, "started"),
        (6, "saved"),
    ]
    assert announced[1]["reason"] == "rank 1: OSError: [Errno 5] Input/output error"
    names = sorted(entry.name for entry in (folder / "broken" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]


def test_every_rank_says_where_it_was_last(folder: Path) -> None:
    for rank in range(RANKS):
        line = json.loads((folder / "signal" / "attempt" / "heartbeat" / f"rank-{rank}").read_text())
        assert (line["step"], line["phase"]) == (STEPS, "done")


def test_agreeing_is_cheap(folder: Path) -> None:
    """Of a step of 100 ms less than 5%, also where other tests have the processor."""
    assert max(seen(folder, "agreement")) < 0.005


def test_a_recipe_exits_with_75_after_sigterm(tmp_path: Path) -> None:
    """The one-device recipe, as a process; the same words resume it."""
    run = tmp_path / "run"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    arguments = ["data=texts", "sequence_length=32", "save_every=0", "device=cpu", "steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.ch1.baseline", *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "CACHE_DIR": str(tmp_path / "cache"),
            "RUN_DIR": str(run),
        },
    )
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(metrics_of(run)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == STOPPED_EXIT
    finally:
        process.kill()
    last = metrics_of(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()
    wrong = start(["recipes.ch1.baseline", f"steps={last + 1}", "batch_size=16"], tmp_path, RUN_DIR=str(run))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "was trained with batch_size=8, this run has batch_size=16" in wrong.stderr


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"reason": "time_limit", "deadline": 1.0, "time": 0.0}', "time_limit"),
        ('{"reason": "a word of a later version"}', "other"),
        ("[1]", "other"),
        ("not JSON", "other"),
    ],
)
def test_that_the_stop_file_exists_is_the_request(text: str, reason: str, tmp_path: Path) -> None:
    flag = StopFlag()
    assert flag.agreed(0, tmp_path) is None
    (tmp_path / STOP_FILE).write_text(text)
    assert flag.agreed(0, tmp_path) == reason
    assert flag.agreed(1, tmp_path) is None, "the other ranks leave the file system alone"


def test_stopping_is_no_error_and_a_one_line_mistake_is_what_it_says(tmp_path: Path) -> None:
    rank = Rank(**{**dict.fromkeys(Rank.__dataclass_fields__, 0), "world_size": 1})
    task._record_error(tmp_path, rank, Stopped())
    assert list(tmp_path.iterdir()) == []
    mistake = SystemExit(2)
    mistake.__cause__ = ArgumentError("steps", 0, "wants 1 or more")
    task._record_error(tmp_path, rank, mistake)
    (record,) = tmp_path.iterdir()
    assert json.loads(record.read_text())["message"] == "steps=0: wants 1 or more"
