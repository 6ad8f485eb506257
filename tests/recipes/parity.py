"""Runs many configurations of the chapters' techniques in one set of processes, and notes what they computed.

Starting a rank costs seconds (it imports torch), a configuration a fraction of one: so the ranks start once
per world size and go through a list of cases. Each case trains a few steps and its losses, gradient norms
and weights come back as plain numbers.

    python -m tests.recipes.parity FOLDER CASES.json DEVICE     (one rank; torch's variables in the environment)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recipes.ch1.baseline import Baseline
from recipes.ch1.baseline_args import BaselineArgs
from recipes.ch2.data_parallel import Copies
from recipes.ch2.data_parallel_args import DataParallelArgs
from recipes.ch2.pipeline_parallel import Pipeline, make_layout
from recipes.ch2.pipeline_parallel_args import PipelineParallelArgs
from recipes.ch2.tensor_parallel import Split
from recipes.ch2.tensor_parallel import make_grid as make_tensor_grid
from recipes.ch2.tensor_parallel_args import TensorParallelArgs
from recipes.ch3.ddp import Replicated
from recipes.ch3.ddp_args import DdpArgs
from recipes.ch4.fsdp import Sharded, make_grid
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.ch5.deepspeed import Zero
from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.ch5.deepspeed_pipeline import Stages
from recipes.ch5.deepspeed_pipeline import make_layout as make_stage_layout
from recipes.ch5.deepspeed_pipeline_args import DeepSpeedPipelineArgs
from recipes.lib import checkpoint, manifest, saving
from recipes.lib.arguments import TrainArgs
from recipes.lib.checkpoint import Progress, StateKeeper, Trained
from recipes.lib.dataset import Dataset
from recipes.lib.distributed import World, joined
from recipes.lib.layout import Layout
from recipes.lib.model import IGNORE
from recipes.lib.model_sizes import ModelSize
from recipes.lib.optimizer import own_part
from recipes.lib.own_time import OwnTime
from recipes.lib.parallelism import attention_backends, precision
from recipes.lib.shards import TokenShards, write_shards
from recipes.lib.stack import OwnFiles
from recipes.lib.training import Plan, Remembering, Technique, optimizer_step
from tests.recipes.held_memory import held
from tests.recipes.ranks import run_ranks, told

DEVICE = os.environ.get("PARITY_DEVICE", "cpu")
"""Where ranks compute: `cuda` runs the same promises on GPUs, which ranks share where there are fewer."""
VOCABULARY = 263
"""A prime: no number of ranks divides it, so every sharding of the tables is uneven."""
SIZE = ModelSize(
    layers=2, width=48, heads=4, kv_heads=2, ffn_width=90, vocab_size=VOCABULARY, rope_theta=1e4, tied=False
)
SIZE_ON_GPUS = dataclasses.replace(SIZE, width=256, ffn_width=480)
"""Heads as wide as cuDNN's and FlashAttention's kernels want them."""
SEQUENCE_LENGTH = 24
STEPS = 5
"""A resumed run does three: the first loss to show AdamW's moments as it read them is its second."""
SAVED_AT = 2
SAVED_AGAIN_AT = 3
"""By a case that itself began with a checkpoint."""


@dataclass(frozen=True)
class Case:
    """One configuration: a technique, its arguments, and what is done with checkpoints on the way."""

    name: str
    technique: str
    world_size: int
    args: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    layers: int = SIZE.layers
    kv_heads: int = SIZE.kv_heads
    ragged: bool = False
    """Whether a part of the targets is not trained on, more in some sequences than in others."""
    save: bool = False
    """Save after step SAVED_AT (or SAVED_AGAIN_AT), under the case's name, and go on."""
    load: str = ""
    """Name of the case whose checkpoint this one begins with."""


@dataclass(frozen=True)
class Kind:
    """A technique as its chapter defines it."""

    arguments: type[TrainArgs]
    build: Callable[[Plan, Any], Technique]
    layout: Callable[[World, Any], Layout] = lambda world, args: Layout.each_its_own(world)


