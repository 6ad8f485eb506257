"""The recipes that measure, under a bare torchrun: what they leave behind, and what they say of a bad rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes.lib.stopping import STOPPED_EXIT

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("trials=2", "budget=0.005")
RECIPES: dict[str, tuple[str, list[str], list[str]]] = {
    "ch1_nccl": ("recipes.ch1.nccl", ["large=64K", *QUICK], []),
    "ch2_allreduce": (
        "recipes.ch2.allreduce",
        ["smallest=1K", "largest=16K", "algorithms=auto,ring,tree", "scopes=world,node", *QUICK],
        ["allreduce.png"],
    ),
    "ch2_bandwidth": ("recipes.ch2.bandwidth", ["smallest=16K", "largest=256K", *QUICK], ["bandwidth.png"]),
    "ch2_mfu": (
        "recipes.ch2.mfu",
        ["matrix_sizes=64,128", "sequence_length=32", "batch_size=1", *QUICK],
        ["mfu.png"],
    ),
    "ch2_overhead": (
        "recipes.ch2.overhead",
        ["models=tiny", "sequence_length=32", "batch_size=1", *QUICK],
        ["overhead.png"],
    ),
    "ch2_pairs": ("recipes.ch2.pairs", ["size=64K", "schedule=parallel", *QUICK], ["pairs.png"]),
    "ch2_patterns": (
        "recipes.ch2.patterns",
        ["smallest=1K", "largest=16K", *QUICK],
        ["patterns.png", "pattern_ring_all_reduce.png", "pattern_all_to_all.png", "pattern_broadcast.png"],
    ),
}


@dataclass(frozen=True)
class Done:
    """A run that is over."""

    status: int
    out: str
    err: str
    folder: Path

    def lines(self, kind: str | None = None, file: str = "results.jsonl") -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (self.folder / file).read_text().splitlines()]
        return [line for line in found if kind is None or line["kind"] == kind]


def run(folder: Path, module: str, *words: str, ranks: int = 2) -> Done:
    environment = {**os.environ, "RUN_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", module]
    done = subprocess.run(
        [*command, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    return Done(done.returncode, done.stdout, done.stderr, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Every recipe, once."""
    made = {
        name: run(tmp_path_factory.mktemp(name), module, *words)
        for name, (module, words, _) in RECIPES.items()
    }
    for name, done in made.items():
        assert done.status == 0, f"{name}\n{done.out}\n{done.err[-4000:]}"
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_every_figure_says_what_it_was_measured_on(runs: dict[str, Done], name: str) -> None:
    (about,) = runs[name].lines("about")
    module, words, _ = RECIPES[name]
    assert about["command"].startswith(f"python -m {module} ")
    assert all(word in about["command"] for word in words)
    assert about["versions"].keys() >= {"python", "torch"}
    assert "CPU cores" in about["hardware"]
    assert (about["ranks"], about["nodes"], about["backend"]) == (2, 1, "gloo")
    measured = runs[name].lines("measurement")
    timed = [line for line in measured if "seconds" in line]
    for line in timed:
        assert 0 < line["seconds_min"] <= line["seconds"] <= line["seconds_max"]
        assert line["trials"] == 2
    assert timed or name in ("ch1_nccl", "ch2_pairs"), "theirs are one level deeper"


@pytest.mark.parametrize("name", RECIPES)
def test_progress_is_there_for_who_watches(runs: dict[str, Done], name: str) -> None:
    progress = runs[name].lines(file="metrics.jsonl")
    steps = progress[0]["steps"]
    assert [line["step"] for line in progress] == list(range(1, steps + 1))
    assert all(line["what"] and line["attempt"] == 1 and line["seconds"] >= 0 for line in progress)
    assert "loss" not in progress[0]


@pytest.mark.parametrize("name", RECIPES)
def test_tables_and_pictures_are_there(runs: dict[str, Done], name: str) -> None:
    shown = (runs[name].folder / "results.txt").read_text()
    assert shown.strip() in runs[name].out.replace("\r", "")
    for picture in RECIPES[name][2]:
        assert f"picture {runs[name].folder / picture}" in shown
        with Image.open(runs[name].folder / picture) as image:
            assert image.convert("RGB").getpixel((1, 1)) == (255, 255, 255), "a light background"
            assert len(set(image.convert("L").tobytes())) > 5


@pytest.mark.parametrize("name", RECIPES)
def test_the_library_and_the_interface_that_were_used_are_noted(runs: dict[str, Done], name: str) -> None:
    (transport,) = runs[name].lines("transport")
    assert transport["library"] == "gloo"
    assert all(device for device in transport["devices_by_rank"])


