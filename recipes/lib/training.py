"""The training loop that every chapter shares. A chapter brings its technique; everything else is here.

The loss of a step is the mean over all tokens of the *global* batch. Each rank divides its own sum by the
global count, and gradients are summed over microbatches and ranks: exact for any split, also an uneven one.
(The mean of the ranks' means is not, as soon as one of them has fewer tokens.)

Suffixes of tensor names: B sequences of one rank's microbatch, S tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from recipes.lib import checkpoint, manifest
from recipes.lib.arguments import TrainArgs, one_line_errors
from recipes.lib.checkpoint import CheckpointMismatch, Progress, StateKeeper, Trained
from recipes.lib.dataset import DataError, Dataset
from recipes.lib.distributed import (
    LaunchError,
    World,
    attempt,
    from_first,
    run_directory,
    sum_over_ranks,
)
from recipes.lib.finite import NotFinite, OwnNumbers
from recipes.lib.flops import flops_per_token, parameter_count
from recipes.lib.heartbeat import Heartbeat
from recipes.lib.layout import Layout
from recipes.lib.metrics import Metrics
from recipes.lib.model import IGNORE, Transformer, materialize
from recipes.lib.model_sizes import SIZES, ModelSize
from recipes.lib.optimizer import clip_gradients, learning_rate, own_part, set_learning_rate
from recipes.lib.own_time import OwnTime
from recipes.lib.parallelism import Precision, attention_backends, precision
from recipes.lib.pretrained import check_init_from, load_pretrained
from recipes.lib.saving import Loaded, Saver, announce_loaded, announce_passed_over, keep_tokenizer
from recipes.lib.stack import OwnFiles
from recipes.lib.stopping import OF_THIS_PROCESS, Stopped, attempt_folder
from recipes.lib.writing import NotSaved

Microbatch = tuple[Tensor, Tensor]
"""Inputs and targets, both [B, S]; the same shape on every rank and for every microbatch."""


class Technique(Protocol):
    """What a chapter brings: how a model is spread over ranks, and how its gradients come together."""

    @property
    def model(self) -> nn.Module:
        """The model that holds this rank's parameters."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over exactly the parameters of `model`."""

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of every microbatch; gives the summed loss (detached) of this rank's sequences.

        Ranks that train on the same sequences together (see Layout) all give the same. Afterwards each
        parameter's (or shard's) `.grad` is the gradient of the global mean loss: the sum over all microbatches
        of all ranks, divided by `token_count`, the number of tokens in the global batch.
        """


@runtime_checkable
class Remembering(Protocol):
    """A technique with numbers of its own that a resumed run goes on with, the same on every rank."""

    def memory(self) -> dict[str, float]:
        """What the checkpoint keeps."""

    def recall(self, memory: dict[str, float]) -> None:
        """What it kept; empty where it was another technique's."""


@runtime_checkable
class Updating(Protocol):
    """A technique that clips gradients and updates parameters in its own way."""

    def clip_and_update(self, rate: float) -> Tensor:
        """Clip to `clip_norm`, update with the learning rate `rate`, forget the gradients.

        Gives the norm of the gradient before that, on every rank.
        """


@dataclass(frozen=True)
class Plan:
    """What is decided before a model is built."""

    recipe: str
    args: TrainArgs
    world: World
    dataset: Dataset
    size: ModelSize
    precision: Precision
    layout: Layout
    run_directory: Path
    resume_from: Path | None
    """The checkpoint to go on from; None begins at step 1."""
    seconds_checking: float = 0.0
    """That it took to find it: the ranks read every byte for its checksum."""


