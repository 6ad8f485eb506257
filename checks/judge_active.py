"""The checks of tier `active`: measurements against the job's best, or against a baseline. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from checks import baselines, perftest
from checks.baselines import Baseline
from checks.expectations import Expectations
from checks.findings import Finding, blind, fail, result, warn
from checks.measured import Measured, Rank
from checks.pairs import Blame
from checks.rails import LEAST, Figure, Rail, floor_of
from checks.reading import Problem, Unread, counted
from checks.registry import check
from checks.verdict import CheckResult, Verdict

BURN_LEAST = {"gpu": 0.9, "cpu": 0.5}
"""Share of the job's best. CPUs differ with whatever else runs on them: there it only warns."""
NOTHING = Unread(Problem.MISSING, "not measured")
RDMA = {"infiniband": "NET/IB", "roce": "NET/IB"}
BASELINES = "checks/baselines.json, each figure with its source"
RECORD = "python -m checks baseline records this cluster's own figures"


@check(
    "burn.product",
    reads=["measure burn"],
    source="superbenchmark and gcm: within 10% of the best GPU",
    tier="active",
)
def product(node: Measured, expected: Expectations) -> list[CheckResult]:
    """Matrix product on every GPU (bf16), or on the node's CPUs (float32), against the best of the job."""
    name = "burn.product"
    if isinstance(node.ranks, Unread):
        return result(name, [blind(node.ranks)], "", "a figure for every rank")
    kind = "gpu" if node.gpus else "cpu"
    unit = "TFLOP/s bf16" if node.gpus else "TFLOP/s float32 on the CPU"
    least = BURN_LEAST[kind] * node.job.best_burn
    findings: list[Finding] = []
    figures: list[float] = []
    for place, rank in enumerate(node.ranks):
        if isinstance(rank.burn, Unread):
            findings.append(blind(rank.burn, f"{kind} {place}"))
            continue
        figures.append(rank.burn)
        base = _baseline(node, expected, "burn") if node.gpus else None
        if rank.burn < max(least, base.floor if base else 0.0) or rank.burn <= 0:
            text = f"{kind} {place}: {rank.burn:.3g} {unit}, the job's best has {node.job.best_burn:.3g}"
            judge = fail if node.gpus else warn
            findings.append(judge(text, "clocks, heat, power, another process: leave this node out"))
    return result(name, findings, f"{_range(figures)} {unit}", f"{BURN_LEAST[kind]:.0%} of the job's best")


@check("copy.device", reads=["measure copy"], source=BASELINES, tier="active")
def device_copy(node: Measured, expected: Expectations) -> list[CheckResult]:
    """A copy within the device's memory."""
    return _local("copy.device", node, expected, lambda rank: {"copy": rank.copy})


@check("copy.host", reads=["measure host"], source=BASELINES, tier="active")
def host_copy(node: Measured, expected: Expectations) -> list[CheckResult]:
    """Copies between pinned host memory and each GPU, both ways."""
    if not isinstance(node.ranks, Unread) and not node.gpus:
        return []
    return _local("copy.host", node, expected, lambda rank: rank.host)


@check("nvlink.pairs", reads=["measure peers"], source=BASELINES, tier="active")
def peers(node: Measured, expected: Expectations) -> list[CheckResult]:
    """Copies between every two GPUs of the node, against the best pair of the node."""
    name = "nvlink.pairs"
    if isinstance(node.ranks, Unread):
        return result(name, [blind(node.ranks)], "", "a figure for every pair")
    if node.gpus < 2:
        return []
    pairs = node.ranks[0].peers
    if isinstance(pairs, Unread):
        return result(name, [blind(pairs)], "", "a figure for every pair")
    figures = [one for one in pairs.values() if isinstance(one, float)]
    top = max(figures, default=0.0)
    findings = [blind(one, pair) for pair, one in pairs.items() if isinstance(one, Unread)]
    wanted = node.gpus * (node.gpus - 1)
    if len(pairs) < wanted:
        findings.append(
            fail(f"{len(pairs)} of {counted(wanted, 'pair')} measured", "look at nvidia-smi topo -m")
        )
    findings += [
        fail(f"GPU {pair}: {one:.3g} GB/s, the best pair has {top:.3g}", "see nvlink.links and nvlink.fabric")
        for pair, one in pairs.items()
        if isinstance(one, float) and one < 0.8 * top
    ]
    if not top and not findings:
        findings.append(
            warn("no GPU reaches another one directly", "peer access is off: ACS, or another PCIe root")
        )
    return result(name, findings, f"{_range(figures)} GB/s", "80% of the node's best pair")


