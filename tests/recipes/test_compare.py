"""Strategies compared: same losses, memory that follows from the shapes, and a stall that is only waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from recipes.ch4.compare_args import STRATEGIES, ZERO, CompareArgs
from recipes.lib.arguments import ArgumentError
from recipes.lib.flops import parameter_count
from recipes.lib.memory import PeakMemory
from recipes.lib.model_sizes import SIZES
from recipes.lib.stall import covered, measure_stall, stall_of

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ROWS = 4096
"""Of the embedding: more than the corpus below has tokens, and a number that two ranks divide."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one comparison on two ranks."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return compare(folder, "steps=4", "untimed=2", "dtype=float64")


def compare(folder: Path, *more: str) -> Path:
    """The run directory of a comparison on two ranks."""
    words = ["sequence_length=32", "batch_size=4", f"vocab_size={ROWS}", *more]
    run = folder / f"run-{len(more)}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "recipes.ch4.compare",
         *words, f"data={folder / 'texts'}", "device=cpu"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "RUN_DIR": str(run), "CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return run


def lines(run: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return {line["strategy"]: line for line in found if line["kind"] == "measurement"}


def test_every_strategy_trains_the_same(compared: Path) -> None:
    found = lines(compared)
    assert tuple(found) == STRATEGIES
    for line in found.values():
        assert line["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-12)
        assert line["grad_norms"] == pytest.approx(found["ddp"]["grad_norms"], rel=1e-12)
    assert found["ddp"]["losses"][-1] != found["ddp"]["losses"][0]


def test_kept_memory_is_what_the_shapes_say(compared: Path) -> None:
    from dataclasses import replace

    whole = 8 * parameter_count(replace(SIZES["tiny"], vocab_size=ROWS))  # float64
    shares = {"ddp": 1, "shard_grad_op": 2, "full_shard": 2, "hybrid_shard": 1}
    for strategy, line in lines(compared).items():
        kept = line["kept"]
        assert kept["parameters"] == kept["gradients"] == pytest.approx(whole / shares[strategy], rel=1e-3)
        assert kept["moments"] == pytest.approx(2 * whole / shares[strategy], rel=1e-3)
        assert 0 < line["peak_bytes"] < 2**31


def test_times_stall_and_pictures_are_there(compared: Path) -> None:
    for line in lines(compared).values():
        assert len(line["step_seconds"]) == line["trials"] == 2
        assert 0 < line["seconds_min"] <= line["seconds"] <= line["seconds_max"]
        assert line["tokens_per_second"] == pytest.approx(4 * 32 / line["seconds"])
        assert 0 <= line["stall"]["waiting"] < 1
    shown = (compared / "results.txt").read_text()
    assert all(f"\n{strategy} " in shown for strategy in STRATEGIES)
    with Image.open(compared / "compare.png") as image:
        assert len(set(image.convert("L").tobytes())) > 5


def test_zero_joins_in_float32(compared: Path) -> None:
    names = ["ddp", *ZERO]
    run = compare(compared.parent, "steps=2", "untimed=1", "dtype=float32", f"strategies={','.join(names)}")
    found = lines(run)
    assert list(found) == names
    whole = found["ddp"]["kept"]["moments"]
    for line in found.values():
        assert line["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-6)
        # AdamW's first update is the gradient's sign, where it is not tiny: rounding decides about those that are.
        assert line["grad_norms"] == pytest.approx(found["ddp"]["grad_norms"], rel=5e-4)
        assert line["kept"]["moments"] == pytest.approx(
            whole / (1 if line["strategy"] == "ddp" else 2), rel=1e-3
        )
    # In float32, too, ZeRO computes with one copy of the parameters and updates another.
    parameters = found["ddp"]["kept"]["parameters"]
    # Stage 3 slices both, and leaves whole beside its slices what is small: here all but the one table.
    table = 4 * ROWS * SIZES["tiny"].width
    for name, copies in (("zero1", 1.5), ("zero2", 1.5), ("zero3", 2 - table / parameters)):
        assert found[name]["kept"]["parameters"] == pytest.approx(copies * parameters, rel=1e-2)


def test_zero_in_float64_is_refused_before_anything_starts() -> None:
    with pytest.raises(ArgumentError, match="zero2 keeps its parameters in float32"):
        CompareArgs(strategies=["ddp", "zero2"], dtype="float64")


def test_there_is_a_way_to_build_each_strategy() -> None:
    from recipes.ch4.compare import STRATEGIES as BUILDERS

    assert tuple(CompareArgs().strategies) == STRATEGIES
    assert tuple(BUILDERS) == (*STRATEGIES, *ZERO)


def test_a_gpus_stall_is_where_no_kernel_computes() -> None:
    """Two streams: 0..4 and 6..8 compute; an all-gather from 3 to 5 is exposed for 1; 5..6 and 8..10 nothing runs."""
    kernels = [
        ("gemm", (0.0, 2.0)), ("gemm", (1.0, 4.0)), ("ncclDevKernel_AllGather", (3.0, 5.0)), ("silu", (6.0, 8.0)),
        ("ncclDevKernel_ReduceScatter", (10.0, 10.0)),
    ]  # fmt: skip
    found = stall_of(kernels)
    assert found.waiting == pytest.approx(4 / 10)
    assert found.communication == pytest.approx(1 / 10)
    assert covered([]) == 0


def test_a_cpus_stall_is_what_it_waits() -> None:
    def half() -> None:
        began = time.thread_time()
        while time.thread_time() - began < 0.2:
            pass
        time.sleep(0.2)

    assert measure_stall(lambda: time.sleep(0.1), CPU).waiting > 0.9
    assert measure_stall(half, CPU).waiting > 0.4  # more where others have the core
    assert measure_stall(half, CPU).communication is None


def test_the_peak_is_what_was_in_use_and_begins_anew() -> None:
    size = 200 * 2**20
    watched = PeakMemory(CPU)
    taken = torch.ones(size // 4)
    assert watched.peak() >= 0.95 * size
    del taken
    again = PeakMemory(CPU)
    assert again.peak() < 0.2 * size
    assert not dist.is_initialized()
