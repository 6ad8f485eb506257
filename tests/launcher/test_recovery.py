"""What a run does after each cause: its budget, where it goes on, and when it stops."""

from __future__ import annotations

from typing import get_args

import pytest

from launcher.outcome import Cause, Outcome
from launcher.recovery import BUDGETS, Past, Possible, decide

HERE = Possible(slurm=True, seconds_left=3600.0)


def past(*causes: str, saved: bool = False, steps: bool = True) -> list[Past]:
    return [Past(cause, steps, saved) for cause in causes]


def ended(cause: Cause, node: str = "") -> Outcome:
    return Outcome(cause, "…", 0, node)


def test_every_cause_but_the_two_ends_has_a_budget() -> None:
    assert set(BUDGETS) == set(get_args(Cause)) - {"done", "cancelled"}


@pytest.mark.parametrize(
    ("cause", "action"),
    [
        ("done", "done"), ("cancelled", "stopped"), ("time_limit", "requeued"), ("preemption", "requeued"),
        ("requeued", "requeued"), ("node_failure", "requeued"), ("hang", "restarted"), ("unknown", "restarted"),
        ("user_error", "restarted"), ("out_of_memory", "restarted"), ("storage", "restarted"),
        ("hardware", "restarted"), ("killed", "restarted"),
    ],
)  # fmt: skip
def test_the_first_failure_of_each_cause(cause: Cause, action: str) -> None:
    assert decide(ended(cause), past(cause), HERE).action == action


@pytest.mark.parametrize("cause", [cause for cause, budget in BUDGETS.items() if budget is not None])
def test_a_budget_that_is_spent_stops_the_run_and_says_why(cause: Cause) -> None:
    budget = BUDGETS[cause]
    assert budget is not None
    # Between two of them another attempt saved nothing either, or it would count from there: so only the last counts.
    history = past(*[cause] * (budget + 1))
    decision = decide(ended(cause), history, HERE)
    assert decision.action == "stopped"
    assert f"{budget} retries" in decision.reason
    if budget < 3:
        assert decide(ended(cause), history[1:], HERE).goes_on


def test_a_new_checkpoint_in_between_gives_the_budget_back() -> None:
    history = [*past("unknown", "unknown"), Past("unknown", True, saved=True)]
    assert decide(ended("unknown"), history, HERE).action == "restarted"


@pytest.mark.parametrize("cause", ["preemption", "time_limit", "requeued"])
def test_what_is_free_is_free_as_long_as_there_is_progress(cause: Cause) -> None:
    assert decide(ended(cause), past(*[cause] * 50, saved=True), HERE).action == "requeued"
    stopped = decide(ended(cause), [*past(cause, saved=True), *past(cause, cause, cause)], HERE)
    assert stopped.action == "stopped"
    assert stopped.reason == f"no new checkpoint in 3 attempts ({cause}, {cause}, {cause})"


def test_an_error_before_the_first_step_is_not_repeated() -> None:
    assert decide(ended("user_error"), past("user_error", steps=False), HERE).action == "stopped"


def test_a_job_that_may_not_be_requeued_gets_a_successor() -> None:
    possible = Possible(slurm=True, may_requeue=False)
    assert decide(ended("time_limit"), past("time_limit"), possible).action == "successor"
    assert decide(ended("hang"), past("hang"), possible).action == "restarted"


def test_a_broken_node_is_left_behind() -> None:
    alone = decide(ended("hardware", "n2"), past("hardware"), HERE)
    assert (alone.action, alone.exclude) == ("requeued", ("n2",))
    spare = decide(
        ended("hardware", "n2"), past("hardware"), Possible(slurm=True, seconds_left=3600.0, spare_nodes=1)
    )
    assert (spare.action, spare.exclude) == ("restarted", ("n2",))
    dead = decide(ended("node_failure", "n2"), past("node_failure"), Possible(slurm=True, spare_nodes=1))
    assert (dead.action, dead.exclude) == ("restarted", ("n2",))


def test_without_time_for_a_restart_the_job_goes_back_into_the_queue() -> None:
    assert decide(ended("hang"), past("hang"), Possible(slurm=True, seconds_left=60.0)).action == "requeued"


def test_a_run_of_this_machine_restarts_but_has_no_queue() -> None:
    here = Possible(slurm=False)
    assert decide(ended("unknown"), past("unknown"), here).action == "restarted"
    assert decide(ended("time_limit"), past("time_limit"), here).action == "stopped"
    assert (
        decide(ended("unknown"), past("unknown"), Possible(slurm=False, interactive=True)).action == "stopped"
    )


def test_what_the_preflight_found_on_a_node_is_left_behind_with_it() -> None:
    found, history = ended("hardware", "n2"), past("hardware", steps=False)
    queued = decide(found, history, Possible(slurm=True, preflight_failed=True))
    assert (queued.action, queued.exclude) == ("requeued", ("n2",))
    assert (
        decide(found, history, Possible(slurm=True, preflight_failed=True, spare_nodes=1)).action
        == "restarted"
    )
