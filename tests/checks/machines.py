"""Nodes as facts, small enough to change one value in a test.

Names and shapes are those of real machines: a DGX H100 (user guide, table "Network Modules"), an OCI BM.GPU.H100.8
(oci-hpc nccl-conf/h100), an Azure ND H100 v5 (azurehpc-health-checks nd96isr_h100_v5.conf), an AWS p5, a GCP a3-mega
(cluster-toolkit run-nccl-tests.sh).
"""

from __future__ import annotations

import dataclasses

from checks.fabric_facts import FabricFacts, Gid, Gpu, Interface, RdmaPort, Route
from checks.given import Given

DEFAULT = "0.0.0.0/0"

ROCE_GIDS = (
    Gid(0, "fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "IB/RoCE v1"),
    Gid(1, "fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "RoCE v2"),
    Gid(2, "0000:0000:0000:0000:0000:ffff:0a00:0001", "IB/RoCE v1"),
    Gid(3, "0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2"),
)
"""The order in which mlx5 fills the table: both types for the link-local address, then for the IPv4 one."""


IB_GIDS = (Gid(0, "fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "IB/RoCE v1"),)
"""On InfiniBand the kernel gives every entry this type."""


def given(**variables: str) -> dict[str, Given]:
    return {name: Given(value, "your shell") for name, value in variables.items()}


def port(
    device: str, link_layer: str = "InfiniBand", state: str = "ACTIVE", gbps: float = 400, **more: object
) -> RdmaPort:
    return RdmaPort(device, 1, state, link_layer, gbps, **{"driver": "mlx5_core", **more})  # type: ignore[arg-type]


def up(*names: str) -> tuple[Interface, ...]:
    return tuple(Interface(name, True, physical=name != "lo") for name in names)


def dgx() -> FabricFacts:
    """Eight compute ports beside their GPUs, two storage ports as fast, one Ethernet port, one port that is down."""
    compute = ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11")
    ports = [
        port(name, pci_path=(f"0000:{index:02x}:01.0", f"0000:{index:02x}:02.0", f"{name}.0"),
             numa_node=index // 4, gids=IB_GIDS)
        for index, name in enumerate(compute)
    ]  # fmt: skip
    ports += [
        port(name, pci_path=(f"0000:00:1{index}.0", f"{name}.0"), numa_node=0)
        for index, name in enumerate(("mlx5_1", "mlx5_7"))
    ]
    ports += [port("mlx5_2", "Ethernet", gbps=200, netdevs=("enp170s0f1np1",)), port("mlx5_8", state="DOWN")]
    gpus = [
        Gpu(f"0000:{index:02x}:00.0", index // 4, "0-55" if index < 4 else "56-111",
            (f"0000:{index:02x}:01.0", f"0000:{index:02x}:03.0", f"gpu{index}.0"))
        for index in range(8)
    ]  # fmt: skip
    interfaces = (*up("lo", "bond0", "ibp24s0"), Interface("enp170s0f1np1", True, master="bond0"))
    routes = (Route("bond0", DEFAULT), Route("bond0", "10.1.0.0/16"), Route("ibp24s0", "172.16.0.0/16"))
    return FabricFacts("dgx-01", tuple(reversed(ports)), interfaces, routes, tuple(gpus))


def oci() -> FabricFacts:
    """Sixteen RoCE ports, and the two of the host's own network."""
    ports = [
        port(f"mlx5_{n}", "Ethernet", gbps=200, netdevs=(f"rdma{n}",), gids=ROCE_GIDS) for n in range(18)
    ]
    ports[2] = dataclasses.replace(ports[2], netdevs=("eth0",))
    ports[11] = dataclasses.replace(ports[11], netdevs=("eth1",), gids=ROCE_GIDS[:2])
    interfaces = up("lo", "eth0", *(f"rdma{n}" for n in range(18) if n not in (2, 11)))
    routes = (
        Route("eth0", DEFAULT),
        *(Route(f"rdma{n}", f"10.224.{n}.0/24") for n in range(18) if n not in (2, 11)),
    )
    return FabricFacts("oci-01", tuple(ports), interfaces, routes)


def azure() -> FabricFacts:
    """Eight InfiniBand functions in a virtual machine, and accelerated networking."""
    ports = [port(f"mlx5_ib{n}", pci_path=(f"010{n}:00:00.0",)) for n in range(8)]
    ports.append(port("mlx5_an0", "Ethernet", gbps=100, netdevs=("eth1",)))
    interfaces = (
        *up("lo", "eth0", "docker0", *(f"ib{n}" for n in range(8))),
        Interface("eth1", True, master="eth0"),
    )
    routes = (Route("eth0", DEFAULT), Route("docker0", "172.17.0.0/16"), Route("ib0", "172.16.1.0/24"))
    gpus = tuple(Gpu(f"000{n + 1}:00:00.0", n // 4, "0-47", (f"000{n + 1}:00:00.0",)) for n in range(8))
    return FabricFacts("azure-01", tuple(ports), interfaces, routes, gpus)


def aws() -> FabricFacts:
    ports = tuple(port(f"rdmap{n}s0", "Unknown", gbps=100, driver="efa") for n in range(32))
    return FabricFacts(
        "aws-01",
        ports,
        up("lo", "ens32", "ens65"),
        (Route("ens32", DEFAULT, 100), Route("ens65", DEFAULT, 200)),
    )


def gcp() -> FabricFacts:
    data = ("enp6s0", "enp7s0", "enp13s0", "enp14s0", "enp134s0", "enp135s0", "enp141s0", "enp142s0")
    routes = (Route("enp0s12", DEFAULT), *(Route(name, f"192.168.{n}.0/24") for n, name in enumerate(data)))
    bridge = Interface("br0", True, physical=False)
    return FabricFacts(
        "gcp-01", (), (*up("lo", "enp0s12", *data), bridge), (*routes, Route("br0", "10.88.0.0/16"))
    )
