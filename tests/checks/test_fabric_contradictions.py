"""What somebody has set against what the node shows: one line for each contradiction, none where they agree."""

from __future__ import annotations

import dataclasses

import pytest

from checks import catalog, fabric_contradictions, judge_environment
from checks.collect import collect_node
from checks.collect_host import ENVIRONMENT
from checks.evidence import Recorded, key_of
from checks.expectations import Expectations
from checks.fabric_environment import derive
from checks.fabric_facts import FabricFacts, FabricKind
from checks.fabric_reading import collected
from checks.given import given_by
from checks.registry import judge
from checks.verdict import Verdict
from tests.checks.machines import aws, azure, dgx, gcp, given, oci
from tests.checks.nodes import healthy, with_answers

OCI_V1_INDEX, OCI_LINK_LOCAL_INDEX = "2", "1"


@pytest.mark.parametrize(
    ("facts", "kind", "variable", "value", "word"),
    [
        (azure(), "tcp", "NCCL_SOCKET_IFNAME", "eth9", "no interface that is up matches; there is lo, eth0"),
        (azure(), "tcp", "NCCL_SOCKET_IFNAME", "eth", None),
        (azure(), "tcp", "NCCL_SOCKET_IFNAME", "=eth", "no interface that is up matches"),
        (azure(), "tcp", "NCCL_SOCKET_IFNAME", "=eth0,eth7", "'eth7' matches no interface that is up"),
        (azure(), "tcp", "NCCL_SOCKET_IFNAME", "^docker,lo", None),
        (azure(), "tcp", "NCCL_SOCKET_IFNAME", "^lo", "takes in docker0, which no other node reaches"),
        (azure(), "tcp", "NCCL_SOCKET_IFNAME", "lo", "takes in lo; other nodes cannot reach them"),
        (
            azure(),
            "tcp",
            "NCCL_SOCKET_IFNAME",
            "=eth1",
            "no interface that is up matches",
        ),  # a bond's part, no route
        (azure(), "tcp", "GLOO_SOCKET_IFNAME", "eth0", None),
        (azure(), "tcp", "GLOO_SOCKET_IFNAME", "eth0,ib0", None),
        (azure(), "tcp", "GLOO_SOCKET_IFNAME", "eth", "no interface eth that is up"),
        (azure(), "tcp", "GLOO_SOCKET_IFNAME", "^docker0", "Gloo knows no '^'"),
        (azure(), "tcp", "GLOO_SOCKET_IFNAME", "=eth0", "Gloo knows no '='"),
        (dgx(), "infiniband", "NCCL_IB_HCA", "=mlx5_0,mlx5_3", None),
        (dgx(), "infiniband", "NCCL_IB_HCA", "=mlx5_0,mlx5_8", "'mlx5_8' is not active"),
        (dgx(), "infiniband", "NCCL_IB_HCA", "=mlx5_0,mlx5_77", "there is no device 'mlx5_77'"),
        (dgx(), "infiniband", "NCCL_IB_HCA", "=mlx5_0:2", "no active port matches"),
        (dgx(), "infiniband", "NCCL_IB_HCA", "=mlx5_0:1", None),
        (dgx(), "infiniband", "NCCL_IB_HCA", "=mlx5_8", "no active port matches; there is mlx5_0:1 ACTIVE"),
        (
            dgx(),
            "infiniband",
            "NCCL_IB_HCA",
            "mlx5_1",
            "a prefix and takes in mlx5_10, mlx5_11 too; write =mlx5_1",
        ),
        (dgx(), "infiniband", "NCCL_IB_HCA", "mlx5", "takes in mlx5_2:1, which is not InfiniBand"),
        (dgx(), "infiniband", "NCCL_IB_HCA", "^mlx5_2,mlx5_8", None),
        (dgx(), "tcp", "NCCL_IB_HCA", "=mlx5_77", None),  # sockets do not read it
        (dgx(), "infiniband", "NCCL_IB_DISABLE", "1", "turns off what fabric=infiniband is"),
        (dgx(), "infiniband", "NCCL_IB_DISABLE", "0", None),
        (oci(), "roce", "NCCL_IB_DISABLE", "1", "turns off what fabric=roce is"),
        (dgx(), "tcp", "NCCL_IB_DISABLE", "1", None),
        (aws(), "efa", "NCCL_IB_DISABLE", "1", None),
        (oci(), "roce", "NCCL_IB_GID_INDEX", "3", None),
        (oci(), "roce", "NCCL_IB_GID_INDEX", "-1", None),
        (oci(), "roce", "NCCL_IB_GID_INDEX", OCI_V1_INDEX, "mlx5_0:1 has IB/RoCE v1 there"),
        (oci(), "roce", "NCCL_IB_GID_INDEX", OCI_LINK_LOCAL_INDEX, "mlx5_0:1 has a link-local address there"),
        (oci(), "roce", "NCCL_IB_GID_INDEX", "9", "mlx5_0:1 has none there"),
        (dgx(), "infiniband", "NCCL_IB_GID_INDEX", "9", None),  # NCCL reads it for RoCE only
        (dgx(), "infiniband", "UCX_NET_DEVICES", "mlx5_0:1,bond0", None),
        (dgx(), "infiniband", "UCX_NET_DEVICES", "all", None),
        (
            dgx(),
            "infiniband",
            "UCX_NET_DEVICES",
            "mlx5_8:1,eth3",
            "neither an active port nor an interface that is up: mlx5_8:1, eth3",
        ),
        (dgx(), "infiniband", "NCCL_NET", "IB", None),
        (dgx(), "infiniband", "NCCL_NET", "Socket", "fabric=infiniband is another transport"),
        (oci(), "roce", "NCCL_NET", "socket", "fabric=roce is another transport"),
        (aws(), "efa", "NCCL_NET", "Socket", "fabric=efa is another transport"),
        (aws(), "efa", "NCCL_NET", "AWS Libfabric", None),
        (aws(), "efa", "NCCL_NET", "Libfabric", None),
        (dgx(), "tcp", "NCCL_NET", "IB", "fabric=tcp is another transport"),
        (gcp(), "tcpxo", "NCCL_NET", "Socket", "fabric=tcpxo is another transport"),
        (gcp(), "tcpxo", "NCCL_NET", "FasTrak", None),
        (dgx(), "auto", "NCCL_NET", "Socket", None),
        (aws(), "efa", "FI_PROVIDER", "efa", None),
        (aws(), "efa", "FI_PROVIDER", "tcp", "libfabric then does not use EFA"),
        (dgx(), "infiniband", "FI_PROVIDER", "tcp", None),
        (gcp(), "tcpxo", "NCCL_FASTRAK_IFNAME", "enp6s0,eth2", "no interface eth2 is up"),
        (gcp(), "tcpxo", "NCCL_FASTRAK_CTRL_DEV", "eth0", "no interface eth0 is up"),
        (gcp(), "tcpxo", "NCCL_FASTRAK_CTRL_DEV", "enp0s12", None),
    ],
)
def test_what_is_set_is_held_against_the_evidence(
    facts: FabricFacts, kind: FabricKind, variable: str, value: str, word: str | None
) -> None:
    found = derive(facts, kind, given(**{variable: value})).warnings
    if word is None:
        assert found == ()
    else:
        assert [line for line in found if word in line], found
        assert all(line.startswith(f"{variable}={value} (your shell): ") for line in found)
        assert all(len(line.splitlines()) == 1 for line in found)


