"""Errors of PCIe links and of NVSwitches in the kernel log, in every form that a kernel or driver gave them."""

from __future__ import annotations

from pathlib import Path

import pytest

from checks.aer import AerError, aer_errors, strange_errors
from checks.sxid import action_of, strange_sxids, sxids
from checks.verdict import CheckResult, Verdict
from tests.checks.replayed import judged

FAIL, WARN, UNKNOWN, PASS = Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN, Verdict.PASS


def of_log(folder: Path, *lines: str) -> dict[str, CheckResult]:
    """A captured log alone: nobody says which devices matter, so all do."""
    return judged(folder, "".join(f"[  {number}.000001] {line}\n" for number, line in enumerate(lines)))


# --- Advanced Error Reporting -----------------------------------------------------------------------------

# drivers/pci/pcie/aer.c of Linux 4.15 (id=), 5.4 (address, prefix), 6.1, and 6.8 on ("Correctable", "message").
OLD = (
    "pcieport 0000:00:1c.0: AER: Corrected error received: id=00e0",
    "pcieport 0000:00:1c.0: PCIe Bus Error: severity=Corrected, type=Physical Layer, id=00e0(Receiver ID)",
    "pcieport 0000:00:1c.0:   device [8086:9d14] error status/mask=00000001/00002000",
    "pcieport 0000:00:1c.0:    [ 0] Receiver Error         (First)",
)
NEWER = (
    "pcieport 0000:00:01.1: AER: Uncorrected (Non-Fatal) error received: 0000:09:00.0",
    "igb 0000:09:00.0: AER: PCIe Bus Error: severity=Uncorrected (Non-Fatal), type=Transaction Layer, (Requester ID)",
    "igb 0000:09:00.0: AER:   device [8086:1537] error status/mask=00004000/00000000",
    "igb 0000:09:00.0: AER:    [14] CmpltTO",
)
NEWEST = (
    "pcieport 0000:00:1c.4: AER: Multiple Correctable error message received from 0000:07:00.0",
    "pcieport 0000:07:00.0: PCIe Bus Error: severity=Correctable, type=Data Link Layer, (Receiver ID)",
    "pcieport 0000:07:00.0:   device [8086:15ea] error status/mask=00000080/00002000",
    "pcieport 0000:07:00.0:    [ 7] BadDLLP",
)
# Linux 6.8 to 6.15, then from 6.16 on: the device that the message names has nothing to tell any more.
NO_DETAILS = (
    "pcieport 0000:00:1c.5: AER: Correctable error message received from 0000:02:00.0",
    "pcieport 0000:00:1c.5: AER: found no error details for 0000:02:00.0",
    "pcieport 0000:00:1c.5: AER: Correctable error message received from 0000:02:00.0 (no details found",
)
LOST_ADDRESS = ("pcieport 0000:16:02.0: AER: Corrected error received: id=0000",)
OLD_WITHOUT_DETAILS = ("pcieport 0001:00:1c.0: AER: Multiple Uncorrected (Fatal) error received: id=1a01",)
# A device that does not answer any more (aer_print_error).
INACCESSIBLE = (
    "mlx5_core 0000:1a:00.0: AER: PCIe Bus Error: severity=Uncorrected (Fatal), type=Inaccessible, "
    "(Unregistered Agent ID)",
)
# Documentation of a surprise removal, drivers/pci/pcie/dpc.c: two lines of one error.
CONTAINED = (
    "pcieport 0000:00:01.4: DPC: containment event, status:0x1f01 source:0x0000",
    "pcieport 0000:00:01.4: DPC: unmasked uncorrectable error detected",
    "pcieport 0000:00:01.4: PCIe Bus Error: severity=Uncorrected (Fatal), type=Transaction Layer, (Receiver ID)",
    "pcieport 0000:00:01.4:    [ 5] SDES (First)",
)


