"""Saving while a run goes on: in the background, announced, limited in number, and no reason to die."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.ch1.baseline import Baseline
from recipes.lib import checkpoint, manifest, metrics, saving, writing
from recipes.lib.arguments import ArgumentError, TrainArgs, convert
from recipes.lib.checkpoint import Progress, Trained
from recipes.lib.distributed import World, joined
from recipes.lib.saving import Saver
from recipes.lib.training import train
from recipes.lib.writing import NotSaved
from tests.recipes.test_training import metrics_of, plan_in

ONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
PARAMETERS = 100_000


@pytest.fixture
def trained() -> Trained:
    """A model of PARAMETERS numbers, and 800 kB of moments."""
    model = torch.nn.Linear(PARAMETERS // 100, 100, bias=False)
    return Trained(model, torch.optim.AdamW(model.parameters()), {"batch_size": 8})


def saver_for(folder: Path, trained: Trained, **settings: Any) -> Saver:
    """A saver that keeps what a test has."""
    settings = {"keep": 9, "keep_every": 0, "in_background": True, "say": lambda text: None, **settings}
    return Saver(folder, trained, ONE, **settings)


def announced(folder: Path) -> list[dict[str, Any]]:
    """The lines of checkpoints.jsonl."""
    return [json.loads(line) for line in (folder / saving.ANNOUNCEMENTS_FILE).read_text().splitlines()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU while it computes")
@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without the wait"])
def test_on_a_gpu_an_update_waits_for_the_copy(tmp_path: Path, waits: bool) -> None:
    """And only so is the checkpoint that of the boundary: 1 GiB is copied for longer than it takes to update it."""
    with joined("cuda") as world:
        model = torch.nn.Linear(2**14, 2**14, bias=False, device=world.device)
        trained = Trained(model, torch.optim.AdamW(model.parameters(), lr=1.0, fused=True), {"batch_size": 8})
        model.weight.grad = torch.ones_like(model.weight)
        trained.optimizer.step()
        with Saver(tmp_path, trained, world, keep=9, keep_every=0, in_background=True) as saver:
            if not waits:
                saver._hook.remove()
            saver.rehearse()
            before = model.weight.detach().clone()
            saver.save(Progress(step=1))
            trained.optimizer.step()
            outcome = saver.wait()
        assert outcome is not None
        assert outcome.event == "saved"
        assert not torch.equal(model.weight, before)
        checkpoint.load(manifest.folder_of(tmp_path, 1), trained, world)
        assert torch.equal(model.weight, before) == waits


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a second GPU, and what happens on the first")
def test_a_copy_from_the_second_gpu_leaves_the_first_alone() -> None:
    """A context on it takes half a GiB for every rank, and fails where the first rank has left none."""
    script = """if True:
        import torch
        from recipes.lib.staging import Stager
        second = torch.device("cuda", 1)
        torch.cuda.set_device(second)
        given = torch.arange(2**20, device=second)
        copied = Stager(second).stage({"given": given}).result()["given"]
        assert torch.equal(copied, given.cpu()), copied
        print([torch._C._cuda_hasPrimaryContext(each) for each in range(2)])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[False, True]\n", done.stderr


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints that have their final name, the oldest first."""
    return sorted(manifest.step_of(found) for found in manifest.folders(folder))


def test_the_state_is_that_of_the_boundary_however_fast_training_goes_on(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved in the background equals what is saved at once, also when the parameters change meanwhile."""
    weight = trained.model.weight
    before = weight.detach().clone()
    really_write = saving.write_checkpoint

    def write_later(*args: Any) -> Any:
        weight.data.add_(1.0)  # the next optimizer step, before a byte is written
        return really_write(*args)

    for name, in_background in (("background", True), ("at-once", False)):
        (tmp_path / name).mkdir()
        with saver_for(tmp_path / name, trained, in_background=in_background) as saver:
            weight.data.copy_(before)
            if in_background:
                monkeypatch.setattr(saving, "write_checkpoint", write_later)
            saver.save(Progress(step=1))
            assert saver.wait() is not None
            monkeypatch.undo()
    found = []
    for name in ("background", "at-once"):
        weight.data.zero_()
        checkpoint.load(manifest.folder_of(tmp_path / name, 1), trained, ONE)
        found.append(weight.detach().clone())
    assert torch.equal(found[0], before)
    assert torch.equal(found[1], before)


