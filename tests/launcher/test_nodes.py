"""What the preflight's findings mean for a run, and which nodes later jobs stay away from."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import __main__ as cli
from launcher import badnodes, preflight, verdicts
from launcher.badnodes import BadNode
from launcher.outcome import Outcome
from launcher.recovery import Past, Possible, decide
from launcher.runs import Run
from launcher.spec import Expected, JobSpec
from launcher.verdicts import Finding, Judged
from tests.launcher.conftest import SampleCheckout

JOB = JobSpec("ch4_fsdp", "recipes.ch4.fsdp", {}, "slurm", "slurm", 2, 8, 8, 8, 60)
ALREADY = [Past("hardware", False, False)]


def judged(*findings: str, nodes: tuple[str, ...] = ("n1", "n2", "n3")) -> Judged:
    """Findings as `node check verdict`."""
    each = (Finding(*text.split(), read="1", expected="2", remedy="") for text in findings)  # type: ignore[misc]
    return Judged(nodes, tuple(each))


def outcome(*findings: str, earlier: dict[str, str] | None = None, **more: Any) -> Outcome:
    found = verdicts.outcome_of(judged(*findings, **more), earlier or {})
    assert found is not None
    return found


# --- who is to blame --------------------------------------------------------------------------------------


def test_nothing_found_lets_the_tasks_start() -> None:
    assert verdicts.outcome_of(judged(), {}) is None


def test_every_node_with_a_finding_is_left_behind_whether_it_failed_or_could_not_look() -> None:
    found = outcome("n3 fs.write unknown", "n1 gpu.ecc fail", "n3 gpu.ecc fail")
    assert found.suspects == ("n1", "n3")
    assert found.reason == "preflight: n1: gpu.ecc fail: 1, expected 2 (and n3)"
    assert outcome("n2 fs.write unknown").suspects == ("n2",)


def test_what_blocks_on_every_node_is_no_nodes_fault() -> None:
    found = outcome(*(f"{node} rdma.devices unknown" for node in ("n1", "n2", "n3")), "n2 gpu.ecc fail")
    assert (found.node, found.suspects) == ("", ())
    assert found.reason.startswith("preflight: on all 3 nodes: rdma.devices unknown: 1, expected 2")
    decision = decide(found, ALREADY, Possible(slurm=True, preflight_failed=True, spare_nodes=3))
    assert (decision.action, decision.exclude) == ("stopped", ())


def test_a_vote_that_nobody_won_blames_nobody_and_hides_no_fault() -> None:
    tie = ("n1 same.driver unknown", "n2 same.driver unknown")
    assert outcome(*tie, nodes=("n1", "n2")).suspects == ()
    assert "there is no majority: n1 1, n2 1" in outcome(*tie, nodes=("n1", "n2")).reason
    assert outcome(*tie, "n3 gpu.ecc fail").suspects == ("n3",)


def test_a_job_of_one_node_asks_its_own_past() -> None:
    alone = {"nodes": ("n1",)}
    assert outcome("n1 gpu.ecc fail", **alone).suspects == ("n1",)
    assert outcome("n1 gpu.ecc fail", earlier={"gpu.ecc": "n1"}, **alone).suspects == ("n1",)
    again = outcome("n1 gpu.ecc fail", earlier={"gpu.ecc": "n2"}, **alone)
    assert (again.suspects, "n2 failed it before" in again.reason) == ((), True)


def test_a_node_on_which_no_task_starts_has_failed() -> None:
    finding = Finding("n2", "report", "unknown", "srun: error: Task launch failed on node n2", "a report", "")
    found = verdicts.outcome_of(Judged(("n1", "n2"), (finding,)), {})
    assert found is not None
    assert (found.cause, found.node) == ("node_failure", "n2")


# --- what comes next --------------------------------------------------------------------------------------


def test_spares_take_the_places_of_all_suspects_or_of_none() -> None:
    found = outcome("n1 gpu.ecc fail", "n2 gpu.ecc fail")
    possible = Possible(slurm=True, preflight_failed=True)
    enough = decide(found, ALREADY, dataclasses.replace(possible, spare_nodes=2))
    assert (enough.action, enough.exclude) == ("restarted", ("n1", "n2"))
    assert decide(found, ALREADY, dataclasses.replace(possible, spare_nodes=1)).action == "requeued"
    needed = dataclasses.replace(possible, indispensable="n1 cannot be excluded: …")
    stopped = decide(found, ALREADY, needed)
    assert (stopped.action, stopped.reason) == ("stopped", "n1 cannot be excluded: …")


def test_without_slurm_there_is_no_other_node() -> None:
    found = outcome("vm gpu.ecc fail", nodes=("vm",))
    assert decide(found, ALREADY, Possible(slurm=False, preflight_failed=True)).action == "stopped"


# --- asking the nodes -------------------------------------------------------------------------------------


def test_reports_whose_pieces_srun_mixed_are_put_together_again() -> None:
    def report(node: str) -> str:
        return json.dumps({"node": node, "checks": [], "traits": {"driver": "5: 3" * 50}})

    first, second = report("n1"), report("n2")
    mixed = [f" 0: {first[:99]}", f"11: {second[:50]}", " 0: " + first[99:], "11: " + second[50:], "2: noise"]
    found = preflight.reports_in("\n".join(mixed) + "\n", labelled=True)
    assert found == [json.loads(first), json.loads(second)]
    assert preflight.reports_in(f"hello\n{first}\n", labelled=False) == [json.loads(first)]
    assert preflight.reports_in(f"0: {first[:80]}\n", labelled=True) == []
    both = "\n".join(f"0: {line}" for line in (first, first))
    assert preflight.reports_in(both + "\n", labelled=True) == [json.loads(first)] * 2, (
        "one task may report for all"
    )


def test_the_nodes_are_held_against_what_job_and_profile_say() -> None:
    spec = dataclasses.replace(
        JOB,
        fabric="mine",
        fabric_kind="infiniband",
        sbatch={"exclusive": ""},
        checks=Expected("H100", 8, ("pcie.acs",)),
    )
    assert preflight.expectations(spec) == [
        "--gpus=8", "--fabric=infiniband", "--sku=H100", "--rails=8", "--without=pcie.acs",
    ]  # fmt: skip
    assert preflight.expectations(dataclasses.replace(JOB, fabric_kind="auto")) == ["--gpus=8", "--shared"]
    for kind, word in (("loopback", "none"), ("tcpxo", "tcpx"), ("tcpx", "tcpx"), ("efa", "efa")):
        assert f"--fabric={word}" in preflight.expectations(dataclasses.replace(JOB, fabric_kind=kind))


@pytest.mark.parametrize(
    ("cluster", "fabric", "sku", "rails"),
    [
        ("aws-p5", "efa", "H100 80GB", 32), ("aws-p5en", "efa", "H200", 16), ("oci-h100", "roce", "H100 80GB", 16),
        ("azure-ndv5", "infiniband", "H100 80GB", 8), ("dgx-h100", "infiniband", "H100 80GB", 8),
        ("gcp-a3mega", "tcpx", "H100 80GB", None),
    ],
)  # fmt: skip
def test_a_providers_profile_says_what_its_nodes_are(
    checkout: SampleCheckout, cluster: str, fabric: str, sku: str, rails: int | None
) -> None:
    spec = checkout.compose("recipe=ch4_fsdp", f"cluster={cluster}")
    words = [f"--fabric={fabric}", f"--sku={sku}", *([] if rails is None else [f"--rails={rails}"])]
    assert spec.preflight == "passive"
    assert set(words) <= set(preflight.expectations(spec))
    assert any(word.startswith("--rails") for word in preflight.expectations(spec)) == (rails is not None)
    # A list of rails in the profile is as long as the number that it promises.
    if names := spec.environment.get("NCCL_IB_HCA"):
        assert len(names.split(",")) == rails


def test_a_profile_names_checks_that_exist(checkout: SampleCheckout) -> None:
    spec = checkout.compose(
        "recipe=ch4_fsdp", "cluster=box", "checks.without=pcie.acs,rdma", "checks.rails=2"
    )
    assert spec.checks == Expected(None, 2, ("pcie.acs", "rdma"))
    assert JobSpec.from_json(spec.to_json()) == spec
    mistake = checkout.mistake("recipe=ch4_fsdp", "checks.without=pcie.asc")
    assert "checks.without: no check 'pcie.asc': did you mean pcie.acs?" in mistake


def test_the_default_tier_is_the_profiles(checkout: SampleCheckout) -> None:
    tiers = {
        cluster: checkout.compose("recipe=ch4_fsdp", f"cluster={cluster}").preflight
        for cluster in ("slurm", "box", "local")
    }
    assert tiers == {"slurm": "passive", "box": "minimal", "local": "minimal"}


# --- the record of bad nodes ------------------------------------------------------------------------------


def on_record(
    root: Path, node: str, kind: str = "fail", *, cluster: str = "c", run: str = "ch4_fsdp-abc"
) -> None:
    found = {
        "fail": Outcome("hardware", "…", node, evidence=(f"{node}: gpu.ecc fail: 1",), suspects=(node,)),
        "unknown": Outcome("hardware", "…", node, evidence=(f"{node}: fs.write unknown: 1",), suspects=(node,)),
        "hardware": Outcome("hardware", "Xid 79", node=node),
        "node_failure": Outcome("node_failure", f"node {node} failed", node=node),
    }[kind]  # fmt: skip
    folder = root / run
    folder.mkdir(parents=True, exist_ok=True)
    badnodes.note_outcome(Run(folder), cluster, 1, node, found)


@pytest.mark.parametrize("kind", list(badnodes.HOURS))
def test_each_kind_ends_in_its_own_time(tmp_path: Path, kind: str) -> None:
    on_record(tmp_path, "n7", kind)
    (bad,) = badnodes.everything(tmp_path, "c")
    assert (bad.kind, bad.run, bad.attempt) == (kind, "abc", 1)
    assert bad.until - bad.time == badnodes.HOURS[kind] * 3600
    assert badnodes.current([bad], bad.until - 1) == [bad]
    assert badnodes.current([bad], bad.until) == []


def test_what_lasts_longest_counts_and_clearing_ends_all_until_something_new_is_found(tmp_path: Path) -> None:
    for kind in ("unknown", "fail", "node_failure"):
        on_record(tmp_path, "n7", kind)
    assert [bad.kind for bad in badnodes.current(badnodes.everything(tmp_path, "c"), time.time())] == ["fail"]
    badnodes.clear(tmp_path, "c", ["n7"])
    assert badnodes.everything(tmp_path, "c") == []
    on_record(tmp_path, "n7", "hardware")
    assert [bad.kind for bad in badnodes.everything(tmp_path, "c")] == ["hardware"]


def _write_many(root: Path, number: int) -> None:
    for _ in range(20):
        on_record(root, f"n{number}", run=f"ch4_fsdp-run{number}")


def test_writers_at_the_same_time_lose_nothing_and_share_no_file(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_many, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(badnodes.everything(tmp_path, "c")) == 80
    assert len(list((tmp_path / ".nodes" / "c").iterdir())) == 4


def bad(node: str, when: float = 1.0) -> BadNode:
    return BadNode(node, when, 1e12, "fail", f"{node} is broken")


def test_a_new_job_leaves_out_as_many_as_its_partition_can_do_without() -> None:
    found = [bad("n1", 1.0), bad("n2", 2.0), bad("n9", 3.0)]
    left = badnodes.choose(JOB, found, {"main": ("n1", "n2", "n3")})
    assert left.nodes == ("n2",)  # the newest; n9 is not in the partition
    assert left.lines[0] == f"leaving out n2 until {bad('n2').ends}, because n2 is broken"
    assert left.lines[1].startswith("n1 cannot be excluded: the job needs 2 nodes, and partition main")
    spares = dataclasses.replace(JOB, spares=1)
    assert badnodes.choose(spares, found, {"main": ("n1", "n2", "n3")}).nodes == ()
    users = dataclasses.replace(JOB, exclude=("n[1,4]",))
    assert badnodes.choose(users, found, {"main": ("n1", "n2", "n3", "n4", "n5")}).nodes == ("n[1,4]", "n2")
    asked = dataclasses.replace(JOB, sbatch={"nodelist": "n[1-2]"})
    chosen = badnodes.choose(asked, found, {"main": ("n1", "n2", "n3", "n4")})
    assert (chosen.nodes, len(chosen.lines)) == ((), 2)


def test_a_job_that_got_nodes_on_record_leaves_idle_as_many_as_it_has_spares() -> None:
    found = [bad("n1", 1.0), bad("n2", 2.0), bad("n9", 3.0)]
    nodes = ("n1", "n2", "n3", "n4")
    one = badnodes.in_a_job(found, nodes, 1)
    assert one.nodes == ("n2",)  # the newest; n9 is not the job's
    assert (
        one.lines[0]
        == f"leaving out n2 until {bad('n2').ends}: a spare takes its place, because n2 is broken"
    )
    assert one.lines[1].startswith(f"n1 is on record as bad until {bad('n1').ends}, and the job has no spare")
    assert "sbatch --exclude=n1, or one node more and spares=1" in one.lines[1]
    assert badnodes.in_a_job(found, nodes, 2).nodes == ("n2", "n1")
    assert badnodes.in_a_job(found, nodes, 0).nodes == ()
    assert badnodes.in_a_job(found[2:], nodes, 3) == badnodes.LeftOut((), ())


def test_the_partitions_of_a_job_are_those_it_names_or_the_default() -> None:
    sinfo = "n1|main*\nn2|main*\nn2|high\nn3|high\n"
    assert badnodes.partitions(sinfo, None) == {"main": ("n1", "n2")}
    assert badnodes.partitions(sinfo, "high,main") == {"main": ("n1", "n2"), "high": ("n2", "n3")}


def test_nodes_shows_explains_and_clears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCHER_RUNS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("launcher.commands.nodes.known_run_roots", lambda: [tmp_path])
    assert cli.main(["nodes"]) == 0
    assert "no node is left out" in capsys.readouterr().out
    on_record(tmp_path, "n7")
    on_record(tmp_path, "n8", "node_failure")
    assert cli.main(["nodes"]) == 0
    shown = capsys.readouterr().out
    assert "n7: gpu.ecc fail: 1" in shown
    assert "node n8 failed" in shown
    assert cli.main(["nodes", "n7"]) == 0
    explained = capsys.readouterr().out
    assert f"abc, attempt 1: {tmp_path / 'ch4_fsdp-abc'}" in explained
    assert "n8" not in explained
    assert cli.main(["nodes", "--clear"]) == 2
    assert cli.main(["nodes", "n1"]) == 2
    assert "n1 is not on record: " in capsys.readouterr().err
    assert cli.main(["nodes", "--clear", "n[7-8]"]) == 0
    assert cli.main(["nodes", "--json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "[]"
