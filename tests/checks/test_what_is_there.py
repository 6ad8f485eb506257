"""What a machine does not have: fine where nobody wants it, a warning where nobody said, a failure where it was."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from checks import catalog
from checks.collect import collect_node
from checks.evidence import Record, Recorded, key_of
from checks.expectations import Expectations
from checks.registry import judge
from checks.verdict import CheckResult, Verdict
from tests.checks.nodes import ADAPTERS, GPUS, LSPCI, healthy, problem, value

PCI = "list /sys/bus/pci/devices"
COUNT = key_of("nvml", ["nvmlDeviceGetCount"])


def judged(
    changes: Mapping[str, Record], expected: Expectations, fabric: str = "infiniband"
) -> dict[str, CheckResult]:
    node = collect_node(Recorded({**healthy(fabric), **changes}), "n1", expected)
    return {one.check: one for one in judge(node, expected, catalog.named((), "passive"))}


def without_gpus(**changes: Record) -> dict[str, Record]:
    """A laptop: no NVML, no device files, no GPU on the bus."""
    devices = [address for address in healthy()[PCI]["value"] if address not in GPUS]
    return {COUNT: problem("missing"), "list /dev": value(["null"]), PCI: value(devices), **changes}


def subjects(results: Mapping[str, CheckResult]) -> set[str]:
    return {name.partition(".")[0] for name in results}


def test_a_laptop_without_gpus_gets_one_warning_that_names_the_option() -> None:
    results = judged(without_gpus(), Expectations(fabric="infiniband"))
    assert results["gpu.count"].verdict is Verdict.WARN
    assert "--gpus=0" in results["gpu.count"].remedy
    assert {name for name in results if name.startswith(("gpu.", "nvlink."))} == {"gpu.count"}


@pytest.mark.parametrize(
    "sign",
    [
        {"list /dev": value(["nvidia0"])},
        {PCI: healthy()[PCI]},
        {PCI: problem("not permitted")},
        {COUNT: problem("timed out")},
    ],
)
def test_any_sign_of_a_gpu_is_looked_into(sign: dict[str, Record]) -> None:
    results = judged({**without_gpus(), **sign}, Expectations(fabric="infiniband"))
    assert results["gpu.count"].verdict is Verdict.UNKNOWN
    assert results["gpu.ecc"].verdict is Verdict.UNKNOWN


def test_who_wants_gpus_and_has_none_does_not_pass() -> None:
    assert judged(without_gpus(), Expectations(gpus=2))["gpu.count"].verdict is Verdict.UNKNOWN
    none = {**without_gpus(), COUNT: value(0)}
    assert judged(none, Expectations(gpus=2))["gpu.count"].verdict is Verdict.FAIL


def test_a_gpu_that_the_driver_lost_is_missed_even_where_enough_are_left() -> None:
    result = judged({COUNT: value(1)}, Expectations(gpus=1))["gpu.count"]
    assert (result.verdict, result.read) == (Verdict.FAIL, "1 of 2 GPUs on the bus answering")
    # In a container that was given one GPU, the other's device file is not there: nothing is lost.
    one_given = {COUNT: value(1), "list /dev": value(["nvidia0"])}
    assert judged(one_given, Expectations(gpus=1))["gpu.count"].verdict is Verdict.PASS


def test_a_fallen_gpu_is_not_missed_by_a_job_without_gpus() -> None:
    fallen = {f"start /sys/bus/pci/devices/{GPUS[0]}/config": value("ff" * 64)}
    assert "gpu.bus" not in judged(fallen, Expectations(gpus=0))
    assert judged({**fallen, COUNT: value(0)}, Expectations(gpus=2))["gpu.bus"].verdict is Verdict.FAIL


def test_a_card_without_nvlink_is_not_asked_for_it() -> None:
    cards: dict[str, Record] = {
        key_of("nvml", ["nvmlDeviceGetName", gpu]): value("NVIDIA L40S") for gpu in (0, 1)
    }
    unsupported = {f"nvml_field {gpu} 91 1": value([problem("unsupported")]) for gpu in (0, 1)}
    none = {f"nvml_field {gpu} 91 1": value([value(0)]) for gpu in (0, 1)}
    for links in (unsupported, none):
        results = judged({**cards, **links}, Expectations(gpus=2))
        assert {"nvlink.links", "nvlink.errors"} & results.keys() == set()
    assert judged(unsupported, Expectations(gpus=2))["nvlink.links"].verdict is Verdict.UNKNOWN, (
        "an H100 has it"
    )


@pytest.mark.parametrize(
    ("architecture", "verdict"), [(7, None), (8, None), (9, Verdict.UNKNOWN), (10, Verdict.UNKNOWN)]
)
def test_fabric_manager_is_asked_on_hopper_and_later(architecture: int, verdict: Verdict | None) -> None:
    changes = {key_of("nvml", ["nvmlDeviceGetGpuFabricInfoV", gpu]): problem("unsupported") for gpu in (0, 1)}
    changes |= {key_of("nvml", ["nvmlDeviceGetArchitecture", gpu]): value(architecture) for gpu in (0, 1)}
    result = judged(changes, Expectations(gpus=2)).get("nvlink.fabric")
    assert (result.verdict if result else None) is verdict


@pytest.mark.parametrize(
    ("configuration", "verdict"), [(0, Verdict.PASS), (1, Verdict.PASS), (2, Verdict.FAIL), (8, Verdict.FAIL)]
)
def test_a_wrong_configuration_of_the_fabric_fails(configuration: int, verdict: Verdict) -> None:
    info = {"state": 3, "status": 0, "cliqueId": 0, "clusterUuid": [0] * 16, "healthMask": configuration << 8}
    changes = {key_of("nvml", ["nvmlDeviceGetGpuFabricInfoV", 1]): value(info)}
    assert judged(changes, Expectations(gpus=2))["nvlink.fabric"].verdict is verdict


def test_an_older_driver_without_a_verdict_of_its_own_warns() -> None:
    changes = {key_of("nvml", ["nvmlSystemGetDriverVersion"]): value("550.90.07")}
    changes |= {f"nvml_field {gpu} 230 1": value([problem("unsupported")]) for gpu in (0, 1)}
    result = judged(changes, Expectations(gpus=2))["gpu.recovery"]
    assert (result.verdict, result.read) == (Verdict.WARN, "driver 550.90.07 gives no verdict")


def test_a_machine_without_rdma_gets_one_warning_that_names_the_option() -> None:
    devices = [address for address in healthy()[PCI]["value"] if address not in ADAPTERS]
    for listing in (value([]), problem("missing")):
        changes = {"list /sys/class/infiniband": listing, PCI: value(devices)}
        results = judged(changes, Expectations(gpus=2))
        assert results["rdma.devices"].verdict is Verdict.WARN
        assert "--fabric=tcp" in results["rdma.devices"].remedy
        assert subjects(results) & {"roce", "efa", "gdr"} == set()
        assert "host.memlock" not in results
    changes = {"list /sys/class/infiniband": problem("missing")}
    assert judged(changes, Expectations(gpus=2))["rdma.devices"].verdict is Verdict.FAIL, (
        "an adapter is on the bus"
    )


def test_plain_network_cards_of_the_same_makers_are_no_sign_of_rdma() -> None:
    none = {"list /sys/class/infiniband": problem("missing")}
    assert judged(none, Expectations(gpus=2), "roce")["rdma.devices"].verdict is Verdict.WARN
    cards = {f"read /sys/bus/pci/devices/{address}/device": value("0xec20\n") for address in ADAPTERS}
    assert judged({**none, **cards}, Expectations(gpus=2), "efa")["rdma.devices"].verdict is Verdict.WARN
    assert judged(none, Expectations(gpus=2), "efa")["rdma.devices"].verdict is Verdict.FAIL


def test_only_efa_devices_count_as_rails_of_efa() -> None:
    expected = Expectations(gpus=2, fabric="efa", rails=2)
    assert judged({}, expected, "efa")["rdma.devices"].verdict is Verdict.PASS
    driver = "link /sys/class/infiniband/rdmap1s6/device/driver"
    hidden = {driver: problem("timed out")}
    assert judged(hidden, expected, "efa")["rdma.devices"].verdict is Verdict.UNKNOWN
    other = {driver: value("/sys/bus/pci/drivers/mlx5_core")}
    assert judged(other, expected, "efa")["rdma.devices"].verdict is Verdict.FAIL


def test_roce_ports_of_an_infiniband_node_are_not_judged_where_nobody_said() -> None:
    storage = {"read /sys/class/infiniband/mlx5_1/ports/1/link_layer": value("Ethernet\n")}
    assert "roce.gid" not in judged(storage, Expectations(gpus=2))
    assert judged(storage, Expectations(gpus=2, fabric="roce"))["roce.gid"].verdict is Verdict.FAIL


def test_a_virtual_function_has_no_link_of_its_own() -> None:
    """SR-IOV 1.1, 3.5: the link status of a virtual function is reserved, so sysfs says `0` and `Unknown`."""
    folder = f"/sys/bus/pci/devices/{ADAPTERS[0]}"
    none = {f"read {folder}/current_link_width": value("0\n")}
    both = {**none, f"read {folder}/current_link_speed": value("Unknown\n")}
    assert judged(both, Expectations(gpus=2))["pcie.path"].verdict is Verdict.PASS
    assert judged(none, Expectations(gpus=2))["pcie.path"].verdict is Verdict.FAIL


def test_a_link_that_its_slot_or_nobody_explains_is_a_warning() -> None:
    folder = "/sys/bus/pci/devices"
    narrow = {f"read {folder}/0000:17:00.0/max_link_width": value("8\n")}
    narrow[f"read {folder}/{GPUS[0]}/current_link_width"] = value("8\n")
    result = judged(narrow, Expectations(gpus=2))["pcie.path"]
    assert (result.verdict, result.read) == (
        Verdict.WARN,
        "0000:19:00.0: width 8 of 16, its slot has no more",
    )
    alone = {f"link {folder}/{GPUS[0]}": value(f"/sys/devices/pci0000:00/{GPUS[0]}")}
    alone[f"read {folder}/{GPUS[0]}/current_link_width"] = value("8\n")
    result = judged(alone, Expectations(gpus=2))["pcie.path"]
    assert (result.verdict, "what is above it is not known" in result.read) == (Verdict.WARN, True)


def test_one_lane_is_too_few_on_infiniband_alone() -> None:
    single = {
        f"read /sys/class/infiniband/mlx5_{one}/ports/1/rate": value("25 Gb/sec (1X EDR)\n") for one in (0, 1)
    }
    assert judged(single, Expectations(gpus=2))["rdma.rate"].verdict is Verdict.FAIL
    assert judged(single, Expectations(gpus=2, fabric="roce"), "roce")["rdma.rate"].verdict is Verdict.PASS


def test_a_port_that_is_down_is_another_jobs_where_enough_rails_are_up() -> None:
    down = {"read /sys/class/infiniband/mlx5_1/ports/1/state": value("1: DOWN\n")}
    assert judged(down, Expectations(gpus=2, rails=1))["rdma.port"].verdict is Verdict.WARN
    assert judged(down, Expectations(gpus=2, rails=2))["rdma.port"].verdict is Verdict.FAIL
    assert judged(down, Expectations(gpus=2))["rdma.port"].verdict is Verdict.FAIL


def test_a_slower_port_is_storages_where_enough_rails_are_fast_or_named() -> None:
    slow = {"read /sys/class/infiniband/mlx5_1/ports/1/rate": value("200 Gb/sec (4X HDR)\n")}
    assert judged(slow, Expectations(gpus=2))["rdma.rate"].verdict is Verdict.FAIL
    assert judged(slow, Expectations(gpus=2, rails=2))["rdma.rate"].verdict is Verdict.FAIL
    assert judged(slow, Expectations(gpus=2, rails=1))["rdma.rate"].verdict is Verdict.WARN
    variables = next(key for key in healthy() if key.startswith("environment "))
    for named, verdict in (("=mlx5_0", Verdict.WARN), ("=mlx5_0,mlx5_1", Verdict.FAIL)):
        changes = {**slow, variables: value({"NCCL_IB_HCA": named})}
        assert judged(changes, Expectations(gpus=2))["rdma.rate"].verdict is verdict


def test_another_fabrics_ports_are_not_judged() -> None:
    storage = "/sys/class/infiniband/mlx5_1/ports/1"
    changes = {f"read {storage}/link_layer": value("Ethernet\n"), f"read {storage}/state": value("1: DOWN\n")}
    assert judged(changes, Expectations(gpus=2, fabric="infiniband"))["rdma.port"].verdict is Verdict.PASS
    assert judged(changes, Expectations(gpus=2, fabric="roce"))["rdma.port"].verdict is Verdict.FAIL


def test_a_guest_is_not_judged_by_its_hypervisors_bridges() -> None:
    changes = {
        "read /proc/cpuinfo": value("flags\t\t: fpu hypervisor\n"),
        "run lspci -vvv": value(LSPCI.replace("SrcValid-", "SrcValid+")),
        "list /sys/devices/system/cpu/cpufreq": problem("missing"),
    }
    results = judged(changes, Expectations(gpus=2))
    assert {"pcie.acs", "pcie.iommu", "gdr.affinity", "host.governor"} & results.keys() == set()


def test_a_long_list_of_bridges_is_cut_and_says_so() -> None:
    bridge = "{:02x}:00.0 PCI bridge: x\n\t\tACSCtl:\tSrcValid+\n"
    many = {"run lspci -vvv": value("".join(bridge.format(number) for number in range(20)))}
    assert judged(many, Expectations(gpus=2))["pcie.acs"].read.endswith("and 4 more")


def test_what_mig_mode_holds_and_hides_is_no_failure() -> None:
    changes = {key_of("nvml", ["nvmlDeviceGetMemoryInfo", 1]): value({"total": 1 << 36, "used": 59 << 20})}
    changes |= {key_of("nvml", ["nvmlDeviceGetRemappedRows", 1]): problem("unsupported")}
    mig = {key_of("nvml", ["nvmlDeviceGetMigMode", 1]): value([1, 1])}
    changes |= {"nvml_field 1 91 1": value([problem("unsupported")])}
    plain, in_mig = judged(changes, Expectations(gpus=2)), judged({**changes, **mig}, Expectations(gpus=2))
    assert (plain["gpu.memory"].verdict, in_mig["gpu.memory"].verdict) == (Verdict.FAIL, Verdict.PASS)
    assert (plain["gpu.remap"].verdict, in_mig["gpu.remap"].verdict) == (Verdict.UNKNOWN, Verdict.WARN)
    assert (plain["nvlink.links"].verdict, in_mig["nvlink.links"].verdict) == (Verdict.UNKNOWN, Verdict.PASS)


@pytest.mark.parametrize(
    ("variables", "verdict"),
    [
        ({"NCCL_NET": "IB"}, Verdict.FAIL),
        ({"NCCL_NET": "Socket"}, Verdict.PASS),
        ({"NCCL_IB_DISABLE": "1"}, Verdict.PASS),
        ({"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"}, Verdict.PASS),
    ],
)
def test_variables_are_held_against_what_the_node_has(variables: dict[str, str], verdict: Verdict) -> None:
    key = next(key for key in healthy() if key.startswith("environment "))
    for listing in (value([]), problem("missing")):
        changes = {key: value(variables), "list /sys/class/infiniband": listing}
        assert judged(changes, Expectations(gpus=2, fabric="tcp"))["env.conflict"].verdict is verdict
    both = {key: value({"NCCL_NET": "IB", "NCCL_IB_DISABLE": "1"})}
    assert judged(both, Expectations(gpus=2, fabric="tcp"))["env.conflict"].verdict is Verdict.FAIL


def test_only_the_jobs_own_gpus_must_be_free() -> None:
    variables = next(key for key in healthy() if key.startswith("environment "))
    busy = {key_of("nvml", ["nvmlDeviceGetMemoryInfo", 1]): value({"total": 1 << 36, "used": 1 << 30})}
    for visible, verdict in (("0", Verdict.PASS), ("1", Verdict.FAIL), ("0,1", Verdict.FAIL)):
        changes = {**busy, variables: value({"CUDA_VISIBLE_DEVICES": visible})}
        assert judged(changes, Expectations(gpus=1))["gpu.memory"].verdict is verdict


def test_a_process_that_has_ended_is_ignored() -> None:
    running = {key_of("nvml", ["nvmlDeviceGetComputeRunningProcesses", 0]): value([{"pid": 77}])}
    gone, here = {"read /proc/77/comm": problem("missing")}, {"read /proc/77/comm": value("python\n")}
    assert judged({**running, **gone}, Expectations(gpus=2))["gpu.processes"].verdict is Verdict.PASS
    assert (
        judged({**running, **here}, Expectations(gpus=2))["gpu.processes"].read
        == "GPU 0: process 77 (python)"
    )


def test_repeated_errors_say_how_often() -> None:
    line = "[ 1.0] NVRM: Xid (PCI:0000:9b:00): 119, pid=1, x\n"
    assert (
        judged({"run dmesg": value(line * 2)}, Expectations())["gpu.xid"].read
        == "Xid 119 on 0000:9b:00 (2 times)"
    )
    assert judged({"run dmesg": value(line)}, Expectations())["gpu.xid"].read == "Xid 119 on 0000:9b:00"


@pytest.mark.parametrize(
    ("on_path", "tool"),
    [
        (value("provider: efa\n    domain: rdmap0s6-rdm\n"), "fi_info"),
        (problem("missing"), "/opt/amazon/efa/bin/fi_info"),
        # A distribution's libfabric, built without EFA, comes first on PATH: fi_getinfo finds no data (FI_ENODATA).
        (value("fi_getinfo: -61 (No data available)\n"), "/opt/amazon/efa/bin/fi_info"),
        (problem("error"), "/opt/amazon/efa/bin/fi_info"),
    ],
)
def test_the_installers_fi_info_is_asked_where_the_one_on_path_knows_no_efa(
    on_path: dict[str, object], tool: str
) -> None:
    records = healthy("efa")
    records["run fi_info -p efa"] = on_path
    records["run /opt/amazon/efa/bin/fi_info -p efa"] = value("provider: efa\n    domain: rdmap0s6-rdm\n")
    expected = Expectations(gpus=2, fabric="efa")
    node = collect_node(Recorded(records), "n1", expected)
    (result,) = judge(node, expected, catalog.named(["efa.libfabric"], "passive"))
    assert (result.verdict, result.read) == (Verdict.PASS, f"1 domain, says {tool}")


@pytest.mark.parametrize(("architecture", "verdict"), [(5, Verdict.PASS), (6, Verdict.UNKNOWN)])
def test_a_gpu_before_turing_has_no_sram_to_count_errors_of(architecture: int, verdict: Verdict) -> None:
    """nvml.h, nvmlMemoryLocation_t: `Turing+` for DRAM and SRAM. Of a later GPU that cannot say nothing is known."""
    records = healthy()
    for gpu in (0, 1):
        records[key_of("nvml", ["nvmlDeviceGetArchitecture", gpu])] = value(architecture)
        for key in [key for key in records if key.startswith(f"nvml nvmlDeviceGetMemoryErrorCounter {gpu} ")]:
            records[key] = problem("unsupported")
    expected = Expectations(gpus=2, fabric="infiniband")
    node = collect_node(Recorded(records), "n1", expected)
    (result,) = judge(node, expected, catalog.named(["gpu.ecc"], "passive"))
    assert result.verdict is verdict, result
