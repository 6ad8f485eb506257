"""The planner as people use it: what it recommends, what it refuses, and how fast."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.ch2.plan import request_of
from recipes.ch2.plan_args import PlanArgs
from recipes.ch2.plan_dry_run import shards_of
from recipes.ch2.predictions import COMMITTED, TO_MEASURE
from recipes.lib.arguments import ArgumentError, parse
from recipes.lib.calibration import CALIBRATION
from recipes.lib.flop_parts import counted, parts_of
from recipes.lib.flops import flops_per_token
from recipes.lib.gpus import GPUS, gpu_of_sku
from recipes.lib.model_sizes import SIZES
from recipes.lib.planner import best_of_each, candidates, recommended, what_would_fit
from recipes.lib.step_time_model import Fabric, predict_step_time
from recipes.lib.workload import Workload

ROOT = Path(__file__).resolve().parents[2]


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.ch2.plan", *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_a_plan_says_which_way_and_why() -> None:
    done = plan("model=llama_8b", "gpu=h200", "nodes=4")
    assert done.returncode == 0, done.stderr
    for said in ("GiB to spare", "optimizer", "matrix products", "recommended: ", "why: ", "not "):
        assert said in done.stdout


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['plan', 'json=true']; from recipes.ch2.plan import main; main(); "
        "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    answer = json.loads(done.stdout)
    assert answer["recommended"]["fits"]
    assert (
        answer["recommended"]["tokens_per_second_per_device"]
        == max(each["tokens_per_second_per_device"] for each in answer["strategies"] if each["fits"])
        or answer["recommended"]["strategy"]
    )


def test_the_fastest_wins_unless_a_simpler_one_is_as_fast() -> None:
    found = candidates(request_of(parse(PlanArgs, ["model=llama_1b", "gpu=h200", "nodes=1"])))
    best = recommended(found)
    assert best is not None
    fastest = max(each.tokens_per_second for each in found if each.fits)
    assert best.fits
    assert best.tokens_per_second >= 0.98 * fastest
    assert (best.work.tensor, best.work.pipeline) == (1, 1), "a model that fits whole needs neither"


def test_what_cannot_fit_says_by_how_much_and_what_would() -> None:
    done = plan("model=llama_70b", "gpu=h100", "nodes=1")
    assert done.returncode == 1
    assert "does not fit: the nearest, " in done.stdout
    assert "GiB more than a H100" in done.stdout
    assert "would fit: nodes=" in done.stdout
    request = request_of(parse(PlanArgs, ["model=llama_70b", "gpu=h100", "nodes=1"]))
    # 70,553,706,496 parameters of 16 bytes over 8 GPUs are 131.4 GiB: more than 79.1 whatever is done.
    nearest = best_of_each(candidates(request))[0]
    assert nearest.spare_gib < 79.1 - 131.4
    nodes = (
        next(word for word in what_would_fit(request) if word.startswith("nodes="))
        .split(":")[0]
        .split("=")[1]
    )
    more = candidates(dataclasses.replace(request, nodes=int(nodes)))
    assert any(each.fits for each in more)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model=lama_8b"], "model=lama_8b: wants one of"),
        (["gpu=h20"], "gpu=h20: wants one of a100_40, a100, h100, h100_pcie, h100_nvl, h200, h200_nvl, b200; "),
        (["tensor=3"], "tensor=3: tensor 3 x pipeline 1 = 3 does not divide 8 GPUs (1 x 8); nearest: 2"),
        (["nodes=3", "tensor=4", "pipeline=4"], "tensor=4: tensor 4 x pipeline 4 = 16 does not"),
        (["tensor=16", "nodes=2"], "tensor=16: wants a divisor of 8, the key/value heads of llama_8b"),
        (["sequence_length=16384"], "sequence_length=16384: wants at most 8192, the context that llama_8b"),
        (["batch_size=12"], "batch_size=12: wants a multiple of 8: shares of the batch times microbatch_size"),
        (["pipeline=64", "nodes=8"], "pipeline=64: wants at most 32, the layers of llama_8b"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        candidates(request_of(parse(PlanArgs, words)))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_mistake_on_the_command_line_has_status_2() -> None:
    done = plan("gpu=h20")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: gpu=h20: ")


@pytest.mark.parametrize(
    ("sku", "gpu"),
    [
        ("H100 80GB", "h100"),
        ("H200", "h200"),
        ("A100", "a100"),
        ("NVIDIA B200", "b200"),
        ("H20", None),
        ("", None),
    ],
)
def test_a_profile_s_word_for_a_gpu_is_understood_or_unknown(sku: str, gpu: str | None) -> None:
    assert gpu_of_sku(sku) == (None if gpu is None else GPUS[gpu])


def test_time_of_products_is_their_flop_over_the_rate() -> None:
    work = Workload(size=SIZES["llama_8b"], sequence_length=4096, microbatch=1)
    time = predict_step_time(work, GPUS["h200"], Fabric(8, 50.0))
    # 32 layers of 218,103,808 multiplied parameters and 128,256 x 4,096 of the head, 6 FLOP each, 4,096 tokens.
    flop = 6 * 4096 * (32 * 218_103_808 + 525_336_576)
    assert time.parts["matrix products"] == pytest.approx(
        flop / (989e12 * CALIBRATION.matrix_share * CALIBRATION.model_share)
    )
    assert "communication, exposed" not in time.parts


def test_a_slow_network_is_seen_only_by_those_who_use_it() -> None:
    work = Workload(size=SIZES["llama_8b"], sequence_length=4096, microbatch=1, data=16, shard=16)
    fast, slow = (predict_step_time(work, GPUS["h200"], Fabric(8, rate)).seconds for rate in (400.0, 5.0))
    assert slow > 2 * fast
    inside = dataclasses.replace(work, data=8, shard=8)
    assert (
        len({predict_step_time(inside, GPUS["h200"], Fabric(8, rate)).seconds for rate in (400.0, 5.0)}) == 1
    )


def test_a_bubble_shrinks_with_more_microbatches() -> None:
    work = Workload(size=SIZES["llama_8b"], sequence_length=4096, microbatch=1, pipeline=4, microbatches=4)
    times = [
        predict_step_time(dataclasses.replace(work, microbatches=rounds), GPUS["h200"], Fabric(8, 50.0))
        for rounds in (4, 16)
    ]
    bubbles = [time.parts["pipeline bubble"] / time.seconds for time in times]
    assert bubbles[0] > 2 * bubbles[1] > 0


def test_the_committed_predictions_are_of_runs_that_calibrate_nothing() -> None:
    committed = json.loads(COMMITTED.read_text())
    assert [one["name"] for one in committed] == [each.name for each in TO_MEASURE]
    assert len(committed) >= 8
    assert all(not one["calibrates"] for one in committed)
    assert all(0 < one["memory_gib"] < 139.8 and one["step_seconds"] > 0 for one in committed)
    text = COMMITTED.with_suffix(".md").read_text()
    assert all(one["command"] in text for one in committed)


def test_a_dry_run_of_1024_ranks_has_the_slices_that_rows_make() -> None:
    size = SIZES["llama_1b"]
    rows = {  # rows and columns of every matrix, and how many of it
        (128_256, 2048): 1, (2048, 2048): 2 * size.layers, (512, 2048): 2 * size.layers,
        (8192, 2048): 2 * size.layers, (2048, 8192): size.layers, (2048, 1): 2 * size.layers + 1,
    }  # fmt: skip
    found = shards_of("llama_1b", ranks=1024, rank=0)
    assert found.bytes == sum(4 * -(-row // 1024) * column * count for (row, column), count in rows.items())
    assert (found.slices, found.empty) == (sum(rows.values()), 0)
    # FSDP2 cuts 512 rows into 512 slices: half of the ranks have none of a key or value projection.
    assert shards_of("llama_1b", ranks=1024, rank=1023).empty == 2 * size.layers + 1


@pytest.mark.parametrize("name", ["llama_1b", "llama_8b"])
def test_formula_and_torch_s_counter_differ_by_the_norms_alone(name: str) -> None:
    size, length = dataclasses.replace(SIZES[name], layers=2), 128
    cost, count = flops_per_token(size, length), counted(size, length)
    parts = parts_of(size, length)
    assert sum(part.full for part in parts) == pytest.approx(cost.full)
    assert sum(part.causal for part in parts) == pytest.approx(cost.causal)
    gains = (2 * size.layers + 1) * size.width
    assert count.forward + count.backward == pytest.approx(cost.full - 6 * gains)
    # The head makes its gradients in the forward pass: three products there, none in the backward pass.
    head = 2 * size.vocab_size * size.width
    assert count.backward == pytest.approx(2 * (count.forward - 3 * head))


def test_what_full_recomputation_adds_is_a_forward_pass_without_its_last_product() -> None:
    size, length = dataclasses.replace(SIZES["smollm2_135m"], layers=2), 128
    again = counted(size, length, "full").backward - counted(size, length).backward
    matrices = 576 * (2 * 9 * 64 + 2 * 3 * 64) + 2 * 576 * 1536  # q, k, v, o, gate, up; not down
    assert again == pytest.approx(2 * (2 * matrices + 4 * 576 * length))
