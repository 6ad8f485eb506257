"""Megatron-Core trains exactly as one process of the shared model does, however the model is split.

Its own schedules, sums, optimizer and checkpoint files, on CPUs with gloo (`megatron_on_cpu`). In float32, which is the
widest format that its optimizer takes: the order of summation costs up to 1e-6 of the loss and 2e-5 of the norm.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.__main__ import main
from recipes.ch5.megatron_args import MegatronArgs
from recipes.lib import checkpoint, manifest, saving
from recipes.lib.arguments import ArgumentError, parse
from recipes.lib.checkpoint import CheckpointMismatch, Progress, Trained
from recipes.lib.distributed import World
from recipes.lib.model import Transformer, materialize
from recipes.lib.model_sizes import ModelSize
from recipes.lib.pretrained import hugging_face_config, to_hugging_face
from recipes.lib.stack import STACK_FOLDER
from tests.recipes.parity import SAVED_AT, SEQUENCE_LENGTH, SIZE, STEPS, Case, Outcome, launch, make_data

# The first test waits for all processes of the file.
pytestmark = pytest.mark.timeout(1800)

WORKER = "tests.recipes.megatron_parity"
LOSS, NORM = 3e-6, 5e-5

EVEN: dict[str, Any] = {"args": {"batch_size": 8, "microbatch_size": 2, "dtype": "float32"}}
# One sequence at a time, of which a part is not trained on; tied tables. The vocabulary is a prime in all cases.
UNEVEN: dict[str, Any] = {
    "args": {"batch_size": 6, "microbatch_size": 1, "dtype": "float32"}, "ragged": True, "tied": True,
}  # fmt: skip
DEEP: dict[str, Any] = {**UNEVEN, "layers": 4}
MIXTURE = {"experts": 4}


def case(
    name: str, world_size: int, facts: dict[str, Any], load: str = "", save: bool = False, **args: Any
) -> Case:
    """Of Megatron-Core, with these of its arguments."""
    facts = {**facts, "args": {**facts["args"], **args}}
    return Case(name, "megatron", world_size, load=load, save=save, **facts)


REFERENCES = [
    Case("shared-even", "baseline", 1, **EVEN),
    Case("shared-uneven", "baseline", 1, **UNEVEN),
    Case("shared-deep", "baseline", 1, **DEEP),
    # The shared model has no experts: Megatron-Core alone is their reference.
    case("one-mixture", 1, UNEVEN, **MIXTURE),
]
# By the reference, what must equal it.
CASES = {
    "shared-even": [
        case("saves-one", 1, EVEN, save=True),
        case("saves-tensor", 2, EVEN, save=True, tensor_parallel=2),
        case("same-grid", 2, EVEN, load="saves-tensor", tensor_parallel=2),
        case("one-to-copies", 2, EVEN, load="saves-one"),
        case("tensor-to-four", 4, EVEN, load="saves-tensor", tensor_parallel=2, pipeline_parallel=2),
        # Another seed, and the reference's initial values as published weights.
        case("published", 2, EVEN, tensor_parallel=2, init_from="published", seed=5),
    ],
    "shared-uneven": [
        case("one", 1, UNEVEN),
        case("tensor", 2, UNEVEN, tensor_parallel=2),
        case("tensor-whole-sequences", 2, UNEVEN, tensor_parallel=2, sequence_parallel=False),
        case("pipeline", 2, UNEVEN, pipeline_parallel=2),
        case("context", 2, UNEVEN, context_parallel=2),
        case("copies", 2, UNEVEN, overlap=True, activation_checkpointing="full"),
        case("copies-whole-optimizer", 2, UNEVEN, save=True, distributed_optimizer=False),
        case("resumed-whole-optimizer", 2, UNEVEN, load="copies-whole-optimizer", distributed_optimizer=False),
        case("tensor-and-context", 4, UNEVEN, tensor_parallel=2, context_parallel=2),
    ],
    "shared-deep": [case("virtual-stages", 2, DEEP, pipeline_parallel=2, stages_per_rank=2)],
    "one-mixture": [
        case("experts", 2, UNEVEN, expert_parallel=2, **MIXTURE),
        case("experts-and-pipeline", 4, UNEVEN, expert_parallel=2, pipeline_parallel=2, **MIXTURE),
    ],
}  # fmt: skip
UPCYCLED = case("upcycled", 1, EVEN, init_from="published", seed=5, **MIXTURE)
ALL = [(reference, case) for reference, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the cases' data and checkpoints."""
    folder = tmp_path_factory.mktemp("megatron")
    make_data(folder / "data")
    model = Transformer(SIZE)
    materialize(model, 0, torch.device("cpu"))
    published = folder / "published"
    published.mkdir()
    save_file(
        {to_hugging_face(name): tensor for name, tensor in model.state_dict().items()},
        published / "a.safetensors",
    )
    (published / "config.json").write_text(json.dumps(hugging_face_config(SIZE, context=SEQUENCE_LENGTH)))
    return folder


