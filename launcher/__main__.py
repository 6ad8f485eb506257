# PYTHON_ARGCOMPLETE_OK
"""The command line: finds the command, reads its arguments, prints a user's mistake as one line.

A command's module is imported only when that command is run, so that `--help` and a typing error answer at
once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launcher.spec import UserError
from launcher.suggest import did_you_mean

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One command: its help line and where its code is, not imported yet."""

    help: str
    module: str
    run: str = "run"
    """Name of the function `(namespace) -> exit status` in the module."""


COMMANDS: dict[str, Command] = {
    "recipes": Command("list the recipes", "launcher.commands.recipes"),
    "show": Command("print the resolved configuration of a job", "launcher.commands.show"),
    "render": Command("print a job's sbatch file", "launcher.commands.render"),
    "env": Command("the network's variables on this machine, and why", "launcher.commands.env"),
    "submit": Command("submit a job, or one per combination of a sweep", "launcher.commands.submit"),
    "status": Command("how a run is, and why it failed", "launcher.commands.status"),
    "logs": Command("what a run's controller and ranks printed", "launcher.commands.logs"),
    "report": Command("where a run's time went, and why its attempts ended", "launcher.commands.report"),
    "checkpoints": Command(
        "list, verify, prune and export a run's checkpoints", "launcher.commands.checkpoints"
    ),
    "nodes": Command("nodes that new jobs stay away from, and why", "launcher.commands.nodes"),
    "cancel": Command("end a run's job", "launcher.commands.cancel"),
    "resume": Command(
        "submit a run again; it continues from its newest checkpoint",
        "launcher.commands.submit",
        run="resume",
    ),
    "box": Command("a real multi-node Slurm on this machine: up, down, status, shell", "launcher.box.cli"),
    "demo": Command("start a box and run a recipe on it", "launcher.commands.demo"),
}

DESCRIPTION = "From one command line to a finished distributed run, on this machine or on a Slurm cluster."

WORDS = """\
words:
  recipe=NAME cluster=NAME   choose the files recipes/chN/NAME.yaml and env/clusters/NAME.yaml
  KEY=VALUE                  a key of the job: nodes, tasks_per_node, gpus_per_node, time, env.NAME ...
  args.KEY=VALUE             an argument of the recipe

  A value is everything after the first =, as the shell passes it: args.data="/a b/[x]=(y)".
  A comma makes a sweep, one job per combination: args.lr=1e-4,3e-4 nodes=1,2. A comma inside brackets
  does not, and quotes inside the word protect it: args.note='"a, b"'.
  In lists, env.*, sbatch.* and partition a comma is part of the value.
"""

COMPLETION = """\
completion of the Tab key:
  bash   eval "$(register-python-argcomplete launcher)"    and for `python -m launcher` once:
         activate-global-python-argcomplete --user
  zsh    autoload -U bashcompinit && bashcompinit, then as in bash
  fish   register-python-argcomplete --shell fish launcher | source
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 2 after a user's mistake, printed as one line."""
    if "_ARGCOMPLETE" in os.environ:
        from launcher.completion import complete

        complete(completion_parser(os.environ.get("COMP_LINE", "")))
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        # Here, not at the interpreter's exit, where a reader that has left would cause a second message.
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `launcher status --all | head`: the reader has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _dispatch(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        parser = top_parser()
        parser.parse_args(words)
        parser.print_help()
        return 0
    name = words[0]
    if name not in COMMANDS:
        if "=" in name:
            raise UserError(f"a command is wanted before {name!r}: {', '.join(COMMANDS)}")
        raise UserError(f"unknown command {name!r}: {did_you_mean(name, COMMANDS)}")
    parser = Parser(prog=f"{_program()} {name}", description=COMMANDS[name].help)
    _fill(parser, name)
    options = parser.parse_command(words[1:])
    run = getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].run)
    status: int = run(options)
    return status


class Parser(argparse.ArgumentParser):
    """argparse, with the project's way to say what is wrong: one line, no usage block."""

    def __init__(
        self, prog: str | None = None, description: str | None = None, epilog: str | None = None
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_command(self, words: list[str]) -> argparse.Namespace:
        """The arguments of a command; its options may stand anywhere among its words."""
        positionals = self._get_positional_actions()
        if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in positionals):
            # A command with commands of its own (box up): argparse cannot mix options into those.
            return self.parse_args(words)
        return self.parse_intermixed_args(words)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message and where the options are listed."""
        raise UserError(f"{message}; see {self.prog} --help")


def top_parser() -> Parser:
    """The parser behind `launcher --help`: names and help lines of the commands, none of their modules."""
    parser = Parser(prog=_program(), description=DESCRIPTION, epilog=f"{WORDS}\n{COMPLETION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, prog=f"{_program()} {name}", help=command.help)
    return parser


def completion_parser(line: str) -> argparse.ArgumentParser:
    """The parser that completes `line`: every command by name, the arguments of the one that `line` has."""
    parser = argparse.ArgumentParser(prog=_program())
    commands = parser.add_subparsers(metavar="COMMAND")
    typed = set(line.split())
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help)
        if name in typed:
            _fill(subparser, name)
    return parser


def _fill(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the command's own arguments; key=value words bring their help and completion."""
    from launcher.commands.arguments import ARGUMENTS
    from launcher.completion import attach_completers

    ARGUMENTS[name](parser)
    if attach_completers(parser):
        parser.epilog = WORDS


def _program() -> str:
    return "launcher" if Path(sys.argv[0]).name == "launcher" else "python -m launcher"


if __name__ == "__main__":
    sys.exit(main())
