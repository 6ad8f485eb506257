"""Check this machine, or every node of a job, and say what was found.

    python -m checks                      this machine: seconds, no load
    python -m checks gpu rdma.port        some subjects and checks
    srun --ntasks-per-node=1 python -m checks     every node of the allocation, and one against the others
    python -m checks list                 every check, what it reads, where its threshold comes from
    python -m checks collect [FILE]       the evidence alone, in one file
    python -m checks --tier=active        measure: this machine, or all nodes of the allocation; 90 s
    python -m checks baseline FILE        record what this cluster gives, for --baselines=FILE
    python -m checks judge FILE           the same verdicts from such a file, or from a capture, anywhere

Exit status: 0 pass, 1 fail, 2 warn, 3 unknown, 64 usage.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from checks import active, baselines, catalog, consensus, gather, minimal, passive, recorded, report
from checks import bundle as bundles
from checks.evidence import BUDGET_SECONDS
from checks.expectations import Expectations
from checks.options import EXIT_USAGE, Parser, add_expectations, expectations, seconds
from checks.reading import counted
from checks.registry import TIERS
from checks.verdict import EXIT_CODES, CheckResult, Verdict, worst

EXIT_UNREAD = 141
"""As the shell says of a program that SIGPIPE ended: 0 would be a pass that nobody saw."""
COLLECT_SECONDS = 60.0
"""`collect` is asked for by a person who wants everything: slow mounts get more time than a preflight has."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"list": _list, "collect": _collect, "judge": _judge, "baseline": _baseline}
    try:
        status = commands[words[0]](words[1:]) if words and words[0] in commands else _check(words)
        sys.stdout.flush()  # a reader that has left is noticed here, and not at the interpreter's exit
    except BrokenPipeError:
        # `python -m checks list | head`: the reader has what it wanted, and the verdict is nobody's any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNREAD
    except (bundles.BundleError, baselines.BaselineError, recorded.NotWhole, catalog.UnknownCheck) as error:
        print(f"python -m checks: {error}", file=sys.stderr)
        return EXIT_USAGE
    return status


# --- this machine, or all nodes of a step -----------------------------------------------------------------


def _check(words: Sequence[str]) -> int:
    options = _parser().parse_args(words)
    expected = expectations(options)
    catalog.named(options.checks, options.tier)  # a name that does not exist is said before anything runs
    if "{node}" not in options.root and not Path(options.root).is_dir():
        raise bundles.BundleError(f"--root={options.root}: no such folder")
    if options.tier == "minimal":
        results = _minimal(options, expected)
        if options.json:
            print(report.json_line(options.node, results))
        else:
            print(report.table(results, width=_width()))
        return EXIT_CODES[worst(result.verdict for result in results)]
    if options.tier == "active":
        return _active(options, expected)
    step = None if options.json else gather.step_of(os.environ)
    if step is not None:
        return gather.check_together(
            step,
            lambda name, wanted: _look(options, name, wanted),
            expected,
            deadline=options.deadline,
            width=_width(),
        )
    looked = _look(options, options.node, expected)
    results = [*looked.results, *_marker(options, looked)]
    if options.json:
        print(report.json_line(options.node, results, consensus.traits_of(looked.node)))
    else:
        print(report.table(results, width=_width()))
        print(report.summary(results, options.node, looked.seconds))
        print(report.costs(looked.node))
    return EXIT_CODES[worst(result.verdict for result in results)]


def _active(options: argparse.Namespace, expected: Expectations) -> int:
    return active.check_actively(
        expected,
        options.checks,
        name=options.node,
        baselines=_baselines(options.baselines),
        budget=options.active_budget,
        srun_options=options.srun,
        root=options.root,
        as_json=options.json,
        width=_width(),
    )


def _baselines(own: Path | None) -> list[baselines.Baseline]:
    """The cluster's own figures first: of two that fit equally the first is taken."""
    return [*(baselines.read(own) if own else []), *baselines.read(baselines.SHIPPED)]


def _look(options: argparse.Namespace, name: str, expected: Expectations) -> passive.Looked:
    """This node's facts, live or from the file that --evidence names."""
    if options.evidence:
        bundle = bundles.read(Path(options.evidence.replace("{node}", name)))
        return passive.look_at(bundle, expected, options.checks)
    root = options.root.replace("{node}", name)
    return passive.look(name, expected, options.checks, root=root, budget=options.budget)


