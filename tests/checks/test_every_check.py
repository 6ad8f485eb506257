"""Every check can fire: healthy, faulty, missing, not permitted, timed out; one changed value changes its verdict."""

from __future__ import annotations

import ast
import fnmatch
import re
from dataclasses import replace
from pathlib import Path

import pytest

from checks import catalog
from checks.collect import collect_node
from checks.evidence import Record, Recorded
from checks.expectations import Expectations
from checks.registry import CHECKS, Check, judge
from checks.verdict import CheckResult, Verdict
from tests.checks.case import Case, Fault
from tests.checks.case_devices import DEVICES
from tests.checks.case_others import OTHERS, rails
from tests.checks.nodes import healthy, problem, value, with_answers

CASES = {**DEVICES, **OTHERS}
PASSIVE = [check.name for check in catalog.named((), "passive")]
ONE_OF_MANY = re.compile(
    r"(?<![\w.:=])1 (?:(?!of\b)\w+ ){0,2}(?:GPUs|answers|bridges|changes|devices|domains|errors|files|folders|inodes"
    r"|interfaces|links|names|nodes|pairs|ports|rails|rounds|rows|times|variables)\b"
)
"""`1 GPUs`: what a check reads is a sentence for people."""
FAULTS = [(name, fault) for name, case in CASES.items() for fault in case.faults]


def judged(name: str, records: dict[str, Record], expected: Expectations) -> CheckResult:
    """One check's one result, through the collectors of production."""
    node = collect_node(Recorded(records), "node1", expected)
    (result,) = judge(node, expected, [CHECKS[name]])
    for text in (result.read, result.expected, result.remedy):
        assert not ONE_OF_MANY.search(text), f"{name}: {text}"
    return result


def evidence(case: Case) -> dict[str, Record]:
    records = healthy(case.fabric)
    return {**records, **{f"resolve {peer}": value(["10.0.0.2"]) for peer in case.expectations().peers}}


def needed(check: Check, records: dict[str, Record]) -> list[str]:
    """The keys of everything that the check says it reads, both samples."""
    return [
        key
        for key in records
        if any(fnmatch.fnmatchcase(key.partition(" @")[0], pattern) for pattern in check.reads)
    ]


def test_every_check_has_its_cases() -> None:
    assert set(PASSIVE) == set(CASES)
    assert [
        name
        for name, case in CASES.items()
        if not any(fault.verdict is not Verdict.PASS for fault in case.faults)
    ] == []


@pytest.mark.parametrize("name", PASSIVE)
def test_a_check_says_where_its_threshold_comes_from(name: str) -> None:
    assert CHECKS[name].source
    assert CHECKS[name].summary.endswith(".")


@pytest.mark.parametrize("name", PASSIVE)
def test_a_healthy_node_passes(name: str) -> None:
    case = CASES[name]
    result = judged(name, evidence(case), case.expectations())
    assert (result.verdict, result.check) == (Verdict.PASS, name), result


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{name}-{fault.says}" for name, fault in FAULTS])
def test_one_changed_answer_changes_the_verdict(name: str, fault: Fault) -> None:
    case = CASES[name]
    result = judged(name, with_answers(evidence(case), fault.answers), case.expectations())
    assert result.verdict is fault.verdict, result
    assert fault.says in f"{result.read} {result.remedy}"
    assert result.remedy, "who reads a finding wants to know what to do"


@pytest.mark.parametrize("what", ["missing", "not permitted", "timed out"])
@pytest.mark.parametrize("name", PASSIVE)
def test_a_check_that_cannot_look_does_not_pass(name: str, what: str) -> None:
    case = CASES[name]
    records = evidence(case)
    keys = needed(CHECKS[name], records)
    assert keys, f"{CHECKS[name].reads} name no evidence"
    result = judged(name, {**records, **dict.fromkeys(keys, problem(what))}, case.expectations())
    wanted = {"missing": case.missing, "not permitted": case.denied, "timed out": case.timed_out}[what]
    assert result.verdict is wanted, result


