"""The recipes that measure, on two nodes of a real Slurm: progress, tables, and every node's name in the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import ledger
from launcher.paths import REPOSITORY
from tests.box_runs.support import Launcher, ended, wait_until

QUICK = ("args.trials=2", "args.budget=0.005")
FEW = ("args.steps=2", "args.warmup_steps=1", "args.batch_size=2", "args.sequence_length=16")
CASES = {
    "ch1_profile": (FEW, "srun", "bottleneck: "),
    "ch1_first_steps": (
        (*FEW, "args.requests=2", "args.prompt_tokens=8"),
        "torchrun",
        "limit of the stream: ",
    ),
    "ch1_topology": ((), "srun", "2 nodes: "),
    "ch1_nccl": (("args.large=64K", *QUICK), "torchrun", "all_reduce"),
    "ch2_bandwidth": (("args.smallest=16K", "args.largest=64K", *QUICK), "srun", "to another node"),
    "ch2_allreduce": (
        ("args.largest=16K", "args.scopes=across", *QUICK),
        "torchrun",
        "all_reduce, across, 2 ranks",
    ),
    "ch2_mfu": (("args.matrix_sizes=64", "args.sequence_length=32", *QUICK), "srun", "of matrix rate"),
    "ch2_overhead": (("args.models=tiny", "args.sequence_length=32", *QUICK), "torchrun", "with and without"),
    "ch2_pairs": (("args.size=64K", *QUICK), "srun", "GB/s from each rank (row) to each other"),
    "ch2_patterns": (("args.largest=16K", "args.patterns=all_to_all", *QUICK), "srun", "all-to-all: 1 round"),
}


@pytest.mark.parametrize("recipe", CASES)
def test_launcher_submit(launcher: Launcher, recipe: str) -> None:
    words, launch, shown = CASES[recipe]
    where = ("cluster=box", "nodes=2", "tasks_per_node=1", f"launch={launch}")
    done = launcher("submit", f"recipe={recipe}", *where, *words, "--wait")
    assert "done: all ranks finished" in done.stdout
    assert shown in done.stdout
    run = launcher.only_run()
    record = ended(run)
    about = ledger.read_lines(run.path / "results.jsonl")[0]
    assert sorted(about["node_of_rank"]) == sorted(record["nodes"])
    assert len(set(about["node_of_rank"])) == about["nodes"] == 2
    progress = ledger.read_lines(run.metrics_file)
    assert record["step_out"] == progress[-1]["step"] == progress[-1]["steps"]
    assert f"step {record['step_out']}/{record['step_out']}" in launcher("status").stdout
    launcher("report")


def test_sbatch_of_the_rendered_file(launcher: Launcher, tmp_path: Path) -> None:
    file = tmp_path / "pairs.sbatch"
    file.write_text(launcher("render", "recipe=ch2_pairs", "cluster=box", "tasks_per_node=1").stdout)
    words = ("args.size=64K", *QUICK)
    launcher.slurm("sbatch", "--nodes=2", f"--output={tmp_path / 'log'}", str(file), *words, cwd=REPOSITORY)
    wait_until(lambda: list(launcher.run_root.glob("ch2_pairs-*/attempts.jsonl")), "the ledger")
    assert ended(launcher.only_run())["state"] == "done"
    assert (launcher.only_run().path / "pairs.png").exists()


def test_a_broken_rank_is_named_in_the_run_s_reason(launcher: Launcher) -> None:
    where = ("cluster=box", "nodes=2", "tasks_per_node=1")
    words = ("args.large=64K", "args.spoilt_rank=1", *QUICK)
    done = launcher("submit", "recipe=ch1_nccl", *where, *words, "--wait", status=None)
    assert done.returncode != 0
    second = ledger.read_lines(launcher.only_run().path / "results.jsonl")[0]["node_of_rank"][1]
    assert f"rank 1 sends wrong numbers (rank 1 is on {second})" in done.stdout