def _minimal(options: argparse.Namespace, expected: Expectations) -> list[CheckResult]:
    """The checks without which no job should start a task; GPUs are always counted."""
    gpus = expected.gpus or 0
    results = [minimal.gpus_present(gpus, visible=os.environ.get("CUDA_VISIBLE_DEVICES") if gpus else None)]
    if expected.master is not None:
        host, _, port = expected.master.rpartition(":")
        results.append(minimal.name_resolves(host))
        results.append(minimal.reachable(host, int(port)))
    if options.writable is not None:
        results.append(minimal.writable(options.writable, node=options.node))
    return results


def _marker(options: argparse.Namespace, looked: passive.Looked) -> list[CheckResult]:
    """The file by which the first node sees that this node writes to the same folder."""
    if options.writable is None:
        return []
    folder = str(options.writable.absolute())
    wrote = any(one.path == folder and isinstance(one.written, float) for one in looked.node.file_systems)
    if not wrote:  # a folder that hangs must not hang this process too
        return [CheckResult("run_dir", Verdict.FAIL, f"{folder}: not written, see fs.write", "writable")]
    return [minimal.writable(options.writable, node=options.node)]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checks", nargs="*", metavar="CHECK", help="checks or subjects; all where none is named"
    )
    parser.add_argument("--tier", choices=TIERS, default="passive", help="what is checked (default passive)")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    parser.add_argument("--writable", type=Path, metavar="FOLDER", help="leave a file in the run directory")
    parser.add_argument("--root", default="/", help="read files under this folder; {node} is the node's name")
    parser.add_argument(
        "--evidence", metavar="FILE", help="judge a bundle in place of this machine; {node} as above"
    )
    parser.add_argument("--node", default=_own_name(), help=argparse.SUPPRESS)
    parser.add_argument(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        default=BUDGET_SECONDS,
        help="seconds that looking may take (default 4)",
    )
    parser.add_argument(
        "--deadline",
        type=seconds,
        metavar="SECONDS",
        default=gather.DEADLINE_SECONDS,
        help="seconds to wait for all nodes (default 20)",
    )
    _add_active(parser)
    add_expectations(parser)
    return parser