def firmware(severity: str, device: str, *more: str, section: str = "PCIe error") -> tuple[str, ...]:
    """drivers/firmware/efi/cper.c, cper_estatus_print to cper_print_pcie."""
    return (
        "{7}[Hardware Error]: Hardware error from APEI Generic Hardware Error Source: 0",
        f"{{7}}[Hardware Error]: event severity: {severity}",
        f"{{7}}[Hardware Error]:  Error 0, type: {severity}",
        f"{{7}}[Hardware Error]:   section_type: {section}",
        "{7}[Hardware Error]:   port_type: 0, PCIe end point",
        f"{{7}}[Hardware Error]:   device_id: {device}",
        "{7}[Hardware Error]:   vendor_id: 0x15b3, device_id: 0x1021",
        *more,
    )


# drivers/pci/pcie/aer.c, pci_print_aer: the line about its severity is printed where it was not corrected.
STATUS = "mlx5_core 0000:1a:00.0: AER: aer_status: 0x00100000, aer_mask: 0x00010000"
SEVERITY = "mlx5_core 0000:1a:00.0: AER: aer_uncor_severity: 0x{:08x}"


@pytest.mark.parametrize(
    ("lines", "errors"),
    [
        (OLD, [("0000:00:1c.0", "corrected", 1)]),
        (OLD * 3, [("0000:00:1c.0", "corrected", 3)]),
        (NEWER, [("0000:09:00.0", "non-fatal", 1)]),
        (NEWEST, [("0000:07:00.0", "corrected", 1)]),
        ((*OLD, *NEWER, *NEWEST[1:2]), [("0000:00:1c.0", "corrected", 1), ("0000:09:00.0", "non-fatal", 1),
                                        ("0000:07:00.0", "corrected", 1)]),
        (NO_DETAILS, [("0000:02:00.0", "corrected", 2)]),
        (OLD_WITHOUT_DETAILS, [("0001:1a:00.1", "fatal", 1)]),
        (LOST_ADDRESS, [("0000:16:02.0", "corrected", 1)]),
        (INACCESSIBLE, [("0000:1a:00.0", "fatal", 1)]),
        (CONTAINED, [("0000:00:01.4", "fatal", 1)]),
        (CONTAINED[:1], [("0000:00:01.4", "fatal", 1)]),
        (firmware("corrected", "0000:1a:00.0"), [("0000:1a:00.0", "corrected", 1)]),
        (firmware("recoverable", "0000:1a:00.0"), [("0000:1a:00.0", "non-fatal", 1)]),
        (firmware("fatal", "0000:1a:00.0"), [("0000:1a:00.0", "fatal", 1)]),
        (firmware("info", "0000:1a:00.0"), []),
        (firmware("fatal", "0000:1a:00.0", section="memory error"), []),
        (firmware("corrected", "0000:1a:00.0", STATUS), [("0000:1a:00.0", "corrected", 1)]),
        (firmware("recoverable", "0000:1a:00.0", STATUS, SEVERITY.format(0x000EF030)),
         [("0000:1a:00.0", "non-fatal", 1)]),
        ((STATUS, SEVERITY.format(0x001EF030)), [("0000:1a:00.0", "fatal", 1)]),
        ((STATUS, STATUS, STATUS), [("0000:1a:00.0", "corrected", 3)]),
        # What is said at boot, and of recovery, is no error.
        (("pcieport 0000:00:1c.0: AER: enabled with IRQ 122", "pcieport 0000:00:1c.0: DPC: enabled with IRQ 122",
          "acpi PNP0A08:00: _OSC: OS now controls [PCIeHotplug SHPCHotplug PME AER PCIeCapability LTR DPC]"), []),
    ],
)  # fmt: skip
def test_an_error_is_counted_once_in_any_kernels_words(
    lines: tuple[str, ...], errors: list[tuple[str, str, int]]
) -> None:
    log = "".join(f"[   12.345678] {line}\n" for line in lines)
    assert aer_errors(log) == [AerError(*one) for one in errors]  # type: ignore[arg-type]
    assert strange_errors(log) == []


