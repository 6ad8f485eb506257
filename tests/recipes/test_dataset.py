"""Batches: a function of the step alone, the same for every number of ranks, each sequence once an epoch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.lib.arguments import ArgumentError
from recipes.lib.dataset import Dataset, rank_rows
from recipes.lib.permutation import permuted
from recipes.lib.shards import TokenShards, write_shards

SEQUENCES, LENGTH = 23, 8


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    """Tokens 0, 1, 2 …: a sequence's first token says which one it is."""
    folder = tmp_path / "shards"
    folder.mkdir()
    tokens = list(range(SEQUENCES * LENGTH + 1))
    write_shards(folder, [tokens], vocab_size=4096, separator=0, tokenizer="", corpus="", tokens_per_shard=50)
    return TokenShards(folder)


@pytest.fixture
def dataset(shards: TokenShards) -> Dataset:
    return Dataset(shards, sequence_length=LENGTH, seed=0)


def whole_batch(dataset: Dataset, step: int, world_size: int, batch_size: int) -> torch.Tensor:
    shares = [dataset.batch(step, rank, world_size, batch_size) for rank in range(world_size)]
    return torch.cat([torch.stack(share) for share in shares], dim=1)


def sequences_of(dataset: Dataset, steps: range, batch_size: int) -> list[int]:
    batches = [dataset.batch(step, 0, 1, batch_size)[0] for step in steps]
    return [int(first) // LENGTH for first in torch.cat(batches)[:, 0]]


def test_a_batch_is_neighbouring_tokens_and_its_targets_the_next_ones(dataset: Dataset) -> None:
    inputs_BS, targets_BS = dataset.batch(0, 0, 1, 5)
    assert inputs_BS.shape == targets_BS.shape == (5, LENGTH)
    assert inputs_BS.dtype == targets_BS.dtype == torch.int64
    assert inputs_BS.is_contiguous()
    assert torch.equal(targets_BS, inputs_BS + 1)
    assert torch.equal(inputs_BS, inputs_BS[:, :1] + torch.arange(LENGTH))
    assert torch.equal(inputs_BS[:, 0] % LENGTH, torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_the_batch_is_the_same_for_every_number_of_ranks(dataset: Dataset, batch_size: int) -> None:
    for step in (0, 1, 7, 1000):
        alone = whole_batch(dataset, step, 1, batch_size)
        for world_size in (2, 3, 5, 8, 11):
            assert torch.equal(whole_batch(dataset, step, world_size, batch_size), alone)


def test_shares_differ_by_at_most_one_and_may_be_empty(dataset: Dataset) -> None:
    assert [len(rank_rows(rank, 4, 10)) for rank in range(4)] == [2, 3, 2, 3]
    assert [len(rank_rows(rank, 4, 2)) for rank in range(4)] == [0, 1, 0, 1]
    inputs_BS, targets_BS = dataset.batch(0, 0, 4, 2)
    assert inputs_BS.shape == targets_BS.shape == (0, LENGTH)


def test_every_epoch_holds_every_sequence_once_in_an_order_of_its_own(dataset: Dataset) -> None:
    """With a batch that does not divide the epoch: 23 steps of 7 are 7 epochs with borders within batches."""
    order = sequences_of(dataset, range(SEQUENCES), 7)
    epochs = [tuple(order[start : start + SEQUENCES]) for start in range(0, len(order), SEQUENCES)]
    assert len(epochs) == len(set(epochs)) == 7
    for epoch in epochs:
        assert sorted(epoch) == list(range(SEQUENCES))
        assert epoch != tuple(range(SEQUENCES))


def test_the_seed_decides_the_order_and_nothing_else_does(shards: TokenShards) -> None:
    def order(seed: int) -> tuple[int, ...]:
        return tuple(sequences_of(Dataset(shards, sequence_length=LENGTH, seed=seed), range(1), SEQUENCES))

    assert order(1) == order(1)
    assert len({order(seed) for seed in (0, 1, 2, 2**31, 2**63, 2**64 - 1)}) == 6


def test_the_order_stays_what_it_was_in_earlier_versions(dataset: Dataset) -> None:
    """A resumed run of an older version would silently see some sequences twice and others never."""
    pinned = [22, 10, 16, 0, 15, 19, 4, 8, 11, 7, 21, 20, 5, 1, 2, 13, 18, 12, 9, 17, 6, 3, 14]
    assert sequences_of(dataset, range(1), SEQUENCES) == pinned


def test_a_resumed_run_continues_where_it_stopped(shards: TokenShards, dataset: Dataset) -> None:
    straight = [dataset.batch(step, 0, 1, 4)[0] for step in range(10)]
    resumed = Dataset(shards, sequence_length=LENGTH, seed=0)
    for step in range(6, 10):
        assert torch.equal(resumed.batch(step, 0, 1, 4)[0], straight[step])


def test_data_shorter_than_one_sequence_is_refused(shards: TokenShards) -> None:
    assert Dataset(shards, sequence_length=len(shards) - 1, seed=0).sequences == 1
    with pytest.raises(
        ArgumentError, match=f"sequence_length={len(shards)}: the data has {len(shards)} tokens"
    ):
        Dataset(shards, sequence_length=len(shards), seed=0)


def test_a_permutation_of_any_size_takes_each_value_once() -> None:
    for size in [*range(1, 130), 255, 256, 257, 4096, 100_003]:
        everything = np.arange(size, dtype=np.uint64)
        assert np.array_equal(np.sort(permuted(everything, size, seed=5, epoch=2)), everything)


def test_a_permutation_looks_random() -> None:
    """Where a value goes is even over the range, and neighbours do not stay neighbours."""
    size, epochs = 1000, 200
    everything = np.arange(size, dtype=np.uint64)
    images = np.stack([permuted(everything, size, seed=0, epoch=epoch) for epoch in range(epochs)]).astype(
        int
    )
    # The mean place of each value over 200 epochs: 289/sqrt(200) = 20.4 around 499.5 if they are independent.
    means = images.mean(axis=0)
    assert abs(means.std() - 20.4) < 2
    steps = np.abs(np.diff(images, axis=1))
    assert 0.5 < (steps == 1).mean() / (2 / size) < 2
    assert abs(np.corrcoef(images.ravel()[:-1], images.ravel()[1:])[0, 1]) < 0.01


def test_a_permutation_of_billions_needs_no_memory() -> None:
    size = 10**13
    few = np.array([0, 1, 2, size - 1], np.uint64)
    images = permuted(few, size, seed=0, epoch=0)
    assert len(set(images.tolist())) == 4
    assert images.max() < size


WORLD_SIZE = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `texts`, and room for a cache and results."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "texts").mkdir()
    (folder / "results").mkdir()
    text = " ".join(f"word{number}" for number in range(500))
    (folder / "texts" / "a.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def seen(base: Path) -> list[dict[str, Any]]:
    """What each rank saw in each scenario of dataset_worker.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CACHE_DIR": str(base / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    worker = Path(__file__).with_name("dataset_worker.py")
    command = [sys.executable, str(worker), str(base / "texts"), str(base / "results")]
    processes = [subprocess.Popen(command, env={**common, "RANK": str(rank)}) for rank in range(WORLD_SIZE)]
    assert [process.wait(timeout=120) for process in processes] == [0] * WORLD_SIZE
    files = [base / "results" / f"{rank}.json" for rank in range(WORLD_SIZE)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def test_ranks_prepare_once_and_share_one_batch(seen: list[dict[str, Any]], base: Path) -> None:
    ranks = [each["good"] for each in seen]
    alone = Dataset.open(str(base / "texts"), sequence_length=8, seed=3, cache_dir=base / "cache")
    inputs_BS, targets_BS = alone.batch(5, 0, 1, 4)
    assert {rank["fingerprint"] for rank in ranks} == {alone.fingerprint}
    assert [row for rank in ranks for row in rank["inputs"]] == inputs_BS.tolist()
    assert [row for rank in ranks for row in rank["targets"]] == targets_BS.tolist()
    assert alone.vocab_size == alone.tokenizer().vocab_size


def test_a_mistake_reaches_every_rank_as_the_same_line(seen: list[dict[str, Any]]) -> None:
    line = "data=/nowhere/texts: no folder /nowhere/texts"
    assert [each["missing"] for each in seen] == [{"error": "ArgumentError", "message": line}] * WORLD_SIZE


def test_a_node_that_does_not_see_the_cache_is_named_on_every_rank(seen: list[dict[str, Any]]) -> None:
    assert {each["blind"]["error"] for each in seen} == {"DataError"}
    (message,) = {each["blind"]["message"] for each in seen}
    assert f"rank 2 on node {socket.gethostname()} does not see what rank 0 prepared" in message
    assert "CACHE_DIR must be a folder on a file system that all nodes share" in message