def with_weights_in(folder: Path, case: Case) -> Case:
    """The case, whose `init_from` is in `folder`."""
    if "init_from" not in case.args:
        return case
    return dataclasses.replace(case, args={**case.args, "init_from": str(folder / case.args["init_from"])})


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """What every case computed, by its name."""
    found: dict[str, Outcome] = {}
    for world_size in (1, 2, 4):
        cases = [
            case
            for case in [*REFERENCES, UPCYCLED, *(case for _, case in ALL)]
            if case.world_size == world_size
        ]
        cases = [with_weights_in(folder, case) for case in cases]
        found |= launch(folder, world_size, cases, module=WORKER)
    return found


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Relative, of the steps that `ours` did: the last ones."""
    theirs = theirs[len(theirs) - len(ours) :]
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("reference", "case"), ALL, ids=lambda value: getattr(value, "name", ""))
def test_trains_as_one_process_does(reference: str, case: Case, outcomes: dict[str, Outcome]) -> None:
    ours, theirs = outcomes[case.name], outcomes[reference]
    assert len(ours.losses) == STEPS - SAVED_AT if case.load else STEPS
    loss = largest_difference(ours.losses, theirs.losses)
    norm = largest_difference(ours.grad_norms, theirs.grad_norms)
    print(f"PARITY {case.name} loss {loss:.2e} norm {norm:.2e}")
    assert loss < LOSS
    assert norm < NORM


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_trains_as_one_gpu_does(tmp_path: Path) -> None:
    """The same cases on GPUs, which choose another kernel, and so another order of summation, for another shape."""
    make_data(tmp_path / "data")
    found: dict[str, Outcome] = {}
    for world_size in (1, 2, 4):
        cases = [case for case in [*REFERENCES, *(case for _, case in ALL)] if case.world_size == world_size]
        cases = [case for case in cases if "init_from" not in case.args]
        found |= launch(tmp_path, world_size, cases, "cuda", WORKER)
    for reference, case in ALL:
        if case.name in found:
            ours, theirs = found[case.name], found[reference]
            assert largest_difference(ours.losses, theirs.losses) < 1e-5, case.name
            assert largest_difference(ours.grad_norms, theirs.grad_norms) < 5e-4, case.name


def test_goes_on_bit_for_bit_in_the_same_grid(outcomes: dict[str, Outcome]) -> None:
    """From a checkpoint, with other initial weights and another random state before it is read."""
    for first, second in (
        ("saves-tensor", "same-grid"),
        ("copies-whole-optimizer", "resumed-whole-optimizer"),
    ):
        through, resumed = outcomes[first], outcomes[second]
        assert resumed.losses == through.losses[SAVED_AT:]
        assert resumed.grad_norms == through.grad_norms[SAVED_AT:]
        assert resumed.weights_after == through.weights_after
        assert resumed.random == through.random


def test_experts_that_begin_as_copies_of_a_dense_layer_are_that_layer(outcomes: dict[str, Outcome]) -> None:
    """In the first step; then the router makes them differ."""
    ours, dense = outcomes["upcycled"], outcomes["shared-even"]
    assert ours.losses[0] == pytest.approx(dense.losses[0], rel=LOSS)
    assert ours.losses[-1] != pytest.approx(dense.losses[-1], rel=1e-4)


def test_copies_share_the_writing_of_a_checkpoint(folder: Path, outcomes: dict[str, Outcome]) -> None:
    """Megatron-Core by itself leaves what all copies have to the first: 96 GB of an 8B model."""
    assert outcomes["copies-whole-optimizer"].losses
    written = [0, 0]
    for path in (folder / "copies-whole-optimizer").rglob("*.distcp"):
        written[int(path.name.split("_")[2])] += path.stat().st_size
    assert min(written) > 0.8 * max(written) > 0, written


def test_each_copy_keeps_a_part_of_the_moments(outcomes: dict[str, Outcome]) -> None:
    whole, parts = outcomes["copies-whole-optimizer"].moments, outcomes["copies"].moments
    assert whole[0] == whole[1]
    assert max(parts) < 0.51 * whole[0]


def run(module: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A recipe as a person starts it."""
    command = [sys.executable, "-m", module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400
    )


