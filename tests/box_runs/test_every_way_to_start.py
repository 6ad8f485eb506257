"""Each recipe on one, two and four nodes, under srun and torchrun, by `launcher submit` and by `sbatch` of the file.

Every second combination by `launcher submit`, the others by `sbatch`: what differs between these, how a job finds its
run and its spec, is over before nodes and launch begin to matter. Either way comes by each recipe, each number of nodes
and each launch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import runs
from launcher.paths import REPOSITORY
from tests.box_runs.support import FAST, Launcher, ended, losses, wait_until

CASES = [
    (recipe, nodes, launch)
    for recipe, node_counts in {"ch1_baseline": [1], "ch3_ddp": [1, 2, 4], "ch4_fsdp": [1, 2, 4]}.items()
    for nodes in node_counts
    for launch in ("srun", "torchrun")
]

FIRST_LOSSES = (8.35, 8.33)
"""Of the built-in corpus with an untrained model: near log of the vocabulary, the same for every world size."""


def check(run: runs.Run, nodes: int, launch: str) -> None:
    record = ended(run)
    assert record["state"] == "done", record
    assert len(set(record["nodes"])) == nodes
    assert record["world_size"] == nodes
    assert record["launch"] == launch
    assert record["step_out"] == 2
    # One to two seconds, where nothing else runs.
    assert record["tasks_started"] - record["started"] < 20.0
    assert sorted(path.name for path in (run.path / "attempt-01").glob("rank-*.log")) == [
        f"rank-{rank}.log" for rank in range(nodes)
    ]


@pytest.fixture(scope="session")
def loss_of_one_process() -> dict[str, list[float]]:
    """Filled by the first case that runs; every other case must give the same losses."""
    return {}


def compare(found: list[float], reference: dict[str, list[float]]) -> None:
    assert found == pytest.approx(reference.setdefault("losses", found), rel=1e-6)


BY_SBATCH = [
    (recipe, nodes, launch)
    for recipe, nodes, launch in CASES
    if launch == {"ch1_baseline": {1: "srun"}, "ch3_ddp": {1: "torchrun", 2: "srun", 4: "torchrun"},
                  "ch4_fsdp": {1: "srun", 2: "torchrun", 4: "srun"}}[recipe][nodes]
]  # fmt: skip
BY_SUBMIT = [case for case in CASES if case not in BY_SBATCH]


@pytest.mark.parametrize(("recipe", "nodes", "launch"), BY_SUBMIT)
def test_launcher_submit(
    launcher: Launcher, recipe: str, nodes: int, launch: str, loss_of_one_process: dict[str, list[float]]
) -> None:
    words = [
        f"recipe={recipe}",
        "cluster=box",
        f"nodes={nodes}",
        f"launch={launch}",
        "tasks_per_node=1",
        *FAST,
    ]
    done = launcher("submit", *words, "--wait")
    assert "done: all ranks finished" in done.stdout
    check(launcher.only_run(), nodes, launch)
    compare(losses(launcher.only_run()), loss_of_one_process)


@pytest.mark.parametrize(("recipe", "nodes", "launch"), BY_SBATCH)
def test_sbatch_of_the_rendered_file(
    launcher: Launcher, tmp_path: Path, recipe: str, nodes: int, launch: str,
    loss_of_one_process: dict[str, list[float]],
) -> None:  # fmt: skip
    file = tmp_path / "my jobs" / f"{recipe}.sbatch"
    file.parent.mkdir()
    words = [f"recipe={recipe}", "cluster=box", "tasks_per_node=1", f"launch={launch}"]
    file.write_text(launcher("render", *words).stdout)
    log = tmp_path / "job.log"
    launcher.slurm("sbatch", f"--nodes={nodes}", f"--output={log}", str(file), *FAST, cwd=REPOSITORY)
    wait_until(lambda: runs.all_runs([launcher.run_root]), f"the run directory; {log}")
    check(launcher.only_run(), nodes, launch)
    compare(losses(launcher.only_run()), loss_of_one_process)
