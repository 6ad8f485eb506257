"""A node's files -> facts of its networks, by the production collectors: trees made here, a bundle, a captured tree."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from checks import fabric_reading
from checks.evidence import Recorded
from checks.fabric_environment import derive
from checks.fabric_facts import FabricFacts, Gid, Gpu, Interface, Route
from checks.fabric_reading import Glance, parse_routes

ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
*\t0000000A\t00000000\t0201\t0\t0\t0\t000000FF\t0\t0\t0
eth1\t0000000B\t00000000\t0000\t0\t0\t0\t000000FF\t0\t0\t0
"""
"""/proc/net/route of a little-endian machine (net/ipv4/fib_trie.c, fib_route_seq_show): 192.0.2.0/24 through eth0, a
rejecting route (RTF_REJECT 0x200), and one that is not up (RTF_UP 0x1)."""

EMPTY_GID = ":".join(["0000"] * 8)
NO_ENVIRONMENT: dict[str, str] = {}


def read_facts(root: Path, environment: dict[str, str]) -> FabricFacts:
    with Glance(str(root)) as source:
        return fabric_reading.read_facts(source, "n1", environment)


def captures() -> Path:
    """The folder of captured evidence."""
    folder = os.environ.get("HARDWARE_CAPTURES")
    if not folder:
        pytest.skip("HARDWARE_CAPTURES names no folder of captures from real machines")
    return Path(folder)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def link(root: Path, name: str, target: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / target).mkdir(parents=True, exist_ok=True)
    path.symlink_to(root / target)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node with a GPU and an mlx5 port behind one switch, as drivers/infiniband/core/sysfs.c lays it out."""
    card = "sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:18:00.0"
    gpu = "sys/devices/pci0000:15/0000:15:01.0/0000:17:00.0/0000:19:00.0"
    port = "sys/class/infiniband/mlx5_0/ports/1"
    files = {
        f"{port}/state": "4: ACTIVE",
        f"{port}/link_layer": "Ethernet",
        f"{port}/rate": "400 Gb/sec (4X NDR)",
        f"{port}/gids/0": "fe80:0000:0000:0000:0e42:a1ff:fe00:0001",
        f"{port}/gids/1": EMPTY_GID,
        f"{port}/gids/2": "fe80:0000:0000:0000:0e42:a1ff:fe00:0001",
        f"{port}/gids/10": "0000:0000:0000:0000:0000:ffff:0a00:0001",
        f"{port}/gid_attrs/types/0": "IB/RoCE v1",
        f"{port}/gid_attrs/types/2": "RoCE v2",
        f"{port}/gid_attrs/types/10": "RoCE v2",
        f"{card}/numa_node": "0",
        f"{card}/net/enp24s0/address": "x",
        f"{gpu}/vendor": "0x10de",
        f"{gpu}/class": "0x030200",
        f"{gpu}/numa_node": "-1",
        f"{gpu}/local_cpulist": "0-55,112-167",
        f"{card}/vendor": "0x15b3",
        f"{card}/class": "0x020700",
        "sys/devices/vga/vendor": "0x1a03",  # a server's own display
        "sys/devices/vga/class": "0x030000",
        "sys/devices/nvswitch/vendor": "0x10de",
        "sys/devices/nvswitch/class": "0x068000",
        "sys/class/net/eth0/operstate": "up",
        "sys/class/net/lo/operstate": "unknown",
        "sys/class/net/lo/flags": "0x9",
        "sys/class/net/eth1/operstate": "down",
        "sys/class/net/tun0/operstate": "unknown",
        "sys/class/net/tun0/flags": "0x1090",
        "sys/class/net/bonding_masters": "bond0",
        "proc/net/route": ROUTES.removesuffix("\n"),
    }
    write(tmp_path, files)
    link(tmp_path, "sys/class/infiniband/mlx5_0/device", card)
    link(tmp_path, f"{card}/driver", "sys/bus/pci/drivers/mlx5_core")
    link(tmp_path, "sys/class/net/eth0/device", "sys/devices/virtio2")
    link(tmp_path, "sys/class/net/eth1/master", "sys/devices/virtual/net/bond0")
    others = (("0000:03:00.0", "sys/devices/vga"), ("0000:07:00.0", "sys/devices/nvswitch"))
    for address, device in (("0000:18:00.0", card), ("0000:19:00.0", gpu), *others):
        link(tmp_path, f"sys/bus/pci/devices/{address}", device)
    return tmp_path


def test_everything_is_read_where_the_kernel_has_it(node: Path) -> None:
    facts = read_facts(node, NO_ENVIRONMENT)
    (port,) = facts.ports
    assert (port.name, port.state, port.link_layer, port.gbps, port.driver) == (
        "mlx5_0:1", "ACTIVE", "Ethernet", 400.0, "mlx5_core",
    )  # fmt: skip
    assert port.gids == (
        Gid(0, "fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "IB/RoCE v1"),
        Gid(2, "fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "RoCE v2"),
        Gid(10, "0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2"),
    )
    assert (port.netdevs, port.numa_node) == (("enp24s0",), 0)
    assert port.pci_path == ("0000:15:01.0", "0000:16:00.0", "0000:18:00.0")
    path = ("0000:15:01.0", "0000:17:00.0", "0000:19:00.0")
    assert facts.gpus == (Gpu("0000:19:00.0", None, "0-55,112-167", path),)
    assert facts.interfaces == (
        Interface("eth0", True, physical=True),
        Interface("eth1", False, master="bond0", physical=False),
        Interface("lo", True, physical=False),
        Interface("tun0", False, physical=False),
    )
    assert facts.routes == (Route("eth0", "0.0.0.0/0", 100), Route("eth0", "192.0.2.0/24", 100))
    assert (facts.node, facts.unread) == ("n1", ())


def test_the_whole_way_from_files_to_variables(node: Path) -> None:
    found = derive(read_facts(node, NO_ENVIRONMENT), "roce", {})
    assert found.variables() == {
        "NCCL_SOCKET_IFNAME": "=eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "=mlx5_0",
        "UCX_NET_DEVICES": "mlx5_0:1",
        "NCCL_IB_GID_INDEX": "10",
        "UCX_IB_GID_INDEX": "10",
    }
    assert found.places[0].hcas == ("mlx5_0",)


def test_a_machine_without_any_of_it_is_empty_and_nothing_was_unreadable(tmp_path: Path) -> None:
    assert read_facts(tmp_path, NO_ENVIRONMENT) == FabricFacts("n1")


def test_a_bundle_gives_the_same_facts(node: Path) -> None:
    with Glance(str(node)) as source:
        live = fabric_reading.read_facts(source, "n1", {"HOME": "/home/u"})
    recorded = Recorded(json.loads(json.dumps(source.records)))
    assert fabric_reading.read_facts(recorded, "n1", {"HOME": "/home/u"}) == live


@pytest.mark.parametrize("text", ["Iface Destination\neth0 xyz", "Iface\n" + "eth0 zz zz zz zz zz zz zz"])
def test_routes_of_another_form_are_named_and_never_a_traceback(node: Path, text: str) -> None:
    write(node, {"proc/net/route": text})
    (line,) = read_facts(node, NO_ENVIRONMENT).unread
    assert line.startswith("/proc/net/route: ")


def test_a_route_of_another_form_is_an_error_for_the_parser() -> None:
    assert parse_routes("") == []
    with pytest.raises(ValueError, match="not a route: eth0 00000000"):
        parse_routes("Iface\neth0 00000000")


def test_what_never_answers_costs_its_deadline_and_is_no_absence(node: Path) -> None:
    (node / "proc/net/route").unlink()
    os.mkfifo(node / "proc/net/route")
    began = time.monotonic()
    facts = read_facts(node, NO_ENVIRONMENT)
    assert time.monotonic() - began < 60  # without a deadline, for ever
    assert facts.ports, "the rest was not read"
    assert any("/proc/net/route" in line and "no answer" in line for line in facts.unread)


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("rate", "N/A (no PMA)", "gbps", None),
        ("rate", "200 Gb/sec (2X NDR)", "gbps", 200.0),
        ("state", "1: DOWN", "state", "DOWN"),
        ("state", "", "state", ""),
        ("link_layer", "InfiniBand", "link_layer", "InfiniBand"),
    ],
)
def test_each_file_of_a_port_matters(node: Path, name: str, text: str, field: str, value: object) -> None:
    write(node, {f"sys/class/infiniband/mlx5_0/ports/1/{name}": text})
    assert getattr(read_facts(node, NO_ENVIRONMENT).ports[0], field) == value


def test_ncclconf_is_found_in_nccls_order(node: Path) -> None:
    write(node, {"etc/nccl.conf": "NCCL_NET=IB\nNCCL_IB_TC=41", "home/u/.nccl.conf": "NCCL_NET=Socket"})
    write(node, {"else/where.conf": "NCCL_IB_TC=106"})
    home = {**NO_ENVIRONMENT, "HOME": "/home/u"}
    assert read_facts(node, home).nccl_conf == {
        "NCCL_NET": ("Socket", "/home/u/.nccl.conf"),
        "NCCL_IB_TC": ("41", "/etc/nccl.conf"),
    }
    named = {**home, "NCCL_CONF_FILE": "/else/where.conf"}
    assert read_facts(node, named).nccl_conf == {
        "NCCL_NET": ("IB", "/etc/nccl.conf"),
        "NCCL_IB_TC": ("106", "/else/where.conf"),
    }


def test_a_folder_that_cannot_be_read_is_no_absence(tmp_path: Path) -> None:
    folder = tmp_path / "sys/class/infiniband"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(folder)  # a loop: an error for root too, unlike a missing permission
    facts = read_facts(tmp_path, NO_ENVIRONMENT)
    (line,) = [line for line in facts.unread if "/sys/class/infiniband" in line]
    assert line in derive(facts, "infiniband", {}).errors[0]


def test_a_glance_does_not_wait_for_counters_to_grow() -> None:
    began = time.monotonic()
    with Glance("/") as source:
        source.wait(60)
    assert time.monotonic() - began < 30


def test_this_machine_can_be_read() -> None:
    facts = read_facts(Path("/"), NO_ENVIRONMENT)
    assert facts.interface("lo") is not None
    assert facts.unread == ()


# --- a real machine -------------------------------------------------------------------------------------------------


@pytest.fixture
def h100(tmp_path: Path) -> Path:
    """The captured /sys/class/infiniband of an H100 node, at its place."""
    (tmp_path / "sys/class").mkdir(parents=True)
    (tmp_path / "sys/class/infiniband").symlink_to(captures() / "infiniband-h100")
    write(tmp_path, {"sys/class/net/eth0/operstate": "up", "proc/net/route": ROUTES.removesuffix("\n")})
    return tmp_path


def test_the_captured_h100_node_has_eight_rails_and_a_bond_that_is_none(h100: Path) -> None:
    found = derive(read_facts(h100, NO_ENVIRONMENT), "infiniband", {})
    ports = [f"mlx5_{n}" for n in (0, 1, 4, 5, 6, 7, 8, 9)]
    assert found.variables() == {
        "NCCL_SOCKET_IFNAME": "=eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": f"={','.join(ports)}",
        "UCX_NET_DEVICES": ",".join(f"{name}:1" for name in ports),
    }
    assert [(note.subject, note.reason) for note in found.notes] == [
        ("mlx5_bond_0:1", "Ethernet, not InfiniBand")
    ]
    assert found.settings[2].reason == "8 active InfiniBand ports at 400 Gb/s"
    assert (found.errors, found.warnings) == ((), ())


def test_the_captured_node_over_roce_has_its_bond_only_and_no_gid_table(h100: Path) -> None:
    found = derive(read_facts(h100, NO_ENVIRONMENT), "roce", {})
    assert found.variables()["NCCL_IB_HCA"] == "=mlx5_bond_0"
    assert "NCCL_IB_GID_INDEX" not in found.variables()


def test_the_captured_node_has_no_efa(h100: Path) -> None:
    (line,) = derive(read_facts(h100, NO_ENVIRONMENT), "efa", {}).errors
    assert "mlx5_bond_0:1 ACTIVE (Ethernet)" in line
