"""Facts of a node -> the variables of its fabric with reasons, and each rule by the one value that it hangs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from checks.fabric_environment import derive
from checks.fabric_facts import FabricFacts, FabricKind, Gid, Interface, RdmaPort, Route
from checks.given import Given
from tests.checks.machines import DEFAULT, ROCE_GIDS, aws, azure, dgx, gcp, given, oci, port, up

COMPUTE_PORTS = "=mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11"
OCI_PORTS = "=" + ",".join(f"mlx5_{n}" for n in range(18) if n not in (2, 11))


def with_ports(facts: FabricFacts, change: Callable[[RdmaPort], RdmaPort]) -> FabricFacts:
    return dataclasses.replace(facts, ports=tuple(change(one) for one in facts.ports))


def changed(name: str, **values: object) -> Callable[[RdmaPort], RdmaPort]:
    return lambda one: dataclasses.replace(one, **values) if one.device == name else one  # type: ignore[arg-type]


# --- whole machines -------------------------------------------------------------------------------------------------


def test_a_dgx_uses_its_eight_compute_ports_and_says_why_not_the_others() -> None:
    found = derive(dgx(), "infiniband", {})
    assert found.variables() == {
        "NCCL_SOCKET_IFNAME": "=bond0",
        "GLOO_SOCKET_IFNAME": "bond0",
        "NCCL_IB_HCA": COMPUTE_PORTS,
        "UCX_NET_DEVICES": COMPUTE_PORTS.removeprefix("=").replace(",", ":1,") + ":1",
        "NCCL_IGNORE_CPU_AFFINITY": "1",
    }
    assert {note.subject: note.reason for note in found.notes} == {
        "mlx5_2:1": "Ethernet, not InfiniBand",
        "mlx5_8:1": "not active: DOWN",
        "mlx5_1:1": "shares no PCIe switch with a GPU, as the others do: storage or management",
        "mlx5_7:1": "shares no PCIe switch with a GPU, as the others do: storage or management",
    }
    assert (found.errors, found.warnings) == ((), ())
    assert all(setting.reason for setting in found.settings)


def test_each_gpu_is_shown_with_the_port_behind_its_switch() -> None:
    places = derive(dgx(), "infiniband", {}).places
    assert [place.hcas for place in places] == [
        (name,) for name in COMPUTE_PORTS.removeprefix("=").split(",")
    ]
    assert (places[7].numa_node, places[7].cpus) == (1, "56-111")


def test_where_paths_say_nothing_the_numa_node_tells_what_is_near() -> None:
    facts = with_ports(azure(), lambda one: dataclasses.replace(one, numa_node=int(one.device[-1]) // 4))
    assert derive(facts, "infiniband", {}).places[0].hcas == ("mlx5_ib0", "mlx5_ib1", "mlx5_ib2", "mlx5_ib3")


def test_an_oci_node_uses_sixteen_ports_and_the_gid_index_that_they_share() -> None:
    found = derive(oci(), "roce", {})
    variables = found.variables()
    assert variables["NCCL_IB_HCA"] == OCI_PORTS
    assert (variables["NCCL_IB_GID_INDEX"], variables["UCX_IB_GID_INDEX"]) == ("3", "3")
    assert variables["NCCL_SOCKET_IFNAME"] == "=eth0"
    reasons = {note.subject: note.reason for note in found.notes}
    assert reasons["mlx5_2:1"] == "carries the node's own traffic (eth0)"
    assert reasons["mlx5_11:1"] == "no RoCE v2 GID with an IPv4 address"


def test_a_virtual_machine_on_azure_leaves_accelerated_networking_out_although_it_shows_no_switch() -> None:
    found = derive(azure(), "infiniband", {})
    assert found.variables()["NCCL_IB_HCA"] == "=" + ",".join(f"mlx5_ib{n}" for n in range(8))
    assert found.variables()["NCCL_SOCKET_IFNAME"] == "=eth0"  # not ib0, which NCCL itself would favour


def test_on_aws_only_the_interface_is_chosen() -> None:
    found = derive(aws(), "efa", {})
    assert found.variables() == {"NCCL_SOCKET_IFNAME": "=ens32", "GLOO_SOCKET_IFNAME": "ens32"}
    assert found.errors == ()


@pytest.mark.parametrize(
    ("kind", "control", "data"),
    [
        ("tcpxo", "NCCL_FASTRAK_CTRL_DEV", "NCCL_FASTRAK_IFNAME"),
        ("tcpx", "NCCL_GPUDIRECTTCPX_CTRL_DEV", "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME"),
    ],
)
def test_on_gcp_the_interface_of_the_host_and_those_of_the_gpus(
    kind: FabricKind, control: str, data: str
) -> None:
    variables = derive(gcp(), kind, {}).variables()
    assert variables[control] == "enp0s12"
    assert variables[data] == "enp6s0,enp7s0,enp13s0,enp14s0,enp134s0,enp135s0,enp141s0,enp142s0"


def test_over_tcp_ucx_too_stays_on_the_interface() -> None:
    assert derive(azure(), "tcp", {}).variables() == {
        "NCCL_SOCKET_IFNAME": "=eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "UCX_NET_DEVICES": "eth0",
        "NCCL_IGNORE_CPU_AFFINITY": "1",
    }


def test_on_one_machine_nothing_is_derived() -> None:
    found = derive(dgx(), "loopback", given(GLOO_SOCKET_IFNAME="lo"))
    assert (found.settings, [setting.name for setting in found.kept]) == ((), ["GLOO_SOCKET_IFNAME"])


# --- fabric=auto ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "hca", "word"),
    [
        (dgx(), COMPUTE_PORTS, "fabric=infiniband"),
        (oci(), None, "fabric=roce"),
        (aws(), None, "fabric=efa"),
        (gcp(), None, "sockets"),
    ],
)
def test_auto_names_what_it_sees_and_pins_infiniband_only(
    facts: FabricFacts, hca: str | None, word: str
) -> None:
    found = derive(facts, "auto", {})
    assert found.variables().get("NCCL_IB_HCA") == hca
    assert "NCCL_NET" not in found.variables()
    assert word in next(note.reason for note in found.notes if note.subject == "fabric=auto")
    assert found.errors == ()


# --- what somebody has set ------------------------------------------------------------------------------------------


def test_an_empty_line_of_the_administrators_file_leaves_the_choice_to_the_library() -> None:
    facts = dataclasses.replace(dgx(), nccl_conf={"NCCL_IB_HCA": ("", "/etc/nccl.conf")})
    assert "NCCL_IB_HCA" not in derive(facts, "infiniband", {}).variables()


def test_nothing_that_is_set_is_changed() -> None:
    everything = derive(oci(), "roce", {}).variables()
    mine = {name: f"mine-{name}" for name in everything}
    found = derive(oci(), "roce", given(**mine))
    assert found.variables() == {}
    assert {one.name: (one.value, one.reason) for one in found.kept} == {
        name: (value, "your shell") for name, value in mine.items()
    }


def test_an_empty_value_leaves_the_choice_to_the_library() -> None:
    found = derive(dgx(), "infiniband", given(NCCL_IB_HCA="", NCCL_SOCKET_IFNAME=""))
    assert "NCCL_IB_HCA" not in found.variables()
    assert found.variables()["GLOO_SOCKET_IFNAME"] == "bond0"
    assert found.warnings == ()


def test_the_administrators_file_is_passed_on_as_it_is() -> None:
    facts = dataclasses.replace(dgx(), nccl_conf={"NCCL_IB_HCA": ("=mlx5_0", "/etc/nccl.conf")})
    found = derive(facts, "infiniband", {})
    setting = next(one for one in found.settings if one.name == "NCCL_IB_HCA")
    assert (setting.value, setting.reason.partition(" says")[0]) == ("=mlx5_0", "/etc/nccl.conf")
    assert found.variables()["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert (
        derive(facts, "infiniband", given(NCCL_IB_HCA="=mlx5_3")).variables()["UCX_NET_DEVICES"] == "mlx5_3:1"
    )


@pytest.mark.parametrize(
    ("mine", "follows"),
    [
        ({"NCCL_SOCKET_IFNAME": "ibp"}, {"GLOO_SOCKET_IFNAME": "ibp24s0"}),
        ({"GLOO_SOCKET_IFNAME": "ibp24s0"}, {"NCCL_SOCKET_IFNAME": "=ibp24s0"}),
        ({"NCCL_SOCKET_IFNAME": "^lo"}, {"GLOO_SOCKET_IFNAME": "bond0"}),
        ({"NCCL_IB_HCA": "mlx5_9"}, {"UCX_NET_DEVICES": "mlx5_9:1"}),
    ],
)
def test_what_is_derived_follows_what_is_set(mine: dict[str, str], follows: dict[str, str]) -> None:
    assert follows.items() <= derive(dgx(), "infiniband", given(**mine)).variables().items()


# --- each rule, by the one value that it hangs on -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "facts", "expected"),
    [
        (
            "a port that comes up is used",
            with_ports(dgx(), changed("mlx5_8", state="ACTIVE", pci_path=("0000:00:01.0", "x"))),
            "mlx5_8",
        ),
        ("a port that goes down is not", with_ports(dgx(), changed("mlx5_3", state="DOWN")), "-mlx5_3"),
        (
            "a port that only initialises is not",
            with_ports(dgx(), changed("mlx5_3", state="INIT")),
            "-mlx5_3",
        ),
        ("nor one whose state is unreadable", with_ports(dgx(), changed("mlx5_3", state="")), "-mlx5_3"),
        ("the link layer decides", with_ports(dgx(), changed("mlx5_3", link_layer="Ethernet")), "-mlx5_3"),
        ("a slower port is left out", with_ports(dgx(), changed("mlx5_3", gbps=200.0)), "-mlx5_3"),
        (
            "a rate that is unknown is no slower rate",
            with_ports(dgx(), changed("mlx5_3", gbps=None)),
            "mlx5_3",
        ),
        (
            "behind a GPU's switch a port is a rail",
            with_ports(dgx(), changed("mlx5_1", pci_path=("0000:00:01.0", "y"))),
            "mlx5_1",
        ),
        (
            "where one GPU has no port behind its switch, paths prove nothing",
            with_ports(dgx(), changed("mlx5_0", pci_path=())),
            "mlx5_1",
        ),
    ],
)
def test_which_ports_are_rails(rule: str, facts: FabricFacts, expected: str) -> None:
    names = derive(facts, "infiniband", {}).variables()["NCCL_IB_HCA"].removeprefix("=").split(",")
    assert (expected.removeprefix("-") in names) == (not expected.startswith("-")), rule
    assert (set(names) == set(COMPUTE_PORTS[1:].split(","))) is False or expected == "mlx5_3", (
        "nothing changed"
    )


def test_with_two_ports_on_a_card_the_one_that_is_used_is_named() -> None:
    second = RdmaPort("mlx5_0", 2, "DOWN", "InfiniBand", 400.0)
    facts = FabricFacts("n", (port("mlx5_0"), second), up("lo", "eth0"), (Route("eth0", DEFAULT),))
    assert derive(facts, "infiniband", {}).variables()["NCCL_IB_HCA"] == "=mlx5_0:1"
    both = dataclasses.replace(facts, ports=(port("mlx5_0"), dataclasses.replace(second, state="ACTIVE")))
    assert derive(both, "infiniband", {}).variables()["NCCL_IB_HCA"] == "=mlx5_0"


@pytest.mark.parametrize(
    ("gids", "index", "reason"),
    [
        (ROCE_GIDS, "3", ""),
        (
            (*ROCE_GIDS[:2], dataclasses.replace(ROCE_GIDS[3], index=5)),
            None,
            "has another index on each port",
        ),
        ((*ROCE_GIDS, dataclasses.replace(ROCE_GIDS[3], index=2)), "3", ""),
        ((), None, "could not be read"),
    ],
)
def test_one_gid_index_for_all_ports_or_none(gids: tuple[Gid, ...], index: str | None, reason: str) -> None:
    found = derive(with_ports(oci(), changed("mlx5_4", gids=gids)), "roce", {})
    assert found.variables().get("NCCL_IB_GID_INDEX") == index
    assert any(note.subject == "NCCL_IB_GID_INDEX" and reason in note.reason for note in found.notes) == (
        index is None
    )


def test_of_several_indices_that_all_ports_share_the_lowest_counts() -> None:
    more = (*ROCE_GIDS, dataclasses.replace(ROCE_GIDS[3], index=5))
    facts = with_ports(oci(), lambda one: dataclasses.replace(one, gids=more) if len(one.gids) > 2 else one)
    assert derive(facts, "roce", {}).variables()["NCCL_IB_GID_INDEX"] == "3"


def test_roce_v1_and_ipv6_entries_are_no_index() -> None:
    only_v1 = with_ports(oci(), lambda one: dataclasses.replace(one, gids=ROCE_GIDS[:3]))
    assert derive(only_v1, "roce", {}).errors
    later = (*ROCE_GIDS[:3], dataclasses.replace(ROCE_GIDS[3], index=7))
    facts = with_ports(oci(), lambda one: dataclasses.replace(one, gids=later) if len(one.gids) > 2 else one)
    assert derive(facts, "roce", {}).variables()["NCCL_IB_GID_INDEX"] == "7"


def test_the_only_roce_port_is_used_although_it_carries_the_nodes_own_traffic() -> None:
    facts = dataclasses.replace(oci(), ports=(oci().ports[2],))
    assert derive(facts, "roce", {}).variables()["NCCL_IB_HCA"] == "=mlx5_2"


def test_a_bond_over_the_card_counts_as_the_nodes_own_traffic() -> None:
    facts = oci()
    bond = (*up("lo", "bond0"), Interface("eth0", True, master="bond0"))
    facts = dataclasses.replace(facts, interfaces=bond, routes=(Route("bond0", DEFAULT),))
    assert "mlx5_2" not in derive(facts, "roce", {}).variables()["NCCL_IB_HCA"].split(",")


@pytest.mark.parametrize(("nodes", "value"), [((0, 0), None), ((0, 1), "1"), ((None, None), None)])
def test_affinity_matters_where_gpus_are_on_several_numa_nodes(
    nodes: tuple[int | None, ...], value: str | None
) -> None:
    gpus = tuple(dataclasses.replace(dgx().gpus[0], numa_node=node) for node in nodes)
    facts = dataclasses.replace(dgx(), gpus=gpus)
    assert derive(facts, "infiniband", {}).variables().get("NCCL_IGNORE_CPU_AFFINITY") == value


# --- a fabric that is not there -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "kind", "words"),
    [
        (
            with_ports(dgx(), lambda one: dataclasses.replace(one, state="DOWN")),
            "infiniband",
            ["no active InfiniBand port", "mlx5_0:1 DOWN (InfiniBand)"],
        ),
        (oci(), "infiniband", ["no active InfiniBand port", "mlx5_2:1 ACTIVE (Ethernet)"]),
        (gcp(), "infiniband", ["no active InfiniBand port", "no RDMA device"]),
        (
            dataclasses.replace(gcp(), unread=("/sys/class/infiniband: Permission denied",)),
            "infiniband",
            ["not read: /sys/class/infiniband: Permission denied"],
        ),
        (azure(), "efa", ["no active EFA device", "mlx5_ib0:1 ACTIVE"]),
        (with_ports(aws(), lambda one: dataclasses.replace(one, state="DOWN")), "efa", ["rdmap0s0:1 DOWN"]),
        (gcp(), "roce", ["no active RDMA port on Ethernet", "no RDMA device"]),
        (
            FabricFacts("n", (), up("lo", "eth0"), (Route("eth0", DEFAULT),)),
            "tcpxo",
            ["no interface for the GPUs", "lo, eth0"],
        ),
        (FabricFacts("n", (), up("lo")), "tcp", ["no interface can be chosen", "env.NCCL_SOCKET_IFNAME="]),
    ],
)
def test_a_fabric_that_is_not_there_is_an_error_that_names_what_is(
    facts: FabricFacts, kind: FabricKind, words: list[str]
) -> None:
    (line,) = derive(facts, kind, {}).errors
    assert len(line.splitlines()) == 1
    assert [word for word in (f"fabric={kind}", *words) if word not in line] == [], line


def test_an_interface_that_somebody_names_is_enough_for_tcp() -> None:
    assert derive(FabricFacts("n", (), up("lo")), "tcp", given(NCCL_SOCKET_IFNAME="=tun7")).errors == ()


def test_named_interfaces_for_the_gpus_that_are_not_there_are_an_error() -> None:
    assert derive(gcp(), "tcpxo", {"NCCL_FASTRAK_IFNAME": Given("eth1,eth2", "profile")}).errors
    assert derive(gcp(), "tcpxo", {"NCCL_FASTRAK_IFNAME": Given("enp6s0,eth2", "profile")}).errors == ()