def _add_active(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tier active")
    group.add_argument("--baselines", type=Path, metavar="FILE", help="this cluster's own figures")
    group.add_argument(
        "--active-budget",
        type=seconds,
        metavar="SECONDS",
        default=active.BUDGET_SECONDS,
        help="seconds for everything (default 90)",
    )
    group.add_argument(
        "--srun",
        action="append",
        default=[],
        metavar="WORD",
        help="for the steps: --srun=--container-image=…",
    )


# --- commands ---------------------------------------------------------------------------------------------


def _list(words: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m checks list", description="Every check, what it reads, where its threshold is from."
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK")
    parser.add_argument("--tier", choices=TIERS, default="passive")
    options = parser.parse_args(words)
    for check in catalog.named(options.checks, options.tier):
        print(
            f"{check.name}\n    {check.summary}\n    reads: {', '.join(check.reads)}\n    threshold: {check.source}"
        )
    return 0


def _collect(words: Sequence[str]) -> int:
    parser = Parser(prog="python -m checks collect", description="Write this machine's evidence to one file.")
    parser.add_argument(
        "file", nargs="?", type=Path, help="default evidence-NODE.json.gz; NAME.json is not compressed"
    )
    parser.add_argument("--root", default="/", help="read files under this folder")
    parser.add_argument("--node", default=_own_name(), help=argparse.SUPPRESS)
    parser.add_argument(
        "--deadline",
        type=seconds,
        metavar="SECONDS",
        default=COLLECT_SECONDS,
        help="seconds for everything together",
    )
    add_expectations(parser)
    options = parser.parse_args(words)
    expected = expectations(options)
    looked = passive.look(options.node, expected, root=options.root, budget=options.deadline)
    path = options.file or Path(f"evidence-{options.node}.json.gz")
    try:
        bundles.write(bundles.make(options.node, expected, looked.records), path)
    except OSError as error:
        print(f"python -m checks: {path}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    print(f"{path}: {counted(len(looked.records), 'answer')} of {options.node} in {looked.seconds:.1f} s")
    return 0


def _judge(words: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m checks judge",
        description="Judge a bundle; or captures: a folder of sysfs, and what lspci -vvv, dmesg, nvidia-smi -q, "
        "nvidia-smi nvlink -s, ibstat and ibstatus printed. Of captures, only what they hold is judged.",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="bundles, or captures of one node"
    )
    parser.add_argument(
        "--check", action="append", default=[], metavar="CHECK", help="only this check or subject"
    )
    parser.add_argument("--part", default="", help="of an nvidia-smi session: idle, load")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write what was read from captures as a bundle"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    add_expectations(parser)
    options = parser.parse_args(words)
    if len(options.files) > 1 and all(path.is_file() and bundles.is_bundle(path) for path in options.files):
        return _judge_many(options)
    for path in options.files:
        if not path.exists() and {path.name, path.name.partition(".")[0]} & _names_of_checks():
            raise bundles.BundleError(f"{path}: no such file; one check alone: --check={path}")
    bundle, captured = passive.opened(options.files, options.part)
    looked = passive.look_at(bundle, expectations(options, bundle.expected), options.check, part=captured)
    if not looked.results and captured:
        raise bundles.BundleError(f"{options.files[0]}: there is nothing in it that a check could judge")
    if options.save:
        bundles.write(bundle, options.save)
    if options.json:
        print(report.json_line(bundle.node, looked.results))
    else:
        print(report.table(looked.results, width=_width()))
        print(report.summary(looked.results, bundle.node))
        left_out = len(catalog.named((), "passive")) - len({result.check for result in looked.results})
        if captured and left_out:
            verb = "finds" if left_out == 1 else "find"
            print(f"{counted(left_out, 'other check')} {verb} nothing to judge in this capture")
    return EXIT_CODES[worst(result.verdict for result in looked.results)]


def _names_of_checks() -> set[str]:
    return {name for check in catalog.named((), None) for name in (check.name, check.subject)}


def _judge_many(options: argparse.Namespace) -> int:
    """Bundles of many nodes: each judged, and one against the others."""
    looked = {}
    for path in options.files:
        bundle = bundles.read(path)
        if bundle.node in looked:
            raise bundles.BundleError(f"{path}: a second bundle of node {bundle.node}")
        looked[bundle.node] = passive.look_at(bundle, expectations(options, bundle.expected), options.check)
    same = consensus.compared({node: consensus.traits_of(one.node) for node, one in looked.items()})
    results = {node: [*one.results, *same[node]] for node, one in looked.items()}
    if options.json:
        for node, found in results.items():
            print(report.json_line(node, found))
    else:
        print(report.folded_table(results, width=_width()))
        print(report.nodes_summary(results))
    return EXIT_CODES[worst(one.verdict for found in results.values() for one in found)]


def _baseline(words: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m checks baseline",
        description="Measure this machine or allocation, known to be good, and write its figures for --baselines=FILE.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="entries of other shapes in it are kept")
    parser.add_argument("--node", default=_own_name(), help=argparse.SUPPRESS)
    _add_active(parser)
    add_expectations(parser)
    options = parser.parse_args(words)
    if active.conducts_elsewhere(os.environ):
        return 0
    expected = expectations(options)
    kept = baselines.read(options.file) if options.file.exists() else []
    nodes, found = active.measure_here(
        expected, name=options.node, baselines=[], budget=options.active_budget, srun_options=options.srun
    )
    if blames := [*found.job.blames, *found.job.rail_blames]:
        raise recorded.NotWhole(f"the nodes are not good: {blames[0]}")
    own = recorded.own_baselines(found.records, nodes, expected)
    keys = {(one.what, one.gpu, one.fabric, one.nodes, one.ranks, one.payload) for one in own}
    kept = [
        one for one in kept if (one.what, one.gpu, one.fabric, one.nodes, one.ranks, one.payload) not in keys
    ]
    try:
        baselines.write(options.file, [*own, *kept])
    except OSError as error:
        raise baselines.BaselineError(f"{options.file}: {error.strerror}") from None
    print(
        f"{options.file}: {counted(len(own), 'figure')} of {counted(len(nodes), 'node')} in {found.seconds:.1f} s"
    )
    return 0


def _own_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _width() -> int:
    """The terminal's width; where output goes to a file, wide enough that a row mostly stays one line."""
    return shutil.get_terminal_size((180, 24)).columns


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no × still gets its table
    sys.exit(main())