def make_plan(recipe: str, args: TrainArgs, world: World, layout: Layout | None = None) -> Plan:
    """Find the run's directory, open the data (rank 0 prepares it at first use) and settle the model's size.

    Without a `layout` each rank trains on sequences of its own.
    All ranks call this together. Raises ArgumentError for arguments that cannot work, on every rank.
    """
    check_init_from(args.init_from, args.model, args.vocab_size)
    dataset = Dataset.open(
        args.data,
        sequence_length=args.sequence_length,
        seed=args.seed,
        init_from=args.init_from,
        group=world.patient,
    )
    rows = args.vocabulary_rows(dataset.vocab_size)
    size = dataclasses.replace(SIZES[args.model], vocab_size=rows)
    directory = run_directory(recipe, world)
    began = time.perf_counter()
    newest = _newest(directory, args, world)
    return Plan(
        recipe=recipe,
        args=args,
        world=world,
        dataset=dataset,
        size=size,
        precision=precision(args.dtype, world.device),
        layout=layout or Layout.each_its_own(world),
        run_directory=directory,
        resume_from=newest,
        seconds_checking=time.perf_counter() - began,
    )


def _newest(directory: Path, args: TrainArgs, world: World) -> Path | None:
    """The checkpoint to go on from. What is passed over is said and announced, also where nothing is left."""
    if not args.resume and attempt() == 1:
        # Older and higher steps beside a run's own: nobody could say any more which of them is its newest.
        found = from_first(manifest.folders(directory)[:1] if world.is_first else [], world)
        if found:
            raise CheckpointMismatch(
                f"resume=false: {found[0].parent} already holds {found[0].name}, and a run does not go backwards: "
                "go on from it (resume=true), or start another run"
            )
    try:
        newest, passed_over = checkpoint.newest(directory, world)
    except checkpoint.NoneSound as error:
        announce_passed_over(directory, error.passed_over, world)
        raise
    announce_passed_over(directory, passed_over, world)
    return newest


def initialize(model: Transformer, plan: Plan, storage: str | None = None) -> None:
    """Give `model` its memory and initial values: random, the same for any world size, or those of
    `init_from`.

    `storage` is where the parameters live if not on the device: "cpu" when they are offloaded.
    """
    materialize(model, plan.args.seed, plan.world.device, storage)
    if plan.args.init_from and plan.resume_from is None:
        load_pretrained(model, plan.args.init_from)


