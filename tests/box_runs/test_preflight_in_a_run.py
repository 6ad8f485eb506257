"""A node that the preflight finds is left behind and the run goes on: with a spare, or from the queue.

The faults are real to the process that looks: on one node of the box the checks run in namespaces of their own, with a
full /dev/shm, without a network, without a GPU's device file, or with another torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import badnodes, runs
from launcher import box as boxes
from launcher.outcome import Outcome
from launcher.paths import REPOSITORY
from tests.box_runs.support import FAST, WAIT_SECONDS, Launcher, ended, submit_entrypoint, wait_until
from tests.box_runs.survival import STEPS, job, runs_log, start_now

SHORT = {**STEPS, "steps": 6, "seconds": 0.05}
CHECKS = f'{shlex.quote(sys.executable)} "$@"'
FULL_SHM = "mount -t tmpfs -o size=64m none /dev/shm && head -c 60m /dev/zero > /dev/shm/full"
GPU_FOLDER = (
    "mkdir -p {folder} && touch {folder}/null {file} && mount --bind /dev/null {folder}/null && "
    "mount --bind {folder} /dev"
)


@pytest.fixture(scope="module")
def box() -> Iterator[boxes.Box]:
    """A box of this file's own: a fault waits on n2, which Slurm chooses only where nobody else's job holds it."""
    name = f"preflight-{os.getpid()}"
    yield boxes.up(nodes=4, name=name, gpus=0)
    boxes.down(name)


@pytest.fixture(autouse=True)
def all_nodes_idle(launcher: Launcher) -> None:
    def idle() -> bool:
        return set(launcher.slurm("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}

    wait_until(idle, "the nodes that the test before held")


@pytest.fixture(autouse=True)
def namespaces() -> None:
    if subprocess.run(["unshare", "-rmn", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this kernel lets nobody make namespaces, in which a node's fault is put")


def interpreter(folder: Path, faults: dict[str, str]) -> Path:
    """An interpreter for python=: on the named nodes the checks start with these words of shell before them."""
    cases = "\n".join(
        f"    {node}) exec {words.replace('CHECKS', CHECKS)} ;;" for node, words in faults.items()
    )
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\ncase " $* " in *" -m checks "*) case "$SLURMD_NODENAME" in\n{cases}\nesac ;; esac\n'
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    path.chmod(0o755)
    return path


def with_mounts(shell: str) -> str:
    inside = shlex.quote(f'{shell} && exec "$0" "$@"')
    return f"unshare -rm sh -c {inside} CHECKS"


def another_torch(folder: Path) -> str:
    about = folder / "elsewhere" / "torch-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    return f"env PYTHONPATH={about.parent}:$PYTHONPATH CHECKS"


def fault(name: str, folder: Path) -> str:
    match name:
        case "host.shm":
            return with_mounts(FULL_SHM)
        case "names.master":
            return "unshare -rn CHECKS"
        case _:
            return another_torch(folder)


def submitted(launcher: Launcher, python: Path, *words: str) -> runs.Run:
    return submit_entrypoint(launcher, "tasks_per_node=1", f"python={python}", *words, **SHORT)


def report_of(run: runs.Run, attempt: int) -> dict[str, Any]:
    content = json.loads((run.path / f"attempt-{attempt:02d}" / "preflight.json").read_text())
    assert isinstance(content, dict)
    return content


def on_record(launcher: Launcher) -> dict[str, str]:
    found = launcher("nodes", "--json")
    return {one["node"]: one["reason"] for one in json.loads(found.stdout)}


@pytest.mark.parametrize("check", ["host.shm", "names.master", "same.torch"])
def test_a_spare_takes_the_place_of_a_node_that_fails(launcher: Launcher, tmp_path: Path, check: str) -> None:
    nodes = "nodes=3" if check == "same.torch" else "nodes=2"  # two nodes have no majority
    python = interpreter(tmp_path, {"n2": fault(check, tmp_path)})
    run = submitted(launcher, python, nodes, "spares=1", "preflight=passive")
    first = ended(run)
    assert first["reason"].startswith(f"preflight: n2: {check} fail: ")
    assert (first["cause"], first["tasks_started"], first["action"]) == ("hardware", None, "restarted")
    second = ended(run, 2)
    assert first["excluded"] == ["n2"]
    assert (second["cause"], second["job_id"]) == ("done", first["job_id"])
    assert "n2" not in second["nodes"]
    assert report_of(run, 1)["suspects"] == ["n2"]
    assert report_of(run, 2)["suspects"] == []
    assert check in runs_log(run)
    assert on_record(launcher)["n2"].startswith(f"n2: {check} fail: ")


def test_the_full_preflight_measures_the_nodes_before_the_run_starts_on_them(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "tasks_per_node=1", "nodes=2", "preflight=full", **SHORT)
    assert ended(run)["cause"] == "done"
    reports = report_of(run, 1)["nodes"]
    for node in ("n1", "n2"):
        read = {
            one["check"]: one["verdict"]
            for report in reports
            if report["node"] == node
            for one in report["checks"]
        }
        assert read["host.shm"] == "pass"
        assert (read["burn.product"], read["net.all_reduce"], read["net.pairs"]) == ("pass",) * 3


def patient(folder: Path) -> Path:
    """An interpreter for python= that gives the active tier as much time as the launcher waits for it.

    Four rounds in which three nodes load torch on this machine's few cores, whatever else runs there.
    """
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\ncase " $* " in *" --tier=active "*) set -- "$@" --active-budget=135 ;; esac\n'
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_a_node_that_hangs_with_every_partner_is_named_and_the_run_goes_on_without_it(
    launcher: Launcher, tmp_path: Path
) -> None:
    """Its ranks stop before their first collective, so every node hangs: the rounds of pairs tell whose fault it is."""
    words = ("nodes=3", "spares=1", "preflight=full", "env.CHECKS_TRIAL=n2 stop")
    run = submitted(launcher, patient(tmp_path), *words)
    first = ended(run)
    assert first["reason"].startswith("preflight: n2: net.pairs fail: this node: with "), first
    assert "hung at: all_reduce" in first["reason"]
    assert (first["tasks_started"], first["action"], first["excluded"]) == (None, "restarted", ["n2"])
    assert report_of(run, 1)["suspects"] == ["n2"]
    second = ended(run, 2)
    assert (second["cause"], second["nodes"]) == ("done", ["n1", "n3", "n4"])
    assert report_of(run, 2)["suspects"] == []
    assert list(on_record(launcher)) == ["n2"]


def test_of_a_pair_that_hangs_one_node_is_left_out_and_the_run_says_which_link_and_why(
    launcher: Launcher, tmp_path: Path
) -> None:
    """Of two nodes alone nobody can say whose fault it is: one goes, and a spare takes its place."""
    words = ("nodes=2", "spares=1", "preflight=full", "env.CHECKS_TRIAL=n2 stop")
    run = submitted(launcher, patient(tmp_path), *words)
    first = ended(run, seconds=300)
    assert first["reason"].startswith("preflight: n1 or n2 or what connects them: "), first
    assert "hung at: all_reduce" in first["reason"]
    assert "leaving out n2 leaves no such pair" in first["reason"]
    assert (first["tasks_started"], first["action"], first["excluded"]) == (None, "restarted", ["n2"])
    assert report_of(run, 1)["links"][0]["nodes"] == ["n1", "n2"]
    second = ended(run, 2, seconds=300)
    assert (second["cause"], second["nodes"]) == ("done", ["n1", "n3"])


def put_on_record(launcher: Launcher, node: str) -> None:
    cluster = re.search(
        r"^ClusterName\s*=\s*(\S+)", launcher.slurm("scontrol", "show", "config"), re.MULTILINE
    )
    assert cluster is not None
    run = launcher.run_root / "ch3_ddp-earlier"
    run.mkdir(parents=True)
    found = Outcome("hardware", "…", node, evidence=(f"{node}: gpu.ecc fail: 1",), suspects=(node,))
    badnodes.note_outcome(runs.Run(run), cluster[1], 1, node, found)


def test_a_job_of_sbatch_leaves_a_node_on_record_idle_where_it_has_a_spare_and_says_so_where_it_has_none(
    launcher: Launcher, tmp_path: Path
) -> None:
    """sbatch itself reads no record of ours, and so gets such nodes."""
    put_on_record(launcher, "n1")
    file = tmp_path / "jobs" / "ch3_ddp.sbatch"
    file.parent.mkdir()
    file.write_text(launcher("render", "recipe=ch3_ddp", "cluster=box", "tasks_per_node=1").stdout)
    for nodes, spares, used, says in (
        (3, 1, ["n2", "n3"], "leaving out n1 until 20"),
        (2, 0, ["n1", "n2"], "n1 is on record as bad until 20"),
    ):
        log, known = tmp_path / f"{nodes}.log", set(runs.all_runs([launcher.run_root]))
        nodelist = f"--nodelist=n[1-{nodes}]"
        words = (
            f"--nodes={nodes}",
            nodelist,
            f"--output={log}",
            "--wait",
            str(file),
            f"spares={spares}",
            *FAST,
        )
        launcher.slurm("sbatch", *words)
        (run,) = set(runs.all_runs([launcher.run_root])) - known
        record = ended(run)
        assert (record["cause"], record["nodes"]) == ("done", used), log.read_text()
        assert says in log.read_text()
        assert "because n1: gpu.ecc fail: 1" in log.read_text() or "spares=1): n1: gpu.ecc" in log.read_text()


def test_the_job_file_of_the_preflight_names_the_bad_node_and_measures_them_all(
    launcher: Launcher, tmp_path: Path
) -> None:
    python = interpreter(tmp_path, {"n2": fault("host.shm", tmp_path)})
    log = tmp_path / "preflight.log"
    words = ("--nodes=2", f"--output={log}", "--wait", "jobs/preflight.sbatch", "--gpus=0", "--fabric=tcp")
    done = subprocess.run(
        ["sbatch", *words], env={**launcher.environment, "LAUNCHER_PYTHON": str(python)}, cwd=REPOSITORY,
        capture_output=True, text=True, check=False, timeout=WAIT_SECONDS,
    )  # fmt: skip
    said = log.read_text()
    assert done.returncode == 1, said
    first, _, second = said.partition("preflight: what GPUs and network give")
    assert first.startswith("preflight: what each node has")
    assert re.search(r"^n2 +host\.shm +fail ", first, re.MULTILINE), first
    assert "leave out: sbatch --exclude=n2\n" in first
    assert "net.pairs: pass: n[1-2]: " in second
    assert said.endswith("\npreflight: fail (exit status 1; 0 pass, 1 fail, 2 warn, 3 unknown)\n")
    assert "Exited with exit code" not in said


def test_without_a_spare_the_job_goes_back_into_the_queue_without_the_node(
    launcher: Launcher, tmp_path: Path
) -> None:
    python = interpreter(tmp_path, {"n2": fault("host.shm", tmp_path)})
    run = submitted(launcher, python, "nodes=2", "preflight=passive")
    first = ended(run)
    assert (first["action"], first["excluded"]) == ("requeued", ["n2"])
    wait_until(lambda: job(launcher, run)["Restarts"] == "1", "the requeue")
    start_now(launcher, run)
    second = ended(run, 2)
    assert second["cause"] == "done"
    assert "n2" not in second["nodes"]
    assert job(launcher, run)["ExcNodeList"] == "n2"


def test_a_node_that_the_partition_cannot_spare_stops_the_run_with_the_reason(
    launcher: Launcher, tmp_path: Path
) -> None:
    python = interpreter(tmp_path, {"n2": fault("host.shm", tmp_path)})
    run = submitted(launcher, python, "nodes=4", "preflight=passive")
    record = ended(run)
    assert record["action"] == "stopped"
    assert record["decision"].startswith("n2 cannot be excluded: the job needs 4 nodes")


def test_what_all_nodes_fail_is_no_nodes_fault(launcher: Launcher, tmp_path: Path) -> None:
    broken = fault("host.shm", tmp_path)
    python = interpreter(tmp_path, dict.fromkeys(("n1", "n2", "n3", "n4"), broken))
    run = submitted(launcher, python, "nodes=2", "preflight=passive")
    record = ended(run)
    assert (record["action"], record["excluded"]) == ("stopped", [])
    assert record["reason"].startswith("preflight: on all 2 nodes: host.shm fail: ")
    assert record["decision"].startswith("it is no node's fault")
    assert on_record(launcher) == {}


def test_a_later_submission_leaves_the_node_out_and_says_so_until_it_is_cleared(
    launcher: Launcher, tmp_path: Path
) -> None:
    python = interpreter(tmp_path, {"n2": fault("names.master", tmp_path)})
    run = submitted(launcher, python, "nodes=2", "spares=1", "preflight=passive")
    assert ended(run, 2)["cause"] == "done"
    words = ("submit", "recipe=ch3_ddp", "cluster=box", "tasks_per_node=1", *FAST)
    said = launcher(*words, "nodes=2", "--wait").stdout
    later = runs.all_runs([launcher.run_root])[-1]
    assert "leaving out n2 until 20" in said
    assert "because n2: names.master fail: " in said
    assert "#SBATCH --exclude=n2\n" in later.script_file.read_text()
    assert later.spec().exclude == ()
    assert "n2" not in ended(later)["nodes"]
    # Never more than the partition can afford.
    said = launcher(*words, "nodes=4", "--wait").stdout
    assert "n2 cannot be excluded: the job needs 4 nodes" in said
    shown = launcher("nodes", "n2").stdout
    assert f"{run.id}, attempt 1: {run.path}" in shown
    assert "names.master fail" in shown
    assert "new jobs on box-" in launcher("nodes", "--clear", "n2").stdout
    assert "no node is left out" in launcher("nodes").stdout
    assert "n2 is not on record" in launcher("nodes", "--clear", "n2", status=2).stderr
    assert "leaving out" not in launcher(*words, "nodes=1", "--wait").stdout


@pytest.fixture
def gpu_box(launcher: Launcher, tmp_path: Path) -> Iterator[Launcher]:
    """Three nodes to which Slurm gives a GPU each: links to /dev/null."""
    (tmp_path / "devices").mkdir()
    fakes = [tmp_path / "devices" / f"nvidia{number}" for number in range(3)]
    for fake in fakes:
        fake.symlink_to("/dev/null")
    name = f"lost-gpu-{os.getpid()}"
    made = boxes.up(nodes=3, name=name, gpu_device_files=fakes)
    try:
        environment = {**launcher.environment, **boxes.environment(made), "LAUNCHER_BOX": name}
        yield dataclasses.replace(launcher, environment=environment)
    finally:
        boxes.down(name)


def test_a_node_whose_gpu_fell_off_the_bus_is_left_behind(gpu_box: Launcher, tmp_path: Path) -> None:
    def devices(node: str, file: str) -> str:
        folder = tmp_path / f"dev-{node}"
        return with_mounts(GPU_FOLDER.format(folder=folder, file=folder / file))

    faults = {"n1": devices("n1", "nvidia0"), "n2": devices("n2", "null"), "n3": devices("n3", "nvidia0")}
    run = submitted(gpu_box, interpreter(tmp_path, faults), "nodes=2", "spares=1", "preflight=minimal")
    first, second = ended(run), ended(run, 2)
    assert first["reason"].startswith("preflight: n2: gpus fail: 0 device files")
    assert (first["action"], second["cause"], second["nodes"]) == ("restarted", "done", ["n1", "n3"])


def test_a_record_of_another_cluster_of_the_same_folder_does_not_count(
    launcher: Launcher, tmp_path: Path
) -> None:
    badnodes.clear(launcher.run_root, "elsewhere", ["n2"])
    assert badnodes.clusters(launcher.run_root) == ["elsewhere"]
    assert "no node is left out" in launcher("nodes").stdout
