"""Six faults really happen to three ranks, and each one's tool names the planted rank, its collective and its line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.ch3 import faulty
from recipes.ch3.debug_args import FAULTS, DebugArgs
from recipes.ch3.diagnosis import TOOLS, NotNamed, Testimony
from recipes.lib.arguments import ArgumentError, parse
from recipes.lib.flight_record import Call, own_line, parting

# Six trainings start one after another, three processes each, and each stands still for some seconds.
pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]
CULPRIT, RANKS, STEP = 2, 3, 3
SOURCE = Path(faulty.__file__).read_text().splitlines()


def line_of(text: str) -> str:
    """Where the one line of the training that holds `text` stands."""
    (number,) = (number for number, line in enumerate(SOURCE, start=1) if text in line)
    return f"recipes/ch3/faulty.py:{number} in "


BACKWARD, FIGURES = "loss.backward()", "# what a training logs"
GRADIENTS = "gloo:all_reduce of [73] Float, call 8 of group gradients"
EXPECTED: dict[str, tuple[str, str, str, str]] = {
    # The tool, the collective, the line that calls it, and where the culprit is or what went wrong there.
    "mismatched_shapes": ("TORCH_DISTRIBUTED_DEBUG=DETAIL", "ALLREDUCE of [1], call ", FIGURES, FIGURES),
    "unused_parameter": ("TORCH_DISTRIBUTED_DEBUG=INFO", GRADIENTS, BACKWARD, "loss = model(samples"),
    "skipped_collective": (
        "flight recorder", "gloo:all_reduce of [1] Float, call 3 of group figures", FIGURES, BACKWARD,
    ),
    "deadlock": ("flight recorder", GRADIENTS, BACKWARD, "# before its gradients"),
    "straggler": ("monitored barrier", "the monitored barrier", "dist.monitored_barrier(", "time.sleep(10 *"),
    "nan_on_one_rank": ("anomaly detection", GRADIENTS, BACKWARD, "lengths = hidden.pow(2)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the recipe found for each fault."""
    folder = tmp_path_factory.mktemp("debug")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(RANKS),
        "-m",
    ]
    done = subprocess.run(
        [*command, "recipes.ch3.debug", f"rank={CULPRIT}", f"step={STEP}", "seconds=6", "device=cpu"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "RUN_DIR": str(folder)},
        capture_output=True, text=True, check=False, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = {line["fault"]: line for line in lines if line["kind"] == "measurement"}
    assert list(found) == list(FAULTS)
    shown = (folder / "results.txt").read_text()
    for fault, line in found.items():
        for value in (
            f"{fault} in step {STEP}: ",
            *(line[key] for key in ("tool", "collective", "called_at", "line")),
        ):
            assert value in shown
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_the_tool_names_rank_collective_and_line(results: dict[str, dict[str, Any]], fault: str) -> None:
    tool, collective, called_at, line = EXPECTED[fault]
    found = results[fault]
    assert found["tool"] == tool
    assert found["rank"] == CULPRIT
    assert found["collective"].startswith(collective)
    assert found["called_at"].startswith(line_of(called_at))
    assert found["line"].startswith(line_of(line))


def test_the_tool_s_own_words_are_told(results: dict[str, dict[str, Any]]) -> None:
    said = {fault: found["said"] for fault, found in results.items()}
    assert said["mismatched_shapes"] == f"the shape is [2] on rank {CULPRIT} and [1] on the others"
    assert said["unused_parameter"] == f"no gradient on rank {CULPRIT} for aside.bias, aside.weight"
    assert said["skipped_collective"].startswith("ranks 0, 1 called gloo:all_reduce of [1] Float")
    assert f"rank {CULPRIT} called gloo:all_reduce of [1] Float, call 3 of group figures" in said["deadlock"]
    assert f"Ranks {CULPRIT} failed to pass monitoredBarrier in 3000 ms" in said["straggler"]
    assert said["nan_on_one_rank"] == "Function 'PowBackward0' returned nan values"


def calls(kinds: str) -> list[Call]:
    """A call per letter, numbered within its group."""
    return [
        Call(kind, kinds[: at + 1].count(kind), "gloo:all_reduce", "[1] Float", f"line {at}")
        for at, kind in enumerate(kinds)
    ]


def test_where_ranks_part() -> None:
    assert parting({0: calls("GFGF"), 1: calls("GFGF")}) is None
    by_majority = parting({0: calls("GFGFG"), 1: calls("GFGG"), 2: calls("GFGFG")})
    assert by_majority is not None
    assert (by_majority.culprits, by_majority.others) == ((1,), (0, 2))
    assert (str(by_majority.instead), str(by_majority.expected)) == (
        "gloo:all_reduce of [1] Float, call 3 of group G",
        "gloo:all_reduce of [1] Float, call 2 of group F",
    )
    for culprit in (0, 1):  # of two ranks the one that breaks with its habit
        by_habit = parting({culprit: calls("GFGG"), 1 - culprit: calls("GFGF")})
        assert by_habit is not None
        assert (by_habit.culprits, by_habit.others) == ((culprit,), (1 - culprit,))
    gone = parting({0: calls("GF"), 1: calls("GFGF"), 2: calls("GFGF")})
    assert gone is not None
    assert (gone.culprits, gone.instead) == ((0,), None)


def test_a_line_of_the_library_is_not_the_reader_s() -> None:
    recipe, library = faulty.__file__, str(Path(faulty.__file__).parents[1] / "lib" / "training.py")
    found = own_line([("torch/distributed.py", 5, "all_reduce"), (library, 3, "train"), (recipe, 1, "main")])
    assert found.startswith('recipes/ch3/faulty.py:1 in main: """A tiny training')
    assert own_line([("torch/distributed.py", 5, "all_reduce")]) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_who_cannot_be_named_is_not_named(fault: str) -> None:
    """Two ranks that ended well, as where a fault did not show."""
    well = Testimony("is done", "", "", tuple(calls("GFGF")))
    with pytest.raises(NotNamed):
        TOOLS[fault]({0: well, 1: well})


@pytest.mark.parametrize(
    ("word", "line"),
    [("fault=deadlok", "fault=deadlok: wants one of all, "), ("step=2", "step=2: wants 3 or more")],
)
def test_a_mistake_is_one_line(word: str, line: str) -> None:
    with pytest.raises(ArgumentError, match=line):
        parse(DebugArgs, [word])
