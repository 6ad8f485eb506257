"""Tier `active`: measure every node of an allocation at once, and where that is not enough find out who it is.

One srun step a round: the whole job first, then pairs (`checks.pairs`) while something is open and time is left. Under
`srun --ntasks-per-node=1 python -m checks --tier active` the first task conducts and the others go home; in an sbatch
or salloc allocation one call does. Without Slurm it measures this machine. Subprocess.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from checks import baselines as tables
from checks import catalog, covering, pairs, perftest, rail_rounds, report
from checks.agent import search_path
from checks.baselines import Baseline
from checks.board import Start, run_round
from checks.expectations import Expectations
from checks.gather import address_of
from checks.hostlist import expanded, folded
from checks.judge_active import job_fabric
from checks.measured import Job, best_burn, measured
from checks.pairs import Outcome, Pair
from checks.reading import Unread, counted
from checks.registry import judge
from checks.verdict import EXIT_CODES, CheckResult, Verdict, worst

BUDGET_SECONDS = 90.0
WHOLE_SHARE = 0.45
"""Of the budget, for the whole job; what it leaves is for the rounds of pairs, in equal parts: who ends early leaves
more to those who come after."""
LEAST_ROUND_SECONDS = 8.0
"""Below that no round is started: srun and torch alone take a few seconds."""
PAIR_LEAST = {"gpu": 0.8, "cpu": 0.2}
"""Share of the median pair, where no baseline says what a pair gives. On CPUs it depends on whatever else runs there:
pairs of a machine with a load of 15 have been seen at 0.37 of their median, and nothing was wrong with them."""
STARTED_LATE = "hung at: start"
"""What an agent says of a rank that has not imported torch and found its device yet."""
CONTEXT = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTER_NAME")
"""What srun may know of the job that it runs in. Everything else (SLURM_CPUS_PER_TASK, SRUN_CPUS_PER_TASK, SLURM_EXACT,
sizes of an outer step) would change the step: it must have all CPUs and GPUs of its nodes."""


@dataclass(frozen=True)
class Found:
    """What the rounds came to."""

    records: Mapping[str, Any]
    job: Job
    history: Sequence[Sequence[Outcome]]
    seconds: float


def nodes_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The nodes to measure: of the step where srun started this process, else of the allocation, else ()."""
    if "SLURM_JOB_ID" not in environment:
        return ()
    step = environment.get("SLURM_STEP_NODELIST") if environment.get("SLURM_STEP_ID", "").isdigit() else None
    return tuple(expanded(step or environment.get("SLURM_JOB_NODELIST", "")))


def under_slurm(options: Sequence[str]) -> Start:
    """Agents as one srun step; `options` are words for srun, such as a container's."""

    def start(nodes: Sequence[str], words: dict[str, Any]) -> list[subprocess.Popen[Any]]:
        command = [
            "srun",
            # Within another step (ours, or a batch script's) the CPUs and GPUs are taken already.
            "--overlap",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            "--cpu-bind=none",
            "--mpi=none",
            "--export=ALL",
            "--input=none",
            "--kill-on-bad-exit=0",
            # srun ends the step when the first task has ended so long ago: the others have their own deadline.
            "--wait=0",
            *options,
            sys.executable,
            "-P",
            "-m",
            "checks.agent",
            json.dumps({**words, "name": ""}),
        ]
        environment = {
            name: text
            for name, text in os.environ.items()
            if name in CONTEXT or not name.startswith(("SLURM_", "SLURMD_", "SRUN_"))
        }
        environment["PYTHONPATH"] = search_path()
        return [subprocess.Popen(command, env=environment, stdout=sys.stderr, stderr=None)]

    return start


def on_this_machine(nodes: Sequence[str], words: dict[str, Any]) -> list[subprocess.Popen[Any]]:
    """An agent for each name, all here."""
    environment = {**os.environ, "PYTHONPATH": search_path()}
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "checks.agent", json.dumps({**words, "name": node})],
            env=environment,
            stdout=sys.stderr,
            start_new_session=True,
        )
        for node in nodes
    ]