TECHNIQUES = {
    "baseline": Kind(BaselineArgs, lambda plan, args: Baseline.build(plan)),
    "ddp": Kind(DdpArgs, Replicated.build),
    "fsdp": Kind(
        FsdpArgs,
        lambda plan, args: Sharded.build(plan, args, make_grid(plan.world, args)),
        lambda world, args: make_grid(world, args).layout,
    ),
    "pipeline": Kind(PipelineParallelArgs, Pipeline.build, make_layout),
    "data_parallel": Kind(DataParallelArgs, Copies.build),
    "tensor_parallel": Kind(TensorParallelArgs, Split.build, make_tensor_grid),
    "zero": Kind(DeepSpeedArgs, Zero.build),
    "deepspeed_pipeline": Kind(DeepSpeedPipelineArgs, Stages.build, make_stage_layout),
}


@dataclass(frozen=True)
class Outcome:
    """What a case computed."""

    losses: list[float]
    grad_norms: list[float]
    weights_before: str
    """SHA-256 of all parameters, whole, before the first step (before loading)."""
    weights_after: str
    random: list[list[float]]
    """Per rank, numbers drawn after saving or loading."""
    moments: list[int]
    """Per rank, elements of the optimizer's state that it holds."""
    announced: int = 0
    """Bytes that a checkpoint was said to take before it was written; 0 where none was."""
    kept: dict[str, int] = field(default_factory=dict)
    """ZeRO: bytes by kind that rank 0 is said to hold."""
    held: dict[str, int] = field(default_factory=dict)
    """And what it does hold."""


