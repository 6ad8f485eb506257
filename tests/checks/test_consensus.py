"""The node that is not like the others is named, and nobody is where there is no majority."""

from __future__ import annotations

from checks.collect import collect_node
from checks.collect_host import ENVIRONMENT
from checks.consensus import clock_result, compared, traits_of
from checks.evidence import Record, Recorded, key_of
from checks.expectations import Expectations
from checks.gather import judged_together
from checks.hostlist import expanded, folded
from checks.report import folded_table
from checks.verdict import CheckResult, Verdict
from tests.checks.nodes import healthy, problem, value, with_answers

EXPECTED = Expectations(gpus=2, fabric="infiniband")


def traits(changes: dict[str, Record] | None = None, fabric: str = "infiniband") -> dict[str, str]:
    return traits_of(collect_node(Recorded(with_answers(healthy(fabric), changes or {})), "n1", EXPECTED))


DRIVER = {key_of("nvml", ["nvmlSystemGetDriverVersion"]): value("570.10")}


def different(name: str, changes: dict[str, Record], fabric: str = "infiniband") -> CheckResult:
    """What is said of the one node of four that is different."""
    nodes = {f"n{number}": traits(fabric=fabric) for number in range(1, 4)}
    results = compared({**nodes, "n4": traits(changes, fabric)})
    assert {one.verdict for node in nodes for one in results[node]} == {Verdict.PASS}
    (result,) = [one for one in results["n4"] if one.check == f"same.{name}"]
    return result


def test_equal_nodes_pass() -> None:
    results = compared({f"n{number}": traits() for number in range(3)})
    assert {one.verdict for found in results.values() for one in found} == {Verdict.PASS}


def test_another_driver_fails_that_node() -> None:
    result = different("driver", DRIVER)
    assert result.verdict is Verdict.FAIL
    assert (result.read, result.expected) == ("570.10", "590.48.01, as on 3 of 4 nodes")


def test_what_breaks_a_job_fails_and_the_rest_warns() -> None:
    folder = "/sys/class/infiniband/mlx5_1"
    assert (
        different(
            "gpu_memory",
            {key_of("nvml", ["nvmlDeviceGetMemoryInfo", 1]): value({"total": 1 << 36, "used": 0})},
        ).verdict
        is Verdict.FAIL
    )
    assert (
        different("rdma", {f"read {folder}/ports/1/rate": value("200 Gb/sec (4X HDR)\n")}).verdict
        is Verdict.FAIL
    )
    assert different("firmware", {f"read {folder}/fw_ver": value("28.39.1\n")}).verdict is Verdict.WARN
    assert different("kernel", {"read /proc/sys/kernel/osrelease": value("5.14.0\n")}).verdict is Verdict.WARN
    assert (
        different("gpudirect", {"read /proc/modules": value("mlx5_ib 1 0 - Live 0x0\n")}).verdict
        is Verdict.FAIL
    )


def test_a_gid_index_that_differs_fails_that_node() -> None:
    port = "/sys/class/infiniband/mlx5_1/ports/1"
    swapped = {
        f"read {port}/gid_attrs/types/2": value("RoCE v2\n"),
        f"read {port}/gid_attrs/types/3": value("IB/RoCE v1\n"),
    }
    assert different("gid", swapped, "roce").verdict is Verdict.FAIL
    assert different("mtu", {"read /sys/class/net/ens1/mtu": value("1500\n")}, "roce").verdict is Verdict.FAIL


def test_what_could_be_read_on_three_nodes_and_not_on_the_fourth_is_a_difference() -> None:
    assert different("driver", {next(iter(DRIVER)): problem("timed out")}).read == "timed out"


def test_without_a_majority_nobody_is_blamed_and_nobody_passes() -> None:
    results = compared({"n1": traits(), "n2": traits(DRIVER)})
    verdicts = {one.verdict for found in results.values() for one in found if one.check == "same.driver"}
    assert verdicts == {Verdict.UNKNOWN}


def test_clocks_are_compared_beyond_what_the_network_may_have_cost() -> None:
    assert clock_result(0.5, 0.01).verdict is Verdict.PASS
    assert clock_result(2.0, 0.01).verdict is Verdict.WARN
    assert clock_result(2.0, 1.5).verdict is Verdict.PASS
    assert clock_result(-90.0, 0.01).verdict is Verdict.FAIL


def test_a_node_that_never_answers_is_named() -> None:
    reports = {"n1": {"node": "n1", "results": [], "traits": traits()}}
    results = judged_together(("n1", "n2"), reports, 20.0)
    assert [(one.check, one.verdict) for one in results["n2"]] == [("report", Verdict.UNKNOWN)]


def test_equal_nodes_are_folded_and_passes_are_not_listed() -> None:
    bad = CheckResult("gpu.ecc", Verdict.FAIL, "GPU 0: 1 error", "none", "reset")
    good = CheckResult("gpu.ecc", Verdict.PASS, "none", "none")
    reports = {f"n{number:03d}": [bad if number in (7, 8, 9, 100) else good] for number in range(1, 129)}
    rows = folded_table(reports).splitlines()
    assert len(rows) == 2
    assert rows[1].startswith("n[007-009,100]  gpu.ecc  fail")
    assert folded_table({"n1": [good], "n2": [good]}) == "every check passes on n[1-2]"


def test_many_different_readings_of_one_check_become_one_row() -> None:
    reports = {
        f"n{number}": [CheckResult("host.shm", Verdict.FAIL, f"{number} MiB free", "room", "")]
        for number in range(64)
    }
    rows = folded_table(reports).splitlines()
    assert len(rows) == 2
    assert "64 different readings" in rows[1]


def test_a_variable_that_holds_the_nodes_own_name_is_no_difference() -> None:
    key = key_of("environment", ENVIRONMENT)
    nodes = {
        name: traits_of(
            collect_node(Recorded({**healthy(), key: value({"NCCL_HOSTID": name})}), name, EXPECTED)
        )
        for name in ("n1", "n2")
    }
    assert nodes["n1"] == nodes["n2"]


def test_names_are_folded_and_unfolded_as_slurm_does() -> None:
    for names, text in (
        (["n1", "n2", "n3", "n7"], "n[1-3,7]"),
        (["n008", "n009", "n010"], "n[008-010]"),
        (["login"], "login"),
        (["a1-ib", "a2-ib"], "a[1-2]-ib"),
        (["n1", "gpu7", "gpu8"], "gpu[7-8],n1"),
        (["n1", "n01"], "n1,n01"),
    ):
        assert folded(names) == text
        assert sorted(expanded(text)) == sorted(names)


def test_a_thousand_nodes_with_one_outlier_make_a_short_report() -> None:
    same, other = traits(), traits(DRIVER)
    results = compared({f"n{number}": other if number == 500 else same for number in range(1, 1025)})
    text = folded_table(results)
    assert len(text.splitlines()) < 10
    assert "n500" in text