def train(plan: Plan, technique: Technique) -> None:
    """Train to the last step. The model may be on any number of ranks; all of them call this together.

    Raises NotFinite when the loss or the gradient is, CheckpointMismatch when the checkpoint is another
    run's, Stopped when the ranks have agreed to stop (and saved), NotSaved when the last checkpoint, at the end or
    at a stop, could not be written: an earlier one that could not leaves the run going.
    """
    args, world = plan.args, plan.world
    heartbeat = Heartbeat(attempt_folder(), world.rank)
    heartbeat.beat(0, "start")
    flops = flops_per_token(plan.size, args.sequence_length)
    metrics = Metrics(
        plan.run_directory,
        world,
        attempt=attempt(),
        steps=args.steps,
        flops=flops,
        compute=plan.precision.products or plan.precision.compute,
    )
    _seed_everything(args.seed + world.rank)
    trained = Trained(
        technique.model,
        technique.optimizer,
        _facts(plan),
        technique=plan.recipe,
        size=dataclasses.asdict(plan.size),
        context=args.sequence_length,
        keeper=technique if isinstance(technique, StateKeeper) else None,
        own=technique if isinstance(technique, OwnFiles) else None,
    )
    progress = Progress()
    if world.is_first:
        keep_tokenizer(plan.dataset.folder, plan.run_directory)
    beginning = "from the start"
    if plan.resume_from is not None:
        began = time.perf_counter()
        progress = checkpoint.load(plan.resume_from, trained, world)
        found = Loaded(plan.resume_from, plan.seconds_checking, time.perf_counter() - began)
        announce_loaded(plan.run_directory, found, world)
        beginning = str(found)
        if isinstance(technique, Remembering):
            technique.recall(progress.technique)
    compute = str(plan.precision.compute).removeprefix("torch.")
    metrics.say(
        f"{plan.recipe}: {args.model}, {parameter_count(plan.size) / 1e6:,.1f}M parameters, {compute}, on "
        f"{world.size} x {_device_name(world.device)}; "
        f"{flops.full / 1e9:.3g} GFLOP/token ({flops.causal / 1e9:.3g} causal)"
    )
    metrics.say(f"run directory {plan.run_directory}; {beginning}")

    saver = Saver(
        plan.run_directory,
        trained,
        world,
        keep=args.keep,
        keep_every=args.keep_every,
        in_background=args.async_save,
        say=metrics.say,
    )
    own = OwnTime(technique.model, world.device)
    numbers = OwnNumbers(technique.model)
    reason = OF_THIS_PROCESS.agreed(world.rank, attempt_folder())
    with attention_backends(world.device), saver:
        metrics.start(progress.tokens)
        while progress.step < args.steps and reason is None:
            step = progress.step + 1
            loss, grad_norm = optimizer_step(plan, technique, step, own, numbers)
            own.step_is_over()
            if args.save_every >= 0:
                saver.rehearse()
            progress = dataclasses.replace(
                progress,
                step=step,
                tokens=progress.tokens + args.batch_size * args.sequence_length,
                sequences=progress.sequences + args.batch_size,
            )
            # ---- Step boundary: parameters, optimizer and progress belong to the same step on every rank.
            # ---- Agreeing on a request to stop, and saving, happen here and nowhere else.
            heartbeat.beat(step, "step", own.median)
            if step < args.steps:  # a run that has nothing left to do is done, not stopped
                reason = OF_THIS_PROCESS.agreed(world.rank, attempt_folder())
            saved = is_saved(step, args) or (reason is not None and args.save_every >= 0)
            # Also before each save: a loss that is no number raises, and such a model must not be saved.
            if step == args.steps or step % args.log_every == 0 or saved:
                value, norm = loss.item(), grad_norm.item()
                if not (math.isfinite(value) and math.isfinite(norm)):
                    saver.wait()
                    raise NotFinite(f"{numbers.first_wrong(world)}; {_what_is_left(plan, saver)}")
                numbers.forget()
                metrics.log(
                    step=step,
                    tokens=progress.tokens,
                    loss=value,
                    grad_norm=norm,
                    lr=learning_rate(step, args),
                )
                progress = dataclasses.replace(progress, best_loss=min(value, progress.best_loss or value))
            if saved:
                heartbeat.beat(step, "save")
                if isinstance(technique, Remembering):
                    progress = dataclasses.replace(progress, technique=technique.memory())
                with metrics.paused():
                    saver.save(progress)
        last = saver.wait()
    if reason is not None:
        heartbeat.beat(progress.step, "done")
        metrics.say(f"stopped after step {progress.step}: {reason}")
        metrics.close()
    if last is not None and last.step == progress.step and last.event != "saved":
        # Also after a stop: STOPPED_EXIT would say that the work until here is safe.
        raise NotSaved(f"step {last.step} is not saved: {last.reason}")
    if reason is not None:
        raise Stopped
    heartbeat.beat(progress.step, "done")
    metrics.close()


def is_saved(step: int, args: TrainArgs) -> bool:
    """Whether a checkpoint is written after `step`: every `save_every` steps and after the last, -1 never."""
    if args.save_every < 0:
        return False
    return step == args.steps or (args.save_every > 0 and step % args.save_every == 0)


def _what_is_left(plan: Plan, saver: Saver) -> str:
    """Where a run that must not be saved any more can go on from."""
    name = f"step-{saver.newest_saved:08d}" if saver.newest_saved is not None else None
    if name is None and plan.resume_from is not None:
        name = plan.resume_from.name
    return f"the last good checkpoint is {name}" if name else "there is no checkpoint of before"


def optimizer_step(
    plan: Plan, technique: Technique, step: int, own: OwnTime, numbers: OwnNumbers | None = None
) -> tuple[Tensor, Tensor]:
    """Optimizer step `step` (from 1): mean loss and gradient norm of the global batch, on every rank.

    `own` measures what this rank does without waiting for the others, `numbers` keeps what it computed.
    """
    args, layout = plan.args, plan.layout
    with own.input():
        batches = microbatches(plan, step)
    counted = torch.stack([(targets != IGNORE).sum() for _, targets in batches]).sum()
    token_count = sum_over_ranks(counted, layout.data_group)
    loss_sum = technique.accumulate_gradients(batches, token_count)
    rate = learning_rate(step, args)
    if isinstance(technique, Updating):
        grad_norm = technique.clip_and_update(rate)
    else:
        grad_norm = clip_gradients(technique.model, args.clip_norm, layout.stage_group)
        set_learning_rate(technique.optimizer, rate)
        # A sharded optimizer also sends what it has updated: a wait for others, which is not this rank's own time.
        with own.update() if own_part(technique.optimizer) is technique.optimizer else nullcontext():
            technique.optimizer.step()
        technique.optimizer.zero_grad()
    own_loss = loss_sum.clone()  # the sum over ranks replaces it
    loss = sum_over_ranks(loss_sum, layout.data_group) / token_count
    if numbers is not None:
        numbers.keep(step, own_loss, loss, grad_norm)
    return loss, grad_norm


