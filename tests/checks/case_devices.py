"""Cases of the checks of GPUs, NVLink and PCIe."""

from __future__ import annotations

from tests.checks.case import FAIL, PASS, UNKNOWN, WARN, Case, Fault, log, nvml, one, xid
from tests.checks.nodes import GPUS, LSPCI, problem, value

PCI = "/sys/bus/pci/devices"
FABRIC_INFO = nvml("nvmlDeviceGetGpuFabricInfoV", 1)
FABRIC = {"state": 3, "status": 0, "cliqueId": 0, "clusterUuid": [0] * 16, "healthMask": 0}
SXID = "[ 9.0] nvidia-nvswitch3: SXid (PCI:0000:85:00.0):"
ADAPTER = "[ 9.1] mlx5_core 0000:1a:00.0:"
LOST = {"problem": "error", "detail": "GPU is lost", "nvml": 15}

DEVICES: dict[str, Case] = {
    "gpu.count": Case(
        [
            one(nvml("nvmlDeviceGetCount"), 1, FAIL, "1 GPU"),
            one(nvml("nvmlDeviceGetName", 1), "NVIDIA A100-SXM4-80GB", FAIL, "GPU 1 is NVIDIA A100"),
            one(nvml("nvmlDeviceGetCount"), "many", UNKNOWN, "not a number"),
        ],
        expected={"sku": "h100"},
    ),
    "gpu.recovery": Case(
        [
            one("nvml_field 1 230 1", [value(2)], FAIL, "node reboot"),
            one("nvml_field 1 230 1", [value(1)], FAIL, "GPU reset"),
            one("nvml_field 1 230 1", [problem("unsupported")], UNKNOWN, "unsupported"),
            one("nvml_field 1 230 1", [], UNKNOWN, "error"),
        ]
    ),
    "gpu.ecc": Case(
        [
            one(nvml("nvmlDeviceGetTotalEccErrors", 1, 1, 0), 1, FAIL, "1 uncorrected error since"),
            one(nvml("nvmlDeviceGetMemoryErrorCounter", 0, 1, 1, 7), 4, FAIL, "SRAM"),
            one(nvml("nvmlDeviceGetMemoryErrorCounter", 0, 0, 1, 7), 10_001, WARN, "corrected SRAM"),
            one(nvml("nvmlDeviceGetMemoryErrorCounter", 0, 0, 1, 2), 20_000_001, WARN, "corrected DRAM"),
            one(nvml("nvmlDeviceGetEccMode", 0), [0, 0], WARN, "ECC is off"),
            one(nvml("nvmlDeviceGetEccMode", 0), problem("unsupported"), WARN, "no ECC"),
        ]
    ),
    "gpu.remap": Case(
        [
            # The index that was off by one in somebody's check: each of the four has to count.
            one(nvml("nvmlDeviceGetRemappedRows", 1), [0, 0, 1, 0], FAIL, "pending"),
            one(nvml("nvmlDeviceGetRemappedRows", 1), [0, 0, 0, 1], FAIL, "failed"),
            one(nvml("nvmlDeviceGetRemappedRows", 1), [0, 513, 0, 0], FAIL, "513 rows"),
            one(nvml("nvmlDeviceGetRemappedRows", 1), [0, 0], UNKNOWN, "remapped rows"),
        ]
    ),
    "gpu.repair": Case(
        [
            one(
                nvml("nvmlDeviceGetSramEccErrorStatus", 1), {"value": {"bThresholdExceeded": 1}}, FAIL, "SRAM"
            ),
            one(nvml("nvmlDeviceGetSramEccErrorStatus", 1), {"value": {}}, UNKNOWN, "bThresholdExceeded"),
            one(nvml("nvmlDeviceGetRepairStatus", 0), [1, 0], FAIL, "a channel repair"),
            one(nvml("nvmlDeviceGetRepairStatus", 0), [1, 1], FAIL, "channel and TPC"),
            one(nvml("nvmlDeviceGetRepairStatus", 0), [1], UNKNOWN, "repairs"),
            one(nvml("nvmlDeviceGetUnrepairableMemoryFlag_v1", 1), 1, FAIL, "cannot be repaired"),
        ]
    ),
    "gpu.xid": Case(
        [
            *(
                xid(number, FAIL, "reset")
                for number in (48, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158)
            ),
            *(xid(number, FAIL, "reboot") for number in (79, 151, 168)),
            xid(54, FAIL, "isolate"),
            *(xid(number, WARN, f"Xid {number}") for number in (13, 31, 43, 63, 92, 94, 999)),
            xid(
                154,
                FAIL,
                "reboot",
                "GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)",
            ),
            xid(
                154, FAIL, "reset", "GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)"
            ),
            xid(
                154,
                WARN,
                "Xid 154",
                "GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)",
            ),
            # What the driver itself no longer minds is of the past.
            log(
                "[  99.0] NVRM: Xid (PCI:0000:19:00): 119, pid=1, name=x, Timeout",
                WARN,
                "asks for nothing any more",
            ),
        ]
    ),
    "gpu.bus": Case(
        [
            one(f"start {PCI}/{GPUS[0]}/config", "ff" * 64, FAIL, "reads as ones"),
            one(nvml("nvmlDeviceGetTemperature", 1, 0), LOST, FAIL, "GPU is lost"),
            one(nvml("nvmlDeviceGetPciInfo", 1), {**LOST, "nvml": 14}, FAIL, "infoROM"),
            one(
                "run lspci -vvv",
                LSPCI + "3b:00.0 3D controller: NVIDIA Corporation GH100 (rev ff)\n",
                FAIL,
                "rev ff",
            ),
        ]
    ),
    "gpu.throttle": Case(
        [
            one(nvml("nvmlDeviceGetCurrentClocksEventReasons", 0), 0x8, FAIL, "hardware slowdown"),
            one(nvml("nvmlDeviceGetCurrentClocksEventReasons", 0), 0x41, FAIL, "thermal"),
            one(nvml("nvmlDeviceGetCurrentClocksEventReasons", 0), 0x80, FAIL, "power brake"),
            one(nvml("nvmlDeviceGetCurrentClocksEventReasons", 0), 0x20, WARN, "software thermal"),
        ]
    ),
    "gpu.temperature": Case(
        [
            one(nvml("nvmlDeviceGetMarginTemperature", 1), 0, FAIL, "at its limit"),
            one(nvml("nvmlDeviceGetMarginTemperature", 1), 5, WARN, "5 below"),
            one("nvml_field 0 82 1", [value(95)], WARN, "memory at 95"),
            Fault(
                {
                    nvml("nvmlDeviceGetMarginTemperature", 1): problem("unsupported"),
                    nvml("nvmlDeviceGetTemperatureThreshold", 1, 1): value(41),
                },
                FAIL,
                "at its limit",
            ),
        ]
    ),
    "gpu.processes": Case(
        [one(nvml("nvmlDeviceGetComputeRunningProcesses", 1), [{"pid": 77}], FAIL, "process 77")]
    ),
    "gpu.memory": Case(
        [
            one(
                nvml("nvmlDeviceGetMemoryInfo", 1),
                {"value": {"total": 1 << 36, "used": 16 << 20}},
                FAIL,
                "16 MiB",
            )
        ]
    ),
    "nvlink.links": Case(
        [
            one(nvml("nvmlDeviceGetNvLinkState", 1, 7), 0, FAIL, "17 of 18 links up, down: 7"),
            one("nvml_field 0 164 18", [value(26562)] * 17 + [value(13281)], FAIL, "link 17: 13.281"),
            one("nvml_field 0 91 1", [problem("unsupported")], UNKNOWN, "GPU 0"),
        ]
    ),
    "nvlink.errors": Case(
        [one("nvml_field 1 163 18 @1", [value(3)] * 17 + [value(4)], FAIL, "GPU 1 link 17: 1 new error")]
    ),
    "nvlink.fabric": Case(
        [
            one(FABRIC_INFO, value({**FABRIC, "state": 2}), FAIL, "in progress"),
            one(FABRIC_INFO, value({**FABRIC, "status": 999}), FAIL, "status 999"),
            one(FABRIC_INFO, value({**FABRIC, "healthMask": 1 << 4}), FAIL, "route unhealthy"),
            one(FABRIC_INFO, value({"state": 3}), UNKNOWN, "fabric"),
        ]
    ),
    # open-gpu-kernel-modules, src/common/nvswitch/kernel/error_nvswitch.c; numbers of the fabric manager user guide.
    "nvlink.sxid": Case(
        [
            log(f"{SXID} 20034, Fatal, Link 30 LTSSM Fault Up", FAIL, "SXid 20034 on 0000:85:00.0 link 30"),
            log(
                f"{SXID} 23001, Fatal, Link 12 ingress SRC-VC buffer overflow",
                FAIL,
                "fatal to the whole fabric",
            ),
            log(f"{SXID} 12028, Non-fatal, Link 32 egress non-posted PRIV error (First)", FAIL, "SXid 12028"),
            log(
                f"{SXID} 20009, Non-fatal, Link 04 RX Short Error Rate",
                WARN,
                "SXid 20009 on 0000:85:00.0 link 4",
            ),
            log(f"{SXID} 20034, Severity 1 Engine instance 30 Sub-engine instance 00", FAIL, "SXid 20034"),
            log(f"{SXID} 29999, Data {{0x50610002, 0x10100030}}", UNKNOWN, "neither fatal nor non-fatal"),
            log(f"{SXID} garbled", UNKNOWN, "garbled"),
        ]
    ),
    # drivers/pci/pcie/aer.c and dpc.c; more forms of each are in test_aer.py.
    "pcie.aer": Case(
        [
            log(
                f"{ADAPTER} AER: PCIe Bus Error: severity=Uncorrected (Fatal), type=Data Link Layer, (Receiver ID)",
                FAIL,
                "0000:1a:00.0: 1 uncorrectable error (fatal)",
            ),
            log(
                f"{ADAPTER} AER: PCIe Bus Error: severity=Uncorrectable (Non-Fatal), type=Transaction Layer, "
                "(Requester ID)",
                FAIL,
                "(non-fatal)",
            ),
            log(
                f"{ADAPTER} PCIe Bus Error: severity=Corrected, type=Physical Layer, (Receiver ID)",
                WARN,
                "0000:1a:00.0: 1 corrected error",
            ),
            log(
                "[ 9.1] pcieport 0000:17:00.0: DPC: containment event, status:0x1f01 source:0x0000",
                FAIL,
                "0000:17:00.0: 1 uncorrectable",
            ),
            log(
                "[ 9.1] nvme 0000:f0:00.0: AER: PCIe Bus Error: severity=Uncorrected (Fatal), type=Inaccessible, "
                "(Unregistered Agent ID)",
                WARN,
                "0000:f0:00.0: 1 uncorrectable error (fatal), which is on no way",
            ),
            log(f"{ADAPTER} AER: PCIe Bus Error: severity=Strange", UNKNOWN, "severity=Strange"),
            one(f"read {PCI}/0000:1a:00.0/aer_dev_fatal", "DLP 1\nTOTAL_ERR_FATAL 1\n", FAIL, "(fatal)"),
            one(
                f"read {PCI}/0000:1a:00.0/aer_dev_nonfatal",
                "DLP 1\nTOTAL_ERR_NONFATAL 2\n",
                FAIL,
                "0000:1a:00.0: 2 uncorrectable errors (non-fatal)",
            ),
            one(
                f"read {PCI}/0000:17:01.0/aer_dev_correctable @1",
                "RxErr 7\nTOTAL_ERR_COR 7\n",
                WARN,
                "0000:17:01.0: 7 corrected errors, 7 of them while it was watched",
            ),
            one(f"read {PCI}/0000:17:01.0/aer_dev_correctable @1", "RxErr 7\n", UNKNOWN, "no TOTAL_ERR"),
        ]
    ),
    "pcie.gpu": Case(
        [
            one(nvml("nvmlDeviceGetCurrPcieLinkWidth", 0), 8, FAIL, "width 8 of 16"),
            one(nvml("nvmlDeviceGetCurrPcieLinkGeneration", 0), 1, WARN, "generation 1 of 5"),
            Fault(
                {
                    nvml("nvmlDeviceGetCurrPcieLinkGeneration", 0): value(1),
                    nvml("nvmlDeviceGetCurrentClocksEventReasons", 0): value(0),
                },
                FAIL,
                "generation 1 of 5",
            ),
        ]
    ),
    "pcie.path": Case(
        [
            one(f"read {PCI}/0000:16:00.0/current_link_width", "8\n", FAIL, "0000:16:00.0: width 8 of 16"),
            one(f"read {PCI}/0000:1a:00.0/current_link_speed", "16.0 GT/s PCIe\n", FAIL, "16 of 32 GT/s"),
            one(f"read {PCI}/0000:19:00.0/current_link_speed", "2.5 GT/s PCIe\n", WARN, "2.5 of 32"),
            one(f"read {PCI}/0000:1a:00.0/current_link_speed", "Unknown\n", UNKNOWN, "Unknown"),
        ]
    ),
    "pcie.bandwidth": Case(
        [
            # drivers/pci/pci.c, __pcie_print_link_status
            log(
                "[ 9.1] mlx5_core 0000:1a:00.0: 126.024 Gb/s available PCIe bandwidth, limited by "
                "16.0 GT/s PCIe x8 link at 0000:17:01.0 (capable of 504.112 Gb/s with 32.0 GT/s PCIe x16 link)",
                WARN,
                "0000:1a:00.0: limited by 16.0 GT/s PCIe x8",
            )
        ]
    ),
    "pcie.acs": Case(
        [one("run lspci -vvv", LSPCI.replace("SrcValid-", "SrcValid+"), WARN, "1 bridge: 0000:17:00.0")]
    ),
    "pcie.iommu": Case(
        [one("read /sys/kernel/iommu_groups/7/type", "DMA-FQ\n", WARN, "DMA-FQ")],
        missing=PASS,  # a device without a group: the IOMMU is off, which is what is wanted
    ),
}
