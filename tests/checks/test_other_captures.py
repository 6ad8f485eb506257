"""Captures of the known kinds that look different: each as its source prints it, through the production import."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checks import passive
from checks.__main__ import main
from checks.bundle import BundleError
from checks.collect_network import PORT_COUNTERS
from checks.verdict import CheckResult, Verdict
from tests.checks.replayed import judged, verdicts

FAIL, WARN, UNKNOWN, PASS = Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN, Verdict.PASS


# --- kernel logs ------------------------------------------------------------------------------------------


def of_log(folder: Path, *messages: str) -> CheckResult:
    # dmesg -T.
    lines = [f"[Fri Aug 30 11:43:{second:02} 2024] {text}\n" for second, text in enumerate(messages)]
    return judged(folder, "".join(lines))["gpu.xid"]


@pytest.mark.parametrize(
    ("message", "verdict", "says"),
    [
        # docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt: with and without MIG; nvErrorLog prints GPU-CI too.
        ("Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: No", WARN,
         "Xid 94 on 0000:01:00"),
        ("Xid (PCI:0000:3b:00 GPU-I:01 GPU-CI:02): 48, pid=9, name=a, DBE", FAIL, "Xid 48 on 0000:3b:00"),
        # docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html: RESET_GPU, WORKFLOW_NVLINK_ERR.
        ("Xid (PCI:0000:04:00): 46, pid=12, name=x, GPU stopped processing", FAIL, "Xid 46"),
        ("Xid (PCI:0000:04:00): 62, 0096(1c54) 00000000 00000000", FAIL, "Xid 62"),
        ("Xid (PCI:0000:04:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 5", FAIL,
         "Xid 74"),
        # The same page, decoding of 144 to 150: fatal is reset, non-fatal is left to 154.
        ("Xid (PCI:0018:01:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6 0x00000000)", FAIL, "Xid 149"),
        ("Xid (PCI:0018:01:00): 145, pid=87, name=ray::W, RLW_RXPIPE Nonfatal XC0 i0 Link 13 (0x0409a0c2)", WARN,
         "Xid 145"),
        ("Xid (PCI:0000:04:00): 150, MSE_WATCHDOG Fatal XC0 i0 Link 00 (0x00000000)", FAIL, "Xid 150"),
        # An older driver: no PCI:, no process.
        ("Xid (0000:03:00): 79, GPU has fallen off the bus", FAIL, "Xid 79 on 0000:03:00"),
        ("Xid (PCI:0000:04:00): 69", WARN, "Xid 69"),
        # kernel-open/nvidia/nv.c.
        ("GPU 0000:91:00.0: GPU has fallen off the bus.", FAIL, "GPU 0000:91:00.0 has fallen off the bus"),
        ("GPU 0000:9b:00.0: RmInitAdapter failed! (0x62:0x55:1860)", WARN, "could not start GPU 0000:9b:00.0"),
        # Torn, or of a form that is not known yet: nobody knows what it asked for.
        ("Xid (PCI:0000:9b", UNKNOWN, "Xid (PCI:0000:9b"),
        ("Xid (invalid): some error", UNKNOWN, "Xid (invalid)"),
    ],
)  # fmt: skip
def test_an_xid_of_any_form_is_never_passed_over(
    tmp_path: Path, message: str, verdict: Verdict, says: str
) -> None:
    result = of_log(tmp_path, f"NVRM: {message}")
    assert (result.verdict, says in result.read) == (verdict, True), result


def test_a_gpu_that_is_gone_before_the_driver_has_it_is_told_in_three_lines(tmp_path: Path) -> None:
    """github.com/NVIDIA/NVSentinel/issues/155: dmesg gives a message of several lines one time of day."""
    text = (
        "[ 1843.308145] NVRM: The NVIDIA GPU 0000:b3:00.0\n"
        "               NVRM: (PCI ID: 10de:26b5) installed in this system has\n"
        "               NVRM: fallen off the bus and is not responding to commands.\n"
        "[ 1843.439662] NVRM: The NVIDIA probe routine failed for 1 device(s).\n"
    )
    result = judged(tmp_path, text)["gpu.xid"]
    assert (result.verdict, result.read) == (FAIL, "GPU 0000:b3:00.0 has fallen off the bus")


def test_a_gpu_that_fell_off_the_bus_is_named_once(tmp_path: Path) -> None:
    """As the driver prints it (gpud's README of its xid component): the Xid, and the same in words."""
    result = of_log(
        tmp_path,
        "NVRM: Xid (PCI:0000:91:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
        "NVRM: GPU 0000:91:00.0: GPU has fallen off the bus.",
        "NVRM: GPU 0000:92:00.0: GPU has fallen off the bus.",
    )
    assert result.read == "Xid 79 on 0000:91:00; GPU 0000:92:00.0 has fallen off the bus"


RESET = (
    "NVRM: Xid (PCI:0009:01:00): 154, GPU recovery action changed from 0x0 (None) to 0x4 (Drain and Reset)"
)
LATER = RESET.replace(
    "0x0 (None) to 0x4 (Drain and Reset)", "0x4 (Drain and Reset) to 0x1 (GPU Reset Required)"
)
NOTHING = (
    "NVRM: Xid (PCI:0009:01:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"
)
BEFORE = "NVRM: Xid (PCI:0009:01:00): 119, pid=1, name=x, Timeout"
OTHER = "NVRM: Xid (PCI:0019:01:00): 119, pid=1, name=x, Timeout"


def test_the_last_recovery_action_of_a_gpu_counts(tmp_path: Path) -> None:
    """Xid 154 of the catalogue; the lines are those of a GB200 in gpud's tests."""
    assert of_log(tmp_path, RESET, LATER).read == "Xid 154 on 0009:01:00"
    assert of_log(tmp_path, RESET, LATER).verdict is FAIL
    assert of_log(tmp_path, BEFORE, RESET, LATER, NOTHING).verdict is WARN
    assert of_log(tmp_path, NOTHING, BEFORE).verdict is FAIL, "it came after"
    both = of_log(tmp_path, BEFORE, OTHER, RESET, NOTHING)
    assert (both.verdict, both.read) == (FAIL, "Xid 119 on 0019:01:00"), "of another GPU nothing was said"


@pytest.mark.parametrize(
    "line",
    [
        # util-linux, sys-utils/dmesg.c: -d, -e, --time-format=iso; systemd's journal among others; syslog, short-iso.
        "[    2.608284 <    0.000001>] {}",
        "[<    0.000001>] {}",
        "[Feb23 16:24] {}",
        "[  +0.000003] {}",
        "2025-02-23T16:24:18,283302+00:00 {}",
        "Feb 14 05:03:41 gpu-1 kernel: {}",
        "Feb 14 05:03:41 gpu-1 kernel[0]: {}",
        # dmesg -T in other languages (strftime %a %b), and a terminal's text with its prompt.
        "[ven. août 30 11:43:12 2024] {}",
        "[金  8月 30 11:43:12 2024] {}",
        "root@gpu-1:~# dmesg -T | grep -i xid\n[Fri Aug 30 11:43:12 2024] {}\nroot@gpu-1:~#",
        "2025-02-23T16:24:18+0000 gpu-1 kernel: {}",
        "\x1b[32m[   12.345678] \x1b[0m\x1b[33m{}",
    ],
)
def test_a_log_of_any_time_format_is_read(tmp_path: Path, line: str) -> None:
    others = "Feb 14 05:03:41 gpu-1 systemd[1]: Started systemd-journald.service - Journal Service.\r\n" * 3
    message = "NVRM: \x1b[0mXid (PCI:0000:9b:00): 79, pid=1, name=x, GPU has fallen off the bus."
    for before in (others, ""):
        result = judged(tmp_path, before + line.format(message) + "\r\n")["gpu.xid"]
        assert result.read == "Xid 79 on 0000:9b:00"


@pytest.mark.parametrize(
    "text",
    [
        # fabricmanager.log: not the kernel's, though it begins with a time in brackets.
        "[Feb 25 2025 13:59:45] [INFO] [tid 1803] Received an inband message\n" * 3,
        # A syslog in which the kernel never spoke.
        "Feb 14 05:03:41 gpu-1 systemd[1]: Started systemd-journald.service - Journal Service.\n" * 3,
    ],
)
def test_a_log_of_something_else_is_no_kernel_log_without_a_finding(tmp_path: Path, text: str) -> None:
    (tmp_path / "capture").write_text(text)
    with pytest.raises(BundleError, match="not a capture that is known"):
        passive.opened([tmp_path / "capture"], "")


# --- lspci and nvidia-smi ---------------------------------------------------------------------------------


def test_a_gpu_that_lspci_shows_as_ones_has_fallen_off_the_bus(tmp_path: Path) -> None:
    """pciutils, lspci.c, show_machine and show_verbose: `(rev ff)` and `!!! Unknown header type 7f`."""
    text = (
        "00:01.0 PCI bridge: Intel Corporation Device 352a (rev 04) (prog-if 00 [Normal decode])\n"
        "\tCapabilities: [220 v1] Access Control Services\n"
        "\t\tACSCtl:\tSrcValid- TransBlk- ReqRedir- CmpltRedir- UpstreamFwd- EgressCtrl- DirectTrans-\n"
        "9b:00.0 3D controller: NVIDIA Corporation GH100 [H100 SXM5 80GB] (rev ff) (prog-if ff)\n"
        "\t!!! Unknown header type 7f\n"
    )
    results = judged(tmp_path, text)
    assert (results["gpu.bus"].verdict, results["pcie.acs"].verdict) == (FAIL, PASS)
    assert "0000:9b:00.0 is shown as rev ff" in results["gpu.bus"].read


def gpu(index: int, name: str, links: str) -> str:
    return f"GPU {index}: {name} (UUID: GPU-00000000-0000-0000-0000-00000000000{index})\n{links}"


UP = "".join(f"\t Link {number}: 25 GB/s\n" for number in range(12))
LOST = "NVML: Unable to retrieve NVLink information as all links are inActive\n"
"""What `nvidia-smi nvlink -s` says of a GPU that lost all of its links (leptonai/gpud#1085: a B200 in production)."""


@pytest.mark.parametrize("links", [LOST, LOST.replace("NVLink", "Nvlink"), ""])
def test_a_gpu_that_lost_all_its_links_is_not_left_out_of_the_count(tmp_path: Path, links: str) -> None:
    a100 = "NVIDIA A100-SXM4-80GB"
    results = judged(tmp_path, gpu(0, a100, UP) + gpu(1, a100, links) + gpu(2, a100, UP))
    assert results["gpu.count"].read == "3 × NVIDIA A100-SXM4-80GB"
    assert results["nvlink.links"].verdict is FAIL
    assert results["nvlink.links"].read == "GPU 1: 0 of 12 links up"


@pytest.mark.parametrize(
    ("name", "count", "links"),
    [
        ("NVIDIA A10", 4, ""),  # gpud's nvidia-smi.nvlink.status.a10: names and nothing else
        ("NVIDIA A100-PCIE-40GB", 2, LOST),  # no bridge between the cards
        ("NVIDIA GH200 480GB", 1, LOST),  # alone: no switch to be joined to
        ("NVIDIA H100 80GB HBM3", 8, ""),  # nvidia-smi -L, which says nothing of links
    ],
)
def test_links_that_nobody_has_or_tells_of_are_not_missed(
    tmp_path: Path, name: str, count: int, links: str
) -> None:
    results = judged(tmp_path, "".join(gpu(index, name, links) for index in range(count)))
    assert (results["gpu.count"].verdict, results["gpu.count"].read) == (PASS, f"{count} × {name}")
    assert "nvlink.links" not in results


@pytest.mark.parametrize(
    ("name", "count", "speed", "verdict", "says"),
    [
        # nvidia-smi nvlink -s of a B300 and an A800 (8 links are what export rules leave of an A100's 12).
        ("NVIDIA B200", 18, 53.125, PASS, "all up"),
        ("NVIDIA B300 SXM6 AC", 18, 53.125, PASS, "all up"),
        ("NVIDIA B200", 17, 53.125, FAIL, "17 of 18 links up"),
        ("NVIDIA B200", 18, 26.562, FAIL, "26.562 GB/s"),
        ("NVIDIA A800-SXM4-80GB", 8, 25, PASS, "all up"),
    ],
)
def test_links_of_other_kinds(
    tmp_path: Path, name: str, count: int, speed: float, verdict: Verdict, says: str
) -> None:
    rows = "".join(f"\t Link {number}: {speed} GB/s\n" for number in range(count))
    result = judged(tmp_path, gpu(0, name, rows) + gpu(1, name, rows))["nvlink.links"]
    assert (result.verdict, says in result.read) == (verdict, True), result


def test_a_card_that_shows_fewer_links_than_its_like_has_lost_some(tmp_path: Path) -> None:
    """Where the output is cut off, or of a kind whose number of links nobody told us."""
    name, row = "NVIDIA A800-SXM4-80GB", "\t Link {}: 25 GB/s\n"
    whole = "".join(row.format(number) for number in range(8))
    result = judged(tmp_path, gpu(0, name, whole) + gpu(1, name, whole[: -len(row)]))["nvlink.links"]
    assert (result.verdict, result.read) == (FAIL, "GPU 1: 7 of 8 links up")


def test_a_gpu_in_mig_mode_beside_others_has_no_links_to_miss(tmp_path: Path) -> None:
    """nvidia_gpu_exporter's capture of an H100 in MIG mode, driver 590."""
    name, rows = "NVIDIA H100 80GB HBM3", "".join(f"\t Link {number}: 26.562 GB/s\n" for number in range(18))
    mig = gpu(1, name, "Nvlink queries are not supported for Devices in MIG mode\n")
    result = judged(tmp_path, gpu(0, name, rows) + mig)["nvlink.links"]
    assert (result.verdict, result.read) == (PASS, "all up on 1 GPU")


def test_links_that_all_gpus_of_a_node_have_lost_are_missed(tmp_path: Path) -> None:
    results = judged(tmp_path, "".join(gpu(index, "NVIDIA H100 80GB HBM3", LOST) for index in range(8)))
    assert results["nvlink.links"].verdict is FAIL


# nvidia-smi -q of driver 590 (as in nvidia_gpu_exporter's captures), with the words of nvidia-smi(1) for the health.
QUERY = """
==============NVSMI LOG==============

Driver Version                            : 590.48.01

Attached GPUs                             : 1
GPU 00000000:9B:00.0
    Product Name                          : NVIDIA GB200
    Product Architecture                  : Blackwell
    GPU Recovery Action                   : None
    Clocks Event Reasons
        Idle                              : Active
        HW Slowdown                       : Not Active
    ECC Mode
        Current                           : Enabled
        Pending                           : Enabled
    ECC Errors
        Aggregate
            SRAM Threshold Exceeded       : No
        Channel Repair Pending            : No
        TPC Repair Pending                : No
        Unrepairable Memory               : No
    Fabric
        State                             : Completed
        Status                            : Success
        CliqueId                          : 32766
        ClusterUUID                       : b2daed23-0000-0000-0000-000000000000
        Health
            Summary                       : Healthy
            Bandwidth                     : Full
            Route Recovery in progress    : False
            Route Unhealthy               : False
            Access Timeout Recovery       : False
            Incorrect Configuration       : None
    Processes                             : None
"""


def test_a_healthy_gpu_of_a_rack_passes(tmp_path: Path) -> None:
    results = judged(tmp_path, QUERY)
    assert {one.verdict for one in results.values()} == {PASS}
    assert {"gpu.repair", "gpu.throttle", "gpu.recovery", "nvlink.fabric"} <= results.keys()


@pytest.mark.parametrize(
    ("name", "value", "check", "verdict", "says"),
    [
        ("SRAM Threshold Exceeded", "Yes", "gpu.repair", FAIL, "more SRAM errors"),
        ("Channel Repair Pending", "Yes", "gpu.repair", FAIL, "channel repair"),
        ("TPC Repair Pending", "Yes", "gpu.repair", FAIL, "TPC repair"),
        ("Unrepairable Memory", "Yes", "gpu.repair", FAIL, "cannot be repaired"),
        ("Unrepairable Memory", "Unknown Error", "gpu.repair", UNKNOWN, "Unknown Error"),
        ("GPU Recovery Action", "Bus Reset", "gpu.recovery", FAIL, "bus reset"),
        ("GPU Recovery Action", "Something New", "gpu.recovery", UNKNOWN, "Something New"),
        ("HW Slowdown", "[N/A]", "gpu.throttle", UNKNOWN, "[N/A]"),
        ("Status", "N/A", "nvlink.fabric", UNKNOWN, "status N/A"),
        ("Summary", "Unhealthy", "nvlink.fabric", FAIL, "health is unhealthy"),
        ("Summary", "Limited Capacity", "nvlink.fabric", FAIL, "limited capacity"),
        ("Bandwidth", "Degraded", "nvlink.fabric", FAIL, "degraded bandwidth"),
        ("Route Recovery in progress", "True", "nvlink.fabric", FAIL, "route recovery"),
        ("Route Unhealthy", "True", "nvlink.fabric", FAIL, "route unhealthy"),
        ("Access Timeout Recovery", "True", "nvlink.fabric", FAIL, "access timeout"),
        ("Incorrect Configuration", "Insufficient Nvlink Resources", "nvlink.fabric", FAIL, "configuration"),
        ("Incorrect Configuration", "Something New", "nvlink.fabric", UNKNOWN, "something new"),
        ("Attached GPUs", "999999999", "gpu.count", UNKNOWN, "more than there can be"),
        ("Product Name", "[GPU requires reset]", "gpu.bus", FAIL, "reset required"),
        ("Product Name", "ERR!", "gpu.count", UNKNOWN, "ERR!"),
        ("Attached GPUs", "8", "gpu.count", UNKNOWN, "up to number 7, and nothing is told of this one"),
    ],
)
def test_one_value_of_the_query_changes_the_verdict(
    tmp_path: Path, name: str, value: str, check: str, verdict: Verdict, says: str
) -> None:
    rows = [
        f"{row.partition(':')[0]}: {value}" if row.strip().startswith(name + " ") else row
        for row in QUERY.splitlines()
    ]
    result = judged(tmp_path, "\n".join(rows) + "\n")[check]
    assert (result.verdict, says in result.read) == (verdict, True), result


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # What nvidia-smi prints in place of an answer: leptonai/gpud, pkg/nvidia/errors; NVIDIA's own messages.
        ("Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error\n", "GPU0000:CB:00.0"),
        ("Unable to determine the device handle for gpu 0000:3B:00.0: GPU is lost.  Reboot the system to recover "
         "this GPU\n", "GPU is lost"),
        ("Failed to initialize NVML: Driver/library version mismatch\n", "version mismatch"),
        (gpu(0, "NVIDIA A100-SXM4-80GB", UP) + "Unable to determine the device handle for GPU0000:CB:00.0: Unknown "
         "Error\n", "GPU0000:CB:00.0"),
        (gpu(0, "NVIDIA A100-SXM4-80GB", UP) + gpu(2, "NVIDIA A100-SXM4-80GB", UP), "nothing is told of this one"),
    ],
)  # fmt: skip
def test_a_gpu_that_does_not_answer_nvidia_smi_is_not_passed_over(
    tmp_path: Path, text: str, says: str
) -> None:
    result = judged(tmp_path, text)["gpu.count"]
    assert (result.verdict, says in result.read) == (UNKNOWN, True), result