def microbatches(plan: Plan, step: int) -> list[Microbatch]:
    """This rank's share of the global batch, on its device, in microbatches of one shape.

    Ranks whose share is smaller get rows of padding (targets IGNORE, which add nothing): each rank must run
    the same number of forward passes, or the others would wait in FSDP's collectives for ever; and one
    shape is one compiled graph.
    """
    args, world, layout = plan.args, plan.world, plan.layout
    rows, count = microbatch_rows(args, layout)
    tokens_BS, targets_BS = plan.dataset.batch(step - 1, layout.data_rank, layout.data_size, args.batch_size)
    missing = count * rows - len(tokens_BS)
    tokens_BS = nn.functional.pad(tokens_BS, (0, 0, 0, missing), value=0)
    targets_BS = nn.functional.pad(targets_BS, (0, 0, 0, missing), value=IGNORE)
    return [
        (_to_device(tokens, world.device), _to_device(targets, world.device))
        for tokens, targets in zip(torch.split(tokens_BS, rows), torch.split(targets_BS, rows), strict=True)
    ]


def microbatch_rows(args: TrainArgs, layout: Layout) -> tuple[int, int]:
    """Sequences of each microbatch, and how many microbatches a step has; the same on every rank."""
    largest_share = math.ceil(args.batch_size / layout.data_size)
    rows = min(args.microbatch_size or largest_share, largest_share)
    return rows, math.ceil(largest_share / rows)


def recipe_main(body: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a recipe's `main`: how its errors leave the process.

    What a person has to set right (arguments, the launch, data that nodes do not share, another run's
    checkpoint) is one line on stderr and exit status 2: trying again would change nothing. So is a loss that is no
    number, with status 1: it may come from one device. A run that was asked to stop leaves with STOPPED_EXIT.
    Everything else keeps its traceback, and torchrun's agent gets it too (`record`), so that its summary names the
    rank that failed first instead of the ones that were killed after it.
    """

    @functools.wraps(body)
    def main() -> None:
        OF_THIS_PROCESS.listen()
        with one_line_errors():
            try:
                record(body)()
            except (
                NotFinite
            ) as error:  # the same on every rank; trying again may help: it may be a device's fault
                if os.environ.get("RANK", "0") == "0":
                    print(f"error: {error}", file=sys.stderr, flush=True)
                raise SystemExit(1) from error
            except LaunchError as error:  # about this rank, or its node
                print(f"error: {error}", file=sys.stderr, flush=True)
                raise SystemExit(2) from error
            except (CheckpointMismatch, DataError) as error:  # the same on every rank
                if os.environ.get("RANK", "0") == "0":
                    print(f"error: {error}", file=sys.stderr, flush=True)
                raise SystemExit(2) from error

    return main


def _facts(plan: Plan) -> dict[str, object]:
    """What a run must not change between attempts: it decides the weights' shapes and every later batch."""
    return {
        "model": plan.args.model,
        "vocab_size": plan.size.vocab_size,
        "data": plan.dataset.fingerprint,
        "sequence_length": plan.args.sequence_length,
        "batch_size": plan.args.batch_size,
        "seed": plan.args.seed,
        **({"experts": plan.size.experts} if plan.size.experts else {}),
    }


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    # From pinned memory the copy does not stop the host, which can queue the step's kernels meanwhile.
    return tensor.pin_memory().to(device, non_blocking=True)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