def _collective(what: str, node: Measured, expected: Expectations) -> list[CheckResult]:
    """One collective over the whole job: its largest message against the baseline."""
    name = f"net.{what}"
    if isinstance(node.ranks, Unread):
        return result(name, [blind(node.ranks)], "", "bus bandwidth")
    if node.job.nodes * len(node.ranks) < 2:
        return []
    findings: list[Finding] = []
    shown = ""
    for place, rank in enumerate(node.ranks):
        if isinstance(rank.collectives, Unread):
            findings.append(blind(rank.collectives, f"rank {place} of this node"))
            continue
        sizes = {size: one for (each, size), one in rank.collectives.items() if each == what}
        if not sizes:
            findings.append(blind(NOTHING, f"rank {place} of this node"))
            continue
        largest = max(sizes)
        value = sizes[largest]
        if isinstance(value, Unread):
            findings.append(blind(value))
            continue
        shown = ", ".join(
            f"{_size(size)} {one:.3g}" for size, one in sorted(sizes.items()) if isinstance(one, float)
        )
        base = _baseline(node, expected, what, largest)
        if value <= 0 or (base is not None and value < base.floor):
            least = base.floor if base else 0.0
            findings.append(
                fail(
                    f"{_size(largest)}: {value:.3g} GB/s bus bandwidth, at least {least:.3g}", "see net.pairs"
                )
            )
    culprits = node.job.culprits
    causes = [*culprits, *dict.fromkeys(" - ".join(one.nodes) for one in node.job.bad_links)]
    if causes and node.name not in culprits:
        # Every node of a collective hangs with the one that does. That one is left out, not all of them.
        because = f"because of {', '.join(causes)}"
        findings = [warn(f"{one.text}: {because}", "see net.pairs and net.rails") for one in findings]
    base = _baseline(node, expected, what, 1 << 60)
    against = f"{base.floor:.3g} GB/s ({base.source})" if base else f"no baseline for this job; {RECORD}"
    return result(name, findings, f"{shown} GB/s bus bandwidth", against)


def _enter(what: str, summary: str) -> None:
    def judge(node: Measured, expected: Expectations) -> list[CheckResult]:
        return _collective(what, node, expected)

    judge.__doc__ = summary
    check(f"net.{what}", reads=[f"measure {what} *"], source=BASELINES, tier="active")(judge)


for _what in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
    _enter(_what, f"{_what.replace('_', '-').capitalize()} over the whole job, by message size.")


@check(
    "net.transport", reads=["measure transport"], source="NCCL's log, which says what it chose", tier="active"
)
def transport(node: Measured, expected: Expectations) -> list[CheckResult]:
    """The transport that NCCL chose is the one that the fabric promises."""
    name = "net.transport"
    if isinstance(node.transports, Unread):
        return result(name, [blind(node.transports)], "", "what NCCL's log says")
    if not node.gpus or node.job.nodes < 2:
        return []
    used = [one for one in node.transports if one.startswith("NET/")]
    promised = RDMA.get(expected.fabric or "")
    wanted = promised or ("an RDMA network" if expected.fabric == "efa" else "a network")
    findings: list[Finding] = []
    if not used:
        findings.append(blind(NOTHING, "NCCL's log names no network"))
    elif promised and not all(one.startswith(promised) for one in used):
        findings.append(
            fail(f"NCCL uses {', '.join(used)}", "NCCL_IB_HCA, drivers in the container, rdma.port")
        )
    elif expected.fabric == "efa" and any("Socket" in one for one in used):
        findings.append(fail(f"NCCL uses {', '.join(used)}", "install aws-ofi-nccl, in the container too"))
    elif expected.fabric is None and any("Socket" in one for one in used):
        findings.append(warn(f"NCCL uses {', '.join(used)}", "right on plain TCP: say --fabric=tcp"))
    return result(name, findings, ", ".join(node.transports), wanted)


@check(
    "net.pairs",
    reads=["measure pair"],
    source="Google's cluster health scanner: two passes of pairs",
    tier="active",
)
def pairs(node: Measured, expected: Expectations) -> list[CheckResult]:
    """Which node or link it is, where the whole job fell short, hung, or had nothing to be compared with."""
    name = "net.pairs"
    if not node.job.expects_pairs:
        if isinstance(node.ranks, Unread):
            return result(name, [blind(node.ranks)], "", "every pair passes")
        return []
    if not node.job.paired:
        return result(
            name, [warn("no time was left for pairs", "a larger --active-budget")], "", "every pair passes"
        )
    findings = [_finding(blame, node.name) for blame in node.job.blames if node.name in blame.nodes]
    return result(name, findings, f"passed, {counted(node.job.paired, 'round')}", "every pair passes")


@check(
    "net.rails",
    reads=["measure rails *"],
    source="azurehpc-health-checks and oci-hpc: nine tenths of the port's rate by ib_write_bw",
    tier="active",
)
def rails(node: Measured, expected: Expectations) -> list[CheckResult]:
    """What perftest's ib_write_bw sends from each RDMA port to the same port of another node, and back."""
    name = "net.rails"
    if not node.job.expects_rails:
        return []
    base = _baseline(node, expected, perftest.TOOL)
    floor = base.floor if base else None
    against = f"{floor:.3g} Gb/s ({base.source})" if base else f"{LEAST:.0%} of the port's rate"
    if isinstance(node.rails, Unread):
        return result(name, [_rail_unread(node.rails, "")], "", against)
    findings = [
        one
        for rail, end in node.rails.items()
        if (one := _rail_finding(rail, end, node, floor_of(end.rate, floor))) is not None
    ]
    if not node.rails:
        findings.append(blind(NOTHING, "no RDMA port of this fabric is active"))
    figures = [end.sent for end in node.rails.values() if isinstance(end.sent, float)]
    return result(name, findings, f"{counted(len(figures), 'rail')}: {_range(figures)} Gb/s", against)


