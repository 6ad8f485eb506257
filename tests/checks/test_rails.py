"""ib_write_bw on every RDMA port, pair by pair: what it prints, whose rail it is; and nothing waits for what hangs.

No machine of the project's tests has RDMA. What perftest prints there is kept below; the rest of its texts come from
its source, through a stand-in that real agents start, meet through and kill.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from checks import board, pairs, perftest, rail_agent, rail_rounds, rails
from checks.agent import search_path
from checks.evidence import Runner, closed, run_command
from checks.expectations import Expectations
from checks.fabric_environment import rails_and_gid
from checks.pairs import Blame, Pair
from checks.reading import Problem, Reading, Unread
from tests.checks import machines
from tests.checks import stand_in_ib_write_bw as stand_in

NO_DEVICE = """\
 Did not detect devices 
 If device exists, check if driver is up
 Unable to find the Infiniband/RoCE device
"""  # noqa: W291
"""stderr of ib_write_bw where there is no RDMA device, status 1: Debian 12's perftest 4.5+0.17-1, `--version` 6.06."""

SMALL = f"{stand_in.HEADER}\n 2       5000           0.061234            0.060123            0.003757\n"
"""REPORT_FMT_EXT (src/perftest_parameters.h:229), which is used below 0.1 Gb/s."""

NODES = ["n1", "n2", "n3", "n4"]
DEVICES = ("mlx5_0", "mlx5_1")


# --- the tool ---------------------------------------------------------------------------------------------


def test_the_average_of_a_report_is_read_in_gigabits() -> None:
    assert perftest.gigabits(stand_in.report(392.5)) == 392.5
    assert perftest.gigabits(SMALL) == 0.060123
    # With a duration perftest knows no peak.
    assert perftest.gigabits(stand_in.report(197.31).replace("197.31 ", "0.00   ", 1)) == 197.31


@pytest.mark.parametrize(
    "text",
    ["", NO_DEVICE, stand_in.HEADER, stand_in.report(1.0).replace("Gb/sec", "MB/sec"),
     stand_in.report(1.0).replace(stand_in.HEADER, ""), stand_in.report(float("nan"))],
)  # fmt: skip
def test_what_is_no_report_in_gigabits_is_no_figure(text: str) -> None:
    with pytest.raises(ValueError, match=r"report"):
        perftest.gigabits(text)


