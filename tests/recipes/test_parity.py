"""Every technique trains exactly as one process does: same loss, same gradient norm, same initial weights.

All on the CPU with gloo. In float64 the only difference allowed is the order of summation, 1e-12 relative; in
float32 that order costs up to 1e-6 of the loss and 5e-5 of the norm.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from recipes.lib.distributed import joined
from tests.recipes.parity import STEPS, Case, Outcome, launch, make_data, run_cases

# The first test waits for every process of the file: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(1800)

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
            "recomputed_layers": 1,
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
    """Gradients that lose something on their way; everything else in float32.

    Six steps: what a low rank leaves out of one step, it makes up for in the next ones.
    """
    common = {"batch_size": 8, "dtype": "float32", "steps": 6}
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
    Case("baseline-8-float32-longer", "baseline", 1, args={"batch_size": 8, "dtype": "float32", "steps": 6}),
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
    assert len(ours) == len(theirs) >= STEPS
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
    ours, exact = outcomes[name], outcomes["baseline-8-float32-longer"]
    loss_error, norm_error = relative(ours.losses, exact.losses), relative(ours.grad_norms, exact.grad_norms)
    print(f"COMPRESSED {name} {loss_error:.2e} {norm_error:.2e}")
    assert least < loss_error < most_of_loss
    assert norm_error < most_of_norm
    assert ours.weights_after != exact.weights_after


def test_power_sgd_of_full_rank_loses_nothing(outcomes: dict[str, Outcome]) -> None:
    """Nothing but rounding: then what the low rank loses is the low rank's doing."""
    ours, exact = outcomes["ddp-power-sgd-of-full-rank-x2"], outcomes["baseline-8-float32-longer"]
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


def test_a_sharded_optimizer_keeps_its_own_part_only(outcomes: dict[str, Outcome]) -> None:
    """And trains as the whole one does: those cases are above."""
    for world_size in WORLD_SIZES[1:]:
        whole = outcomes[f"ddp-static-graph-x{world_size}"].moments
        parts = outcomes[f"ddp-sharded-optimizer-x{world_size}"].moments
        assert len(set(whole)) == 1
        assert sum(parts) == whole[0]
        assert max(parts) < whole[0]
