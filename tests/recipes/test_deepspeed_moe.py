"""A mixture of experts trains as one process with all of them does, wherever they are, and goes on from checkpoints.

The one process is written in plain torch (moe_parity.py). float32: the order of summation costs up to 1e-6 of the loss
and 5e-5 of the norm.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load

from recipes.ch5.deepspeed_moe_args import DeepSpeedMoeArgs
from recipes.ch5.deepspeed_moe_load import LOAD_FILE, History, load_png, load_table, read_history
from recipes.lib import checkpoint, manifest, saving
from recipes.lib.arguments import ArgumentError
from recipes.lib.checkpoint import CheckpointMismatch, Trained
from recipes.lib.distributed import alone
from recipes.lib.export import CannotExport, export
from recipes.lib.flops import flops_per_token, parameter_count
from recipes.lib.model import initial_values
from tests.recipes import moe_parity  # noqa: F401 (the mixtures are techniques from here on)
from tests.recipes.parity import DEVICE, SAVED_AT, SIZE, STEPS, Case, Outcome, launch, make_data, run_cases
from tests.recipes.ranks import run_ranks, told
from tests.recipes.test_training import metrics_of, start

# The first test waits for every process of the file: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(900)

# One sequence at a time, so that tokens are routed in the same groups whatever the number of ranks; on four ranks 1, 2,
# 1 and 2 of them. Always clipped. The second loss has its part in the norm.
COMMON = {"batch_size": 6, "microbatch_size": 1, "dtype": "float32", "clip_norm": 0.5, "load_balance": 0.3}
ALL_ROOM = {**COMMON, "drop_tokens": False}
KINDS: dict[str, dict[str, object]] = {
    "two": ALL_ROOM,
    "one": {**ALL_ROOM, "experts_per_token": 1},
    "dropping": {**COMMON, "capacity_factor": 0.6},
}


def case(kind: str, world_size: int, parallel: int, stage: int, **more: Any) -> Case:
    """Experts over `parallel` of the ranks."""
    args = {**KINDS[kind], "expert_parallel": parallel, "stage": stage, **more}
    name = "-".join([kind, f"x{world_size}", f"ep{parallel}", f"zero{stage}", *more])
    return Case(name, "mixture", world_size, args=args, ragged=True, tied=True)


PARITY = [
    *(case("two", 2, parallel, stage) for parallel in (1, 2) for stage in (0, 1, 2)),
    case("one", 2, 2, 2),
    case("one", 2, 1, 0),
    case("dropping", 2, 2, 1),
    case("two", 2, 2, 1, activation_checkpointing="full"),
    *(case("two", 4, 2, stage) for stage in (0, 1, 2)),
    case("dropping", 4, 4, 2),
]
ROUNDED = [case("two", 2, 2, stage, dtype="bfloat16") for stage in (0, 2)]
LEAVING = [
    dataclasses.replace(case("two", 2, 2, 2), name="sharded", save=True),
    dataclasses.replace(case("two", 2, 2, 0), name="whole", save=True),
    dataclasses.replace(case("two", 2, 2, 1, dtype="bfloat16"), name="rounded", save=True),
    dataclasses.replace(case("dropping", 2, 2, 1, random_selection=True), name="drawn", save=True),
]


def going_on(name: str, world_size: int, parallel: int, stage: int, kind: str = "two", **more: Any) -> Case:
    """Begins with other weights, and with the checkpoint that its name begins with."""
    started = case(kind, world_size, parallel, stage, seed=1, **more)
    return dataclasses.replace(started, name=name, load=name.partition("-to-")[0])


SAME = [
    going_on("sharded-to-sharded", 2, 2, 2),
    going_on("whole-to-whole", 2, 2, 0),
    going_on("rounded-to-rounded", 2, 2, 1, dtype="bfloat16"),
    # Who chooses by chance goes on with the same chances.
    going_on("drawn-to-drawn", 2, 2, 1, kind="dropping", random_selection=True),
]
ELSEWHERE = [
    going_on("sharded-to-copies", 2, 1, 1),
    going_on("sharded-to-whole", 2, 2, 0),
    going_on("whole-to-four", 4, 4, 1),
    going_on("sharded-to-two-of-four", 4, 2, 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("mixtures")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """What every case computed; two launches, the second of which reads what the first has saved."""
    make_data(folder / "data")
    plain = [Case(f"plain-{kind}", "plain_mixture", 1, args=args, ragged=True, tied=True, save=True)
             for kind, args in KINDS.items()]  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with alone(DEVICE) as world:
        found = run_cases(folder, plain, world)
    torch.set_num_threads(threads)
    for size in (2, 4):
        cases = [each for each in (*LEAVING, *PARITY, *ROUNDED, *SAME, *ELSEWHERE) if each.world_size == size]
        found |= launch(folder, size, cases, module="tests.recipes.moe_parity")
    return found


def relative(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two series."""
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("each", PARITY, ids=lambda each: each.name)
def test_trains_as_one_process_with_all_experts_does(each: Case, outcomes: dict[str, Outcome]) -> None:
    ours, plain = outcomes[each.name], outcomes[f"plain-{each.name.partition('-')[0]}"]
    loss_error, norm_error = relative(ours.losses, plain.losses), relative(ours.grad_norms, plain.grad_norms)
    print(f"PARITY {each.name} loss {loss_error:.2e} norm {norm_error:.2e}")
    assert len(ours.losses) == STEPS
    assert min(plain.grad_norms) > COMMON["clip_norm"]
    assert loss_error < 1e-6
    assert norm_error < 5e-5


