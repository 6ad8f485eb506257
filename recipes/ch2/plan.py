r"""The planner: memory and time of a training step for each strategy, before anybody waits for a GPU.

    python -m recipes.ch2.plan model=llama_8b gpu=h200 gpus_per_node=8 nodes=4
    python -m recipes.ch2.plan model=llama_70b gpu=h100 nodes=1
    python -m recipes.ch2.plan model=llama_8b gpu=h200 dry_run=1024

Memory is counted operation by operation (`recipes.lib.memory_model`), time from measured rates (`step_time_model`,
`calibration`). `python -m recipes.ch2.predictions` shows how far both were from what was measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from recipes.ch2.plan_args import PlanArgs
from recipes.lib.arguments import one_line_errors, parse_or_exit
from recipes.lib.calibration import GIB
from recipes.lib.flops import parameter_count
from recipes.lib.gpus import find_gpu
from recipes.lib.memory_model import PARTS
from recipes.lib.planner import (
    Candidate,
    Request,
    best_of_each,
    candidates,
    recommended,
    what_would_fit,
)
from recipes.lib.tables import table

SHOWN = 10
"""Rows of the table: beyond them nobody would choose."""


def main() -> None:
    """Print the plan. A model that cannot fit ends with status 1."""
    args = parse_or_exit(PlanArgs)
    with one_line_errors():
        request = request_of(args)
        found = candidates(request)
    if args.dry_run:
        from recipes.ch2.plan_dry_run import dry_run  # torch: seconds that a plan alone need not wait for

        with one_line_errors():
            print(dry_run(args))
        return
    best = recommended(found)
    rows = best_of_each(found)
    if args.json:
        print(json.dumps(as_json(request, best, rows), indent=2))
    else:
        print(text(request, best, rows))
    if best is None:
        raise SystemExit(1)


def request_of(args: PlanArgs) -> Request:
    """The question as the planner takes it. Raises ArgumentError for an unknown GPU."""
    return Request(
        model=args.model,
        gpu=find_gpu(args.gpu),
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        network_gb_s=args.network_gb_s,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        microbatch=args.microbatch_size,
        checkpointing="" if args.activation_checkpointing == "auto" else args.activation_checkpointing,
        compiled=args.compile,
        master_bytes=2 if args.param_dtype == "bfloat16" else 4,
        tensor=args.tensor,
        pipeline=args.pipeline,
    )


def text(request: Request, best: Candidate | None, rows: Sequence[Candidate]) -> str:
    """The plan as people read it."""
    gpu = request.gpu
    lines = [
        f"{request.model} on {request.nodes} x {request.gpus_per_node} {gpu.name} ({gpu.memory_gib:.1f} GiB, "
        f"{gpu.peak / 1e12:.0f} TFLOP/s dense bf16), sequences of {request.sequence_length}",
        "",
        table(
            [
                "strategy",
                "recompute",
                "microbatch",
                "GiB needed",
                "GiB to spare",
                "step",
                "tok/s per GPU",
                "MFU (F)",
            ],
            [_row(each) for each in rows[:SHOWN]],
        ),
    ]
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} more that are slower or do not fit")
    shown = best or rows[0]
    lines += ["", *_memory_lines(shown), "", *_time_lines(shown), ""]
    lines += reason(best, rows) if best is not None else cannot(request, rows[0])
    return "\n".join(lines)


def reason(best: Candidate, rows: Sequence[Candidate]) -> list[str]:
    """Which one, and why not another."""
    said = [f"recommended: {_words(best)}, {best.tokens_per_second:,.0f} tokens/s per GPU"]
    largest = max(best.time.parts, key=lambda part: best.time.parts[part])
    said.append(
        f"why: {best.spare_gib:.1f} GiB stay free; {best.time.parts[largest] / best.time.seconds:.0%} of the step is "
        f"{largest}"
    )
    other = next((each for each in rows if each.work.name != best.work.name and each.fits), None)
    if other is not None:
        change = other.tokens_per_second / best.tokens_per_second - 1
        nearly = (
            "as fast within what the planner knows, and less simple"
            if abs(change) <= 0.02
            else f"{change:+.0%}"
        )
        said.append(f"next: {_words(other)}: {nearly}")
    simpler = [each for each in rows if not each.fits and each.complexity < best.complexity]
    for each in simpler[:2]:
        said.append(f"not {_words(each)}: {-each.spare_gib:.1f} GiB are missing")
    return said


def cannot(request: Request, nearest: Candidate) -> list[str]:
    """By how much nothing fits, and what would."""
    said = [
        f"does not fit: the nearest, {_words(nearest)}, needs {nearest.memory.needed / GIB:.1f} GiB, "
        f"{-nearest.spare_gib:.1f} GiB more than a {request.gpu.name} has"
    ]
    return said + [f"would fit: {each}" for each in what_would_fit(request)]


def as_json(request: Request, best: Candidate | None, rows: Sequence[Candidate]) -> dict[str, Any]:
    return {
        "model": request.model,
        "parameters": parameter_count(rows[0].work.size),
        "gpu": dataclasses.asdict(request.gpu),
        "recommended": _figures(best) if best is not None else None,
        "strategies": [_figures(each) for each in rows],
    }


def _figures(each: Candidate) -> dict[str, Any]:
    return {
        "strategy": each.work.name,
        "activation_checkpointing": each.work.checkpointing,
        "microbatch_size": each.work.microbatch,
        "fits": each.fits,
        "memory_gib": each.memory.peak.tensor_bytes / GIB,
        "needed_gib": each.memory.needed / GIB,
        "spare_gib": each.spare_gib,
        "peak_moment": each.memory.peak.name,
        "parts_gib": {part: size / GIB for part, size in each.memory.peak.parts.items()},
        "step_seconds": each.time.seconds,
        "parts_seconds": each.time.parts,
        "tokens_per_second_per_device": each.tokens_per_second,
        "mfu": each.mfu,
    }


def _row(each: Candidate) -> list[object]:
    needed, spare = f"{each.memory.needed / GIB:.1f}", f"{each.spare_gib:.1f}"
    left = [each.work.name, each.work.checkpointing, each.work.microbatch, needed, spare]
    if not each.fits:
        return [*left, "-", "does not fit", "-"]
    return [*left, f"{each.time.seconds:.3g} s", f"{each.tokens_per_second:,.0f}", f"{each.mfu:.1%}"]


def _memory_lines(each: Candidate) -> list[str]:
    peak = each.memory.peak
    parts = [(part, peak.parts[part]) for part in PARTS if part in peak.parts]
    outside = ("outside of torch's tensors", each.memory.outside)
    rows = [(part, f"{size / GIB:.2f}") for part, size in [*parts, outside]]
    return [f"memory of {_words(each)}, fullest at: {peak.name}", table(["part", "GiB"], rows)]


def _time_lines(each: Candidate) -> list[str]:
    rows = [(part, f"{seconds * 1e3:.1f}") for part, seconds in each.time.parts.items()]
    return [
        "time of its step",
        table(["part", "ms"], [*rows, ("together", f"{each.time.seconds * 1e3:.1f}")]),
    ]


def _words(each: Candidate) -> str:
    rounds = f" x {each.work.microbatches}" if each.work.microbatches > 1 else ""
    return (
        f"{each.work.name} (recompute {each.work.checkpointing}, microbatch {each.work.microbatch}{rounds})"
    )


if __name__ == "__main__":
    main()
