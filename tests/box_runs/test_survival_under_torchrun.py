"""A run outlives the same under torchrun, whose agents stand between Slurm and the ranks."""

from __future__ import annotations

from launcher import box as boxes
from tests.box_runs.support import Launcher, ended, submit_entrypoint
from tests.box_runs.survival import STEPS, after_step, check_continued, start_now, steps_of

TRAINING = ("args.steps=150", "args.save_every=0", "args.sequence_length=32", "args.batch_size=4")


def test_a_preempted_training_run_saves_and_goes_on(own_box: tuple[Launcher, boxes.Box]) -> None:
    launcher, _ = own_box
    words = ["recipe=ch3_ddp", "cluster=box", "nodes=3", "tasks_per_node=1", "launch=torchrun"]
    run = launcher.run_of(launcher("submit", "--json", *words, "sbatch.exclusive=", *TRAINING))
    after_step(run, 12)
    launcher.slurm(
        "sbatch", "--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 1"
    )
    first = ended(run)
    assert (first["cause"], first["action"]) == ("preemption", "requeued")
    # 143 where srun ended the slowest agent, whose rank had saved, once the others were gone.
    assert first["exit_code"] in (75, 143)
    # save_every=0: what there is was saved because the ranks were asked to.
    assert 12 <= first["saved_out"] == first["step_out"] < 150
    start_now(launcher, run)
    second = ended(run, 2)
    assert (second["cause"], second["launch"], second["step_out"]) == ("done", "torchrun", 150)
    assert steps_of(run) == list(range(1, 151))


def test_the_rank_that_was_killed_is_named(launcher: Launcher) -> None:
    run = submit_entrypoint(
        launcher,
        "nodes=2",
        "tasks_per_node=1",
        "launch=torchrun",
        steps=40,
        fault="kill",
        rank=1,
        step=12,
        **STEPS,
    )
    first, second = check_continued(run, 40, "killed", "done")
    assert first["rank"] == 1
    assert first["reason"] == f"rank 1 on {first['nodes'][1]}: Killed (SIGKILL)"
    assert first["action"] == "restarted"
    assert second["job_id"] == first["job_id"]
