"""What data and tensor parallelism by hand send, and when; what they refuse; how they are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from recipes.ch2 import data_parallel, tensor_parallel
from recipes.ch2.data_parallel import Copies
from recipes.ch2.data_parallel_args import DataParallelArgs
from recipes.ch2.tensor_parallel_args import TensorParallelArgs
from recipes.lib.arguments import ArgumentError, parse
from recipes.lib.distributed import World
from recipes.lib.gradient_sums import buckets, pack, unpack
from recipes.lib.own_time import OwnTime
from recipes.lib.step_times import compare
from recipes.lib.training import optimizer_step
from tests.recipes.parity import SEQUENCE_LENGTH, SIZE, VOCABULARY, Case, build, make_data, plan_for

ROOT = Path(__file__).resolve().parents[2]
MICROBATCHES = {"batch_size": 6, "microbatch_size": 2}
"""Three of them a step."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what is all-reduced from here on."""
    shapes: list[torch.Size] = []
    send = dist.all_reduce

    def noted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(tensor.shape)
        return send(tensor, *args, **options)

    monkeypatch.setattr(dist, "all_reduce", noted)
    return shapes


# --- data parallelism ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["flat", "bucketed", "overlapped"])
def test_gradients_are_sent_once_a_step(
    variant: str, tmp_path: Path, one_rank: World, sent: list[torch.Size]
) -> None:
    """Sent after every microbatch, they would come to the same sum at three times the traffic."""
    make_data(tmp_path / "data")
    case = Case(variant, "data_parallel", 1, args={**MICROBATCHES, "variant": variant, "bucket_mb": 0.05})
    plan = plan_for(case, tmp_path, one_rank)
    technique = build(case, plan)
    sent.clear()
    optimizer_step(plan, technique, 1, OwnTime(technique.model, plan.world.device))
    parameters = list(technique.model.parameters())
    expected = [parameters] if variant == "flat" else buckets(parameters, 0.05 * 2**20)
    assert len(expected) == 1 if variant == "flat" else len(expected) > 3
    assert [shape.numel() for shape in sent] == [sum(each.numel() for each in bucket) for bucket in expected]


def test_the_last_layers_gradients_leave_while_the_first_are_computed(
    tmp_path: Path, one_rank: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path / "data")
    case = Case("overlapped", "data_parallel", 1, args={**MICROBATCHES, "bucket_mb": 0.05})
    plan = plan_for(case, tmp_path, one_rank)
    technique = build(case, plan)
    optimizer_step(plan, technique, 1, OwnTime(technique.model, plan.world.device))
    (first_layer, *_) = technique.model.layers  # type: ignore[misc]
    computed: list[bool] = []
    arrived = first_layer.self_attn.q_proj.weight
    handle = arrived.register_post_accumulate_grad_hook(lambda _: computed.append(True))
    before: list[int] = []
    send = dist.all_reduce

    def noted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        before.append(len(computed))
        return send(tensor, *args, **options)

    monkeypatch.setattr(dist, "all_reduce", noted)
    optimizer_step(plan, technique, 2, OwnTime(technique.model, plan.world.device))
    handle.remove()
    # After the third backward pass has begun, and before it comes to the first layer.
    assert before[0] == 2
    assert before[-1] == 3


def test_buckets_hold_everything_once_and_the_last_first() -> None:
    tensors = [torch.full((count,), float(count)) for count in (7, 1, 30, 2, 3)]
    found = buckets(tensors, 4 * 6)
    assert [[len(each) for each in bucket] for bucket in found] == [[3, 2], [30], [1], [7]]
    row = pack(found[0])
    unpack(row * 2, found[0])
    assert [each.tolist() for each in found[0]] == [[6.0] * 3, [4.0] * 2]


def test_copies_that_differ_are_seen_and_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="broadcast=false: wants save_every=-1"):
        parse(DataParallelArgs, ["broadcast=false"])
    done = torchrun(
        tmp_path,
        "recipes.ch2.data_parallel",
        "broadcast=false",
        "save_every=-1",
        "steps=1",
        "sequence_length=16",
    )
    assert done.returncode == 0, done.stderr
    before, after = (line for line in done.stdout.splitlines() if "the copies differ by" in line)
    assert before.startswith("without a broadcast the copies differ by 0.1"), before
    assert not after.endswith("by 0")


# --- tensor parallelism -------------------------------------------------------------------------------------


def test_logits_are_never_sent(tmp_path: Path, one_rank: World, sent: list[torch.Size]) -> None:
    make_data(tmp_path / "data")
    args = {"batch_size": 2, "tensor_parallel": 1}
    case = Case("split", "tensor_parallel", 1, args=args)
    plan = plan_for(case, tmp_path, one_rank)
    technique = build(case, plan)
    sent.clear()
    optimizer_step(plan, technique, 1, OwnTime(technique.model, plan.world.device))
    tokens = 2 * SEQUENCE_LENGTH
    activations = (2, SEQUENCE_LENGTH, SIZE.width)
    # The embedding, and per layer attention and feed-forward; the loss; all of it but the loss back again.
    per_pass = 1 + 2 * SIZE.layers
    loss = [(tokens,), (2, tokens)]
    expected = [activations] * per_pass + loss + [activations] * per_pass
    assert [tuple(shape) for shape in sent] == expected
    assert all(VOCABULARY not in shape for shape in sent)