@pytest.mark.parametrize(
    ("lines", "verdict", "says"),
    [
        (OLD * 12, WARN, "0000:00:1c.0: 12 corrected errors"),
        (NEWER, FAIL, "0000:09:00.0: 1 uncorrectable error (non-fatal)"),
        (CONTAINED, FAIL, "(fatal)"),
        (firmware("corrected", "0000:1a:00.0"), WARN, "0000:1a:00.0: 1 corrected"),
        # Torn at the end of the kernel's buffer, or of a form that is not known yet.
        (("igb 0000:09:00.0: AER: PCIe Bus Error: sever",), UNKNOWN, "PCIe Bus Error: sever"),
        (("igb 0000:09:00.0: CXL Bus Error: severity=Deferred, type=x",), UNKNOWN, "severity=Deferred"),
        (("pcieport 0000:00:1c.0: AER: enabled with IRQ 122",), PASS, "none"),
    ],
)
def test_a_captured_log_is_judged_by_the_severity(
    tmp_path: Path, lines: tuple[str, ...], verdict: Verdict, says: str
) -> None:
    result = of_log(tmp_path, *lines)["pcie.aer"]
    assert (result.verdict, says in result.read) == (verdict, True), result


# --- NVSwitch ---------------------------------------------------------------------------------------------

SXID = "nvidia-nvswitch2: SXid (PCI:0000:07:00.0):"


@pytest.mark.parametrize(
    ("lines", "verdict", "says"),
    [
        # open-gpu-kernel-modules, error_nvswitch.c: three lines of one error, numbers with five digits.
        ((f"{SXID} 20034, Fatal, Link 37 LTSSM Fault Up",
          f"{SXID} 20034, Severity 1 Engine instance 37 Sub-engine instance 00",
          f"{SXID} 20034, Data {{0x10000000, 0x10000000, 0x00000000}}"), FAIL, "SXid 20034 on 0000:07:00.0 link 37"),
        ((f"{SXID} 20034, Fatal, Link 37 LTSSM Fault Up", f"{SXID} 20034, Fatal, Link 38 LTSSM Fault Up"), FAIL,
         "link 37 38 (2 times)"),
        ((f"{SXID} 11012, Non-fatal, Link 02 ingress header ECC SBE",
          f"{SXID} 11012, Severity 0 Engine instance 02 Sub-engine instance 00"), WARN, "SXid 11012"),
        # The first line is gone: the severity is in the second, or NVIDIA's list knows the number.
        ((f"{SXID} 20034, Severity 1 Engine instance 37 Sub-engine instance 00",), FAIL, "SXid 20034"),
        ((f"{SXID} 31999, Severity 0 Engine instance 37 Sub-engine instance 00",), WARN, "SXid 31999"),
        ((f"{SXID} 20034, Data {{0x10000000, 0x10000000}}",), FAIL, "SXid 20034"),
        ((f"{SXID} 24001, Data {{0x10000000, 0x10000000}}",), WARN, "SXid 24001"),
        # A number that is not listed says itself what it is.
        ((f"{SXID} 31999, Fatal, Link 01 of tomorrow",), FAIL, "SXid 31999"),
        ((f"{SXID} 31999, Link 01 of tomorrow",), UNKNOWN, "neither fatal nor non-fatal"),
        # The guide calls it non-fatal, and says that GPU access will hang; and one that may be ignored.
        ((f"{SXID} 12028, Non-fatal, Link 32 egress non-posted PRIV error (First)",), FAIL, "SXid 12028"),
        ((f"{SXID} 22013, Non-fatal, Link 02 Minion Link DLREQ interrupt",), PASS, "none"),
        ((f"{SXID} 10003, Fatal, Host_unhandled_interrupt",), FAIL, "fatal to the whole fabric"),
        (("nvidia-nvswitch2: SXid (PCI:0000:0",), UNKNOWN, "SXid (PCI:0000:0"),
        (("nvidia-nvswitch0: Driver initialized",), PASS, "none"),
    ],
)  # fmt: skip
def test_an_error_of_a_switch_is_judged_by_what_it_does_to_the_gpus(
    tmp_path: Path, lines: tuple[str, ...], verdict: Verdict, says: str
) -> None:
    result = of_log(tmp_path, *lines)["nvlink.sxid"]
    assert (result.verdict, says in result.read) == (verdict, True), result
    assert says.endswith("times)") or "times" not in result.read, "three lines are one error"


