"""The command line answers at once: help and mistakes never wait for torch or for a command that was not
named.

The bounds hold for the processor time of the quicker of two starts, which on an idle machine is the time
that a person waits, and which other work on the machine hardly changes. The waits themselves are printed
(`pytest -rP`) and bounded generously, to find a command that sleeps or asks the network.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from launcher.__main__ import COMMANDS
from launcher.paths import REPOSITORY
from launcher.recipes import load_recipes

HELP_SECONDS, MISTAKE_SECONDS = 0.4, 1.0
WAIT_SECONDS = 10.0

HEAVY = ("launcher.config", "launcher.commands.submit", "omegaconf", "rich", "yaml", "torch", "submitit")

WITHOUT_TORCH = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "matplotlib", "pandas", "transformers", "submitit"):
            raise ImportError(f"{name} is imported on the way to an answer")
sys.meta_path.insert(0, Refuse())
"""


@dataclass(frozen=True)
class Start:
    """What one start of the command line cost."""

    processor_seconds: float
    waited_seconds: float


def quicker_of_two(*words: str, status: int) -> Start:
    return min((start(words, status) for _ in range(2)), key=lambda each: each.processor_seconds)


def start(words: tuple[str, ...], status: int) -> Start:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    waited, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == status, finished.stderr
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Start(used, waited)


@pytest.mark.parametrize(
    ("words", "status", "bound"),
    [
        (("--help",), 0, HELP_SECONDS),
        *(((command, "--help"), 0, HELP_SECONDS) for command in COMMANDS),
        (("submit", "recipe=ch4_fsdb"), 2, MISTAKE_SECONDS),
        (("submit", "recipe=ch4_fsdp", "args.stpes=3"), 2, MISTAKE_SECONDS),
        (("submit", "recipe=ch4_fsdp", "cluster=slurm", "gpus_per_node=16"), 2, MISTAKE_SECONDS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_an_answer_is_there_within_its_bound(words: tuple[str, ...], status: int, bound: float) -> None:
    quicker = quicker_of_two(*words, status=status)
    print(f"{' '.join(words)}: {quicker.processor_seconds:.2f} s, waited {quicker.waited_seconds:.2f} s")
    assert quicker.processor_seconds < bound
    assert quicker.waited_seconds < WAIT_SECONDS


def test_help_imports_nothing_that_only_the_work_needs() -> None:
    # What the bound above sees late on a quick machine: one import here is a third of it on a busy one.
    code = f"""
import sys
from launcher.__main__ import main
try:
    main(["submit", "--help"])
except SystemExit:
    print(sorted(name for name in sys.modules if name in {HEAVY}), file=sys.stderr)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert finished.stderr.strip() == "[]"


@pytest.mark.parametrize("name", [entry.name for entry in load_recipes()])
def test_a_job_is_composed_where_torch_cannot_be_imported(name: str) -> None:
    code = f"""
{WITHOUT_TORCH}
from launcher.__main__ import main
sys.exit(main(["show", "recipe={name}", "cluster=local"]))
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_the_hook_of_these_tests_refuses_torch() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_TORCH}\nimport torch"], capture_output=True, text=True, check=False
    )
    assert "torch is imported on the way" in finished.stderr