def test_a_query_that_breaks_off_is_no_pass_wherever_it_does(tmp_path: Path) -> None:
    """Of the last GPU's values some are not there: not because this driver does not tell them."""
    rows = QUERY.replace("Attached GPUs                             : 1", "Attached GPUs : 2").splitlines(
        True
    )
    first = next(number for number, row in enumerate(rows) if row.startswith("GPU "))
    for whole in (rows, [*rows, *rows[first:]]):
        text = whole if len(whole) > len(rows) else [row.replace("GPUs : 2", "GPUs : 1") for row in whole]
        assert {one.verdict for one in judged(tmp_path, "".join(text)).values()} == {PASS}
        for end in range(first + 1 if whole is rows else len(rows) + 1, len(whole)):
            results = judged(tmp_path, "".join(text[:end]))
            assert UNKNOWN in {one.verdict for one in results.values()}, text[end - 1]


def test_of_a_part_of_the_query_the_last_gpu_has_what_the_first_has(tmp_path: Path) -> None:
    """`nvidia-smi -q -d ECC,PERFORMANCE`: no name and no processes by which its end could be seen."""
    head, _, body = QUERY.partition("GPU 00000000:9B:00.0\n")
    part = body[body.index("    Clocks Event Reasons") : body.index("    Fabric")]
    text = head.replace(": 1\n", ": 2\n") + f"GPU 00000000:1B:00.0\n{part}GPU 00000000:9B:00.0\n"
    assert {one.verdict for one in judged(tmp_path, text + part).values()} == {PASS}
    cut = judged(tmp_path, text + part[: part.index("    ECC Errors")])
    assert (cut["gpu.repair"].verdict, cut["gpu.throttle"].verdict) == (UNKNOWN, PASS)


