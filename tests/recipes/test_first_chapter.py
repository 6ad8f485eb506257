"""`ch1_profile` and `ch1_first_steps` as a reader starts them: what they leave behind, and what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from recipes.ch1.first_steps_args import FirstStepsArgs
from recipes.lib.arguments import ArgumentError
from recipes.lib.flops import flops_per_token
from recipes.lib.model_sizes import SIZES
from recipes.lib.roofline import Roof
from recipes.lib.step_trace import PARTS, PREFIX
from recipes.lib.workloads import Gain, Workload
from tests.recipes.ranks import run_ranks, told
from tests.recipes.test_measuring_recipes import ROOT, Done, run

SMALL = ("batch_size=4", "sequence_length=64", "steps=2", "warmup_steps=1")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two ranks, of which the second one's disk pretends to be slow."""
    folder = tmp_path_factory.mktemp("profile")
    done = run(folder, "recipes.ch1.profile", *SMALL, "input_delay=4", "delayed_rank=1")
    assert done.status == 0, done.err[-4000:]
    return done


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory: pytest.TempPathFactory) -> Done:
    words = ("prompt_tokens=16", "new_tokens=4", "requests=6", "rows=2")
    done = run(tmp_path_factory.mktemp("steps"), "recipes.ch1.first_steps", *SMALL, *words)
    assert done.status == 0, done.err[-4000:]
    return done


def measured(done: Done, beginning: str) -> dict[str, Any]:
    (line,) = [line for line in done.lines("measurement") if line["what"].startswith(beginning)]
    return line


# --- ch1_profile ------------------------------------------------------------------------------------------


def test_a_slow_input_is_named_with_its_rank(profiled: Done) -> None:
    verdict = measured(profiled, "bottleneck")
    assert (verdict["bottleneck"], verdict["rank"]) == ("input", 1)
    assert "bottleneck: input, " in profiled.out
    assert "on rank 1, which the others wait for" in profiled.out
    waits = verdict["ranks"][0]
    assert waits["network"] > 1.5, "rank 0 waits in the exchange for what rank 1 reads"
    assert waits["input"] < 1


def test_the_parts_add_up_to_the_step(profiled: Done) -> None:
    verdict = measured(profiled, "bottleneck")
    assert sum(verdict["parts"].values()) == pytest.approx(verdict["seconds_profiled"])
    assert set(verdict["parts"]) <= set(PARTS)
    assert {
        "input",
        "forward: attention",
        "forward: head and loss",
        "backward",
        "exchange",
        "optimizer",
    } <= set(verdict["parts"])
    for rank in verdict["ranks"]:
        assert all(seconds >= 0 for seconds in rank.values())


def test_memory_is_told_by_part(profiled: Done) -> None:
    verdict = measured(profiled, "bottleneck")
    parameters = verdict["kept_bytes"]["parameters"]
    # Two moments as large as the parameters, and a step counter of 4 bytes for each of them.
    assert 2 * parameters <= verdict["kept_bytes"]["optimizer's moments"] < 2.01 * parameters
    assert verdict["kept_bytes"]["gradients, in DDP's buckets"] == parameters
    assert verdict["peak_bytes"]["forward: head and loss"] > 4 * 64 * 2 * 4096 * 4, (
        "logits of two sequences, at least"
    )
    assert verdict["peak_bytes"]["backward"] >= verdict["peak_bytes"]["optimizer"]
    assert verdict["host_peak_bytes"] > parameters


def test_every_rank_leaves_a_trace_with_the_parts_in_it(profiled: Done) -> None:
    for rank in (0, 1):
        events = json.loads((profiled.folder / f"trace-rank-{rank}.json").read_text())["traceEvents"]
        names = [event["name"].removeprefix(PREFIX) for event in events if event["name"].startswith(PREFIX)]
        assert names.count("step") == names.count("input") == names.count("optimizer") == 2
        assert names.count("attention") == names.count("feed-forward") == 2 * 4, "four layers"
        assert "gloo:all_reduce" in {event["name"] for event in events}


def test_the_profiled_run_is_drawn(profiled: Done) -> None:
    with Image.open(profiled.folder / "profile.png") as image:
        assert image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or ()}
    assert (224, 142, 43) in colours, "the input's colour: it is most of the step"


