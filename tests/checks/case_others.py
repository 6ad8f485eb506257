"""Cases of the checks of the network, the host and the environment."""

from __future__ import annotations

from checks.evidence import Record
from tests.checks.case import FAIL, PASS, UNKNOWN, WARN, Case, Fault, environment, limit, log, one
from tests.checks.nodes import GPUS, problem, value

PORT = "/sys/class/infiniband/mlx5_1/ports/1"
PCI = "/sys/bus/pci/devices"
MLX5 = "[ 9.3] mlx5_core 0000:1a:00.0:"
ROOM = {"size": 1 << 40, "free": 1 << 39, "inodes": 1 << 20, "inodes_free": 1 << 19}


def rails(names: str) -> dict[str, Record]:
    """The variable by which a profile says which ports are the job's."""
    return environment(PASS, "", NCCL_IB_HCA=names).answers  # type: ignore[return-value]


EFA_TOOL = "run /opt/amazon/efa/bin/fi_info -p efa"

OTHERS: dict[str, Case] = {
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
            Fault(
                {**rails("=mlx5_0"), f"read {PORT}/state": value("1: DOWN\n")},
                WARN,
                "NCCL_IB_HCA does not name it",
            ),
            Fault({**rails("mlx5_1"), f"read {PORT}/state": value("1: DOWN\n")}, FAIL, "mlx5_1:1 is 1: DOWN"),
        ]
    ),
    "rdma.rate": Case(
        [
            one(f"read {PORT}/rate", "200 Gb/sec (4X HDR)\n", FAIL, "200 Gb/s, others of its kind 400"),
            one(f"read {PORT}/rate", "fast\n", UNKNOWN, "fast"),
            one(f"read {PORT}/rate", "nan Gb/sec\n", UNKNOWN, "no rate"),
            one(f"read {PORT}/rate", "0 Gb/sec (4X)\n", UNKNOWN, "no rate"),
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
        [one("read /sys/class/net/eth0/carrier_changes @1", "3\n", FAIL, "eth0: 1 carrier change")]
    ),
    "rdma.verbs": Case([one("list /dev/infiniband", ["uverbs0"], FAIL, "1 uverbs file for 2 devices")]),
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
        [
            one("run fi_info -p efa", "fi_getinfo: -61\n", FAIL, "fi_info names no provider efa"),
            one(
                "run fi_info -p efa", problem("missing"), UNKNOWN, "on PATH and at the EFA installer's place"
            ),
            Fault(
                {"run fi_info -p efa": problem("missing"), EFA_TOOL: value("fi_getinfo: -61\n")},
                FAIL,
                "/opt/amazon/efa/bin/fi_info names no provider efa",
            ),
            Fault(
                {"run fi_info -p efa": problem("missing"), EFA_TOOL: problem("timed out")},
                UNKNOWN,
                "timed out",
            ),
        ],
        fabric="efa",
    ),
    "rdma.log": Case(
        [
            # drivers/net/ethernet/mellanox/mlx5/core: events.c, pcie_core and port_module; health.c, poll_health.
            log(
                f"{MLX5} mlx5_pcie_event:299:(pid 9): Detected insufficient power on the PCIe slot (27W).",
                WARN,
                "insufficient power on the PCIe slot (27W)",
            ),
            log(
                f"{MLX5} Port module event[error]: module 0, Cable error, High Temperature",
                WARN,
                "module 0, Cable error, High Temperature",
            ),
            log(f"{MLX5} device's health compromised - reached miss count", FAIL, "health compromised"),
            log(
                f"{MLX5} poll_health:1157:(pid 0): Fatal error 3 detected\n{MLX5} Fatal error 3 detected",
                FAIL,
                "Fatal error 3 detected (2 times)",
            ),
        ]
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
                "invalid context, 1 time",
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
                "no neighbour resolves",
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
            environment(
                FAIL, "NCCL_SOCKET_IFNAME=ib (environment): no interface that is up", NCCL_SOCKET_IFNAME="ib"
            ),
            environment(FAIL, "there is no interface eth that is up", GLOO_SOCKET_IFNAME="eth"),
            environment(FAIL, "TP_SOCKET_IFNAME=eth9", TP_SOCKET_IFNAME="eth9"),
            environment(WARN, "'ib7' matches no interface", NCCL_SOCKET_IFNAME="=eth0,ib7"),
            Fault({"read /sys/class/net/eth0/operstate": value("down\n")}, FAIL, "eth0 is down"),
        ]
    ),
    "env.hca": Case(
        [
            environment(FAIL, "NCCL_IB_HCA=mlx5_7 (environment): no active port", NCCL_IB_HCA="mlx5_7"),
            environment(WARN, "there is no device 'mlx5_7'", NCCL_IB_HCA="=mlx5_0,mlx5_7"),
            environment(FAIL, "mlx5_0:1 has none there", NCCL_IB_GID_INDEX="1"),
            environment(FAIL, "mlx5_0:1 has IB/RoCE v1 there", NCCL_IB_GID_INDEX="2"),
            environment(FAIL, "no number", NCCL_IB_GID_INDEX="three"),
            environment(WARN, "neither an active port", UCX_NET_DEVICES="mlx5_7:1"),
        ],
        fabric="roce",
    ),
    "env.conflict": Case(
        [
            environment(FAIL, "NCCL_IB_DISABLE=1", NCCL_IB_DISABLE="1"),
            environment(FAIL, "NCCL_NET=Socket", NCCL_NET="Socket"),
            environment(FAIL, "NCCL_NET=IB and NCCL_IB_DISABLE=1", NCCL_NET="IB", NCCL_IB_DISABLE="1"),
            environment(WARN, "NCCL_P2P_DISABLE=1", NCCL_P2P_DISABLE="1"),
        ]
    ),
    "env.files": Case([one("start /etc/topo.xml", problem("missing"), FAIL, "/etc/topo.xml: no such file")]),
}
