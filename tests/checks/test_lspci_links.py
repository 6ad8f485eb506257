"""PCIe links of `lspci -vvv`: those on the way to a GPU or adapter, against what both of their ends can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from checks.verdict import Verdict
from tests.checks.replayed import judged

FAIL, WARN, UNKNOWN, PASS = Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN, Verdict.PASS
GPU, ADAPTER, UPPER = "0000:19:00.0", "0000:1a:00.0", "0000:16:00.0"


def link(speed: str = "32GT/s", width: int = 16, state: str = "", cap: str = "32GT/s, Width x16") -> str:
    """pciutils, ls-caps.c, cap_express_link."""
    return (
        f"\t\tLnkCap:\tPort #0, Speed {cap}, ASPM not supported\n"
        f"\t\tLnkSta:\tSpeed {speed}{state}, Width x{width}{state}\n"
        "\t\tLnkCap2: Supported Link Speeds: 2.5-32GT/s, Crosslink- Retimer+ 2Retimers+ DRS-\n"
        "\t\tLnkSta2: Current De-emphasis Level: -6dB, EqualizationComplete+ EqualizationPhase1+\n"
    )


def tree(**links: str) -> str:
    """A root port, a switch with a port for the GPU and one for the adapter, and a disk elsewhere."""

    def bridge(address: str, what: str, primary: str, secondary: str) -> str:
        name = (
            "Intel Corporation Device 352a" if what == "root" else "Broadcom / LSI PEX890xx PCIe Gen 5 Switch"
        )
        return (
            f"{address} PCI bridge: {name} (rev 04) (prog-if 00 [Normal decode])\n"
            f"\tBus: primary={primary}, secondary={secondary}, subordinate=1c, sec-latency=0\n"
            f"\tCapabilities: [68] Express (v2) Port\n{links.get(what, link())}\n"
        )

    return (
        bridge("15:01.0", "root", "15", "16")
        + bridge("16:00.0", "upper", "16", "17")
        + bridge("17:00.0", "lower", "17", "19")
        + bridge("17:01.0", "other", "17", "1a")
        + "19:00.0 3D controller: NVIDIA Corporation GH100 [H100 SXM5 80GB] (rev a1)\n"
        + f"\tCapabilities: [60] Express (v2) Endpoint, MSI 00\n{links.get('gpu', link())}\n"
        + "1a:00.0 Infiniband controller: Mellanox Technologies MT2910 Family [ConnectX-7]\n"
        + f"\tCapabilities: [60] Express (v2) Endpoint, MSI 00\n{links.get('adapter', link())}\n"
        + "9f:00.0 Non-Volatile memory controller: Samsung Electronics Co Ltd NVMe SSD\n"
        + f"\tCapabilities: [70] Express (v2) Endpoint, MSI 00\n{link('8GT/s', 2, ' (downgraded)')}"
    )


# `(ok)` and `(downgraded)` are of 3.6 and 3.7; later versions say nothing of what is well, nor of a port above.
@pytest.mark.parametrize("ok", ["", " (ok)"])
def test_links_at_their_best_pass_and_a_disk_does_not_count(tmp_path: Path, ok: str) -> None:
    every = dict.fromkeys(("root", "upper", "lower", "other", "gpu", "adapter"), link(state=ok))
    result = judged(tmp_path, tree(**every))["pcie.path"]
    assert (result.verdict, result.read) == (PASS, "2 devices at their best")


@pytest.mark.parametrize("mark", ["", " (downgraded)"])
@pytest.mark.parametrize(
    ("place", "speed", "width", "verdict", "says"),
    [
        ("gpu", "32GT/s", 8, FAIL, f"{GPU}: width 8 of 16"),
        ("gpu", "2.5GT/s", 16, WARN, f"{GPU}: 2.5 of 32 GT/s"),  # it may save power
        ("adapter", "32GT/s", 8, FAIL, f"{ADAPTER}: width 8 of 16"),
        ("adapter", "16GT/s", 16, FAIL, f"{ADAPTER}: 16 of 32 GT/s"),
        ("upper", "32GT/s", 4, FAIL, f"{UPPER}: width 4 of 16"),
        ("upper", "8GT/s", 16, FAIL, f"{UPPER}: 8 of 32 GT/s"),
    ],
)
def test_a_link_below_its_two_ends_is_seen_with_and_without_the_mark(
    tmp_path: Path, mark: str, place: str, speed: str, width: int, verdict: Verdict, says: str
) -> None:
    result = judged(tmp_path, tree(**{place: link(speed, width, mark)}))["pcie.path"]
    assert (result.verdict, says in result.read) == (verdict, True), result


@pytest.mark.parametrize(
    ("links", "verdict", "says"),
    [
        # A slot of an older generation: nothing is broken, and it is slow.
        ({"adapter": link("16GT/s", 16, " (downgraded)"), "other": link("16GT/s", cap="16GT/s, Width x16")}, WARN,
         f"{ADAPTER}: 16 of 32 GT/s, its slot has no more"),
        # A virtual function: its link status is reserved.
        ({"adapter": link("unknown", 0, " (downgraded)")}, PASS, "2 devices"),
        ({"adapter": link("unknown", 16, "")}, UNKNOWN, ADAPTER),
        ({"adapter": "\t\tLnkCap:\tPort #0, Speed 32GT/s, Width x16, ASPM L1\n"}, UNKNOWN, "no LnkSta of 0000:1a"),
        ({"adapter": "\tCapabilities: <access denied>\n"}, Verdict.NOT_PERMITTED, "lspci shows <access denied>"),
        ({"other": ""}, PASS, "2 devices"),  # a hypervisor's port without PCI Express
    ],
)  # fmt: skip
def test_a_slot_a_function_and_what_cannot_be_read(
    tmp_path: Path, links: dict[str, str], verdict: Verdict, says: str
) -> None:
    result = judged(tmp_path, tree(**links))["pcie.path"]
    assert (result.verdict, says in result.read) == (verdict, True), result


def test_a_guests_device_is_compared_with_itself_alone(tmp_path: Path) -> None:
    """`lspci -vvv` in a virtual machine: no port above, and an address of a domain of its own (Azure)."""
    text = "0101:00:00.0 Infiniband controller [0207]: Mellanox Technologies MT2910 [15b3:101e]\n"
    assert judged(tmp_path, text + link())["pcie.path"].verdict is PASS
    result = judged(tmp_path, text + link(width=8))["pcie.path"]
    assert (result.verdict, "0101:00:00.0: width 8 of 16" in result.read) == (WARN, True)


def test_a_device_that_reads_as_ones_is_not_asked_for_its_link(tmp_path: Path) -> None:
    results = judged(tmp_path, tree().replace("(rev a1)", "(rev ff)"))
    assert (results["gpu.bus"].verdict, results["pcie.path"].read) == (FAIL, "1 device at its best")