@pytest.mark.parametrize("each", [*ROUNDED, LEAVING[2]], ids=lambda each: each.name)
def test_bfloat16_stays_near_and_is_not_equal(each: Case, outcomes: dict[str, Outcome]) -> None:
    """In the first steps: later on, a router that rounds has sent some tokens elsewhere."""
    ours, exact = outcomes[each.name], outcomes["plain-two"]
    assert 1e-6 < relative(ours.losses, exact.losses) < 2e-2
    assert relative(ours.grad_norms[:2], exact.grad_norms[:2]) < 5e-2


def saved(folder: Path, name: str) -> dict[str, Tensor]:
    """The parameters in the checkpoint of a case, whole."""
    (path,) = manifest.folders(folder / name)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata.items()
    wanted = {key: torch.empty(entry.size) for key, entry in entries if key.startswith("model.")}
    load(wanted, checkpoint_id=path, no_dist=True)
    return {key.removeprefix("model."): tensor for key, tensor in wanted.items()}


@pytest.mark.parametrize("name", ["sharded", "whole"])
def test_every_expert_of_every_rank_learns_what_it_would_alone(
    name: str, folder: Path, outcomes: dict[str, Outcome]
) -> None:
    ours, plain = saved(folder, name), saved(folder, "plain-two")
    experts = [key for key in ours if ".mlp.experts." in key]
    assert ours.keys() == plain.keys()
    assert len(experts) == SIZE.layers * 4 * 3
    for key in experts:
        before = initial_values(key, ours[key].shape, SIZE.layers, 0, torch.device("cpu"))
        assert (ours[key] - before).abs().max() > 1e-3, f"{key} has not been trained"
        torch.testing.assert_close(ours[key], plain[key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("each", SAME, ids=lambda each: each.name)
def test_goes_on_bit_for_bit_at_the_same_size(each: Case, outcomes: dict[str, Outcome]) -> None:
    resumed, straight = outcomes[each.name], outcomes[each.load]
    assert resumed.weights_before != straight.weights_before
    assert resumed.losses == straight.losses[SAVED_AT:]
    assert resumed.grad_norms == straight.grad_norms[SAVED_AT:]
    assert resumed.weights_after == straight.weights_after
    assert resumed.random == straight.random


@pytest.mark.parametrize("each", ELSEWHERE, ids=lambda each: each.name)
def test_goes_on_with_experts_elsewhere_and_in_another_stage(
    each: Case, outcomes: dict[str, Outcome]
) -> None:
    """Only the order of summation changes."""
    resumed, straight = outcomes[each.name], outcomes[each.load]
    assert resumed.losses == pytest.approx(straight.losses[SAVED_AT:], rel=1e-6)
    assert resumed.grad_norms == pytest.approx(straight.grad_norms[SAVED_AT:], rel=5e-5)


def test_counts_are_the_same_wherever_the_experts_are(folder: Path, outcomes: dict[str, Outcome]) -> None:
    names = ["two-x2-ep1-zero0", "two-x2-ep2-zero2", "two-x4-ep2-zero1"]
    first, *others = [read_history(folder / name / LOAD_FILE) for name in names]
    tokens = 6 * 24 * 2  # sequences, tokens of each, experts of a token
    assert (first.wanted_TLE.sum(axis=2) == tokens).all()
    assert (first.wanted_TLE == first.taken_TLE).all()
    resumed = read_history(folder / "sharded-to-copies" / LOAD_FILE)
    assert resumed.steps_T.tolist() == list(range(SAVED_AT + 1, STEPS + 1))
    np.testing.assert_array_equal(resumed.wanted_TLE, first.wanted_TLE[SAVED_AT:])
    for other in others:
        np.testing.assert_array_equal(other.wanted_TLE, first.wanted_TLE)
        np.testing.assert_allclose(other.balance_TL, first.balance_TL, rtol=1e-5)


def test_what_a_full_expert_drops_is_counted(folder: Path, outcomes: dict[str, Outcome]) -> None:
    history = read_history(folder / "dropping-x2-ep2-zero1" / LOAD_FILE)
    room = 8  # 24 tokens, 2 experts each, over 4 experts, 0.6 of it: 7.2
    assert (history.taken_TLE <= 6 * room).all()
    assert (history.taken_TLE <= history.wanted_TLE).all()
    assert (history.dropped_TL > 0.2).all()


def test_the_recipe_shows_what_each_expert_got(tmp_path: Path) -> None:
    """A process alone; what it saves is no dense model, and not written as one."""
    words = ["recipes.ch5.deepspeed_moe", "stage=1", "experts_per_token=1", "steps=2"]
    done = start(words, tmp_path, RUN_DIR=str(tmp_path / "run"), ATTEMPT="1")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert "layer  expert 0  expert 1  expert 2  expert 3  fullest  emptiest  dropped  balance" in done.stdout
    assert read_history(run / LOAD_FILE).steps_T.tolist() == [1, 2]
    assert (run / "experts.png").stat().st_size > 10_000
    (path,) = manifest.folders(run)
    with pytest.raises(CannotExport, match="it has experts"):
        export(path, tmp_path / "exported")


def history_of(wanted: list[list[float]], taken: list[list[float]]) -> History:
    counts = (np.array([wanted] * 8, float), np.array([taken] * 8, float))
    return History(np.arange(1, 9), np.full((8, len(wanted)), 1.25), *counts)


def test_the_table_says_who_got_how_much(tmp_path: Path) -> None:
    history = history_of([[60, 20, 20, 0], [25, 25, 25, 25]], [[40, 20, 20, 0], [25, 25, 25, 25]])
    head, uneven, even, note = load_table(history).splitlines()
    assert head.split() == [
        "layer", *(word for number in range(4) for word in ("expert", str(number))), "fullest", "emptiest",
        "dropped", "balance",
    ]  # fmt: skip
    assert uneven.split() == [
        "0",
        "60.0%",
        "20.0%",
        "20.0%",
        "0.0%",
        "2.40",
        "x",
        "0.00",
        "x",
        "20.0%",
        "1.250",
    ]
    assert even.split()[5:] == ["1.00", "x", "1.00", "x", "0.0%", "1.250"]
    assert note.startswith("of the last 2 steps; even would be 25.0%")
    load_png(tmp_path / "experts.png", "What each expert got", "", history)
    assert (tmp_path / "experts.png").stat().st_size > 10_000


def test_of_many_experts_the_table_has_the_extremes_alone() -> None:
    head, row, _ = load_table(history_of([[9.0] + [1.0] * 15], [[9.0] + [1.0] * 15])).splitlines()
    assert head.split() == ["layer", "fullest", "emptiest", "dropped", "balance"]
    assert row.split()[:3] == ["0", "6.00", "x"]


def test_experts_count_as_parameters_and_those_of_a_token_as_arithmetic() -> None:
    size = dataclasses.replace(SIZE, experts=4, experts_per_token=1)
    network, router = 3 * SIZE.width * SIZE.ffn_width, 4 * SIZE.width
    more = parameter_count(size) - parameter_count(SIZE)
    assert more == SIZE.layers * (3 * network + router)
    dense, one = flops_per_token(SIZE, 8).full, flops_per_token(size, 8).full
    two = flops_per_token(dataclasses.replace(size, experts_per_token=2), 8).full
    assert one - dense == 6 * SIZE.layers * router
    assert two - one == 6 * SIZE.layers * network


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"batch_size": 6}, "trained with experts=4, this run has no experts"),
        ({"batch_size": 6, "experts": 8}, "trained with experts=4, this run has experts=8"),
    ],
)
def test_a_checkpoint_with_other_experts_is_refused_in_one_line(
    facts: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = torch.nn.Linear(2, 2)
    trained = Trained(model, torch.optim.AdamW(model.parameters()), {"batch_size": 6, "experts": 4})
    with alone("cpu") as world:
        saving.save(tmp_path, trained, checkpoint.Progress(step=1), world)
        (path,) = manifest.folders(tmp_path)
        with pytest.raises(CheckpointMismatch, match=said) as caught:
            checkpoint.load(path, dataclasses.replace(trained, facts=facts), world)
    assert "\n" not in str(caught.value)


REFUSED = {
    "stage": ({"stage": 3}, "wants 0, 1 or 2"),
    "dtype": ({"dtype": "float64"}, "nearest: float32"),
    "experts_per_token": ({"experts_per_token": 3}, "nearest: 2"),
    "expert_parallel": ({"experts": 6, "expert_parallel": 4}, "wants a divisor of experts=6; nearest: 3"),
    "compile": ({"compile": True}, "wants false"),
    "activation_checkpointing": ({"activation_checkpointing": "selective"}, "none or full"),
    "random_selection": ({"activation_checkpointing": "full", "random_selection": True}, "wants false"),
    "init_from": ({"init_from": "/weights"}, "random weights"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_does_not_go_together_is_one_line_that_names_the_key(key: str) -> None:
    args, said = REFUSED[key]
    with pytest.raises(ArgumentError, match=said) as caught:
        DeepSpeedMoeArgs(**args)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_experts_are_spread_over_ranks_that_they_divide() -> None:
    assert [DeepSpeedMoeArgs(experts=6).ranks_with_experts(ranks) for ranks in (1, 2, 4, 9)] == [1, 2, 2, 3]
    for args, ranks, said in (
        ({"expert_parallel": 4}, 6, "wants a divisor of the 6 ranks and of experts=4; nearest: 2"),
        (
            {"batch_size": 6},
            4,
            "wants a divisor of the 1 or 2 sequences that each of 4 ranks has; nearest: 1",
        ),
        (
            {"batch_size": 12, "microbatch_size": 4},
            2,
            "of the 6 sequences that each of 2 ranks has; nearest: 3",
        ),
    ):
        with pytest.raises(ArgumentError, match=said):
            DeepSpeedMoeArgs(**args).check_ranks(ranks, ranks)
    DeepSpeedMoeArgs(batch_size=8).check_ranks(64, 8)  # ranks without a sequence: nothing but padding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_on_gpus_it_learns_and_goes_on(stage: int, tmp_path: Path) -> None:
    words = ["-m", "recipes.ch5.deepspeed_moe", f"stage={stage}"]
    words += ["data=stdlib", "sequence_length=64", "save_every=5"]
    run = {**os.environ, "RUN_DIR": str(tmp_path / "run"), "CACHE_DIR": str(tmp_path)}
    for steps in (5, 8):
        failed = told(run_ranks([*words, f"steps={steps}"], 2, "cuda", run))
        assert not failed, failed
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert read_history(tmp_path / "run" / LOAD_FILE).wanted_TLE.shape[0] == 8
