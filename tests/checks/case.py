"""What a case is: the healthy node of a check, what makes it fail or warn, what it says where it cannot look.

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
from tests.checks.nodes import KERNEL_LOG, value

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
