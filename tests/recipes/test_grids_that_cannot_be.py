"""Numbers of ranks, heads and tokens that chapter 4 cannot divide: one line before anything is submitted or started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launcher.__main__ import main
from launcher.paths import REPOSITORY
from recipes.ch4.compare_args import CompareArgs
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.lib.arguments import ArgumentError, parse

ARGUMENTS = {
    "strategy=zero3": "strategy=zero3: wants one of full_shard, shard_grad_op, hybrid_shard",
    "tensor_parallel=3": "tensor_parallel=3: wants a divisor of the 4 heads of model=tiny",
    "tensor_parallel=4": "tensor_parallel=4: wants a divisor of the 2 key/value heads of model=tiny",
    "context_parallel=8": "context_parallel=8: does not divide the 4 heads over 2 key/value heads that a rank has of "
    "model=tiny",
    "context_parallel=4 sequence_length=250": "context_parallel=4: 4 ranks share a sequence, and do not divide "
    "sequence_length=250",
    "tensor_parallel=2 sequence_length=255": "tensor_parallel=2: 2 ranks share a sequence, and do not divide "
    "sequence_length=255",
    "model=llama_8b sequence_length=8193": "sequence_length=8193: model=llama_8b was made for sequences of 8,192 "
    "tokens at most",
    "float8=rowwise tensor_parallel=2": "float8=rowwise: wants tensor_parallel=1: its products are of whole matrices",
    "float8=rowwise sequence_length=100": "float8=rowwise: wants sequence_length in multiples of 16, not 100",
    "kept=attention": "kept=attention: wants activation_checkpointing=selective",
    "recomputed_layers=1": "recomputed_layers=1: wants activation_checkpointing=selective or full",
    "recomputed_layers=9 activation_checkpointing=full": "recomputed_layers=9: wants at most 4, the layers of tiny",
    "kept=everything": "kept=everything: wants one of matmul, attention, collectives",
}
RANKS = {
    (
        "tensor_parallel=2",
        3,
        3,
    ): "tensor_parallel=2: 2 ranks share each sequence (tensor_parallel=2 times context_parallel=1), and do "
    "not divide 3 ranks",
    (
        "context_parallel=2",
        5,
        1,
    ): "context_parallel=2: 2 ranks share each sequence (tensor_parallel=1 times context_parallel=2), and do "
    "not divide 5 ranks",
    ("strategy=hybrid_shard shard_size=3", 4, 2): "shard_size=3: wants a divisor of 4, the number of ranks",
    (
        "strategy=hybrid_shard shard_size=2 tensor_parallel=2 context_parallel=2",
        8,
        4,
    ): "shard_size=2: wants a multiple of tensor_parallel=2 times context_parallel=2",
    (
        "tensor_parallel=2",
        6,
        6,
    ): "tensor_parallel=2: leaves 3 ranks to slice the width 128 of model=tiny, which they do not divide",
}
COMPARISONS = {
    "strategies=ddp,zero4": "strategies=zero4: wants one of ddp, shard_grad_op, full_shard, hybrid_shard, zero1",
    "strategies=ddp,ddp": "strategies=ddp,ddp: names ddp twice",
    "strategies=": "strategies=: wants one or more of ddp, shard_grad_op, full_shard, hybrid_shard",
    "untimed=10": "untimed=10: wants less than steps=10: none would be timed",
    "save_every=5": "save_every=5: ch4_compare measures, and saves no checkpoint",
    "strategies=ddp shard_size=2": "shard_size=2: wants hybrid_shard among the strategies",
}


@pytest.mark.parametrize("words", ARGUMENTS)
def test_arguments_that_no_number_of_ranks_could_serve(words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(FsdpArgs, words.split())
    assert str(caught.value).startswith(ARGUMENTS[words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", RANKS)
def test_ranks_that_cannot_be_divided(case: tuple[str, int, int]) -> None:
    words, ranks, ranks_per_node = case
    with pytest.raises(ArgumentError) as caught:
        parse(FsdpArgs, words.split()).check_ranks(ranks, ranks_per_node)
    assert str(caught.value) == RANKS[case]


def test_grids_that_can_be() -> None:
    parse(FsdpArgs, "tensor_parallel=2 context_parallel=2".split()).check_ranks(8, 4)
    whole = "model=llama_8b tensor_parallel=8 sequence_length=8192 strategy=hybrid_shard"
    parse(FsdpArgs, whole.split()).check_ranks(64, 8)


@pytest.mark.parametrize("words", COMPARISONS)
def test_comparisons_that_make_no_sense(words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(CompareArgs, words.split())
    assert str(caught.value).startswith(COMPARISONS[words])


def test_the_launcher_says_it_before_it_submits(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "submit",
        "recipe=ch4_fsdp",
        "cluster=local",
        "tasks_per_node=3",
        "nodes=1",
        "args.tensor_parallel=2",
    ]
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(
        "args.tensor_parallel=2: 2 ranks share each sequence (tensor_parallel=2 times context_parallel=1), and do not "
        "divide 3 ranks\n"
    )


def test_the_recipe_says_it_too() -> None:
    """Under torchrun nobody asked before."""
    done = subprocess.run(
        [sys.executable, "-m", "recipes.ch4.fsdp", "tensor_parallel=2", "device=cpu"],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: tensor_parallel=2: 2 ranks share each sequence (tensor_parallel=2 times context_parallel=1), and do "
        "not divide 1 ranks\n"
    )