def test_every_save_is_announced_when_it_begins_and_when_it_is_safe(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTEMPT", "3")
    said: list[str] = []
    with saver_for(tmp_path, trained, say=said.append) as saver:
        saver.save(Progress(step=4))
    started, saved = announced(tmp_path)
    assert [(line["event"], line["step"], line["attempt"]) for line in (started, saved)] == [
        ("started", 4, 3),
        ("saved", 4, 3),
    ]
    assert saved["bytes"] > 3 * 4 * PARAMETERS
    assert 0 < saved["seconds_blocked"] <= saved["seconds_total"]
    assert saved["time"] >= started["time"]
    assert said[0].startswith("saved step-00000004: ")


def test_the_next_save_waits_for_the_one_before(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, most = 0, 0
    really_write = saving.write_checkpoint

    def write(*args: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        result = really_write(*args)
        under_way -= 1
        return result

    monkeypatch.setattr(saving, "write_checkpoint", write)
    with saver_for(tmp_path, trained) as saver:
        for step in (1, 2, 3):
            saver.save(Progress(step=step))
    assert (most, steps_in(tmp_path)) == (1, [1, 2, 3])


def test_an_error_that_is_not_the_disks_ends_the_run(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("a peer is gone")

    monkeypatch.setattr(saving, "write_checkpoint", broken)
    with pytest.raises(RuntimeError, match="a peer is gone"), saver_for(tmp_path, trained) as saver:
        saver.save(Progress(step=1))


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, 0, [9]), (2, 0, [8, 9]), (2, 3, [3, 6, 8, 9]), (9, 0, [*range(1, 10)])],
)
def test_the_newest_and_every_so_manyth_are_kept(
    keep: int, keep_every: int, left: list[int], tmp_path: Path, trained: Trained
) -> None:
    with saver_for(tmp_path, trained, keep=keep, keep_every=keep_every) as saver:
        for step in range(1, 10):
            saver.save(Progress(step=step))
    assert steps_in(tmp_path) == left
    assert list((tmp_path / "checkpoints").glob("*.tmp")) == []


def test_unsound_checkpoints_neither_count_nor_go(tmp_path: Path, trained: Trained) -> None:
    """With keep=1, a sound checkpoint must not go because of a newer one that cannot be read."""
    with saver_for(tmp_path, trained) as saver:
        for step in (1, 2, 8):
            saver.save(Progress(step=step))
    (manifest.folder_of(tmp_path, 8) / manifest.MANIFEST_FILE).unlink()
    with saver_for(tmp_path, trained, keep=1) as saver:
        saver.save(Progress(step=3))
    assert steps_in(tmp_path) == [3, 8]


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ArgumentError, match="keep=0: wants 1 or more"):
        convert(TrainArgs, {"keep": "0"})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, real: what is written beyond that fails as on any full disk."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_disk_that_fills_up_leaves_the_run_going(
    in_background: bool, small_disk: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_SPARE_BYTES", 0)
    with saver_for(small_disk, trained, in_background=in_background) as saver:
        saver.save(Progress(step=1))
        saver.wait()
        filler = small_disk / "filler"
        filler.write_bytes(bytes(6 * 2**20))
        # As under a quota, which is not seen beforehand.
        monkeypatch.setattr(saver, "_space_problem", lambda needed: None)
        saver.save(Progress(step=2))
        failed = saver.wait()
        assert failed is not None
        assert (failed.event, "No space left on device" in failed.reason) == ("failed", True)
        assert failed.reason.startswith("rank 0: ")
        assert list((small_disk / "checkpoints").glob("*.tmp")) == []
        filler.unlink()
        saver.save(Progress(step=3))
    assert [line["event"] for line in announced(small_disk)] == [
        "started",
        "saved",
        "started",
        "failed",
        "started",
        "saved",
    ]
    assert checkpoint.newest(small_disk, ONE) == (manifest.folder_of(small_disk, 3), [])


def test_space_is_looked_for_before_a_save(small_disk: Path, trained: Trained) -> None:
    with saver_for(small_disk, trained) as saver:
        saver.save(Progress(step=1))
        skipped = saver.wait()
    assert skipped is not None
    assert skipped.event == "skipped", "8 MiB are less than the 16 that are always asked for"
    assert f"{small_disk / 'checkpoints'} has 0.008 GiB free" in skipped.reason
    assert [line["event"] for line in announced(small_disk)] == ["skipped"]


def test_metrics_wait_for_a_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = metrics.Lines(small_disk / "lines.jsonl")
    lines.append({"n": 1})
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**22))
    with filler.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(2**12))
    for number in range(2, 4000):
        lines.append({"n": number})
    filler.unlink()
    lines.append({"n": 4000})
    lines.close()
    found = [json.loads(line)["n"] for line in (small_disk / "lines.jsonl").read_text().splitlines()]
    assert found == list(range(1, 4001))
    assert capsys.readouterr().err.count("No space left on device; lines wait in memory") == 1


def test_a_run_whose_last_checkpoint_is_not_saved_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise NotSaved("rank 0: OSError: no space")

    plan = plan_in(tmp_path, steps=3, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_checkpoint", full)
        with pytest.raises(NotSaved, match="no space"):
            train(plan, Baseline.build(plan))
    assert [line["step"] for line in metrics_of(plan.run_directory)] == [1, 2, 3]
    assert [line["event"] for line in announced(plan.run_directory)] == ["started", "failed"] * 3
    again = plan_in(tmp_path, steps=3, save_every=1)
    assert again.resume_from is None
    train(again, Baseline.build(again))
    assert steps_in(plan.run_directory) == [1, 2, 3]


def test_what_differs_from_what_was_written_is_not_saved(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that loses bytes without an error is found by the size, before the folder gets its name."""
    really_save = writing.state_dict_saver.save

    def losing(*args: Any, **kwargs: Any) -> Any:
        result = really_save(*args, **kwargs)
        with (Path(kwargs["storage_writer"].path) / "__0_0.distcp").open("ab") as stream:
            stream.truncate(10)
        return result

    monkeypatch.setattr(writing.state_dict_saver, "save", losing)
    with pytest.raises(NotSaved, match=r"__0_0.distcp has 10 bytes on the disk"):
        saving.save(tmp_path, trained, Progress(step=1), ONE)
    assert list((tmp_path / "checkpoints").iterdir()) == []
