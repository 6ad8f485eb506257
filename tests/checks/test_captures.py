"""Captures of real machines replay through the production collectors.

HARDWARE_CAPTURES names their folder: sysfs trees (`infiniband*/`), `lspci*.txt`, `kernel-log/`, `nvidia-smi/`. They are
other people's and stay there; tests that need none of them are in test_formats.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from checks.__main__ import main
from checks.verdict import Verdict
from tests.checks.replayed import verdicts

FOLDER = Path(os.environ.get("HARDWARE_CAPTURES", ""))
pytestmark = pytest.mark.skipif(
    "HARDWARE_CAPTURES" not in os.environ, reason="HARDWARE_CAPTURES does not name a folder of captures"
)


def found(pattern: str) -> Path:
    """The capture of that name; a folder without it is not the one that was meant."""
    paths = sorted(FOLDER.glob(pattern))
    assert paths, f"{FOLDER} holds no {pattern}"
    return paths[0]


def test_nine_healthy_ndr_adapters_and_the_bond() -> None:
    results = verdicts([found("infiniband-h100")])
    assert {name: one.verdict for name, one in results.items()} == dict.fromkeys(
        ("rdma.devices", "rdma.port", "rdma.rate", "rdma.counters"), Verdict.PASS
    )
    assert "9 ports active" in results["rdma.port"].read
    assert "mlx5_bond_0" in results["rdma.devices"].read
    assert "400 Gb/sec (4X NDR)" in results["rdma.rate"].read


@pytest.mark.parametrize(
    ("file", "text", "check", "verdict"),
    [
        ("state", "1: DOWN\n", "rdma.port", Verdict.FAIL),
        ("phys_state", "2: Polling\n", "rdma.port", Verdict.FAIL),
        ("phys_state", "4: ACTIVE\n", "rdma.port", Verdict.PASS),
        ("rate", "200 Gb/sec (4X HDR)\n", "rdma.rate", Verdict.FAIL),
        ("counters/link_downed", "N/A (no PMA)\n", "rdma.counters", Verdict.UNKNOWN),
        ("counters/link_downed", None, "rdma.counters", Verdict.UNKNOWN),
        ("state", None, "rdma.port", Verdict.UNKNOWN),
    ],
)
def test_one_file_of_the_tree_changes_the_verdict(
    tmp_path: Path, file: str, text: str | None, check: str, verdict: Verdict
) -> None:
    tree = tmp_path / "infiniband"
    shutil.copytree(found("infiniband-h100"), tree)
    changed = tree / "mlx5_4" / "ports" / "1" / file
    for folder in (changed.parent, tree / "mlx5_4" / "ports" / "1"):
        folder.chmod(0o755)
    changed.unlink()
    if text is not None:
        changed.write_text(text)
    assert verdicts([tree])[check].verdict is verdict


def test_the_six_bridges_with_acs_on_are_named() -> None:
    result = verdicts([found("lspci-vvv-*")])["pcie.acs"]
    assert result.verdict is Verdict.WARN
    assert result.read.split(": ", 1) == [
        "on at 6 bridges",
        "0000:00:0c.0 0000:00:0e.0 0000:82:00.0 0000:82:01.0 0000:82:02.0 0000:82:03.0",
    ]


def test_without_acs_the_same_machine_passes(tmp_path: Path) -> None:
    text = found("lspci-vvv-*").read_text()
    (tmp_path / "lspci.txt").write_text(text.replace("ACSCtl:\tSrcValid+", "ACSCtl:\tSrcValid-"))
    assert verdicts([tmp_path / "lspci.txt"])["pcie.acs"].verdict is Verdict.PASS


def test_every_link_to_its_gpus_and_adapters_is_at_its_best() -> None:
    """Others are not: those of disks, and of the switch above the NVSwitches."""
    text = found("lspci-vvv-*").read_text()
    assert "(downgraded)" in text
    result = verdicts([found("lspci-vvv-*")])["pcie.path"]
    assert (result.verdict, result.read) == (Verdict.PASS, "20 devices at their best")


@pytest.mark.parametrize(
    ("device", "line", "says"),
    [
        ("9b:00.0 3D controller", "Speed 32GT/s (ok), Width x8 (downgraded)", "0000:9b:00.0: width 8 of 16"),
        (
            "9c:00.0 Ethernet controller",
            "Speed 16GT/s (downgraded), Width x16 (ok)",
            "0000:9c:00.0: 16 of 32 GT/s",
        ),
        ("98:00.0 PCI bridge", "Speed 32GT/s, Width x8", "0000:98:00.0: width 8 of 16"),
    ],
)
def test_a_link_below_its_best_is_named(tmp_path: Path, device: str, line: str, says: str) -> None:
    before, head, after = found("lspci-vvv-*").read_text().partition(f"\n{device}")
    assert head
    healthy = "LnkSta:\tSpeed 32GT/s (ok), Width x16 (ok)"
    (tmp_path / "lspci.txt").write_text(before + head + after.replace(healthy, f"LnkSta:\t{line}", 1))
    result = verdicts([tmp_path / "lspci.txt"])["pcie.path"]
    assert (result.verdict, says in result.read) == (Verdict.FAIL, True), result


def test_xid_119_asks_for_a_reset_of_that_gpu() -> None:
    result = verdicts([found("kernel-log/*119*")])["gpu.xid"]
    assert result.verdict is Verdict.FAIL
    assert "Xid 119 on 0000:9b:00 (5 times)" in result.read
    assert "reset that GPU: leave the node out" in result.remedy


def test_the_nvlinks_of_eight_a100s() -> None:
    results = verdicts([found("nvidia-smi/nvlink*a100*")])
    assert results["gpu.count"].read == "8 × NVIDIA A100-SXM4-80GB"
    assert results["nvlink.links"].verdict is Verdict.PASS
    assert results["nvlink.links"].expected == "12 × 25 GB/s"


@pytest.mark.parametrize("kind", ["h100", "h200"])
def test_an_idle_gpu_of_driver_590_is_healthy(kind: str) -> None:
    results = verdicts([found(f"nvidia-smi/linux-{kind}*")])
    assert {one.verdict for one in results.values()} == {Verdict.PASS}
    assert {
        "gpu.recovery",
        "gpu.ecc",
        "gpu.remap",
        "nvlink.links",
        "nvlink.fabric",
        "pcie.gpu",
    } <= results.keys()


@pytest.mark.parametrize("kind", ["h100", "h200"])
def test_a_loaded_gpu_is_in_use_and_else_healthy(kind: str) -> None:
    results = verdicts([found(f"nvidia-smi/linux-{kind}*")], part="load")
    bad = {name for name, one in results.items() if one.verdict is not Verdict.PASS}
    assert bad == {"gpu.processes", "gpu.memory"}


@pytest.mark.parametrize(
    ("before", "after", "check", "verdict"),
    [
        ("GPU Recovery Action                                : None", "Reset", "gpu.recovery", Verdict.FAIL),
        ("GPU Recovery Action                                : None", "[N/A]", "gpu.recovery", Verdict.UNKNOWN),
        ("        Pending                                        : No\n", "Yes\n", "gpu.remap", Verdict.FAIL),
        ("        State                                          : Completed", "In Progress", "nvlink.fabric",
         Verdict.FAIL),
        ("            HW Thermal Slowdown                        : Not Active", "Active", "gpu.throttle", Verdict.FAIL),
        ("                Current                                : 16x", "8x", "pcie.gpu", Verdict.FAIL),
        ("            DRAM Uncorrectable                         : 0", "1", "gpu.ecc", Verdict.FAIL),
        ("            DRAM Uncorrectable                         : 0", "Requested functionality has been deprecated",
         "gpu.ecc", Verdict.UNKNOWN),
        ("Link 3: 26.562 GB/s", "<inactive>", "nvlink.links", Verdict.FAIL),
    ],
)  # fmt: skip
def test_one_value_of_the_session_changes_the_verdict(
    tmp_path: Path, before: str, after: str, check: str, verdict: Verdict
) -> None:
    text = found("nvidia-smi/linux-h100*").read_text()
    assert before in text
    head = before.rpartition(": ")[0]
    file = tmp_path / "session.txt"
    file.write_text(text.replace(before, f"{head}: {after}", 1))
    assert verdicts([file])[check].verdict is verdict


def test_captures_of_one_node_are_judged_together(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [found("infiniband-h100"), found("lspci-vvv-*"), found("kernel-log/*119*")]
    assert main(["judge", *map(str, paths)]) == 1
    out = capsys.readouterr().out
    assert "Xid 119" in out
    assert "6 bridges" in out


def test_a_part_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(found("nvidia-smi/linux-h100*")), "--part=night"]) == 64
    assert "no part 'night' in this capture: idle, load" in capsys.readouterr().err
