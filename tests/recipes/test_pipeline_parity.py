"""Every schedule of `ch2_pipeline_parallel` trains exactly as one process does, and its checkpoints load elsewhere.

In float64 the only difference allowed is the order of summation, 1e-12 relative; in float32 that order costs up to 1e-6
of the loss and 5e-5 of the norm. Vocabulary and layers are primes (263 and 11), which no number of ranks or stages
divides, so stages are unequal.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.lib.distributed import joined
from recipes.lib.pipeline_orders import SCHEDULES
from tests.recipes.parity import SAVED_AT, STEPS, Case, Outcome, launch, make_data, run_cases

# The first test waits for every process of the file: half a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(900)

LAYERS = 11
"""Two stages on each of four ranks are eight: three of two layers and five of one."""
TOLERANCES = {"float64": (1e-12, 1e-12), "float32": (1e-6, 5e-5)}
EVEN = {"args": {"batch_size": 8, "microbatch_size": 1}}
# Twelve sequences in microbatches of two, of which parts do not count; the table is used in two stages.
UNEVEN = {"args": {"batch_size": 12, "microbatch_size": 2}, "ragged": True, "tied": True}
FEWEST = {"1F1B": 1, "DualPipeV": 2}
"""Microbatches that torch wants of a schedule for each rank in the pipeline."""


def case(name: str, world_size: int, layout: dict, **more: object) -> Case:
    """A case of the pipeline; `more` are arguments of the recipe."""
    args = {"pipeline_parallel": 0, "picture": False, **layout["args"], **more}
    return Case(f"{name}-x{world_size}", "pipeline", world_size, **{**layout, "args": args}, layers=LAYERS)


def schedule_cases(world_size: int) -> list[Case]:
    """Every schedule in float64, with all ranks in one pipeline."""
    cases = []
    for schedule in SCHEDULES:
        cases.append(case(f"even-{schedule}", world_size, EVEN, schedule=schedule))
        small = UNEVEN
        if FEWEST.get(schedule, 0) * world_size > 6:  # as many microbatches as the schedule wants
            small = {**UNEVEN, "args": {"batch_size": 12, "microbatch_size": 1}}
        cases.append(case(f"uneven-{schedule}", world_size, small, schedule=schedule))
    return cases


VARIANTS = {
    2: [
        case("float32-1f1b", 2, EVEN, schedule="1f1b_by_hand", dtype="float32"),
        case("float32-zero-bubble", 2, EVEN, schedule="InterleavedZeroBubble", dtype="float32"),
        # Fewer microbatches than ranks; 1F1B fills itself only in part.
        case("one-microbatch", 2, {"args": {"batch_size": 8, "microbatch_size": 8}}, schedule="1f1b_by_hand"),
        # Six microbatches in two runs of the schedule: gradients accumulate over runs.
        case("two-runs", 2, UNEVEN, schedule="gpipe_by_hand", microbatches=3),
        case("two-runs-torch", 2, UNEVEN, schedule="InterleavedZeroBubble", microbatches=3),
        case("three-stages-each", 2, UNEVEN, schedule="Interleaved1F1B", stages_per_rank=3),
        case("recompute", 2, UNEVEN, schedule="ZBVZeroBubble", activation_checkpointing="full"),
        case("recompute-selective", 2, UNEVEN, schedule="LoopedBFS", activation_checkpointing="selective"),
        # Two copies of a whole model: a pipeline of one.
        case("copies-only", 2, UNEVEN, schedule="1f1b_by_hand", pipeline_parallel=1),
    ],
    4: [
        # Two pipelines of two ranks. In the uneven layout one copy has five sequences, the other seven with padding.
        *(
            case(f"two-copies-{layout}-{schedule}", 4, facts, schedule=schedule, pipeline_parallel=2)
            for schedule in ("1f1b_by_hand", "1F1B", "ZBVZeroBubble", "DualPipeV")
            for layout, facts in (
                ("even", EVEN),
                ("uneven", {**UNEVEN, "args": {"batch_size": 11, "microbatch_size": 1}}),
            )
        ),
    ],
}


def with_checkpoints() -> dict[int, list[Case]]:
    """Saved by two stages, gone on from by four, by one process and by DDP; and the other way round."""
    save = {**UNEVEN, "save": True}
    others = {"ragged": True, "tied": True, "layers": LAYERS}
    # Another seed: what the case trains with must come from the checkpoint, not from its own beginning.
    args = {"batch_size": 12, "seed": 7}
    return {
        2: [
            case("saves", 2, save, schedule="1f1b_by_hand"),
            case("loads-own", 2, {**UNEVEN, "load": "saves-x2"}, schedule="ZBVZeroBubble", seed=7),
            Case("ddp-loads-x2", "ddp", 2, args=args, load="saves-x2", **others),
        ],
        4: [case("loads", 4, {**UNEVEN, "load": "saves-x2"}, schedule="1f1b_by_hand", seed=7)],
    }


REFERENCES = [
    *(
        Case(f"baseline-8-{dtype}", "baseline", 1, args={"batch_size": 8, "dtype": dtype}, layers=LAYERS)
        for dtype in TOLERANCES
    ),
    *(
        Case(
            f"baseline-{size}-float64",
            "baseline",
            1,
            args={"batch_size": size},
            ragged=True,
            tied=True,
            layers=LAYERS,
        )
        for size in (11, 12)
    ),
]
ALONE = [
    case("alone-1f1b", 1, UNEVEN, schedule="1f1b_by_hand"),
    case("alone-zbv", 1, UNEVEN, schedule="ZBVZeroBubble"),
]
CASES = {size: [*schedule_cases(size), *VARIANTS[size]] for size in (2, 4)}
RESUMED = with_checkpoints()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What every case computed: one set of processes per world size, one rank in this process."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    make_data(folder / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Outcome] = {}
    with joined("cpu") as world:
        found |= run_cases(folder, [*REFERENCES, *ALONE], world)
    for size in (2, 4):
        found |= launch(folder, size, [*CASES[size], *RESUMED[size]])
    loading = Case("one-loads", "baseline", 1, args={"batch_size": 12, "seed": 7}, ragged=True, tied=True,
                   layers=LAYERS, load="saves-x2")  # fmt: skip
    with joined("cpu") as world:
        found |= run_cases(folder, [loading], world)
    torch.set_num_threads(threads)
    return found


def relative(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two series."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", [*ALONE, *CASES[2], *CASES[4]], ids=lambda case: case.name)
def test_trains_as_one_process_does(case: Case, outcomes: dict[str, Outcome]) -> None:
    dtype = case.args.get("dtype", "float64")
    ours, reference = outcomes[case.name], outcomes[f"baseline-{case.args['batch_size']}-{dtype}"]
    assert len(ours.losses) == STEPS
    loss_error = relative(ours.losses, reference.losses)
    norm_error = relative(ours.grad_norms, reference.grad_norms)
    print(f"PARITY {case.name} loss {loss_error:.2e} norm {norm_error:.2e}")
    loss_tolerance, norm_tolerance = TOLERANCES[dtype]
    assert loss_error < loss_tolerance
    assert norm_error < norm_tolerance


@pytest.mark.parametrize("name", ["loads-own-x2", "ddp-loads-x2", "loads-x4", "one-loads"])
def test_a_checkpoint_of_two_stages_goes_on_elsewhere(name: str, outcomes: dict[str, Outcome]) -> None:
    """Weights and moments have the names that they have in the whole model."""
    ours, reference = outcomes[name], outcomes["baseline-12-float64"]
    assert relative(ours.losses, reference.losses[SAVED_AT:]) < 1e-12
    assert relative(ours.grad_norms, reference.grad_norms[SAVED_AT:]) < 1e-12