def test_the_real_tool_takes_our_words_and_says_that_there_is_no_device() -> None:
    if shutil.which(perftest.TOOL) is None or Path(rail_agent.SYSFS).exists():
        pytest.skip("perftest is not installed here, or this machine has RDMA devices")
    command = perftest.command("mlx5_0", 1, gid="3", service=20001, partner="127.0.0.1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (1, NO_DEVICE)
    assert perftest.OWN_FAULTS.search(str(run_command(command, 20)))


# --- whose it is ------------------------------------------------------------------------------------------


def record(partner: str, average: float | dict[str, str], rate: float | None = 400.0) -> dict[str, Any]:
    sent = closed(stand_in.report(average)) if isinstance(average, float) else average
    return {"partner": partner, "rate": rate, "sent": sent, "served": closed(stand_in.report(392.5))}


def played(
    nodes: Sequence[str], bad: dict[tuple[frozenset[str], str], Any], devices: Sequence[str] = DEVICES
) -> tuple[Sequence[Blame], int]:
    """What is blamed where these ends (one node or two) are so on a rail, through the rounds of production."""

    def a_round(groups: Sequence[Sequence[str]], kind: str, seconds: float) -> dict[str, Any]:
        assert (kind, seconds > 0) == ("rails", True)
        answers: dict[str, Any] = {}
        for a, b in groups:
            for node, partner in ((a, b), (b, a)):
                figures = {
                    device: next(
                        (v for (ends, on), v in bad.items() if on == device and ends <= {a, b}), 392.5
                    )
                    for device in devices
                }
                answers[node] = {"rails": {device: record(partner, one) for device, one in figures.items()}}
        return answers

    there = {node: {"rdma": list(devices), "perftest": "/usr/bin/ib_write_bw"} for node in nodes}
    found = rail_rounds.measured(nodes, there, a_round, lambda: 60.0, baseline=None, least_seconds=8.0)
    return found.blames, found.rounds


def at(*ends: str) -> frozenset[str]:
    return frozenset(ends)


def test_healthy_rails_take_one_round() -> None:
    assert played(NODES, {}) == ((), 1)


@pytest.mark.parametrize("count", [4, 5, 8, 9])
def test_the_one_bad_rail_of_a_node_is_named_and_no_other(count: int) -> None:
    nodes = [f"n{one}" for one in range(1, count + 1)]
    for node, device in itertools.product(nodes, DEVICES):
        (blame,), rounds = played(nodes, {(at(node), device): 45.0})
        assert (blame.kind, blame.nodes, blame.rails) == ("rail", (node,), (device,))
        assert "45 Gb/s, expected 360 Gb/s" in blame.why
        assert rounds <= 3


def test_a_node_all_of_whose_rails_are_bad_is_a_node() -> None:
    slow = {(at("n3"), device): 45.0 for device in DEVICES}
    (blame,), _ = played(NODES, slow)
    assert (blame.kind, blame.nodes, blame.rails) == ("node", ("n3",), DEVICES)


def test_a_rail_that_is_bad_between_two_nodes_only_is_a_link() -> None:
    (blame,), _ = played(NODES, {(at("n1", "n2"), "mlx5_1"): 45.0})
    assert (blame.kind, blame.nodes, blame.rails) == ("link", ("n1", "n2"), ("mlx5_1",))


def test_of_two_nodes_nothing_says_which_it_is_except_where_one_accuses_itself() -> None:
    (blame,), _ = played(["n1", "n2"], {(at("n2"), "mlx5_0"): 45.0})
    assert (blame.kind, blame.nodes) == ("undetermined", ("n1", "n2"))
    down = closed(Unread(Problem.ERROR, "ib_write_bw: status 1: Couldn't get context for the device"))
    answers = {
        "n1": {"rails": {"mlx5_0": record("n2", closed(Unread(Problem.TIMED_OUT, "no answer")))}},
        "n2": {"rails": {"mlx5_0": {**record("n1", 392.5), "served": down}}},
    }
    there = {node: {"perftest": "/usr/bin/ib_write_bw"} for node in answers}
    found = rail_rounds.measured(
        ["n1", "n2"], there, lambda *_: answers, lambda: 60.0, baseline=None, least_seconds=8.0
    )
    (blame,) = found.blames
    assert (blame.kind, blame.nodes, blame.rails) == ("rail", ("n2",), ("mlx5_0",))


def test_a_rail_that_fails_on_all_nodes_blames_none_of_them() -> None:
    blames, _ = played(NODES, {(at(node), "mlx5_1"): 45.0 for node in NODES})
    assert {blame.kind for blame in blames} == {"undetermined"}
    assert {blame.rails for blame in blames} == {("mlx5_1",)}


def test_a_rail_that_one_node_lacks_is_that_nodes_and_a_rail_that_one_node_has_is_nobodys() -> None:
    said: dict[str, Any] = {node: {device: record("x", 392.5) for device in DEVICES} for node in NODES}
    del said["n3"]["mlx5_1"]
    said["n4"]["mlx5_9"] = record("x", 392.5)
    found = {node: rails.rails_of(one) for node, one in said.items()}
    assert rails.own_faults(found) == {"n3": {"mlx5_1": rails.NO_RAIL}}


@pytest.mark.parametrize(
    ("rate", "baseline", "passed"),
    [(400.0, None, False), (200.0, None, True), (None, 180.0, True), (200.0, 210.0, False)],
)  # fmt: skip
def test_a_rail_is_judged_by_the_baseline_or_by_its_rate(
    rate: float | None, baseline: float | None, passed: bool
) -> None:
    found = {node: rails.rails_of({"mlx5_0": record("x", 196.0, rate)}) for node in ("n1", "n2")}
    (one,) = rails.outcomes([Pair("n1", "n2")], found, baseline)["mlx5_0"]
    assert one.passed is passed


@pytest.mark.parametrize("said", [None, [], "x", {"mlx5_0": 3}, {"mlx5_0": None}, {"problem": "x"}])
def test_a_report_of_another_form_is_no_figure(said: Any) -> None:
    found = rails.rails_of(said)
    assert isinstance(found, Unread)
    outcomes = rails.outcomes(
        [Pair("n1", "n2")], {"n1": found, "n2": rails.rails_of({"a": record("n1", 1.0)})}, None
    )
    assert [one.passed for each in outcomes.values() for one in each] == [False]


@pytest.mark.parametrize(
    "odd", [{}, {"sent": 3}, {"sent": {"value": 3}}, {"sent": {"value": "x"}}, {"sent": {"problem": []}}, {"rate": "x"}]
)  # fmt: skip
def test_a_rail_of_another_form_is_no_figure(odd: dict[str, Any]) -> None:
    found = rails.rails_of({"mlx5_0": odd})
    assert not isinstance(found, Unread)
    assert isinstance(found["mlx5_0"].sent, Unread)


def test_rails_are_measured_where_the_fabric_has_them_and_the_tool_is_there() -> None:
    infiniband, tcp, unsaid = Expectations(fabric="infiniband"), Expectations(fabric="tcp"), Expectations()
    with_devices = {node: {"rdma": ["mlx5_0"], "perftest": None} for node in NODES}
    assert rail_rounds.are_measured(NODES, {}, infiniband)
    assert rail_rounds.are_measured(NODES, with_devices, unsaid)
    assert not rail_rounds.are_measured(NODES, with_devices, tcp)
    assert not rail_rounds.are_measured(NODES, {}, unsaid)
    assert not rail_rounds.are_measured(["n1"], with_devices, infiniband)
    never = rail_rounds.measured(
        NODES, with_devices, _no_round, lambda: 60.0, baseline=None, least_seconds=8.0
    )
    assert {one["problem"] for one in never.records.values()} == {"missing"}
    there = {node: {"perftest": "/usr/bin/ib_write_bw"} for node in NODES}
    late = rail_rounds.measured(NODES, there, _no_round, lambda: 5.0, baseline=None, least_seconds=8.0)
    assert {one["problem"] for one in late.records.values()} == {"timed out"}


def _no_round(*_: Any) -> dict[str, Any]:
    raise AssertionError("a round was started")


def test_the_ports_are_those_of_the_job_with_the_gid_that_nccl_is_told() -> None:
    chosen, gid = rails_and_gid(machines.dgx(), "infiniband", {})
    assert ([port.device for port in chosen.chosen][:2], len(chosen.chosen), gid) == (
        ["mlx5_0", "mlx5_3"],
        8,
        None,
    )
    named, gid = rails_and_gid(machines.oci(), "roce", machines.given(NCCL_IB_HCA="=mlx5_0,mlx5_1"))
    assert ([port.device for port in named.chosen], gid) == (["mlx5_0", "mlx5_1"], "3")
    assert rails_and_gid(machines.oci(), "roce", machines.given(NCCL_IB_GID_INDEX="5"))[1] == "5"
    assert rails_and_gid(machines.gcp(), "auto", {})[0].chosen == ()


# --- agents that meet, measure and are killed -------------------------------------------------------------


def tree(root: Path, node: str) -> None:
    """/sys/class/infiniband of two NDR ports (drivers/infiniband/core/sysfs.c: state_show, rate_show)."""
    for device in DEVICES:
        port = root / node / "sys" / "class" / "infiniband" / device / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (
            ("state", "4: ACTIVE"), ("phys_state", "5: LinkUp"),
            ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand"),
        ):  # fmt: skip
            (port / name).write_text(f"{text}\n")


def install(folder: Path) -> None:
    """The stand-in, as an executable that is called as perftest's is."""
    path = folder / perftest.TOOL
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {stand_in.__file__} "$@"\n')
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for node in NODES:
        tree(tmp_path, node)
    install(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def a_round(place: Path, groups: Sequence[Sequence[str]], seconds: float) -> dict[str, Any]:
    """One round of real agents, of which each believes to be another node."""

    def start(nodes: Sequence[str], words: dict[str, Any]) -> list[subprocess.Popen[Any]]:
        return [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "checks.agent", json.dumps({**words, "name": ""})],
                env={**os.environ, "PYTHONPATH": search_path(), "SLURMD_NODENAME": node},
                start_new_session=True,
            )
            for node in nodes
        ]

    words = {"gpus": None, "fabric": "infiniband", "root": f"{place}/{{node}}"}
    return board.run_round(groups, "rails", seconds, start, words=words, address="localhost")