def test_one_device_alone_with_recomputation(tmp_path: Path) -> None:
    words = ("activation_checkpointing=full", "technique=fsdp", *SMALL)
    done = run(tmp_path, "recipes.ch1.profile", *words, ranks=1)
    assert done.status == 0, done.err[-4000:]
    verdict = measured(done, "bottleneck")
    assert verdict["parts"]["backward: recomputation"] > 0
    assert verdict["ranks"][0]["input"] < verdict["seconds_profiled"] / 2
    assert verdict["bottleneck"] != "input"
    assert "rank 0, which the others wait for" not in done.out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpus_kernels_are_counted_and_the_memory_is_kept_as_a_snapshot(tmp_path: Path) -> None:
    run_dir = {**os.environ, "RUN_DIR": str(tmp_path)}
    ended = run_ranks(["-m", "recipes.ch1.profile", *SMALL], 2, "cuda", run_dir)
    assert not told(ended), told(ended)
    verdict = measured(Done(0, ended[0].out, ended[0].err, tmp_path), "bottleneck")
    assert sum(verdict["parts"].values()) == pytest.approx(verdict["seconds_profiled"])
    assert verdict["parts"]["backward"] > 0
    assert verdict["exchange_seconds"] > 0, "NCCL's kernels"
    assert verdict["peak_bytes"]["backward"] > 0
    for rank in (0, 1):
        assert (tmp_path / f"memory-rank-{rank}.pickle").stat().st_size > 1000


# --- ch1_first_steps --------------------------------------------------------------------------------------


def test_one_rank_and_two_train_the_same_batch(first_steps: Done) -> None:
    gain = measured(first_steps, "2 ranks")
    assert gain["tokens"] == 4 * 64
    assert gain["speedup"] == pytest.approx(gain["one"] / gain["several"])
    assert gain["efficiency"] == pytest.approx(gain["speedup"] / 2)
    assert gain["exposed"] == pytest.approx(max(0.0, gain["several"] - gain["silent"]))
    assert "exchange not hidden" in first_steps.out


def test_operations_are_counted_as_they_ran(first_steps: Done) -> None:
    uses = measured(first_steps, "training, prefill")
    size = SIZES["tiny"]
    size = type(size)(**{**vars(size), "vocab_size": 4096})
    formula = flops_per_token(size, 64).full * 4 * 64
    assert uses["training"]["flops"] == pytest.approx(formula, rel=0.05)
    # Forward only, and one token: a third of training's, with attention to the 16 tokens of the prompt.
    assert uses["decoding"]["flops"] == pytest.approx(flops_per_token(size, 17).full / 3, rel=0.05)
    assert uses["decoding a batch"]["flops"] == 2 * uses["decoding"]["flops"]
    # The weights are read once for all rows; two rows are not twice the bytes.
    assert uses["decoding a batch"]["bytes"] < 1.5 * uses["decoding"]["bytes"]


def test_training_does_more_with_each_byte_than_decoding(first_steps: Done) -> None:
    uses = measured(first_steps, "training, prefill")
    order = ["training", "prefill", "decoding a batch", "decoding"]
    intensities = [uses[name]["intensity"] for name in order]
    assert intensities == sorted(intensities, reverse=True)
    assert uses["decoding"]["intensity"] < 1 < uses["training"]["intensity"]


def test_the_stream_was_answered_and_drawn(first_steps: Done) -> None:
    stream = measured(first_steps, "a stream")
    assert 0 <= stream["wait_median"] <= stream["first_token_median"] <= stream["first_token_max"]
    assert "limit of the stream: " in first_steps.out
    with Image.open(first_steps.folder / "first_steps.png") as image:
        assert image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


# --- figures and mistakes ---------------------------------------------------------------------------------


def test_what_limits_a_workload_follows_from_both_of_the_device_s_limits() -> None:
    roof = Roof(flops_per_second=1000.0, bytes_per_second=100.0)
    assert Workload("a", 1, 1, flops=900, bytes=10, seconds=1.0).limit(roof) == "compute"
    assert Workload("b", 1, 1, flops=90, bytes=90, seconds=1.0).limit(roof) == "memory"
    assert Workload("c", 1, 1, flops=9, bytes=9, seconds=1.0).limit(roof) == "host", "neither is near"


def test_an_exchange_that_is_hidden_costs_nothing() -> None:
    assert Gain(2, 10, one=2.0, several=1.25, silent=1.0).exposed == pytest.approx(0.25)
    assert Gain(2, 10, one=2.0, several=1.25, silent=1.3).exposed == 0.0
    assert Gain(2, 10, one=2.0, several=1.25, silent=1.0).efficiency == pytest.approx(0.8)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ArgumentError, match="compile=true: wants false"):
        FirstStepsArgs(compile=True)


def test_a_rank_that_is_not_there_cannot_be_delayed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.ch1.profile", "delayed_rank=1"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().endswith("error: delayed_rank=1: there are ranks 0 to 0")
