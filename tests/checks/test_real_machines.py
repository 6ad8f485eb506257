"""Evidence that `python -m checks collect` took on real machines: healthy, and read as such by every check.

One, two and four H200s of one host in virtual machines, driver 580.159, 2026-11-21 and (two) 2026-11-22; NVLink between
all pairs, no InfiniBand. Of the kernel log the lines with the kernel's command line were taken out, which `collect`
keeps no more, and of the mounts one that only these machines have.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from checks import bundle, passive
from checks.bundle import Bundle
from checks.evidence import Record
from checks.expectations import Expectations
from checks.verdict import CheckResult, Verdict

FOLDER = Path(__file__).parent / "bundles"
GPUS = {"h200_x1": 1, "h200_x2": 2, "h200_x4": 4}
UNSYNCHRONIZED = "clock.sync"
"""These virtual machines run nothing that keeps their clock right, and the check says so."""


def judged(name: str, changed: dict[str, Record] | None = None) -> dict[str, CheckResult]:
    found = bundle.read(FOLDER / f"{name}.json.gz")
    expected = Expectations(gpus=GPUS[name], sku="H200", fabric="none")
    records = {**found.records, **(changed or {})}
    report = passive.look_at(Bundle(found.node, found.taken, expected, records), expected)
    return {result.check: result for result in report.results}


@pytest.mark.parametrize("name", GPUS)
def test_a_healthy_machine_passes_every_check(name: str) -> None:
    results = judged(name)
    verdicts = {check: result.verdict for check, result in results.items()}
    assert verdicts.pop(UNSYNCHRONIZED) is Verdict.WARN
    assert set(verdicts.values()) == {Verdict.PASS}, verdicts
    assert {
        "gpu.count",
        "gpu.recovery",
        "gpu.ecc",
        "gpu.remap",
        "gpu.xid",
        "gpu.bus",
        "pcie.gpu",
    } <= verdicts.keys()
    assert results["gpu.count"].read == f"{GPUS[name]} × NVIDIA H200"


def test_several_gpus_have_their_links_and_one_alone_misses_none() -> None:
    assert judged("h200_x2")["nvlink.links"].read == "all up on 2 GPUs"
    assert judged("h200_x4")["nvlink.links"].read == "all up on 4 GPUs"
    assert not {"nvlink.links", "nvlink.errors"} & judged("h200_x1").keys()


@pytest.mark.parametrize(
    ("key", "record", "check", "verdict"),
    [
        ("nvml nvmlDeviceGetNvLinkState 2 7", {"value": 0}, "nvlink.links", Verdict.FAIL),
        (
            "nvml_field 1 91 1",
            {"value": [{"problem": "unsupported", "detail": "field 91"}]},
            "nvlink.links",
            Verdict.UNKNOWN,
        ),
    ],
)
def test_one_changed_answer_of_the_real_machine_changes_the_verdict(
    key: str, record: Record, check: str, verdict: Verdict
) -> None:
    changed = {key: record}
    assert changed.keys() <= bundle.read(FOLDER / "h200_x4.json.gz").records.keys()
    assert judged("h200_x4", changed)[check].verdict is verdict