def in_rounds(place: Path, seconds: float = 16.0) -> tuple[rail_rounds.Found, float]:
    there = {node: {"perftest": "/usr/bin/ib_write_bw"} for node in NODES}
    began = time.monotonic()
    found = rail_rounds.measured(
        NODES, there, lambda groups, kind, _: a_round(place, groups, seconds), lambda: 60.0,
        baseline=None, least_seconds=8.0,
    )  # fmt: skip
    return found, time.monotonic() - began


def test_agents_measure_both_ways_on_every_rail(place: Path) -> None:
    answers = a_round(place, [("n1", "n2")], 20.0)
    for node, partner in (("n1", "n2"), ("n2", "n1")):
        found = rails.rails_of(answers[node]["rails"])
        assert not isinstance(found, Unread)
        assert list(found) == list(DEVICES)
        for rail in found.values():
            assert (rail.sent, rail.rate, rail.partner, rail.own_fault) == (392.5, 400.0, partner, ""), (
                answers
            )


def test_the_slow_rail_of_a_node_is_named_by_its_agents(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULTS", "n2/mlx5_1 45")
    found, _ = in_rounds(place)
    (blame,) = found.blames
    assert (blame.kind, blame.nodes, blame.rails) == ("rail", ("n2",), ("mlx5_1",)), found.blames
    # What replays is what was read: the records are texts of ib_write_bw, and give the same answer again.
    assert rails.rails_of(json.loads(json.dumps(found.records["n2"]))) == rails.rails_of(found.records["n2"])


def test_a_rail_that_hangs_costs_its_deadline_and_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAULTS", "n3/mlx5_0 hang")
    found, seconds = in_rounds(place, seconds=16.0)
    (blame,) = found.blames
    assert (blame.kind, blame.nodes, blame.rails) == ("rail", ("n3",), ("mlx5_0",)), found.blames
    assert "timed out" in blame.why
    assert seconds < 16.0 * pairs.MOST_ROUNDS + 60, "it hangs for ten minutes"


def test_a_port_that_is_down_accuses_itself_in_the_first_round(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAULTS", "n1/mlx5_1 down")
    answers = a_round(place, [("n1", "n2")], 12.0)
    found = {node: rails.rails_of(one["rails"]) for node, one in answers.items()}
    (fault,) = rails.own_faults(found)["n1"].values()
    assert "Couldn't get context for the device" in fault
    assert list(rails.own_faults(found)) == ["n1"]


@pytest.mark.parametrize(
    ("problem", "left"), [(Problem.MISSING, Problem.MISSING), (Problem.NOT_PERMITTED, Problem.NOT_PERMITTED)]
)
def test_what_keeps_the_tool_from_running_is_in_the_record(
    place: Path, problem: Problem, left: Problem
) -> None:
    def refuse(argv: Sequence[str], seconds: float) -> Reading:
        return Unread(problem, f"command {argv[0]}")

    said = rails.rails_of(measured_with(refuse, place))
    assert not isinstance(said, Unread)
    assert {one.sent.problem for one in said.values() if isinstance(one.sent, Unread)} == {left}


def test_a_partner_that_never_listens_is_waited_for_until_the_deadline(place: Path) -> None:
    asked: list[str] = []

    def nobody(argv: Sequence[str], seconds: float) -> Reading:
        asked.append(argv[-1])
        return Unread(Problem.ERROR, f"{argv[0]}: status 1: {perftest.NO_CONNECTION}")

    began = time.monotonic()
    said = rails.rails_of(measured_with(nobody, place, seconds=1.5))
    assert 0.5 < time.monotonic() - began < 15
    assert not isinstance(said, Unread)
    assert asked.count("n2.example") > 2
    assert [one.own_fault for one in said.values()] == ["", ""]


def measured_with(runner: Runner, place: Path, seconds: float = 3.0) -> dict[str, Any]:
    here = rail_agent.Rails(f"{place}/n1", "infiniband", {})
    services = {device: {"port": 20001, "rate": 400.0} for device in DEVICES}
    partner = {"partner": "n2", "address": "n2.example", "services": services, "first": False}
    try:
        return rail_agent.measured(
            here, partner, board="localhost", ends=time.monotonic() + seconds, runner=runner
        )
    finally:
        here.close()


def test_the_kernels_list_of_cpus_is_read() -> None:
    assert rail_agent.cpus_in("0-2,8\n") == [0, 1, 2, 8]
    assert rail_agent.cpus_in("\n") == []
