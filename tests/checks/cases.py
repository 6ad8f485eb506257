"""For each check: the healthy node, what makes it fail or warn, and what it says where it cannot look.

A fault changes one answer of a healthy node, so each is also the mutation of its check: one value, another verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checks.collect_host import ENVIRONMENT
from checks.evidence import Record, key_of
from checks.expectations import Expectations
from checks.verdict import Verdict
from tests.checks.nodes import GPUS, KERNEL_LOG, LSPCI, problem, value

FAIL, WARN, UNKNOWN, PASS = Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN, Verdict.PASS


@dataclass(frozen=True)
class Fault:
    answers: Mapping[str, Record]
    verdict: Verdict
    says: str
    """A part of what the check reports."""


@dataclass(frozen=True)
class Case:
    faults: Sequence[Fault]
    fabric: str = "infiniband"
    expected: Mapping[str, Any] = field(default_factory=dict)
    missing: Verdict = UNKNOWN
    denied: Verdict = Verdict.NOT_PERMITTED
    timed_out: Verdict = UNKNOWN

    def expectations(self) -> Expectations:
        return Expectations(**{"gpus": 2, "fabric": self.fabric, **self.expected})


def one(key: str, answer: Any, verdict: Verdict, says: str) -> Fault:
    """A fault of one changed answer; a Record is taken as it is."""
    record = (
        answer if isinstance(answer, dict) and ("problem" in answer or "value" in answer) else value(answer)
    )
    return Fault({key: record}, verdict, says)


def nvml(*words: Any) -> str:
    return key_of("nvml", words)


def log(line: str, verdict: Verdict, says: str) -> Fault:
    return one("run dmesg", KERNEL_LOG + line + "\n", verdict, says)


def xid(number: int, verdict: Verdict, says: str, text: str = "pid=1, name=python, …") -> Fault:
    # kernel-open/nvidia/nv.c; a GPU that NVML does not know, so that the driver's own verdict says nothing of it.
    return log(f"[  99.0] NVRM: Xid (PCI:0000:9b:00): {number}, {text}", verdict, says)


def limit(name: str, soft: str, verdict: Verdict) -> Fault:
    rows = f"Limit                     Soft Limit           Hard Limit\n{name:25} {soft:20} {soft:20}\n"
    return one("read /proc/self/limits", rows, verdict, soft)


def environment(verdict: Verdict, says: str, **variables: str) -> Fault:
    return one(key_of("environment", ENVIRONMENT), {"value": variables}, verdict, says)


PORT = "/sys/class/infiniband/mlx5_1/ports/1"
PCI = "/sys/bus/pci/devices"
FABRIC_INFO = nvml("nvmlDeviceGetGpuFabricInfoV", 1)
FABRIC = {"state": 3, "status": 0, "cliqueId": 0, "clusterUuid": [0] * 16, "healthMask": 0}
ROOM = {"size": 1 << 40, "free": 1 << 39, "inodes": 1 << 20, "inodes_free": 1 << 19}
LOST = {"problem": "error", "detail": "GPU is lost", "nvml": 15}

CASES: dict[str, Case] = {
    "gpu.count": Case(
        [
            one(nvml("nvmlDeviceGetCount"), 1, FAIL, "1 GPUs"),
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
            one(nvml("nvmlDeviceGetTotalEccErrors", 1, 1, 0), 1, FAIL, "1 uncorrected errors since"),
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
            # linux_nvswitch.c
            log("[ 9.0] nvidia-nvswitch3: SXid (PCI:0000:85:00.0): 20034, Fatal, Link 30", FAIL, "20034"),
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
        [one("nvml_field 1 163 18 @1", [value(3)] * 17 + [value(4)], FAIL, "GPU 1 link 17: 1 new errors")]
    ),
    "nvlink.fabric": Case(
        [
            one(FABRIC_INFO, value({**FABRIC, "state": 2}), FAIL, "in progress"),
            one(FABRIC_INFO, value({**FABRIC, "status": 999}), FAIL, "status 999"),
            one(FABRIC_INFO, value({**FABRIC, "healthMask": 1 << 4}), FAIL, "route unhealthy"),
            one(FABRIC_INFO, value({"state": 3}), UNKNOWN, "fabric"),
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
        [one("run lspci -vvv", LSPCI.replace("SrcValid-", "SrcValid+"), WARN, "1 bridges: 0000:17:00.0")]
    ),
    "pcie.iommu": Case(
        [one("read /sys/kernel/iommu_groups/7/type", "DMA-FQ\n", WARN, "DMA-FQ")],
        missing=PASS,  # a device without a group: the IOMMU is off, which is what is wanted
    ),
    "rdma.devices": Case(
        [one("list /sys/class/infiniband", ["mlx5_0"], FAIL, "1 of 1")], expected={"rails": 2}, missing=FAIL
    ),
    "rdma.port": Case(
        [
            one(f"read {PORT}/state", "1: DOWN\n", FAIL, "mlx5_1:1 is 1: DOWN"),
            one(f"read {PORT}/state", "2: INIT\n", FAIL, "2: INIT"),
            one(f"read {PORT}/phys_state", "2: Polling\n", FAIL, "2: Polling"),
            Fault(
                {
                    f"read {PORT}/state": value("1: DOWN\n"),
                    f"read {PORT}/phys_state": value("3: Disabled\n"),
                },
                WARN,
                "disabled",
            ),
            one(f"read {PORT}/state", "ACTIVE\n", UNKNOWN, "ACTIVE"),
        ]
    ),
    "rdma.rate": Case(
        [
            one(f"read {PORT}/rate", "200 Gb/sec (4X HDR)\n", FAIL, "200 Gb/s, others of its kind 400"),
            one(f"read {PORT}/rate", "fast\n", UNKNOWN, "fast"),
        ]
    ),
    "rdma.counters": Case(
        [
            one(f"read {PORT}/counters/link_downed @1", "256\n", FAIL, "link_downed grew by 1"),
            one(f"read {PORT}/counters/symbol_error @1", "266\n", WARN, "symbol_error grew by 11"),
            one(f"read {PORT}/counters/symbol_error @1", "377\n", FAIL, "symbol_error grew by 122"),
            one(
                f"read {PORT}/counters/link_error_recovery @1", "257\n", FAIL, "link_error_recovery grew by 2"
            ),
            one(
                f"read {PORT}/hw_counters/local_ack_timeout_err @1",
                "14\n",
                FAIL,
                "local_ack_timeout_err grew by 2",
            ),
            one(f"read {PORT}/counters/link_downed", "N/A (no PMA)\n", UNKNOWN, "N/A (no PMA)"),
        ]
    ),
    "rdma.flap": Case(
        [one("read /sys/class/net/eth0/carrier_changes @1", "3\n", FAIL, "eth0: 1 carrier changes")]
    ),
    "rdma.verbs": Case([one("list /dev/infiniband", ["uverbs0"], FAIL, "1 uverbs files for 2 devices")]),
    "roce.gid": Case(
        [
            one(f"read {PORT}/gid_attrs/types/3", "IB/RoCE v1\n", FAIL, "mlx5_1: no RoCE v2 GID"),
            one(
                f"read {PORT}/gids/3",
                "fe80:0000:0000:0000:0000:0000:0000:0001\n",
                FAIL,
                "mlx5_1: no RoCE v2 GID",
            ),
            Fault(
                {
                    f"read {PORT}/gid_attrs/types/2": value("RoCE v2\n"),
                    f"read {PORT}/gid_attrs/types/3": value("IB/RoCE v1\n"),
                },
                FAIL,
                "no index is RoCE v2 on all ports",
            ),
        ],
        fabric="roce",
    ),
    "roce.mtu": Case([one("read /sys/class/net/ens2/mtu", "1500\n", WARN, "ens2: MTU 1500")], fabric="roce"),
    "roce.pfc": Case(
        [
            one(
                "run dcb -j pfc show dev ens2", '{"prio-pfc":{"0":false,"3":false}}', WARN, "ens2: PFC is off"
            ),
            one("run dcb -j pfc show dev ens2", "{}", UNKNOWN, "dcb said"),
        ],
        fabric="roce",
        missing=WARN,  # a tool that few images hold must not keep every job from starting
    ),
    "efa.libfabric": Case(
        [one("run fi_info -p efa", "fi_getinfo: -61\n", FAIL, "no provider efa")], fabric="efa"
    ),
    "gdr.support": Case(
        [
            Fault(
                {
                    "read /proc/modules": value("mlx5_ib 1 0 - Live 0x0\n"),
                    "read /proc/driver/nvidia/version": value(
                        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550\n"
                    ),
                },
                FAIL,
                "neither",
            )
        ]
    ),
    "gdr.log": Case(
        [
            log(
                "[ 9.2] nvidia-peermem nv_get_p2p_free_callback:127 ERROR detected invalid context, skipping",
                FAIL,
                "invalid context, 1 times",
            )
        ]
    ),
    "gdr.affinity": Case([one(f"read {PCI}/{GPUS[1]}/numa_node", "3\n", WARN, "NUMA node 3 has none")]),
    "host.memlock": Case([limit("Max locked memory", "65536", FAIL)]),
    "host.nofile": Case(
        [
            limit("Max open files", "1023", FAIL),
            limit("Max open files", "1024", WARN),
            limit("Max open files", "many", UNKNOWN),
        ]
    ),
    "host.shm": Case(
        [
            one("statvfs /dev/shm", value({**ROOM, "free": 127 << 20}), FAIL, "127 MiB free"),
            one("statvfs /dev/shm", value({**ROOM, "free": 1023 << 20}), WARN, "1023 MiB free"),
            one("statvfs /dev/shm", value({}), UNKNOWN, "/dev/shm"),
        ]
    ),
    "host.governor": Case(
        [
            one(
                "read /sys/devices/system/cpu/cpufreq/policy1/scaling_governor",
                "powersave\n",
                WARN,
                "powersave",
            )
        ]
    ),
    "clock.source": Case(
        [one("read /sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet\n", WARN, "hpet")]
    ),
    "clock.sync": Case(
        [
            one("clock", value({"state": 5, "status": 0x2001}), WARN, "not synchronized"),
            one("clock", value({"state": 0, "status": 0x40}), WARN, "not synchronized"),
            one("clock", value({}), UNKNOWN, "clock"),
        ]
    ),
    "fs.space": Case(
        [
            one("statvfs /tmp", value({**ROOM, "free": 1 << 20}), FAIL, "/tmp: 1 MiB free"),
            one("statvfs /tmp", value({**ROOM, "free": 1 << 30}), WARN, "/tmp: 1024 MiB free"),
            one("statvfs /tmp", value({**ROOM, "inodes_free": 999}), FAIL, "999 inodes free"),
        ],
        missing=FAIL,  # the folder is not there: that is what was asked
    ),
    "fs.write": Case(
        [
            one(
                "written /tmp",
                {"problem": "error", "detail": "/tmp: Read-only file system"},
                FAIL,
                "Read-only",
            ),
            one("written /tmp", 1.5, WARN, "1.5 s"),
        ],
        missing=FAIL,
        denied=FAIL,  # the job's user may not write there: that is what was asked
    ),
    "names.resolve": Case(
        [
            one(
                "resolve node1",
                {"problem": "error", "detail": "Name or service not known"},
                FAIL,
                "node1: Name or",
            ),
            one(
                "resolve node2",
                {"problem": "error", "detail": "Name or service not known"},
                WARN,
                "node2: Name or",
            ),
            one("resolve node1", ["127.0.1.1"], WARN, "node1 is 127.0.1.1"),
        ],
        expected={"peers": ("node2",)},
    ),
    "names.master": Case(
        [
            one(
                "connect 10.0.0.9 29500",
                {"problem": "error", "detail": "Connection refused"},
                FAIL,
                "refused",
            )
        ],
        expected={"master": "10.0.0.9:29500"},
        timed_out=FAIL,  # who drops a connection without a word is a firewall
    ),
    "env.interface": Case(
        [
            environment(FAIL, "NCCL_SOCKET_IFNAME=ib: no such", NCCL_SOCKET_IFNAME="ib"),
            environment(FAIL, "GLOO_SOCKET_IFNAME=eth: no such", GLOO_SOCKET_IFNAME="eth"),
            Fault({"read /sys/class/net/eth0/operstate": value("down\n")}, FAIL, "eth0 is down"),
        ]
    ),
    "env.hca": Case(
        [
            environment(FAIL, "NCCL_IB_HCA=mlx5_7: no such", NCCL_IB_HCA="mlx5_7"),
            environment(FAIL, "GID_INDEX=1 is no RoCE v2", NCCL_IB_GID_INDEX="1"),
        ],
        fabric="roce",
    ),
    "env.conflict": Case(
        [
            environment(FAIL, "NCCL_IB_DISABLE=1", NCCL_IB_DISABLE="1"),
            environment(FAIL, "NCCL_NET=Socket", NCCL_NET="Socket"),
            environment(WARN, "NCCL_P2P_DISABLE=1", NCCL_P2P_DISABLE="1"),
        ]
    ),
    "env.files": Case([one("start /etc/topo.xml", problem("missing"), FAIL, "/etc/topo.xml: no such file")]),
}