@pytest.mark.parametrize("name", PASSIVE)
@pytest.mark.parametrize("answer", [None, True, -1, "", "[N/A]", "\udcff\udcfe", {"x": 1}, [[]], 1e300])
def test_an_answer_that_makes_no_sense_is_no_traceback(name: str, answer: object) -> None:
    """Any answer of any form in place of each that the check needs: a verdict, whatever it is."""
    case = CASES[name]
    records = evidence(case)
    broken = {**records, **dict.fromkeys(needed(CHECKS[name], records), value(answer))}
    expected = case.expectations()
    node = collect_node(Recorded(broken), "node1", expected)
    results = judge(node, expected, [CHECKS[name]])
    any_text_is_a_log = "run dmesg" in CHECKS[name].reads and isinstance(answer, str)
    if answer in NONSENSE and not any_text_is_a_log:
        assert [result for result in results if result.verdict is Verdict.PASS] == []


NONSENSE = (None, "[N/A]", "\udcff\udcfe", {"x": 1}, [[]])
"""No value of anything; the others may be one by chance, as -1 is a temperature."""


def test_a_bundle_without_anything_passes_nothing() -> None:
    expected = Expectations(gpus=2, fabric="infiniband", master="n1:1")
    node = collect_node(Recorded({}), "node1", expected)
    results = judge(node, expected, catalog.named((), "passive"))
    assert [result for result in results if result.verdict is Verdict.PASS] == []


def test_what_the_profile_says_is_not_there_is_not_missed() -> None:
    expected = Expectations(gpus=0, fabric="tcp")
    node = collect_node(Recorded(healthy()), "node1", expected)
    subjects = {
        result.check.partition(".")[0] for result in judge(node, expected, catalog.named((), "passive"))
    }
    assert subjects & {"gpu", "nvlink", "pcie", "gdr", "roce", "efa"} == set()


def test_a_resolver_that_hangs_is_asked_once() -> None:
    """Four names of neighbours at two seconds each would be more than the preflight may take."""
    expected = Expectations(peers=("n2", "n3", "n4"))
    records = {**healthy(), "resolve n2": problem("timed out")}
    result = judged("names.resolve", records, expected)
    assert (result.verdict, result.read) == (Verdict.WARN, "no neighbour resolves")


def test_a_tool_that_would_show_this_user_nothing_is_not_missed() -> None:
    case = CASES["pcie.acs"]
    records = {**evidence(case), "run lspci -vvv": problem("missing"), "user": value(1000)}
    assert judged("pcie.acs", records, case.expectations()).verdict is Verdict.NOT_PERMITTED


def test_other_ports_do_not_stand_in_for_a_rail_that_is_gone() -> None:
    """A node has ports for storage, as fast as its rails: with one rail less it still has as many active ports."""
    case = CASES["rdma.port"]
    wanted = replace(case.expectations(), rails=2)
    assert judged("rdma.port", evidence(case), wanted).verdict is Verdict.PASS
    fewer = with_answers(evidence(case), rails("=mlx5_0,mlx5_7"))
    result = judged("rdma.port", fewer, wanted)
    assert (result.verdict, result.read) == (Verdict.FAIL, "1 of 2 rails active")


def test_what_only_root_may_read_blocks_where_the_profile_demands_it() -> None:
    case = CASES["pcie.acs"]
    records = {**evidence(case), "run lspci -vvv": problem("not permitted")}
    assert not judged("pcie.acs", records, case.expectations()).verdict.blocks
    demanding = Expectations(gpus=2, fabric="infiniband", demand_permission=True)
    assert judged("pcie.acs", records, demanding).verdict is Verdict.UNKNOWN


def test_what_to_do_names_checks_that_there_are() -> None:
    """`see net.pairs`: who looks for it in `python -m checks list` has to find it."""
    subjects = "|".join(sorted({check.subject for check in CHECKS.values()} - {"same", "clock"}))
    named = {
        word
        for file in (Path(catalog.__file__).parent).glob("judge_*.py")
        for text in strings_of(file)
        for word in re.findall(rf"(?<![\w./])(?:{subjects})\.[a-z_]+\b(?![./:=])", text)
    }
    assert {"gpu.remap", "net.pairs", "nvlink.links"} <= named
    assert named - set(CHECKS) == set()


def strings_of(file: Path) -> list[str]:
    """Every literal in it, docstrings and the parts of formatted ones too."""
    return [
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
