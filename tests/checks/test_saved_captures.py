"""Captures however they were saved: packed, in another encoding, as JSON, and logs and drivers of other versions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from checks.__main__ import main
from checks.bundle import BundleError
from checks.verdict import CheckResult, Verdict
from tests.checks.replayed import judged

FAIL, WARN, UNKNOWN, PASS = Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN, Verdict.PASS
LOST = "NVRM: Xid (PCI:0000:9b:00): 79, pid=1, name=x, GPU has fallen off the bus."
ADAPTER = "mlx5_core 0000:1a:00.0: firmware version: 28.39.1002"
LOG = f"[    1.000000] {ADAPTER}\n[    3.000000] {LOST}\n"


def of_log(folder: Path, *messages: str) -> CheckResult:
    return judged(folder, "".join(f"[    9.000000] {message}\n" for message in messages))["gpu.xid"]


# --- how it was saved -------------------------------------------------------------------------------------

# systemd, src/shared/logs-show.c, output_json: what is not UTF-8 is an array of bytes.
JOURNAL = [
    {"MESSAGE": "Started.", "_TRANSPORT": "stdout", "SYSLOG_IDENTIFIER": "systemd"},
    {"MESSAGE": LOST, "_TRANSPORT": "kernel", "SYSLOG_IDENTIFIER": "kernel", "PRIORITY": "4"},
    {"MESSAGE": list(b"caf\xe9"), "_TRANSPORT": "kernel"},
]
# util-linux 2.38 and later, sys-utils/dmesg.c, print_record with --json.
DMESG = {"dmesg": [{"pri": 6, "time": 1.0, "msg": ADAPTER}, {"pri": 4, "time": 3.5, "msg": LOST}]}


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(LOG.encode()),  # /var/log/dmesg.1.gz
        LOG.encode("utf-16"),  # Windows PowerShell's `>`
        LOG.replace("\n", "\r\n"),
        LOG.encode().replace(b"firmware", b"caf\xe9"),
        "".join(json.dumps(entry) + "\n" for entry in JOURNAL),  # journalctl -o json
        "".join(json.dumps(entry, indent="\t") + "\n" for entry in JOURNAL),  # -o json-pretty
        json.dumps(DMESG, indent=3),
        gzip.compress(json.dumps(DMESG).encode()),
        f"Linux version 6.8.0\nCommand line: ro\n{ADAPTER}\n{LOST}\nnvme0n1: p1\n",  # dmesg -t
        f"__CURSOR=s=1\nMESSAGE={LOST}\nSYSLOG_IDENTIFIER=kernel\n",  # journalctl -o export
        f"12:[    3.000000] {LOST}\n",  # grep -n
        f"Aug 30 11:43:12.123456 gpu-1 kernel: {LOST}\n",  # journalctl -o short-precise
        f"Fri 2024-08-30 11:43:12 UTC gpu-1 kernel: {LOST}\n",  # -o with-unit
        f"[   12.345678] gpu-1 kernel: {LOST}\n",  # -o short-monotonic
        f"[   12.345678][ T1234] {ADAPTER}\n[   12.345678][  C12] {LOST}\n",  # CONFIG_PRINTK_CALLER
    ],
)
def test_a_log_is_read_however_it_was_saved(tmp_path: Path, data: bytes | str) -> None:
    result = judged(tmp_path, data)["gpu.xid"]
    assert (result.verdict, result.read) == (FAIL, "Xid 79 on 0000:9b:00")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gzip.compress(LOG.encode() * 50)[:-30], "cut short"),
        (b"\x1f\x8b" + b"\0" * 40, "damaged"),
        (json.dumps(DMESG)[:-20], "a log as JSON that breaks off"),
        (json.dumps(JOURNAL[0]) + "\n", "not a capture that is known"),  # the kernel never spoke
        (json.dumps({"MESSAGES": LOST}), "not a bundle"),
    ],
)
def test_what_is_cut_off_or_something_else_is_one_line(tmp_path: Path, data: bytes | str, says: str) -> None:
    with pytest.raises(BundleError) as error:
        judged(tmp_path, data)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_report_of_many_tools_keeps_the_kernels_log(tmp_path: Path) -> None:
    """nvidia-bug-report.sh: `nvidia-smi -q` and the log in one file; the first must not hide the other."""
    results = judged(tmp_path, f"{QUERY}\n____\n\ndmesg:\n{LOG}")
    assert (results["gpu.xid"].verdict, results["gpu.count"].verdict) == (FAIL, PASS)


def test_a_bundle_and_a_capture_are_not_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").write_text(LOG)
    assert main(["judge", str(tmp_path / "log"), f"--save={tmp_path}/b.json"]) == 1
    capsys.readouterr()
    assert main(["judge", str(tmp_path / "b.json"), str(tmp_path / "log")]) == 64
    assert "b.json: a bundle beside captures" in capsys.readouterr().err


# --- what the driver's other versions say -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "verdict", "says"),
    [
        # open-gpu-kernel-modules, nvErrorLog_va, and the texts of NVIDIA's catalogue of Xids.
        ("48, pid=1234, name=python, DBE (double bit error) detected", FAIL, "reset that GPU"),
        ("48, An uncorrectable double bit error (DBE) has been detected on GPU in the framebuffer at partition 4, "
         "subpartition 0.", FAIL, "reset that GPU"),
        ("63, Dynamic Page Retirement: New page retired, reboot to activate (0x00000000000c1d9e).", WARN, "gpu.remap"),
        ("63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate.", WARN, "gpu.remap"),
        ("64, Dynamic Page Retirement: Fatal error, unable to retire page (0x00000000000c1d9e).", FAIL, "reset"),
        ("74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 0(0x0, 0x0)", FAIL, "reset"),
        ("79, GPU has fallen off the bus.", FAIL, "reboot the node"),
        ("94, pid=7194, Contained: SM (0x1). RST: No, D-RST: No", WARN, "gpu.remap"),
        ("95, pid=7061, Uncontained: LTC TAG (0x2,0x0). RST: Yes, D-RST: No", FAIL, "reset that GPU"),
        ("119, pid=8403, name=nvidia-smi, Timeout after 6s of waiting for RPC response from GPU0 GSP! Expected "
         "function 76 (GSP_RM_CONTROL) (0x20801702 0x4).", FAIL, "reset that GPU"),
        ("120, pid=1, name=x, GSP task exception: instruction page fault", FAIL, "reset that GPU"),
        ("137, pid=1, name=x, NVLink: Remote translation error", WARN, "application"),
        ("140, pid='<unknown>', name=<unknown>, An unrecoverable ECC error escaped", FAIL, "reset that GPU"),
        ("143, pid='<unknown>', name=<unknown>, Failed to initialize GPU", FAIL, "reset that GPU"),
        ("149, pid='<unknown>', name=<unknown>, NETIR_LINK_EVT  Fatal   XC0 i0 Link 08 (0x004505c6 0x00000000)", FAIL,
         "reset that GPU"),
        ("149, NETIR_LINK_DOWN Nonfatal XC1 i0 Link 03 (0x004505c6)", WARN, "application"),
        ("145, RLW_SRC_TRACK Non fatal XC0 i0 Link 13 (0x0409a0c2)", WARN, "application"),
        # Without its severity nobody knows what it asks for.
        ("149, (0x004505c6 0x00000000 0x00000000)", UNKNOWN, "by hand"),
        # 154 of a driver that has one more action: whatever it is, the driver asks for something.
        ("154, GPU recovery action changed from 0x0 (None) to 0x5 (Recover IMEX Domain)", FAIL, "leave the node out"),
        # The catalogue: additional to 48; a fatal time-out; a halted micro-controller.
        ("171, pid=1, name=x, Uncorrectable DRAM error", FAIL, "reset that GPU"),
        ("172, pid=1, name=x, Uncorrectable SRAM error", FAIL, "reset that GPU"),
        ("167, PCIE_FATAL_TIMEOUT", FAIL, "reset that GPU"),
        ("169, SEC2 halted", FAIL, "reset that GPU"),
    ],
)  # fmt: skip
def test_an_xid_in_the_words_of_any_driver(tmp_path: Path, message: str, verdict: Verdict, says: str) -> None:
    result = of_log(tmp_path, f"NVRM: Xid (PCI:0000:9b:00): {message}")
    assert (result.verdict, says in result.remedy) == (verdict, True), result
    assert f"Xid {message.partition(',')[0]} on 0000:9b:00" in result.read


@pytest.mark.parametrize(
    "message",
    [
        # kernel-open/nvidia/nv.c; drivers/base/dd.c of Linux before and since 6.6.
        "NVRM: GPU 0000:9b:00.0: RmInitAdapter failed! (0x25:0x40:1457)",
        "NVRM: GPU 0000:9b:00.0: rm_init_adapter failed, device minor number 3",
        "nvidia: probe of 0000:9b:00.0 failed with error -1",
        "nvidia 0000:9b:00.0: probe with driver nvidia failed with error -1",
    ],
)
def test_a_gpu_that_the_driver_could_not_start_is_named(tmp_path: Path, message: str) -> None:
    result = of_log(tmp_path, ADAPTER, message)
    assert (result.verdict, result.read) == (WARN, "the driver could not start GPU 0000:9b:00.0")


# nvidia-smi -q of driver 535 (as in gpud's captures of eight H100s): two questions before there was a recovery action.
QUERY = """
==============NVSMI LOG==============

