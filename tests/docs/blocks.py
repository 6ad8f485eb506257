"""The command blocks of a Markdown file: where they are and what is wrong with them. Pure, but for `bash -n`.

A block is fenced with ```bash and is run, command by command. One that a test cannot run has a line
`<!-- not run here: REASON -->` before it, and a command that needs what a test lacks: `NEEDS_MORE`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NEEDS_MORE = {
    "a network": r"\b(git (clone|pull|push)|make lock|apt-get|pip|uv|docker|podman|npm|curl|wget)\b|data=hf:"
    r"|\benv install \w|\block_stacks\b",
    "another machine": r"\b(ssh|scp|rsync)\b",
    "a Slurm cluster": r"\b(sbatch|srun|salloc|squeue|scancel|sinfo)\b|\bcluster=(?!(box|local|debug)\b)",
    "a container runtime": r"\bcontainer\.kind=|\bapptainer\b",
    "GPUs": r"=cuda\b|\bgpus_per_node=[1-9]|\bnvidia-smi\b|--nproc[-_]per[-_]node[= ](gpu|[4-9]|\d\d)",
    "several hosts": r"--nnodes\b|\bfabric=infiniband\b",
    "the memory of a large machine": r"\bmodel=(?!(tiny|small)\b)\w",
    "a person at a terminal": r" (-f|--follow|--watch)\b",
}
"""What a test on two cores without a network does not have, and the commands that ask for it."""

NEVER_HERE = {
    "would run this very test again, or for minutes": r"\bmake (test|bench)\b",
    "would change the environment that runs the test": r"\bmake (lock|clean)\b|\brm -rf? .*\.venv\b",
}
"""Commands that must not run inside a test."""

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>```+)(?P<language>[^`]*)")
_MARKER = re.compile(r" *<!-- not run here:(?P<reason>.*)-->\s*")
_OTHER_SHELLS = frozenset({"sh", "shell", "zsh", "console", "shell-session", "terminal", "shellscript"})


@dataclass(frozen=True)
class Block:
    """One ```bash block."""

    file: str
    line: int
    """Of the opening fence, from 1."""
    text: str
    marked: bool
    reason: str
    """Why it is not run; only where it is marked."""

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def needs(self) -> list[str]:
        """What its commands need that a test does not have."""
        return self._matching(NEEDS_MORE)

    @property
    def dangers(self) -> list[str]:
        """Why a test must not run it."""
        return self._matching(NEVER_HERE)

    def _matching(self, patterns: Mapping[str, str]) -> list[str]:
        code = "\n".join(line for line in self.text.splitlines() if not line.lstrip().startswith("#"))
        return [meaning for meaning, pattern in patterns.items() if re.search(pattern, code)]


@dataclass(frozen=True)
class Command:
    """One complete command: a line, or several joined by a backslash, a here-document, an if or a loop."""

    line: int
    """In its file, from 1."""
    text: str


def blocks(markdown: str, file: str) -> list[Block]:
    """Every ```bash block of a file, in order."""
    return [
        Block(file, fence.line, fence.text, fence.marked, fence.reason)
        for fence in _fences(markdown)
        if fence.language == "bash"
    ]


def problems(markdown: str, file: str) -> list[str]:
    """What a reader, or the test that runs the blocks, would stumble over; one line each."""
    found = []
    for fence in _fences(markdown):
        where = f"{file}:{fence.line}"
        if not fence.closed:
            found.append(f"{where}: the block is never closed")
        if fence.language in _OTHER_SHELLS:
            found.append(f"{where}: commands stand in ```bash, output in ```text; not in ```{fence.language}")
        if fence.marked and fence.language != "bash":
            found.append(f"{where}: 'not run here' stands before a block that is not ```bash")
    for block in blocks(markdown, file):
        if any(re.match(r"\s*[$>] ", line) for line in block.text.splitlines()):
            found.append(f"{block.name}: a prompt is in the way of who copies the line")
        if block.marked and not block.reason:
            found.append(f"{block.name}: 'not run here:' wants a reason")
        if block.marked and not block.needs and not block.dangers:
            found.append(f"{block.name}: marked, but nothing in it needs {' or '.join(NEEDS_MORE)}")
        if block.dangers and not block.marked:
            found.append(f"{block.name}: mark it, it {', '.join(block.dangers)}")
        try:
            commands(block)
        except ValueError as error:
            found.append(str(error))
    return found


def commands(block: Block) -> list[Command]:
    """The block's commands. Raises ValueError for text that bash cannot parse."""
    complete: list[Command] = []
    pending: list[str] = []
    for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            continue
        pending.append(line)
        if not line.endswith("\\") and _complaint("\n".join(pending)) is None:
            complete.append(Command(number - len(pending) + 1, "\n".join(pending)))
            pending = []
    if pending:
        raise ValueError(f"{block.name}: bash cannot read it: {_complaint(chr(10).join(pending))}")
    return complete


def _complaint(script: str) -> str | None:
    """What bash says about a script that it cannot read or that ends too early."""
    # bash only warns of a here-document without its end, so its silence counts, not its exit status.
    checked = subprocess.run(
        ["bash", "-n"], input=script + "\n", capture_output=True, text=True, env={"LC_ALL": "C"}, check=False
    )
    said = checked.stderr.strip().splitlines()
    return said[0].removeprefix("bash: ") if said else None


@dataclass(frozen=True)
class _Fence:
    line: int
    language: str
    text: str
    closed: bool
    marked: bool
    reason: str


def _fences(markdown: str) -> Iterator[_Fence]:
    lines = markdown.splitlines()
    marker: re.Match[str] | None = None
    number = 0
    while number < len(lines):
        opened = _FENCE.fullmatch(lines[number])
        if opened is None:
            if lines[number].strip():
                marker = _MARKER.fullmatch(lines[number])
            number += 1
            continue
        indent, ticks = opened["indent"], opened["ticks"]
        end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == ticks), None)
        inside = lines[number + 1 : end]
        yield _Fence(
            line=number + 1,
            language=opened["language"].strip(),
            text="\n".join(line.removeprefix(indent) for line in inside),
            closed=end is not None,
            marked=marker is not None,
            reason=marker["reason"].strip() if marker else "",
        )
        marker = None
        number = len(lines) if end is None else end + 1
