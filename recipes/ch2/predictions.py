r"""The planner held against measurements: those that there are, and predictions for those that are to come.

    python -m recipes.ch2.predictions
    python -m recipes.ch2.predictions measured=benchmarks/planner_h200

The first prints both tables as the model stands. The second compares what was committed before the runs
(benchmarks/planner_predictions_2026-11-21.json) with the metrics of the runs: copy each run's metrics.jsonl to
NAME.jsonl. Predictions are made anew for no run that is compared: a model that was fitted to them afterwards proves
nothing.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.ch2.predictions_args import PredictionsArgs
from recipes.ch3.ddp_args import DdpArgs
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.lib.arguments import ArgumentError, one_line_errors, parse, parse_or_exit
from recipes.lib.calibration import GIB
from recipes.lib.fitting import workload_of
from recipes.lib.gpus import find_gpu
from recipes.lib.memory_model import predict_memory
from recipes.lib.step_time_model import Fabric, predict_step_time

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MEASURED = BENCHMARKS / "llama_8b_h200_2026-11-21"
COMMITTED = BENCHMARKS / "planner_predictions_2026-11-21.json"
WARM_UP = 5
"""Steps that do not count."""
GPU, NODE = "h200", Fabric(gpus_per_node=8, network_gb_s=50.0)


@dataclass(frozen=True)
class Configuration:
    """One run."""

    name: str
    gpus: int
    recipe: str
    words: str
    fused_loss: bool = True
    """False for a run of before the fused loss."""
    calibrates: str = ""
    """What of the model was worked out with it at hand; empty: nothing. Fitted are four numbers of
    `recipes.lib.calibration`; which moments of a step can be the fullest was found by explaining these runs' peaks."""

    @property
    def command(self) -> str:
        """How it is measured, with the GPUs of one node."""
        module = {"ch3_ddp": "recipes.ch3.ddp", "ch4_fsdp": "recipes.ch4.fsdp"}[self.recipe]
        return (
            f"RUN_DIR=runs/{self.name} PYTORCH_ALLOC_CONF=expandable_segments:True "
            f"torchrun --nproc-per-node {self.gpus} -m {module} {self.words} steps=20 save_every=-1"
        )


_8B = "model=llama_8b sequence_length=4096"
_BEFORE = (
    Configuration("1gpu_eager_full_b1", 1, "ch4_fsdp", f"{_8B} batch_size=1 activation_checkpointing=full"),
    Configuration("1gpu_eager_full_b2", 1, "ch4_fsdp", f"{_8B} batch_size=2 activation_checkpointing=full"),
    Configuration(
        "1gpu_compiled_full_b2", 1, "ch4_fsdp", f"{_8B} batch_size=2 activation_checkpointing=full compile=true"
    ),
    Configuration("2gpu_compiled_none", 2, "ch4_fsdp", f"{_8B} batch_size=8 compile=true"),
    Configuration(
        "4gpu_compiled_selective", 4, "ch4_fsdp", f"{_8B} batch_size=16 activation_checkpointing=selective compile=true"
    ),
    Configuration("4gpu_compiled_none", 4, "ch4_fsdp", f"{_8B} batch_size=16 compile=true"),
    Configuration("4gpu_eager_full", 4, "ch4_fsdp", f"{_8B} batch_size=8 activation_checkpointing=full"),
)  # fmt: skip
MEASURED_ONES = tuple(
    dataclasses.replace(each, fused_loss=False, calibrates="memory" if each.gpus == 4 else "time, memory")
    for each in _BEFORE
)
_L = "model=llama_8b sequence_length=8192"
_1B = "model=llama_1b sequence_length"
TO_MEASURE = (
    Configuration("1b_1gpu_ddp_none", 1, "ch3_ddp", f"{_1B}=4096 batch_size=4 compile=true"),
    Configuration(
        "1b_2gpu_ddp_selective", 2, "ch3_ddp", f"{_1B}=4096 batch_size=8 activation_checkpointing=selective"
    ),
    Configuration("1b_4gpu_ddp_none_8k", 4, "ch3_ddp", f"{_1B}=8192 batch_size=8 compile=true"),
    Configuration(
        "1b_1gpu_fsdp_full_8k", 1, "ch4_fsdp", f"{_1B}=8192 batch_size=2 activation_checkpointing=full"
    ),
    Configuration("1b_4gpu_fsdp_none", 4, "ch4_fsdp", f"{_1B}=4096 batch_size=32 compile=true"),
    Configuration(
        "8b_1gpu_fsdp_full_8k", 1, "ch4_fsdp", f"{_L} batch_size=1 activation_checkpointing=full compile=true"
    ),
    Configuration(
        "8b_2gpu_fsdp_selective_8k", 2, "ch4_fsdp",
        f"{_L} batch_size=2 activation_checkpointing=selective compile=true",
    ),
    Configuration("8b_2gpu_fsdp_none_eager", 2, "ch4_fsdp", f"{_8B} batch_size=4"),
    Configuration("8b_4gpu_fsdp_none_8k", 4, "ch4_fsdp", f"{_L} batch_size=8 compile=true"),
    Configuration("8b_4gpu_fsdp_full_8k", 4, "ch4_fsdp", f"{_L} batch_size=8 activation_checkpointing=full"),
    Configuration(
        "8b_4gpu_grad_op_selective", 4, "ch4_fsdp",
        f"{_8B} batch_size=16 strategy=shard_grad_op activation_checkpointing=selective compile=true",
    ),
    Configuration(
        "8b_4gpu_fsdp_accumulated", 4, "ch4_fsdp",
        f"{_8B} batch_size=32 microbatch_size=2 activation_checkpointing=selective compile=true",
    ),
)  # fmt: skip


