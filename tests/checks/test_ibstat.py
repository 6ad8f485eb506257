"""`ibstat`, `ibstatus` and their options as captures: judged as the files of sysfs would be that they read."""

from __future__ import annotations

from pathlib import Path

import pytest

from checks.expectations import Expectations
from checks.verdict import Verdict
from tests.checks.replayed import judged

FAIL, WARN, UNKNOWN, PASS = Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN, Verdict.PASS


def adapter(name: str, *ports: str, kind: str = "MT4129", count: int | None = None) -> str:
    """rdma-core, infiniband-diags/ibstat.c, ca_dump."""
    return (
        f"CA '{name}'\n\tCA type: {kind}\n\tNumber of ports: {len(ports) if count is None else count}\n"
        "\tFirmware version: 28.39.1002\n\tHardware version: 0\n\tNode GUID: 0xa088c203005d3a9c\n"
        "\tSystem image GUID: 0xa088c203005d3a9c\n" + "".join(ports)
    )


def port(number: int = 1, **changed: str) -> str:
    """The same, port_dump."""
    values = {"State": "Active", "Physical state": "LinkUp", "Rate": "400", "Base lid": "17", "LMC": "0",
              "SM lid": "1", "Capability mask": "0xa751e848", "Port GUID": "0xa088c203005d3a9c",
              "Link layer": "InfiniBand"}  # fmt: skip
    values |= {name.replace("_", " "): text for name, text in changed.items()}
    return f"\tPort {number}:\n" + "".join(f"\t\t{name}: {text}\n" for name, text in values.items() if text)


def node(**changed: str) -> str:
    """Eight adapters, of which the third is changed."""
    return "".join(adapter(f"mlx5_{number}", port(**changed if number == 2 else {})) for number in range(8))


def test_eight_healthy_adapters(tmp_path: Path) -> None:
    results = judged(tmp_path, node())
    assert {name: one.verdict for name, one in results.items()} == dict.fromkeys(
        ("rdma.devices", "rdma.port", "rdma.rate"), PASS
    )
    assert results["rdma.port"].read == "8 ports active"
    assert judged(tmp_path, node(), expected=Expectations(rails=9))["rdma.devices"].verdict is FAIL


@pytest.mark.parametrize(
    ("changed", "check", "verdict", "says"),
    [
        ({"State": "Down"}, "rdma.port", FAIL, "mlx5_2:1 is 1: DOWN"),
        ({"State": "Initializing"}, "rdma.port", FAIL, "2: INIT"),
        ({"State": "Armed"}, "rdma.port", FAIL, "3: ARMED"),
        ({"State": "???"}, "rdma.port", UNKNOWN, "???"),
        ({"State": "Down", "Physical_state": "Polling"}, "rdma.port", FAIL, "2: Polling"),
        ({"State": "Down", "Physical_state": "Disabled"}, "rdma.port", WARN, "disabled"),
        ({"Physical_state": "LinkErrorRecovery"}, "rdma.port", FAIL, "6: LinkErrorRecovery"),
        ({"Physical_state": "???"}, "rdma.port", UNKNOWN, "???"),
        ({"Link_layer": ""}, "rdma.port", UNKNOWN, "is it cut off?"),
        ({"Rate": "200"}, "rdma.rate", FAIL, "mlx5_2: 200 Gb/s, others of its kind 400"),
        ({"Rate": "2.5"}, "rdma.rate", FAIL, "2.5 Gb/s"),
        ({"Rate": "40 (FDR10)"}, "rdma.rate", FAIL, "40 Gb/s"),
        ({"Rate": ""}, "rdma.rate", UNKNOWN, "is it cut off?"),
        ({"Rate": "fast"}, "rdma.rate", UNKNOWN, "fast"),
        ({"Link_layer": "IB"}, "rdma.port", PASS, "8 ports active"),  # libibumad without the file
    ],
)  # fmt: skip
def test_one_changed_line_changes_the_verdict(
    tmp_path: Path, changed: dict[str, str], check: str, verdict: Verdict, says: str
) -> None:
    result = judged(tmp_path, node(**changed))[check]
    assert (result.verdict, says in result.read) == (verdict, True), result


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            adapter("mlx5_0", port()) + adapter("mlx5_1", port(), count=2),
            "mlx5_1",
        ),  # its second port is cut off
        (adapter("mlx5_0", port()) + adapter("mlx5_1", count=1), "mlx5_1"),
        (adapter("mlx5_0", port()) + "CA 'mlx5_1'\n", "mlx5_1"),
        (
            adapter("mlx5_0", port())
            + "ibpanic: [88] main: stat of IB device 'mlx5_1' failed: No such file\n",
            "mlx5_1",
        ),
    ],
)
def test_an_output_that_breaks_off_is_no_pass(tmp_path: Path, text: str, says: str) -> None:
    result = judged(tmp_path, text)["rdma.port"]
    assert (result.verdict, says in result.read) == (UNKNOWN, True), result


