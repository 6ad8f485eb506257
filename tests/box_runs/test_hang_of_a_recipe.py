"""A rank of a real recipe stops in the middle of training: what is said of it, and that the run goes on to its end."""

from __future__ import annotations

import re

from launcher import ledger, runs
from tests.box_runs.support import Launcher, ended, submit_entrypoint

STEPS = 12


def test_fsdp_names_the_rank_its_line_and_the_collective_and_goes_on(launcher: Launcher) -> None:
    """Under torchrun, whose workers the signal reaches only if Slurm sends it to the tasks' children as well."""
    run = submit_entrypoint(
        launcher, "nodes=2", "tasks_per_node=1", "env.HANG_SECONDS=4", "launch=torchrun", module="faulty",
        recipe="recipes.ch4.fsdp", fault="hang", faulty_rank=1, faulty_step=8,
        steps=STEPS, save_every=5, log_every=1, batch_size=4, sequence_length=64,
    )  # fmt: skip
    first, second = ended(run, 1), ended(run, 2)
    assert (first["cause"], first["rank"], first["action"]) == ("hang", 1, "restarted")
    assert re.search(
        rf"rank 1 on {first['nodes'][1]} stands in stuck_in_a_layer \(faulty\.py:\d+\) while the others wait in "
        r".*: gloo all_gather of \[\d+\] Float, call \d+ of group 0 \(default_pg\)$",
        first["reason"],
    ), first["reason"]
    assert any(re.search(r"^rank 1 .*; made call \d+ last$", line) for line in first["evidence"]), first[
        "evidence"
    ]
    assert first["saved_out"] == 5
    assert (second["cause"], second["saved_in"], second["step_out"]) == ("done", 5, STEPS)
    assert steps_after_the_restart(run) == list(range(6, STEPS + 1))


def steps_after_the_restart(run: runs.Run) -> list[int]:
    return [line["step"] for line in ledger.read_lines(run.metrics_file) if line["attempt"] == 2]