def predict(configuration: Configuration) -> dict[str, Any]:
    """Peak memory and time of a step, with their parts."""
    kind = {"ch3_ddp": DdpArgs, "ch4_fsdp": FsdpArgs}[configuration.recipe]
    args = dataclasses.asdict(parse(kind, configuration.words.split()))
    work = workload_of(configuration.recipe, args, 1, configuration.gpus)
    assert work is not None
    work = dataclasses.replace(work, fused_loss=configuration.fused_loss)
    memory = predict_memory(work)
    time = predict_step_time(work, find_gpu(GPU), NODE)
    return {
        "name": configuration.name,
        "gpus": configuration.gpus,
        "recipe": configuration.recipe,
        "words": configuration.words,
        "calibrates": configuration.calibrates,
        "memory_gib": memory.peak.tensor_bytes / GIB,
        "fullest_at": memory.peak.name,
        "needed_gib": memory.needed / GIB,
        "step_seconds": time.seconds,
        "tokens_per_second_per_device": work.step_tokens / time.seconds / work.gpus,
        "tokens_per_step": work.step_tokens,
        "command": configuration.command,
    }


def measured(path: Path, tokens_per_step: int, gpus: int) -> tuple[float, float]:
    """Peak memory [GiB] and median time of a step [s] of a run's metrics. Raises ArgumentError for too few steps."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steady = [line["tokens_per_second_per_device"] for line in lines[WARM_UP:]]
    if not steady:
        raise ArgumentError(
            "measured", str(path), f"has {len(lines)} steps; the first {WARM_UP} do not count"
        )
    return max(line["memory_gib"] for line in lines), tokens_per_step / gpus / statistics.median(steady)


def compared(predictions: Sequence[dict[str, Any]], folder: Path) -> str:
    """Predicted against measured, for those that the folder has."""
    rows = []
    for one in predictions:
        path = folder / f"{one['name']}.jsonl"
        if not path.exists():
            rows.append([f"`{one['name']}`", one["calibrates"] or "nothing", *["not measured"] * 6])
            continue
        memory, seconds = measured(path, one["tokens_per_step"], one["gpus"])
        rows.append([
            f"`{one['name']}`", one["calibrates"] or "nothing",
            f"{one['memory_gib']:.2f}", f"{memory:.2f}", f"{one['memory_gib'] / memory - 1:+.2%}",
            f"{one['step_seconds']:.3f}", f"{seconds:.3f}", f"{one['step_seconds'] / seconds - 1:+.1%}",
        ])  # fmt: skip
    head = [
        "run",
        "calibrates",
        "GiB predicted",
        "measured",
        "error",
        "s per step predicted",
        "measured",
        "error",
    ]
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print tables in Markdown."""
    args = parse_or_exit(PredictionsArgs)
    with one_line_errors():
        coming = [predict(each) for each in TO_MEASURE]
        if args.json:
            print(json.dumps(coming, indent=1))
        elif args.measured:
            folder = Path(args.measured)
            if not folder.is_dir():
                raise ArgumentError("measured", args.measured, "is no folder")
            print(compared(json.loads(COMMITTED.read_text()), folder))
        else:
            print("Measured before:\n")
            print(compared([predict(each) for each in MEASURED_ONES], MEASURED))
            print("\nTo be measured; none of these calibrates anything:\n")
            head = [
                "run",
                "GPUs",
                "recipe and arguments",
                "peak GiB",
                "fullest at",
                "s per step",
                "tok/s per GPU",
            ]
            rows = [
                [
                    f"`{one['name']}`", str(one["gpus"]), f"`{one['recipe']}` `{one['words']}`",
                    f"{one['memory_gib']:.2f}", one["fullest_at"], f"{one['step_seconds']:.3f}",
                    f"{one['tokens_per_second_per_device']:,.0f}",
                ]
                for one in coming
            ]  # fmt: skip
            print(markdown(head, rows))
            print("\n```text")
            print("\n".join(each.command for each in TO_MEASURE))
            print("```")


if __name__ == "__main__":
    main()
