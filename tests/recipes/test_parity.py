"""Every technique trains exactly as one process does: same loss, same gradient norm, same initial weights.

All on the CPU with gloo. In float64 the only difference allowed is the order of summation, 1e-12 relative; in
float32 that order costs up to 1e-6 of the loss and 5e-5 of the norm.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from recipes.ch3.ddp import Replicated
from recipes.ch3.ddp_args import DdpArgs
from recipes.lib.arguments import ArgumentError
from recipes.lib.distributed import World, joined
from recipes.lib.loss_scale import GROWTH_STEPS, SMALLEST, LossScale
from recipes.lib.own_time import OwnTime
from recipes.lib.training import optimizer_step
from tests.recipes.parity import STEPS, Case, Outcome, build, launch, make_data, plan_for, run_cases

# The first test waits for every process of the file: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(900)

LAYOUTS = {
    # Every rank has the same share, in one piece.
    "even": {"args": {"batch_size": 8}},
    # On four ranks 1, 2, 1 and 2 sequences, one at a time; targets that do not count, unevenly; tied tables.
    "uneven": {"args": {"batch_size": 6, "microbatch_size": 1}, "ragged": True, "tied": True},
}
STRATEGIES = ("full_shard", "shard_grad_op", "hybrid_shard")
WORLD_SIZES = (1, 2, 4)
TOLERANCES = {"float64": (1e-12, 1e-12), "float32": (1e-6, 5e-5)}


def technique_cases(world_size: int) -> list[Case]:
    """DDP and each FSDP strategy, in each layout and both number formats."""
    cases = []
    for layout, facts in LAYOUTS.items():
        for dtype in TOLERANCES:
            common = {**facts, "world_size": world_size}
            name = f"{layout}-{dtype}-x{world_size}"
            args = {**facts["args"], "dtype": dtype}
            cases.append(Case(f"ddp-{name}", "ddp", **{**common, "args": args}))
            for strategy in STRATEGIES:
                slices = {"shard_size": 2} if strategy == "hybrid_shard" and world_size > 1 else {}
                sharded = {**args, "strategy": strategy, **slices}
                cases.append(Case(f"{strategy}-{name}", "fsdp", **{**common, "args": sharded}))
    return cases


def variant_cases(world_size: int) -> list[Case]:
    """What can be switched on beside a technique; float64, the uneven layout."""
    uneven = LAYOUTS["uneven"]
    switches = {
        "ddp-full-recompute": ("ddp", {"activation_checkpointing": "full"}),
        "ddp-many-buckets": ("ddp", {"bucket_mb": 0.02, "gradient_as_bucket_view": False}),
        "ddp-static-graph": ("ddp", {"static_graph": True, "microbatch_size": 0}),
        "ddp-sharded-optimizer": ("ddp", {"optimizer_sharding": True, "bucket_mb": 0.1}),
        "fsdp-full-recompute": ("fsdp", {"activation_checkpointing": "full"}),
        "fsdp-selective-recompute": ("fsdp", {"activation_checkpointing": "selective"}),
        "fsdp-offload": ("fsdp", {"cpu_offload": True}),
        "fsdp-deferred": ("fsdp", {"defer_reduction": True}),
        "hybrid-deferred-offload": (
            "fsdp",
            {"strategy": "hybrid_shard", "shard_size": 2, "defer_reduction": True, "cpu_offload": True},
        ),
        # Two microbatches of two sequences for shares of one and two: the second is padding alone on some
        # ranks.
        "fsdp-padded-microbatch": ("fsdp", {"microbatch_size": 2}),
    }
    return [
        Case(
            f"{name}-x{world_size}",
            technique,
            world_size,
            args={**uneven["args"], **args},
            ragged=True,
            tied=True,
        )
        for name, (technique, args) in switches.items()
    ]


def grid_cases() -> list[Case]:
    """Tensor, sequence and context parallelism with FSDP and with copies, on four ranks."""
    hybrid = {"strategy": "hybrid_shard", "shard_size": 2}
    grids: dict[str, dict[str, object]] = {
        "tensor2": {"tensor_parallel": 2},
        "context2": {"context_parallel": 2},
        # As many as heads, of which two have the same key and value.
        "context4": {"context_parallel": 4},
        "tensor2-context2": {"tensor_parallel": 2, "context_parallel": 2},
        "hybrid-tensor2": {**hybrid, "tensor_parallel": 2},
        "hybrid-context2": {**hybrid, "context_parallel": 2},
        "tensor2-switches": {
            "tensor_parallel": 2,
            "prefetch": 2,
            "cpu_offload": True,
            "activation_checkpointing": "selective",
            "kept": ["attention", "collectives"],
        },
        "tensor2-compiled": {"tensor_parallel": 2, "compile": True},
        "context2-compiled": {"context_parallel": 2, "compile": True},
        "context2-on-disk": {"context_parallel": 2, "optimizer_folder": tempfile.gettempdir()},
    }
    cases = []
    for name, grid in grids.items():
        for layout, facts in LAYOUTS.items():
            for dtype in TOLERANCES:
                # The whole matrix for one of each kind; the others where most can go wrong.
                if name == "tensor2-context2" or (layout, dtype) == ("uneven", "float64"):
                    args = {**facts["args"], "dtype": dtype, **grid}
                    cases.append(Case(f"fsdp-{name}-{layout}-{dtype}", "fsdp", 4, **{**facts, "args": args}))
    return cases


def idle_rank_cases(world_size: int) -> list[Case]:
    """Fewer sequences than ranks: some have nothing to compute, and must not stop the others."""
    args = {"batch_size": 3}
    return [
        Case(f"{technique}-idle-x{world_size}", technique, world_size, args=args)
        for technique in ("ddp", "fsdp")
    ]


def rounded_cases(world_size: int) -> list[Case]:
    """Computation in bfloat16, with parameters kept in float32 and in bfloat16."""
    args = {"batch_size": 8, "dtype": "bfloat16"}
    return [
        Case(f"ddp-rounded-x{world_size}", "ddp", world_size, args=args),
        Case(f"ddp-half-x{world_size}", "ddp", world_size, args={**args, "dtype": "float16"}),
        Case(f"fsdp-rounded-x{world_size}", "fsdp", world_size, args=args),
        Case(
            f"fsdp-sums-rounded-x{world_size}", "fsdp", world_size, args={**args, "reduce_dtype": "bfloat16"}
        ),
        Case(f"fsdp-all-rounded-x{world_size}", "fsdp", world_size, args={**args, "param_dtype": "bfloat16"}),
    ]


def compressed_cases(world_size: int) -> list[Case]:
    """Gradients that lose something on their way; everything else in float32."""
    common = {"batch_size": 8, "dtype": "float32"}
    ways = {
        "float16": {"compression": "float16", "bucket_mb": 0.05},
        "power-sgd": {"compression": "power_sgd", "power_sgd_rank": 2, "power_sgd_start": 2},
        "power-sgd-of-full-rank": {"compression": "power_sgd", "power_sgd_rank": 64, "power_sgd_start": 2},
    }
    return [
        Case(f"ddp-{name}-x{world_size}", "ddp", world_size, args={**common, **args})
        for name, args in ways.items()
    ]


def reference_of(case: Case) -> str:
    """Name of the single-process case that `case` must equal."""
    layout = f"{case.args['batch_size']}-{case.args.get('dtype', 'float64')}"
    return f"baseline-{layout}"


REFERENCES = [
    Case("baseline-8-float64", "baseline", 1, args={"batch_size": 8, "dtype": "float64"}),
    Case("baseline-8-float32", "baseline", 1, args={"batch_size": 8, "dtype": "float32"}),
    Case("baseline-3-float64", "baseline", 1, args={"batch_size": 3, "dtype": "float64"}),
    # Whole batches of the uneven layout at once: accumulation is part of what is compared.
    *(
        Case(
            f"baseline-6-{dtype}",
            "baseline",
            1,
            args={"batch_size": 6, "dtype": dtype},
            ragged=True,
            tied=True,
        )
        for dtype in TOLERANCES
    ),
]
CASES = {
    1: technique_cases(1),
    2: [*technique_cases(2), *variant_cases(2)],
    4: [*technique_cases(4), *variant_cases(4), *grid_cases(), *idle_rank_cases(4)],
}
ALL = [case for cases in CASES.values() for case in cases]
ROUNDED = rounded_cases(2)
COMPRESSED = compressed_cases(2)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What every case computed: one set of processes per world size, one rank in this process."""
    folder: Path = tmp_path_factory.mktemp("parity")
    make_data(folder / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with joined("cpu") as world:
        found = run_cases(folder, [*REFERENCES, *CASES[1]], world)
    torch.set_num_threads(threads)
    for world_size in WORLD_SIZES[1:]:
        rounded = [*ROUNDED, *COMPRESSED] if world_size == 2 else []
        found |= launch(folder, world_size, [*CASES[world_size], *rounded])
    return found


def relative(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two series."""
    assert len(ours) == len(theirs) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_trains_as_one_process_does(case: Case, outcomes: dict[str, Outcome]) -> None:
    ours, reference = outcomes[case.name], outcomes[reference_of(case)]
    loss_error = relative(ours.losses, reference.losses)
    norm_error = relative(ours.grad_norms, reference.grad_norms)
    loss_tolerance, norm_tolerance = TOLERANCES[case.args.get("dtype", "float64")]
    print(f"PARITY {case.name} loss {loss_error:.2e} norm {norm_error:.2e}")
    assert loss_error < loss_tolerance
    assert norm_error < norm_tolerance


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_16_bits_are_near_float32(case: Case, outcomes: dict[str, Outcome]) -> None:
    """And not equal to it, or it would not be 16 bits that were computed in."""
    ours, exact = outcomes[case.name], outcomes["baseline-8-float32"]
    loss_error = relative(ours.losses, exact.losses)
    print(f"ROUNDED {case.name} {loss_error:.2e} {relative(ours.grad_norms, exact.grad_norms):.2e}")
    assert 1e-6 < loss_error < 1e-2
    assert relative(ours.grad_norms, exact.grad_norms) < 5e-2


LOST = {
    # The largest difference of the loss and of the norm; what rounds less, loses less.
    "ddp-float16-x2": (1e-8, 1e-5, 1e-3),
    "ddp-power-sgd-x2": (1e-5, 2e-3, 1e-1),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_compressed_gradient_loses(name: str, outcomes: dict[str, Outcome]) -> None:
    """Little, and not nothing: an equal loss would say that whole gradients were sent."""
    least, most_of_loss, most_of_norm = LOST[name]
    ours, exact = outcomes[name], outcomes["baseline-8-float32"]
    loss_error, norm_error = relative(ours.losses, exact.losses), relative(ours.grad_norms, exact.grad_norms)
    print(f"COMPRESSED {name} {loss_error:.2e} {norm_error:.2e}")
    assert least < loss_error < most_of_loss
    assert norm_error < most_of_norm
    assert ours.weights_after != exact.weights_after


def test_power_sgd_of_full_rank_loses_nothing(outcomes: dict[str, Outcome]) -> None:
    """Nothing but rounding: then what the low rank loses is the low rank's doing."""
    ours, exact = outcomes["ddp-power-sgd-of-full-rank-x2"], outcomes["baseline-8-float32"]
    print(f"FULL {relative(ours.losses, exact.losses):.2e} {relative(ours.grad_norms, exact.grad_norms):.2e}")
    assert relative(ours.losses, exact.losses) < 1e-5


def test_the_reference_learns(outcomes: dict[str, Outcome]) -> None:
    """Otherwise equal losses would say little: weights that never move agree with everything."""
    for case in REFERENCES:
        assert outcomes[case.name].losses[-1] < outcomes[case.name].losses[0] - 0.1


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_equal_bit_for_bit(layout: str, dtype: str, outcomes: dict[str, Outcome]) -> None:
    cases = [case.name for case in ALL if f"-{layout}-{dtype}" in case.name]
    assert len(cases) >= (1 + len(STRATEGIES)) * len(WORLD_SIZES) + 1
    assert len({outcomes[name].weights_before for name in cases}) == 1


@pytest.fixture
def one_rank() -> Iterator[World]:
    """A process group of this process alone, left also when the test fails."""
    try:
        with joined("cpu") as world:
            yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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


def test_a_sharded_optimizer_keeps_its_own_part_only(outcomes: dict[str, Outcome]) -> None:
    """And trains as the whole one does: those cases are above."""
    for world_size in WORLD_SIZES[1:]:
        whole = outcomes[f"ddp-static-graph-x{world_size}"].moments
        parts = outcomes[f"ddp-sharded-optimizer-x{world_size}"].moments
        assert len(set(whole)) == 1
        assert sum(parts) == whole[0]
        assert max(parts) < whole[0]


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
