"""Which rounds the active tier runs, and what they come to, where the agents' answers are given."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from checks import active
from checks.active import on_this_machine
from checks.expectations import Expectations
from tests.checks.active_nodes import BASELINES, node, rank

NODES = ("n1", "n2", "n3", "n4")
TCP = Expectations(gpus=2, fabric="tcp")
Answers = Callable[[Sequence[Sequence[str]], str], dict[str, Any]]


def late() -> dict[str, Any]:
    """A node one of whose ranks was not there yet when the round was over."""
    return {"node": "n", "gpus": 2, "ranks": [rank(), {"trouble": active.STARTED_LATE, "stage": "start"}]}


def a_pair(*, trouble: str = "") -> dict[str, Any]:
    return {"gpus": 2, "ranks": [{"pair": 180.0, "trouble": trouble}, {"pair": 180.0, "trouble": ""}]}


def measured(
    monkeypatch: pytest.MonkeyPatch, answers: Answers, expected: Expectations = TCP, budget: float = 90.0
) -> tuple[active.Found, list[tuple[str, int]]]:
    """What it came to, and each round's kind and number of groups."""
    rounds: list[tuple[str, int]] = []

    def run_round(groups: Any, kind: str, seconds: float, *_: Any, **__: Any) -> dict[str, Any]:
        assert 0 < seconds <= budget
        rounds.append((kind, len(groups)))
        return answers(groups, kind)

    monkeypatch.setattr(active, "run_round", run_round)
    found = active.measure(
        NODES, expected, on_this_machine, baselines=BASELINES, budget=budget, address="localhost"
    )
    return found, rounds


def test_a_job_that_gives_what_it_should_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rounds = measured(monkeypatch, lambda groups, kind: {name: node() for name in NODES})
    assert rounds == [("whole", 1)]


def test_a_node_that_started_late_is_measured_again_and_then_good(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter([{**{name: node() for name in NODES}, "n2": late()}, {name: node() for name in NODES}])
    found, rounds = measured(monkeypatch, lambda groups, kind: next(tries))
    assert rounds == [("whole", 1), ("whole", 1)]
    results = active.judged(NODES, found.records, found.job, TCP)
    assert {one.verdict.value for each in results.values() for one in each} == {"pass"}


def test_a_pair_that_started_late_is_asked_once_more_and_then_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, ...]] = []

    def answers(groups: Sequence[Sequence[str]], kind: str) -> dict[str, Any]:
        if kind == "whole":
            return {name: node() for name in NODES if name != "n4"}  # which makes pairs necessary
        asked.extend(tuple(group) for group in groups)
        first = asked.count(("n1", "n2")) == 1
        return {
            name: a_pair(trouble=active.STARTED_LATE if name == "n1" and first else "")
            for group in groups
            for name in group
        }

    found, rounds = measured(monkeypatch, answers)
    assert rounds == [("whole", 1), ("pair", 2), ("pair", 1)]
    assert asked == [("n1", "n2"), ("n3", "n4"), ("n1", "n2")]
    assert (found.job.blames, found.job.paired) == ((), 1)


def test_a_node_that_never_starts_is_named_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(groups: Sequence[Sequence[str]], kind: str) -> dict[str, Any]:
        if kind == "whole":
            return {name: late() if name == "n3" else node() for name in NODES}
        return {
            name: a_pair(trouble=active.STARTED_LATE if name == "n3" else "")
            for group in groups
            for name in group
        }

    found, rounds = measured(monkeypatch, answers)
    assert [kind for kind, _ in rounds].count("whole") == 2
    (blame,) = found.job.blames
    assert (blame.kind, blame.nodes) == ("node", ("n3",))
    assert "hung at: start" in blame.why


def test_nothing_is_asked_again_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(groups: Sequence[Sequence[str]], kind: str) -> dict[str, Any]:
        time.sleep(3.0)
        return {name: late() for name in NODES}

    found, rounds = measured(monkeypatch, answers, budget=active.LEAST_ROUND_SECONDS + 2.5)
    assert rounds == [("whole", 1)]
    assert found.job.expects_pairs


def test_rails_are_measured_after_the_job_and_before_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(groups: Sequence[Sequence[str]], kind: str) -> dict[str, Any]:
        if kind == "rails":
            return {name: {"rails": node()["rails"]} for group in groups for name in group}
        there = {"perftest": "/usr/bin/ib_write_bw", "rdma": ["mlx5_0", "mlx5_1"]}
        return {name: {**node(), "rails": None, **there} for name in NODES}

    infiniband = Expectations(gpus=2, fabric="infiniband")
    found, rounds = measured(monkeypatch, answers, infiniband)
    assert rounds == [("whole", 1), ("rails", 2)]
    results = active.judged(NODES, found.records, found.job, infiniband, ["net.rails"])
    assert {one.verdict.value for each in results.values() for one in each} == {"pass"}
    assert "net.rails: pass: n[1-4]: 2 rails: 391 to 392 Gb/s" in active.passes(results)
