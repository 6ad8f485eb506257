"""The tree of a machine is read as it is, its distances have nvidia-smi's names, and its picture shows every part."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from recipes.ch1.topology import kinds_of_node, text_of
from recipes.lib.nvlinks import Gpu, read_gpus, recorded_gpus, sysfs_address
from recipes.lib.topology import RELATIONS, Device, Machine, pcie_link, pcie_relation, read_machine
from recipes.lib.topology_picture import draw_machine, pcie_tree
from tests.recipes.synthetic_machines import GEN5, dgx, ethernet, file, pci, pcie_box, rdma, socket

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def large(tmp_path: Path) -> Machine:
    return read_machine("n1", dgx(tmp_path), tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Machine:
    return read_machine("n1", pcie_box(tmp_path), tmp_path)


def between(machine: Machine, one: str, other: str) -> str:
    named = {each.name: each for each in machine.devices}
    assert machine.relation(named[one], named[other]) == machine.relation(named[other], named[one])
    return machine.relation(named[one], named[other])


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [
        ("GPU0", "GPU0", "X"),
        ("GPU0", "GPU7", "NV18"),
        ("GPU0", "mlx5_0", "PIX"),
        ("GPU0", "mlx5_1", "NODE"),
        ("GPU0", "mlx5_4", "SYS"),
        ("mlx5_4", "mlx5_7", "NODE"),
    ],
)
def test_distances_in_a_machine_with_a_switch_for_every_gpu(
    large: Machine, one: str, other: str, word: str
) -> None:
    assert between(large, one, other) == word


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [
        ("GPU0", "GPU1", "NV4"),
        ("GPU0", "eth0", "PXB"),
        ("GPU0", "GPU2", "PHB"),
        ("GPU0", "GPU3", "NODE"),  # one socket, although the firmware does not name it
    ],
)
def test_distances_in_a_machine_with_bridges(small: Machine, one: str, other: str, word: str) -> None:
    assert between(small, one, other) == word


@pytest.mark.parametrize(
    ("below_one", "below_other", "word"),
    [
        (["0000:03:00.0"], ["0000:03:00.1"], "PIX"),  # two functions of a device
        (["0000:02:00.0", "0000:03:00.0"], ["0000:02:01.0", "0000:04:00.0"], "PIX"),  # two ports of a switch
        (
            ["0000:02:00.0", "0000:03:00.0", "0000:04:00.0"],
            ["0000:02:01.0", "0000:06:00.0"],
            "PXB",
        ),  # one port deeper
    ],
)
def test_bridges_are_counted(below_one: list[str], below_other: list[str], word: str) -> None:
    above = ["pci0000:00", "0000:00:01.0"]
    one, other = (
        Device("", "nic", "", path[-1], (*above, *path), 0, "", None) for path in (below_one, below_other)
    )
    assert pcie_relation(one, other) == pcie_relation(other, one) == word


def test_without_nvlink_the_way_is_pcie_s(small: Machine) -> None:
    cut = tuple(dataclasses.replace(gpu, links_to_gpu=()) for gpu in small.gpus)
    assert between(dataclasses.replace(small, gpus=cut), "GPU0", "GPU1") == "PIX"


def test_sockets_that_the_firmware_does_not_name_count_as_far(small: Machine) -> None:
    two = dataclasses.replace(small, numa=(small.numa[0], dataclasses.replace(small.numa[0], number=1)))
    assert between(two, "GPU0", "GPU3") == "SYS"


def test_facts_of_the_devices(large: Machine) -> None:
    named = {each.name: each for each in large.devices}
    assert [each.name for each in large.devices if each.kind == "gpu"] == [
        f"GPU{number}" for number in range(8)
    ]
    assert named["GPU4"].numa == 1
    assert named["GPU4"].address == "0000:98:00.0"
    assert named["GPU4"].pcie == "32 GT/s x16"
    assert named["GPU4"].gigabytes == pytest.approx(63.0, abs=0.1)
    assert named["mlx5_0"].gigabytes == 50.0
    assert named["ens0"].gigabytes == 12.5
    assert large.numa[1].distances == (21, 10)
    assert large.cpu == "Intel(R) Xeon(R) Platinum 8480C"


@pytest.mark.parametrize(
    ("speed", "width", "text", "gigabytes"),
    [
        ("8.0 GT/s PCIe", "8", "8 GT/s x8", 7.88),
        ("5.0 GT/s PCIe", "16", "5 GT/s x16", 8.0),
        ("64.0 GT/s PCIe", "16", "64 GT/s x16", 126.0),
        ("Unknown", "255", "", None),
        ("32.0 GT/s PCIe", "0", "", None),
    ],
)
def test_the_speed_of_a_link(
    tmp_path: Path, speed: str, width: str, text: str, gigabytes: float | None
) -> None:
    found = pcie_link(pci(tmp_path, ["pci0000:00", "0000:00:01.0"], 0, (speed, width)))
    assert found[0] == text
    assert found[1] == (pytest.approx(gigabytes, rel=0.01) if gigabytes else None)


def test_a_speed_that_is_not_known_is_not_made_up(tmp_path: Path) -> None:
    socket(tmp_path, 0, "0-3", "10")
    function = pci(tmp_path, ["pci0000:00", "0000:00:01.0"], 0, GEN5)
    ethernet(tmp_path, "eth0", function, speed="-1")
    rdma(tmp_path, "mlx5_0", pci(tmp_path, ["pci0000:00", "0000:00:02.0"], 0, GEN5), rate="N/A (no PMA)")
    assert [each.gigabytes for each in read_machine("n", [], tmp_path).devices] == [None, None]


def test_an_interface_of_an_rdma_card_is_not_counted_twice(tmp_path: Path) -> None:
    function = pci(tmp_path, ["pci0000:00", "0000:00:01.0"], 0, GEN5)
    rdma(tmp_path, "mlx5_0", function)
    ethernet(tmp_path, "ens1", function)
    file(tmp_path / "sys/class/net/lo/speed", "0")  # virtual: without a device
    assert [each.name for each in read_machine("n", [], tmp_path).devices] == ["mlx5_0"]


def test_without_a_driver_gpus_on_the_bus_are_shown_all_the_same(tmp_path: Path) -> None:
    dgx(tmp_path)
    found = [each for each in read_machine("n", [], tmp_path).devices if each.kind == "gpu"]
    assert [each.model for each in found] == ["NVIDIA GPU, no driver"] * 8


def test_an_empty_machine_is_a_machine(tmp_path: Path) -> None:
    machine = read_machine("n1", [], tmp_path)
    assert machine == Machine("n1", (), (), ())
    assert "neither a GPU nor a network card" in text_of(machine, ["n1"])
    draw_machine(tmp_path / "empty.png", machine, "1 node: n1")


@pytest.mark.skipif(
    "HARDWARE_CAPTURES" not in os.environ, reason="HARDWARE_CAPTURES names no folder of captures"
)
def test_a_captured_infiniband_tree_is_read(tmp_path: Path) -> None:
    """Eight cards, and a bond in place of the two that it joins."""
    captured = Path(os.environ["HARDWARE_CAPTURES"]) / "infiniband-h100"
    shutil.copytree(captured, tmp_path / "sys/class/infiniband")
    cards = read_machine("n1", [], tmp_path).devices
    rates = {each.name: each.gigabytes for each in cards}
    assert len(rates) == 9
    for name, rate in rates.items():
        said = (captured / name / "ports/1/rate").read_text()
        assert rate == float(said.split()[0]) / 8


# --- NVML


class FakeNvml:
    """What pynvml offers, for two GPUs with four links: three to a switch, or all to each other. The real one is in
    test_gpus_here_are_those_that_torch_sees.
    """

    NVML_SUCCESS = 0
    NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON = 7

    class NVMLError_LibraryNotFound(Exception): ...

    class NVMLError_DriverNotLoaded(Exception): ...

    class NVMLError_NotSupported(Exception): ...

    class NVMLError_InvalidArgument(Exception): ...

    def __init__(self, *, switched: bool, speed: int = 26562, missing: bool = False) -> None:
        self._switched, self._speed, self._missing = switched, speed, missing

    def nvmlInit(self) -> None:
        if self._missing:
            raise self.NVMLError_LibraryNotFound

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H200"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(busId=f"00000000:{handle + 27:02X}:00.0")

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= 4:
            raise self.NVMLError_InvalidArgument
        return int(link != 3 or not self._switched)

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        return 2 if self._switched else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        return self.nvmlDeviceGetPciInfo(1 - handle)

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:
        assert fields == [self.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self._speed))]


def test_links_to_a_switch_join_all_gpus() -> None:
    one, other = read_gpus(FakeNvml(switched=True))
    assert (one.model, one.links_to_switch, one.links_to(other)) == ("NVIDIA H200", 3, 3)
    assert one.nvlink_gigabytes == pytest.approx(3 * 26.562)


def test_links_straight_to_a_gpu_are_counted_by_its_address() -> None:
    one, other = read_gpus(FakeNvml(switched=False))
    assert one.links_to_gpu == ((other.address, 4),)
    assert (one.links_to(other), one.links_to(one)) == (4, 0)


def test_a_speed_of_zero_is_no_speed_and_a_missing_driver_is_no_gpu() -> None:
    assert read_gpus(FakeNvml(switched=True, speed=0))[0].nvlink_gigabytes is None
    assert read_gpus(FakeNvml(switched=True, missing=True)) == []


def test_gpus_here_are_those_that_torch_sees() -> None:
    """With the real NVML, or without a driver; CUDA may be told to see fewer."""
    assert len(read_gpus()) >= torch.cuda.device_count()
    assert bool(read_gpus()) is Path("/proc/driver/nvidia/version").exists()


def test_addresses_are_spelt_as_the_kernel_does() -> None:
    assert sysfs_address("00000000:1B:00.0") == "0000:1b:00.0"
    assert sysfs_address("00010000:1B:00.0") == "10000:1b:00.0"


def test_recorded_gpus_are_the_same_again(tmp_path: Path) -> None:
    gpus = pcie_box(tmp_path)
    assert recorded_gpus(tmp_path / "nvml.json") == gpus
    assert recorded_gpus(tmp_path / "none.json") == []


# --- what is shown


def test_bridges_with_a_single_way_on_are_left_out_of_the_tree(small: Machine) -> None:
    first, second = pcie_tree(small.devices)
    assert (first.name, second.name) == ("pci0000:00", "pci0000:40")
    assert [each.name for each in second.devices] == ["GPU3"]
    (bridge,) = first.branches
    (switch,) = bridge.branches
    assert [each.name for each in switch.devices] == ["GPU0", "GPU1"]
    assert (first.depth, len(first.leaves)) == (3, 4)


def test_the_text_has_every_device_and_explains_its_words(large: Machine) -> None:
    text = text_of(large, ["n1", "n2"])
    assert text.strip().startswith("2 nodes: n1, n2")
    for device in large.devices:
        assert f"{device.name} " in text
    for word in ("NV#", "PIX", "NODE", "SYS"):
        assert f"{word:<5} {RELATIONS[word]}" in text
    assert "PXB  " not in text, "only words that the matrix uses are explained"


def test_equal_nodes_are_one_kind_and_a_different_one_stands_out(large: Machine) -> None:
    def node(name: str, **changes: Any) -> Machine:
        gpus = tuple(dataclasses.replace(gpu, uuid=f"{name}-{gpu.uuid}") for gpu in large.gpus)
        return dataclasses.replace(large, name=name, **{"gpus": gpus, **changes})

    lame = (dataclasses.replace(large.gpus[0], links_to_switch=17), *large.gpus[1:])
    kinds = kinds_of_node([node("n1"), node("n2", gpus=lame), node("n3"), node("n4")])
    assert [names for _, names in kinds] == [["n1", "n3", "n4"], ["n2"]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("build", [dgx, pcie_box])
def test_the_picture_shows_every_device_and_every_kind_of_link(build: Any, tmp_path: Path) -> None:
    gpus: list[Gpu] = build(tmp_path)
    machine = read_machine("n1", gpus, tmp_path)
    for ending in ("png", "svg"):
        draw_machine(tmp_path / f"topology.{ending}", machine, "1 node: n1")
    with Image.open(tmp_path / "topology.png") as image:
        assert image.width > 900
        assert image.width < 3 * image.height, "a strip that nobody can read"
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    svg = (tmp_path / "topology.svg").read_text()
    # Text is drawn as outlines; matplotlib leaves each as a comment.
    written = set(re.findall(r"<!-- (.*?) -->", svg))
    assert {each.name for each in machine.devices} <= written
    assert {f"NUMA node {each.number}" for each in machine.numa} <= written
    assert ("NV18" if build is dgx else "NV4") in written


def test_the_recipe_reads_a_copied_machine(tmp_path: Path) -> None:
    dgx(tmp_path)
    environment = {**os.environ, "RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.ch1.topology", f"root={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=environment, timeout=120,
    )  # fmt: skip
    assert "GPU7    NVIDIA H100 80GB HBM3" in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "metrics.jsonl", "results.jsonl", "results.txt", "topology.png", "topology.svg",
    }  # fmt: skip


def test_a_root_without_a_machine_is_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.ch1.topology", f"root={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: root={tmp_path}: wants a folder that holds sys/devices/system/\n"
