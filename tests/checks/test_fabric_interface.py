"""The interface for sockets: from the way to the other nodes, never from a host's name."""

from __future__ import annotations

import pytest

from checks.fabric_environment import socket_interface
from checks.fabric_facts import FabricFacts, Interface, Route
from tests.checks.machines import DEFAULT, up


@pytest.mark.parametrize(
    ("interfaces", "routes", "peer", "expected", "word"),
    [
        (
            up("eth0", "eth1"),
            (Route("eth0", DEFAULT), Route("eth1", "10.0.0.0/8")),
            None,
            "eth0",
            "default route",
        ),
        (
            up("eth0", "eth1"),
            (Route("eth0", DEFAULT), Route("eth1", "10.0.0.0/8")),
            "10.1.2.3",
            "eth1",
            "where the ranks meet",
        ),
        (
            up("eth0", "eth1"),
            (Route("eth0", "10.0.0.0/8"), Route("eth1", "10.1.0.0/16")),
            "10.1.2.3",
            "eth1",
            "ranks meet",
        ),
        (
            up("eth0", "eth1"),
            (Route("eth0", DEFAULT), Route("eth1", "10.0.0.0/8")),
            "127.0.0.11",
            "eth0",
            "default route",
        ),
        (
            up("eth0", "eth1"),
            (Route("eth1", DEFAULT, 200), Route("eth0", DEFAULT, 100)),
            None,
            "eth0",
            "default route",
        ),
        (
            up("eth0", "eth1"),
            (Route("eth1", DEFAULT), Route("eth0", DEFAULT)),
            None,
            None,
            "eth0 and eth1 alike",
        ),
        (up("lo", "eth0"), (Route("eth0", "10.0.0.0/8"),), None, "eth0", "no other interface"),
        (
            up("eth0", "eth1"),
            (Route("eth0", "10.0.0.0/8"), Route("eth1", "11.0.0.0/8")),
            None,
            None,
            "eth0 and eth1 could be meant",
        ),
        (
            up("lo", "docker0", "virbr0", "veth12"),
            (Route("docker0", "172.17.0.0/16"),),
            None,
            None,
            "reaches further",
        ),
        (
            up("docker0", "eth0"),
            (Route("docker0", DEFAULT), Route("eth0", "10.0.0.0/8")),
            None,
            "eth0",
            "no other interface",
        ),
        (
            (Interface("eth0", False), *up("eth1")),
            (Route("eth0", DEFAULT), Route("eth1", "10.0.0.0/8")),
            None,
            "eth1",
            "no other",
        ),
        (
            (Interface("eth0", True, master="bond0"), *up("bond0")),
            (Route("bond0", DEFAULT),),
            None,
            "bond0",
            "default route",
        ),
        (
            (Interface("eth0", True, master="br0"), *up("br0")),
            (Route("eth0", DEFAULT, 0), Route("br0", DEFAULT, 100)),
            None,
            "br0",
            "default route",
        ),
        (up("virbr0"), (Route("virbr0", DEFAULT),), None, None, "reaches further"),
        (up("veth1"), (Route("veth1", DEFAULT),), None, None, "reaches further"),
        (up("docker0"), (Route("docker0", DEFAULT),), None, None, "reaches further"),
        (up("lo"), (Route("lo", DEFAULT),), None, None, "reaches further"),
        (up("local0"), (Route("local0", DEFAULT),), None, "local0", "default route"),
        (up("br0"), (Route("br0", DEFAULT),), None, "br0", "default route"),
        (up("eth0"), (Route("eth0", "10.0.0.0/8"),), "192.168.7.1", None, "no route to 192.168.7.1"),
        (
            up("docker0"),
            (Route("docker0", "172.17.0.0/16"),),
            "172.17.0.2",
            None,
            "docker0, which is not usable",
        ),
    ],
)
def test_the_interface_for_sockets(
    interfaces: tuple[Interface, ...],
    routes: tuple[Route, ...],
    peer: str | None,
    expected: str | None,
    word: str,
) -> None:
    name, reason = socket_interface(FabricFacts("n", (), interfaces, routes), peer)
    assert (name, word in reason) == (expected, True), reason
