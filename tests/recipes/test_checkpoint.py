"""Checkpoints: complete or invisible, and a run that goes on from one is the run that never stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from recipes.lib import checkpoint, manifest, saving, writing
from recipes.lib.checkpoint import CheckpointMismatch, Progress, Trained
from recipes.lib.distributed import World, alone, joined
from tests.recipes.parity import SAVED_AGAIN_AT, SAVED_AT, STEPS, Case, Outcome, launch, make_data, run_cases

# The first test waits for every process of the file: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(1800)

UNEVEN = {"batch_size": 6, "microbatch_size": 1}
OTHER_WEIGHTS = {**UNEVEN, "seed": 1}
"""Arguments of the cases that load: whatever the checkpoint does not bring back shows."""


def leaving(name: str, technique: str, world_size: int, **args: object) -> Case:
    """A case that trains all steps and leaves a checkpoint on the way."""
    return Case(name, technique, world_size, args={**UNEVEN, **args}, tied=True, save=True)


def going_on(name: str, technique: str, world_size: int, load: str, **args: object) -> Case:
    """A case that begins with the checkpoint of another."""
    return Case(name, technique, world_size, args={**OTHER_WEIGHTS, **args}, tied=True, load=load)


GRID = {"tensor_parallel": 2, "context_parallel": 2}

AT_THE_SAME_SIZE = [
    going_on("one-to-one", "baseline", 1, "one"),
    going_on("ddp2-to-ddp2", "ddp", 2, "ddp2"),
    going_on("zero2-to-zero2", "ddp", 2, "zero2", optimizer_sharding=True),
    going_on("half2-to-half2", "ddp", 2, "half2", dtype="float16"),
    going_on("fsdp4-to-fsdp4", "fsdp", 4, "fsdp4"),
    going_on("fsdp4-to-fsdp4-float32", "fsdp", 4, "fsdp4-float32", dtype="float32"),
    going_on("hybrid4-to-hybrid4", "fsdp", 4, "hybrid4", strategy="hybrid_shard", shard_size=2),
    going_on("offload4-to-offload4", "fsdp", 4, "offload4", cpu_offload=True),
    going_on("grid4-to-grid4", "fsdp", 4, "grid4", **GRID),
    going_on("disk4-to-disk4", "fsdp", 4, "disk4", optimizer_folder=tempfile.gettempdir()),
]
AT_ANOTHER_SIZE = [
    going_on("one-to-fsdp4", "fsdp", 4, "one"),
    going_on("zero2-to-zero4", "ddp", 4, "zero2", optimizer_sharding=True),
    going_on("zero2-to-fsdp4", "fsdp", 4, "zero2"),
    going_on("fsdp4-to-zero2", "ddp", 2, "fsdp4", optimizer_sharding=True),
    going_on("zero2-to-one", "baseline", 1, "zero2"),
    going_on("ddp2-to-fsdp4", "fsdp", 4, "ddp2"),
    dataclasses.replace(going_on("fsdp4-to-fsdp2", "fsdp", 2, "fsdp4"), save=True),
    going_on("fsdp4-to-ddp2", "ddp", 2, "fsdp4"),
    going_on("hybrid4-to-fsdp2", "fsdp", 2, "hybrid4"),
    going_on("offload4-to-fsdp4", "fsdp", 4, "offload4"),
    going_on("fsdp4-to-one", "baseline", 1, "fsdp4"),
    going_on("fsdp2-to-fsdp3", "fsdp", 3, "fsdp4-to-fsdp2"),
    going_on("ddp2-to-one", "baseline", 1, "ddp2"),
    going_on("one-to-grid4", "fsdp", 4, "one", **GRID),
    going_on("fsdp4-to-tensor4", "fsdp", 4, "fsdp4", tensor_parallel=2),
    going_on(
        "grid4-to-hybrid4", "fsdp", 4, "grid4", strategy="hybrid_shard", shard_size=2, tensor_parallel=2
    ),
    going_on("grid4-to-disk4", "fsdp", 4, "grid4", optimizer_folder=tempfile.gettempdir()),
    going_on("disk4-to-context4", "fsdp", 4, "disk4", context_parallel=2),
    going_on("grid4-to-ddp2", "ddp", 2, "grid4"),
    going_on("grid4-to-one", "baseline", 1, "grid4"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What every case computed. The order of the launches has each checkpoint written before it is read."""
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    make_data(folder / "data")
    cases = [*AT_THE_SAME_SIZE, *AT_ANOTHER_SIZE]
    from_four = [case for case in cases if case.load in ("fsdp4", "hybrid4", "offload4", "grid4")]
    early = [case for case in cases if case not in from_four]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with alone("cpu") as world:
        found = run_cases(folder, [leaving("one", "baseline", 1)], world)
        found |= run_cases(folder, [case for case in early if case.name == "one-to-one"], world)
    in_two = [
        leaving("ddp2", "ddp", 2),
        leaving("zero2", "ddp", 2, optimizer_sharding=True),
        leaving("half2", "ddp", 2, dtype="float16"),
    ]
    found |= launch(folder, 2, [*in_two, *(c for c in early if c.world_size == 2)])
    in_four = [
        leaving("fsdp4", "fsdp", 4),
        leaving("fsdp4-float32", "fsdp", 4, dtype="float32"),
        leaving("hybrid4", "fsdp", 4, strategy="hybrid_shard", shard_size=2),
        leaving("offload4", "fsdp", 4, cpu_offload=True),
        leaving("grid4", "fsdp", 4, **GRID),
        leaving("disk4", "fsdp", 4, optimizer_folder=tempfile.gettempdir()),
    ]
    found |= launch(folder, 4, [*in_four, *(c for c in cases if c.world_size == 4)])
    found |= launch(folder, 2, [c for c in from_four if c.world_size == 2])
    found |= launch(folder, 3, [c for c in cases if c.world_size == 3])
    with joined("cpu") as world:
        last = [c for c in cases if c.world_size == 1 and c.name not in found]
        found |= run_cases(folder, last, world)
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("case", AT_THE_SAME_SIZE, ids=lambda case: case.name)
def test_goes_on_bit_for_bit_at_the_same_world_size(case: Case, outcomes: dict[str, Outcome]) -> None:
    resumed, straight = outcomes[case.name], outcomes[case.load]
    assert resumed.weights_before != straight.weights_before
    assert resumed.losses == straight.losses[SAVED_AT:]
    assert resumed.grad_norms == straight.grad_norms[SAVED_AT:]
    assert resumed.weights_after == straight.weights_after