def test_a_rank_holds_its_slices_under_the_names_of_the_whole(tmp_path: Path, one_rank: World) -> None:
    make_data(tmp_path / "data")
    shapes = {}
    for technique in ("baseline", "tensor_parallel"):
        args = {"batch_size": 2, **({"tensor_parallel": 1} if technique == "tensor_parallel" else {})}
        case = Case(technique, technique, 1, args=args)
        model = build(case, plan_for(case, tmp_path, one_rank)).model
        shapes[technique] = {name: each.shape for name, each in model.named_parameters()}
    assert shapes["tensor_parallel"] == shapes["baseline"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["tensor_parallel=3"],
            "tensor_parallel=3: wants a divisor of 4, the query heads of tiny: each rank has whole heads",
        ),
        (
            ["tensor_parallel=4"],
            "tensor_parallel=4: wants a divisor of 2, the key/value heads of tiny: each rank has whole heads",
        ),
        (
            ["model=llama_8b", "tensor_parallel=16"],
            "tensor_parallel=16: wants a divisor of 8, the key/value heads of llama_8b: each rank has whole heads",
        ),
        (
            ["sequence_parallel=true", "sequence_length=255"],
            "sequence_length=255: wants a multiple of tensor_parallel=2: each rank has an equal part of the sequence",
        ),
        (["by=hands"], "by=hands: wants one of hand, dtensor, compare; nearest: hand"),
    ],
)
def test_what_cannot_be_split_is_refused_before_submission(words: list[str], line: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        parse(TensorParallelArgs, words)
    assert str(raised.value) == line


def test_ranks_that_tensor_parallel_does_not_divide(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.ch2.tensor_parallel", "tensor_parallel=2"],
        cwd=ROOT, env={**os.environ, "RUN_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: tensor_parallel=2: wants a divisor of 1, the number of ranks\n"


# --- comparing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "names"),
    [
        ("data_parallel", ["nothing is sent", "flat", "bucketed", "overlapped", "torch's DDP"]),
        (
            "tensor_parallel",
            ["1 whole copies", *["1 copy split in 1: by hand"] * 2, *["1 copy split in 1: DTensor"] * 2],
        ),
    ],
)
def test_all_are_timed_on_the_same_work(
    technique: str, names: list[str], tmp_path: Path, one_rank: World
) -> None:
    make_data(tmp_path / "data")
    which = (
        {"variant": "compare"} if technique == "data_parallel" else {"by": "compare", "tensor_parallel": 1}
    )
    case = Case("comparison", technique, 1, args={"batch_size": 2, **which})
    plan = plan_for(case, tmp_path, one_rank)
    plan.run_directory.mkdir()
    chapter = {"data_parallel": data_parallel, "tensor_parallel": tensor_parallel}[technique]
    found = compare(chapter.contestants(plan, plan.args), trials=2, budget=0.01)  # type: ignore[attr-defined]
    assert [each.name.startswith(name) for each, name in zip(found, names, strict=True)] == [True] * len(
        names
    )
    folder = tmp_path / "comparison"
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["kind"] == "measurement"]
    assert [line["name"] for line in measured] == [each.name for each in found]
    for line in measured:
        assert 0 < line["seconds_min"] <= line["seconds"] <= line["seconds_max"]
        assert line["spread"] == pytest.approx((line["seconds_max"] - line["seconds_min"]) / line["seconds"])
    assert len({line["parameter_bytes"] for line in measured}) == 1, "one rank holds everything"
    assert "beside the first" in (folder / "results.txt").read_text()
    with Image.open(folder / "steps.png") as image:
        assert len(set(image.convert("L").tobytes())) > 5


def test_what_is_compared_with_sends_nothing(tmp_path: Path, one_rank: World, sent: list[torch.Size]) -> None:
    make_data(tmp_path / "data")
    case = Case("comparison", "data_parallel", 1, args={"batch_size": 2, "variant": "compare"})
    plan = plan_for(case, tmp_path, one_rank)
    assert isinstance(plan.args, DataParallelArgs)
    alone, flat, *_ = data_parallel.contestants(plan, plan.args)
    messages = []
    for contestant in (alone, flat):
        technique = contestant.build(plan)
        assert isinstance(technique, Copies)
        sent.clear()
        optimizer_step(plan, technique, 1, OwnTime(technique.model, plan.world.device))
        messages.append(len(sent))
    assert messages == [0, 1]


def torchrun(folder: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", module, *words]
    environment = {**os.environ, "RUN_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