def test_bandwidths_follow_from_size_and_time(runs: dict[str, Done]) -> None:
    lines = runs["ch2_allreduce"].lines("measurement")
    assert {line["collective"] for line in lines} == {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
    }
    assert {(line["algorithm"], line["scope"]) for line in lines if line["collective"] == "all_reduce"} == {
        (algorithm, scope) for algorithm in ("auto", "ring", "tree") for scope in ("world", "node")
    }
    for line in lines:
        assert line["algbw_gb_s"] == pytest.approx(line["size"] / line["seconds"] / 1e9)
        factor = {"all_reduce": 1.0}.get(line["collective"], 0.5)  # of two ranks
        assert line["busbw_gb_s"] == pytest.approx(factor * line["algbw_gb_s"])
        assert line["correct"] is True


def test_patterns_by_hand_are_timed_beside_the_library_s(runs: dict[str, Done]) -> None:
    for line in runs["ch2_patterns"].lines("measurement"):
        assert line["library"]["seconds"] > 0
    (rounds,) = runs["ch2_patterns"].lines("rounds")
    assert {name: len(each) for name, each in rounds["seconds"].items()} == {
        "broadcast": 1, "scatter": 1, "gather": 1, "ring_all_reduce": 2, "tree_all_reduce": 2, "all_to_all": 1,
    }  # fmt: skip


def test_both_directions_of_the_only_pair_are_measured(runs: dict[str, Done]) -> None:
    pairs = [pair for line in runs["ch2_pairs"].lines("measurement") for pair in line["pairs"]]
    assert sorted((pair["from"], pair["to"]) for pair in pairs) == [(0, 1), (1, 0)]
    assert all(pair["gb_s"] > 0 for pair in pairs)


def test_a_rank_that_sends_a_wrong_number_is_named_and_the_test_fails(tmp_path: Path) -> None:
    done = run(tmp_path, "recipes.ch1.nccl", "large=64K", "spoilt_rank=1", *QUICK, ranks=3)
    assert done.status == 1
    (verdict,) = done.lines("verdict")
    assert verdict["broken"].startswith("rank 1 sends wrong numbers (rank 1 is on ")
    assert (
        "seen in all_reduce, all_gather, reduce_scatter, all_to_all, reduce, gather, send_recv, pairs"
        in done.out
    )
    assert "WrongResult: rank 1 sends wrong numbers" in done.err
    right = {line["collective"] for line in done.lines("measurement") if line.get("correct")}
    assert right == {"broadcast", "scatter"}, "what rank 1 has no part in is still right, and timed"


def test_a_slow_rank_is_named_and_the_test_goes_on(tmp_path: Path) -> None:
    # Who is late by 5 ms is named where the others are not late by chance: on a busy machine not at the first look.
    for look in range(5):
        done = run(tmp_path / str(look), "recipes.ch1.nccl", "large=64K", "slow_rank=1", *QUICK)
        assert done.status == 0, done.err
        if "slow: rank 1 (" in done.out:
            break
    assert "slow: rank 1 (" in done.out
    assert "the others wait" in done.out


def test_a_request_to_stop_is_heard_between_two_measurements(tmp_path: Path) -> None:
    (tmp_path / "stop.json").write_text('{"reason": "preemption"}')
    environment = {**os.environ, "RUN_DIR": str(tmp_path), "ATTEMPT_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.ch1.topology"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == STOPPED_EXIT
    assert "stopped after measurement 1 of 2: preemption" in done.stdout
    beat = json.loads((tmp_path / "heartbeat/rank-0").read_text())
    assert (beat["step"], beat["phase"]) == (1, "done")


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        (
            "recipes.ch2.allreduce",
            [],
            "one rank alone has nobody to talk to: start two or more (tasks_per_node=2)",
        ),
        ("recipes.ch2.allreduce", ["largest=16X"], "largest=16X: wants bytes such as 65536, 64K, 16M or 1G"),
        ("recipes.ch2.allreduce", ["largest=1K"], "smallest=4K: wants at most largest=1K"),
        ("recipes.ch2.patterns", ["patterns=ring"], "patterns=ring: wants one of broadcast, scatter, gather"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, module: str, words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, env={**os.environ, "RUN_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_what_gloo_cannot_choose_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "recipes.ch2.allreduce", "algorithms=nvls", "largest=16K", *QUICK)
    assert done.status == 1
    assert 'error: algorithms=["nvls"]: wants auto, ring, tree on gloo' in done.err
