"""Checkpoints: complete or invisible, and a run that goes on from one is the run that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.lib import checkpoint
from recipes.lib.checkpoint import CheckpointMismatch, Progress, Trained
from recipes.lib.distributed import World, alone, joined
from tests.recipes.parity import SAVED_AT, STEPS, Case, Outcome, launch, make_data, run_cases

# The first test waits for every process of the file: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(900)

UNEVEN = {"batch_size": 6, "microbatch_size": 1}
OTHER_WEIGHTS = {**UNEVEN, "seed": 1}
"""Arguments of the cases that load: whatever the checkpoint does not bring back shows."""


def saving(name: str, technique: str, world_size: int, **args: object) -> Case:
    """A case that trains all steps and leaves a checkpoint on the way."""
    return Case(name, technique, world_size, args={**UNEVEN, **args}, tied=True, save=True)


def going_on(name: str, technique: str, world_size: int, load: str, **args: object) -> Case:
    """A case that begins with the checkpoint of another."""
    return Case(name, technique, world_size, args={**OTHER_WEIGHTS, **args}, tied=True, load=load)


AT_THE_SAME_SIZE = [
    going_on("one-to-one", "baseline", 1, "one"),
    going_on("ddp2-to-ddp2", "ddp", 2, "ddp2"),
    going_on("fsdp4-to-fsdp4", "fsdp", 4, "fsdp4"),
    going_on("fsdp4-to-fsdp4-float32", "fsdp", 4, "fsdp4-float32", dtype="float32"),
    going_on("hybrid4-to-hybrid4", "fsdp", 4, "hybrid4", strategy="hybrid_shard", shard_size=2),
    going_on("offload4-to-offload4", "fsdp", 4, "offload4", cpu_offload=True),
]
AT_ANOTHER_SIZE = [
    going_on("one-to-fsdp4", "fsdp", 4, "one"),
    going_on("ddp2-to-fsdp4", "fsdp", 4, "ddp2"),
    going_on("fsdp4-to-fsdp2", "fsdp", 2, "fsdp4"),
    going_on("fsdp4-to-ddp2", "ddp", 2, "fsdp4"),
    going_on("hybrid4-to-fsdp2", "fsdp", 2, "hybrid4"),
    going_on("offload4-to-fsdp4", "fsdp", 4, "offload4"),
    going_on("fsdp4-to-one", "baseline", 1, "fsdp4"),
    going_on("ddp2-to-one", "baseline", 1, "ddp2"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What every case computed. The order of the launches has each checkpoint written before it is read."""
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    make_data(folder / "data")
    cases = [*AT_THE_SAME_SIZE, *AT_ANOTHER_SIZE]
    from_four = [case for case in cases if case.load.startswith(("fsdp4", "hybrid4", "offload4"))]
    early = [case for case in cases if case not in from_four]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with alone("cpu") as world:
        found = run_cases(folder, [saving("one", "baseline", 1)], world)
        found |= run_cases(folder, [case for case in early if case.name == "one-to-one"], world)
    found |= launch(folder, 2, [saving("ddp2", "ddp", 2), *(c for c in early if c.world_size == 2)])
    in_four = [
        saving("fsdp4", "fsdp", 4),
        saving("fsdp4-float32", "fsdp", 4, dtype="float32"),
        saving("hybrid4", "fsdp", 4, strategy="hybrid_shard", shard_size=2),
        saving("offload4", "fsdp", 4, cpu_offload=True),
    ]
    found |= launch(folder, 4, [*in_four, *(c for c in cases if c.world_size == 4)])
    found |= launch(folder, 2, [c for c in from_four if c.world_size == 2])
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
    assert len(resumed.losses) == STEPS - SAVED_AT
    assert resumed.losses == pytest.approx(straight.losses[SAVED_AT:], rel=1e-12)
    assert resumed.grad_norms == pytest.approx(straight.grad_norms[SAVED_AT:], rel=1e-12)


@pytest.fixture
def trained() -> Trained:
    """A model so small that only the folder matters."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return Trained(model, optimizer, {"batch_size": 8, "data": "abc"})


@pytest.fixture
def world() -> World:
    """One process without torch.distributed."""
    return World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for name in ("step-00000090", "step-00000100", "step-00000110.tmp", "step-00000120.old.tmp", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000100"


def test_progress_comes_back(tmp_path: Path, trained: Trained, world: World) -> None:
    progress = Progress(step=7, tokens=7 * 2048, sequences=56, best_loss=2.5)
    folder = checkpoint.save(tmp_path, trained, progress, world)
    assert folder == checkpoint.latest(tmp_path)
    assert checkpoint.load(folder, trained, world) == progress


def test_a_save_that_is_killed_stays_invisible(
    tmp_path: Path, trained: Trained, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint.save(tmp_path, trained, Progress(step=1), world)

    def killed(*args: object, checkpoint_id: Path, **kwargs: object) -> None:
        checkpoint_id.mkdir()
        (checkpoint_id / "__7_0.distcp").write_bytes(b"half, by an eighth rank")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.state_dict_saver, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, trained, Progress(step=2), world)
    assert checkpoint.latest(tmp_path) == first
    second = checkpoint.save(tmp_path, trained, Progress(step=2), world)
    assert checkpoint.load(second, trained, world) == Progress(step=2)
    assert not (second / "__7_0.distcp").exists()
    assert sorted(entry.name for entry in second.parent.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_step_that_is_saved_again_replaces_the_first(
    tmp_path: Path, trained: Trained, world: World
) -> None:
    checkpoint.save(tmp_path, trained, Progress(step=1, tokens=1), world)
    folder = checkpoint.save(tmp_path, trained, Progress(step=1, tokens=2), world)
    assert checkpoint.load(folder, trained, world).tokens == 2
    assert [entry.name for entry in folder.parent.iterdir()] == ["step-00000001"]


def test_another_runs_checkpoint_is_refused(tmp_path: Path, trained: Trained, world: World) -> None:
    folder = checkpoint.save(tmp_path, trained, Progress(step=1), world)
    other = Trained(trained.model, trained.optimizer, {"batch_size": 16, "data": "abc"})
    with pytest.raises(CheckpointMismatch, match=r"batch_size=8, this run has batch_size=16"):
        checkpoint.load(folder, other, world)
