"""Every active check can fire: healthy, faulty, missing, not permitted, timed out, and what makes no sense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from checks import baselines, catalog
from checks.expectations import Expectations
from checks.measured import Job, best_burn, measured
from checks.pairs import Blame
from checks.registry import CHECKS, judge
from checks.verdict import CheckResult, Verdict
from tests.checks.active_nodes import JOB, MIB, WHAT, changed, node
from tests.checks.stand_in_ib_write_bw import report

ACTIVE = [check.name for check in catalog.named((), "active")]
INFINIBAND = Expectations(gpus=2, fabric="infiniband")
BIG = 256 * MIB

FAULTS: dict[str, tuple[tuple[Any, ...], Any, Verdict]] = {
    "burn.product": (("ranks", 1, "burn"), 620.0, Verdict.FAIL),
    "copy.device": (("ranks", 0, "copy"), 2200.0, Verdict.FAIL),
    "copy.host": (("ranks", 1, "host"), {"to device": 44.0, "to host": 50.0}, Verdict.FAIL),
    "nvlink.pairs": (("ranks", 0, "peers"), {"0-1": 200.0, "1-0": 332.0}, Verdict.FAIL),
    "net.transport": (("transport",), ["NET/Socket", "P2P"], Verdict.FAIL),
    "net.rails": (("rails", "mlx5_1", "sent"), {"value": report(45.0)}, Verdict.UNKNOWN),
    **{f"net.{what}": (("ranks", 0, f"{what} {BIG}"), 150.0, Verdict.FAIL) for what in WHAT},
}
"""One changed value each, and the verdict that it changes to. net.pairs reads what the job's pairs came to."""

MISSING = {"net.rails": Verdict.WARN}
"""A tool that few images hold must not keep every job from starting."""

NEEDED: dict[str, tuple[Any, ...]] = {name: place for name, (place, _, _) in FAULTS.items()}


def judged(name: str, record: Any, expected: Expectations = INFINIBAND, job: Job = JOB) -> list[CheckResult]:
    return judge(measured("n1", record, job), expected, [CHECKS[name]])


def test_every_active_check_has_its_cases() -> None:
    assert set(ACTIVE) == {*FAULTS, "net.pairs"}


@pytest.mark.parametrize("name", ACTIVE)
def test_a_healthy_node_passes_and_says_what_it_measured(name: str) -> None:
    (one,) = judged(name, node())
    assert one.verdict is Verdict.PASS, one
    assert one.read
    assert one.expected


@pytest.mark.parametrize("name", FAULTS)
def test_one_changed_figure_changes_the_verdict(name: str) -> None:
    where, value, verdict = FAULTS[name]
    (one,) = judged(name, changed(where, value))
    assert (one.verdict, bool(one.remedy)) == (verdict, True), one