def _rail_finding(rail: str, end: Rail, node: Measured, least: float) -> Finding | None:
    """What is wrong with this node's end of a rail. A figure that is short is its node's only where a blame says so."""
    about = [blame for blame in node.job.rail_blames if rail in blame.rails]
    own = [blame for blame in about if node.name in blame.nodes]
    if own and not (isinstance(end.sent, Unread) and end.sent.problem is Problem.NOT_PERMITTED):
        return _finding(own[0], node.name, f"{rail}: ")
    if isinstance(end.sent, float) and end.sent >= max(least, 1e-9):
        return None
    if any(end.partner in blame.nodes and blame.kind in ("node", "rail") for blame in about):
        return None
    if isinstance(end.sent, Unread):
        return _rail_unread(end.sent, f"{rail} to {end.partner}")
    text = f"{rail} to {end.partner}: {end.sent:.3g} Gb/s, at least {least:.3g}"
    return Finding(Verdict.UNKNOWN, f"undetermined, {text}", "measure with more nodes")


def _rail_unread(why: Unread, what: str) -> Finding:
    if why.problem is Problem.MISSING:
        # As with every tool that few images hold: its absence must not keep every job from starting.
        return warn(
            f"{what}: {why}".removeprefix(": "), "install perftest on the nodes, or --without=net.rails"
        )
    return blind(why, what)


def _finding(blame: Blame, node: str, rail: str = "") -> Finding:
    if blame.kind == "node":
        return fail(f"{rail}this node: {blame.why}", "leave this node out")
    if blame.kind == "rail":
        return fail(f"{rail}this node's port or cable: {blame.why}", "leave this node out")
    others = ", ".join(one for one in blame.nodes if one != node)
    if blame.kind == "link":
        remedy = "the cable or switch between them: leave out one of the two"
        return fail(f"{rail}the link to {others}: {blame.why}", remedy)
    if blame.kind == "once":
        return warn(f"{rail}with {others}: {blame.why}", "watch it: the same pair passes now")
    what = f"this node or {others} or what connects them" if others else "this node"
    remedy = "leave out one of the two, or measure with more nodes" if others else "measure with more nodes"
    return Finding(Verdict.UNKNOWN, f"{rail}undetermined, {what}: {blame.why}", remedy)


def _local(
    name: str,
    node: Measured,
    expected: Expectations,
    figures_of: Callable[[Rank], Mapping[str, Figure] | Unread],
) -> list[CheckResult]:
    """Figures of each rank alone: above zero, and not below a baseline where there is one."""
    if isinstance(node.ranks, Unread):
        return result(name, [blind(node.ranks)], "", "a figure for every rank")
    findings: list[Finding] = []
    figures: list[float] = []
    bases: dict[str, Baseline] = {}
    for place, rank in enumerate(node.ranks):
        of_rank = figures_of(rank)
        if isinstance(of_rank, Unread):
            findings.append(blind(of_rank, f"rank {place}"))
            continue
        if not of_rank:
            findings.append(blind(NOTHING, f"rank {place}"))
        for what, value in of_rank.items():
            if isinstance(value, Unread):
                findings.append(blind(value, f"rank {place} {what}"))
                continue
            figures.append(value)
            base = _baseline(node, expected, what)
            if base:
                bases[what] = base
            least = base.floor if base else 0.0
            if value <= 0 or value < least:
                text = f"rank {place} {what}: {value:.3g} GB/s, at least {least:.3g}"
                findings.append(fail(text, "see pcie.gpu, pcie.path and pcie.acs: leave this node out"))
    against = "; ".join(f"{what} {base.floor:.3g} GB/s ({base.source})" for what, base in bases.items())
    return result(name, findings, f"{_range(figures)} GB/s", against or f"no baseline; {RECORD}")


def job_fabric(nodes: int, expected: Expectations) -> str:
    """The word under which a job's network is found in the baselines."""
    return "node" if nodes == 1 else (expected.fabric or "unknown")


def _baseline(node: Measured, expected: Expectations, what: str, payload: int = 0) -> Baseline | None:
    ranks = 0 if isinstance(node.ranks, Unread) else len(node.ranks)
    return baselines.find(
        node.job.baselines, what, gpu=node.device, fabric=job_fabric(node.job.nodes, expected), nodes=node.job.nodes,
        ranks=ranks, payload=payload,
    )  # fmt: skip


def _range(figures: list[float]) -> str:
    if not figures:
        return "nothing"
    low, high = min(figures), max(figures)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
