"""Every schedule of `ch2_pipeline_parallel` trains exactly as one process does, and its checkpoints load elsewhere.

In float64 the only difference allowed is the order of summation, 1e-12 relative; in float32 that order costs up to 1e-6
of the loss and 5e-5 of the norm. Vocabulary and layers are primes (263; 7 or 11), which no number of ranks or stages
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
pytestmark = pytest.mark.timeout(1800)

TOLERANCES = {"float64": (1e-12, 1e-12), "float32": (1e-6, 5e-5)}
# Eight sequences in four or eight microbatches.
EVEN = {"args": {"batch_size": 8, "microbatch_size": 2}}
# Twelve, of which parts do not count; the table is used in the first stage and in the last.
UNEVEN = {"args": {"batch_size": 12, "microbatch_size": 3}, "ragged": True, "tied": True}


def case(name: str, world_size: int, layout: dict, layers: int = 7, **more: object) -> Case:
    """A case of the pipeline; `more` are arguments of the recipe.

    (With 5 layers the uneven layout comes to where AdamW divides by almost nothing: there the order of summation alone,
    in one process, costs 1.3e-12 of the norm.)
    """
    args = {"pipeline_parallel": 0, "picture": False, **layout["args"], **more}
    return Case(f"{name}-x{world_size}", "pipeline", world_size, **{**layout, "args": args}, layers=layers)


def schedule_cases(world_size: int) -> list[Case]:
    """Every schedule in float64, with all ranks in one pipeline."""
    # Two stages on each of four ranks are eight: three of two layers, five of one. DualPipeV wants a microbatch each.
    layers, even, uneven = (7, 2, 3) if world_size == 2 else (11, 1, 2)
    cases = []
    for schedule in SCHEDULES:
        facts = {"schedule": schedule, "layers": layers}
        cases.append(case(f"even-{schedule}", world_size, EVEN, **facts, microbatch_size=even))
        rows = 1 if schedule == "DualPipeV" else uneven
        cases.append(case(f"uneven-{schedule}", world_size, UNEVEN, **facts, microbatch_size=rows))
    return cases


VARIANTS = {
    2: [
        case("float32-1f1b", 2, EVEN, schedule="1f1b_by_hand", dtype="float32"),
        case("float32-zero-bubble", 2, EVEN, schedule="InterleavedZeroBubble", dtype="float32"),
        # Fewer microbatches than ranks; 1F1B fills itself only in part.
        case("one-microbatch", 2, EVEN, schedule="1f1b_by_hand", microbatch_size=8),
        # Four microbatches in two runs of the schedule: gradients accumulate over runs.
        case("two-runs", 2, UNEVEN, schedule="gpipe_by_hand", microbatches=2),
        case("two-runs-torch", 2, UNEVEN, schedule="InterleavedZeroBubble", microbatches=2),
        case("three-stages-each", 2, UNEVEN, 11, schedule="Interleaved1F1B", stages_per_rank=3),
        case("recompute", 2, UNEVEN, schedule="ZBVZeroBubble", activation_checkpointing="full"),
        case("recompute-selective", 2, UNEVEN, schedule="LoopedBFS", activation_checkpointing="selective"),
        # Two copies of a whole model: a pipeline of one.
        case("copies-only", 2, UNEVEN, schedule="1f1b_by_hand", pipeline_parallel=1),
    ],
    4: [
        # Two pipelines of two ranks. Of eleven sequences one copy has six, the other five and one of padding.
        *(
            case(f"two-copies-{layout}-{schedule}", 4, facts, schedule=schedule, pipeline_parallel=2, **args)
            for schedule in ("1f1b_by_hand", "1F1B", "ZBVZeroBubble", "DualPipeV")
            for layout, facts, args in (
                ("even", EVEN, {"microbatch_size": 1}),
                ("uneven", UNEVEN, {"microbatch_size": 1, "batch_size": 11}),
            )
        ),
    ],
}


def with_checkpoints() -> dict[int, list[Case]]:
    """Saved by two stages; gone on from by four of another order, by four ranks, and by DDP."""
    save = {**UNEVEN, "save": True}
    others = {"ragged": True, "tied": True, "layers": 11}
    # Another seed: what the case trains with must come from the checkpoint, not from its own beginning.
    args = {"batch_size": 12, "seed": 7}
    return {
        2: [
            case("saves", 2, save, 11, schedule="1f1b_by_hand"),
            case("loads-own", 2, {**UNEVEN, "load": "saves-x2"}, 11, schedule="ZBVZeroBubble", seed=7),
            Case("ddp-loads-x2", "ddp", 2, args=args, load="saves-x2", **others),
        ],
        4: [case("loads", 4, {**UNEVEN, "load": "saves-x2"}, 11, schedule="1f1b_by_hand", seed=7)],
    }


def reference_of(case: Case) -> Case:
    """The single-process case that `case` must equal; whole batches at once."""
    args = {"batch_size": case.args["batch_size"], "dtype": case.args.get("dtype", "float64")}
    name = f"baseline-{args['batch_size']}-{args['dtype']}-{case.layers}-layers"
    return Case(name, "baseline", 1, args=args, tied=case.tied, ragged=case.ragged, layers=case.layers)


ALONE = [
    case("alone-1f1b", 1, UNEVEN, schedule="1f1b_by_hand"),
    case("alone-zbv", 1, UNEVEN, schedule="ZBVZeroBubble"),
]
CASES = {size: [*schedule_cases(size), *VARIANTS[size]] for size in (2, 4)}
RESUMED = with_checkpoints()
TRAINED = [*ALONE, *CASES[2], *CASES[4]]
REFERENCES = {case.name: case for case in map(reference_of, [*TRAINED, *RESUMED[2]])}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What every case computed: one set of processes per world size, one rank in this process."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    make_data(folder / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Outcome] = {}
    with joined("cpu") as world:
        found |= run_cases(folder, [*REFERENCES.values(), *ALONE], world)
    for size in (2, 4):
        found |= launch(folder, size, [*CASES[size], *RESUMED[size]])
    loading = Case("one-loads", "baseline", 1, args={"batch_size": 12, "seed": 7}, ragged=True, tied=True,
                   layers=11, load="saves-x2")  # fmt: skip
    with joined("cpu") as world:
        found |= run_cases(folder, [loading], world)
    torch.set_num_threads(threads)
    return found


def relative(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two series."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_trains_as_one_process_does(case: Case, outcomes: dict[str, Outcome]) -> None:
    ours, reference = outcomes[case.name], outcomes[reference_of(case).name]
    assert len(ours.losses) == STEPS
    loss_error = relative(ours.losses, reference.losses)
    norm_error = relative(ours.grad_norms, reference.grad_norms)
    print(f"PARITY {case.name} loss {loss_error:.2e} norm {norm_error:.2e}")
    loss_tolerance, norm_tolerance = TOLERANCES[case.args.get("dtype", "float64")]
    assert loss_error < loss_tolerance
    assert norm_error < norm_tolerance


@pytest.mark.parametrize("name", ["loads-own-x2", "ddp-loads-x2", "loads-x4", "one-loads"])
def test_a_checkpoint_of_two_stages_goes_on_elsewhere(name: str, outcomes: dict[str, Outcome]) -> None:
    """Weights and moments have the names that they have in the whole model."""
    ours, reference = outcomes[name], outcomes["baseline-12-float64-11-layers"]
    assert relative(ours.losses, reference.losses[SAVED_AT:]) < 1e-12
    assert relative(ours.grad_norms, reference.grad_norms[SAVED_AT:]) < 1e-12