def test_what_nvidia_calls_always_fatal_asks_for_a_reboot() -> None:
    assert {action_of(number, None) for number in (12020, 22003, 22011, 23001, 23017)} == {"reboot"}
    assert action_of(12020, fatal=False) == "reboot"
    assert [action_of(22012, fatal) for fatal in (True, False, None)] == ["reset", "watch", "reset"]


def test_errors_of_switches_and_numbers_are_kept_apart() -> None:
    other = SXID.replace("0000:07", "0000:08")
    log = (
        f"{SXID} 20034, Fatal, Link 1 x\n{other} 20034, Fatal, Link 1 x\n{SXID} 20009, Non-fatal, Link 1 x\n"
    )
    found = [(one.switch, one.number) for one in sxids(log)]
    assert found == [("0000:07:00.0", 20034), ("0000:08:00.0", 20034), ("0000:07:00.0", 20009)]
    assert strange_sxids(log) == []


# --- adapters ---------------------------------------------------------------------------------------------

MLX5 = "mlx5_core 0000:1a:00.0:"
UNPOWERED = f"{MLX5} mlx5_pcie_event:299:(pid 9): Detected insufficient power on the PCIe slot (27W)."
HOT = f"{MLX5} Port module event[error]: module 0, Cable error, High Temperature"
UNHEALTHY = f"{MLX5} device's health compromised - reached miss count"
OTHER = UNHEALTHY.replace("1a:00", "2a:00")


@pytest.mark.parametrize(
    ("lines", "verdict", "says"),
    [
        # drivers/net/ethernet/mellanox/mlx5/core: events.c, pcie_core and port_module; health.c, poll_health.
        ((UNPOWERED, UNPOWERED), WARN, "0000:1a:00.0: insufficient power on the PCIe slot (27W) (2 times)"),
        ((HOT,), WARN, "0000:1a:00.0: module 0, Cable error, High Temperature"),
        ((HOT, UNHEALTHY), FAIL, "0000:1a:00.0: device's health compromised"),
        ((f"{MLX5} poll_health:1157:(pid 0): Fatal error 3 detected",), FAIL, "Fatal error 3 detected"),
        ((UNHEALTHY, OTHER, f"{MLX5} health recovery succeeded"), FAIL, "0000:2a:00.0: device's health"),
        ((f"{MLX5} health recovery succeeded", UNHEALTHY), FAIL, "0000:1a:00.0"),
    ],
)
def test_what_an_adapter_reports_of_itself_is_judged(
    tmp_path: Path, lines: tuple[str, ...], verdict: Verdict, says: str
) -> None:
    result = of_log(tmp_path, *lines)["rdma.log"]
    assert (result.verdict, says in result.read) == (verdict, True), result


@pytest.mark.parametrize(
    "lines",
    [
        (UNPOWERED, f"{MLX5} mlx5_pcie_event:304:(pid 9): PCIe slot advertised sufficient power (75W)."),
        (HOT, f"{MLX5} Port module event: module 0, Cable plugged"),
        (UNHEALTHY, f"{MLX5} health recovery succeeded"),
        (f"{MLX5} firmware version: 28.39.1002", f"{MLX5} Port module event: module 0, Cable unplugged"),
    ],
)
def test_what_has_ended_since_and_what_is_no_complaint_is_none(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    assert "rdma.log" not in of_log(tmp_path, *lines)