def test_one_port_alone_is_printed_without_indentation(tmp_path: Path) -> None:
    """`ibstat mlx5_0 1`: ca_stat, port_dump(…, alone)."""
    text = "CA: 'mlx5_0'\n" + port(State="Down").replace("\t", "")
    assert judged(tmp_path, text)["rdma.port"].read == "mlx5_0:1 is 1: DOWN, 5: LinkUp"


def test_ports_of_another_fabric_are_not_the_jobs(tmp_path: Path) -> None:
    text = adapter("mlx5_0", port()) + adapter("mlx5_1", port(State="Down", Link_layer="Ethernet", Rate="40"))
    assert judged(tmp_path, text, expected=Expectations(fabric="infiniband"))["rdma.port"].verdict is PASS
    assert judged(tmp_path, text, expected=Expectations(fabric="roce"))["rdma.port"].verdict is FAIL


@pytest.mark.parametrize(
    "text", ["mlx5_0\nmlx5_1\nmlx5_bond_0\n", "".join(adapter(f"mlx5_{n}", count=1) for n in range(3))]
)
def test_a_list_of_devices_says_nothing_of_ports(tmp_path: Path, text: str) -> None:
    """`ibstat -l` and `ibstat -s`."""
    results = judged(tmp_path, text, expected=Expectations(fabric="infiniband", rails=3))
    assert {name: one.verdict for name, one in results.items()} == {"rdma.devices": PASS}
    assert judged(tmp_path, text, expected=Expectations(rails=4))["rdma.devices"].verdict is FAIL


# rdma-core, infiniband-diags/scripts/ibstatus.
IBSTATUS = """Infiniband device '{}' port 1 status:
\tdefault gid:\t fe80:0000:0000:0000:46d2:c920:0000:3891
\tbase lid:\t 0x97
\tsm lid:\t\t 0x13d
\tstate:\t\t {}
\tphys state:\t {}
\trate:\t\t {}
\tlink_layer:\t {}

"""


@pytest.mark.parametrize(
    ("state", "physical", "rate", "check", "verdict"),
    [
        ("4: ACTIVE", "5: LinkUp", "400 Gb/sec (4X NDR)", "rdma.port", PASS),
        ("1: DOWN", "2: Polling", "400 Gb/sec (4X NDR)", "rdma.port", FAIL),
        ("4: ACTIVE", "5: LinkUp", "100 Gb/sec (1X NDR)", "rdma.rate", FAIL),
        ("4: ACTIVE", "5: LinkUp", "N/A (no PMA)", "rdma.rate", UNKNOWN),
        ("", "5: LinkUp", "400 Gb/sec (4X NDR)", "rdma.port", UNKNOWN),
    ],
)
def test_ibstatus_is_read_too(
    tmp_path: Path, state: str, physical: str, rate: str, check: str, verdict: Verdict
) -> None:
    whole = IBSTATUS.format("mlx5_0", "4: ACTIVE", "5: LinkUp", "400 Gb/sec (4X NDR)", "InfiniBand")
    text = "$ ibstatus\n" + whole + IBSTATUS.format("mlx5_1", state, physical, rate, "InfiniBand")
    assert judged(tmp_path, text)[check].verdict is verdict