Driver Version                            : 535.161.08

Attached GPUs                             : 1
GPU 00000000:9B:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    Product Architecture                  : Hopper
    GPU Reset Status
        Reset Required                    : No
        Drain and Reset Recommended       : No
    ECC Mode
        Current                           : Enabled
        Pending                           : Enabled
    Processes                             : None
"""


@pytest.mark.parametrize(
    ("name", "value", "verdict", "says"),
    [
        ("", "", PASS, "none"),
        ("Reset Required", "Yes", FAIL, "wants: GPU reset"),
        ("Drain and Reset Recommended", "Yes", FAIL, "wants: drain and reset"),
    ],
)
def test_an_older_driver_says_in_other_words_that_it_wants_a_reset(
    tmp_path: Path, name: str, value: str, verdict: Verdict, says: str
) -> None:
    rows = [
        f"{row.partition(':')[0]}: {value}" if name and row.strip().startswith(name) else row
        for row in QUERY.splitlines()
    ]
    result = judged(tmp_path, "\n".join(rows) + "\n")["gpu.recovery"]
    assert (result.verdict, says in result.read) == (verdict, True), result


def test_what_a_driver_that_was_asked_both_ways_says_counts_where_it_is_worse(tmp_path: Path) -> None:
    """590 prints both: `GPU Reset Status` and `GPU Recovery Action`."""
    action = "    GPU Recovery Action                   : {}\n"
    both = QUERY.replace("535.161.08", "590.48.01").replace("    GPU Reset", f"{action}    GPU Reset")
    wants = both.replace("Required                    : No", "Required                    : Yes")
    assert judged(tmp_path, both.format("None"))["gpu.recovery"].verdict is PASS
    assert judged(tmp_path, both.format("Reset"))["gpu.recovery"].verdict is FAIL
    assert judged(tmp_path, both.format("[N/A]"))["gpu.recovery"].verdict is UNKNOWN
    assert judged(tmp_path, wants.format("None"))["gpu.recovery"].verdict is FAIL


# nvidia-smi -q of a V100, driver 470: errors of one and of two bits, pages that are retired, no rows to remap.
VOLTA = """
==============NVSMI LOG==============

Driver Version                            : 470.182.03

Attached GPUs                             : 1
GPU 00000000:07:00.0
    Product Name                          : Tesla V100-SXM2-32GB
    Product Architecture                  : Volta
    Ecc Mode
        Current                           : Enabled
        Pending                           : Enabled
    ECC Errors
        Volatile
            Single Bit
                Device Memory             : 7
                Total                     : 7
            Double Bit
                Device Memory             : 0
                Texture Memory            : N/A
                Total                     : 0
    Retired Pages
        Double Bit ECC                    : 0
        Pending Page Blacklist            : No
    Remapped Rows                         : N/A
    Processes                             : None
"""


def test_a_gpu_before_ampere_has_memory_errors_too(tmp_path: Path) -> None:
    healthy = judged(tmp_path, VOLTA)
    assert (healthy["gpu.remap"].verdict, "older than row remapping" in healthy["gpu.remap"].read) == (
        WARN,
        True,
    )
    broken = judged(tmp_path, VOLTA.replace("Total                     : 0", "Total                     : 4"))
    assert (broken["gpu.ecc"].verdict, "4 uncorrected errors since" in broken["gpu.ecc"].read) == (FAIL, True)