def test_the_administrators_file_is_held_against_the_evidence_too() -> None:
    facts = dataclasses.replace(dgx(), nccl_conf={"NCCL_IB_DISABLE": ("1", "/etc/nccl.conf")})
    assert derive(facts, "infiniband", {}).warnings == (
        "NCCL_IB_DISABLE=1 (/etc/nccl.conf): turns off what fabric=infiniband is",
    )
    # The environment wins over the file, so what counts is what the environment says.
    assert derive(facts, "infiniband", given(NCCL_IB_DISABLE="0")).warnings == ()


def test_lo_is_no_contradiction_on_one_machine() -> None:
    assert derive(azure(), "loopback", given(NCCL_SOCKET_IFNAME="lo")).warnings == ()


def test_a_long_value_is_cut_in_the_line() -> None:
    (line,) = derive(
        dgx(), "infiniband", given(NCCL_IB_HCA="=" + ",".join(f"bnxt_re{n}" for n in range(40)))
    ).warnings
    assert "..." in line.partition(" (")[0]
    assert len(line.partition(" (")[0]) < 80


def test_each_variable_is_judged_in_one_place_and_each_becomes_a_verdict_in_one_check() -> None:
    named = [*judge_environment.INTERFACES, *judge_environment.DEVICES, *judge_environment.TRANSPORTS]
    assert sorted(named) == sorted(fabric_contradictions.VARIABLES)


@pytest.mark.parametrize(
    ("variable", "value", "verdict"),
    [
        ("NCCL_SOCKET_IFNAME", "ib", Verdict.FAIL),
        ("NCCL_SOCKET_IFNAME", "=eth0,ib7", Verdict.WARN),
        ("NCCL_IB_HCA", "mlx5_9", Verdict.FAIL),
        ("NCCL_IB_DISABLE", "1", Verdict.FAIL),
    ],
)
def test_the_preflight_and_the_fabrics_variables_say_the_same_of_a_node(
    variable: str, value: str, verdict: Verdict
) -> None:
    """The same words from both, so that they cannot drift apart."""
    records = with_answers(healthy(), {key_of("environment", ENVIRONMENT): {"value": {variable: value}}})
    expected = Expectations(gpus=2, fabric="infiniband")
    node = collect_node(Recorded(records), "n1", expected)
    results = judge(node, expected, catalog.named(["env"], "passive"))
    (result,) = [one for one in results if one.verdict is not Verdict.PASS]
    warned = derive(collected(node), "infiniband", given_by({variable: value}, "environment")).warnings
    assert (result.verdict, result.read) == (verdict, "; ".join(warned))


def test_a_job_within_one_machine_may_name_lo() -> None:
    environment = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    changes = {key_of("environment", ENVIRONMENT): {"value": environment}}
    changes["read /sys/class/net/lo/operstate"] = {"value": "unknown\n"}
    for fabric, verdict in (("none", Verdict.PASS), ("infiniband", Verdict.WARN)):
        expected = Expectations(gpus=2, fabric=fabric)
        node = collect_node(Recorded({**healthy(), **changes}), "n1", expected)
        (result,) = judge(node, expected, catalog.named(["env.interface"], "passive"))
        assert result.verdict is verdict, result
