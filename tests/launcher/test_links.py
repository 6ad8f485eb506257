"""A bad link between two nodes costs one of them; where none can be spared the run stops and says what to do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from checks.pairs import Blame
from checks.report import json_line
from checks.verdict import CheckResult, Verdict
from launcher import badnodes, preflight, verdicts
from launcher.outcome import Outcome
from launcher.recovery import Past, Possible, decide
from launcher.runs import Run
from launcher.spec import JobSpec
from tests.launcher.conftest import SampleCheckout

NODES = ("n1", "n2", "n3", "n4")
ALREADY = [Past("hardware", False, False)]
LINK = Blame("link", ("n1", "n2"), "0.3 GB/s, expected 9; each passes with another node")
OPEN = Blame("undetermined", ("n1", "n2"), "n1 hung at: all_reduce")


def reports(
    *blames: Blame,
    nodes: tuple[str, ...] = NODES,
    check: str = "net.pairs",
    more: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """What the active tier prints of these nodes, `more` being further checks that fail, by node."""
    found = []
    for node in nodes:
        own = [blame for blame in blames if node in blame.nodes]
        kinds = {one.kind for one in own}
        worst = Verdict.UNKNOWN if kinds - {"once"} else Verdict.WARN if kinds else Verdict.PASS
        results = [CheckResult(check, worst, "; ".join(one.why for one in own), "every pair passes", "")]
        if node in (more or {}):
            results.append(CheckResult((more or {})[node], Verdict.FAIL, "1", "2", ""))
        found.append(json.loads(json_line(node, results, blames={check: blames})))
    return found


def judged(*blames: Blame, nodes: tuple[str, ...] = NODES, **more: Any) -> verdicts.Judged:
    of_reports = {key: more.pop(key) for key in ("check", "more") if key in more}
    return verdicts.judged_of(nodes, reports(*blames, nodes=nodes, **of_reports), **more)


def outcome(*blames: Blame, **more: Any) -> Outcome:
    found = verdicts.outcome_of(judged(*blames, **more), {})
    assert found is not None
    return found


@pytest.mark.parametrize(("blame", "says"), [(LINK, "the link n1 - n2 is bad: 0.3 GB/s"),
                                             (OPEN, "n1 or n2 or what connects them: n1 hung")])  # fmt: skip
def test_one_end_of_a_bad_link_is_left_out_and_the_reason_names_link_measurement_and_next_command(
    blame: Blame, says: str
) -> None:
    found = outcome(blame)
    assert (found.suspects, found.node) == (("n2",), "n2")
    assert found.reason.startswith(f"preflight: {says}")
    assert "leaving out n2 leaves no such pair" in found.reason
    assert "`python -m launcher resume checks.links=go_on` runs over it" in found.reason
    assert "\n" not in found.reason
    assert found.evidence[0].startswith(f"n2: net.pairs link: {says}")


def test_a_spare_or_another_node_takes_its_place_and_else_the_run_stops() -> None:
    found, possible = outcome(LINK), Possible(slurm=True, preflight_failed=True)
    assert decide(found, ALREADY, dataclasses.replace(possible, spare_nodes=1)).action == "restarted"
    queued = decide(found, ALREADY, possible)
    assert (queued.action, queued.exclude) == ("requeued", ("n2",))
    stopped = decide(found, ALREADY, dataclasses.replace(possible, indispensable="n2 cannot be excluded: …"))
    assert (stopped.action, stopped.reason) == ("stopped", "n2 cannot be excluded: …")


def test_a_node_that_is_bad_by_itself_takes_its_links_with_it() -> None:
    found = outcome(LINK, Blame("undetermined", ("n3", "n4"), "slow"), more={"n1": "gpu.ecc"})
    assert found.suspects == ("n1", "n4")
    assert found.reason == "preflight: n1: gpu.ecc fail: 1, expected 2 (and n4)"
    assert [line.split(" ")[:3] for line in found.evidence][:1] == [["n1:", "gpu.ecc", "fail:"]]


def test_a_blame_of_the_node_alone_is_not_taken_for_the_links() -> None:
    found = outcome(LINK, Blame("node", ("n1",), "slow with everybody"))
    assert found.suspects == ("n1",)


def test_a_pair_that_passes_now_does_not_make_a_link_the_nodes_own_fault() -> None:
    found = judged(LINK, Blame("once", ("n1", "n3"), "slow at first"))
    assert (found.findings, found.suspects) == ((), ("n2",))


def test_a_rails_link_is_a_link_too() -> None:
    rail = dataclasses.replace(LINK, rails=("mlx5_3",))
    found = outcome(rail, check="net.rails")
    assert found.suspects == ("n2",)
    assert "the link n1 - n2 (mlx5_3) is bad" in found.reason


def test_a_pair_that_passes_when_it_is_asked_again_lets_the_tasks_start() -> None:
    assert verdicts.outcome_of(judged(Blame("once", ("n1", "n2"), "slow")), {}) is None


def test_who_was_in_a_bad_pair_of_an_earlier_attempt_goes_first() -> None:
    """Of n1 and n2 the second was left out; n1 fails with n3 as well, so it was n1."""
    earlier = [frozenset(("n1", "n2"))]
    two = Blame("undetermined", ("n1", "n3"), "hung")
    found = outcome(two, nodes=("n1", "n3"), earlier=earlier)
    assert found.suspects == ("n1",)


def test_two_pairs_without_a_node_in_common_are_no_nodes_fault() -> None:
    two = Blame("undetermined", ("n3", "n4"), "hung")
    found = outcome(two, nodes=("n3", "n4"), earlier=[frozenset(("n1", "n2"))])
    assert found.suspects == ()
    assert "n1 - n2 did not pass in an earlier attempt either" in found.reason
    decision = decide(found, ALREADY, Possible(slurm=True, preflight_failed=True, spare_nodes=2))
    assert (decision.action, decision.reason.startswith("it is no node's fault")) == ("stopped", True)


def test_where_not_one_pair_passes_nobody_is_left_out() -> None:
    every = [Blame("undetermined", (a, b), "hung") for a in NODES for b in NODES if a < b]
    found = outcome(*every)
    assert found.suspects == ()
    assert "not one of the 4 nodes passes with another" in found.reason
    assert "(and 5 more)" in found.reason


def test_the_profile_may_choose_to_go_on(checkout: SampleCheckout) -> None:
    assert not judged(LINK, OPEN, over_links=True).blocks
    assert judged(LINK, over_links=True, more={"n4": "gpu.ecc"}).suspects == ("n4",)
    spec = checkout.compose("recipe=ch4_fsdp", "cluster=box", "checks.links=go_on")
    assert spec.checks.links == "go_on"
    assert JobSpec.from_json(spec.to_json()) == spec
    assert checkout.compose("recipe=ch4_fsdp", "cluster=box").checks.links == "leave_out"
    assert "checks.links" in checkout.mistake("recipe=ch4_fsdp", "checks.links=ignore")


def test_a_check_that_the_profile_leaves_out_blames_nobody() -> None:
    line = json_line("n1", [CheckResult("fs.write", Verdict.PASS, "", "")], blames={"net.pairs": [LINK]})
    assert json.loads(line)["blames"] == []


def test_one_end_of_a_link_is_on_record_for_an_hour_because_it_may_be_the_other_one(tmp_path: Path) -> None:
    (tmp_path / "ch4_fsdp-abc").mkdir()
    badnodes.note_outcome(Run(tmp_path / "ch4_fsdp-abc"), "c", 1, "n2", outcome(LINK))
    (bad,) = badnodes.everything(tmp_path, "c")
    assert (bad.kind, bad.reason[:40]) == ("unknown", "n2: net.pairs link: the link n1 - n2 is ")


def test_the_pairs_of_earlier_attempts_are_read_from_their_reports(tmp_path: Path) -> None:
    links = [{"check": "net.pairs", **dataclasses.asdict(OPEN)}]
    for number, found in ((1, links), (2, []), (3, links)):
        folder = tmp_path / f"attempt-0{number}"
        folder.mkdir()
        (folder / "preflight.json").write_text(json.dumps({"links": found}))
    assert preflight.pairs_earlier(tmp_path, tmp_path / "attempt-03") == [frozenset(("n1", "n2"))]