@pytest.mark.parametrize("problem", ["missing", "not permitted", "timed out"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_check_that_could_not_measure_does_not_pass(name: str, problem: str) -> None:
    (one,) = judged(name, changed(NEEDED[name], {"problem": problem, "detail": "why"}))
    wanted = {"not permitted": Verdict.NOT_PERMITTED, "missing": MISSING.get(name, Verdict.UNKNOWN)}
    assert one.verdict is wanted.get(problem, Verdict.UNKNOWN), one


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize(
    "record", [None, [], "x", {}, {"ranks": []}, {"ranks": [None]}, {"ranks": 7, "gpus": "2"}]
)
def test_a_report_that_makes_no_sense_is_no_pass(name: str, record: Any) -> None:
    assert Verdict.PASS not in [one.verdict for one in judged(name, record, job=replace(JOB, paired=0))]


@pytest.mark.parametrize("name", sorted(FAULTS))
@pytest.mark.parametrize("value", [None, True, "fast", -1.0, float("nan"), float("inf"), [[]], {"x": "y"}])
def test_a_figure_that_makes_no_sense_is_no_pass(name: str, value: Any) -> None:
    found = [one.verdict for one in judged(name, changed(NEEDED[name], value))]
    assert Verdict.PASS not in found, found


@pytest.mark.parametrize(
    ("trouble", "verdict"),
    [
        ("hung at: all_reduce of 65536 bytes", Verdict.UNKNOWN),
        ("ended at: start: No module named 'torch'", Verdict.UNKNOWN),
        ("ended at: burn: Permission denied", Verdict.NOT_PERMITTED),
    ],
)
def test_a_rank_that_did_not_finish_has_measured_no_collective(trouble: str, verdict: Verdict) -> None:
    (one,) = judged("net.all_reduce", changed(("ranks", 0, "trouble"), trouble))
    assert one.verdict is verdict
    assert trouble in one.read


@pytest.mark.parametrize(
    ("blame", "verdict"),
    [
        (Blame("node", ("n1",), "slow"), Verdict.FAIL),
        (Blame("link", ("n1", "n2"), "slow"), Verdict.FAIL),
        (Blame("once", ("n1", "n2"), "slow"), Verdict.WARN),
        (Blame("undetermined", ("n1", "n2"), "slow"), Verdict.UNKNOWN),
        (Blame("node", ("n3",), "slow"), Verdict.PASS),
    ],
)
def test_what_the_pairs_came_to_is_said_of_the_nodes_that_it_names(blame: Blame, verdict: Verdict) -> None:
    (one,) = judged("net.pairs", node(), job=replace(JOB, blames=(blame,)))
    assert one.verdict is verdict


@pytest.mark.parametrize(
    ("blame", "verdict", "says"),
    [
        (Blame("rail", ("n1",), "slow", ("mlx5_1",)), Verdict.FAIL, "mlx5_1: this node's port or cable"),
        (Blame("node", ("n1",), "slow", ("mlx5_0", "mlx5_1")), Verdict.FAIL, "mlx5_0: this node"),
        (Blame("link", ("n1", "n2"), "slow", ("mlx5_1",)), Verdict.FAIL, "mlx5_1: the link to n2"),
        (Blame("once", ("n1", "n2"), "slow", ("mlx5_1",)), Verdict.WARN, "mlx5_1: with n2: slow"),
        (Blame("undetermined", ("n1", "n2"), "slow", ("mlx5_1",)), Verdict.UNKNOWN, "mlx5_1: undetermined"),
        (Blame("rail", ("n2",), "slow", ("mlx5_1",)), Verdict.PASS, "2 rails: 45 to 391 Gb/s"),
        (Blame("rail", ("n3",), "slow", ("mlx5_1",)), Verdict.UNKNOWN, "undetermined, mlx5_1 to n2"),
        (Blame("rail", ("n1",), "slow", ("mlx5_7",)), Verdict.UNKNOWN, "undetermined, mlx5_1 to n2"),
    ],
)
def test_a_short_rail_is_a_failure_of_the_node_that_is_blamed_for_it(
    blame: Blame, verdict: Verdict, says: str
) -> None:
    where, value, _ = FAULTS["net.rails"]
    (one,) = judged("net.rails", changed(where, value), job=replace(JOB, rail_blames=(blame,)))
    assert (one.verdict, says in one.read) == (verdict, True), one


@pytest.mark.parametrize("kind", ["node", "rail", "link", "undetermined"])
def test_a_collective_that_hangs_with_another_node_is_that_nodes_fault(kind: str) -> None:
    """In a job that hangs everybody hangs: the one who is to blame is left out, and not all of them."""
    hung = changed(("ranks", 0, "trouble"), "hung at: all_reduce of 65536 bytes")
    for culprit, verdict in (("n1", Verdict.UNKNOWN), ("n3", Verdict.WARN)):
        job = replace(JOB, blames=(Blame(kind, (culprit,), "hung"),))
        (one,) = judged("net.all_reduce", hung, job=job)
        assert one.verdict is (verdict if kind in ("node", "rail") else Verdict.UNKNOWN)
        assert ("because of n3" in one.read) == (one.verdict is Verdict.WARN)


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [("link", Verdict.WARN), ("undetermined", Verdict.WARN), ("once", Verdict.UNKNOWN)],
)
def test_a_collective_that_hangs_over_a_bad_link_is_the_links_fault(kind: str, verdict: Verdict) -> None:
    """Or every node would have it, and what blocks on every node is nobody's fault. A pair that passes now is none."""
    hung = changed(("ranks", 0, "trouble"), "hung at: all_reduce of 65536 bytes")
    for ends in (("n1", "n2"), ("n3", "n4")):
        job = replace(JOB, blames=(Blame(kind, ends, "hung"),))
        (one,) = judged("net.all_reduce", hung, job=job)
        assert one.verdict is verdict
        assert (f"because of {' - '.join(ends)}" in one.read) == (verdict is Verdict.WARN)


def test_a_job_without_rails_misses_none_and_one_with_rails_has_ports() -> None:
    without = changed(("rails",), None)
    assert judged("net.rails", without, job=replace(JOB, expects_rails=False)) == []
    (one,) = judged("net.rails", changed(("rails",), {}))
    assert (one.verdict, "no RDMA port" in one.read) == (Verdict.UNKNOWN, True)


def test_a_rail_is_held_against_the_clusters_own_figure() -> None:
    own = baselines.Baseline("ib_write_bw", "H100", "infiniband", (4, 4), 2, 0, 500.0, 0.9, "ours")
    (one,) = judged("net.rails", node(), job=replace(JOB, baselines=(own,)))
    assert (one.verdict, "450" in one.expected) == (Verdict.UNKNOWN, True)


def test_pairs_that_no_time_was_left_for_are_no_pass() -> None:
    (one,) = judged("net.pairs", node(), job=replace(JOB, paired=0))
    assert one.verdict is Verdict.WARN


@pytest.mark.parametrize(
    ("fabric", "used", "verdict"),
    [
        ("roce", "NET/IB", Verdict.PASS),
        ("roce", "NET/Socket", Verdict.FAIL),
        ("efa", "NET/AWS Libfabric", Verdict.PASS),
        ("efa", "NET/Socket", Verdict.FAIL),
        ("tcp", "NET/Socket", Verdict.PASS),
        (None, "NET/Socket", Verdict.WARN),
        ("infiniband", "P2P", Verdict.UNKNOWN),
    ],
)
def test_the_network_is_the_one_that_the_fabric_promises(fabric: Any, used: str, verdict: Verdict) -> None:
    expected = Expectations(gpus=2, fabric=fabric)
    (one,) = judged("net.transport", changed(("transport",), [used]), expected)
    assert one.verdict is verdict


def test_the_best_of_the_job_is_over_all_nodes() -> None:
    assert best_burn([node(), changed(("ranks", 1, "burn"), 750.0), None, {"ranks": 3}]) == 750.0


def test_a_cpu_that_is_slow_only_warns_and_says_what_was_measured() -> None:
    record = {**changed(("ranks", 0, "burn"), 100.0), "gpus": 0}
    (one,) = judged("burn.product", record)
    assert one.verdict is Verdict.WARN
    assert "float32 on the CPU" in one.read
