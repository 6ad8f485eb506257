"""The nodes of a step find each other, and the first prints one report: real processes and connections, no Slurm."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from checks import bundle
from checks.evidence import Record, key_of
from checks.expectations import Expectations
from checks.gather import Step, step_of
from tests.checks.nodes import healthy, value

NODES = ("localhost", "n2", "n3", "n4")
ENVIRONMENT = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost,n[2-4]",
    "COLUMNS": "200",  # so that no cell is wrapped
}


@pytest.fixture
def evidence(tmp_path: Path) -> str:
    for node in NODES:
        write(tmp_path / f"{node}.json", {})
    return f"{tmp_path}/{{node}}.json"


def write(path: Path, changes: dict[str, Record]) -> None:
    names: dict[str, Record] = {f"resolve {node}": value(["10.0.0.1"]) for node in NODES}
    bundle.write(bundle.make(path.stem, Expectations(), {**healthy(), **names, **changes}), path)


def started(place: int, evidence: str, secret: str, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, **ENVIRONMENT, "SLURM_NODEID": str(place), "SLURM_LOCALID": "0",
        # Tests that run at the same time are different steps.
        "SLURM_STEP_LAUNCHER_PORT": secret,
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "checks",
        "--gpus=2",
        "--fabric=infiniband",
        f"--evidence={evidence}",
        *options,
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(evidence: str, places: tuple[int, ...] = (0, 1, 2, 3), *options: str) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each task."""
    secret = uuid.uuid4().hex
    tasks = [started(place, evidence, secret, *options) for place in places]
    ended = []
    for task in tasks:
        out, error = task.communicate(timeout=60)
        ended.append((task.returncode, out, error))
    return ended


def test_healthy_nodes_give_one_report_and_no_other_line(evidence: str) -> None:
    first, *others = run(evidence)
    assert first[0] == 0, first
    assert first[1].startswith("every check passes on localhost,n[2-4]\npass: 4 nodes (localhost,n[2-4]) in ")
    assert others == [(0, "", "")] * 3


def test_a_node_that_differs_is_named(evidence: str, tmp_path: Path) -> None:
    write(tmp_path / "n3.json", {key_of("nvml", ["nvmlSystemGetDriverVersion"]): value("570.10")})
    (status, out, _), *_ = run(evidence)
    assert status == 1
    assert "n3     same.driver  fail     570.10" in out
    assert out.endswith("leave out: sbatch --exclude=n3\n")


def test_a_node_with_a_fault_of_its_own_is_named(evidence: str, tmp_path: Path) -> None:
    write(tmp_path / "n2.json", {key_of("nvml", ["nvmlDeviceGetRemappedRows", 1]): value([0, 0, 1, 0])})
    (status, out, _), *_ = run(evidence)
    assert status == 1
    assert "GPU 1: a remap is pending" in out
    assert out.endswith("leave out: sbatch --exclude=n2\n")


def test_a_node_that_never_answers_costs_the_deadline_and_is_named(evidence: str) -> None:
    # Long enough for the three that are there, on a busy machine too.
    (status, out, _), *_ = run(evidence, (0, 1, 3), "--deadline=9")
    assert status == 3
    assert "no answer within 9 s" in out
    assert out.endswith("leave out: sbatch --exclude=n3\n")


def test_a_node_that_cannot_reach_the_first_says_so_itself(evidence: str) -> None:
    ((status, out, error),) = run(evidence, (2,), "--deadline=1")
    assert (status, out) == (1, "")
    assert "n3: the first node was not told: localhost:" in error


def test_somebody_else_on_the_port_is_not_taken_for_the_first_node(evidence: str) -> None:
    secret = uuid.uuid4().hex
    step = step_of(
        {**ENVIRONMENT, "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_LAUNCHER_PORT": secret}
    )
    assert step is not None
    with socket.create_server(("", step.ports[0])):
        tasks = [started(place, evidence, secret, "--deadline=25") for place in range(4)]
        ended = [(task.communicate(timeout=60)[0], task.returncode) for task in tasks]
    assert "pass: 4 nodes" in ended[0][0]
    assert [status for _, status in ended] == [0, 0, 0, 0]


def test_a_stranger_who_talks_nonsense_changes_nothing(evidence: str) -> None:
    secret = uuid.uuid4().hex
    first = started(0, evidence, secret, "--deadline=25")
    step = step_of(
        {**ENVIRONMENT, "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_LAUNCHER_PORT": secret}
    )
    assert step is not None
    for words in (
        b"GET / HTTP/1.0\r\n\r\n",
        f"{step.token}\n[1, 2]\n".encode(),
        f"{step.token}\n{{}}\n".encode(),
    ):
        _say(step, words)
    others = [started(place, evidence, secret) for place in (1, 2, 3)]
    out, _ = first.communicate(timeout=60)
    for task in others:
        task.communicate(timeout=60)
    assert "pass: 4 nodes" in out


def _say(step: Step, words: bytes) -> None:
    for _ in range(1200):
        try:
            with socket.create_connection(("localhost", step.ports[0]), timeout=5) as connection:
                connection.sendall(words)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
                return
        except ConnectionRefusedError:
            import time

            time.sleep(0.05)
    raise AssertionError("the first node does not listen")


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_NODEID"])
def test_outside_of_a_step_a_machine_checks_itself(missing: str) -> None:
    whole = {**ENVIRONMENT, "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
    assert step_of(whole) is not None
    assert step_of({name: text for name, text in whole.items() if name != missing}) is None
    assert step_of({**whole, "SLURM_STEP_NODELIST": "n1"}) is None


def test_every_name_is_looked_up_by_some_node_and_none_looks_up_all() -> None:
    nodes = tuple(f"n{number}" for number in range(1024))
    steps = [Step("token", nodes, place, 0) for place in range(1024)]
    asked = [one.neighbours for one in steps]
    assert {len(names) for names in asked} == {8}
    assert {name for names in asked for name in names} == set(nodes)