def measure(
    nodes: Sequence[str],
    expected: Expectations,
    start: Start,
    *,
    baselines: Sequence[Baseline],
    budget: float = BUDGET_SECONDS,
    address: str,
    root: str = "/",
) -> Found:
    """Every round that is needed, within the budget: the whole job, its rails, then pairs."""
    began = time.monotonic()

    def left() -> float:
        return budget - (time.monotonic() - began)

    def a_round(groups: Sequence[Sequence[str]], kind: str, seconds: float) -> dict[str, Any]:
        words = {"gpus": expected.gpus, "fabric": expected.fabric, "root": root}
        return run_round(groups, kind, min(seconds, left()), start, words=words, address=address)

    records = a_round([nodes], "whole", budget * WHOLE_SHARE)
    if any(started_late(record) for record in records.values()) and left() > LEAST_ROUND_SECONDS:
        records = a_round([nodes], "whole", left() * WHOLE_SHARE)
    job = Job(nodes=len(nodes), best_burn=best_burn(list(records.values())), baselines=tuple(baselines))
    results = judged(nodes, records, job, expected)
    job = replace(job, expects_pairs=len(nodes) > 1 and needs_pairs(results, records, job, expected))
    if rail_rounds.are_measured(nodes, records, expected):
        found = rail_rounds.measured(
            nodes, records, a_round, left,
            baseline=base.floor if (base := job_baseline(perftest.TOOL, records, job, expected)) else None,
            least_seconds=LEAST_ROUND_SECONDS,
        )  # fmt: skip
        records = {node: {**records[node], "rails": found.records[node]} for node in records}
        job = replace(job, expects_rails=True, rail_blames=found.blames)
    history: list[list[Outcome]] = []
    while job.expects_pairs and left() > LEAST_ROUND_SECONDS:
        wanted = pairs.next_round(nodes, history)
        if not wanted:
            break
        seconds = left() / (pairs.MOST_ROUNDS - len(history))
        answers = a_round([(pair.a, pair.b) for pair in wanted], "pair", seconds)
        late = [pair for pair in wanted if any(started_late(answers.get(node)) for node in (pair.a, pair.b))]
        if late and left() > LEAST_ROUND_SECONDS:
            # Longer than before: what is left for others is of no use to a machine that does not even start.
            answers |= a_round([(pair.a, pair.b) for pair in late], "pair", 1.5 * seconds)
        figures = {pair: pair_figure(pair, answers) for pair in wanted}
        on_gpus = any(record.get("gpus") for record in answers.values())
        history.append(_outcomes(figures, history, floor=None, share=PAIR_LEAST["gpu" if on_gpus else "cpu"]))
    job = replace(job, paired=len(history), blames=tuple(pairs.blamed(nodes, history)))
    return Found(records, job, history, time.monotonic() - began)


