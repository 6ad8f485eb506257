"""Formats of kernel log, lspci and nvidia-smi beyond the one capture of each: as their sources print them."""

from __future__ import annotations

from pathlib import Path

import pytest

from checks import nvidia_smi
from checks.captures import imported
from checks.collect import collect_node
from checks.collect_gpu import kernel_address
from checks.evidence import Recorded
from checks.expectations import Expectations
from checks.facts import Acs, Gpus
from checks.kernel_log import limited_links, xids
from checks.lspci import parse_lspci
from checks.reading import Problem, Unread
from tests.checks.nodes import LSPCI

# --- kernel log -------------------------------------------------------------------------------------------

MESSAGE = "NVRM: Xid (PCI:0000:9b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."


@pytest.mark.parametrize(
    "before",
    [
        "",
        "[12345.678901] ",
        "[Sun Feb 23 16:24:18 2025] ",
        "2025-02-23T16:24:18,000000+00:00 ",
        "Feb 23 16:24:18 gpu-07 kernel: ",
        "<4>[ 12.3] ",
        "kern  :warn  : [ 12.3] ",
        "kern  :warn  : 2025-01-21T04:41:44,283302+00:00 ",
        "6,3964,206764307,-;",
    ],
)
def test_what_stands_before_the_message_does_not_matter(before: str) -> None:
    (found,) = xids(before + MESSAGE + "\n")
    assert (found.address, found.number, found.action) == ("0000:9b:00", 79, "reboot")


def test_a_log_is_known_by_its_lines(tmp_path: Path) -> None:
    lines = ("[ 1.5] x", "[Sun Feb 23 16:24:18 2025] x", "kern  :warn  : 2025-01-21T04:41:44,2 x", "6,39,206,-;x",
             "Feb 23 16:24:18 gpu-07 kernel: x")  # fmt: skip
    for number, line in enumerate(lines):
        (tmp_path / str(number)).write_text(f"{line}\n{line}\n")
        assert list(imported([tmp_path / str(number)]).records) == ["run dmesg"], line


def test_older_drivers_print_no_domain_and_no_name() -> None:
    (found,) = xids("NVRM: Xid (PCI:0000:03:00): 48, pid=2134, DBE (double bit error) ECC Error\n")
    assert found.action == "reset"
    (found,) = xids("NVRM: Xid (PCI:0000:03:00): 31, Ch 00000003, engmask 00000101, intr 10000000\n")
    assert found.action == "watch"


def test_repeated_errors_are_counted_and_different_gpus_kept_apart() -> None:
    log = "".join(f"NVRM: Xid (PCI:0000:{bus}:00): 94, pid=1, x\n" for bus in ("9b", "9b", "3b"))
    assert [(one.address, one.count) for one in xids(log)] == [("0000:9b:00", 2), ("0000:3b:00", 1)]


def test_a_link_at_full_speed_is_not_limited() -> None:
    # drivers/pci/pci.c prints "%u.%03u Gb/s available PCIe bandwidth (%s x%d link)" for it.
    full = "mlx5_core 0000:1a:00.0: 504.112 Gb/s available PCIe bandwidth (32.0 GT/s PCIe x16 link)\n"
    assert limited_links(full) == []


# --- lspci ------------------------------------------------------------------------------------------------


def test_an_ordinary_user_sees_no_capabilities() -> None:
    seen = "17:00.0 PCI bridge: Broadcom / LSI PEX890xx (rev b0)\n\tCapabilities: <access denied>\n"
    found = parse_lspci(seen)
    assert isinstance(found, Acs)
    assert not found.readable


def test_domains_are_kept_and_bridges_of_any_kind_are_bridges() -> None:
    text = LSPCI.replace("17:00.0 PCI bridge", "0001:17:00.0 PCI bridge").replace("SrcValid-", "SrcValid+")
    found = parse_lspci(text)
    assert isinstance(found, Acs)
    assert found.enabled == ("0001:17:00.0",)


def test_a_device_that_is_no_bridge_does_not_count() -> None:
    found = parse_lspci("19:00.0 3D controller: NVIDIA\n\t\tACSCtl:\tSrcValid+ ReqRedir+\n")
    assert isinstance(found, Acs)
    assert found.enabled == ()


def test_output_without_capabilities_is_no_answer() -> None:
    found = parse_lspci("17:00.0 PCI bridge: Broadcom / LSI PEX890xx (rev b0)\n")
    assert isinstance(found, Unread)
    assert "was it lspci -vvv?" in found.detail


def test_names_alone_tell_nothing_of_links(tmp_path: Path) -> None:
    (tmp_path / "lspci").write_text(
        "0001:00:00.0 3D controller [0302]: NVIDIA Corporation GA100 [10de:20b2] (rev a1)\n"
    )
    assert list(imported([tmp_path / "lspci"]).records) == ["run lspci -vvv"]


def test_output_without_devices_is_an_error() -> None:
    found = parse_lspci("pcilib: Cannot open /proc/bus/pci\n")
    assert isinstance(found, Unread)
    assert found.problem is Problem.ERROR


@pytest.mark.parametrize(
    ("printed", "address"),
    [
        ("00000000:9B:00.0", "0000:9b:00.0"),
        ("0000:9b:00", "0000:9b:00.0"),
        ("9b:00.0", "0000:9b:00.0"),
        ("00010000:01:00.0", "10000:01:00.0"),
    ],
)
def test_addresses_are_written_as_the_kernel_writes_them(printed: str, address: str) -> None:
    assert kernel_address(printed) == address


# --- nvidia-smi -------------------------------------------------------------------------------------------