def test_a_query_without_a_gpu_is_no_capture(tmp_path: Path) -> None:
    (tmp_path / "capture").write_text(QUERY.partition("Attached")[0])
    with pytest.raises(BundleError, match="without a GPU in it"):
        passive.opened([tmp_path / "capture"], "")


def test_a_capture_in_which_nothing_can_be_judged_is_no_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "capture").write_text(QUERY.replace(" : ", " = "))
    assert main(["judge", str(tmp_path / "capture")]) == 64
    assert "a check could judge" in capsys.readouterr().err


def test_a_slot_that_is_too_slow_is_seen_in_a_log_alone(tmp_path: Path) -> None:
    """drivers/pci/pci.c, __pcie_print_link_status; of a disk's slot nobody asked."""
    limited = "63.008 Gb/s available PCIe bandwidth, limited by 8.0 GT/s PCIe x8 link at 0000:40:01.0"
    log = f"[ 2.6] nvme 0000:01:00.0: {limited}\n[ 2.6] mlx5_core 0000:41:00.1: {limited}\n"
    result = judged(tmp_path, log)["pcie.bandwidth"]
    assert result.verdict is WARN
    assert "0000:41:00.1: limited by 8.0 GT/s" in result.read
    assert "0000:01:00.0" not in result.read


# --- sysfs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gone", "check"), [("counters", "rdma.counters"), ("../1", "rdma.port")])
def test_an_infiniband_port_without_counters_and_a_device_without_ports_are_unknown(
    tmp_path: Path, gone: str, check: str
) -> None:
    """drivers/infiniband/core/sysfs.c: counters/ and hw_counters/ of each port, under ports/NUMBER."""
    for device in ("mlx5_0", "mlx5_1"):
        port = tmp_path / device / "ports" / "1"
        for folder in ("counters", "hw_counters"):
            (port / folder).mkdir(parents=True)
        for name in PORT_COUNTERS:
            (port / "counters" / name).write_text("0\n")
        for name, text in (("state", "4: ACTIVE"), ("phys_state", "5: LinkUp"), ("rate", "400 Gb/sec (4X NDR)"),
                           ("link_layer", "InfiniBand"), ("hw_counters/rnr_nak_retry_err", "0")):  # fmt: skip
            (port / name).write_text(text + "\n")
    shutil.rmtree(tmp_path / "mlx5_1" / "ports" / "1" / gone)
    results = verdicts([tmp_path])
    assert (results[check].verdict, "mlx5_1" in results[check].read) == (UNKNOWN, True), results[check]
    assert "mlx5_0" not in results[check].read
