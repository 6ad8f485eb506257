"""A run leaves a broken node behind, where it can do without it. Nodes that die are in test_conformance_of_nodes."""

from __future__ import annotations

import json

from launcher import runs
from tests.box_runs.support import Launcher, ended, submit_entrypoint, wait_until
from tests.box_runs.survival import STEPS, check_continued, job, runs_log, start_now


def nodes_of(run: runs.Run, attempt: int = 1) -> list[str]:
    about = json.loads((run.path / f"attempt-{attempt:02d}" / "attempt.json").read_text())
    return [str(node) for node in about["nodes"]]


def back_in_the_queue(launcher: Launcher, run: runs.Run) -> None:
    wait_until(lambda: job(launcher, run)["Restarts"] == "1", "the requeue")
    start_now(launcher, run)


def broken_card(launcher: Launcher, nodes: int) -> tuple[runs.Run, str]:
    """A run whose rank 1 loses its GPU after step 12, back in the queue; and that rank's node."""
    run = submit_entrypoint(
        launcher, f"nodes={nodes}", "tasks_per_node=1", steps=40, fault="xid", rank=1, step=12, **STEPS
    )
    ended(run)
    back_in_the_queue(launcher, run)
    return run, nodes_of(run)[1]


def test_a_node_with_a_broken_card_is_left_behind(launcher: Launcher) -> None:
    run, broken = broken_card(launcher, nodes=2)
    first, second = check_continued(run, 40, "hardware", "done")
    assert (first["action"], first["excluded"]) == ("requeued", [broken])
    assert broken not in second["nodes"]
    assert job(launcher, run)["ExcNodeList"] == broken


def test_a_node_that_the_job_cannot_do_without_is_not_excluded(launcher: Launcher) -> None:
    """The box has four nodes: without one of them a job of four would wait for ever."""
    run, broken = broken_card(launcher, nodes=4)
    first, second = check_continued(run, 40, "hardware", "done")
    said = f"{broken} cannot be excluded: the job needs 4 nodes, and partition main would have 3 left"
    assert (first["action"], first["excluded"]) == ("requeued", [])
    assert first["decision"] == f"the job goes back into the queue; {said}"
    assert said in runs_log(run)
    assert broken in second["nodes"]
    assert job(launcher, run)["ExcNodeList"] == "(null)"