class RaggedDataset(Dataset):
    """The same sequences, of which all but a first part is ignored: how much, the sequence decides."""

    def batch(self, step: int, rank: int, world_size: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, as `Dataset.batch`."""
        tokens_BS, targets_BS = super().batch(step, rank, world_size, batch_size)
        kept_B = 1 + tokens_BS[:, 0] % SEQUENCE_LENGTH
        ignored_BS = torch.arange(SEQUENCE_LENGTH) >= kept_B[:, None]
        return tokens_BS, targets_BS.masked_fill(ignored_BS, IGNORE)


def make_data(folder: Path) -> None:
    """Shards of pseudo-random tokens with something to learn in them: only an eighth of the ids occurs."""
    folder.mkdir()
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY // 8, 4000)
    write_shards(
        folder, [tokens.tolist()], vocab_size=VOCABULARY, separator=0, tokenizer="none", corpus="random"
    )


def launch(
    folder: Path,
    world_size: int,
    cases: Sequence[Case],
    device: str = DEVICE,
    module: str = "tests.recipes.parity",
) -> dict[str, Outcome]:
    """Run `cases`, which all want `world_size`, on that many new processes; by name what they computed."""
    assert {case.world_size for case in cases} == {world_size}
    words = folder / f"cases-{time.monotonic_ns()}.json"
    words.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    failed = told(run_ranks(["-m", module, str(folder), str(words), device], world_size, device))
    assert not failed, failed
    found = json.loads(words.with_suffix(".outcomes").read_text())
    return {name: Outcome(**fields) for name, fields in found.items()}


def run_cases(folder: Path, cases: Sequence[Case], world: World) -> dict[str, Outcome]:
    """Run the cases in this process, together with the other ranks of `world`."""
    with attention_backends(world.device):
        return {case.name: _run(case, folder, world) for case in cases}


def plan_for(case: Case, folder: Path, world: World) -> Plan:
    """The plan of a case, over the data in `folder`/data."""
    kind = TECHNIQUES[case.technique]
    defaults = {
        "sequence_length": SEQUENCE_LENGTH,
        "steps": STEPS,
        "warmup_steps": 2,
        "lr": 1e-2,
        "dtype": "float64",
    }
    args = kind.arguments(**{**defaults, **case.args})
    data = RaggedDataset if case.ragged else Dataset
    return Plan(
        recipe=case.name,
        args=args,
        world=world,
        # Not args.seed: a case that loads begins with other weights, yet trains on the same sequences.
        dataset=data(TokenShards(folder / "data"), sequence_length=SEQUENCE_LENGTH, seed=0),
        size=dataclasses.replace(
            SIZE_ON_GPUS if world.device.type == "cuda" else SIZE,
            tied=case.tied,
            layers=case.layers,
            kv_heads=case.kv_heads,
        ),
        precision=precision(args.dtype, world.device),
        layout=kind.layout(world, args),
        run_directory=folder / case.name,
        resume_from=None,
    )


def build(case: Case, plan: Plan) -> Technique:
    """The chapter's own model, sharded and initialized as the chapter does it."""
    return TECHNIQUES[case.technique].build(plan, plan.args)


def weights(model: nn.Module) -> str:
    """SHA-256 of all parameters, whole; the same however they are sharded. All ranks call this together."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # ZeRO's
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(parameter)
        digest.update(name.removeprefix("module.").encode())
        digest.update(whole.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _run(case: Case, folder: Path, world: World) -> Outcome:
    torch.manual_seed(world.rank)
    plan = plan_for(case, folder, world)
    technique = build(case, plan)
    weights_before = weights(technique.model)
    keeper = technique if isinstance(technique, StateKeeper) else None
    own = technique if isinstance(technique, OwnFiles) else None
    facts = {"batch_size": plan.args.batch_size}
    trained = Trained(technique.model, technique.optimizer, facts, keeper=keeper, own=own)
    progress, drawn, results = Progress(), [], []
    announced = 0
    if case.load:
        torch.manual_seed(99)
        (saved,) = manifest.folders(folder / case.load)
        progress = checkpoint.load(saved, trained, world)
        if isinstance(technique, Remembering):
            technique.recall(progress.technique)
        drawn = torch.rand(3).tolist()
    time_of_its_own = OwnTime(technique.model, world.device)
    for step in range(progress.step + 1, plan.args.steps + 1):
        loss, grad_norm = optimizer_step(plan, technique, step, time_of_its_own)
        results.append((loss.item(), grad_norm.item()))
        if case.save and step == (SAVED_AGAIN_AT if case.load else SAVED_AT):
            memory = technique.memory() if isinstance(technique, Remembering) else {}
            reached = Progress(step=step, technique=memory)
            announced = saving.bytes_of_all(checkpoint.state_of(trained, reached, world), trained, world)
            saving.save(plan.run_directory, trained, reached, world)
            drawn = torch.rand(3).tolist()
    everyone = [(drawn, _elements(technique.optimizer))] * world.size
    if world.size > 1:
        dist.all_gather_object(everyone, everyone[world.rank])
    return Outcome(
        losses=[loss for loss, _ in results],
        grad_norms=[norm for _, norm in results],
        weights_before=weights_before,
        weights_after=weights(technique.model),
        random=[numbers for numbers, _ in everyone],
        moments=[elements for _, elements in everyone],
        announced=announced,
        **_memory(technique),
    )


def _memory(technique: Technique) -> dict[str, dict[str, int]]:
    if not (isinstance(technique, Zero) and technique.stage):
        return {}
    kept = dataclasses.asdict(technique.kept())
    return {"kept": kept, "held": held(technique.model, technique.engine.optimizer)}


def _elements(optimizer: torch.optim.Optimizer) -> int:
    states = own_part(optimizer).state.items()
    tensors = [value for _, state in states for value in state.values() if isinstance(value, Tensor)]
    return sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in tensors)


def main() -> None:
    """One rank."""
    folder, words, device = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    cases = [Case(**fields) for fields in json.loads(words.read_text())]
    # What is compiled is traced and differentiated as ever, but runs without the code that takes a minute to generate.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    with joined(device) as world:
        outcomes = run_cases(folder, cases, world)
        if world.is_first:
            found = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
            words.with_suffix(".outcomes").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
