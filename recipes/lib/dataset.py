"""Batches for training: a pure function of the step, so that a resumed run goes on exactly where it stopped.

The order of the sequences is a pseudo-random permutation that is computed, not stored, and does not know
how many ranks there are: the same steps train on the same sequences on one GPU and on a thousand.

Suffixes of tensor names: B sequences of one rank, S tokens of a sequence.
"""

from __future__ import annotations

import pickle
import socket
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from recipes.lib.arguments import ArgumentError
from recipes.lib.distributed import SECONDS_UNTIL_VISIBLE
from recipes.lib.permutation import permuted
from recipes.lib.prepare import prepare
from recipes.lib.shards import TokenShards, UnreadableShards
from recipes.lib.tokenizer import Tokenizer, load_tokenizer


class DataError(Exception):
    """The prepared data is not the same on every rank; the message says where and why."""


class Dataset:
    """Sequences of tokens in a shuffled order that depends on nothing but the data and the seed."""

    def __init__(self, shards: TokenShards, *, sequence_length: int, seed: int) -> None:
        """A view of `shards`. Raises ArgumentError where they hold not even one sequence."""
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.sequences = (len(shards) - 1) // sequence_length
        if self.sequences < 1:
            problem = f"the data has {len(shards)} tokens; wants {len(shards) - 1} or less"
            raise ArgumentError("sequence_length", sequence_length, problem)

    @classmethod
    def open(
        cls,
        data: str,
        *,
        sequence_length: int,
        seed: int,
        cache_dir: str | Path | None = None,
        init_from: str = "",
        group: dist.ProcessGroup | None = None,
    ) -> Dataset:
        """The dataset that `data=…` and `init_from=…` name; all ranks call this together.

        Rank 0 prepares it under CACHE_DIR where that has not been done, the others wait, and all of them
        make sure that they see the same tokens. Without torch.distributed the process does it alone.
        `group` is the group of all ranks to wait on, if not the default one: its timeout must allow for the
        preparation.

        Raises ArgumentError for wrong arguments and DataError where the ranks do not see the same data: the
        same error on every rank, so that none is left waiting for another.
        """
        if dist.is_available() and dist.is_initialized():
            shards = _open_together(data, init_from, cache_dir, group)
        else:
            shards = TokenShards(prepare(data, init_from=init_from, cache_dir=cache_dir))
        return cls(shards, sequence_length=sequence_length, seed=seed)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that a token can have."""
        return self.shards.index.vocab_size

    @property
    def fingerprint(self) -> str:
        """Decides every batch, with the seed and the sizes. A run must not change it midway."""
        return self.shards.index.content

    @property
    def folder(self) -> Path:
        """Where the shards are, with the tokenizer.json that made them."""
        return self.shards.folder

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this data."""
        return load_tokenizer(self.folder)

    def batch(
        self, step: int, rank: int, world_size: int, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs_BS and targets_BS (int64, on the CPU) of one rank at one step, both counted from 0.

        `batch_size` counts the sequences of all ranks together; the ranks' shares are neighbouring rows of
        that batch and differ by at most one, so a rank has none where there are more ranks than sequences.
        Targets are the inputs one token later.
        """
        rows = rank_rows(rank, world_size, batch_size)
        positions = step * batch_size + np.arange(rows.start, rows.stop)
        tokens_BS = np.empty((len(rows), self.sequence_length + 1), np.int64)
        for row, sequence in enumerate(self._shuffled(positions)):
            tokens_BS[row] = self.shards.read(int(sequence) * self.sequence_length, self.sequence_length + 1)
        tokens = torch.from_numpy(tokens_BS)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _shuffled(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """The sequence at each position of the endless order, in which every epoch is a new permutation."""
        epochs, within = np.divmod(positions, self.sequences)
        sequences = np.empty(len(positions), np.uint64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            sequences[chosen] = permuted(
                within[chosen].astype(np.uint64), self.sequences, seed=self.seed, epoch=int(epoch)
            )
        return sequences


def rank_rows(rank: int, world_size: int, batch_size: int) -> range:
    """Which rows of a batch of `batch_size` sequences are a rank's."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def _open_together(
    data: str, init_from: str, cache_dir: str | Path | None, group: dist.ProcessGroup | None
) -> TokenShards:
    """What `Dataset.open` promises: one prepares, all see the same, or all raise the same error."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    prepared: list[tuple[Path, str] | Exception | None] = [None]
    if rank == 0:
        try:
            folder = prepare(data, init_from=init_from, cache_dir=cache_dir)
            prepared = [(folder, TokenShards(folder).index.content)]
        except Exception as error:  # noqa: BLE001 - every rank raises it below, so that none waits for rank 0
            prepared = [_sendable(error)]
    dist.broadcast_object_list(prepared, src=0, group=group)
    result = prepared[0]
    if isinstance(result, Exception):
        raise result
    assert result is not None
    shards, problem = _look(*result)
    problems: list[tuple[str, str] | None] = [None] * world_size
    dist.all_gather_object(problems, problem and (socket.gethostname(), problem), group=group)
    found = [(number, *entry) for number, entry in enumerate(problems) if entry]
    if found:
        number, node, problem = found[0]
        more = f" ({len(found)} of {world_size} ranks have such a problem)" if len(found) > 1 else ""
        hint = "CACHE_DIR must be a folder on a file system that all nodes share"
        raise DataError(
            f"rank {number} on node {node} does not see what rank 0 prepared: {problem}; {hint}{more}"
        )
    assert shards is not None
    return shards


def _look(folder: Path, content: str) -> tuple[TokenShards | None, str | None]:
    """The shards in `folder`, or else what is wrong with them as this node sees them."""
    until = time.monotonic() + SECONDS_UNTIL_VISIBLE
    while True:
        try:
            shards = TokenShards(folder)
        except UnreadableShards as error:
            if time.monotonic() < until:
                if folder.parent.is_dir():
                    list(
                        folder.parent.iterdir()
                    )  # Opening a directory makes an NFS client ask its server again.
                time.sleep(0.5)
                continue
            return None, str(error)
        if shards.index.content != content:
            return None, f"{folder} holds other tokens there"
        return shards, None


def _sendable(error: Exception) -> Exception:
    """The error itself where it survives being pickled, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception's own __init__ and __reduce__ may raise anything
        return DataError(f"rank 0 could not prepare the data: {type(error).__name__}: {error}")
    return error
