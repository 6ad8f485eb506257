"""The worker asks NVML through nvidia-ml-py: real calls and structures, with a library of our own in NVIDIA's place.

The library is compiled from driver_stub.c. What a real driver answers is in the bundles; this is about how it is asked.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from checks import bundle, passive
from checks.expectations import Expectations
from checks.reading import Problem, Unread
from checks.verdict import Verdict

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build a driver's library with")
SUBJECTS = ("gpu.count", "gpu.recovery", "gpu.ecc", "gpu.remap", "gpu.bus", "gpu.throttle", "gpu.temperature",
            "gpu.processes", "gpu.memory", "nvlink.links", "nvlink.errors", "nvlink.fabric", "pcie.gpu")  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("driver_stub.c")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return folder


def looked(library: Path, monkeypatch: pytest.MonkeyPatch, stub: str = "") -> passive.Looked:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("STUB", stub)
    return passive.look("n1", Expectations(gpus=2, sku="H200"), SUBJECTS)


def test_every_answer_of_a_healthy_driver_is_understood(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = looked(library, monkeypatch)
    assert {one.verdict for one in found.results} == {Verdict.PASS}, found.results
    gpu = found.node.gpus.gpus[0]
    assert (gpu.bus_id, gpu.memory_total, gpu.memory_used) == ("0000:83:00.0", 150754820096, 0)
    assert (gpu.dram_corrected, gpu.sram_corrected, gpu.temperature_margin) == (42, 0, 44)
    assert not isinstance(gpu.remapped, Unread)
    assert (gpu.remapped.correctable, gpu.remapped.uncorrectable) == (1, 2)
    assert isinstance(gpu.mig, Unread)
    assert gpu.mig.problem is Problem.UNSUPPORTED


def test_a_lost_gpu_is_named(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {one.check: one for one in looked(library, monkeypatch, "lost").results}
    assert results["gpu.bus"].verdict is Verdict.FAIL
    assert "GPU 1: GPU is lost" in results["gpu.bus"].read
    assert results["gpu.ecc"].verdict is Verdict.UNKNOWN


def test_a_process_of_somebody_else_is_named(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {one.check: one for one in looked(library, monkeypatch, "busy").results}
    assert results["gpu.processes"].verdict is Verdict.FAIL
    assert "process 1" in results["gpu.processes"].read


def test_a_driver_that_hangs_costs_its_deadline_and_is_unknown(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    found = looked(library, monkeypatch, "hang")
    assert time.monotonic() - began < 30  # without a deadline, for ever
    assert {one.verdict for one in found.results} == {Verdict.UNKNOWN}
    assert isinstance(found.node.host.limits, dict), "the rest of the node was read meanwhile"


def test_the_driver_and_its_bundle_are_judged_alike(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stub in ("", "lost"):
        found = looked(library, monkeypatch, stub)
        file = tmp_path / "driver.json.gz"
        bundle.write(bundle.make("n1", found.expected, found.records), file)
        assert passive.look_at(bundle.read(file), found.expected, SUBJECTS).results == found.results
