"""DeepSpeed's universal checkpoints beside this project's, in turns: `python -m tests.bench.universal [TURNS]`.

A model of 21 million parameters trains for three steps under ZeRO on two or four ranks, is saved in both ways, and goes
on for three more: the run that nothing happened to. New ranks, as many, fewer or more, begin with other weights, load,
and do the last three steps again. Both ways are measured by the same processes and take turns in being first.

    universal   engine.save_checkpoint, ds_to_universal.py as a program, engine.load_checkpoint
    mended      the same, with two things put right after the load that stage 3 gets wrong (`mend`)
    by name     recipes/lib/zero_state.py in the format of all recipes, with checksums, and synced to the disk

Saving and loading are timed from one barrier to the next, the conversion as a whole process.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipes.ch5.deepspeed import Zero
from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.lib import checkpoint, manifest, saving
from recipes.lib.checkpoint import Progress, Trained
from recipes.lib.dataset import Dataset
from recipes.lib.distributed import World, joined
from recipes.lib.layout import Layout
from recipes.lib.model_sizes import ModelSize
from recipes.lib.own_time import OwnTime
from recipes.lib.parallelism import precision
from recipes.lib.shards import TokenShards
from recipes.lib.training import Plan, optimizer_step
from tests.recipes.parity import make_data
from tests.recipes.ranks import run_ranks, told

SIZE = ModelSize(
    layers=4, width=512, heads=8, kv_heads=8, ffn_width=1536, vocab_size=8192, rope_theta=1e4, tied=False
)
SAVED_AT, STEPS = 3, 6
STAGES = (2, 3)
CHANGES = ((2, 2), (4, 2), (2, 4))
"""Ranks that save, and ranks that load."""
WAYS = {2: ("universal", "by name"), 3: ("universal", "mended", "by name")}
TAG = f"step{SAVED_AT}"


@dataclasses.dataclass(frozen=True)
class Task:
    """What ranks do with one engine."""

    folder: str
    stage: int
    way: str
    """That checkpoints are loaded in; or, of those who save, that is the first."""
    saves: bool

    @property
    def theirs(self) -> Path:
        """Where DeepSpeed saves."""
        return Path(self.folder) / "deepspeed"


def work(words: Path) -> None:
    """One rank, and one task after the other."""
    with joined("cpu") as world:
        found = []
        for fields in json.loads(words.read_text()):
            found.append(one(Task(**fields), world))
            gc.collect()
        if world.is_first:
            words.with_suffix(".done").write_text(json.dumps(found))


def one(task: Task, world: World) -> dict[str, Any]:
    """Losses and seconds of a task, on this rank."""
    args = DeepSpeedArgs(
        stage=task.stage, sequence_length=32, batch_size=4, steps=STEPS, warmup_steps=2, lr=1e-3, dtype="float32",
        seed=0 if task.saves else 1,
    )  # fmt: skip
    plan = Plan(
        recipe="universal", args=args, world=world, size=SIZE, precision=precision(args.dtype, world.device),
        dataset=Dataset(TokenShards(Path(task.folder).parent / "data"), sequence_length=32, seed=0),
        layout=Layout.each_its_own(world), run_directory=Path(task.folder), resume_from=None,
    )  # fmt: skip
    technique = Zero.build(plan, args)
    # As {"checkpoint": {"load_universal": true}} in the configuration, which the recipe does not compose.
    technique.engine._config.load_universal_checkpoint = not task.saves and task.way != "by name"
    trained = Trained(technique.model, technique.optimizer, {}, keeper=technique)
    seconds = {} if task.saves else {task.way: load(task, technique, trained, world)}
    clock, losses = OwnTime(technique.model, world.device), []
    for step in range(1 if task.saves else SAVED_AT + 1, STEPS + 1):
        losses.append(optimizer_step(plan, technique, step, clock)[0].item())
        if task.saves and step == SAVED_AT:
            seconds = save(task, technique, trained, world)
    return {"losses": losses, "seconds": seconds}


def save(task: Task, technique: Zero, trained: Trained, world: World) -> dict[str, float]:
    """Seconds of each way."""
    ways: dict[str, Callable[[], object]] = {
        "universal": lambda: technique.engine.save_checkpoint(task.theirs, tag=TAG),
        "by name": lambda: saving.save(Path(task.folder), trained, Progress(SAVED_AT), world),
    }
    return {way: timed(ways[way]) for way in sorted(ways, key=lambda way: way != task.way)}


def load(task: Task, technique: Zero, trained: Trained, world: World) -> float:
    """Seconds."""
    if task.way == "by name":
        (saved,) = manifest.folders(Path(task.folder))
        return timed(lambda: checkpoint.load(saved, trained, world))
    groups = technique.optimizer.param_groups
    decays = [group["weight_decay"] for group in groups]
    took = timed(lambda: technique.engine.load_checkpoint(task.theirs, tag=f"{TAG}_universal"))
    if task.way == "mended":
        mend(technique.optimizer, decays)
    return took


def mend(optimizer: torch.optim.Optimizer, decays: list[float]) -> None:
    """Undo what load_hp_checkpoint_state_from_checkpoint_dir_stage3 (stage3.py, 0.19.8) does in silence.

    It gives all buffers one tensor for their counts of steps, which torch's AdamW counts up for each of them; and all
    groups of parameters the options of the first, so that norms decay like matrices.
    """
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def timed(action: Callable[[], object]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def on_ranks(ranks: int, tasks: list[Task], folder: Path) -> list[dict[str, Any]]:
    """What rank 0 found, by task."""
    words = folder / "tasks.json"
    words.write_text(json.dumps([dataclasses.asdict(task) for task in tasks]))
    if failed := told(run_ranks(["-m", "tests.bench.universal", "worker", str(words)], ranks)):
        raise SystemExit(failed)
    return list(json.loads(words.with_suffix(".done").read_text()))


def convert(folder: Path, stage: int) -> float:
    """Seconds of DeepSpeed's program."""
    words = ["--input_folder", f"{folder}/{TAG}", "--output_folder", f"{folder}/{TAG}_universal"]
    # Below stage 3 it stops without: it looks for what Megatron-DeepSpeed's models bring along.
    words += ["--inject_missing_state"] if stage < 3 else []
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began