@pytest.mark.parametrize("case", AT_THE_SAME_SIZE, ids=lambda case: case.name)
def test_every_rank_gets_its_own_random_state_back(case: Case, outcomes: dict[str, Outcome]) -> None:
    resumed, straight = outcomes[case.name], outcomes[case.load]
    assert resumed.random == straight.random
    assert len({tuple(numbers) for numbers in resumed.random}) == case.world_size


@pytest.mark.parametrize("case", AT_ANOTHER_SIZE, ids=lambda case: case.name)
def test_goes_on_in_another_world_size_and_technique(case: Case, outcomes: dict[str, Outcome]) -> None:
    """Only the order of summation changes: 1e-12 relative in float64."""
    resumed, straight = outcomes[case.name], outcomes[case.load]
    steps = len(resumed.losses)
    assert steps == STEPS - (SAVED_AGAIN_AT if case.name == "fsdp2-to-fsdp3" else SAVED_AT)
    assert resumed.losses == pytest.approx(straight.losses[-steps:], rel=1e-12)
    assert resumed.grad_norms == pytest.approx(straight.grad_norms[-steps:], rel=1e-12)


@pytest.fixture
def trained() -> Trained:
    """A model so small that only the folder matters."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return Trained(model, optimizer, {"batch_size": 8, "data": "abc"})


ONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def world() -> World:
    """One process without torch.distributed."""
    return ONE


def newest(run_directory: Path, world: World) -> Path | None:
    """The checkpoint that a resume goes on from, without any passed over."""
    folder, passed_over = checkpoint.newest(run_directory, world)
    assert passed_over == []
    return folder


def test_the_newest_complete_checkpoint_counts(tmp_path: Path, trained: Trained, world: World) -> None:
    assert newest(tmp_path, world) is None
    for step in (90, 100):
        saving.save(tmp_path, trained, Progress(step=step), world)
    for name in ("step-00000110.tmp", "step-00000120.old.tmp", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest(tmp_path, world) == tmp_path / "checkpoints" / "step-00000100"


def test_progress_comes_back(tmp_path: Path, trained: Trained, world: World) -> None:
    progress = Progress(step=7, tokens=7 * 2048, sequences=56, best_loss=2.5)
    folder = saving.save(tmp_path, trained, progress, world)
    assert folder == newest(tmp_path, world)
    assert checkpoint.load(folder, trained, world) == progress


def test_a_save_that_is_killed_stays_invisible(
    tmp_path: Path, trained: Trained, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = saving.save(tmp_path, trained, Progress(step=1), world)

    def killed(*args: object, storage_writer: FileSystemWriter, **kwargs: object) -> None:
        (Path(storage_writer.path) / "__7_0.distcp").write_bytes(b"half, by an eighth rank")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.state_dict_saver, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            saving.save(tmp_path, trained, Progress(step=2), world)
    assert (tmp_path / "checkpoints" / "step-00000002.tmp" / "__7_0.distcp").exists()
    assert newest(tmp_path, world) == first
    second = saving.save(tmp_path, trained, Progress(step=2), world)
    assert checkpoint.load(second, trained, world) == Progress(step=2)
    assert not (second / "__7_0.distcp").exists()
    assert sorted(entry.name for entry in second.parent.iterdir()) == ["step-00000001", "step-00000002"]


def shorten(folder: Path) -> str:
    """Cut the tail off the file of tensors, as a copy that ran out of space does."""
    file = folder / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    return "__0_0.distcp has"


def remove_file(folder: Path) -> str:
    """Lose a file."""
    (folder / ".metadata").unlink()
    return ".metadata is missing"


def flip_a_byte(folder: Path) -> str:
    """Change one bit in the middle of the tensors."""
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "__0_0.distcp is corrupt"


def remove_manifest(folder: Path) -> str:
    """Lose the manifest."""
    (folder / manifest.MANIFEST_FILE).unlink()
    return "manifest.json is missing"


def tear_manifest(folder: Path) -> str:
    """Keep half of the manifest."""
    file = folder / manifest.MANIFEST_FILE
    file.write_text(file.read_text()[:50])
    return "manifest.json cannot be read"


DAMAGES = [shorten, remove_file, flip_a_byte, remove_manifest, tear_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unsound_checkpoint_is_passed_over_and_stays(
    damage: Callable[[Path], str], tmp_path: Path, trained: Trained, world: World
) -> None:
    first, second = (saving.save(tmp_path, trained, Progress(step=step), world) for step in (1, 2))
    problem = damage(second)
    files = sorted(second.iterdir())
    found, passed_over = checkpoint.newest(tmp_path, world)
    assert found == first
    assert len(passed_over) == 1
    assert str(passed_over[0]).startswith(f"step-00000002 is passed over: {problem}")
    assert sorted(second.iterdir()) == files


def test_a_run_does_not_silently_begin_again(tmp_path: Path, trained: Trained, world: World) -> None:
    shorten(saving.save(tmp_path, trained, Progress(step=1), world))
    with pytest.raises(
        CheckpointMismatch, match=r"none of the 1 checkpoints .* is sound .*start another run"
    ):
        checkpoint.newest(tmp_path, world)


def test_a_newer_versions_checkpoint_is_refused(tmp_path: Path, trained: Trained, world: World) -> None:
    saving.save(tmp_path, trained, Progress(step=1), world)
    folder = saving.save(tmp_path, trained, Progress(step=2), world)
    file = folder / manifest.MANIFEST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99, "new": True}))
    with pytest.raises(CheckpointMismatch, match=r"newer version \(format 99, this one reads 1\)"):
        checkpoint.newest(tmp_path, world)


def test_another_stacks_checkpoint_is_refused(tmp_path: Path, trained: Trained, world: World) -> None:
    folder = saving.save(tmp_path, trained, Progress(step=2), world)
    file = folder / manifest.MANIFEST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "stack": "megatron"}))
    with pytest.raises(CheckpointMismatch, match=r"was written by megatron"):
        checkpoint.load(folder, trained, world)


def test_checksums_cover_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the writer cuts its writes; and the parts of the ranks are together the whole."""
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 10)
    content = bytes(range(35))
    sums = manifest.Checksums()
    for start, end in ((0, 3), (3, 10), (10, 31), (31, 35)):
        sums.update(memoryview(content[start:end]))
    assert sums.entry().crc32 == tuple(f"{zlib.crc32(content[at : at + 10]):08x}" for at in (0, 10, 20, 30))
    described = Trained(torch.nn.Linear(1, 1), None, {}).description(1, ONE)
    described = dataclasses.replace(described, files={"a": sums.entry()})
    (tmp_path / "a").write_bytes(content)
    manifest.check_blocks(tmp_path, described)
    for position in range(35):
        damaged = bytearray(content)
        damaged[position] ^= 128
        (tmp_path / "a").write_bytes(damaged)
        finders = []
        for part in range(3):
            try:
                manifest.check_blocks(tmp_path, described, part, 3)
            except manifest.Unsound:
                finders.append(part)
        assert finders == [position // 10 % 3]


def test_a_step_that_is_saved_again_replaces_the_first(
    tmp_path: Path, trained: Trained, world: World
) -> None:
    saving.save(tmp_path, trained, Progress(step=1, tokens=1), world)
    folder = saving.save(tmp_path, trained, Progress(step=1, tokens=2), world)
    assert checkpoint.load(folder, trained, world).tokens == 2
    assert [entry.name for entry in folder.parent.iterdir()] == ["step-00000001"]


def test_another_runs_checkpoint_is_refused(tmp_path: Path, trained: Trained, world: World) -> None:
    folder = saving.save(tmp_path, trained, Progress(step=1), world)
    other = Trained(trained.model, trained.optimizer, {"batch_size": 16, "data": "abc"})
    with pytest.raises(CheckpointMismatch, match=r"batch_size=8, this run has batch_size=16"):
        checkpoint.load(folder, other, world)