# `nvidia-smi -q` of driver 525 on an A100: one count of SRAM errors, and throttle reasons by their old name.
OLDER = """
==============NVSMI LOG==============

Timestamp                                 : Tue Jul 14 08:12:38 2026
Driver Version                            : 525.147.05
CUDA Version                              : 12.0

Attached GPUs                             : 2
GPU 00000000:07:00.0
    Product Name                          : NVIDIA A100-SXM4-80GB
    Product Architecture                  : Ampere
    GPU UUID                              : GPU-1
    PCI
        GPU Link Info
            PCIe Generation
                Max                       : 4
                Current                   : 4
            Link Width
                Max                       : 16x
                Current                   : 8x
    Clocks Throttle Reasons
        Idle                              : Not Active
        HW Slowdown                       : Active
            HW Thermal Slowdown           : Active
    FB Memory Usage
        Total                             : 81920 MiB
        Used                              : 2 MiB
    ECC Mode
        Current                           : Enabled
        Pending                           : Enabled
    ECC Errors
        Volatile
            SRAM Correctable              : 0
            SRAM Uncorrectable            : 2
            DRAM Correctable              : 0
            DRAM Uncorrectable            : 1
        Aggregate
            SRAM Correctable              : 0
            SRAM Uncorrectable            : 5
            DRAM Correctable              : 7
            DRAM Uncorrectable            : 1
    Remapped Rows
        Correctable Error                 : 0
        Uncorrectable Error               : 1
        Pending                           : Yes
        Remapping Failure Occurred        : No
    Temperature
        GPU Current Temp                  : 33 C
        GPU Slowdown Temp                 : 89 C
    Processes
        GPU instance ID                   : N/A
        Compute instance ID               : N/A
        Process ID                        : 4711
            Type                          : C
            Name                          : python
            Used GPU Memory               : 100 MiB
        Process ID                        : 4712
            Type                          : G
            Name                          : Xorg
GPU 00000000:0F:00.0
    Product Name                          : [GPU is lost]
    GPU UUID                              : [Unknown Error]
    Remapped Rows                         : N/A
    Fabric
        State                             : Completed
        Status                            : Insufficient Resources
    Processes                             : None
"""


def gpus(text: str) -> Gpus:
    return collect_node(Recorded(nvidia_smi.records(text)), "n1", Expectations()).gpus


def test_an_older_driver_is_read_too() -> None:
    found = gpus(OLDER)
    first = found.gpus[0]
    assert (found.driver, found.cuda, found.count) == ("525.147.05", "12.0", 2)
    assert (first.bus_id, first.name, first.architecture) == ("0000:07:00.0", "NVIDIA A100-SXM4-80GB", 7)
    assert (first.pcie_width, first.pcie_width_max) == (8, 16)
    assert first.clock_reasons == 0x48
    assert (first.ecc_volatile_uncorrected, first.sram_uncorrected, first.dram_corrected) == (3, 5, 7)
    assert not isinstance(first.remapped, Unread)
    assert (first.remapped.uncorrectable, first.remapped.pending, first.remapped.failed) == (1, True, False)
    assert (first.temperature, first.temperature_slowdown) == (33, 89)
    assert not isinstance(first.processes, Unread)
    assert [process.pid for process in first.processes] == [4711]


def test_what_an_older_driver_does_not_print_is_not_recorded() -> None:
    action = gpus(OLDER).gpus[0].recovery_action
    assert isinstance(action, Unread)
    assert action.problem is Problem.NOT_RECORDED


def test_a_lost_gpu_is_lost_in_the_import_too() -> None:
    second = gpus(OLDER).gpus[1]
    assert second.lost == (15,)
    assert isinstance(second.remapped, Unread)
    assert second.remapped.problem is Problem.UNSUPPORTED
    assert not isinstance(second.fabric, Unread)
    assert second.fabric.status != 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("No devices were found\n", 0),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", Problem.MISSING),
    ],
)
def test_nvidia_smi_without_a_gpu_says_so(text: str, count: object) -> None:
    found = gpus(text).count
    assert (found.problem if isinstance(found, Unread) else found) == count


def test_an_inactive_link_is_down() -> None:
    text = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n"
        + "".join(f"\t Link {link}: 26.562 GB/s\n" for link in range(17))
        + "\t Link 17: <inactive>\n"
    )
    (gpu,) = gpus(text).gpus
    assert isinstance(gpu.nvlinks, tuple)
    assert [link.active for link in gpu.nvlinks] == [True] * 17 + [False]


# --- folders ----------------------------------------------------------------------------------------------


def test_what_else_lies_in_a_copied_folder_is_no_device(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (tmp_path / "README").write_text("copied on Monday\n")
    (tmp_path / ".DS_Store").write_text("")
    assert imported([tmp_path]).records["list /sys/class/infiniband"] == {"value": ["mlx5_0"]}


def test_a_captured_root_is_read_by_the_collectors(tmp_path: Path) -> None:
    port = tmp_path / "sys" / "class" / "infiniband" / "hfi1_0" / "ports" / "1"
    (port / "counters").mkdir(parents=True)
    for name, text in (("state", "4: ACTIVE"), ("phys_state", "5: LinkUp"), ("rate", "100 Gb/sec (4X EDR)")):
        (port / name).write_text(text + "\n")
    (port / "link_layer").write_text("InfiniBand\n")
    for name in ("link_downed", "symbol_error", "link_error_recovery", "local_link_integrity_errors"):
        (port / "counters" / name).write_text("N/A (no PMA)\n")
    node = collect_node(Recorded(imported([tmp_path]).records), "n1", Expectations())
    assert not isinstance(node.rdma.devices, Unread)
    (device,) = node.rdma.devices
    assert device.ports[0].state == "4: ACTIVE"
    first = {one.name: one.first for one in device.ports[0].counters}["link_downed"]
    assert isinstance(first, Unread)
    assert first.problem is Problem.UNSUPPORTED
