"""What somebody has set against what the node shows: one line for each contradiction, none where they agree."""

from __future__ import annotations

import dataclasses

import pytest

from checks.fabric_environment import derive
from checks.fabric_facts import FabricFacts, FabricKind
from tests.checks.machines import aws, azure, dgx, gcp, given, oci

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
