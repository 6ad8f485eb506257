"""Checkpoints: everything that a run needs to go on as if it had not stopped. Complete, or invisible.

Written by torch.distributed.checkpoint: every rank writes its own shards, under the parameters' names, so
that a checkpoint loads into any world size and any technique: FSDP's into DDP, four ranks' into one.

    RUN_DIR/checkpoints/step-00000100.tmp/    being written, or left by a process that was killed
    RUN_DIR/checkpoints/step-00000100/        complete
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from recipes.lib.distributed import World, wait_for_all

_COMPLETE = re.compile(r"step-(\d{8})")
# Flat: the optimizer's state under parameter names instead of per group, which another technique may number
# otherwise.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class CheckpointMismatch(Exception):
    """The checkpoint belongs to another run: going on from it would not continue what it began."""


@dataclass(frozen=True)
class Progress:
    """Where a run is after its last optimizer step. The learning rate is a function of `step`."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on, by all ranks."""
    sequences: int = 0
    """The data cursor: position of the next sequence in the global order."""
    best_loss: float | None = None
    """Lowest loss that was logged."""


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds of the model's side."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    facts: dict[str, Any]
    """What must be equal for the run to go on: data, batch size, … (plain values)."""


def folder_of(run_directory: Path, step: int) -> Path:
    """Where the complete checkpoint of optimizer step `step` is."""
    return run_directory / "checkpoints" / f"step-{step:08d}"


def latest(run_directory: Path) -> Path | None:
    """The complete checkpoint with the highest step; None where there is none."""
    parent = run_directory / "checkpoints"
    if not parent.is_dir():
        return None
    complete = [entry for entry in parent.iterdir() if _COMPLETE.fullmatch(entry.name)]
    return max(complete, key=lambda entry: entry.name, default=None)


def save(run_directory: Path, trained: Trained, progress: Progress, world: World) -> Path:
    """Write the checkpoint of `progress.step`; all ranks call this together. Gives its folder.

    When it returns on any rank, the checkpoint is complete and visible on all of them.
    """
    final = folder_of(run_directory, progress.step)
    beside = final.with_name(f"{final.name}.tmp")
    if world.is_first and beside.exists():
        shutil.rmtree(beside)  # left by a process that was killed while writing
    wait_for_all(world)
    with _quiet_about_one_process():
        state_dict_saver.save(
            _state(trained, progress, world),
            checkpoint_id=beside,
            process_group=world.patient,
            no_dist=world.patient is None,
        )
    wait_for_all(world)
    if world.is_first:
        _publish(beside, final)
    wait_for_all(world)
    return final


def load(folder: Path, trained: Trained, world: World) -> Progress:
    """Fill model, optimizer and random state from a complete checkpoint; all ranks call this together.

    The world size may differ from the one that saved: a rank that had no part in the checkpoint keeps its
    random state. Raises CheckpointMismatch where `trained.facts` differ from the checkpoint's.
    """
    # Facts first: weights of another shape would fail further down with a message about tensors.
    saved = json.loads(_load({"facts": ""}, folder, world)["facts"])
    for name, value in trained.facts.items():
        if saved.get(name) != value:
            raise CheckpointMismatch(
                f"{folder} was trained with {name}={saved.get(name)}, this run has {name}={value}: "
                "set it back, or start another run"
            )
    state = _state(trained, Progress(), world)
    random_key = _random_key(world)
    if random_key not in filesystem.FileSystemReader(folder).read_metadata().state_dict_metadata:
        del state[random_key]
    state = _load(state, folder, world)
    set_state_dict(
        trained.model,
        trained.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_OPTIONS,
    )
    if random_key in state:
        _set_random_state(state[random_key], world)
    return Progress(**json.loads(state["progress"]))


def _load(state: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Fill `state`: tensors in place, other values by replacement. Gives it back."""
    with _quiet_about_one_process():
        state_dict_loader.load(
            state, checkpoint_id=folder, process_group=world.patient, no_dist=world.patient is None
        )
    return state


def _state(trained: Trained, progress: Progress, world: World) -> dict[str, Any]:
    """What is saved: references to the model's and the optimizer's own tensors, nothing is copied.

    Values that are no tensors are JSON or bytes, one key each: torch.distributed.checkpoint takes nested ones
    apart, and a later field would be a missing key in every older checkpoint.
    """
    model, optimizer = get_state_dict(trained.model, trained.optimizer, options=_OPTIONS)
    return {
        "model": model,
        "optimizer": optimizer,
        "facts": json.dumps(trained.facts),
        "progress": json.dumps(asdict(progress)),
        _random_key(world): _random_state(world),
    }


@contextmanager
def _quiet_about_one_process() -> Iterator[None]:
    """Without a warning that a recipe on one device saves from one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
        yield


def _publish(beside: Path, final: Path) -> None:
    """Rename a fully written folder into place."""
    _sync(beside)
    if final.exists():
        # The step was saved before (a run with resume=false). A folder cannot be renamed onto another;
        # between these two renames there is none of this step, and never a partial one.
        replaced = final.with_name(f"{final.name}.old.tmp")
        final.rename(replaced)
        beside.rename(final)
        shutil.rmtree(replaced)
    else:
        beside.rename(final)
    _sync(final.parent)


def _sync(folder: Path) -> None:
    """Have the folder's entries on the disk: a rename that survives a power cut must not name lost files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_key(world: World) -> str:
    return f"random_of_rank_{world.rank}"


def _random_state(world: World) -> bytes:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return pickle.dumps(state)


def _set_random_state(pickled: bytes, world: World) -> None:
    state = pickle.loads(pickled)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)
