"""Data and tensor parallelism by hand, and by DTensor, train exactly as one process does.

As in test_parity.py: losses and gradient norms over five steps, with accumulation, uneven numbers of tokens and a
vocabulary that no number of ranks divides, on two and four ranks over gloo.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.lib.distributed import joined
from tests.recipes.parity import SAVED_AT, STEPS, Case, Outcome, launch, make_data, run_cases

# The first test waits for every process of the file: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(1800)

LAYOUTS = {
    # Every copy has the same share, in one piece.
    "even": {"args": {"batch_size": 8}},
    # On four copies 2, 1, 2 and 1 sequences, in microbatches of two, so that rows of padding fill some; targets that
    # do not count, unevenly; tied tables.
    "uneven": {"args": {"batch_size": 6, "microbatch_size": 2}, "ragged": True, "tied": True},
}
TOLERANCES = {"float64": (1e-12, 1e-12), "float32": (1e-6, 5e-5)}
UNEVEN_64, UNEVEN_32, EVEN_64 = ("uneven", "float64"), ("uneven", "float32"), ("even", "float64")
FOUR_HEADS = {"kv_heads": 4, "tensor_parallel": 4, "model": "llama_1b"}
"""The model's name only decides how many ranks may share it; the tests' own size is trained."""


def made(name: str, technique: str, world_size: int, layout: str, dtype: str, **args: Any) -> Case:
    """One configuration in one layout."""
    facts = LAYOUTS[layout]
    kv_heads = args.pop("kv_heads", 2)
    args = {**facts["args"], **args, "dtype": dtype}
    return Case(
        f"{name}-{layout}-{dtype}-x{world_size}", technique, world_size, **{**facts, "args": args},
        kv_heads=kv_heads,
    )  # fmt: skip


def data_cases(world_size: int) -> list[Case]:
    # The test model's gradients fill several buckets of 50 KiB.
    return [
        made(variant, "data_parallel", world_size, *kind, variant=variant, bucket_mb=0.05)
        for variant in ("flat", "bucketed", "overlapped")
        for kind in (UNEVEN_64, UNEVEN_32, EVEN_64)
    ]


def tensor_cases(
    world_size: int, *kinds: tuple[str, str], sequence_parallel: tuple[bool, ...] = (False, True), **args: Any
) -> list[Case]:
    """By hand and by DTensor, with and without sequence parallelism."""
    ranks = args.get("tensor_parallel", 2)
    return [
        made(f"{by}{'-sequence' if sequence else ''}-tp{ranks}", "tensor_parallel", world_size, *kind,
             by=by, sequence_parallel=sequence, **args)
        for by in ("hand", "dtensor")
        for sequence in sequence_parallel
        for kind in kinds
    ]  # fmt: skip


CASES = {
    2: [
        *data_cases(2),
        *tensor_cases(2, UNEVEN_64, UNEVEN_32, EVEN_64),
        made("overlapped-recomputed", "data_parallel", 2, *UNEVEN_64, activation_checkpointing="full"),
        made("hand-recomputed", "tensor_parallel", 2, *UNEVEN_64, activation_checkpointing="selective",
             sequence_parallel=True),
        made("dtensor-recomputed", "tensor_parallel", 2, *UNEVEN_64, activation_checkpointing="full",
             by="dtensor"),
    ],
    4: [
        *data_cases(4),
        *tensor_cases(4, UNEVEN_64),
        *tensor_cases(4, UNEVEN_32, sequence_parallel=(True,)),
        *tensor_cases(4, UNEVEN_64, sequence_parallel=(True,), **FOUR_HEADS),
        # Fewer sequences than copies: one of them has nothing to compute.
        Case("overlapped-idle", "data_parallel", 4, args={"batch_size": 3}),
    ],
}  # fmt: skip
BEFORE_LOADING = {"seed": 1, "batch_size": 6}
UNEVEN: dict[str, Any] = {"ragged": True, "tied": True}
SAVED = [
    Case(f"saved-by-{name}", technique, 2, args={"batch_size": 6, **args}, save=True, **UNEVEN)
    for name, technique, args in (
        ("hand", "tensor_parallel", {"sequence_parallel": True}),
        ("dtensor", "tensor_parallel", {"by": "dtensor", "sequence_parallel": True}),
        ("ddp", "ddp", {}),
    )
]
LOADED = [
    Case(f"{by}-into-{name}", technique, 2, args={**BEFORE_LOADING, **args}, load=f"saved-by-{by}", **UNEVEN)
    for by, name, technique, args in (
        ("hand", "ddp", "ddp", {}),
        ("hand", "dtensor", "tensor_parallel", {"by": "dtensor"}),
        ("hand", "tp1", "tensor_parallel", {"tensor_parallel": 1}),
        ("dtensor", "hand", "tensor_parallel", {}),
        ("dtensor", "fsdp", "fsdp", {}),
        ("ddp", "hand", "tensor_parallel", {}),
        ("ddp", "copies", "data_parallel", {}),
    )
]
EVEN: dict[str, Any] = {"batch_size": 8}
ROUNDED = [
    Case(f"{name}-rounded", technique, 2, args={**EVEN, "dtype": "bfloat16", **args})
    for name, technique, args in (
        ("hand", "tensor_parallel", {}),
        ("dtensor", "tensor_parallel", {"by": "dtensor"}),
        ("overlapped", "data_parallel", {}),
    )
]
WITHOUT_BROADCAST = Case(
    "without-broadcast", "data_parallel", 2, args={**EVEN, "broadcast": False, "save_every": -1}
)
EXACT = [case for cases in CASES.values() for case in cases]


def reference(case: Case) -> Case:
    """The single process that `case` must equal. Whole batches at once: accumulation is compared, too."""
    dtype = case.args.get("dtype", "float64")
    args = {"batch_size": case.args["batch_size"], "dtype": "float32" if dtype == "bfloat16" else dtype}
    name = f"one-{args['batch_size']}-{args['dtype']}-{case.kv_heads}-{case.tied}-{case.ragged}"
    return Case(name, "baseline", 1, args=args, tied=case.tied, ragged=case.ragged, kv_heads=case.kv_heads)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What every case computed: one set of processes per world size, one rank in this process."""
    folder: Path = tmp_path_factory.mktemp("by-hand")
    make_data(folder / "data")
    found = launch(folder, 2, [*CASES[2], *SAVED, *LOADED, *ROUNDED, WITHOUT_BROADCAST])
    found |= launch(folder, 4, CASES[4])
    references = {reference(case).name: reference(case) for case in [*EXACT, *SAVED, *ROUNDED]}
    into_one = Case(
        "into-one", "baseline", 1, args=BEFORE_LOADING, ragged=True, tied=True, load=SAVED[0].name
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with joined("cpu") as world:
        found |= run_cases(folder, [*references.values(), into_one], world)
    torch.set_num_threads(threads)
    return found


def relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference of two series."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_trains_as_one_process_does(case: Case, outcomes: dict[str, Outcome]) -> None:
    ours, one = outcomes[case.name], outcomes[reference(case).name]
    assert len(one.losses) == STEPS
    loss_error, norm_error = relative(ours.losses, one.losses), relative(ours.grad_norms, one.grad_norms)
    print(f"PARITY {case.name} loss {loss_error:.2e} norm {norm_error:.2e}")
    loss_tolerance, norm_tolerance = TOLERANCES[case.args.get("dtype", "float64")]
    assert loss_error < loss_tolerance
    assert norm_error < norm_tolerance
    assert ours.weights_before == one.weights_before


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_bfloat16_is_near_float32(case: Case, outcomes: dict[str, Outcome]) -> None:
    """And not equal to it, or it would not be bfloat16 that was computed in."""
    ours, exact = outcomes[case.name], outcomes[reference(case).name]
    assert 1e-6 < relative(ours.losses, exact.losses) < 1e-2
    assert relative(ours.grad_norms, exact.grad_norms) < 5e-2


def test_without_the_broadcast_it_is_another_training(outcomes: dict[str, Outcome]) -> None:
    """So that the agreement above says something about the broadcast."""
    ours, one = outcomes[WITHOUT_BROADCAST.name], outcomes["one-8-float64-2-False-False"]
    assert abs(ours.losses[0] - one.losses[0]) > 1e-6


@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.name)
def test_a_checkpoint_goes_on_under_another_technique(case: Case, outcomes: dict[str, Outcome]) -> None:
    one = outcomes[reference(SAVED[0]).name]
    assert relative(outcomes[case.name].losses, one.losses[SAVED_AT:]) < 1e-12
    assert relative(outcomes[case.name].grad_norms, one.grad_norms[SAVED_AT:]) < 1e-12


def test_a_checkpoint_of_slices_goes_on_in_one_process(outcomes: dict[str, Outcome]) -> None:
    one = outcomes[reference(SAVED[0]).name]
    assert relative(outcomes["into-one"].losses, one.losses[SAVED_AT:]) < 1e-12