def turn(number: int, folder: Path, found: dict[tuple[str, ...], list[float]]) -> None:
    """Add what one turn took to `found`, by what was measured."""
    make_data(folder / "data")
    first = ("universal", "by name")[number % 2]
    straight: dict[str, list[float]] = {}
    for ranks in sorted({before for before, _ in CHANGES}):
        tasks = [Task(str(folder / f"{ranks}-{stage}"), stage, first, saves=True) for stage in STAGES]
        for task, done in zip(tasks, on_ranks(ranks, tasks, folder), strict=True):
            straight[task.folder] = done["losses"][SAVED_AT:]
            case = (f"stage {task.stage}", f"{ranks} ranks")
            for way, seconds in done["seconds"].items():
                found[*case, f"seconds to save, {way}"].append(seconds)
            found[*case, "seconds to convert"].append(convert(task.theirs, task.stage))
            places = {"universal": task.theirs / TAG, "by name": Path(task.folder) / "checkpoints"}
            places["converted"] = task.theirs / f"{TAG}_universal"
            for name, place in places.items():
                size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
                found[*case, f"MB, {name}"].append(size / 1e6)
    for ranks in sorted({after for _, after in CHANGES}):
        tasks = [
            Task(str(folder / f"{before}-{stage}"), stage, way, saves=False)
            for before, after in CHANGES
            for stage in STAGES
            for way in WAYS[stage][:: 1 if number % 2 else -1]
            if after == ranks
        ]
        for task, done in zip(tasks, on_ranks(ranks, tasks, folder), strict=True):
            case = (f"stage {task.stage}", f"{Path(task.folder).name[0]} to {ranks} ranks")
            found[*case, f"seconds to load, {task.way}"].append(done["seconds"][task.way])
            pairs = zip(done["losses"], straight[task.folder], strict=True)
            found[*case, f"loss differs by, {task.way}"].append(max(abs(a - b) / b for a, b in pairs))


def main() -> int:
    """The driver; or, by its first word, a rank."""
    if sys.argv[1:2] == ["worker"]:
        work(Path(sys.argv[2]))
        return 0
    turns = int(sys.argv[1]) if sys.argv[1:] else 3
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for number in range(turns):
        with tempfile.TemporaryDirectory(prefix="universal") as folder:
            turn(number, Path(folder), found)
    print("| stage | ranks | what | median | lowest | highest |\n|---|---|---|---|---|---|")
    for what, values in sorted(found.items()):
        figures = (statistics.median(values), min(values), max(values))
        print(f"| {' | '.join(what)} | {' | '.join(f'{figure:.3g}' for figure in figures)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