@pytest.mark.parametrize("recipe", ["megatron", "compare"])
def test_a_cpu_is_refused_in_one_line(recipe: str, tmp_path: Path) -> None:
    """By the comparison, too, before it measures the others."""
    ended = run(f"recipes.ch5.{recipe}", "steps=4", RUN_DIR=str(tmp_path))
    assert ended.returncode == 2
    assert not (tmp_path / "results.jsonl").exists()
    assert ended.stderr.splitlines()[-1].startswith("error: Megatron-Core computes on GPUs alone")
    assert "Traceback" not in ended.stderr


def test_a_missing_megatron_core_names_its_environment(tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").touch()  # another package of this name: it has no core
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = run("recipes.ch5.megatron", "steps=1", PYTHONPATH=search)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "megatron.core is not installed here: python -m launcher env install megatron" in line


def shared(size: ModelSize) -> Trained:
    """What a recipe on torch alone saves and loads."""
    model = Transformer(size)
    return Trained(model, torch.optim.AdamW(model.parameters()), {"batch_size": 8})


def test_a_recipe_on_torch_refuses_its_checkpoint(
    outcomes: dict[str, Outcome], folder: Path, one_rank: World
) -> None:
    """Of a run that is the same in everything else."""
    (saved,) = manifest.folders(folder / "saves-one")
    with pytest.raises(CheckpointMismatch) as caught:
        checkpoint.load(saved, shared(SIZE), one_rank)
    assert str(caught.value) == (
        f"{saved} was written by Megatron-Core (torch_dist); this recipe reads torch.distributed.checkpoint: "
        "go on with one that does, or start another run"
    )


def test_it_refuses_a_checkpoint_of_a_recipe_on_torch(tmp_path: Path, one_rank: World) -> None:
    saved = saving.save(tmp_path, shared(SIZE), Progress(step=1), one_rank)
    ended = run(
        "tests.recipes.megatron_on_cpu",
        "recipes.ch5.megatron",
        "steps=2",
        "sequence_length=16",
        RUN_DIR=str(tmp_path),
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"error: {saved} was written by torch.distributed.checkpoint; this recipe reads Megatron-Core (torch_dist): "
        "go on with one that does, or start another run"
    )
    assert "Traceback" not in ended.stderr


def test_a_byte_that_changed_in_a_file_of_megatrons_is_found(
    outcomes: dict[str, Outcome], folder: Path
) -> None:
    """The manifest has its files, too; without the byte the checkpoint is sound."""
    (saved,) = manifest.folders(folder / "saves-tensor")
    found = manifest.check(saved)
    file = max(
        (name for name in found.files if name.startswith(STACK_FOLDER)),
        key=lambda name: found.files[name].size,
    )
    content = bytearray((saved / file).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / file).write_bytes(content)
    with pytest.raises(manifest.Unsound, match=f"{file} is corrupt"):
        manifest.check(saved)


ARGUMENTS = {
    "tensor_parallel=3": "tensor_parallel=3: wants a divisor of the 4 heads of model=tiny; nearest: 2",
    "tensor_parallel=4": "tensor_parallel=4: wants a divisor of the 2 key/value heads of model=tiny; nearest: 2",
    "tensor_parallel=2 sequence_length=255": "tensor_parallel=2: cuts a sequence into 2 pieces, which do not divide "
    "sequence_length=255; nearest: 256",
    "context_parallel=2 sequence_length=254": "context_parallel=2: cuts a sequence into 4 pieces, which do not divide "
    "sequence_length=254; nearest: 256",
    "context_parallel=8": "context_parallel=8: does not divide the 4 heads over 2 key/value heads that a rank has of "
    "model=tiny; nearest: 4",
    "pipeline_parallel=3": "pipeline_parallel=3: 3 stages (3 ranks x 1) do not divide the 4 layers of "
    "model=tiny; nearest: 2",
    "pipeline_parallel=2 stages_per_rank=4": "stages_per_rank=4: 8 stages (2 ranks x 4) do not divide the 4 layers of "
    "model=tiny; nearest: 2",
    "pipeline_parallel=3 stages_per_rank=3": "pipeline_parallel=3: 9 stages (3 ranks x 3) do not divide the "
    "4 layers of model=tiny; nearest: 2 with stages_per_rank=1",
    "stages_per_rank=2": "stages_per_rank=2: wants pipeline_parallel=2 or more",
    "expert_parallel=2": "expert_parallel=2: wants experts=2 or more; experts=0 is a dense model",
    "experts=4 expert_parallel=3": "expert_parallel=3: wants a divisor of experts=4; nearest: 2",
    "experts=2 experts_per_token=3": "experts_per_token=3: wants at most experts=2",
    "experts=2 tensor_parallel=2 sequence_parallel=false": "sequence_parallel=false: wants true with experts=2 and "
    "tensor_parallel=2",
    "dtype=float64": "dtype=float64: wants float32 or bfloat16: its optimizer has no other",
    "compile=true": "compile=true: wants false: Megatron-Core compiles what it can itself",
    "async_save=true": "async_save=true: wants false: Megatron-Core writes while the steps wait",
    "activation_checkpointing=selective": "activation_checkpointing=selective: wants none or full: what others keep "
    "selectively, attention's result, it computes again",
}
RANKS = {
    ("tensor_parallel=2 pipeline_parallel=2", 6): "tensor_parallel=2: one copy of the model takes 4 ranks "
    "(tensor_parallel=2 times pipeline_parallel=2), which do not divide 6 ranks; nearest: 1",
    ("tensor_parallel=2 pipeline_parallel=4", 4): "pipeline_parallel=4: one copy of the model takes 8 ranks "
    "(tensor_parallel=2 times pipeline_parallel=4), which do not divide 4 ranks; nearest: 2",
    ("tensor_parallel=2 pipeline_parallel=2", 5): "tensor_parallel=2: one copy of the model takes 4 ranks "
    "(tensor_parallel=2 times pipeline_parallel=2), which do not divide 5 ranks; nearest: 8 ranks",
    (
        "experts=4 expert_parallel=4",
        6,
    ): "expert_parallel=4: 6 ranks have 6 copies of the rest, over which experts are spread: wants a divisor; "
    "nearest: 2",
    (
        "pipeline_parallel=2 stages_per_rank=2 batch_size=6",
        4,
    ): "stages_per_rank=2: virtual stages go round in groups of "
    "pipeline_parallel=2 microbatches, and a copy has 3 (batch_size=6 over 2 copies, microbatch_size=1)",
}


@pytest.mark.parametrize("words", ARGUMENTS)
def test_arguments_that_no_number_of_ranks_could_serve(words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(MegatronArgs, words.split())
    assert str(caught.value) == ARGUMENTS[words]


@pytest.mark.parametrize("asked", RANKS)
def test_ranks_that_cannot_be_divided(asked: tuple[str, int]) -> None:
    words, ranks = asked
    with pytest.raises(ArgumentError) as caught:
        parse(MegatronArgs, words.split()).check_ranks(ranks, ranks)
    assert str(caught.value) == RANKS[asked]


def test_the_launcher_says_it_before_it_submits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=ch5_megatron", "cluster=local", "nodes=1", "tasks_per_node=3", "args.tensor_parallel=2"]
    assert main(["submit", *words]) == 2
    assert capsys.readouterr().err.endswith(
        "args.tensor_parallel=2: one copy of the model takes 2 ranks (tensor_parallel=2), which do not divide "
        "3 ranks; nearest: 1\n"
    )


def test_it_stands_beside_fsdp_and_zero_in_one_job(tmp_path: Path) -> None:
    """The same losses, and what each keeps of so many parameters: FSDP a half of all, Megatron-Core of the moments."""
    words = ["steps=2", "untimed=1", "sequence_length=32", "batch_size=4", "dtype=float32"]
    agent = ("--nproc-per-node", "2", "-m", "tests.recipes.megatron_on_cpu", "recipes.ch5.compare")
    ended = run("torch.distributed.run", *agent, *words, RUN_DIR=str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    measured = {line["strategy"]: line for line in lines if line["kind"] == "measurement"}
    assert list(measured) == ["full_shard", "zero1", "zero2", "zero3", "megatron"]
    fsdp, megatron = measured["full_shard"], measured["megatron"]
    for one in measured.values():
        assert one["losses"] == pytest.approx(fsdp["losses"], rel=LOSS)
        assert one["grad_norms"] == pytest.approx(fsdp["grad_norms"], rel=NORM)
    # Its tables have a few rows more.
    assert megatron["kept"]["parameters"] == pytest.approx(2 * fsdp["kept"]["parameters"], rel=0.02)
    assert megatron["kept"]["gradients"] == megatron["kept"]["parameters"]
    assert megatron["kept"]["moments"] == pytest.approx(fsdp["kept"]["moments"], rel=0.02)
    assert (tmp_path / "compare.png").stat().st_size > 10_000
