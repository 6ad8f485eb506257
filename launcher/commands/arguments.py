"""What every command takes, apart from the modules that do the work.

`--help` and the Tab key need the arguments alone. Beside the work they would wait for everything that the work
imports: 0.35 seconds of a processor for `submit --help`, and more than that for `demo --help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

RUNS_SHOWN = 20
REPORT_PAGE = "report.html"


def recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a JSON list instead of the table")


def show(parser: argparse.ArgumentParser) -> None:
    _words(parser, "recipe=NAME cluster=NAME and overrides")
    parser.add_argument("--json", action="store_true", help="the frozen form that a run directory keeps")
    parser.add_argument("--origins", action="store_true", help="say of each value where it comes from")


def render(parser: argparse.ArgumentParser) -> None:
    _words(parser, "recipe=NAME cluster=NAME and overrides")
    parser.add_argument(
        "--all", action="store_true", help="every recipe and the preflight, as the files of jobs/ have it"
    )
    parser.add_argument("--write", action="store_true", help="with --all: write jobs/*.sbatch")


def env(parser: argparse.ArgumentParser) -> None:
    _words(
        parser,
        "cluster=NAME, fabric=NAME, env.NAME=VALUE; without: fabric=auto. "
        "Or: install NAME [into=FOLDER] makes the locked environment of a stack; install alone lists them",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything as JSON")
    form.add_argument("--shell", action="store_true", help='export lines: eval "$(... env --shell)"')
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="folder that holds the sys/ and proc/ of another machine"
    )


def submit(parser: argparse.ArgumentParser) -> None:
    _words(parser, "recipe=NAME cluster=NAME nodes=4 args.lr=3e-4 …")
    parser.add_argument(
        "--dry-run", action="store_true", help="validate, print the job script, submit nothing"
    )
    _after_submission(parser)


def resume(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    _words(parser, "changes to the job, such as nodes=2")
    _after_submission(parser)


def status(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("--all", action="store_true", help=f"a table of the newest {RUNS_SHOWN} runs")
    parser.add_argument("--limit", type=int, default=RUNS_SHOWN, metavar="N", help="rows of --all")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def logs(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    parser.add_argument(
        "--rank", type=int, metavar="N", help="only this rank (default: controller and rank 0)"
    )
    parser.add_argument("--attempt", type=int, metavar="N", help="of this attempt (default: the newest)")


def report(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("--json", action="store_true", help="JSON instead of text; writes no page")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help=f"where the page goes (default: {REPORT_PAGE} in the run directory)",
    )


def checkpoints(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte and compare the checksums")
    parser.add_argument(
        "--prune", action="store_true", help="delete all but those of --keep and --keep-every"
    )
    parser.add_argument("--keep", type=int, metavar="N", help="with --prune: the newest N stay")
    parser.add_argument(
        "--keep-every", type=int, metavar="M", help="with --prune: so do multiples of M steps"
    )
    parser.add_argument("--yes", action="store_true", help="with --prune: delete, do not only say what")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write Hugging Face files to a new folder"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="with --export: of this step (default: the newest)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="with --export: of the weights"
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="only these, with their evidence: n7 n[8-9]")
    parser.add_argument("--clear", action="store_true", help="let new jobs have the named nodes again")
    parser.add_argument("--on", metavar="CLUSTER", help="one cluster's only, by Slurm's name for it")
    parser.add_argument("--all", action="store_true", help="records that have ended too")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def cancel(parser: argparse.ArgumentParser) -> None:
    _run(parser)


def demo(parser: argparse.ArgumentParser) -> None:
    _words(parser, "overrides, such as args.steps=20")


def box(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="box_action", required=True, metavar="ACTION")

    up = actions.add_parser("up", help="bring up a Slurm cluster on this machine")
    up.add_argument("--nodes", type=int, default=2, metavar="N", help="number of nodes (default: 2)")
    _box_name(up)
    up.add_argument(
        "--cpus-per-node",
        type=int,
        metavar="N",
        help="CPUs that Slurm gives out per node, whatever this machine has (`box status` shows them)",
    )
    up.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs to deal to the nodes (default: all; nodes share them where there are fewer)",
    )
    up.add_argument("--accounting", action="store_true", help="run slurmdbd too, so that sacct answers")

    down = actions.add_parser("down", help="end a box with all its jobs")
    which = down.add_mutually_exclusive_group()
    _box_name(which)
    which.add_argument("--all", action="store_true", help="every box of this user on this machine")

    shown = actions.add_parser("status", help="what runs")
    _box_name(shown, default=None, what="only this box (default: all)")
    shown.add_argument("--json", action="store_true", help="one JSON list, for programs")

    shell = actions.add_parser("shell", help="a shell, or one command, with the box's sbatch, srun, …")
    _box_name(shell)
    shell.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="after -- (default: your shell)"
    )


def _words(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=meaning)


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="run id or the start of one (default: the latest run)")


def _after_submission(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait", action="store_true", help="stay, show progress, end with the run's own success"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per run instead of text")


def _box_name(
    parser: argparse._ActionsContainer,
    default: str | None = "default",
    what: str = "the box (default: default)",
) -> None:
    parser.add_argument("--name", default=default, help=what)


ARGUMENTS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "recipes": recipes,
    "show": show,
    "render": render,
    "env": env,
    "submit": submit,
    "status": status,
    "logs": logs,
    "report": report,
    "checkpoints": checkpoints,
    "nodes": nodes,
    "cancel": cancel,
    "resume": resume,
    "box": box,
    "demo": demo,
}
"""By the command's name."""
