"""What an optimizer step sends, repeats and refuses: each technique in this process alone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from recipes.ch3.ddp import Replicated
from recipes.ch3.ddp_args import DdpArgs
from recipes.lib.arguments import ArgumentError
from recipes.lib.distributed import World
from recipes.lib.loss_scale import GROWTH_STEPS, SMALLEST, LossScale
from recipes.lib.own_time import OwnTime
from recipes.lib.training import optimizer_step
from tests.recipes.parity import Case, build, make_data, plan_for

MICROBATCHES = {"batch_size": 6, "microbatch_size": 2}
"""Three of them a step."""


def test_ddp_sends_gradients_once_a_step(tmp_path: Path, one_rank: World) -> None:
    """Sent after every microbatch, they would come to the same sum at three times the traffic."""
    make_data(tmp_path / "data")
    case, sent = Case("ddp", "ddp", 1, args=MICROBATCHES), []
    plan = plan_for(case, tmp_path, one_rank)
    technique = build(case, plan)
    assert isinstance(technique, Replicated)

    def count(state, bucket):  # type: ignore[no-untyped-def] # DDP refuses annotations that are text
        sent.append(bucket.index())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    technique.model.register_comm_hook(None, count)
    optimizer_step(plan, technique, 1, OwnTime(technique.model, plan.world.device))
    assert sent
    assert len(sent) == len(set(sent))


def test_a_compiled_layer_stays_one_graph_inside_of_ddp(
    tmp_path: Path, one_rank: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would cut it where a bucket ends; and with recomputation in the graph it would refuse to."""
    make_data(tmp_path / "data")
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    args = {"batch_size": 2, "compile": True, "bucket_mb": 0.01, "activation_checkpointing": "full"}
    case = Case("compiled", "ddp", 1, args=args)
    plan = plan_for(case, tmp_path, one_rank)
    technique = build(case, plan)
    own = OwnTime(technique.model, plan.world.device)
    loss, _ = optimizer_step(plan, technique, 1, own)
    assert loss.isfinite()
    assert len(graphs) == 2, "one that both layers share, and the loss"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"compression": "bfloat16"}, "compression=bfloat16: wants NCCL, that is GPUs; gloo sums float16"),
        (
            {"compression": "power_sgd", "bucket_mb": 0.1},
            "bucket_mb=0.1: wants 0.5 or more, one bucket for all",
        ),
    ],
)
def test_what_gloo_cannot_compress_is_refused(
    args: dict[str, object], line: str, tmp_path: Path, one_rank: World
) -> None:
    make_data(tmp_path / "data")
    plan = plan_for(Case("refused", "ddp", 1, args={"batch_size": 2, **args}), tmp_path, one_rank)
    with pytest.raises(ArgumentError, match=line):
        Replicated.build(plan, plan.args)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            {"dtype": "float16", "compression": "power_sgd"},
            "compression=power_sgd: an overflow of dtype=float16",
        ),
        ({"steps": 5, "profile": 3}, "profile=3: wants steps=6 or more; steps=5"),
    ],
)
def test_arguments_that_cannot_go_together(args: dict[str, Any], line: str) -> None:
    with pytest.raises(ArgumentError, match=line):
        DdpArgs(**args)


def test_a_static_graph_is_refused_with_several_microbatches(tmp_path: Path, one_rank: World) -> None:
    make_data(tmp_path / "data")
    plan = plan_for(Case("static", "ddp", 1, args={**MICROBATCHES, "static_graph": True}), tmp_path, one_rank)
    with pytest.raises(
        ArgumentError, match=r"static_graph=true: wants one microbatch a step, this run has 3"
    ):
        Replicated.build(plan, plan.args)


def test_float16_repeats_what_overflows(tmp_path: Path, one_rank: World) -> None:
    """The first number is too large for this loss: it is halved until nothing overflows, and no step is lost."""
    make_data(tmp_path / "data")
    results = {}
    for first in (2.0**16, 2.0**40):
        case = Case(f"half-{first}", "ddp", 1, args={"batch_size": 4, "dtype": "float16"})
        plan = plan_for(case, tmp_path, one_rank)
        technique = build(case, plan)
        assert isinstance(technique, Replicated)
        assert technique.scale is not None
        technique.scale.value = first
        own = OwnTime(technique.model, plan.world.device)
        steps = [optimizer_step(plan, technique, step, own) for step in (1, 2)]
        results[first] = [value.item() for step in steps for value in step]
        assert technique.scale.value <= 2.0**24
    assert results[2.0**40] == pytest.approx(results[2.0**16], rel=1e-3)


def test_the_number_of_float16_grows_again(one_rank: World) -> None:
    scale, model = LossScale(), torch.nn.Linear(2, 1)
    scale.value = 4.0

    def passes(number: float) -> torch.Tensor:
        model.zero_grad()
        (model(torch.ones(1, 2)).sum() * number).backward()
        return torch.tensor(number)

    for _ in range(GROWTH_STEPS):
        used = scale.gradients(model, passes)
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[1.0, 1.0]], "the gradients are those of the loss itself"
    assert (used.item(), scale.value) == (4.0, 8.0)
    again = LossScale()
    again.restore(scale.state())
    assert again.state() == scale.state()
    again.restore({})
    assert again.state() == LossScale().state()


def test_a_gradient_that_no_number_helps_is_passed_on(one_rank: World) -> None:
    scale, model = LossScale(), torch.nn.Linear(2, 1)

    def passes(number: float) -> torch.Tensor:
        (model(torch.full((1, 2), torch.inf)).sum() * number).backward()
        return torch.tensor(number)

    assert scale.gradients(model, passes).item() == SMALLEST
    assert model.weight.grad is not None
    assert not model.weight.grad.isfinite().all()


def test_hybrid_shard_sums_over_copies_once_a_step(
    tmp_path: Path, one_rank: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path / "data")
    case = Case("hybrid", "fsdp", 1, args={**MICROBATCHES, "strategy": "hybrid_shard"})
    summed = []
    plan = plan_for(case, tmp_path, one_rank)
    technique = build(case, plan)
    sharded = [module for module in technique.model.modules() if isinstance(module, FSDPModule)]
    send = dist.all_reduce

    def count(tensor: torch.Tensor, *args: object, **options: object) -> object:
        summed.append(tensor.shape)
        return send(tensor, *args, **options)

    monkeypatch.setattr(dist, "all_reduce", count)
    optimizer_step(plan, technique, 1, OwnTime(technique.model, plan.world.device))
    # The root holds nothing of its own, and the head shares the last norm's group.
    assert len(summed) == len(sharded) - 2