def _outcomes(
    figures: Mapping[Pair, float | str],
    history: Sequence[Sequence[Outcome]],
    *,
    floor: float | None,
    share: float,
) -> list[Outcome]:
    """A later round has few pairs, all suspect: its median would be theirs, so the first round's pairs count too."""
    least = floor
    if least is None and history:
        before = sorted(
            one.figure for each in history for one in each if one.passed and one.figure is not None
        )
        least = share * before[len(before) // 2] if before else None
    return pairs.relative_outcomes(figures, floor=least, share=share)


def judged(
    nodes: Sequence[str],
    records: Mapping[str, Any],
    job: Job,
    expected: Expectations,
    checks: Sequence[str] = (),
) -> dict[str, list[CheckResult]]:
    chosen = catalog.named(checks, "active")
    left_out = {one.name for one in catalog.named(expected.without, None)} if expected.without else set()
    chosen = [one for one in chosen if one.name not in left_out]
    return {node: judge(measured(node, records.get(node), job), expected, chosen) for node in nodes}


def needs_pairs(
    results: Mapping[str, Sequence[CheckResult]], records: Mapping[str, Any], job: Job, expected: Expectations
) -> bool:
    """Whether the whole-job measurement fell short or hung, or nothing says what it should have been."""
    short = any(
        one.check.startswith("net.") and one.verdict.blocks for found in results.values() for one in found
    )
    known = job_baseline("all_reduce", records, job, expected)
    return short or known is None


def job_baseline(what: str, records: Mapping[str, Any], job: Job, expected: Expectations) -> Baseline | None:
    """What the whole job should give, by the first node that said which GPUs it has."""
    said = [measured(node, record, job) for node, record in records.items()]
    one = next((node for node in said if node.device), None)
    ranks = len(one.ranks) if one is not None and not isinstance(one.ranks, Unread) else 0
    return tables.find(
        job.baselines, what, gpu=one.device if one else "", fabric=job_fabric(job.nodes, expected),
        nodes=job.nodes, ranks=ranks, payload=1 << 60,
    )  # fmt: skip


def started_late(record: Mapping[str, Any] | None) -> bool:
    """Whether a rank of this node had not even started when its time was over. So is a node without a CPU to spare,
    which says nothing of its network: it is asked once more, and then believed."""
    ranks = (record or {}).get("ranks", [])
    return any(rank.get("trouble") == STARTED_LATE for rank in ranks)


def pair_figure(pair: Pair, answers: Mapping[str, Any]) -> float | str:
    """GB/s of a pair, or why there is none: who did not answer, or where its ranks stopped."""
    silent = [node for node in (pair.a, pair.b) if node not in answers]
    if silent:
        return f"{' and '.join(silent)} never answered"
    ranks = [(node, rank) for node in (pair.a, pair.b) for rank in answers[node].get("ranks", [])]
    # Figures of both ends are the same: the slowest rank's time.
    troubles = [f"{node} {rank['trouble']}" for node, rank in ranks if rank.get("trouble")]
    values = [rank.get("pair") for _, rank in ranks]
    if troubles or not values or not all(isinstance(one, float) for one in values):
        return "; ".join(troubles[:2]) or "no figure"
    return float(min(one for one in values if isinstance(one, float)))


def check_actively(
    expected: Expectations,
    checks: Sequence[str],
    *,
    name: str,
    baselines: Sequence[Baseline],
    budget: float,
    srun_options: Sequence[str],
    root: str,
    as_json: bool,
    width: int,
) -> int:
    """The whole of `python -m checks --tier active`, and its exit status."""
    if conducts_elsewhere(os.environ):
        return 0
    nodes, found = measure_here(
        expected, name=name, baselines=baselines, budget=budget, srun_options=srun_options, root=root
    )
    results = judged(nodes, found.records, found.job, expected, checks)
    if as_json:
        for node, one in results.items():
            blames = {"net.pairs": found.job.blames, "net.rails": found.job.rail_blames}
            print(report.json_line(node, one, blames=blames))
    elif len(nodes) == 1:
        print(report.table(results[nodes[0]], width=width))
        print(report.summary(results[nodes[0]], nodes[0], found.seconds))
    else:
        print(passes(results))
        print(report.folded_table(results, width=width))
        print(conclusion(results, found))
    return EXIT_CODES[worst(one.verdict for each in results.values() for one in each)]


def measure_here(
    expected: Expectations,
    *,
    name: str,
    baselines: Sequence[Baseline],
    budget: float,
    srun_options: Sequence[str],
    root: str = "/",
) -> tuple[tuple[str, ...], Found]:
    """The allocation that this process is in, or this machine. `root` holds the sys and proc of the nodes."""
    nodes = nodes_of(os.environ)
    if nodes:
        start, address = (
            under_slurm(srun_options),
            address_of(os.environ.get("SLURMD_NODENAME") or socket.gethostname()),
        )
    else:
        nodes, start, address = (name,), on_this_machine, "localhost"
    found = measure(nodes, expected, start, baselines=baselines, budget=budget, address=address, root=root)
    return nodes, found


def conducts_elsewhere(environment: Mapping[str, str]) -> bool:
    """Whether another task of the same step conducts: the step's first."""
    return environment.get("SLURM_STEP_ID", "").isdigit() and environment.get("SLURM_PROCID", "0") != "0"


def passes(results: Mapping[str, Sequence[CheckResult]]) -> str:
    """What was measured where every node passes, a line each: figures are worth seeing."""
    shown: dict[str, dict[str, list[str]]] = {}
    for node, found in results.items():
        for one in found:
            if one.verdict is Verdict.PASS:
                shown.setdefault(one.check, {}).setdefault(one.read, []).append(node)
    lines = []
    for check, readings in shown.items():
        read, nodes = max(readings.items(), key=lambda one: len(one[1]))
        count = f" (of {counted(len(readings), 'different reading')})" if len(readings) > 1 else ""
        lines.append(f"{check}: pass: {folded(nodes)}: {read}{count}")
    return "\n".join(lines)


def conclusion(results: Mapping[str, Sequence[CheckResult]], found: Found) -> str:
    """The whole verdict, and only the nodes that something names: in a job that hangs every node has a failure."""
    whole = worst(one.verdict for each in results.values() for one in each)
    named = list(found.job.culprits)
    named += [
        node
        for node, each in results.items()
        if any(r.verdict is Verdict.FAIL and not r.check.startswith("net.") for r in each)
    ]
    took = f"{found.seconds:.1f} s, {counted(found.job.paired, 'round')} of pairs"
    lines = [f"{whole.value}: {counted(len(results), 'node')} ({folded(results)}) in {took}"]
    lines += map(str, (*found.job.rail_blames, *found.job.blames))
    links = found.job.bad_links
    if covering.nobody_passes([*results], links):
        lines.append(
            "no node passes with any other: look at what they have in common, the network and its settings"
        )
        links = ()
    ends = covering.cover([*results], [one.nodes for one in links], out=named)
    if named or ends:
        lines.append(f"leave out: sbatch --exclude={folded(dict.fromkeys((*named, *ends)))}")
    if ends:
        lines.append(f"of {folded(ends)} it is not known that they are bad: one end of each link has to go")
    return "\n".join(lines)
