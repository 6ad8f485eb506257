"""Checkpoints: everything that a run needs to go on as if it had not stopped. Complete, or invisible.

In the format of torch.distributed.checkpoint: every rank has its own shards, under the parameters' names, so
that a checkpoint loads into any world size and any technique: FSDP's into DDP, four ranks' into one. Here is
what a checkpoint holds and how a run goes on from one; `manifest` says whether it is sound, `writing` and
`saving` make them.
"""

from __future__ import annotations

import functools
import json
import pickle
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import filesystem, state_dict_loader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from recipes.lib import manifest
from recipes.lib.distributed import SECONDS_UNTIL_VISIBLE, World, from_first
from recipes.lib.optimizer import own_part
from recipes.lib.stack import STACK_FOLDER, OwnFiles

# Flat: the optimizer's state under parameter names instead of per group, which another technique may number
# otherwise.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
# A recipe on one device saves and loads from one process, and a thread that writes cannot set filters safely.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")


class CheckpointMismatch(Exception):
    """The checkpoint belongs to another run: going on from it would not continue what it began."""


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that nobody goes on from."""

    step: int
    problem: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"step-{self.step:08d} is passed over: {self.problem}"


class NoneSound(CheckpointMismatch):
    """There are checkpoints, and none that a run could go on from."""

    def __init__(self, run_directory: Path, passed_over: list[PassedOver]) -> None:
        self.passed_over = passed_over
        super().__init__(
            f"none of the {len(passed_over)} checkpoints in {run_directory / 'checkpoints'} is sound "
            f"({passed_over[0]}): restore one, or start another run"
        )


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
    technique: dict[str, float] = field(default_factory=dict)
    """What the technique goes on with, such as the number by which a loss is scaled."""


@runtime_checkable
class StateKeeper(Protocol):
    """A technique that knows by itself where model and optimizer are: torch would not find them (ZeRO's buffers)."""

    def checkpoint_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the model and of the optimizer, by the names that `torch_state` would give them; references."""

    def state_was_loaded(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Take over what `checkpoint_state` gave, with its tensors filled in place. All ranks call this together."""


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds of the model's side."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    facts: dict[str, Any]
    """What must be equal for the run to go on: data, batch size, … (plain values)."""
    own: OwnFiles | None = None
    """What writes and reads model and optimizer in its own way; None: torch.distributed.checkpoint does."""
    technique: str = ""
    """The recipe's name."""
    size: dict[str, Any] = field(default_factory=dict)
    """The model's, by the fields of ModelSize."""
    context: int = 0
    """Tokens per sequence."""
    keeper: StateKeeper | None = None
    """Who knows where the state of model and optimizer is; None: torch finds it."""

    @property
    def stack(self) -> str:
        """Who can read the files."""
        return manifest.STACK if self.own is None else self.own.stack

    def description(self, step: int, world: World) -> manifest.Manifest:
        """What the manifest says of the model's side."""
        return manifest.Manifest(
            step=step,
            world_size=world.size,
            technique=self.technique,
            facts=self.facts,
            model=self.size,
            context=self.context,
            torch=str(torch.__version__),
            time=time.time(),
            stack=self.stack,
        )


def newest(run_directory: Path, world: World) -> tuple[Path | None, list[PassedOver]]:
    """The newest sound checkpoint, or None where there is none at all; all ranks call this together.

    Beside it each newer one that was passed over because it is torn or corrupt; nothing is deleted. Every byte
    has been read once, each rank reading its part. Raises, on every rank alike, NoneSound where all are unsound
    (the run would silently begin again), CheckpointMismatch where one was written by a newer version.
    """
    passed_over: list[PassedOver] = []
    # Rank 0 looks for all: on a network file system the ranks may for seconds see different checkpoints.
    for folder in from_first(manifest.folders(run_directory) if world.is_first else [], world):
        problem = _first_problem(folder, world)
        if problem is None:
            return folder, passed_over
        passed_over.append(PassedOver(manifest.step_of(folder), problem))
    if passed_over:
        raise NoneSound(run_directory, passed_over)
    return None, []


def _first_problem(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint by any rank's look; None where all of them found it sound."""
    problem = _problem_of(functools.partial(manifest.check_sizes, folder)) if world.is_first else None
    problem = from_first(problem, world)
    if problem is None:
        problems = [_problem_of(functools.partial(_look, folder, world))]
        if world.size > 1:
            (mine,) = problems
            problems = [None] * world.size
            dist.all_gather_object(problems, mine, group=world.patient)
        problem = next((found for found in problems if found is not None), None)
    if isinstance(problem, manifest.TooNew):
        raise CheckpointMismatch(str(problem))
    return None if problem is None else str(problem)


def _look(folder: Path, world: World) -> None:
    """Check this rank's part of a checkpoint that rank 0 sees in full. Raises Unsound."""
    until = time.monotonic() + SECONDS_UNTIL_VISIBLE
    while True:
        try:
            found = manifest.check_sizes(folder)
        except manifest.Unsound:
            if world.is_first or time.monotonic() > until:
                raise
            time.sleep(0.5)  # another node may not see for a minute what rank 0 sees: that is not torn
        else:
            return manifest.check_blocks(folder, found, world.rank, world.size)


def _problem_of(check: Callable[[], object]) -> Exception | None:
    try:
        check()
    except (manifest.Unsound, manifest.TooNew) as error:
        return error
    return None


def load(folder: Path, trained: Trained, world: World) -> Progress:
    """Fill model, optimizer and random state from a complete checkpoint; all ranks call this together.

    The world size may differ from the one that saved: a rank that had no part in the checkpoint keeps its
    random state. Raises CheckpointMismatch where `trained.facts` differ from the checkpoint's.
    """
    # Facts first: weights of another shape would fail further down with a message about tensors.
    try:
        found = manifest.Manifest.read(folder)
    except manifest.Unsound as error:
        raise CheckpointMismatch(f"{folder}: {error}") from None
    if found.stack != trained.stack:
        problem = f"{folder} was written by {found.stack}; this recipe reads {trained.stack}"
        raise CheckpointMismatch(
            f"{problem}: go on with {found.technique or 'one that does'}, or start another run"
        )
    for name in {**trained.facts, **found.facts}:  # also those that this run lacks, such as experts
        theirs, ours = (_said(name, facts) for facts in (found.facts, trained.facts))
        if theirs != ours:
            problem = f"{folder} was trained with {theirs}, this run has {ours}"
            raise CheckpointMismatch(f"{problem}: set it back, or start another run")
    state = state_of(trained, Progress(), world)
    random_key = _random_key(world)
    if random_key not in filesystem.FileSystemReader(folder).read_metadata().state_dict_metadata:
        del state[random_key]
    state = _load(state, folder, world)
    if trained.own is not None:
        trained.own.read(folder / STACK_FOLDER)
    elif trained.keeper is not None:
        trained.keeper.state_was_loaded(state["model"], state["optimizer"])
    elif own_part(trained.optimizer) is trained.optimizer:
        set_torch_state(trained.model, trained.optimizer, state["model"], state["optimizer"])
    else:
        # The moments are loaded already, in place. torch cannot take them apart into a sharded optimizer's groups,
        # of which one may have no parameter on this rank; what else is in there, every step sets or the arguments say.
        set_model_state_dict(trained.model, state["model"], options=_OPTIONS)
    if random_key in state:
        _set_random_state(state[random_key], world)
    return Progress(**json.loads(state["progress"]))


def _said(name: str, facts: dict[str, Any]) -> str:
    return f"{name}={facts[name]}" if name in facts else f"no {name}"


def _load(state: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Fill `state`: tensors in place, other values by replacement. Gives it back."""
    state_dict_loader.load(
        state, checkpoint_id=folder, process_group=world.patient, no_dist=world.patient is None
    )
    return state


def state_of(trained: Trained, progress: Progress, world: World) -> dict[str, Any]:
    """What is saved: references to the model's and the optimizer's own tensors, nothing is copied.

    Without them where a stack writes them itself.

    Values that are no tensors are JSON or bytes, one key each: torch.distributed.checkpoint takes nested ones
    apart, and a later field would be a missing key in every older checkpoint.
    """
    state: dict[str, Any] = {
        "progress": json.dumps(asdict(progress)),
        _random_key(world): _random_state(world),
    }
    if trained.keeper is not None:
        state["model"], state["optimizer"] = trained.keeper.checkpoint_state()
    elif trained.own is None:
        state["model"], state["optimizer"] = torch_state(trained.model, own_part(trained.optimizer))
    return state


def torch_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the model and of the optimizer, under the names of the model's parameters."""
    return get_state_dict(model, optimizer, options=_OPTIONS)


def set_torch_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
) -> None:
    """Take over what `torch_state` gave, of this process or of another."""
    set_state_dict(
        model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=_OPTIONS
    )


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
