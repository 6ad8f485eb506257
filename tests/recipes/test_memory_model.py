"""The planner's memory: against numbers worked out by hand, torch's own trackers, and what was measured on H200s."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from recipes.ch2.predictions import MEASURED, MEASURED_ONES, TO_MEASURE, measured, predict
from recipes.ch5.memory import PREDICTED
from recipes.lib import layer_memory, model
from recipes.lib.calibration import CALIBRATION, GIB
from recipes.lib.memory_model import predict_memory
from recipes.lib.model_sizes import SIZES, ModelSize
from recipes.lib.workload import Workload
from tests.recipes.tracked_memory import ranks, tracked_peak

LLAMA_8B = Workload(size=SIZES["llama_8b"], sequence_length=4096, microbatch=1)
NO_WORKSPACE = dataclasses.replace(CALIBRATION, workspace_bytes=0)
SMALL = ModelSize(
    layers=2, width=8, heads=2, kv_heads=1, ffn_width=24, vocab_size=10, rope_theta=1e4, tied=False
)  # fmt: skip


def test_the_head_s_chunks_are_the_model_s() -> None:
    assert layer_memory.MAX_LOGITS == model.MAX_LOGITS


def test_states_of_llama_8b_are_sixteen_bytes_a_parameter() -> None:
    work = dataclasses.replace(LLAMA_8B, data=4, shard=4)
    memory = predict_memory(work)
    update = memory.moments[-1].parts
    # 8,030,261,248 parameters in float32 over four GPUs: 8,030,261,248 bytes.
    assert update["parameters"] == pytest.approx(8_030_261_248)
    assert update["gradients"] == pytest.approx(8_030_261_248)
    assert update["optimizer"] == pytest.approx(16_060_522_496)
    assert memory.certain == pytest.approx(32_121_044_992)


def test_predicted_parameters_are_the_real_model_s_bytes() -> None:
    for name in ("llama_1b", "llama_8b", "smollm2_135m"):
        with torch.device("meta"):
            real = sum(parameter.nbytes for parameter in model.Transformer(SIZES[name]).parameters())
        work = Workload(size=SIZES[name], sequence_length=128, microbatch=1, strategy="single")
        assert predict_memory(work).moments[-1].parts["parameters"] == real


@pytest.mark.parametrize(
    ("checkpointing", "compiled", "kept"),
    [
        # 6 tokens. One array of [tokens, 8] in bfloat16 is 96 bytes, of keys or values 48, of [tokens, 24] 288. The
        # logarithms of two heads are 48 bytes, the roots of two norms 48.
        ("full", False, 96),
        # x, normed, q, k, v, attention, x, normed; gate, SiLU, up, product.
        ("none", False, 6 * 96 + 2 * 48 + 4 * 288 + 48 + 48),
        # x, q, k, v, o, gate, up, down, attention.
        ("selective", False, 5 * 96 + 2 * 48 + 2 * 288 + 48),
        # x, normed, q, k, v, attention, o, normed; gate, up, product.
        ("none", True, 6 * 96 + 2 * 48 + 3 * 288 + 48 + 48),
        # x, q, k, v, attention, o; gate, up.
        ("selective", True, 4 * 96 + 2 * 48 + 2 * 288 + 48),
    ],
)
def test_what_a_layer_keeps_is_what_is_counted_by_hand(checkpointing: str, compiled: bool, kept: int) -> None:
    work = Workload(
        size=SMALL,
        sequence_length=3,
        microbatch=2,
        checkpointing=checkpointing,
        compiled=compiled,
        data=2,
        shard=2,
    )
    assert layer_memory.layer_bytes(work, CALIBRATION).kept == kept


@pytest.mark.parametrize("run", MEASURED_ONES, ids=lambda run: run.name)
def test_what_was_measured_on_h200s_comes_out(run: object) -> None:
    one = predict(run)  # type: ignore[arg-type]
    memory, seconds = measured(MEASURED / f"{one['name']}.jsonl", one["tokens_per_step"], one["gpus"])
    assert one["memory_gib"] == pytest.approx(memory, rel=1e-3)
    assert one["step_seconds"] == pytest.approx(seconds, rel=0.03)


def test_ddp_has_one_set_of_buckets_and_what_autocast_holds() -> None:
    """As measured on an H200 once the first buckets were let go of (benchmarks/one_gpu_h200_2026-11-22.md)."""
    (run,) = (run for run in TO_MEASURE if run.name == "1b_1gpu_ddp_none")
    assert predict(run)["memory_gib"] == pytest.approx(44.588, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "strategy", "checkpointing", "recomputed", "data"),
    [
        ("llama_8b", "full_shard", "full", 0, 4),
        ("llama_8b", "shard_grad_op", "selective", 0, 4),
        ("llama_8b", "shard_grad_op", "selective", 1, 4),
        ("llama_1b", "single", "none", 0, 1),
    ],
)
def test_torch_s_own_tracker_agrees(
    name: str, strategy: str, checkpointing: str, recomputed: int, data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of the real width, their operations one by one."""
    size = dataclasses.replace(SIZES[name], layers=2)
    work = Workload(
        size=size, sequence_length=4096, microbatch=2, strategy=strategy, data=data,
        shard=data, checkpointing=checkpointing, recomputed_layers=recomputed,
    )  # fmt: skip
    with ranks(data):
        tracked = tracked_peak(work, monkeypatch)
    assert predict_memory(work, NO_WORKSPACE).peak.tensor_bytes == pytest.approx(tracked, rel=0.02)
    assert tracked > 4 * GIB


@pytest.mark.parametrize(
    ("recipe", "ranks", "measured", "args"),
    [
        ("ch5_deepspeed", 4, 110.76, {"stage": 2, "batch_size": 16, "compile": True}),
        ("ch5_deepspeed", 4, 103.51, {"stage": 3, "batch_size": 12}),
        ("ch5_megatron", 4, 124.03, {"batch_size": 16, "microbatch_size": 2, "overlap": True}),
    ],
)
def test_what_was_measured_on_four_h200s_comes_out(
    recipe: str, ranks: int, measured: float, args: dict[str, object]
) -> None:
    """benchmarks/several_h200_2026-11-22.md; Megatron-Core's is a formula and two measurements, its own beside this."""
    arguments, needed, _ = PREDICTED[recipe]
    needs: Any = needed(arguments(model="llama_8b", sequence_length=4096, **args), ranks)
    predicted = needs.needed if recipe == "ch5_megatron" else needs.peak.tensor_bytes
    assert predicted / GIB == pytest.approx(measured, rel=0.01)
